"""Measures where the head's time goes on a GPU, and whether it runs at all, in sections that gpu_stages.py calls.

    python bench/gpu_probe.py smoke gemms rows steps host --json probes.json
    python bench/gpu_probe.py smoke --quick                # tiny, on the CPU if there is no GPU

    smoke       versions, driver, peak rates (a GEMM, a copy), each backend on a small problem against float64
    gemms       TFLOP/s of h·Wᵀ by number of rows and by dtype of the output
    rows        each kernel on a step's logits in its default configuration: milliseconds, and picoseconds per logit
    steps       milliseconds of a call by tokens per step and by lanes, which the plan chooses
    wide-steps  the same, with more values of tokens per step
    host        microseconds that the host takes to launch a call while the device is busy
    tiny        each kernel and backend once on unaligned and on aligned rows, for a memory checker
    tuning      the fastest launch of each kernel, kept in $XPO_FAST_CACHE

Times are medians of device events on normally distributed operands. Exit status 1: something of ours fails; 3: this
process has lost its device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu import AHEAD_MS, about
from gpu_contenders import OURS
from gpu_device import lost, synchronize
from report import DEVICE_LOST, Report
from xpo_fast.bench.accuracy import TOLERANCES
from xpo_fast.bench.measure import table
from xpo_fast.bench.problem import make_weight

HEADS = [(4096, 128256), (2048, 151936)]  # (D, V)
TOKENS = 8192
STEPS = (256, 384, 768, 1024, 1536)
WIDE_STEPS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
ROWS = (128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
STEP_TOKENS = 768  # in the section `rows`
VOCABS = (128256, 151936, 151937)  # the rows of the last one are not aligned
PEERS = ("trl", "liger_kernel", "cutlass", "quack", "cut_cross_entropy")


class Probe:
    """The device, problem sizes that suit it, operands on it, and the timing of calls."""

    def __init__(self, quick: bool, device: torch.device, report: Report, seed: int) -> None:
        self.quick, self.device, self.report, self.seed = quick, device, report, seed
        self.problems: list[str] = report.content["problems"]
        self.heads = [(48, 1009)] if quick else HEADS
        self.tokens = 64 if quick else TOKENS
        self.dtype = torch.bfloat16

    def ms(self, call: Callable[[], object], repeats: int = 8) -> float:
        """Returns the median milliseconds of device time of a call; on a CPU the wall time of one call."""
        call()
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        from xpo_fast.kernels.timing import sample_with_events  # pyright: ignore[reportMissingImports]

        return statistics.median(sample_with_events({"": lambda _: call()}, [None], repeats, ahead_ms=AHEAD_MS)[""])

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Returns normally distributed numbers."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.normal_(std=std, generator=generator)

    def head(self, width: int, vocab: int) -> Tensor:
        """Returns the weight (V, D) of a head."""
        return make_weight(vocab, width, self.dtype, self.device, self.seed)

    def targets(self, vocab: int, tokens: int) -> Tensor:
        """Returns targets (N,) on the host, as from a data loader."""
        return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(self.seed))

    def logits(self, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
        """Returns uninitialised logits (rows, V), aligned as the head aligns them."""
        return torch.empty(rows, -(-vocab // 64) * 64, device=self.device, dtype=dtype)[:, :vocab]

    def backends(self) -> list[str]:
        """Returns our backends that run on the device."""
        from xpo_fast.head.backends import check_backend

        found = []
        for backend in OURS:
            with contextlib.suppress(ValueError):
                check_backend(backend, self.device)
                found.append(backend)
        return found


def smoke(probe: Probe) -> list[dict[str, Any]]:
    """Returns the versions, the rates of a GEMM and a copy, and each backend's errors on small problems."""
    import importlib.util

    import xpo_fast as xf
    from xpo_fast import native
    from xpo_fast.head.backends import check_backend
    from xpo_fast.head.choice import choose_backend

    found: list[dict[str, Any]] = []
    driver = _first_line("nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader")
    peers = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    tools = [name for name in ("nvcc", "compute-sanitizer", "ncu") if shutil.which(name)]
    for what, value in (("driver", driver), ("peers", peers), ("tools", tools), ("library", native.why_not())):
        found.append({"what": what, "value": value or "there"})
    n = 256 if probe.quick else 8192
    a = probe.normal(n, n)
    out = torch.empty_like(a)
    found.append({"what": "GEMM, TFLOP/s", "value": 2e-9 * n**3 / probe.ms(lambda: torch.mm(a, a, out=out))})
    copied = probe.ms(lambda: out.copy_(a))
    found.append({"what": f"copy of {a.nbytes / 1e6:.0f} MB, TB/s", "value": 2e-9 * a.nbytes / copied})
    for vocab in (1031, 4160):
        hidden, weight, targets = (probe.normal(40, 64), probe.normal(vocab, 64, std=0.3), probe.targets(vocab, 40))
        truth, (wanted,) = _token_logps(xf, hidden.double(), weight.double(), targets, "dense")
        for backend in (*OURS, "auto"):
            record: dict[str, Any] = {"what": f"{backend}, V {vocab}"}
            try:
                check_backend(backend, probe.device)
                logps, (grad,) = _token_logps(xf, hidden, weight, targets, backend)
            except Exception as error:  # the other backends are still to be tried
                record["value"] = f"{type(error).__name__}: {error}"[:300]
                if lost(probe.device):
                    raise
            else:
                error = (logps.double() - truth).abs().max().item()
                slope = ((grad.double() - wanted).norm() / wanted.norm()).item()
                name = choose_backend(backend, probe.device, torch.bfloat16)
                record |= {"value": f"{error:.1e}, gradient {slope:.1e} ({name})", "logps": error, "grad": slope}
                bounds = TOLERANCES["bf16"]
                record["right"] = error <= bounds["logps"] and slope <= bounds["hidden_grad"]
            found.append(record)
    if not any(record.get("right") for record in found):  # gpu_checks.py finds which of them are wrong
        probe.problems.append("none of our backends gives the log-probs of a small problem")
    return found


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "no answer"
    return done.stdout.strip().partition("\n")[0] or "no answer"


