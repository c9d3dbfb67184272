"""Lays rows out as one sequence without padding, in which what rows have in common stands once.

rows, padded (R, T)                       one sequence (N,)
prompt chosen   pad        shared         prompt chosen rejected
prompt rejected                           0 … p−1 p …    p …         positions: those in the row
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST_SAVED = 8  # tokens that a common beginning must save to stand apart: it makes the attention's calls smaller
LAYOUTS = ("padded", "packed", "shared")
CHOICES = ("auto", *LAYOUTS)


@dataclass(frozen=True)
class Segment:
    """A run of tokens that the same rows have; a token sees the segments `before` it in its row, and its own."""

    start: int  # in the sequence
    stop: int
    at: int  # position of its first token in its rows: the number of tokens in `before`
    before: tuple[tuple[int, int], ...]  # (start, stop) of the segments before it, from the rows' first tokens on

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Where N tokens of a sequence stand in R padded rows of T, and where their hidden states belong.

    The tokens are in the order of a walk through the tree of segments, each in front of those that follow it in some
    row. So token k is seen by token q, up to the model's own windows, if and only if k ≤ q < `ends[k]`.
    """

    shape: tuple[int, int]  # (R, T)
    row: Tensor  # (N,) int64, the row that a token is read from, the first of those that have it
    column: Tensor  # (N,) int64, its column there
    positions: Tensor  # (N,) int64, its position in its rows, padding not counted
    ends: Tensor  # (N,) int64, the end of the part of the sequence that sees it
    index: Tensor  # (M,) int64, the token whose hidden state belongs at …
    at_row: Tensor  # (M,) int64, … this row
    at_column: Tensor  # (M,) int64, … and column
    segments: tuple[Segment, ...]
    read: int  # tokens of the rows, without padding
    shares: bool  # whether what rows begin with in common was to stand once

    def __len__(self) -> int:
        return len(self.row)

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        return {segment.start: i for i, segment in enumerate(self.segments)}

    def keys_of(self, number: int, window: int | None = None) -> tuple[tuple[int, int, int], ...]:
        """Returns what the tokens of a segment look at: (number, from, to) of segments, its own at the end.

        window: how many tokens, itself among them, a token looks back at; what the segment's first one does not see is
        left out.
        """
        own = self.segments[number]
        skip, at, pieces = unseen(own.at, window), 0, []
        for start, stop in own.before:
            size = stop - start
            if at + size > skip:
                pieces.append((self._numbers[start], max(skip - at, 0), size))
            at += size
        return (*pieces, (number, 0, len(own)))

    def to(self, device: Any, **how: Any) -> Layout:
        """Returns the layout with its tensors on the device; how: of `Tensor.to`."""
        return replace(self, **{n: x.to(device, **how) for n, x in vars(self).items() if isinstance(x, Tensor)})

    def pin_memory(self) -> Layout:
        """Returns the layout with its tensors in pinned memory, for a `DataLoader`."""
        return replace(self, **{n: x.pin_memory() for n, x in vars(self).items() if isinstance(x, Tensor)})

    def take(self, x: Tensor) -> Tensor:
        """Returns the sequence's entries (1, N, …) of x (R, T, …)."""
        return x[self.row, self.column][None]

    def put(self, x: Tensor, length: int) -> Tensor:
        """Returns x (1, N, …) as rows (R, length, …): where it was asked for, and 0 elsewhere."""
        rows = self.shape[0]
        flat = x[0].flatten(1)
        out = flat.new_zeros(rows * length, flat.shape[1])
        out = out.index_copy(0, self.at_row * length + self.at_column, flat.index_select(0, self.index))
        return out.view(rows, length, *x.shape[2:])


def unseen(at: int, window: int | None) -> int:
    """Returns how many tokens of its row, from the first on, the token at position `at` is too far behind to see."""
    return 0 if window is None else max(at + 1 - window, 0)


