"""Benchmarks the head on a CPU in one run: ours, the bare products, the materialised loss, TRL, Liger, torch.

    python bench/head.py --memory --json bench/results/head-cpu.json

All run forward and backward on the same operands and threads. Correctness comes first: every contender is compared with
float64 on the same operands, and ours is not timed if it is outside its tolerance. Then each repeat calls every
contender in turn. A ratio of times is the median over repeats of the ratio within a repeat.

Exit status 1: ours is outside its tolerance or exceeds its memory bound, or a contender is missing (unless
--skip-missing).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import memory
from contenders import Contender, Missing, make_contenders, make_floor
from measure import environment, ratio, table, time_interleaved
from problem import CASES, ROWS, Case, Results, float64_truth, make_batch, make_weight
from xpo_fast.files import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest absolute error of a log-prob; for the others, the norm of the error divided by the norm of the truth.
# 2⁻⁸ is the largest relative error of one rounding to bf16.
TOLERANCES = {
    "fp32": {"logps": 2e-5, "loss": 1e-5, "hidden_grad": 1e-5, "weight_grad": 1e-5},
    "bf16": {"logps": 1e-3, "loss": 1e-3, "hidden_grad": 2**-8, "weight_grad": 2**-8},
}
FLOOR = "floor: the products alone"
FLOOR_NEW = "the same, gradients into new memory"
BATCHES = 3  # used in turn by the repeats


class Shape(NamedTuple):
    """The sizes of a head's problem, written N×D×V."""

    scored: int  # N
    width: int  # D
    vocab: int  # V

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Returns the shape that a text such as 1024x576x49152 names; raises argparse.ArgumentTypeError for others."""
        try:
            shape = cls(*map(int, text.split("x")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"expected NxDxV (scored tokens, width, vocabulary) such as 1024x576x49152, got {text!r}"
            ) from None
        if shape.scored % ROWS or min(shape) < 1:
            raise argparse.ArgumentTypeError(f"expected N to be a multiple of {ROWS}, the number of rows, got {text!r}")
        return shape

    def __str__(self) -> str:
        return "×".join(map(str, self))

    @property
    def gemm_flop(self) -> int:
        """Returns the FLOP of one product of the head."""
        return 2 * self.scored * self.width * self.vocab


SHAPES = [Shape(1024, 576, 49152), Shape(512, 4096, 128256)]
QUICK_SHAPE = Shape(64, 40, 1009)


class Aim(NamedTuple):
    """The baseline's time divided by ours should be at least `speedup`."""

    case: str
    baseline: str
    speedup: float
    dtypes: tuple[str, ...] = ("fp32", "bf16")


AIMS = (
    Aim("frozen", FLOOR, 1 / 1.10, ("fp32",)),
    Aim("frozen", "materialised", 1.0),
    Aim("frozen", "TRL", 3.0),
    Aim("dpo", FLOOR, 1 / 1.15, ("fp32",)),
    Aim("dpo-accumulated", FLOOR, 1 / 1.15, ("fp32",)),
    Aim("dpo", "materialised", 1.0),
    Aim("dpo", "TRL", 2.0),
    Aim("dpo-prompts", "Liger", 2.5),
)


