"""The head as one custom operator, opaque to torch.compile, with its gradient.

∂logp/∂z = e_y − p does not depend on the loss, which enters by u = ∂L/∂logp, one number per token. With a frozen head
the forward therefore computes (e_y − p) W while the tile is live, and the backward scales its rows by u: 2F. With a
trainable head, or outputs that have gradients of their own, the backward computes each tile again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import chunked
from .backends import row_operations
from .operands import Operands, unpacked_scaling
from .spec import accumulation_dtype, compares, differentiable, to_device
from .tiling import Tiling
from .vocab_parallel import shard_of


def _names(outputs: str) -> tuple[str, ...]:
    """Splits comma-separated names."""
    return tuple(outputs.split(",")) if outputs else ()


# The first twelve arguments of both operators are `Operands.packed()`.
@torch.library.custom_op("xpo_fast::token_stats", mutates_args=())
def token_stats(
    hidden: Tensor,  # (N, D), or with an adapter (N, D + r)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    adapter: Tensor | None,  # (V, r)
    targets: Tensor,  # (N,) int64
    ref_hidden: Tensor | None,  # (N, Dr)
    ref_weight: Tensor | None,  # (V, Dr)
    ref_bias: Tensor | None,  # (V,)
    weight_grad: Tensor | None,  # (V, D), the buffer to which the backward adds dW
    scaling: list[float],
    ignore_index: int,
    shard: str,
    tiling: list[int],
    backend: str,
    outputs: str,  # names, comma-separated
    save_grad: bool,
    selected: Tensor | None = None,  # (K,) or (N, K) int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logp (N,), lse (N,), the stacked outputs (E + K, N), and ∂logp/∂hidden: (N, D) if saved, else (0, D).

    The last K outputs are the log-probs of the selected ids.
    """
    operands = Operands.unpacked(
        hidden,
        weight,
        bias,
        adapter,
        targets,
        ref_hidden,
        ref_weight,
        ref_bias,
        weight_grad,
        scaling,
        ignore_index,
        shard,
    )
    operands = replace(operands, selected=selected)
    rows = row_operations(backend, operands.shard)
    return chunked.forward(operands, _names(outputs), Tiling(*tiling), save_grad, rows)


@token_stats.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets, (outputs, save_grad, *selected) = others[3], others[13:]
    n = targets.shape[0]
    stats = hidden.new_empty((n,), dtype=accumulation_dtype(hidden.dtype))
    count = sum(ids.shape[-1] for ids in selected if ids is not None)
    extra = hidden.new_empty((len(_names(outputs)) + count, n), dtype=stats.dtype)
    return stats, torch.empty_like(stats), extra, hidden.new_empty((n if save_grad else 0, hidden.shape[1]))


@torch.library.custom_op("xpo_fast::token_stats_backward", mutates_args=("weight_grad",))
def token_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    weight_grad: Tensor | None,
    scaling: list[float],
    ignore_index: int,
    shard: str,
    tiling: list[int],
    backend: str,
    upstream: list[Tensor],  # (N,) each
    upstream_names: str,
    values: list[Tensor],  # (N,) each
    values_names: str,
    needs: list[bool],  # hidden, weight, bias, adapter
    selected: Tensor | None = None,  # (K,) or (N, K)
    d_selected: Tensor | None = None,  # (K, N)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of hidden, weight, bias and adapter.

    A gradient that is not needed is (0,), and so is dW if it was added to weight_grad.
    """
    operands = Operands.unpacked(
        hidden,
        weight,
        bias,
        adapter,
        targets,
        ref_hidden,
        ref_weight,
        ref_bias,
        weight_grad,
        scaling,
        ignore_index,
        shard,
    )
    u = dict(zip(_names(upstream_names), upstream, strict=True))
    v = dict(zip(_names(values_names), values, strict=True))
    rows = row_operations(backend, operands.shard)
    operands = replace(operands, selected=selected)
    grads = chunked.backward(operands, Tiling(*tiling), u, v, needs, rows, d_selected)
    d_hidden, d_weight, d_bias, d_adapter = (
        hidden.new_empty(0) if g is None or x is None else g.to(x.dtype)
        for g, x in zip(grads, (hidden, weight, bias, adapter), strict=True)
    )
    return d_hidden, d_weight, d_bias, d_adapter


@token_stats_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight_grad, needs = arguments[0], arguments[8], arguments[18]
    needs = (needs[0], needs[1] and weight_grad is None, *needs[2:])
    return tuple(
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0)
        for need, x in zip(needs, arguments, strict=False)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, weight_grad, scaling, ignore_index, shard, tiling, backend, outputs, save_grad, selected = inputs
    logp, lse, extra, dlogp = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dlogp)
    ctx.names, ctx.save_grad = _names(outputs), save_grad
    ctx.numbers, ctx.execution = (scaling, ignore_index, shard), (tiling, backend)
    ctx.weight_grad = weight_grad  # not by save_for_backward: the backwards of other calls write it, too
    if save_grad:
        # The gradient of lse is W[y] − (saved ∂logp/∂hidden), hence weight and targets.
        _, weight, _, adapter, targets, *_ = tensors
        ctx.save_for_backward(weight, adapter, targets, logp, lse, dlogp)
    else:
        ctx.save_for_backward(*tensors, extra, selected)


def _later_backward_possible() -> bool:
    """Returns whether the running backward was asked to retain its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def scale_saved(saved: Tensor, factor: Tensor) -> Tensor:
    """Returns saved · factor as a new tensor object, computed in place if no later backward can read `saved` again."""
    if torch.compiler.is_compiling() or _later_backward_possible():
        return (saved * factor).to(saved.dtype)
    saved = saved.detach()
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return saved
    return saved.mul_(factor)


