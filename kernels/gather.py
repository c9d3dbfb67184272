"""Log-probs of logits that exist, and their gradient: each logit is read once a pass and never widened in memory.

One program a row. The forward keeps a running maximum and a running sum a lane (online softmax) and joins the lanes at
the end of the row; the backward writes ∂L/∂logits into any buffer, or over the logits. Under a mask that may end
anywhere no load or store is wider than an element: where rows are aligned, full blocks go without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .gates import Variant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LOG2E = tl.constexpr(1.4426950408889634)
# Where a maximum starts from, in place of −∞, so that no difference is ∞ − ∞.
_LOWEST = tl.constexpr(-1e30)
# Read or written at one element a program, or compared: how they are aligned is no reason to compile again.
_ONCE_A_ROW = ("targets", "logp", "largest", "log_total", "upstream", "ignore_index")


@triton.jit(do_not_specialize=_ONCE_A_ROW)
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
    ALIGNED: tl.constexpr,  # each row
    BLOCK: tl.constexpr,
):
    """logp = (x_y − max x) / T − log Σ e^((x − max x) / T); 0 in all three outputs of an ignored row."""
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
        top = tl.full((BLOCK,), _LOWEST, tl.float32)
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
        highest = tl.where(highest == _LOWEST, float("-inf"), highest)  # no finite logit: NaN, as in torch
        z = tl.log(tl.sum(total * tl.exp2((top - highest) * gain), axis=0))
        # A target outside the vocabulary reads nothing; the host asserts.
        x_y = tl.load(row + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)
        tl.store(logp + n, (x_y - highest) * inverse_temperature - z)
        tl.store(largest + n, highest)
        tl.store(log_total + n, z)


@triton.jit(do_not_specialize=_ONCE_A_ROW)
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
    ALIGNED: tl.constexpr,  # each row
    BLOCK: tl.constexpr,
):
    """grad = u (e_y − p) / T; an ignored row, or one with u = 0, is not read and gets zeros."""
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
                # p_y − 1 before it is rounded: a confident token's gradient is that difference.
                dx = tl.where(at == column, 1.0 - p, -p) * u
                tl.store(out + at, dx.to(grad.dtype.element_ty), mask=mask)


def supports(logits: Tensor) -> bool:
    """Whether the kernels take logits (N, V) of this dtype and layout: not float64, no stride along the vocabulary."""
    return logits.dtype in DTYPES and (logits.stride(1) == 1 or logits.shape[1] == 1)


def forward(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) integer
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """logp (N,) and the normaliser (2, N) that `write_gradient` takes: max x, log Σ e^((x − max x) / T); float32."""
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
                **tuning.lookup("gather_forward", logits.device, _key(logits)).options,
                enable_fp_fusion=True,
            )
    return logp, normaliser


def write_gradient(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) integer
    normaliser: Tensor,  # (2, N)
    u: Tensor,  # (N,)
    temperature: float,
    ignore_index: int,
    out: Tensor,  # (N, V), of any float dtype; may be logits
) -> None:
    """out = u (e_y − softmax(logits / temperature)) / temperature."""
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
                **tuning.lookup("gather_backward", logits.device, _key(logits)).options,
                enable_fp_fusion=True,
            )


def _aligned(x: Tensor) -> bool:
    """Each row, as Triton looks at it: a pointer of 16 bytes' multiple, a stride of 16 elements'."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0


def _key(logits: Tensor) -> tuning.Key:
    return logits.dtype, tuning.bucket(logits.shape[1])


def _problem(workload: tuning.Workload, backward: bool) -> Iterator[tuning.Problem]:
    w = workload

    def inputs(seed: int) -> tuple[Tensor, ...]:
        logits = tuning.normal(w, seed, w.tokens, w.vocab).mul_(3)
        targets = tuning.tokens(w, seed)
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

    key = w.dtype, tuning.bucket(w.vocab)
    yield tuning.Problem(key, inputs, run_backward if backward else run_forward)


_CANDIDATES = tuning.row_candidates(
    (4096, 8),
    (4096, 16),
    (1024, 4),
    (2048, 4),
    (2048, 8),
    (4096, 4),
    (8192, 8),
    (8192, 16),
    (16384, 16),
    without={"sm_80": ((2048, 4),), "sm_100": ((4096, 8), (8192, 16))},
)
_TUNABLE = {
    kernel.__name__: tuning.declare(
        kernel.__name__, tuning.Tunable((kernel,), _CANDIDATES, partial(_problem, backward=backward))
    )
    for kernel, backward in ((gather_forward, False), (gather_backward, True))
}


def variants() -> Iterator[Variant]:
    """What `gates` compiles: each dtype; a vocabulary that ends anywhere, and rows that begin anywhere."""
    numbers = {"vocab": "i32", "ignore_index": "i32", "inverse_temperature": "fp32"}
    strides = ("stride", "grad_stride")
    for dtype in ("bf16", "fp16", "fp32"):
        for case, sizes in (("", (*strides, "vocab")), (", any V", strides), (", any rows", ())):
            aligned = bool(sizes)
            options: dict[str, Any] = {
                "constexprs": {"ALIGNED": aligned},
                "representative": dtype == "bf16" and case == ", any V",
            }
            yield Variant(
                gather_forward,
                dtype + case,
                {
                    "logits": f"*{dtype}", "targets": "*i64", "logp": "*fp32", "largest": "*fp32",
                    "log_total": "*fp32", "stride": "i32", **numbers,
                },
                divisible=("logits", *sizes),
                tunable=_TUNABLE["gather_forward"],
                wide_loops=int(aligned),
                instructions=13 if aligned else 16,
                **options,
            )  # fmt: skip
            yield Variant(
                gather_backward,
                dtype + case,
                {
                    "logits": f"*{dtype}", "targets": "*i64", "largest": "*fp32", "log_total": "*fp32",
                    "upstream": "*fp32", "grad": f"*{dtype}", "stride": "i32", "grad_stride": "i32", **numbers,
                },
                divisible=("logits", "grad", *sizes),
                tunable=_TUNABLE["gather_backward"],
                wide_loops=2 * aligned,
                instructions=17 if aligned else 22,
                **options,
            )  # fmt: skip
