"""Benchmarks the head on one GPU in one run: correctness, then times and memory, of ours and of the peers.

    python bench/gpu.py --json bench/results/gpu.json
    python bench/gpu.py --quick                          # tiny shapes, on the CPU if there is no GPU

Everything is in bf16. The cases are `frozen`, the log-probs of every token with a frozen head, forward and backward;
`trainable`, DPO with a trainable head (peers that only have cross-entropy run that, which has the same products);
`logps`, log-probs without gradient; and `gather`, log-probs of given logits, forward and backward, at the smallest N.

Correctness comes first: every contender is compared with float64 on fresh random data, in memory that held NaN, and a
wrong one is not timed. Times are the median of device events over repeats in which all contenders take turns on
rotating inputs; work queued ahead hides the host's launches. The floor is the GEMMs alone, by the platform's BLAS on
real operands; for `gather`, it is reading the logits twice and writing them once. Memory is the peak above inputs and
gradients.

All contenders run in one process, which an illegal access of any of them ends. So the result file is written after each
contender and each case, and names the current step. gpu_stages.py runs this and the other stages.

Exit status 1: one of ours is wrong, fails, or (on a GPU) is missing; 3: this process has lost its device.
"""

from __future__ import annotations

import argparse
import gc
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_contenders import CONTENDERS, OURS, TASKS, Contender, Task, make_floor, make_ours
from gpu_device import capture_problem, float64_flops, lost, peak_mib, poison, synchronize, waits_for_device
from gpu_inputs import find_gather_truth, find_truths, make_logits, make_rows
from gpu_report import accuracy, aim_line, aims, memory_aims, memory_cell, summary, time_cell
from report import DEVICE_LOST, Report
from xpo_fast.bench.accuracy import PEER_TOLERANCES, TOLERANCES, errors_of
from xpo_fast.bench.contenders import Missing
from xpo_fast.bench.measure import MIB, environment, ratio, time_interleaved, versions
from xpo_fast.bench.problem import Batch, Results, Shape, make_weight
from xpo_fast.head.choice import choose_backend

HEADS = [(4096, 128256), (3584, 151936), (2048, 151936), (2304, 262144), (4096, 32000)]  # (D, V)
SHAPES = [Shape(n, d, v) for n in (8192, 2048, 32768) for d, v in HEADS]  # in order of priority
QUICK_SHAPES = [Shape(64, 48, 1009), Shape(128, 48, 777)]
BATCHES = 3
REPEATS = (3, 20)
SAMPLE_S = 0.4  # per contender and case
AHEAD_MS = 10.0  # the host takes 2.5 to 4 ms for the about 200 launches of an objective
FIRST_CALLS_S = 60.0  # a contender whose first calls (which compile) take longer in all is left out
PACKAGES = ("cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")
GATHER_TOKENS = 2048  # more logits would not change the rate


class DeviceLost(Exception):
    """Raised if a kernel's error has made the device unusable for this process."""