def refuse_double_backward(what: str) -> None:
    """Raises RuntimeError if the running backward is itself recorded by autograd; `what` names the function."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} has no second derivative; call backward without create_graph=True")


def _backward(ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None, d_extra: Tensor | None, _: None) -> tuple:
    refuse_double_backward("token_stats")
    if ctx.save_grad:
        grads = _backward_frozen(ctx, d_logp, d_lse), None, None, None
    else:
        grads = _backward_recompute(ctx, d_logp, d_lse, d_extra)
    return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))


def _backward_frozen(ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None) -> Tensor | None:
    weight, adapter, targets, logp, lse, dlogp = ctx.saved_tensors
    scaling, ignore_index, shard = ctx.numbers
    targets = to_device(targets, weight.device)
    scored = targets != ignore_index
    u, v = (None if d is None else torch.where(scored, d, 0.0) for d in (d_logp, d_lse))
    if v is None:
        if u is None:
            return None
        return scale_saved(dlogp, u.unsqueeze(1))
    scaling = unpacked_scaling(scaling)
    gain = v * scaling.gain
    if scaling.ceiling is not None:
        gain = gain * (1 - ((logp + lse) / scaling.ceiling) ** 2)
    y, cut = torch.where(scored, targets, 0), shard_of(shard)
    rows = [
        (x[y] if cut is None else cut.target_rows(x, y)).to(weight.dtype) for x in (weight, adapter) if x is not None
    ]
    own = torch.cat(rows, dim=1) * gain.unsqueeze(1)
    others = (v.neg() if u is None else u - v).unsqueeze(1) * dlogp
    return (others + own).to(dlogp.dtype)


def _backward_recompute(ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None, d_extra: Tensor | None) -> tuple:
    *operands, ref_hidden, ref_weight, ref_bias, extra, selected = ctx.saved_tensors
    upstream = {"logp": d_logp, "lse": d_lse}
    values = {}
    for k, name in enumerate(ctx.names):
        if differentiable([name]) and d_extra is not None:
            upstream[name], values[name] = d_extra[k], extra[k]
    given = {n: d for n, d in upstream.items() if d is not None}
    d_selected = None if selected is None or d_extra is None else d_extra[len(ctx.names) :]
    needs = list(ctx.needs_input_grad[:4])
    if not (given or d_selected is not None) or not any(needs):
        return None, None, None, None
    needs_ref = compares(given)
    grads = token_stats_backward(
        *operands,
        *((ref_hidden, ref_weight, ref_bias) if needs_ref else (None, None, None)),
        ctx.weight_grad,
        *ctx.numbers,
        *ctx.execution,
        list(given.values()),
        ",".join(given),
        list(values.values()),
        ",".join(values),
        needs,
        selected,
        d_selected,
    )
    returned = needs[0], needs[1] and ctx.weight_grad is None, *needs[2:]
    return tuple(g if wanted else None for g, wanted in zip(grads, returned, strict=True))


token_stats.register_autograd(_backward, setup_context=_setup_context)
