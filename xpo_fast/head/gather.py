"""Log-probs from materialised logits, without a float32 copy of them; the gradient can overwrite them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .autograd import refuse_double_backward
from .backends import BACKENDS, check_backend, get_backend
from .choice import choose_backend
from .gemms import BLOCK_BYTES
from .row_operations import softmax_
from .spec import Scaling, accumulation_dtype, check_targets, scored_positions
from .tiling import STEP_BYTES, scratch_bytes


def _blocks(logits: Tensor, index: Tensor):
    """Yields blocks of scored rows in the accumulation dtype: (positions (r,), logits (r, V)).

    On the CPU a block fits a core's cache; on a device blocks are few and large.
    """
    dtype = accumulation_dtype(logits.dtype)
    most = BLOCK_BYTES
    if logits.device.type != "cpu":
        most = min(scratch_bytes(logits.device) // 2, STEP_BYTES)
    rows = max(1, most // (logits.shape[1] * dtype.itemsize))
    for start in range(0, index.shape[0], rows):
        at = index[start : start + rows]
        yield at, logits.index_select(0, at).to(dtype)


def _kernels() -> ModuleType:
    # Imported on first use, since it imports the package triton.
    from ..kernels import gather  # pyright: ignore[reportMissingImports]

    return gather


def _choose_backend(backend: str, logits: Tensor) -> str:
    """Returns "torch" or "triton" for logits (N, V).

    Raises ValueError for a backend that does not exist or cannot run on them.
    """
    names = ("auto", "torch", *(name for name in BACKENDS if get_backend(name).gather_kernel))
    if backend not in names:
        raise ValueError(f"no backend named {backend!r}; there are {', '.join(names)}")
    chosen = choose_backend(backend, logits.device, logits.dtype)
    if not get_backend(chosen).gather_kernel:  # $XPO_FAST_BACKEND may name a backend without one
        return "torch"
    check_backend(chosen, logits.device)
    if _kernels().supports(logits):
        return chosen
    if backend == "auto":
        return "torch"
    raise ValueError(
        "the triton backend takes float32, bfloat16 and float16 logits with stride 1 along V, got "
        f"{logits.dtype} with strides {logits.stride()}: pass backend='auto'"
    )


@torch.library.custom_op("xpo_fast::gather_logps", mutates_args=())
def _forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    overwrite: bool,
    fused: bool = False,  # by the Triton kernels
) -> tuple[Tensor, Tensor]:
    """Returns logp (N,), and the normalisers of the rows for the Triton kernels' backward: (2, N), else (2, 0)."""
    if fused:
        check_targets(targets, ignore_index, logits.shape[1])
        return _kernels().forward(logits, targets, temperature, ignore_index)
    index = scored_positions(targets, ignore_index, logits.shape[1])
    logp = logits.new_zeros(targets.shape, dtype=accumulation_dtype(logits.dtype))
    for at, z in _blocks(logits, index):
        z.div_(temperature)
        z_y = z.gather(1, targets[at].unsqueeze(1)).squeeze(1)
        largest, log_total, _ = softmax_(z)
        logp[at] = z_y - largest - log_total
    return logp, logp.new_empty((2, 0))


@_forward.register_fake
def _(logits, targets, temperature, ignore_index, overwrite, fused=False):
    logp = logits.new_empty(targets.shape, dtype=accumulation_dtype(logits.dtype))
    return logp, logp.new_empty((2, targets.shape[0] if fused else 0))


def _write_gradient(
    logits: Tensor,
    targets: Tensor,
    u: Tensor,
    temperature: float,
    ignore_index: int,
    normaliser: Tensor | None,
    out: Tensor,
) -> None:
    """Writes u (e_y − softmax(logits / temperature)) / temperature into out (N, V), which may be `logits`."""
    if normaliser is not None:
        _kernels().write_gradient(logits, targets, normaliser, u, temperature, ignore_index, out)
        return
    index = scored_positions(targets, ignore_index, logits.shape[1])
    for at, z in _blocks(logits, index):
        z.div_(temperature)
        *_, total = softmax_(z)
        scale = (u[at] / temperature).unsqueeze(1).to(z.dtype)
        z.mul_(-scale / total.unsqueeze(1)).scatter_add_(1, targets[at].unsqueeze(1), scale)
        out.index_copy_(0, at, z.to(out.dtype))
    out.masked_fill_((targets == ignore_index).unsqueeze(1), 0)


@torch.library.custom_op("xpo_fast::gather_logps_backward", mutates_args=())
def _gradient(
    logits: Tensor,
    targets: Tensor,
    u: Tensor,
    temperature: float,
    ignore_index: int,
    normaliser: Tensor | None = None,  # (2, N) from `_forward`, for the Triton kernels
) -> Tensor:
    out = torch.empty_like(logits)
    _write_gradient(logits, targets, u, temperature, ignore_index, normaliser, out)
    return out


@_gradient.register_fake
def _(logits, targets, u, temperature, ignore_index, normaliser=None):
    return torch.empty_like(logits)


@torch.library.custom_op("xpo_fast::gather_logps_overwrite", mutates_args=("logits",))
def _overwrite(
    logits: Tensor, targets: Tensor, u: Tensor, temperature: float, ignore_index: int, normaliser: Tensor | None = None
) -> None:
    """Writes the gradient over the logits; an operator, so that autograd and torch.compile see the write."""
    _write_gradient(logits, targets, u, temperature, ignore_index, normaliser, logits)


@_overwrite.register_fake
def _(logits, targets, u, temperature, ignore_index, normaliser=None):
    return None


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, *ctx.scalars = inputs
    _, normaliser = output
    ctx.mark_non_differentiable(normaliser)
    ctx.save_for_backward(logits, targets, normaliser)


def _backward(ctx: Any, u: Tensor, _: Tensor) -> tuple:
    refuse_double_backward("gather_logps")
    logits, targets, normaliser = ctx.saved_tensors
    temperature, ignore_index, overwrite, fused = ctx.scalars
    arguments = targets, u, temperature, ignore_index, normaliser if fused else None
    if overwrite:
        out = logits.detach()
        _overwrite(out, *arguments)
    else:
        out = _gradient(logits, *arguments)
    return out, *[None] * 5


_forward.register_autograd(_backward, setup_context=_setup_context)


def gather_logps(
    logits: Tensor,  # (…, V)
    targets: Tensor,  # (…) integer, aligned
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Returns log softmax(logits / temperature)[target], float32, shaped like targets, 0 where ignored.

    The logits are not copied to float32 as a whole: one block at a time is, of a cache's size on the CPU and of at most
    half a GiB on a device; triton copies none. Differentiable in logits, once. With `overwrite_logits=True` the
    backward writes the gradient over the logits, which nothing may read afterwards: this saves a tensor of their size,
    and allows one backward only.

    backend: "torch", or on CUDA and ROCm "triton": one kernel each for forward and backward, for float32, bfloat16 or
    float16 logits with stride 1 along V. "auto" is triton for such logits where it passed its check (see
    `head.verdict`), else torch. Raises ValueError for shapes, dtypes or a backend that do not fit, and (on CPU) for a
    target outside the vocabulary.
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
    fused = get_backend(_choose_backend(backend, flat)).gather_kernel
    ids = targets.reshape(-1).long()
    logp, _ = _forward(flat, ids, float(temperature), ignore_index, overwrite_logits, fused)
    return logp.view(targets.shape)
