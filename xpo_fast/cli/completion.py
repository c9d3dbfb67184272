"""`xpo-fast completion`: prints the script by which a shell completes commands, options, files and names."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from .parser import Parser

_FILES = ("data", "eval_data", "ptx_data", "held_out_data", "config", "chat_template")
_FOLDERS = (
    "model",
    "teacher",
    "output_dir",
    "resume",
    "ref_cache",
    "reward_model",
    "policy",
    "server_lora",
    "server_folder",
    "server_weights",
)


def add_parser(commands: Any, whole: Parser) -> None:
    """Adds `xpo-fast completion`. whole: the parser that has the commands."""
    parser = commands.add_parser(
        "completion",
        help="tab completion for bash, zsh or fish",
        description="Print the script that completes commands, options, files and names, for example: xpo-fast "
        "completion bash > ~/.local/share/bash-completion/completions/xpo-fast",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="bash|zsh|fish", help="the shell")
    parser.set_defaults(run=partial(run, whole, commands.choices))


def run(whole: Parser, commands: dict[str, Parser], args: argparse.Namespace) -> int:
    """Prints the script of a shell."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError(f"completion needs shtab: pip install 'xpo-fast[train]' ({error})") from error
    for name, parser in commands.items():
        actions: list[Any] = parser._actions  # shtab reads an attribute that argparse does not declare
        for action in actions:
            if action.dest in _FILES:
                action.complete = shtab.FILE
            elif action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.choices is None and (names := _names(name, action.dest, commands)):
                action.choices = names
    sys.stdout.write(shtab.complete(whole, shell=args.shell).rstrip("\n") + "\n")
    return 0


def _names(command: str, dest: str, commands: dict[str, Parser]) -> list[str] | None:
    """Returns the names that an option of a command takes, if the parser does not know them."""
    if dest in ("method", "card"):
        from ..methods import METHODS

        rows, sampled = ("pairwise", "listwise", "unpaired"), ("policy",)
        layouts = {"train": rows, "check": (*rows, *sampled), "rl": sampled}.get(command)
        return sorted(name for name, m in METHODS.items() if layouts is None or m.layout in layouts)
    if dest == "backend":
        from ..head.backends import BACKENDS

        return ["auto", *BACKENDS]
    if (command, dest) == ("recipe", "name"):
        from ..recipes import RECIPES

        return list(RECIPES)
    if (command, dest) == ("help", "command"):
        return list(commands)
    if dest in ("optim", "scheduler"):
        try:
            from transformers.trainer_utils import SchedulerType
            from transformers.training_args import OptimizerNames
        except ImportError:  # without it nothing can be trained
            return None
        return [entry.value for entry in (OptimizerNames if dest == "optim" else SchedulerType)]
    return None
