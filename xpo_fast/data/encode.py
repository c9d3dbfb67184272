"""Encoding: a data set of `load` becomes token ids, cut to a length."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .kinds import DataError, get_kind
from .load import prompt_keys
from .rows import completions_of, grouped
from .sources import require
from .template import as_conversation, prompt_of, report, unwritten_of, warn_of_unread, write

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("xpo_fast")

_COUNTS = ("completions_cut", "count", "prompt_cut", "rewritten")  # per row, for `_report` alone


def encode(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    kind: str,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    """Tokenizes a data set of `load`, and cuts its rows to a length.

    Text is prompt + completion + EOS, with the tokenizer's leading special tokens (BOS) once in front. A conversation
    is written by the chat template: the prompt with the generation prompt, then what follows it. The prompt of a text
    with an empty prompt is the leading special tokens; where the tokenizer has none, the first token of the text, which
    nothing predicts.

    Rows longer than `max_length` are cut: first the prompt, from the left (its BOS stays), but not below half of
    `max_length`; then the completions, from the right, EOS first. `max_prompt_length` caps the prompt in any case. All
    completions of a prompt follow the same ids of it.

    Unpaired rows with a label also get `kl_completion_ids`, the mismatched completion of KTO's KL estimate: that of the
    next row (cyclic) with another prompt, cut to fit. It depends neither on batch size nor on `num_proc`.

    dataset: from `load`, of this kind. kind: a key of `KINDS`. Lengths are in tokens. num_proc: how many processes.
    chat_template_kwargs: variables of the chat template; those of a row's column come first.

    Returns one column of ids for each column of text, ``…_ids`` (completions_ids: a list of lists), and the others.
    Raises DataError for a conversation without a chat template or refused by it, a prompt or completion without a
    token, or labelled unpaired data of one row; ValueError for a length that is too small, or columns that are not
    those of `load`.
    """
    row_kind = get_kind(kind)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a prompt token and a completion token); got {max_length}")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1 or None; got {max_prompt_length}")
    loaded = [{"prompt", "where", *form} for form in row_kind.forms if set(form) >= set(row_kind.completions)]
    if not any(columns <= set(dataset.column_names) for columns in loaded):
        expected = " or ".join(", ".join(sorted(columns)) for columns in loaded)
        raise ValueError(
            f"encode takes what load(…, kind={kind!r}) gives, with columns {expected}; "
            f"got {', '.join(dataset.column_names)}"
        )
    if not len(dataset):
        raise DataError(f"no rows to encode; expected at least one {kind} row")
    first = dataset[0]
    warn_of_unread(tokenizer, chat_template_kwargs, first["prompt"])
    labelled = "label" in row_kind.numbers and "label" in dataset.column_names
    if labelled and len(dataset) == 1:
        raise DataError(
            f"{first['where']}: the only row; labelled data needs two or more, because the KL estimate sets "
            "each prompt beside the completion of another row; add rows"
        )
    encoded = dataset.map(
        encode_rows,
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="tokenize",
        fn_kwargs={
            "tokenizer": tokenizer,
            "kind": kind,
            "leading": leading_ids(tokenizer, first["prompt"] or next(iter(completions_of(first, row_kind).values()))),
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "chat_template_kwargs": chat_template_kwargs,
        },
    )
    _report(encoded, max_length)
    listed = (
        names for some in encoded.select_columns("unwritten").iter(batch_size=1000) for names in some["unwritten"]
    )
    report(itertools.chain.from_iterable(map(json.loads, listed)), len(encoded))
    encoded = encoded.remove_columns([*_COUNTS, "unwritten"])
    return _add_mismatched(encoded, prompt_keys(dataset), max_length) if labelled else encoded


def leading_ids(tokenizer: Any, prompt: str | list) -> list[int]:
    """Returns the special tokens that a tokenizer puts before a text (BOS, most often); [] for messages.

    A chat template writes its special tokens itself.
    """
    if not isinstance(prompt, str):
        return []
    bare = tokenize(tokenizer, [prompt])[0]
    special = tokenizer(prompt, verbose=False)["input_ids"]
    starts = range(len(special) - len(bare) + 1)
    return special[: next((i for i in starts if special[i : i + len(bare)] == bare), 0)]


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Returns the token ids of texts, without special tokens."""
    # verbose=False: a text beyond the model's length is no cause for a warning, it is cut afterwards.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_rows(
    batch: dict[str, list],
    tokenizer: Any,
    kind: str,
    leading: list[int],
    max_length: int,
    max_prompt_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, list]:
    """Tokenizes and cuts a batch of rows, see `encode`.

    batch: columns, those of `load`. leading: from `leading_ids`, for rows of text. Returns also the counts
    `prompt_cut`, `completions_cut`, `count` (of completions) and `rewritten` (whether the chat template writes the
    prompt differently before an answer), and `unwritten`, the JSON of what the chat template leaves out.
    """
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    row_kind = get_kind(kind)
    named = [completions_of(row, row_kind) for row in rows]
    prompts, kwargs = [prompt_of(row) for row in rows], chat_template_kwargs
    given = [*zip(rows, prompts, ([*by.values()] for by in named))]
    texts = [render(tokenizer, prompt, completions, row["where"], kwargs) for row, prompt, completions in given]
    lost = [unwritten_of(tokenizer, prompt, completions, row["where"], kwargs) for row, prompt, completions in given]
    ids = iter(tokenize(tokenizer, [text for group in texts for text in group]))
    encoded = []
    for row, names, group, left_out in zip(rows, named, texts, lost):
        prompt, completions, rewritten = split_ids(tokenizer, group, [next(ids) for _ in group])
        if isinstance(row["prompt"], str):
            completions = [_with_eos(completion, tokenizer.eos_token_id) for completion in completions]
            if not row["prompt"] and completions[0][: len(leading)] == leading:  # a text alone
                start, [text] = len(leading) or 1, completions
                prompt, completions = text[:start], [text[start:]]
            elif prompt[: len(leading)] != leading:
                prompt = leading + prompt
        for name, part in zip(("prompt", *names), (prompt, *completions)):
            if not part:
                raise DataError(
                    f"{row['where']}: {name} has no token; expected at least one from the tokenizer and its "
                    "chat template; drop the row, or use a tokenizer that knows its words and an EOS"
                )
        kept, fitted = _cut(prompt, completions, tokenizer.bos_token_id, max_length, max_prompt_length)
        encoded.append(
            {
                "prompt_ids": kept,
                **{f"{name}_ids": value for name, value in grouped(dict(zip(names, fitted))).items()},
                **{name: row[name] for name in row_kind.numbers if name in row},
                "where": row["where"],
                "prompt_cut": len(kept) < len(prompt),
                "completions_cut": sum(len(f) < len(c) for f, c in zip(fitted, completions)),
                "count": len(fitted),
                "rewritten": rewritten,
                "unwritten": json.dumps(left_out),  # a list that is empty in the first rows would have no type
            }
        )
    return {name: [row[name] for row in encoded] for name in encoded[0]}


