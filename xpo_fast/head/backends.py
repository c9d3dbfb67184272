"""The table of backends: name, devices, row operations and kernels of each. One line adds a backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .. import native
from ..device import has_triton
from ..wording import did_you_mean
from .gemms import Gemms
from .row_operations import MakeRowOperations, RowOperations
from .vocab_parallel import VocabParallelRows, VocabShard

OVERRIDE = "XPO_FAST_BACKEND"
CHECK = "xpo-fast doctor --check"
# The dtypes for which triton's kernels have GEMMs.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _runs_anywhere(device: torch.device) -> str | None:
    return None


def _triton_error(device: torch.device) -> str | None:
    if not has_triton():
        return "the triton backend needs the package triton: install it, or pass backend='torch'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the triton backend runs on GPUs, got operands on {device.type}: move them, or pass backend='torch' "
            "(to try the kernels in Triton's interpreter, set TRITON_INTERPRET=1 before anything imports triton)"
        )
    return None


def why_not_triton(device: torch.device) -> str | None:
    """Returns why triton's kernels cannot be launched on a GPU, or None if nothing known before a launch forbids it."""
    if not has_triton():
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is 1, and kernels would be interpreted"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"triton's products need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def _triton_rows(gemms: Gemms, ref_gemms: Gemms | None = None) -> RowOperations:
    from .triton import row_operations  # imports the package triton

    return row_operations(gemms, ref_gemms)


def _cuda_error(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the cuda backend runs on NVIDIA GPUs, and this torch is for ROCm: pass backend='triton'"
    if (reason := _no_gpu(device)) is not None:
        return reason
    # torch.compile cannot trace the loading of a library; there the operator reports a missing one.
    reason = None if torch.compiler.is_compiling() else native.why_not(device)
    return None if reason is None else f"the cuda backend cannot use the library of csrc/, {reason}"


def _no_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "the cuda backend needs an NVIDIA GPU, and torch sees none: pass backend='torch'"
    if device.type != "cuda":
        return f"the cuda backend runs on GPUs, got operands on {device.type}: move them, or pass backend='torch'"
    return None


def _cuda_rows(gemms: Gemms, ref_gemms: Gemms | None = None) -> RowOperations:
    from .cuda import row_operations

    return row_operations(gemms, ref_gemms)


@dataclass(frozen=True)
class Backend:
    """An implementation of the work between the GEMMs: from the products h Wᵀ to statistics and ∂L/∂(product).

    rows: makes the row operations of a head; None for `dense`, which keeps all logits and has no tiles.
    why_not: returns the reason why the backend cannot run on a device, or None if it can.
    kernels: the row operations are GPU kernels, which write dz into a buffer separate from the products.
    gather_kernel: there is a kernel for `gather_logps`.
    loss_kernels: there are kernels for the losses of whole units (objective/segments.py).
    """

    name: str
    rows: MakeRowOperations | None
    why_not: Callable[[torch.device], str | None] = _runs_anywhere
    kernels: bool = False
    gather_kernel: bool = False
    loss_kernels: bool = False


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("dense", None),
        Backend("torch", RowOperations),
        Backend("triton", _triton_rows, _triton_error, kernels=True, gather_kernel=True),
        Backend("cuda", _cuda_rows, _cuda_error, kernels=True, loss_kernels=True),
    )
}
BACKENDS = tuple(_BACKENDS)


def get_backend(name: str) -> Backend:
    """Returns the backend of that name. Raises ValueError if there is none."""
    if name not in _BACKENDS:
        raise ValueError(
            f"no backend named {name!r}; there are auto, {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}"
        )
    return _BACKENDS[name]


def check_backend(name: str, device: torch.device) -> None:
    """Raises ValueError, with the reason, if the backend cannot run on the device."""
    reason = get_backend(name).why_not(device)
    if reason is not None:
        raise ValueError(reason)


def row_operations(name: str, shard: VocabShard | None = None) -> MakeRowOperations:
    """Returns the factory of a backend's row operations; with a shard, that of the vocabulary-parallel ones."""
    if shard is not None:
        return partial(VocabParallelRows, shard)
    rows = get_backend(name).rows
    assert rows is not None, f"{name} has no tiles"
    return rows
