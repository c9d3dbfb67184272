"""What looks at more of the vocabulary than a log-prob: divergences, rival tokens, weights. See pairwise.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .math import check, check_bool
from .pairwise import Losses, _check_beta, _metrics
from .registry import register


@register(
    paper="Token-level Direct Preference Optimization (arXiv 2404.11999)",
    equation="−log σ(h − αβ(kl_l − sg kl_w))",
    survey="S25–28",
    attributes="Implicit Point Token Positive Preference Human Pair Uncontrol KL Off Offline Separate",
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
    version: int = 2,
) -> Losses:
    """Token-level DPO: the rejected completion may not drift further from the reference than the chosen one.

    `version=1`: L = −log σ(h − β(kl_l − kl_w)), survey S28. `version=2`: L = −log σ(h − αβ(kl_l − sg kl_w)). The
    divergence is the forward one, reference ‖ policy, and carries gradient.
    """
    _check_beta(beta)
    check(alpha >= 0, "alpha >= 0", alpha)
    check(version in (1, 2), "version 1 or 2", version)
    reward_w, reward_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)
    drift = beta * (kl_l - kl_w) if version == 1 else alpha * beta * (kl_l - kl_w.detach())
    losses = -logsigmoid(reward_w - reward_l - drift)
    kl = {"kl/chosen": kl_w, "kl/rejected": kl_l}
    return losses, _metrics(reward_w, reward_l, logp_w, logp_l, **kl)


@register(
    paper="Pairwise CRINGE, Some things are more CRINGE than others (arXiv 2312.16682); CRINGE (arXiv 2211.05826)",
    equation="g·[−logp_w + α Σ_t log(1 + e^{neg_t − pos_t})], g = σ((b − (logp_w − logp_l))/τ)",
    survey="S29–30",
    attributes="Implicit Point Response Positive Preference AI Pair Uncontrol KL Off Online Separate",
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
    """Pairwise CRINGE: the chosen's likelihood, and each rejected token against a rival, while a gate is open.

    L = g·[−logp_w + α Σ_t log(1 + e^{neg_score_t − pos_score_t})] over the masked t, and the gate
    g = σ((b − (logp_w − logp_l))/τ) without gradient: a pair told apart by more than b is let go. Survey S29–30.
    """
    check(alpha >= 0, "alpha >= 0", alpha)
    check(tau > 0, "tau > 0", tau)
    check_bool("mask", mask)
    # The mask comes before the arithmetic: what stands outside it may be NaN, and a gradient of 0·NaN is.
    lead = torch.where(mask, pos_score, 0.0) - torch.where(mask, neg_score, 0.0)
    contrast = torch.where(mask, -logsigmoid(lead), 0.0).sum(dim=-1)
    gate = torch.sigmoid((b - (logp_w - logp_l).detach()) / tau)
    losses = gate * (alpha * contrast - logp_w)
    return losses, _metrics(logp_w, logp_l, logp_w, logp_l, nll_loss=-logp_w, contrast=contrast, gate=gate)


def wpo_weights(logp: Tensor, log_sum_sq_probs: Tensor, length: Tensor, *, clamp: bool = True) -> Tensor:
    """How much a completion is the policy's own (WPO, arXiv 2406.11827): detached weights, of the shape of `logp`.

    w = exp(mean over tokens of (log p − log Σp²)), from each row's sums of the two and its length in tokens; 1 for a
    row of no tokens. A pair's loss is multiplied by w_w·w_l. clamp: at most 1 (the authors cap the pair's product).
    """
    weights = ((logp - log_sum_sq_probs) / length.clamp(min=1)).detach().exp()
    return weights.clamp(max=1) if clamp else weights
