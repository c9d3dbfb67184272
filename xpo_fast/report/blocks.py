"""What a page consists of, as values that its template writes: parts, tables, figures; and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import charts
from .charts import Chart


@dataclass
class Table:
    """Rows of cells; the first column names them, and numbers are aligned at the right."""

    head: Sequence[str]
    rows: list[list[str]]
    caption: str = ""
    numbers: bool = True

    @property
    def wide(self) -> bool:
        """Whether it is given the whole width of a page."""
        return len(self.head) > 4 or (not self.numbers and len(self.head) > 3)


@dataclass
class Figure:
    """A chart with its legend, and the same as a table. legend: (name, number of the colour, dash, last value)."""

    title: str
    svg: str
    legend: list[tuple[str, int, int, str]]
    caption: str
    table: Table


@dataclass
class Tile:
    """A figure at the head of a page, with a line about it."""

    label: str
    value: str
    about: str = ""


@dataclass
class Part:
    """One part of a page. missing: the line that stands in its place if the run has no data for it.

    short: the title where there is little room.
    """

    id: str
    title: str
    missing: str = ""
    intro: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more: list[Figure] = field(default_factory=list)  # shown when asked for
    pairs: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, str]] = field(default_factory=list)
    row: dict[str, str] | None = None  # a scored row
    shares: list[tuple[str, str, float]] = field(default_factory=list)  # of a bar: name, value, share
    options: list[tuple[str, str]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    short: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show but the line about what is missing."""
        given = (self.figures, self.tables, self.more, self.pairs, self.findings, self.shares, self.options, self.code)
        return not any(given)


class Numbered:
    """Makes figures, and counts them: each SVG of a page needs ids of its own."""

    def __init__(self) -> None:
        self.count = 0

    def figure(self, chart: Chart) -> Figure | None:
        """Returns the figure of a chart; None if it has no finite value."""
        if chart.empty:
            return None
        self.count += 1
        head, rows = chart.table()
        table = Table(head, [[text(row[0]), *map(text, row[1:])] for row in rows])
        written = share if chart.share else text
        legend = [(line.name, line.colour % 8, line.dash, written(line.last)) for line in chart.lines]
        window = f"Each point is the mean of {chart.window} logs." if chart.window > 1 else ""
        bands = f"Band: {'; '.join(chart.bands)}." if chart.bands else ""
        return Figure(chart.title, charts.svg(chart, self.count), legend, _joined(window, bands, *chart.notes), table)

    def other(self, title: str, draw: Callable[[int], str], names: Sequence[str], caption: str, table: Table) -> Figure:
        """Returns the figure of another drawing. draw: returns the SVG for its number."""
        self.count += 1
        legend = [(name, k, k % 4, "") for k, name in enumerate(names)]
        return Figure(title, draw(self.count), legend, caption, table)


def _joined(*sentences: str) -> str:
    return " ".join(x for x in sentences if x)


def text(value: float | None) -> str:
    """Returns a number as text, four digits of it; "–" for NaN and None, infinities by name."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    size = abs(value)
    shown = f"{value:,.0f}" if size >= 10_000 else f"{value:.4g}" if size >= 1e-3 else f"{value:.2e}"
    return shown.replace("-", "−")


def change(before: float, after: float) -> str:
    """Returns the difference of two numbers with its sign."""
    off = after - before
    if not math.isfinite(off):
        return "–"
    return f"{'+' if off > 0 else ''}{text(off)}" if off else "0"


def share(value: float) -> str:
    """Returns a share as a percentage."""
    return "–" if not math.isfinite(value) else f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """Returns seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
