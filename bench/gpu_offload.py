"""Checks and times the levers of memory on a GPU: the stage `offload` of gpu_stages.py.

    python bench/gpu_offload.py --json offload.json
    python bench/gpu_offload.py --quick                 # tiny, on the CPU if there is no GPU, with copies in its memory

A random Llama takes the gradients of pairs of rows of several lengths, one backward behind the other without a wait
between them, as the model is and with its activations moved to the host: all weights trained or an adapter, with
checkpointing or without it, padded and packed. Gradients must be the same bits, or, where the device does not compute
them twice alike, differ by at most twice as much as two runs do. Then a step is timed both ways, in turn, and its peak
is measured. Last, AdamW's steps in the backward are compared with those behind it in the same ways.

Exit status 1: something is wrong or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which cuBLAS computes the same twice

import peft
import torch
from torch import Tensor

import xpo_fast as xf
from gpu import about
from gpu_device import lost, peak_mib, poison, synchronize
from gpu_layouts import DTYPES, SIZES, Size, model_of, rows_of
from report import DEVICE_LOST, Report
from xpo_fast.bench.measure import ratio, table, time_interleaved
from xpo_fast.layouts import Inputs
from xpo_fast.models import Head, install_fused_loss
from xpo_fast.trainer.in_backward import StepsInBackward
from xpo_fast.trainer.offload import CudaCopies, offloading

BATCHES = 4  # whose gradients are added up
REPEATS = 5
STEPS = 3  # of the optimizer


class HostCopies:
    """`Copies` where there is no GPU: they are made at once."""

    device = torch.device("cpu")

    def leave(self, here: Tensor) -> tuple[Tensor, None]:
        """Returns a copy."""
        return here.clone(), None

    def come_back(self, there: Tensor) -> tuple[Tensor, None]:
        """Returns a copy."""
        return there.clone(), None

    def wait(self, event: None) -> None:
        """Has nothing to wait for."""


def made(size: Size, dtype: str, *, adapted: bool, checkpointing: bool, device: torch.device) -> Any:
    """Returns a random model, of which everything is trained or an adapter."""
    model = model_of(size, DTYPES[dtype], "sdpa", device)
    if adapted:
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        install_fused_loss(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def backward(model: Any, objective: xf.Objective, rows: Inputs) -> None:
    """Adds a step's gradients to those that are there."""

    def score(hidden: Tensor, head: Head) -> Tensor:
        return objective(hidden, head, rows.targets).loss

    rows.run(model, score).backward()


def gradients(model: Any, batches: Sequence[Inputs], copies: Any) -> dict[str, Tensor]:
    """Returns the sums of the gradients of the batches. copies: to the host, or None."""
    objective = xf.Objective("simpo")
    model.zero_grad()
    with contextlib.nullcontext() if copies is None else offloading(model, copies):
        for rows in batches:
            backward(model, objective, rows)
    synchronize(batches[0].input_ids.device)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Returns ‖a − b‖/‖a‖ over all tensors; 0 only for equal bits; infinity if one has others than the other."""
    if a.keys() != b.keys():
        return float("inf")
    squares = [sum(float(x.double().square().sum()) for x in y) for y in (a.values(), [a[n] - b[n] for n in a])]
    return (squares[1] / squares[0]) ** 0.5


def offload(case: dict[str, Any], size: Size, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Returns the record of a case: whether gradients are right, then the peak and time of a step, plain and moved."""
    how = {"adapted": case["trained"] == "adapter", "checkpointing": case["checkpointing"]}
    model = made(size, case["dtype"], device=device, **how)
    copies: Any = CudaCopies(device) if device.type == "cuda" else HostCopies()
    batches = [rows_of(size, case["layout"], args.seed + k, device) for k in range(BATCHES)]
    found = []
    for through in (None, None, copies):
        poison(device)
        found.append(gradients(model, batches, through))
    first, again, through_host = found
    repeat, moved = difference(first, again), difference(first, through_host)
    record = {**case, "repeat": repeat, "difference": moved, "right": moved <= 2 * repeat}
    del found, first, again, through_host

    def step(rows: Inputs, *, copies: Any) -> dict[str, Tensor]:
        gradients(model, [rows], copies)
        return {}

    calls = {"plain": partial(step, copies=None), "moved": partial(step, copies=copies)}
    record["peak_mib"] = {name: peak_mib(partial(call, batches[0]), device) for name, call in calls.items()}
    samples = time_interleaved(calls, batches[:2], 2 if args.quick else REPEATS)
    record |= {"samples_ms": samples, "time": ratio(samples["moved"], samples["plain"])}
    return record