def render(
    tokenizer: Any, prompt: Any, completions: list[Any], where: str, kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns the text of the prompt, then the text of the prompt with each completion; where: the row, for errors.

    kwargs: variables of the chat template, see `write`.
    """
    if isinstance(prompt, str):
        return [prompt, *(prompt + completion for completion in completions)]
    conversation = as_conversation(prompt)
    wholes = [write(tokenizer, conversation.followed_by(one), where, kwargs=kwargs) for one in completions]
    return [write(tokenizer, conversation, where, answer=True, kwargs=kwargs), *wholes]


def split_ids(tokenizer: Any, texts: list[str], ids: list[list[int]]) -> tuple[list[int], list[list[int]], bool]:
    """Splits the ids of `render`'s texts into those of the prompt and of each completion.

    Returns prompt ids, completion ids, and whether the prompt's end was dropped, because the prompt's ids do not begin
    those of the whole.
    """
    prompt_text, *full_texts = texts
    prompt, *fulls = ids
    completions = []
    for text, full in zip(full_texts, fulls):
        if full[: len(prompt)] == prompt:
            completions.append(full[len(prompt) :])
        elif text.startswith(prompt_text):
            # A token spans the boundary: keep the prompt as generation will see it, and start a token there.
            completions += tokenize(tokenizer, [text[len(prompt_text) :]])
        else:
            shared = len(os.path.commonprefix([prompt, *fulls]))  # noqa: RUF071 (it compares lists)
            return prompt[:shared], [other[shared:] for other in fulls], True
    return prompt, completions, False


def _with_eos(completion: list[int], eos: int | None) -> list[int]:
    return completion if eos is None or completion[-1:] == [eos] else [*completion, eos]


def _cut(
    prompt: list[int], completions: list[list[int]], bos: int | None, max_length: int, max_prompt_length: int | None
) -> tuple[list[int], list[list[int]]]:
    """Cuts the prompt from the left, then the completions from the right, so that both fit into `max_length`."""
    room = max(max_length - max(map(len, completions)), max_length // 2)
    keep = min(len(prompt), room, max_prompt_length or room)
    if keep < len(prompt):
        head = prompt[:1] if prompt[0] == bos else []
        prompt = head + prompt[len(prompt) - keep + len(head) :]
    return prompt, [completion[: max_length - keep] for completion in completions]


def _report(encoded: datasets.Dataset, max_length: int) -> None:
    """Logs how many prompts and completions were cut, and warns of prompts that the chat template rewrites."""
    sums = dict.fromkeys(_COUNTS, 0)
    for batch in encoded.select_columns([*_COUNTS]).iter(batch_size=1000):
        sums = {name: total + sum(batch[name]) for name, total in sums.items()}
    cut, count, prompts_cut, rewritten = sums.values()
    logger.log(
        logging.WARNING if cut else logging.INFO,
        "max_length=%d: %d of %d completions cut at the end (without EOS), %d of %d prompts cut at the start",
        *(max_length, cut, count, prompts_cut, len(encoded)),
    )
    if rewritten:
        logger.warning(
            "in %d of %d rows the chat template writes the prompt otherwise when an answer follows: there "
            "the completion begins where the two part, and the prompt is shorter than in generation",
            *(rewritten, len(encoded)),
        )


def _add_mismatched(encoded: datasets.Dataset, prompts: np.ndarray, max_length: int) -> datasets.Dataset:
    """Adds the column `kl_completion_ids`, see `encode`; prompts: from `prompt_keys`."""
    datasets = require("datasets", "train")
    others = encoded.select_columns("completion_ids").select(_next_with_another_prompt(prompts)).flatten_indices()
    others = others.rename_column("completion_ids", "kl_completion_ids")

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return {"kl_completion_ids": row["kl_completion_ids"][: max_length - len(row["prompt_ids"])]}

    return datasets.concatenate_datasets([encoded, others], axis=1).map(cut, desc="mismatched completions")


def _next_with_another_prompt(prompts: np.ndarray) -> np.ndarray:
    """Returns for each row the next one (cyclic) whose prompt differs, (rows,) int64; prompts: from `prompt_keys`.

    Rows of one prompt are adjacent in most unpaired data, and a completion of the same prompt is no mismatch.
    """
    rows = np.arange(len(prompts))
    starts = np.flatnonzero(prompts != np.roll(prompts, 1))  # of the runs of one prompt
    if not len(starts):
        logger.warning("all %d rows have the same prompt: KTO's KL estimate then uses matching completions", len(rows))
        return (rows + 1) % len(rows)
    return starts[np.searchsorted(starts, rows, side="right") % len(starts)]


def with_column(dataset: datasets.Dataset, name: str, values: Any) -> datasets.Dataset:
    """Returns the data set with one more column."""
    add: Any = dataset.add_column  # its decorator supplies an argument that its signature demands
    return add(name, values)
