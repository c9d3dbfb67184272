"""Log-probs, statistics and ∂logp/∂(product) of rows of products h Wᵀ, in one kernel that reads each product once.

A softmax takes two reads if e^(z − lse) is stored, because lse is known only at the end of the first. But bfloat16 has
float32's range of exponents. So this kernel stores e^(z − c) instead, where c is a logit of the row chosen beforehand,
and sums S = Σ e^(z − c) beside it. 1/S is a factor of the row, which the caller applies to h and dH instead of the
tile. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, logits
from .logits import FLOOR

STATISTICS = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logit", "top1")
GRADIENTS = (torch.bfloat16, torch.float32)  # float16 lacks the exponents

# A row whose largest logit exceeds c by more than this is read again, with its largest logit as c. Then sums of e^(z −
# c), and of its products with an entry of the head, stay far below float32's limit e^88. The gap is smaller if z − c
# itself or the squares of e^(z − c) are summed.
_GAP = tl.constexpr(40.0)
_GAP_OF_STATISTICS = tl.constexpr(20.0)
_TINY = tl.constexpr(1e-30)
# Pointers to one element per program: their alignment is no reason to compile again. Nor is the vocabulary's size.
_NOT_SPECIALIZED = ("targets", *STATISTICS, "factor", "vocab")


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def one_read(
    products,  # (n, V) float32, rows `stride` apart
    bias,  # (V,) float32, or None
    targets,  # (n,) int64
    # Results (n,) float32, None if not wanted
    logp,
    lse,
    entropy,
    log_sum_sq_probs,
    mean_logit,
    top1,  # 1 or 0
    grad,  # ∂logp/∂(product) up to a factor per row, (n, V) float32 or bfloat16, or None
    factor,  # (n,) float32, needed with grad
    stride,
    grad_stride,
    vocab,
    gain,  # logit_scale / temperature
    inner,  # logit_scale / softcap
    ceiling,  # softcap / temperature
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the statistics, grad = e·s, at the target −s Σ e over all others, and factor = −1/Σ e.

    Here e = e^(z − c) and s = dz/d(product).

    The sum over all others is exact where p_y − 1 would cancel. Rounding to bfloat16 changes an entry by up to 2⁻⁸ of
    itself. In most rows the entries of the target and of its likeliest rival are by far the largest. So the factor is
    chosen by least squares to bring these two closest to their exact values; with a softcap it is not, since there they
    need not be the largest.
    """
    n = tl.program_id(0).to(tl.int64)
    row = products + n * stride
    y = tl.load(targets + n).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    full = vocab // BLOCK * BLOCK

    # A target outside the vocabulary has no logit; the caller asserts that there is none.
    known = (y >= 0) & (y < vocab)
    z_y, slope_y = logits.final(row, bias, tl.where(known, y, 0), vocab, gain, inner, ceiling, SOFTCAP)
    z_y = tl.where(known, z_y, float("nan"))
    some, _slope = logits.final(row, bias, lane, vocab, gain, inner, ceiling, SOFTCAP)
    c = tl.maximum(tl.max(some, axis=0), z_y)
    largest = c
    rival = c  # the largest of all but the target
    others = 0.0  # Σ e over all but the target
    gaps = 0.0  # Σ e (z − c) over all but the target; `squares` likewise
    squares = 0.0
    plain = 0.0
    again = vocab > 0
    while again:  # a second round only for rows where c was too small
        total = tl.zeros((BLOCK,), tl.float32)
        weighted = tl.zeros((BLOCK,), tl.float32)
        squared = tl.zeros((BLOCK,), tl.float32)
        summed = tl.zeros((BLOCK,), tl.float32)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for TAIL in tl.static_range(2):
            for start in range(full if TAIL else 0, vocab if TAIL else full, BLOCK):
                at = start + lane
                z, slope = logits.final(row, bias, at, vocab, gain, inner, ceiling, SOFTCAP, TAIL)
                if mean_logit is not None:
                    summed += tl.where(at < vocab, z, 0.0)
                z = tl.where(at == y, float("-inf"), z)
                top = tl.maximum(top, z)
                e = tl.exp(z - c)
                total += e
                if entropy is not None:
                    weighted += e * tl.where(z < FLOOR, FLOOR, z - c)
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
        # Without a finite logit lse is −∞, as in torch.
        tl.store(lse + n, tl.where(c == float("-inf"), c, c + log_s))
    if entropy is not None:
        gap_y = tl.where(z_y < FLOOR, FLOOR, z_y - c)
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
        # Another thread has written e there in the loop: this store must come after it.
        tl.debug_barrier()
        tl.store(grad + n * grad_stride + y, rounded, mask=known)


