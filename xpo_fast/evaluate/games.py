"""Win rates between policies, and their Elo by maximum likelihood under Bradley–Terry, with intervals.

    P(i beats j) = σ(θ_i − θ_j)        Elo_i = 1000 + 400/ln 10 · (θ_i − mean θ)

A tie is half a win for each side. Under this scale 400 points are odds of ten to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ranking import error_of

SCALE, CENTRE = 400 / math.log(10), 1000.0
INTERVALS = ("wald", "bootstrap")
_Z = 1.96  # of 95%


class NotFinite(ValueError):
    """Raised where no finite strengths are the most likely: some policies never met, or some never lost to the rest."""


@dataclass(frozen=True)
class Games:
    """G games between M policies.

    first, second: who played. score: 1 if the first one won, 0 if the second, ½ for a tie; a probability counts as that
    share of a win; NaN: no verdict, the game counts nowhere. prompts: number of the prompt of each game.

    Raises ValueError for fewer than two policies, other shapes, a policy against itself, or a score outside [0, 1].
    """

    names: tuple[str, ...]  # (M,)
    first: np.ndarray  # (G,) int
    second: np.ndarray  # (G,) int
    score: np.ndarray  # (G,)
    prompts: np.ndarray  # (G,) int

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError(f"expected two policies or more, got {', '.join(self.names) or 'none'}")
        shapes = {x.shape for x in (self.first, self.second, self.score, self.prompts)}
        if len(shapes) > 1 or self.first.ndim != 1:
            raise ValueError(f"expected first, second, score and prompts (G,) of G games, got {sorted(shapes)}")
        if (self.first == self.second).any():
            raise ValueError(f"game {int((self.first == self.second).argmax())} has one policy on both sides")
        if ((self.score < 0) | (self.score > 1)).any():
            raise ValueError("a score is 1, ½ or 0, or a probability, and one is outside [0, 1]")

    def judged(self) -> Games:
        """Returns the games that have a verdict."""
        at = ~np.isnan(self.score)
        return Games(self.names, self.first[at], self.second[at], self.score[at], self.prompts[at])

    def wins(self) -> np.ndarray:
        """Returns the wins of i over j, (M, M), a tie as half."""
        return self.wins_by_prompt().sum(axis=0)

    def wins_by_prompt(self) -> np.ndarray:
        """Returns `wins` of each prompt with a verdict, (Q, M, M)."""
        some = self.judged()
        which = np.unique(some.prompts, return_inverse=True)[1] if len(some.score) else np.zeros(0, int)
        table = np.zeros((which.max(initial=-1) + 1, len(self.names), len(self.names)))
        np.add.at(table, (which, some.first, some.second), some.score)
        np.add.at(table, (which, some.second, some.first), 1 - some.score)
        return table


def decided(probability: np.ndarray) -> np.ndarray:
    """Returns 1, ½ or 0 by whether P(first beats second) is above, at or below ½; NaN stays."""
    return (np.sign(np.asarray(probability, dtype=np.float64) - 0.5) + 1) / 2


def win_rates(games: Games) -> list[dict[str, Any]]:
    """Returns a row of JSON values for each two policies that played: wins, ties, losses, and the rate of the first.

    rate: the mean score, a tie as ½; its standard error has the games of a prompt as one observation, and is None for a
    single prompt. unjudged: games without a verdict.
    """
    rows = []
    for i in range(len(games.names)):
        for j in range(i + 1, len(games.names)):
            forth, back = (games.first == i) & (games.second == j), (games.first == j) & (games.second == i)
            if not (forth | back).any():
                continue
            score = np.where(forth, games.score, 1 - games.score)[forth | back]
            at = ~np.isnan(score)
            known, prompts = score[at], games.prompts[forth | back][at]
            rows.append(
                {
                    "first": games.names[i],
                    "second": games.names[j],
                    "games": len(known),
                    "unjudged": int((~at).sum()),
                    "wins": int((known > 0.5).sum()),
                    "ties": int((known == 0.5).sum()),
                    "losses": int((known < 0.5).sum()),
                    "rate": float(known.mean()) if len(known) else None,
                    "standard_error": error_of(known, prompts) if len(known) else None,
                }
            )
    return rows


def check_finite(wins: np.ndarray, names: Sequence[str]) -> None:
    """Raises NotFinite, naming the policies, unless finite strengths are the most likely ones.

    They are exactly if every policy reaches every other over a chain of wins (Ford, 1957); wins: (M, M).
    """
    reach = _closure(wins > 0)
    joined = _closure((wins + wins.T) > 0)
    if not joined.all():
        sides = joined[0], ~joined[0]
        one, other = (", ".join(name for name, here in zip(names, side, strict=True) if here) for side in sides)
        raise NotFinite(f"no game joins {one} with {other}: their strengths cannot be compared")
    if reach.all():
        return
    # A group that reaches all others and is reached by none of them: it lost no game to the rest.
    top = next(i for i in range(len(names)) if not (reach[:, i] & ~reach[i]).any())
    group = reach[top] & reach[:, top]
    best, rest = (", ".join(n for n, here in zip(names, side, strict=True) if here) for side in (group, ~group))
    raise NotFinite(f"{best} lost no game, and tied none, against {rest}: no finite difference is the most likely")


def _closure(edges: np.ndarray) -> np.ndarray:
    """Returns whether j is reached from i, itself included, (M, M) bool."""
    reach = edges | np.eye(len(edges), dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(len(edges))))):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return reach


def bradley_terry(wins: np.ndarray, names: Sequence[str] | None = None, *, prior: float = 0.0) -> np.ndarray:
    """Returns Bradley and Terry's strengths θ (M,) of mean 0, which maximise Σ_{i≠j} (W_ij + c/2) log σ(θ_i − θ_j).

    wins: W (M, M), the wins of i over j, a tie as half to each. names: of the policies, for errors. prior: c, games
    that every two policies are taken to have played beside these, half won by either side; any makes the strengths
    finite, and draws them together. By Newton's method, to a gradient of 1e-9 wins. Raises NotFinite (see
    `check_finite`) if no finite strengths are the most likely; ValueError for a table that is not square, or negative
    numbers.
    """
    w = np.asarray(wins, dtype=np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or len(w) < 2 or not (np.isfinite(w) & (w >= 0)).all():
        raise ValueError(f"expected wins (M, M) of M ≥ 2 policies, finite and at least 0, got shape {w.shape}")
    if not (prior >= 0 and math.isfinite(prior)):
        raise ValueError(f"expected a prior of 0 games or more, got {prior}")
    w = _with_prior(w, prior)
    check_finite(w, [f"policy {i}" for i in range(len(w))] if names is None else names)
    theta = np.zeros(len(w))
    for _ in range(200):
        gradient, information = _derivatives(w, theta)
        if np.abs(gradient).max() <= 1e-9:
            break
        step = np.linalg.solve(information + 1 / len(w), gradient)
        size, now = 1.0, _likelihood(w, theta)
        while _likelihood(w, theta + size * step) < now and size > 1e-12:
            size /= 2
        theta = theta + size * step
        theta -= theta.mean()
    return theta


def _with_prior(wins: np.ndarray, prior: float) -> np.ndarray:
    return (wins + prior / 2) * (1 - np.eye(len(wins)))


def _likelihood(wins: np.ndarray, theta: np.ndarray) -> float:
    return float(-(wins * np.logaddexp(0, theta[None, :] - theta[:, None])).sum())


def _derivatives(wins: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradient (M,) of the log-likelihood, and the information (M, M), minus its second derivative."""
    p = np.exp(-np.logaddexp(0, theta[None, :] - theta[:, None]))  # P(i beats j)
    games = wins + wins.T
    weights = games * p * (1 - p)
    return (wins - games * p).sum(axis=1), np.diag(weights.sum(axis=1)) - weights