def run_case(
    shape: Shape, dtype: str, name: str, weight: Tensor, repeats: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Checks, then times every contender of a case; returns a record per contender, and why others are missing."""
    case = CASES[name]
    length = shape.scored // ROWS * (2 if case.prompts else 1)
    batches = [make_batch(weight, ROWS, length, case.prompts, seed) for seed in range(BATCHES)]
    contenders, missing = _available(case)
    truth = float64_truth(batches[0], case)
    errors = {name: errors_of(made.call(batches[0]), truth) for name, made in contenders.items()}  # and warm-up
    del truth
    outside = {name: _outside(errors[name], dtype) for name, made in contenders.items() if made.ours}

    floors = {FLOOR: make_floor(batches[0], case)}
    if case.train_head and not case.accumulated:
        floors[FLOOR_NEW] = make_floor(batches[0], case, new_gradients=True)
    for floor in floors.values():
        floor.call(batches[0])
    contenders = {**floors, **contenders}
    timed = {name: made.call for name, made in contenders.items() if not outside.get(name)}
    samples_ms = time_interleaved(timed, batches, repeats)
    records = []
    for contender, made in contenders.items():
        record: dict[str, Any] = {
            "shape": shape._asdict(),
            "dtype": dtype,
            "case": name,
            "contender": contender,
            "ours": made.ours,
            "gemms": made.gemms,
            "flop": made.gemms * shape.gemm_flop,
            "errors": errors.get(contender, {}),
            "outside_tolerance": outside.get(contender, []),
        }
        if contender in samples_ms:
            record["samples_ms"] = samples_ms[contender]
            record["median_ms"] = statistics.median(samples_ms[contender])
            record["min_ms"] = min(samples_ms[contender])
            record["of_floor"] = ratio(samples_ms[FLOOR], samples_ms[contender])
        records.append(record)
    return records, missing


def _available(case: Case) -> tuple[dict[str, Contender], list[str]]:
    contenders, missing = {}, []
    for name, make in make_contenders(case).items():
        try:
            contenders[name] = make()
        except Missing as error:
            missing.append(str(error))
    return contenders, missing


def errors_of(found: Results, truth: Results) -> dict[str, float | None]:
    """Returns the error of each result by name; None for NaN and infinities, which JSON does not have."""
    errors = {}
    for name, value in found.items():
        error = _largest_error(value, truth[name]) if name == "logps" else _relative_error(value, truth[name])
        errors[name] = error if math.isfinite(error) else None
    return errors


def _largest_error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item()


def _relative_error(found: Tensor, truth: Tensor) -> float:
    """Returns the norm of the error divided by the norm of the truth, in blocks, since a gradient may be gigabytes."""
    error = norm = 0.0
    for f, t in zip(torch.atleast_1d(found).split(8192), torch.atleast_1d(truth).split(8192), strict=True):
        error += (f.double() - t).square().sum().item()
        norm += t.double().square().sum().item()
    return (error / norm) ** 0.5


def _outside(errors: Mapping[str, float | None], dtype: str) -> list[str]:
    return [name for name, error in errors.items() if error is None or error > TOLERANCES[dtype][name]]


def compare_with_aims(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the aims of a case, each with the speed-up that was measured and whether it meets the aim."""
    timed = {r["contender"]: r for r in records if "samples_ms" in r}
    ours = next((r for r in timed.values() if r["ours"]), None)
    if ours is None:
        return []
    compared = []
    for aim in AIMS:
        if aim.case == ours["case"] and ours["dtype"] in aim.dtypes and aim.baseline in timed:
            speedup = ratio(timed[aim.baseline]["samples_ms"], ours["samples_ms"])
            outcome = {"speedup": speedup, "aim": aim.speedup, "met": speedup >= aim.speedup}
            where = {key: ours[key] for key in ("case", "dtype", "shape")}
            compared.append({**where, "baseline": aim.baseline, **outcome})
    return compared


def timing_table(records: list[dict[str, Any]]) -> str:
    """Returns the records of a case as a Markdown table."""
    rows = []
    for r in records:
        if "samples_ms" in r:
            rate = r["flop"] / r["median_ms"] / 1e6
            cells = [f"{r['median_ms']:.0f}", f"{r['min_ms']:.0f}", f"{rate:.0f}", f"{r['of_floor']:.2f}"]
        else:
            cells = ["wrong: " + ", ".join(r["outside_tolerance"]), "", "", ""]
        for name in ("logps", "loss", "hidden_grad", "weight_grad"):
            error = r["errors"].get(name, "")
            cells.append("NaN" if error is None else error and f"{error:.0e}")
        rows.append([r["contender"], str(r["gemms"]), *cells])
    times = ["GEMMs", "median ms", "min ms", "GFLOP/s", "of floor"]
    return table(["", *times, "logp error", "loss error", "dH error", "dW error"], rows)


def parse_arguments() -> argparse.Namespace:
    """Returns the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_listed(Shape.parse), default=SHAPES, metavar="NxDxV,...")
    for flag, known in (("--dtype", DTYPES), ("--cases", CASES)):
        parser.add_argument(flag, type=_listed(_known(known)), default=list(known), metavar=",".join(known))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--no-timing", action="store_true", help="measure only memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--quick", action="store_true", help="try this script: tiny shapes, two repeats")
    parser.add_argument("--skip-missing", action="store_true", help="missing contenders are not an error")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"expected --repeats of at least 1, got {args.repeats}")
    if args.no_timing and not args.memory:
        parser.error("--no-timing without --memory leaves nothing to measure: add --memory")
    if args.quick:
        args.shapes, args.repeats = [QUICK_SHAPE], 2
    return args


def _listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part) for part in text.split(",")]


def _known(names: Mapping[str, Any]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def main() -> int:
    """Runs the command and returns its exit status."""
    args = parse_arguments()
    about = environment()
    results: dict[str, Any] = {"environment": about, "timing": [], "aims": [], "memory": []}
    tables, problems = [], []
    for shape in [] if args.no_timing else args.shapes:
        for dtype in args.dtype:
            weight = make_weight(shape.vocab, shape.width, DTYPES[dtype])
            for case in args.cases:
                title = f"{case}, {dtype}, {shape}"
                print(f"timing {title}", file=sys.stderr, flush=True)
                records, missing = run_case(shape, dtype, case, weight, args.repeats)
                results["timing"] += records
                results["aims"] += [] if args.quick else compare_with_aims(records)
                tables.append(f"### {title}\n\n{timing_table(records)}")
                problems += [f"wrong: {r['contender']}, {title}" for r in records if r["outside_tolerance"]]
                problems += [] if args.skip_missing else [f"missing: {why}" for why in missing]
    if args.memory:
        for dtype in args.dtype:
            for record in memory.sweep(str(DTYPES[dtype]).removeprefix("torch."), args.quick):
                results["memory"].append(record)
                what = f"{record['contender']}, {record['case']}, {record['dtype']}"
                print(f"measured the memory of {what}", file=sys.stderr, flush=True)
        tables.append(f"### MiB beyond inputs and results\n\n{memory.memory_table(results['memory'])}")
        for r in results["memory"]:
            if not r.get("within_bound", True):
                problems.append(f"over its memory: {r['case']}, {r['dtype']}, {r['rows']} × {r['length']}")
            if "missing" in r and not args.skip_missing:
                problems.append(f"missing: {r['missing']}")

    if args.json:
        write_json(args.json, results)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['cpu']}, {about['threads']} threads, commit {about['commit']}, {versions}", end="\n\n")
    print("\n\n".join(tables), end="\n\n")
    for aim in results["aims"]:
        where = f"{aim['case']}, {aim['dtype']}, {Shape(**aim['shape'])}"
        came = f"{aim['baseline']} takes {aim['speedup']:.2f} times ours (aim: {aim['aim']:.2f})"
        print(f"{'met' if aim['met'] else 'MISSED'}: {where}: {came}")
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
