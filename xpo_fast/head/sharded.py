"""Operands that FSDP2 or ZeRO-3 keep in parts: gathered once per call, not once per tile, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .spec import cast_for_autocast


def gathered(*, weight_grad: Tensor | None = None, **operands: Tensor | None) -> list[Any]:
    """Returns the operands as plain tensors, each gathered once; gradients flow back into the parts. None stays None.

    A DTensor (FSDP2) may be replicated or sharded, on any dimension, over a mesh of any number of dimensions. It is
    gathered in the dtype it has here, so cast it before; its gradient is the mean over the ranks of its mesh. Inside
    the forward of a model under `fully_shard` the head's weight is a plain tensor already, if its module is gathered
    with the model's own; then nothing is done here.

    A parameter of DeepSpeed's ZeRO-3 is gathered together with the others, and is whole only for this call and for as
    long as a backward needs it. Its gradient is reduced by ZeRO-3's hook on it, as those of all other parameters are.
    Neither this call nor the model's forward around it has to go through DeepSpeed's engine, but every rank has to make
    the call.

    Raises ValueError for a DTensor that requires a gradient and has another placement (a partial sum), and for a
    sharded operand beside weight_grad, since dW would be added to it without being summed over the ranks.
    """
    given: dict[int, tuple[str, Tensor]] = {}
    for name, x in operands.items():
        if x is not None:
            given.setdefault(id(x), (name, x))
            if weight_grad is not None and (is_sharded(x) or is_partitioned(x)):
                raise ValueError(
                    f"weight_grad is for a weight that this rank has whole, and {name} is kept in parts: leave it out"
                )
    held = unpartitioned(*(x for _, x in given.values()))
    found = {}
    for (at, (name, x)), own in zip(given.items(), held, strict=True):
        found[at] = _full(name, x) if is_sharded(x) else own if own is x else cast_for_autocast(own)[0]
    return [None if x is None else found[id(x)] for x in operands.values()]


def unpartitioned(*tensors: Tensor | None) -> list[Any]:
    """Returns parameters of ZeRO-3 as plain tensors, in their own dtype; other tensors, and None, as they are.

    Released parameters are gathered, all at once; those that the model has gathered already are not gathered again.
    """
    parameters = [x for x in tensors if x is not None and is_partitioned(x)]
    wait_for_prefetched(parameters)
    with _gathering([x for x in parameters if _is_released(x)]):
        return [_Partitioned.apply(x) if x is not None and is_partitioned(x) else x for x in tensors]


def refuse_sharded(**operands: Tensor | None) -> None:
    """Raises ValueError for a DTensor among operands that must be plain tensors of this rank."""
    for name, x in operands.items():
        if x is not None and is_sharded(x):
            raise ValueError(
                f"expected {name} to be a plain tensor, got a DTensor: pass what this rank has, {name}.to_local(), or "
                f"all of it, {name}.full_tensor()"
            )


def is_sharded(x: Tensor) -> bool:
    """Returns whether x is a DTensor."""
    return hasattr(x, "full_tensor")  # importing its class takes a third of a second


def is_partitioned(x: Tensor) -> bool:
    """Returns whether x is a parameter of ZeRO-3, gathered at the moment or not."""
    return hasattr(x, "ds_shape")


def in_parts_now(x: Tensor) -> bool:
    """Returns whether this process has only a part of x at the moment."""
    return is_sharded(x) or (is_partitioned(x) and _is_released(x))


def _is_released(x: Any) -> bool:
    """Returns whether a parameter of ZeRO-3 is in parts at the moment."""
    return x.ds_status.name == "NOT_AVAILABLE"


def wait_for_prefetched(parameters: Iterable[Any]) -> None:
    """Waits for the parameters that ZeRO-3 is prefetching, for which otherwise their module's forward would wait."""
    if all(x.ds_status.name != "INFLIGHT" for x in parameters):
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK  # pyright: ignore[reportMissingImports]

    registries = [m.ds_inflight_param_registry for m in FWD_MODULE_STACK if hasattr(m, "ds_inflight_param_registry")]
    for x in parameters:
        for handles in registries:
            if x in handles:
                handles.pop(x).wait()


def _gathering(released: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which the released parameters of ZeRO-3 are gathered."""
    if not released:
        return contextlib.nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(released)


def _full(name: str, x: Tensor) -> Tensor:
    """Returns a DTensor as a plain tensor. Raises ValueError for a partial sum that requires a gradient."""
    sharded: Any = x
    kinds = [type(p).__name__ for p in sharded.placements]
    if torch.is_grad_enabled() and x.requires_grad and not all(k in ("Replicate", "Shard") for k in kinds):
        raise ValueError(
            f"expected {name} to be a DTensor that is replicated or sharded, got {tuple(sharded.placements)}: "
            f"redistribute it first, or detach it where it does not learn"
        )
    full: Any = _Full.apply(x)
    return full


class _Full(torch.autograd.Function):
    """A DTensor as a plain tensor on every rank; its gradient is the mean over the ranks of its mesh.

    Where each rank has its own tokens, FSDP2 and DDP average the gradients of all other parameters in the same way. On
    ranks with the same tokens, as in tensor parallelism, the mean is the gradient that each of them has.
    """

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return x.full_tensor()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        mean = upstream[0] / ctx.mesh.size()
        partial_sums = DTensor.from_local(mean, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return partial_sums.redistribute(placements=ctx.placements)


class _Partitioned(torch.autograd.Function):
    """A gathered parameter of ZeRO-3 as a plain tensor, which stays valid when the parameter is released again.

    Its gradient is the parameter's. Autograd accumulates it only into a parameter of its shape; a released parameter is
    not gathered for that, but gets the shape, without memory, until the backward ends.
    """

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.parameter = x
        return x.data

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        x = ctx.parameter
        if _is_released(x):
            x.data = x.new_empty(1).expand(x.ds_shape)
            torch.autograd.Variable._execution_engine.queue_callback(partial(_remove_shape, x))  # pyright: ignore
        return upstream[0]


def _remove_shape(x: Any) -> None:
    """Undoes the shape that the backward gave a released parameter."""
    if _is_released(x):  # unless ZeRO-3 has gathered it since
        x.data = x.new_empty(0)
