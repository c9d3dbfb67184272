"""Times the candidates of a launch on a device, and refuses those whose results differ from the default's."""

from __future__ import annotations

import contextlib
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from xpo_fast.wording import one_line

from .launch import Problem, override, target, tunable

INPUT_SETS = 3  # used in turn
CYCLES_PER_MS = 2_000_000  # of a device's clock, roughly
ROUNDING = 1e-5  # relative error of a float32 result that another order of summation explains

Name = TypeVar("Name")
Input = TypeVar("Input")
Timer: TypeAlias = Callable[[Mapping[Any, Callable[[tuple], object]], Sequence[tuple], int], dict[Any, list[float]]]


@dataclass(frozen=True)
class Trial:
    """One candidate: its median time, or why it was refused."""

    choice: Any
    time_ms: float | None  # None if refused
    refused: str = ""


def sample_with_events(
    calls: Mapping[Name, Callable[[Input], object]],
    inputs: Sequence[Input],
    repeats: int,
    ahead_ms: float = 2.0,
) -> dict[Name, list[float]]:
    """Returns milliseconds of device time, one sample per call and repeat. Call each of `calls` once beforehand.

    The calls take turns, and the inputs rotate from repeat to repeat. ahead_ms: how long the device is kept busy before
    each call, so that the host has issued all launches of the call when the device begins with it.
    """
    names = list(calls)
    samples_ms: dict[Name, list[float]] = {name: [] for name in names}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(repeats):
        arguments = inputs[repeat % len(inputs)]
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            torch.cuda._sleep(round(ahead_ms * CYCLES_PER_MS))
            start.record()
            found = calls[name](arguments)
            end.record()
            end.synchronize()
            samples_ms[name].append(start.elapsed_time(end))
            del found
    return samples_ms


def time_with_events(
    calls: Mapping[Any, Callable[[tuple], object]], inputs: Sequence[tuple], repeats: int
) -> dict[Any, list[float]]:
    """Runs each call on each input once, then returns `sample_with_events`."""
    for arguments in inputs:
        for call in calls.values():
            call(arguments)
    return sample_with_events(calls, inputs, repeats)


def time_candidates(
    name: str, problem: Problem, device: torch.device, *, timer: Timer = time_with_events, repeats: int = 30
) -> list[Trial]:
    """Returns a trial of every candidate of a launch, the default's first; raises whatever the default raises."""

    def run(choice: Any, arguments: tuple) -> Sequence[Tensor]:
        with override(name, choice):
            return problem.run(*arguments)

    default, *others = tunable(name).candidates[target(device)]
    inputs = [problem.inputs(seed) for seed in range(INPUT_SETS)]
    refused: dict[Any, str] = {}
    with _poisoned_allocations():
        want = run(default, inputs[0])
        for choice in others:
            try:
                excess = difference(run(choice, inputs[0]), want)
            except Exception as error:  # by the compiler or the launcher: the other candidates can still be tried
                refused[choice] = one_line(error)[:200]
                continue
            if not excess <= 1:
                refused[choice] = f"differs from the default, {excess:.3g} times what rounding explains"
    del want
    calls = {c: functools.partial(run, c) for c in (default, *others) if c not in refused}
    samples_ms = timer(calls, inputs, repeats)
    return [
        Trial(c, None if c in refused else statistics.median(samples_ms[c]), refused.get(c, ""))
        for c in (default, *others)
    ]


def difference(found: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Returns the largest |found − want| as a multiple of what rounding explains; ∞ if shapes or dtypes differ."""
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in want]:
        return float("inf")
    worst = 0.0
    for x, y in zip(found, want):
        kind = torch.finfo(y.dtype)
        relative = max(kind.eps, ROUNDING)
        size = torch.linalg.vector_norm(y, dtype=torch.float32) / max(1, y.numel()) ** 0.5
        for a, b in zip(x.split(64), y.split(64)):  # by parts: a float32 copy of everything may not fit
            a, b = a.float(), b.float()
            allowed = relative * b.abs() + ROUNDING * size + kind.tiny * kind.eps
            excess = ((a - b).abs() / allowed).nan_to_num(float("inf"), float("inf"))
            same = (a == b) | (a.isnan() & b.isnan())
            worst = max(worst, excess.masked_fill_(same, 0).max().item() if excess.numel() else 0.0)
    return worst


@contextlib.contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Makes torch fill new memory with NaN, so that an element that a candidate does not write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operators that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
