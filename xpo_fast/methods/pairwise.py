"""Losses of a chosen and a rejected completion.

Every function takes (P,) float tensors, log-probs in nats summed over a completion's tokens and lengths in tokens,
and returns (losses (P,), metrics of detached (P,) tensors). Symbols: Δw = logp_w − ref_logp_w, Δl likewise,
h = β(Δw − Δl), σ the logistic function, m̄ = m / len. Out-of-range hyperparameters raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..reduce import sum_over_ranks
from .math import (
    Losses,
    check,
    check_beta,
    check_lengths,
    check_rows,
    check_smoothing,
    log_odds,
    pair_metrics,
    past_overflow,
    smoothed,
)
from .registry import register
from .survey import NO_REWARD


def _rewards(
    beta: float, logp_w: Tensor, logp_l: Tensor, ref_logp_w: Tensor, ref_logp_l: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns βΔw and βΔl. Raises ValueError unless beta > 0."""
    check_beta(beta)
    return beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)


def _dpo(
    logp_w: Tensor, logp_l: Tensor, ref_logp_w: Tensor, ref_logp_l: Tensor, beta: float, label_smoothing: float
) -> Losses:
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check_smoothing(label_smoothing)
    return smoothed(reward_w - reward_l, label_smoothing), pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Direct Preference Optimization (arXiv 2305.18290); smoothing: cDPO, Mitchell 2023",
    equation="−(1−ε) log σ(h) − ε log σ(−h)",
    survey="S10, S12",
)
def dpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """Direct Preference Optimization.

    L = −(1−ε) log σ(h) − ε log σ(−h); ε = `label_smoothing`, the probability that a label is flipped (cDPO).
    Survey S10, S12. At policy = reference every loss is ln 2.
    """
    return _dpo(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, label_smoothing)


@register(paper="Provably Robust DPO (arXiv 2403.00409)", equation="[−(1−ε) log σ(h) + ε log σ(−h)] / (1−2ε)")
def robust_dpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Losses:
    """DPO unbiased under labels flipped with probability ε = `label_smoothing` in [0, 0.5).

    L = [−(1−ε) log σ(h) + ε log σ(−h)] / (1−2ε). Its mean over flips is the clean DPO loss. It can be negative.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check_smoothing(label_smoothing)
    h, eps = reward_w - reward_l, label_smoothing
    losses = (-(1 - eps) * logsigmoid(h) + eps * logsigmoid(-h)) / (1 - 2 * eps)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="SLiC-HF (arXiv 2305.10425)",
    equation="max(0, δ − logp_w + logp_l) − λ logp_sft",
    survey="S3",
    attributes={**NO_REWARD, "policy": "Hybrid"},
)
def slic(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    logp_sft: Tensor | None = None,  # (P,) log-prob of the completion to stay close to; the chosen one if not given
    delta: float = 1.0,
    lam: float = 0.1,
) -> Losses:
    """Sequence likelihood calibration from human feedback: a hinge on the policy's own log-probs, no reference.

    L = max(0, δ − logp_w + logp_l) − λ logp_sft. Survey S3. δ is in nats.
    """
    check(delta >= 0, "delta >= 0", delta)
    check(lam >= 0, "lam >= 0", lam)
    logp_sft = logp_w if logp_sft is None else logp_sft
    losses = torch.relu(delta - logp_w + logp_l) - lam * logp_sft
    return losses, pair_metrics(logp_w, logp_l, logp_w, logp_l)


@register(
    paper="Statistical Rejection Sampling Improves Preference Optimization (arXiv 2309.06657)",
    equation="max(0, 1 − h)",
    survey="S4 (sampling)",
    attributes={"policy": "Hybrid"},
)
def rso(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    loss: Literal["hinge", "sigmoid"] = "hinge",
) -> Losses:
    """The losses of RSO (its rejection sampling belongs to the data).

    `loss="hinge"`: L = max(0, 1 − h), the normalised SLiC hinge. `loss="sigmoid"`: L = −log σ(h), which is `dpo`.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    h = reward_w - reward_l
    losses = torch.relu(1 - h) if loss == "hinge" else -logsigmoid(h)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(paper="Smaug: DPO-Positive (arXiv 2402.13228)", equation="−log σ(h − βλ max(0, −Δw))", survey="S13")
