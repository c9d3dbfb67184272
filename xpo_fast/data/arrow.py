"""Arrow files of rows: messages of role and content as structs, others as JSON, so that no row gains another's keys.

    rows ── stored ──▶ a data set that is mapped into memory      data sets ── together ──▶ one

A column of structs has the keys of every row in each of them, None where a row lacks one; and a chat template that
tests for a key then finds it. So messages with further keys, tools and variables of a template are kept as JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.table import InMemoryTable

from .kinds import DataError
from .template import KWARGS, TOOLS

_AT_ONCE = 1000  # rows


@dataclass
class Json(datasets.Json):
    """`datasets.Json` that gives back the numbers that it was given.

    datasets writes ten decimals, and reads 48.856614 as 48.856614000000004.
    """

    def encode_example(self, example_data: Any) -> str | None:
        """Returns the JSON text of a value."""
        return None if example_data is None else json.dumps(example_data, ensure_ascii=False)

    def decode_example(self, example_data: Any, token_per_repo_id: Any = None) -> Any:
        """Returns the value of a JSON text."""
        return None if example_data is None else json.loads(example_data)


def stored(rows: Iterator[dict[str, Any]], *, in_memory: bool) -> datasets.Dataset | None:
    """Returns the rows of `load` as a data set, in memory or mapped from a file; None if there are no rows.

    It has the columns of tools and of variables of the template if a row has them. Raises DataError for a file that
    cannot be written.
    """
    if in_memory:
        held = [*rows]
        return _in_memory(held) if held else None
    others = False

    def is_plain(some: list[dict[str, Any]]) -> bool:  # or comes behind rows that are not
        nonlocal others
        others = others or not all(map(_is_plain, some))
        return not others

    thousands = iter(lambda: list(itertools.islice(rows, _AT_ONCE)), [])
    parts = [_mapped(group, plain) for plain, group in itertools.groupby(thousands, is_plain)]
    return together(parts) if parts else None


def together(parts: list[datasets.Dataset]) -> datasets.Dataset:
    """Returns the data sets one after another; where one has a column as JSON, all have it so."""
    if len(parts) == 1:
        return parts[0]
    features: dict[str, Any] = {}
    for part in parts:
        features |= {name: x for name, x in part.features.items() if name not in features or _holds_json(x)}
    alike = [datasets.Features({name: features[name] for name in part.features}) for part in parts]
    # What is not JSON is left to `concatenate_datasets`, which says what does not fit together.
    cast = [own if not any(map(_holds_json, to.values())) else own.cast(to) for own, to in zip(parts, alike)]
    return datasets.concatenate_datasets(cast)


def _holds_json(feature: Any) -> bool:
    return isinstance(feature, datasets.Json) or (isinstance(feature, datasets.List) and _holds_json(feature.feature))


def _depth(value: Any) -> int:
    """Returns in how many lists the dicts of a value lie: 1 for messages, 2 for a list of completions, 0 for others."""
    inner = value[0] if isinstance(value, list) and value else None
    return 1 if isinstance(inner, dict) else 2 if isinstance(inner, list) and _depth(inner) else 0


def _is_plain(row: dict[str, Any]) -> bool:
    """Returns whether the messages of a row have a role and words, and nothing else."""
    if isinstance(row["prompt"], str):
        return True
    if row.get(TOOLS) is not None or row.get(KWARGS) is not None:
        return False
    for value in row.values():
        depth = _depth(value)
        for messages in value if depth == 2 else [value] * depth:
            if not all(len(m) == 2 and type(m.get("content")) is str for m in messages):
                return False
    return True


def _features(row: dict[str, Any], json_type: Any) -> datasets.Features:
    """Returns the types of the columns of rows like this one. json_type: of its messages, tools and variables."""
    listed: list[Any] = [json_type, datasets.List(json_type), datasets.List(datasets.List(json_type))]
    depths = {name: _depth(value) for name, value in row.items() if name not in (TOOLS, KWARGS)}
    others = datasets.Dataset.from_list([{name: row[name] for name, depth in depths.items() if not depth}]).features
    found = {name: listed[depth] if depth else others[name] for name, depth in depths.items()}
    return datasets.Features({**found, TOOLS: listed[1], KWARGS: listed[0]})


def _json_batch(rows: list[dict[str, Any]], texts: datasets.Features, features: datasets.Features) -> Any:
    """Returns rows as Arrow has them. texts: `features` with text for JSON, which Arrow makes of no other value."""
    asked = [name for name, feature in features.items() if _holds_json(feature)]
    written = [row | {name: _texts(row.get(name), listed=name != KWARGS) for name in asked} for row in rows]
    return pyarrow.RecordBatch.from_pylist(written, schema=texts.arrow_schema).cast(features.arrow_schema)


def _texts(value: Any, *, listed: bool) -> Any:
    """Returns the JSON text of a value; listed: that of each dict in its lists."""
    if listed and isinstance(value, list):
        return [_texts(one, listed=True) for one in value]
    return Json().encode_example(value)


def _in_memory(rows: list[dict[str, Any]]) -> datasets.Dataset:
    if all(map(_is_plain, rows)):
        return datasets.Dataset.from_list(rows)
    features = _features(rows[0], Json())
    batch = _json_batch(rows, _features(rows[0], datasets.Value("string")), features)
    table = InMemoryTable(pyarrow.Table.from_batches([batch]))
    return _without_empty(datasets.Dataset(table, info=datasets.DatasetInfo(features=features)))


def _without_empty(made: datasets.Dataset) -> datasets.Dataset:
    """Returns the data set without the columns beside its messages that no row has."""
    beside = [name for name in (TOOLS, KWARGS) if name in made.features]
    return made.remove_columns([name for name in beside if made.data.column(name).null_count == len(made)])


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Makes the folder of the Arrow files, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="xpo_fast-", ignore_cleanup_errors=True)


def _mapped(thousands: Iterator[list[dict[str, Any]]], plain: bool) -> datasets.Dataset:
    """Writes the rows into a file and returns it as a data set mapped into memory."""
    some = next(thousands)
    if plain:
        features = datasets.Dataset.from_list(some[:1]).features
        batch = functools.partial(pyarrow.RecordBatch.from_pylist, schema=features.arrow_schema)
    else:
        features, texts = _features(some[0], Json()), _features(some[0], datasets.Value("string"))
        batch = functools.partial(_json_batch, texts=texts, features=features)
    path: Path | None = None
    try:
        path = Path(_folder().name) / f"{uuid.uuid4().hex}.arrow"
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, features.arrow_schema) as writer:
            for rows in itertools.chain([some], thousands):
                writer.write_batch(batch(rows))
        info = datasets.DatasetInfo(features=features)
        return _without_empty(datasets.Dataset.from_file(str(path), info=info))
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(
                f"the rows cannot be written to {path or tempfile.gettempdir()} ({error}); make room there, or set "
                "TMPDIR to a folder that has it"
            ) from error
        raise
