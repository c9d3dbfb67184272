"""Rows of positions: padded targets (B, T) and packed ones (N,) with offsets in one form, a row index per position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import on_host, static_shapes, to_device
from .row_parallel import RowShard


class Group(NamedTuple):
    """Whole units that are scored together, or tokens if every token is a unit."""

    positions: Tensor  # (n,) sorted by unit
    units: Sequence[int]  # empty if tokens are the units
    start: int  # index of the first position in the concatenation of all groups


def shift_labels(labels: Tensor, ignore_index: int = -100, *, row_shard: RowShard | None = None) -> Tensor:
    """Returns aligned targets, targets[t] = labels[t + 1], from the labels of `transformers`, labels[t] = token t.

    labels (…, T) → (…, T); the last position predicts nothing and is ignored.
    row_shard: labels are this rank's chunk of every row, whose last position predicts the first token of the next
    chunk that has one: one all-gather of one label per row. Shifting each chunk alone would lose it. Rows must be the
    same on all ranks.
    """
    if row_shard is not None:
        return _shift_pieces(labels, ignore_index, row_shard)
    targets = torch.full_like(labels, ignore_index)
    targets[..., :-1] = labels[..., 1:]
    return targets


def _shift_pieces(labels: Tensor, ignore_index: int, shard: RowShard) -> Tensor:
    """Returns aligned targets of this rank's chunk of labels (…, w)."""
    pieces, rows = shard.pieces(labels), labels.shape[:-1]
    firsts = [x[..., 0] if x.shape[-1] else x.new_full(rows, ignore_index) for x in pieces]
    filled = labels.new_tensor([x.shape[-1] > 0 for x in pieces])
    every = shard.every(torch.cat([*(x.reshape(-1) for x in firsts), filled]))
    targets = [shift_labels(x, ignore_index) for x in pieces]
    follows = torch.full_like(firsts[0], ignore_index)
    for rank, which in reversed(shard.order):
        if rank == shard.rank and targets[which].shape[-1]:
            targets[which][..., -1] = follows
        if bool(every[rank, which - len(pieces)]):
            follows = every[rank, : -len(pieces)].view(len(pieces), *rows)[which]
    return torch.cat(targets, dim=-1)


def packed_rows(
    targets: Tensor,  # (B, T), or (N,) packed
    cu_seqlens: Tensor | None,  # (B + 1,)
    device: torch.device | None = None,
) -> tuple[Tensor, int]:
    """Returns the row of every position, (N,) int64 on `device` (by default the targets'), and the number of rows.

    Raises ValueError for offsets that do not fit; their values are checked only if they are on the host. The host does
    not wait for a device.
    """
    device = targets.device if device is None else device
    if cu_seqlens is None:
        if targets.dim() != 2:
            raise ValueError(
                f"expected padded rows (B, T), got targets {tuple(targets.shape)}; for packed rows pass cu_seqlens="
            )
        count = targets.shape[0]
        return torch.arange(count, device=device).repeat_interleave(targets.shape[1]), count
    if targets.dim() != 1:
        raise ValueError(f"with cu_seqlens, expected packed targets (N,), got {tuple(targets.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be an integer tensor (B + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    lengths, size, count = cu_seqlens.diff(), targets.shape[0], cu_seqlens.shape[0] - 1
    readable = on_host(cu_seqlens) and not torch.compiler.is_compiling()
    if readable and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != size or bool((lengths < 0).any())):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of positions, {size}, got {cu_seqlens.tolist()}")
    if readable and static_shapes(targets):  # no copy from the host can be captured
        rows = torch.empty(size, dtype=torch.int64, device=device)
        for row, part in enumerate(rows.split(lengths.tolist())):
            part.fill_(row)
        return rows, count
    rows = torch.arange(count, device=cu_seqlens.device).repeat_interleave(lengths, output_size=size)
    return to_device(rows, device), count


def sum_rows(x: Tensor, rows: Tensor, count: int, *, exact: bool = False) -> Tensor:
    """Returns the sum of x (N,) over the positions of each row, (count,). rows (N,): the row of each position.

    exact: for floats, sums of integers, which have the same bits in whatever order a device adds: each position is
    exact to 2⁻⁵³, and the sum is rounded once. Infinities, NaN and numbers from 2⁴⁰ on are added as floats.
    """
    return _exact_sums(x, rows, count) if exact else x.new_zeros(count).index_add(0, rows, x)


def _exact_sums(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Returns `sum_rows` with exact=True."""
    plain = x.abs() < 2**40
    small, others = torch.where(plain, x, 0).double(), torch.where(plain, 0, x).double()
    scaled = small.detach() * 2**20
    whole = scaled.round()
    parts = torch.stack([whole, ((scaled - whole) * 2**32).round()]).long()  # 20 binary places, and 32 more
    high, low = parts.new_zeros(2, count).index_add(1, rows, parts).double().unbind(0)
    rest = others + (small - small.detach())  # whose second half is 0, with the gradient of the integers
    total = (high / 2**20 + low / 2**52) + rest.new_zeros(count).index_add(0, rows, rest)
    return total.to(x.dtype)
