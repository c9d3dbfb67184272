"""Losses of a chosen and a rejected completion.

Every function takes (P,) float tensors, log-probs in nats summed over a completion's tokens and lengths in tokens,
and returns (losses (P,), metrics of detached (P,) tensors). Symbols: Δw = logp_w − ref_logp_w, Δl likewise,
h = β(Δw − Δl), σ the logistic function, m̄ = m / len. Out-of-range hyperparameters raise ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .math import check, check_choice, log_odds
from .registry import register

Losses = tuple[Tensor, dict[str, Tensor]]


def _metrics(reward_w: Tensor, reward_l: Tensor, logp_w: Tensor, logp_l: Tensor, **others: Tensor) -> dict:
    named = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/accuracies": (reward_w > reward_l).to(reward_w.dtype),
        "rewards/margins": reward_w - reward_l,
        "logps/chosen": logp_w,
        "logps/rejected": logp_l,
        **others,
    }
    return {name: value.detach() for name, value in named.items()}


def _lengths(length: Tensor | None, name: str, why: str) -> Tensor:
    if length is None:
        raise ValueError(f"missing {name}: {why} needs the completions' lengths in tokens")
    return length


def _check_beta(beta: float) -> None:
    check(beta > 0, "beta > 0", beta)


def _check_smoothing(label_smoothing: float) -> None:
    check(0 <= label_smoothing < 0.5, "label_smoothing in [0, 0.5)", label_smoothing)


def _smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(h) − ε log σ(−h)."""
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


@register(
    paper="Direct Preference Optimization (arXiv 2305.18290); smoothing: cDPO, Mitchell 2023",
    equation="−(1−ε) log σ(h) − ε log σ(−h)",
    survey="S10, S12",
    attributes="Implicit Point Response Positive Preference Human Pair Uncontrol KL Off Offline Separate",
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
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    reward_w, reward_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)
    losses = _smoothed(reward_w - reward_l, label_smoothing)
    return losses, _metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Provably Robust DPO (arXiv 2403.00409)",
    equation="[−(1−ε) log σ(h) + ε log σ(−h)] / (1−2ε)",
    attributes="Implicit Point Response Positive Preference Human Pair Uncontrol KL Off Offline Separate",
)
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
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    reward_w, reward_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)
    h, eps = reward_w - reward_l, label_smoothing
    losses = (-(1 - eps) * logsigmoid(h) + eps * logsigmoid(-h)) / (1 - 2 * eps)
    return losses, _metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="SLiC-HF (arXiv 2305.10425)",
    equation="max(0, δ − logp_w + logp_l) − λ logp_sft",
    survey="S3",
    attributes="- - - - Preference Human Pair Uncontrol KL Hybrid Offline Separate",
)
def slic(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    logp_sft: Tensor
    | None = None,  # (P,) log-prob of the completion to stay close to; the chosen one if not given
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
    return losses, _metrics(logp_w, logp_l, logp_w, logp_l)


@register(
    paper="Statistical Rejection Sampling Improves Preference Optimization (arXiv 2309.06657)",
    equation="max(0, 1 − h)",
    survey="S4 (sampling)",
    attributes="Implicit Point Response Positive Preference Human Pair Uncontrol KL Hybrid Offline Separate",
)
def rso(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.1,
    loss: str = "hinge",
) -> Losses:
    """The losses of RSO (its rejection sampling belongs to the data).

    `loss="hinge"`: L = max(0, 1 − h), the normalised SLiC hinge. `loss="sigmoid"`: L = −log σ(h), which is `dpo`.
    """
    _check_beta(beta)
    check_choice("loss", loss, ("hinge", "sigmoid"))
    reward_w, reward_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)
    h = reward_w - reward_l
    losses = torch.relu(1 - h) if loss == "hinge" else -logsigmoid(h)
    return losses, _metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="Smaug: DPO-Positive (arXiv 2402.13228)",
    equation="−log σ(h − βλ max(0, −Δw))",
    survey="S13",
    attributes="Implicit Point Response Positive Preference Human Pair Uncontrol KL Off Offline Separate",
)
def dpop(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    ref_logp_l: Tensor,  # (P,)
    beta: float = 0.3,
    lam: float = 50.0,
    variant: str = "paper",
) -> Losses:
    """DPO-Positive: a penalty when the chosen completion falls below its reference log-prob.

    `variant="paper"`: L = −log σ(h − βλ·max(0, −Δw)). `variant="survey"`, as S13 prints it, with the penalty
    outside: L = −log σ(h) + λ·max(0, −Δw).
    """
    _check_beta(beta)
    check(lam >= 0, "lam >= 0", lam)
    check_choice("variant", variant, ("paper", "survey"))
    reward_w, reward_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)
    h, penalty = reward_w - reward_l, lam * torch.relu(ref_logp_w - logp_w)
    losses = -logsigmoid(h - beta * penalty) if variant == "paper" else -logsigmoid(h) + penalty
    return losses, _metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv 2310.12036)",
    equation="(u_w − u_l − 1/(2β))², u = Δ/len",
    survey="S17",
    attributes="Implicit Preference Response Positive Preference Human Pair Uncontrol KL Off Offline Separate",
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
    variant: str = "mean",
) -> Losses:
    """Identity preference optimisation: a squared distance to a target margin, so it cannot overfit a sure label.

    L = (u_w − u_l − 1/(2β))². `variant="mean"`: u = Δ/len, the authors' correction. `variant="sum"`: u = Δ, as
    S17 prints it. The metrics' rewards are βu.
    """
    _check_beta(beta)
    check_choice("variant", variant, ("mean", "sum"))
    u_w, u_l = logp_w - ref_logp_w, logp_l - ref_logp_l
    if variant == "mean":
        u_w = u_w / _lengths(len_w, "len_w", 'variant="mean"')
        u_l = u_l / _lengths(len_l, "len_l", 'variant="mean"')
    losses = (u_w - u_l - 1 / (2 * beta)) ** 2
    return losses, _metrics(beta * u_w, beta * u_l, logp_w, logp_l)


