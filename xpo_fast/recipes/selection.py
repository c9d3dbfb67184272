"""Selectors: from K judged completions of a prompt to the rows that are trained on.

A selector is a pure function of the judge's scores (K,) or win probabilities (K, K). It returns picks: dicts of indices
into the completions, with the numbers that the method reads:

    {"chosen": i}    {"chosen": i, "rejected": j, "prob": P(i beats j), "score_chosen": …}    {"completions": [i, …]}

A completion without a finite score is never picked, and nothing is picked if no completion is better than another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.math import win_rates
from ..rewards.agreement import ALIKE, confident

Pick = dict[str, Any]


@dataclass(frozen=True)
class Selector:
    """A selector and what it reads and returns.

    function: (judged, generator, **arguments) → picks. needs: what `judged` is: "scores", "wins", "asked", the ranks
    that the completions were asked to have, "alike", the shares of words that each two samples have in common, or
    "nothing", when it is the number of completions. kind: the kind of data
    of the picks, as `data.load` names it.
    """

    function: Callable[..., list[Pick]]
    needs: str
    kind: str

    def __call__(self, judged: Tensor, generator: torch.Generator, arguments: Mapping[str, Any]) -> list[Pick]:
        return self.function(judged, generator, **arguments)


def best(scores: Tensor, generator: torch.Generator) -> list[Pick]:  # (K,)
    """Picks the completion with the highest score, of equal ones the first (RAFT, arXiv 2304.06767)."""
    known = _known(scores)
    return [{"chosen": max(known, key=scores.tolist().__getitem__)}] if known else []


def best_worst(scores: Tensor, generator: torch.Generator, *, min_gap: float = 0.0) -> list[Pick]:  # (K,)
    """Picks the highest score against the lowest, of equal ones the first, if they differ by more than min_gap.

    This is the best-of-n enhancer: the best completion is the enhancer's, the worst the policy's (survey 3.1.4).
    """
    known, value = _known(scores), scores.tolist().__getitem__
    return _pairs(scores, [(max(known, key=value), min(known, key=value))] if known else [], min_gap)


def all_pairs(wins: Tensor, generator: torch.Generator) -> list[Pick]:  # (K, K)
    """Picks all K(K−1)/2 pairs, with the probability that the first wins; a draw is a pair, too.

    With `sppo` the sum over the pairs regresses each log-ratio Δ_i to (p_i − ½)/β, where p_i is the mean of P(i beats
    j) over the others j: the win rates of survey S61 (whose mean includes i itself, which multiplies 1/β by (K−1)/K).
    """
    picks = []
    for i in range(len(wins)):
        for j in range(i + 1, len(wins)):
            p = wins[i, j].item()
            if not math.isnan(p):
                a, b, p = (i, j, p) if p >= 0.5 else (j, i, 1 - p)
                picks.append({"chosen": a, "rejected": b, "prob": p})
    return picks


def pair(wins: Tensor, generator: torch.Generator, *, min_gap: float = 0.0) -> list[Pick]:  # (K, K)
    """Picks the pairs in which one completion is likelier to win: |P − ½| > min_gap/2."""
    return [pick for pick in all_pairs(wins, generator) if 2 * pick["prob"] - 1 > min_gap]


def large_margin(wins: Tensor, generator: torch.Generator, *, min_gap: float = 0.2) -> list[Pick]:  # (K, K)
    """Picks pairs whose win rates differ by min_gap or more, up to rounding (DNO, arXiv 2404.03715, survey 3.11.3)."""
    rates = win_rates(wins)
    known = sorted(_known(rates), key=lambda i: -rates[i].item())
    picks = _pairs(rates, [(a, b) for n, a in enumerate(known) for b in known[n + 1 :]], 0.0)
    # Five verdicts make rates in fifths: the gap 0.6 − 0.4 is 0.2, and less in binary.
    return [pick for pick in picks if pick["score_chosen"] - pick["score_rejected"] >= min_gap - 1e-6]


def rejection(
    scores: Tensor,  # (K,) rewards
    generator: torch.Generator,
    *,
    n: int = 8,
    beta: float = 0.5,
    rank: str = "first-round",
) -> list[Pick]:
    """Picks pairs of n completions that statistical rejection sampling accepts (RSO, arXiv 2309.06657; survey S4).

    rank: "first-round" makes n/2 pairs of neighbours in the order of acceptance; "tournament" continues with the
    winners until one is left, n − 1 pairs. The higher score of a pair is chosen; a pair of equal scores is left out.
    """
    if rank not in ("first-round", "tournament"):
        raise ValueError(f"rank must be first-round or tournament, got {rank!r}")
    standing = accepted(scores, generator, n=n, beta=beta)
    pairs: list[tuple[int, int]] = []
    while len(standing) > 1:
        met = [sorted(two, key=lambda i: -scores[i].item()) for two in zip(standing[::2], standing[1::2])]
        pairs += [(a, b) for a, b in met]
        bye = standing[len(standing) - len(standing) % 2 :]
        standing = [a for a, _ in met] + bye if rank == "tournament" else []
    return _pairs(scores, pairs, 0.0)


def accepted(scores: Tensor, generator: torch.Generator, *, n: int, beta: float) -> list[int]:
    """Returns the indices of n of K candidates, in the order of acceptance (RSO's algorithm 1).

    A candidate is accepted if u < exp((r − r_max)/β), with u uniform and r_max the highest reward of the candidates
    left; passes over those left are repeated until n are accepted, or none is left. The accepted are distributed as
    π·exp(r/β) if the candidates are many and drawn from π. β → ∞ accepts all, β → 0 those with the highest reward.
    """
    if not (beta > 0 and n >= 1):
        raise ValueError(f"expected beta > 0 and n >= 1, got beta={beta}, n={n}")
    rewards, left, taken = scores.tolist(), _known(scores), []
    while left and len(taken) < n:
        r_max = max(rewards[i] for i in left)
        u = torch.rand(len(left), generator=generator, dtype=torch.float64).tolist()
        won = [i for i, x in zip(left, u) if x < math.exp((rewards[i] - r_max) / beta)]
        taken += won[: n - len(taken)]
        left = [i for i in left if i not in won]
    return taken


def against_rejected(count: Tensor, generator: torch.Generator) -> list[Pick]:  # ()
    """Picks all completions, against the data's rejected one (NN)."""
    return [{"completions": list(range(int(count)))}] if count else []


def only(count: Tensor, generator: torch.Generator) -> list[Pick]:  # ()
    """Picks every completion, unjudged."""
    return [{"chosen": i} for i in range(int(count))]


def as_asked(ranks: Tensor, generator: torch.Generator) -> list[Pick]:  # (K,)
    """Picks every completion that was to be better against every one that was to be worse, unjudged (RLCD)."""
    rank = ranks.tolist()
    places = range(len(rank))
    return [{"chosen": a, "rejected": b} for a in places for b in places if rank[a] > rank[b]]


def agreed(alike: Tensor, generator: torch.Generator, *, least: float = 0.5, same: float = ALIKE) -> list[Pick]:
    """Picks what most samples agree on against what the fewest say, and the data's chosen against its rejected answer.

    alike: (K, K), of `overlaps`; NaN for the data's own answers, which are both there or neither. least: the share of
    the samples that must agree; 1 makes no pairs of samples. same: the share of words from which two samples say the
    same. (RLP, arXiv 2403.19279.)
    """
    if not 0 <= same <= 1:
        raise ValueError(f"expected same in [0, 1], got {same!r}")
    own = [i for i in range(len(alike)) if math.isnan(alike[i, i].item())]
    sampled = [i for i in range(len(alike)) if i not in own]
    found = confident(sampled, lambda i, j: alike[i, j].item() >= same, least)
    picks: list[Pick] = [{"chosen": own[0], "rejected": own[1]}] if own else []
    if found is not None:
        best, worst, share = found
        picks.append({"chosen": sampled[best], "rejected": sampled[worst], "confidence": share})
    return picks


UNJUDGED = ("nothing", "asked", "alike")  # what selectors need that no judge gives
SELECTORS: Mapping[str, Selector] = {
    "only": Selector(only, "nothing", "chosen"),
    "as-asked": Selector(as_asked, "asked", "pair"),
    "agreed": Selector(agreed, "alike", "pair"),
    "best": Selector(best, "scores", "chosen"),
    "best-worst": Selector(best_worst, "scores", "pair"),
    "rejection": Selector(rejection, "scores", "pair"),
    "all-pairs": Selector(all_pairs, "wins", "pair"),
    "pair": Selector(pair, "wins", "pair"),
    "large-margin": Selector(large_margin, "wins", "pair"),
    "against-rejected": Selector(against_rejected, "nothing", "list"),
}


def _known(scores: Tensor) -> list[int]:
    return [i for i, x in enumerate(scores.tolist()) if math.isfinite(x)]


def _pairs(scores: Tensor, pairs: list[tuple[int, int]], min_gap: float) -> list[Pick]:
    value = scores.tolist()
    return [
        {"chosen": a, "rejected": b, "score_chosen": value[a], "score_rejected": value[b]}
        for a, b in pairs
        if value[a] - value[b] > min_gap
    ]
