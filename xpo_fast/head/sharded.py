"""Operands that FSDP2 or ZeRO-3 keep in parts: gathered once a call, not once a tile, or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(*, weight_grad: Tensor | None = None, **operands: Tensor | None) -> list[Any]:
    """The operands as plain tensors, each DTensor gathered once, with its gradient (`_Whole`); None stays None.

    A DTensor may be replicated or sharded, on any dimension and a mesh of any number of them. A dtype that it was cast to
    is the one that it is gathered in. Inside the forward of a model under `fully_shard` the head's weight is a plain
    tensor already, if its module is gathered with the model's own: nothing is done here. ZeRO-3 has no tensor to ask:
    what it has taken away, shape (0,), is refused.

    Raises ValueError for a parameter that ZeRO-3 has taken away, for a DTensor whose gradient is wanted and has no such
    placement (a partial sum), and for one with weight_grad, where a gradient is added that no rank has summed.
    """
    if weight_grad is not None and any(x is not None and is_sharded(x) for x in operands.values()):
        raise ValueError("weight_grad is for a weight that this rank has whole, got a DTensor: leave it out")
    found: dict[int, Tensor] = {}
    for name, x in operands.items():
        if x is not None and id(x) not in found:
            found[id(x)] = _whole(name, x)
    return [None if x is None else found[id(x)] for x in operands.values()]


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


def _whole(name: str, x: Tensor) -> Tensor:
    shape = getattr(x, "ds_shape", None)  # what DeepSpeed adds to a parameter
    if shape is not None and x.shape != shape:
        raise ValueError(
            f"{name} is {tuple(x.shape)} and ZeRO-3 has its {tuple(shape)} in parts: for the forward, and for the backward "
            f"where it is trainable, be in `with deepspeed.zero.GatheredParameters([{name}]):`"
        )
    if not is_sharded(x):
        return x
    sharded: Any = x
    kinds = [type(p).__name__ for p in sharded.placements]
    if torch.is_grad_enabled() and x.requires_grad and not all(k in ("Replicate", "Shard") for k in kinds):
        raise ValueError(
            f"expected {name} to be a DTensor that is replicated or sharded, got {tuple(sharded.placements)}: "
            f"redistribute it first, or detach it where it does not learn"
        )
    gathered: Any = _Whole.apply(x)
    return gathered


class _Whole(torch.autograd.Function):
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
