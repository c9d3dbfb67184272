"""Losses of one completion and a thumbs up or down. Conventions as in pairwise.py, one row a unit: (B,)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reduce import sum_over_ranks
from .math import check
from .registry import register


def kto_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KTO's reference point: max(0, mean of logp − ref_logp over mismatched rows), over the rows of all ranks.

    logp, ref_logp (B,): log-probs of another prompt's completion after each prompt, under policy and reference.
    Returns a detached () tensor in nats, without β. Survey S34. ValueError if there is one row in all.
    """
    ratio = (logp - ref_logp).detach()
    total = sum_over_ranks(torch.stack([ratio.sum(), ratio.new_tensor(float(ratio.numel()))]))
    if total[1] < 2:
        raise ValueError(
            "KTO estimates its reference point from prompts with another prompt's completion, so a batch needs at "
            f"least two rows over all ranks, got {int(total[1])}; raise the batch size"
        )
    return (total[0] / total[1]).clamp(min=0)


@register(
    paper="KTO: Model Alignment as Prospect Theoretic Optimization (arXiv 2402.01306)",
    equation="desirable: λ_D(1 − σ(β(Δ − kl))); undesirable: λ_U(1 − σ(β(kl − Δ)))",
    survey="S32–34",
    attributes="- - - - Binary Human - Uncontrol KL Off Offline Separate",
    unit="row",
)
def kto(
    *,
    logp: Tensor,  # (B,)
    ref_logp: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    kl: Tensor,  # () reference point in nats, see kto_kl
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kahneman–Tversky optimisation: a saturating gain or loss against a reference point.

    L = λ_D(1 − σ(β(Δ − kl))) where desirable, λ_U(1 − σ(β(kl − Δ))) where not; Δ = logp − ref_logp. Survey S32–34.
    `kl` carries no gradient.
    """
    check(beta > 0, "beta > 0", beta)
    check(lambda_d >= 0, "lambda_d >= 0", lambda_d)
    check(lambda_u >= 0, "lambda_u >= 0", lambda_u)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be a bool tensor, got {desirable.dtype}")
    if kl.dim() != 0:
        raise ValueError(f"kl must be one number () for all rows, see kto_kl; got a tensor {tuple(kl.shape)}")
    ratio = logp - ref_logp
    gain = beta * (ratio - kl.detach())
    losses = torch.where(desirable, lambda_d * torch.sigmoid(-gain), lambda_u * torch.sigmoid(gain))
    reward, nan = (beta * ratio).detach(), logp.new_tensor(float("nan"))
    # A mean over the rows of one kind: NaN marks the others, and the reduction leaves them out.
    metrics = {
        "rewards/chosen": torch.where(desirable, reward, nan),
        "rewards/rejected": torch.where(desirable, nan, reward),
        "logps/chosen": torch.where(desirable, logp.detach(), nan),
        "logps/rejected": torch.where(desirable, nan, logp.detach()),
        "kl": kl.detach().expand_as(reward),
    }
    return losses, metrics
