"""Prepares a trainer's model, tokenizer and data sets, and warns, before the first step."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..data import with_column
from ..models import install_fused_loss, load_model
from ..precision import warn_if_slow
from .reference import row_tokens


def with_tokenizer(
    model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Returns the model, loaded if it is a name, and its tokenizer, which pads with EOS if it has no pad token."""
    if isinstance(model, str):
        model, loaded = load_model(model)
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise ValueError("the trainer needs the model's tokenizer: pass processing_class=tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def prepare_model(model: nn.Module, args: TrainingArguments, peft_config: Any) -> nn.Module:
    """Puts the adapter of `peft_config`, if any, on the model and installs the fused loss; returns the model to train.

    The adapter's initial weights follow from args.seed. Warns about dtypes that lose updates or that are slow.
    """
    if peft_config is not None:
        set_seed(args.seed)  # Trainer sets it only after the adapter's weights are drawn
        model = with_adapter(model, peft_config)
    install_fused_loss(model)
    warn_of_lost_updates(model, args)
    mixed = [torch.bfloat16] * args.bf16 + [torch.float16] * args.fp16
    for dtype in (next(model.parameters()).dtype, *mixed):
        warn_if_slow(dtype, args.device)
    return model


def with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Returns the PEFT model of `model` and `peft_config`.

    Raises ValueError for a model that has an adapter, for prompt learning, and for target modules it does not have.
    Warns of an initialisation after which the saved adapter is not the trained model.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs peft: pip install 'xpo-fast[train]'") from error
    if hasattr(model, "disable_adapter"):
        raise ValueError(
            "the model carries an adapter already: pass it without peft_config, or merge the adapter first"
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(f"{type(peft_config).__name__} adds positions of its own, which is not supported; use LoRA")
    how = getattr(peft_config, "init_lora_weights", None)
    if isinstance(how, str) and "_niter_" in how:
        warnings.warn(
            f"init_lora_weights={how!r} draws at random what it takes out of the base weights, and PEFT draws again "
            'when the saved adapter is loaded, on another base then: use "pissa", or save the model with '
            "merge_and_unload()",
            stacklevel=4,
        )
    try:
        return get_peft_model(model, peft_config)  # type: ignore[arg-type]
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"{error} Its linear modules are {', '.join(linear)}") from error


def check_trainable(model: Any, besides: nn.Module | None = None) -> None:
    """Raises ValueError if every parameter of the model is frozen; those of `besides`, such as a critic, do not count.

    The error says how to train the adapter of a PEFT model, or else the model.
    """
    left_out = set() if besides is None else set(besides.parameters())
    parameters = [p for p in model.parameters() if p not in left_out]
    if not any(p.requires_grad for p in parameters):
        adapters = getattr(model, "active_adapters", None) if hasattr(model, "disable_adapter") else None
        how = (
            f"as an adapter is when it is loaded; call model.set_adapter({adapters[0]!r}) to train it on"
            if adapters
            else "as after merging an adapter; call model.requires_grad_(True), or pass a peft_config"
        )
        raise ValueError(
            f"nothing would be trained: each of the model's {len(parameters)} parameters is frozen (requires_grad is "
            f"False), {how}"
        )


def warn_of_lost_updates(model: nn.Module, args: TrainingArguments) -> None:
    """Warns if weights in 16 bits are trained with a learning rate under 1e-5.

    Adam moves a weight by about the learning rate; if that is under half a step of the weight's dtype, nothing moves.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if trained and args.learning_rate < 1e-5:
        warnings.warn(
            f"{sum(p.numel() for p in trained):,} weights in {trained[0].dtype} are trained with a learning rate of "
            f"{args.learning_rate:g}: most updates round to nothing. Load the model in float32 and set bf16=True "
            "(mixed precision), or use LoRA",
            stacklevel=3,
        )


def map_splits(dataset: Any, fn: Any) -> Any:
    """Returns fn(dataset), or, for a dict of data sets, the dict of fn of each."""
    if isinstance(dataset, dict) and not isinstance(dataset, datasets.DatasetDict):
        return {name: fn(split) for name, split in dataset.items()}
    return fn(dataset)


def some_rows(train: Any, held_out: Any) -> Any:
    """Returns the rows to train on, or else those to evaluate on, the first of several data sets; None without any."""
    found = train or held_out
    return next(iter(found.values())) if isinstance(found, dict) else found


def with_lengths(dataset: Any, args: TrainingArguments) -> Any:
    """Adds the column of row lengths by which Trainer groups rows into batches, if args ask for such batches."""
    name = args.length_column_name
    if args.train_sampling_strategy in ("random", "sequential") or name in dataset.column_names:
        return dataset
    return with_column(dataset, name, [row_tokens(row) for row in dataset])
