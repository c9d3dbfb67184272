"""Single logits: those of given tokens, and of tokens drawn from the likeliest others. No tile is kept for them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import chunked
from .autograd import refuse_double_backward
from .plan import has_triton
from .spec import Scaling, accumulation_dtype, scored_positions, to_device


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
    backend: str = "torch",
) -> Tensor:
    """At every scored position a token drawn from the softmax of its `top_k` likeliest, the target not among them.

    (N,) int64, 0 where ignored. 1F, tile by tile; nothing waits for the device. The draws of a generator depend neither
    on the tiles nor on the backend, but for logits that are equal or almost: which of them the top k are, and in which
    order, is the backend's.
    """
    vocab, device = weight.shape[0], hidden.device
    index = scored_positions(targets, ignore_index, vocab, device)
    targets = to_device(targets, device)
    ignored = targets == ignore_index
    # Where shapes must not depend on values, the index has the ignored ones, too.
    targets = targets.masked_fill(ignored, 0)
    by_kernel = backend == "triton" or (backend == "cuda" and device.type == "cuda" and has_triton())
    if by_kernel and accumulation_dtype(weight.dtype) == torch.float32:
        from ..kernels import topk  # pyright: ignore[reportMissingImports]

        tiles = chunked.products_of(hidden, weight, index, tile_tokens)
        likeliest = partial(
            topk.run,
            bias=None if bias is None else bias.float().contiguous(),
            **asdict(scaling),
        )
    else:
        tiles = chunked.final_logits(hidden, weight, bias, scaling, index, tile_tokens)
        likeliest = _likeliest
    k = min(top_k, vocab - 1)
    # The token with the smallest E / p, E exponential, is one drawn from p: torch.multinomial, but for its look at p.
    clocks = torch.empty((index.shape[0], k), dtype=accumulation_dtype(weight.dtype), device=device)
    clocks.exponential_(generator=generator)
    rivals, start = torch.zeros_like(targets), 0
    for part, z in tiles:
        stop = start + part.shape[0]
        values, tokens = likeliest(z, targets[part], k)
        first = (values.softmax(dim=1) / clocks[start:stop]).argmax(dim=1, keepdim=True)
        rivals[part] = tokens.gather(1, first).squeeze(1)
        start = stop
    return rivals.masked_fill_(ignored, 0)


def _likeliest(
    z: Tensor,  # (n, V) final logits, overwritten
    targets: Tensor,  # (n,)
    k: int,
) -> tuple[Tensor, Tensor]:
    """`kernels.topk.run` of final logits."""
    return z.scatter_(1, targets.unsqueeze(1), -torch.inf).topk(k, dim=1)
