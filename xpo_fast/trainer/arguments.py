"""What transformers' Trainer takes and these trainers do not use: refused by name, and what to do instead.

What is not named here acts as transformers describes it. tests/test_settings.py holds that every field of
`TrainingArguments` is one or the other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from ..models.lm_head import causal_lm

logger = logging.getLogger("xpo_fast")

_NO_PREDICTIONS = "an evaluation computes losses and metrics and keeps no predictions: leave it out"
_LIGER = (
    "Liger's forward would take the place of the one that the loss is fused into, which makes no logits already: leave "
    "it out, or patch the model before it is handed over, with fused_linear_cross_entropy=False"
)
_FULL_EVAL = (
    "it rounds the weights themselves, which go on being trained, and compares them with a reference that is not "
    "rounded: bf16=True evaluates in mixed precision"
)

# Fields of TrainingArguments that may have their defaults alone, by why, and what to do instead.
REFUSED: dict[str, str] = {
    "label_smoothing_factor": "it is about labels' cross-entropy; methods that smooth their labels take "
    'method_args={"label_smoothing": …}',
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "label_names": "batches have targets of their own, which the data's kind decides: leave it out",
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
}

_NO_LOADER = "the batches of online RL are cut from rollouts, no data loader reads them: leave it out"
_BY_SEED = "prompts are drawn in an order that follows from seed alone, pass after pass: leave it out"
_OF_A_LOADER = "drop_last num_workers persistent_workers prefetch_factor multiprocessing_context in_order"
REFUSED_ONLINE: dict[str, str] = {
    **REFUSED,
    **{f"dataloader_{name}": _NO_LOADER for name in _OF_A_LOADER.split()},
    "train_sampling_strategy": _BY_SEED,
    "length_column_name": _BY_SEED,
    "data_seed": _BY_SEED,
    "ignore_data_skip": "a resumed run goes on with the rollouts of its checkpoint: leave it out",
    "auto_find_batch_size": "rollouts are cut into steps before the first is tried: set a smaller "
    "per_device_train_batch_size, with more gradient_accumulation_steps",
}

# Arguments of Trainer itself.
REFUSED_BY_TRAINER: dict[str, str] = {
    "compute_loss_func": "the loss is the method's: name another by method=, or give XPOTrainer an objective=",
    "compute_metrics": "an evaluation keeps no predictions to compute metrics of; the method's own are logged, and "
    "callbacks see them",
    "preprocess_logits_for_metrics": "no logits are made",
    "model_init": "references and adapters are made of the model that is handed over: pass model=",
    "tokenizer": "pass it as processing_class=",
}

_DISPATCH = (
    "one process's batches would be sliced by rows for the others, which cuts pairs and lists apart: leave it out, "
    "every process reads its own"
)
_OF_ACCELERATOR: dict[str, tuple[Any, str]] = {  # the value that is refused, and why
    "split_batches": (True, "per_device_train_batch_size is a device's own, as the steps are counted: divide it there"),
    "dispatch_batches": (True, _DISPATCH),
    "even_batches": (False, "processes without a last batch would leave the others waiting; rows that only fill one up "
    "do not count: leave it out"),
}  # fmt: skip


def changed(config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass whose values are not their defaults; an empty list is as good as None."""
    found = {}
    for field in dataclasses.fields(config):
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        value = getattr(config, field.name)
        if value is not default and value != default and not (_is_empty(value) and _is_empty(default)):
            found[field.name] = value
    return found


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def check_arguments(args: Any, refused: Mapping[str, str]) -> None:
    """Raises ValueError for fields of TrainingArguments that have no effect, or a harmful one.

    args: after transformers' own __post_init__. refused: `REFUSED`, or `REFUSED_ONLINE`.
    """
    problems = [f"{name}={value!r}: {refused[name]}" for name, value in changed(args).items() if name in refused]
    if not args.average_tokens_across_devices and args.world_size > 1:
        problems.append("average_tokens_across_devices=False: denominators are those of all devices: leave it out")
    accelerator = args.accelerator_config
    for name, (value, why) in _OF_ACCELERATOR.items():
        if getattr(accelerator, name, None) is value:
            problems.append(f"accelerator_config {name}={value}: {why}")
    if "num_steps" in (getattr(accelerator, "gradient_accumulation_kwargs", None) or {}):
        problems.append("accelerator_config num_steps: set gradient_accumulation_steps")
    if problems:
        raise ValueError("not used here, or not as it is meant: " + "; ".join(problems))
    if (parallel := args.parallelism_config) is not None:
        sizes = {name: getattr(parallel, name) or 1 for name in ("tp_size", "cp_size", "sp_size")}
        check_parallelism(splits_rows=getattr(args, "splits_rows", False), **sizes)


def check_parallelism(*, splits_rows: bool = False, **sizes: int) -> None:
    """Raises ValueError for parallelism that cuts what a trainer keeps whole. sizes: tp_size, cp_size, sp_size.

    splits_rows: the trainer takes rows in chunks, by sp_size.
    """
    whole = {name: size for name, size in sizes.items() if size > 1 and not (splits_rows and name == "sp_size")}
    if whole:
        raise ValueError(
            f"{', '.join(f'{name}={size}' for name, size in whole.items())} of parallelism_config: this trainer keeps "
            f"{'layers and the order of tokens' if splits_rows else 'rows and layers'} whole, and would train on parts "
            "of them: leave it out, and share out rows by DDP, FSDP2 or ZeRO; rows longer than a device's memory are "
            "cut by sp_size with DeepSpeed when training on preferences, or go through Objective(...)(..., row_shard=) "
            "in a loop of your own, see docs/scale.md"
        )


def check_trainer_arguments(given: Mapping[str, Any]) -> None:
    """Raises ValueError for keyword arguments of Trainer that have no effect here, and for several devices."""
    problems = [f"{name}=: {why}" for name, why in REFUSED_BY_TRAINER.items() if given.get(name) is not None]
    if problems:
        raise ValueError("not used here: " + "; ".join(problems))
    if given["args"].n_gpu > 1:
        raise ValueError(
            f"one process sees {given['args'].n_gpu} devices, and DataParallel splits pairs apart: start one process "
            "per device with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one device"
        )


def let_ddp_find_unused_parameters(model: Any, args: Any) -> None:
    """Lets DDP look for weights without a gradient if the model has parts for images or sound, which text may not use.

    transformers does so by itself, but not with activation checkpointing: DDP would wait for these weights, and until
    it finds out in the second step average no gradient. Changes args.ddp_find_unused_parameters if it is None, and logs
    that. Raises ValueError for reentrant checkpointing, with which DDP cannot look.
    """
    config = getattr(causal_lm(model), "config", None)
    single = config is None or config.get_text_config() is config
    if single or args.world_size == 1 or args.fsdp or args.deepspeed or args.ddp_find_unused_parameters is not None:
        return
    how = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    name = type(causal_lm(model)).__name__
    if args.gradient_checkpointing and how.get("use_reentrant"):
        raise ValueError(
            f"text does not use all of {name}, and with use_reentrant=True DDP cannot find out what: leave "
            "use_reentrant out, or freeze those parts and set ddp_find_unused_parameters=False"
        )
    args.ddp_find_unused_parameters = True
    logger.info("ddp_find_unused_parameters=True: text need not use all of %s", name)
