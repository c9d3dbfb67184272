"""A trainable head at 3F: the loss of whole units is evaluated while their tile is live, and both gradients made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import on_host
from .autograd import refuse_double_backward, scale_saved
from .plan import Plan, implementation
from .rows import Group
from .spec import Scaling


def pack(index: Tensor, lengths: Sequence[int], tile_tokens: int) -> list[Group]:
    """Whole units, in order, as many a tile as fit; a unit longer than a tile has a group of its own.

    index (n,): the scored positions, sorted by unit. lengths: the scored positions of each unit.
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


class UnitLoss(torch.autograd.Function):
    """A sum over units as a function of hidden (N, D), weight (V, D), bias (V,), adapter: (loss (), logp (N,))."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: Scaling,
        ignore_index: int,
        groups: Sequence[Group],
        plan: Plan,
        coefficients: Callable[[Tensor, Group], Tensor],
        total: Callable[[Tensor], Tensor],
        weight_grad: Tensor | None = None,  # (V, D)
        grad_scale: float = 1.0,
        adapter: Tensor | None = None,  # (V, r); hidden is (N, D + r)
    ) -> tuple[Tensor, Tensor]:
        """coefficients(logp (n,), group) → ∂loss/∂logp (n,) at its positions; total(logp (N,)) → the loss.

        weight_grad: dW · grad_scale is added to it, and autograd is given none.
        """
        scale = 1.0 if weight_grad is None else grad_scale

        def scaled(logp: Tensor, group: Group) -> Tensor:
            u = coefficients(logp, group)
            return u if scale == 1 else u * scale

        operands = hidden, weight, bias, adapter
        needs = (*ctx.needs_input_grad[:3], adapter is not None and ctx.needs_input_grad[-1])
        logp, grads = implementation(plan.backend).unit_gradients(
            hidden,
            weight,
            bias,
            targets,
            scaling,
            ignore_index,
            groups,
            plan.tiling,
            scaled,
            needs,
            weight_grad,
            adapter=adapter,
        )
        ctx.added, ctx.scale = weight_grad is not None, scale
        ctx.dtypes = [None if x is None else x.dtype for x in operands]
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
        *grads, d_adapter = (
            None if g is None else scaled_to(g, factor, dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, *([None] * 9), d_adapter)


def scaled_to(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """saved · factor in a dtype: one pass over a wide dW, or none over what can be scaled in place."""
    if saved.dtype == dtype:
        return scale_saved(saved, factor)
    return torch.mul(saved, factor, out=torch.empty_like(saved, dtype=dtype))


def _check_scale(factor: Tensor, scale: float) -> None:
    """RuntimeError unless the loss was multiplied by what dW was multiplied by when it was added to `weight_grad`."""
    message = (
        f"weight_grad was given the gradient of {scale:g} times the loss, and the backward is of another multiple: pass "
        "what the loss is multiplied by as grad_scale="
    )
    if on_host(factor):
        if not math.isclose(float(factor), scale, rel_tol=1e-6):
            raise RuntimeError(f"{message} {float(factor):g}")
    else:
        same = ((factor - scale).abs() <= 1e-6 * abs(scale)).all()
        torch._assert_async(same, message)  # pyright: ignore[reportPrivateImportUsage]
