"""What is known to be wrong before data and model are loaded: names, packages, devices, the hub."""

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
from . import options
from .options import TRAINER_ARGUMENTS, UsageError


def check(args: argparse.Namespace) -> None:
    """Check the options of any command: numbers, files to read, folders to write into, packages that report."""
    options.check_numbers(args)
    given = vars(args)
    if not 0 <= given.get("seed", 0) < 2**32:
        raise UsageError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    if not 0 <= given.get("lora_dropout", 0) < 1:
        raise UsageError(f"--lora-dropout must be at least 0 and below 1, got {args.lora_dropout}")
    for name in ("weight_decay", "max_grad_norm"):
        if not 0 <= given.get(name, 0) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0, got {given[name]}")
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
    """Check the options of a training command. arguments: those of TrainingArguments, see `training.training_arguments`."""
    check(args)
    check_further(args)
    check_quantisation(args)
    check_names(args)
    if args.eval_steps is not None and not args.eval_data and args.eval_split == 0:
        raise UsageError(
            "--eval-steps evaluates rows held out, and there are none with --eval-split 0: leave --eval-steps out, or hold "
            "out rows by --eval-split or --eval-data"
        )
    if args.optim:
        check_optimizer(args.optim, arguments)
    if args.push_to_hub:
        check_hub()
    elif args.hub_private:
        raise UsageError("--hub-private is for --push-to-hub")


def read_template(name: str) -> str:
    """Return the text of a chat template."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--chat-template {name}: {reason}; expected the file of a Jinja template") from error


def check_names(args: argparse.Namespace) -> None:
    """Check the optimizer's and the scheduler's names."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for option, what, known in (
        ("scheduler", "schedule", SchedulerType),
        ("optim", "optimizer", OptimizerNames),
    ):
        value, names = getattr(args, option), [entry.value for entry in known]
        if value is not None and value not in names:
            near = did_you_mean(value, names)
            there = f"{' There' if near else '; there'} are {', '.join(names)}"
            raise UsageError(f"--{option}: no {what} named {value!r}{near}{there}")


def check_further(args: argparse.Namespace) -> None:
    """Check the names and the values of --train."""
    from transformers import TrainingArguments

    fields = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    for name, value in args.train:
        if name not in TRAINER_ARGUMENTS:
            raise UsageError(
                f"--train {name}: it takes {', '.join(TRAINER_ARGUMENTS)}{did_you_mean(name, TRAINER_ARGUMENTS)}"
            )
        options.check_like(f"--train {name}", fields[name].default, value)
        if fields[name].type in (str, str | None) and not (value is None or type(value) is str):
            raise UsageError(
                f"--train {name}: expected text, got {value!r}; write it as an option of its own, --{name} {value}"
            )


def check_optimizer(name: str, arguments: dict[str, Any]) -> None:
    """Make the optimizer and take a step with it on a small matrix: its package and its device are there, or UsageError."""
    import torch
    from transformers import Trainer, TrainingArguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages say of themselves when they are imported
        given = TrainingArguments(**arguments)
        try:
            layer: Any = torch.nn.Linear(128, 128, bias=False, device=given.device)  # as many as are quantised
            made, options = Trainer.get_optimizer_cls_and_kwargs(given, layer)
            layer.weight.grad = torch.ones_like(layer.weight)
            made(layer.parameters(), **options).step()
        except Exception as error:  # of any package that an optimizer comes from
            raise UsageError(
                f"--optim {name} does not work here: {str(error).strip() or type(error).__name__}"
            ) from error


def check_quantisation(args: argparse.Namespace) -> None:
    """Check --load-in-4bit and --load-in-8bit against what is trained, and that bitsandbytes is there."""
    if not (args.load_in_4bit or args.load_in_8bit):
        return
    option = "--load-in-4bit" if args.load_in_4bit else "--load-in-8bit"
    if args.full or getattr(args, "head_only", False):
        other = "--full" if args.full else "--head-only"
        raise UsageError(f"{option} freezes the weights and trains an adapter: leave {other} out")
    if (Path(args.model) / "adapter_config.json").is_file():
        raise UsageError(
            f"{option}: {args.model} is an adapter, and merging it into quantised weights would round it away; merge it first: "
            "xpo_fast.models.load_model, save_pretrained"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{option} needs bitsandbytes: pip install bitsandbytes")


def check_hub() -> None:
    """Check that the hub can be reached and knows who is there, before hours of training."""
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
    except Exception as error:  # whichever client the hub's package uses has errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"--push-to-hub: the hub does not answer or does not know the token ({reason}); log in with `hf auth login`, or "
            "leave --push-to-hub out and upload later with `hf upload`"
        ) from error
