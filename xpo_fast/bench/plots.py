"""Draws results: times over the floor, errors, sweeps, peak memory, whole steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .work import FLOOR, Record

OURS = "#b3202c"
OTHERS = ("#4c6f91", "#7f9c6b", "#c58b2a", "#7d6a9c", "#4f9c97", "#9a5f4a", "#8a8a8a", "#b59ab0", "#5b5b5b")


def draw(records: Mapping[str, Sequence[Record]], folder: Path) -> list[Path]:
    """Writes a PNG for each suite that has figures, and returns the paths. records: by suite/case."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    by_suite: dict[str, dict[str, Sequence[Record]]] = {}
    for key, found in records.items():
        suite, _, case = key.partition("/")
        by_suite.setdefault(suite, {})[case] = found
    drawn = []
    for suite, cases in by_suite.items():
        if suite == "losses":
            drawn.append(_bars(cases, "over_floor", "time over the bare products", folder / "losses.png"))
            drawn.append(_errors(cases, folder / "errors.png"))
        elif suite == "sweep":
            drawn.append(_lines(cases, folder / "sweep.png"))
        elif suite == "memory":
            side = {"peak MiB beyond inputs and results": [r for found in cases.values() for r in _beside(found)]}
            drawn.append(_bars(side, "mib", "MiB", folder / "memory.png"))
        elif suite == "steps":
            drawn.append(_bars(cases, "over_floor", "time over the bare products", folder / "steps.png"))
    return [path for path in drawn if path is not None]


def _beside(records: Sequence[Record]) -> list[Record]:
    """Returns the records of the configuration in which all contenders are measured, with the case in their names."""
    return [
        {**r, "contender": f"{r['params']['case']}, {r['params']['dtype']}: {r['contender']}"}
        for r in records
        if r["params"]["group"] == "side by side"
    ]


def _figure(count: int, width: float, height: float, columns: int = 2) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = min(count, columns)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bars(cases: Mapping[str, Sequence[Record]], quantity: str, label: str, path: Path) -> Path | None:
    shown = {name: [r for r in found if quantity in r and r["contender"] != FLOOR] for name, found in cases.items()}
    shown = {name: found for name, found in shown.items() if found}
    if not shown:
        return None
    longest = max(map(len, shown.values()))
    figure, axes = _figure(len(shown), 7.0, 0.8 + 0.3 * longest)
    for axis, (name, found) in zip(axes, shown.items()):
        values = [r[quantity] for r in found]
        bars = axis.barh(
            [r["contender"] for r in found], values, color=[OURS if r["ours"] else OTHERS[0] for r in found]
        )
        axis.bar_label(bars, [f"{v:.2f}" if v < 100 else f"{v:.0f}" for v in values], padding=3, fontsize=8)
        axis.set(title=name, xlabel=label, xlim=(0, 1.15 * max(*values, 1e-9)))
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        if quantity == "over_floor":
            axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    return _save(figure, path)


def _errors(cases: Mapping[str, Sequence[Record]], path: Path) -> Path | None:
    """Draws the largest error of each result by contender, over all cases of a dtype, on a logarithmic axis."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for records in cases.values():
        for r in records:
            for name, error in r.get("errors", {}).items():
                if error:
                    of = found.setdefault(r["params"]["dtype"], {}).setdefault(r["contender"], {})
                    of[name] = max(of.get(name, 0.0), error)
    if not found:
        return None
    figure, axes = _figure(len(found), 7.0, 1.2 + 0.3 * max(map(len, found.values())))
    marks = {"logps": "o", "loss": "s", "hidden_grad": "^", "weight_grad": "v"}
    for axis, (dtype, contenders) in zip(axes, found.items()):
        for i, (name, mark) in enumerate(marks.items()):
            points = [(errors[name], c) for c, errors in contenders.items() if name in errors]
            if points:
                axis.plot(*zip(*points, strict=True), mark, color=OTHERS[i], label=name, markersize=5)
        axis.set(
            xscale="log", title=f"largest error against float64, {dtype}", xlabel="log-prob in nats, else relative"
        )
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _save(figure, path)


def _lines(cases: Mapping[str, Sequence[Record]], path: Path) -> Path | None:
    sweeps: dict[str, dict[str, list[tuple[float, float]]]] = {}
    ours = set()
    for records in cases.values():
        for r in (r for r in records if "over_floor" in r and r["contender"] != FLOOR):
            point = r["params"]["value"], r["over_floor"]
            sweeps.setdefault(r["params"]["sweep"], {}).setdefault(r["contender"], []).append(point)
            ours |= {r["contender"]} if r["ours"] else set()
    if not sweeps:
        return None
    figure, axes = _figure(len(sweeps), 4.2, 3.2, columns=3)
    others = sorted({name for found in sweeps.values() for name in found} - ours)
    colours = {**dict.fromkeys(ours, OURS), **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}}
    for axis, (quantity, found) in zip(axes, sweeps.items()):
        for name, points in found.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=colours[name], label=name, markersize=4)
        axis.set(xlabel=quantity, ylabel="time over the floor", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.legend(fontsize=7, loc="lower right")
    return _save(figure, path)
