"""Ranking accuracy: does a policy find the chosen completion likelier, and would it at the objective's optimum?

From "Preference Learning Algorithms Do Not Learn Preference Rankings" (arXiv 2405.19534). For a pair (x, y_w, y_l) with
α = P(y_w beats y_l | x), and a policy's margin m = log π(y_w|x) − log π(y_l|x):

    right        m > 0; equal log-probs are a tie, and not right
    idealised    m* = m_ref + logit(α)/β > 0

The optimum of KL-regularised reward maximisation, and of DPO on enough labels, is π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β).
The normaliser cancels in a ratio, and under Bradley–Terry r(x, y_w) − r(x, y_l) = logit(α), so

    π*(y_w|x)/π*(y_l|x) = π_ref(y_w|x)/π_ref(y_l|x) · (α/(1−α))^{1/β}        (Theorem 3.1)

whose logarithm is m*. A unanimous pair, α = 1, has m* = ∞ and is right whatever the reference; α = 0 is wrong; α = ½
leaves the reference's margin. The alignment gap is the idealised accuracy − the policy's.

A pair is ranked right exactly if its DPO loss −log σ(β(m − m_ref)) is less than −log σ(−β·m_ref) (Theorem 4.1): pairs
that the reference ranks wrong by much stay wrong at small losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..rewards.report import standard_error

FLIPS = ("stays right", "to right", "to wrong", "stays wrong")  # by the reference's ranking and the policy's


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of P pairs, chosen before rejected: sums over the scored tokens of a completion, in nats.

    alpha: P(chosen beats rejected), NaN where it is not known; None: 1, the label of every pair is certain.
    prompts: numbers shared by the pairs of a prompt, which are one observation of a standard error; None: each its own.

    Raises ValueError for other shapes, for no pair, and for an alpha outside [0, 1].
    """

    policy: np.ndarray  # (P, 2)
    reference: np.ndarray  # (P, 2)
    tokens: np.ndarray  # (P, 2)
    alpha: np.ndarray | None = None  # (P,)
    prompts: np.ndarray | None = None  # (P,) int

    def __post_init__(self) -> None:
        shapes = {x.shape for x in (self.policy, self.reference, self.tokens)}
        (shape, *others) = shapes
        if others or len(shape) != 2 or shape[1] != 2 or not shape[0]:
            raise ValueError(f"expected log-probs and tokens (P, 2) of P ≥ 1 pairs, got {sorted(shapes)}")
        for name in ("alpha", "prompts"):
            given = getattr(self, name)
            if given is not None and given.shape != shape[:1]:
                raise ValueError(f"expected {name} of shape {shape[:1]}, one for each pair, got {given.shape}")
        if self.alpha is not None and (wrong := (self.alpha < 0) | (self.alpha > 1)).any():
            i = int(wrong.argmax())
            raise ValueError(f"alpha is P(chosen beats rejected), in [0, 1]; got {self.alpha[i]:.6g} for pair {i}")

    def __len__(self) -> int:
        return len(self.policy)

    @property
    def finite(self) -> np.ndarray:
        """(P,) bool, whether all four log-probs of a pair are finite."""
        return np.all(np.isfinite(np.concatenate([self.policy, self.reference], axis=1)), axis=1)

    def take(self, at: np.ndarray) -> PairLogps:
        """Returns the pairs at these numbers, or where this mask is True."""
        alpha, prompts = (None if x is None else x[at] for x in (self.alpha, self.prompts))
        return PairLogps(self.policy[at], self.reference[at], self.tokens[at], alpha, prompts)


def margins(logps: np.ndarray, tokens: np.ndarray | None = None) -> np.ndarray:
    """Returns log π(y_w|x) − log π(y_l|x) of log-probs (P, 2), (P,) float64; with tokens, of means over tokens."""
    scaled = np.asarray(logps, dtype=np.float64)
    if tokens is not None:
        scaled = scaled / tokens
    return scaled[:, 0] - scaled[:, 1]


def ideal_margin(reference_margin: np.ndarray, alpha: np.ndarray, beta: float) -> np.ndarray:
    """Returns log π*(y_w|x) − log π*(y_l|x) = m_ref + logit(α)/β of the objective's optimum π* (2405.19534, Thm. 3.1).

    reference_margin: m_ref (P,), finite. alpha: (P,) in [0, 1]; 1 gives ∞, 0 −∞, NaN NaN. Returns (P,) float64. Raises
    ValueError for a beta that is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    a = np.asarray(alpha, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logit = np.log(a) - np.log1p(-a)
    return np.asarray(reference_margin, dtype=np.float64) + logit / beta


def flips(reference_margin: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Returns the index in FLIPS of each pair (P,): how training changed its ranking. A tie is not right."""
    before, after = np.asarray(reference_margin) > 0, np.asarray(margin) > 0
    return np.where(before, np.where(after, 0, 2), np.where(after, 1, 3))


