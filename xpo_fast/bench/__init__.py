"""Benchmarks on one protocol: correctness, then times over a floor in one run, and peak memory in fresh processes."""

from .measure import environment, peak_allocated_mib, ratio, table, time_interleaved
from .problem import CASES, Batch, Case, Shape

__all__ = ["CASES", "Batch", "Case", "Shape", "environment", "peak_allocated_mib", "ratio", "table", "time_interleaved"]