class Bench:
    """One run: its settings, records and problems."""

    def __init__(self, args: argparse.Namespace, device: torch.device, facts: dict[str, Any]) -> None:
        self.args, self.device, self.facts = args, device, facts
        self.start = time.monotonic()
        self.records: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.skipped: list[str] = []
        self.problems: list[str] = []
        self.first_calls_s: dict[str, float] = {}
        self.shapes_s: dict[Shape, float] = {}  # without the first calls
        self.report = Report(args.json, environment=facts)

    @property
    def elapsed_s(self) -> float:
        """Returns the seconds since the start of the run."""
        return time.monotonic() - self.start

    def save(self) -> None:
        """Writes all results so far."""
        found = {"timing": self.records, "aims": self.aims(), "memory_aims": self.memory_aims()}
        outcome = {"missing": self.missing, "skipped": self.skipped, "problems": self.problems}
        self.report.save(**found, **outcome)

    def aims(self) -> list[dict[str, Any]]:
        """Returns the aims for times and precision, as judged so far."""
        return aims(self.records, max(shape.scored for shape in self.args.shapes))

    def memory_aims(self) -> list[str]:
        """Returns a line per peak of our backends."""
        return memory_aims(self.records, self.facts.get("device_memory_mib", 0))

    def begin(self, doing: str, contender: str = "") -> None:
        """Writes all results so far, and what is done next."""
        self.report.begin(doing, contender)
        self.save()

    def run(self) -> None:
        """Measures shape after shape until the time is used up."""
        self.begin("measuring the rate of float64")
        float64_rate = float64_flops(self.device)
        for shape in self.args.shapes:
            # Assumes that time grows at most in proportion to the products.
            bounds_s = [s * max(1.0, shape.gemm_flop / known.gemm_flop) for known, s in self.shapes_s.items()]
            if self.elapsed_s + min(bounds_s, default=0.0) > self.args.budget_s:
                self.skipped.append(f"{shape}, after {self.elapsed_s:.0f} of {self.args.budget_s:.0f} s")
                continue
            before_s = self.elapsed_s - sum(self.first_calls_s.values())
            # For each of two losses, two passes over the vocabulary: one product, then three.
            truth_s = 8 * shape.gemm_flop / float64_rate
            self.run_shape(shape, check=truth_s < self.args.check_s)
            self.shapes_s[shape] = self.elapsed_s - sum(self.first_calls_s.values()) - before_s
            print(f"{shape}: done after {self.elapsed_s:.0f} s", file=sys.stderr, flush=True)
        self.report.end()

    def run_shape(self, shape: Shape, check: bool) -> None:
        """Measures all cases of a shape. check: compare with float64."""
        self.begin(f"making the inputs and the truth of {shape}")
        weight = make_weight(shape.vocab, shape.width, torch.bfloat16, self.device, self.args.seed)
        batches = [make_rows(weight, shape.scored, self.args.seed + k) for k in range(BATCHES)]
        with_gemms = [name for name in self.args.cases if TASKS[name].gemms]
        truths = find_truths(batches[0], with_gemms) if check and with_gemms else None
        for name in with_gemms:
            self.run_case(shape, name, batches, truths)
        del weight, truths
        if "gather" in self.args.cases and shape.scored <= GATHER_TOKENS:
            batches = [make_logits(batch) for batch in batches]
            truths = {"token": find_gather_truth(batches[0])} if check else None
            self.run_case(shape, "gather", batches, truths)
        del batches
        gc.collect()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def run_case(self, shape: Shape, name: str, batches: list[Batch], truths: dict[str, Results] | None) -> None:
        """Checks, then times all contenders of a case, and adds their records. truths: results by loss, if known."""
        task = TASKS[name]
        where = f"{name}, {shape}"
        floor = make_floor(batches[0], task)
        floor.call(batches[0])
        calls, records = {"floor": floor.call}, {"floor": self.record(shape, name, "floor", gemms=task.gemms)}
        self.records.append(records["floor"])
        for contender in self.args.only:
            if self.first_calls_s.get(contender, 0.0) > FIRST_CALLS_S:
                self.skipped.append(f"{contender} in {where}: its first calls take too long")
                continue
            self.begin(f"{contender} in {where}", contender)
            try:
                made = CONTENDERS[contender](task, self.device)
            except Missing as error:
                self.missing.setdefault(contender, str(error))
                if contender in OURS and self.device.type != "cpu":
                    self.problems.append(f"missing: {error}")
                continue
            except Exception as error:
                # A peer that does not support the installed versions may fail in any way.
                if contender in OURS:
                    raise
                self.missing.setdefault(contender, f"{contender}: {type(error).__name__}: {error}"[:300])
                continue
            if made is None:
                continue
            record = self.record(shape, name, contender, ours=made.ours, checked=truths is not None)
            records[contender] = record
            self.records.append(record)
            try:
                self.check(made, contender, record, batches[0], truths)
                record["peak_mib"] = peak_mib(partial(made.call, batches[0]), self.device)
                if made.ours:
                    record["waits"] = waits_for_device(partial(made.call, batches[0]), self.device)
                    self.check_capture(contender, record, task, batches[0], where)
            except Exception as error:  # a peer may fail in any way
                failed = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{error}"
                record["failed"] = f"{type(error).__name__}: {failed}"[:500]
                if made.ours:
                    self.problems.append(f"failed: {contender}, {where}: {record['failed']}")
            else:
                if not record["outside_tolerance"]:
                    calls[contender] = made.call
                elif made.ours:
                    self.problems.append(f"wrong: {contender}, {where}: {record['outside_tolerance']}")
            if self.device.type != "cpu" and "failed" in record:
                if lost(self.device):
                    raise DeviceLost(f"{contender}, {where}: {record['failed']}")
                gc.collect()
                torch.cuda.empty_cache()
        self.begin(f"timing {where}")
        self.time(calls, records, batches)
        for contender, record in records.items():
            if contender in calls:
                record["of_floor"] = ratio(records["floor"]["samples_ms"], record["samples_ms"])

    def record(self, shape: Shape, case: str, contender: str, **more: Any) -> dict[str, Any]:
        """Returns a new record of a contender."""
        where = {"shape": shape._asdict(), "case": case, "contender": contender}
        return {**where, "flop": TASKS[case].gemms * shape.gemm_flop, **more}

    def check(
        self, made: Contender, contender: str, record: dict[str, Any], batch: Batch, truths: dict[str, Results] | None
    ) -> None:
        """Makes the first call, which compiles, and a second one in poisoned memory, and records its errors."""
        synchronize(self.device)
        start = time.perf_counter()
        found = made.call(batch)
        synchronize(self.device)
        taken_s = time.perf_counter() - start
        record["first_call_s"] = taken_s
        self.first_calls_s[contender] = self.first_calls_s.get(contender, 0.0) + taken_s
        record["outside_tolerance"] = []
        if truths is not None:
            del found
            poison(self.device)
            found = made.call(batch)
            truth = truths[made.loss or "token"]
            tolerances = TOLERANCES["bf16"] if made.ours else PEER_TOLERANCES["bf16"]
            errors = errors_of(found, truth)
            record["outside_tolerance"] = [n for n, e in errors.items() if e is None or e > tolerances[n]]
            if errors.get("logps") is not None:
                excess = found["logps"].double() - truth["logps"]
                errors["logps_rms"] = excess.square().mean().sqrt().item()
            record["errors"] = errors

    def check_capture(self, backend: str, record: dict[str, Any], task: Task, batch: Batch, where: str) -> None:
        """Captures a call as a graph, only at the fewest tokens; labels are on the device, as a graph needs them."""
        if self.device.type == "cpu" or batch.targets.numel() > min(shape.scored for shape in self.args.shapes):
            return
        made = make_ours(task, self.device, backend, labels_on_host=False)
        record["not_captured"] = capture_problem(partial(made.call, batch), self.device)
        if record["not_captured"]:
            self.problems.append(f"not captured: {backend}, {where}: {record['not_captured']}")

    def time(self, calls: dict[str, Callable[[Batch], Results]], records: dict[str, Any], batches: list[Batch]) -> None:
        """Times the calls in turn, and adds the samples to their records."""
        start = time.perf_counter()
        for call in calls.values():
            call(batches[-1])
        synchronize(self.device)
        round_s = time.perf_counter() - start
        fewest, most = (2, 2) if self.args.quick else REPEATS
        repeats = round(min(max(SAMPLE_S * len(calls) / round_s, fewest), most))
        if self.device.type == "cpu":
            measure = time_interleaved
        else:
            from xpo_fast.kernels.timing import sample_with_events  # pyright: ignore[reportMissingImports]

            measure = partial(sample_with_events, ahead_ms=AHEAD_MS)
        gc.collect()
        gc.freeze()  # the collections of time_interleaved need not visit all modules
        gc.disable()
        try:
            for contender, samples_ms in measure(calls, batches, repeats).items():
                records[contender] |= {"samples_ms": samples_ms, "median_ms": statistics.median(samples_ms)}
        finally:
            gc.enable()
            gc.unfreeze()


