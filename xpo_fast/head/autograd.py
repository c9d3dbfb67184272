"""The head as one custom operator, opaque to torch.compile, with its gradient.

∂logp/∂z = e_y − p does not depend on what the loss does with logp: u = ∂L/∂logp is one number a token. So with a
frozen head the forward multiplies (e_y − p) W while the tile is live and the backward scales rows: 2F. A trainable
head, or outputs with gradients of their own, make the tile again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunked
from .plan import Tiling, implementation
from .spec import DIFFERENTIABLE, Scaling, to_device
from .vocab_parallel import shard_of


def _scaling(temperature: float, softcap: float, logit_scale: float) -> Scaling:
    return Scaling(temperature, softcap or None, logit_scale)


def _reference(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> chunked.Reference | None:
    return None if hidden is None or weight is None else (hidden, weight, bias)


def _names(outputs: str) -> tuple[str, ...]:
    return tuple(outputs.split(",")) if outputs else ()


@torch.library.custom_op("xpo_fast::token_stats", mutates_args=())
def token_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    ref_hidden: Tensor | None,  # (N, Dr)
    ref_weight: Tensor | None,  # (V, Dr)
    ref_bias: Tensor | None,  # (V,)
    weight_grad: Tensor | None,  # (V, D), to which the backward adds dW
    temperature: float,
    softcap: float,  # 0: none
    logit_scale: float,
    ignore_index: int,
    tile_tokens: int,
    step_tokens: int,
    lanes: int,
    backend: str,
    outputs: str,  # names, comma-separated
    save_grad: bool,
    adapter: Tensor | None = None,  # (V, r); hidden is (N, D + r)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp (N,), lse (N,), the outputs stacked (E, N), ∂logp/∂hidden (N, D) if saved, else (0, D)."""
    return implementation(backend).forward(
        hidden,
        weight,
        bias,
        targets,
        _reference(ref_hidden, ref_weight, ref_bias),
        _scaling(temperature, softcap, logit_scale),
        ignore_index,
        _names(outputs),
        Tiling(tile_tokens, step_tokens, lanes),
        save_grad,
        adapter=adapter,
    )


@token_stats.register_fake
def _(
    hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, weight_grad, temperature, softcap, logit_scale,
    ignore_index, tile_tokens, step_tokens, lanes, backend, outputs, save_grad, adapter=None,
):  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n = targets.shape[0]
    stats = hidden.new_empty((n,), dtype=dtype)
    extra = hidden.new_empty((len(_names(outputs)), n), dtype=dtype)
    return stats, torch.empty_like(stats), extra, hidden.new_empty((n if save_grad else 0, hidden.shape[1]))


@torch.library.custom_op("xpo_fast::token_stats_backward", mutates_args=("weight_grad",))
def token_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    weight_grad: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    tile_tokens: int,
    step_tokens: int,
    lanes: int,
    backend: str,
    upstream: list[Tensor],  # (N,) each
    upstream_names: str,
    values: list[Tensor],  # (N,) each
    values_names: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    adapter: Tensor | None = None,
    need_adapter: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight, bias and adapter; (0,) for one that is not needed, and weight's if added elsewhere."""
    grads = implementation(backend).backward(
        hidden,
        weight,
        bias,
        targets,
        _reference(ref_hidden, ref_weight, ref_bias),
        _scaling(temperature, softcap, logit_scale),
        ignore_index,
        Tiling(tile_tokens, step_tokens, lanes),
        dict(zip(_names(upstream_names), upstream, strict=True)),
        dict(zip(_names(values_names), values, strict=True)),
        (need_hidden, need_weight, need_bias, need_adapter),
        weight_grad,
        adapter=adapter,
    )
    d_hidden, d_weight, d_bias, d_adapter = (
        hidden.new_empty(0) if g is None or x is None else g.to(x.dtype)
        for g, x in zip(grads, (hidden, weight, bias, adapter), strict=True)
    )
    return d_hidden, d_weight, d_bias, d_adapter


