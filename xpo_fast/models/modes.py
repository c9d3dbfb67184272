"""Contexts in which a model is scored: eval mode without gradient, a PEFT adapter switched off, other weights in place.

None of them leaves a trace: modes, which weights are trained, and the weights are as before when the block ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode (no dropout); then restores each module's mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`eval_mode` without gradient."""
    with eval_mode(model), torch.no_grad():
        yield


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Lets a PEFT model compute as its base model; for other models it does nothing.

    Weights that are trained beside the adapter, such as biases, stay as they are.
    """
    if not hasattr(model, "disable_adapter"):
        yield
        return
    # PEFT makes the active adapters trainable when it switches them on again, those that were frozen, too.
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, flag in trained:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


@contextlib.contextmanager
def in_place_of(weights: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Puts each tensor in the place of its parameter's values, in the parameter's dtype and on its device."""
    own = [p.data for p, _ in weights]
    try:
        for p, x in weights:
            p.data = x.to(p.data)
        _forget_casts(weights)
        yield
    finally:
        for (p, _), data in zip(weights, own, strict=True):
            p.data = data
        _forget_casts(weights)


def _forget_casts(weights: Sequence[Any]) -> None:
    """Drops what an autocast around the block has made of the parameters' earlier values."""
    if weights:
        torch.clear_autocast_cache()
