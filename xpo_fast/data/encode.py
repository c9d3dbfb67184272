"""Encoding: a data set of `load` becomes token ids, cut to a length."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .kinds import DataError, get_kind
from .load import prompt_keys
from .rows import completions_of, grouped
from .sources import require
from .template import (
    as_conversation,
    check_continued,
    prompt_of,
    unwritten_of,
    warn_of_unread,
    warn_of_unwritten,
    write,
)
from .turns import check_score, scored_spans

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("xpo_fast")

# Per row, for `_log_counts` alone.
_COUNTS: tuple[str, ...] = ("completions_cut", "count", "prompt_cut", "rewritten", "joined", "masked", "unscored")


def encode(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    kind: str,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    score: str = "assistant",
    num_proc: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    """Tokenizes a data set of `load`, and cuts its rows to a length.

    Text is prompt + completion + EOS, with the tokenizer's leading special tokens (BOS) once in front. A conversation
    is written by the chat template: the prompt with the generation prompt, then what follows it. The prompt of a text
    with an empty prompt is the leading special tokens; where the tokenizer has none, the first token of the text, which
    nothing predicts.

    The ids are those that the tokenizer gives the whole text. All completions of a prompt follow the same ids of it:
    those with which the prompt alone and the prompt with each completion begin. Where a token holds the prompt's end
    and a completion's beginning, the completion's ids begin before it: the tokens that hold the prompt's words alone
    are read and not scored, and the one that holds both is scored, because no other token says these words of the
    completion. (Generation sees the prompt's own ids there.)

    What is scored is the completion. Of one of several turns it is what the assistant says, each turn with its end, or
    what `score` says; the other turns are read.

    Rows longer than `max_length` are cut: first the prompt, from the left (the special tokens that open it stay), but
    not below half of `max_length`; then the completions, from the right, EOS first. `max_prompt_length` caps the prompt
    in any case.

    Unpaired rows with a label also get `kl_completion_ids`, the mismatched completion of KTO's KL estimate: that of the
    next row (cyclic) with another prompt, cut to fit. It depends neither on batch size nor on `num_proc`.

    dataset: from `load`, of this kind. kind: a key of `KINDS`. Lengths are in tokens. score: of a completion of several
    turns, "assistant" (what the assistant says), "last" (its last turn) or "all". num_proc: how many processes.
    chat_template_kwargs: variables of the chat template; those of a row's column come first.

    Returns one column of ids for each column of text, ``…_ids`` (completions_ids: a list of lists), and the others. If
    a token of any completion is not scored, the data set also has, for each column of completions, ``…_mask``: True for
    the tokens that are. Raises DataError for a conversation without a chat template or refused by it, a prompt or
    completion without a token, a completion of which nothing is scored, or labelled unpaired data of one row;
    ValueError for a length that is too small, an unknown score, or columns that are not those of `load`.
    """
    row_kind = get_kind(kind)
    check_score(score)
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
            "score": score,
            "chat_template_kwargs": chat_template_kwargs,
        },
    )
    sums = _log_counts(encoded, max_length)
    left_out: Any = encoded.select_columns("unwritten")
    listed = (names for some in left_out.iter(batch_size=1000) for names in some["unwritten"])
    warn_of_unwritten(itertools.chain.from_iterable(map(json.loads, listed)), len(encoded))
    masks = [] if sums["masked"] else [name for name in encoded.column_names if name.endswith("_mask")]
    encoded = encoded.remove_columns([*_COUNTS, "unwritten", *masks])
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


def tokenize_after(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text that follows another, without special tokens and without a space of their own.

    Some tokenizers put a space in front of whatever they are given (Metaspace, add_prefix_space).
    """
    [twice, ids] = tokenize(tokenizer, ["a", text])
    if decode(tokenizer, twice + twice) == "aa":
        return ids
    for before in ("\n", "a", ".", "|"):
        [known, whole] = tokenize(tokenizer, [before, before + text])
        if whole[: len(known)] == known:
            return whole[len(known) :]
    return ids


def decode_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text of token ids as it stands behind others, without special tokens: the space in front, too.

    Some tokenizers leave out the space in front of whatever they decode (Metaspace, Llama 2's). It is left out here
    only where they put it there themselves, behind a special token.
    """
    special, last = special_ids(tokenizer), list(before[-1:])
    said = [i for i in ids if i not in special]
    alone, known, whole = (decode(tokenizer, x) for x in (said, last, [*last, *said]))
    core = getattr(tokenizer, "backend_tokenizer", None)
    joined = core is not None and core.decoder is None  # tokens with spaces between, which are of no text
    if joined or not said or not whole.startswith(known):
        return alone
    if special.issuperset(last) and tokenize(tokenizer, [known + alone])[0] == [*last, *said]:
        return alone
    return whole[len(known) :]


def special_ids(tokenizer: Any) -> set[int]:
    """Returns the ids that are no words: BOS, EOS, and those that open and close messages."""
    return {*tokenizer.all_special_ids, *(i for i, x in tokenizer.added_tokens_decoder.items() if x.special)}


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of token ids, special tokens too, as it was written."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_rows(
    batch: dict[str, list],
    tokenizer: Any,
    kind: str,
    leading: list[int],
    max_length: int,
    max_prompt_length: int | None,
    score: str = "assistant",
    own: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, list]:
    """Tokenizes and cuts a batch of rows, see `encode`.

    batch: columns, those of `load`. leading: from `leading_ids`, for rows of text. own: as for `split_ids`. Returns
    also the columns ``…_mask``, the counts `prompt_cut`, `completions_cut`, `count` (of completions), `rewritten`
    (whether the chat template writes the prompt differently before an answer), `joined` (whether a token holds the
    prompt's end and a completion's beginning), `masked` (whether any token of a completion is not scored) and
    `unscored` (the completions of which nothing that is scored was left); and `unwritten`, the JSON of what the chat
    template leaves out.
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
    for row, conversation, names, group, left_out in zip(rows, prompts, named, texts, lost):
        split = split_ids(tokenizer, group, [next(ids) for _ in group], own)
        prompt, completions = split.prompt, split.completions
        told = conversation if isinstance(conversation, str) else as_conversation(conversation).told(kwargs)
        masks = [
            _mask(tokenizer, told, split, i, x, group[i + 1], score, row["where"]) for i, x in enumerate(names.values())
        ]
        if isinstance(row["prompt"], str):
            completions = [_with_eos(completion, tokenizer.eos_token_id) for completion in completions]
            if not row["prompt"] and completions[0][: len(leading)] == leading:  # a text alone
                start, [text] = len(leading) or 1, completions
                prompt, completions, masks = text[:start], [text[start:]], [masks[0][start:]]
            elif prompt[: len(leading)] != leading:
                prompt = leading + prompt
            masks = [[*m, *[True] * (len(ids) - len(m))] for m, ids in zip(masks, completions)]  # EOS
        for name, part in zip(("prompt", *names), (prompt, *completions)):
            if not part:
                raise _without_token(row["where"], name, joined=split.joined)
        for name, mask in zip(names, masks):
            if not any(mask):
                raise DataError(
                    f"{row['where']}: nothing of {name} is scored; drop the row, or score all (--score all)"
                )
        kept, fitted = _cut(tokenizer, prompt, completions, leading, max_length, max_prompt_length)
        masks = [mask[: len(ids)] for mask, ids in zip(masks, fitted)]
        encoded.append(
            {
                "prompt_ids": kept,
                **{f"{name}_ids": value for name, value in grouped(dict(zip(names, fitted))).items()},
                **{f"{name}_mask": value for name, value in grouped(dict(zip(names, masks))).items()},
                **{name: row[name] for name in row_kind.numbers if name in row},
                "where": row["where"],
                "prompt_cut": len(kept) < len(prompt),
                "completions_cut": sum(len(f) < len(c) for f, c in zip(fitted, completions)),
                "count": len(fitted),
                "rewritten": split.rewritten,
                "joined": split.joined,
                "masked": not all(map(all, masks)),
                "unscored": sum(not any(mask) for mask in masks),
                "unwritten": json.dumps(left_out),  # a list that is empty in the first rows would have no type
            }
        )
    return {name: [row[name] for row in encoded] for name in encoded[0]}


def _without_token(where: str, name: str, *, joined: bool) -> DataError:
    if joined and name == "prompt":
        return DataError(
            f"{where}: the tokenizer joins the first token of the prompt with the completion's beginning, and no token "
            "stands before it that could predict it; begin the prompt with more words, or use a tokenizer with a BOS"
        )
    return DataError(
        f"{where}: {name} has no token; expected at least one from the tokenizer and its "
        "chat template; drop the row, or use a tokenizer that knows its words and an EOS"
    )


def render(
    tokenizer: Any, prompt: Any, completions: list[Any], where: str, kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns the text of the prompt, then the text of the prompt with each completion; where: the row, for errors.

    kwargs: variables of the chat template, see `write`.
    """
    if isinstance(prompt, str):
        return [prompt, *(prompt + completion for completion in completions)]
    conversation = as_conversation(prompt)
    for completion in completions:
        check_continued(conversation, completion, where)
    wholes = [write(tokenizer, conversation.followed_by(one), where, kwargs=kwargs) for one in completions]
    return [write(tokenizer, conversation, where, answer=True, kwargs=kwargs), *wholes]


class Split(NamedTuple):
    """Token ids of a prompt and of the completions that follow it.

    read: of each completion, how many of its first tokens hold the prompt's words alone. rewritten: whether the chat
    template writes the prompt otherwise when an answer follows, so that the prompt's end was left out. joined: whether
    a token holds the prompt's end and a completion's beginning.
    """

    prompt: list[int]
    completions: list[list[int]]
    read: list[int]
    rewritten: bool = False
    joined: bool = False


def split_ids(tokenizer: Any, texts: list[str], ids: list[list[int]], own: bool = False) -> Split:
    """Splits the ids of `render`'s texts into those of the prompt and of each completion.

    own: the completions follow the prompt's own ids, which a sampler was given: where a token would hold the prompt's
    end and a completion's beginning, a token begins at the completion's.
    """
    prompt_text, *full_texts = texts
    prompt, *fulls = ids
    if all(full[: len(prompt)] == prompt for full in fulls):
        return Split(prompt, [full[len(prompt) :] for full in fulls], [0] * len(fulls))
    follows = [text.startswith(prompt_text) for text in full_texts]
    if own and all(follows):
        completions = [
            full[len(prompt) :]
            if full[: len(prompt)] == prompt
            else tokenize_after(tokenizer, text[len(prompt_text) :])
            for text, full in zip(full_texts, fulls)
        ]
        return Split(prompt, completions, [0] * len(fulls))
    shared = len(os.path.commonprefix([prompt, *fulls]))  # noqa: RUF071 (it compares lists)
    # TRL and lm-evaluation-harness, too, tokenize the whole and let the token that holds both belong to the completion.
    read = [within(tokenizer, prompt, full) - shared if f else 0 for full, f in zip(fulls, follows)]
    completions = [full[shared:] for full in fulls]
    return Split(prompt[:shared], completions, read, rewritten=not all(follows), joined=all(follows))


def within(tokenizer: Any, part: list[int], whole: list[int]) -> int:
    """Returns how many of the first tokens of a text stand within a part that it begins with, from the ids of both."""
    shared = len(os.path.commonprefix([part, whole]))  # noqa: RUF071 (it compares lists)
    left, found = decode(tokenizer, part[shared:]), shared
    for end in range(shared + 1, len(whole) + 1 if left else 0):
        text = decode(tokenizer, whole[shared:end])
        if left.startswith(text):
            found = end
        elif not text.endswith("\ufffd") or len(text) > len(left) + 4:  # else the token ends within a character
            break
    return found


def _mask(
    tokenizer: Any, prompt: Any, split: Split, i: int, completion: Any, text: str, score: str, where: str
) -> list[bool]:
    """Returns which tokens of completion i are scored; text: of the prompt and it; where: the row, for errors."""
    ids, read = split.completions[i], split.read[i]
    if isinstance(completion, str) or len(completion) == 1 or score == "all":
        return [False] * read + [True] * (len(ids) - read)
    spans = scored_spans(tokenizer, prompt, completion, text, where, score)
    whole = [*split.prompt, *ids]
    edges = sorted({edge for span in spans for edge in span} - {0, len(text)})
    inside = {
        c: within(tokenizer, part, whole) for c, part in zip(edges, tokenize(tokenizer, [text[:c] for c in edges]))
    }
    inside |= {0: 0, len(text): len(whole)}
    mask = [False] * len(whole)
    for start, end in spans:
        mask[inside[start] : inside[end]] = [True] * (inside[end] - inside[start])
    return [False] * read + mask[len(split.prompt) + read :]


def _with_eos(completion: list[int], eos: int | None) -> list[int]:
    return completion if eos is None or completion[-1:] == [eos] else [*completion, eos]


def _cut(
    tokenizer: Any,
    prompt: list[int],
    completions: list[list[int]],
    leading: list[int],
    max_length: int,
    max_prompt_length: int | None,
) -> tuple[list[int], list[list[int]]]:
    """Cuts the prompt from the left, then the completions from the right, so that both fit into `max_length`."""
    room = max(max_length - max(map(len, completions)), max_length // 2)
    keep = min(len(prompt), room, max_prompt_length or room)
    if keep < len(prompt):
        head = prompt[: min(_opening(tokenizer, prompt, leading), keep)]
        prompt = head + prompt[len(prompt) - keep + len(head) :]
    return prompt, [completion[: max_length - keep] for completion in completions]


def _opening(tokenizer: Any, prompt: list[int], leading: list[int]) -> int:
    """Returns how many tokens open a prompt: BOS, and other special tokens before its first word or message.

    A special token that stands elsewhere, too, opens a message, as does the last before the first word if the tokenizer
    does not know it for its BOS or one of `leading`.
    """
    special, count = special_ids(tokenizer), 0
    while count < len(prompt) and prompt[count] in special and prompt.count(prompt[count]) == 1:
        count += 1
    if count and prompt[count - 1] not in {tokenizer.bos_token_id, *leading}:
        count -= count == len(prompt) or prompt[count] not in special
    return count


def _log_counts(encoded: datasets.Dataset, max_length: int) -> dict[str, int]:
    """Logs how many prompts and completions were cut, and warns of what is other than in generation, or not scored.

    Returns the sums of the columns `_COUNTS`.
    """
    sums = dict.fromkeys(_COUNTS, 0)
    batch: Any
    for batch in encoded.select_columns([*_COUNTS]).iter(batch_size=1000):
        sums |= {name: total + sum(batch[name]) for name, total in sums.items()}
    cut, count, prompts_cut, rewritten, joined, _, unscored = sums.values()
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
    if joined:
        logger.warning(
            "in %d of %d rows a token holds the prompt's end and a completion's beginning: it is scored, and "
            "generation, which sees the prompt's own tokens, cannot say it; a prompt that ends with a word, and "
            "completions that begin with a space or a line, avoid it",
            *(joined, len(encoded)),
        )
    if unscored:
        logger.warning(
            "max_length=%d: %d of %d completions were cut before anything that is scored: they teach nothing",
            *(max_length, unscored, count),
        )
    return sums


def _add_mismatched(encoded: datasets.Dataset, prompts: np.ndarray, max_length: int) -> datasets.Dataset:
    """Adds the column `kl_completion_ids`, see `encode`; prompts: from `prompt_keys`."""
    datasets = require("datasets", "train")
    names = [name for name in ("completion_ids", "completion_mask") if name in encoded.column_names]
    others = encoded.select_columns(names).select(_next_with_another_prompt(prompts)).flatten_indices()
    others = others.rename_columns({name: f"kl_{name}" for name in names})

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        # The tokens that hold the words of the other prompt alone are not this row's.
        mask = row.get("kl_completion_mask", ())
        start = mask.index(True) if True in mask else 0
        end = start + max_length - len(row["prompt_ids"])
        return {f"kl_{name}": row[f"kl_{name}"][start:end] for name in names}

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
