"""Losses of sampled completions with advantages: policy gradients by token or by sequence.

Every function takes (B, T) float tensors of the tokens' log-probs in nats and a `mask` (B, T) of the completions'
tokens; `advantage` is (B,) or (B, T). Values outside the mask do not matter, NaN included: the loss there is 0 and so
is its gradient. A function returns losses (B, T), or (B,) where its docstring says so, and detached metrics, NaN
outside the mask and in rows without a token. Symbols: A = advantage, r = exp(token_logp − old_logp), sg stop-gradient,

    C(a, b) = −min(r·A, clip(r, 1−a, 1+b)·A),
    k3 = ref/π − 1 − log(ref/π), see math.k3.

`old_logp` are the log-probs at sampling; without it the step is on-policy, r = 1 with a gradient. The methods of
GRPO's family add `beta`·k3 with `ref_token_logp` and subtract `entropy_coef`·`entropy`, both token by token before
anything is summed over a row. They differ in what the mean over losses divides by, see Method.denominator. Advantages
are data and come without a gradient. Out-of-range hyperparameters and bad data raise ValueError.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .math import Losses, check, check_beta, check_rows, k3, past_overflow
from .registry import RLDefaults, register

_USES = {"ref_token_logp": "beta", "entropy": "entropy_coef"}

_ATTRIBUTES = {"reward": "Explicit", "policy": "On"}
_register = partial(register, attributes=_ATTRIBUTES, unit="token", denominator="tokens")
_PPO = RLDefaults(advantage="gae", kl_coef=0.05)


def _inside(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x (B,) or (B, T) as (B, T), 0 outside the mask."""
    return torch.where(mask, x[:, None] if x.dim() == 1 else x, 0.0)


def _tokens(
    token_logp: Tensor, advantage: Tensor, mask: Tensor, old_logp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns mask, log π, log r and A, each (B, T), 0 outside the mask."""
    mask = mask.bool()
    logp = _inside(token_logp, mask)
    old = logp.detach() if old_logp is None else _inside(old_logp, mask)
    return mask, logp, logp - old, _inside(advantage, mask)


def _ratio(log_ratio: Tensor) -> Tensor:
    return past_overflow(torch.exp, log_ratio)


def _bounds(eps_low: float, eps_high: float) -> tuple[float, float]:
    """Returns log(1 − eps_low) and log(1 + eps_high); −∞, no lower bound, for eps_low ≥ 1."""
    check(eps_low > 0, "eps_low (or eps) > 0", eps_low)
    check(eps_high > 0, "eps_high (or eps) > 0", eps_high)
    return math.log1p(-eps_low) if eps_low < 1 else -math.inf, math.log1p(eps_high)


def _clipped(
    log_ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float, cap: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns C(eps_low, eps_high), with r at most `cap` where A < 0, and its metrics, not masked yet."""
    # The minimum bounds r above where A > 0 and below where A < 0. Bounding log r is the same, overflows only where the
    # loss itself does, and leaves the bounded side without a gradient.
    low, high = _bounds(eps_low, eps_high)
    negative, positive = advantage < 0, advantage > 0
    highest = None if cap is None else math.log(cap)
    bounded = torch.where(negative, log_ratio.clamp(min=low, max=highest), log_ratio.clamp(max=high))
    low_clipped, high_clipped = negative & (log_ratio < low), positive & (log_ratio > high)
    metrics = {
        "ratio": _ratio(log_ratio),
        "clip_ratio/low_mean": low_clipped,
        "clip_ratio/high_mean": high_clipped,
        "clip_ratio/region_mean": low_clipped | high_clipped,
    }
    return -advantage * _ratio(bounded), metrics


def _by_token(metrics: dict[str, Tensor], mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the metrics detached, NaN outside the mask."""
    return {name: torch.where(mask, x.detach().to(dtype), torch.nan) for name, x in metrics.items()}


def _by_row(metrics: dict[str, Tensor], mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns means (B,) over each row's tokens, NaN for a row without tokens."""
    count = mask.sum(dim=1)
    return {name: _inside(x.detach().to(dtype), mask).sum(dim=1) / count for name, x in metrics.items()}


# ref_token_logp, beta, entropy, entropy_coef
_Regularisers = tuple[Tensor | None, float, Tensor | None, float]


def _regularised(
    losses: Tensor, metrics: dict[str, Tensor], mask: Tensor, logp: Tensor, regularisers: _Regularisers
) -> Losses:
    """Returns losses + β·k3 − entropy_coef·entropy, (B, T), and the metrics with those of the inputs given."""
    ref_token_logp, beta, entropy, entropy_coef = regularisers
    check(beta >= 0, "beta >= 0", beta)
    check(entropy_coef >= 0, "entropy_coef >= 0", entropy_coef)
    if beta and ref_token_logp is None:
        raise ValueError(f"missing ref_token_logp: the KL term of beta={beta} needs the reference's log-probs")
    if entropy_coef and entropy is None:
        raise ValueError(f"missing entropy: entropy_coef={entropy_coef} needs the entropy at every token")
    metrics = dict(metrics)
    if ref_token_logp is not None:
        metrics["kl"] = k3(logp, _inside(ref_token_logp, mask))
        losses = losses + beta * metrics["kl"] if beta else losses
    if entropy is not None:
        metrics["entropy"] = _inside(entropy, mask)
        losses = losses - entropy_coef * metrics["entropy"] if entropy_coef else losses
    return losses, metrics


def _surrogate(
    token_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    old_logp: Tensor | None,
    eps: tuple[float, float],
    regularisers: _Regularisers,
) -> Losses:
    """Returns C(eps) + β·k3 − entropy_coef·entropy by token."""
    mask, logp, log_ratio, advantage = _tokens(token_logp, advantage, mask, old_logp)
    losses, metrics = _clipped(log_ratio, advantage, *eps)
    losses, metrics = _regularised(losses, metrics, mask, logp, regularisers)
    return losses, _by_token(metrics, mask, losses.dtype)


def _sequence_surrogate(
    token_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    old_logp: Tensor | None,
    eps: tuple[float, float],
    regularisers: _Regularisers,
    mean: bool,
) -> Losses:
    """Returns `_surrogate` with each token's log r replaced by its row's mean; then the row's mean or sum: (B,)."""
    mask, logp, log_ratio, advantage = _tokens(token_logp, advantage, mask, old_logp)
    count = mask.sum(dim=1).clamp(min=1)
    log_ratio = _inside(log_ratio.sum(dim=1) / count, mask)
    losses, by_row = _clipped(log_ratio, advantage, *eps)
    losses, by_token = _regularised(losses, {}, mask, logp, regularisers)
    rows, dtype = losses.sum(dim=1), losses.dtype
    return rows / count if mean else rows, _by_row(by_row, mask, dtype) | _by_token(by_token, mask, dtype)


# --- PPO ----------------------------------------------------------------------------------------------------


@_register(
    paper="Proximal Policy Optimization Algorithms (arXiv 1707.06347); dual clip: arXiv 1912.09729",
    equation="C(ε, ε); with dual clip c and A < 0: min(C(ε, ε), −c·A)",
    uses={"entropy": "entropy_coef"},
    rl=_PPO,
)
def ppo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    eps: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
) -> Losses:
    """Proximal policy optimisation, the clipped surrogate.

    L = C(ε, ε). With `dual_clip` c > 1, where A < 0: L = min(C(ε, ε), −c·A), so that a token which has become far more
    likely than when it was sampled has no gradient. A divergence from a reference belongs to the reward (InstructGPT).
    """
    check(dual_clip is None or dual_clip > 1, "dual_clip > 1", dual_clip)
    mask, logp, log_ratio, advantage = _tokens(token_logp, advantage, mask, old_logp)
    losses, metrics = _clipped(log_ratio, advantage, eps, eps, dual_clip)
    losses, metrics = _regularised(losses, metrics, mask, logp, (None, 0.0, entropy, entropy_coef))
    return losses, _by_token(metrics, mask, losses.dtype)


@_register(
    paper="Proximal Policy Optimization Algorithms (arXiv 1707.06347); clipping the value: its authors' code",
    equation="½ max((V − R)², (clip(V, V_old ± c) − R)²)",
)
def ppo_value(
    *,
    value: Tensor,  # (B, T)
    old_value: Tensor,  # (B, T) at sampling
    returns: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    value_clip: float = 0.2,
) -> Losses:
    """The critic's loss in PPO.

    L = ½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²), c = `value_clip`, R = `returns`, see advantages.gae. The
    metric is the share of tokens whose clipped value counts.
    """
    check(value_clip > 0, "value_clip > 0", value_clip)
    mask = mask.bool()
    value, old_value, returns = _inside(value, mask), _inside(old_value, mask), _inside(returns, mask)
    plain = (value - returns) ** 2
    clipped = (old_value + (value - old_value).clamp(-value_clip, value_clip) - returns) ** 2
    metrics = {"clip_ratio/value_mean": clipped > plain}
    return 0.5 * torch.maximum(plain, clipped), _by_token(metrics, mask, value.dtype)


@_register(
    paper="Proximal Policy Optimization Algorithms (arXiv 1707.06347)",
    equation="−r·A + β·k3(old ‖ new)",
    rl=replace(_PPO, adapts_beta=True),
)
def ppo_penalty(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    beta: float = 0.1,
) -> Losses:
    """PPO with a penalty on the divergence from the sampling policy, in place of clipping.

    L = −r·A + β·k3(old ‖ new), k3 = r − 1 − log r in tokens drawn from the old policy. `adapt` changes β with the
    metric "kl".
    """
    check(beta >= 0, "beta >= 0", beta)
    mask, _, log_ratio, advantage = _tokens(token_logp, advantage, mask, old_logp)
    ratio, kl = _ratio(log_ratio), k3(torch.zeros_like(log_ratio), log_ratio)
    losses = -ratio * advantage + beta * kl
    return losses, _by_token({"ratio": ratio, "kl": kl}, mask, losses.dtype)


def adapt(beta: float, kl: float | Tensor, target: float) -> float:
    """Returns the β of `ppo_penalty`'s next step: doubled if kl > 1.5·target, halved if kl < target/1.5."""
    check_beta(beta)
    check(target > 0, "target > 0", target)
    kl = float(kl)
    return 2 * beta if kl > 1.5 * target else beta / 2 if kl < target / 1.5 else beta


@_register(
    paper="Training language models to follow instructions with human feedback (arXiv 2203.02155)",
    equation="C(ε, ε) + β·k3 − γ·mean of ptx_logp",
    survey="S2",
    uses={"ref_token_logp": "beta"},
    rl=_PPO,
)
def ppo_ptx(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    ptx_logp: Tensor,  # (B', T') log-probs of tokens of pretraining text
    ptx_mask: Tensor,  # (B', T')
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    eps: float = 0.2,
    gamma: float = 1.0,
    beta: float = 0.0,
) -> Losses:
    """PPO with pretraining gradients mixed in, against the alignment tax.

    L = C(ε, ε) + β·k3 − γ·(mean of ptx_logp over ptx_mask) at every token of the mask, so that the mean over tokens is
    that of `ppo` − γ·(mean log-likelihood of a pretraining token). Survey S2. InstructGPT subtracts the divergence from
    the reference from the rewards, hence β = 0 here; with `beta` it is a term of the loss.
    """
    check(gamma >= 0, "gamma >= 0", gamma)
    losses, metrics = _surrogate(token_logp, advantage, mask, old_logp, (eps, eps), (ref_token_logp, beta, None, 0.0))
    mask, ptx_mask = mask.bool(), ptx_mask.bool()
    likelihood = _inside(ptx_logp, ptx_mask).sum() / ptx_mask.sum().clamp(min=1)
    nll = {"nll_loss": -likelihood.expand_as(losses)}
    return losses - torch.where(mask, gamma * likelihood, 0.0), metrics | _by_token(nll, mask, losses.dtype)


# --- REINFORCE ----------------------------------------------------------------------------------------------


@_register(
    paper="Simple statistical gradient-following algorithms, Williams 1992; of language models: Back to "
    "Basics (arXiv 2402.14740)",
    equation="−A·token_logp",
    rl=RLDefaults(advantage="batch_mean"),
)
def reinforce(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
) -> Losses:
    """REINFORCE: L = −A·token_logp by token. On-policy only."""
    mask, logp, _, advantage = _tokens(token_logp, advantage, mask, None)
    return -advantage * logp, _by_token({"logps": logp}, mask, logp.dtype)


@_register(
    paper="Back to Basics: Revisiting REINFORCE Style Optimization for RLHF (arXiv 2402.14740)",
    equation="−A Σ_t token_logp",
    survey="S48",
    unit="row",
    denominator="units",
    axes={"advantage": ("U",)},
    rl=RLDefaults(advantage="leave_one_out", reuse={"variant": "clipped"}),
)
def rloo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) see advantages.leave_one_out
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    eps: float = 0.2,
    variant: Literal["plain", "clipped"] = "plain",
) -> Losses:
    """REINFORCE leave-one-out, each completion being one action: (B,).

    `variant="plain"`, the paper's: L = −A Σ_t token_logp. Survey S48. `variant="clipped"`, TRL's: C(ε, ε) with the
    ratio of whole sequences, r = exp(Σ_t token_logp − old_logp). The two have the same gradient on-policy.
    """
    mask, logp, log_ratio, _ = _tokens(token_logp, advantage, mask, old_logp)
    scored = mask.any(dim=1)
    advantage, log_ratio = torch.where(scored, advantage, 0.0), log_ratio.sum(dim=1)
    losses, metrics = _clipped(log_ratio, advantage, eps, eps)
    if variant == "plain":
        losses, metrics = -advantage * logp.sum(dim=1), {"ratio": metrics["ratio"]}
    return losses, _by_token(metrics, scored, losses.dtype)


# --- GRPO and its family ------------------------------------------------------------------------------------


@_register(paper="DeepSeekMath (arXiv 2402.03300)", equation="C(ε, ε) + β·k3", denominator="row_means", uses=_USES)
def grpo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    eps: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """Group relative policy optimisation: PPO without a critic, advantages from advantages.group_normalised.

    L = C(ε, ε) + β·k3; the mean over rows of each row's mean over its tokens.
    """
    return _surrogate(token_logp, advantage, mask, old_logp, (eps, eps), (ref_token_logp, beta, entropy, entropy_coef))


@_register(
    paper="Dr. GRPO: Understanding R1-Zero-Like Training (arXiv 2503.20783)",
    equation="C(ε, ε) + β·k3",
    attributes={**_ATTRIBUTES, "length": "Control"},
    denominator="fixed_length",
    uses=_USES,
    rl=RLDefaults(advantage="group_mean"),
)
def dr_grpo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    eps: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """GRPO done right: `grpo` divided by a fixed length, with advantages that are not scaled.

    L = C(ε, ε) + β·k3; the mean is the sum divided by rows × a fixed number of tokens. Advantages:
    group_normalised(…, scale=False). Neither the length of a wrong answer nor the difficulty of a prompt sets its
    weight.
    """
    return _surrogate(token_logp, advantage, mask, old_logp, (eps, eps), (ref_token_logp, beta, entropy, entropy_coef))


@_register(
    paper="BNPO: Beta Normalization Policy Optimization (arXiv 2506.02864); as a reduction: TRL",
    equation="C(ε, ε) + β·k3",
    denominator="local_tokens",
    uses=_USES,
)
def bnpo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    eps: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """`grpo` averaged over the tokens of the micro-batch, which is TRL's meaning of the name.

    L = C(ε, ε) + β·k3; the mean over micro-batches of each one's mean over its tokens. The paper's own subject, a Beta
    normalisation of rewards, is a matter of the advantages.
    """
    return _surrogate(token_logp, advantage, mask, old_logp, (eps, eps), (ref_token_logp, beta, entropy, entropy_coef))


@_register(
    paper="DAPO: An Open-Source LLM Reinforcement Learning System at Scale (arXiv 2503.14476)",
    equation="C(ε_low, ε_high) + β·k3",
    uses=_USES,
    rl=RLDefaults(max_draws=10, overlong="penalty"),  # as its authors run it (verl's max_num_gen_batches)
)
def dapo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """Decoupled clip and dynamic sampling: `grpo` with more room above, averaged over all tokens of the step.

    L = C(ε_low, ε_high) + β·k3. Dynamic sampling belongs to the rollout.
    """
    return _surrogate(
        token_logp, advantage, mask, old_logp, (eps_low, eps_high), (ref_token_logp, beta, entropy, entropy_coef)
    )


@_register(
    paper="Group Sequence Policy Optimization (arXiv 2507.18071)",
    equation="C(ε_low, ε_high) with r = exp(mean_t log r_t)",
    unit="row",
    denominator="units",
    uses=_USES,
)
def gspo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """Group sequence policy optimisation: one ratio per sequence, the geometric mean of its tokens': (B,).

    L = C(ε_low, ε_high) with r = exp(mean over tokens of token_logp − old_logp), + β·(mean of k3). With one advantage
    per token, the mean over tokens of C. As TRL 1.16 with importance_sampling_level="sequence", loss_type="grpo".
    """
    regularisers = ref_token_logp, beta, entropy, entropy_coef
    return _sequence_surrogate(token_logp, advantage, mask, old_logp, (eps_low, eps_high), regularisers, mean=True)


@_register(
    paper="Length-Unbiased Sequence Policy Optimization (arXiv 2602.05261)",
    equation="length · C(ε_low, ε_high) with r = exp(mean_t log r_t)",
    attributes={**_ATTRIBUTES, "length": "Control"},
    unit="row",
    denominator="units",
    uses=_USES,
)
def luspo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    eps_low: float = 2e-3,
    eps_high: float = 2.5e-3,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """Length-unbiased sequence policy optimisation: `gspo` times the sequence's length: (B,).

    L = length·C(ε_low, ε_high) with the ratio of `gspo`, + β·(sum of k3). As TRL 1.16 with
    importance_sampling_level="sequence"; the ε are the paper's (TRL takes 0.2 unless told).
    """
    regularisers = ref_token_logp, beta, entropy, entropy_coef
    return _sequence_surrogate(token_logp, advantage, mask, old_logp, (eps_low, eps_high), regularisers, mean=False)


@_register(
    paper="CISPO: MiniMax-M1 (arXiv 2506.13585)",
    equation="−sg(min(r, cap))·A·token_logp",
    uses=_USES,
    rl=RLDefaults(settings={"cap": 5.0}, unless=("eps",)),  # ScaleRL (arXiv 2510.13786)
)
def cispo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    cap: float | None = None,
    eps: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """Clipped importance sampling: the weight is clipped, and no token loses its gradient.

    L = −sg(min(r, cap))·A·token_logp + β·k3. Exactly one of `cap`, TRL's epsilon_high (ScaleRL, arXiv 2510.13786: 5),
    and `eps`, cap = 1 + eps, must be given.
    """
    if (cap is None) == (eps is None):
        raise ValueError(f"expected exactly one of cap= and eps=, got cap={cap}, eps={eps}")
    if eps is not None:
        check(eps > 0, "eps > 0", eps)
        cap = 1 + eps
    assert cap is not None
    check(cap > 0, "cap > 0", cap)
    mask, logp, log_ratio, advantage = _tokens(token_logp, advantage, mask, old_logp)
    ratio = _ratio(log_ratio.detach())
    losses = -ratio.clamp(max=cap) * advantage * logp
    metrics = {"ratio": ratio, "cispo_clip_ratio": (ratio > cap) & (advantage > 0)}
    losses, metrics = _regularised(losses, metrics, mask, logp, (ref_token_logp, beta, entropy, entropy_coef))
    return losses, _by_token(metrics, mask, losses.dtype)


@_register(
    paper="Soft Adaptive Policy Optimization (arXiv 2511.20347)",
    equation="−(4/τ) σ(τ(r − 1))·A, τ = τ_pos where A > 0, else τ_neg",
    denominator="row_means",
    uses=_USES,
)
def sapo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """Soft adaptive policy optimisation: a smooth gate in place of the clip.

    L = −(4/τ) σ(τ(r − 1))·A + β·k3, τ = `tau_pos` where A > 0, else `tau_neg`. At r = 1 its gradient is that of
    `grpo`.
    """
    check(tau_pos > 0, "tau_pos > 0", tau_pos)
    check(tau_neg > 0, "tau_neg > 0", tau_neg)
    mask, logp, log_ratio, advantage = _tokens(token_logp, advantage, mask, old_logp)
    ratio = _ratio(log_ratio)
    up, down = (4 / tau * torch.sigmoid(tau * (ratio - 1)) for tau in (tau_pos, tau_neg))
    losses = -torch.where(advantage > 0, up, down) * advantage
    losses, metrics = _regularised(losses, {"ratio": ratio}, mask, logp, (ref_token_logp, beta, entropy, entropy_coef))
    return losses, _by_token(metrics, mask, losses.dtype)


