"""Compares the records of gpu.py with the aims, and formats them as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_contenders import FLOOR_TOKENS, OURS, TASKS
from xpo_fast.bench.measure import MIB, ratio, table
from xpo_fast.bench.problem import Shape


class Aim(NamedTuple):
    """The baseline's time divided by ours should be at least `speedup`, at AIM_TOKENS tokens or more."""

    task: str
    baseline: str
    speedup: float
    width: range = range(1, 2**20)


AIM_TOKENS = 8192
AIMS = (
    *(Aim(task, "floor", 0.93, range(4096, 2**20)) for task in ("frozen", "trainable")),
    *(Aim(task, "floor", 0.85, range(2048, 4096)) for task in ("frozen", "trainable")),
    *(Aim(task, "TRL", 1.40) for task in ("frozen", "trainable")),
    *(Aim(task, "Liger fused", 1.0) for task in ("frozen", "trainable", "logps")),
    Aim("trainable", "QuACK CE", 1.0),
)
LOGPS_AIM_TFLOPS = 700  # without gradient
# Largest absolute error of a log-prob. Tensor cores sum products of bf16 operands in float32 and truncate (Fasi et al.
# 2021). At a width of 4096 that alone is an error of 1.2e-4 (truncation.py), which no later kernel can undo.
LOGP_AIM = 2e-4
ACCURACY_AIM = 100  # RMS error of ACCURACY_PEER, whose logits pass through float16, divided by ours
ACCURACY_PEER = "Liger fused"
# Peak memory above inputs and gradients, at vocabularies in MEMORY_VOCAB. With a trainable head the plan takes a share
# of the card, which is reported without an aim.
MEMORY_VOCAB = range(150_000, 160_000)
MEMORY_CASES = ("frozen", "logps")
MEMORY_AIM_MB, MEMORY_GROWTH_AIM_MB = 2600, 300  # in all; growth when tokens quadruple


def aims(records: list[dict[str, Any]], most_tokens: int) -> list[dict[str, Any]]:
    """Returns the aims, each with the worst value of each of our backends; one backend is enough to meet an aim."""
    found = []
    for aim in AIMS:
        ours: dict[str, dict[str, Any]] = {}
        for r in _timed(records, most_tokens, aim.task):
            baseline = _timed(records, most_tokens, aim.task, aim.baseline)
            its = next((x for x in baseline if x["shape"] == r["shape"]), None)
            if r["shape"]["width"] in aim.width and its is not None:
                speedup = ratio(its["samples_ms"], r["samples_ms"])
                nearest(ours, r, speedup)
        widths = [aim.width.start, aim.width.stop - 1]
        what = f"{aim.task}: {aim.baseline}'s time over ours"
        found += judged(what, aim.speedup, ours, case=aim.task, baseline=aim.baseline, widths=widths)
    ours = {}
    for r in _timed(records, most_tokens, "logps"):
        nearest(ours, r, r["flop"] / r["median_ms"] / 1e9)
    found += judged("logps: TFLOP/s", LOGPS_AIM_TFLOPS, ours, case="logps")
    return found + _accuracy_aims(records)


def _timed(
    records: list[dict[str, Any]], most_tokens: int, case: str, contender: str | None = None
) -> list[dict[str, Any]]:
    """Returns the timed records of a case at AIM_TOKENS or more, of our backends or of one contender."""
    return [
        r
        for r in records
        if "samples_ms" in r
        and r["case"] == case
        and r["shape"]["scored"] >= min(AIM_TOKENS, most_tokens)
        and (r["contender"] in OURS if contender is None else r["contender"] == contender)
    ]


