"""Sources of rows: files, folders, hub names, data sets and lists of dicts, read row by row, each with its place.

A file is never in memory as a whole. A row's place is ``"pairs.jsonl:17"``, the line of a file, or ``"name[17]"``, the
index into anything else.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .forms import renamed
from .kinds import DataError
from .template import KWARGS, TOOLS

LOADED = "xpo_fast.data"  # the builder_name of data sets of `load`
_ACCEPTED = (
    "a .jsonl or .json file (also .gz), a .parquet or .csv file, a folder or hub name that "
    "datasets.load_dataset understands, a datasets.Dataset, or a list of dicts"
)
_BLOCK = 2**20  # bytes


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency; its ImportError names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here: pip install 'xpo-fast[{extra}]' ({error})") from error


def read(
    source: Any, split: str, *, columns: Mapping[str, str] | None = None, config: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) for every row as it stands, columns renamed; several sources in their order, unmixed."""
    for one in sources(source, split, config):
        for where, row in one.rows():
            yield where, renamed(row, columns or {}, where)


@dataclass(frozen=True)
class Source:
    """One source of rows. label: its name in places and errors; weight: its share of the rows of a mixture, or None."""

    source: Any
    split: str
    label: str
    weight: float | None = None
    config: str | None = None

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Yields (place, row) for every row; rows that `load` has read before keep their place."""
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
            raise DataError(f"expected {_ACCEPTED}; got {type(rows).__name__}")
        placed = is_loaded(rows)
        for index, row in enumerate(rows if isinstance(rows, list) else _rows_of(rows)):
            yield row["where"] if placed else f"{self.label}[{index}]", row


def _rows_of(table: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a `datasets.Dataset`, messages and tools without the keys that only other rows have."""
    filled = {name: x for name, x in table.features.items() if name in (TOOLS, KWARGS) or _has_fillers(x)}
    for row in table:
        for name, feature in filled.items():
            row[name] = _without_fillers(row[name], feature, name in (TOOLS, KWARGS))
        yield row


def _of_conversation(struct: Mapping[str, Any]) -> bool:
    """Returns whether the keys are those of a message with more than its words, or of a tool."""
    names = struct.keys()
    messages = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    tools = ({"type", "function"}, {"name", "parameters"})
    return any(names > some for some in messages) or any(names >= some for some in tools)


def _has_fillers(feature: Any) -> bool:
    if feature is None:
        return False
    if isinstance(feature, dict):
        return _of_conversation(feature) or any(map(_has_fillers, feature.values()))
    return _has_fillers(getattr(feature, "feature", None))


