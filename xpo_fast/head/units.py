"""A trainable head at 3F: the loss of whole units is evaluated while their tile is live, and both gradients made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import refuse_double_backward, scale_saved
from .plan import choose_backend, implementation
from .spec import Scaling

Group = tuple[Tensor, Sequence[int]]


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
    return list(zip(index.split(sizes), groups, strict=True))


class UnitLoss(torch.autograd.Function):
    """A sum over units as a function of hidden (N, D), weight (V, D), bias (V,): (loss (), logp (N,))."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: Scaling,
        groups: Sequence[Group],
        tile_tokens: int,
        coefficients: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
        total: Callable[[Tensor], Tensor],
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """coefficients(logp (n,), positions (n,), units) → ∂loss/∂logp (n,) for one group; total(logp (N,)) → the loss."""
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        head = implementation(choose_backend(backend, hidden.device))
        logp, (d_hidden, d_weight, d_bias) = head.unit_gradients(
            hidden, weight, bias, targets, scaling, groups, tile_tokens, coefficients, needs
        )
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.mark_non_differentiable(logp)
        return total(logp), logp

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        refuse_double_backward("the objective")
        grads = (
            None if g is None else scale_saved(g, upstream[0]).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, *([None] * 7))
