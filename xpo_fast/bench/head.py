"""Times losses, forward and backward, against the bare products and the peers, after a comparison with float64.

Correctness comes first: every contender is compared with float64 on the same operands, and one that is wrong is not
timed. Then each repeat calls every contender in turn. A ratio of times is the median over repeats of the ratio within a
repeat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..precision import native
from .accuracy import errors_of, wrong
from .contenders import LIGER_FUSED, Contender, Missing, make_contenders, make_floor
from .measure import ratio, time_interleaved
from .problem import CASES, CPU, ROWS, Batch, Case, Results, Shape, float64_truth, make_batch, make_weight
from .work import DTYPES, FLOOR, Record, Settings, Work, chosen, timed

FLOOR_NEW = "the same, gradients into new memory"
BATCHES = 3  # used in turn by the repeats
SLOW = 10.0  # times as long as the floor: of such a contender one sample tells enough
SHAPE = Shape(128, 576, 49152)  # of every loss
WIDE = Shape(64, 2048, 32768)  # of the losses in WIDE_CASES
WIDE_CASES = ("frozen", "dpo")
# They compile anew for each case, or take thirty times the floor, and their log-probs know nothing of the loss: only in
# WIDE_CASES are they measured without being asked for.
COSTLY = ("torch.compile", "CCE, torch.compile", "torch linear_cross_entropy, chunked")
QUICK_SHAPE = Shape(64, 40, 1009)
SWEEP_CONTENDERS = ("materialised", "TRL", "Liger")

# For estimates of how long a case takes: products per second of two cores in fp32, and times over the floor.
RATE = 1.8e11
TIMES = {"TRL": 4.4, "Liger": 1.8, LIGER_FUSED: 4.0, "torch linear_cross_entropy, chunked": 5.0}
COMPILING_S, CASE_S = 12.0, 1.5


@dataclass(frozen=True)
class Problem:
    """A case and its sizes."""

    name: str
    case: Case
    length: int  # T
    width: int  # D
    vocab: int  # V
    dtype: str = "fp32"  # a name of DTYPES
    rows: int = ROWS  # R

    @property
    def prompt(self) -> int:
        """Returns the number of unscored positions of a row."""
        return round(self.length * self.case.prompt_share)

    @property
    def shape(self) -> Shape:
        """Returns N×D×V."""
        return Shape(self.rows * (self.length - self.prompt), self.width, self.vocab)

    def batches(self) -> list[Batch]:
        """Returns random batches on one head."""
        weight = make_weight(self.vocab, self.width, DTYPES[self.dtype])
        return [make_batch(weight, self.rows, self.length, self.prompt, seed) for seed in range(BATCHES)]


def works(settings: Settings) -> Iterator[Work]:
    """Yields the cases of the suite `losses`: every loss at one shape, two of them at a wide one, or as asked for.

    Contenders in COSTLY are measured in these two losses.
    """
    if settings.quick:
        shapes = {QUICK_SHAPE: tuple(CASES)}
    elif settings.shapes:
        shapes = dict.fromkeys(settings.shapes, tuple(CASES))
    else:
        shapes = {SHAPE: tuple(CASES), WIDE: WIDE_CASES}
    for shape, names in shapes.items():
        for dtype in _dtypes(settings):
            for name in chosen(names, settings):
                case = CASES[name]
                length = round(shape.scored / ROWS / (1 - case.prompt_share))
                problem = Problem(name, case, length, shape.width, shape.vocab, dtype)
                title = f"{name}, {dtype}, {shape}"
                all_of_them = settings.contenders or name in WIDE_CASES
                wanted = tuple(
                    c for c in make_contenders(case) if settings.wants(c) and (all_of_them or c not in COSTLY)
                )
                estimate_s = _estimate_s(problem, wanted, settings.repeats)
                estimate_s += COMPILING_S * sum("compile" in c for c in wanted)
                yield Work("losses", title, estimate_s, functools.partial(run, problem, settings, wanted))


def _dtypes(settings: Settings) -> tuple[str, ...]:
    return settings.dtypes or tuple(name for name, dtype in DTYPES.items() if native(dtype, CPU))


def sweep_works(settings: Settings) -> Iterator[Work]:
    """Yields the cases of the suite `sweep`: DPO with a trainable head as one size varies, and lists of K rows."""
    dpo, lists = CASES["dpo"], CASES["lists"]
    base = Problem("", dpo, length=32, width=512, vocab=16384)
    points: dict[str, list[tuple[float, Problem]]] = {
        "T": [(n, _with(base, length=n)) for n in (16, 32, 64)],
        "V": [(n, _with(base, vocab=n)) for n in (4096, 16384, 32768)],
        "D": [(n, _with(base, width=n)) for n in (256, 512, 1024)],
        "scored share": [(s, _with(base, length=64, case=dpo._replace(prompt_share=1 - s))) for s in (0.25, 0.5, 1.0)],
        "P": [(n, _with(base, rows=2 * n)) for n in (1, 4, 8)],
        "K": [(n, _with(base, length=16, rows=16, case=lists._replace(list_size=n))) for n in (2, 4, 8)],
    }
    if settings.quick:
        small = {"length": 4, "width": 16, "vocab": 101}
        points = {name: [(x, _with(p, **small)) for x, p in found[:2]] for name, found in points.items()}
    for quantity in chosen(points, settings):
        for value, problem in points[quantity]:
            title = f"{quantity} = {value:g}"
            wanted = [c for c in SWEEP_CONTENDERS if settings.wants(c)]
            estimate_s = _estimate_s(problem, ["xpo_fast", *wanted], settings.repeats)
            point = {"sweep": quantity, "value": value}
            yield Work("sweep", title, estimate_s, functools.partial(run, problem, settings, SWEEP_CONTENDERS, point))


def _with(problem: Problem, **changes: object) -> Problem:
    return Problem(**{**vars(problem), **changes})  # pyright: ignore[reportArgumentType]


def _estimate_s(problem: Problem, contenders: Sequence[str], repeats: int) -> float:
    floor_s = problem.case.floor_gemms * problem.shape.gemm_flop / RATE
    prompts = 1 / (1 - problem.case.prompt_share)
    over = 1 + sum(TIMES.get(name, 1.5) * (1 if name.startswith("xpo_fast") else prompts) for name in contenders)
    return floor_s * (over * (repeats + 1) + 6) + CASE_S  # 6: float64's results


def run(
    problem: Problem, settings: Settings, only: tuple[str, ...] | None = None, point: Record | None = None
) -> list[Record]:
    """Compares every contender with float64, times those that are right, and returns a record of each.

    only: the names of contenders to measure beside the floor and ours by `auto`; None: all of them.
    point: further `params` of the records.
    """
    batches = problem.batches()
    makers = make_contenders(problem.case)
    first = next(iter(makers))
    wanted = [n for n in makers if settings.wants(n) and (only is None or n == first or n in only)]
    measured = {n: _checked(makers[n]) for n in wanted}
    truth = float64_truth(batches[0], problem.case)
    records: dict[str, Record] = {}
    calls: dict[str, Callable[[Batch], Results]] = {}
    for name, made in measured.items():
        records[name] = {"contender": name, "ours": name.startswith("xpo_fast")}
        if isinstance(made, str):
            records[name]["missing"] = made
            continue
        records[name] |= {"gemms": made.gemms, "flop": made.gemms * problem.shape.gemm_flop}
        records[name] |= _errors(made, batches[0], truth, problem.dtype)
        if not records[name].get("wrong") and "failed" not in records[name]:
            calls[name] = made.call
    del truth
    floors = _floors(batches[0], problem.case, alone=point is not None)
    records = {n: {"contender": n, "ours": False, "gemms": f.gemms} for n, f in floors.items()} | records
    for floor in floors.values():
        floor.call(batches[0])  # the others' first calls, some of which compiled, were the checks
    calls = {name: floor.call for name, floor in floors.items()} | calls
    for name, times in timed(time_interleaved(calls, batches, settings.repeats, slow=SLOW), FLOOR).items():
        records[name] |= times
    sizes = {**problem.shape._asdict(), "rows": problem.rows, "length": problem.length}
    params = {"case": problem.name, "dtype": problem.dtype, **sizes, **(point or {})}
    return [record | {"params": params} for record in records.values()]


def _checked(make: Callable[[], Contender]) -> Contender | str:
    """Returns the contender, or why it cannot run here."""
    try:
        return make()
    except Missing as error:
        return str(error)


def _errors(made: Contender, batch: Batch, truth: Results, dtype: str) -> Record:
    """Returns the errors of a contender's results, or why it failed: its exception ends its own measurement alone."""
    try:
        errors = errors_of(made.call(batch), truth)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"errors": errors, "wrong": wrong(errors, dtype, ours=made.ours)}


