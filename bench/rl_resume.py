"""Compares an online run that is killed and resumed many times with an undisturbed one: all results have equal bits.

    python bench/rl_resume.py --kills 10 --steps 60 --json bench/results/rl-resume-cpu.json

A tiny random model, or SmolLM2 with an adapter (--task smollm2), is trained with PPO, which has the most state of all
methods: two epochs over two minibatches of each rollout, a critic, an adaptive KL, a reference that follows the policy.
The run is a process of its own, forked from one that has only imported what it needs. It gets SIGKILL a random time
after a random step, ten times, during rollouts, steps and the writing of checkpoints, and is resumed from the last
complete checkpoint. The weights, every logged number except times, the held-out reward, and the table of samples are
compared. Exit status 1: anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = [{"prompt": f"w{i} w{i + 1}"} for i in range(0, 20, 2)]


def share_of_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns the share of even tokens in each completion, a reward."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def tiny() -> dict[str, Any]:
    """Returns a random model of two layers, which is trained whole and has dropout, with its data and settings."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(94))])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.3, attention_dropout=0.1, **SMALL)
    return {
        "model": transformers.LlamaForCausalLM(config),
        "rewards": share_of_even,
        "args": {"max_new_tokens": 6, "learning_rate": 3e-3},
        "train_dataset": PROMPTS,
        "eval_dataset": PROMPTS,
        "processing_class": tokenizer,
    }


def smollm2() -> dict[str, Any]:
    """Returns SmolLM2-135M in bfloat16 with an adapter, to be trained on the sums of examples/verifiable_reward.py."""
    from peft import LoraConfig

    from xpo_fast.models import SMOLLM2, load_model

    example = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples" / "verifiable_reward.py"))
    model, tokenizer = load_model(SMOLLM2, dtype="bfloat16")
    return {
        "model": model,
        "rewards": example["correct"],
        "args": {"max_new_tokens": 12, "learning_rate": 1.5e-4},
        "train_dataset": example["sums"](64, 0),
        "eval_dataset": example["sums"](16, -1),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"),
    }


def train(folder: Path, steps: int, method: str, task: str, done: Any) -> None:
    """Trains from the last checkpoint, if there is one; sends `done` each step, and writes result.json at the end."""
    import torch
    import transformers

    from xpo_fast.rl import RLTrainer, last_checkpoint
    from xpo_fast.rl.config import RLConfig

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends
    torch.set_num_threads(1)
    given = TASKS[task]()

    class Say(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done.send(state.global_step)

    options: dict[str, Any] = {"kl_coef": 0.05, "kl_target": 0.5, "kl_horizon": 100, "ref_mixin": 0.1}
    trainer = RLTrainer(
        given.pop("model"),
        given.pop("rewards"),
        RLConfig(
            str(folder),
            method=method,
            num_generations=4,
            prompts_per_rollout=4,
            epochs_per_rollout=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=steps,
            save_steps=3,
            save_total_limit=2,
            logging_steps=5,
            use_cpu=True,
            disable_tqdm=True,
            **options,
            **given.pop("args"),
        ),
        callbacks=[Say()],
        **given,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    timeless = [
        {k: v for k, v in log.items() if "time" not in k and "_per_second" not in k}
        for log in trainer.state.log_history
    ]
    held_out = {k: v for k, v in trainer.evaluate().items() if "time" not in k}
    digest = hashlib.sha256()
    for _, x in sorted(trainer.model.state_dict().items()):
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    # For these two Trainer only counts what it has trained since it was resumed.
    last = [{k: v for k, v in log.items() if k not in ("train_loss", "total_flos")} for log in timeless]
    samples = hashlib.sha256((folder / "samples.jsonl").read_bytes()).hexdigest()
    result = {"weights": digest.hexdigest(), "held_out": held_out, "log": last, "samples": samples}
    (folder / "result.json").write_text(json.dumps(result))


TASKS = {"tiny": tiny, "smollm2": smollm2}


def run(folder: Path, args: argparse.Namespace, kills: int, chance: random.Random) -> tuple[dict[str, Any], list[int]]:
    """Runs the training, kills it a number of times, and returns its result and the steps after which it was killed."""
    steps = args.steps
    processes = multiprocessing.get_context("forkserver")
    killed: list[int] = []
    targets = sorted(
        chance.sample(range(1, steps * 3 // 4), kills)
    )  # early enough that the run does not end before the last one
    while True:
        seen, done = processes.Pipe(duplex=False)
        child = processes.Process(target=train, args=(folder, steps, args.method, args.task, done))
        child.start()
        done.close()  # so that the child's end is the last
        target = targets[len(killed)] if len(killed) < kills else steps + 1
        for step in _received(seen):
            if step >= target:
                time.sleep(chance.uniform(0, 0.2))
                if child.is_alive():
                    child.kill()
                    killed.append(step)
                break
        child.join()
        seen.close()
        if child.exitcode == 0:
            return json.loads((folder / "result.json").read_text()), killed
        if child.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the run failed with status {child.exitcode}")


def _received(seen: Any) -> Iterator[int]:
    """Yields what a process sends until it ends."""
    with contextlib.suppress(EOFError):
        while True:
            yield seen.recv()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Returns the names of the results that differ."""
    return [name for name in a if a[name] != b[name]]


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--method", default="ppo")
    parser.add_argument("--task", choices=TASKS, default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times at which the run is killed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Of the processes; what one that is killed leaves behind is removed, without a word.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}
    imports = ["torch", "peft", "transformers.models.llama.modeling_llama", "transformers.trainer", "xpo_fast.rl"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(imports)
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as beside:
        other = beside.submit(run, Path(folder) / "alone", args, 0, chance)
        resumed, killed = run(Path(folder) / "killed", args, args.kills, chance)
        alone, _ = other.result()
    wrong = differences(alone, resumed)
    print(f"{args.task}, {args.method}, {args.steps} steps, killed after steps {killed}: ", end="")
    print(f"{', '.join(wrong)} differ" if wrong else "weights, log, held-out reward and samples are the same")
    if args.json is not None:
        from xpo_fast.bench.measure import environment
        from xpo_fast.files import write_json

        about = {"task": args.task, "method": args.method, "steps": args.steps, "seed": args.seed}
        about["killed_after_steps"] = killed
        write_json(
            args.json, {**about, "different": wrong, "held_out": resumed["held_out"], "environment": environment()}
        )
    return 1 if wrong or len(killed) < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
