"""`xpo-fast completion`: the script by which a shell completes commands, options, files and names."""

from __future__ import annotations

import argparse
import sys
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_FILES = ("data", "eval_data", "ptx_data", "held_out_data", "config", "chat_template")
_FOLDERS = ("model", "output_dir", "resume", "ref_cache", "reward_model", "policy", "server_lora")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "completion", help="tab completion for bash, zsh or fish", allow_abbrev=False,
        description="Print the script that completes commands, options, files and names, for example: xpo-fast completion bash "
        "> ~/.local/share/bash-completion/completions/xpo-fast",
    )  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, metavar="bash|zsh|fish", help="the shell that it is for")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script of a shell."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError(f"completion needs shtab: pip install 'xpo-fast[train]' ({error})") from error
    from . import build_parser, parsers

    whole = build_parser()
    for name, parser in parsers(whole).items():
        actions: list[Any] = parser._actions  # shtab reads an attribute that argparse does not declare
        for action in actions:
            if action.dest in _FILES:
                action.complete = shtab.FILE
            elif action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.choices is None and (names := _names(name, action.dest)):
                action.choices = names
    sys.stdout.write(shtab.complete(whole, shell=args.shell).rstrip("\n") + "\n")
    return 0


def _names(command: str, dest: str) -> list[str] | None:
    """The names that an option of a command takes, where the parser leaves them to who reads them later."""
    if dest in ("method", "card"):
        from ..methods import METHODS

        layouts = {"train": ("pairwise", "listwise", "unpaired"), "rl": ("policy",)}.get(command)
        return sorted(name for name, m in METHODS.items() if layouts is None or m.layout in layouts)
    if (command, dest) == ("recipe", "name"):
        from ..recipes import RECIPES

        return list(RECIPES)
    if (command, dest) == ("help", "command"):
        from . import parsers

        return list(parsers())
    if dest in ("optim", "scheduler"):
        try:
            from transformers.trainer_utils import SchedulerType
            from transformers.training_args import OptimizerNames
        except ImportError:  # without it there is nothing to train with
            return None
        return [entry.value for entry in (OptimizerNames if dest == "optim" else SchedulerType)]
    return None
