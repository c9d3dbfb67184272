"""Makes what the options ask for: model and tokenizer, the adapter, and the rows held out."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import HELD_OUT_AT_MOST, SMOLLM2, count
from .parser import UsageError

if TYPE_CHECKING:
    import datasets

# The options of an adapter, and the fields of peft's LoraConfig.
LORA = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_targets": "target_modules"}


def load(args: argparse.Namespace, **further: Any) -> tuple[Any, Any]:
    """Returns the model, its weights in float32 with --full, and the tokenizer. further: for `load_model`."""
    from ..models import load_model

    if args.attn:
        further["attn_implementation"] = args.attn
    if args.trust_remote_code:
        further["trust_remote_code"] = True
    bits = args.quantize is not None and "device_map" not in further
    if bits:
        further |= quantised(args)
    dtype = "float32" if args.full else args.dtype
    model, tokenizer = load_model(args.model, dtype=dtype, device=device_of(args), **further)
    if bits:
        _evaluate_as_trained(model)
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    return model, tokenizer


def read_template(name: str) -> str:
    """Returns the text of a chat template."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--chat-template {name}: {reason}; expected the file of a Jinja template") from error


def read_context(value: str | None) -> str | None:
    """Returns the text of --context: that of a file, if there is one of this name, or else the value itself."""
    if value is None:
        return None
    try:
        if Path(value).is_file():
            return Path(value).read_text(encoding="utf-8")
    except OSError:  # a text that is too long for a name
        pass
    except ValueError as error:
        raise UsageError(f"--context {value}: it is not UTF-8 text; expected a file of text, or a text") from error
    if len(value.split()) < 2:
        raise UsageError(f"--context {value}: no such file, and a text has more than one word")
    return value


def device_of(args: argparse.Namespace) -> str | None:
    """Returns "cpu" for --cpu; None lets `load_model` choose."""
    return "cpu" if args.cpu else None


def accelerator_of(args: argparse.Namespace) -> str:
    """Returns the accelerator, or "cpu" for --cpu and where there is none."""
    import torch

    accelerator = None if args.cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else str(accelerator)


def placed(args: argparse.Namespace, name: str, dtype: str) -> tuple[Any, Any]:
    """Returns a model on the accelerator, and its tokenizer. An adapter stays on its base model: nothing is rounded."""
    from ..models import load_model

    model, tokenizer = load_model(name, dtype=dtype, device=device_of(args), merge=False)
    move: Any = model.to
    return move(accelerator_of(args)), tokenizer


def quantised(args: argparse.Namespace) -> dict[str, Any]:
    """Returns keyword arguments of `from_pretrained` for --quantize."""
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    from .. import precision
    from ..models import smollm2_path

    path = str(smollm2_path()) if args.model.lower() == SMOLLM2 else args.model
    saved: Any = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code).get_text_config().dtype
    device = torch.device(device_of(args) or precision.default_device())
    compute = precision.resolve(args.dtype, saved or torch.float32, device)
    config = BitsAndBytesConfig(load_in_8bit=True)
    if args.quantize == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    found: dict[str, Any] = {"quantization_config": config}
    return found | ({"device_map": "cpu"} if args.cpu else {})  # else that of the process


def _evaluate_as_trained(model: Any) -> None:
    """Makes bitsandbytes compute on the CPU in evaluation as it does in training.

    It would repack 4-bit weights at the first evaluation, after which no gradient passes through them, and round
    activations to 8 bits in evaluation alone: a reference policy, which is evaluated, would be another model than the
    policy.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt) and module.weight.device.type == "cpu":
            module.train()
            module.train = lambda mode=True, module=module: module


def lora(args: argparse.Namespace) -> Any:
    """Returns peft's LoraConfig for the options of the adapter."""
    from peft import LoraConfig

    targets = args.lora_targets if args.lora_targets == "all-linear" else args.lora_targets.split(",")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
    )


def hold_out(args: argparse.Namespace, rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Returns the rows to train on, and the rows of --eval-split or None; rows of one prompt stay together."""
    import numpy as np

    wanted = min(len(rows) // 10, HELD_OUT_AT_MOST) if args.eval_split is None else count(args.eval_split, len(rows))
    if wanted == 0:
        return rows, None
    from ..data import prompt_keys

    # Numbers for prompts, and arrays of rows: a file may have more of them than lists would fit into memory.
    _, firsts, group = np.unique(prompt_keys(rows), return_index=True, return_inverse=True)
    order: Any = np.argsort(firsts)  # as they come in the data
    sizes = np.bincount(group)
    random.Random(args.seed).shuffle(order)
    left, chosen = wanted, np.zeros(len(order), dtype=bool)
    for prompt in order:  # a prompt seen in training says little about what was learned
        if sizes[prompt] <= left:
            chosen[prompt] = True
            left -= int(sizes[prompt])
        if not left:
            break
    is_held = chosen[group]
    held, kept = np.flatnonzero(is_held), np.flatnonzero(~is_held)
    if not len(kept) or not len(held):
        if args.eval_split is None:
            return rows, None
        raise UsageError(
            f"--eval-split {args.eval_split:g} of {len(rows)} rows with {len(order)} different prompts leaves "
            f"{len(kept)} rows to train on and {len(held)} to evaluate; rows of one prompt stay together"
        )
    return rows.select(kept), rows.select(held)
