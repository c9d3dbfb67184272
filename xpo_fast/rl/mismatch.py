"""The mismatch between the sampler and the policy: how far apart their probabilities are, and weights that correct it.

A completion is drawn from μ, the sampler, and trained on as if from π, the policy. Both are asked for the log-prob of
each token drawn; w = π/μ of a token, or the product over a completion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = ("token", "sequence")
BOUNDS = ("truncate", "mask")
_MOST = 40.0


def importance_weights(
    log_ratio: Tensor,  # (R, C)
    mask: Tensor,  # (R, C) bool
    *,
    level: str = "token",
    mode: str = "truncate",
    lower: float = 0.0,
    upper: float = math.inf,
) -> Tensor:
    """Computes the importance weights of sampled tokens, policy over sampler: w = exp(log π − log μ), bounded.

    level: "token", a weight for each token, (R, C), 1 outside the mask; "sequence", for each completion that of its
        tokens' sum of log-ratios, (R,).
    mode: "truncate" clamps weights to [lower, upper]; "mask" makes those outside 0, so that their tokens are not
        learned from.

    Truncated: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025). Masked: Liu
    et al., "When speed kills stability" (2025). They are TRL's vllm_importance_sampling_mode token_truncate,
    token_mask, sequence_truncate and sequence_mask. Raises ValueError for another level or mode, and for bounds that
    are not 0 ≤ lower < upper.
    """
    if level not in LEVELS or mode not in BOUNDS:
        raise ValueError(
            f"expected level of {', '.join(LEVELS)} and mode of {', '.join(BOUNDS)}, got {level!r}, {mode!r}"
        )
    if not 0 <= lower < upper:
        raise ValueError(f"expected 0 ≤ lower < upper, got lower={lower!r}, upper={upper!r}")
    log_w = torch.where(mask, log_ratio, 0.0)
    w = (log_w if level == "token" else log_w.sum(dim=1)).exp()
    w = w.clamp(min=lower, max=upper) if mode == "truncate" else torch.where((w >= lower) & (w <= upper), w, 0.0)
    return torch.where(mask, w, 1.0) if level == "token" else w


def mismatch(log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
    """Computes how far the sampler is from the policy, from (R, C) log π − log μ of the tokens drawn from μ.

    off_policy/logp_gap: mean over tokens of |log π − log μ|. off_policy/kl: KL(μ‖π) per token by k3, the mean of
    w − 1 − log w (Schulman, 2020), which no sample makes negative. off_policy/chi2: χ²(π‖μ) per token, the mean of
    w² − 1. off_policy/chi2_sequence: the same of whole completions, the mean over rows of exp(2 Σ log w) − 1. All are
    0 where the two agree; NaN without a token. mask: (R, C) bool; rows without a token do not count. Ratios count as
    e⁴⁰ at most, so that the metrics stay finite.
    """
    rows = mask.any(dim=1)
    log_w = torch.where(mask, log_ratio, 0.0).double()
    tokens, whole = log_w[mask].clamp(max=_MOST), log_w.sum(dim=1)[rows].clamp(max=_MOST)
    return {
        "off_policy/logp_gap": float(tokens.abs().mean()),
        "off_policy/kl": float((tokens.expm1() - tokens).mean()),
        "off_policy/chi2": float((2 * tokens).expm1().mean()),
        "off_policy/chi2_sequence": float((2 * whole).expm1().mean()),
    }
