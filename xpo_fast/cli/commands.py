"""Builds the parser of the command line, with a parser for each command."""

from __future__ import annotations

import argparse

from .. import __version__
from . import completion, eval_reward, manual, recipe, reward, rl, train, tune
from . import methods as catalogue
from .parser import Parser


def build_parser() -> Parser:
    """Returns the parser of the whole command line; `parsers` returns those of its commands."""
    parser = Parser(
        prog="xpo-fast",
        description="Preference training, supervised fine-tuning and RL of language models, without logits in memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"xpo-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, reward, eval_reward, rl, recipe, catalogue):
        command.add_parser(commands)
    _add_doctor(commands)
    tune.add_parser(commands)
    manual.add_parser(commands, parser)
    completion.add_parser(commands, parser)
    return parser


def parsers(parser: Parser | None = None) -> dict[str, Parser]:
    """Returns the parser of each command by its name."""
    actions = (build_parser() if parser is None else parser)._actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser("doctor", help="versions, devices, backends, and what is missing", allow_abbrev=False)
    doctor.add_argument(
        "--check",
        action="store_true",
        help="check the kernels of triton anew on every GPU, for each dtype, and keep the verdict; exit code 1 if "
        "one fails",
    )
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import run

    return run(args)
