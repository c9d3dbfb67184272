"""The matrix products of a head, and the memory of their results."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..precision import native
from .spec import Scaling, accumulation_dtype, has_mixed_gemms

# Bytes of a block in row operations and weight conversions: small enough to stay in a core's cache.
BLOCK_BYTES = 2 * 2**20


class _Bf16Products:
    """Context in which oneDNN multiplies float32 operands as bf16, accumulating and returning float32.

    It is exact for operands whose values are bf16 already, and the only way to bf16 GEMMs with float32 results on CPU,
    where torch.mm has no out_dtype. The setting is global to the process: it is on for single GEMMs only, and the last
    thread that uses it restores it.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, "none"
        self._setting: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._setting.fp32_precision
                self._setting.fp32_precision = "bf16"
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._setting.fp32_precision = self._before


_bf16_products = _Bf16Products()


class Gemms:
    """The GEMMs of one head, F = 2·N·V·D FLOP each, and the map from its products to final logits.

    With an adapter B (V, r) hidden states are [h, x] (N, D + r) and products h Wᵀ + x Bᵀ, which adds F·r/D per GEMM.
    """

    def __init__(
        self,
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        scaling: Scaling,
        adapter: Tensor | None = None,  # (V, r)
    ) -> None:
        self.weight, self.scaling = weight, scaling
        self.vocab, self.width = weight.shape
        self.dtype = accumulation_dtype(weight.dtype)
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.narrow = weight.dtype != self.dtype
        # Without a GEMM of narrow operands and wide results the weight is converted, one block at a time.
        self.widen = self.narrow and not has_mixed_gemms(weight.device)
        self.gemm_dtype = self.dtype if self.widen else weight.dtype  # of the operands of the GEMMs
        self._wide = None
        self.adapter = None if adapter is None else adapter.to(self.gemm_dtype)
        # On a CPU without bf16 products the converted operands are multiplied in float32.
        as_bf16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and native(weight.dtype, weight.device)
        self._products = _bf16_products if as_bf16 else nullcontext()

    def rows(self, hidden: Tensor, index: Tensor, ignored: Tensor | None = None) -> Tensor:
        """Returns hidden[index] (n, D), in the dtype of the GEMMs, with zeros where `ignored` (n,) is True."""
        h = hidden.index_select(0, index)
        if self.adapter is not None:
            h = aligned_rows(h.shape[0], h.shape[1], h.dtype, h.device).copy_(h)
        if ignored is not None:
            h.masked_fill_(ignored.unsqueeze(1), 0)
        return h.to(self.dtype) if self.widen else h

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows, W[rows]) in the dtype of the GEMMs: all rows at once, or converted block by block."""
        if not self.widen:
            yield slice(0, self.vocab), self.weight
            return
        size = max(1, min(self.vocab, BLOCK_BYTES // (self.width * self.dtype.itemsize)))
        if self._wide is None:
            self._wide = self.weight.new_empty((size, self.width), dtype=self.dtype)
        for start in range(0, self.vocab, size):
            block = slice(start, min(start + size, self.vocab))
            yield block, self._wide[: block.stop - start].copy_(self.weight[block])

    def logits(self, h: Tensor, out: Tensor) -> Tensor:
        """Writes the products h Wᵀ into out (n, V), and returns it: 1F. `finish` turns them into final logits."""
        h, x = self.parts(h)
        for block, weight in self._weight_blocks():
            if self.narrow and not self.widen:
                torch.mm(h, weight.T, out_dtype=self.dtype, out=out)
                if self.adapter is not None:
                    torch.addmm(out, x, self.adapter.T, out_dtype=self.dtype, out=out)
            else:
                part = out[:, block]
                with self._products:
                    torch.mm(h, weight.T, out=part)
                    if self.adapter is not None:
                        torch.addmm(part, x, self.adapter[block].T, out=part)
        return out

    def parts(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns rows [h, x] split into h (n, D), which meets W, and x (n, r), which meets the adapter; r may be 0."""
        return h[:, : self.width], h[:, self.width :]

    def into_hidden(self, dz: Tensor) -> Tensor:
        """Returns dz W (n, D), or with an adapter dz [W, B] (n, D + r), in the accumulation dtype: 1F."""
        if self.narrow and not self.widen:
            out = torch.mm(dz, self.weight, out_dtype=self.dtype)
            own = None if self.adapter is None else torch.mm(dz, self.adapter, out_dtype=self.dtype)
        else:
            out = dz.new_empty((dz.shape[0], self.width))
            with self._products:
                own = None if self.adapter is None else dz @ self.adapter
            for block, weight in self._weight_blocks():
                with self._products:
                    torch.addmm(out, dz[:, block], weight, beta=0 if block.start == 0 else 1, out=out)
        return out if own is None else torch.cat([out, own], dim=1)

    def into_weight(self, dz: Tensor, h: Tensor, out: Tensor, first: bool) -> None:
        """Writes (first=True) or adds dzᵀ h to out (V, D), which has the accumulation dtype: 1F.

        If it is written, out may have the dtype of the GEMMs instead. The adapter's gradient is computed in the same
        way, out (V, r) from x (n, r): see `parts`.
        """
        beta = 0 if first else 1
        if first and out.dtype == self.gemm_dtype:
            with self._products:
                torch.mm(dz.T, h, out=out)
        elif self.narrow and not self.widen:
            torch.addmm(out, dz.T, h, beta=beta, out_dtype=self.dtype, out=out)
        else:
            with self._products:
                torch.addmm(out, dz.T, h, beta=beta, out=out)

    def into_bias(self, dz: Tensor, factor: Tensor | None, out: Tensor) -> None:
        """Adds Σ factor · dz over rows to out (V,), in the accumulation dtype; factor (n,), or None for 1."""
        if factor is None:
            out += dz.sum(dim=0, dtype=out.dtype)
        elif dz.dtype == out.dtype:
            out.addmv_(dz.T, factor)
        else:
            # As a sum of two narrow numbers: one alone would round the factor of a whole row.
            large = factor.to(dz.dtype)
            parts = torch.stack([large, (factor - large).to(dz.dtype)], dim=1)
            out += torch.mm(dz.T, parts, out_dtype=out.dtype).sum(dim=1)

    def finish(self, z: Tensor, columns: Tensor | None = None) -> None:
        """Converts products to final logits, in place: adds the bias, then scales and caps them.

        z: (n, V), or the products (n, K) at `columns` (n, K).
        """
        s = self.scaling
        if self.bias is not None:
            z.add_(self.bias if columns is None else self.bias[columns])
        if s.softcap is not None:
            z.mul_(s.logit_scale / s.softcap).tanh_().mul_(s.softcap / s.temperature)
        elif s.gain != 1:
            z.mul_(s.gain)

    def times_slope(self, dz: Tensor, z: Tensor | None) -> None:
        """Multiplies ∂L/∂z by the softcap's slope, in place, which gives ∂L/∂(product) / gain.

        z: the final logits, overwritten; needed only with a softcap.
        """
        ceiling = self.scaling.ceiling
        if ceiling is not None:
            assert z is not None
            dz.mul_(z.div(ceiling).square_().neg_().add_(1))


