"""From preference data to batches: `load` reads rows, `encode` makes token ids, `Collator` pads them.

    a file ── load ──▶ prompt, chosen, rejected ── encode ──▶ token ids ── Collator ──▶ tensors (R, T)

A data set is of one kind, by what a method learns from:

    pair        prompt, chosen, rejected      score_chosen and score_rejected, prob, margin
    unpaired    prompt, completion            label or reward (or both), value
    list        prompt, completions           scores or rejected (or both)
    rejected    prompt, rejected
    chosen      prompt, chosen

What stands on the right are numbers that the data may carry beside the text (and a list's `rejected`, one more
completion, for the methods that compare it with all the others): in every row of a data set or in none.

Every row keeps `where` (``"pairs.jsonl:17"``, the line of a file; ``"name[17]"``, the index into anything
else), so that whatever is wrong with it can be said by name.
"""

from __future__ import annotations

import gzip
import importlib
import json
import logging
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .data_rows import (
    COMPLETIONS,
    FIELDS,
    FORMS,
    NUMBERS,
    DataError,
    check_alike,
    check_columns,
    check_kind,
    completions_of,
    filled,
    grouped,
    notes_of,
    shape_prompt,
    shape_row,
)

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ACCEPTED",
    "COMPLETIONS",
    "FIELDS",
    "IGNORE_INDEX",
    "NUMBERS",
    "Collator",
    "DataError",
    "check_columns",
    "encode",
    "encode_rows",
    "load",
    "load_prompts",
    "opening",
    "read",
    "render",
    "require",
    "split_ids",
    "tokenize",
    "with_column",
]

logger = logging.getLogger("xpo_fast")

IGNORE_INDEX = -100
ACCEPTED = (
    "a .jsonl or .json file (also .gz), a .parquet or .csv file, a folder or hub name that "
    "datasets.load_dataset understands, a datasets.Dataset, or a list of dicts"
)
# What `encode` leaves as it is.
_KEPT = ("label", "scores", *NUMBERS["pair"], *NUMBERS["unpaired"])


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise the ImportError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here: pip install 'xpo-fast[{extra}]' ({error})") from error


# --- load: rows in one shape ----------------------------------------------------------------------


def load(source: Any, *, kind: str, split: str = "train") -> datasets.Dataset:
    """Read preference data of any of the usual forms into one.

    Args:
        source: a path, a hub name, a `datasets.Dataset` or `DatasetDict`, or a list of dicts (`ACCEPTED`).
        kind: one of `COMPLETIONS`. A pair read as unpaired gives a desirable and an undesirable row; one with
            scores read as a list, a list of two; read as rejected or chosen, that half. Unpaired rows read as
            chosen are taken whatever their label.
        split: which split of a hub name, folder or `DatasetDict`; a single file is one split.

    Forms: TRL's preference data, prompt given or shared by `chosen` and `rejected`; TRL's unpaired data
    (`prompt`, `completion`, `label`); lists (`prompt`, `completions`, `scores`); each as strings or as lists of
    ``{"role", "content"}``; and Anthropic's transcripts (``"\\n\\nHuman: … \\n\\nAssistant: …"``), which become
    conversations. A conversation that stands alone, without a prompt, answers with its last turn.

    Returns:
        prompt, the columns of `COMPLETIONS`, where; and those of these that the data has, as floats:
        score_chosen, score_rejected, prob (P(chosen beats rejected), also read from prob_chosen), margin of
        pairs; reward, value of unpaired rows, and their label as a bool; scores (K numbers) of lists, and their
        rejected. Prompts and completions are all strings, or all lists of messages.

    Raises:
        DataError: a source that is not there or cannot be read, no rows, a row that is not of these forms, or
            one that lacks what other rows have.
    """
    check_kind(kind)
    datasets = require("datasets", "train")
    rows: list[dict[str, Any]] = []
    notes: Counter[str] = Counter()
    for where, row in read(source, split):
        for shaped in shape_row(row, kind, where):
            rows.append(shaped)
            check_alike(shaped, rows[0])
            notes.update(notes_of(shaped, kind))
    if not rows:
        raise DataError(f"{_name(source)}: no rows; expected {FIELDS[kind]} in each row")
    for note, count in notes.items():
        logger.warning("%s: %s in %d of %d rows", _name(source), note, count, len(rows))
    return datasets.Dataset.from_list(rows)


