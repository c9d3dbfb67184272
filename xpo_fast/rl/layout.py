"""Settles the layout of an online run, once, on its first completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data import pad_rows
from ..layouts import Chosen, choose
from ..trainer.layout import proven
from .experience import Batches

Row = tuple[list[int], list[int]]


def settle(
    batches: Batches, policy: Any, rows: Sequence[Row], *, before: str | None, hindrance: str | None = None
) -> Chosen:
    """Returns the layout in which a run's models read rows. Logs which and why; warns if it does not prove itself.

    rows: (prompt ids, completion ids) of a rollout, at least one, none without a completion. before: the layout that a
    resumed run had; None for a new one. hindrance: why only padded rows can be read, whatever the policy. Raises
    ValueError for a layout that the policy cannot be read in. Every process must call it, with the same rows.
    """
    args = batches.args
    chosen = choose(args.layout, policy, lambda: batches.first(rows), hindrance=hindrance, before=before)
    some = pad_rows(_some(rows), batches.pad)
    return proven(chosen, args.layout, policy, lambda: some, batches.accelerator, backend=args.backend)


def _some(rows: Sequence[Row]) -> list[Row]:
    """Returns the shortest row, the shortest other one of its prompt, and the shortest of another, if there are any."""
    shortest, *others = sorted(rows, key=lambda row: sum(map(len, row)))
    same = [row for row in others if row[0] == shortest[0]]
    rest = [row for row in others if row[0] != shortest[0]]
    return [shortest, *same[:1], *rest[:1]]
