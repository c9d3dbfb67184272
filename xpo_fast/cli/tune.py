"""`xpo-fast tune`: measures on the GPU at hand how each Triton kernel is launched fastest, and keeps the result."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..wording import did_you_mean, one_line
from . import options

if TYPE_CHECKING:
    import torch

    from ..kernels.timing import Trial  # pyright: ignore[reportMissingImports]


def add_parser(commands: Any) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest launches of the Triton kernels on this GPU",
        description="Time every candidate launch of every Triton kernel on the GPU at hand, refuse those whose results "
        "differ from the default's, and keep the fastest in $XPO_FAST_CACHE/tuning.json (~/.cache/xpo_fast). A process "
        "reads that file once: tune before you train. Exit code 1: a problem could not be tuned; 2: there is no GPU.",
    )
    vocabs, tokens = [32000, 128256, 151936], [4096, 1024, 16384]
    counts = "numbers of rows; all but the first are used only where the choice depends on it"
    add = parser.add_argument
    add("--vocab", nargs="+", type=int, default=vocabs, metavar="V", help=f"vocabulary sizes {_default(vocabs)}")
    dtypes = {"choices": options.DTYPES[1:], "default": ["bfloat16"]}
    add("--dtype", nargs="+", **dtypes, help="dtypes of the operands (default: bfloat16)")
    add("--kernels", nargs="+", metavar="NAME", help="tune only these launches (default: all)")
    add("--tokens", nargs="+", type=int, default=tokens, metavar="N", help=f"{counts} {_default(tokens)}")
    add("--width", type=int, default=4096, metavar="D", help="width of the hidden states")
    add("--repeats", type=int, default=30, metavar="N", help="timed calls per candidate")
    parser.set_defaults(run=run)


def _default(values: Sequence[object]) -> str:
    return f"(default: {' '.join(map(str, values))})"


def load() -> list[str]:
    """Imports every file that declares launches, and returns the names of the launches."""
    from ..head import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from ..kernels import gates, launch  # pyright: ignore[reportMissingImports]

    gates.modules()
    return launch.tunables()


def run(args: argparse.Namespace) -> int:
    """Tunes what the options ask for; returns 1 if a problem could not be tuned, 2 if there is no GPU."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError("tune needs the package triton, which is for Linux: install it")
    import torch

    from ..kernels import launch, timing  # pyright: ignore[reportMissingImports]

    device = _gpu()
    if device is None:
        print("no GPU to tune for (or TRITON_INTERPRET is set): fixed defaults stay in use", file=sys.stderr)
        return 2
    names = load()
    for name in args.kernels or ():
        if name not in names:
            raise ValueError(f"no launch named {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    work: dict[tuple[str, launch.Key], launch.Problem] = {}
    for name in args.kernels or names:
        for dtype in args.dtype:
            for vocab in args.vocab:
                for n in args.tokens:
                    workload = launch.Workload(vocab, getattr(torch, dtype), n, args.width, device)
                    for problem in launch.tunable(name).problems(workload):
                        work.setdefault((name, problem.key), problem)
    failed = 0
    for n, ((name, key), problem) in enumerate(work.items(), 1):
        print(f"[{n}/{len(work)}] {name}: {', '.join(map(str, key))}", flush=True)
        try:
            trials = timing.time_candidates(name, problem, device, timer=timing.time_with_events, repeats=args.repeats)
        except Exception as error:  # memory may run out: the other problems can still be tuned
            failed += 1
            print(f"  not tuned, {one_line(error)[:200]}", flush=True)
            continue
        best = min((t for t in trials if t.time_ms is not None), key=lambda t: t.time_ms or 0.0)
        print(_table(trials, best), flush=True)
        # Saved at once: an interrupted run keeps what it has measured.
        launch.save({launch.entry(name, device, key): launch.encoded(best.choice)})
    print(f"{len(work) - failed} tuned, {failed} failed; {launch.TUNING.path}")
    return 1 if failed else 0


def _gpu() -> torch.device | None:
    import torch
    from triton import knobs

    if knobs.runtime.interpret or not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def _table(trials: Sequence[Trial], best: Trial) -> str:
    """Returns one line per candidate: its time and how it compares with the default, or why it was refused."""
    default_ms = trials[0].time_ms
    assert default_ms is not None
    names = [str(trial.choice) for trial in trials]
    width = max(map(len, names))
    lines = []
    for name, trial in zip(names, trials):
        if trial.time_ms is None:
            lines.append(f"  {name:<{width}}  refused: {trial.refused}")
        else:
            note = " default" * (trial is trials[0]) + " fastest" * (trial is best)
            lines.append(f"  {name:<{width}}  {trial.time_ms:9.4f} ms  {default_ms / trial.time_ms:5.2f}x{note}")
    return "\n".join(lines)
