"""Tokens of a tile and of its steps, and the memory that they are given."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Bytes of scratch memory unless the caller says otherwise. On the CPU, of the tile of logits, which a reference's shares. On
# a device, of dz and the logits of a step: this share of the card's memory, whatever of it is free, so that the same call
# has the same tiles; the bytes where there is no card to ask.
DEFAULT_TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 2500 * 10**6}
SHARE_OF_CARD = 0.07

# Of the float32 products that are made at once on a device: enough that a GEMM fills its processors many times over and that
# the host is ahead, few enough to leave the memory to dz.
STEP_BYTES = 512 * 2**20
ROWS = 128  # of a block of a device's GEMMs


class Tiling(NamedTuple):
    """tile: tokens whose ∂L/∂(product) is held at once. step: tokens whose products are made at once, of a tile.

    lanes: 2 if the rows of a step are worked on beside the next products, on a stream of their own.
    """

    tile: int
    step: int
    lanes: int = 1


def room(rows: int, most: int) -> int:
    """For how many rows memory is asked: of few sizes, which a device's allocator can hand out again."""
    if rows >= most:
        return most
    part = -(-most // 8)
    return min(most, -(-rows // part) * part if rows > part else 1 << max(rows - 1, 0).bit_length())


def whole_blocks(tokens: int) -> int:
    return tokens - tokens % ROWS if tokens > ROWS else tokens


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
