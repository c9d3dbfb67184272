"""The values that the head and the objective return: token statistics, and a loss with its metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

IGNORE_INDEX = -100  # the target of a position that is not scored


@dataclass
class TokenStats:
    """Statistics of the next-token distribution at every position, each shaped like `targets`.

    They are float32 (float64 for float64 operands); 0, or False, where the target is ignored; None if not requested.
    z are the final logits (scaled, capped, divided by the temperature), y the target and p = softmax z.
    """

    logp: Tensor  # z_y − lse; differentiable
    lse: Tensor  # log Σ e^z; differentiable
    entropy: Tensor | None = None  # −Σ p log p; differentiable
    kl: Tensor | None = None  # KL(ref ‖ policy) over the vocabulary; differentiable in the policy
    reverse_kl: Tensor | None = None  # KL(policy ‖ ref); differentiable in the policy
    jsd: Tensor | None = None  # generalised Jensen–Shannon divergence from ref; differentiable in the policy
    log_sum_sq_probs: Tensor | None = None  # log Σ p²; detached
    mean_logit: Tensor | None = None  # mean of z over the vocabulary; detached
    top1: Tensor | None = None  # bool: no token is more likely than the target
    selected_logp: Tensor | None = None  # (…, K): z_id − lse of the selected ids; differentiable


@dataclass
class LossOutput:
    """The result of an objective: a differentiable loss, and detached tensors to log."""

    loss: Tensor  # (), or one entry per unit with reduction="none"
    metrics: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)  # number of entries in the mean of each metric
    losses: tuple[Tensor, ...] = ()  # the loss of each method of a sum, without its weight, detached
    token_reward: Tensor | None = None  # shaped as targets: token_dpo's β(log π − log ref)
