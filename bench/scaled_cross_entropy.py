"""Times Liger's fused scaled cross-entropy and ours, forward and backward, over the bare GEMMs of the same step.

    python bench/scaled_cross_entropy.py --json bench/results/scaled-cross-entropy-cpu.json

The floor multiplies what no implementation can leave out: logits and dH, with a trainable head dW, each once, in the
operands' dtype. Every repeat calls floor, ours and Liger's on the same operands, in turn. Times are of one thread, in
processor time, in which other work on the machine shows little, and medians; a ratio is the median of the repeats'
ratios. On a CPU without bf16 instructions torch's own bf16 products, the floor's and Liger's, take many times as long
as float32 ones, in which ours then multiplies: its ratio to that floor is below 1. Errors are of results and gradients,
in norm, against float64, for an eighth of the tokens. Needs liger-kernel 0.8.5.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpo_fast.bench.measure import environment, ratio, table
from xpo_fast.files import write_json
from xpo_fast.integrations.liger import LigerFusedLinearScaledCrossEntropyFunction as Ours

TOKENS, VOCAB, WIDTH, IDS, TEMPERATURE = 256, 4096, 576, 8, 0.8
FORMS = {"nll": (False, False), "nll, entropy, 8 ids": (True, True)}
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, weight, target, ids


def operands(dtype: torch.dtype, tokens: int) -> Operands:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=g).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH, generator=g) * 3 / WIDTH**0.5).to(dtype)
    target, ids = (torch.randint(0, VOCAB, (n,), generator=g) for n in (tokens, IDS))
    return hidden, weight, target, ids


def step(function: Any, form: str, trains_head: bool) -> Callable[[Operands], dict[str, Tensor]]:
    """Returns a call that computes results and gradients by name."""
    return_entropy, with_ids = FORMS[form]

    def call(given: Operands) -> dict[str, Tensor]:
        hidden, weight, target, ids = given
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(trains_head)]
        out = function.apply(*leaves, target, TEMPERATURE, -100, 1, return_entropy, ids if with_ids else None)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in leaves if x.requires_grad]
        names = ["nll"] + ["entropy"] * return_entropy + ["selected"] * with_ids
        results = dict(zip(names, out, strict=True))
        # nll and the rest pull apart, as a policy loss and a bonus do.
        loss = results["nll"].mean() - sum(x.float().mean() for name, x in results.items() if name != "nll")
        grads = dict(zip(("hidden_grad", "weight_grad"), torch.autograd.grad(loss, wanted), strict=False))
        return {name: x.detach() for name, x in (results | grads).items()}

    return call


def floor(trains_head: bool) -> Callable[[Operands], Tensor]:
    def call(given: Operands) -> Tensor:
        hidden, weight, *_ = given
        logits = hidden @ weight.T
        if trains_head:
            return logits.T @ hidden + (logits @ weight).sum()
        return logits @ weight

    return call


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def processor_times(
    calls: dict[str, Callable[[Operands], Any]], given: Operands, repeats: int
) -> dict[str, list[float]]:
    """Returns milliseconds of processor time by contender, one per repeat; the first of all is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            gc.collect()
            start = time.process_time()
            result = call(given)
            if repeat:
                samples[name].append((time.process_time() - start) * 1e3)
            del result
    return samples


def measure(dtype: torch.dtype, form: str, trains_head: bool, repeats: int) -> dict[str, Any]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

    calls: dict[str, Callable[[Operands], Any]] = {
        "ours": step(Ours, form, trains_head),
        "liger": step(Liger, form, trains_head),
        "floor": floor(trains_head),
    }
    some = operands(dtype, TOKENS // 8)
    hidden, weight, target, ids = some
    exact = calls["ours"]((hidden.double(), weight.double(), target, ids))
    found = {name: call(some) for name, call in calls.items()}
    errors = {name: {what: error(x, exact[what]) for what, x in found[name].items()} for name in ("ours", "liger")}
    del exact, found
    times = processor_times(calls, operands(dtype, TOKENS), repeats)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "results": form,
        "head": "trainable" if trains_head else "frozen",
        "time_ms": {name: statistics.median(samples) for name, samples in times.items()},
        "over_floor": {name: ratio(times[name], times["floor"]) for name in ("ours", "liger")},
        "liger_over_ours": ratio(times["liger"], times["ours"]),
        "error": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for form in FORMS:
            for trains_head in (False, True):
                cases.append(measure(dtype, form, trains_head, arguments.repeats))
                print(".", end="", flush=True)
    print()
    header = ["operands", "results", "head", "ours", "Liger", "ours over floor", "Liger over floor", "Liger/ours"]
    header += ["nll error, ours", "Liger"]
    print(
        table(
            header,
            (
                [c["dtype"], c["results"], c["head"]]
                + [f"{c['time_ms'][name]:.0f} ms" for name in ("ours", "liger")]
                + [f"{c['over_floor'][name]:.2f}" for name in ("ours", "liger")]
                + [f"{c['liger_over_ours']:.2f}"]
                + [f"{c['error'][name]['nll']:.1e}" for name in ("ours", "liger")]
                for c in cases
            ),
        )
    )
    if arguments.json:
        shape = {"tokens": TOKENS, "vocab": VOCAB, "width": WIDTH, "ids": IDS, "temperature": TEMPERATURE}
        settings = {"repeats": arguments.repeats, "threads": torch.get_num_threads()}
        write_json(arguments.json, {"shape": shape, **settings, "cases": cases, "environment": environment()})


if __name__ == "__main__":
    main()