def load_prompts(source: Any, split: str = "train", *, alike: bool = False) -> list[dict[str, Any]]:
    """Rows with a prompt, text or messages, and whatever else the data have; what `load` reads, and prompts alone.

    Rows without a column `where` of their own get one, of type `Place`. Of rows with chosen and rejected, or chosen or
    completion, these and the prompt are brought into the form that `load` gives. alike: every row must have the columns of
    the first, as functions need that are called with columns.
    """
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for where, raw in read(source, split):
        row = shape_prompt(raw, where)
        compared = {**(row if alike else {"prompt": row["prompt"]}), "where": where}
        first = first or compared
        check_alike(compared, first)
        row.setdefault("where", Place(where))
        rows.append(row)
    if not rows:
        raise DataError(f"{_name(source)}: no rows; expected a prompt in each row")
    return rows


class Place(str):
    """Where a row stands in its source ("prompts.jsonl:17"), to be told from what a user's own column `where` says."""


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        return path.resolve().name if path.exists() else str(source)
    return "rows" if isinstance(source, list) else "dataset"


def read(source: Any, split: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row, as it stands in the source."""
    datasets = require("datasets", "train")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if path.is_file():
            yield from _read_file(path)
            return
        rows = _load_dataset(str(source), path, split)
    else:
        rows = source
    if isinstance(rows, dict):  # a DatasetDict is one
        if split not in rows:
            raise DataError(f"{_name(source)}: no split {split!r}; it has {', '.join(map(str, rows))}")
        rows = rows[split]
    if isinstance(rows, datasets.Dataset):
        rows = rows.with_format(None)
    elif not isinstance(rows, list):
        raise DataError(f"expected {ACCEPTED}; got {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{_name(source)}[{index}]", row


def _load_dataset(source: str, path: Path, split: str) -> Any:
    datasets = require("datasets", "train")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or _file_type(path)
    if looks_like_path and not path.exists():
        raise DataError(f"{source}: no such file or folder; expected {ACCEPTED}")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path) if path.exists() else source, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: datasets cannot load split {split!r} of it ({error}); expected {ACCEPTED}"
        ) from error


def _file_type(path: Path) -> str:
    name = path.name.lower()
    match = re.search(r"\.(jsonl|json)(\.gz)?$|\.(parquet|csv)$", name)
    return (match[1] or match[3]) if match else ""


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    kind = _file_type(path)
    if kind in ("jsonl", "json"):
        yield from _read_json(path)
    elif kind:
        datasets = require("datasets", "train")
        try:
            table = getattr(datasets.Dataset, f"from_{kind}")(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{path.name}: not a readable .{kind} file ({error.__cause__ or error})"
            ) from error
        for index, row in enumerate(table):
            yield f"{path.name}[{index}]", row
    else:
        raise DataError(f"{path.name}: a file of unknown type; expected {ACCEPTED}")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """One object a line (the row is named by its line), or one array of objects (named by its index)."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if line.startswith(b"["):
                    # An array may span lines: let the parser count them from here.
                    rows = _parse(line + b"\n" + file.read(), path.name, number)
                    for index, row in enumerate(rows):
                        yield f"{path.name}[{index}]", row
                elif line:
                    yield f"{path.name}:{number}", _parse(line, path.name, number)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path.name}:{number + 1}: cannot be read from this line on ({error}); "
            "expected a whole file, plain or gzip: copy or download it again"
        ) from error


