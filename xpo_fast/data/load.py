"""Loading: rows of any source and form become one data set of prompts and completions (`load`, `load_prompts`).

Rows of a file flow into an Arrow file that is mapped into memory, and are never all in memory: `load` and `encode` take
files of any size. The Arrow files lie in the folder for temporary files ($TMPDIR) until the program ends.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .forms import renamed
from .kinds import DataError, get_kind
from .rows import check_alike, check_names, notes_of, shape_prompt, shape_row, unread_of
from .sources import LOADED, Source, is_loaded, mixture, require, sources
from .template import KWARGS, TOOLS

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("xpo_fast")

_AT_ONCE = 1000  # rows


def load(
    source: Any,
    *,
    kind: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    seed: int = 42,
) -> datasets.Dataset:
    """Reads preference data of any of the usual forms into one.

    source: a .jsonl or .json file (also .gz), a .parquet or .csv file, a folder or hub name of `datasets.load_dataset`,
        a `datasets.Dataset` or `DatasetDict`, or a list of dicts; or a list of paths and names, read one after another.
        A path or name may be followed by ``:SPLIT``, ``:WEIGHT`` or ``:SPLIT:WEIGHT``. What `load` has returned for
        this kind stays as it is; rows that were changed since are checked again.
    kind: a key of `KINDS`. A pair read as unpaired gives a desirable and an undesirable row; one with scores read as a
        list gives a list of two; read as rejected or chosen, it gives that half. Unpaired rows read as chosen are taken
        whatever their label.
    split: of a hub name, folder or `DatasetDict` whose name does not say it; a single file is one split.
    columns: {field: column}, for columns of other names; a column may be a path into dicts and over lists, as
        ``responses.best`` (`data.forms.renamed`).
    config: the configuration of a hub name, `name` of `datasets.load_dataset`.
    seed: of the order in which several sources with weights are mixed. A weight is a source's share of the rows: each
        next row comes from a source drawn with these probabilities (`datasets.interleave_datasets`), until one source
        has no row left; so no row is taken twice, and some rows of the other sources are left out.

    Forms: TRL's preference data, prompt given or shared by `chosen` and `rejected`; TRL's unpaired data (`prompt`,
    `completion`, `label`); lists (`prompt`, `completions`, `scores`); each as strings or as lists of ``{"role",
    "content"}``; and Anthropic's transcripts (``"\\n\\nHuman: … \\n\\nAssistant: …"``), which become conversations.
    The last turn of a conversation without a prompt is its completion. ShareGPT, Alpaca and others are read where only
    one reading is possible, see `data.forms` and docs/data.md; rows of `text` alone are read as chosen, with an empty
    prompt.

    Returns the columns prompt, `Kind.completions` and where; and those of the following that the data has, as floats:
    score_chosen, score_rejected, prob (P(chosen beats rejected), also read from prob_chosen), margin for pairs; reward,
    value for unpaired rows, and their label as a bool; scores (K numbers) for lists, and their rejected completion.
    Prompts and completions are all strings, or all lists of messages.

    Raises DataError for a source that does not exist or cannot be read, no rows, a row that is not of these forms, or
    one that lacks a field that other rows have; ValueError for an unknown kind, and for a name in `columns` that is no
    field of a row.
    """
    row_kind = get_kind(kind)
    check_names(columns or ())
    again = not columns and is_loaded(source)

    def shape(row: Any, where: str) -> list[dict[str, Any]]:
        # A row of text alone has an empty prompt once it has been read, which no row is read from.
        if again and row_kind.reads_text and isinstance(row, dict) and row.get("prompt") == "":
            row = {"text": row.get(kind)}
        return shape_row(row, row_kind, where)

    if again and source.info.config_name == kind and _is_unchanged(source, shape):
        return source
    how: Any = {"split": split, "columns": columns, "config": config, "seed": seed, "expected": row_kind.expected}
    about: Any = {
        "notes": lambda made, row: notes_of(made, row, row_kind),
        "unread": lambda made, row: unread_of(made, row, row_kind),
    }
    rows = load_rows(source, shape, **about, **how)
    rows.info.config_name, rows.info.dataset_name = kind, rows._fingerprint
    return rows


def _is_unchanged(rows: Any, shape: Callable[[Any, str], list[dict[str, Any]]]) -> bool:
    """Returns whether a data set of `load` is as it was made, or each row is still what it would be read as.

    Raises DataError for a faulty row.
    """
    if rows.info.dataset_name == rows._fingerprint:
        return True
    first: dict[str, Any] = {}
    for row in rows.with_format(None):
        made = shape(row, row["where"])
        for one in made:
            first.update({} if first else one)
            check_alike(one, first)
        row = {name: x for name, x in row.items() if x is not None or name not in (TOOLS, KWARGS)}
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
    notes: Callable[[dict[str, Any], dict[str, Any]], Iterable[str]] = lambda made, row: (),
    unread: Callable[[dict[str, Any], dict[str, Any]], Iterable[str]] = lambda made, row: (),
) -> datasets.Dataset:
    """Reads a source as `load` does, and brings each row into shape with a function of the caller's.

    shape: makes rows from a row of the source and its place. expected: the fields that a row should have, for errors.
    notes: makes warnings from a row of `shape` and the row it was made from; each is counted and logged once. unread:
        likewise the columns that nothing was read from; one line names them.
    """
    require("datasets", "train")
    from . import arrow  # datasets is optional

    parts = sources(source, split, config)
    first: dict[str, Any] = {}
    found = []
    paths = {path.partition(".")[0] for path in (columns or {}).values()}

    def shaped(part: Source, counts: Counter[str], others: dict[str, None]) -> Iterator[dict[str, Any]]:
        for where, row in part.rows():
            row = renamed(row, columns or {}, where)
            for made in shape(row, where):
                first.update({} if first else made)
                check_alike(made, first)
                counts.update(notes(made, row))
                others.update((name, None) for name in unread(made, row) if name not in paths)
                yield made

    for part in parts:
        counts: Counter[str] = Counter()
        others: dict[str, None] = {}
        made = shaped(part, counts, others)
        rows = arrow.stored(made, in_memory=isinstance(part.source, list))
        if not rows:
            raise DataError(f"{part.label}: no rows; expected {expected} in each row")
        for note, count in counts.items():
            logger.warning("%s: %s in %d of %d rows", part.label, note, count, len(rows))
        if others:
            logger.warning("%s: columns that nothing is read from: %s", part.label, ", ".join(map(str, others)))
        found.append(rows)
    order = mixture([part.weight for part in parts], [len(rows) for rows in found], seed)
    rows = arrow.together(found)
    rows = rows if order is None else rows.select(order)
    rows.info.builder_name = LOADED
    return rows


def load_prompts(
    source: Any,
    split: str = "train",
    *,
    alike: bool = False,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    seed: int = 42,
) -> list[dict[str, Any]]:
    """Reads rows with a prompt, text or messages, and their other columns: those that `load` reads, and prompts alone.

    Rows without a column `where` of their own get one, of type `Place`. In rows with chosen and rejected, chosen, or
    completion, these and the prompt are brought into the form that `load` gives.

    alike: every row must have the columns of the first, as functions that are called with columns need. The other
    arguments are those of `load`; columns may have any names.
    """
    found: list[dict[str, Any]] = []
    counts: list[int] = []
    first: dict[str, Any] = {}
    parts = sources(source, split, config)
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
    for name in (TOOLS, KWARGS):  # a row may be without
        if any(name in row for row in found):
            for row in found:
                row.setdefault(name, None)
    order = mixture([part.weight for part in parts], counts, seed)
    return found if order is None else [found[i] for i in order]


class Place(str):
    """The place of a row in its source ("prompts.jsonl:17"), as opposed to a column `where` of the user's own."""


