"""Checks options before data and model are loaded: numbers, names, packages, folders, the hub."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import check_writable
from ..wording import did_you_mean
from . import options
from .loading import read_template
from .options import TRAINER_ARGUMENTS
from .parser import UsageError
from .settings import check_like

# What numbers must be, in words and as a condition.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "batch_size grad_accum lora_rank logging_steps save_steps save_total_limit eval_steps eval_batch_size num_proc "
    "max_pairs tokens_per_batch": ("at least 1", lambda x: x >= 1),
    "lr epochs lora_alpha tile_mib value_head_lr": ("positive", lambda x: 0 < x < math.inf),
    "warmup_ratio": ("a share in [0, 1)", lambda x: 0 <= x < 1),
    # transformers reads a value of 1 and more as steps, and below 1 as a share.
    "warmup_steps": (
        "a number of steps, or a share of them below 1",
        lambda x: 0 <= x < math.inf and (x < 1 or x == int(x)),
    ),
    "max_steps": ("at least 1, or -1 for --epochs", lambda x: x >= 1 or x == -1),
    "seed": ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    "lora_dropout": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "weight_decay max_grad_norm": ("at least 0", lambda x: 0 <= x < math.inf),
}


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for options of any command: numbers, files to read, folders to write into, reporters."""
    given = vars(args)
    for names, (expected, holds) in _NUMBERS.items():
        for name in names.split():
            if (value := given.get(name)) is not None and not holds(value):
                raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {value:.15g}")
    if given.get("backend", "auto") != "auto":
        from ..head.backends import get_backend

        try:
            get_backend(args.backend)
        except ValueError as error:
            raise UsageError(f"--backend: {error}") from error
    if given.get("chat_template") is not None:
        read_template(args.chat_template)
    if not given.get("dry_run", False):
        for option in ("output_dir", "ref_cache"):
            if given.get(option) is not None:
                check_writable(Path(given[option]), f"--{option.replace('_', '-')}")
    if given.get("report_to", "none") != "none":
        from ..reporters import check_reporters

        check_reporters(args.report_to)


def check_training(args: argparse.Namespace, arguments: dict[str, Any]) -> None:
    """Raises UsageError for options of a training command. arguments: see `training.training_arguments`."""
    check(args)
    check_further(args)
    check_quantisation(args)
    check_names(args)
    if args.eval_steps is not None and not args.eval_data and args.eval_split == 0:
        raise UsageError(
            "--eval-steps evaluates rows held out, and there are none with --eval-split 0: leave --eval-steps out, "
            "or hold out rows by --eval-split or --eval-data"
        )
    if args.optim or any(options.levers(args).values()):
        check_levers(args, arguments)
    if args.push_to_hub:
        check_hub()
    elif args.hub_private:
        raise UsageError("--hub-private is for --push-to-hub")


def check_names(args: argparse.Namespace) -> None:
    """Raises UsageError for an optimizer or a schedule that transformers does not know."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for option, what, known in (("scheduler", "schedule", SchedulerType), ("optim", "optimizer", OptimizerNames)):
        value, names = getattr(args, option), [entry.value for entry in known]
        if value is not None and value not in names:
            near = did_you_mean(value, names)
            there = f"{' There' if near else '; there'} are {', '.join(names)}"
            raise UsageError(f"--{option}: no {what} named {value!r}{near}{there}")


def check_further(args: argparse.Namespace) -> None:
    """Raises UsageError for names and values of --train."""
    from transformers import TrainingArguments

    fields = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    for name, value in args.train:
        if name not in TRAINER_ARGUMENTS:
            raise UsageError(
                f"--train {name}: it takes {', '.join(TRAINER_ARGUMENTS)}{did_you_mean(name, TRAINER_ARGUMENTS)}"
            )
        check_like(f"--train {name}", fields[name].default, value)
        if fields[name].type in (str, str | None) and not (value is None or type(value) is str):
            raise UsageError(
                f"--train {name}: expected text, got {value!r}; write it as an option of its own, --{name} {value}"
            )


def check_levers(args: argparse.Namespace, arguments: dict[str, Any]) -> None:
    """Raises UsageError for an optimizer or a lever of memory that cannot be had, see `trainer.optimizers`."""
    from ..trainer import MethodConfig
    from ..trainer.optimizers import check_optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the trainer's own arguments
        cut = {"tokens_per_batch": args.tokens_per_batch}
        try:
            check_optimizer(MethodConfig(**cut, **options.levers(args), **arguments))
        except ValueError as error:
            raise UsageError(str(error)) from error


def check_quantisation(args: argparse.Namespace) -> None:
    """Raises UsageError for --quantize of trained weights, or without bitsandbytes."""
    if args.quantize is None:
        return
    option = f"--quantize {args.quantize}"
    if args.full or getattr(args, "head_only", False):
        other = "--full" if args.full else "--head-only"
        raise UsageError(f"{option} freezes the weights and trains an adapter: leave {other} out")
    if (Path(args.model) / "adapter_config.json").is_file():
        raise UsageError(
            f"{option}: {args.model} is an adapter, and merging it into quantised weights would round it away; merge "
            "it first: xpo_fast.models.load_model, save_pretrained"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{option} needs bitsandbytes: pip install bitsandbytes")


def check_hub() -> None:
    """Raises UsageError if the hub does not answer or does not know the token, before hours of training."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "--push-to-hub: the hub is switched off by HF_HUB_OFFLINE; unset it, or leave --push-to-hub out"
        )
    if huggingface_hub.get_token() is None:
        raise UsageError("--push-to-hub: no token; log in with `hf auth login`, or set HF_TOKEN to one that may write")
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # each client of the hub has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"--push-to-hub: the hub does not answer or does not know the token ({reason}); log in with `hf auth "
            "login`, or leave --push-to-hub out and upload later with `hf upload`"
        ) from error
