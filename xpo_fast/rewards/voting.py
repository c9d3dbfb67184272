"""Votes of several reward models on the labels of pairs: how strong a preference is, and what is made of its label.

    pairs ── M reward models ──▶ r_w − r_l (P, M) ── mean, deviation ──▶ flip, drop, soft label or margin ──▶ pairs

After Secrets of RLHF Part II (arXiv 2401.06080), where ten models are trained on the same pairs from ten seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..methods.math import check, check_choice

LABELS = ("hard", "soft", "margin")


@dataclass(frozen=True)
class Votes:
    """What M reward models say of P pairs, and what becomes of them."""

    mean: np.ndarray  # (P,) preference strength r_w − r_l, the mean over the models
    std: np.ndarray  # (P,) its standard deviation over the models
    flipped: np.ndarray  # (P,) bool: chosen and rejected change places
    dropped: np.ndarray  # (P,) bool
    prob: np.ndarray  # (P,) of the label that stays or comes, the mean of σ(strength)

    def summary(self) -> dict[str, Any]:
        """Returns the figures of the vote, as JSON values."""
        quantiles = {f"strength_{q:02d}": float(np.quantile(self.mean, q / 100)) for q in (5, 20, 50, 80, 95)}
        return {
            "pairs": len(self.mean),
            "flipped": int(self.flipped.sum()),
            "dropped": int(self.dropped.sum()),
            "strength_below_0": float((self.mean < 0).mean()),
            "std_mean": float(self.std.mean()),
            **quantiles,
        }


def vote(
    margins: np.ndarray,  # (P, M) r_w − r_l of each pair by each model
    *,
    flip: float = 0.1,
    drop: float = 0.0,
) -> Votes:
    """Decides by the strength of each preference what becomes of its label.

    flip: share of the pairs whose labels are changed, those of lowest mean strength; a pair of positive mean keeps its
    label whatever the share. drop: share that is left out, those of least |mean| among the others. M = 1 has deviation
    0. Raises ValueError for no pairs or models, a margin that is not finite, and shares that are negative or above 1
    together.
    """
    if margins.ndim != 2 or not margins.size:
        raise ValueError(f"expected margins (P, M) of one or more pairs and models, got {margins.shape}")
    if not np.isfinite(margins).all():
        raise ValueError(f"expected finite margins, got {int((~np.isfinite(margins)).sum())} that are not")
    check(flip >= 0 and drop >= 0 and flip + drop <= 1, "shares flip and drop >= 0, at most 1 together", (flip, drop))
    margins = margins.astype(np.float64)
    mean, count = margins.mean(axis=1), len(margins)
    flipped, dropped = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    flipped[np.argsort(mean, kind="stable")[: round(flip * count)]] = True
    flipped &= mean < 0
    weakest = np.argsort(np.where(flipped, np.inf, np.abs(mean)), kind="stable")
    dropped[weakest[: round(drop * count)]] = True
    signed = np.where(flipped, -1.0, 1.0)[:, None] * margins
    prob = np.exp(-np.logaddexp(0, -signed)).mean(axis=1)
    return Votes(mean, margins.std(axis=1), flipped, dropped & ~flipped, prob)


def adapted(rows: Sequence[Mapping[str, Any]], votes: Votes, labels: str = "hard") -> list[dict[str, Any]]:
    """Returns the pairs as `data.load` reads them: labels flipped, pairs left out, and what the models say beside them.

    labels: "hard" leaves it at that; "soft" adds `prob`, the mean of σ(strength) over the models; "margin" adds
    `margin`, the mean strength, 0 where it is negative. strength_mean, strength_std and flipped are for people: no
    method reads them. A label's own prob, margin and scores are of another opinion, and are left out.
    """
    check_choice("labels", labels, LABELS)
    if len(rows) != len(votes.mean):
        raise ValueError(f"expected the {len(votes.mean)} pairs that were voted on, got {len(rows)}")
    found = []
    for i, row in enumerate(rows):
        if votes.dropped[i]:
            continue
        flipped, mean = bool(votes.flipped[i]), float(votes.mean[i])
        kept = {k: v for k, v in row.items() if k not in _OF_LABELS and v is not None}
        if flipped:
            kept |= {"chosen": row["rejected"], "rejected": row["chosen"]}
        if labels == "soft":
            kept["prob"] = float(votes.prob[i])
        elif labels == "margin":
            kept["margin"] = max(-mean if flipped else mean, 0.0)
        found.append({**kept, "strength_mean": mean, "strength_std": float(votes.std[i]), "flipped": flipped})
    return found


_OF_LABELS = ("prob", "margin", "score_chosen", "score_rejected", "where", "strength_mean", "strength_std", "flipped")


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Computes the probability that a positive has a higher score than a negative, ties ½ (the area under the ROC).

    scores, positive: (N,). Raises ValueError without both kinds.
    """
    positive = np.asarray(positive, dtype=bool)
    first, others = np.asarray(scores)[positive], np.sort(np.asarray(scores)[~positive])
    if not len(first) or not len(others):
        raise ValueError(f"expected positives and negatives, got {len(first)} and {len(others)}")
    below, to = (np.searchsorted(others, first, side=side) for side in ("left", "right"))
    return float((below + to).mean() / 2 / len(others))
