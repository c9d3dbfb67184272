"""The oracle: every logit materialised, every gradient by autograd. Other backends are tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import Scaling, accumulation_dtype, scored_positions


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> Tensor:
    """(n, D), (V, D) → (n, V) final logits."""
    dtype = accumulation_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * scaling.logit_scale
    if scaling.softcap is not None:
        z = scaling.softcap * torch.tanh(z / scaling.softcap)
    return z / scaling.temperature


def token_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    ref: tuple[Tensor, Tensor, Tensor | None] | None,  # hidden (N, D), weight (V, Dr), bias (V,) of the reference
    scaling: Scaling,
    ignore_index: int,
    outputs: Sequence[str],
    adapter: Tensor | None = None,  # (V, r)
) -> dict[str, Tensor]:
    """Every statistic of the scored positions, scattered to (N,), zero elsewhere."""
    if adapter is not None:
        weight = torch.cat([weight, adapter.to(weight.dtype)], dim=1)
    index = scored_positions(targets, ignore_index, weight.shape[0])
    z = logits(hidden[index], weight, bias, scaling)
    y = targets[index].unsqueeze(1)
    lse = torch.logsumexp(z, dim=1)
    logprobs = z - lse.unsqueeze(1)
    probs = logprobs.exp()
    found = {"logp": logprobs.gather(1, y).squeeze(1), "lse": lse}
    if "entropy" in outputs:
        found["entropy"] = -_expectation(probs, logprobs)
    if ref is not None:
        with torch.no_grad():
            ref_logprobs = torch.log_softmax(logits(ref[0][index], ref[1], ref[2], scaling), dim=1)
        if "kl" in outputs:
            found["kl"] = _expectation(ref_logprobs.exp(), ref_logprobs - logprobs)
        if "reverse_kl" in outputs:
            found["reverse_kl"] = _expectation(probs, logprobs - ref_logprobs)
    if "log_sum_sq_probs" in outputs:
        found["log_sum_sq_probs"] = torch.logsumexp(2 * logprobs, dim=1).detach()
    if "mean_logit" in outputs:
        found["mean_logit"] = z.mean(dim=1).detach()
    if "top1" in outputs:
        found["top1"] = z.gather(1, y).squeeze(1) >= z.amax(dim=1)
    return {
        name: torch.zeros(targets.shape, dtype=x.dtype, device=x.device).index_put((index,), x)
        for name, x in found.items()
    }


def _expectation(probs: Tensor, x: Tensor) -> Tensor:
    """Σ p·x over the vocabulary, with 0·∞ = 0 for tokens that a bias of −∞ rules out."""
    return (probs * torch.where(probs > 0, x, 0.0)).sum(dim=1)