def _floors(batch: Batch, case: Case, *, alone: bool) -> dict[str, Contender]:
    floors = {FLOOR: make_floor(batch, case)}
    if case.train_head and not case.accumulated and not alone:
        floors[FLOOR_NEW] = make_floor(batch, case, new_gradients=True)
    return floors


# --- what was set out to be reached, at the shapes that are published -------------------------------------------------

PUBLISHED = (Shape(1024, 576, 49152), Shape(512, 4096, 128256))


class Aim(NamedTuple):
    """The baseline's time divided by ours should be at least `speedup`."""

    case: str
    baseline: str
    speedup: float
    dtypes: tuple[str, ...] = ("fp32", "bf16")


AIMS = (
    Aim("frozen", FLOOR, 1 / 1.10, ("fp32",)),
    Aim("frozen", "materialised", 1.0),
    Aim("frozen", "TRL", 3.0),
    Aim("dpo", FLOOR, 1 / 1.15, ("fp32",)),
    Aim("dpo-accumulated", FLOOR, 1 / 1.15, ("fp32",)),
    Aim("dpo", "materialised", 1.0),
    Aim("dpo", "TRL", 2.0),
    Aim("dpo-prompts", "Liger", 2.5),
)


def aims(records: list[Record]) -> list[str]:
    """Returns a line per aim that the records of a case can be held to."""
    found = {r["contender"]: r for r in records if "samples_ms" in r}
    ours = next((r for r in found.values() if r["ours"]), None)
    if ours is None or Shape(*(ours["params"][x] for x in Shape._fields)) not in PUBLISHED:
        return []
    params = ours["params"]
    lines = []
    for aim in AIMS:
        if aim.case == params["case"] and params["dtype"] in aim.dtypes and aim.baseline in found:
            speedup = ratio(found[aim.baseline]["samples_ms"], ours["samples_ms"])
            met = "met" if speedup >= aim.speedup else "MISSED"
            where = f"{aim.case}, {params['dtype']}"
            lines.append(f"{met}: {where}: {aim.baseline} takes {speedup:.2f} times ours (aim: {aim.speedup:.2f})")
    return lines
