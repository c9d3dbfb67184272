"""Operands that FSDP2 or ZeRO-3 keep in parts: gathered once a call, not once a tile, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .spec import cast_for_autocast


def gathered(*, weight_grad: Tensor | None = None, **operands: Tensor | None) -> list[Any]:
    """Returns the operands as plain tensors, each gathered once; their gradients go back into the parts. None stays None.

    A DTensor (FSDP2) may be replicated or sharded, on any dimension and a mesh of any number of them. A dtype that it was
    cast to is the one that it is gathered in; its gradient is the mean over the ranks of its mesh. Inside the forward of a
    model under `fully_shard` the head's weight is a plain tensor already, if its module is gathered with the model's own:
    nothing is done here.

    A parameter of DeepSpeed's ZeRO-3 is gathered together with the others, whole only for this call and for as long as a
    backward needs it; its gradient is reduced by the hook that ZeRO-3 has on it, as those of all other parameters are. That
    this call, or the model's forward around it, is the engine's is not needed; that every rank makes it is.

    Raises ValueError for a DTensor whose gradient is wanted and has no such placement (a partial sum), and for parts with
    weight_grad, where a gradient is added that no rank has summed.
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
    """Parameters of ZeRO-3 as plain tensors, in their own dtype; other tensors, and None, as they are.

    What has been taken away is gathered, all of it at once; what the model has gathered already is not gathered again.
    """
    parameters = [x for x in tensors if x is not None and is_partitioned(x)]
    _await(parameters)
    with _with_gathered([x for x in parameters if _taken_away(x)]):
        return [_Held.apply(x) if x is not None and is_partitioned(x) else x for x in tensors]


def refuse_sharded(**operands: Tensor | None) -> None:
    """ValueError for operands that must be this rank's own plain tensors."""
    for name, x in operands.items():
        if x is not None and is_sharded(x):
            raise ValueError(
                f"expected {name} to be a plain tensor, got a DTensor: pass what this rank has, {name}.to_local(), or "
                f"all of it, {name}.full_tensor()"
            )


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(x, "full_tensor")  # its class takes a third of a second to import


def is_partitioned(x: Tensor) -> bool:
    """Whether it is a parameter that ZeRO-3 keeps in parts, at the moment or not."""
    return hasattr(x, "ds_shape")


def _taken_away(x: Any) -> bool:
    """Whether a parameter of ZeRO-3 is not there."""
    return x.ds_status.name == "NOT_AVAILABLE"


def _await(parameters: Iterable[Any]) -> None:
    """Wait for those that ZeRO-3 has begun to gather: ahead, for a module whose own forward would wait for it."""
    if all(x.ds_status.name != "INFLIGHT" for x in parameters):
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK  # pyright: ignore[reportMissingImports]

    under_way = [m.ds_inflight_param_registry for m in FWD_MODULE_STACK if hasattr(m, "ds_inflight_param_registry")]
    for x in parameters:
        for handles in under_way:
            if x in handles:
                handles.pop(x).wait()


def _with_gathered(taken: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """The context in which what ZeRO-3 has taken away is there."""
    if not taken:
        return contextlib.nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(taken)


def _full(name: str, x: Tensor) -> Tensor:
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

    That is what FSDP2 and DDP make of the gradients of all other parameters where each rank has its own tokens; and
    on ranks with the same tokens, as for tensor parallelism, what each of them has.
    """

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return x.full_tensor()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        mean = upstream[0] / ctx.mesh.size()
        each = DTensor.from_local(mean, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return each.redistribute(placements=ctx.placements)


class _Held(torch.autograd.Function):
    """A whole parameter of ZeRO-3 as a plain tensor, which is there when the parameter is taken away again.

    Its gradient is the parameter's. Autograd adds it up only to one that has its shape: not gathered again for that, it
    is given the shape, without memory, until the backward ends.
    """

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.parameter = x
        return x.data

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        x = ctx.parameter
        if _taken_away(x):
            x.data = x.new_empty(1).expand(x.ds_shape)
            torch.autograd.Variable._execution_engine.queue_callback(partial(_take_away, x))  # pyright: ignore
        return upstream[0]


def _take_away(x: Any) -> None:
    if _taken_away(x):  # nor has ZeRO-3 gathered it since
        x.data = x.new_empty(0)
