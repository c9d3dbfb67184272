"""Losses of one completion and a thumbs up or down. Conventions as in pairwise.py; one row is one unit: (B,)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..reduce import sum_over_ranks
from .math import Losses, check, check_beta, check_bool
from .registry import register
from .survey import NO_REWARD

_register = partial(register, attributes={**NO_REWARD, "feedback": "Binary", "feedback-form": "-"}, unit="row")


def _metrics(desirable: Tensor, reward: Tensor, logp: Tensor, **others: Tensor) -> dict[str, Tensor]:
    reward, logp = reward.detach(), logp.detach()
    # Each is a mean over the rows of one kind: NaN marks the others, and the reduction leaves them out.
    return {
        "rewards/chosen": torch.where(desirable, reward, torch.nan),
        "rewards/rejected": torch.where(desirable, torch.nan, reward),
        "logps/chosen": torch.where(desirable, logp, torch.nan),
        "logps/rejected": torch.where(desirable, torch.nan, logp),
        **{name: value.detach().expand_as(reward) for name, value in others.items()},
    }


def kto_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Returns KTO's reference point: max(0, mean of logp − ref_logp) over the mismatched rows of all ranks.

    logp, ref_logp (B,): log-probs of another prompt's completion after each prompt, under policy and reference.
    Returns a detached () tensor in nats, without β. Survey S34. Raises ValueError if there is one row in all.
    """
    ratio = (logp - ref_logp).detach()
    own = torch.stack([ratio.sum(), ratio.new_full((), ratio.numel())])
    total = sum_over_ranks(own)
    # This rank's rows are known without reading from the device; a rank with fewer than two reads the sum of all.
    rows = ratio.numel()
    if rows < 2 and total is not own:
        rows = int(total[1])
    if rows < 2:
        raise ValueError(
            "KTO estimates its reference point from prompts with another prompt's completion, so a batch needs at "
            f"least two rows over all ranks, got {rows}; raise the batch size"
        )
    return (total[0] / total[1]).clamp(min=0)


@_register(
    paper="KTO: Model Alignment as Prospect Theoretic Optimization (arXiv 2402.01306)",
    equation="desirable: λ_D(1 − σ(β(Δ − kl))); undesirable: λ_U(1 − σ(β(kl − Δ)))",
    survey="S32–34",
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
) -> Losses:
    """Kahneman–Tversky optimisation: a saturating gain or loss against a reference point.

    L = λ_D(1 − σ(β(Δ − kl))) where desirable, λ_U(1 − σ(β(kl − Δ))) where not; Δ = logp − ref_logp. Survey S32–34.
    `kl` carries no gradient.
    """
    check_beta(beta)
    check(lambda_d >= 0, "lambda_d >= 0", lambda_d)
    check(lambda_u >= 0, "lambda_u >= 0", lambda_u)
    check_bool("desirable", desirable)
    ratio = logp - ref_logp
    gain = beta * (ratio - kl.detach())
    losses = torch.where(desirable, lambda_d * torch.sigmoid(-gain), lambda_u * torch.sigmoid(gain))
    return losses, _metrics(desirable, beta * ratio, logp, kl=kl)


@_register(
    paper="Direct Reward Optimisation: Offline Regularised RL for LLMs Alignment (arXiv 2405.19107)",
    equation="½(reward − sg value − βΔ)²/β + ½(reward − value − β sg Δ)²",
    survey="S35–39",
    axes={"value": ("U",)},
)
def dro(
    *,
    logp: Tensor,  # (B,)
    ref_logp: Tensor,  # (B,)
    reward: Tensor,  # (B,)
    value: Tensor,  # (B,) V(x), learned beside the policy; may carry gradient
    beta: float = 1.0,
    variant: Literal["split", "square"] = "split",
) -> Losses:
    """Direct reward optimisation: βΔ regresses to the reward less a learned value of the prompt.

    `variant="split"`: L = ½(reward − sg value − βΔ)²/β + ½(reward − value − β·sg Δ)², whose gradients are S38 for
    the policy, that of S37 rescaled by 1/β as the authors do, and S39 for the value.
    `variant="square"`: L = ½(reward − value − βΔ)², S37 as printed.
    """
    check_beta(beta)
    implicit, advantage = beta * (logp - ref_logp), reward - value
    if variant == "split":
        losses = (advantage.detach() - implicit) ** 2 / (2 * beta) + (advantage - implicit.detach()) ** 2 / 2
    else:
        losses = (advantage - implicit) ** 2 / 2
    metrics = {"reward": reward, "value": value, "rewards/implicit": implicit, "logps": logp}
    return losses, {name: x.detach().expand_as(losses) for name, x in metrics.items()}


