"""Log-probs, statistics and ∂logp/∂(product) of rows of products h Wᵀ, each product read from memory once.

A softmax is two reads where e^(z − lse) has to be stored: lse is known at the end of the first. bfloat16 has float32's
exponents, so that here e^(z − c) is stored instead, with a logit c of the row that is chosen beforehand, S = Σ e^(z − c) is
summed beside it, and 1/S is a factor of the row, which goes into what the tile is multiplied by and into dH. No atomics:
the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .gates import Variant
from .rows import _FLOOR, _logits

STATISTICS = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logit", "top1")
GRADIENTS = (torch.bfloat16, torch.float32)  # float16 has not the exponents

# A row whose largest logit is further above c is read again, with the largest as c: sums of e^(z − c), and of their products
# with an entry of the head, stay far below float32's e^88. Less far where z − c itself or squares of e^(z − c) are summed.
_GAP = tl.constexpr(40.0)
_GAP_OF_STATISTICS = tl.constexpr(20.0)
_TINY = tl.constexpr(1e-30)


@triton.jit(
    # Read or written at one element a program: how they are aligned is no reason to compile again.
    do_not_specialize=[
        "targets", "logp", "lse", "entropy", "log_sum_sq_probs", "mean_logit", "top1", "factor", "vocab",
    ]
)  # fmt: skip
def one_read(
    products,  # (n, V) float32, rows `stride` apart
    bias,  # (V,) float32, or None
    targets,  # (n,) int64
    # Results, (n,) float32, None where not wanted
    logp,
    lse,
    entropy,
    log_sum_sq_probs,
    mean_logit,
    top1,  # 1 or 0
    grad,  # (n, V) float32 or bfloat16, ∂logp/∂(product) up to the row's factor; or None
    factor,  # (n,) float32, where grad is given
    stride,
    grad_stride,
    vocab,
    gain,  # logit_scale / temperature
    inner,  # logit_scale / softcap
    ceiling,  # softcap / temperature
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With e = e^(z − c) and s = dz/d(product): grad = e·s but at the target, −s Σ e over all others; factor = −1/Σ e.

    The sum over all others is exact where p_y − 1 would cancel. What is rounded is off by up to 2⁻⁸ of itself; of the entries
    the target's and its likeliest rival's are the largest by far in most rows: the factor is the one with which the two
    come closest to what they were (least squares), but for a softcap, where they need not be the largest.
    """
    n = tl.program_id(0).to(tl.int64)
    row = products + n * stride
    y = tl.load(targets + n).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK

    # A target outside the vocabulary has no logit; the host asserts.
    known = (y >= 0) & (y < vocab)
    z_y, slope_y = _logits(row, bias, tl.where(known, y, 0), vocab, gain, inner, ceiling, SOFTCAP)
    z_y = tl.where(known, z_y, float("nan"))
    some, _slope = _logits(row, bias, lane, vocab, gain, inner, ceiling, SOFTCAP)
    c = tl.maximum(tl.max(some, axis=0), z_y)
    largest = c
    rival = c  # the largest of all but the target
    others = 0.0  # Σ e of all but the target
    gaps = 0.0  # Σ e (z − c) of all but the target, and so on
    squares = 0.0
    plain = 0.0
    again = vocab > 0
    while again:  # once, but for rows that c does not suit
        total = tl.zeros((BLOCK,), tl.float32)
        weighted = tl.zeros((BLOCK,), tl.float32)
        squared = tl.zeros((BLOCK,), tl.float32)
        summed = tl.zeros((BLOCK,), tl.float32)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for TAIL in tl.static_range(2):
            for start in range(whole if TAIL else 0, vocab if TAIL else whole, BLOCK):
                at = start + lane
                z, slope = _logits(row, bias, at, vocab, gain, inner, ceiling, SOFTCAP, TAIL)
                if mean_logit is not None:
                    summed += tl.where(at < vocab, z, 0.0)
                z = tl.where(at == y, float("-inf"), z)
                top = tl.maximum(top, z)
                e = tl.exp(z - c)
                total += e
                if entropy is not None:
                    weighted += e * tl.where(z < _FLOOR, _FLOOR, z - c)
                if log_sum_sq_probs is not None:
                    squared += e * e
                if grad is not None:
                    dz = (e * slope if SOFTCAP else e).to(grad.dtype.element_ty)
                    if TAIL:
                        tl.store(grad + n * grad_stride + at, dz, mask=at < vocab)
                    else:
                        tl.store(grad + n * grad_stride + at, dz)
        rival = tl.max(top, axis=0)
        largest = tl.maximum(rival, z_y)
        others = tl.sum(total, axis=0)
        gaps = tl.sum(weighted, axis=0)
        squares = tl.sum(squared, axis=0)
        plain = tl.sum(summed, axis=0)
        if entropy is not None or log_sum_sq_probs is not None:
            again = largest - c > _GAP_OF_STATISTICS
        else:
            again = largest - c > _GAP
        c = tl.where(again, largest, c)

    e_y = tl.exp(z_y - c)
    total_y = others + e_y
    log_s = tl.log(total_y)
    if logp is not None:
        tl.store(logp + n, (z_y - c) - log_s)
    if lse is not None:
        # Without a finite logit: −∞, as in torch.
        tl.store(lse + n, tl.where(c == float("-inf"), c, c + log_s))
    if entropy is not None:
        gap_y = tl.where(z_y < _FLOOR, _FLOOR, z_y - c)
        tl.store(entropy + n, log_s - (gaps + e_y * gap_y) / total_y)
    if log_sum_sq_probs is not None:
        tl.store(log_sum_sq_probs + n, tl.log(squares + e_y * e_y) - 2.0 * log_s)
    if mean_logit is not None:
        tl.store(mean_logit + n, plain / vocab)
    if top1 is not None:
        tl.store(top1 + n, (z_y >= largest).to(tl.float32))
    if grad is not None:
        dz_y = -others * slope_y if SOFTCAP else -others
        rounded = dz_y.to(grad.dtype.element_ty)
        if SOFTCAP:
            tl.store(factor + n, -1.0 / total_y)
        else:
            e = tl.exp(rival - c)
            e_rounded = e.to(grad.dtype.element_ty).to(tl.float32) / others
            e = e / others
            y_rounded = -rounded.to(tl.float32) / others
            nearest = (y_rounded + e * e_rounded) / (y_rounded * y_rounded + e_rounded * e_rounded)
            tl.store(factor + n, tl.where(others > _TINY, nearest, 1.0) * -gain / total_y)
        # After the zero that another thread has written there.
        tl.debug_barrier()
        tl.store(grad + n * grad_stride + y, rounded, mask=known)


