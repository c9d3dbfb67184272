"""Poisons a device's memory, and tells a call's peak memory and waits, whether it can be captured, and lost devices."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from xpo_fast.bench.measure import MIB, size_mib
from xpo_fast.bench.problem import Results

SMALL = 2**20  # bytes: the allocator keeps a pool of its own for blocks up to this size
LARGE = 2**32  # bytes: more than any one buffer here


def poison_sizes(free: int, segments: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the sizes of blocks to fill so that all memory which the allocator hands out next has been filled.

    free: bytes that the device has left. segments: of torch.cuda.memory_snapshot().
    The allocator hands out the smallest free block that is large enough, splits larger ones, and never joins blocks of
    two segments. So memory that it has yet to request from the device is filled in blocks of LARGE, not in many smaller
    ones, and the free blocks of segments that are partly in use are filled one by one.
    """
    spare = []
    for segment in segments:
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        if segment["segment_type"] == "small":
            sizes = [min(SMALL, size - at) for size in sizes for at in range(0, size, SMALL)]
        spare += sizes
    large = min(LARGE, free // 2)
    return sorted([*spare, *[large] * min(4, free // 2 // large if large else 0)], reverse=True) + [SMALL] * 64


def poison(device: torch.device) -> None:
    """Fills the memory that the allocator will hand out next with NaN, for every stream that it has served."""
    if device.type == "cpu":
        return
    torch.cuda.synchronize(device)
    streams = {0} | {segment["stream"] for segment in torch.cuda.memory_snapshot()}
    torch.cuda.empty_cache()
    for stream in streams:
        segments = [
            segment
            for segment in torch.cuda.memory_snapshot()
            if segment["stream"] == stream and segment.get("segment_pool_id", (0, 0)) == (0, 0)
        ]
        free, _ = torch.cuda.mem_get_info(device)
        served = torch.cuda.ExternalStream(stream, device) if stream else torch.cuda.default_stream(device)
        with torch.cuda.stream(served):
            sizes = poison_sizes(free // len(streams), segments)
            held = [torch.full((size // 4,), float("nan"), device=device) for size in sizes]
            del held
    torch.cuda.synchronize(device)


def lost(device: torch.device) -> bool:
    """Returns whether a kernel's error has made the device unusable for this process."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def synchronize(device: torch.device) -> None:
    """Waits for a device; does nothing for the CPU."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def peak_mib(call: Callable[[], Results], device: torch.device) -> float | None:
    """Returns the peak memory of a call above earlier allocations and its gradients; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = call()
    torch.cuda.synchronize(device)
    gradients_mib = size_mib(x for name, x in found.items() if name.endswith("_grad"))
    return (torch.cuda.max_memory_allocated(device) - before) / MIB - gradients_mib


def waits_for_device(call: Callable[[], Results], device: torch.device) -> str | None:
    """Returns the line on which a call makes the host wait for the device, as far as torch notices, or None."""
    if device.type == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{Path(at.filename).name}:{at.lineno}: {at.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def capture_problem(call: Callable[[], Results], device: torch.device) -> str | None:
    """Returns why a call cannot be captured as a CUDA graph that gives the same results, or None if it can."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        want = call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = call()
    except Exception as error:
        torch.cuda.synchronize(device)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for x in found.values():
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize(device)
    different = [name for name, x in found.items() if not torch.equal(x, want[name])]
    return f"a replay gives another {', '.join(different)}" if different else None


def float64_flops(device: torch.device) -> float:
    """Returns the FLOP/s of a float64 GEMM."""
    n = 256 if device.type == "cpu" else 4096
    a = torch.randn(n, n, dtype=torch.float64, device=device)
    torch.mm(a, a)
    synchronize(device)
    start = time.perf_counter()
    torch.mm(a, a)
    synchronize(device)
    return 2 * n**3 / (time.perf_counter() - start)