@register(
    paper="SimPO (arXiv 2405.14734)",
    equation="−log σ(β·logp_w/len_w − β·logp_l/len_l − γ)",
    survey="S47",
    attributes="- - - - Preference Human Pair Control - Off Offline Merge",
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
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    gamma = gamma if gamma_beta_ratio is None else gamma_beta_ratio * beta
    reward_w, reward_l = beta * logp_w / len_w, beta * logp_l / len_l
    losses = _smoothed(reward_w - reward_l - gamma, label_smoothing)
    return losses, _metrics(reward_w, reward_l, logp_w, logp_l)


@register(
    paper="ORPO (arXiv 2403.07691)",
    equation="−logp_w/len_w − λ log σ(o_w − o_l), o = log odds of exp(logp/len)",
    survey="S42",
    attributes="- - - - Preference Human Pair Uncontrol - Off Offline Merge",
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
    return losses, _metrics(
        lam * mean_w,
        lam * mean_l,
        logp_w,
        logp_l,
        nll_loss=-mean_w,
        log_odds_chosen=ratio,
        log_odds_ratio=logsigmoid(ratio),
    )


@register(
    paper="Contrastive Preference Optimization (arXiv 2401.08417)",
    equation="−log σ(β(logp_w − logp_l)) − α·logp_w",
    survey="S54",
    attributes="Implicit Point Response Negative - Human - Uncontrol KL Off Offline Merge",
)
def cpo(
    *,
    logp_w: Tensor,  # (P,)
    logp_l: Tensor,  # (P,)
    len_w: Tensor | None = None,  # (P,) needed by nll="mean"
    beta: float = 0.1,
    alpha: float = 1.0,
    nll: str = "sum",
    label_smoothing: float = 0.0,
) -> Losses:
    """Contrastive preference optimisation: DPO with a uniform reference plus the chosen completion's likelihood.

    L = −log σ(β(logp_w − logp_l)) smoothed as in `dpo`, − α·logp_w. Survey S54. `nll="mean"`: − α·logp_w/len_w.
    """
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    check(alpha >= 0, "alpha >= 0", alpha)
    check_choice("nll", nll, ("sum", "mean"))
    reward_w, reward_l = beta * logp_w, beta * logp_l
    nll_w = -logp_w if nll == "sum" else -logp_w / _lengths(len_w, "len_w", 'nll="mean"')
    losses = _smoothed(reward_w - reward_l, label_smoothing) + alpha * nll_w
    return losses, _metrics(reward_w, reward_l, logp_w, logp_l, nll_loss=nll_w)


@register(
    paper="Supervised fine-tuning: maximum likelihood of the chosen completion",
    equation="−logp_w, over tokens",
    attributes="- - - - - Human - Uncontrol - Off Offline Separate",
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