def in_backward(case: dict[str, Any], size: Size, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Returns the record of AdamW's steps in the backward against those behind it: the weights, and the peak."""
    batches = [rows_of(size, case["layout"], args.seed + k, device) for k in range(STEPS)]
    start = made(size, case["dtype"], adapted=False, checkpointing=case["checkpointing"], device=device)
    objective = xf.Objective("simpo")

    def run(*, inside: bool) -> tuple[dict[str, Tensor], float | None]:
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
        steps = StepsInBackward(optimizer) if inside else None

        def step(rows: Inputs) -> dict[str, Tensor]:
            if steps is None:
                backward(model, objective, rows)
                optimizer.step()
            else:
                with steps.stepping():
                    backward(model, objective, rows)
            model.zero_grad()
            return {}

        for rows in batches[:-1]:
            step(rows)
        peak = peak_mib(partial(step, batches[-1]), device)
        return {n: p.detach() for n, p in model.named_parameters()}, peak

    (first, plain), (again, _), (found, inside) = (run(inside=x) for x in (False, False, True))
    repeat, moved = difference(first, again), difference(first, found)
    about_it = {"repeat": repeat, "difference": moved, "right": moved <= 2 * repeat}
    return {**case, **about_it, "peak_mib": {"plain": plain, "moved": inside}}


def cases(quick: bool) -> Iterator[tuple[Any, Size, dict[str, Any]]]:
    """Yields the check, the size and the settings of each case."""
    for size in SIZES[:1] if quick else SIZES:
        for dtype in list(DTYPES)[:1] if quick else DTYPES:
            for layout in ("padded", "packed"):
                for trained in ("all", "adapter"):
                    for checkpointing in (False, True):
                        case = {"model": size.name, "dtype": dtype, "layout": layout, "trained": trained}
                        yield offload, size, {"lever": "offload", **case, "checkpointing": checkpointing}
            case = {"model": size.name, "dtype": dtype, "layout": "padded", "trained": "all", "checkpointing": True}
            yield in_backward, size, {"lever": "in backward", **case}


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE during the run")
    parser.add_argument("--quick", action="store_true", help="try this script: the tiny model in float32")
    parser.add_argument("--commit", help="commit to record if there is no git")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="seed of the data (default: fresh)")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.quick:
        print("no GPU: --quick tries this script on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    report = Report(args.json, environment=about(device, args), offload=[])
    records, problems = report.content["offload"], report.content["problems"]
    for check, size, case in cases(args.quick):
        where = ", ".join(map(str, case.values()))
        report.begin(where)
        try:
            records.append(check(case, size, args, device))
            if not records[-1]["right"]:
                problems.append(f"wrong: {where}")
        except Exception as error:  # the other cases can still run
            problems.append(f"{where}: {type(error).__name__}: {error}"[:500])
            if lost(device):
                report.save()
                return DEVICE_LOST
    report.end()
    print(table((*next(cases(True))[2], "repeat", "difference", "peak_mib", "time"), map(_cells, records)))
    print("\n".join(problems))
    return 1 if problems else 0


def _cells(record: dict[str, Any]) -> list[str]:
    """Returns a record's cells: the peaks as plain → moved, and the time as moved over plain."""
    known = [str(x) for name, x in record.items() if name in next(cases(True))[2]]
    errors = [f"{record[name]:.2g}" for name in ("repeat", "difference")]
    peaks = " → ".join("-" if x is None else f"{x:.0f}" for x in record["peak_mib"].values())
    return [*known, *errors, peaks, f"{record['time']:.2f}" if "time" in record else "-"]


if __name__ == "__main__":
    sys.exit(main())
