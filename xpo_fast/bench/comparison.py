"""Compares two runs: what takes longer relative to the floor in its own run, and what takes more memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .measure import table
from .results import records_of
from .work import FLOOR

WORSE = 1.15  # times the earlier figure
QUANTITIES = {"over_floor": "time over the floor", "mib": "peak MiB"}


class Change(NamedTuple):
    """One figure of a contender in two runs."""

    key: str
    contender: str
    ours: bool
    quantity: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Returns the later figure divided by the earlier one."""
        return self.after / self.before if self.before else 1.0

    @property
    def worse(self) -> bool:
        """Tells whether the later figure is more than 15% above the earlier one."""
        return self.ratio > WORSE


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Returns the figures that both contents of result files have. Raises ValueError if there is none."""
    before, after = ({(r["key"], r["contender"]): r for r in records_of(content)} for content in (old, new))
    found = [
        Change(*key, bool(r["ours"]), name, before[key][quantity], r[quantity])
        for key, r in after.items()
        if key in before and r["contender"] != FLOOR
        for quantity, name in QUANTITIES.items()
        if quantity in r and quantity in before[key]
    ]
    if not found:
        raise ValueError(
            "the file of --compare has no case of this run: compare runs of the same suites, shapes and dtypes"
        )
    return found


def lost(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns what of ours had a figure before and has none now, though its case was measured: it is wrong or fails."""
    after = {(r["key"], r["contender"]): r for r in records_of(new)}
    figures = ((r["key"], r["contender"]) for r in records_of(old) if r["ours"] and QUANTITIES.keys() & r.keys())
    return [
        f"{key}: {contender} had a figure, and has none now"
        for key, contender in figures
        if (key, contender) in after and not QUANTITIES.keys() & after[key, contender].keys()
    ]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns in which ways the two runs are not of the same machine and versions."""
    a, b = old["environment"], new["environment"]
    found = [f"{n}: {a.get(n)} before, {b.get(n)} now" for n in ("cpu", "instructions", "threads") if a.get(n) != b[n]]
    names = sorted(a["versions"].keys() | b["versions"].keys())
    pairs = ((n, a["versions"].get(n, "absent"), b["versions"].get(n, "absent")) for n in names)
    return [*found, *(f"{n}: {x} before, {y} now" for n, x, y in pairs if x != y)]


def comparison_table(found: list[Change]) -> str:
    """Returns the changes that are worse in Markdown, ours first."""
    rows = [
        [f"{c.key}: {c.contender}", c.quantity, f"{c.before:.2f}", f"{c.after:.2f}", f"{c.ratio:.2f}"]
        for c in sorted(found, key=lambda c: (not c.ours, -c.ratio))
        if c.worse
    ]
    return table(["worse than before", "", "before", "now", "ratio"], rows)
