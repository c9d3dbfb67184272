"""Prepares and checks a trainer's model, tokenizer and data sets, and warns, before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..data import with_column
from ..head import token_logps
from ..models import Head, check_ids, embeddings, install_fused_loss, load_model
from ..models.lm_head import causal_lm
from ..models.modes import evaluating
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


def check_trainable(model: nn.Module) -> None:
    """Raises ValueError if every parameter of the model is frozen."""
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"nothing would be trained: each of the model's {len(parameters)} parameters is frozen (requires_grad is "
            "False), as after merging an adapter; call model.requires_grad_(True), or pass a peft_config"
        )


def check_head(model: nn.Module, ids: list[int], device: torch.device, backend: str) -> None:
    """Raises ValueError if the model's own logits are not those that the fused head makes of its hidden states.

    ids: tokens of any text, of which the first 9 are used.
    """
    tokens = torch.tensor([ids[:9]], device=device)
    inputs = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
    targets = tokens[:, 1:]

    def fused(hidden: Tensor, head: Head) -> Tensor:
        if hidden.shape[:2] != targets.shape:
            raise ValueError(
                f"expected one hidden state per token, {tuple(targets.shape)}, got {tuple(hidden.shape[:2])}: "
                "the model or its adapter adds positions of its own, which is not supported"
            )
        return token_logps(hidden, head, targets, backend=backend)

    with evaluating(model):
        logps = model(**inputs, fused_loss=fused)
        logits = model(**inputs).logits  # (1, 8, V)
    expected = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    tolerance = 1e-3 + torch.finfo(logits.dtype).eps * float(logits.float().abs().max())
    if not bool(logits.isfinite().all()):
        broken = next((n for n, p in model.named_parameters() if not bool(p.isfinite().all())), None)
        raise ValueError(
            "the model's logits are not finite"
            + (f": {broken} holds NaN or an infinity; " if broken else f" in {logits.dtype}; ")
            + "use a model that was saved before it diverged, or load it in float32"
        )
    difference = float((logps - expected).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"{type(causal_lm(model)).__name__} does more to its logits than a linear head with bias, scale "
            f"and softcap: log-probs from hidden states differ from the model's own by {difference:.3g} (at most "
            f"{tolerance:.3g} is rounding). Training would be silently wrong, so it is refused"
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


def check_rows(model: nn.Module, tokenizer: Any, encoded: datasets.Dataset, *sources: Any) -> None:
    """Raises ValueError, which names the row, for a token id that the model has no embedding for.

    sources: what `encoded` was made from; the first with as many rows and a column `where` says where the row stands.
    """
    from pyarrow.compute import max as maximum  # pyright: ignore[reportAttributeAccessIssue]

    for name in (n for n in encoded.column_names if n.endswith("_ids")):
        column: Any = encoded.with_format("arrow").select_columns([name])
        highest = -1
        for table in column.iter(batch_size=10_000):
            ids: Any = table[name].combine_chunks()
            while hasattr(ids.type, "value_type"):
                ids = ids.flatten()
            highest = max(highest, maximum(ids).as_py() or 0)
        if highest >= embeddings(model):
            rows: Any = encoded.select_columns([name])
            for i, row in enumerate(rows):
                found = row[name]
                flat = [x for part in found for x in (part if isinstance(part, list) else [part])]
                check_ids(model, tokenizer, flat, _place(i, len(encoded), sources))
    check_ids(model, tokenizer, [tokenizer.pad_token_id], "the padding token")


def _place(i: int, count: int, sources: Iterable[Any]) -> str:
    """Returns where row i of `count` stands, for an error."""
    for rows in sources:
        if isinstance(rows, datasets.Dataset) and "where" in rows.column_names and len(rows) == count:
            return rows[i]["where"]
    return f"row {i}"


def with_lengths(dataset: Any, args: TrainingArguments) -> Any:
    """Adds the column of row lengths by which Trainer groups rows into batches, if args ask for such batches."""
    name = args.length_column_name
    if args.train_sampling_strategy in ("random", "sequential") or name in dataset.column_names:
        return dataset
    return with_column(dataset, name, [row_tokens(row) for row in dataset])
