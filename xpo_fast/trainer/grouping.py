"""Rows as the objective takes them: which belong together, the empty halves of pairs, and chunks of cut rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data import Kind
from ..layouts import current_shard, own_chunk
from ..types import IGNORE_INDEX


def grouped_targets(kind: Kind, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Returns targets as the objective takes them, and its keyword arguments that say which of them belong together.

    For the kinds that are one half of a pair, the rows of the other half are empty.
    """
    targets = inputs["targets"]
    if kind.listed:
        lists = inputs["list_lengths"].shape[0]
        return targets, {"list_size": targets.shape[0] // max(lists, 1)}
    if kind.half is None:
        return targets, {}
    count, length = targets.shape
    lengths = torch.zeros(2, count, dtype=torch.int64, device=targets.device)
    lengths[kind.half] = length
    ends = lengths.flatten().cumsum(0)
    return targets.flatten(), {"cu_seqlens": torch.cat([ends.new_zeros(1), ends])}


def own_targets(targets: Tensor, given: dict[str, Any], half: int | None) -> tuple[Tensor, dict[str, Any]]:
    """Returns what `grouped_targets` does, of this process's chunks if rows are cut over several."""
    if (shard := current_shard()) is None:
        return targets, given
    if (ends := given.pop("cu_seqlens", None)) is not None:  # one behind the other: chunks of rows are none of that
        targets = by_half(targets.view((len(ends) - 1) // 2, -1), half, IGNORE_INDEX)
    return own_chunk(targets, IGNORE_INDEX), {**given, "row_shard": shard}


def as_targets(x: Tensor, half: int | None) -> Tensor:
    """Returns what a forward has for each position of its rows, (R, T, …), as the objective's targets are."""
    if half is None:
        return x
    return x.flatten(0, 1) if current_shard() is None else by_half(x, half)


def by_half(x: Tensor, half: int | None, fill: int = 0) -> Tensor:
    """Returns one half of pairs with the other one, which is empty, or x itself where rows are no halves."""
    if half is None:
        return x
    halves = (x, torch.full_like(x, fill))
    return torch.cat(halves[::-1] if half else halves)