@token_stats_backward.register_fake
def _(
    hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, weight_grad, temperature, softcap, logit_scale,
    ignore_index, tile_tokens, step_tokens, lanes, backend, upstream, upstream_names, values, values_names,
    need_hidden, need_weight, need_bias, adapter=None, need_adapter=False,
):  # fmt: skip
    wanted = (
        (need_hidden, hidden),
        (need_weight and weight_grad is None, weight),
        (need_bias, bias),
        (need_adapter, adapter),
    )
    return tuple(torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for need, x in wanted)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    (
        hidden,
        weight,
        bias,
        targets,
        ref_hidden,
        ref_weight,
        ref_bias,
        weight_grad,
        *scalars,
        outputs,
        save_grad,
        adapter,
    ) = inputs
    logp, lse, extra, dlogp = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dlogp)
    ctx.names, ctx.scalars, ctx.save_grad = _names(outputs), scalars, save_grad
    ctx.weight_grad = weight_grad  # not saved: the backwards of other calls write it
    if save_grad:
        # The target's own row of W is needed for lse, whose gradient is W[y] minus the saved one.
        ctx.save_for_backward(weight, adapter, targets, logp, lse, dlogp)
    else:
        ctx.save_for_backward(hidden, weight, bias, adapter, targets, ref_hidden, ref_weight, ref_bias, extra)


def _later_backward_possible() -> bool:
    """Whether the backward under way was asked to retain its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def scale_saved(saved: Tensor, factor: Tensor) -> Tensor:
    """saved · factor, in place where no later backward can want `saved` again; a fresh tensor object either way."""
    if torch.compiler.is_compiling() or _later_backward_possible():
        return (saved * factor).to(saved.dtype)
    saved = saved.detach()
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return saved
    return saved.mul_(factor)


def refuse_double_backward(what: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} has no second derivative; call backward without create_graph=True")


def _backward(ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None, d_extra: Tensor | None, _: None) -> tuple:
    refuse_double_backward("token_stats")
    if ctx.save_grad:
        operands = _backward_frozen(ctx, d_logp, d_lse), None, None, None
    else:
        operands = _backward_recompute(ctx, d_logp, d_lse, d_extra)
    *operands, d_adapter = operands
    return (*operands, *([None] * 15), d_adapter)


def _backward_frozen(ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None) -> Tensor | None:
    weight, adapter, targets, logp, lse, dlogp = ctx.saved_tensors
    temperature, softcap, logit_scale, ignore_index, *_, backend = ctx.scalars
    targets = to_device(targets, weight.device)
    scored = targets != ignore_index
    u, v = (None if d is None else torch.where(scored, d, 0.0) for d in (d_logp, d_lse))
    if v is None:
        if u is None:
            return None
        return scale_saved(dlogp, u.unsqueeze(1))
    scaling = _scaling(temperature, softcap, logit_scale)
    gain = v * scaling.gain
    if scaling.ceiling is not None:
        gain = gain * (1 - ((logp + lse) / scaling.ceiling) ** 2)
    y, shard = torch.where(scored, targets, 0), shard_of(backend)
    rows = [
        (x[y] if shard is None else shard.target_rows(x, y)).to(weight.dtype)
        for x in (weight, adapter)
        if x is not None
    ]
    own = torch.cat(rows, dim=1) * gain.unsqueeze(1)
    others = (v.neg() if u is None else u - v).unsqueeze(1) * dlogp
    return (others + own).to(dlogp.dtype)


def _backward_recompute(ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None, d_extra: Tensor | None) -> tuple:
    hidden, weight, bias, adapter, targets, ref_hidden, ref_weight, ref_bias, extra = ctx.saved_tensors
    upstream = {"logp": d_logp, "lse": d_lse}
    values = {}
    for k, name in enumerate(ctx.names):
        if name in DIFFERENTIABLE and d_extra is not None:
            upstream[name], values[name] = d_extra[k], extra[k]
    given = {n: d for n, d in upstream.items() if d is not None}
    *need, need_adapter = *ctx.needs_input_grad[:3], ctx.needs_input_grad[-1]
    if not given or not any((*need, need_adapter)):
        return None, None, None, None
    needs_ref = "kl" in given or "reverse_kl" in given
    grads = token_stats_backward(
        hidden,
        weight,
        bias,
        targets,
        ref_hidden if needs_ref else None,
        ref_weight if needs_ref else None,
        ref_bias if needs_ref else None,
        ctx.weight_grad,
        *ctx.scalars,
        list(given.values()),
        ",".join(given),
        list(values.values()),
        ",".join(values),
        *need,
        adapter,
        need_adapter,
    )
    returned = need[0], need[1] and ctx.weight_grad is None, need[2], need_adapter
    return tuple(g if wanted else None for g, wanted in zip(grads, returned, strict=True))


token_stats.register_autograd(_backward, setup_context=_setup_context)
