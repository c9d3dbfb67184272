"""Reduction of unit losses to a scalar by a global denominator, and of metrics to means: the one place for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from .types import LossOutput

REDUCTIONS = ("mean", "sum", "none")

_copies: ContextVar[int] = ContextVar("copies", default=1)  # ranks that have the same rows


@contextmanager
def each_row_on(ranks: int) -> Iterator[None]:
    """Makes `sum_over_ranks` count rows once that this number of ranks have, all ranks in groups of so many."""
    token = _copies.set(ranks)
    try:
        yield
    finally:
        _copies.reset(token)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Returns the sum of a detached tensor over all ranks; the tensor itself without torch.distributed."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x, copies = x.clone(), _copies.get()
        dist.all_reduce(x)
        if copies > 1:
            x = x / copies if x.is_floating_point() else x // copies
    return x


def most_over_ranks(count: int, device: torch.device) -> int:
    """Returns the largest count of all ranks; the count itself without torch.distributed."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        most = torch.tensor(count, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)
    return count


def reduce_losses(losses: Tensor, reduction: str, denominator: float | Tensor) -> Tensor:
    """Reduces unit losses (U,) to a scalar; with reduction="none" returns them as they are.

    denominator: the divisor of "mean", the number of items (units, or tokens) of the whole optimizer step over all
    micro-batches and ranks. A unit that does not count has loss 0 and is no item. Without any item the mean is 0.
    """
    if reduction == "none":
        return losses
    return losses.sum() / (denominator + (denominator == 0)) if reduction == "mean" else losses.sum()


def mixed(outputs: Sequence[tuple[float, LossOutput]]) -> LossOutput:
    """Returns the sum of losses, and of metrics, of one batch times their weights; counts are those of the first."""
    (weight, first), *others = outputs
    if not others and weight == 1:
        return first
    out = LossOutput(
        loss=weight * first.loss,
        metrics={name: weight * x for name, x in first.metrics.items()},
        counts=first.counts,
        losses=tuple(weight * x for x in first.losses),
    )
    for w, other in others:
        out.loss = out.loss + w * other.loss
        out.metrics = {name: x + w * other.metrics[name] for name, x in out.metrics.items()}
        out.losses = tuple(x + w * y for x, y in zip(out.losses, other.losses, strict=True))
    return out


def mean_metrics(metrics: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """Returns the mean of each metric over valid units (U,) without NaN entries, detached; NaN if there are none.

    A metric has one entry per unit, or any other shape (…) with NaN wherever it does not count.
    """
    return {name: _counted(values, valid).nanmean() for name, values in metrics.items()}


def count_metrics(metrics: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """Returns the number of entries that each mean of `mean_metrics` is over: () each."""
    return {name: (~_counted(values, valid).isnan()).sum() for name, values in metrics.items()}


def _counted(values: Tensor, valid: Tensor) -> Tensor:
    """Returns a metric's values, detached, with NaN for units that are not valid."""
    values = values.detach()
    return torch.where(valid, values, torch.nan) if values.shape == valid.shape else values
