"""Sizes of tiles and steps in tokens, and the scratch memory that they may take."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Default bytes of scratch memory. On the CPU it holds the tile of logits, and the reference's. On a device it holds dz
# and the logits of a step, and is a share of the card's memory, whatever part of that is free, so that the same call
# always has the same tiles; the bytes below apply where no card can be asked.
DEFAULT_TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 2500 * 10**6}
SHARE_OF_CARD = 0.07

# Bytes of the float32 products of a step on a device: enough for a GEMM to fill the multiprocessors many times over and
# for the host to stay ahead, few enough to leave the memory to dz.
STEP_BYTES = 512 * 2**20
ROWS = 128  # rows of a block of a device's GEMMs
# Tokens of a product with invariant=True, powers of two: all products have this shape, and the last rows are zeros.
INVARIANT_TOKENS = {"cpu": 128, "cuda": 256}


class Tiling(NamedTuple):
    """The sizes of a call's tiles.

    tile: tokens whose ∂L/∂(product) is in memory at once. step: tokens of a tile whose products are computed at once.
    lanes: 2 if the row operations of a step run on a stream of their own, beside the next products; else 1.
    block: 0, or the tokens of every product, of which tile and step are multiples (invariant=True).
    """

    tile: int
    step: int
    lanes: int = 1
    block: int = 0

    def in_blocks(self, block: int) -> Tiling:
        """Returns the tiling with tile and step rounded down to multiples of a block, but of one block at least."""
        tile, step = (max(block, n - n % block) for n in self[:2])
        return Tiling(tile, step, self.lanes, block)

    def padded(self, rows: int) -> int:
        """Returns the rows that products of `rows` tokens have: rounded up to whole blocks, if there are any."""
        return -(-rows // self.block) * self.block if self.block else rows


def buffer_rows(rows: int, most: int) -> int:
    """Returns `rows`, of at most `most`, rounded up to one of few buffer sizes, which an allocator can reuse."""
    if rows >= most:
        return most
    part = -(-most // 8)
    return min(most, -(-rows // part) * part if rows > part else 1 << max(rows - 1, 0).bit_length())


def whole_blocks(tokens: int) -> int:
    """Returns tokens rounded down to a multiple of ROWS, if they are more than that."""
    return tokens - tokens % ROWS if tokens > ROWS else tokens


def lanes_of(device: torch.device) -> int:
    """Returns the number of streams that are worth their memory on a device, 1 or 2.

    From sm_90 on, cuBLAS's GEMMs occupy all multiprocessors until they end, and another stream's kernels wait: 1.
    Before, the last blocks of a GEMM leave multiprocessors to the row operations of the previous step: 2.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return 1
    capability = _capability(device.index)
    return 2 if capability is not None and capability < (9, 0) else 1


def scratch_bytes(device: torch.device) -> int:
    """Returns the default bytes of scratch memory on a device: see DEFAULT_TILE_BYTES."""
    total = _total_bytes(device.index) if device.type == "cuda" else None
    if total is None:
        return DEFAULT_TILE_BYTES["cpu" if device.type == "cpu" else "cuda"]
    return int(SHARE_OF_CARD * total)


# Properties of a card do not change: they are constants to torch.compile.
@torch.compiler.assume_constant_result
def _total_bytes(index: int | None) -> int | None:
    return torch.cuda.get_device_properties(index).total_memory if torch.cuda.is_available() else None


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None
