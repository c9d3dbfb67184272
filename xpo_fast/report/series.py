"""Metrics over the steps of a run, read from its logs; and what is drawn of them: means of windows, and bands."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

POINTS = 60  # windows that a curve is drawn by, at most
EVAL = "eval_"
# Of a log's fields those that are no metric, or that are written once, at the end.
_NO_METRICS = ("step", "epoch", "total_flos")
_TIMINGS = ("_runtime", "_second", "_time")


@dataclass
class Series:
    """One metric: its values at steps, in increasing order; NaN where the log has no finite value.

    low, high: bounds of each value, if they are known.
    """

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    low: list[float] | None = None
    high: list[float] | None = None

    @property
    def finite(self) -> list[float]:
        """The values that are finite."""
        return [x for x in self.values if math.isfinite(x)]

    @property
    def missing(self) -> int:
        """How many values are not finite."""
        return len(self.values) - len(self.finite)

    def add(self, step: float, value: float) -> None:
        """Adds a value at the last step so far, or after it."""
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: float) -> None:
        """Removes the values at `step` and later."""
        end = bisect.bisect_left(self.steps, step)
        del self.steps[end:], self.values[end:]


@dataclass
class Metrics:
    """The metrics of a run by name: of training, and of evaluations, whose names have no prefix here."""

    training: dict[str, Series] = field(default_factory=dict)
    evaluation: dict[str, Series] = field(default_factory=dict)
    last_step: float = 0.0

    def read(self, lines: Iterable[Mapping[str, Any]], offset: float = 0.0) -> None:
        """Adds the lines of a log. offset: is added to their steps.

        A run that went on from a checkpoint may repeat steps: what was logged of them before is dropped.
        """
        trained = -math.inf
        for line in lines:
            step = number(line.get("step"))
            if not math.isfinite(step):
                continue
            step += offset
            evaluates = any(name.startswith(EVAL) for name in line)
            if not evaluates and "loss" in line:
                if step <= trained:
                    for series in (*self.training.values(), *self.evaluation.values()):
                        series.cut(step)
                trained = step
            elif not evaluates:
                continue  # the summary at the end
            for name, value in line.items():
                if name in _NO_METRICS or not (value is None or isinstance(value, (int, float))):
                    continue
                kept = self.evaluation if name.startswith(EVAL) else self.training
                short = name.removeprefix(EVAL)
                if kept is self.evaluation and name.endswith(_TIMINGS):
                    continue
                series = kept.setdefault(short, Series())
                series.cut(step)  # an evaluation may be logged twice at one step
                series.add(step, number(value))
        ends = [s.steps[-1] for s in (*self.training.values(), *self.evaluation.values()) if s.steps]
        self.last_step = max(ends, default=self.last_step)


def number(value: Any) -> float:
    """Returns a JSON value as a number; NaN for null and what is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


@dataclass
class Curve:
    """A series as it is drawn: the mean of each window of logs, and its bounds.

    window: logs per point. band: what the bounds are, "" without any.
    """

    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    window: int = 1
    band: str = ""


def curve(series: Series, spread: Series | None = None, most: int = POINTS) -> Curve:
    """Returns the curve of a series: means over windows of equally many logs, at most `most` of them.

    Bounds are the series' own; else ± the mean of `spread`, its standard deviation by step, where that is given; else
    the lowest and the highest value of each window of several logs.
    """
    count = len(series.values)
    window = max(1, math.ceil(count / most))
    spreads = dict(zip(spread.steps, spread.values)) if spread is not None else {}
    found = Curve([], [], [], [], window)
    if series.low is not None and series.high is not None:
        found.band = "95% interval"
    elif any(map(math.isfinite, spreads.values())):
        found.band = "± one standard deviation of the samples"
    elif window > 1:
        found.band = f"lowest and highest of {window} logs"
    for start in range(0, count, window):
        at = slice(start, start + window)
        values = [x for x in series.values[at] if math.isfinite(x)]
        mean = sum(values) / len(values) if values else math.nan
        low, high = min(values, default=math.nan), max(values, default=math.nan)
        if series.low is not None and series.high is not None:
            low, high = min(series.low[at], default=math.nan), max(series.high[at], default=math.nan)
        elif found.band and spreads:
            near = [spreads[s] for s in series.steps[at] if math.isfinite(spreads.get(s, math.nan))]
            off = sum(near) / len(near) if near else math.nan
            low, high = mean - off, mean + off
        found.steps.append(sum(series.steps[at]) / len(series.steps[at]))
        found.values.append(mean)
        found.low.append(low)
        found.high.append(high)
    return found