def _accuracy_aims(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bounds, times = {}, {}
    for r in records:
        error = r.get("errors", {}).get("logps")
        if r["contender"] not in OURS or r["case"] == "gather" or not error:
            continue
        nearest(bounds, r, LOGP_AIM / error)
        for peer in records:
            if (peer["case"], peer["contender"]) != (r["case"], ACCURACY_PEER):
                continue
            if peer["shape"] == r["shape"] and peer.get("errors", {}).get("logps"):
                nearest(times, r, peer["errors"]["logps_rms"] / r["errors"]["logps_rms"])
    return [
        *judged(f"{LOGP_AIM:.0e} over the largest error of a log-prob", 1.0, bounds),
        *judged(f"RMS error of a log-prob, {ACCURACY_PEER}'s over ours", ACCURACY_AIM, times),
    ]


def memory_aims(records: list[dict[str, Any]], card_mib: float) -> list[str]:
    """Returns a line per peak of our backends and its aim; growth is only judged between shapes that fill a tile."""
    peaks_mb = {
        (r["contender"], r["case"], Shape(**r["shape"])): r["peak_mib"] * MIB / 1e6
        for r in records
        if r["contender"] in OURS and TASKS[r["case"]].gemms and r.get("peak_mib") is not None
    }
    card_mb = card_mib * MIB / 1e6
    lines = []
    for (ours, case, shape), peak_mb in peaks_mb.items():
        if shape.vocab not in MEMORY_VOCAB:
            continue
        where = f"{ours}, {case} {shape}"
        if case not in MEMORY_CASES:
            lines.append(f"{where} takes {peak_mb:.0f} MB, {peak_mb / card_mb:.1%} of the card")
            continue
        bounds = [(f"{where} takes", peak_mb, MEMORY_AIM_MB)]
        smaller = ours, case, shape._replace(scored=shape.scored // 4)
        if smaller in peaks_mb and smaller[2].scored >= FLOOR_TOKENS:
            growth_mb = peak_mb - peaks_mb[smaller]
            bounds.append((f"{where} takes more than {smaller[2]} by", growth_mb, MEMORY_GROWTH_AIM_MB))
        for what, found_mb, aim_mb in bounds:
            verdict = "met" if found_mb < aim_mb else "MISSED"
            lines.append(f"{verdict}: {what} {found_mb:.0f} MB (aim: {aim_mb})")
    return lines


def nearest(ours: dict[str, dict[str, Any]], record: dict[str, Any], value: float) -> None:
    """Records the value of a backend and its case, if it is the smallest of this backend so far."""
    known = ours.get(record["contender"])
    if known is None or value < known["value"]:
        ours[record["contender"]] = {"value": value, "at": f"{record['case']} {Shape(**record['shape'])}"}


def judged(what: str, aim: float, ours: dict[str, dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Returns a list of one aim with the values of our backends, or of none if nothing was measured."""
    if not ours:
        return []
    best = max(ours, key=lambda backend: ours[backend]["value"])
    return [{"what": what, "aim": aim, "met": ours[best]["value"] >= aim, "best": best, "ours": ours, **more}]


def aim_line(aim: dict[str, Any], auto: str) -> str:
    """Returns a line: met or missed by our best backend, every backend's value, and which of them is `auto`."""
    values = ", ".join(
        f"{backend}{' (auto)' if backend == auto else ''} {found['value']:.2f} at {found['at']}"
        for backend, found in aim["ours"].items()
    )
    return f"{'met' if aim['met'] else 'MISSED'}: {aim['what']} {aim['aim']:g} or more: {values}"


def summary(records: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str], names: list[str]) -> str:
    """Returns a table with a line per case and shape, and a column per contender."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for r in records:
        key = r["case"], str(Shape(**r["shape"]))
        lines.setdefault(key, {})[r["contender"]] = cell(r)
    present = [n for n in names if any(n in cells for cells in lines.values())]
    return table(
        ["case, N×D×V", *present],
        [[f"{case} {shape}", *(cells.get(n, "") for n in present)] for (case, shape), cells in lines.items()],
    )


def time_cell(r: dict[str, Any]) -> str:
    """Returns the median milliseconds of a record and the floor's share, or why it has none; "?" if unchecked."""
    if "failed" in r:
        return "OOM" if "out of memory" in r["failed"] else "failed"
    if "median_ms" not in r:
        return "wrong"
    share = "" if r["contender"] == "floor" else f" {r['of_floor']:.2f}"
    return f"{r['median_ms']:.2f}{share}" + ("" if r.get("checked", True) else "?")


def memory_cell(r: dict[str, Any]) -> str:
    """Returns the peak of a record in MiB."""
    return "" if r.get("peak_mib") is None else f"{r['peak_mib']:.0f}"


ERRORS = {
    "logps": "log-prob, largest",
    "logps_rms": "log-prob, RMS",
    "hidden_grad": "hidden's gradient",
    "weight_grad": "head's gradient",
}


def accuracy(records: list[dict[str, Any]]) -> str:
    """Returns a table with a line per width and contender: the largest of each error over its cases and shapes."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for r in records:
        errors = found.setdefault((r["shape"]["width"], r["contender"]), {}) if r.get("errors") else {}
        for name, error in r.get("errors", {}).items():
            if error is not None and r["case"] != "gather":
                errors[name] = max(error, errors.get(name, 0.0))
    lines = [
        [f"D {width}, {contender}", *(f"{errors[n]:.1e}" if n in errors else "" for n in ERRORS)]
        for (width, contender), errors in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return table(["against float64", *ERRORS.values()], lines)