def dpop(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.3,
    lam: float = 50.0,
    variant: Literal["paper", "survey"] = "paper",
) -> Losses:
    """DPO-Positive: a penalty when the chosen completion falls below its reference log-prob.

    `variant="paper"`: L = −log σ(h − βλ·max(0, −Δw)). `variant="survey"`, as S13 prints it, with the penalty
    outside: L = −log σ(h) + λ·max(0, −Δw).
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check(lam >= 0, "lam >= 0", lam)
    h, penalty = reward_w - reward_l, lam * torch.relu(ref_logp_w - logp_w)
    losses = -logsigmoid(h - beta * penalty) if variant == "paper" else -logsigmoid(h) + penalty
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


def beta_dpo_state(
    margins: Tensor, m0: Tensor, s: Tensor, momentum: float = 0.9, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the running mean and standard deviation (m0, s) of `beta_dpo`'s margins, moved towards a batch's.

    margins (P,): M = Δw − Δl in nats, without β; valid (P,) bool: the pairs that count, all if not given; m0, s ().
    x ← momentum·x + (1 − momentum)·(x of the batch over all ranks, the deviation with n − 1). A batch of one pair has
    no deviation and leaves s as it is; an empty batch leaves both. Call it before `beta_dpo`, as the authors do. Begin
    with m0 = 0 and s = 1: the authors' s = 0 divides 0 by 0 while the policy is still the reference.
    """
    check(0 <= momentum < 1, "momentum in [0, 1)", momentum)
    # Squares are summed around m0, where they do not cancel.
    x = margins.detach() - m0
    x = x if valid is None else torch.where(valid, x, 0.0)
    count = x.new_full((), x.numel()) if valid is None else valid.sum().to(x.dtype)
    total, squares, count = sum_over_ranks(torch.stack([x.sum(), x.square().sum(), count])).unbind()
    mean = total / count.clamp(min=1)
    std = ((squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
    return m0 + (1 - momentum) * mean, torch.where(count > 1, momentum * s + (1 - momentum) * std, s)


def _remember_margins(
    remembered: Mapping[str, Tensor], inputs: Mapping[str, Tensor], valid: Tensor, **_: object
) -> dict[str, Tensor]:
    margins = (inputs["logp_w"] - inputs["ref_logp_w"]) - (inputs["logp_l"] - inputs["ref_logp_l"])
    m0, s = beta_dpo_state(
        margins, remembered.get("m0", margins.new_zeros(())), remembered.get("s", margins.new_ones(())), valid=valid
    )
    return {"m0": m0, "s": s}


def _keep(log_weights: Tensor, keep: float) -> Tensor:
    """Returns a mask (P,) of ⌊keep·P⌋ entries, at least one, drawn without replacement with weights e^log_weights.

    It runs exponential races in log space: the same draw as torch.multinomial's from the same state of the generator,
    but no weight underflows and nothing is read from the device.
    """
    units = log_weights.shape[0]
    count = min(units, max(1, math.floor(keep * units + 1e-6)))
    if keep == 1 or count == units:
        return torch.ones_like(log_weights, dtype=torch.bool)
    race = log_weights - torch.empty_like(log_weights).exponential_().log()
    return torch.zeros_like(log_weights, dtype=torch.bool).scatter(0, race.topk(count).indices, True)


@register(
    paper="β-DPO: Direct Preference Optimization with Dynamic β (arXiv 2407.08639)",
    equation="−log σ(β_batch M), β_batch = max(β(1 + α(mean M − m0)), 1e-3), M = Δw − Δl",
    survey="S14",
    unit="batch",
    state=_remember_margins,
)
def beta_dpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    m0: Tensor,  # () running mean of M, see beta_dpo_state
    s: Tensor,  # () running standard deviation of M
    beta: float = 0.1,
    alpha: float = 0.6,
    keep: float = 0.8,
) -> Losses:
    """DPO with a β for each batch, on the pairs whose margins are not outliers.

    L = −log σ(β_batch·M) of the kept pairs, 0 of the others; M = Δw − Δl in nats,
    β_batch = max(β(1 + α(mean(M) − m0)), 1e-3) without gradient, the mean over the kept pairs of all ranks (so every
    rank must call it). A fraction `keep`, at least one pair, is drawn on each rank by torch's generator, without
    replacement, with weights exp(−½((M − m0)/s)²); keep = 1 draws nothing. Survey S14; M without β, the draw and the
    floor of 1e-3 follow the authors' code. The metrics' rewards are βΔ; dropped pairs are left out of them.
    """
    check_beta(beta)
    check(alpha >= 0, "alpha >= 0", alpha)
    check(0 < keep <= 1, "keep in (0, 1]", keep)
    ratio_w, ratio_l = logp_w - ref_logp_w, logp_l - ref_logp_l
    margin, m0 = ratio_w - ratio_l, m0.detach()
    known = margin.detach()
    kept = _keep(-0.5 * ((known - m0) / s.detach().clamp(min=1e-6)).square(), keep)
    total, count = sum_over_ranks(
        torch.stack([torch.where(kept, known, 0.0).sum(), kept.sum().to(known.dtype)])
    ).unbind()
    beta_batch = (beta * (1 + alpha * (total / count.clamp(min=1) - m0))).clamp(min=1e-3)
    losses = torch.where(kept, -logsigmoid(beta_batch * margin), 0.0)
    metrics = pair_metrics(
        beta * ratio_w, beta * ratio_l, logp_w, logp_l, beta=beta_batch.expand_as(known).to(known.dtype)
    )
    return losses, {name: torch.where(kept, x, float("nan")) for name, x in metrics.items()}


@register(
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv 2310.12036)",
    equation="(u_w − u_l − 1/(2β))², u = Δ/len",
    survey="S17",
    attributes={"reward-form": "Preference"},
)
def ipo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    len_w: Tensor | None = None,  # (P,) needed by variant="mean"
    len_l: Tensor | None = None,  # (P,)
    beta: float = 0.1,
    variant: Literal["mean", "sum"] = "mean",
) -> Losses:
    """Identity preference optimisation: a squared distance to a target margin, so it cannot overfit a sure label.

    L = (u_w − u_l − 1/(2β))². `variant="mean"`: u = Δ/len, the authors' correction. `variant="sum"`: u = Δ, as
    S17 prints it. The metrics' rewards are βu.
    """
    check_beta(beta)
    u_w, u_l = logp_w - ref_logp_w, logp_l - ref_logp_l
    if variant == "mean":
        u_w = u_w / check_lengths(len_w, "len_w", 'variant="mean"')
        u_l = u_l / check_lengths(len_l, "len_l", 'variant="mean"')
    losses = (u_w - u_l - 1 / (2 * beta)) ** 2
    return losses, pair_metrics(beta * u_w, beta * u_l, logp_w, logp_l)


