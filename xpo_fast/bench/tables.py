"""Writes results as Markdown: times over the floor with errors, sweeps, peak memory, whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .head import aims
from .measure import table
from .work import FLOOR, Record

Cases = Mapping[str, Sequence[Record]]  # by the name of the case


def markdown(environment: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> str:
    """Returns all results. records: by suite/case."""
    parts = [about(environment)]
    for suite, render in TABLES.items():
        cases = {k.partition("/")[2]: found for k, found in records.items() if k.partition("/")[0] == suite}
        if cases:
            parts.append(render(cases))
    absent = not_measured(r for found in records.values() for r in found)
    if absent:
        parts.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in absent))
    return "\n\n".join(parts) + "\n"


def about(environment: Mapping[str, Any]) -> str:
    """Returns the machine, threads, commit and versions in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = environment["commit"] or "no checkout"
    changed = " with changes" if environment["uncommitted_changes"] else ""
    machine = f"{environment['cpu']} ({environment['instructions']}), {environment['threads']} threads"
    return f"{machine}; commit {commit[:12]}{changed}; {versions}"


def not_measured(records: Iterable[Record]) -> list[str]:
    """Returns a line per contender and reason for which there is no figure."""
    found: dict[tuple[str, str], int] = {}
    for r in records:
        why = r.get("missing") or ("failed" in r and f"FAILED: {r['failed']}") or _wrong(r)
        if why:
            found[r["contender"], why] = found.get((r["contender"], why), 0) + 1
    return [f"{name}: {why}{f' ({n} cases)' if n > 1 else ''}" for (name, why), n in found.items()]


def _wrong(record: Record) -> str:
    errors = ((name, record["errors"][name]) for name in record.get("wrong", ()))
    said = ", ".join(f"{name} {'is not finite' if e is None else f'{e:.1e}'}" for name, e in errors)
    return f"WRONG, so not timed: errors against float64: {said}" if said else ""


def problems(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """Returns what is wrong with ours: results, failures, memory above its bound. records: by suite/case."""
    found = []
    for key, r in ((key, r) for key, of in records.items() for r in of if r["ours"]):
        said = (_wrong(r) and "wrong") or ("failed" in r and "failed") or ""
        over = "" if r.get("within_bound", True) else "over its bound of memory"
        found += [f"{what}: {key}, {r['contender']}" for what in (said, over) if what]
    return found


# --- a table for each suite -------------------------------------------------------------------------------------------


def losses(cases: Cases) -> str:
    """Returns a table for each case: time over the floor, milliseconds, rate, errors; and which aims are met."""
    met = [f"- {line}" for found in cases.values() for line in aims(list(found))]
    parts = [f"### losses: {name}\n\n{_timing(found)}" for name, found in cases.items()]
    return "\n\n".join([*parts, "\n".join(met)] if met else parts)


def _timing(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        cells = ["", "", "", ""]
        if "samples_ms" in r:
            rate = f"{r['flop'] / r['median_ms'] / 1e6:.0f}" if "flop" in r else ""
            cells = [f"{r['over_floor']:.2f}", f"{r['median_ms']:.1f}", f"{min(r['samples_ms']):.1f}", rate]
        elif "missing" not in r:
            cells[0] = "failed" if "failed" in r else "wrong"
        else:
            cells[0] = "–"
        errors = [r.get("errors", {}).get(n, "") for n in ("logps", "loss", "hidden_grad", "weight_grad")]
        shown = ["NaN" if e is None else e and f"{e:.0e}" for e in errors]
        rows.append([r["contender"], str(r.get("gemms", "")), *cells, *map(str, shown)])
    times = ["GEMMs", "over the floor", "median ms", "min ms", "GFLOP/s"]
    return table(["", *times, "logp error", "loss error", "dH error", "dW error"], rows)


def sweep(cases: Cases) -> str:
    """Returns the times over the floor at each point of each sweep."""
    names = list(dict.fromkeys(r["contender"] for found in cases.values() for r in found if r["contender"] != FLOOR))
    rows = []
    for title, found in cases.items():
        of = {r["contender"]: r for r in found}
        rows.append([title, *(f"{of[n]['over_floor']:.2f}" if "samples_ms" in of.get(n, {}) else "–" for n in names)])
    return "### sweep: times over the floor\n\n" + table(["", *names], rows)


def memory(cases: Cases) -> str:
    """Returns MiB beyond inputs and results."""
    rows = []
    for r in (r for found in cases.values() for r in found if "mib" in r):
        p = r["params"]
        size = [str(p["scored"]), f"{p['rows']} × {p['length']}", str(p["vocab"]), str(p["width"])]
        resident = r.get("resident_mib")
        mib = [f"{r['inputs_mib']:.0f}", f"{r['results_mib']:.0f}", "" if resident is None else f"{resident:.1f}"]
        bound = [f"{r['bound_mib']:.1f}", "within" if r["within_bound"] else "OVER"] if "bound_mib" in r else ["", ""]
        rows.append([f"{p['case']}, {p['dtype']}", r["contender"], *size, *mib, f"{r['mib']:.1f}", *bound])
    sizes = ["N", "rows × T", "V", "D"]
    header = ["", "", *sizes, "inputs", "results", "resident", "allocated", "bound", ""]
    return "### memory: MiB beyond inputs and results\n\n" + table(header, rows)


def steps(cases: Cases) -> str:
    """Returns whole steps: tokens, times over the floor, and how many times as fast as padded rows."""
    rows = []
    for name, found in cases.items():
        for r in (r for r in found if "samples_ms" in r):
            shown = [str(r.get("tokens", "")), f"{r['over_floor']:.2f}", f"{sum(r['samples_ms']):.0f}"]
            rows.append([name, r["contender"], *shown, f"{r['as_fast_as_padded']:.2f}"])
    header = ["", "", "positions", "over the floor", "all steps, ms", "times as fast as padded"]
    return "### whole steps\n\n" + table(header, rows)


def step_memory(cases: Cases) -> str:
    """Returns the peaks of whole steps."""
    rows = [[name, f"{r['mib']:.0f}"] for name, found in cases.items() for r in found if "mib" in r]
    return "### whole steps: peak MiB\n\n" + table(["", "allocated"], rows)


def precision(cases: Cases) -> str:
    """Returns float32's milliseconds and bfloat16's time over float32's, with each setting of instructions."""
    times = {name: {r["contender"]: r for r in found} for name, found in cases.items()}
    parts = list(dict.fromkeys(c.rpartition(": ")[0] for found in times.values() for c in found))
    rows = []
    for part in parts:
        pairs = [(found[f"{part}: float32"], found[f"{part}: bfloat16"]) for found in times.values()]
        rows.append([part, *(f"{min(a['samples_ms']):.1f}, {b['over_floor']:.2f}" for a, b in pairs)])
    rows.append(["`auto`, of a bfloat16 checkpoint", *(found[0]["params"]["auto"] for found in cases.values())])
    header = ["float32 in ms, bfloat16 over float32", *cases]
    return "### precision\n\n" + table(header, rows)


TABLES: dict[str, Callable[[Cases], str]] = {
    "losses": losses,
    "sweep": sweep,
    "memory": memory,
    "steps": steps,
    "step-memory": step_memory,
    "precision": precision,
}
