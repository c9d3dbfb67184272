"""Keeps a device busy: tells which tensors can be read without waiting for it, and copies without waiting.

A tensor on the host is read at once. Reading one on a device waits for all work before it, and is impossible while a
CUDA graph is captured: there the work is recorded, and done later, with other values.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Returns whether the package triton is installed."""
    return _HAS_TRITON


def on_host(x: Tensor) -> bool:
    """Returns whether x is on the CPU, where reading it waits for nothing."""
    return x.device.type == "cpu"


def static_shapes(x: Tensor) -> bool:
    """Returns whether no shape or branch may depend on the values of x: its device's work is being captured."""
    return not on_host(x) and capturing()


def capturing() -> bool:
    """Returns whether the current device's work is being captured as a CUDA graph."""
    if torch.compiler.is_compiling():  # it cannot trace the question
        return False
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns x on a device, copied from the host without waiting; x itself if it is there.

    Raises ValueError while a CUDA graph is captured, since replaying it would not copy x again.
    """
    if x.device == device or not on_host(x):
        return x.to(device)
    if torch.compiler.is_compiling():
        return x.to(device, non_blocking=True)
    if capturing():
        raise ValueError(
            f"a CUDA graph is being captured, and a tensor {tuple(x.shape)} of the call is on the CPU, where a replay "
            f"would not look again: move targets, columns and what the objective remembers to {device} before"
        )
    pinned = device.type == "cuda" and not x.requires_grad  # pinning would cut its graph
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """Returns x on the CPU, where it can be read; waits for the device."""
    return x.cpu()
