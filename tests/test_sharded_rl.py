"""Online RL of models in parts, FSDP2's and DeepSpeed's, on two processes against one process.

The samples are the same ids, drawn by the policy itself from seeds of the prompts; rewards, losses, norms of gradients
and the weights after three steps are equal to 1e-5 in float32. One world of gloo processes runs all cases; in each
rollout one process has two prompts and the other has one, so that they do not run equally many forwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

import test_rl
from ranks import run_world, shared_folder
from test_rl import make_tokenizer
from test_sharded_training import check_equal, found_of, fsdp, shards_on_cpu, zero
from test_trainer import PEFT_WARNING, lora, make_model
from xpo_fast.rollout import GenerateRollout, Samples

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

STEPS = 3
PROMPTS = [{"prompt": text} for text in ("w1 w2", "w3", "w4 w5 w6", "w7 w8", "w9")]
LAYOUTS = ["FSDP2", "ZeRO-2", "ZeRO-3"] if sys.platform == "linux" else ["FSDP2"]  # the extra [dev] has DeepSpeed there


class Case(NamedTuple):
    args: dict[str, Any]
    adapted: bool = False
    tied: bool = False
    shift: float = 0.0


PPO = {"method": "ppo", "kl_coef": 0.1, "epochs_per_rollout": 2, "whiten_advantages": False}
CASES = {
    "grpo": Case({}),
    "grpo, tied, by tokens": Case({"tokens_per_batch": 24}, tied=True),
    "grpo, lora": Case({}, adapted=True),
    "grpo, copy": Case({"method_args": {"beta": 0.1}, "reference": "copy"}),
    "grpo, adapter off": Case({"method_args": {"beta": 0.1}}, adapted=True),
    "ppo": Case({**PPO, "value_head_learning_rate": 5e-3}),
    "ppo, lora": Case(PPO, adapted=True),
}


class ByPrompt(GenerateRollout):
    """Draws the completions of each prompt from a seed of its own, however prompts are shared out."""

    updates = 0

    def update(self, model: Any) -> None:
        self.updates += 1
        super().update(model)

    def generate(self, prompts: Any, n: int = 1, *, sampling: Any, seed: int) -> Samples:
        found = []
        for p in prompts:
            drawn = int(hashlib.sha256(f"{p} {self.updates}".encode()).hexdigest()[:6], 16)
            found.append(super().generate([p], n, sampling=sampling, seed=drawn))
        each = [[x for samples in found for x in getattr(samples, name)] for name in Samples.__dataclass_fields__]
        return Samples(*each)


def reward(completion_ids, **_):
    """No reward for some; all of a prompt's may be equal."""
    return [math.nan if ids[0] % 7 == 0 else sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(case: Case, folder: Path, ranks: int, **further: Any) -> Any:
    args = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6 // ranks,
        "num_generations": 4, "prompts_per_rollout": 3, "max_grad_norm": 1.0, "adam_epsilon": 1e-4, "layout": "padded",
        "preflight": "stop", "per_device_eval_batch_size": 3, "eval_generations": 2,
    }  # fmt: skip
    if "tokens_per_batch" in case.args:
        args |= {"per_device_train_batch_size": 12 // ranks, "gradient_accumulation_steps": 1}
    args |= {**case.args, **further, **({"ddp_backend": "gloo"} if ranks > 1 else {})}
    rollout = args.pop("rollout", None)
    model = make_model(tie_word_embeddings=case.tied)
    args["peft_config"] = lora() if case.adapted else None
    trainer = test_rl.make_trainer(folder, reward, model=model, prompts=PROMPTS, **args)
    trainer.rollout = rollout or ByPrompt(trainer.policy, make_tokenizer())
    return trainer


def trained(case: Case, folder: Path, ranks: int, *, resume: str | None = None, **further: Any) -> dict[str, Any]:
    trainer = make(case, folder, ranks, **further)
    trainer.train(resume_from_checkpoint=resume)
    return about(trainer)


def about(trainer: Any) -> dict[str, Any]:
    found = found_of(trainer)
    found["logs"] = [{k: v for k, v in log.items() if not k.startswith("time/")} for log in found["logs"]]
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "samples.jsonl").read_text().splitlines()]
    found["samples"] = [(x["rollout"], x["prompt"], x["completion"], str(x["reward"])) for x in lines]
    return found


def on_two_ranks(folder: Path, rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with shards_on_cpu():
        found |= runs("FSDP2", folder, fsdp())
    if "ZeRO-3" in LAYOUTS:
        import deepspeed

        with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
            for stage in (2, 3):
                found |= runs(f"ZeRO-{stage}", folder, zero(stage))
    return found


def runs(layout: str, folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{layout}, {name}": trained(case, folder / f"{layout}-{name}", 2, **copy.deepcopy(how))
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = shared_folder(tmp_path_factory, "sharded_rl")
    return run_world(folder / "two", 2, partial(on_two_ranks, folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    found: dict[str, Any] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in found:
            found[name] = trained(CASES[name], tmp_path_factory.mktemp("alone"), 1)
        return found[name]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_a_model_in_parts_is_trained_as_a_whole_one(two, alone, layout, name):
    want = alone(name)
    for own in (r[f"{layout}, {name}"] for r in two):
        assert own["samples"] == want["samples"]
        check_equal(own, want)
        assert own["class"].startswith("FSDP") if layout == "FSDP2" else own["class"] == "DeepSpeedEngine"
    if layout == "FSDP2":
        assert sum(r[f"{layout}, {name}"]["parts"] for r in two) == want["parts"]
