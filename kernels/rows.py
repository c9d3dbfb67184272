"""Statistics of rows of products h Wᵀ, and gradients with respect to them, by one kernel that reads a row up to twice.

One program per row. The first read finds, per lane and joined at the end, the largest logit and log Σ e^z (online
softmax), and with them the statistics. The second read happens only if probabilities are needed: it writes
∂L/∂(product) for the gradient GEMMs, and sums the divergences from a reference's row. It starts where the first ended,
since that is still in the cache. Bias, scale, softcap and temperature are applied on the fly, in float32. No atomics:
the same input gives the same bits. Calls that need no second read are one_read.py's.
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

STATISTICS = ("logp", "lse", "entropy", "kl", "reverse_kl", "log_sum_sq_probs", "mean_logit", "top1")
DIFFERENTIABLE = ("logp", "lse", "entropy", "kl", "reverse_kl")
_VALUES = ("entropy", "reverse_kl")  # statistics whose own gradient needs them
# Pointers to one element per program: their alignment is no reason to compile again. Nor is the vocabulary's size.
_NOT_SPECIALIZED = (
    *("targets", *STATISTICS),
    *(f"u_{name}" for name in DIFFERENTIABLE),
    *(f"v_{name}" for name in _VALUES),
    "vocab",
)


@triton.jit
def _joined(top, total):
    """Returns the largest logit and log Σ e^(z − largest) of a row, and the factor that rescales each lane's sum."""
    largest = tl.max(top, axis=0)
    share = tl.exp(top - largest)
    # Without a finite logit the results are NaN, as in torch.
    largest = tl.where(largest == FLOOR, float("-inf"), largest)
    return largest, tl.log(tl.sum(total * share, axis=0)), share


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def row_pass(
    products,  # (n, V) float32, rows `stride` apart
    ref_products,  # (n, V) float32, rows `ref_stride` apart, or None
    bias,  # (V,) float32, or None
    ref_bias,  # (V,) float32, or None
    targets,  # (n,) int64
    # Results (n,) float32, None if not wanted
    logp,
    lse,
    entropy,
    kl,  # KL(reference ‖ policy)
    reverse_kl,  # KL(policy ‖ reference)
    log_sum_sq_probs,
    mean_logit,
    top1,  # 1 or 0
    grad,  # ∂L/∂(product), (n, V), or None; may be the products
    u_logp,  # ∂L/∂logp (n,) float32, None for 0; so with the others
    u_lse,
    u_entropy,
    u_kl,
    u_reverse_kl,
    v_entropy,  # the entropy itself (n,), needed with u_entropy
    v_reverse_kl,
    stride,
    ref_stride,
    grad_stride,
    vocab,
    gain,  # logit_scale / temperature
    inner,  # logit_scale / softcap
    ceiling,  # softcap / temperature
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes statistics of softmax(z), z the final logits, and the gradient of any function of the differentiable ones.

    ∂logp/∂z = e_y − p; ∂lse/∂z = p; ∂entropy/∂z = −p (log p + entropy); ∂kl/∂z = p − q;
    ∂reverse_kl/∂z = p (log p − log q − reverse_kl), with p = softmax z and q the reference's.
    """
    n = tl.program_id(0)
    row = products + n.to(tl.int64) * stride
    y = tl.load(targets + n).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    full = vocab // BLOCK * BLOCK  # the columns in full blocks: their loads and stores are wide for any V
    if ref_products is not None:
        ref_row = ref_products + n.to(tl.int64) * ref_stride

    z_y, _slope_y = logits.final(row, bias, y, vocab, gain, inner, ceiling, SOFTCAP)
    top = tl.full((BLOCK,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # Σ e^(z − top)
    weighted = tl.zeros((BLOCK,), tl.float32)  # Σ e^(z − top) (z − top)
    squares = tl.zeros((BLOCK,), tl.float32)  # Σ e^(2 (z − top))
    plain = tl.zeros((BLOCK,), tl.float32)  # Σ z
    ref_top = tl.full((BLOCK,), FLOOR, tl.float32)
    ref_total = tl.zeros((BLOCK,), tl.float32)
    for TAIL in tl.static_range(1, -1, -1):
        for back in range(0, vocab - full if TAIL else full, BLOCK):
            at = (full if TAIL else full - BLOCK - back) + lane
            z, slope = logits.final(row, bias, at, vocab, gain, inner, ceiling, SOFTCAP, TAIL)
            if mean_logit is not None:
                plain += tl.where(at < vocab, z, 0.0)
            z = tl.where(z < FLOOR, FLOOR, z)  # not maximum, which would drop a NaN
            gap = z - top
            rises = gap > 0
            e = tl.exp(-tl.abs(gap))  # one exponential, whichever of the two is the larger
            if entropy is not None:
                weighted = tl.where(rises, e * (weighted - gap * total), weighted + e * gap)
            if log_sum_sq_probs is not None:
                squares = tl.where(rises, e * e * squares + 1.0, squares + e * e)
            total = tl.where(rises, total * e + 1.0, total + e)
            top = tl.maximum(top, z)
            if ref_products is not None:
                z, _ref_slope = logits.final(ref_row, ref_bias, at, vocab, gain, inner, ceiling, SOFTCAP, TAIL)
                z = tl.where(z < FLOOR, FLOOR, z)
                gap = z - ref_top
                e = tl.exp(-tl.abs(gap))
                ref_total = tl.where(gap > 0, ref_total * e + 1.0, ref_total + e)
                ref_top = tl.maximum(ref_top, z)

    m, log_s, share = _joined(top, total)
    if ref_products is not None:
        ref_m, ref_log_s, _ref_share = _joined(ref_top, ref_total)
    if logp is not None:
        tl.store(logp + n, z_y - m - log_s)
    if top1 is not None:
        tl.store(top1 + n, (z_y >= m).to(tl.float32))
    if lse is not None:
        tl.store(lse + n, m + log_s)
    if entropy is not None:
        gaps = tl.sum(share * (weighted + (top - m) * total), axis=0)
        tl.store(entropy + n, log_s - gaps * tl.exp(-log_s))
    if log_sum_sq_probs is not None:
        tl.store(log_sum_sq_probs + n, tl.log(tl.sum(share * share * squares, axis=0)) - 2.0 * log_s)
    if mean_logit is not None:
        tl.store(mean_logit + n, tl.sum(plain, axis=0) / vocab)

    if kl is not None or reverse_kl is not None or grad is not None:
        sum_kl = tl.zeros((BLOCK,), tl.float32)
        sum_reverse = tl.zeros((BLOCK,), tl.float32)
        if grad is not None:
            out = grad + n.to(tl.int64) * grad_stride
            factor = 0.0  # the coefficient of p
            if u_logp is not None:
                ul = tl.load(u_logp + n)
                factor -= ul
            if u_lse is not None:
                factor += tl.load(u_lse + n)
            if u_kl is not None:
                uk = tl.load(u_kl + n)
                factor += uk
            if u_entropy is not None:
                ue = tl.load(u_entropy + n)
                factor -= ue * tl.load(v_entropy + n)
            if u_reverse_kl is not None:
                ur = tl.load(u_reverse_kl + n)
                factor -= ur * tl.load(v_reverse_kl + n)
        for TAIL in tl.static_range(2):
            for start in range(full if TAIL else 0, vocab if TAIL else full, BLOCK):
                at = start + lane
                z, slope = logits.final(row, bias, at, vocab, gain, inner, ceiling, SOFTCAP, TAIL)
                log_p = (z - m) - log_s
                p = tl.exp(log_p)
                if ref_products is not None:
                    z, _ref_slope = logits.final(ref_row, ref_bias, at, vocab, gain, inner, ceiling, SOFTCAP, TAIL)
                    log_q = (z - ref_m) - ref_log_s
                    q = tl.exp(log_q)
                    # 0·∞ = 0: a bias of −∞ rules a token out.
                    if kl is not None:
                        sum_kl += tl.where(q == 0, 0.0, q * (log_q - log_p))
                    if reverse_kl is not None:
                        sum_reverse += tl.where(p == 0, 0.0, p * (log_p - log_q))
                if grad is not None:
                    dz = p * factor
                    if u_entropy is not None:
                        dz -= tl.where(p == 0, 0.0, p * ue * log_p)
                    if u_reverse_kl is not None:
                        dz += tl.where(p == 0, 0.0, p * ur * (log_p - log_q))
                    if u_kl is not None:
                        dz -= q * uk
                    if u_logp is not None:
                        # p_y − 1 is formed before it is rounded: it is the gradient of a confident token.
                        dz += tl.where(at == y, ul, 0.0)
                    dz *= slope
                    if TAIL:
                        tl.store(out + at, dz.to(grad.dtype.element_ty), mask=at < vocab)
                    else:
                        tl.store(out + at, dz.to(grad.dtype.element_ty))
        if kl is not None:
            tl.store(kl + n, tl.sum(sum_kl, axis=0))
        if reverse_kl is not None:
            tl.store(reverse_kl + n, tl.sum(sum_reverse, axis=0))


def _tunable(names: Iterable[str], gradient: bool) -> str:
    """Returns the name of the launch: three are tuned apart, because the sums of statistics take registers."""
    if not gradient:
        return "row_pass_divergences"
    return "row_pass" if set(names) <= {"logp", "lse"} else "row_pass_statistics"


def run(
    products: Tensor,  # (n, V) float32, h Wᵀ
    targets: Tensor,  # (n,) int64
    *,
    bias: Tensor | None = None,  # (V,) float32
    ref_products: Tensor | None = None,  # (n, V) float32
    ref_bias: Tensor | None = None,  # (V,) float32
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    out: Mapping[str, Tensor] | None = None,  # statistic → (n,) float32, written
    upstream: Mapping[str, Tensor] | None = None,  # differentiable statistic → (n,) ∂L/∂statistic
    values: Mapping[str, Tensor] | None = None,  # entropy, reverse_kl (n,), if upstream has them
    grad: Tensor | None = None,  # (n, V) written
) -> None:
    """Writes the statistics named in `out` and, if `grad` is given, ∂L/∂products.

    z = softcap(logit_scale (products + bias)) / temperature. grad: of any float dtype, or the products themselves.
    """
    out, upstream, values = dict(out or {}), dict(upstream or {}), values or {}
    assert set(out) <= set(STATISTICS) and set(upstream) <= set(DIFFERENTIABLE)
    assert ref_products is not None or not {"kl", "reverse_kl"} & {*out, *upstream}
    vectors = (*out.values(), *upstream.values(), *values.values())
    for x in (products, *(t for t in (bias, ref_products, ref_bias) if t is not None), *vectors):
        assert (x.dtype == torch.float32 and x.stride(-1) == 1) or x.numel() <= 1, (x.dtype, x.stride())
    n, vocab = products.shape
    if n == 0:
        return
    assert grad is None or grad.dtype == products.dtype or grad.data_ptr() != products.data_ptr()
    key = None if grad is None else grad.dtype, ref_products is not None, launch.bucket(vocab)
    config = launch.lookup(_tunable({*out, *upstream}, grad is not None), products.device, key)
    with torch.cuda.device_of(products):
        row_pass[(n,)](
            products,
            ref_products,
            bias,
            ref_bias,
            targets,
            *(out.get(name) for name in STATISTICS),
            grad,
            *(upstream.get(name) for name in DIFFERENTIABLE),
            *(values.get(name) for name in _VALUES),
            products.stride(0),
            0 if ref_products is None else ref_products.stride(0),
            0 if grad is None else grad.stride(0),
            vocab,
            *logits.scalars(logit_scale, softcap, temperature),
            SOFTCAP=softcap is not None,
            **config.narrowed(vocab).options,
            enable_fp_fusion=False,  # rounds the target's logit and the largest alike: they are compared
        )


def _problems(name: str, workload: launch.Workload) -> Iterator[launch.Problem]:
    w = workload
    alone = name == _tunable((), True)  # log-probs and their gradient, without other statistics

    def inputs(with_ref: bool, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
        products, *ref = (w.normal(s, w.tokens, w.vocab).float().mul_(3) for s in range(seed, seed + 1 + with_ref))
        return products, ref[0] if ref else None, w.targets(seed)

    def call(dtype: torch.dtype | None, products: Tensor, ref: Tensor | None, targets: Tensor) -> list[Tensor]:
        names = ("logp", "lse") if alone else tuple(s for s in STATISTICS if ref is not None or "kl" not in s)
        made = {s: products.new_empty(w.tokens) for s in names}
        if dtype is None:
            run(products, targets, ref_products=ref, out=made)
            return [*made.values()]
        ones = products.new_ones(w.tokens)
        upstream = dict.fromkeys((s for s in DIFFERENTIABLE if s in made), ones)
        values: dict[str, Tensor] = dict.fromkeys(_VALUES, ones)
        grad = torch.empty_like(products, dtype=dtype)
        run(products, targets, ref_products=ref, out=made, upstream=upstream, values=values, grad=grad)
        return [*made.values(), grad]

    dtype = None if name == _tunable((), False) else w.dtype
    for with_ref in (False,) if alone else (True,) if dtype is None else (False, True):
        yield launch.Problem((dtype, with_ref, launch.bucket(w.vocab)), partial(inputs, with_ref), partial(call, dtype))


# Left out: shapes that spill with some version of Triton, and on gfx942 those with too few columns per thread for a
# wide store.
_WIDE = ((4096, 16), (2048, 16), (1024, 8), (1024, 4))
for _name, _shapes, _without in (
    (
        _tunable((), True),
        ((4096, 16), (2048, 8), (2048, 16), (2048, 4)),
        {"sm_100": _WIDE, "gfx942": ((2048, 16),)},
    ),
    (
        _tunable(STATISTICS, True),
        ((512, 4), (1024, 8), (1024, 4)),
        {"sm_80": _WIDE[3:], "sm_90": _WIDE[3:], "sm_100": _WIDE, "gfx942": ((512, 4), (1024, 8))},
    ),
    (
        _tunable((), False),
        ((512, 4), (256, 4), (1024, 4)),
        {"sm_80": ((512, 4), (1024, 4)), "sm_90": _WIDE, "sm_100": _WIDE, "gfx942": ((512, 4), (256, 4))},
    ),
):
    _candidates = launch.row_candidates(*_shapes, without=_without)
    launch.declare(_name, launch.Tunable((row_pass,), _candidates, partial(_problems, _name)))


def variants() -> Iterator[launch.Variant]:
    """Yields what gates.py compiles: the calls that the head makes, with softcap and bias and without."""
    some = ("entropy", "log_sum_sq_probs", "mean_logit", "top1")
    both = ("kl", "reverse_kl")
    cases = (  # name, statistics, upstream, dtype of the gradient, the most instructions per logit
        ("log-probs and their gradient, float16", ("logp", "lse"), ("logp",), "fp16", 18),
        ("statistics and gradient, float16", ("logp", "lse", *some[1:]), ("logp",), "fp16", 28),
        ("divergences", ("logp", "lse", *some, *both), (), None, 52),
        ("gradient", (), ("logp", "lse"), "bf16", 18),
        ("gradient of entropy", (), ("logp", "lse", "entropy"), "bf16", 28),
        ("gradient of divergences", (), DIFFERENTIABLE, "bf16", 44),
    )
    sizes = ("stride", "ref_stride", "grad_stride")
    for name, out, upstream, dtype, most in cases:
        ref = bool({*both} & {*out, *upstream})
        for everything in (True, False):
            wanted = {
                "products": True,
                "ref_products": ref,
                "bias": everything,
                "ref_bias": everything and ref,
                **{s: s in out for s in STATISTICS},
                **{f"u_{s}": s in upstream for s in DIFFERENTIABLE},
                **{f"v_{s}": s in upstream for s in _VALUES},
            }
            signature = {x: "*fp32" for x, there in wanted.items() if there} | {"targets": "*i64"}
            signature |= dict.fromkeys((*sizes, "vocab"), "i32") | dict.fromkeys(("gain", "inner", "ceiling"), "fp32")
            absent: dict[str, object] = {x: None for x, there in wanted.items() if not there}
            if dtype is None:
                absent["grad"] = None
            else:
                signature["grad"] = f"*{dtype}"
            yield launch.Variant(
                row_pass,
                name + (", softcap and bias" if everything else ""),
                signature,
                {**absent, "SOFTCAP": everything},
                divisible=("products", "ref_products", "bias", "ref_bias", "grad", *sizes),
                fp_fusion=False,
                tunable=launch.tunable(_tunable({*out, *upstream}, dtype is not None)),
                wide_loops=2,
                instructions=most + (88 if ref else 50) * everything,
                representative=everything and name in ("gradient", "divergences"),
            )
