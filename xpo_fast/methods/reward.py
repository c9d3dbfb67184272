"""Losses that train a reward or preference model, and functions of its rewards.

A method takes a model's outputs, one entry or K of them per pair (P,) or row (B,), and returns (losses, metrics of
detached tensors). Symbols: r_w, r_l the rewards of the chosen and the rejected completion, σ the logistic function,
BT = −log σ(r_w − r_l), ε = `label_smoothing`. Out-of-range hyperparameters and bad data raise ValueError.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .math import (
    Losses,
    check,
    check_beta,
    check_bool,
    check_choice,
    check_rows,
    check_smoothing,
    pair_metrics,
    smoothed,
)
from .pairwise import dpo
from .registry import register

_ATTRIBUTES = {"reward": "Explicit", "length": "-", "divergence": "-", "policy": "-"}


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the last dimension where mask; NaN, which the reduction leaves out, for an empty row."""
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1)


def _first(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the first entry of each row (U, K) where mask; 0 where there is none."""
    return torch.where(mask & (mask.cumsum(1) == 1), x, 0).sum(1)


@register(
    paper="Training language models to follow instructions with human feedback (arXiv 2203.02155); margin: Llama 2 "
    "(arXiv 2307.09288); smoothing: arXiv 2401.06080; centring: arXiv 2312.09244",
    equation="−(1−ε) log σ(h) − ε log σ(−h) + c(r_w + r_l)², h = r_w − r_l − margin",
    survey="S1",
    attributes=_ATTRIBUTES,
)
def bradley_terry(
    *,
    reward_w: Tensor,  # (P,)
    reward_l: Tensor,  # (P,)
    margin: Tensor | None = None,  # (P,) by how much the chosen completion is better; 0 if not given
    label_smoothing: float = 0.0,
    center: float = 0.0,
) -> Losses:
    """Bradley–Terry reward model: the likelihood that the chosen completion wins.

    L = −(1−ε) log σ(h) − ε log σ(−h) + c(r_w + r_l)², h = r_w − r_l − margin, c = `center`, which keeps the rewards of
    a pair around 0 (they are defined up to a constant). Survey S1 with K = 2. `center` is TRL's
    center_rewards_coefficient.
    """
    check_smoothing(label_smoothing)
    check(center >= 0, "center >= 0", center)
    h = reward_w - reward_l if margin is None else reward_w - reward_l - margin
    losses = smoothed(h, label_smoothing)
    if center:
        losses = losses + center * (reward_w + reward_l) ** 2
    return losses, pair_metrics(reward_w, reward_l)


@register(
    paper="Training language models to follow instructions with human feedback (arXiv 2203.02155)",
    equation="−1/C(K,2) Σ log σ(r_i − r_j) over rank_i < rank_j",
    survey="S1",
    attributes={**_ATTRIBUTES, "feedback-form": "List"},
    unit="list",
)
def k_wise(
    *,
    rewards: Tensor,  # (P, K)
    ranks: Tensor,  # (P, K) 1 = best
    mask: Tensor | None = None,  # (P, K) bool, where K varies
) -> Losses:
    """InstructGPT's reward model: all comparisons of the K ranked completions of a prompt as one unit.

    L = −1/C(K,2) Σ log σ(r_i − r_j) over the pairs in which i is ranked strictly better. Survey S1. Ties add 0 and
    still count among the C(K,2). K = 1 gives 0. ValueError for a rank below 1.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    wrong = mask & ~(ranks >= 1)
    check_rows(
        ~wrong.any(1),
        "ranks from 1, the best",
        "rank scores first; leave missing completions out with mask=",
        rank=_first(ranks, wrong),
    )
    r = torch.where(mask, rewards, 0.0)
    better = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    gap = r[:, :, None] - r[:, None, :]
    k = mask.sum(1)
    losses = -torch.where(better, logsigmoid(gap), 0.0).sum((1, 2)) / (k * (k - 1) / 2).clamp(min=1)
    right = (gap > 0).to(r.dtype).flatten(1)
    return losses, {
        "rewards/mean": _masked_mean(r, mask).detach(),
        "rewards/accuracies": _masked_mean(right, better.flatten(1)).detach(),
    }


@register(
    paper="ArmoRM: Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts (arXiv "
    "2406.12845), first stage",
    equation="Σ_k (r_k − target_k)²",
    attributes={**_ATTRIBUTES, "feedback": "-", "feedback-form": "-"},
    unit="row",
)
def regression(
    *,
    rewards: Tensor,  # (B, K) one reward per objective
    targets: Tensor,  # (B, K) the annotators' ratings
    mask: Tensor | None = None,  # (B, K) bool, where a completion is not rated on every objective
) -> Losses:
    """Regression of K rewards on absolute ratings.

    L = Σ_k (r_k − target_k)² over the objectives in `mask`. ValueError for a rating that is not finite and not masked.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    wrong = mask & ~torch.isfinite(targets)
    check_rows(~wrong.any(1), "finite targets", "leave the missing ones out with mask=", target=_first(targets, wrong))
    error = torch.where(mask, rewards, 0.0) - torch.where(mask, targets, 0.0)
    return (error**2).sum(1), {
        "rewards/mean": _masked_mean(rewards, mask).detach(),
        "error": _masked_mean(error.abs(), mask).detach(),
    }


@register(
    paper="ArmoRM: Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts (arXiv "
    "2406.12845), second stage",
    equation="−(1−ε) log σ(h) − ε log σ(−h), h = R_w − R_l, R = Σ_k softmax(gate)_k r_k",
    attributes=_ATTRIBUTES,
)
def gated(
    *,
    rewards_w: Tensor,  # (P, K)
    rewards_l: Tensor,  # (P, K)
    gate_w: Tensor,  # (P, K) logits of the gate
    gate_l: Tensor,  # (P, K) ArmoRM's gate sees the prompt alone: gate_w again
    label_smoothing: float = 0.0,
) -> Losses:
    """Bradley–Terry on a gated mixture of K rewards; to train the gate alone, detach the rewards.

    L = −(1−ε) log σ(h) − ε log σ(−h), h = R_w − R_l, R = Σ_k softmax(gate)_k r_k.
    """
    check_smoothing(label_smoothing)
    reward_w, reward_l = (gate_w.softmax(1) * rewards_w).sum(1), (gate_l.softmax(1) * rewards_l).sum(1)
    return smoothed(reward_w - reward_l, label_smoothing), pair_metrics(reward_w, reward_l)


@register(
    paper="Nash Learning from Human Feedback (arXiv 2312.00886), its preference model",
    equation="−p log σ(z) − (1−p) log σ(−z)",
    attributes={**_ATTRIBUTES, "reward-form": "Preference"},
)
def preference_model(
    *,
    logit: Tensor,  # (P,) of the first completion beating the second
    prob_w: Tensor,  # (P,) share of the annotators for whom it does
) -> Losses:
    """Preference model P(y ≻ y′ | x) = σ(z), which reads both completions and need not be transitive.

    L = −p log σ(z) − (1−p) log σ(−z), z = `logit`, p = `prob_w`. ValueError for a p outside [0, 1].
    """
    check_rows((prob_w >= 0) & (prob_w <= 1), "prob_w in [0, 1]", "turn scores into probabilities first", prob_w=prob_w)
    losses = -prob_w * logsigmoid(logit) - (1 - prob_w) * logsigmoid(-logit)
    return losses, {
        "accuracy": ((logit > 0) == (prob_w > 0.5)).to(logit.dtype),
        "prob_w": torch.sigmoid(logit).detach(),
    }


@register(
    paper="A General Language Assistant as a Laboratory for Alignment (arXiv 2112.00861), binary discrimination",
    equation="desirable: −log σ(z); undesirable: −log σ(−z)",
    attributes={**_ATTRIBUTES, "feedback": "Binary", "feedback-form": "-"},
    unit="row",
)
def discriminator(
    *,
    logit: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
) -> Losses:
    """Binary classifier of single completions: a reward model from thumbs up and down.

    L = −log σ(z) where desirable, −log σ(−z) where not, z = `logit`.
    """
    check_bool("desirable", desirable)
    losses = -logsigmoid(torch.where(desirable, logit, -logit))
    return losses, {"accuracy": ((logit > 0) == desirable).to(logit.dtype)}


@register(
    paper="GRM: Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs (arXiv 2406.10216)",
    equation='(1−α)·BT + α·reg; reg "sft": −log σ(β·logp_w), "dpo": −log σ(h)',
    attributes={**_ATTRIBUTES, "sft": "Merge"},
)
def grm(
    *,
    reward_w: Tensor,  # (P,)
    reward_l: Tensor,  # (P,)
    logp_w: Tensor,  # (P,) of the frozen LM head on the reward model's own trunk
    logp_l: Tensor | None = None,  # (P,) needed by regulariser="dpo"
    ref_logp_w: Tensor | None = None,  # (P,)
    ref_logp_l: Tensor | None = None,  # (P,)
    alpha: float = 0.01,
    beta: float = 0.1,
    regulariser: Literal["sft", "dpo"] = "sft",
) -> Losses:
    """Bradley–Terry with a text-generation loss on the same trunk, which keeps its features general.

    L = (1−α)·BT + α·reg. `regulariser="sft"`: reg = −log σ(β·logp_w). `regulariser="dpo"`: reg = −log σ(h),
    h = β(Δw − Δl), or β(logp_w − logp_l) where no reference is given.
    """
    check(0 <= alpha <= 1, "alpha in [0, 1]", alpha)
    check_beta(beta)
    if regulariser == "sft":
        reg = -logsigmoid(beta * logp_w)
    else:
        if logp_l is None:
            raise ValueError('missing logp_l: regulariser="dpo" compares both completions')
        if (ref_logp_w is None) != (ref_logp_l is None):
            raise ValueError("expected ref_logp_w and ref_logp_l, or neither; got one of them")
        ratio = logp_w - logp_l
        if ref_logp_w is not None and ref_logp_l is not None:
            ratio = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)
        reg = -logsigmoid(beta * ratio)
    bt = -logsigmoid(reward_w - reward_l)
    return (1 - alpha) * bt + alpha * reg, pair_metrics(reward_w, reward_l, reward_loss=bt, policy_loss=reg)


@register(
    paper="HAF-RM: A Hybrid Alignment Framework for Reward Model Training (arXiv 2407.04185)",
    equation="BT − α log σ(h)",
    attributes={**_ATTRIBUTES, "sft": "Merge"},
    trains_head=True,
)
def haf(
    *,
    reward_w: Tensor,  # (P,)
    reward_l: Tensor,  # (P,)
    logp_w: Tensor,  # (P,) of the policy head on the same trunk
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Losses:
    """A reward head and a policy head on one trunk, trained together.

    L = BT − α log σ(h), the second term `dpo` of the policy head, h = β(Δw − Δl).
    """
    check(alpha >= 0, "alpha >= 0", alpha)
    bt = -logsigmoid(reward_w - reward_l)
    policy, _ = dpo(logp_w=logp_w, logp_l=logp_l, ref_logp_w=ref_logp_w, ref_logp_l=ref_logp_l, beta=beta)
    return bt + alpha * policy, pair_metrics(reward_w, reward_l, reward_loss=bt, policy_loss=policy)


@register(
    paper="Learning Goal-Conditioned Representations for Language Reward Models (arXiv 2407.13887)",
    equation="BT + λ(near_w + apart_l)",
    attributes=_ATTRIBUTES,
)
def goal_conditioned(
    *,
    reward_w: Tensor,  # (P,)
    reward_l: Tensor,  # (P,)
    near_w: Tensor,  # (P,)
    apart_l: Tensor,  # (P,)
    lam: float = 0.5,
) -> Losses:
    """Bradley–Terry, and states that are alike along what is preferred and unlike along what is not.

    L = BT + λ(near_w + apart_l), near_w the mean of −log σ(f(h_s, h_g)) over pairs of states s < g of the chosen
    completion, apart_l that of −log(1 − σ(f(h_s, h_g))) over those of the rejected one, f the cosine. The paper draws
    one source and one goal of each, an estimate of this mean. The cosine of a state with the goal, the mean of the
    preferred completions' last states, is then the Q-value of a completion that is only begun.
    """
    check(lam >= 0, "lam >= 0", lam)
    bt = -logsigmoid(reward_w - reward_l)
    metrics = pair_metrics(reward_w, reward_l, reward_loss=bt, near=near_w, apart=apart_l)
    return bt + lam * (near_w + apart_l), metrics


@register(
    paper="Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), SimCSE on the "
    "difference of a pair's hidden states",
    equation="−(1−ε) log σ(h) − ε log σ(−h) − α log(e^{cos(v_i, v'_i)/τ} / Σ_j e^{cos(v_i, v'_j)/τ})",
    attributes=_ATTRIBUTES,
    unit="batch",
)
def contrastive(
    *,
    reward_w: Tensor,  # (P,)
    reward_l: Tensor,  # (P,)
    view: Tensor,  # (P, D) h_w − h_l under one dropout mask
    other_view: Tensor,  # (P, D) the same under another
    margin: Tensor | None = None,  # (P,)
    label_smoothing: float = 0.0,
    alpha: float = 0.1,
    temperature: float = 0.05,
) -> Losses:
    """Bradley–Terry with a contrastive loss on the hidden states, which keeps the differences of pairs apart.

    L_i = BT_i − α log(e^{cos(v_i, v'_i)/τ} / Σ_j e^{cos(v_i, v'_j)/τ}), BT as in `bradley_terry`, v = h_w − h_l the
    difference of the states that the rewards are read from, v' the same under another dropout mask, j over the pairs of
    the batch, τ = `temperature`: the pairs of a batch are one another's negatives, and one pair alone adds 0. The paper
    draws the masks in the whole model by two forwards; the trainer draws them on the states of one forward.
    """
    check(alpha >= 0, "alpha >= 0", alpha)
    losses, metrics = bradley_terry(
        reward_w=reward_w, reward_l=reward_l, margin=margin, label_smoothing=label_smoothing
    )
    apart = info_nce(view, other_view, temperature)
    return losses + alpha * apart, {**metrics, "contrastive_loss": apart.detach()}


@register(
    paper="Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080); MetaRM: Shifted "
    "Distributions Alignment via Meta-Learning (arXiv 2405.00438)",
    equation="−(1−ε) log σ(h) − ε log σ(−h) at θ' = θ + η ∂J/∂θ, J = 2/K² Σ_{i<j} σ(|r_i − r_j|) of policy samples",
    attributes=_ATTRIBUTES,
)
def meta(
    *,
    reward_w: Tensor,  # (P,) at θ'
    reward_l: Tensor,  # (P,)
    margin: Tensor | None = None,  # (P,)
    label_smoothing: float = 0.0,
) -> Losses:
    """Bradley–Terry at weights that tell the policy's own samples apart, which keeps the model sharp off its data.

    θ' = θ + η ∂J/∂θ, J = mean over prompts of `spread`; L = BT(θ'), and θ ← θ − lr ∂BT/∂θ'. The function is
    `bradley_terry` of rewards at θ'; the trainer takes the inner step on a batch of `samples`, rate η = `inner_lr`,
    before each batch of pairs, and applies the gradient found there to θ: the first-order form of the paper's.
    """
    return bradley_terry(reward_w=reward_w, reward_l=reward_l, margin=margin, label_smoothing=label_smoothing)


@register(
    paper="Fine-Tuning Language Models with Reward Learning on Policy (arXiv 2403.19279), its multi-view loss; form: "
    "Learning Robust Representations via Multi-View Information Bottleneck (arXiv 2002.07017)",
    equation="−(1−ε) log σ(h) − ε log σ(−h) + α·mean_s(InfoNCE(z_s, z'_s) + κ/2·‖z_s − z'_s‖²)",
    attributes=_ATTRIBUTES,
    unit="batch",
)
def rlp(
    *,
    reward_w: Tensor,  # (P,)
    reward_l: Tensor,  # (P,)
    sample_view: Tensor,  # (S, D) states of the policy's samples under one dropout mask
    other_sample_view: Tensor,  # (S, D) the same under another
    margin: Tensor | None = None,  # (P,)
    label_smoothing: float = 0.0,
    alpha: float = 0.1,
    kappa: float = 0.1,
    temperature: float = 0.05,
) -> Losses:
    """Bradley–Terry with an unsupervised loss that keeps the model's features on the policy's distribution.

    L_i = BT_i + α·mean_s [−log(e^{cos(z_s, z'_s)/τ} / Σ_t e^{cos(z_s, z'_t)/τ}) + κ/2·‖z_s − z'_s‖²], z the states of
    the policy's samples scaled to length 1, z' the same under another dropout mask, τ = `temperature`. It is the
    multi-view information bottleneck −I(z; z') + κ·SKL: InfoNCE bounds the information that the views share, and
    ½‖z − z'‖² is the symmetrised KL of unit Gaussians around them, the information that they do not share. The second
    term is that of the batch, alike for each pair; without samples it is 0.
    """
    check(alpha >= 0, "alpha >= 0", alpha)
    check(kappa >= 0, "kappa >= 0", kappa)
    losses, metrics = bradley_terry(
        reward_w=reward_w, reward_l=reward_l, margin=margin, label_smoothing=label_smoothing
    )
    apart = info_nce(sample_view, other_sample_view, temperature)
    off = 0.5 * ((_unit(sample_view) - _unit(other_sample_view)) ** 2).sum(1)
    views = (apart + kappa * off).sum() / max(len(apart), 1)
    seen = {"views_loss": views.detach().expand_as(losses)} if len(apart) else {}
    return losses + alpha * views, {**metrics, **seen}


def info_nce(
    x: Tensor,  # (N, D)
    y: Tensor,  # (N, D)
    temperature: float,
) -> Tensor:
    """Computes −log(e^{cos(x_i, y_i)/τ} / Σ_j e^{cos(x_i, y_j)/τ}), (N,), as SimCSE does (arXiv 2104.08821).

    The cosine with a vector of 0 is 0, and so is its gradient.
    """
    check(temperature > 0, "temperature > 0", temperature)
    return -(_unit(x) @ _unit(y).T / temperature).log_softmax(1).diagonal()


def spread(
    rewards: Tensor,  # (P, K) of the samples of P prompts
    mask: Tensor | None = None,  # (P, K) bool, where K varies
) -> Tensor:
    """Computes J = 2/K² Σ_{i<j} σ(|r_i − r_j|), (P,), MetaRM's measure of how far a model tells samples apart.

    Its gradient is 0 between samples of equal rewards. (arXiv 2405.00438.)
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    r = torch.where(mask, rewards, 0.0)
    both = (mask[:, :, None] & mask[:, None, :]).triu(1)
    apart = torch.sigmoid((r[:, :, None] - r[:, None, :]).abs())
    return 2 * torch.where(both, apart, 0.0).sum((1, 2)) / (mask.sum(1) ** 2).clamp(min=1)


def ensemble(
    rewards: Tensor,  # (..., E) of E reward models
    how: str = "mean",
    coef: float = 1.0,
) -> Tensor:
    """Computes one reward (...) from those of E models: "mean", "worst" (their minimum) or "uncertainty".

    uncertainty: mean − coef·variance, the variance over the models divided by E, as in Reward Model Ensembles Help
    Mitigate Overoptimization (arXiv 2310.02743). E = 1 gives the reward itself in all three.
    """
    check_choice("how", how, ("mean", "worst", "uncertainty"))
    check(coef >= 0, "coef >= 0", coef)
    if how == "worst":
        return rewards.min(-1).values
    mean = rewards.mean(-1)
    return mean - coef * rewards.var(-1, correction=0) if how == "uncertainty" else mean


def length_normalised(
    reward: Tensor,  # (...)
    length: Tensor,  # (...) tokens
    alpha: float,
) -> Tensor:
    """Returns reward / (α + length), α ≥ 0 in tokens: completions much shorter than α keep their order."""
    check(alpha >= 0, "alpha >= 0", alpha)
    return reward / (alpha + length)


def length_penalty(
    length: Tensor,  # (...) tokens
    target: float,
    lam: float,
) -> Tensor:
    """Returns λ·|length − target|, to be added to a loss or subtracted from a reward."""
    check(lam >= 0, "lam >= 0", lam)
    return lam * (length - target).abs()


def odin(
    *,
    quality_w: Tensor,  # (P,) the quality head's rewards
    quality_l: Tensor,  # (P,)
    length_w: Tensor,  # (P,) the length head's rewards
    length_l: Tensor,  # (P,)
    len_w: Tensor,  # (P,) tokens
    len_l: Tensor,  # (P,)
    weight_quality: Tensor,  # (D,) of the quality head
    weight_length: Tensor,  # (D,) of the length head
    lambda_length: float = 1.0,
    lambda_orthogonal: float = 1.0,
) -> Tensor:
    """Computes ODIN's total loss (), of a reward model with a head for quality and one for length (arXiv 2402.07319).

    L = mean −log σ(q_w + l_w − q_l − l_l) + λ_L(|ρ(q, len)| − ρ(l, len)) + λ_O |cos(W_q, W_l)|, ρ Pearson's correlation
    over the 2P completions. The sum of the heads is trained to rank, the length head to follow the length, the quality
    head not to; reinforcement learning uses q alone. ρ is that of the tensors given: gather them over ranks first
    where a rank's batch is small. It is 0, with gradient 0, where one side is constant.

    As in the paper; its authors' later code writes 1 − ρ(l, len), the same gradient, and leaves the third term out.
    """
    check(lambda_length >= 0, "lambda_length >= 0", lambda_length)
    check(lambda_orthogonal >= 0, "lambda_orthogonal >= 0", lambda_orthogonal)
    rank = -logsigmoid(quality_w + length_w - quality_l - length_l).mean()
    lengths = torch.cat([len_w, len_l]).to(quality_w.dtype)
    rho_quality = _cosine(*_centred(torch.cat([quality_w, quality_l]), lengths))
    rho_length = _cosine(*_centred(torch.cat([length_w, length_l]), lengths))
    cosine = _cosine(weight_quality.flatten(), weight_length.flatten())
    return rank + lambda_length * (rho_quality.abs() - rho_length) + lambda_orthogonal * cosine.abs()


def _centred(*xs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x - x.mean() for x in xs)


def _unit(x: Tensor) -> Tensor:
    """Returns the rows of x (N, D) scaled to length 1; a row of 0 as it is, with gradient 0."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norms > 0, x / torch.where(norms > 0, norms, 1.0), 0.0)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Returns the cosine of two vectors; 0, with gradient 0, if one of them is 0."""
    norms = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    return torch.where(norms > 0, (x * y).sum() / torch.where(norms > 0, norms, 1.0), 0.0)
