"""The rows that the reference of context distillation reads: encoded, checked, and brought to the policy's places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..data.ragged import in_parts
from ..methods import METHODS
from ..objective import Objective
from ..types import IGNORE_INDEX
from .config import XPOConfig


def check_context(objective: Objective, context: str | None) -> None:
    """Raises ValueError for a context that no method reads, and for a method that has none to read."""
    names = " + ".join(m.name for m in objective.methods)
    if objective.reads_context and context is None:
        raise ValueError(
            f"{names} trains the policy to answer as its reference does under a context: pass context= (--context FILE "
            "or TEXT), the text to distil"
        )
    if context is not None and not objective.reads_context:
        raise ValueError(f"context is for context_distillation, {names} reads none: leave it out (--context)")


def check_teacher(objective: Objective, *, taught: bool) -> None:
    """Raises ValueError for a method that learns of a teacher where there is none, and for a teacher of none."""
    names = " + ".join(m.name for m in objective.methods)
    if objective.reads_teacher and not taught:
        raise ValueError(
            f"{names} learns of a teacher, another model: train by xpo-fast distill --teacher MODEL, or by "
            "DistillationTrainer(model, teacher, …)"
        )
    if taught and objective.reads_topk:
        raise ValueError(
            f"{names} reads what a teacher has said before, in the columns topk_ids and topk_logp of the data: make "
            "them by distill --cache-teacher DIR (teacher_topk), and train on DIR by xpo-fast train (XPOTrainer); with "
            "the teacher there, train by gkd"
        )
    if taught and not objective.reads_teacher:
        of_teachers = [m.name for m in METHODS.values() if m.reads_teacher]
        raise ValueError(f"{names} learns of no teacher: expected {', '.join(of_teachers)}, or a sum with one of them")


def encode_for(rows: Any, tokenizer: Any, objective: Objective, args: XPOConfig) -> Any:
    """Returns rows of `data.load` as token ids, with `ref_prompt_ids` where the reference reads a context."""
    how = args.encoding()
    found = data.encode(rows, tokenizer, kind=objective.data_kind, **how)
    if not objective.reads_context:
        return found
    assert args.context is not None
    further = {name: how[name] for name in ("score", "num_proc", "chat_template_kwargs")}
    return data.add_context(found, rows, tokenizer, args.context, **further)


def context_lengths(encoded: Any) -> Sequence[int] | None:
    """Returns the tokens of each row with its longest context in front; None where no model reads one."""
    fronts = [name for name in encoded.column_names if name.startswith("ref_") and name.endswith("prompt_ids")]
    if not fronts:
        return None

    def lengths(name: str) -> np.ndarray:
        return np.concatenate([ids.lengths for ids in in_parts(encoded, name)])

    return (np.max([lengths(name) for name in fronts], axis=0) + lengths("chosen_ids")).tolist()


def at_places(
    hidden: Tensor,  # (R, T', D)
    targets: Tensor,  # (R, T') aligned, of the rows that `hidden` is of
    places: Tensor,  # (R, T) aligned, of other rows with the same targets
) -> Tensor:
    """Returns hidden states (R, T, D) of rows at the places where other rows have the same targets.

    The targets of both stand alike behind the first of them. What is at a place without a target has no meaning.
    """
    first, wanted = ((x != IGNORE_INDEX).int().argmax(dim=1, keepdim=True) for x in (targets, places))
    columns = torch.arange(places.shape[1], device=hidden.device)
    at = (columns + first - wanted).clamp(0, hidden.shape[1] - 1)
    return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
