"""The command `xpo-fast`: train, reward and rl make models, eval-reward measures them, recipe repeats it all; methods and
doctor tell what there is. One module a command; they share options.py and the steps in training.py. Nothing here imports transformers
before a command needs it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from .. import __version__, catalogue, doctor
from ..doctor import one_line
from . import recipe, reward, rl, train, training
from .streams import outliving_readers

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0, 1 (unusable installation), 2 (wrong input, or no room to save), 130 (stopped by Ctrl-C), 143
    (stopped by SIGTERM).
    """
    args, began = build_parser().parse_args(argv), time.time()
    with outliving_readers():
        try:
            with training.terminable():
                return args.run(args)
        except (*_mistakes(), RuntimeError) as error:
            # Of errors at large those about memory on the CPU, for which torch has no class of their own.
            if getattr(args, "debug", False) or not (isinstance(error, _mistakes()) or _of_memory(error)):
                raise
            for line in (_told(error, args), *_advice(error, args)):
                print(f"xpo-fast: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            if not getattr(stop, "told", False):
                print(f"xpo-fast: stopped; {training.kept(args, began)}", file=sys.stderr)
            return getattr(stop, "status", 130)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xpo-fast", description="Preference training without logits in memory.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"xpo-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for room in (train, reward, rl, recipe, catalogue, doctor):
        room.add_parser(commands)
    return parser


def _mistakes() -> tuple[type[BaseException], ...]:
    """What is one line for the user. Of a module that no command has imported there is no error to catch."""
    late = (("xpo_fast.rewards", "RewardError"), ("xpo_fast.rollout", "RolloutError"))
    found = [getattr(sys.modules[module], name) for module, name in late if module in sys.modules]
    return (ValueError, ImportError, OSError, torch.OutOfMemoryError, *found)


def _told(error: BaseException, args: argparse.Namespace) -> str:
    """The error in one line; the system's own about a file names the option that the file was given by."""
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return one_line(error)
    name = str(error.filename)
    given = [(option, value) for option, value in vars(args).items() if isinstance(value, str) and value]
    option = next(
        (o for o, value in given if name == value or name.startswith(value.rstrip("/") + "/")), None
    )
    said = f"{name}: {error.strerror}"
    return said if option is None else f"--{option.replace('_', '-')} {said}"


def _advice(error: BaseException, args: argparse.Namespace) -> list[str]:
    """Further lines on what to do."""
    if _of_memory(error):
        return [line for line in [_less_memory(args)] if line]
    checkpoint = getattr(error, "checkpoint", None)
    if checkpoint is not None and "resume" in args:
        return [
            f"the last whole checkpoint is {checkpoint}: make room, then go on with the same command and --resume"
        ]
    return []


def _of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def _less_memory(args: argparse.Namespace) -> str | None:
    """What to do where memory ran out, by the options that the command has."""
    if not hasattr(args, "batch_size"):
        return None
    halve = "halve --batch-size"
    if hasattr(args, "grad_accum"):
        halve += " and double --grad-accum, which trains the same"
    names = ("generation_batch_size", "gradient_checkpointing", "max_length", "max_new_tokens", "tile_mib")
    others = ", ".join(f"--{name.replace('_', '-')}" for name in names if hasattr(args, name))
    return f"{halve}; or use {others}" if others else halve
