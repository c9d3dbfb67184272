"""Log-probs without gradient, straight from hidden states and the LM head: a GEMM that keeps no logit.

A program has a block of rows and walks a share of the vocabulary; of each block of logits it keeps, a row, the running
maximum and sum (online softmax) and the target's logit. A second kernel joins the shares. Bias, scale, softcap and
temperature are applied in float32 to what the GEMM has summed. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gates import TARGETS, Variant
from .rows import _tanh

STATISTICS = ("logp", "lse", "entropy")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# What a launch takes, by target, for 16-bit operands with rows of multiples of 16: as large as compiles without a spill
# for every flag. PARTS: so many pieces of a block of logits one after the other, or their temporaries spill.
DEFAULTS = {
    "sm_80": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64, "PARTS": 4, "num_warps": 8, "num_stages": 4},
    "sm_90": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_D": 64, "PARTS": 16, "num_warps": 8, "num_stages": 4},
    "sm_100": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_D": 64, "PARTS": 8, "num_warps": 8, "num_stages": 4},
    "gfx942": {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_D": 64, "PARTS": 4, "num_warps": 8, "num_stages": 2},
}
# For float32, rows of other lengths and other devices.
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "PARTS": 1, "num_warps": 8, "num_stages": 2}
JOIN_BLOCK, JOIN_WARPS = 128, 4
# Hidden states that are read over and over should stay in the cache, beside the columns of W that pass through it.
CACHED_BYTES = 16 * 2**20

# Where a maximum starts from, in place of −∞, so that no difference is ∞ − ∞.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _part(x, part: tl.constexpr, PARTS: tl.constexpr):
    """Columns part·N/PARTS up to (part + 1)·N/PARTS of x (M, N)."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if PARTS > 1:
        a, b = x.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        x = a if part < PARTS // 2 else b
        x = _part(x, part % (PARTS // 2), PARTS // 2)
    return x


@triton.jit(
    # Read at few places a program, or counts: how they are aligned is no reason to compile again.
    do_not_specialize=["bias", "targets", "partials", "n", "vocab", "splits", "group"]
)
def logps_pass(
    hidden,  # (n, D), rows `hidden_stride` apart
    weight,  # (V, D), rows `weight_stride` apart
    bias,  # (V,) float32, or None
    targets,  # (n,) int64
    partials,  # (3 or 4, splits, n) float32: max z, Σ e^(z − max), z_y, and with ENTROPY Σ e^(z − max) (z − max)
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
    """One share of the vocabulary for BLOCK_M rows. A share without columns is neutral: max −1e30, sums 0.

    The programs of a group of row blocks follow one another, those of the same share first: what runs together reads
    the same columns of W, and no more rows of h than stay in the cache.
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
    # A block's offset is 64 bits wide, those within it 32. Past the end the last row is read again.
    h = hidden + start_m.to(tl.int64) * hidden_stride
    h_at = tl.minimum(lane_m, n - 1 - start_m)[:, None] * hidden_stride + lane_d[None, :]
    y = tl.load(targets + start_m + lane_m, mask=start_m + lane_m < n, other=-1).to(tl.int32)

    top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
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
            z = _tanh(x_part * inner) * ceiling if SOFTCAP else x_part * gain
            z = tl.where((at < vocab)[None, :], z, float("-inf"))
            z_y += tl.sum(tl.where(at[None, :] == y[:, None], z, 0.0), axis=1)
            higher = tl.maximum(top, tl.max(z, axis=1))
            gap = z - higher[:, None]
            e = tl.exp(gap)
            fade = tl.exp(top - higher)
            if ENTROPY:
                # 0·∞ = 0 for tokens that a bias of −∞ rules out.
                weighted = fade * (weighted + (top - higher) * total)
                weighted += tl.sum(e * tl.maximum(gap, _LOWEST), axis=1)
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


@triton.jit(
    # Read or written at one element a row.
    do_not_specialize=["partials", "targets", "logp", "lse", "entropy", "n", "vocab", "splits"]
)
def logps_join(
    partials,  # (3 or 4, splits, n) float32, as logps_pass leaves them
    targets,  # (n,) int64
    logp,  # (n,) float32, or None where not wanted, and so on
    lse,
    entropy,
    n,
    vocab,
    splits,
    BLOCK: tl.constexpr,
):
    """The shares of the vocabulary joined, in their order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    plane = splits.to(tl.int64) * n
    top = tl.full((BLOCK,), _LOWEST, tl.float32)
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
    # −∞ without a finite logit: log-prob and entropy are NaN then, as in torch.
    log_total = tl.log(total)
    if logp is not None:
        y = tl.load(targets + row, mask=inside, other=0)
        # A target outside the vocabulary has no logit; the host asserts.
        z_y = tl.where((y >= 0) & (y < vocab), z_y, float("nan"))
        tl.store(logp + row, (z_y - top) - log_total, mask=inside)
    if lse is not None:
        tl.store(lse + row, top + log_total, mask=inside)
    if entropy is not None:
        tl.store(entropy + row, log_total - weighted / total, mask=inside)


def supports(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes hidden (n, D) and weight (V, D): one dtype, not float64, no stride along D."""
    return (
        hidden.dtype == weight.dtype
        and weight.dtype in DTYPES
        and all(map(_rows_are_whole, (hidden, weight)))
    )


def _rows_are_whole(x: Tensor) -> bool:
    # Within a block of 256 rows offsets are 32 bits wide.
    return (x.stride(1) == 1 or x.shape[1] == 1) and 0 <= x.stride(0) < 2**23


def _aligned(x: Tensor) -> bool:
    """To 16 bytes, each row, and D to 16 elements: what Triton looks at before it copies asynchronously."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0


@lru_cache
def target(device: torch.device) -> str | None:
    """Whose defaults a GPU takes, if any's: sm_80's need 96 KiB of shared memory, which the smaller NVIDIA GPUs have."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942" if properties.gcnArchName.startswith(("gfx94", "gfx95")) else None
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}.get(properties.major)


def default_config(hidden: Tensor, weight: Tensor) -> dict[str, int]:
    """The fixed configuration for operands on their device."""
    if hidden.dtype == torch.float32 or not (_aligned(hidden) and _aligned(weight)):
        return SMALL
    return DEFAULTS.get(target(hidden.device) or "", SMALL)


@lru_cache
def split_count(row_blocks: int, vocab_blocks: int, group: int, processors: int) -> int:
    """Shares of the vocabulary, at most one a block of it, so that every processor is busy about equally long.

    Programs run in waves, one a processor, as long as their largest share takes. So many shares at least that a wave is
    no more than one group of row blocks.
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
    processors: int | None = None,  # the device's
    splits: int | None = None,  # by processors
    config: Mapping[str, int] | None = None,  # what the kernel is launched with, by default default_config's
) -> None:
    """Write the statistics in `out` of softmax(z), z = softcap(logit_scale (h Wᵀ + b)) / temperature."""
    (n, width), vocab = hidden.shape, weight.shape[0]
    assert supports(hidden, weight) and weight.shape[1] == width, (hidden, weight)
    assert targets.shape == (n,) and targets.dtype == torch.int64 and targets.is_contiguous()
    assert out and set(out) <= set(STATISTICS)
    for x, shape in ((bias, (vocab,)), *((x, (n,)) for x in out.values())):
        assert x is None or (x.shape == shape and x.dtype == torch.float32 and x.is_contiguous())
    if n == 0:
        return
    config = config or default_config(hidden, weight)
    row_blocks, vocab_blocks = triton.cdiv(n, config["BLOCK_M"]), triton.cdiv(vocab, config["BLOCK_N"])
    group = max(1, CACHED_BYTES // (config["BLOCK_M"] * width * hidden.itemsize))
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
            logit_scale / temperature,
            0.0 if softcap is None else logit_scale / softcap,
            0.0 if softcap is None else softcap / temperature,
            SOFTCAP=softcap is not None,
            ENTROPY="entropy" in out,
            enable_fp_fusion=False,  # the largest logit less itself is 0: no log-prob is above 0
            **config,
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


def variants() -> Iterator[Variant]:
    """What `gates` compiles: each target's own configuration with every flag, and the small one."""
    cases = (  # name, softcap and bias, entropy
        ("log-probs", False, False),
        ("log-probs, softcap and bias", True, False),
        ("entropy", False, True),
        ("entropy, softcap and bias", True, True),
    )
    kinds = [
        *((dtype, True, config, (name,)) for dtype in ("bf16", "fp16") for name, config in DEFAULTS.items()),
        *((dtype, False, SMALL, tuple(TARGETS)) for dtype in ("bf16", "fp16", "fp32")),
        ("fp32", True, SMALL, tuple(TARGETS)),
    ]
    sizes = ("hidden_stride", "weight_stride", "width")
    for case, everything, entropy in cases:
        for dtype, aligned, config, targets in kinds:
            config = dict(config)
            launch = {option: config.pop(option) for option in ("num_warps", "num_stages")}
            signature = {
                "hidden": f"*{dtype}", "weight": f"*{dtype}", "targets": "*i64", "partials": "*fp32",
                **dict.fromkeys((*sizes, "n", "vocab", "splits", "group"), "i32"),
                **dict.fromkeys(("gain", "inner", "ceiling"), "fp32"),
            }  # fmt: skip
            constexprs: dict[str, object] = {"SOFTCAP": everything, "ENTROPY": entropy, **config}
            if everything:
                signature["bias"] = "*fp32"
            else:
                constexprs["bias"] = None
            own = config["BLOCK_M"] != SMALL["BLOCK_M"]
            yield Variant(
                logps_pass,
                f"{case}, {dtype}" + ("" if aligned else ", any D") + (f", {targets[0]}'s" if own else ""),
                signature,
                constexprs,
                divisible=("hidden", "weight", *(sizes if aligned else ())),
                targets=targets,
                async_copies=own,
                representative=own and case == "log-probs" and dtype == "bf16",
                **launch,
            )
    for name, wanted in (("log-probs", ("logp", "lse")), ("entropy", STATISTICS)):
        signature = dict.fromkeys(("partials", *wanted), "*fp32") | {"targets": "*i64"}
        yield Variant(
            logps_join,
            name,
            signature | dict.fromkeys(("n", "vocab", "splits"), "i32"),
            {**{x: None for x in STATISTICS if x not in wanted}, "BLOCK": JOIN_BLOCK},
            num_warps=JOIN_WARPS,
        )