def about(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the context of the measurements: `environment`, the device, the peers' versions and the seed."""
    found = environment()
    found["commit"] = found["commit"] or args.commit
    found["versions"] |= versions(PACKAGES)
    if device.type != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["device_memory_mib"] = properties.total_memory // MIB
        found["processors"] = properties.multi_processor_count
        found["versions"]["hip" if torch.version.hip else "cuda"] = torch.version.hip or torch.version.cuda
    found["auto"] = choose_backend("auto", device, torch.bfloat16)
    return {**found, "seed": args.seed, "clock": "wall, CPU" if device.type == "cpu" else "device events"}


def parse_arguments() -> argparse.Namespace:
    """Returns the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="NxDxV")
    parser.add_argument("--cases", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="measure only these contenders"
    )
    parser.add_argument("--without", nargs="+", choices=CONTENDERS, default=[], help="leave out these contenders")
    parser.add_argument("--budget-s", type=float, default=510.0, help="skip shapes that would not end within this time")
    parser.add_argument(
        "--check-s", type=float, default=15.0, help="do not check shapes whose float64 results take longer"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="seed of the data (default: fresh)")
    parser.add_argument("--commit", help="commit to record if there is no git")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--quick", action="store_true", help="try this script: tiny shapes, two repeats")
    args = parser.parse_args()
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    args.only = [name for name in args.only if name not in args.without]
    return args


def main() -> int:
    """Runs the command and returns its exit status."""
    args = parse_arguments()
    if not torch.cuda.is_available() and not args.quick:
        print("no GPU: `xpo-fast bench` measures on a CPU; --quick tries this script on one", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = about(device, args)
    bench = Bench(args, device, facts)
    lost_by = False
    try:
        bench.run()
    except DeviceLost as error:
        lost_by = True
        bench.problems.append(f"the device is lost to this process: {error}")
    except Exception as error:  # the earlier results are kept
        bench.problems.append(f"ended early: {type(error).__name__}: {error}")
    bench.save()
    installed = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['device']}, commit {facts['commit']}, {installed}, seed {args.seed}, {bench.elapsed_s:.0f} s")
    memory = summary(bench.records, memory_cell, list(CONTENDERS))
    print(f"\npeak MiB above inputs and gradients\n\n{memory}")
    times = summary(bench.records, time_cell, ["floor", *CONTENDERS])
    print(f"\nms ({facts['clock']}), and the floor's share of it\n\n{times}\n")
    for why in bench.missing.values():
        print(f"missing: {why}")
    print(f"largest errors, of the gradients relative to their norm\n\n{accuracy(bench.records)}\n")
    for aim in bench.aims():
        print(aim_line(aim, facts["auto"]))
    for line in bench.memory_aims():
        print(line)
    for wait in sorted({r["waits"] for r in bench.records if r.get("waits")}):
        print(f"ours waits for the device at {wait}")
    for line in (*(f"skipped: {s}" for s in bench.skipped), *dict.fromkeys(bench.problems)):
        print(line)
    if lost_by:
        sys.stdout.flush()
        os._exit(DEVICE_LOST)  # freeing the device's memory would fail
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
