"""The parts of a page that compares runs: final figures side by side, the same curves overlaid, what was set apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .blocks import Numbered, Part, Table, text
from .charts import Chart, Line
from .metrics import CURVES, LENGTHS, REWARDS, SPEED, Charted, spread_of
from .parts import MOST_OTHERS, options_of, outcome
from .run import Run
from .series import curve, number

MOST_RUNS = 8  # that colours tell apart
_PATHS = ("output-dir", "resume", "overwrite", "config")  # differ between any two runs


def comparison(runs: Sequence[Run], names: Sequence[str]) -> list[Part]:
    """Returns the parts of the page of several runs. names: of the runs, each another."""
    numbered = Numbered()
    main = [name for _, metrics, _ in (*REWARDS, *CURVES, *LENGTHS, *SPEED) for name in metrics]
    known = list(dict.fromkeys(name for run in runs for name in Charted(run.metrics).names))
    deviations = {spread_of(name) for name in known} & {*known}
    shown = [name for name in main if name in known]
    components = [name for name in known if name.startswith("rewards/") and name.endswith("/mean")]
    divergences = [name for name in known if "kl" in name.split("/")]
    shown = list(dict.fromkeys([*shown, *components, *divergences]))
    left = [name for name in known if name not in shown and name not in deviations]

    def figures(chosen: Sequence[str]) -> list:
        found = (numbered.figure(overlaid(runs, names, name)) for name in chosen)
        return [figure for figure in found if figure is not None]

    others = Part("others", "All other metrics", "There are no others.", more=figures(left[:MOST_OTHERS]))
    if left[MOST_OTHERS:]:
        others.lines.append(f"{len(left) - MOST_OTHERS} more are in the runs' logs: {', '.join(left[MOST_OTHERS:])}.")
    return [
        _final(runs, names),
        Part("curves", "Curves", "The runs logged nothing.", figures=figures(shown)),
        _set_apart(runs, names),
        others,
    ]


def overlaid(runs: Sequence[Run], names: Sequence[str], metric: str) -> Chart:
    """Returns the chart of one metric of all runs: the training's curve of each, or its evaluations without one."""
    lines, notes = [], []
    for k, (run, name) in enumerate(zip(runs, names, strict=True)):
        for series, told, points in ((run.metrics.training, "", False), (run.metrics.evaluation, ", held out", True)):
            if metric in series:
                found = series[metric]
                lines.append(Line(name + told, curve(found), k, points=points, dash=k % 4))
                if found.missing:
                    notes.append(f"{name}{told}: {found.missing} of {len(found.values)} logs have no finite value.")
    return Chart(metric, lines, notes=notes)


def _final(runs: Sequence[Run], names: Sequence[str]) -> Part:
    found = [{f"{k}, held out": after for k, (_, after) in outcome(run).items()} for run in runs]
    for figures, run in zip(found, runs, strict=True):
        figures |= {k: s.finite[-1] for k, s in run.metrics.training.items() if s.finite and k in _LAST}
        totals, held = (run.results.get(k) for k in ("throughput", "memory"))
        if isinstance(totals, dict) and totals.get("tokens"):
            figures["tokens per second, whole run"] = number(totals.get("tokens_per_second"))
        if isinstance(held, dict):
            figures["peak memory, GiB"] = number(held.get("peak_bytes")) / 2**30
        steps = number(run.state.get("global_step"))
        figures["steps"] = steps if math.isfinite(steps) else run.metrics.last_step
    rows = [[key, *(text(figures.get(key)) for figures in found)] for key in dict.fromkeys(k for f in found for k in f)]
    intro = "Held-out figures are those after training; the others the last that was logged."
    return Part("outcome", "Final figures", "The runs have none.", intro, tables=[Table(["", *names], rows)])


_LAST = ("loss", "reward", "completions/mean_length")


def _set_apart(runs: Sequence[Run], names: Sequence[str]) -> Part:
    settings = [{"command": run.command, **options_of(run)} for run in runs]
    versions = [dict(run.results.get("versions") or {}) | {"commit": run.results.get("commit")} for run in runs]
    tables = []
    for title, found in (("option", settings), ("version", versions)):
        keys = sorted({k for one in found for k in one} - {*_PATHS})
        apart = [k for k in keys if len({str(one.get(k)) for one in found}) > 1]
        rows = [[k, *("–" if one.get(k) is None else str(one[k]) for one in found)] for k in apart]
        if rows:
            tables.append(Table([title, *names], rows, numbers=False))
    return Part("configuration", "What was set differently", "All options and versions are the same.", tables=tables)
