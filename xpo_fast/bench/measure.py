"""Measures times and peak memory, describes the machine, and formats tables, for every benchmark and the demo.

It knows nothing of heads and losses.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..precision import instructions, processor, settings

MIB = 2**20
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "pytest-benchmark"),
    "xpo-fast",
)

Input = TypeVar("Input")
Result = TypeVar("Result")


def time_interleaved(
    contenders: Mapping[str, Callable[[Input], object]],
    inputs: Sequence[Input],
    repeats: int,
    *,
    slow: float = math.inf,
) -> dict[str, list[float]]:
    """Returns wall-clock milliseconds by contender, one sample per repeat. Call each contender once beforehand.

    A repeat calls every contender once on the same input, so that a drift of the machine affects all of them. The input
    and the first contender change from repeat to repeat. Results are freed outside the timed region. What takes over
    `slow` times as long as the first contender of all has a sample of the first repeat only.
    """
    names = list(contenders)
    samples_ms: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # or each collection below looks at all that was imported, half a second of it
    try:
        for repeat in range(repeats):
            argument = inputs[repeat % len(inputs)]
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                if repeat and samples_ms[name][0] > slow * samples_ms[names[0]][0]:
                    continue
                gc.collect()
                start = time.perf_counter()
                result = contenders[name](argument)
                samples_ms[name].append((time.perf_counter() - start) * 1e3)
                del result
    finally:
        gc.unfreeze()
    return samples_ms


def ratio(numerator_ms: Sequence[float], denominator_ms: Sequence[float]) -> float:
    """Returns the median over repeats of the ratio within a repeat, in which drift between repeats cancels.

    One that was slow has fewer repeats, the first ones.
    """
    return statistics.median(n / d for n, d in zip(numerator_ms, denominator_ms, strict=False))


def peak_allocated_mib(call: Callable[[], Result]) -> tuple[float, Result]:
    """Returns the peak of what `call` allocates through torch's CPU allocator, its results included, and its result.

    The peak is exact: every allocation and release is traced, also those inside operators. Memory that a BLAS library
    allocates for itself is not counted; `peak_resident_mib` counts it.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    live = (event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    return max(live, default=0) / MIB, result


def peak_resident_mib(call: Callable[[], Result]) -> tuple[float | None, Result]:
    """Returns by how much `call` raises the resident memory of this process, its results included, and its result.

    The first value is None except on Linux. It is too low if the process has freed memory that its allocator has kept.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None, call()
    before_kib = _status_kib("VmRSS")
    result = call()
    return (_status_kib("VmHWM") - before_kib) / 1024, result


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def size_mib(tensors: Iterable[Tensor]) -> float:
    """Returns the size of the tensors' elements in MiB."""
    return sum(t.numel() * t.element_size() for t in tensors) / MIB


def environment() -> dict[str, Any]:
    """Returns the context of a measurement: commit, date, machine, threads, versions.

    The commit is None where this file is not one of a checkout's: an installed package may lie inside another project.
    """
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu",
        "cpu": processor(torch.device("cpu")),
        "instructions": instructions(),
        "held_to": settings(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve()
    try:
        for words in (("ls-files", "--error-unmatch", str(here)), arguments):
            done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True)
            if done.returncode != 0:
                return None
    except FileNotFoundError:
        return None
    return done.stdout.strip()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def render(line: list[str]) -> str:
        aligned = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])


def read_json(path: Path | None) -> dict[str, Any]:
    """Returns the content of a result file, or {} if there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
