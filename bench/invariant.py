"""Times invariant=True against the default, and counts the rows whose log-probs have other bits alone than in a batch.

    OMP_NUM_THREADS=1 python bench/invariant.py --json bench/results/invariant-cpu.json

Shapes are N×D×V as in the head's benchmarks, with one of them of a single row. The two take turns in one process; a
ratio is the median over repeats of the ratio within a repeat, of CPU seconds, since those of the wall move with other
work on the cores. Exit status 1: a row has other bits with invariant=True, or its log-probs are further from float64
than 1e-4.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xpo_fast as xf
from xpo_fast.bench.measure import environment, ratio, table, time_interleaved
from xpo_fast.bench.problem import IGNORE, ROWS, Batch, Shape, make_batch, make_weight
from xpo_fast.files import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALLS = "log-probs", "frozen head", "trainable head"
ALLOWED = 1e-4


def call(batch: Batch, kind: str, invariant: bool) -> Tensor:
    """Computes log-probs alone, with the gradient of hidden states, or SimPO's loss with both gradients."""
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    if kind == "log-probs":
        return xf.token_logps(hidden, weight, batch.targets, invariant=invariant)
    hidden.requires_grad_()
    weight.requires_grad_(kind == "trainable head")
    objective = xf.Objective("simpo", invariant=invariant)
    loss = objective(hidden, weight, batch.targets).loss
    loss.backward()
    return loss


def other_bits(batch: Batch, invariant: bool) -> int:
    """Counts the rows whose log-probs differ, alone and in the batch, in any of the pieces that a row is cut into."""
    want, count = call(batch, "log-probs", invariant), 0
    for row in range(batch.targets.shape[0]):
        pieces = [slice(0, 1), slice(1, 4), slice(4, None)]
        for at in pieces:
            hidden, targets = batch.hidden[row : row + 1, at], batch.targets[row : row + 1, at]
            found = xf.token_logps(hidden, batch.weight, targets, invariant=invariant)
            if not torch.equal(found, want[row : row + 1, at]):
                count += 1
                break
    return count


def off_float64(batch: Batch, invariant: bool) -> float:
    """Returns the largest distance of the first row's log-probs from float64's."""
    found = xf.token_logps(batch.hidden, batch.weight, batch.targets, invariant=invariant)[0]
    logits = batch.hidden[0].double() @ batch.weight.double().T
    want = logits.log_softmax(-1).gather(-1, batch.targets[0, :, None].clamp(min=0))[:, 0]
    return float((found - want.where(batch.targets[0] != IGNORE, 0)).abs().max())


def measured(batch: Batch, kind: str, repeats: int) -> dict[str, Any]:
    """Returns the times of the default and of invariant=True, in milliseconds of the wall and of the CPU."""
    cpu_ms: dict[str, list[float]] = {"default": [], "invariant": []}

    def timed(_: None, name: str) -> None:
        began = time.process_time()
        call(batch, kind, name == "invariant")
        cpu_ms[name].append((time.process_time() - began) * 1e3)

    calls = {name: functools.partial(timed, name=name) for name in cpu_ms}
    for warm in calls.values():
        warm(None)
    for samples in cpu_ms.values():
        samples.clear()
    times_ms = time_interleaved(calls, [None], repeats)
    found = ratio(cpu_ms["invariant"], cpu_ms["default"])
    return {"times_ms": times_ms, "cpu_ms": cpu_ms, "cpu_ratio": found}


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x576x49152", "64x576x49152"], metavar="NxDxV")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, found, faults = [], {}, 0
    for text in args.shapes:
        shape = Shape.parse(text)
        for name, dtype in DTYPES.items():
            weight = make_weight(shape.vocab, shape.width, dtype)
            batch = make_batch(weight, ROWS, shape.scored // ROWS, 0, seed=0)
            bits = {way: other_bits(batch, way == "invariant") for way in ("default", "invariant")}
            off = {way: off_float64(batch, way == "invariant") for way in bits}
            faults += bits["invariant"] > 0 or off["invariant"] > ALLOWED
            for kind in CALLS:
                key = f"{shape} {name}, {kind}"
                found[key] = {**measured(batch, kind, args.repeats), "rows_with_other_bits": bits, "off_float64": off}
                times = [f"{statistics.median(found[key]['cpu_ms'][way]):.0f}" for way in bits]
                counts = [f"{bits[way]} of {ROWS}" for way in bits]
                rows.append([key, *times, f"{found[key]['cpu_ratio']:.2f}", *counts, f"{off['invariant']:.0e}"])
                if args.json:
                    write_json(args.json, {"environment": environment(), "calls": found})
    header = ["", "default, CPU ms", "invariant", "ratio", "rows with other bits", "invariant", "off float64"]
    print(table(header, rows))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
