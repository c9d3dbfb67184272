"""Checks of teachers before the first step: weights, vocabularies, tokenizers, scales of logits."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..models import Head
from ..models.lm_head import causal_lm


def parse_teachers(teacher: Any) -> list[tuple[Any, float]]:
    """Returns teachers with their weights, which add up to 1. teacher: a model or name, or a list, see there.

    Raises ValueError for an empty list and for weights that are not positive.
    """
    given = list(teacher) if isinstance(teacher, list) else [teacher]
    found: list[tuple[Any, float]] = []
    for one in given:
        model, weight = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        if not isinstance(model, (str, nn.Module)):
            raise ValueError(f"expected a model as the teacher, its name, or (model, weight), got {one!r:.80}")
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"expected a teacher's weight > 0, got {weight!r}")
        found.append((model, float(weight)))
    if not found:
        raise ValueError("expected at least one teacher, got an empty list")
    total = sum(weight for _, weight in found)
    return [(model, weight / total) for model, weight in found]


def check_tokenizers(teacher: nn.Module, theirs: Any, student: nn.Module, own: Any) -> None:
    """Raises ValueError unless tokens have the same numbers in the tokenizers of teacher and student.

    Where the teacher's tokenizer is not there, its head must have exactly the student's number of rows.
    """
    rows, wanted = vocabulary(teacher), vocabulary(student)
    if theirs is None or own is None:
        if rows != wanted:
            raise ValueError(
                f"the teacher's head has {rows} rows and the student's {wanted}: pass teacher_processing_class=, the "
                "teacher's tokenizer, to see whether the rows that both have are the same tokens"
            )
        return
    first, second = own.get_vocab(), theirs.get_vocab()
    if first == second:
        return
    other = {token for token, number in first.items() if second.get(token) != number}
    shown = ", ".join(f"{t!r} ({first[t]} and {second.get(t, 'none')})" for t in sorted(other, key=first.get)[:3])
    more = len(set(second) - set(first))
    what = f"{len(other)} tokens have other numbers there, such as {shown}" if other else f"it has {more} tokens more"
    raise ValueError(
        f"the teacher's tokenizer is not the student's: {what}. A divergence compares the same token in both: take a "
        "teacher of the student's family, or train on the teacher's texts by `xpo-fast train --method sft`"
    )


def check_heads(teacher: nn.Module, student: nn.Module) -> tuple[int, float]:
    """Returns the rows that both heads have, and the teacher's scale of logits by the student's.

    Raises ValueError for a teacher with fewer rows than the student, and for softcaps that differ.
    """
    rows, wanted = vocabulary(teacher), vocabulary(student)
    if rows < wanted:
        raise ValueError(
            f"the teacher's vocabulary of {rows} rows does not hold the student's of {wanted}: if the student's rows "
            f"beyond {rows} are padding, call student.resize_token_embeddings({rows}) first; else take another teacher"
        )
    theirs, own = Head.from_model(causal_lm(teacher)), Head.from_model(causal_lm(student))
    if theirs.softcap != own.softcap:
        raise ValueError(
            f"the teacher's logits have the softcap {theirs.softcap} and the student's {own.softcap}: one computation "
            "has one; take a teacher with the student's, or sampled_kl, which reads log-probs alone"
        )
    return wanted, theirs.logit_scale / own.logit_scale


def vocabulary(model: nn.Module) -> int:
    """Returns the rows of a causal LM's head, also where ZeRO-3 keeps it in parts."""
    weight = Head.from_model(causal_lm(model)).weight
    return getattr(weight, "ds_shape", weight.shape)[0]
