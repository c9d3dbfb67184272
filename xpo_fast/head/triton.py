"""The `triton` backend: the loops of chunked.py with cuBLAS products, and Triton kernels for their rows.

A kernel writes dz, in the dtype of the gradient GEMMs, into the memory of a tile; that takes half the bytes of the
tile's logits, which exist for some hundred rows at a time. Log-probs and their gradient read each product once
(kernels/one_read.py). Divergences, gradients of other statistics, and float16 gradients read it twice
(kernels/rows.py). Nothing in the loops waits for the device. float64 operands take torch's row operations.

Log-probs without gradient can also be computed without a tile (kernels/logps.py), and are if `xpo-fast tune` found that
faster; this file declares that choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from ..kernels import launch, logps, one_read  # pyright: ignore[reportMissingImports]
from ..kernels import rows as kernel  # pyright: ignore[reportMissingImports]
from . import chunked
from .gemms import Gemms
from .operands import Operands
from .row_operations import RowOperations
from .tiling import STEP_BYTES, Tiling, lanes_of, whole_blocks

LOGPS = "token_logps"  # the choice: log-probs without gradient by tiles (False) or by kernels/logps.py (True)
ENOUGH_TOKENS = 16384  # with more, the same one is faster


class TritonRowOperations(RowOperations):
    """`RowOperations` by the kernels."""

    def __init__(self, gemms: Gemms, ref_gemms: Gemms | None = None) -> None:
        super().__init__(gemms, ref_gemms)
        self.own_memory = True
        self.once = partial(one_read.run, bias=gemms.bias, **asdict(gemms.scaling))
        self.run = partial(
            kernel.run, bias=gemms.bias, ref_bias=None if ref_gemms is None else ref_gemms.bias, **asdict(gemms.scaling)
        )

    def fused(self, gathered: Callable[[], Tensor], y: Tensor, outputs: Sequence[str], found: Tensor) -> bool:
        gemms, names = self.gemms, ("logp", "lse", *outputs)
        weight = gemms.weight
        vocab, width = weight.shape
        if self.ref_gemms is not None or gemms.adapter is not None or not set(names) <= set(logps.STATISTICS):
            return False
        if not prefers_fused(weight.device, weight.dtype, vocab, width, y.shape[0]):
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
        self, z: Tensor, z_ref: Tensor | None, y: Tensor, u: Mapping[str, Tensor], v: Mapping[str, Tensor], dz: Tensor
    ) -> None:
        self.run(z, y, ref_products=z_ref, upstream=u, values=v, grad=dz)


def row_operations(gemms: Gemms, ref_gemms: Gemms | None = None) -> RowOperations:
    """Returns the row operations of a call: by the kernels, or by torch for float64."""
    kind = TritonRowOperations if gemms.dtype == torch.float32 else RowOperations
    return kind(gemms, ref_gemms)


def prefers_fused(device: torch.device, dtype: torch.dtype, vocab: int, width: int, tokens: int) -> bool:
    """Returns whether log-probs without gradient go through kernels/logps.py instead of tiles: False unless measured.

    dtype: the weight's. tokens: the scored ones.
    """
    return launch.lookup(LOGPS, device, _logps_key(dtype, vocab, width, tokens))


def _logps_key(dtype: torch.dtype, vocab: int, width: int, tokens: int) -> launch.Key:
    return dtype, *map(launch.bucket, (vocab, width, min(tokens, ENOUGH_TOKENS)))


def _logps_problems(workload: launch.Workload) -> Iterator[launch.Problem]:
    w = workload
    lanes, tile = lanes_of(w.device), 4096
    # As `plan.fit` makes tiles and steps for log-probs alone, if the card has 32 GB or more.
    step = whole_blocks(max(1, STEP_BYTES // lanes // (w.vocab * torch.float32.itemsize)))
    tiling = Tiling(tile, min(step, tile), lanes)

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = w.normal(2 * seed, w.tokens, w.width)
        weight = w.normal(2 * seed + 1, w.vocab, w.width).mul_(3 / w.width**0.5)
        return hidden, weight, w.targets(seed).cpu()  # on the host, reading them waits for nothing

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        logp, *_ = chunked.forward(Operands(hidden, weight, targets), (), tiling, False, row_operations)
        return (logp,)

    yield launch.Problem(_logps_key(w.dtype, w.vocab, w.width, w.tokens), inputs, call)


_WAYS = dict.fromkeys(launch.TARGETS, (False, True))
launch.declare(LOGPS, launch.Tunable((one_read.one_read, logps.logps_pass), _WAYS, _logps_problems))