def lay_out(
    input_ids: Tensor,  # (R, T)
    attention_mask: Tensor,  # (R, T), 1 on the tokens of a row, which stand side by side
    wanted: Tensor | None = None,  # (R, T) bool, the positions whose hidden states are read; None: all tokens
    *,
    share: bool,
    least: int = LEAST_SAVED,
) -> Layout:
    """Lays rows out as one sequence: packed, or with share what rows begin with in common once (exact: causal models).

    A row's tokens behind its last wanted one are left out: nothing that is read depends on them. least: the tokens that
    standing once must save. Raises ValueError for a row with padding between its tokens, and where padding is wanted.
    """
    ids, mask = input_ids.detach().cpu().numpy(), attention_mask.detach().cpu().numpy().astype(bool)
    asked = mask if wanted is None else wanted.detach().cpu().numpy()
    count, width = ids.shape
    first = mask.argmax(axis=1)
    length = mask.sum(axis=1)
    columns = np.arange(width)
    if not np.array_equal(mask, (columns >= first[:, None]) & (columns < (first + length)[:, None])):
        raise ValueError(
            "attention_mask: expected padding at the rows' ends; got a row with padding between its tokens, which "
            'layout="padded" alone can read'
        )
    if (asked & ~mask).any():
        raise ValueError(
            "attention_mask: expected 1 wherever a hidden state is read; got a target at a position of padding, which "
            'layout="padded" alone can read'
        )
    last = np.where(asked.any(axis=1), width - asked[:, ::-1].argmax(axis=1) - first, 0)  # tokens that are computed
    if not last.any():
        last[0] = 1  # a model must be run on something: ranks wait for one another
    texts = [ids[r, first[r] : first[r] + last[r]] for r in range(count)]
    pieces = list(_walk(texts, [r for r in range(count) if last[r]], share, least))
    token_of = np.full((count, width), -1, dtype=np.int64)
    segments: list[Segment] = []
    row, position, ends = [], [], []
    start = 0
    for rows, begin, stop, parents, below in pieces:
        size = stop - begin
        before = tuple((segments[p].start, segments[p].stop) for p in parents)
        segments.append(Segment(start, start + size, begin, before))
        at = np.arange(start, start + size)
        for r in rows:
            token_of[r, first[r] + begin : first[r] + stop] = at
        row.append(np.full(size, rows[0]))
        position.append(np.arange(begin, stop))
        ends.append(np.full(size, start + size + below))
        start += size
    rows_of, at = np.concatenate(row), np.concatenate(position)
    places = asked & (token_of >= 0)
    at_row, at_column = places.nonzero()
    names = ("row", "column", "positions", "ends", "index", "at_row", "at_column")
    arrays = (rows_of, at + first[rows_of], at, np.concatenate(ends), token_of[places], at_row, at_column)
    tensors = {name: torch.from_numpy(x) for name, x in zip(names, arrays, strict=True)}
    return Layout((count, width), segments=tuple(segments), read=int(length.sum()), shares=share, **tensors)


def side_by_side(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Returns an order of rows (prompt ids, completion ids) in which those that begin alike meet, long prompts first.

    Cut into batches in this order, rows share as much as they can, and what takes the most memory comes at once.
    """
    return sorted(range(len(rows)), key=lambda r: (-len(rows[r][0]), *map(list, rows[r])))


Piece = tuple[list[int], int, int, tuple[int, ...], int]


def _walk(texts: Sequence[np.ndarray], rows: list[int], share: bool, least: int) -> Iterator[Piece]:
    """Yields segments in order: their rows, first and last position, the numbers of those before, the tokens below."""
    pieces: list[list[Any]] = []

    def walk(rows: list[int], begin: int, at: int, parents: tuple[int, ...]) -> None:
        """Adds the tokens from `begin` on of rows that are alike up to `at` and have a token there or further on."""
        if len(rows) == 1 or not share:
            for r in rows:
                pieces.append([[r], begin, len(texts[r]), parents, 0])
            return
        for group in _alike(texts, rows, at):
            common = _common(texts, group, at)
            longer = [r for r in group if len(texts[r]) > common]
            if len(group) > 1 and (len(group) - 1) * (common - begin) >= least:
                number = len(pieces)
                pieces.append([group, begin, common, parents, 0])
                if longer:
                    walk(longer, common, common, (*parents, number))
                pieces[number][4] = sum(stop - first for _, first, stop, _, _ in pieces[number + 1 :])
            else:
                for r in group:
                    if r not in longer:
                        pieces.append([[r], begin, common, parents, 0])
                if longer:
                    walk(longer, begin, common, parents)

    walk(rows, 0, 0, ())
    yield from ((rows, begin, stop, parents, below) for rows, begin, stop, parents, below in pieces)


def _alike(texts: Sequence[np.ndarray], rows: list[int], at: int) -> list[list[int]]:
    """Returns the rows in groups by their token at `at`, in the order of their first rows."""
    groups: dict[int, list[int]] = {}
    for r in rows:
        groups.setdefault(int(texts[r][at]), []).append(r)
    return list(groups.values())


def _common(texts: Sequence[np.ndarray], rows: list[int], at: int) -> int:
    """Returns the number of tokens that rows begin with in common, at least `at`."""
    shortest = min(len(texts[r]) for r in rows)
    table = np.stack([texts[r][at:shortest] for r in rows])
    differs = (table != table[0]).any(axis=0)
    return at + int(differs.argmax()) if differs.any() else shortest
