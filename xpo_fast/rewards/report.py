"""Evaluation of scorers on pairs: accuracy, calibration, dependence on length, and plots of these.

A scorer is a reward model, or a policy by its implicit reward β(log π − log ref); all are measured on the same pairs,
so that they can be compared. The margin m of a pair is the score of its chosen completion − that of its rejected one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import prompt_of, require
from ..files import appearing
from .encoding import encode_rows


@dataclass(frozen=True)
class PairScores:
    """Scores of P pairs by one scorer, and the lengths of their completions in tokens."""

    name: str
    chosen: np.ndarray  # (P,)
    rejected: np.ndarray  # (P,)
    chosen_tokens: np.ndarray  # (P,)
    rejected_tokens: np.ndarray  # (P,)
    is_logit: bool = True  # σ(scale·margin) is P(chosen beats rejected)
    prompts: np.ndarray | None = None  # (P,) int, shared by the pairs of a prompt; None: each has its own
    scale: float = 1.0  # the standard deviation that whitening took out

    def __post_init__(self) -> None:
        shapes = {x.shape for x in (self.chosen, self.rejected, self.chosen_tokens, self.rejected_tokens)}
        if len(shapes) > 1 or self.chosen.ndim != 1 or not len(self.chosen):
            raise ValueError(f"{self.name}: expected scores and lengths (P,) of P ≥ 1 pairs, got {shapes}")
        wrong = ~(np.isfinite(self.chosen) & np.isfinite(self.rejected))
        if wrong.any():
            raise ValueError(
                f"{self.name}: {wrong.sum()} of {len(wrong)} pairs have a score that is not finite, the first is pair "
                f"{int(wrong.argmax())}"
            )

    @property
    def margin(self) -> np.ndarray:
        """Score of the chosen completion − that of the rejected one, (P,)."""
        return self.chosen - self.rejected

    @property
    def right(self) -> np.ndarray:
        """1 where the chosen completion has the higher score, ½ for equal scores, else 0, (P,)."""
        return (np.sign(self.margin) + 1) / 2

    @property
    def gap(self) -> np.ndarray:
        """Tokens of the chosen completion − those of the rejected one, (P,)."""
        return self.chosen_tokens - self.rejected_tokens


def summary(scores: PairScores) -> dict[str, Any]:
    """Returns the figures of one scorer, as JSON values.

    accuracy counts a tie as ½. standard_error is that of the accuracy, with the pairs of a prompt as one observation;
    accuracy_95 is Wilson's interval for the number of independent pairs with that standard error. log_loss, brier and
    calibration take σ(margin) as P(chosen beats rejected), for whitened rewards σ(std·margin). scale is the factor on
    these margins with the least log-loss on these pairs: 1 for calibrated ones, None if all have one sign, where no
    finite factor is best. length_correlation is Pearson's, of score and tokens over all completions; longer_wins is the
    accuracy of preferring the longer completion.
    """
    n, right, margin = len(scores.margin), scores.right, scores.margin
    accuracy = float(right.mean())
    both = np.concatenate([scores.chosen, scores.rejected])
    tokens = np.concatenate([scores.chosen_tokens, scores.rejected_tokens])
    spread = {"score": both, "chosen": scores.chosen, "rejected": scores.rejected, "margin": margin}
    return {
        "name": scores.name,
        "pairs": n,
        "accuracy": accuracy,
        "prompts": n if scores.prompts is None else len(np.unique(scores.prompts)),
        "standard_error": standard_error(right, scores.prompts),
        "accuracy_95": wilson(accuracy, _independent(right, scores.prompts)),
        "ties": int((margin == 0).sum()),
        **{f"{name}_{of}": float(getattr(x, of)()) for name, x in spread.items() for of in ("mean", "std")},
        **(_probabilities(scores.scale * margin) if scores.is_logit else {}),
        "by_length_gap": by_length_gap(scores),
        "length_correlation": _correlation(both, tokens),
        "longer_wins": float(((np.sign(scores.gap) + 1) / 2).mean()),
        "chosen_tokens_mean": float(scores.chosen_tokens.mean()),
        "rejected_tokens_mean": float(scores.rejected_tokens.mean()),
    }


def _probabilities(margin: np.ndarray) -> dict[str, Any]:
    bins = calibration(margin)
    weights = np.array([row["pairs"] for row in bins])
    errors = np.array([abs(row["accuracy"] - row["confidence"]) for row in bins])
    return {
        "log_loss": float(np.logaddexp(0, -margin).mean()),
        "brier": float((_sigmoid(-margin) ** 2).mean()),
        "calibration_error": float((weights * errors).sum() / weights.sum()),
        "scale": best_scale(margin),
        "calibration": bins,
    }


def standard_error(x: np.ndarray, cluster: np.ndarray | None) -> float:
    """Returns the standard error of the mean of x (n,): √Σ_g(Σ_{i∈g}(x_i − x̄))²/n, g the clusters.

    cluster: (n,) the cluster of each entry; None: each entry is its own.
    """
    off = x - x.mean()
    if cluster is not None:
        off = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=off)
    return math.sqrt(float((off**2).sum())) / len(x)


def _independent(x: np.ndarray, cluster: np.ndarray | None) -> float:
    """Returns the number of independent entries whose mean would have the standard error of the mean of x (n,)."""
    if cluster is None:
        return len(x)
    clusters, error = len(np.unique(cluster)), standard_error(x, cluster)
    return min(len(x), float(x.var()) / error**2) if error and x.var() else clusters


def wilson(p: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's interval for a share p of n; z = 1.96 gives 95%."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def calibration(margin: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Returns mean confidence, accuracy and number of pairs for equal bins of the confidence σ(|m|) over [½, 1].

    The prediction is the completion that scores higher; a tie counts as half right. Empty bins are left out.
    """
    confidence, right = _sigmoid(np.abs(margin)), (np.sign(margin) + 1) / 2
    at = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for b in np.unique(at).tolist():
        means = {"confidence": float(confidence[at == b].mean()), "accuracy": float(right[at == b].mean())}
        bounds = {"from": 0.5 + b / (2 * bins), "to": 0.5 + (b + 1) / (2 * bins)}
        rows.append({**bounds, **means, "pairs": int((at == b).sum())})
    return rows


