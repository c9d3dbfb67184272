"""FlashAttention over a laid out sequence: one call of its function for sequences of different lengths.

The queries of each segment are such a sequence, in the order they are in. Its keys are those of the segments before it
in its rows, and its own: where segments are shared, they are gathered. FlashAttention lays the last query on the last
key, so `causal` is exactly what a segment sees, and windows count back from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rows import Layout


@dataclass(frozen=True)
class Lengths:
    """What FlashAttention is told in place of a mask."""

    queries: Tensor  # (segments + 1,) int32, where a segment's queries begin
    keys: Tensor  # (segments + 1,) int32, where its keys begin
    most_queries: int
    most_keys: int
    index: Tensor | None  # (K,) int64, the tokens whose keys and values are read, in order; None: all, as they are


def lengths(layout: Layout, *, local_size: int | None = None, **_: Any) -> Lengths:
    """Returns the lengths of a layer. The arguments are those of transformers' mask functions.

    local_size: the layer's window; keys that no query of a segment sees are not gathered.
    """
    device = layout.ends.device
    segments = layout.segments
    sizes = [len(segment) for segment in segments]
    if not any(segment.before for segment in segments):
        starts = _starts(sizes, device)
        return Lengths(starts, starts, max(sizes), max(sizes), None)
    pieces = [layout.keys_of(i, local_size) for i in range(len(segments))]
    key_sizes = [sum(stop - start for _, start, stop in own) for own in pieces]
    parts = [np.arange(a, b) + segments[i].start for own in pieces for i, a, b in own]
    index = torch.from_numpy(np.concatenate(parts)).to(device)
    return Lengths(_starts(sizes, device), _starts(key_sizes, device), max(sizes), max(key_sizes), index)


def _starts(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=device)


def attend(
    run: Callable[..., Any],
    implementation: str,
    module: Any,
    query: Tensor,  # (1, H, N, d)
    key: Tensor,  # (1, G, N, d)
    value: Tensor,  # (1, G, N, d')
    lengths: Lengths,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Computes attention by `run`, transformers' function for FlashAttention; returns (1, N, H, d')."""
    if lengths.index is not None:
        key, value = (x.index_select(2, lengths.index) for x in (key, value))
    kwargs |= {"cu_seq_lens_q": lengths.queries, "cu_seq_lens_k": lengths.keys}
    kwargs |= {"max_length_q": lengths.most_queries, "max_length_k": lengths.most_keys}
    # It looks up which FlashAttention to call by the name in the module's config.
    config, name = module.config, module.config._attn_implementation
    config._attn_implementation = implementation
    try:
        return run(module, query, key, value, None, **kwargs)
    finally:
        config._attn_implementation = name
