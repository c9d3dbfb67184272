"""Contexts in which a model is scored: eval mode without gradient, and a PEFT model with its adapter switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode (no dropout) and switches gradients off; then restores each module's mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def without_adapter(model: Any) -> contextlib.AbstractContextManager:
    """Returns the context in which a PEFT model computes as its base model; for other models it does nothing."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