def _token_logps(
    xf: Any, hidden: Tensor, weight: Tensor, targets: Tensor, backend: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaf = hidden.detach().requires_grad_()
    logps = xf.token_logps(leaf, weight, targets, backend=backend)
    return logps.detach(), torch.autograd.grad(logps.sum(), leaf)


def gemms(probe: Probe) -> Iterator[dict[str, Any]]:
    """Yields the rates of the head's product, a record per head and number of rows."""
    for width, vocab in probe.heads:
        weight = probe.head(width, vocab)
        for rows in (8, 64) if probe.quick else ROWS:
            record: dict[str, Any] = {"D": width, "V": vocab, "rows": rows}
            for dtype in (torch.bfloat16, torch.float32):
                call = _product(probe, probe.normal(rows, width), weight, dtype)
                record[f"TFLOP/s to {str(dtype)[6:]}"] = 2e-9 * rows * width * vocab / probe.ms(call)
            yield record


def _product(probe: Probe, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    if probe.device.type == "cpu":  # a CPU has no GEMM whose result is wider than its operands
        return lambda: (hidden @ weight.T).to(dtype)
    out = probe.logits(len(hidden), len(weight), dtype)
    if dtype == hidden.dtype:
        return lambda: torch.mm(hidden, weight.T, out=out)
    return lambda: torch.mm(hidden, weight.T, out_dtype=dtype, out=out)


def _problems(probe: Probe, vocab: int, tokens: int, width: int = 48) -> Iterator[tuple[str, Any]]:
    """Yields every kernel with the problems it is tuned on."""
    from xpo_fast.kernels import launch  # pyright: ignore[reportMissingImports]

    from xpo_fast.cli import tune
    from xpo_fast.head.triton import LOGPS

    workload = launch.Workload(vocab, probe.dtype, tokens, width, probe.device)
    for name in tune.load():
        if name != LOGPS:  # not a kernel, but the choice between two
            for problem in launch.tunable(name).problems(workload):
                yield name, problem


def rows(probe: Probe) -> Iterator[dict[str, Any]]:
    """Yields the times of the row kernels, a record per vocabulary and kernel."""
    from xpo_fast.head import cuda

    tokens = 8 if probe.quick else STEP_TOKENS
    for vocab in (1009,) if probe.quick else VOCABS:
        timed: dict[str, Callable[[], object]] = {}
        for name, problem in _problems(probe, vocab, tokens, 48 if probe.quick else 4096):
            arguments = problem.inputs(probe.seed)
            key = ", ".join(str(k).removeprefix("torch.") for k in problem.key)
            timed[f"{name} ({key})"] = lambda run=problem.run, arguments=arguments: run(*arguments)
        if "cuda" in probe.backends():
            logits = probe.logits(tokens, vocab, torch.float32).normal_(std=3)
            dz = probe.logits(tokens, vocab, probe.dtype)
            targets = probe.targets(vocab, tokens).to(probe.device)
            logp = torch.empty(tokens, device=probe.device)
            timed["csrc, log-probs"] = lambda: cuda.run(logits, targets, out={"logp": logp})  # noqa: B023
            timed["csrc, and gradient"] = lambda: cuda.run(logits, targets, out={"logp": logp}, grad=dz)  # noqa: B023
        for name, call in timed.items():
            ms = probe.ms(call, 20)
            yield {"V": vocab, "kernel": name, "ms": ms, "ps a logit": ms * 1e9 / tokens / vocab}


@contextlib.contextmanager
def tiled(step: int, lanes: int) -> Iterator[None]:
    """Fixes the tokens per step and the lanes of plans in a `with` block; tiles remain as planned."""
    from xpo_fast.head import plan as head

    fit_tiles = head.fit_tiles

    def fixed(*arguments: Any, **options: Any) -> Any:
        tiling, *more = fit_tiles(*arguments, **options)
        changed = {"step": min(step, tiling.tile), "lanes": lanes}
        if tiling.step == tiling.tile:  # in-place row operations have no steps
            changed["tile"] = changed["step"]
        return tiling._replace(**{k: v for k, v in changed.items() if k in tiling._fields}), *more

    head.fit_tiles = fixed
    try:
        yield
    finally:
        head.fit_tiles = fit_tiles


def _calls(probe: Probe, width: int, vocab: int, tokens: int, backend: str) -> dict[str, Callable[[], object]]:
    """Returns a call by name for each case that computes logits itself."""
    import xpo_fast as xf

    weight, hidden = probe.head(width, vocab), probe.normal(tokens // 4, 4, width).flatten(0, 1)
    targets = probe.targets(vocab, tokens)
    rows = hidden.view(4, -1, width)  # two pairs
    objective = xf.Objective("dpo", beta=0.01, backend=backend)
    ref_logps = torch.zeros(4, device=probe.device)

    def frozen() -> object:
        return _token_logps(xf, hidden, weight, targets, backend)

    def trainable() -> object:
        leaves = rows.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = objective(*leaves, targets.view(4, -1), ref_logps=ref_logps).loss
        return torch.autograd.grad(loss, leaves)

    def logps() -> object:
        with torch.no_grad():
            return xf.token_logps(hidden, weight, targets, backend=backend)

    return {"frozen": frozen, "trainable": trainable, "logps": logps}


def steps(probe: Probe, wide: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the times of calls, a record per head, tokens per step and lanes. wide: WIDE_STEPS in place of STEPS."""
    from xpo_fast.head.choice import choose_backend
    from xpo_fast.head.tiling import Tiling

    available = probe.backends()
    backend = "triton" if "triton" in available else choose_backend("auto", probe.device, torch.bfloat16)
    for width, vocab in probe.heads:
        calls = _calls(probe, width, vocab, probe.tokens, backend)
        for step in (8, 32) if probe.quick else WIDE_STEPS if wide else STEPS:
            for lanes in (1, 2) if "lanes" in Tiling._fields else (1,):
                with tiled(step, lanes):
                    found = {name: probe.ms(call, 5) for name, call in calls.items()}
                yield {"D": width, "V": vocab, "backend": backend, "step": step, "lanes": lanes, **found}
        yield {
            **{"D": width, "V": vocab, "backend": backend, "step": "as planned"},
            **{name: probe.ms(call, 5) for name, call in calls.items()},
        }


def host(probe: Probe) -> Iterator[dict[str, Any]]:
    """Yields the host's times. The device sleeps during a call, so that the host neither fills a queue nor waits."""
    width, vocab = probe.heads[0]
    for backend in probe.backends():
        for tokens in (probe.tokens // 16, probe.tokens):
            for name, call in _calls(probe, width, vocab, tokens, backend).items():
                call()
                synchronize(probe.device)
                if probe.device.type != "cpu":
                    torch.cuda._sleep(60_000_000)
                start = time.perf_counter()
                call()
                us = (time.perf_counter() - start) * 1e6
                synchronize(probe.device)
                yield {"backend": backend, "case": name, "tokens": tokens, "us": us}


def tiny(probe: Probe) -> Iterator[dict[str, Any]]:
    """Runs every kernel and backend, and yields their names; a memory checker watches the process."""
    for vocab in (1031, 4160):
        for name, problem in _problems(probe, vocab, 5):
            problem.run(*problem.inputs(probe.seed))
            synchronize(probe.device)
            yield {"V": vocab, "ran": name}
        for backend in probe.backends():
            for name, call in _calls(probe, 48, vocab, 64, backend).items():
                with tiled(16, 2):
                    call()
                synchronize(probe.device)
                yield {"V": vocab, "ran": f"{backend}, {name}"}


def tune(probe: Probe) -> Iterator[dict[str, Any]]:
    """Runs `xpo-fast tune`. In the interpreter, every candidate is tried, and none is timed or kept."""
    from xpo_fast.kernels import launch, timing  # pyright: ignore[reportMissingImports]

    from xpo_fast import cli

    if probe.device.type != "cpu":
        status = cli.main(["tune", "--vocab", *map(str, VOCABS[:2]), "--tokens", "4096", "--repeats", "20"])
        if status:
            probe.problems.append(f"tuning ended with status {status}")
        yield {"kept in": str(launch.TUNING.path), "status": status}
        return
    for name, problem in _problems(probe, 65, 3):
        trials = timing.time_candidates(
            name, problem, probe.device, timer=lambda calls, inputs, repeats: {c: [1.0] for c in calls}
        )
        refused = [f"{t.choice}: {t.refused}" for t in trials if t.refused]
        probe.problems += refused
        yield {"kernel": name, "candidates": len(trials), "refused": refused}


SECTIONS: dict[str, Callable[[Probe], Any]] = {
    "smoke": smoke,
    "gemms": gemms,
    "rows": rows,
    "steps": steps,
    "wide-steps": lambda probe: steps(probe, wide=True),
    "host": host,
    "tiny": tiny,
    "tuning": tune,
}
INTERPRETED = ("rows", "tiny", "tuning")  # sections that need the interpreter on a CPU


def cell(value: Any) -> str:
    """Returns a value as a cell of a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(name: str, records: list[dict[str, Any]]) -> None:
    """Prints the records of a section."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    if "what" in columns or not records:
        lines = [f"{'WRONG: ' if r.get('right') is False else ''}{r['what']}: {cell(r['value'])}" for r in records]
        print("\n".join([f"\n{name}\n", *(lines or ["nothing"])]), flush=True)
        return
    print(f"\n{name}\n\n{table(columns, [[cell(r.get(c, '')) for c in columns] for r in records])}", flush=True)


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE during the run")
    parser.add_argument("--quick", action="store_true", help="try this script: tiny sizes")
    parser.add_argument("--commit", help="commit to record if there is no git")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="seed of the data (default: fresh)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        if not args.quick:
            print("no GPU: --quick tries this script on a CPU", file=sys.stderr)
            return 2
        if set(args.sections) & set(INTERPRETED):
            if os.environ.get("TRITON_INTERPRET") != "1":  # Triton read it at import: start again
                os.environ["TRITON_INTERPRET"] = "1"
                os.execv(sys.executable, [sys.executable, *sys.argv])
            np.seterr(all="ignore")  # NaN and infinities are normal in the interpreter
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(args.json)
    report.begin("reading the environment")
    report.save(environment=about(device, args))
    probe = Probe(args.quick, device, report, args.seed)
    for name in args.sections:
        records: list[dict[str, Any]] = []
        report.begin(name)
        try:
            for record in SECTIONS[name](probe):
                records.append(record)
                report.save(**{name: records})
        except Exception as error:  # the other sections can still run
            probe.problems.append(f"{name}, after {len(records)} records: {type(error).__name__}: {error}"[:500])
            if lost(device):
                report.save()
                print("\n".join(probe.problems), flush=True)
                os._exit(DEVICE_LOST)  # freeing the device's memory would fail
        show(name, records)
    report.end()
    for problem in probe.problems:
        print(problem)
    return 1 if probe.problems else 0


if __name__ == "__main__":
    sys.exit(main())
