"""A trainable head at 3F: the loss of whole units and both gradients are computed while their tile is live."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import on_host
from . import chunked
from .autograd import refuse_double_backward, scale_saved
from .backends import row_operations
from .operands import Operands
from .plan import Plan
from .rows import Group


def pack(index: Tensor, lengths: Sequence[int], tile_tokens: int) -> list[Group]:
    """Packs whole units, in order, into groups that fit a tile; a unit longer than a tile is a group of its own.

    index (n,): the scored positions, sorted by unit. lengths: the number of scored positions of each unit.
    """
    groups: list[list[int]] = []
    room = 0
    for unit, length in enumerate(lengths):
        if length == 0:
            continue
        if not groups or length > room:
            groups.append([])
            room = tile_tokens
        groups[-1].append(unit)
        room -= length
    sizes = [sum(lengths[u] for u in group) for group in groups]
    starts = itertools.accumulate(sizes, initial=0)
    return [Group(*group) for group in zip(index.split(sizes), groups, starts)]


def unit_loss(
    operands: Operands,  # flat
    groups: Sequence[Group],
    plan: Plan,
    coefficients: Callable[[Tensor, Group], Tensor],
    total: Callable[[Tensor], Tensor],
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns a loss () that is a sum over units, differentiable in the operands, and the log-probs (N,), detached.

    coefficients(logp (n,), group) returns ∂loss/∂logp (n,) at the group's positions; total(logp (N,)) returns the loss.
    With a weight_grad, dW · grad_scale is added to it in this call, and autograd gets no dW.
    """
    tensors = operands.hidden, operands.weight, operands.bias, operands.adapter
    out: Any = _UnitLoss.apply(*tensors, operands, groups, plan, coefficients, total, grad_scale)
    return out


class _UnitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: Tensor | None,
        operands: Operands,
        groups: Sequence[Group],
        plan: Plan,
        coefficients: Callable[[Tensor, Group], Tensor],
        total: Callable[[Tensor], Tensor],
        grad_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Computes `unit_loss`. The first four repeat the operands' fields, since autograd tracks arguments only."""
        scale = 1.0 if operands.weight_grad is None else grad_scale

        def scaled(logp: Tensor, group: Group) -> Tensor:
            u = coefficients(logp, group)
            return u if scale == 1 else u * scale

        rows = row_operations(plan.backend, operands.shard)
        logp, grads = chunked.unit_gradients(operands, groups, plan.tiling, scaled, ctx.needs_input_grad[:4], rows)
        ctx.added, ctx.scale = operands.weight_grad is not None, scale
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, adapter)]
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logp)
        return total(logp), logp

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        refuse_double_backward("the objective")
        factor = upstream[0]
        if ctx.added:
            _check_scale(factor, ctx.scale)
            factor = factor / ctx.scale
        grads = [
            None if g is None else scaled_to(g, factor, dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))


def scaled_to(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns saved · factor in `dtype`, scaling and converting a wider tensor in one pass."""
    if saved.dtype == dtype:
        return scale_saved(saved, factor)
    return torch.mul(saved, factor, out=torch.empty_like(saved, dtype=dtype))


def _check_scale(factor: Tensor, scale: float) -> None:
    """Raises RuntimeError unless the loss was multiplied by the number by which dW in `weight_grad` was scaled."""
    message = (
        f"weight_grad was given the gradient of {scale:g} times the loss, and the backward is of another multiple: "
        "pass what the loss is multiplied by as grad_scale="
    )
    if on_host(factor):
        if not math.isclose(float(factor), scale, rel_tol=1e-6):
            raise RuntimeError(f"{message} {float(factor):g}")
    else:
        same = ((factor - scale).abs() <= 1e-6 * abs(scale)).all()
        torch._assert_async(same, message)  # pyright: ignore[reportPrivateImportUsage]
