"""What torch does on a real device and not on the meta device: fused attention, and casts of mixed precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..layouts import Layout, attention

_PRODUCTS = {linear, torch.matmul, torch.bmm, torch.mm, torch.addmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


class AsOnDevice(TorchFunctionMode):
    """Calls torch's functions as they are on a device with fused attention.

    dtype: of the matrix products, if `autocast` is on. made: is told of each weight that is cast. cached: a weight is
    cast once per forward.
    """

    def __init__(self, dtype: torch.dtype, made: Callable[[Tensor], None], *, cached: bool) -> None:
        super().__init__()
        self.dtype, self.made, self.cached, self.autocast = dtype, made, cached, False
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return self._attention(*map(self._cast, args[:3]), *args[3:], **kwargs)
        if self.autocast and func in _PRODUCTS:
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(x) for name, x in kwargs.items()}
        if func in (torch.mm, torch.addmm) and "out_dtype" in kwargs and args[0].is_meta:  # which fails there with out=
            shape = args[-2].shape[0], args[-1].shape[1]
            return kwargs["out"] if "out" in kwargs else args[0].new_empty(shape, dtype=kwargs["out_dtype"])
        return func(*args, **kwargs)

    def forget(self) -> None:
        """Drops the casts of weights, as the end of an autocast does."""
        self._casts.clear()

    def _cast(self, x: Any) -> Any:
        if not (self.autocast and isinstance(x, Tensor) and x.dtype == torch.float32 and x.is_meta):
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if (cast := self._casts.get(id(x))) is None:
            cast = x.to(self.dtype)
            self.made(cast)
            if self.cached:
                self._casts[id(x)] = cast
        return cast

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Returns what flash attention does, (B, H, T, Dv); it keeps its inputs, the result and a number per row."""
        if not query.is_meta:
            given: dict[str, Any] = {
                "dropout_p": dropout_p,
                "is_causal": is_causal,
                "scale": scale,
                "enable_gqa": enable_gqa,
            }
            return scaled_dot_product_attention(query, key, value, attn_mask, **given)
        if attn_mask is not None:
            attn_mask = attn_mask.to("meta")
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
        out: Any = _Attention.apply(query, key, value, attn_mask)
        return out


@contextlib.contextmanager
def one_kernel() -> Iterator[None]:
    """Lets a layout's attention be one call over the sequence, as FlexAttention is on CUDA: no copies, and no mask."""

    def plan(layout: Layout, *_: Any, **__: Any) -> attention.Plan:
        whole = sum(map(len, layout.segments))
        return attention.Plan((whole,), (attention.Call((0,), (((0, 0, whole),),), None),))

    with patch.object(attention, "plan", plan):
        yield


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Keeps what the backward of flash attention reads."""
        *batch, heads, tokens, _ = query.shape
        # As the kernels return it: a token's heads side by side, so that joining them copies nothing.
        out = query.new_empty((*batch, tokens, heads, value.shape[-1])).transpose(-3, -2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        """Makes the three gradients."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
