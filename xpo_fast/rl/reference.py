"""The reference policy of an online run: which one it is, and how it follows the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import install_fused_loss
from ..objective import Objective
from ..trainer import HandedOver, Kept
from ..trainer.sharding import shard_copy
from ..trainer.whole import whole
from .config import RLConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def choose_reference(args: RLConfig, objective: Objective, model: nn.Module, *, adapts_beta: bool) -> str:
    """Returns what serves as the reference: none, copy or adapter; raises ValueError where args ask for something else.

    adapts_beta: kl_target steers the divergence from the sampling policy, and needs no reference.
    """
    needed = objective.needs_reference or args.reward_kl > 0
    adapted = hasattr(model, "disable_adapter")
    why = f"{objective} with kl_coef={args.reward_kl:g}"
    if not needed:
        if args.reference in ("adapter", "copy"):
            raise ValueError(f'{why} has no reference: use reference="auto", got {args.reference!r}')
        for name in ("kl_target", "ref_mixin"):
            if getattr(args, name) and not (name == "kl_target" and adapts_beta):
                raise ValueError(f"{name} is about a reference, and {why} has none: set kl_coef, or the method's beta")
        return "none"
    if args.reference == "none":
        raise ValueError(f'{why} compares with a reference: use reference="auto", "copy" or "adapter"')
    chosen = args.reference if args.reference != "auto" else "adapter" if adapted else "copy"
    if chosen == "adapter" and not adapted:
        raise ValueError(
            'reference="adapter" is the model with its adapter switched off: train with a peft_config (--lora)'
        )
    if args.ref_mixin and chosen == "copy" and adapted:
        raise ValueError(
            "ref_mixin moves the weights that are trained, of a PEFT model the adapter, which a copy has not: use "
            'reference="adapter", which averages the adapter, or leave ref_mixin at 0'
        )
    return chosen


class MovingReference:
    """Reference policy: the model as it was handed over. With a mixin x it follows: ref ← (1 − x)·ref + x·policy.

    kind: "copy", a frozen copy; "adapter", the PEFT model with its adapter switched off; or "kept", the PEFT model with
    the weights that are trained as they were handed over. With a mixin, of a PEFT model, it is the model with an
    average of the adapter (and of all else that is trained), kept in float32 and put in its place while the reference
    is scored.
    """

    def __init__(self, kind: str, policy: Any, accelerator: Accelerator, mixin: float, handed_over: HandedOver) -> None:
        self.policy, self.mixin = policy, mixin
        self.copy, self._kept = None, None
        if kind == "copy":
            copied = handed_over.copy(policy)
            install_fused_loss(copied)
            self.identity = handed_over.identity(copied, None)  # of whole weights, before they are in parts
            self.copy = shard_copy(copied, accelerator)
            return
        self._kept = Kept(policy, off=False, dtype=torch.float32) if mixin else Kept(policy, off=handed_over.off)
        self.identity = handed_over.identity(None, self._kept)

    @property
    def average(self) -> dict[str, Tensor]:
        """The average of the weights that are trained, by name; empty unless an adapter is averaged."""
        return self._kept.weights if self._kept is not None and self.mixin else {}

    def moving(self) -> dict[str, Tensor]:
        """Returns the weights that follow the policy's, by their names in the policy; checkpoints keep them."""
        if not self.mixin:
            return {}
        return self.average if self.copy is None else dict(self.copy.named_parameters())

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the reference's weights by the mixin towards the policy's."""
        policy = dict(self.policy.named_parameters())
        for name, x in self.moving().items():
            x.lerp_(policy[name].to(x), self.mixin)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Puts weights of `moving` back."""
        for name, x in self.moving().items():
            x.copy_(weights[name])

    @contextlib.contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """Yields the model that computes as the reference inside the block; every process must enter.

        A copy in parts is whole inside it. Of the policy in parts, one that computes as the reference in its place, the
        caller sees to that.
        """
        if self.copy is not None:
            with whole(self.copy):
                yield self.copy
        elif self._kept is not None:
            with self._kept.in_place():
                yield self.policy
