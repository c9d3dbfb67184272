"""Which backend, which tile, how many passes over the head: decided before anything is computed, as a value."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import device as devices
from .. import native
from .spec import accumulation_dtype, has_mixed_gemms

if TYPE_CHECKING:
    from .verdict import Verdict

BACKENDS = ("dense", "torch", "triton", "cuda")
OVERRIDE = "XPO_FAST_BACKEND"
CHECK = "xpo-fast doctor --check"
_UNKNOWN = f"triton has not been checked here yet; the first call does it, and so does `{CHECK}`"
# What the kernels of triton have GEMMs for.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger("xpo_fast")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Bytes of scratch memory unless the caller says otherwise. On the CPU, of the tile of logits, which a reference's shares. On
# a device, of dz and the logits of a step: this share of the card's memory, whatever of it is free, so that the same call
# has the same tiles; the bytes where there is no card to ask.
DEFAULT_TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 2500 * 10**6}
SHARE_OF_CARD = 0.07

# More tokens make the GEMMs no faster; but for a float32 dW that is read and written again for each tile.
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 4096}

# Of the float32 products that are made at once on a device: enough that a GEMM fills its processors many times over and that
# the host is ahead, few enough to leave the memory to dz.
STEP_BYTES = 512 * 2**20
_ROWS = 128  # of a block of a device's GEMMs


class Tiling(NamedTuple):
    """tile: tokens whose ∂L/∂(product) is held at once. step: tokens whose products are made at once, of a tile.

    lanes: 2 if the rows of a step are worked on beside the next products, on a stream of their own.
    """

    tile: int
    step: int
    lanes: int = 1


@dataclass(frozen=True)
class Plan:
    """How a head pass will run. `passes` counts GEMMs of F = 2·N·V·D FLOP, N the scored tokens."""

    backend: str
    tokens: int | None  # scored tokens; None if not counted
    tiling: Tiling
    vocab: int
    dtype: torch.dtype  # of logits
    dz_dtype: torch.dtype | None  # of ∂L/∂(product); None where it is not made, or takes the logits' place
    logits: int  # tiles or steps of logits in memory at once, with what is made beside them
    passes: float
    why: str
    accumulator_bytes: int = 0  # of a float32 dW, beyond the gradient's, where it takes several tiles
    reason: str = ""  # of `Choice`, which `why` has too

    @property
    def tile_tokens(self) -> int:
        return self.tiling.tile

    @property
    def tile_bytes(self) -> int:
        tile, step = (n if self.tokens is None else room(self.tokens, n) for n in self.tiling[:2])
        dz = 0 if self.dz_dtype is None else tile * self.dz_dtype.itemsize
        return self.vocab * (dz + self.logits * step * self.dtype.itemsize)

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f", {self.tokens} scored tokens"
        name = str(self.dtype).removeprefix("torch.")
        memory = f"{self.tile_tokens} tokens x {self.vocab} {name} logits"
        if self.tiling.step != self.tiling.tile or self.dz_dtype is not None:
            memory = f"{self.tile_tokens} tokens x {self.vocab}, {self.tiling.step} of them as {name} logits at once"
        if self.tiling.lanes > 1:
            memory += " on each of two streams"
        more = ""
        if self.accumulator_bytes:
            more = f"; {self.accumulator_bytes / 2**20:.1f} MiB beside the gradient of the head, summed in float32"
        return (
            f"{self.backend} backend, {self.passes:g}F: {self.why}{tokens}; tiles of at most {memory} "
            f"({self.tile_bytes / 2**20:.1f} MiB){more}"
        )


class Choice(NamedTuple):
    """A backend, and why it is what `auto` stands for; no reason for one that was asked for, or that is the only one."""

    backend: str
    why: str = ""


def named_backend(backend: str, device: torch.device | None = None, *, sharded: bool = False) -> str:
    """Return the backend that was named, by an argument or for `auto` by $XPO_FAST_BACKEND; else "auto".

    The variable decides among what can run: triton and cuda only of GPUs, nothing of a vocabulary that is cut over ranks.
    Raises ValueError for a backend that does not exist.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"no backend named {backend!r}; there are auto, {', '.join(BACKENDS)}")
        return backend
    named = _override()
    if named not in ("", "auto", *BACKENDS):
        raise ValueError(f"{OVERRIDE} names no backend: {named!r}; there are auto, {', '.join(BACKENDS)}")
    on_gpu = device is None or device.type == "cuda"
    possible = not sharded and (on_gpu or named in ("torch", "dense"))
    return named if named and possible else "auto"


