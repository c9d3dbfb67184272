"""When iterative training ends, by the scores of held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StoppingRule:
    """Rule that ends a run: the survey (4.6) names the missing stopping point of iterative training as an open problem.

    After every iteration the policy answers the same held-out prompts and a judge scores the answers. An iteration is
    better than the best so far if the mean of the paired differences exceeds min_gain + z standard errors of that mean.
    After `patience` iterations that are not better the loop ends, and the best model is the result.
    """

    patience: int = 1
    min_gain: float = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        if not (self.patience >= 1 and self.z >= 0 and math.isfinite(self.z) and math.isfinite(self.min_gain)):
            raise ValueError(f"expected patience >= 1, z >= 0, and a finite min_gain, got {self}")

    def best(self, history: Sequence[Sequence[float]]) -> int:
        """Returns the index of the best model so far.

        history: the scores of the same prompts, by the model at the start and after each iteration.
        """
        best = 0
        for i in range(1, len(history)):
            gain, error = paired(history[i], history[best])
            if gain > self.min_gain + (self.z * error if self.z else 0.0):
                best = i
        return best

    def stops(self, history: Sequence[Sequence[float]]) -> bool:
        """Returns whether the last `patience` iterations were no better than the best."""
        return len(history) - 1 - self.best(history) >= self.patience


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of a − b and the standard error of that mean, over the entries that neither lacks (NaN)."""
    differences = [x - y for x, y in zip(a, b, strict=True) if not math.isnan(x - y)]
    count, center = len(differences), mean(differences)
    if count < 2:
        return center, math.inf if count else math.nan
    return center, math.sqrt(sum((d - center) ** 2 for d in differences) / (count - 1) / count)


def mean(values: Sequence[float]) -> float:
    """Returns the mean of the values that are not NaN; NaN if there is none."""
    known = [x for x in values if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan
