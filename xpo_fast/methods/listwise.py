"""Losses of K scored completions per prompt.

Every function takes (P, K) float tensors, log-probs in nats summed over a completion's tokens, lengths in tokens and
scores, higher is better, and returns (losses (P,), metrics of detached (P,) tensors). `mask` (P, K) says which
completions exist; values outside it do not matter, NaN included, and get no gradient.
Symbols: s = β(logps − ref_logps), p = logps / lens, ψ = scores.

A list of one completion has nothing to rank: its loss and gradient are exactly 0 in every method but `nn`, also where
the formula has a term for it (`rrhf`, `pro` and the pointwise kinds of `lipo`). Completions with equal scores stay in
the order given wherever an order is needed. Scores that are not finite and hyperparameters out of range raise
ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .math import Losses, check, check_beta, check_rows, pair_metrics
from .registry import register
from .survey import NO_REWARD


def _lists(mask: Tensor | None, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mask and scores (P, K), scores 0 outside the mask."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    scores = torch.where(mask, scores, 0.0)
    total = scores.sum(dim=1)
    check_rows(total.isfinite(), "finite scores", "mask the completions that have none", sum_of_scores=total)
    return mask, scores


def _ranks(x: Tensor, mask: Tensor) -> Tensor:
    """Returns distinct ranks (P, K) int64, 0 = highest: ties in the order given, entries outside the mask last."""
    order = torch.where(mask, x.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _differences(x: Tensor) -> Tensor:
    """Returns (P, K, K), x_i − x_j at [:, i, j]."""
    return x[:, :, None] - x[:, None, :]


def _better(scores: Tensor, mask: Tensor) -> Tensor:
    """Returns (P, K, K) bool, ψ_i > ψ_j at [:, i, j], False where one of them is masked."""
    return (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def _best(x: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Returns x of the completion with the highest score: (P,)."""
    return torch.where(mask & (_ranks(scores, mask) == 0), x, 0.0).sum(dim=1)


def _zero_if_alone(losses: Tensor, mask: Tensor) -> Tensor:
    """Returns the losses (P,), 0 for lists of one completion."""
    return torch.where(mask.sum(dim=1) > 1, losses, 0.0)


def _log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x − logsumexp(x) over the last dimension where mask, 0 elsewhere."""
    # The lowest number and not −∞, which would make a row without an entry NaN.
    return torch.where(mask, torch.where(mask, x, torch.finfo(x.dtype).min).log_softmax(dim=-1), 0.0)


def _likelihood_of_order(terms: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Returns Σ_k [−x_kk + logsumexp_{i≥k} x_ki] in score order, x_ki = terms[:, k, i]: (P,)."""
    rank = _ranks(scores, mask)
    later = (rank[:, None, :] >= rank[:, :, None]) & mask[:, None, :]
    return -_log_softmax(terms, later & mask[:, :, None]).diagonal(dim1=1, dim2=2).sum(dim=1)


def _metrics(reward: Tensor, logps: Tensor, scores: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Returns metrics of the best and the worst completion; accuracies: the share of strictly ordered pairs that
    `reward` orders alike."""
    reward, logps = reward.detach(), logps.detach()
    rank, count = _ranks(scores, mask), mask.sum(dim=1)

    def at(x: Tensor, place: Tensor) -> Tensor:
        picked = torch.where(mask & (rank == place[:, None]), x, 0.0).sum(dim=1)
        return torch.where(count > 0, picked, torch.nan)

    first, last = torch.zeros_like(count), count - 1
    better = _better(scores, mask)
    right = (better & (_differences(reward) > 0)).sum(dim=(1, 2)).to(reward.dtype)
    return {
        "rewards/chosen": at(reward, first),
        "rewards/rejected": at(reward, last),
        "rewards/accuracies": right / better.sum(dim=(1, 2)),
        "rewards/margins": at(reward, first) - at(reward, last),
        "logps/chosen": at(logps, first),
        "logps/rejected": at(logps, last),
    }


def _implicit_rewards(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Returns s and the log-probs, (P, K), 0 outside the mask."""
    check_beta(beta)
    logps = torch.where(mask, logps, 0.0)
    return beta * (logps - torch.where(mask, ref_logps, 0.0)), logps


def _mean_logps(logps: Tensor, lens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p and the log-probs, (P, K), 0 outside the mask."""
    logps = torch.where(mask, logps, 0.0)
    return logps / torch.where(mask, lens, 1.0), logps


# --- LiPO: kinds of loss, each (s, ψ, mask) → (P,) with s and ψ 0 outside the mask --------------------------


def _lambda(s: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    better = _better(scores, mask)
    # |2^ψi − 2^ψj|, for ψi > ψj, as 2^ψi (1 − 2^−gap): neither cancellation nor ∞ − ∞.
    gap = torch.where(better, _differences(scores), 0.0)
    gain = torch.exp2(scores)[:, :, None] * -torch.expm1(-math.log(2.0) * gap)
    discount = 1 / torch.log1p(1.0 + _ranks(s, mask).to(s.dtype))
    weight = torch.where(better, gain * _differences(discount).abs(), 0.0)
    return -(weight * logsigmoid(_differences(s))).sum(dim=(1, 2))


def _point_sigmoid(s: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    outside = (scores < 0) | (scores > 1)
    extreme = scores.gather(1, (scores - 0.5).abs().argmax(dim=1, keepdim=True)).squeeze(1)
    check_rows(
        ~outside.any(dim=1),
        'scores in [0, 1] for kind="point_sigmoid"',
        "give probabilities, as a sigmoid of the reward, or choose another kind",
        scores=extreme,
    )
    losses = -scores * logsigmoid(s) - (1 - scores) * logsigmoid(-s)
    return torch.where(mask, losses, 0.0).sum(dim=1)


def _over_pairs(losses: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum (P,) of losses (P, K, K) over the pairs ψ_i > ψ_j."""
    return torch.where(_better(scores, mask), losses, 0.0).sum(dim=(1, 2))


def _list_mle(s: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    return _likelihood_of_order(s[:, None, :].expand(-1, s.shape[1], -1), scores, mask)


_KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "lambda": _lambda,
    "pair_logistic": lambda s, scores, mask: _over_pairs(-logsigmoid(_differences(s)), scores, mask),
    "pair_hinge": lambda s, scores, mask: _over_pairs(torch.relu(1 - _differences(s)), scores, mask),
    "point_mse": lambda s, scores, mask: ((s - scores) ** 2).sum(dim=1),
    "point_sigmoid": _point_sigmoid,
    "softmax": lambda s, scores, mask: -(scores * _log_softmax(s, mask)).sum(dim=1),
    "list_mle": _list_mle,
}


@register(
    paper="LiPO: Listwise Preference Optimization through Learning-to-Rank (arXiv 2402.01878)",
    equation="Σ_{ψi>ψj} Δij log(1 + e^{−(si−sj)}), Δij = |2^ψi − 2^ψj|·|1/log(1+τi) − 1/log(1+τj)|, τ = rank of s",
    survey="S49",
    attributes={"feedback-form": "List"},
    unit="list",
)
def lipo(
    *,
    logps: Tensor,  # (P, K)
    ref_logps: Tensor,  # (P, K)
    scores: Tensor,  # (P, K)
    mask: Tensor | None = None,  # (P, K) bool, where K varies
    beta: float = 0.1,
    kind: Literal[
        "lambda", "pair_logistic", "pair_hinge", "point_mse", "point_sigmoid", "softmax", "list_mle"
    ] = "lambda",
) -> Losses:
    """Listwise preference optimisation: the losses of learning to rank, on s = β(logps − ref_logps).

    `kind` names the loss; sums are over the completions i, j of a list:
    "lambda" (LiPO-λ): Σ_{ψi>ψj} Δij log(1 + e^{−(si−sj)}), Δij = |2^ψi − 2^ψj|·|1/log(1+τi) − 1/log(1+τj)|, τi the
        rank of si, 1 = best, without gradient. Equal s get distinct ranks, in the order given: with equal ranks Δ, and
        with it the gradient, would be 0 at policy = reference, and nothing would ever train.
    "pair_logistic": Σ_{ψi>ψj} log(1 + e^{−(si−sj)}). "pair_hinge": Σ_{ψi>ψj} max(0, 1 − (si−sj)).
    "point_mse": Σ(s−ψ)². "point_sigmoid": −Σ[ψ log σ(s) + (1−ψ) log σ(−s)], for scores in [0, 1] only.
    "softmax": −Σ ψ log softmax(s), ψ as given. "list_mle": `plackett_luce`.
    Survey S49, which prints a minus sign too many. Pairs of equal scores add nothing to the sums over pairs.
    """
    mask, scores = _lists(mask, scores)
    s, logps = _implicit_rewards(logps, ref_logps, mask, beta)
    return _zero_if_alone(_KINDS[kind](s, scores, mask), mask), _metrics(s, logps, scores, mask)


@register(
    paper="The analysis of permutations, Plackett 1975; of preferences: Direct Preference Optimization "
    "(arXiv 2305.18290)",
    equation="−Σ_k [s_k − logsumexp_{i≥k} s_i] in score order",
    attributes={"feedback-form": "List"},
    unit="list",
)
def plackett_luce(
    *,
    logps: Tensor,  # (P, K)
    ref_logps: Tensor,  # (P, K)
    scores: Tensor,  # (P, K)
    mask: Tensor | None = None,  # (P, K) bool, where K varies
    beta: float = 0.1,
) -> Losses:
    """DPO of a ranking: the likelihood of the whole order under implicit rewards s.

    L = −Σ_k [s_k − logsumexp_{i≥k} s_i], k = 1 … K from the best score to the worst (DPO, appendix A.3). K = 2 is
    `dpo`; at policy = reference the loss is ln K!. Equal scores are taken in the order given, which the loss then fits
    as if it were preferred.
    """
    mask, scores = _lists(mask, scores)
    s, logps = _implicit_rewards(logps, ref_logps, mask, beta)
    return _zero_if_alone(_list_mle(s, scores, mask), mask), _metrics(s, logps, scores, mask)


@register(
    paper="RRHF: Rank Responses to Align Language Models with Human Feedback (arXiv 2304.05302)",
    equation="Σ_{ψi<ψj} max(0, p_i − p_j) − λ·logp of the best, p = logps / lens",
    survey="S50",
    attributes={**NO_REWARD, "feedback-form": "List", "divergence": "-", "sft": "Merge"},
    unit="list",
)
def rrhf(
    *,
    logps: Tensor,  # (P, K)
    lens: Tensor,  # (P, K) tokens of the completion, padding not counted
    scores: Tensor,  # (P, K)
    mask: Tensor | None = None,  # (P, K) bool, where K varies
    lam_sft: float = 1.0,
) -> Losses:
    """Rank responses to align with human feedback: a hinge on mean log-probs and fine-tuning on the best completion.

    There is no reference.

    L = Σ_{ψi<ψj} max(0, p_i − p_j) − λ·logp of the best (a sum over its tokens), p = logps / lens, λ = `lam_sft`.
    Survey S50. The authors' public code divides by padded lengths; here a length is the completion's own. The metrics'
    rewards are p.
    """
    check(lam_sft >= 0, "lam_sft >= 0", lam_sft)
    mask, scores = _lists(mask, scores)
    p, logps = _mean_logps(logps, lens, mask)
    losses = _over_pairs(torch.relu(-_differences(p)), scores, mask) - lam_sft * _best(logps, scores, mask)
    return _zero_if_alone(losses, mask), _metrics(p, logps, scores, mask)


@register(
    paper="Preference Ranking Optimization for Human Alignment (arXiv 2306.17492)",
    equation="Σ_{k<K} [−r_k/T_k^k + logsumexp_{i≥k}(r_i/T_i^k)] − α(K−1)²·logp of the best, r = logps / lens",
    survey="S51–52",
    attributes={"reward": "Explicit", "feedback-form": "List", "divergence": "-", "sft": "Merge"},
    unit="list",
)
def pro(
    *,
    logps: Tensor,  # (P, K)
    lens: Tensor,  # (P, K)
    scores: Tensor,  # (P, K)
    mask: Tensor | None = None,  # (P, K) bool, where K varies
    alpha: float = 0.05,
    temperature: bool = True,
    variant: Literal["authors", "survey"] = "authors",
) -> Losses:
    """Preference ranking optimisation: each completion against all worse ones, and fine-tuning on the best.

    A = Σ_{k<K} [−r_k/T_k^k + logsumexp_{i≥k}(r_i/T_i^k)] in score order, r = logps / lens,
    T_i^k = 1/(ψ_k − ψ_i), T_k^k = min_i T_i^k (S52); `temperature=False`: all T = 1 (S51). `variant="authors"`, as
    their code has it: L = A − α(K−1)²·logp of the best (a sum over its tokens), K the number of completions of the
    list. `variant="survey"`: L = −logp of the best + αA.
    The code multiplies by 1/T, the gap of scores. A tie has gap 0: its completion stays in the logsumexp as e⁰ and has
    no gradient there. The metrics' rewards are r.
    """
    check(alpha >= 0, "alpha >= 0", alpha)
    mask, scores = _lists(mask, scores)
    r, logps = _mean_logps(logps, lens, mask)
    terms = r[:, None, :].expand(-1, r.shape[1], -1)
    if temperature:
        gap = torch.where(_better(scores, mask), _differences(scores), 0.0)  # 1/T_i^k at [:, k, i]
        terms = terms * (gap + torch.diag_embed(gap.amax(dim=2)))
    order, best = _likelihood_of_order(terms, scores, mask), _best(logps, scores, mask)
    losses = order - alpha * best * (mask.sum(dim=1) - 1) ** 2 if variant == "authors" else alpha * order - best
    return _zero_if_alone(losses, mask), _metrics(r, logps, scores, mask)


@register(
    paper="Negating Negatives: Alignment without Human Positives, D2O (arXiv 2403.03419)",
    equation="−log σ((γ/K) Σ_i(logps_i − ref_logps_i) − α(logp_l − ref_pos_logp_l))",
    survey="S53",
    attributes={"reward-sign": "Negative", "feedback": "-", "feedback-form": "-", "policy": "On"},
    unit="list",
)
def nn(
    *,
    logps: Tensor,  # (P, K) of completions that the policy made
    ref_logps: Tensor,  # (P, K)
    logp_l: Tensor,  # (P,) of the dataset's rejected completion
    ref_pos_logp_l: Tensor,  # (P,) the same under a second, more helpful reference
    mask: Tensor | None = None,  # (P, K) bool, where K varies
    gamma: float = 0.1,
    alpha: float = 0.1,
) -> Losses:
    """Negating negatives: away from a rejected completion, towards the mean of K self-generated ones.

    L = −log σ((γ/K) Σ_i(logps_i − ref_logps_i) − α(logp_l − ref_pos_logp_l)). Survey S53. There are two references: a
    general one for the self-generated completions, and a better aligned one for the rejected completion, for example
    the previous epoch's policy.
    """
    check(gamma >= 0, "gamma >= 0", gamma)
    check(alpha >= 0, "alpha >= 0", alpha)
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask.bool()
    logps, count = torch.where(mask, logps, 0.0), mask.sum(dim=1).clamp(min=1)
    reward_w = gamma * (logps - torch.where(mask, ref_logps, 0.0)).sum(dim=1) / count
    reward_l = alpha * (logp_l - ref_pos_logp_l)
    metrics = pair_metrics(reward_w, reward_l, logps.sum(dim=1) / count, logp_l)
    return -logsigmoid(reward_w - reward_l), metrics
