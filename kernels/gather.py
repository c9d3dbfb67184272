"""Log-probs of given logits, and their gradient: each logit is read once per pass and never widened in memory.

One program per row. The forward keeps a running maximum and a running sum per lane (online softmax) and joins the lanes
at the end of the row. The backward writes ∂L/∂logits into another buffer or over the logits. A mask that may end
anywhere makes loads and stores one element wide; so in aligned rows full blocks take none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .logits import FLOOR

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LOG2E = tl.constexpr(1.4426950408889634)
# Pointers to one element per program, or a number to compare: their alignment is no reason to compile again.
_NOT_SPECIALIZED = ("targets", "logp", "largest", "log_total", "upstream", "ignore_index")


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def gather_forward(
    logits,  # (N, V), rows `stride` apart
    targets,  # (N,)
    logp,  # (N,) float32
    largest,  # (N,) float32: max x
    log_total,  # (N,) float32: log Σ e^((x − max x) / T)
    stride,
    vocab,
    ignore_index,
    inverse_temperature,
    ALIGNED: tl.constexpr,  # whether every row is
    BLOCK: tl.constexpr,
):
    """Writes logp = (x_y − max x) / T − log Σ e^((x − max x) / T); all three outputs are 0 for an ignored row."""
    n = tl.program_id(0)
    y = tl.load(targets + n)
    if y == ignore_index:
        tl.store(logp + n, 0.0)
        tl.store(largest + n, 0.0)
        tl.store(log_total + n, 0.0)
    else:
        row = logits + n.to(tl.int64) * stride
        gain = inverse_temperature * _LOG2E
        lane = tl.arange(0, BLOCK)
        top = tl.full((BLOCK,), FLOOR, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        full = vocab // BLOCK * BLOCK if ALIGNED else 0
        for TAIL in tl.static_range(2):
            for start in range(full if TAIL else 0, vocab if TAIL else full, BLOCK):
                at = start + lane
                mask = at < vocab if TAIL else None
                x = tl.load(row + at, mask=mask, other=float("-inf") if TAIL else None).to(tl.float32)
                gap = x - top
                e = tl.exp2(-tl.abs(gap) * gain)  # one exponential, whichever of the two is the larger
                total = tl.where(gap > 0, total * e + 1.0, total + e)
                top = tl.maximum(top, x)
        highest = tl.max(top, axis=0)
        highest = tl.where(highest == FLOOR, float("-inf"), highest)  # without a finite logit: NaN, as in torch
        z = tl.log(tl.sum(total * tl.exp2((top - highest) * gain), axis=0))
        # A target outside the vocabulary reads nothing; the caller asserts that there is none.
        x_y = tl.load(row + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)
        tl.store(logp + n, (x_y - highest) * inverse_temperature - z)
        tl.store(largest + n, highest)
        tl.store(log_total + n, z)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def gather_backward(
    logits,  # (N, V), rows `stride` apart
    targets,  # (N,)
    largest,  # (N,) float32
    log_total,  # (N,) float32
    upstream,  # (N,) float32: u = ∂L/∂logp
    grad,  # (N, V), rows `grad_stride` apart; may be logits
    stride,
    grad_stride,
    vocab,
    ignore_index,
    inverse_temperature,
    ALIGNED: tl.constexpr,  # whether every row is
    BLOCK: tl.constexpr,
):
    """Writes grad = u (e_y − p) / T; an ignored row, or one with u = 0, is not read and gets zeros."""
    n = tl.program_id(0)
    y = tl.load(targets + n)
    u = tl.load(upstream + n) * inverse_temperature
    out = grad + n.to(tl.int64) * grad_stride
    lane = tl.arange(0, BLOCK)
    full = vocab // BLOCK * BLOCK if ALIGNED else 0
    if (y == ignore_index) | (u == 0):
        nothing = tl.zeros((BLOCK,), grad.dtype.element_ty)
        for TAIL in tl.static_range(2):
            for start in range(full if TAIL else 0, vocab if TAIL else full, BLOCK):
                at = start + lane
                tl.store(out + at, nothing, mask=at < vocab if TAIL else None)
    else:
        row = logits + n.to(tl.int64) * stride
        highest = tl.load(largest + n)
        z = tl.load(log_total + n)
        column = y.to(tl.int32)
        for TAIL in tl.static_range(2):
            for start in range(full if TAIL else 0, vocab if TAIL else full, BLOCK):
                at = start + lane
                mask = at < vocab if TAIL else None
                x = tl.load(row + at, mask=mask).to(tl.float32)
                p = tl.exp2(((x - highest) * inverse_temperature - z) * _LOG2E)
                # p_y − 1 is formed before it is rounded: it is the gradient of a confident token.
                dx = tl.where(at == column, 1.0 - p, -p) * u
                tl.store(out + at, dx.to(grad.dtype.element_ty), mask=mask)


def supports(logits: Tensor) -> bool:
    """Returns whether the kernels take logits (N, V): any dtype but float64, stride 1 along the vocabulary."""
    return logits.dtype in DTYPES and (logits.stride(1) == 1 or logits.shape[1] == 1)


def forward(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) integer
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Returns logp (N,) and the normaliser (2, N) for `write_gradient`: max x, log Σ e^((x − max x) / T); float32."""
    n, vocab = logits.shape
    normaliser = logits.new_empty((2, n), dtype=torch.float32)
    logp = logits.new_empty((n,), dtype=torch.float32)
    if n:
        with torch.cuda.device_of(logits):
            gather_forward[(n,)](
                logits,
                targets.contiguous(),
                logp,
                normaliser[0],
                normaliser[1],
                logits.stride(0),
                vocab,
                ignore_index,
                1 / temperature,
                ALIGNED=_aligned(logits),
                **launch.lookup("gather_forward", logits.device, _key(logits)).options,
                enable_fp_fusion=True,
            )
    return logp, normaliser


