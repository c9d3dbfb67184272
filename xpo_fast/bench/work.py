"""What a benchmark is made of: settings, cases to measure, and the records that a case gives."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .measure import ratio
from .problem import Shape

# A record is what is known of one contender in one case: `contender`, `ours`, and, where they apply, `params` (sizes),
# `errors` and `wrong` (accuracy.py), `missing` or `failed` (why there is no number), `samples_ms`, `over_floor`, `mib`.
Record = dict[str, Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR = "floor: the products alone"


@dataclass(frozen=True)
class Settings:
    """What the suites are asked for; None and empty are the suite's own choice."""

    quick: bool = False  # tiny sizes and two repeats, to try the command
    repeats: int = 3
    shapes: tuple[Shape, ...] = ()  # of the losses
    dtypes: tuple[str, ...] = ()  # names of DTYPES; by default those that the CPU multiplies natively
    cases: tuple[str, ...] = ()  # names of cases, or how they begin
    contenders: tuple[str, ...] = ()  # beginnings of names; the floor and ours are always measured
    model: str = "smollm2-135m"  # of whole steps
    data: str | None = None  # preference pairs of whole steps; None: the packaged ones
    max_length: int = 512  # longer rows are left out of whole steps, in tokens
    batch: int = 4  # units per batch of whole steps

    def wants(self, contender: str) -> bool:
        """Tells whether a contender of this name is measured."""
        always = contender.startswith(("floor", "the same")) or contender.split(" ")[0].startswith("xpo_fast")
        return not self.contenders or always or contender.lower().startswith(tuple(map(str.lower, self.contenders)))


@dataclass(frozen=True)
class Work:
    """One case, which is measured in one go and kept in the result file when it is done."""

    suite: str
    name: str  # unique in its suite
    estimate_s: float  # on two quiet cores, from counts: for the progress, not for results
    run: Callable[[], list[Record]]

    @property
    def key(self) -> str:
        """Returns the name of the case in a result file."""
        return f"{self.suite}/{self.name}"


def timed(samples_ms: Mapping[str, Sequence[float]], floor: str) -> dict[str, Record]:
    """Returns times by contender: every sample, their median, and over the floor's within each repeat, the median."""
    return {
        name: {
            "samples_ms": list(samples),
            "median_ms": statistics.median(samples),
            "over_floor": ratio(samples, samples_ms[floor]),
        }
        for name, samples in samples_ms.items()
    }


def chosen(cases: Iterable[str], settings: Settings) -> list[str]:
    """Returns the names of those cases that the settings ask for: by their name, or else by how it begins."""
    names = list(cases)
    if not settings.cases:
        return names
    wanted = {n for given in settings.cases for n in ([given] if given in names else names) if n.startswith(given)}
    return [name for name in names if name in wanted]
