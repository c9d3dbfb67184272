"""Loads the model and tokenizer that the options ask for: dtype, quantisation, device, adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import SMOLLM2
from .parser import UsageError

# The options of an adapter, and the fields of peft's LoraConfig.
LORA = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_targets": "target_modules",
}


def load(args: argparse.Namespace, **further: Any) -> tuple[Any, Any]:
    """Returns the model, its weights in float32 with --full, and the tokenizer. further: for `load_model`."""
    from ..models import load_model

    if args.attn:
        further["attn_implementation"] = args.attn
    if args.trust_remote_code:
        further["trust_remote_code"] = True
    bits = (args.load_in_4bit or args.load_in_8bit) and "device_map" not in further
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


def device_of(args: argparse.Namespace) -> str | None:
    """Returns "cpu" for --cpu; None lets `load_model` choose."""
    return "cpu" if args.cpu else None


def accelerator_of(args: argparse.Namespace) -> str:
    """Returns the accelerator, or "cpu" for --cpu and where there is none."""
    import torch

    accelerator = None if args.cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else str(accelerator)


def quantised(args: argparse.Namespace) -> dict[str, Any]:
    """Returns keyword arguments of `from_pretrained` for --load-in-4bit and --load-in-8bit."""
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    from .. import precision
    from ..models import smollm2_path

    path = str(smollm2_path()) if args.model.lower() == SMOLLM2 else args.model
    saved: Any = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code).get_text_config().dtype
    device = torch.device(device_of(args) or precision.default_device())
    compute = precision.resolve(args.dtype, saved or torch.float32, device)
    config = BitsAndBytesConfig(load_in_8bit=True)
    if args.load_in_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
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
