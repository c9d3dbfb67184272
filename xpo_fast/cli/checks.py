"""Checks options before data and model are loaded: numbers, names, packages, folders, the hub."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

from ..files import check_writable
from ..wording import did_you_mean
from .loading import read_template
from .options import TRAINER_ARGUMENTS
from .parser import UsageError
from .settings import check_like

_AT_LEAST_ONE = (
    *("batch_size", "grad_accum", "lora_rank", "logging_steps", "save_steps", "save_total_limit", "eval_steps"),
    *("eval_batch_size", "num_proc", "max_pairs"),
)
_POSITIVE = ("lr", "epochs", "lora_alpha", "tile_mib", "value_head_lr")


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for options of any command: numbers, files to read, folders to write into, reporters."""
    _check_numbers(args)
    given = vars(args)
    if not 0 <= given.get("seed", 0) < 2**32:
        raise UsageError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    if not 0 <= given.get("lora_dropout", 0) < 1:
        raise UsageError(f"--lora-dropout must be at least 0 and below 1, got {args.lora_dropout}")
    for name in ("weight_decay", "max_grad_norm"):
        if not 0 <= given.get(name, 0) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0, got {given[name]}")
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
    if args.optim:
        check_optimizer(args.optim, arguments)
    if args.push_to_hub:
        check_hub()
    elif args.hub_private:
        raise UsageError("--hub-private is for --push-to-hub")


def _check_numbers(args: argparse.Namespace) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in _POSITIVE:
        value = getattr(args, name, None)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("warmup_ratio", "warmup_steps"):
        value = getattr(args, name, None)
        bound = 1 if name == "warmup_ratio" else math.inf
        # transformers reads a value of 1 and more as steps, and below 1 as a share.
        if value is not None and not (0 <= value < bound and (value < 1 or value == int(value))):
            expected = "a share in [0, 1)" if bound == 1 else "a number of steps, or a share of them below 1"
            raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {value:g}")
    steps = getattr(args, "max_steps", -1)
    if steps == 0 or steps < -1:
        raise UsageError(f"--max-steps must be at least 1, or -1 for --epochs; got {steps}")


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


def check_optimizer(name: str, arguments: dict[str, Any]) -> None:
    """Takes a step of the optimizer on a small matrix; raises UsageError if its package or device is missing."""
    import torch
    from transformers import Trainer, TrainingArguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages when they are imported
        given = TrainingArguments(**arguments)
        try:
            layer: Any = torch.nn.Linear(
                128, 128, bias=False, device=given.device
            )  # large enough for optimizers that quantise
            optimizer, keywords = Trainer.get_optimizer_cls_and_kwargs(given, layer)
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer(layer.parameters(), **keywords).step()
        except Exception as error:  # any package may provide the optimizer
            raise UsageError(
                f"--optim {name} does not work here: {str(error).strip() or type(error).__name__}"
            ) from error


def check_quantisation(args: argparse.Namespace) -> None:
    """Raises UsageError for --load-in-4bit and --load-in-8bit of trained weights, or without bitsandbytes."""
    if not (args.load_in_4bit or args.load_in_8bit):
        return
    option = "--load-in-4bit" if args.load_in_4bit else "--load-in-8bit"
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"--push-to-hub: the hub does not answer or does not know the token ({reason}); log in with `hf auth "
            "login`, or leave --push-to-hub out and upload later with `hf upload`"
        ) from error
