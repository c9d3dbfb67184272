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
    found = BlockMask.from_kv_blocks(
        *_listed(some & ~every if causal else some),
        *full,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees if causal else sees_and_may,
        seq_lengths=(len(layout), len(layout)),
    )
    # The next batch has other sizes: torch.compile need not find out one by one.
    for x in (ends, positions):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        for x in (getattr(found, name), getattr(found, f"full_{name}")):
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, list(range(2, x.ndim)))
    return found


def attend(
    run: Callable[..., Any],
    module: Any,
    query: Tensor,  # (1, H, N, d)
    key: Tensor,  # (1, G, N, d)
    value: Tensor,  # (1, G, N, d')
    mask: BlockMask,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Computes attention by `run`, transformers' function for FlexAttention; returns (1, N, H, d')."""
    for x in (query, key, value):
        torch._dynamo.maybe_mark_dynamic(x, 2)
    return run(module, query, key, value, mask, **kwargs)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row of blocks (n, n) how many are set, and the numbers of those, then of the others."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], numbers.int()[None, None]