def bco_state(rewards: Tensor, valid: Tensor, mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the running mean of `bco`'s rewards and its number of rows, with a batch's rows of all ranks added.

    rewards (B,): βΔ; valid (B,) bool: the rows that count; mean, count (), both 0 at first. Every row seen has the
    same weight, as in TRL's running moments. Call it before `bco`, whose `delta` is the mean.
    """
    excess = torch.where(valid, rewards.detach() - mean, 0.0).sum()
    total, rows = sum_over_ranks(torch.stack([excess, valid.sum().to(excess.dtype)])).unbind()
    count = count + rows
    return mean + total / count.clamp(min=1), count


def _remember_rewards(
    remembered: Mapping[str, Tensor], inputs: Mapping[str, Tensor], valid: Tensor, *, beta: float, **_: object
) -> dict[str, Tensor]:
    rewards = beta * (inputs["logp"] - inputs["ref_logp"])
    mean, count = (remembered.get(name, rewards.new_zeros(())) for name in ("delta", "delta_count"))
    mean, count = bco_state(rewards, valid, mean, count)
    return {"delta": mean, "delta_count": count}


@_register(
    paper="Binary Classifier Optimization for Large Language Model Alignment (arXiv 2404.04656)",
    equation="desirable: −log σ(βΔ − delta); undesirable: −log σ(delta − βΔ)",
    unit="batch",
    state=_remember_rewards,
)
def bco(
    *,
    logp: Tensor,  # (B,)
    ref_logp: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    delta: Tensor,  # () shift of the rewards, see bco_state
    beta: float = 0.1,
) -> Losses:
    """Binary classifier optimisation: the implicit reward is the logit of a thumbs up.

    L = −log σ(βΔ − delta) where desirable, −log σ(delta − βΔ) where not; Δ = logp − ref_logp. `delta`, in units of
    reward and without gradient, is the running mean of βΔ (TRL's; the paper's is midway between the means of the two
    kinds of rows).
    """
    check_beta(beta)
    check_bool("desirable", desirable)
    reward = beta * (logp - ref_logp)
    logit = reward - delta.detach()
    losses = -logsigmoid(torch.where(desirable, logit, -logit))
    return losses, _metrics(desirable, reward, logp, delta=delta)


@_register(
    paper="Anchored Preference Optimization (arXiv 2408.06266)",
    equation="desirable: λ_D(1 − σ(βΔ)); undesirable: λ_U σ(βΔ)",
)
def apo_zero_unpaired(
    *,
    logp: Tensor,  # (B,)
    ref_logp: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
) -> Losses:
    """`apo_zero` without pairs: `kto` whose reference point is the reference itself.

    L = λ_D(1 − σ(βΔ)) where desirable, λ_U·σ(βΔ) where not; as TRL's loss type of KTOTrainer.
    """
    check_beta(beta)
    check(lambda_d >= 0, "lambda_d >= 0", lambda_d)
    check(lambda_u >= 0, "lambda_u >= 0", lambda_u)
    check_bool("desirable", desirable)
    reward = beta * (logp - ref_logp)
    losses = torch.where(desirable, lambda_d * torch.sigmoid(-reward), lambda_u * torch.sigmoid(reward))
    return losses, _metrics(desirable, reward, logp)
