"""Runs GRPO by completions of `transformers serve` beside the same by the model's own, and kills the server in runs.

    python bench/server_rollout.py --json bench/results/server-rollout.json
    python bench/server_rollout.py --tiny --steps 2 --seeds 0 --kills 1 --json /tmp/server-rollout.json

The model is SmolLM2-135M-Instruct in float32 with full fine-tuning, the reward the share of a completion's letters that
are vowels, 20 steps of 4 prompts × 4 completions of 16 tokens. Before every rollout the policy is saved into a folder,
which the server loads; the server is started and ended here. Runs that the file has are not repeated, and it is written
after each. Reported: the reward of the first and of the last fifth of the steps, each with the standard error over
those steps of all seeds, and seconds per step. --tiny takes a random model of two layers instead.

--kills N: N further runs through the server, of --kill-steps steps, in each of which the server is killed (SIGKILL) at
a random time and started again; their prompts, completions, rewards and final weights are compared with those of one
run whose server is left alone. Each completion has a seed of its own, so that they must be the same.
Exit status 1: the last rewards of the two samplers differ by more than three standard errors, or a killed run differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from xpo_fast.bench.measure import environment, read_json, table
from xpo_fast.data import load_prompts
from xpo_fast.demo_data import PAIRS
from xpo_fast.files import write_json
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.rl import RLTrainer
from xpo_fast.rl.config import RLConfig
from xpo_fast.rl.sample_log import SAMPLES_FILE
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


class Server:
    """A `transformers serve` of its own, as a context: started at the beginning and killed at the end."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts the process, and does not wait until it answers."""
        command = [sys.executable, "-c", SERVE, "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **quiet)

    def kill(self) -> None:
        """Kills the process by SIGKILL."""
        self.process.kill()
        self.process.wait()

    def __enter__(self, start_s: float = 900.0) -> Server:
        self.start()
        until = time.monotonic() + start_s
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(0.5)
        self.kill()
        raise RuntimeError("transformers serve did not start: pip install 'transformers[serving]'")

    def __exit__(self, *error: object) -> None:
        self.kill()


def run(url: str | None, seed: int, args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Returns a run's rewards by step, its seconds, and digests of its samples and of its weights at the end."""
    model, tokenizer = tiny() if args.tiny else load_model(SMOLLM2, dtype="float32")
    prompts = load_prompts(PAIRS)
    with tempfile.TemporaryDirectory(prefix="server-rollout-") as folder:
        sizes: Any = {"per_device_train_batch_size": 16, "num_generations": 4, "max_new_tokens": args.tokens}
        rest: Any = {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "report_to": "none"}
        rest |= {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "max_steps": steps, "seed": seed}
        config = RLConfig(f"{folder}/run", method="grpo", **sizes, **rest)
        rollout = None if url is None else TransformersRollout(url, tokenizer, folder=f"{folder}/policies")
        operands: Any = {"train_dataset": prompts, "processing_class": tokenizer, "rollout": rollout}
        trainer = RLTrainer(model, vowels, config, **operands)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        samples = Path(f"{folder}/run", SAMPLES_FILE).read_bytes()
    weights = b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "sampler": "embedded" if url is None else "served",
        "seed": seed,
        "reward": [entry["reward"] for entry in log],
        "length": [entry["completions/mean_length"] for entry in log],
        "seconds": seconds,
        "completions": samples.count(b"\n"),
        "samples": hashlib.sha256(samples).hexdigest(),
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def killed(server: Server, after_s: float, args: argparse.Namespace) -> dict[str, Any]:
    """Returns a run through a server that is killed `after_s` seconds after its beginning, and started again."""
    timer = threading.Timer(after_s, lambda: (server.kill(), server.start()))
    timer.start()
    try:
        found = run(server.url, 0, args, args.kill_steps)
    finally:
        timer.join()
    return found | {"killed_after_s": after_s}


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
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kill-steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    settings = {name: getattr(args, name) for name in ("steps", "tokens", "kill_steps", "tiny")}
    empty = {"environment": environment(), **settings, "runs": [], "undisturbed": None, "killed": []}
    result = read_json(args.json) if args.json.is_file() else empty
    if {name: result[name] for name in settings} != settings:
        parser.error(f"{args.json} holds runs of other settings than {settings}: name another file")
    with Server() as server:
        for seed in args.seeds:
            for sampler, url in (("embedded", None), ("served", server.url)):
                if not any((run["sampler"], run["seed"]) == (sampler, seed) for run in result["runs"]):
                    result["runs"].append(run(url, seed, args, args.steps))
                    write_json(args.json, result)
        if args.kills and result["undisturbed"] is None:
            result["undisturbed"] = run(server.url, 0, args, args.kill_steps)
            write_json(args.json, result)
        times = random.Random()  # its own: the trainer seeds the global one
        while len(result["killed"]) < args.kills:
            at = times.uniform(0.05, 0.95) * result["undisturbed"]["seconds"]
            found = killed(server, at, args)
            if found["seconds"] > at:  # else it had ended before
                result["killed"].append(found)
                write_json(args.json, result)
    return report(result, args)


def report(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Prints the tables of a result, and returns the exit status."""
    rows, last = [], {}
    part = max(args.steps // 5, 1)
    for sampler in SAMPLERS:
        runs = [r for r in result["runs"] if r["sampler"] == sampler]
        first, last[sampler] = (mean_and_error(runs, x) for x in (slice(0, part), slice(-part, None)))
        step_s = sum(r["seconds"] for r in runs) / len(runs) / args.steps
        shown = [f"{mean:.3f} ± {error:.3f}" for mean, error in (first, last[sampler])]
        rows.append([sampler, str(len(runs)), *shown, f"{step_s:.2f}"])
    print(table(["sampler", "runs", "first reward", "last reward", "s per step"], rows))
    (a, e), (b, f) = last.values()
    apart = abs(a - b) > 3 * math.hypot(e, f)
    whole = result["undisturbed"]
    parts = ("completions", "samples", "reward", "weights")
    differing = [run for run in result["killed"] if any(run[name] != whole[name] for name in parts)]
    rows = []
    for i, found in enumerate(result["killed"], 1):
        same = ["yes" if found[name] == whole[name] else "no" for name in parts[1:]]
        seconds = [f"{found[name]:.1f}" for name in ("killed_after_s", "seconds")]
        rows.append([str(i), *seconds, str(found["completions"]), *same])
    if rows:
        names = ["run", "killed after s", "seconds", "completions", "same samples", "same rewards", "same weights"]
        print(f"\nundisturbed: {whole['completions']} completions in {whole['seconds']:.1f} s")
        print(table(names, rows))
    return int(apart or bool(differing))


if __name__ == "__main__":
    sys.exit(main())
