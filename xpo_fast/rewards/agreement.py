"""Preferences without a judge: what most samples of a prompt agree on is preferred to what few of them say.

    K samples ── alike? ──▶ clusters ──▶ the largest one's share is the confidence ──▶ a pair, if it is high enough

The synthetic preferences of Fine-Tuning Language Models with Reward Learning on Policy (arXiv 2403.19279), by the
self-consistency of samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.math import check
from .judges import text_of

ALIKE = 0.5  # the share of common words from which two samples say the same


def overlap(first: str, second: str) -> float:
    """Returns the share of words, in lower case, that two texts have in common of all that they have (Jaccard's)."""
    a, b = ({*re.findall(r"\w+", text.lower())} for text in (first, second))
    return len(a & b) / len(a | b) if a | b else 1.0


def overlaps(texts: Sequence[str | None]) -> Tensor:
    """Returns the `overlap` of each two of K texts, (K, K) float32; NaN on the row and the column of a None."""
    found = torch.full((len(texts), len(texts)), math.nan)
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            if a is not None and b is not None:
                found[i, j] = overlap(a, b)
    return found


def clusters(items: Sequence[Any], alike: Callable[[Any, Any], bool] | None = None) -> list[list[int]]:
    """Returns the numbers of the items in clusters, the largest first, of equal ones the one with the first item.

    alike: whether two items say the same; by default texts whose `overlap` is `ALIKE` or more. Those that a chain of
    such pairs connects are in one cluster.
    """
    same = alike or (lambda a, b: overlap(a, b) >= ALIKE)
    found: list[list[int]] = []
    for i, item in enumerate(items):
        met = [group for group in found if any(same(items[j], item) for j in group)]
        found = [group for group in found if group not in met]
        found.append(sorted([*(j for group in met for j in group), i]))
    return sorted(found, key=lambda group: (-len(group), group[0]))


def confident(
    items: Sequence[Any], alike: Callable[[Any, Any], bool] | None, least: float
) -> tuple[int, int, float] | None:
    """Returns the first item of the largest cluster, the first of the smallest, and the share that the largest holds.

    Returns None where that share is below `least`, all items are in one cluster, or two clusters are the largest.
    Raises ValueError for a share outside (0, 1].
    """
    check(0 < least <= 1, "least in (0, 1]", least)
    parts = clusters(items, alike)
    if len(parts) < 2 or len(parts[0]) / len(items) < least or len(parts[1]) == len(parts[0]):
        return None
    return parts[0][0], parts[-1][0], len(parts[0]) / len(items)


def confident_pairs(
    rows: Sequence[dict[str, Any]],
    groups: Sequence[Sequence[int]],
    *,
    least: float = 0.5,
    alike: Callable[[str, str], bool] | None = None,
) -> list[dict[str, Any]]:
    """Returns a pair for each prompt whose largest cluster holds the share `least` of its samples, and not all.

    rows, groups: of `load_samples`. The chosen sample is the first of the largest cluster, the rejected one the first
    of the smallest; `confidence` is the largest one's share. Where two clusters are the largest there is no pair.
    """
    check(0 < least <= 1, "least in (0, 1]", least)
    found = []
    for group in groups:
        picked = confident([text_of(rows[i]["chosen"]) for i in group], alike, least)
        if picked is None:
            continue
        best, worst, confidence = group[picked[0]], group[picked[1]], picked[2]
        about = {name: x for name, x in rows[group[0]].items() if name not in ("chosen", "where") and x is not None}
        pair = {"chosen": rows[best]["chosen"], "rejected": rows[worst]["chosen"], "confidence": confidence}
        found.append({**about, **pair})
    return found