_GPO = {
    "logistic": lambda h: -logsigmoid(h),
    "hinge": lambda h: torch.relu(1 - h),
    "squared": lambda h: (h - 1) ** 2,
    "exponential": lambda h: past_overflow(torch.exp, -h),
    "truncated_quadratic": lambda h: torch.relu(1 - h) ** 2,
    "savage": lambda h: torch.sigmoid(-h) ** 2,
}


@register(
    paper="Generalized Preference Optimization (arXiv 2402.05749)",
    equation="f(h), f a loss of binary classification",
    survey="S18",
)
def gpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    f: Literal["logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage"] = "logistic",
) -> Losses:
    """Generalised preference optimisation: any loss of binary classification, of the margin h.

    L = f(h). Survey S18; f by the paper's Table 1: logistic log(1 + e⁻ʰ), which is `dpo`; hinge max(0, 1 − h);
    squared (h − 1)²; exponential e⁻ʰ; truncated_quadratic max(0, 1 − h)²; savage 1/(1 + eʰ)².
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    return _GPO[f](reward_w - reward_l), pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Direct Preference Optimization with an Offset (arXiv 2402.10571)",
    equation="−log σ(h − α log(score_w − score_l))",
)
def odpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    score_w: Tensor,  # (P,)
    score_l: Tensor,  # (P,)
    beta: float = 0.1,
    alpha: float = 1.0,
    offset: Literal["log", "identity"] = "log",
) -> Losses:
    """DPO with an offset: the margin asked for grows with how much better the chosen completion was scored.

    L = −log σ(h − α·log(score_w − score_l)). `offset="identity"`: − α·(score_w − score_l), the paper's ablation.
    ValueError for a chosen completion that is not scored higher.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check(alpha >= 0, "alpha >= 0", alpha)
    gap = score_w - score_l
    check_rows(gap > 0, "score_w > score_l", "drop the pair or swap it", score_w=score_w, score_l=score_l)
    h = reward_w - reward_l - alpha * (gap.log() if offset == "log" else gap)
    return -logsigmoid(h), pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Disentangling Length from Quality in Direct Preference Optimization (arXiv 2403.19159)",
    equation="−log σ(h + α(len_w − len_l))",
    survey="S44–46",
    attributes={"length": "Control", "sft": "Merge"},
)
def rdpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    len_w: Tensor,  # (P,)
    len_l: Tensor,  # (P,)
    beta: float = 0.1,
    alpha: float = 0.01,
    variant: Literal["derived", "survey"] = "derived",
) -> Losses:
    """Regularised DPO: a price of α per token, so that a preference that length explains teaches less.

    `variant="derived"`: L = −log σ(h + α(len_w − len_l)), which follows from the objective S44: its optimum has
    r = βΔ + α·len + const. `variant="survey"`: −log σ(h − α(len_w − len_l)), with the sign that S46 prints.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check(alpha >= 0, "alpha >= 0", alpha)
    price = alpha * (len_w - len_l).to(reward_w.dtype)
    h = reward_w - reward_l + (price if variant == "derived" else -price)
    return -logsigmoid(h), pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="SimPO (arXiv 2405.14734)",
    equation="−log σ(β·logp_w/len_w − β·logp_l/len_l − γ)",
    survey="S47",
    attributes={**NO_REWARD, "length": "Control", "divergence": "-", "sft": "Merge"},
)
def simpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    len_w: Tensor,  # (P,)
    len_l: Tensor,  # (P,)
    beta: float = 2.0,
    gamma: float = 1.0,
    gamma_beta_ratio: float | None = None,
    label_smoothing: float = 0.0,
) -> Losses:
    """Simple preference optimisation: length-normalised log-probs, a target margin, no reference.

    L = −log σ(g) smoothed as in `dpo`, g = β·logp_w/len_w − β·logp_l/len_l − γ. Survey S47.
    γ is absolute, in units of reward; the authors' scripts give it as a ratio to β: `gamma_beta_ratio`, and then
    γ = ratio·β and `gamma` is not used.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    gamma = gamma if gamma_beta_ratio is None else gamma_beta_ratio * beta
    reward_w, reward_l = beta * logp_w / len_w, beta * logp_l / len_l
    losses = smoothed(reward_w - reward_l - gamma, label_smoothing)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="ORPO (arXiv 2403.07691)",
    equation="−logp_w/len_w − λ log σ(o_w − o_l), o = log odds of exp(logp/len)",
    survey="S42",
    attributes={**NO_REWARD, "divergence": "-", "sft": "Merge"},
)
def orpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    len_w: Tensor,  # (P,)
    len_l: Tensor,  # (P,)
    lam: float = 0.1,
) -> Losses:
    """Odds-ratio preference optimisation: fine-tuning on the chosen completion plus a log odds ratio, no reference.

    L = −p̄_w − λ log σ(o_w − o_l), p̄ = logp/len, o = p̄ − log(1 − e^p̄). Survey S42 prints the odds ratio where the
    paper means its logarithm. The metrics' rewards are λp̄, as in TRL.
    """
    check(lam >= 0, "lam >= 0", lam)
    mean_w, mean_l = logp_w / len_w, logp_l / len_l
    ratio = log_odds(mean_w) - log_odds(mean_l)
    losses = -mean_w - lam * logsigmoid(ratio)
    others = {"nll_loss": -mean_w, "log_odds_chosen": ratio, "log_odds_ratio": logsigmoid(ratio)}
    return losses, pair_metrics(lam * mean_w, lam * mean_l, logp_w, logp_l, **others)


