"""Attention over a laid out sequence, by transformers' attention functions, through its interfaces.

A model whose config names an implementation of `name_of` makes its masks and calls its attention here. A segment's
tokens attend to the segments before it in its rows and to itself. In each of the ways of ways.py that is left to a
function of transformers, so that scaling, softcap, sinks, dropout, grouped heads and windows are the model's own. This
file has the way that goes everywhere: the function and the mask of the implementation that the model had (sdpa, eager),
segment by segment.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import flex, varlen
from .rows import Layout, unseen
from .ways import FLEX, VARLEN

_PREFIX = "xpo_fast_"
_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
    """Lets the models with `install_layouts` that are called in the block read their rows in this layout."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def current() -> Layout | None:
    """Returns the layout of the block `laid_out`, or None."""
    return _LAYOUT.get()


@dataclass(frozen=True)
class Call:
    """One call of the attention function: segments of equal lengths at equal positions, side by side in a batch."""

    segments: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, int, int], ...], ...]  # of each: (segment, from, to) whose keys and values it reads
    mask: Tensor | None  # (1, 1, n, k) as the attention function takes it; None: causal, of n = k tokens


@dataclass(frozen=True)
class Plan:
    """What an attention function is given in place of a mask: the calls that make up the attention of a layer."""

    lengths: tuple[int, ...]  # of all segments
    calls: tuple[Call, ...]

    @functools.cached_property
    def is_batch(self) -> bool:
        """Whether the segments are rows of one length, computed in one call, each with its own keys alone."""
        own = tuple(((i, 0, size),) for i, size in enumerate(self.lengths))
        return len(self.calls) == 1 and self.calls[0].pieces == own


def name_of(implementation: str, way: str) -> str:
    """Returns the name of the implementation that lays out for `implementation` in a way of ways.py, and registers it
    with transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"{_PREFIX}{way}_{implementation}"
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _attention(implementation))
        AttentionMaskInterface.register(name, _mask(implementation, way))
    return name


def implementation_of(name: str) -> str:
    """Returns the implementation that a name of `name_of` stands for; another name as it is."""
    return name.removeprefix(_PREFIX).partition("_")[2] if name.startswith(_PREFIX) else name


def _mask(implementation: str, way: str) -> Callable[..., Any]:
    """Returns the mask function of an implementation: what a way needs to know of the current layout, else its mask."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        layout = current()
        if layout is None:
            return make(*args, **kwargs)
        if way == FLEX:
            return flex.block_mask(layout, **kwargs)
        if way == VARLEN:
            return varlen.lengths(layout, **kwargs)
        return plan(layout, make, **kwargs)

    return mask


def plan(
    layout: Layout,
    make: Callable[..., Any],
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Plan:
    """Plans the attention of a layer. make: the mask function of the model's implementation; the rest is its arguments.

    mask_function(b, h, q, k) is the model's own: it is asked with positions in rows, so that windows and chunks are
    those of the rows.
    """
    about = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")  # of the sequence as one row
    kwargs = {n: x for n, x in kwargs.items() if n not in about} | {"batch_size": 1, "local_size": local_size}
    window = local_size if allow_is_causal_skip else None  # else the mask may be more than a window
    calls: dict[tuple[int, int], list[int]] = {}
    for i, segment in enumerate(layout.segments):
        calls.setdefault((len(segment), segment.at), []).append(i)
    made = []
    for (size, at), members in calls.items():
        # Keys further back than the window of the first query are seen by none.
        skip = unseen(at, window)

        def moved(b: Any, h: Any, q: Any, k: Any, at: int = at, skip: int = skip) -> Any:
            return mask_function(b, h, q + at, k + skip)

        found = make(
            q_length=size,
            kv_length=at + size - skip,
            mask_function=moved,
            allow_is_causal_skip=allow_is_causal_skip and at == 0,
            **kwargs,
        )
        pieces = tuple(layout.keys_of(i, window) for i in members)
        made.append(Call(tuple(members), pieces, found))
    return Plan(tuple(map(len, layout.segments)), tuple(made))


def _attention(implementation: str) -> Callable[..., Any]:
    """Returns the attention function of an implementation. What it is given in place of a mask says what it does.

    Not the name by which it is called: where layers are computed again, that is of the last forward.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if flex.is_block_mask(attention_mask):
            return flex.attend(function_of(module, flex.NAME), module, query, key, value, attention_mask, **kwargs)
        run = function_of(module, implementation)
        if isinstance(attention_mask, varlen.Lengths):
            return varlen.attend(run, implementation, module, query, key, value, attention_mask, **kwargs)
        if isinstance(attention_mask, Plan):
            run = _without_repeats(run) if implementation == "sdpa" else run
            return in_calls(run, module, query, key, value, attention_mask, **kwargs)
        return run(module, query, key, value, attention_mask, **kwargs)

    return attention


def function_of(module: Any, implementation: str) -> Callable[..., Any]:
    """Returns the function by which an attention module computes: eager attention is its own file's."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[implementation]


class _WithoutGroups:
    """An attention module as it would be if each of its query heads had keys and values of its own."""

    num_key_value_groups = 1

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _without_repeats(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns transformers' attention by sdpa, which reads keys and values that several query heads share as they are.

    Where there is a mask, it would repeat them for each of these heads. They are taken as more queries of one head.
    """

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        batch, heads, count, width = query.shape  # (B, H, n, d); key and value: (B, G, k, d)
        shared = heads // key.shape[1]
        if mask is None or shared == 1 or mask.shape[1] != 1 or kwargs.get("position_bias") is not None:
            return run(module, query, key, value, mask, **kwargs)
        queries = query.reshape(batch, key.shape[1], shared * count, width)
        found, weights = run(_WithoutGroups(module), queries, key, value, mask.repeat(1, 1, shared, 1), **kwargs)
        found = found.unflatten(1, (shared, count)).permute(0, 2, 3, 1, 4)  # (B, n, G, H / G, d')
        return found.flatten(2, 3), weights

    return attend


def in_calls(
    run: Callable[..., Any],
    module: Any,
    query: Tensor,  # (1, H, N, d)
    key: Tensor,  # (1, G, N, d)
    value: Tensor,  # (1, G, N, d')
    plan: Plan,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention call by call; returns (1, N, H, d')."""
    if plan.is_batch:  # nothing need be copied
        shape = len(plan.lengths), plan.lengths[0]
        q, k, v = (x[0].unflatten(1, shape).transpose(0, 1) for x in (query, key, value))
        found, _ = run(module, q, k, v, plan.calls[0].mask, **kwargs)
        return found.flatten(0, 1)[None], None
    # Split, not sliced: the gradient of a slice is a tensor of the whole sequence.
    queries, keys, values = (x.split(plan.lengths, dim=2) for x in (query, key, value))
    out: list[Any] = [None] * len(plan.lengths)
    for call in plan.calls:
        k, v = (_together([_joined(x, p) for p in call.pieces], 0) for x in (keys, values))
        q = _together([queries[i] for i in call.segments], 0)
        found, _ = run(module, q, k, v, call.mask, **kwargs)
        for i, x in zip(call.segments, found.split(1), strict=True):
            out[i] = x
    return torch.cat(out, dim=1), None


def _joined(parts: tuple[Tensor, ...], pieces: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Returns the pieces (segment, from, to) of parts (1, G, n, d), one behind the other."""
    found = [parts[i] if b - a == parts[i].shape[2] else parts[i][:, :, a:b] for i, a, b in pieces]
    return _together(found, 2)


def _together(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
