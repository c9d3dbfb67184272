"""Columns of token ids as flat arrays, in which many rows are counted at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import datasets
import numpy as np

from ..data import Kind


class Ragged(NamedTuple):
    """A column of token ids, those of a list one after another."""

    flat: np.ndarray  # (N,)
    offsets: np.ndarray  # (C + 1,) of the C completions
    row: np.ndarray  # (C,) index of the row of each

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def parts(self) -> list[bytes]:
        """Returns the bytes of each completion's ids."""
        return [self.flat[a:b].tobytes() for a, b in pairwise(self.offsets.tolist())]

    def ends(self, ids: set[int]) -> np.ndarray:
        """Returns whether one of `ids` is among the last two tokens of each completion, (C,) bool."""
        named = np.isin(self.flat, list(ids))
        before = np.concatenate([[0], named.cumsum()])
        stops = self.offsets[1:]
        return before[stops] > before[np.maximum(stops - 2, self.offsets[:-1])]


def columns_of(dataset: datasets.Dataset, kind: Kind, count: int) -> dict[str, Ragged]:
    """Returns the ids of the first rows by column, the prompts' first."""
    table: Any = dataset.with_format("arrow")[:count]
    names = dict.fromkeys(name for name in (*kind.encoded, "rejected_ids") if name in dataset.column_names)
    return {name: _ragged(table[name]) for name in names}


def scored_of(dataset: datasets.Dataset, name: str, column: Ragged, count: int) -> np.ndarray:
    """Returns how many tokens of each completion of a column are scored, (C,) int64."""
    mask = f"{name.removesuffix('_ids')}_mask"
    if mask not in dataset.column_names:
        return column.lengths
    table: Any = dataset.select_columns([mask]).with_format("arrow")[:count]
    scored = _ragged(table[mask])
    return np.diff(np.concatenate([[0], scored.flat.cumsum()])[scored.offsets])


def _ragged(table: Any) -> Ragged:
    import pyarrow as pa
    import pyarrow.compute as pc

    column: Any = table.combine_chunks()
    row, lengths = np.arange(len(column)), np.ones(len(column), dtype=np.int64)
    while isinstance(column.type, (pa.ListType, pa.LargeListType)):
        row = np.repeat(row, lengths)
        # pyarrow makes its compute functions at import, where no type checker sees them.
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[attr-defined]
        column = column.flatten()
    offsets = np.concatenate([[0], lengths.cumsum()])
    return Ragged(column.to_numpy(zero_copy_only=False).astype(np.int64), offsets, row)


def keys_of(columns: dict[str, Ragged], count: int) -> list[int]:
    """Returns a hash of all token ids of each row."""
    keys: list[tuple] = [()] * count
    for name, column in columns.items():
        for i, part in zip(column.row.tolist(), column.parts(), strict=True):
            keys[i] = (*keys[i], name, part)
    return [hash(key) for key in keys]
