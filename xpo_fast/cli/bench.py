"""`xpo-fast bench`: measures the losses and whole steps against the bare products and the peers, on one protocol."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, write_atomically
from . import options
from .options import SMOLLM2
from .parser import UsageError

if TYPE_CHECKING:
    from ..bench.results import Results
    from ..bench.work import Settings, Work

DTYPES = ("fp32", "bf16")
QUICK_REPEATS = 2


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure losses and whole steps against their products and the peers",
        description="Measure losses, forward and backward, and whole training steps on this CPU, in one run: every "
        "contender is compared with float64 first, and one that is wrong is not timed; then all take turns on the same "
        "data. Times are given over those of the bare matrix products; peak memory is that of a fresh process. Without "
        "SUITE the suites that --list marks run, in about a quarter of an hour on two cores. A peer that is not "
        "installed is named. Exit code 1: ours is wrong, fails or takes more memory than its bound, or --compare finds "
        "something of ours worse. On a GPU: bench/gpu.py of the repository.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="suites that --list shows (default: those it marks)")
    add = options.adder(parser)
    add("--list", "show the suites, or the cases of each SUITE, with estimates of the time, and measure nothing", False)
    add("--quick", "tiny sizes and two repeats, to try the command: the figures mean nothing", False)
    add("--json FILE", "write every sample to FILE, case by case, in the format of pytest-benchmark")
    add("--resume", "keep the finished cases of --json FILE, and measure the others", False)
    add("--overwrite", "begin --json FILE anew if it exists", False)
    add("--markdown FILE", "write the tables to FILE, too")
    add("--plot DIR", "draw the results into DIR, as PNG files")
    about = "compare with an earlier --json FILE: what takes over 15%% more time relative to the floor, or more memory"
    add("--compare FILE", about)
    add("--cases NAME", "only the case NAME, or those whose names begin so; may be repeated", [])
    add("--contenders NAME", "only contenders whose names begin so, beside the floor and ours; may be repeated", [])
    add("--shapes NxDxV", "shapes of the suite losses: scored tokens, width, vocabulary; may be repeated", [])
    about = "dtype of the losses (default: those that this CPU multiplies natively); may be repeated"
    add("--dtype", about, [], choices=DTYPES)
    add("--repeats N", "timed rounds in which each contender is called once", 3)
    add("--threads N", "threads of torch (default: its own choice)", type=int)
    add("--model NAME", "model of whole steps and of precision: a folder, or a name that `train` takes", SMOLLM2)
    add("--data FILE", "preference pairs of whole steps (default: the packaged ones)")
    add("--max-length TOKENS", "whole steps leave longer rows out", 512)
    add("--batch-size N", "pairs per batch of whole steps", 4)


def run(args: argparse.Namespace) -> int:
    """Measures what is asked for, prints it, and returns the exit code."""
    _check(args)
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ImportError("bench needs the package pytest-benchmark: pip install 'xpo-fast[bench]'")
    import torch

    from ..bench import results, suites

    settings = _settings(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    plan = suites.plan(args.suites, settings)
    if args.list:
        print(_listed(args.suites, plan))
        return 0
    _check_extras(args)
    old = results.read(Path(args.compare)) if args.compare else None
    kept = dataclasses.asdict(settings) | {"shapes": list(map(str, settings.shapes))}
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
    del kept["cases"]  # which only selects: a finished case is the same with other ones
    found = results.Results(Path(args.json) if args.json else None, kept)
    if args.resume:
        found.resume()
    from ..bench.run import run as run_plan

    try:
        run_plan(plan, found)
    except KeyboardInterrupt as stop:
        print(f"\nxpo-fast: stopped; {_kept(args, found)}", file=sys.stderr)
        stop.told = True  # pyright: ignore[reportAttributeAccessIssue]
        raise
    return _report(args, found, old)


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together, and for files that cannot be written."""
    for name in ("repeats", "threads", "max_length", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on with --json FILE and --overwrite begins it anew: give one of them")
    if (args.resume or args.overwrite) and not args.json:
        raise UsageError(f"--{'resume' if args.resume else 'overwrite'} needs the file: give --json FILE")
    if args.list:
        return
    if args.json and Path(args.json).is_file() and not args.resume and not args.overwrite:
        raise UsageError(f"--json {args.json} exists: --resume keeps its finished cases, --overwrite begins it anew")
    for option in ("json", "markdown", "plot"):
        if value := getattr(args, option):
            if option != "plot" and Path(value).is_dir():
                raise UsageError(f"--{option} {value} is a folder: name a file")
            check_writable(Path(value) if option == "plot" else Path(value).absolute().parent, f"--{option}")


def _check_extras(args: argparse.Namespace) -> None:
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs the package matplotlib: pip install 'xpo-fast[bench]'")


def _settings(args: argparse.Namespace) -> Settings:
    from ..bench.problem import Shape
    from ..bench.work import Settings

    try:
        shapes = tuple(map(Shape.parse, args.shapes))
    except ValueError as error:
        raise UsageError(f"--shapes: {error}") from error
    return Settings(
        quick=args.quick,
        repeats=min(args.repeats, QUICK_REPEATS) if args.quick else args.repeats,
        shapes=shapes,
        dtypes=tuple(args.dtype),
        cases=tuple(args.cases),
        contenders=tuple(args.contenders),
        model=args.model,
        data=args.data,
        max_length=args.max_length,
        batch=args.batch_size,
    )


def _listed(names: list[str], plan: list[Work]) -> str:
    """Returns the suites with their cases' count and time; with names, every case of these suites."""
    from ..bench.run import left_in_words
    from ..bench.suites import DEFAULT, SUITES

    if names:
        lines = [f"{work.suite:<12} {work.estimate_s:6.0f} s  {work.name}" for work in plan]
        return "\n".join([*lines, f"in all {left_in_words(sum(w.estimate_s for w in plan))} on two cores, by counts"])
    lines = []
    for name, suite in SUITES.items():
        of = [w for w in plan if w.suite == name]
        size = f"{len(of)} cases, {left_in_words(sum(w.estimate_s for w in of))}" if of else "by name only"
        lines.append(f"{'*' if name in DEFAULT else ' '} {name:<12} {size:<28} {suite.about}")
    total = left_in_words(sum(w.estimate_s for w in plan))
    return "\n".join([*lines, f"* runs without SUITE: {total} on two cores, by counts"])


def _report(args: argparse.Namespace, found: Results, old: dict[str, Any] | None) -> int:
    from ..bench import comparison, tables

    text = tables.markdown(found.environment, found.records)
    print(text)
    if args.markdown:
        write_atomically(Path(args.markdown), text.encode())
    if args.plot:
        from ..bench.plots import draw

        for path in draw(found.records, Path(args.plot)):
            print(f"drawn: {path}", file=sys.stderr)
    bad = [f"failed: {key}: {why}" for key, why in found.failures.items()]
    bad += tables.problems(found.records)
    if old is not None and found.records:
        new = found.content()
        for line in comparison.differences(old, new):
            print(f"the earlier run differs: {line}", file=sys.stderr)
        changes = comparison.changes(old, new)
        worse = [c for c in changes if c.worse]
        print(f"{len(changes)} figures compared with {args.compare}, {len(worse)} worse by more than 15%")
        if worse:
            print(f"\n{comparison.comparison_table(changes)}")
        bad += [f"worse than in {args.compare}: {c.key}, {c.contender}" for c in worse if c.ours]
        bad += [f"worse than in {args.compare}: {line}" for line in comparison.lost(old, new)]
    for line in bad:
        print(f"xpo-fast: {line}", file=sys.stderr)
    return 1 if bad else 0


def _kept(args: argparse.Namespace, found: Results) -> str:
    if not args.json:
        return "nothing was written, for there was no --json FILE"
    if not found.records:
        return "no case was finished"
    return f"{args.json} has the {len(found.records)} finished cases, and the same command with --resume goes on"