def _tunable(names: Iterable[str], gradient: bool) -> str:
    """Four, since what statistics add up is kept in registers."""
    statistics = set(names) - {"logp", "lse", "top1"}
    return "one_read" + ("_statistics" if statistics else "") + ("_gradient" if gradient else "")


def run(
    products: Tensor,  # (n, V) float32, h Wᵀ
    targets: Tensor,  # (n,) int64
    *,
    bias: Tensor | None = None,  # (V,) float32
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    out: Mapping[str, Tensor],  # statistic → (n,) float32, written
    grad: Tensor | None = None,  # (n, V) float32 or bfloat16, other memory than the products, written
    factor: Tensor | None = None,  # (n,) float32, written where grad is
) -> None:
    """Write the statistics in `out` and, up to a factor of each row, ∂logp/∂products = factor · grad."""
    assert set(out) <= set(STATISTICS) and (grad is None) == (factor is None)
    vectors = (*out.values(), *(() if factor is None else (factor,)))
    for x in (products, *(() if bias is None else (bias,)), *vectors):
        assert (x.dtype == torch.float32 and x.stride(-1) == 1) or x.numel() <= 1, (x.dtype, x.stride())
    n, vocab = products.shape
    if n == 0:
        return
    if grad is not None:
        assert grad.shape == products.shape and grad.dtype in GRADIENTS and grad.stride(1) == 1
        assert grad.data_ptr() != products.data_ptr()  # which may be read again
    key = None if grad is None else grad.dtype, tuning.bucket(vocab)
    config = tuning.lookup(_tunable(out, grad is not None), products.device, key)
    with torch.cuda.device_of(products):
        one_read[(n,)](
            products,
            bias,
            targets,
            *map(out.get, STATISTICS),
            grad,
            factor,
            products.stride(0),
            0 if grad is None else grad.stride(0),
            vocab,
            logit_scale / temperature,
            0.0 if softcap is None else logit_scale / softcap,
            0.0 if softcap is None else softcap / temperature,
            SOFTCAP=softcap is not None,
            **config.narrowed(vocab).options,
            enable_fp_fusion=False,  # the target's logit and the largest are compared: rounded alike
        )


