"""FlexAttention over a laid out sequence: one call for all segments, in which masked blocks of tokens cost nothing.

A token q sees a token k if k ≤ q < ends[k], and the model's own mask function says so of their positions in rows. Which
blocks have such pairs follows from the ends and positions of each block alone, so no mask of all pairs is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rows import Layout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "flex_attention"  # in transformers
BLOCK = 128  # tokens, FlexAttention's default


def is_block_mask(mask: Any) -> bool:
    """Returns whether a mask is one of FlexAttention."""
    from torch.nn.attention.flex_attention import BlockMask

    return isinstance(mask, BlockMask)


def block_mask(
    layout: Layout,
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> BlockMask:
    """Returns the mask of a layer. The arguments are those of transformers' mask functions.

    mask_function(b, h, q, k) is the model's own, asked with positions in rows. Where local_size is at least a row's
    length and allow_is_causal_skip is set, it says no more than k ≤ q, and is not asked.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends, positions = layout.ends, layout.positions
    longest = max(segment.at + len(segment) for segment in layout.segments)
    causal = allow_is_causal_skip and (local_size is None or longest <= local_size)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k])

    def sees_and_may(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(b, h, q, k) & mask_function(b, h, positions[q], positions[k])

    count = -(-len(layout) // BLOCK)
    # The last block is filled up with its last token.
    blocks = torch.arange(count * BLOCK, device=ends.device).clamp(max=len(layout) - 1).view(count, BLOCK)
    start = blocks[:, 0]
    q, k = start[:, None], start
    some = (k <= q) & (q < ends[blocks].amax(1))
    if not causal and local_size is not None:
        at = positions[blocks]
        some &= at.amin(1)[:, None] - at.amax(1) < local_size
    every = (k < q) & (q + BLOCK <= ends[blocks].amin(1))
    full = _listed(every) if causal else (None, None)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every if causal else some),
        *full,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees if causal else sees_and_may,
        seq_lengths=(len(layout), len(layout)),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row of blocks (n, n) how many are set, and the numbers of those, then of the others."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], numbers.int()[None, None]