def on_huge_pages(memory: Tensor) -> Tensor:
    """Asks Linux to back a CPU tensor's untouched memory by huge pages, and returns the tensor.

    A GEMM that writes fresh pages of 4 KiB out of order takes a fifth longer than one that writes used memory; fresh
    huge pages cost it nothing. NumPy does the same.
    """
    if memory.device.type == "cpu" and sys.platform == "linux":
        first = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = memory.data_ptr() + memory.numel() * memory.itemsize - first
        if size > 0:
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return memory


# The tiles of the last call on CPU, as bytes, kept for the next. The page faults of fresh memory cost 7% of the two
# GEMMs of a small head.
_used_tiles: list[Tensor] = []
_KEEP_TILES, KEEP_BYTES = 2, 256 * 2**20


def release_tiles() -> None:
    """Frees the tiles that are kept for the next call on CPU, at most two of at most 256 MiB each."""
    _used_tiles.clear()


# Rows of a device's tile start at multiples of this many elements for any V: wide loads, and BLAS's fast paths.
_ALIGNED = 64


@contextmanager
def logits_memory(rows: int, gemms: Gemms) -> Iterator[Tensor]:
    """Yields uninitialised memory for (rows, V) logits."""
    if gemms.weight.device.type != "cpu":
        yield aligned_rows(rows, gemms.vocab, gemms.dtype, gemms.weight.device)
        return
    size = rows * gemms.vocab * gemms.dtype.itemsize
    try:
        memory = _used_tiles.pop()
    except IndexError:
        memory = torch.empty(0, dtype=torch.uint8)
    if memory.numel() < size:
        del memory  # freed before the larger one is allocated
        memory = on_huge_pages(torch.empty(size, dtype=torch.uint8))
    try:
        yield memory[:size].view(gemms.dtype).view(rows, gemms.vocab)
    finally:
        if len(_used_tiles) < _KEEP_TILES and memory.numel() <= KEEP_BYTES:
            _used_tiles.append(memory)


def aligned_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns uninitialised memory (rows, width) whose row stride is padded so that every row is aligned."""
    return torch.empty((rows, -(-width // _ALIGNED) * _ALIGNED), dtype=dtype, device=device)[:, :width]
