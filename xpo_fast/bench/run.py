"""Runs the cases of a plan in turn, shows the progress, and keeps each result when it is there."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from ..wording import one_line
from .results import Results
from .work import Work


def run(plan: Sequence[Work], results: Results) -> None:
    """Measures the cases that are not among the results yet. The progress goes to stderr."""
    left = [work for work in plan if work.key not in results.records]
    if len(left) < len(plan):
        print(f"{len(plan) - len(left)} of {len(plan)} cases were finished before", file=sys.stderr)
    done_s = estimated_s = 0.0
    for number, work in enumerate(left, len(plan) - len(left) + 1):
        rest_s = sum(w.estimate_s for w in left) - estimated_s
        # The first cases say how much slower than the estimate this machine is.
        scale = done_s / estimated_s if estimated_s > 20 else 1.0
        print(
            f"[{number}/{len(plan)}] {work.suite}: {work.name}; {left_in_words(rest_s * scale)} left", file=sys.stderr
        )
        sys.stderr.flush()
        start = time.perf_counter()
        try:
            records = work.run()
        except Exception as error:  # the other cases can still be measured
            results.failures[work.key] = f"{type(error).__name__}: {one_line(error)}"
            print(f"  {results.failures[work.key]}", file=sys.stderr, flush=True)
        else:
            results.add(work, records, time.perf_counter() - start)
        done_s += time.perf_counter() - start
        estimated_s += work.estimate_s


def left_in_words(seconds: float) -> str:
    """Returns "about 5 min" or "under a minute"."""
    return "under a minute" if seconds < 60 else f"about {seconds / 60:.0f} min"
