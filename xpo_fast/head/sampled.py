"""Single logits: those of given tokens, and of tokens drawn from the likeliest others. No tile is kept for them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked
from .spec import Scaling, accumulation_dtype, scored_positions


def picked_logits(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    tokens: Tensor,  # (n,) int64
    scaling: Scaling,
) -> Tensor:
    """The final logit of one token at every position: (n,), differentiable, N·D memory."""
    dtype = accumulation_dtype(weight.dtype)
    z = (hidden.to(dtype) * weight[tokens].to(dtype)).sum(dim=1)
    if bias is not None:
        z = z + bias[tokens].to(dtype)
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