def write_gradient(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) integer
    normaliser: Tensor,  # (2, N)
    u: Tensor,  # (N,), ∂L/∂logp
    temperature: float,
    ignore_index: int,
    out: Tensor,  # (N, V), of any float dtype; may be logits
) -> None:
    """Writes out = u (e_y − softmax(logits / temperature)) / temperature."""
    n, vocab = logits.shape
    if n:
        with torch.cuda.device_of(logits):
            gather_backward[(n,)](
                logits,
                targets.contiguous(),
                normaliser[0],
                normaliser[1],
                u.float().contiguous(),
                out,
                logits.stride(0),
                out.stride(0),
                vocab,
                ignore_index,
                1 / temperature,
                ALIGNED=_aligned(logits) and _aligned(out),
                **launch.lookup("gather_backward", logits.device, _key(logits)).options,
                enable_fp_fusion=True,
            )


def _aligned(x: Tensor) -> bool:
    """Returns whether Triton takes every row as aligned: pointer a multiple of 16 bytes, stride of 16 elements."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0


def _key(logits: Tensor) -> launch.Key:
    return logits.dtype, launch.bucket(logits.shape[1])


def _problem(workload: launch.Workload, backward: bool) -> Iterator[launch.Problem]:
    w = workload

    def inputs(seed: int) -> tuple[Tensor, ...]:
        logits = w.normal(seed, w.tokens, w.vocab).mul_(3)
        targets = w.targets(seed)
        if not backward:
            return logits, targets
        _, normaliser = forward(logits, targets, 1.0, -100)
        return logits, targets, normaliser, torch.ones_like(normaliser[0])

    def run_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return forward(logits, targets, 1.0, -100)

    def run_backward(logits: Tensor, targets: Tensor, normaliser: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(logits)
        write_gradient(logits, targets, normaliser, u, 1.0, -100, out)
        return (out,)

    key = w.dtype, launch.bucket(w.vocab)
    yield launch.Problem(key, inputs, run_backward if backward else run_forward)


_SHAPES = (
    *((4096, 8), (4096, 16), (1024, 4), (2048, 4), (2048, 8)),
    *((4096, 4), (8192, 8), (8192, 16), (16384, 16)),
)
_CANDIDATES = launch.row_candidates(*_SHAPES, without={"sm_80": ((2048, 4),), "sm_100": ((4096, 8), (8192, 16))})
for _kernel, _backward in ((gather_forward, False), (gather_backward, True)):
    _declared = launch.Tunable((_kernel,), _CANDIDATES, partial(_problem, backward=_backward))
    launch.declare(_kernel.__name__, _declared)


def variants() -> Iterator[launch.Variant]:
    """Yields what gates.py compiles: each dtype, with V a multiple of 16 or not, and with rows that are not aligned."""
    scalars = {"vocab": "i32", "ignore_index": "i32", "inverse_temperature": "fp32"}
    strides = ("stride", "grad_stride")
    for dtype in ("bf16", "fp16", "fp32"):
        for case, sizes in (("", (*strides, "vocab")), (", any V", strides), (", any rows", ())):
            aligned = bool(sizes)
            both = {
                "logits": f"*{dtype}",
                "targets": "*i64",
                **dict.fromkeys(("largest", "log_total"), "*fp32"),
                **scalars,
            }
            own = (
                (gather_forward, {"logp": "*fp32", "stride": "i32"}, 1, 13 if aligned else 16),
                (
                    gather_backward,
                    {"upstream": "*fp32", "grad": f"*{dtype}", **dict.fromkeys(strides, "i32")},
                    2,
                    17 if aligned else 22,
                ),
            )
            for kernel, signature, loops, most in own:
                yield launch.Variant(
                    kernel,
                    dtype + case,
                    both | signature,
                    {"ALIGNED": aligned},
                    divisible=("logits", "grad", *sizes),
                    tunable=launch.tunable(kernel.__name__),
                    wide_loops=loops * aligned,
                    instructions=most,
                    representative=dtype == "bf16" and case == ", any V",
                )
