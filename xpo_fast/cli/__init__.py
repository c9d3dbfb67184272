"""The command `xpo-fast`: train, reward and rl make models, eval-reward measures them, recipe repeats it all; methods and
doctor tell what there is. One module a command; they share options.py and the steps in training.py. Nothing here imports transformers
before a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from .. import __version__, catalogue, doctor
from ..doctor import one_line
from . import recipe, reward, rl, train

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (unusable installation), 2 (wrong input), 130 (stopped)."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader, `head` perhaps, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _mistakes() as error:
        if getattr(args, "debug", False):
            raise
        print(f"xpo-fast: {one_line(error)}", file=sys.stderr)
        if isinstance(error, torch.OutOfMemoryError) and (advice := _less_memory(args)):
            print(f"xpo-fast: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("xpo-fast: stopped; finished checkpoints and reference log-probs are kept", file=sys.stderr)
        return 130


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