def _tunable(names: Iterable[str], gradient: bool) -> str:
    """Returns the name of the launch: four are tuned apart, because the sums of statistics take registers."""
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
    grad: Tensor | None = None,  # (n, V) float32 or bfloat16, written; not the products' memory
    factor: Tensor | None = None,  # (n,) float32, written; needed with grad
) -> None:
    """Writes the statistics named in `out` and, if `grad` is given, ∂logp/∂products = factor · grad, factor per row."""
    assert set(out) <= set(STATISTICS) and (grad is None) == (factor is None)
    vectors = (*out.values(), *(() if factor is None else (factor,)))
    for x in (products, *(() if bias is None else (bias,)), *vectors):
        assert (x.dtype == torch.float32 and x.stride(-1) == 1) or x.numel() <= 1, (x.dtype, x.stride())
    n, vocab = products.shape
    if n == 0:
        return
    if grad is not None:
        assert grad.shape == products.shape and grad.dtype in GRADIENTS and grad.stride(1) == 1
        assert grad.data_ptr() != products.data_ptr()  # a row may be read again
    key = None if grad is None else grad.dtype, launch.bucket(vocab)
    config = launch.lookup(_tunable(out, grad is not None), products.device, key)
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
            *logits.scalars(logit_scale, softcap, temperature),
            SOFTCAP=softcap is not None,
            **config.narrowed(vocab).options,
            enable_fp_fusion=False,  # rounds the target's logit and the largest alike: they are compared
        )


def _problems(name: str, workload: launch.Workload) -> Iterator[launch.Problem]:
    w = workload
    names = STATISTICS if "statistics" in name else ("logp", "lse")

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        return w.normal(seed, w.tokens, w.vocab).float().mul_(3), w.targets(seed)

    def call(products: Tensor, targets: Tensor) -> list[Tensor]:
        made = {s: products.new_empty(w.tokens) for s in names}
        if "gradient" not in name:
            run(products, targets, out=made)
            return [*made.values()]
        grad, factor = torch.empty_like(products, dtype=w.dtype), products.new_empty(w.tokens)
        run(products, targets, out=made, grad=grad, factor=factor)
        return [*made.values(), grad, factor]

    if "gradient" not in name:
        yield launch.Problem((None, launch.bucket(w.vocab)), inputs, call)
    elif w.dtype in GRADIENTS:
        yield launch.Problem((w.dtype, launch.bucket(w.vocab)), inputs, call)


# Left out: shapes that spill with some version of Triton, and on gfx942 those with too few columns per thread for a
# wide store.
for _name, _shapes, _without in (
    # Few warps per row: many rows run at once, and the last ones leave few processors idle.
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
    _candidates = launch.row_candidates(*_shapes, without=_without)
    launch.declare(_name, launch.Tunable((one_read,), _candidates, partial(_problems, _name)))


def variants() -> Iterator[launch.Variant]:
    """Yields what gates.py compiles: the calls that the head makes, with softcap and bias and without."""
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
            wanted = {"bias": everything, **{s: s in out for s in STATISTICS}, "factor": dtype is not None}
            signature = dict.fromkeys(("products", *(x for x, there in wanted.items() if there)), "*fp32")
            signature |= {"targets": "*i64"} | dict.fromkeys(("stride", "grad_stride", "vocab"), "i32")
            signature |= dict.fromkeys(("gain", "inner", "ceiling"), "fp32")
            absent: dict[str, object] = {x: None for x, there in wanted.items() if not there}
            if dtype is None:
                absent["grad"] = None
            else:
                signature["grad"] = f"*{dtype}"
            yield launch.Variant(
                one_read,
                name + (", softcap and bias" if everything else ""),
                signature,
                {**absent, "SOFTCAP": everything},
                divisible=("products", "bias", "grad", "stride", "grad_stride"),
                fp_fusion=False,
                tunable=launch.tunable(_tunable(out, dtype is not None)),
                wide_loops=1,
                instructions=(32 if statistics else 18) + 50 * everything,
                representative=name == "log-probs and their gradient",
            )
