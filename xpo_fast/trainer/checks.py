"""Checks a trainer's model and rows before the first step: its head, its causality, its ids, its positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from .. import precision
from ..data.ragged import in_parts
from ..data.topk import TOPK
from ..head import token_logps
from ..models import Head, check_ids, check_lengths, embeddings, no_router_loss, own_logits, table_of_positions
from ..models.lm_head import causal_lm
from ..models.modes import evaluating

_READ = 8  # tokens of the forwards that check a model


def check_head(model: nn.Module, ids: list[int], device: torch.device, backend: str) -> None:
    """Raises ValueError if the model's own logits are not those that the fused head makes of its hidden states.

    Or if a token's log-probs depend on what stands behind it: `check_causal`. ids: tokens of any text, of which the
    first 9 are used; a shorter text is repeated.
    """
    count = 1 + min(_READ, table_of_positions(model) or _READ)
    tokens = torch.tensor([(ids * count)[:count]], device=device)
    inputs = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
    targets = tokens[:, 1:]

    def fused(hidden: Tensor, head: Head) -> Tensor:
        if hidden.shape[:2] != targets.shape:
            raise ValueError(
                f"expected one hidden state per token, {tuple(targets.shape)}, got {tuple(hidden.shape[:2])}: "
                "the model or its adapter adds positions of its own, which is not supported: use LoRA in place of "
                "prompt tuning, or another model"
            )
        return token_logps(hidden, head, targets, backend=backend)

    with evaluating(model):
        logps = model(**inputs, fused_loss=fused, **no_router_loss(model))
        logits = own_logits(model, inputs)  # (1, 8, V)
    expected = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    # Some models compute their logits in 16 bits and return them in float32.
    step = max(torch.finfo(dtype).eps for dtype in (logits.dtype, causal_lm(model).dtype))
    tolerance = 1e-3 + step * float(logits.float().abs().max())
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
            f"{tolerance:.3g} is rounding). Training would be silently wrong, so it is refused: "
            "use another model, or one whose class computes its logits by its head alone"
        )
    check_causal(model, inputs["input_ids"], logits)


def check_causal(
    model: nn.Module,
    input_ids: Tensor,  # (1, T)
    logits: Tensor,  # (1, T, V)
) -> None:
    """Raises ValueError if the log-probs behind a token depend on the tokens, or on the padding, that follow it.

    Other tokens from position k on, and padding behind k, must move nothing before k. The forward that asks has the
    shape of the one that made `logits`, so that only the mask makes another kernel of it. A move is the mean over the
    vocabulary of |Δ log p|, at the position that moves most. Rounding, and a token that it sends to another expert,
    is taken to move less than √ε of what the other token moves at k itself, ε the step of the dtype: 0.0003 in float32,
    0.09 in bfloat16. In tiny random models what follows moves more than 0.002, in trained ones far more.
    """
    count = input_ids.shape[1]
    k = count - min(3, count - 1)  # 5 of 8; at least 1 of 2 or more
    if not 1 <= k < count:
        return
    before = logits.float().log_softmax(dim=-1)[0, : k + 1]
    other = input_ids.clone()
    # Others of the row itself: an id may have a meaning that a text has no use for.
    different = input_ids[0, None, :] != input_ids[0, k:, None]  # (3, T)
    at = different.int().argmax(dim=1)
    other[0, k:] = torch.where(different.any(dim=1), input_ids[0, at], (input_ids[0, k:] + 1) % embeddings(model))

    def moved(padded: int) -> tuple[float, float]:
        """Returns by how much log-probs before k, and at k, move if the last `padded` positions are padding."""
        mask = torch.ones_like(other)
        mask[0, count - padded :] = 0
        with evaluating(model):
            after = own_logits(model, {"input_ids": other, "attention_mask": mask})
        by = (after.float().log_softmax(dim=-1)[0, : k + 1] - before).nan_to_num(0.0).abs().mean(dim=-1)
        return float(by[:k].max()), float(by[k])

    early, own = moved(count - k - 1)
    step = max(torch.finfo(dtype).eps for dtype in (logits.dtype, causal_lm(model).dtype))
    step = max(step, precision.tf32_step(input_ids.device))
    allowed = step * float(logits.float().abs().max()) + step**0.5 * own
    if early <= allowed:
        return
    ahead, _ = moved(0)
    raise ValueError(
        f"{type(causal_lm(model)).__name__} is not causal: "
        + (
            f"other tokens from position {k + 1} on move the log-probs of those before it, by {ahead:.3g} nats: the "
            "model reads ahead, as encoders do (load one with is_decoder=True), prefix LMs, and image-and-text models "
            "that read a prompt in both directions"
            if ahead > allowed
            else f"padding behind a row moves the log-probs of its tokens, by {early:.3g} nats: the model does not "
            "observe attention_mask"
        )
        + ". Its log-probs are not those that it generates with, so it is refused"
    )


def check_rows(
    model: nn.Module, tokenizer: Any, encoded: datasets.Dataset, *, lengths: Sequence[int] | None = None
) -> None:
    """Raises ValueError, which names the row, for a token id that the model has no embedding for, or too long a row.

    lengths: tokens of each row as the model reads it; by default the prompt and its longest completion.
    """
    for name in (n for n in encoded.column_names if n.endswith("_ids") and n not in TOPK):
        for ids in in_parts(encoded, name):
            outside = np.flatnonzero((ids.flat < 0) | (ids.flat >= embeddings(model)))
            if len(outside):
                at = int(outside[0])
                row = int(ids.row[np.searchsorted(ids.offsets, at, side="right") - 1])
                check_ids(model, tokenizer, [int(ids.flat[at])], place_in(encoded, row))
    if tokenizer.pad_token_id is not None:
        # Padding is masked, but Trainer writes this id into the model's config, and such a model cannot be loaded.
        check_ids(model, tokenizer, [tokenizer.pad_token_id], "the padding token")
    remedy = "set max_length to at most that, or leave longer rows out"
    lengths = row_lengths(encoded) if lengths is None else lengths
    check_lengths(model, lengths, lambda i: place_in(encoded, i), remedy)


def row_lengths(encoded: datasets.Dataset) -> list[int]:
    """Returns the tokens of each row's prompt and longest completion."""
    prompt, longest = np.zeros(len(encoded), dtype=np.int64), np.zeros(len(encoded), dtype=np.int64)
    for name in (n for n in encoded.column_names if n.endswith("_ids") and n not in TOPK):
        for ids in in_parts(encoded, name):
            np.maximum.at(prompt if name == "prompt_ids" else longest, ids.row, ids.lengths)
    return (prompt + longest).tolist()


def place_in(encoded: datasets.Dataset, i: int) -> str:
    """Returns where row i of a data set stands in its source, for an error."""
    return str(encoded[i]["where"]) if "where" in encoded.column_names else f"row {i}"
