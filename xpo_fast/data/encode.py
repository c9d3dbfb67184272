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

Rows of a file flow into an Arrow file that is mapped into memory, and are never all in memory: `load` and `encode` take
files of any size. The Arrow files stand in the folder for temporary files ($TMPDIR) until the program ends.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import re
import tempfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .forms import renamed
from .kinds import KINDS, DataError, get_kind
from .rows import (
    check_alike,
    check_columns,
    check_names,
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
    "IGNORE_INDEX",
    "Collator",
    "DataError",
    "check_columns",
    "encode",
    "encode_rows",
    "load",
    "load_prompts",
    "load_rows",
    "opening",
    "origins",
    "prompt_keys",
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
_AT_ONCE = 1000  # rows
_BLOCK = 2**20  # bytes


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise the ImportError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here: pip install 'xpo-fast[{extra}]' ({error})") from error


# --- load: rows in one shape ----------------------------------------------------------------------


def load(
    source: Any,
    *,
    kind: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    seed: int = 42,
) -> datasets.Dataset:
    """Read preference data of any of the usual forms into one.

    Args:
        source: a path, a hub name, a `datasets.Dataset` or `DatasetDict`, or a list of dicts (`ACCEPTED`); or a list of
            paths and names, which are read one after another. A path or name may be followed by ``:SPLIT``, ``:WEIGHT``
            or ``:SPLIT:WEIGHT``. What `load` has returned for this kind stays as it is; what was changed since is checked
            again.
        kind: a key of `KINDS`. A pair read as unpaired gives a desirable and an undesirable row; one with
            scores read as a list, a list of two; read as rejected or chosen, that half. Unpaired rows read as
            chosen are taken whatever their label.
        split: which split of a hub name, folder or `DatasetDict`, where the name does not say it; a single file is one
            split.
        columns: {field: column}, for columns of other names; a column may be a path into dicts and over lists, as
            ``responses.best`` (`data_forms.renamed`).
        config: which configuration of a hub name, `name` of `datasets.load_dataset`.
        seed: of the order in which several sources with weights are mixed. A weight is a source's share of the rows: each
            next row is of a source drawn with these probabilities (`datasets.interleave_datasets`), until one source has
            no row left; so no row is taken twice, and of the others some are left out.

    Forms: TRL's preference data, prompt given or shared by `chosen` and `rejected`; TRL's unpaired data
    (`prompt`, `completion`, `label`); lists (`prompt`, `completions`, `scores`); each as strings or as lists of
    ``{"role", "content"}``; and Anthropic's transcripts (``"\\n\\nHuman: … \\n\\nAssistant: …"``), which become
    conversations. A conversation that stands alone, without a prompt, answers with its last turn. ShareGPT, Alpaca and
    others are read where they can be read in one way only, see `data_forms` and docs/data.md; rows of `text` alone are
    read as chosen, with an empty prompt.

    Returns:
        prompt, the kind's columns of completions, where; and those of these that the data has, as floats:
        score_chosen, score_rejected, prob (P(chosen beats rejected), also read from prob_chosen), margin of
        pairs; reward, value of unpaired rows, and their label as a bool; scores (K numbers) of lists, and their
        rejected. Prompts and completions are all strings, or all lists of messages.

    Raises:
        DataError: a source that is not there or cannot be read, no rows, a row that is not of these forms, or
            one that lacks what other rows have.
        ValueError: columns under a name that no row is read by.
    """
    about = get_kind(kind)
    check_names(columns or ())
    again = not columns and _is_loaded(source)

    def shape(row: Any, where: str) -> list[dict[str, Any]]:
        # Text without a prompt is of this form after it was read, and of none before.
        text = again and about.reads_text and isinstance(row, dict) and row.get("prompt") == ""
        return shape_row({"text": row.get(kind)} if text else row, about, where)

    if again and source.info.config_name == kind and _in_shape(source, shape):
        return source
    rows = load_rows(
        source,
        shape,
        split=split,
        columns=columns,
        config=config,
        seed=seed,
        expected=about.expected,
        notes=lambda made, row: notes_of(made, row, about),
    )
    rows.info.config_name, rows.info.dataset_name = kind, rows._fingerprint
    return rows


def _in_shape(rows: Any, shape: Callable[[Any, str], list[dict[str, Any]]]) -> bool:
    """Whether a data set of `load` is as it was, or its rows still are what they are read as; DataError for a faulty one."""
    if rows.info.dataset_name == rows._fingerprint:
        return True
    first: dict[str, Any] = {}
    for row in rows.with_format(None):
        made = shape(row, row["where"])
        for one in made:
            first.update({} if first else one)
            check_alike(one, first)
        if None in row.values() or [row | one for one in made] != [row]:
            return False
    return bool(first)


def load_rows(
    source: Any,
    shape: Callable[[Any, str], Iterable[dict[str, Any]]],
    *,
    split: str,
    columns: Mapping[str, str] | None,
    config: str | None,
    seed: int,
    expected: str,
    notes: Callable[[dict[str, Any], dict[str, Any]], Iterator[str]] = lambda made, row: iter(()),
) -> datasets.Dataset:
    """Read a source as `load` does, and bring each row into shape by a function of its own.

    shape: makes rows of a row of the source and its place. expected: what each row should have, for errors. notes: what is
    worth knowing about a row that was made, and the one that it was made of, counted and logged once.
    """
    datasets = require("datasets", "train")
    parts = _parts(source, split, config)
    first: dict[str, Any] = {}
    found = []
    for part in parts:
        counts: Counter[str] = Counter()

        def shaped(part: _Part = part, counts: Counter[str] = counts) -> Iterator[dict[str, Any]]:
            for where, row in part.rows():
                row = renamed(row, columns or {}, where)
                for made in shape(row, where):
                    first.update({} if first else made)
                    check_alike(made, first)
                    counts.update(notes(made, row))
                    yield made

        rows: Any = datasets.Dataset.from_list([*shaped()]) if isinstance(part.source, list) else _mapped(shaped())
        if not rows:
            raise DataError(f"{part.label}: no rows; expected {expected} in each row")
        for note, count in counts.items():
            logger.warning("%s: %s in %d of %d rows", part.label, note, count, len(rows))
        found.append(rows)
    order = _mixture([part.weight for part in parts], [len(rows) for rows in found], seed)
    rows = found[0] if len(found) == 1 else datasets.concatenate_datasets(found)
    rows = rows if order is None else rows.select(order)
    rows.info.builder_name = __name__
    return rows


def _is_loaded(source: Any) -> bool:
    """Whether `load_rows` made it, or it was selected of such a data set: its rows have their form and their places."""
    return getattr(getattr(source, "info", None), "builder_name", None) == __name__ and "where" in source.column_names


def load_prompts(
    source: Any,
    split: str = "train",
    *,
    alike: bool = False,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    seed: int = 42,
) -> list[dict[str, Any]]:
    """Read rows with a prompt, text or messages, and whatever else the data have; what `load` reads, and prompts alone.

    Rows without a column `where` of their own get one, of type `Place`. Of rows with chosen and rejected, or chosen or
    completion, these and the prompt are brought into the form that `load` gives. alike: every row must have the columns of
    the first, as functions need that are called with columns. The other arguments are those of `load`; columns may have any
    names.
    """
    found: list[dict[str, Any]] = []
    counts: list[int] = []
    first: dict[str, Any] = {}
    parts = _parts(source, split, config)
    for part in parts:
        before = len(found)
        for where, raw in part.rows():
            row = shape_prompt(renamed(raw, columns or {}, where), where)
            compared = {**(row if alike else {"prompt": row["prompt"]}), "where": where}
            first = first or compared
            check_alike(compared, first)
            row.setdefault("where", Place(where))
            found.append(row)
        counts.append(len(found) - before)
        if not counts[-1]:
            raise DataError(f"{part.label}: no rows; expected a prompt in each row")
    order = _mixture([part.weight for part in parts], counts, seed)
    return found if order is None else [found[i] for i in order]


def origins(rows: Any) -> dict[str, int]:
    """Return how many rows came of each source, by the names in their `where`; rows of `load`, `encode` or `load_prompts`."""
    counts: Counter[str] = Counter()
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        # A column `where` of the user's own is no place.
        places = (
            [row["where"] for row in some if isinstance(row["where"], Place)]
            if isinstance(some, list)
            else some["where"]
        )
        counts.update(re.sub(r"(:\d+|\[\d+\])$", "", str(place)) for place in places)
    return dict(counts)


def prompt_keys(dataset: datasets.Dataset) -> np.ndarray:
    """Return a number for each row's prompt, (rows,) uint64, the same for the same prompt; of rows of text for that text.

    Two prompts of one number are as likely as a collision of 64 bits, and cost no more than being kept together.
    """
    text = "chosen" if "chosen" in dataset.column_names else "prompt"
    keys = np.empty(len(dataset), dtype=np.uint64)
    dataset = dataset.select_columns(list(dict.fromkeys(["prompt", text])))
    for start in range(0, len(dataset), _AT_ONCE):
        some = dataset[start : start + _AT_ONCE]
        for i, (prompt, whole) in enumerate(zip(some["prompt"], some[text]), start):
            said = json.dumps(prompt or whole, sort_keys=True).encode()
            keys[i] = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")
    return keys


class Place(str):
    """Where a row stands in its source ("prompts.jsonl:17"), to be told from what a user's own column `where` says."""


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        return path.resolve().name if path.exists() else str(source)
    return "rows" if isinstance(source, list) else "dataset"


def read(
    source: Any,
    split: str,
    *,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of every row, as it stands in the source but for the names of columns; of all sources, unmixed."""
    for part in _parts(source, split, config):
        for where, row in part.rows():
            yield where, renamed(row, columns or {}, where)


@dataclass(frozen=True)
class _Part:
    """One source of rows. label: its name in `where` and in errors; weight: its share of the rows, or None."""

    source: Any
    split: str
    label: str
    weight: float | None = None
    config: str | None = None

    def rows(self) -> Iterator[tuple[str, Any]]:
        datasets = require("datasets", "train")
        rows, split = self.source, self.split
        if isinstance(rows, str):
            path = Path(rows).expanduser()
            if path.is_file():
                yield from _read_file(path, self.label)
                return
            rows = _load_dataset(rows, path, split, self.config)
        if isinstance(rows, dict):  # a DatasetDict is one
            if split not in rows:
                raise DataError(f"{self.label}: no split {split!r}; it has {', '.join(map(str, rows))}")
            rows = rows[split]
        if isinstance(rows, datasets.Dataset):
            rows = rows.with_format(None)
        elif not isinstance(rows, list):
            raise DataError(f"expected {ACCEPTED}; got {type(rows).__name__}")
        placed = _is_loaded(rows)
        for index, row in enumerate(rows):
            yield row["where"] if placed else f"{self.label}[{index}]", row


def _parts(source: Any, split: str, config: str | None) -> list[_Part]:
    require("datasets", "train")
    names = source if isinstance(source, list) else [source]
    if not names or not all(isinstance(one, (str, os.PathLike)) for one in names):
        if config is not None:
            raise ValueError(f"config={config!r} is of a hub name; the rows are given")
        return [_Part(source, split, _name(source))]
    parts = [_part(os.fspath(one), split, config) for one in names]
    labels = Counter(part.label for part in parts)
    for i, part in enumerate(parts):
        if labels[part.label] > 1:  # files of one name in several folders
            parts[i] = _Part(part.source, part.split, part.source, part.weight, config)
    weights = [part.weight is not None for part in parts]
    if any(weights) and (len(parts) == 1 or not all(weights)):
        raise DataError(
            f"{parts[weights.index(True)].label}: a weight is a share of the rows of several sources; give "
            f"{'each of them one' if len(parts) > 1 else 'another source'}, or leave it out"
        )
    if config is not None and all(Path(part.source).expanduser().is_file() for part in parts):
        raise DataError(
            f"--data-config {config}: a configuration is of a hub name or folder; {parts[0].label} is a file"
        )
    return parts


def _part(text: str, split: str, config: str | None) -> _Part:
    """NAME, NAME:SPLIT, NAME:WEIGHT or NAME:SPLIT:WEIGHT; what is there as a path is a path first, colons and all."""
    pieces = re.split(r":(?![^\[]*\])", text)  # the colons of train[10%:20%] are of the split
    ends = [n for n in range(len(pieces), 0, -1) if Path(":".join(pieces[:n])).expanduser().exists()]
    # Neither "C:\\pairs.jsonl" nor "https://host/pairs.jsonl" names a split.
    end = ends[0] if ends else 2 if len(pieces) > 1 and pieces[1].startswith(("\\", "//")) else 1
    name, rest = ":".join(pieces[:end]), pieces[end:]
    weight = _weight(rest[-1]) if rest else None
    splits = rest if weight is None else rest[:-1]
    if len(splits) > 1 or not all(splits):
        raise DataError(f"{text}: expected NAME, NAME:SPLIT, NAME:WEIGHT or NAME:SPLIT:WEIGHT")
    if splits and Path(name).expanduser().is_file():
        raise DataError(
            f"{text}: {name} is one file, without splits; expected a weight, as {name}:0.5, or nothing behind it"
        )
    if weight is not None and not 0 < weight < math.inf:
        raise DataError(f"{text}: a weight must be positive and finite; got {weight:g}")
    return _Part(name, splits[0] if splits else split, _name(name), weight, config)


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _mixture(weights: list[float | None], counts: list[int], seed: int) -> np.ndarray | None:
    """Which rows to take, in which order, of sources one after another; None for all of them, as they stand."""
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return None
    datasets = require("datasets", "train")
    ends = list(itertools.accumulate(counts, initial=0))
    numbers = [
        datasets.Dataset.from_dict({"i": np.arange(a, b)}).with_format("numpy") for a, b in itertools.pairwise(ends)
    ]
    probabilities = [share / sum(shares) for share in shares]
    mixed = datasets.interleave_datasets(numbers, probabilities, seed=seed, stopping_strategy="first_exhausted")
    return np.asarray(mixed["i"][:])


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where Arrow files stand; it goes with this process."""
    return tempfile.TemporaryDirectory(prefix="xpo_fast-", ignore_cleanup_errors=True)


def _mapped(rows: Iterator[dict[str, Any]]) -> datasets.Dataset | None:
    """The rows as a data set in a file that is mapped into memory, or None if there are none."""
    import pyarrow

    datasets = require("datasets", "train")
    some = list(itertools.islice(rows, _AT_ONCE))
    if not some:
        return None
    schema = datasets.Dataset.from_list(some[:1]).features.arrow_schema
    path: Path | None = None
    try:
        path = Path(_folder().name) / f"{uuid.uuid4().hex}.arrow"
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            while some:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(some, schema=schema))
                some = list(itertools.islice(rows, _AT_ONCE))
        return datasets.Dataset.from_file(str(path))
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(
                f"the rows cannot be written to {path or tempfile.gettempdir()} ({error}); make room there, or set TMPDIR to "
                "a folder that has it"
            ) from error
        raise


def _load_dataset(source: str, path: Path, split: str, config: str | None) -> Any:
    datasets = require("datasets", "train")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or _file_type(path)
    if looks_like_path and not path.exists():
        raise DataError(f"{source}: no such file or folder; expected {ACCEPTED}")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        further = {} if config is None else {"name": config}
        return datasets.load_dataset(str(path) if path.exists() else source, split=split, **further)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: datasets cannot load split {split!r} of it ({error}); expected {ACCEPTED}"
        ) from error


