"""The `triton` backend: the loops of chunked.py with cuBLAS products, and Triton kernels for their rows.

A kernel writes dz in the dtype of the gradient GEMMs into the memory of a tile, which takes half the bytes of its
logits; these are there for some hundred rows at a time. Log-probs and their gradient read each product once
(kernels/one_read.py); divergences, gradients of other statistics, and those in float16 twice (kernels/rows.py). Nothing
in the loops waits for the device. float64 operands take torch's row operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from ..kernels import logps, one_read  # pyright: ignore[reportMissingImports]
from ..kernels import rows as kernel  # pyright: ignore[reportMissingImports]
from ..kernels.tuning import prefers_fused  # pyright: ignore[reportMissingImports]
from .gemms import Gemms
from .row_operations import RowOperations


class TritonRowOperations(RowOperations):
    """`RowOperations` by the kernels."""

    def __init__(self, gemms: Gemms, ref_gemms: Gemms | None = None) -> None:
        super().__init__(gemms, ref_gemms)
        self.own_memory = True
        self.once = partial(one_read.run, bias=gemms.bias, **asdict(gemms.scaling))
        self.run = partial(
            kernel.run,
            bias=gemms.bias,
            ref_bias=None if ref_gemms is None else ref_gemms.bias,
            **asdict(gemms.scaling),
        )

    def fused(self, gathered: Callable[[], Tensor], y: Tensor, outputs: Sequence[str], found: Tensor) -> bool:
        gemms, names = self.gemms, ("logp", "lse", *outputs)
        weight = gemms.weight
        if self.ref_gemms is not None or gemms.adapter is not None or not set(names) <= set(logps.STATISTICS):
            return False
        if not prefers_fused(weight.device, weight.dtype, *weight.shape, y.shape[0]):
            return False
        h = gathered()
        if not logps.supports(h, weight):
            return False
        out = dict(zip(names, found, strict=True))
        logps.run(h, weight, y, bias=gemms.bias, out=out, **asdict(gemms.scaling))
        return True

    def statistics(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        outputs: Sequence[str],
        rows: Tensor,
        dz: Tensor | None,
        factor: Tensor | None,
    ) -> None:
        out = dict(zip(("logp", "lse", *outputs), rows, strict=True))
        if set(outputs) <= set(one_read.STATISTICS) and (dz is None or dz.dtype in one_read.GRADIENTS):
            self.once(z, y, out=out, grad=dz, factor=factor)
            return
        upstream = None if factor is None else {"logp": factor.fill_(1)}
        self.run(z, y, ref_products=z_ref, out=out, upstream=upstream, grad=dz)

    def gradient(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        u: Mapping[str, Tensor],
        v: Mapping[str, Tensor],
        dz: Tensor,
    ) -> None:
        self.run(z, y, ref_products=z_ref, upstream=u, values=v, grad=dz)


def row_operations(gemms: Gemms, ref_gemms: Gemms | None = None) -> RowOperations:
    kind = TritonRowOperations if gemms.dtype == torch.float32 else RowOperations
    return kind(gemms, ref_gemms)