@register(
    paper="Contrastive Preference Optimization (arXiv 2401.08417)",
    equation="−log σ(β(logp_w − logp_l)) − α·logp_w",
    survey="S54",
    attributes={"reward-sign": "Negative", "feedback": "-", "feedback-form": "-", "sft": "Merge"},
)
def cpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    len_w: Tensor | None = None,  # (P,) needed by nll="mean"
    beta: float = 0.1,
    alpha: float = 1.0,
    nll: Literal["sum", "mean"] = "sum",
    label_smoothing: float = 0.0,
) -> Losses:
    """Contrastive preference optimisation: DPO with a uniform reference plus the chosen completion's likelihood.

    L = −log σ(β(logp_w − logp_l)) smoothed as in `dpo`, − α·logp_w. Survey S54. `nll="mean"`: − α·logp_w/len_w.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check(alpha >= 0, "alpha >= 0", alpha)
    reward_w, reward_l = beta * logp_w, beta * logp_l
    nll_w = -logp_w if nll == "sum" else -logp_w / check_lengths(len_w, "len_w", 'nll="mean"')
    losses = smoothed(reward_w - reward_l, label_smoothing) + alpha * nll_w
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l, nll_loss=nll_w)


@register(
    paper="Self-Play Preference Optimization (arXiv 2405.00675)",
    equation="(Δw − (P − ½)/β)² + (Δl − (½ − P)/β)²",
    survey="S60–61",
    attributes={"reward": "-", "reward-form": "Preference", "policy": "On"},
)
def sppo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    prob_w: Tensor | None = None,  # (P,) not needed by variant="hard"
    beta: float = 0.001,
    variant: Literal["soft", "hard", "survey"] = "soft",
) -> Losses:
    """Self-play preference optimisation: each log-ratio regresses to its completion's win rate less a half, over β.

    P = prob_w, the probability that the chosen completion beats the rejected one; β is the paper's 1/η.
    `variant="soft"`: L = (Δw − (P − ½)/β)² + (Δl − (½ − P)/β)²; the authors' code halves it. `variant="hard"`: P = 1,
    which is TRL's `sppo_hard`. `variant="survey"`: S61 with its log Z estimated on the pair: the targets are
    P/β − log Z and (1 − P)/β − log Z, Z = ½(e^{P/β} + e^{(1−P)/β}).
    ValueError for a P outside [0, 1].
    """
    check_beta(beta)
    ratio_w, ratio_l = logp_w - ref_logp_w, logp_l - ref_logp_l
    if variant == "hard":
        target_w, target_l = 0.5 / beta, -0.5 / beta
    else:
        if prob_w is None:
            raise ValueError(f'missing prob_w: variant="{variant}" needs P(chosen beats rejected)')
        check_rows((prob_w >= 0) & (prob_w <= 1), "prob_w in [0, 1]", "give a probability", prob_w=prob_w)
        target_w, target_l = (prob_w - 0.5) / beta, (0.5 - prob_w) / beta
        if variant == "survey":
            # P/β − log ½(e^{P/β} + e^{(1−P)/β}) = log 2 + log σ((2P − 1)/β)
            target_w, target_l = (math.log(2.0) + logsigmoid(2 * t) for t in (target_w, target_l))
    losses = (ratio_w - target_w) ** 2 + (ratio_l - target_l) ** 2
    return losses, pair_metrics(beta * ratio_w, beta * ratio_l, logp_w, logp_l)


@register(
    paper="Direct Nash Optimization (arXiv 2404.03715)",
    equation="dpo, the reference being the previous iterate",
    survey="S62",
    attributes={"reward": "-", "reward-form": "Preference", "policy": "On"},
)
def dno(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """Direct Nash optimisation: `dpo` against the previous iterate, on pairs whose win rates differ by a wide margin.

    L = −(1−ε) log σ(h) − ε log σ(−h), ref = π^t. Survey S62, the practical algorithm.
    """
    return _dpo(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, label_smoothing)


@register(
    paper="From r to Q*: Your Language Model is Secretly a Q-Function (arXiv 2404.12358)",
    equation="dpo, h the difference of sums of token rewards β(log π − log ref)",
    survey="S23–24",
    attributes={"reward-level": "Token"},
    token_reward=True,
)
def token_dpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """DPO read as token-level credit assignment: the loss is `dpo`, and each token has a reward.

    L = −(1−ε) log σ(h) − ε log σ(−h), h = Σ_t β(log π − log ref) over the chosen less that over the rejected.
    Survey S23–24. The objective gives the tokens' rewards.
    """
    return _dpo(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, label_smoothing)


# f′(π/ref) as a function of Δ = log(π/ref), up to a constant.
_DIVERGENCES = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: -past_overflow(torch.exp, -ratio),
    "js": lambda ratio, alpha: math.log(2.0) + logsigmoid(ratio),
    "alpha": lambda ratio, alpha: -past_overflow(torch.expm1, -alpha * ratio) / alpha,
}


@register(
    paper="Beyond Reverse KL: f-divergences (arXiv 2309.16240)",
    equation="−log σ(β(g(Δw) − g(Δl))), g(Δ) = f′(e^Δ)",
    survey="S63–67",
    attributes={"divergence": "Multiple", "policy": "Hybrid"},
)
def f_dpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    alpha: float = 0.5,
) -> Losses:
    """DPO under another divergence from the reference.

    L = −log σ(β(g(Δw) − g(Δl))), g(Δ) = f′(e^Δ). Survey S63–67. reverse_kl: g = Δ, which is `dpo`;
    forward_kl: −e^(−Δ); js: log 2 + log σ(Δ); alpha: (1 − e^(−αΔ))/α, α in (0, 1) as in the paper, 1 − α in TRL.
    Where e^(−Δ) would overflow, g goes on along its tangent. The metrics' rewards are βΔ, as in TRL.
    """
    check_beta(beta)
    check(0 < alpha < 1, "alpha in (0, 1)", alpha)
    g, ratio_w, ratio_l = _DIVERGENCES[divergence], logp_w - ref_logp_w, logp_l - ref_logp_l
    losses = -logsigmoid(beta * (g(ratio_w, alpha) - g(ratio_l, alpha)))
    return losses, pair_metrics(beta * ratio_w, beta * ratio_l, logp_w, logp_l)


@register(
    paper="Negative Preference Optimization (arXiv 2404.05868)",
    equation="(2/β) log(1 + e^{βΔl})",
    attributes={"reward-sign": "Negative", "feedback": "-", "feedback-form": "-"},
)
def npo(
    *,
    logp_l: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
) -> Losses:
    """Negative preference optimisation: DPO's rejected half alone, for unlearning.

    L = (2/β)·log(1 + e^{βΔl}). At policy = reference every loss is (2/β) ln 2; as β → 0 its gradient is that of
    gradient ascent on the rejected completion's loss.
    """
    check_beta(beta)
    reward_l = beta * (logp_l - ref_logp_l)
    metrics = {"rewards/rejected": reward_l.detach(), "logps/rejected": logp_l.detach()}
    return -2 / beta * logsigmoid(-reward_l), metrics


@register(
    paper="Towards Efficient Exact Optimization of Language Model Alignment (arXiv 2402.00856)",
    equation="KL([σ(h), σ(−h)] ‖ [1−ε, ε])",
)
def exo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Losses:
    """Efficient exact optimisation, on pairs: reverse KL from the policy's preference to a smoothed label.

    L = σ(h)[log σ(h) − log(1−ε)] + σ(−h)[log σ(−h) − log ε], ε = `label_smoothing` in (0, 0.5). The paper's Eq. 16,
    as TRL's `exo_pair`. It is 0 where σ(h) = 1 − ε.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check(0 < label_smoothing < 0.5, "label_smoothing in (0, 0.5)", label_smoothing)
    h = reward_w - reward_l
    losses = torch.sigmoid(h) * (logsigmoid(h) - math.log1p(-label_smoothing))
    losses = losses + torch.sigmoid(-h) * (logsigmoid(-h) - math.log(label_smoothing))
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Noise Contrastive Alignment of Language Models with Explicit Rewards (arXiv 2402.05369)",
    equation="−log σ(βΔw) − ½ log σ(−βΔw) − ½ log σ(−βΔl)",
)
def nca(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
) -> Losses:
    """Noise contrastive alignment, on pairs: absolute likelihoods count, not only their difference.

    L = −log σ(βΔw) − ½ log σ(−βΔw) − ½ log σ(−βΔl), as TRL's `nca_pair`.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    losses = -logsigmoid(reward_w) - 0.5 * (logsigmoid(-reward_w) + logsigmoid(-reward_l))
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(paper="Binary Classifier Optimization (arXiv 2404.04656)", equation="−log σ(βΔw) − log σ(−βΔl)")
def bco_pair(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
) -> Losses:
    """Binary classifier optimisation, on pairs: chosen and rejected are each compared with the reference alone.

    L = −log σ(βΔw) − log σ(−βΔl), as TRL's `bco_pair`, without the shift δ that `bco` has.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    losses = -logsigmoid(reward_w) - logsigmoid(-reward_l)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


