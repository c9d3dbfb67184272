"""The oracle: all logits are materialised, and gradients come from autograd. Other backends are tested against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .operands import Operands
from .spec import Jsd, Scaling, accumulation_dtype, check_selected, jsd_of, scored_positions, to_device


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> Tensor:
    """Returns the final logits (n, V) of hidden states (n, D) and a weight (V, D)."""
    dtype = accumulation_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    return scaling.final(z)


def token_stats(operands: Operands, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Returns the statistics of flat operands by name, (N,) or (N, K) each, 0 at positions that are not scored."""
    hidden, weight, bias, scaling, ref = (
        operands.hidden,
        operands.weight,
        operands.bias,
        operands.scaling,
        operands.ref,
    )
    if operands.adapter is not None:
        weight = torch.cat([weight, operands.adapter.to(weight.dtype)], dim=1)
    targets = to_device(operands.targets, hidden.device)
    index = scored_positions(targets, operands.ignore_index, weight.shape[0])
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
            ref_logprobs = torch.log_softmax(logits(ref.hidden[index], ref.weight, ref.bias, scaling), dim=1)
        if "kl" in outputs:
            found["kl"] = _expectation(ref_logprobs.exp(), ref_logprobs - logprobs)
        if "reverse_kl" in outputs:
            found["reverse_kl"] = _expectation(probs, logprobs - ref_logprobs)
        for name in outputs:
            if settings := jsd_of(name):
                found[name] = _jsd(logprobs, ref_logprobs, settings)
    if "log_sum_sq_probs" in outputs:
        found["log_sum_sq_probs"] = torch.logsumexp(2 * logprobs, dim=1).detach()
    if "mean_logit" in outputs:
        found["mean_logit"] = z.mean(dim=1).detach()
    if "top1" in outputs:
        found["top1"] = z.gather(1, y).squeeze(1) >= z.amax(dim=1)
    if operands.selected is not None:
        ids = to_device(operands.selected, hidden.device)
        ids = ids[index] if ids.dim() > 1 else ids.expand(index.shape[0], -1)
        check_selected(ids if operands.selected.dim() > 1 else operands.selected, weight.shape[0])
        found["selected_logp"] = logprobs.gather(1, ids)
    return {name: x.new_zeros((targets.shape[0], *x.shape[1:])).index_put((index,), x) for name, x in found.items()}


def _jsd(logprobs: Tensor, ref_logprobs: Tensor, settings: Jsd) -> Tensor:
    """Returns the generalised Jensen–Shannon divergence of each row."""
    beta = settings.beta
    log_p, log_q = (torch.log_softmax(x / settings.temperature, dim=1) for x in (logprobs, ref_logprobs))
    p, q = log_p.exp(), log_q.exp()
    if beta in (0, 1):
        return _expectation(p, log_p - log_q) if beta else _expectation(q, log_q - log_p)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * _expectation(q, log_q - log_m) + (1 - beta) * _expectation(p, log_p - log_m)


def _expectation(probs: Tensor, x: Tensor) -> Tensor:
    """Returns Σ p·x over the vocabulary, with 0·∞ = 0 for tokens that a bias of −∞ rules out."""
    return (probs * torch.where(probs > 0, x, 0.0)).sum(dim=1)
