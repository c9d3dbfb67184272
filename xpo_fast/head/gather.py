"""Log-probs for those who have logits: no float32 copy of them, and a gradient that can take their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import refuse_double_backward
from .chunked import _row_blocks, _softmax_
from .spec import Scaling, accumulation_dtype, scored_positions


def _blocks(logits: Tensor, index: Tensor):
    """Scored rows of the logits, a cache-sized block of them widened at a time: (positions, (r, V))."""
    dtype = accumulation_dtype(logits.dtype)
    for b in _row_blocks(torch.empty((index.shape[0], logits.shape[1]), dtype=dtype, device="meta")):
        yield index[b], logits[index[b]].to(dtype)


@torch.library.custom_op("xpo_fast::gather_logps", mutates_args=())
def _forward(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, overwrite: bool
) -> Tensor:
    index = scored_positions(targets, ignore_index, logits.shape[1])
    logp = logits.new_zeros(targets.shape, dtype=accumulation_dtype(logits.dtype))
    for at, z in _blocks(logits, index):
        z.div_(temperature)
        z_y = z.gather(1, targets[at].unsqueeze(1)).squeeze(1)
        largest, log_total, _ = _softmax_(z)
        logp[at] = z_y - largest - log_total
    return logp


@_forward.register_fake
def _(logits, targets, temperature, ignore_index, overwrite):
    return logits.new_empty(targets.shape, dtype=accumulation_dtype(logits.dtype))


def _write_gradient(
    logits: Tensor, targets: Tensor, u: Tensor, temperature: float, ignore_index: int, out: Tensor
):
    """out (N, V) = u (e_y − softmax(logits / temperature)) / temperature; out may be logits."""
    index = scored_positions(targets, ignore_index, logits.shape[1])
    for at, z in _blocks(logits, index):
        z.div_(temperature)
        *_, total = _softmax_(z)
        scale = (u[at] / temperature).unsqueeze(1).to(z.dtype)
        z.mul_(-scale / total.unsqueeze(1)).scatter_add_(1, targets[at].unsqueeze(1), scale)
        out[at] = z.to(out.dtype)
    out[targets == ignore_index] = 0


@torch.library.custom_op("xpo_fast::gather_logps_backward", mutates_args=())
def _gradient(logits: Tensor, targets: Tensor, u: Tensor, temperature: float, ignore_index: int) -> Tensor:
    out = torch.empty_like(logits)
    _write_gradient(logits, targets, u, temperature, ignore_index, out)
    return out


@_gradient.register_fake
def _(logits, targets, u, temperature, ignore_index):
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, targets, *ctx.scalars = inputs
    ctx.save_for_backward(logits, targets)


def _backward(ctx: Any, u: Tensor) -> tuple:
    refuse_double_backward("gather_logps")
    logits, targets = ctx.saved_tensors
    temperature, ignore_index, overwrite = ctx.scalars
    if overwrite:
        out = logits.detach()
        _write_gradient(out, targets, u, temperature, ignore_index, out)
    else:
        out = _gradient(logits, targets, u, temperature, ignore_index)
    return out, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def gather_logps(
    logits: Tensor,  # (…, V)
    targets: Tensor,  # (…) integer, aligned
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
) -> Tensor:
    """log softmax(logits / temperature)[target], float32, shaped like targets, 0 where ignored.

    No float32 copy of the logits is made. Differentiable in logits, once. `overwrite_logits=True` lets the backward
    write the gradient over the logits, which nobody may read afterwards: it saves a tensor of their size, and allows
    one backward. ValueError for shapes or dtypes that do not fit and (on CPU) a target outside the vocabulary.
    """
    if not logits.is_floating_point() or logits.dim() < 1 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected float logits (…, V) and targets (…), got {logits.dtype} {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    if targets.device != logits.device:
        raise ValueError(f"logits are on {logits.device} and targets on {targets.device}: move one of them")
    Scaling(float(temperature))
    flat = logits.reshape(-1, logits.shape[-1])
    logp = _forward(flat, targets.reshape(-1).long(), float(temperature), ignore_index, overwrite_logits)
    return logp.view(targets.shape)