@_register(
    paper="VESPO: Variational Sequence-Level Soft Policy Optimization (arXiv 2602.10693)",
    equation="−sg(φ)·A·token_logp, φ = w^k e^{λ(1 − w)}, w = Π_t r_t",
    unit="row",
    uses=_USES,
)
def vespo(
    *,
    token_logp: Tensor,  # (B, T)
    advantage: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
    ref_token_logp: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Losses:
    """Variational sequence-level soft policy optimisation: a smooth function of the sequence's ratio as weight.

    L = −sg(φ)·A·token_logp + β·k3, one loss per token, (B, T); φ = w^k e^{λ(1 − w)}, w = exp(Σ_t token_logp −
    old_logp); (k, λ) = (`k_pos`, `lambda_pos`) where A ≥ 0, else (`k_neg`, `lambda_neg`). As in TRL 1.16, a token's
    log-ratio is clamped to ±20, log w to [log 1e-8, 20], and λ to at least 1e-4.
    """
    for name, x in {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}.items():
        check(x >= 0, f"{name} >= 0", x)
    mask, logp, log_ratio, advantage = _tokens(token_logp, advantage, mask, old_logp)
    log_w = log_ratio.detach().clamp(-20, 20).sum(dim=1, keepdim=True).clamp(math.log(1e-8), 20)

    def phi(k: float, lam: float) -> Tensor:
        return torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(posinf=0.0)

    weight = torch.where(advantage >= 0, phi(k_pos, max(lambda_pos, 1e-4)), phi(k_neg, max(lambda_neg, 1e-4)))
    losses, metrics = -weight * advantage * logp, {"ratio": _ratio(log_ratio)}
    losses, metrics = _regularised(losses, metrics, mask, logp, (ref_token_logp, beta, entropy, entropy_coef))
    by_row = _by_row({"vespo/phi_seq_mean": weight}, mask, losses.dtype)
    return losses, _by_token(metrics, mask, losses.dtype) | by_row


# --- Nash learning ------------------------------------------------------------------------------------------


@_register(
    paper="Nash Learning from Human Feedback (arXiv 2312.00886)",
    equation="−sg(prob_w − ½ − β Σ_t log(π/ref))·Σ_t token_logp",
    survey="S55–59",
    attributes={**_ATTRIBUTES, "reward": "-", "reward-form": "Preference"},
    unit="row",
    denominator="units",
    rl=RLDefaults(advantage="reward"),
)
def nash_md(
    *,
    token_logp: Tensor,  # (B, T)
    ref_token_logp: Tensor,  # (B, T)
    prob_w: Tensor,  # (B,) P(this completion beats one of the mixture policy's)
    mask: Tensor,  # (B, T)
    beta: float = 0.1,
) -> Losses:
    """Nash mirror descent: a policy gradient on the regularised preference against a mixture policy, (B,).

    L = −sg(prob_w − ½ − β Σ_t log(π/ref))·Σ_t token_logp. Survey S55–59. The completion is the policy's own; its rival
    comes from the geometric mixture π^{1−c}·ref^c of the distributions of the next token.
    """
    check(beta >= 0, "beta >= 0", beta)
    mask = mask.bool()
    logp, scored = _inside(token_logp, mask), mask.any(dim=1)
    prob_w = torch.where(scored, prob_w, 0.5)
    check_rows(
        (prob_w >= 0) & (prob_w <= 1), "prob_w in [0, 1]", "pass the probability itself, not its logit", prob_w=prob_w
    )
    kl = (logp - _inside(ref_token_logp, mask)).detach().sum(dim=1)
    advantage = (prob_w - 0.5 - beta * kl).detach()
    metrics = {"kl": kl, "advantage": advantage}
    return -advantage * logp.sum(dim=1), _by_token(metrics, scored, logp.dtype)
