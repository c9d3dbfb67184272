"""Rows that are cut over ranks, as sequence and context parallelism cut them: each rank has a chunk of every row.

The head works by token, so each rank scores its own tokens. What a loss needs of a whole row is a few numbers for each
of its tokens; they are gathered, and the gradient of the gathered numbers returns to the rank that made them. Nothing
that is exchanged has a size that grows with the vocabulary or with the width of a hidden state.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class RowShard:
    """The ranks over which rows are cut: rank g of a group has the g-th chunk of every row, in order.

        shard = xf.RowShard(sequence_parallel_group)
        out = objective(hidden, weight, targets, row_shard=shard)  # each rank: its chunk of every row
        (out.loss * shard.world).backward()  # where the engine then averages the gradients over the ranks

    group: a torch.distributed.ProcessGroup; by default all ranks. Chunks are consecutive and may have any widths, 0
    too, so long as hidden states, targets and inputs by token of a rank are of the same positions.
    balanced: each rank has two pieces of equal width, side by side: the g-th, and the g-th from the end. So torch's
    context_parallel, which accelerate's cp_size uses, orders positions (ring attention, "head-tail" or "zigzag").

    Raises ValueError without a process group.
    """

    group: Any = None  # torch.distributed.ProcessGroup
    balanced: bool = False

    def __post_init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("rows are cut over the ranks of a process group: call init_process_group() first")
        if self.group is None:
            object.__setattr__(self, "group", dist.group.WORLD)
        if dist.get_rank(self.group) < 0:
            raise ValueError("this rank is not in the group of its row_shard: pass the group that has its rows")

    @property
    def world(self) -> int:
        """Returns the number of ranks of the group."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Returns this rank's place in the group, and its chunk's in a row."""
        return dist.get_rank(self.group)

    @property
    def order(self) -> list[tuple[int, int]]:
        """Returns the pieces of a row in order: the rank of each, and which of the rank's own it is."""
        once = [(rank, 0) for rank in range(self.world)]
        return [*once, *((rank, 1) for rank, _ in reversed(once))] if self.balanced else once

    def pieces(self, x: Tensor) -> list[Tensor]:
        """Returns the one or two pieces of a chunk (…, w), views. Raises ValueError for a width of no two halves."""
        if not self.balanced:
            return [x]
        if x.shape[-1] % 2:
            raise ValueError(f"a balanced chunk has two pieces of equal width, got {x.shape[-1]} positions: pad rows")
        return list(x.tensor_split(2, dim=-1))

    def chunk(self, x: Tensor, dim: int = -1) -> Tensor:
        """Returns this rank's chunk of whole rows; the first chunks are wider by one if they cannot be equal.

        dim: the axis of positions: −1 for targets (R, T) or packed ones (N,), 1 for hidden states (R, T, D). Raises
        ValueError for balanced rows that 2·G does not divide.
        """
        order, width = self.order, x.shape[dim]
        if self.balanced and width % len(order):
            raise ValueError(f"balanced chunks of {self.world} ranks need rows of a multiple of {len(order)}: pad them")
        pieces = x.tensor_split(len(order), dim=dim)
        own = [piece for piece, (rank, _) in zip(pieces, order, strict=True) if rank == self.rank]
        return own[0] if len(own) == 1 else torch.cat(own, dim=dim)

    def every(self, x: Tensor) -> Tensor:
        """Returns x of every rank, (G, …): one all-gather, without a gradient. x has the same shape on all ranks."""
        found = x.new_empty((self.world, *x.shape))
        dist.all_gather(list(found.unbind(0)), x.detach().contiguous(), group=self.group)
        return found

    def parts(self, width: int, device: torch.device) -> RowParts:
        """Returns where the ranks' chunks are in a row, after they have exchanged their widths: one small collective.

        The host waits for the device.
        """
        return RowParts(self, tuple(self.every(torch.tensor([width], device=device)).flatten().tolist()))


@dataclass(frozen=True)
class RowParts:
    """The widths of the chunks of a group's ranks."""

    shard: RowShard
    widths: tuple[int, ...]

    def own(self, x: Tensor) -> Tensor:
        """Returns this rank's chunk (…, w) of whole rows (…, T)."""
        pieces = x.split(self._sizes, dim=-1)
        own = [piece for piece, (rank, _) in zip(pieces, self.shard.order, strict=True) if rank == self.shard.rank]
        return torch.cat(own, dim=-1)

    @property
    def _sizes(self) -> list[int]:
        """Returns the widths of the pieces of a row, in order."""
        return [self.widths[rank] // (1 + self.shard.balanced) for rank, _ in self.shard.order]

    def whole(self, x: Tensor) -> Tensor:
        """Returns whole rows (…, T) from each rank's chunk (…, w): one all-gather.

        The gradient of a chunk is that of its own entries. It is complete where all ranks compute the same from the
        whole rows, so nothing is summed, and the backward exchanges nothing.
        """
        rows: Any = _Whole.apply(x, self)
        return rows

    def exchange(self, chunks: Sequence[Tensor], same: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns whole rows from chunks (…, w) of any dtypes, and whether each of `same` is so on all ranks, () bool.

        One all-gather of bytes, without a gradient.
        """
        padded = [self._padded(x.detach()) for x in chunks]
        parts = [x.detach().contiguous().flatten() for x in (*padded, *same)]
        sent = torch.cat([x.view(torch.uint8) for x in parts])
        found, at = self.shard.every(sent), [0, *itertools.accumulate(x.nbytes for x in parts)]
        sections = [
            found[:, a:b].clone(memory_format=torch.contiguous_format) for a, b in itertools.pairwise(at)
        ]  # a copy begins at its own memory, as other dtypes need
        rows = [
            self._joined(section.view(x.dtype).view(self.shard.world, *x.shape))
            for section, x in zip(sections, padded, strict=False)
        ]
        return rows, [(section == section[0]).all() for section in sections[len(padded) :]]

    def _padded(self, x: Tensor) -> Tensor:
        return pad(x, (0, max(self.widths) - x.shape[-1])).contiguous()

    def _joined(self, x: Tensor) -> Tensor:
        """Returns whole rows (…, T) from every rank's padded chunk (G, …, w)."""
        chunks = [self.shard.pieces(part[..., :width]) for part, width in zip(x, self.widths, strict=True)]
        return torch.cat([chunks[rank][which] for rank, which in self.shard.order], dim=-1)


class _Whole(torch.autograd.Function):
    """`RowParts.whole`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: RowParts) -> Tensor:
        ctx.parts = parts
        return parts._joined(parts.shard.every(parts._padded(x)))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.parts.own(upstream[0]), None
