"""Unit losses and a global denominator → one scalar. The only place where anything is averaged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a detached tensor over all ranks; the tensor itself without torch.distributed."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def reduce_losses(losses: Tensor, reduction: str, denominator: float | Tensor) -> Tensor:
    """Reduce unit losses (U,) to a scalar, or return them as they are with reduction="none".

    denominator: what "mean" divides by, the items (units, or tokens) of the whole optimizer step over all
    micro-batches and ranks. A unit left out has loss 0 and is not among them; nothing over no items is 0.
    """
    if reduction == "none":
        return losses
    return losses.sum() / (denominator + (denominator == 0)) if reduction == "mean" else losses.sum()


def mean_metrics(metrics: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """The mean of each metric over valid units (U,), NaN entries left out; NaN if there are none. Detached.

    A metric has one entry a unit, or (…) of its own with NaN wherever it does not count.
    """
    return {name: _counted(values, valid).nanmean() for name, values in metrics.items()}


def count_metrics(metrics: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """The number of entries that each mean of `mean_metrics` is over: () each."""
    return {name: (~_counted(values, valid).isnan()).sum() for name, values in metrics.items()}


def _counted(values: Tensor, valid: Tensor) -> Tensor:
    values = values.detach()
    return torch.where(valid, values, torch.nan) if values.shape == valid.shape else values
