"""`xpo-fast cache-reference`: computes the reference's log-probs of a run of `xpo-fast train` before it."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import Any

from . import checks, options, train, training
from .parser import Options, UsageError, option

_OF_THE_PLACE = ("reference", "ref_cache", "output_dir", "config", "debug", "preflight", "fit", "dry_run")


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast cache-reference`."""
    parser = commands.add_parser(
        "cache-reference",
        help="compute a run's reference log-probs before it, for train --reference cached",
        description="Compute the reference's log-probs of the rows of a run of `xpo-fast train` into --ref-cache; "
        "that run reads them by --reference cached and computes none. It takes the options of train, so that the verb "
        "of a command can be replaced. The folder may be made on another machine, by another number of processes and "
        "in another layout of the model than the run, and copied. A command that was stopped goes on where it was.",
    )
    parser.set_defaults(run=run, dry_run=False)
    options.add_config(parser, dry_run=False)
    about = "accepted from the configuration of a run; this command checks the model's head alone"
    options.add_option(parser, "--preflight", about, "warn", choices=options.PREFLIGHT)
    train.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Computes, and says where the log-probs are and which command reads them."""
    if args.reference not in ("auto", "cached"):
        raise UsageError(f"--reference {args.reference}: this command makes the cached one; leave it out")
    args.reference = "cached"
    objective = train.checked_objective(args.method, dict(args.set))

    from torch import nn

    from ..trainer.reference import choose

    choose("cached", objective, nn.Module())  # before a model is loaded
    command = _train_command(args)
    with tempfile.TemporaryDirectory(prefix="xpo_fast-cache-") as folder:
        args.output_dir, args.report_to, args.push_to_hub, args.preflight = folder, "none", None, "off"
        checks.check_training(args, training.training_arguments(args, lr=train.learning_rate(args), evaluates=False))
        training.quiet(args)
        trainer = train.trainer_of(args, *train.read_rows(args, objective))
        trainer.prepare()
        found = trainer.reference_folder
    assert found is not None
    rows = len(trainer.train_dataset) + (0 if trainer.eval_dataset is None else len(trainer.eval_dataset))
    say = training.printer(trainer)
    say(f"reference log-probs of {rows:,} rows in {found.parent}, key {found.name}; they are read by")
    say(command.format(shlex.quote(str(found.parent))))
    return 0


def _train_command(args: argparse.Namespace) -> str:
    """Returns the command that reads the cache, with {} for its folder, and every option that is not a default."""
    assert isinstance(args, Options)
    words = ["xpo-fast", "train"]
    for action in args.parser.documented():
        value = getattr(args, action.dest, action.default)
        if action.dest in _OF_THE_PLACE or value == action.default:
            continue
        if value is True:
            words.append(option(action))
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [option(action), _typed(one)]
    if args.output_dir != args.parser.get_default("output_dir"):
        words += ["--output-dir", str(Path(args.output_dir))]
    return f"{shlex.join(words).replace('{', '{{').replace('}', '}}')} --reference cached --ref-cache {{}}"


def _typed(value: Any) -> str:
    """Returns a value of an option as it is typed: NAME=VALUE for a setting, names of columns with commas."""
    if isinstance(value, tuple):
        return f"{value[0]}={value[1]}"
    if isinstance(value, dict):
        return ",".join(f"{name}={x}" for name, x in value.items())
    return str(value)
