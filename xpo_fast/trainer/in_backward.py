"""Takes the optimizer's step inside the backward: each parameter's as soon as its gradient is there, and frees that.

The optimizer, its groups and state, the schedule and the checkpoints are those of the plain run, so either run goes on
from a checkpoint of the other. A step of the optimizer with one gradient there, and none for its other parameters, is a
step of that parameter: so it is for the optimizers of `optimizers.STEP_ALONE`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .optimizers import LOMO, STEP_ALONE, name_of


class StepsInBackward:
    """Steps each parameter of an optimizer in the backwards inside `stepping`. `close` ends it.

    Raises ValueError if the parameters are on several devices, whose gradients would come at the same time.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        if len(devices := {str(p.device) for p in parameters}) > 1:
            raise ValueError(
                f"optimizer_in_backward: the parameters are on {', '.join(sorted(devices))}: put them on one device, "
                "or leave it out"
            )
        self._active = False
        self._stepped: set[Tensor] = set()
        self._norms: list[Tensor] = []
        self._handles = [p.register_post_accumulate_grad_hook(self._step) for p in parameters]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Steps in the backward inside the block, which must be one backward."""
        self._stepped.clear()
        self._norms.clear()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def norm(self) -> Tensor:
        """Returns the norm of all gradients of the last backward, ()."""
        return torch.stack(self._norms).norm() if self._norms else torch.zeros(())

    def close(self) -> None:
        """Lets gradients be kept as usual."""
        for handle in self._handles:
            handle.remove()

    def _step(self, p: Tensor) -> None:
        if not self._active or p.grad is None:
            return
        if p in self._stepped:
            raise RuntimeError(
                "optimizer_in_backward: a weight got a second gradient in one backward, after its step was taken, as "
                "from reentrant checkpointing inside the model's own code: leave optimizer_in_backward out"
            )
        self._stepped.add(p)
        self._norms.append(torch.linalg.vector_norm(p.grad, dtype=torch.float32))
        self._optimizer.step()
        p.grad = None


def check_in_backward(args: Any, *, sharded: bool = False) -> None:
    """Raises ValueError, with all that stands against it, if args.optimizer_in_backward cannot be done.

    So it does for an optimizer that steps in the backward by itself (lomo, adalomo). args: a `MethodConfig`. sharded:
    FSDP or DeepSpeed keep the model in parts.
    """
    optim = name_of(args.optim)
    itself = optim in LOMO
    if not (itself or args.optimizer_in_backward):
        return
    problems = []
    if args.max_grad_norm:
        problems.append(
            f"max_grad_norm={args.max_grad_norm:g} clips by the norm of all gradients, which are never there "
            "together: set it to 0"
        )
    if args.gradient_accumulation_steps > 1:
        problems.append(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} would keep the gradients: set it to 1"
        )
    if args.tokens_per_batch is not None:
        problems.append(f"tokens_per_batch={args.tokens_per_batch} cuts a step into several backwards: leave it out")
    if args.world_size > 1:
        problems.append(f"the gradients of {args.world_size} processes are averaged before a step: use one process")
    elif sharded or args.fsdp or args.deepspeed:
        problems.append("FSDP and DeepSpeed keep weights and gradients in parts: use one process without them")
    if args.fp16:
        problems.append("fp16=True looks for overflows in all gradients before a step: use bf16")
    if args.auto_find_batch_size:
        problems.append("auto_find_batch_size would try again with weights half of which have been stepped")
    how = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    if how.get("use_reentrant"):
        problems.append("use_reentrant=True makes gradients in several backwards: leave it out")
    if itself and args.optimizer_in_backward:
        problems.append(f"{optim} steps in the backward by itself: leave optimizer_in_backward out")
    elif not itself and optim not in STEP_ALONE:
        problems.append(f"optim={optim} does not step one weight without the others; these do: {', '.join(STEP_ALONE)}")
    if problems:
        raise ValueError(f"{f'optim={optim}' if itself else 'optimizer_in_backward'}: {'; '.join(problems)}")