@torch.compiler.assume_constant_result
def _override() -> str:
    return os.environ.get(OVERRIDE, "")


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, *, sharded: bool = False) -> str:
    """Return the backend to use for operands of a dtype on a device, see `choice`."""
    return choice(backend, device, dtype, sharded=sharded).backend


def choice(
    backend: str, device: torch.device, dtype: torch.dtype, *, sharded: bool = False, run: bool = True
) -> Choice:
    """Return the backend to use: `auto` is triton on a GPU where it passed its check (head/verdict.py), else torch.

    The first call for a device and dtype may run the check; without `run`, while a CUDA graph is captured and while
    torch.compile traces, what is written down is all there is. sharded: the vocabulary is cut over ranks. Raises ValueError
    for a backend that does not exist.
    """
    named = named_backend(backend, device, sharded=sharded)
    if named != "auto":
        return Choice(named, f"{OVERRIDE} is {named}" if backend == "auto" else "")
    if device.type != "cuda":
        return Choice("torch")
    if sharded:
        return Choice("torch", "auto is torch: a vocabulary that is cut over ranks takes no other")
    if dtype not in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return Choice("torch", f"auto is torch: triton has no kernels for {name}")
    if torch.compiler.is_compiling() or devices.capturing():
        return Choice(*_recorded_choice(device, dtype))
    from . import verdict  # late: it imports this file

    return _choice_on(device, dtype, verdict.verdict if run else verdict.recorded)


