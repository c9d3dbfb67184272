"""Runs GRPO by completions of `transformers serve` beside the same by the model's own, with the same seeds.

    python bench/server_rollout.py --json bench/results/server-rollout.json
    python bench/server_rollout.py --tiny --steps 2 --seeds 0 --json /tmp/server-rollout.json

The model is SmolLM2-135M-Instruct in float32 with full fine-tuning, the reward the share of a completion's letters that
are vowels, 20 steps of 4 prompts × 4 completions of 16 tokens. Before every rollout the policy is saved into a folder,
which the server loads; the server is started and ended here. Runs that the file has are not repeated, and it is written
after each. Reported: the reward of the first and of the last fifth of the steps, each with the standard error over
those steps of all seeds, and seconds a step. --tiny takes a random model of two layers instead.
Exit status 1: the last rewards of the two differ by more than three standard errors.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xpo_fast.bench.measure import environment, read_json, table
from xpo_fast.data import load_prompts
from xpo_fast.demo_data import PAIRS
from xpo_fast.files import write_json
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.rl import RLTrainer
from xpo_fast.rl.config import RLConfig
from xpo_fast.rollout import TransformersRollout

SAMPLERS = ("embedded", "served")
SERVE = "from transformers.cli.transformers import app; app()"


def vowels(completions: list[Any], **_: Any) -> list[float]:
    """Returns the share of each completion's letters that are vowels: it varies, whatever the model."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    letters = [[x for x in text.lower() if x.isalpha()] for text in texts]
    return [sum(x in "aeiou" for x in row) / max(len(row), 1) for row in letters]


def tiny() -> tuple[Any, Any]:
    """Returns a random Llama of two layers with SmolLM2's tokenizer."""
    import torch
    import transformers

    _, tokenizer = load_model(SMOLLM2)
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)
    return transformers.LlamaForCausalLM(config), tokenizer


@contextlib.contextmanager
def served(start_s: float = 900.0) -> Iterator[str]:
    """Yields the address of a `transformers serve` of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", "--host", "127.0.0.1", "--port", str(port)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **quiet)
    try:
        until = time.monotonic() + start_s
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        else:
            raise RuntimeError("transformers serve did not start: pip install 'transformers[serving]'")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def run(sampler: str, seed: int, args: argparse.Namespace, url: str) -> dict[str, Any]:
    """Returns a run's rewards and seconds by step."""
    model, tokenizer = tiny() if args.tiny else load_model(SMOLLM2, dtype="float32")
    prompts = load_prompts(PAIRS)
    with tempfile.TemporaryDirectory(prefix="server-rollout-") as folder:
        sizes: Any = {"per_device_train_batch_size": 16, "num_generations": 4, "max_new_tokens": args.tokens}
        rest: Any = {"save_strategy": "no", "logging_steps": 1, "log_samples": False, "disable_tqdm": True}
        rest |= {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "max_steps": args.steps, "seed": seed}
        config = RLConfig(f"{folder}/run", method="grpo", **sizes, **rest)
        rollout = TransformersRollout(url, tokenizer, folder=f"{folder}/policies") if sampler == "served" else None
        operands: Any = {"train_dataset": prompts, "processing_class": tokenizer, "rollout": rollout}
        trainer = RLTrainer(model, vowels, config, **operands)
        began = time.perf_counter()
        trainer.train()
        step_s = (time.perf_counter() - began) / args.steps
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    rewards = [entry["reward"] for entry in log]
    lengths = [entry["completions/mean_length"] for entry in log]
    return {"sampler": sampler, "seed": seed, "reward": rewards, "length": lengths, "step_s": step_s}


def mean_and_error(runs: list[dict[str, Any]], part: slice) -> tuple[float, float]:
    """Returns the mean of the rewards of these steps of all runs, and its standard error over steps and runs."""
    values = [x for run in runs for x in run["reward"][part]]
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    settings = {"steps": args.steps, "tokens": args.tokens, "tiny": args.tiny}
    result = read_json(args.json) if args.json.is_file() else {"environment": environment(), **settings, "runs": []}
    if {name: result[name] for name in settings} != settings:
        parser.error(f"{args.json} holds runs of other settings than {settings}: name another file")
    done = {(run["sampler"], run["seed"]) for run in result["runs"]}
    todo = [(s, seed) for seed in args.seeds for s in SAMPLERS if (s, seed) not in done]
    with served() if any(s == "served" for s, _ in todo) else contextlib.nullcontext("") as url:
        for sampler, seed in todo:
            result["runs"].append(run(sampler, seed, args, url))
            write_json(args.json, result)
    rows, last = [], {}
    part = max(args.steps // 5, 1)
    for sampler in SAMPLERS:
        runs = [r for r in result["runs"] if r["sampler"] == sampler]
        first, last[sampler] = (mean_and_error(runs, x) for x in (slice(0, part), slice(-part, None)))
        step_s = sum(r["step_s"] for r in runs) / len(runs)
        shown = [f"{mean:.3f} ± {error:.3f}" for mean, error in (first, last[sampler])]
        rows.append([sampler, str(len(runs)), *shown, f"{step_s:.2f}"])
    print(table(["sampler", "runs", "first reward", "last reward", "s per step"], rows))
    (a, e), (b, f) = last.values()
    return int(abs(a - b) > 3 * math.hypot(e, f))


if __name__ == "__main__":
    sys.exit(main())
