"""Which backend, which tile, how many passes over the head: decided before anything is computed, as a value."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from .spec import accumulation_dtype

BACKENDS = ("dense", "torch", "triton")
AUTO_REASON = (
    "it makes tiles, and triton's kernels have not run on a GPU yet; dense is there to be compared with"
)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Bytes of the one tile of logits (and of a reference's beside it, together) unless the caller says otherwise.
DEFAULT_TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 2560 * 2**20}

# More tokens make the GEMMs no faster.
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Plan:
    """How a head pass will run. `passes` counts GEMMs of F = 2·N·V·D FLOP, N the scored tokens."""

    backend: str
    tokens: int | None  # scored tokens; None if not counted
    tile_tokens: int
    vocab: int
    dtype: torch.dtype  # of the tile
    passes: float
    why: str

    @property
    def tile_bytes(self) -> int:
        rows = self.tile_tokens if self.tokens is None else min(self.tile_tokens, self.tokens)
        return rows * self.vocab * self.dtype.itemsize

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f", {self.tokens} scored tokens"
        return (
            f"{self.backend} backend, {self.passes:g}F: {self.why}{tokens}; tiles of at most {self.tile_tokens} tokens "
            f"x {self.vocab} {str(self.dtype).removeprefix('torch.')} logits ({self.tile_bytes / 2**20:.1f} MiB)"
        )


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend that `auto` stands for on a device; ValueError for one that does not exist."""
    if backend == "auto":
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"no backend named {backend!r}; there are auto, {', '.join(BACKENDS)}")
    return backend


def check_backend(backend: str, device: torch.device) -> None:
    """ValueError if a backend cannot run on a device."""
    if backend != "triton":
        return
    if not _HAS_TRITON:
        raise ValueError("the triton backend needs the package triton: install it, or pass backend='torch'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the triton backend runs on GPUs, got operands on {device.type}: move them, or pass backend='torch' "
            "(to try the kernels in Triton's interpreter, set TRITON_INTERPRET=1 before anything imports triton)"
        )


def implementation(backend: str) -> ModuleType:
    """The module with the `forward`, `backward` and `unit_gradients` of a backend that makes tiles."""
    if backend == "triton":
        from . import triton  # not before it is wanted: imports the package triton

        return triton
    from . import chunked

    return chunked


def tile_size(
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    tile_bytes: int | None,
    *,
    tiles: int = 1,
    unit_tokens: int = 0,
) -> int:
    """Tokens of a tile: enough for the GEMMs to be fast and for the longest unit, no more than the budget holds.

    tiles: how many tiles share the budget. unit_tokens: the tokens of a unit that should fit whole, if any.
    """
    kind = device.type if device.type in DEFAULT_TILE_BYTES else "cpu"
    if tile_bytes is None:
        tile_bytes = DEFAULT_TILE_BYTES[kind]
    if tile_bytes <= 0:
        raise ValueError(f"expected a tile of at least one byte, got tile_bytes={tile_bytes}")
    budget = tile_bytes // (tiles * vocab * accumulation_dtype(dtype).itemsize)
    return max(1, min(budget, max(_ENOUGH_TOKENS[kind], unit_tokens)))
