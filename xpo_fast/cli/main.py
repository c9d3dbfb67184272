"""Runs the command line: reads the words, runs the command, and turns errors into lines and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from .. import __version__
from ..wording import did_you_mean, one_line
from . import (
    aliases,
    bench,
    cache_reference,
    chat,
    check,
    completion,
    config_file,
    distill,
    eval_reward,
    evaluate,
    fit,
    manual,
    merge,
    rahf,
    recipe,
    report,
    resuming,
    reward,
    rl,
    router,
    train,
    tune,
)
from . import methods as catalogue
from .parser import Given, Options, Parser, UsageError, spelled, split, unknown
from .signals import outliving_readers, terminable
from .typed import around


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns the exit code: 0, 1 (unusable installation), 2 (wrong input, no room to save, or a run that learned nothing
    and was to stop then), 130 (stopped by Ctrl-C), 143 (stopped by SIGTERM).
    """
    # Before torch is imported: its threads would wait by spinning, and take the core that another process needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args, began = argparse.Namespace(), time.time()
    with outliving_readers():
        try:
            with terminable():
                args = parse(list(sys.argv[1:] if argv is None else argv))
                return args.run(args)
        except (*_mistakes(), RuntimeError) as error:
            # Of RuntimeErrors, only those for which torch has no class: memory on the CPU, and another process's end.
            known = isinstance(error, _mistakes()) or _of_memory(error) or _of_another_process(error)
            if getattr(args, "debug", False) or not known:
                raise
            kept = f"; {resuming.kept(args, began)}" if _of_another_process(error) else ""
            for line in (_message(error, args) + kept, *_advice(error, args)):
                print(f"xpo-fast: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            if not getattr(stop, "told", False):
                print(f"xpo-fast: stopped; {resuming.kept(args, began)}", file=sys.stderr)
            return getattr(stop, "status", 130)


def build_parser() -> Parser:
    """Returns the parser of the whole command line; `parsers` returns those of its commands."""
    parser = Parser(
        prog="xpo-fast",
        description="Preference training, supervised fine-tuning and RL of language models, without logits in memory.",
    )
    parser.add_argument("--version", action="version", version=f"xpo-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    trains = (train, check, cache_reference, fit, reward, eval_reward, router, evaluate, rl, distill, rahf, recipe)
    for command in (*trains, report, chat, merge, catalogue):
        command.add_parser(commands)
    _add_doctor(commands)
    tune.add_parser(commands)
    bench.add_parser(commands)
    manual.add_parser(commands, parser)
    completion.add_parser(commands, parser)
    return parser


def parsers(parser: Parser | None = None) -> dict[str, Parser]:
    """Returns the parser of each command by its name."""
    actions = (build_parser() if parser is None else parser)._actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    def run(args: argparse.Namespace) -> int:
        from . import doctor

        return doctor.run(args)

    parser = commands.add_parser("doctor", help="versions, devices, backends, and what is missing")
    about = "check the kernels of triton anew on every GPU, for each dtype, and keep the verdict; exit code 1 if one"
    parser.add_argument("--check", action="store_true", help=f"{about} fails")
    parser.set_defaults(run=run)


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options of a command line, those of its --config included.

    Exits with code 2 and one or two lines on stderr for words that it does not understand.
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
        typed = around(command, parser, words)
        config, given = typed.options.get("config"), []
        if sum(isinstance(g, Given) and g.name == "config" for g in split(words)) > 1:
            raise UsageError("--config came twice; write the options into one file")
        if config is not None and config.values and parser.named("config") is not None:
            given = config_file.words(config.first, command, parser, words)
            typed = around(command, parser, [*given, *words])
        found, off = spelled(parser, words, lambda other: aliases.translate(other, typed))
        found = [word for word in found if not (word.startswith("--") and _dest(parser, word) in off)]
    except UsageError as error:
        parser.error(one_line(error))
    args, extra = parser.parse_known_args([*given, *found], Options(parser))
    if extra:
        parser.error(unknown(parser, extra, aliases.names(typed), commands.values()))
    return args


def _dest(parser: Parser, word: str) -> str | None:
    action = parser.named(word.partition("=")[0])
    return None if action is None else action.dest


def _mistakes() -> tuple[type[BaseException], ...]:
    """Returns the errors that become one line. A module that no command has imported has raised none."""
    late = (("xpo_fast.rewards", "RewardError"), ("xpo_fast.rollout", "RolloutError"), ("torch", "OutOfMemoryError"))
    found = [getattr(sys.modules[module], name) for module, name in late if module in sys.modules]
    return (ValueError, ImportError, OSError, *found)


def _message(error: BaseException, args: argparse.Namespace) -> str:
    """Returns the error in one line; an error of the system about a file names the option that gave the file."""
    if _of_another_process(error):
        rank, ranks = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
        return (
            f"rank {rank} of {ranks} stops: another process of this run has ended. Its last lines say why, unless it "
            f"was killed ({one_line(error):.160})"
        )
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return one_line(error)
    name = str(error.filename)
    values = [(o, v) for o, given in vars(args).items() for v in (given if isinstance(given, list) else [given])]
    given = [(option, value) for option, value in values if isinstance(value, str) and value]
    option = next((o for o, value in given if name == value or name.startswith(value.rstrip("/") + "/")), None)
    said = f"{name}: {error.strerror}"
    return said if option is None else f"--{option.replace('_', '-')} {said}"


def _advice(error: BaseException, args: argparse.Namespace) -> list[str]:
    """Returns further lines that say what to do."""
    if _of_memory(error):
        return _less_memory(args)
    checkpoint = getattr(error, "checkpoint", None)
    if checkpoint is not None and "resume" in args:
        return [f"the last whole checkpoint is {checkpoint}: make room, then go on with the same command and --resume"]
    return []


def _of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in str(error)


def _of_another_process(error: BaseException) -> bool:
    """Returns whether a collective failed because one of the other processes is gone."""
    if not isinstance(error, RuntimeError) or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    said = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "remote process exited",
        "Timed out",
    )
    return type(error).__name__ in ("DistNetworkError", "DistBackendError") or any(text in str(error) for text in said)


def _less_memory(args: argparse.Namespace) -> list[str]:
    """Returns what to do after memory ran out, by the options that the command has."""
    if not hasattr(args, "batch_size"):
        return []
    halve = "halve --batch-size"
    if hasattr(args, "grad_accum"):
        halve += " and double --grad-accum, which trains the same"
    names = (
        "generation_batch_size",
        "gradient_checkpointing",
        "max_length",
        "max_new_tokens",
        "tokens_per_batch",
        "tile_mib",
    )
    named = {name: f"--set {name}=N" for name in getattr(args, "parser", Parser).settings}
    named |= {name: f"--{name.replace('_', '-')}" for name in names if hasattr(args, name)}
    others = ", ".join(named[name] for name in names if name in named)
    return [f"{halve}; or use {others}" if others else halve]
