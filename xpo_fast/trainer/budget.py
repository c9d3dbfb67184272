"""Token budgets: the units of an optimizer step are cut into micro-batches of at most so many tokens.

Tokens are counted as the model computes them: the positions R·T of padded rows, or a layout's sequence. Which units a
step has, and so its denominators, do not depend on the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..data.ragged import in_parts
from ..layouts.inputs import FORWARDS, KEY
from ..types import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets

    from ..objective import Objective

Batch = dict[str, Any]
WINDOW = 512  # units of an evaluation that are cut together
_OPEN = 8  # micro-batches without padding that are looked at for room, the last ones


@dataclass(frozen=True)
class Size:
    """What units take in one forward: as many rows each as the one with the most of them, all as wide as the widest."""

    rows: int
    width: int
    laid_out: int | None = None  # tokens in a layout, each unit's own; None: padded
    units: int = 1

    def __add__(self, other: Size) -> Size:
        laid_out = None if self.laid_out is None or other.laid_out is None else self.laid_out + other.laid_out
        return Size(max(self.rows, other.rows), max(self.width, other.width), laid_out, self.units + other.units)

    @property
    def padded(self) -> int:
        """Positions of the units' padded rows."""
        return self.units * self.rows * self.width

    def tokens(self, common: int) -> int:
        """Returns the tokens that are computed; common: with which all units begin, and which a layout has once."""
        return self.padded if self.laid_out is None else self.laid_out - (self.units - 1) * common


def cut(sizes: Sequence[Sequence[Size]], budget: int, *, common: int = 0) -> list[list[int]]:
    """Cuts units into micro-batches; returns the units' numbers, the longest unit first in the first of them.

    sizes: of each unit one `Size` per forward. No forward of a micro-batch takes more than `budget` tokens, but that of
    a unit that takes more alone. common: see `Size.tokens`.
    """

    def tokens(forwards: Sequence[Size]) -> int:
        return max(size.tokens(common) for size in forwards)

    order = sorted(range(len(sizes)), key=lambda i: -tokens(sizes[i]))
    parts: list[list[int]] = []
    totals: list[list[Size]] = []
    for i in order:
        # Padded, a shorter unit in an earlier micro-batch would be padded to the length of longer ones.
        padded = any(size.laid_out is None for size in sizes[i])
        for k in range(max(len(parts) - (1 if padded else _OPEN), 0), len(parts)):
            grown = [a + b for a, b in zip(totals[k], sizes[i], strict=True)]
            if tokens(grown) <= budget:
                parts[k].append(i)
                totals[k] = grown
                break
        else:
            parts.append([i])
            totals.append([*sizes[i]])
    return parts


def computed(batch: Mapping[str, Any], of: str = "") -> int:
    """Returns the positions that a model computes for the rows of a batch whose keys begin with `of`."""
    layout = batch.get(of + KEY)
    return batch[of + "input_ids"].numel() if layout is None else len(layout)


@dataclass(frozen=True)
class Unit:
    """An encoded row of a data set, and what it takes alone."""

    row: Mapping[str, Any]
    forwards: tuple[Size, ...]
    ids: np.ndarray  # of its first row, with which the others of the unit may begin, too


@dataclass
class Units:
    """The units that a data loader has drawn for one batch; those from `counted` on only fill it up.

    No list: what is done to the tensors of a batch on their way must leave this as it is.
    """

    drawn: list[Unit]
    counted: int

    @property
    def padded(self) -> int:
        """Positions of the batch if it were padded and not cut."""
        first, *rest = (unit.forwards[0] for unit in self.drawn)
        return sum(rest, first).padded


@dataclass
class KeepsUnits:
    """A collator that keeps rows as they are, with the size of each, to be cut when those of a step are there."""

    collate: Callable[[Sequence[Any]], Batch]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Units:
        return Units([self.unit(row) for row in rows], len(rows))

    def unit(self, row: Mapping[str, Any]) -> Unit:
        """Returns a row with its size."""
        batch = self.collate([dict(row)])
        forwards = []
        for of in FORWARDS:
            if of + "input_ids" in batch:
                laid_out = computed(batch, of) if of + KEY in batch else None
                rows, width = batch[of + "input_ids"].shape
                forwards.append(Size(rows, width, laid_out))
        return Unit(row, tuple(forwards), batch["input_ids"][0][batch["attention_mask"][0] == 1].numpy())


class Parts(list[Batch]):
    """The micro-batches that Trainer is given as one."""


