"""Rows that are cut over ranks while a model reads them: each rank gives it a chunk of every padded row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor
from torch.nn.functional import pad

from ..head import RowShard
from ..reduce import each_row_on

_SHARD: ContextVar[RowShard | None] = ContextVar("row_shard", default=None)


@contextlib.contextmanager
def split_over(shard: RowShard | None) -> Iterator[None]:
    """Lets `Inputs` in the block read this rank's chunk of every row, and sums over ranks count each row once.

    shard: the ranks that have the same rows; None: rows stay whole.
    """
    token = _SHARD.set(shard)
    try:
        with each_row_on(1 if shard is None else shard.world):
            yield
    finally:
        _SHARD.reset(token)


def current_shard() -> RowShard | None:
    """Returns the ranks over which the block `split_over` cuts rows, or None."""
    return _SHARD.get()


def own_chunk(
    x: Tensor,  # (R, T)
    fill: int,
) -> Tensor:
    """Returns this rank's chunk (R, ⌈T / G⌉) of padded rows, which are filled up at the end so that all are as wide.

    Outside of a block `split_over` it is all of them.
    """
    shard = current_shard()
    if shard is None:
        return x
    return shard.chunk(pad(x, (0, -x.shape[1] % shard.world), value=fill)).contiguous()
