"""`xpo-fast report`: writes one page of HTML about a run, or about several compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import options
from .parser import UsageError

PAGE, COMPARISON = "report.html", "comparison.html"


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast report`."""
    parser = commands.add_parser(
        "report",
        help="one page of HTML about a run: curves, figures before and after, samples, settings",
        description="Write one page of HTML about a run of train, reward, rl or recipe, finished or not. It needs no "
        "network: curves, rewards and KL, figures and samples before and after, what the preflight found, throughput "
        "and memory, the configuration, and how to reproduce it. Of several runs: the same curves overlaid, final "
        "figures side by side, and the options that differ.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output-dir of a run; several are compared")
    add = options.adder(parser)
    add("--output FILE", f"the page (default: {PAGE} in the run's folder; of several runs, {COMPARISON} here)")
    add("--samples N", "pairs of samples to show", 12)
    add("--debug", "show the traceback of an error", False)


def run(args: argparse.Namespace) -> int:
    """Reads the runs and writes the page."""
    if args.samples < 0:
        raise UsageError(f"--samples must be at least 0, got {args.samples}")

    from ..files import size, write_atomically
    from ..report import read_run, render

    runs = [read_run(folder) for folder in args.runs]
    one = len(runs) == 1
    path = Path(args.output) if args.output else Path(args.runs[0]) / PAGE if one else Path(COMPARISON)
    if path.is_dir():
        raise UsageError(f"--output {path}: a folder; name a file in it, such as {path / PAGE}")
    page = render(runs, samples=args.samples).encode()
    write_atomically(path, page)
    for folder, found in zip(args.runs, runs, strict=True):
        for note in found.notes:
            print(f"{folder}: {note}")
    print(f"{path}: {size(len(page))}, open it in a browser")
    return 0
