"""The question that `xpo-fast fit`, and --fit of the training commands, ask: from their options and their data."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import loading, settings
from .options import SMOLLM2
from .parser import UsageError

if TYPE_CHECKING:
    from ..fit.question import Question

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_MOST = 4096  # units that are kept of the data, the longest


def memory(text: str) -> int:
    """Parses a size such as 24GiB, 24GB or 24G, all of 2**30 bytes, or bytes."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 24GiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def lengths(text: str) -> tuple[int, int]:
    """Parses MEAN,MAX, or one length for all."""
    try:
        values = [int(x) for x in text.split(",")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 2 or min(values) < 2 or values[0] > values[-1]:
        raise argparse.ArgumentTypeError(f"expected MEAN,MAX in tokens, at least 2 each, or one length, got {text!r}")
    return values[0], values[-1]


def device_of(args: argparse.Namespace) -> tuple[str, int]:
    """Returns the kind of device that is asked about, and its memory in bytes: by default this machine's."""
    import torch

    here = loading.accelerator_of(args)
    asked = getattr(args, "device", None)
    given = getattr(args, "memory", None)
    device = asked or ("cuda" if given is not None and not args.cpu else here.partition(":")[0])
    if device not in ("cuda", "cpu"):
        raise UsageError(f"the allocator of {device} is not known: name --device cuda or cpu, and --memory")
    if given is not None:
        return device, given
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: there is none here, so say how much memory it has: --memory 24GiB")
        return device, torch.cuda.get_device_properties(0).total_memory
    import psutil

    return device, psutil.virtual_memory().total


def config_of(args: argparse.Namespace) -> Any:
    """Returns the configuration of the model that the options name."""
    from transformers import AutoConfig

    from ..fit import shapes
    from ..models import smollm2_path

    shape, size = getattr(args, "shape", None), getattr(args, "params", None)
    if sum(x is not None for x in (getattr(args, "named", None), shape, size)) > 1:
        raise UsageError("MODEL, --shape and --params each say which model: give one of them")
    try:
        if size is not None:
            return shapes.of_size(shapes.number(size))
        if shape is not None:
            return shapes.shape(shape)
    except ValueError as error:
        raise UsageError(str(error)) from error
    path = str(smollm2_path()) if args.model.lower() == SMOLLM2 else args.model
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        near = [name for name in shapes.SHAPES if name == args.model.lower()]
        hint = f"; --shape {near[0]} has its configuration without it" if near else ""
        raise UsageError(
            f"no configuration of a model in {args.model!r}{hint}: {str(error).splitlines()[0]}"
        ) from error


def measured(args: argparse.Namespace, rows: Any, kind: str, encoding: dict[str, Any]) -> Any:
    """Returns the units of rows as `data.load` returns them, in tokens. encoding: for `data.encode`."""
    from .. import data

    return units_of(data.encode(rows, tokenizer_of(args), kind=kind, **encoding), data.KINDS[kind])


def measured_prompts(args: argparse.Namespace, rows: list[dict[str, Any]], new_tokens: int) -> Any:
    """Returns the one unit of a rollout: the longest prompt, and the longest completion."""
    from ..rollout.sampling import encode_prompts

    return ((max(map(len, encode_prompts([row["prompt"] for row in rows], tokenizer_of(args)))), (new_tokens,)),)


def units_of(encoded: Any, kind: Any) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Returns prompt and completions of encoded rows in tokens, those that take the most first. kind: of the data."""
    columns = [encoded[name] for name in kind.encoded[1:]]
    found = []
    for prompt, *texts in zip(encoded["prompt_ids"], *columns, strict=True):
        completions = texts[0] if kind.listed else texts
        found.append((len(prompt), tuple(map(len, completions))))
    return tuple(sorted(found, key=_takes, reverse=True)[:_MOST])


def _takes(unit: tuple[int, tuple[int, ...]]) -> int:
    prompt, completions = unit
    return len(completions) * (prompt + max(completions, default=0))


def question_of(args: argparse.Namespace, command: str, units: Any, **fields: Any) -> Question:
    """Returns the question of options of a training command. units: see `Question`. fields: in place of others."""
    from ..fit.optimizers import check
    from ..fit.question import Question
    from ..methods import METHODS

    under = [name for name, m in METHODS.items() if m.reads_context and name in args.method]
    taught = [name for name, m in METHODS.items() if m.reads_teacher and name in args.method]
    if taught:
        raise UsageError(f"the memory of {taught[0]} is not predicted, since a teacher is another model")
    if command == "train" and under:
        raise UsageError(
            f"the memory of {under[0]} is not predicted, since its reference reads other rows: leave --fit out, or ask "
            "about tdpo, which keeps as much of rows as long as those with the context"
        )
    device, size = device_of(args)
    config = config_of(args)
    full = args.full
    optim, arguments = _optimizer(args)
    try:
        check(optim)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    given: dict[str, Any] = {
        "config": config,
        "command": command,
        "method": args.method,
        "settings": dict(args.set),
        "full": full,
        "dtype": _dtype(args, config, device),
        "quantize": args.quantize,
        "lora": None if full or getattr(args, "head_only", False) else loading.lora(args),
        "attention": args.attn,
        "optim": optim,
        "optim_arguments": arguments,
        "optimizer_in_backward": args.optimizer_in_backward,
        "gradient_checkpointing": args.gradient_checkpointing,
        "activation_offload": args.activation_offload,
        "max_grad_norm": args.max_grad_norm,
        "layout": args.layout,
        "reference": getattr(args, "reference", None) or "auto",
        "batch_size": args.batch_size,
        "eval_batch_size": getattr(args, "eval_batch_size", None) or args.batch_size,
        "grad_accum": args.grad_accum,
        "tokens_per_batch": args.tokens_per_batch,
        "units": units,
        "tile_mib": getattr(args, "tile_mib", None),
        "device": device,
        "memory": size,
    }
    return Question(**given | fields)


def rl_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of the question that are about rollouts."""
    _, fields = settings.divided(args.set, settings.RL)
    generations = args.num_generations or 8
    step = args.batch_size * args.grad_accum
    prompts = args.prompts_per_rollout or -(-step // generations)
    further = {
        name: value for name in ("advantage", "kl_coef", "epochs_per_rollout") if (value := getattr(args, name, None))
    }
    found: dict[str, Any] = {"generations": generations, "prompts": prompts, "rl": further}
    if "generation_batch_size" in fields:
        found["generation_batch_size"] = fields["generation_batch_size"]
    return found


def _dtype(args: argparse.Namespace, config: Any, device: str) -> str:
    """Returns the dtype of --dtype, as `load_model` resolves "auto" on such a device."""
    import torch

    from .. import precision

    if args.dtype != "auto":
        return args.dtype
    if args.full:
        return "float32"
    saved = getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    if device == "cuda":
        return precision.name_of(saved)
    chosen = precision.resolve("auto", saved, torch.device("cpu"))
    return chosen if isinstance(chosen, str) else precision.name_of(chosen)


def _optimizer(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the name of the optimizer, transformers' default included, and its arguments of optim_args."""
    from transformers import TrainingArguments

    default = TrainingArguments.__dataclass_fields__["optim"].default
    more = dict(getattr(args, "train", [])).get("optim_args") or ""
    pairs = (x.partition("=") for x in str(more).replace(" ", "").split(",") if "=" in x)
    return args.optim or str(getattr(default, "value", default)), {name: value for name, _, value in pairs}


def tokenizer_of(args: argparse.Namespace) -> Any:
    """Returns the tokenizer of the model that the options name, which pads with EOS if it has no pad token."""
    from ..models import smollm2_path
    from ..models.loading import load_tokenizer

    path = str(smollm2_path()) if args.model.lower() == SMOLLM2 else args.model
    tokenizer = load_tokenizer(path, {"trust_remote_code": args.trust_remote_code})
    if args.chat_template:
        tokenizer.chat_template = loading.read_template(args.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def refuse(args: argparse.Namespace, command: str, units: Any, **fields: Any) -> None:
    """Raises UsageError, with what to change, if a training command's run will not fit. units: see `Question`."""
    from ..fit.predict import predict, propose
    from ..fit.table import verdict

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    prediction = predict(question_of(args, command, units, ranks=ranks, **fields))
    print(f"memory     {verdict(prediction)}")
    if prediction.fits is not False:
        return
    proposal, _ = propose(prediction)
    advice = "take a smaller model, shorter rows or more memory"
    if proposal is not None:
        advice = f"it fits with {' '.join(change.what for change, _ in proposal.changes)}"
    raise UsageError(
        f"--fit: {verdict(prediction)}, in the phase {prediction.largest.name!r}: {advice}; or leave --fit out, and it "
        "starts all the same"
    )


def model_in_words(args: argparse.Namespace) -> str:
    """Returns how the options name the model."""
    if getattr(args, "shape", None):
        return args.shape
    return f"{args.params} weights" if getattr(args, "params", None) else Path(args.model).name or args.model