def _file_type(path: Path) -> str:
    name = path.name.lower()
    match = re.search(r"\.(jsonl|json)(\.gz)?$|\.(parquet|csv)$", name)
    return (match[1] or match[3]) if match else ""


def _read_file(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    kind = _file_type(path)
    if kind in ("jsonl", "json"):
        yield from _read_json(path, name)
    elif kind:
        datasets = require("datasets", "train")
        try:
            table = getattr(datasets.Dataset, f"from_{kind}")(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{name}: not a readable .{kind} file ({error.__cause__ or error})") from error
        for index, row in enumerate(table):
            yield f"{name}[{index}]", row
    else:
        raise DataError(f"{name}: a file of unknown type; expected {ACCEPTED}")


def _read_json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """One object a line (the row is named by its line), or one array of objects (named by its index)."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if line.startswith(b"["):
                    for index, row in enumerate(_read_array(file, line + b"\n", name, number)):
                        yield f"{name}[{index}]", row
                    return
                elif line:
                    yield f"{name}:{number}", _parse(line, name, number)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{name}:{number + 1}: cannot be read from this line on ({error}); "
            "expected a whole file, plain or gzip: copy or download it again"
        ) from error


def _read_array(file: Any, block: bytes, name: str, line: int) -> Iterator[Any]:
    """The values of an array, one after another: it need not fit into memory. block: its beginning; line: of that."""
    utf8, decode = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    text, at = "", 0  # text[at] is what stands before a value, "[" or ","

    def broken(reason: str, place: int) -> DataError:
        return DataError(
            f"{name}:{line + text.count(chr(10), 0, place)}: not valid JSON ({reason}); "
            "expected one JSON object a line, or one array of objects"
        )

    while True:
        line += text.count("\n", 0, at)
        text, at = text[at:], 0
        try:
            text += utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            row = line + text.count("\n") + block.count(b"\n", 0, error.start)
            raise DataError(f"{name}:{row}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        while True:
            start = _after_space(text, at + 1)
            if text[start : start + 1] == "]" and text[at] == "[":
                stop = start
            else:
                try:
                    value, end = decode(text, start)
                except json.JSONDecodeError as error:
                    # A value that the block cuts is broken at its end, or in a string that does not end.
                    if not block or not (error.pos > len(text) - 10 or error.msg.startswith(("Unterm", "Invalid \\"))):
                        raise broken(error.msg, error.pos) from error
                    break
                stop = _after_space(text, end)
                if stop == len(text) and block:  # of a number there may be more to come
                    break
                if text[stop : stop + 1] not in (",", "]"):
                    raise broken("Expecting ',' delimiter", stop)
                yield value
            at = stop
            if text[at] == "]":
                if (rest := _after_space(text, at + 1)) < len(text) or file.read().strip():
                    raise broken("Extra data", rest)
                return
        block = file.read(max(_BLOCK, len(text)))  # more each time: a long value is not tried often


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parse(text: bytes, name: str, line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{line}: not valid JSON ({error.msg}, column {error.colno}); "
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
    is what the chat template makes of it: the prompt with the generation prompt, then what follows it. Of text with an
    empty prompt the opening tokens are the prompt; where the tokenizer has none, the first token is, which nothing predicts.

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
    about = get_kind(kind)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a prompt token and a completion token); got {max_length}")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1 or None; got {max_prompt_length}")
    loaded = [{"prompt", "where", *form} for form in about.forms if set(form) >= set(about.completions)]
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
    labelled = "label" in about.numbers and "label" in dataset.column_names
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
            "opening": opening(tokenizer, first["prompt"] or next(iter(completions_of(first, about).values()))),
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
        },
    )
    _report(encoded, max_length)
    encoded = encoded.remove_columns(["prompt_cut", "completions_cut", "count", "parted"])
    if labelled:
        return _add_mismatched(encoded, prompt_keys(dataset), max_length)
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
    about = KINDS[kind]
    named = [completions_of(row, about) for row in rows]
    texts = [render(tokenizer, row["prompt"], [*by.values()], row["where"]) for row, by in zip(rows, named)]
    ids = iter(tokenize(tokenizer, [text for group in texts for text in group]))
    encoded = []
    for row, names, group in zip(rows, named, texts):
        prompt, completions, parted = split_ids(tokenizer, group, [next(ids) for _ in group])
        if isinstance(row["prompt"], str):
            completions = [_end(completion, tokenizer.eos_token_id) for completion in completions]
            if not row["prompt"]:
                prompt, completions = _opened(completions, opening)
            elif prompt[: len(opening)] != opening:
                prompt = opening + prompt
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
                **{name: row[name] for name in about.numbers if name in row},
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
            *(tokenizer.apply_chat_template(prompt + completion, tokenize=False) for completion in completions),
        ]
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise DataError(
            f"{where}: the chat template refuses this conversation ({error}); "
            "drop the row, or pass another template (--chat-template FILE)"
        ) from error


def split_ids(tokenizer: Any, texts: list[str], ids: list[list[int]]) -> tuple[list[int], list[list[int]], bool]:
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


def _opened(texts: list[list[int]], opening: list[int]) -> tuple[list[int], list[list[int]]]:
    """Prompt and completion of a text without a prompt: nothing predicts its first token, which is the prompt; or BOS is."""
    [text] = texts
    start = len(opening) or 1
    return (text[:start], [text[start:]]) if text[: len(opening)] == opening else (opening, texts)


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
    cut, count, prompts_cut, parted = (_sum(encoded, name) for name in names)
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


def _sum(encoded: datasets.Dataset, name: str) -> int:
    slices = range(0, len(encoded), _AT_ONCE)
    return sum(sum(encoded[start : start + _AT_ONCE][name]) for start in slices)


def _add_mismatched(encoded: datasets.Dataset, prompts: np.ndarray, max_length: int) -> datasets.Dataset:
    datasets = require("datasets", "train")
    others = encoded.select_columns("completion_ids").select(_next_with_another_prompt(prompts)).flatten_indices()
    encoded = datasets.concatenate_datasets(
        [encoded, others.rename_column("completion_ids", "kl_completion_ids")], axis=1
    )
    return encoded.map(_cut_mismatched, fn_kwargs={"max_length": max_length}, desc="mismatched completions")


def _cut_mismatched(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    return {"kl_completion_ids": row["kl_completion_ids"][: max_length - len(row["prompt_ids"])]}


def _next_with_another_prompt(prompts: np.ndarray) -> np.ndarray:
    """For each row the next one (cyclic) whose prompt differs, (rows,) int64. prompts: of `prompt_keys`.

    Rows of one prompt stand together in most unpaired data, and a completion of the same prompt is no
    mismatch.
    """
    rows = np.arange(len(prompts))
    starts = np.flatnonzero(prompts != np.roll(prompts, 1))  # of runs of one prompt
    if not len(starts):
        logger.warning("all %d rows have the same prompt: KTO's KL estimate then uses matching completions", len(rows))
        return (rows + 1) % len(rows)
    return starts[np.searchsorted(starts, rows, side="right") % len(starts)]


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
        get_kind(self.kind)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        kind = KINDS[self.kind]
        if kind.listed:
            return self._lists(features)
        batch = self._pad([(row["prompt_ids"], row[f"{name}_ids"]) for name in kind.completions for row in features])
        batch |= _column(features, kind.reference[: len(kind.completions)], "ref_logps", torch.float32)
        for name, key in kind.numbers.items():
            batch |= _column(features, [name], key, torch.bool if name == "label" else torch.float32)
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
    features: list[dict[str, Any]], names: Sequence[str], key: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """``{key: (len(names) · B,)}``, or nothing where the rows carry none of `names`."""
    if not any(name in row for row in features for name in names):
        return {}
    return {key: torch.tensor([row[name] for name in names for row in features], dtype=dtype)}
