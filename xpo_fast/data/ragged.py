"""Columns of token ids as arrays: those of all rows one after another, and where each list of them begins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .kinds import Kind

if TYPE_CHECKING:
    import datasets

_AT_ONCE = 10_000  # rows


class Ragged(NamedTuple):
    """The C lists of a column, one per row, or several where the column holds lists of lists."""

    flat: np.ndarray  # (N,) int64, the ids of all lists
    offsets: np.ndarray  # (C + 1,) where each begins in `flat`
    row: np.ndarray  # (C,) index of the row of each

    @property
    def lengths(self) -> np.ndarray:
        """The number of ids of each list, (C,)."""
        return np.diff(self.offsets)

    def parts(self) -> list[bytes]:
        """Returns the bytes of each list's ids."""
        return [self.flat[a:b].tobytes() for a, b in pairwise(self.offsets.tolist())]

    def ends(self, ids: set[int]) -> np.ndarray:
        """Returns whether one of `ids` is among the last two of each list, (C,) bool."""
        named = np.isin(self.flat, list(ids))
        before = np.concatenate([[0], named.cumsum()])
        stops = self.offsets[1:]
        return before[stops] > before[np.maximum(stops - 2, self.offsets[:-1])]


def ragged(dataset: datasets.Dataset, name: str, start: int = 0, stop: int | None = None) -> Ragged:
    """Returns a column of ids or of a mask, that of the rows from start to stop."""
    import pyarrow as pa

    table: Any = dataset.select_columns([name]).with_format("arrow")[start:stop]
    column: Any = table[name].combine_chunks()
    row, lengths = np.arange(len(column)) + start, np.ones(len(column), dtype=np.int64)
    while isinstance(column.type, (pa.ListType, pa.LargeListType)):
        row = np.repeat(row, lengths)
        lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        column = column.flatten()
    offsets = np.concatenate([[0], lengths.cumsum()])
    return Ragged(column.to_numpy(zero_copy_only=False).astype(np.int64), offsets, row)


def in_parts(dataset: datasets.Dataset, name: str) -> Iterator[Ragged]:
    """Yields a column as `ragged` does, some thousand rows at a time."""
    for start in range(0, len(dataset), _AT_ONCE):
        yield ragged(dataset, name, start, min(start + _AT_ONCE, len(dataset)))


def columns_of(dataset: datasets.Dataset, kind: Kind, count: int) -> dict[str, Ragged]:
    """Returns the ids of the first rows by column, the prompts' first."""
    names = dict.fromkeys(name for name in (*kind.encoded, "rejected_ids") if name in dataset.column_names)
    return {name: ragged(dataset, name, stop=count) for name in names}


def scored_of(dataset: datasets.Dataset, name: str, column: Ragged, count: int) -> np.ndarray:
    """Returns how many tokens of each completion of a column are scored, (C,) int64."""
    mask = f"{name.removesuffix('_ids')}_mask"
    if mask not in dataset.column_names:
        return column.lengths
    scored = ragged(dataset, mask, stop=count)
    return np.diff(np.concatenate([[0], scored.flat.cumsum()])[scored.offsets])


def keys_of(columns: dict[str, Ragged], count: int) -> list[int]:
    """Returns a hash of all token ids of each row."""
    keys: list[tuple] = [()] * count
    for name, column in columns.items():
        for i, part in zip(column.row.tolist(), column.parts(), strict=True):
            keys[i] = (*keys[i], name, part)
    return [hash(key) for key in keys]
