"""Gauges of how far a policy's samples lie from what a reward model was measured on: off its distribution, its rewards
are guesses, which a policy that is trained against them finds.

    states of the pairs' completions ── mean, covariance ──▶ distance of held-out pairs, and of the samples ──▶ AUC
    rewards of both ──▶ shift of the mean; with several models, how much they disagree

The distance is Mahalanobis's, as in A Simple Unified Framework for Detecting Out-of-Distribution Samples (arXiv
1807.03888), on the states that the rewards are read from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data import prompt_of
from .voting import auc

SHRINKAGE = 0.1  # share of the covariance that is replaced by its mean variance: there are fewer rows than columns


def distances(
    states: np.ndarray,  # (N, D) that the distribution is fitted to
    *others: np.ndarray,  # (M, D) each
    shrinkage: float = SHRINKAGE,
) -> tuple[np.ndarray, ...]:
    """Computes (x − μ)ᵀ Σ⁻¹ (x − μ)/D, (M,), of each of `others`: about 1 for rows of the same distribution.

    μ, Σ: mean and covariance of `states`, Σ = (1 − s)S + s·tr(S)/D·I. Raises ValueError for fewer than two rows, and
    where they are all equal.
    """
    if states.ndim != 2 or len(states) < 2:
        raise ValueError(f"expected states (N, D) of two or more rows, got {states.shape}")
    states = states.astype(np.float64)
    mean, width = states.mean(axis=0), states.shape[1]
    covariance = np.cov(states, rowvar=False).reshape(width, width)
    variance = np.trace(covariance) / width
    if not variance > 0:
        raise ValueError("expected states that differ, got equal ones")
    covariance = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(width)
    found = []
    for rows in others:
        off = rows.astype(np.float64) - mean
        found.append((off * np.linalg.solve(covariance, off.T).T).sum(axis=1) / width)
    return tuple(found)


class Drift:
    """Gauges of several reward models, one after another, on the same pairs and samples.

    pairs: rows of `data.load(…, kind="pair")`; the distribution is fitted to every other one, and the rest is the
    yardstick. samples: rows of `load_samples`. Raises ValueError for fewer than four pairs, or no samples.
    """

    def __init__(self, pairs: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> None:
        if len(pairs) < 4 or not len(samples):
            raise ValueError(f"expected four or more pairs, and samples; got {len(pairs)} and {len(samples)}")
        halves = [pairs[::2], pairs[1::2]]
        texts = [[(prompt_of(row), row[n]) for row in half for n in ("chosen", "rejected")] for half in halves]
        texts.append([(prompt_of(row), row["chosen"]) for row in samples])
        self._prompts = [[p for p, _ in part] for part in texts]
        self._completions = [[c for _, c in part] for part in texts]
        self._rewards: list[tuple[np.ndarray, np.ndarray]] = []
        self.models: list[dict[str, Any]] = []

    def add(self, name: str, model: Any) -> dict[str, Any]:
        """Measures a `RewardModel`; returns and keeps its gauges, as JSON values.

        reward_shift: (mean reward of the samples − that of the held-out pairs' completions) / deviation of the latter.
        reward_spread: the deviation of the samples' rewards / that of the latter. distance, distance_samples: medians
        of `distances`. auc: how well the distance tells samples from held-out completions: ½ on the distribution, 1
        far from it.
        """
        fitted, held, drawn = (
            model.states(p, c).numpy() for p, c in zip(self._prompts, self._completions, strict=True)
        )
        near, far = distances(fitted, held, drawn)
        rewards = [model.score(p, c).double().numpy() for p, c in zip(self._prompts[1:], self._completions[1:])]
        deviation = rewards[0].std()
        if not deviation > 0:
            raise ValueError(f"{name} gives all completions of the pairs the same reward: train it first")
        before, after = ((x - rewards[0].mean()) / deviation for x in rewards)
        self._rewards.append((before, after))
        found = {
            "name": name,
            "completions": len(held),
            "samples": len(drawn),
            "reward_shift": float(after.mean()),
            "reward_spread": float(after.std()),
            "distance": float(np.median(near)),
            "distance_samples": float(np.median(far)),
            "auc": auc(np.concatenate([near, far]), np.arange(len(near) + len(far)) >= len(near)),
        }
        self.models.append(found)
        return found

    def disagreement(self) -> dict[str, float] | None:
        """Returns how far the models' standardised rewards lie apart, on both kinds of rows; None for one model.

        It is the mean of the deviation over the models: those that agree on pairs and not on samples guess there.
        """
        if len(self._rewards) < 2:
            return None
        before, after = (np.stack(x, axis=1).std(axis=1).mean() for x in zip(*self._rewards, strict=True))
        return {"pairs": float(before), "samples": float(after)}
