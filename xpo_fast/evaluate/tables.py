"""Tables of an evaluation in Markdown, and the plot of a frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import require
from ..files import appearing
from .frontier import Point, efficient
from .ranking import FLIPS


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table; the first column is text, the others are aligned as numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shown(value: float | None, error: float | None = None, form: str = ".3f") -> str:
    """Returns "0.512 ± 0.031"; a dash for None."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def of_ranking(figures: Mapping[str, Any]) -> str:
    """Returns the tables of `ranking`."""
    rows = []
    for name in ("reference", "policy"):
        one, per_token = figures[name], figures[name]["per_token"]
        rows.append([name, _accuracy(one), _accuracy(per_token), f"{one['margin_mean']:.2f}", one["ties"]])
    for one in figures["idealised"]:
        without = f", {one['without_alpha']} without α" if one["without_alpha"] else ""
        rows.append([f"optimum, β = {one['beta']:g}{without}", _accuracy(one), "–", "–", one.get("ties", "–")])
    implicit = figures["implicit"]
    rows.append([f"implicit reward, β = {implicit['beta']:g}", _accuracy(implicit), "–", "–", implicit["ties"]])
    first = markdown(("ranks chosen above rejected", "accuracy", "per token", "mean margin", "ties"), rows)
    flips = []
    for name in FLIPS:
        f = figures["flips"][name]
        means = [shown(f[key], form=".2f") for key in ("reference_margin", "margin")]
        flips.append([name, f["pairs"], f"{f['share']:.1%}", *means])
    second = markdown(("pairs by the reference → by the policy", "pairs", "share", "margin before", "after"), flips)
    left = f"; {figures['not_finite']} more left out, their log-probs are not finite" if figures["not_finite"] else ""
    return f"{figures['pairs']} pairs of {figures['prompts']} prompts{left}.\n\n{first}\n\n{second}\n"


def _accuracy(entry: Mapping[str, Any]) -> str:
    return shown(entry["accuracy"], entry.get("standard_error"))


def of_games(rates: Sequence[Mapping[str, Any]], strengths: Mapping[str, Any] | None, missing: str | None) -> str:
    """Returns the tables of `win_rates` and `elo`. missing: why there is no Elo."""
    rows = [
        [
            f"{r['first']} against {r['second']}",
            shown(r["rate"], r["standard_error"]),
            *(r[key] for key in ("wins", "ties", "losses", "unjudged")),
        ]
        for r in rates
    ]
    first = markdown(("", "win rate of the first", "wins", "ties", "losses", "unjudged"), rows)
    if strengths is None:
        return f"{first}\n\nNo Elo: {missing}\n"
    ranked = [
        [
            p["name"],
            f"{p['elo']:.0f}",
            f"{p['low']:.0f} … {p['high']:.0f}",
            f"{p['difference']:+.0f} ± {p['difference_standard_error']:.0f}",
        ]
        for p in sorted(strengths["policies"], key=lambda p: -p["elo"])
    ]
    second = markdown(("policy", "Elo", "95% interval", "against the first named ± SE"), ranked)
    return f"{first}\n\n{second}\n"


def of_frontier(points: list[Point], reward: str) -> str:
    """Returns the table of a frontier. reward: what the reward is."""
    rows = [
        [
            p.name,
            shown(p.kl, p.kl_error, ".4g"),
            shown(p.k3, p.k3_error, ".4g"),
            shown(p.reward, p.reward_error, ".4g"),
            f"{p.tokens:.1f}",
            "yes" if on else "no",
        ]
        for p, on in zip(points, efficient(points), strict=True)
    ]
    return markdown(("policy", "KL, k1", "KL, k3", reward, "tokens", "on the frontier"), rows) + "\n"


def plot_frontier(points: list[Point], reward: str, path: Path) -> None:
    """Writes a PNG: reward against KL (k3) with ±1 standard error, in the order of the run, the frontier marked."""
    require("matplotlib", "train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    known = [p for p in points if p.reward is not None]
    x, y = ([getattr(p, key) for p in known] for key in ("k3", "reward"))
    across, up = ([getattr(p, key) or 0.0 for p in known] for key in ("k3_error", "reward_error"))
    axes.errorbar(x, y, up, across, marker="o", linewidth=1, capsize=3, color="#2b4a78", label="in order, ±SE")
    on = [p for p, best in zip(known, efficient(known), strict=True) if best]
    x, y = ([getattr(p, key) for p in on] for key in ("k3", "reward"))
    axes.plot(x, y, "s", markersize=9, fillstyle="none", color="#c2502f", label="frontier")
    for p in known:
        axes.annotate(p.name, (p.k3, p.reward), xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.set(xlabel="KL(π‖reference), nats per completion (k3)", ylabel=reward)
    axes.legend(loc="lower right")
    with appearing(path) as part:
        figure.savefig(part, format="png")
