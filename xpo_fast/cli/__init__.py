"""The command `xpo-fast`: train, reward and rl make models, eval-reward measures them, recipe repeats it all; methods and
doctor tell what there is; help and completion are about the command itself.

One module per command; they share options.py, the checks in checks.py and the steps in training.py. What is typed is brought
into the form that the parser declares (parser.py, aliases.py, config_file.py). Nothing here imports torch or transformers
before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from .. import __version__
from ..wording import did_you_mean, one_line
from . import aliases, completion, config_file, manual, recipe, reward, rl, train, training, tune
from .options import UsageError
from .parser import Given, Parser, spelled, split, unknown
from .streams import outliving_readers

__all__ = ["build_parser", "main", "parse", "parsers"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0, 1 (unusable installation), 2 (wrong input, or no room to save), 130 (stopped by Ctrl-C), 143
    (stopped by SIGTERM).
    """
    # Before torch is imported: its threads wait by spinning otherwise, and take the core that another process needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args, began = argparse.Namespace(), time.time()
    with outliving_readers():
        try:
            with training.terminable():
                args = parse(list(sys.argv[1:] if argv is None else argv))
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


def build_parser() -> Parser:
    """Return the parser of the whole command line, whose commands are parsers of their own, see `parsers`."""
    parser = Parser(
        prog="xpo-fast",
        description="Preference training, supervised fine-tuning and RL of language models, without logits in memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"xpo-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for room in (train, reward, rl, recipe):
        room.add_parser(commands)
    _add_told(commands)
    tune.add_parser(commands)
    manual.add_parser(commands)
    completion.add_parser(commands)
    return parser


def parsers(parser: Parser | None = None) -> dict[str, Parser]:
    """Return the parser of each command by its name."""
    actions = (build_parser() if parser is None else parser)._actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options that a command line asks for, those of its --config included.

    Exits with code 2 and a line or two on stderr for what cannot be understood.
    """
    whole = build_parser()
    commands = parsers(whole)
    command, words = (argv[0], argv[1:]) if argv else ("", [])
    if command not in commands:
        if command and not command.startswith("-"):
            near = did_you_mean(command, commands)
            whole.error(
                f"no command named {command!r}{near}{' There' if near else '; there'} are {', '.join(commands)}"
            )
        if command.startswith("-") and whole.named(command) is None and command != "-h":
            whole.error(unknown(whole, argv, (), commands.values()))
        return whole.parse_args(argv)
    parser = commands[command]
    try:
        typed = aliases.around(command, parser, words)
        config = typed.options.get("config")
        if sum(isinstance(g, Given) and g.name == "config" for g in split(words)) > 1:
            raise UsageError("--config came twice; write the options into one file")
        if config is not None and config.values and parser.named("config") is not None:
            given = config_file.words(config.values[0], command, parser, words)
            typed = aliases.around(command, parser, [*given, *words])
        else:
            given = []
        found, off = spelled(parser, words, lambda other: aliases.translate(other, typed))
        found = [word for word in found if not (word.startswith("--") and _dest(parser, word) in off)]
    except UsageError as error:
        parser.error(one_line(error))
    args, extra = parser.parse_known_args([*given, *found])
    if extra:
        parser.error(unknown(parser, extra, aliases.names(typed), commands.values()))
    return args


def _dest(parser: Parser, word: str) -> str | None:
    action = parser.named(word.partition("=")[0])
    return None if action is None else action.dest


def _add_told(commands: argparse._SubParsersAction) -> None:
    """Add the commands that print what there is."""
    from . import methods as catalogue

    catalogue.add_parser(commands)
    doctor = commands.add_parser("doctor", help="versions, devices, backends, and what is missing", allow_abbrev=False)
    doctor.add_argument(
        "--check",
        action="store_true",
        help="check the kernels of triton anew on every GPU, for each dtype, and keep the verdict; exit code 1 if one fails",
    )
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import run

    return run(args)


def _mistakes() -> tuple[type[BaseException], ...]:
    """What is one line for the user. Of a module that no command has imported there is no error to catch."""
    late = (
        ("xpo_fast.rewards", "RewardError"),
        ("xpo_fast.rollout", "RolloutError"),
        ("torch", "OutOfMemoryError"),
    )
    found = [getattr(sys.modules[module], name) for module, name in late if module in sys.modules]
    return (ValueError, ImportError, OSError, *found)


def _told(error: BaseException, args: argparse.Namespace) -> str:
    """The error in one line; the system's own about a file names the option that the file was given by."""
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return one_line(error)
    name = str(error.filename)
    values = [(o, v) for o, given in vars(args).items() for v in (given if isinstance(given, list) else [given])]
    given = [(option, value) for option, value in values if isinstance(value, str) and value]
    option = next((o for o, value in given if name == value or name.startswith(value.rstrip("/") + "/")), None)
    said = f"{name}: {error.strerror}"
    return said if option is None else f"--{option.replace('_', '-')} {said}"


def _advice(error: BaseException, args: argparse.Namespace) -> list[str]:
    """Further lines on what to do."""
    if _of_memory(error):
        return [line for line in [_less_memory(args)] if line]
    checkpoint = getattr(error, "checkpoint", None)
    if checkpoint is not None and "resume" in args:
        return [f"the last whole checkpoint is {checkpoint}: make room, then go on with the same command and --resume"]
    return []


def _of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in str(error)


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