def ranking(pairs: PairLogps, betas: Sequence[float] = (0.1,)) -> dict[str, Any]:
    """Returns the figures of a policy and its reference on pairs, as JSON values.

    betas: of the idealised accuracy, one entry each; the first is that of the implicit reward β(log π − log π_ref).
    Pairs with a log-prob that is not finite are left out and counted. policy and reference have the ranking accuracy by
    sums and by means per token; implicit the share of pairs with the higher implicit reward for the chosen completion.
    A standard error has the pairs of a prompt as one observation, and is None for a single prompt. idealised leaves out
    pairs without alpha, and counts them. Raises ValueError if no pair is finite, or without a beta.
    """
    if not betas:
        raise ValueError("expected one beta or more, got none")
    finite = pairs.finite
    if not finite.any():
        raise ValueError(f"none of {len(pairs)} pairs has finite log-probs by policy and reference: nothing to rank")
    left_out, pairs = int((~finite).sum()), pairs.take(finite)
    after, before = margins(pairs.policy), margins(pairs.reference)
    alpha = np.ones(len(pairs)) if pairs.alpha is None else pairs.alpha
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": len(pairs) if pairs.prompts is None else len(np.unique(pairs.prompts)),
        "not_finite": left_out,
    }
    for name, logps, margin in (("policy", pairs.policy, after), ("reference", pairs.reference, before)):
        per_token = margins(logps, pairs.tokens)
        found[name] = {
            **_accuracy(margin, pairs.prompts),
            "margin_mean": float(margin.mean()),
            "per_token": {**_accuracy(per_token, pairs.prompts), "margin_mean": float(per_token.mean())},
        }
    change = (after > 0).astype(float) - (before > 0)
    found["change"] = {"mean": float(change.mean()), "standard_error": error_of(change, pairs.prompts)}
    found["idealised"] = [_idealised(before, after, alpha, beta, pairs.prompts) for beta in betas]
    gained, beta = after - before, betas[0]
    found["implicit"] = {
        "beta": beta,
        **_accuracy(gained, pairs.prompts),
        "margin_mean": float(beta * gained.mean()),
        "dpo_loss": float(np.logaddexp(0, -beta * gained).mean()),
        "chosen_likelier": float((pairs.policy[:, 0] > pairs.reference[:, 0]).mean()),
        "rejected_likelier": float((pairs.policy[:, 1] > pairs.reference[:, 1]).mean()),
    }
    which = flips(before, after)
    found["flips"] = {name: _group(which == k, before, after, beta) for k, name in enumerate(FLIPS)}
    return found


def _accuracy(margin: np.ndarray, prompts: np.ndarray | None) -> dict[str, Any]:
    right = (margin > 0).astype(float)
    return {
        "accuracy": float(right.mean()),
        "standard_error": error_of(right, prompts),
        "ties": int((margin == 0).sum()),
    }


def _idealised(
    before: np.ndarray, after: np.ndarray, alpha: np.ndarray, beta: float, prompts: np.ndarray | None
) -> dict[str, Any]:
    ideal = ideal_margin(before, alpha, beta)
    known = ~np.isnan(ideal)
    entry: dict[str, Any] = {"beta": beta, "without_alpha": int((~known).sum()), "accuracy": None, "gap": None}
    if known.any():
        some = None if prompts is None else prompts[known]
        entry |= _accuracy(ideal[known], some)
        gap = (ideal[known] > 0).astype(float) - (after[known] > 0)
        entry |= {"gap": float(gap.mean()), "gap_standard_error": error_of(gap, some)}
    return entry


def _group(at: np.ndarray, before: np.ndarray, after: np.ndarray, beta: float) -> dict[str, Any]:
    """Returns count, share, mean margins and mean DPO loss of the pairs where `at` is True."""
    entry: dict[str, Any] = {"pairs": int(at.sum()), "share": float(at.mean())}
    means = {"reference_margin": before, "margin": after, "dpo_loss": np.logaddexp(0, -beta * (after - before))}
    return entry | {name: float(x[at].mean()) if at.any() else None for name, x in means.items()}


def error_of(x: np.ndarray, prompts: np.ndarray | None) -> float | None:
    """Returns the standard error of the mean of x (n,), with a prompt as one observation; None for a single prompt."""
    one = len(x) < 2 if prompts is None else len(np.unique(prompts)) < 2
    return None if one else standard_error(x, prompts)


def pair_lines(pairs: PairLogps, betas: Sequence[float]) -> list[dict[str, Any]]:
    """Returns a line of JSON values for each pair: log-probs, tokens, margins, the flip, and what the optimum would do.

    loss_to_rank: the DPO loss, at the first beta, below which the pair is ranked right. A pair that is not finite has
    no flip; one without alpha is not idealised.
    """
    alpha = np.ones(len(pairs)) if pairs.alpha is None else pairs.alpha
    with np.errstate(invalid="ignore"):  # log-probs that are not finite give margins that are not
        after, before = margins(pairs.policy), margins(pairs.reference)
        ideal = [ideal_margin(before, alpha, beta) for beta in betas]
        loss, to_rank = np.logaddexp(0, -betas[0] * (after - before)), np.logaddexp(0, betas[0] * before)
    which, finite = flips(before, after), pairs.finite
    return [
        {
            "policy": pairs.policy[i].tolist(),
            "reference": pairs.reference[i].tolist(),
            "tokens": pairs.tokens[i].astype(int).tolist(),
            "margin": float(after[i]),
            "reference_margin": float(before[i]),
            "flip": FLIPS[which[i]] if finite[i] else None,
            "loss": float(loss[i]),
            "loss_to_rank": float(to_rank[i]),
            "alpha": float(alpha[i]),
            "idealised": [None if np.isnan(x[i]) else bool(x[i] > 0) for x in ideal],
        }
        for i in range(len(pairs))
    ]