def covariance(by_prompt: np.ndarray, theta: np.ndarray, *, prior: float = 0.0) -> np.ndarray:
    """Returns the covariance (M, M) of the strengths of `bradley_terry`, in which they have mean 0.

    by_prompt: (Q, M, M) wins of each prompt. With I⁺ the pseudo-inverse of the information: I⁺ (Σ_q s_q s_qᵀ) I⁺
    Q/(Q−1), s_q the score of prompt q's games, whose completions meet several opponents (Liang, Zeger 1986); I⁺ itself
    for a single prompt, as if its games were independent.
    """
    count = len(theta)
    _, information = _derivatives(_with_prior(by_prompt.sum(axis=0), prior), theta)
    inverse = np.linalg.inv(information + 1 / count) - 1 / count
    if len(by_prompt) < 2:
        return inverse
    scores = np.stack([_derivatives(one, theta)[0] for one in by_prompt])  # (Q, M)
    return inverse @ (scores.T @ scores) @ inverse * len(scores) / (len(scores) - 1)


def elo(
    games: Games, *, prior: float = 0.0, interval: str = "wald", draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Returns the Elo of each policy with a 95% interval, as JSON values: {"policies": rows, …}.

    prior: see `bradley_terry`. interval: "wald", ±1.96 of the standard error of `covariance`; "bootstrap", from the
    2.5% to the 97.5% quantile over `draws` redrawn sets of prompts, of which those without finite strengths are counted
    as unbounded and left out. Rows: name, games, elo, low, high, standard_error, and the difference to the first policy
    with its own. Raises NotFinite where `bradley_terry` does; ValueError for another interval.
    """
    if interval not in INTERVALS:
        raise ValueError(f"interval must be one of {', '.join(INTERVALS)}, got {interval!r}")
    by_prompt = games.wins_by_prompt()
    if not len(by_prompt):
        raise NotFinite(f"none of {len(games.score)} games has a verdict: no strengths")
    wins = by_prompt.sum(axis=0)
    theta = bradley_terry(wins, games.names, prior=prior)
    found: dict[str, Any] = {"interval": interval, "prior_games": prior}
    if interval == "wald":
        cov = covariance(by_prompt, theta, prior=prior)
        variance = np.diag(cov)
        error, to_first = np.sqrt(variance), np.sqrt(np.maximum(variance + cov[0, 0] - 2 * cov[0], 0))
        low, high = theta - _Z * error, theta + _Z * error
    else:
        fitted, unbounded = _redrawn(by_prompt, games.names, prior, draws, seed)
        found |= {"draws": draws, "unbounded": unbounded}
        if len(fitted) < 2:
            raise NotFinite(f"of {draws} redrawn sets of prompts, {unbounded} have no finite strengths: no interval")
        low, high = np.quantile(fitted, [0.025, 0.975], axis=0)
        error, to_first = fitted.std(axis=0, ddof=1), (fitted - fitted[:, :1]).std(axis=0, ddof=1)
    played = (wins + wins.T).sum(axis=1)
    found["policies"] = [
        {
            "name": name,
            "games": float(played[i]),
            "elo": CENTRE + SCALE * float(theta[i]),
            "low": CENTRE + SCALE * float(low[i]),
            "high": CENTRE + SCALE * float(high[i]),
            "standard_error": SCALE * float(error[i]),
            "difference": SCALE * float(theta[i] - theta[0]),
            "difference_standard_error": SCALE * float(to_first[i]),
        }
        for i, name in enumerate(games.names)
    ]
    return found


def _redrawn(
    by_prompt: np.ndarray, names: Sequence[str], prior: float, draws: int, seed: int
) -> tuple[np.ndarray, int]:
    """Returns the strengths (B, M) of the redrawn sets of prompts that have finite ones, and how many have none."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(draws):
        counts = np.bincount(generator.integers(len(by_prompt), size=len(by_prompt)), minlength=len(by_prompt))
        try:
            found.append(bradley_terry(np.tensordot(counts, by_prompt, axes=1), names, prior=prior))
        except NotFinite:
            continue
    return np.array(found).reshape(-1, len(names)), draws - len(found)
