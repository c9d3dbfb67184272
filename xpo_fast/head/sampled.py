"""Logits of single tokens: of the targets, and of tokens sampled from the most likely others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunked
from .autograd import refuse_double_backward
from .operands import Operands
from .spec import accumulation_dtype, scored_positions, to_device


class _Products(torch.autograd.Function):
    """h·W[token] of each row (n,), in the accumulation dtype; dW is summed in it, too, since a token may recur."""

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


def picked_logits(operands: Operands) -> Tensor:
    """Returns the final logit of each position's target, (N,), for flat operands: differentiable once, N·D memory."""
    bias, tokens = operands.bias, operands.targets
    z: Any = _Products.apply(operands.hidden, operands.weight, tokens)
    if bias is not None:
        z = z + bias.to(z.dtype)[tokens]
    return operands.scaling.final(z)


@torch.no_grad()
def sample_rivals(operands: Operands, tile_tokens: int, top_k: int, generator: torch.Generator | None = None) -> Tensor:
    """Samples a token at every scored position, from the softmax of the `top_k` most likely ones other than the target.

    Returns (N,) int64 for flat operands, 0 where ignored. Costs 1F, tile by tile; the host does not wait for the
    device. A generator's draws do not depend on the tiles.
    """
    vocab, device, ignore_index = operands.vocab, operands.hidden.device, operands.ignore_index
    index = scored_positions(operands.targets, ignore_index, vocab, device)
    targets = to_device(operands.targets, device)
    ignored = targets == ignore_index
    # Under CUDA graph capture the index contains the ignored positions too.
    targets = targets.masked_fill(ignored, 0)
    k = min(top_k, vocab - 1)
    # The token with the largest p / E, E exponential, is a sample from p. torch.multinomial would read p on the host.
    clocks = torch.empty((index.shape[0], k), dtype=accumulation_dtype(operands.weight.dtype), device=device)
    clocks.exponential_(generator=generator)
    rivals, start = torch.zeros_like(targets), 0
    for part, z in chunked.final_logits(operands, index, tile_tokens):
        stop = start + part.shape[0]
        values, tokens = z.scatter_(1, targets[part].unsqueeze(1), -torch.inf).topk(k, dim=1)
        first = (values.softmax(dim=1) / clocks[start:stop]).argmax(dim=1, keepdim=True)
        rivals[part] = tokens.gather(1, first).squeeze(1)
        start = stop
    return rivals.masked_fill_(ignored, 0)
