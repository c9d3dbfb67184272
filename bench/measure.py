"""Measuring: interleaved timing, peak memory, what it ran on, tables and result files.

Knows nothing of heads and losses and imports nothing of bench/: every benchmark can share it, and the demo.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
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

from xpo_fast.precision import instructions, processor, settings

MIB = 2**20
PACKAGES = ("torch", "triton", "numpy", "transformers", "trl", "liger-kernel", "xpo-fast")

Input = TypeVar("Input")
Result = TypeVar("Result")


def time_interleaved(
    contenders: Mapping[str, Callable[[Input], object]], inputs: Sequence[Input], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every call, by contender: one sample a repeat.

    A repeat calls every contender once on the same input, so that a drift of the machine meets them all; the
    input and who goes first change with the repeat. Warm up before. Results are freed outside the clock.
    """
    names = list(contenders)
    samples_ms: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        argument = inputs[repeat % len(inputs)]
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            start = time.perf_counter()
            result = contenders[name](argument)
            samples_ms[name].append((time.perf_counter() - start) * 1e3)
            del result
    return samples_ms


def ratio(numerator_ms: Sequence[float], denominator_ms: Sequence[float]) -> float:
    """Median over repeats of the ratio within the repeat: what drifts between repeats cancels."""
    return statistics.median(n / d for n, d in zip(numerator_ms, denominator_ms, strict=True))


def peak_allocated_mib(call: Callable[[], Result]) -> tuple[float, Result]:
    """Peak of what `call` allocates through torch's CPU allocator, its results included, and its result.

    Exact: every allocation and release is traced, those inside an operator too. What a BLAS takes for itself
    is not seen; `peak_resident_mib` sees it.
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
    """How far `call` raises the resident memory of this process, its results included, and its result.

    Linux only: None elsewhere. Where a process has freed much, the allocator hides what the call takes.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # makes the high-water mark start again from now
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
    """Bytes of the tensors' elements, in MiB."""
    return sum(t.numel() * t.element_size() for t in tensors) / MIB


def environment() -> dict[str, Any]:
    """What a figure needs beside it to be worth quoting: commit, machine, threads, versions."""
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
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def render(line: list[str]) -> str:
        aligned = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