@torch.compiler.assume_constant_result
def _recorded_choice(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """`choice` by what is known or written down; called, not traced, by torch.compile."""
    from . import verdict

    found = _choice_on(device, dtype, verdict.recorded)
    if found.why.endswith(_UNKNOWN):
        _say(f"{found.why}; call once before compiling or capturing")
    return found.backend, found.why


@functools.cache
def _say(text: str) -> None:
    """A line of the log, once a process: not a warning, which is an error to some."""
    logger.warning(text)


def _choice_on(
    device: torch.device, dtype: torch.dtype, ask: Callable[[torch.device, torch.dtype], Verdict | None]
) -> Choice:
    """`choice` on a GPU by who knows the verdict."""
    reason = why_not_triton(device)
    if reason is not None:
        return Choice("torch", f"auto is torch: {reason}")
    found = ask(device, dtype)
    if found is None:
        return Choice("torch", f"auto is torch: {_UNKNOWN}")
    if found.ok:
        return Choice("triton", f"auto is triton, which passed its check on {torch.cuda.get_device_name(device)}")
    return Choice("torch", f"auto is torch: triton {found}")


def why_not_triton(device: torch.device) -> str | None:
    """Return why triton's kernels cannot be launched on a GPU; None if they can, as far as can be told without doing it."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is 1, and kernels would be interpreted"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"triton's products need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def check_backend(backend: str, device: torch.device) -> None:
    """ValueError if a backend cannot run on a device."""
    if backend == "cuda":
        _check_cuda(device)
    if backend != "triton":
        return
    if not _HAS_TRITON:
        raise ValueError("the triton backend needs the package triton: install it, or pass backend='torch'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the triton backend runs on GPUs, got operands on {device.type}: move them, or pass backend='torch' "
            "(to try the kernels in Triton's interpreter, set TRITON_INTERPRET=1 before anything imports triton)"
        )


def _check_cuda(device: torch.device) -> None:
    if torch.version.hip is not None:
        raise ValueError("the cuda backend runs on NVIDIA GPUs, and this torch is for ROCm: pass backend='triton'")
    _check_gpu(device)
    # A library cannot be loaded by what torch.compile traces: there it is the operator that misses it.
    reason = None if torch.compiler.is_compiling() else native.why_not(device)
    if reason is not None:
        raise ValueError(f"the cuda backend cannot use the library of csrc/, {reason}")


def _check_gpu(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ValueError("the cuda backend needs an NVIDIA GPU, and torch sees none: pass backend='torch'")
    if device.type != "cuda":
        raise ValueError(
            f"the cuda backend runs on GPUs, got operands on {device.type}: move them, or pass backend='torch'"
        )


def has_triton() -> bool:
    return _HAS_TRITON


def implementation(backend: str) -> Any:
    """What has the `forward`, `backward` and `unit_gradients` of a backend that makes tiles."""
    if backend == "triton":
        from . import triton  # not before it is wanted: imports the package triton

        return triton
    if backend == "cuda":
        from . import cuda

        return cuda
    from . import chunked, vocab_parallel

    shard = vocab_parallel.shard_of(backend)
    return chunked if shard is None else vocab_parallel.implementation(shard)


def fit(
    backend: str,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    tile_bytes: int | None,
    *,
    chunk_tokens: int | None = None,
    heads: int = 1,
    copies: int = 0,
    dz: bool = True,
    learns: bool = False,
    unit_tokens: int = 0,
) -> tuple[Tiling, torch.dtype | None, int]:
    """Tokens of tiles and steps, the dtype of dz's own memory (or None), and how many logits are in memory at once.

    As many tokens as the GEMMs gain from and as the longest unit has, no more than the budget holds. heads: 2 with a
    reference. copies: what torch's row operations make beside a step's logits, of their size. dz: whether a gradient is
    wanted. learns: whether dW is.
    """
    if tile_bytes is not None and tile_bytes <= 0:
        raise ValueError(f"expected a tile of at least one byte, got tile_bytes={tile_bytes}")
    on_device = device.type != "cpu"
    kernels = backend in ("triton", "cuda") and dtype != torch.float64
    enough = _ENOUGH_TOKENS["cuda" if on_device else "cpu"] * (2 if learns and on_device else 1)
    enough = max(enough, unit_tokens)
    budget = scratch_bytes(device) if tile_bytes is None else tile_bytes
    accumulated = accumulation_dtype(dtype)
    held = heads + (copies if on_device and not kernels else 0)  # of a step's logits
    logit_bytes = vocab * accumulated.itemsize * held
    if not kernels and (dtype == accumulated or not has_mixed_gemms(device)):
        tile = chunk_tokens or max(1, min(budget // logit_bytes, enough))
        return Tiling(tile, tile), None, held
    # Of torch's operations on a device there are many a step: it has few, large ones.
    step_bytes = min(budget // 4, STEP_BYTES * held) if kernels else min(budget // 2, 2 * STEP_BYTES * held)
    lanes = lanes_of(device) if kernels else 1
    step = _step_tokens(step_bytes // lanes, logit_bytes)
    tile = enough  # without dz a tile is the hidden states that are gathered at once
    if dz:
        rest = budget - lanes * step * logit_bytes
        tile = min(max(step, _whole_blocks(rest // (vocab * dtype.itemsize))), enough)
    tile = chunk_tokens or tile
    return Tiling(tile, min(step, tile), lanes), dtype if dz else None, lanes * held


def _step_tokens(step_bytes: int, logit_bytes: int) -> int:
    return _whole_blocks(max(1, step_bytes // logit_bytes))


def room(rows: int, most: int) -> int:
    """For how many rows memory is asked: of few sizes, which a device's allocator can hand out again."""
    if rows >= most:
        return most
    part = -(-most // 8)
    return min(most, -(-rows // part) * part if rows > part else 1 << max(rows - 1, 0).bit_length())


def _whole_blocks(tokens: int) -> int:
    return tokens - tokens % _ROWS if tokens > _ROWS else tokens


def lanes_of(device: torch.device) -> int:
    """How many streams are worth their memory.

    From sm_90 on the BLAS's GEMMs stay on all processors until they end, and what another stream has for them waits: one.
    Before, a GEMM's last blocks leave processors to the rows of the step before.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return 1
    capability = _capability(device.index)
    return 2 if capability is not None and capability < (9, 0) else 1


def scratch_bytes(device: torch.device) -> int:
    """Bytes of scratch memory by default: see DEFAULT_TILE_BYTES."""
    total = _total_bytes(device.index) if device.type == "cuda" else None
    return (
        DEFAULT_TILE_BYTES["cpu" if device.type == "cpu" else "cuda"] if total is None else int(SHARE_OF_CARD * total)
    )


# Of the card, which does not change: a constant of what torch.compile traces.
@torch.compiler.assume_constant_result
def _total_bytes(index: int | None) -> int | None:
    return torch.cuda.get_device_properties(index).total_memory if torch.cuda.is_available() else None


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None