def _without_fillers(value: Any, feature: Any, inside: bool) -> Any:
    """Returns a value of Arrow without the None that a struct has for a key of other rows; a message keeps its content.

    inside: the value belongs to a message or a tool. What is kept as JSON has no such keys.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        inside = inside or _of_conversation(feature)
        kept = {k: x for k, x in value.items() if not inside or x is not None or (k == "content" and "role" in feature)}
        return {name: _without_fillers(x, feature[name], inside) for name, x in kept.items()}
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [_without_fillers(one, inner, inside) for one in value]
    return value


def is_loaded(source: Any) -> bool:
    """Returns whether a data set comes from `load` (or was selected from one), so that its rows have their places."""
    return getattr(getattr(source, "info", None), "builder_name", None) == LOADED and "where" in source.column_names


def sources(source: Any, split: str, config: str | None) -> list[Source]:
    """Returns the sources that an argument of `load` names: one, or each of a list of paths and names."""
    require("datasets", "train")
    names = source if isinstance(source, list) else [source]
    if not names or not all(isinstance(one, (str, os.PathLike)) for one in names):
        if config is not None:
            raise ValueError(f"config={config!r} is of a hub name; the rows are given")
        return [Source(source, split, _name(source))]
    found = [_parse_name(os.fspath(one), split, config) for one in names]
    labels = Counter(one.label for one in found)
    for i, one in enumerate(found):
        if labels[one.label] > 1:  # files of one name in several folders
            found[i] = Source(one.source, one.split, one.source, one.weight, config)
    weighted = [one.weight is not None for one in found]
    if any(weighted) and (len(found) == 1 or not all(weighted)):
        raise DataError(
            f"{found[weighted.index(True)].label}: a weight is a share of the rows of several sources; give "
            f"{'each of them one' if len(found) > 1 else 'another source'}, or leave it out"
        )
    if config is not None and all(Path(one.source).expanduser().is_file() for one in found):
        raise DataError(
            f"--data-config {config}: a configuration is of a hub name or folder; {found[0].label} is a file"
        )
    return found


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        return path.resolve().name if path.exists() else str(source)
    return "rows" if isinstance(source, list) else "dataset"


def _parse_name(text: str, split: str, config: str | None) -> Source:
    """Parses NAME, NAME:SPLIT, NAME:WEIGHT or NAME:SPLIT:WEIGHT; an existing path is taken first, colons included."""
    pieces = re.split(r":(?![^\[]*\])", text)  # the colons of train[10%:20%] belong to the split
    ends = [n for n in range(len(pieces), 0, -1) if Path(":".join(pieces[:n])).expanduser().exists()]
    # Neither "C:\\pairs.jsonl" nor "https://host/pairs.jsonl" names a split.
    end = ends[0] if ends else 2 if len(pieces) > 1 and pieces[1].startswith(("\\", "//")) else 1
    name, rest = ":".join(pieces[:end]), pieces[end:]
    weight, splits = None, rest
    with contextlib.suppress(ValueError, IndexError):
        weight, splits = float(rest[-1]), rest[:-1]
    if len(splits) > 1 or not all(splits):
        raise DataError(f"{text}: expected NAME, NAME:SPLIT, NAME:WEIGHT or NAME:SPLIT:WEIGHT")
    if splits and Path(name).expanduser().is_file():
        raise DataError(
            f"{text}: {name} is one file, without splits; expected a weight, as {name}:0.5, or nothing behind it"
        )
    if weight is not None and not 0 < weight < math.inf:
        raise DataError(f"{text}: a weight must be positive and finite; got {weight:g}")
    return Source(name, splits[0] if splits else split, _name(name), weight, config)


def mixture(weights: list[float | None], counts: list[int], seed: int) -> np.ndarray | None:
    """Draws rows of several sources by their weights: indices into the sources one after another.

    weights, counts: one per source. Returns None without weights, for all rows in their order.
    """
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return None
    datasets = require("datasets", "train")
    ends = list(itertools.accumulate(counts, initial=0))
    spans = [{"i": np.arange(a, b)} for a, b in itertools.pairwise(ends)]
    numbers = [datasets.Dataset.from_dict(span).with_format("numpy") for span in spans]
    probabilities = [share / sum(shares) for share in shares]
    mixed = datasets.interleave_datasets(numbers, probabilities, seed=seed, stopping_strategy="first_exhausted")
    return np.asarray(mixed["i"][:])


def _load_dataset(source: str, path: Path, split: str, config: str | None) -> Any:
    datasets = require("datasets", "train")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or _file_type(path)
    if looks_like_path and not path.exists():
        raise DataError(f"{source}: no such file or folder; expected {_ACCEPTED}")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        further = {} if config is None else {"name": config}
        return datasets.load_dataset(str(path) if path.exists() else source, split=split, **further)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: datasets cannot load split {split!r} of it ({error}); expected {_ACCEPTED}"
        ) from error


def _file_type(path: Path) -> str:
    name = path.name.lower()
    match = re.search(r"\.(jsonl|json)(\.gz)?$|\.(parquet|csv)$", name)
    return (match[1] or match[3]) if match else ""


def _read_file(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    extension = _file_type(path)
    if extension in ("jsonl", "json"):
        yield from _read_json(path, name)
    elif extension:
        datasets = require("datasets", "train")
        try:
            table = getattr(datasets.Dataset, f"from_{extension}")(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{name}: not a readable .{extension} file ({error.__cause__ or error})") from error
        for index, row in enumerate(_rows_of(table)):
            yield f"{name}[{index}]", row
    else:
        raise DataError(f"{name}: a file of unknown type; expected {_ACCEPTED}")


def _read_json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) of JSON lines (a row's place is its line), or of one array of objects (its index)."""
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
                    yield f"{name}:{number}", _parse_line(line, name, number)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{name}:{number + 1}: cannot be read from this line on ({error}); "
            "expected a whole file, plain or gzip: copy or download it again"
        ) from error


def _read_array(file: Any, block: bytes, name: str, line: int) -> Iterator[Any]:
    """Yields the values of a JSON array one after another: the array need not fit into memory.

    block: the beginning of the array, already read from `file`; line: the number of its first line, for errors.
    """
    utf8, decode = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    text, at = "", 0  # text[at] is the "[" or "," before the next value

    def broken(reason: str, place: int) -> DataError:
        return DataError(
            f"{name}:{line + text.count(chr(10), 0, place)}: not valid JSON ({reason}); "
            "expected one JSON object per line, or one array of objects"
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
                    # A value cut by the end of the block fails at the end of the text, or in an unterminated string.
                    if not block or not (error.pos > len(text) - 10 or error.msg.startswith(("Unterm", "Invalid \\"))):
                        raise broken(error.msg, error.pos) from error
                    break
                stop = _after_space(text, end)
                if stop == len(text) and block:  # the next block may have more digits of a number
                    break
                if text[stop : stop + 1] not in (",", "]"):
                    raise broken("Expecting ',' delimiter", stop)
                yield value
            at = stop
            if text[at] == "]":
                if (rest := _after_space(text, at + 1)) < len(text) or file.read().strip():
                    raise broken("Extra data", rest)
                return
        block = file.read(max(_BLOCK, len(text)))  # doubled each time, so that a long value is retried few times


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parse_line(text: bytes, name: str, line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{line}: not valid JSON ({error.msg}, column {error.colno}); "
            "expected one JSON object per line, or one array of objects"
        ) from error
