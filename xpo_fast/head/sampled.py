"""Single logits: those of given tokens, and of tokens drawn from the likeliest others. No tile is kept for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunked
from .autograd import refuse_double_backward
from .spec import Scaling, accumulation_dtype, scored_positions


class _Products(torch.autograd.Function):
    """h·W[tokens] a row (n,), in the accumulation dtype, as is its gradient: a token may be there many times."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, tokens)
        dtype = accumulation_dtype(weight.dtype)
        return (hidden.to(dtype) * weight[tokens].to(dtype)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_double_backward("a logit")
        hidden, weight, tokens = ctx.saved_tensors
        u, d_hidden, d_weight = upstream[0].unsqueeze(1), None, None
        if ctx.needs_input_grad[0]:
            d_hidden = (u * weight[tokens].to(u.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            total = torch.zeros(weight.shape, dtype=u.dtype, device=u.device)
            d_weight = total.index_add_(0, tokens, u * hidden.to(u.dtype)).to(weight.dtype)
        return d_hidden, d_weight, None


def picked_logits(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    tokens: Tensor,  # (n,) int64
    scaling: Scaling,
) -> Tensor:
    """The final logit of one token at every position: (n,), differentiable once, N·D memory."""
    z: Any = _Products.apply(hidden, weight, tokens)
    if bias is not None:
        z = z + bias.to(z.dtype)[tokens]
    z = z * scaling.logit_scale
    if scaling.softcap is not None:
        z = scaling.softcap * torch.tanh(z / scaling.softcap)
    return z / scaling.temperature


@torch.no_grad()
def sample_rivals(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    scaling: Scaling,
    ignore_index: int,
    tile_tokens: int,
    top_k: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """At every scored position a token drawn from the softmax of its `top_k` likeliest, the target not among them.

    (N,) int64, 0 where ignored. 1F, tile by tile.
    """
    index = scored_positions(targets, ignore_index, weight.shape[0])
    rivals = torch.zeros_like(targets)
    for part, z in chunked.final_logits(hidden, weight, bias, scaling, index, tile_tokens):
        z.scatter_(1, targets[part].unsqueeze(1), -torch.inf)
        best, tokens = z.topk(min(top_k, z.shape[1] - 1), dim=1)
        drawn = torch.multinomial(best.softmax(dim=1), 1, generator=generator)
        rivals[part] = tokens.gather(1, drawn).squeeze(1)
    return rivals
