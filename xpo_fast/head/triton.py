"""The `triton` backend: the loops of chunked.py with cuBLAS products, and one Triton kernel for the rows of a tile.

dz is written in the dtype of the gradient GEMMs into the memory of the tile, so that a tile is all there is. Nothing
in the loops waits for the device. float64 operands take torch's row operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..kernels import rows as kernel  # pyright: ignore[reportMissingImports]
from . import chunked


class TritonRowOperations(chunked.RowOperations):
    """`chunked.RowOperations` by the kernel; dz is exact, without a divisor."""

    def __init__(self, head: chunked._Head, ref_head: chunked._Head | None = None) -> None:
        super().__init__(head, ref_head)
        scaling = head.scaling
        self.run = partial(
            kernel.run,
            bias=_contiguous(head.bias),
            ref_bias=None if ref_head is None else _contiguous(ref_head.bias),
            logit_scale=scaling.logit_scale,
            softcap=scaling.softcap,
            temperature=scaling.temperature,
        )

    def statistics(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        outputs: Sequence[str],
        rows: Tensor,
        with_dz: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out = dict(zip(("logp", "lse", *outputs), rows, strict=True))
        if not with_dz:
            self.run(z, y, ref_products=z_ref, out=out)
            return z, None
        dz = self._dz(z)
        self.run(z, y, ref_products=z_ref, out=out, upstream={"logp": torch.ones_like(rows[0])}, grad=dz)
        return dz, None

    def gradient(
        self, z: Tensor, z_ref: Tensor | None, y: Tensor, u: dict[str, Tensor], v: dict[str, Tensor]
    ) -> Tensor:
        dz = self._dz(z)
        self.run(z, y, ref_products=z_ref, upstream=u, values=v, grad=dz)
        return dz

    def scores(self, z: Tensor, y: Tensor, logp: Tensor) -> tuple[Tensor, ...]:
        largest, log_total = torch.empty((2, *logp.shape), dtype=logp.dtype, device=logp.device)
        self.run(z, y, out={"logp": logp, "largest": largest, "log_total": log_total})
        return largest, log_total

    def unit_gradient(
        self, z: Tensor, y: Tensor, u: Tensor, known: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        dz = self._dz(z)
        self.run(z, y, upstream={"logp": u.contiguous()}, normaliser=known, grad=dz)
        return dz, None

    def _dz(self, z: Tensor) -> Tensor:
        return kernel.inside(z, self.head.gemm_dtype)


def row_operations(head: chunked._Head, ref_head: chunked._Head | None = None) -> chunked.RowOperations:
    kind = TritonRowOperations if head.dtype == torch.float32 else chunked.RowOperations
    return kind(head, ref_head)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


forward = partial(chunked.forward, operations=row_operations)
backward = partial(chunked.backward, operations=row_operations)
unit_gradients = partial(chunked.unit_gradients, operations=row_operations)
