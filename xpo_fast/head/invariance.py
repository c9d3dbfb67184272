"""Batch invariance: what a fixed shape of all products promises, checked on the machine at hand.

The bits of h Wᵀ depend on the order in which a GEMM adds up, and libraries choose it by the operands' shapes: a row has
other bits alone than among others (Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025). With one
shape for all products there is one order, so long as it is the same for every row of a product; that is checked once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import capturing
from .gemms import Gemms
from .row_operations import row_blocks, softmax_

# What was found right: device, dtype, shapes and threads.
_checked: set[tuple] = set()


def check_places(gemms: Gemms) -> None:
    """Multiplies one row at all places of a block, once for each shape. Raises RuntimeError if its bits differ.

    Nothing is checked while a CUDA graph is captured, since no number can be read there.
    """
    weight, rank = gemms.weight, 0 if gemms.adapter is None else gemms.adapter.shape[1]
    key = (weight.device, weight.dtype, *weight.shape, rank, gemms.block, torch.get_num_threads())
    if key in _checked or capturing():
        return
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, weight.shape[1] + rank, generator=generator).to(weight.device, weight.dtype)
    h = gemms.rows(row, torch.zeros(gemms.block, dtype=torch.int64, device=weight.device))
    z = gemms.logits(h, torch.empty((gemms.block, gemms.vocab), dtype=gemms.dtype, device=weight.device))
    right = _equal_rows(z)
    sums = torch.cat([torch.stack(softmax_(z[b]), dim=1) for b in row_blocks(z, gemms.block)])
    if not bool(right & _equal_rows(sums) & _equal_rows(gemms.into_hidden(z.to(gemms.gemm_dtype)))):
        raise RuntimeError(
            f"invariant=True cannot hold here: of {gemms.block} equal rows, which this build of torch multiplied on "
            f"{weight.device} by a {weight.dtype} weight {tuple(weight.shape)}, not all results are equal bit by bit; "
            "leave it out"
        )
    _checked.add(key)


def _equal_rows(x: Tensor) -> Tensor:
    """Returns whether all rows of x (n, m) are equal bit by bit, () bool; NaN is equal to NaN."""
    return ((x == x[0]) | x[0].isnan()).all()
