"""The likeliest tokens but one of every row of products h Wᵀ, for rival tokens: no sorted or copied tile.

One program a row, which it reads once: a lane keeps the largest of its logits. The largest of them all leaves its lane,
k times over, and the lane looks for its next among its own columns, V / BLOCK of them. A logit and its token make one
integer that sorts as the pair does, logit first, lower tokens first among equals. No two are equal, so the same input
gives the same tokens. Bias, scale, softcap and temperature are applied on the fly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gates import Variant
from .rows import _logits

BLOCK, WARPS = 4096, 8

# Below whatever a column comes to.
_NOTHING = tl.constexpr(-(2**63))
_MASK = tl.constexpr(2**31 - 1)
# Of a lane's columns at a time, when it looks for its next.
_COLUMNS = tl.constexpr(128)


@triton.jit
def _flipped(bits):
    """The bits of a float32 to an int32 that sorts as it does, and back."""
    return tl.where(bits < 0, bits ^ _MASK, bits)


@triton.jit
def _keys(z, at):
    """One int64 for a logit and its column; NaN above all, as in torch, and −0 equal to 0."""
    order = _flipped(z.to(tl.int32, bitcast=True))
    order = tl.where(z == 0, 0, tl.where(z != z, _MASK, order))
    return (order.to(tl.int64) << 32) | (at ^ _MASK).to(tl.int64)


@triton.jit(
    # Read or written at one element a program: how they are aligned is no reason to compile again; nor is k.
    do_not_specialize=["targets", "values", "tokens", "k"]
)
def top_k(
    products,  # (n, V) float32, rows `stride` apart
    bias,  # (V,) float32, or None
    targets,  # (n,) int64
    values,  # (n, k) float32
    tokens,  # (n, k) int64
    stride,
    vocab,
    k,
    gain,  # logit_scale / temperature
    inner,  # logit_scale / softcap
    ceiling,  # softcap / temperature
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values, tokens = topk(z without z_y), z the final logits, in descending order."""
    n = tl.program_id(0).to(tl.int64)
    row = products + n * stride
    y = tl.load(targets + n).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), _NOTHING, tl.int64)
    full = vocab // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        # Of full blocks the end is a multiple of BLOCK: their loads are wide whatever V is.
        stop = vocab if TAIL else full
        for start in range(full if TAIL else 0, stop, BLOCK):
            at = start + lane
            z, _slope = _logits(row, bias, at, stop, gain, inner, ceiling, SOFTCAP)
            candidate = (at != y) & (at < stop) if TAIL else at != y
            best = tl.maximum(best, tl.where(candidate, _keys(z, at), _NOTHING))
    for j in range(0, k):
        last = tl.max(best, axis=0)
        column = (last & _MASK).to(tl.int32) ^ _MASK
        tl.store(values + n * k + j, _flipped((last >> 32).to(tl.int32)).to(tl.float32, bitcast=True))
        tl.store(tokens + n * k + j, column.to(tl.int64))
        following = tl.full((_COLUMNS,), _NOTHING, tl.int64)
        for start in range(column % BLOCK, vocab, BLOCK * _COLUMNS):
            at = start + tl.arange(0, _COLUMNS) * BLOCK
            z, _slope = _logits(row, bias, at, vocab, gain, inner, ceiling, SOFTCAP)
            key = _keys(z, at)
            key = tl.where((at < vocab) & (at != y) & (key < last), key, _NOTHING)
            following = tl.maximum(following, key)
        best = tl.where(lane == column % BLOCK, tl.max(following, axis=0), best)


def run(
    products: Tensor,  # (n, V) float32, h Wᵀ
    targets: Tensor,  # (n,) int64
    k: int,
    *,
    bias: Tensor | None = None,  # (V,) float32
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The k largest final logits of every row but its target's, (n, k), in descending order, and their tokens (n, k).

    Equal logits go to the lower token first; NaN comes before all numbers.
    """
    n, vocab = products.shape
    assert 0 < k < vocab < 2**30, (k, vocab)
    for x in (products, *(() if bias is None else (bias,))):
        assert x.dtype == torch.float32 and x.stride(-1) == 1, (x.dtype, x.stride())
    values = products.new_empty((n, k))
    tokens = targets.new_empty((n, k), dtype=torch.int64)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    if n:
        with torch.cuda.device_of(products):
            top_k[(n,)](
                products,
                bias,
                targets.contiguous(),
                values,
                tokens,
                products.stride(0),
                vocab,
                k,
                logit_scale / temperature,
                0.0 if softcap is None else logit_scale / softcap,
                0.0 if softcap is None else softcap / temperature,
                SOFTCAP=softcap is not None,
                BLOCK=block,
                num_warps=max(1, min(WARPS, block // 128)),
                enable_fp_fusion=False,  # a logit may be made again: rounded alike
            )
    return values, tokens


def variants() -> Iterator[Variant]:
    """What `gates` compiles: with everything that can be done to logits and with nothing, and any vocabulary.

    The head's memory for products has aligned rows, whatever V is.
    """
    for everything in (False, True):
        for case, sizes in (("", ("stride", "vocab")), (", any V", ("stride",))):
            signature = {
                "products": "*fp32", "targets": "*i64", "values": "*fp32", "tokens": "*i64",
                **dict.fromkeys(("stride", "vocab", "k"), "i32"),
                **dict.fromkeys(("gain", "inner", "ceiling"), "fp32"),
            }  # fmt: skip
            constexprs: dict[str, object] = {"SOFTCAP": everything, "BLOCK": BLOCK}
            if everything:
                signature["bias"] = "*fp32"
            else:
                constexprs["bias"] = None
            yield Variant(
                top_k,
                ("bias and softcap" if everything else "plain") + case,
                signature,
                constexprs,
                divisible=("products", "bias", *sizes),
                num_warps=WARPS,
                fp_fusion=False,
                representative=everything and case != "",
                wide_loops=1,
                instructions=72 if everything else 26,
            )