def _matched(x: Tensor, y: Tensor) -> Tensor:
    """Returns for each entry of x (P,) the entry of y (P,) of equal rank: optimal transport on the line."""
    return y.sort(stable=True).values[x.argsort(stable=True).argsort()]


@register(
    paper="Distributional Preference Alignment of LLMs via Optimal Transport (arXiv 2406.05882)",
    equation="−log σ(β(x_(i) − y_(i))), x = logp_w − logp_l, y = ref_logp_w − ref_logp_l, sorted",
    unit="batch",
)
def aot(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """Alignment by optimal transport: the policy's margins are to dominate the reference's as a distribution.

    L = −(1−ε) log σ(βd) − ε log σ(−βd), d = x_(i) − y_(i), the differences of the sorted margins x = logp_w − logp_l
    and y = ref_logp_w − ref_logp_l of a rank's batch; as TRL's `aot`. A pair's loss is the one that its x enters.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check_smoothing(label_smoothing)
    margin = logp_w - logp_l
    losses = smoothed(beta * (margin - _matched(margin, ref_logp_w - ref_logp_l)), label_smoothing)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Distributional Preference Alignment of LLMs via Optimal Transport (arXiv 2406.05882)",
    equation="−log σ(β(x_(i) − y_(i))), x = Δw, y = Δl, sorted",
    unit="batch",
)
def aot_unpaired(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Losses:
    """Alignment by optimal transport where chosen and rejected need not belong together.

    L = −(1−ε) log σ(βd) − ε log σ(−βd), d = x_(i) − y_(i), the differences of the sorted log-ratios x = Δw and y = Δl
    of a rank's batch; as TRL's `aot_unpaired`. A pair's loss is the one that its Δw enters.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check_smoothing(label_smoothing)
    losses = smoothed(reward_w - _matched(reward_w, reward_l), label_smoothing)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(paper="Anchored Preference Optimization (arXiv 2408.06266)", equation="σ(−βΔw) + σ(βΔl)")
def apo_zero(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
) -> Losses:
    """APO where the chosen are better than the policy's own: they gain, the rejected lose.

    L = 1 − σ(βΔw) + σ(βΔl). The paper's Eq. 7, as TRL's `apo_zero`.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    losses = torch.sigmoid(-reward_w) + torch.sigmoid(reward_l)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(paper="Anchored Preference Optimization (arXiv 2408.06266)", equation="σ(βΔw) + σ(−h)")
def apo_down(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
) -> Losses:
    """APO where the chosen are worse than the policy's own: both lose, the rejected more.

    L = σ(βΔw) + 1 − σ(h). The paper's Eq. 8, as TRL's `apo_down`.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    losses = torch.sigmoid(reward_w) + torch.sigmoid(reward_l - reward_w)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Discovering Preference Optimization Algorithms with and for LLMs (arXiv 2406.08414)",
    equation="−log σ(h)·(1 − m) + e⁻ʰ·m, m = σ(h/τ)",
)
def discopop(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    tau: float = 0.05,
) -> Losses:
    """DiscoPOP's log-ratio modulated loss, found by a language model.

    L = −log σ(h)·(1 − m) + e⁻ʰ·m, m = σ(h/τ). The paper's Eq. 5, as TRL's `discopop`. Not convex; at h = 0 it is
    ½(ln 2 + 1).
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    check(tau > 0, "tau > 0", tau)
    h = reward_w - reward_l
    # e⁻ʰ·m in one exponent: as two factors they are ∞ and 0 at h ≪ 0.
    exponential = past_overflow(torch.exp, logsigmoid(h / tau) - h)
    losses = exponential - logsigmoid(h) * torch.sigmoid(-h / tau)
    return losses, pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Tülu 3 (arXiv 2411.15124)", equation="−log σ(β(Δw/len_w − Δl/len_l))", attributes={"length": "Control"}
)
def dpo_norm(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    len_w: Tensor,  # (P,)
    len_l: Tensor,  # (P,)
    beta: float = 0.1,
) -> Losses:
    """Length-normalised DPO.

    L = −log σ(β(Δw/len_w − Δl/len_l)), as TRL's `sigmoid_norm`. The metrics' rewards are βΔ/len.
    """
    reward_w, reward_l = _rewards(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    reward_w, reward_l = reward_w / len_w, reward_l / len_l
    return -logsigmoid(reward_w - reward_l), pair_metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Supervised fine-tuning: maximum likelihood of the chosen completion",
    equation="−logp_w, over tokens",
    attributes={**NO_REWARD, "feedback": "-", "feedback-form": "-", "divergence": "-"},
    denominator="tokens",
)
def sft(
    *,
    logp_w: Tensor,  # (P,)
) -> Losses:
    """Supervised fine-tuning on the chosen completions.

    L = −logp_w; the mean divides by the chosen completions' tokens, so that a batch's loss is its token mean.
    """
    return -logp_w, {"logps/chosen": logp_w.detach()}
