"""Charts as SVG for a page: drawn by matplotlib, their colours left to the page's style; and their values as tables."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data import require
from .series import Curve

# matplotlib writes colours as they are; these stand for the page's custom properties of the same names.
_INK, _MUTED, _GRID = "#010203", "#020304", "#030405"
_COLOURS = tuple(f"#0405{k:02x}" for k in range(8))
_PROPERTIES = {_INK: "ink", _MUTED: "muted", _GRID: "rule"} | {c: f"c{k}" for k, c in enumerate(_COLOURS)}
_DASHES = ("solid", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (5, 1.4, 1.2, 1.4)))
_SIZE = (5.0, 2.75)  # inches, of which SVG has 72 units each: about the width of a telephone
_PLACE = (0.125, 0.15, 0.86, 0.8)  # of the axes in it: left, bottom, width, height
ROWS = 40  # of a table, at most


@dataclass
class Line:
    """A curve with its name. points: markers without a line between them. colour, dash: numbers of its style."""

    name: str
    curve: Curve
    colour: int = 0
    points: bool = False
    dash: int = 0

    @property
    def last(self) -> float:
        """The last finite value; NaN without one."""
        return next((x for x in reversed(self.curve.values) if math.isfinite(x)), math.nan)


@dataclass
class Chart:
    """A chart of curves over the steps.

    marks: steps of vertical lines. notes: what a reader must know of it, such as values that are not finite.
    """

    title: str
    lines: list[Line]
    marks: Sequence[float] = ()
    notes: list[str] = field(default_factory=list)
    across: str = "step"
    share: bool = False  # values are shares, from 0 to 1

    @property
    def empty(self) -> bool:
        """Whether there is no finite value to draw."""
        return all(math.isnan(line.last) for line in self.lines)

    @property
    def bands(self) -> list[str]:
        """What the bands are, each once."""
        return list(dict.fromkeys(line.curve.band for line in self.lines if line.curve.band))

    @property
    def window(self) -> int:
        """The most logs that a point is the mean of."""
        return max((line.curve.window for line in self.lines), default=1)

    def table(self) -> tuple[list[str], list[list[float]]]:
        """Returns the head and the rows of a table of the values: at most ROWS rows, first and last included."""
        steps = sorted({s for line in self.lines for s in line.curve.steps})
        if len(steps) > ROWS:
            steps = [steps[round(k * (len(steps) - 1) / (ROWS - 1))] for k in range(ROWS)]
        values = [dict(zip(line.curve.steps, line.curve.values)) for line in self.lines]
        rows = [[step, *(v.get(step, math.nan) for v in values)] for step in steps]
        return [self.across, *(line.name for line in self.lines)], rows


def svg(chart: Chart, number: int) -> str:
    """Returns the chart as an SVG element. number: that of the chart on its page, for ids that differ."""
    axes, figure = _axes(steps=True)
    for line in chart.lines:
        _draw(axes, line)
    for mark in chart.marks:
        axes.axvline(mark, color=_GRID, linewidth=1, zorder=0)
    curves = [line.curve for line in chart.lines]
    values = [x for c in curves for x in (*c.values, *c.low, *c.high) if math.isfinite(x)]
    if min(values) == max(values):
        axes.set_yticks(values[:1])
    if chart.share:
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(chart.across, color=_MUTED, fontsize=9, loc="right", labelpad=1)
    return _element(figure, number)


def histogram(values: Mapping[str, Sequence[float]], across: str, number: int) -> str:
    """Returns the distributions of several sets of values as an SVG element: shares of each set."""
    import numpy as np

    axes, figure = _axes()
    sets = {name: np.array([x for x in given if math.isfinite(x)]) for name, given in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), bins=24)
    for k, found in enumerate(sets.values()):
        weights = np.full(len(found), 1 / max(len(found), 1))
        style: dict[str, Any] = {"bins": edges, "weights": weights, "color": _COLOURS[k]}
        axes.hist(found, histtype="stepfilled", alpha=0.18, **style)
        axes.hist(found, histtype="step", linewidth=1.4, linestyle=_DASHES[k % len(_DASHES)], **style)
    axes.set_xlabel(across, color=_MUTED, fontsize=9, loc="right", labelpad=1)
    return _element(figure, number)


def dots(points: Sequence[tuple[float, float, float]], across: str, number: int, *, diagonal: bool = False) -> str:
    """Returns points (x, y, half the height of its error bar) as an SVG element. diagonal: draws x = y, too."""
    axes, figure = _axes()
    x, y, off = ([p[k] for p in points] for k in range(3))
    if diagonal:
        axes.plot([0.5, 1], [0.5, 1], color=_MUTED, linewidth=1, linestyle=_DASHES[1])
    axes.errorbar(
        x,
        y,
        [e if math.isfinite(e) else 0 for e in off],
        color=_COLOURS[0],
        marker="o",
        markersize=4,
        linewidth=1.2,
        capsize=3,
    )
    axes.set_xlabel(across, color=_MUTED, fontsize=9, loc="right", labelpad=1)
    return _element(figure, number)


def _draw(axes: Any, line: Line) -> None:
    curve, colour = line.curve, _COLOURS[line.colour % len(_COLOURS)]
    if curve.band:
        if line.points or len(curve.steps) == 1:
            off = [
                [max(v - lo, 0) for v, lo in zip(curve.values, curve.low)],
                [max(hi - v, 0) for v, hi in zip(curve.values, curve.high)],
            ]
            off = [[e if math.isfinite(e) else 0 for e in side] for side in off]
            axes.errorbar(curve.steps, curve.values, off, color=colour, linestyle="none", linewidth=1, capsize=3)
        else:
            axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
    few = len(curve.steps) <= 16
    style = "none" if line.points else _DASHES[line.dash % len(_DASHES)]
    marker = ("D" if line.points else "o") if line.points or few else None
    face = "none" if line.points else colour
    axes.plot(
        curve.steps,
        curve.values,
        color=colour,
        linewidth=1.6,
        linestyle=style,
        marker=marker,
        markersize=5 if line.points else 3,
        markerfacecolor=face,
    )


def _axes(*, steps: bool = False) -> tuple[Any, Any]:
    require("matplotlib", "train")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE)
    axes = figure.add_axes(_PLACE)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_MUTED, labelcolor=_MUTED, labelsize=9, length=0, pad=3)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=steps, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.yaxis.get_offset_text().set(color=_MUTED, fontsize=8)
    return axes, figure


def _element(figure: Any, number: int) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    out = io.StringIO()
    # Text stays text: it is small, and takes the page's font. The salt makes ids differ between charts.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": f"chart {number}", "font.family": "sans-serif"}
    ):
        figure.patch.set_visible(False)
        figure.axes[0].patch.set_visible(False)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(out.getvalue(), number)


def _for_page(text: str, number: int) -> str:
    """Returns matplotlib's document as an element whose ids are the page's alone, and whose colours the style's."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?)\s(?:width|height)="[^"]*"\s(?:width|height)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="s{number}-', text)
    text = re.sub(r'((?:xlink:href="|url\()#)', rf"\g<1>s{number}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, name in _PROPERTIES.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r'(?<= )(?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    text = re.sub(r"\n\s*", "\n", text)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()
