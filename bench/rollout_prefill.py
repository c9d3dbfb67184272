"""Times rollouts whose batches read each distinct prompt once against rollouts that read a prompt for each completion.

    python bench/rollout_prefill.py --json bench/results/rollout-prefill.json

SmolLM2-135M in float32, 8 completions of exactly 64 tokens for each prompt of 256 tokens, in a batch of one prompt's
completions and in one of four prompts'. The two ways take turns in one process; a ratio is the median over repeats of
the ratio within a repeat. CPU seconds, of all threads, are given too: where other work shares the cores, it moves them
less than the times (OMP_WAIT_POLICY=PASSIVE keeps waiting threads out of them). Peaks are of what torch allocates for
the first two tokens. Exit status 1: more than 1 completion in 16 differs, or log-probs up to where it does by more than
1e-3.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from xpo_fast.bench.measure import environment, peak_allocated_mib, ratio, table, time_interleaved
from xpo_fast.files import write_json
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.rollout import GenerateRollout, Samples, Sampling

COPIES, PROMPT_TOKENS, NEW_TOKENS = 8, 256, 64
WAYS = EACH, ONCE = "a prompt for each completion", "each prompt once"


def prompts(tokenizer: Any, count: int) -> list[str]:
    """Returns different texts of the same number of tokens, each the opening of a word list."""
    texts = []
    for k in range(count):
        words = " ".join(f"{word} {i * (k + 3)}" for i in range(PROMPT_TOKENS) for word in ("count", "sum", "of"))
        texts.append(tokenizer.decode(tokenizer(words).input_ids[:PROMPT_TOKENS]))
    return texts


def different(a: Samples, b: Samples) -> tuple[int, float]:
    """Returns the number of completions that part, and the largest difference of log-probs up to there."""
    assert a.logps is not None and b.logps is not None
    parted, largest = 0, 0.0
    for x, y, p, q in zip(a.completion_ids, b.completion_ids, a.logps, b.logps, strict=True):
        same = next((i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), len(x))
        parted += same < len(x)
        largest = max([largest, *(abs(s - t) for s, t in zip(p[:same], q[:same], strict=True))])
    return parted, largest


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 4], metavar="N", help="of each batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(SMOLLM2, dtype=torch.float32)
    tokenizer.eos_token = None  # no completion ends early
    model.generation_config.eos_token_id = None

    def sample(count: int, way: str, tokens: int = NEW_TOKENS) -> Samples:
        before = mock.patch("xpo_fast.rollout.generate.each_prompt_once", lambda *_: contextlib.nullcontext())
        with before if way == EACH else contextlib.nullcontext():
            rollout = GenerateRollout(model, tokenizer, batch_size=count * COPIES)
            return rollout.generate(prompts(tokenizer, count), COPIES, sampling=Sampling(tokens), seed=0)

    found, rows, faults = {}, [], 0
    for count in args.prompts:
        peaks_mib = {way: peak_allocated_mib(functools.partial(sample, count, way, 2))[0] for way in WAYS}
        samples: dict[str, Samples] = {}
        cpu_ms: dict[str, list[float]] = {way: [] for way in WAYS}

        def call(_: None, way: str, count: int = count, samples: Any = samples, cpu_ms: Any = cpu_ms) -> None:
            began = time.process_time()
            samples[way] = sample(count, way)
            cpu_ms[way].append((time.process_time() - began) * 1e3)

        calls = {way: functools.partial(call, way=way) for way in WAYS}
        samples_ms = time_interleaved(calls, [None], args.repeats)
        parted, largest = different(samples[EACH], samples[ONCE])
        faults += parted > count * COPIES / 16 or largest > 1e-3
        faster, less = (ratio(x[EACH], x[ONCE]) for x in (samples_ms, cpu_ms))
        found[f"{count * COPIES} completions of {count} prompts"] = {
            "times_ms": samples_ms, "ratio": faster, "cpu_ms": cpu_ms, "cpu_ratio": less, "peaks_mib": peaks_mib,
            "completions_that_differ": parted, "largest_logp_difference": largest,
        }  # fmt: skip
        times = [f"{min(samples_ms[way]) / 1e3:.1f} s, {peaks_mib[way]:.0f} MiB" for way in WAYS]
        rows.append(
            [f"{count * COPIES} of {count}", *times, f"{faster:.2f}", f"{less:.2f}", str(parted), f"{largest:.0e}"]
        )
        if args.json:
            shape = {"copies": COPIES, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
            write_json(args.json, {"environment": environment(), "shape": shape, "batches": found})
    print(
        table(["completions, prompts", *WAYS, "ratio", "of CPU seconds", "completions that differ", "log-probs"], rows)
    )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