def _parse(text: bytes, name: str, line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        raise DataError(f"{name}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno}); "
            "expected one JSON object a line, or one array of objects"
        ) from error


# --- encode: token ids ----------------------------------------------------------------------------


def encode(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    kind: str,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Token ids of what `load` gives, its other columns as they are.

    Text is prompt + completion + EOS, with the tokenizer's opening tokens (BOS) once in front. A conversation
    is what the chat template makes of it: the prompt with the generation prompt, then what follows it.

    What is longer than `max_length` is cut: first the prompt, from the left (its BOS stays), but not below
    half of `max_length`; then the completions, from the right, EOS first. `max_prompt_length` caps the prompt
    in any case. All completions of a prompt follow the same ids of it.

    Unpaired rows with a label also get `kl_completion_ids`, the mismatched completion of KTO's KL estimate: that
    of the next row (cyclic) with another prompt, cut to fit. It depends neither on batch size nor on `num_proc`.

    Returns:
        For each column of text one of ids, ``…_ids`` (completions_ids: a list of lists), and the others.

    Raises:
        DataError: a conversation without a chat template or refused by it, a prompt or completion without a
            token, or labelled unpaired data of one row.
        ValueError: a length too small, or columns that are not those of `load`.
    """
    check_kind(kind)
    if max_length < 2:
        raise ValueError(
            f"max_length must be at least 2 (a prompt token and a completion token); got {max_length}"
        )
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1 or None; got {max_prompt_length}")
    loaded = [{"prompt", "where", *form} for form in FORMS[kind] if set(form) >= set(COMPLETIONS[kind])]
    if not any(columns <= set(dataset.column_names) for columns in loaded):
        raise ValueError(
            f"encode takes what load(…, kind={kind!r}) gives, with columns "
            f"{' or '.join(', '.join(sorted(columns)) for columns in loaded)}; "
            f"got {', '.join(dataset.column_names)}"
        )
    if not len(dataset):
        raise DataError(f"no rows to encode; expected at least one {kind} row")
    first = dataset[0]
    if not isinstance(first["prompt"], str) and not tokenizer.chat_template:
        raise DataError(
            f"{first['where']}: a conversation, and the tokenizer has no chat template to write it with; "
            "pass one (--chat-template FILE), or give prompt and completions as text"
        )
    labelled = kind == "unpaired" and "label" in dataset.column_names
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
            "opening": opening(tokenizer, first["prompt"]),
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
        },
    )
    _report(encoded, max_length)
    encoded = encoded.remove_columns(["prompt_cut", "completions_cut", "count", "parted"])
    if labelled:
        return _add_mismatched(encoded, list(dataset["prompt"]), max_length)
    return encoded


def opening(tokenizer: Any, prompt: str | list) -> list[int]:
    """The ids a tokenizer puts before a text (BOS, most often). A chat template writes them itself."""
    if not isinstance(prompt, str):
        return []
    bare = tokenize(tokenizer, [prompt])[0]
    special = tokenizer(prompt, verbose=False)["input_ids"]
    starts = range(len(special) - len(bare) + 1)
    return special[: next((i for i in starts if special[i : i + len(bare)] == bare), 0)]


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: texts beyond the model's length are no cause for a warning, they are cut afterwards.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_rows(
    batch: dict[str, list],
    tokenizer: Any,
    kind: str,
    opening: list[int],
    max_length: int,
    max_prompt_length: int | None,
) -> dict[str, list]:
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    named = [completions_of(row, kind) for row in rows]
    texts = [render(tokenizer, row["prompt"], [*by.values()], row["where"]) for row, by in zip(rows, named)]
    ids = iter(tokenize(tokenizer, [text for group in texts for text in group]))
    encoded = []
    for row, names, group in zip(rows, named, texts):
        prompt, completions, parted = split_ids(tokenizer, group, [next(ids) for _ in group])
        if isinstance(row["prompt"], str):
            if prompt[: len(opening)] != opening:
                prompt = opening + prompt
            completions = [_end(completion, tokenizer.eos_token_id) for completion in completions]
        for name, part in zip(("prompt", *names), (prompt, *completions)):
            if not part:
                raise DataError(
                    f"{row['where']}: {name} has no token; expected at least one from the tokenizer and its "
                    "chat template; drop the row, or use a tokenizer that knows its words and an EOS"
                )
        short, fitted = _fit(prompt, completions, tokenizer.bos_token_id, max_length, max_prompt_length)
        encoded.append(
            {
                "prompt_ids": short,
                **{f"{name}_ids": value for name, value in grouped(dict(zip(names, fitted))).items()},
                **{name: row[name] for name in _KEPT if name in row},
                "where": row["where"],
                "prompt_cut": len(short) < len(prompt),
                "completions_cut": sum(len(f) < len(c) for f, c in zip(fitted, completions)),
                "count": len(fitted),
                "parted": parted,
            }
        )
    return {name: [row[name] for row in encoded] for name in encoded[0]}


def render(tokenizer: Any, prompt: Any, completions: list[Any], where: str) -> list[str]:
    """The text of the prompt, then of the prompt with each completion."""
    if isinstance(prompt, str):
        return [prompt, *(prompt + completion for completion in completions)]
    try:
        return [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
            *(
                tokenizer.apply_chat_template(prompt + completion, tokenize=False)
                for completion in completions
            ),
        ]
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise DataError(
            f"{where}: the chat template refuses this conversation ({error}); "
            "drop the row, or pass another template (--chat-template FILE)"
        ) from error


def split_ids(
    tokenizer: Any, texts: list[str], ids: list[list[int]]
) -> tuple[list[int], list[list[int]], bool]:
    """Prompt ids, completion ids, and whether the prompt's end had to go (it is no prefix of the whole)."""
    prompt_text, *whole_texts = texts
    prompt, *wholes = ids
    completions = []
    for text, whole in zip(whole_texts, wholes):
        if whole[: len(prompt)] == prompt:
            completions.append(whole[len(prompt) :])
        elif text.startswith(prompt_text):
            # A token spans the boundary: keep the prompt as generation will see it, and start a token there.
            completions += tokenize(tokenizer, [text[len(prompt_text) :]])
        else:
            shared = min(_shared_prefix(prompt, other) for other in wholes)
            return prompt[:shared], [other[shared:] for other in wholes], True
    return prompt, completions, False


def _shared_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _end(completion: list[int], eos: int | None) -> list[int]:
    return completion if eos is None or completion[-1:] == [eos] else [*completion, eos]


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    bos: int | None,
    max_length: int,
    max_prompt_length: int | None,
) -> tuple[list[int], list[list[int]]]:
    """Cut the prompt from the left, then the completions from the right, to `max_length` in all."""
    room = max(max_length - max(map(len, completions)), max_length // 2)
    keep = min(len(prompt), room, max_prompt_length or room)
    if keep < len(prompt):
        head = prompt[:1] if prompt[0] == bos else []
        prompt = head + prompt[len(prompt) - keep + len(head) :]
    return prompt, [completion[: max_length - keep] for completion in completions]


def _report(encoded: datasets.Dataset, max_length: int) -> None:
    rows = len(encoded)
    names = ("completions_cut", "count", "prompt_cut", "parted")
    cut, count, prompts_cut, parted = (sum(encoded[name]) for name in names)
    logger.log(
        logging.WARNING if cut else logging.INFO,
        "max_length=%d: %d of %d completions cut at the end (without EOS), %d of %d prompts cut at the start",
        *(max_length, cut, count, prompts_cut, rows),
    )
    if parted:
        logger.warning(
            "in %d of %d rows the chat template writes the prompt otherwise when an answer follows: there "
            "the completion begins where the two part, and the prompt is shorter than in generation",
            *(parted, rows),
        )


def _add_mismatched(encoded: datasets.Dataset, prompts: list[Any], max_length: int) -> datasets.Dataset:
    datasets = require("datasets", "train")
    others = (
        encoded.select_columns("completion_ids").select(_next_with_another_prompt(prompts)).flatten_indices()
    )
    encoded = datasets.concatenate_datasets(
        [encoded, others.rename_column("completion_ids", "kl_completion_ids")], axis=1
    )
    return encoded.map(_cut_mismatched, fn_kwargs={"max_length": max_length}, desc="mismatched completions")


def _cut_mismatched(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    return {"kl_completion_ids": row["kl_completion_ids"][: max_length - len(row["prompt_ids"])]}


def _next_with_another_prompt(prompts: list[Any]) -> list[int]:
    """For each row the next one (cyclic) whose prompt differs.

    Rows of one prompt stand together in most unpaired data, and a completion of the same prompt is no
    mismatch.
    """
    rows = len(prompts)
    following = [(i + 1) % rows for i in range(rows)]
    if all(prompt == prompts[0] for prompt in prompts):
        logger.warning(
            "all %d rows have the same prompt: KTO's KL estimate then uses matching completions", rows
        )
        return following
    for i in reversed([*range(rows), *range(rows)]):  # twice, because the last rows look past the end
        after = (i + 1) % rows
        following[i] = after if prompts[i] != prompts[after] else following[after]
    return following


def with_column(dataset: datasets.Dataset, name: str, values: Any) -> datasets.Dataset:
    """The data set with one more column."""
    add: Any = dataset.add_column  # its decorator supplies an argument that its signature demands
    return add(name, values)


# --- collate: padded tensors ----------------------------------------------------------------------


@dataclass
class Collator:
    """Encoded rows to right-padded tensors, in the row layout of `Objective`.

    pair: the P chosen rows, then the P rejected rows (R = 2P). unpaired, rejected, chosen: a row each (R = B or
    P). list: the K rows of a prompt side by side (R = P·K), K the longest list of the batch, and where the data
    has `rejected`, that as one more row behind them (R = P·(K + 1)). A completion that a shorter list lacks is a
    row without a target, and one position to attend to: attention over none is NaN in some kernels.

    ``targets[r, t]`` is the token that position t predicts, ``input_ids[r, t + 1]``, where that token belongs
    to the completion, and -100 elsewhere. Padding is known by length and never by id: EOS is scored even
    where ``pad_token_id`` is the same id.

    Returns:
        input_ids, attention_mask, targets (R, T) int64, and what the features carry of these:

        * pair: score_w, score_l, prob_w, margin (P,) float32;
        * unpaired: desirable (B,) bool, reward, value (B,) float32; kl_input_ids, kl_attention_mask, kl_targets
          (B, T') int64, the prompts with their mismatched completions; kl_ref_logps (B,) float32;
        * list: list_lengths (P,) int64, and scores (P, K) float32, NaN where a completion is missing;
        * ref_logps (R,) float32, of the features ref_logp_chosen and ref_logp_rejected, or ref_logp: of a list
          one log-prob a row, 0 for a completion that is missing.
    """

    pad_token_id: int
    kind: str
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = COMPLETIONS[self.kind]
        if self.kind == "list":
            return self._lists(features)
        batch = self._pad([(row["prompt_ids"], row[f"{name}_ids"]) for name in names for row in features])
        ref_names = ["ref_logp" if name == "completion" else f"ref_logp_{name}" for name in names]
        batch |= _column(features, ref_names, "ref_logps", torch.float32)
        for name, key in NUMBERS.get(self.kind, {}).items():
            batch |= _column(features, [name], key, torch.float32)
        if self.kind == "unpaired":
            batch |= _column(features, ["label"], "desirable", torch.bool)
            if "kl_completion_ids" in features[0]:
                mismatched = self._pad([(row["prompt_ids"], row["kl_completion_ids"]) for row in features])
                batch |= {f"kl_{name}": value for name, value in mismatched.items()}
                batch |= _column(features, ["kl_ref_logp"], "kl_ref_logps", torch.float32)
        return batch

    def _lists(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["completions_ids"]) for row in features)
        last = "rejected_ids" in features[0]
        rows: list[tuple[list[int], list[int]]] = []
        for row in features:
            listed = [(row["prompt_ids"], completion) for completion in row["completions_ids"]]
            rejected = [(row["prompt_ids"], row["rejected_ids"])] if last else []
            rows += filled(listed, longest, ([], [])) + rejected
        batch = self._pad(rows)
        batch["list_lengths"] = torch.tensor([len(row["completions_ids"]) for row in features])
        if "scores" in features[0]:
            scores = [filled(row["scores"], longest, math.nan) for row in features]
            batch["scores"] = torch.tensor(scores, dtype=torch.float32)  # (P, K)
        if "ref_logp" in features[0]:
            ref_logps: list[float] = []
            for row in features:
                given, count = row["ref_logp"], len(row["completions_ids"])
                if len(given) < count + last:
                    raise DataError(
                        f"{row.get('where', 'a row')}: expected a ref_logp for each of {count + last} completions; "
                        f"got {len(given)}; compute the reference's log-probs again"
                    )
                ref_logps += filled(given[:count], longest, 0.0) + (given[-1:] if last else [])
            batch["ref_logps"] = torch.tensor(ref_logps, dtype=torch.float32)  # (R,)
        return batch

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        multiple = self.pad_to_multiple_of or 1
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        shape = (len(rows), -(-longest // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)  # (R, T)
        attention_mask = torch.zeros(shape, dtype=torch.int64)  # (R, T)
        targets = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)  # (R, T)
        for r, (prompt, completion) in enumerate(rows):
            ids = torch.tensor([*prompt, *completion], dtype=torch.int64)
            input_ids[r, : len(ids)] = ids
            attention_mask[r, : max(len(ids), 1)] = 1
            targets[r, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}


def _column(
    features: list[dict[str, Any]], names: list[str], key: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """``{key: (len(names) · B,)}``, or nothing where the rows carry none of `names`."""
    if not any(name in row for row in features for name in names):
        return {}
    return {key: torch.tensor([row[name] for name in names for row in features], dtype=dtype)}
