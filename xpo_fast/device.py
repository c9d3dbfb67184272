"""What it takes to keep a device busy: what may be read without waiting for it, and copies that nobody waits for.

A tensor of the host is read at once. One of a device is read only after all work before it is done, and not at all while
a CUDA graph is being captured: there the work is recorded, and done later, with other values.
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
    """Whether reading x waits for nothing."""
    return x.device.type == "cpu"


def static_shapes(x: Tensor) -> bool:
    """Whether no shape may depend on the values of x, nor any decision: x is on a device whose work is being captured."""
    return not on_host(x) and capturing()


def capturing() -> bool:
    """Whether the current device's work is being captured as a CUDA graph."""
    if torch.compiler.is_compiling():  # which cannot trace the question
        return False
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, from the host by a copy that nothing waits for; x itself if it is there."""
    if x.device == device:
        return x
    if not on_host(x):
        return x.to(device)
    if torch.compiler.is_compiling():
        return x.to(device, non_blocking=True)
    if capturing():
        raise ValueError(
            f"a CUDA graph is being captured, and a tensor {tuple(x.shape)} of the call is on the CPU, where a replay "
            f"would not look again: move targets, columns and what the objective remembers to {device} before"
        )
    pinned = device.type == "cuda" and not x.requires_grad  # which pinning would cut off
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """x where it can be read. From a device this waits."""
    return x.cpu()