def origins(rows: Any) -> dict[str, int]:
    """Returns the number of rows per source, by the names in `where`; rows: from `load`, `encode` or `load_prompts`."""
    counts: Counter[str] = Counter()
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        # A column `where` of the user's own is no place.
        places = [row["where"] for row in some] if isinstance(some, list) else [*map(Place, some["where"])]
        counts.update(re.sub(r"(:\d+|\[\d+\])$", "", str(place)) for place in places if isinstance(place, Place))
    return dict(counts)


def prompt_keys(dataset: datasets.Dataset) -> np.ndarray:
    """Returns a hash of each row's prompt, (rows,) uint64; for rows of text alone, a hash of the text.

    Two prompts share a hash with the probability of a 64-bit collision; then they are merely kept together.
    """
    text = "chosen" if "chosen" in dataset.column_names else "prompt"
    keys = np.empty(len(dataset), dtype=np.uint64)
    if "prompt" not in dataset.column_names:  # token ids
        dataset, text = dataset.rename_column("prompt_ids", "prompt"), "prompt"
    dataset = dataset.select_columns(list(dict.fromkeys(["prompt", text])))
    for start in range(0, len(dataset), _AT_ONCE):
        some = dataset[start : start + _AT_ONCE]
        for i, (prompt, completion) in enumerate(zip(some["prompt"], some[text]), start):
            serialised = json.dumps(prompt or completion, sort_keys=True).encode()
            keys[i] = int.from_bytes(hashlib.blake2b(serialised, digest_size=8).digest(), "big")
    return keys
