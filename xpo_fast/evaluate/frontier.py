"""Reward against KL over the checkpoints of a run, on the policies' own samples.

    KL(π‖π_ref) = E_{y~π} Σ_t δ_t,   δ_t = log π(y_t|x, y_<t) − log π_ref(y_t|x, y_<t)

k1 = Σ_t δ_t of a sample is unbiased and may be negative; k3 = Σ_t (e^{−δ_t} − 1 + δ_t) has the same mean, is never
negative, and varies less where the policies are near (Schulman, "Approximating KL divergence", 2020). Both are of the
completions as sampled, so of those cut at the longest length for the tokens before the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ranking import error_of


@dataclass(frozen=True)
class Point:
    """A policy's KL from the reference and its reward: means over completions, with standard errors over prompts.

    A standard error is None for a single prompt. unjudged: completions without a reward, or with one that is not
    finite; reward is None if none has one.
    """

    name: str
    kl: float
    kl_error: float | None
    k3: float
    k3_error: float | None
    reward: float | None
    reward_error: float | None
    tokens: float
    prompts: int
    completions: int
    unjudged: int = 0


def kl_estimates(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns k1 and k3 of each completion, (R,) float64 each.

    policy, reference: (R, T) log-probs of the tokens of the policy's own samples, 0 in both behind a completion's end.
    Raises ValueError for different shapes.
    """
    if policy.shape != reference.shape:
        raise ValueError(
            f"expected log-probs of the same tokens, got {tuple(policy.shape)} and {tuple(reference.shape)}"
        )
    delta = policy.double() - reference.double()
    return delta.sum(dim=1), (torch.expm1(-delta) + delta).sum(dim=1)


def point(
    name: str, k1: np.ndarray, k3: np.ndarray, reward: np.ndarray, tokens: np.ndarray, prompts: np.ndarray
) -> Point:
    """Returns the point of a policy from its R completions: (R,) each, prompts a number shared by those of a prompt.

    Raises ValueError for no completion, and for a KL that is not finite.
    """
    if not len(k1):
        raise ValueError(f"{name}: no completion to measure")
    if not (np.isfinite(k1) & np.isfinite(k3)).all():
        wrong = int((~(np.isfinite(k1) & np.isfinite(k3))).argmax())
        raise ValueError(
            f"{name}: the log-ratio to the reference is not finite for completion {wrong}: load the models in another "
            "dtype"
        )
    judged = np.isfinite(reward)
    mean = float(reward[judged].mean()) if judged.any() else None
    return Point(
        name,
        float(k1.mean()),
        error_of(k1, prompts),
        float(k3.mean()),
        error_of(k3, prompts),
        mean,
        None if mean is None else error_of(reward[judged], prompts[judged]),
        float(tokens.mean()),
        len(np.unique(prompts)),
        len(k1),
        int((~judged).sum()),
    )


def efficient(points: list[Point]) -> list[bool]:
    """Returns for each point whether it is on the frontier: no other has at most its KL and at least its reward.

    KL is k3's mean, which varies less. Of points that are equal in both, all are on it; one without a reward is not.
    """

    def beaten(a: Point) -> bool:
        return any(
            b.k3 <= a.k3 and b.reward >= a.reward and (b.k3, b.reward) != (a.k3, a.reward)
            for b in points
            if b.reward is not None and a.reward is not None
        )

    return [a.reward is not None and not beaten(a) for a in points]


def as_rows(points: list[Point]) -> list[dict[str, Any]]:
    """Returns the points as JSON values, with whether each is on the frontier."""
    return [{**vars(p), "on_frontier": on} for p, on in zip(points, efficient(points), strict=True)]