def _problems(name: str, workload: tuning.Workload) -> Iterator[tuning.Problem]:
    w = workload
    names = STATISTICS if "statistics" in name else ("logp", "lse")

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        return tuning.normal(w, seed, w.tokens, w.vocab).float().mul_(3), tuning.tokens(w, seed)

    def launch(products: Tensor, targets: Tensor) -> list[Tensor]:
        made = {s: products.new_empty(w.tokens) for s in names}
        if "gradient" not in name:
            run(products, targets, out=made)
            return [*made.values()]
        grad, factor = torch.empty_like(products, dtype=w.dtype), products.new_empty(w.tokens)
        run(products, targets, out=made, grad=grad, factor=factor)
        return [*made.values(), grad, factor]

    if "gradient" not in name:
        yield tuning.Problem((None, tuning.bucket(w.vocab)), inputs, launch)
    elif w.dtype in GRADIENTS:
        yield tuning.Problem((w.dtype, tuning.bucket(w.vocab)), inputs, launch)


# Without what spills with one Triton or another; and on gfx942 what gives a thread too little for a wide store.
for _name, _shapes, _without in (
    # Few warps a row: many rows are under way, and the last of them leave few processors idle.
    ("one_read", ((1024, 4), (1024, 8), (512, 4)), {"sm_80": ((1024, 4),)}),
    (
        "one_read_gradient",
        ((1024, 4), (1024, 8), (2048, 16), (512, 4)),
        {"sm_100": ((1024, 4),), "gfx942": ((1024, 8), (2048, 16), (512, 4))},
    ),
    ("one_read_statistics", ((512, 4), (1024, 8)), {"sm_100": ((1024, 8),)}),
    (
        "one_read_statistics_gradient",
        ((1024, 8), (1024, 4)),
        {**dict.fromkeys(("sm_80", "sm_90", "sm_100"), ((1024, 4),)), "gfx942": ((1024, 8),)},
    ),
):
    tuning.declare(
        _name,
        tuning.Tunable((one_read,), tuning.row_candidates(*_shapes, without=_without), partial(_problems, _name)),
    )


def variants() -> Iterator[Variant]:
    """What `gates` compiles: what the head asks for, with everything that can be done to logits and with nothing."""
    some = ("entropy", "log_sum_sq_probs", "mean_logit", "top1")
    cases = (  # name, statistics, dtype of the gradient
        ("log-probs", (), None),
        ("log-probs and their gradient", (), "bf16"),
        ("log-probs and their gradient, float32", (), "fp32"),
        ("statistics", some, None),
        ("statistics and gradient", some, "bf16"),
    )
    for name, statistics, dtype in cases:
        out = ("logp", "lse", *statistics)
        for everything in (True, False):
            wanted = {
                "bias": everything,
                **{s: s in out for s in STATISTICS},
                "factor": dtype is not None,
            }
            signature = dict.fromkeys(("products", *(x for x, there in wanted.items() if there)), "*fp32")
            signature |= {"targets": "*i64"} | dict.fromkeys(("stride", "grad_stride", "vocab"), "i32")
            signature |= dict.fromkeys(("gain", "inner", "ceiling"), "fp32")
            nothing: dict[str, object] = {x: None for x, there in wanted.items() if not there}
            if dtype is None:
                nothing["grad"] = None
            else:
                signature["grad"] = f"*{dtype}"
            yield Variant(
                one_read,
                name + (", softcap and bias" if everything else ""),
                signature,
                {**nothing, "SOFTCAP": everything},
                divisible=("products", "bias", "grad", "stride", "grad_stride"),
                fp_fusion=False,
                tunable=tuning.tunable(_tunable(out, dtype is not None)),
                wide_loops=1,
                instructions=(32 if statistics else 18) + 50 * everything,
                representative=name == "log-probs and their gradient",
            )
