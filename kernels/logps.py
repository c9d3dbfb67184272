"""Log-probs without gradient, straight from hidden states and the LM head: a GEMM that keeps no logits.

A program has a block of rows and walks a share of the vocabulary. Of each block of logits it keeps, per row, the
running maximum and sum (online softmax) and the target's logit. A second kernel joins the shares. Bias, scale, softcap
and temperature are applied in float32 to the sums of the GEMM. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, logits
from .logits import FLOOR

STATISTICS = ("logp", "lse", "entropy")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# For float32, for rows that are not aligned, and for devices with little shared memory.
SMALL = launch.config(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_D=32, PARTS=1)
JOIN_BLOCK, JOIN_WARPS = 128, 4
# Hidden states are read again and again; this many bytes of them stay in the cache beside the columns of W.
CACHED_BYTES = 16 * 2**20


@triton.jit
def _part(x, part: tl.constexpr, PARTS: tl.constexpr):
    """Returns columns part·N/PARTS up to (part + 1)·N/PARTS of x (M, N)."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if PARTS > 1:
        a, b = x.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        x = a if part < PARTS // 2 else b
        x = _part(x, part % (PARTS // 2), PARTS // 2)
    return x


# Pointers read at few places per program, or counts: their alignment is no reason to compile again.
@triton.jit(do_not_specialize=["bias", "targets", "partials", "n", "vocab", "splits", "group"])
def logps_pass(
    hidden,  # (n, D), rows `hidden_stride` apart
    weight,  # (V, D), rows `weight_stride` apart
    bias,  # (V,) float32, or None
    targets,  # (n,) int64
    partials,  # (3, splits, n) float32: max z, Σ e^(z − max), z_y; ENTROPY: (4, splits, n) with Σ e^(z − max) (z − max)
    hidden_stride,
    weight_stride,
    n,
    vocab,
    width,
    splits,
    group,
    gain,  # logit_scale / temperature
    inner,  # logit_scale / softcap
    ceiling,  # softcap / temperature
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes partial results of one share of the vocabulary for BLOCK_M rows; of no columns, max −1e30 and sums 0.

    Consecutive programs belong to one group of row blocks, and within it to one share. So programs that run at the same
    time read the same columns of W, and no more rows of h than stay in the cache.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(n, BLOCK_M)
    first = program // (group * splits) * group
    program %= group * splits
    size = tl.minimum(row_blocks - first, group)
    split = program // size
    start_m = (first + program % size) * BLOCK_M
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    lane_d = tl.arange(0, BLOCK_D)
    # The offset of a block is 64 bits wide, offsets within it 32. Beyond the end, the last row is read again.
    h = hidden + start_m.to(tl.int64) * hidden_stride
    h_at = tl.minimum(lane_m, n - 1 - start_m)[:, None] * hidden_stride + lane_d[None, :]
    y = tl.load(targets + start_m + lane_m, mask=start_m + lane_m < n, other=-1).to(tl.int32)

    top = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    z_y = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    blocks = tl.cdiv(vocab, BLOCK_N)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        start_n = block * BLOCK_N
        w = weight + start_n.to(tl.int64) * weight_stride
        w_at = tl.minimum(lane_n, vocab - 1 - start_n)[:, None] * weight_stride + lane_d[None, :]
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d in range(0, width, BLOCK_D):
            inside = (d + lane_d < width)[None, :]
            h_d = tl.load(h + d + h_at, mask=inside, other=0.0)
            w_d = tl.load(w + d + w_at, mask=inside, other=0.0)
            x = tl.dot(h_d, w_d.T, x, input_precision="ieee")
        for part in tl.static_range(PARTS):
            x_part = _part(x, part, PARTS)
            at = start_n + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            if bias is not None:
                x_part += tl.load(bias + at, mask=at < vocab, other=0.0)[None, :]
            z = logits.tanh(x_part * inner) * ceiling if SOFTCAP else x_part * gain
            z = tl.where((at < vocab)[None, :], z, float("-inf"))
            z_y += tl.sum(tl.where(at[None, :] == y[:, None], z, 0.0), axis=1)
            higher = tl.maximum(top, tl.max(z, axis=1))
            gap = z - higher[:, None]
            e = tl.exp(gap)
            fade = tl.exp(top - higher)
            if ENTROPY:
                # 0·∞ = 0: a bias of −∞ rules a token out.
                weighted = fade * (weighted + (top - higher) * total)
                weighted += tl.sum(e * tl.maximum(gap, FLOOR), axis=1)
            total = total * fade + tl.sum(e, axis=1)
            top = higher

    plane = splits.to(tl.int64) * n
    to = partials + split.to(tl.int64) * n + start_m + lane_m
    inside = start_m + lane_m < n
    tl.store(to, top, mask=inside)
    tl.store(to + plane, total, mask=inside)
    tl.store(to + 2 * plane, z_y, mask=inside)
    if ENTROPY:
        tl.store(to + 3 * plane, weighted, mask=inside)


# Pointers to one element per row, or counts: their alignment is no reason to compile again.
@triton.jit(do_not_specialize=["partials", "targets", *STATISTICS, "n", "vocab", "splits"])
def logps_join(
    partials,  # (3 or 4, splits, n) float32, from logps_pass
    targets,  # (n,) int64
    logp,  # (n,) float32, or None if not wanted; so with lse and entropy
    lse,
    entropy,
    n,
    vocab,
    splits,
    BLOCK: tl.constexpr,
):
    """Joins the shares of the vocabulary, in order, and writes the statistics."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    plane = splits.to(tl.int64) * n
    top = tl.full((BLOCK,), FLOOR, tl.float32)
    at = partials + row
    for _split in range(splits):
        top = tl.maximum(top, tl.load(at, mask=inside, other=0.0))
        at += n
    total = tl.zeros((BLOCK,), tl.float32)
    z_y = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    at = partials + row
    for _split in range(splits):
        gap = tl.load(at, mask=inside, other=0.0) - top
        share = tl.exp(gap)
        part = tl.load(at + plane, mask=inside, other=0.0)
        total += share * part
        z_y += tl.load(at + 2 * plane, mask=inside, other=0.0)
        if entropy is not None:
            weighted += share * (tl.load(at + 3 * plane, mask=inside, other=0.0) + gap * part)
        at += n
    # −∞ without a finite logit: then log-prob and entropy are NaN, as in torch.
    log_total = tl.log(total)
    if logp is not None:
        y = tl.load(targets + row, mask=inside, other=0)
        # A target outside the vocabulary has no logit; the caller asserts that there is none.
        z_y = tl.where((y >= 0) & (y < vocab), z_y, float("nan"))
        tl.store(logp + row, (z_y - top) - log_total, mask=inside)
    if lse is not None:
        tl.store(lse + row, top + log_total, mask=inside)
    if entropy is not None:
        tl.store(entropy + row, log_total - weighted / total, mask=inside)


def supports(hidden: Tensor, weight: Tensor) -> bool:
    """Returns whether the kernel takes hidden (n, D) and weight (V, D): one dtype, not float64, stride 1 along D."""
    return hidden.dtype == weight.dtype and weight.dtype in DTYPES and all(map(_has_contiguous_rows, (hidden, weight)))


def _has_contiguous_rows(x: Tensor) -> bool:
    # The row stride is bounded because offsets within a block of 256 rows are 32 bits wide.
    return (x.stride(1) == 1 or x.shape[1] == 1) and 0 <= x.stride(0) < 2**23


def _aligned(x: Tensor) -> bool:
    """Returns whether rows are aligned to 16 bytes and D is a multiple of 16, as asynchronous copies need."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0


def choose_config(hidden: Tensor, weight: Tensor, entropy: bool) -> launch.Config:
    """Returns the configuration that `lookup` finds for these operands, or SMALL if it cannot run on the device."""
    if hidden.dtype == torch.float32 or not (_aligned(hidden) and _aligned(weight)):
        return SMALL
    key = weight.dtype, *map(launch.bucket, weight.shape)
    config = launch.lookup(_tunable(entropy), hidden.device, key)
    return config if _shared_bytes(config) <= _shared_limit(hidden.device) else SMALL


def _tunable(entropy: bool) -> str:
    return "logps_pass_entropy" if entropy else "logps_pass"


def _shared_bytes(config: launch.Config) -> int:
    """Returns the shared memory that the blocks of 16-bit operands in flight take."""
    o = config.options
    return 2 * (o["BLOCK_M"] + o["BLOCK_N"]) * o["BLOCK_D"] * o["num_stages"]


@lru_cache
def _shared_limit(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip:
        return 1024 * launch.SHARED_LIMIT_KIB[launch.target(device)]
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache
def split_count(row_blocks: int, vocab_blocks: int, group: int, processors: int) -> int:
    """Returns the number of shares of the vocabulary with which all processors are busy about equally long.

    Programs run in waves of one per processor, and a wave takes as long as its largest share. There are at most as many
    shares as blocks of the vocabulary, and at least enough that a wave covers no more than one group of row blocks.
    """
    least = min(max(processors // group, 1), vocab_blocks) if row_blocks > group else 1
    most = min(max(8 * processors // row_blocks, least), vocab_blocks)

    def cost(splits: int) -> int:
        return math.ceil(row_blocks * splits / processors) * math.ceil(vocab_blocks / splits)

    return min(range(least, most + 1), key=lambda splits: (cost(splits), splits))


def run(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,) int64
    *,
    bias: Tensor | None = None,  # (V,) float32
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    out: Mapping[str, Tensor],  # logp, lse, entropy → (n,) float32, written
    processors: int | None = None,  # default: the device's
    splits: int | None = None,  # default: by `split_count`
    options: Mapping[str, int] | None = None,  # of the launch; default: those of `choose_config`
) -> None:
    """Writes the statistics named in `out` of softmax(z), z = softcap(logit_scale (h Wᵀ + b)) / temperature."""
    (n, width), vocab = hidden.shape, weight.shape[0]
    assert supports(hidden, weight) and weight.shape[1] == width, (hidden, weight)
    assert targets.shape == (n,) and targets.dtype == torch.int64 and targets.is_contiguous()
    assert out and set(out) <= set(STATISTICS)
    for x, shape in ((bias, (vocab,)), *((x, (n,)) for x in out.values())):
        assert x is None or (x.shape == shape and x.dtype == torch.float32 and x.is_contiguous())
    if n == 0:
        return
    options = options or choose_config(hidden, weight, "entropy" in out).options
    row_blocks, vocab_blocks = triton.cdiv(n, options["BLOCK_M"]), triton.cdiv(vocab, options["BLOCK_N"])
    group = max(1, CACHED_BYTES // (options["BLOCK_M"] * width * hidden.itemsize))
    if splits is None:
        processors = processors or _processors(hidden.device)
        splits = split_count(row_blocks, vocab_blocks, group, processors)
    partials = hidden.new_empty((4 if "entropy" in out else 3, splits, n), dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        logps_pass[(row_blocks * splits,)](
            hidden,
            weight,
            bias,
            targets,
            partials,
            hidden.stride(0),
            weight.stride(0),
            n,
            vocab,
            width,
            splits,
            group,
            *logits.scalars(logit_scale, softcap, temperature),
            SOFTCAP=softcap is not None,
            ENTROPY="entropy" in out,
            enable_fp_fusion=False,  # the largest logit minus itself is 0, so that no log-prob exceeds 0
            **options,
        )
        logps_join[(triton.cdiv(n, JOIN_BLOCK),)](
            partials,
            targets,
            *map(out.get, STATISTICS),
            n,
            vocab,
            splits,
            BLOCK=JOIN_BLOCK,
            num_warps=JOIN_WARPS,
            enable_fp_fusion=False,
        )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _problems(entropy: bool, workload: launch.Workload) -> Iterator[launch.Problem]:
    w = workload

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = w.normal(2 * seed, w.tokens, w.width)
        weight = w.normal(2 * seed + 1, w.vocab, w.width).mul_(3 / w.width**0.5)
        return hidden, weight, w.targets(seed)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
        names = STATISTICS if entropy else STATISTICS[:2]
        made = {name: torch.empty(w.tokens, dtype=torch.float32, device=w.device) for name in names}
        run(hidden, weight, targets, out=made)
        return [*made.values()]

    yield launch.Problem((w.dtype, launch.bucket(w.vocab), launch.bucket(w.width)), inputs, call)


# (BLOCK_M, BLOCK_N, BLOCK_D, PARTS, warps, stages), each target's default first: the largest that compile without a
# spill for every flag. PARTS: in how many pieces a block of logits is handled, since the temporaries of all of it would
# spill.
_SHAPES = {
    "sm_80": ((128, 128, 64, 4, 8, 4), (128, 128, 32, 4, 8, 4), (64, 128, 64, 4, 4, 4)),
    "sm_90": ((128, 256, 64, 16, 8, 4), (128, 128, 64, 4, 8, 4), (128, 256, 64, 16, 8, 3)),
    "sm_100": ((128, 256, 64, 8, 8, 4), (128, 128, 64, 4, 8, 4), (128, 256, 64, 8, 8, 3)),
    "gfx942": ((256, 128, 64, 4, 8, 2), (128, 128, 64, 4, 8, 2)),
}
_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "PARTS")
for _entropy in (False, True):
    _candidates = {
        target: tuple(
            launch.config(*shape[4:], **dict(zip(_BLOCKS, shape)))
            for shape in shapes
            # With the sums of an entropy the widest blocks of sm_90 spill.
            if not (_entropy and target == "sm_90" and shape[1] == 256)
        )
        for target, shapes in _SHAPES.items()
    }
    _name = _tunable(_entropy)
    launch.declare(_name, launch.Tunable((logps_pass,), _candidates, partial(_problems, _entropy)))


def variants() -> Iterator[launch.Variant]:
    """Yields what gates.py compiles: each target's default configuration with every flag, and SMALL."""
    cases = (  # name, softcap and bias, entropy
        ("log-probs", False, False),
        ("log-probs, softcap and bias", True, False),
        ("entropy", False, True),
        ("entropy, softcap and bias", True, True),
    )
    kinds = [  # dtype, aligned, whether the configuration is looked up
        *((dtype, True, True) for dtype in ("bf16", "fp16")),
        *((dtype, False, False) for dtype in ("bf16", "fp16", "fp32")),
        ("fp32", True, False),
    ]
    sizes = ("hidden_stride", "weight_stride", "width")
    for case, everything, entropy in cases:
        for dtype, aligned, tuned in kinds:
            signature = dict.fromkeys(("hidden", "weight"), f"*{dtype}") | {"targets": "*i64", "partials": "*fp32"}
            signature |= dict.fromkeys((*sizes, "n", "vocab", "splits", "group"), "i32")
            signature |= dict.fromkeys(("gain", "inner", "ceiling"), "fp32")
            constexprs: dict[str, object] = {"SOFTCAP": everything, "ENTROPY": entropy}
            if everything:
                signature["bias"] = "*fp32"
            else:
                constexprs["bias"] = None
            variant = launch.Variant(
                logps_pass,
                f"{case}, {dtype}" + ("" if aligned else ", any D"),
                signature,
                constexprs,
                divisible=("hidden", "weight", *(sizes if aligned else ())),
                async_copies=tuned,
                fp_fusion=False,
                representative=tuned and case == "log-probs" and dtype == "bf16",
            )
            if tuned:
                yield replace(variant, tunable=launch.tunable(_tunable(entropy)))
            else:
                yield variant.launched(SMALL)
    for name, wanted in (("log-probs", ("logp", "lse")), ("entropy", STATISTICS)):
        signature = dict.fromkeys(("partials", *wanted), "*fp32") | {"targets": "*i64"}
        yield launch.Variant(
            logps_join,
            name,
            signature | dict.fromkeys(("n", "vocab", "splits"), "i32"),
            {**{x: None for x in STATISTICS if x not in wanted}, "BLOCK": JOIN_BLOCK},
            num_warps=JOIN_WARPS,
            fp_fusion=False,
        )
