"""GRPO with samples from a server that speaks OpenAI's API, and what happens when that server is restarted.

    python examples/server_rollout.py
    python examples/server_rollout.py --url http://localhost:8000

Without --url the server is that of policy_server.py, in a thread. With --url it is that one in a process of its own, or
vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. Before every rollout the adapter is saved in a folder
that the server must be able to read, and the server is told to load it. The off-policy weight that is printed is the
ratio of the policy's probability of a token to the server's: 1 if the server samples from the current policy. The
trainer waits for a server that is unreachable for a while. A restarted one comes back without the adapter, which
happens here in the middle of a rollout: the next request is refused, the trainer saves a checkpoint and raises, and a
new trainer continues from there. The reward is the share of an answer's words that are different from each other.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
from typing import Any

from peft import LoraConfig
from policy_server import PolicyServer

from xpo_fast.data import load_prompts
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.rl import RLTrainer
from xpo_fast.rl.config import RLConfig
from xpo_fast.rollout import RolloutError, ServerRollout


def novelty(completions: list[Any], **_: Any) -> list[float]:
    words = [messages[-1]["content"].split() for messages in completions]
    return [len(set(said)) / max(len(said), 1) for said in words]


class Forgetful(PolicyServer):
    """Server that loses its adapters before completion number `at`, as if it had been restarted."""

    at = 21

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions" and self.completions + 1 == self.at:
            self.policies = {"base": self.policies["base"]}
            self.at = 0
        return super().answer(path, body)


def main(model: Any, tokenizer: Any, url: str | None = None, *, steps: int = 5, tokens: int = 32) -> dict[str, Any]:
    """Returns the log of the steps, the errors that stopped the run, the policy and its rollout."""
    folder = tempfile.mkdtemp(prefix="server_rollout-")
    sampling: Any = {"num_generations": 4, "per_device_train_batch_size": 8, "max_new_tokens": tokens}
    optimizer: Any = {"learning_rate": 2e-4, "lr_scheduler_type": "constant", "max_steps": steps}
    args = RLConfig(folder, method="grpo", logging_steps=1, **sampling, **optimizer)

    def trainer(url: str) -> RLTrainer:
        rollout = ServerRollout(url, tokenizer, concurrency=4, push="lora", folder=f"{folder}/adapters")
        operands: Any = {"train_dataset": load_prompts(PAIRS), "processing_class": tokenizer, "rollout": rollout}
        lora = LoraConfig(r=8, target_modules="all-linear")
        return RLTrainer(copy.deepcopy(model), novelty, args, peft_config=lora, **operands)

    stopped = []
    with contextlib.ExitStack() as stack:
        at = url or stack.enter_context(Forgetful(copy.deepcopy(model), tokenizer)).url
        run = trainer(at)
        try:
            run.train()
        except RolloutError as error:
            stopped.append(f"after step {run.state.global_step}: {error}")
            checkpoint = f"{folder}/checkpoint-{run.state.global_step}"
            run = trainer(at)
            run.train(resume_from_checkpoint=checkpoint)
    log = [entry for entry in run.state.log_history if "loss" in entry]
    return {"stopped": stopped, "log": log, "policy": run.model, "rollout": run.rollout}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", help="address of a server of SmolLM2-135M-Instruct on this machine")
    found = main(*load_model(SMOLLM2, dtype="float32"), parser.parse_args().url)
    print(*found["stopped"], "step   reward   off-policy weight", sep="\n")
    for told in found["log"]:
        print(f"{told['step']:>4}{told['reward']:>9.3f}{told['off_policy/weight']:>20.5f}")
