"""The `triton` backend: the loops of chunked.py with cuBLAS products, and Triton kernels for their rows.

A kernel writes dz, in the dtype of the gradient GEMMs, into the memory of a tile; that takes half the bytes of the
tile's logits, which exist for some hundred rows at a time. Log-probs and their gradient read each product once
(kernels/one_read.py). Divergences, gradients of other statistics, and float16 gradients read it twice
(kernels/rows.py). Nothing in the loops waits for the device. float64 operands take torch's row operations.

Log-probs without gradient can also be computed without a tile (kernels/logps.py), and are if `xpo-fast tune` found that
faster; this file declares that choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from ..kernels import launch, logps, one_read  # pyright: ignore[reportMissingImports]
from ..kernels import rows as kernel  # pyright: ignore[reportMissingImports]
from . import chunked
from .gemms import Gemms
from .plan import Tiling, fit
from .row_operations import RowOperations
from .spec import Scaling

LOGPS = "token_logps"  # the choice: log-probs without gradient by tiles (False) or by kernels/logps.py (True)
ENOUGH_TOKENS = 16384  # with more, the same one is faster


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
    tiling, *_ = fit("triton", w.vocab, w.dtype, w.device, None, dz=False)

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = w.normal(2 * seed, w.tokens, w.width)
        weight = w.normal(2 * seed + 1, w.vocab, w.width).mul_(3 / w.width**0.5)
        return hidden, weight, w.targets(seed).cpu()  # on the host, reading them waits for nothing

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        return forward(hidden, weight, None, targets, None, Scaling(), -100, (), tiling, False)[:1]

    yield launch.Problem(_logps_key(w.dtype, w.vocab, w.width, w.tokens), inputs, call)


_WAYS = dict.fromkeys(launch.TARGETS, (False, True))
launch.declare(LOGPS, launch.Tunable((one_read.one_read, logps.logps_pass), _WAYS, _logps_problems))


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    ref: chunked.Reference | None,
    scaling: Scaling,
    ignore_index: int,
    outputs: Sequence[str],
    tiling: Tiling,
    save_grad: bool,
    adapter: Tensor | None = None,  # (V, r)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `chunked.forward`, or without gradient, if that was measured to be faster, the same without any tile."""
    arguments = hidden, weight, bias, targets, ref, scaling, ignore_index
    fused = not save_grad and ref is None and adapter is None and {"logp", "lse", *outputs} <= set(logps.STATISTICS)
    if fused and logps.supports(hidden, weight):
        passes = chunked.Passes(*arguments, tiling, row_operations)
        if prefers_fused(hidden.device, weight.dtype, *weight.shape, len(passes)):
            found = torch.empty((2 + len(outputs), len(passes)), dtype=torch.float32, device=hidden.device)
            logps.run(
                passes.gathered(slice(None)),
                weight,
                passes.y,
                bias=passes.gemms.bias,
                out=dict(zip(("logp", "lse", *outputs), found, strict=True)),
                **asdict(scaling),
            )
            return *passes.spread(found), hidden.new_empty((0, hidden.shape[1]))
    return chunked.forward(*arguments, outputs, tiling, save_grad, row_operations, adapter)


backward = partial(chunked.backward, operations=row_operations)
unit_gradients = partial(chunked.unit_gradients, operations=row_operations)