def entries(batches: Sequence[Batch], count: int) -> list[Parts]:
    """Returns a step's micro-batches as `count` of Trainer's: all in the last, with which the step ends."""
    return [*(Parts() for _ in range(count - 1)), Parts(batches)]


@dataclass
class Budget:
    """Cuts units into batches of at most `tokens` tokens a forward, the longest first."""

    tokens: int
    collate: Callable[[Sequence[Any]], Batch]

    def batches(self, units: Sequence[Unit]) -> list[Batch]:
        """Returns the batches of these units."""
        return [batch for _, batch in self.numbered(units)]

    def numbered(self, units: Sequence[Unit], *, beside: bool = False) -> list[tuple[list[int], Batch]]:
        """Returns the batches with the numbers of their units. beside: all rows of a batch are read in one forward."""
        forwards = [unit.forwards for unit in units]
        if beside:
            forwards = [(_beside(sizes),) for sizes in forwards]
        shares = any(size.laid_out is not None for sizes in forwards for size in sizes)
        rest = cut(forwards, self.tokens, common=_common([unit.ids for unit in units]) if shares else 0)[::-1]
        found = []
        while rest:
            part = rest.pop()
            batch = self.collate([dict(units[i].row) for i in part])
            tokens = [computed(batch, of) for of in FORWARDS if of + "input_ids" in batch]
            if len(part) > 1 and (sum if beside else max)(tokens) > self.tokens:  # less is shared than in others
                half = -(-len(part) // 2)
                rest += [part[half:], part[:half]]
            else:
                found.append((part, batch))
        return found

    def filler(self, units: Sequence[Unit]) -> Batch:
        """Returns a batch from which nothing is learned, for a process that has none while others have."""
        shortest = min(units, key=lambda unit: unit.forwards[0].padded)
        return without_targets(self.collate([dict(shortest.row)]))


def without_targets(batch: Batch) -> Batch:
    """Returns a batch whose rows have no targets."""
    names = [of + "targets" for of in FORWARDS]
    return batch | {name: torch.full_like(batch[name], IGNORE_INDEX) for name in names if name in batch}


def _beside(sizes: Sequence[Size]) -> Size:
    """Returns the size of a unit whose rows of all forwards are read in one."""
    laid_out = [size.laid_out for size in sizes if size.laid_out is not None]
    rows, width = sum(size.rows for size in sizes), max(size.width for size in sizes)
    return Size(rows, width, sum(laid_out) if laid_out else None)


def _common(texts: Sequence[np.ndarray]) -> int:
    """Returns the number of tokens that all texts begin with."""
    if not texts:
        return 0
    common = texts[0]
    for text in texts[1:]:
        size = min(len(common), len(text))
        differs = common[:size] != text[:size]
        common = common[: int(differs.argmax()) if differs.any() else size]
    return len(common)


def unit_tokens(encoded: datasets.Dataset, layout: str) -> np.ndarray:
    """Returns about how many tokens each row of an encoded data set takes alone in the layout, (N,) int64."""
    prompt, total, longest, count = np.zeros((4, len(encoded)), dtype=np.int64)
    for name in (n for n in encoded.column_names if n.endswith("_ids") and not n.startswith(("kl_", "ref_", "topk_"))):
        for ids in in_parts(encoded, name):
            if name == "prompt_ids":
                np.add.at(prompt, ids.row, ids.lengths)
            else:
                np.add.at(total, ids.row, ids.lengths)
                np.maximum.at(longest, ids.row, ids.lengths)
                np.add.at(count, ids.row, 1)
    return {"padded": count * (prompt + longest), "packed": count * prompt + total, "shared": prompt + total}[layout]


class LongestFirst(Sampler[int]):
    """Another sampler's order; in the first pass one row and the first change places, so that it is in the first step.

    A step out of memory is then the first one, and what follows takes less.
    """

    def __init__(self, sampler: Any, row: int) -> None:
        self.sampler, self.row = sampler, row
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        if self.epoch == 0 and self.row in order:
            at = order.index(self.row)
            order[0], order[at] = order[at], order[0]
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Tells which pass is next."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def coupled(objective: Objective) -> list[str]:
    """Returns the names of the methods whose losses depend on which units share a micro-batch."""
    return [
        m.name
        for m in objective.methods
        if m.unit == "batch" or m.state is not None or m.denominator == "local_tokens" or "ptx_logp" in m.columns
    ]