def best_scale(margin: np.ndarray) -> float | None:
    """Returns the s with the least mean log(1 + e^{−s·m}), by bisection; None if no two margins have opposite signs."""
    if not ((margin > 0).any() and (margin < 0).any()):
        return None

    def slope(s: float) -> float:  # of the loss in s; rises with s
        return float(-(margin * _sigmoid(-s * margin)).mean())

    low, high = -1.0, 1.0
    while slope(low) > 0:
        low *= 2
    while slope(high) < 0:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def by_length_gap(scores: PairScores, bins: int = 5) -> list[dict[str, float]]:
    """Returns the accuracy in `bins` quantiles of `PairScores.gap`, in increasing order of the gap."""
    edges = np.quantile(scores.gap, np.linspace(0, 1, bins + 1))
    at = np.searchsorted(edges[1:-1], scores.gap, side="left")
    rows = []
    for b in np.unique(at):
        gap, right = scores.gap[at == b], scores.right[at == b]
        error = standard_error(right, None if scores.prompts is None else scores.prompts[at == b])
        row = {"from": float(gap.min()), "to": float(gap.max()), "accuracy": float(right.mean())}
        rows.append({**row, "standard_error": error, "pairs": len(gap)})
    return rows


def compare(a: PairScores, b: PairScores) -> dict[str, Any]:
    """Returns the difference of two scorers' accuracies on the same pairs, its standard error, and their agreement.

    Raises ValueError for different numbers of pairs.
    """
    if len(a.margin) != len(b.margin):
        raise ValueError(f"expected the same pairs, {a.name} has {len(a.margin)} and {b.name} {len(b.margin)}")
    difference = a.right - b.right
    return {
        "first": a.name,
        "second": b.name,
        "accuracy_difference": float(difference.mean()),
        "standard_error": standard_error(difference, a.prompts),
        "same_choice": float((np.sign(a.margin) == np.sign(b.margin)).mean()),
        "margin_correlation": _correlation(a.margin, b.margin),
        "margin_rank_correlation": _correlation(_ranks(a.margin), _ranks(b.margin)),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns Pearson's correlation; None if one side is constant."""
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Returns the ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


_COLOURS = {"chosen": "#1b7837", "rejected": "#c2502f", "line": "#2b4a78"}


def plot(scores: PairScores, path: str | Path) -> None:
    """Writes a PNG of one scorer: scores, margins, calibration, accuracy by length gap, lengths, score by length."""
    figure, axes = _figure(2, 3, f"{scores.name}, {len(scores.margin)} pairs")
    figures = summary(scores)
    _distributions(axes[0][0], scores.chosen, scores.rejected, "score")
    axes[0][0].set_title("scores")
    low, high = figures["accuracy_95"]
    axes[0][1].hist(scores.margin, bins=40, color=_COLOURS["line"])
    axes[0][1].axvline(0, color="black", linewidth=1)
    axes[0][1].set(title=f"accuracy {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    axes[0][1].set(xlabel="score of chosen − score of rejected", ylabel="pairs")
    _plot_calibration(axes[0][2], scores, figures)
    rows = figures["by_length_gap"]
    at = np.arange(len(rows))
    errors = [1.96 * row["standard_error"] for row in rows]
    axes[1][0].bar(at, [row["accuracy"] for row in rows], yerr=errors, color=_COLOURS["line"], capsize=3)
    axes[1][0].axhline(0.5, color="black", linewidth=1, linestyle="--")
    axes[1][0].set_xticks(at, [f"{row['from']:.0f}…{row['to']:.0f}\nn={row['pairs']}" for row in rows])
    axes[1][0].set(title="accuracy by length gap, ±1.96 SE", ylim=(0, 1))
    axes[1][0].set(xlabel="tokens of chosen − tokens of rejected", ylabel="accuracy")
    _distributions(axes[1][1], scores.chosen_tokens, scores.rejected_tokens, "tokens of the completion")
    axes[1][1].set_title("lengths")
    for name in ("chosen", "rejected"):
        tokens, values = getattr(scores, f"{name}_tokens"), getattr(scores, name)
        axes[1][2].scatter(tokens, values, s=5, alpha=0.5, color=_COLOURS[name], label=name)
    correlation = figures["length_correlation"]
    shown = "none" if correlation is None else f"{correlation:.2f}"
    axes[1][2].set(title=f"score and length, correlation {shown}")
    axes[1][2].set(xlabel="tokens of the completion", ylabel="score")
    axes[1][2].legend(loc="upper right")
    _save(figure, path)


def plot_comparison(a: PairScores, b: PairScores, path: str | Path) -> None:
    """Writes a PNG of two scorers on the same pairs: margins against each other, accuracies by length gap."""
    found = compare(a, b)
    figure, (left, right) = _figure(1, 2, f"{a.name} and {b.name}, {len(a.margin)} pairs")
    left.scatter(a.margin, b.margin, s=6, alpha=0.5, color=_COLOURS["line"])
    left.axhline(0, color="black", linewidth=1)
    left.axvline(0, color="black", linewidth=1)
    left.set(title=f"same choice in {found['same_choice']:.1%} of pairs")
    left.set(xlabel=f"margin of {a.name}", ylabel=f"margin of {b.name}")
    for scores, colour in ((a, _COLOURS["line"]), (b, _COLOURS["rejected"])):
        rows = by_length_gap(scores)
        errors = [1.96 * row["standard_error"] for row in rows]
        at = [(row["from"] + row["to"]) / 2 for row in rows]
        right.errorbar(at, [row["accuracy"] for row in rows], errors, marker="o", capsize=3, color=colour)
        right.plot([], [], marker="o", color=colour, label=scores.name)
    right.axhline(0.5, color="black", linewidth=1, linestyle="--")
    right.set(title="accuracy by length gap, ±1.96 SE", ylim=(0, 1))
    right.set(xlabel="tokens of chosen − tokens of rejected", ylabel="accuracy")
    right.legend(loc="lower right")
    _save(figure, path)


def _plot_calibration(axis: Any, scores: PairScores, figures: dict[str, Any]) -> None:
    if not scores.is_logit:
        axis.axis("off")
        return
    rows = figures["calibration"]
    axis.plot([0.5, 1], [0.5, 1], color="black", linewidth=1, linestyle="--")
    errors = [1.96 * math.sqrt(r["accuracy"] * (1 - r["accuracy"]) / r["pairs"]) for r in rows]
    x, y = [r["confidence"] for r in rows], [r["accuracy"] for r in rows]
    axis.errorbar(x, y, errors, marker="o", capsize=3, color=_COLOURS["line"])
    for row in rows:
        axis.annotate(str(row["pairs"]), (row["confidence"], 0.02), xycoords=("data", "axes fraction"), fontsize=7)
    axis.set(title=f"calibration, error {figures['calibration_error']:.3f}", ylim=(0, 1))
    axis.set(xlabel="σ(|margin|), pairs below", ylabel="how often right")


def _distributions(axis: Any, chosen: np.ndarray, rejected: np.ndarray, label: str) -> None:
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=40)
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        axis.hist(values, bins=edges, alpha=0.55, color=_COLOURS[name], label=f"{name}, mean {values.mean():.2f}")
    axis.set(xlabel=label, ylabel="completions")
    axis.legend(loc="upper right")


def _figure(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    require("matplotlib", "train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns)


def _save(figure: Any, path: str | Path) -> None:
    with appearing(Path(path)) as part:
        figure.savefig(part, format="png")


def score_pairs(
    name: str, scorer: Any, rows: Sequence[Mapping[str, Any]], *, is_logit: bool | None = None
) -> PairScores:
    """Returns a scorer's scores of loaded pairs (`data.load(…, kind="pair")`).

    scorer: an object with score(prompts, completions) → (R,), a tokenizer and a spec. A preference model has only
        compare(): the chosen completion gets the logit of P(chosen beats rejected), the rejected one 0.
    is_logit: whether σ(scale·margin) is a probability, without which there is no calibration; None: as the scorer, or
        its `spec`, declares.
    """
    if is_logit is None:
        is_logit = bool(getattr(scorer, "is_logit", scorer.spec.is_logit))
    chosen, rejected = ([row[n] for row in rows] for n in ("chosen", "rejected"))
    prompts = [prompt_of(row) for row in rows]
    features = encode_rows(scorer.tokenizer, scorer.spec, prompts, {"chosen": chosen, "rejected": rejected})
    tokens = [np.array([float(len(row[f"{n}_ids"])) for row in features]) for n in ("chosen", "rejected")]
    if scorer.spec.form == "preference":
        logit = torch.logit(scorer.compare(prompts, chosen, rejected).double(), eps=1e-12)
        values = [logit.numpy(), np.zeros(len(rows))]
    else:
        found = scorer.score([*prompts, *prompts], [*chosen, *rejected]).double()
        values = [x.numpy() for x in found.chunk(2)]
    numbers: dict[str, int] = {}
    which = np.array([numbers.setdefault(json.dumps(p, sort_keys=True), len(numbers)) for p in prompts])
    scale = float(getattr(scorer, "scale", 1.0))
    return PairScores(name, *values, *tokens, is_logit=is_logit, prompts=which, scale=scale)
