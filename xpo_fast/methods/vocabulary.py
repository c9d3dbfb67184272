"""Losses of pairs that read more of the vocabulary than log-probs: divergences, rival tokens; and WPO's weights.

Conventions as in pairwise.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .math import Losses, check, check_beta, check_bool, pair_metrics
from .registry import register


@register(
    paper="Token-level Direct Preference Optimization (arXiv 2404.11999)",
    equation="−log σ(h − αβ(kl_l − sg kl_w))",
    survey="S25–28",
    attributes={"reward-level": "Token"},
)
def tdpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    kl_w: Tensor,  # (P,) Σ_t KL(ref ‖ policy) over the completion's positions
    kl_l: Tensor,  # (P,)
    beta: float = 0.1,
    alpha: float = 0.5,
    version: Literal[1, 2] = 2,
) -> Losses:
    """Token-level DPO: the rejected completion may not drift further from the reference than the chosen one.

    `version=1`: L = −log σ(h − β(kl_l − kl_w)), survey S28. `version=2`: L = −log σ(h − αβ(kl_l − sg kl_w)). The
    divergence is the forward one, reference ‖ policy, and carries gradient.
    """
    check_beta(beta)
    check(alpha >= 0, "alpha >= 0", alpha)
    reward_w, reward_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)
    drift = beta * (kl_l - kl_w) if version == 1 else alpha * beta * (kl_l - kl_w.detach())
    losses = -logsigmoid(reward_w - reward_l - drift)
    kl = {"kl/chosen": kl_w, "kl/rejected": kl_l}
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l, **kl)


@register(
    paper="Pairwise CRINGE, Some things are more CRINGE than others (arXiv 2312.16682); CRINGE (arXiv 2211.05826)",
    equation="g·[−logp_w + α Σ_t log(1 + e^{neg_t − pos_t})], g = σ((b − (logp_w − logp_l))/τ)",
    survey="S29–30",
    attributes={"feedback-source": "AI", "optimization": "Online"},
)
def cringe(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    pos_score: Tensor,  # (P, T) logit of a rival drawn from the likeliest other tokens
    neg_score: Tensor,  # (P, T) logit of the rejected completion's token
    mask: Tensor,  # (P, T) bool, the rejected completion's tokens
    alpha: float = 1.0,
    b: float = 0.0,
    tau: float = 1.0,
) -> Losses:
    """Pairwise CRINGE: the chosen's likelihood, and each rejected token against a rival token, times a gate.

    L = g·[−logp_w + α Σ_t log(1 + e^{neg_score_t − pos_score_t})] over the masked t, and the gate
    g = σ((b − (logp_w − logp_l))/τ) without gradient: it closes on a pair whose log-probs differ by more than b.
    Survey S29–30.
    """
    check(alpha >= 0, "alpha >= 0", alpha)
    check(tau > 0, "tau > 0", tau)
    check_bool("mask", mask)
    # The mask comes before the arithmetic: outside it there may be NaN, and 0·NaN would make the gradient NaN.
    lead = torch.where(mask, pos_score, 0.0) - torch.where(mask, neg_score, 0.0)
    contrast = torch.where(mask, -logsigmoid(lead), 0.0).sum(dim=-1)
    gate = torch.sigmoid((b - (logp_w - logp_l).detach()) / tau)
    losses = gate * (alpha * contrast - logp_w)
    return losses, pair_metrics(logp_w, logp_l, logp_w, logp_l, nll_loss=-logp_w, contrast=contrast, gate=gate)


def wpo_weights(logp: Tensor, log_sum_sq_probs: Tensor, length: Tensor, *, clamp: bool = True) -> Tensor:
    """Computes WPO's weights (arXiv 2406.11827): how close a completion is to the policy's own samples.

    w = exp(mean over tokens of (log p − log Σp²)), from each row's sums of the two and its length in tokens, detached,
    of the shape of `logp`; 1 for a row without tokens. A pair's loss is multiplied by w_w·w_l. clamp: at most 1 (the
    authors cap the pair's product).
    """
    weights = ((logp - log_sum_sq_probs) / length.clamp(min=1)).detach().exp()
    return weights.clamp(max=1) if clamp else weights
