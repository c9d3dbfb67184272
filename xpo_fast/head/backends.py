"""The backends: what each is called, where it runs, and what works on the rows of its products. One line adds one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .. import native
from ..device import has_triton
from .gemms import Gemms
from .row_operations import MakeRowOperations, RowOperations
from .vocab_parallel import VocabParallelRows, VocabShard

OVERRIDE = "XPO_FAST_BACKEND"
CHECK = "xpo-fast doctor --check"
# What the kernels of triton have GEMMs for.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _anywhere(device: torch.device) -> str | None:
    return None


def _triton_why_not(device: torch.device) -> str | None:
    if not has_triton():
        return "the triton backend needs the package triton: install it, or pass backend='torch'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the triton backend runs on GPUs, got operands on {device.type}: move them, or pass backend='torch' "
            "(to try the kernels in Triton's interpreter, set TRITON_INTERPRET=1 before anything imports triton)"
        )
    return None


def why_not_triton(device: torch.device) -> str | None:
    """Returns why triton's kernels cannot be launched on a GPU; None if they can, as far as can be told without doing it."""
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


def _cuda_why_not(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the cuda backend runs on NVIDIA GPUs, and this torch is for ROCm: pass backend='triton'"
    if (reason := _no_gpu(device)) is not None:
        return reason
    # torch.compile cannot trace the loading of a library: there the operator reports that it is missing.
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
    """How the rows of products are worked on.

    rows: makes the row operations of a head; None for `dense`, which keeps all logits and has no tiles.
    why_not: returns why it cannot run on a device, None if it can.
    kernels: the rows are worked on by kernels of a GPU, which write dz into memory of its own.
    gathers: it has a kernel for `gather_logps`. joins_losses: it has kernels for the losses of whole units (segments.py).
    """

    name: str
    rows: MakeRowOperations | None
    why_not: Callable[[torch.device], str | None] = _anywhere
    kernels: bool = False
    gathers: bool = False
    joins_losses: bool = False


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("dense", None),
        Backend("torch", RowOperations),
        Backend("triton", _triton_rows, _triton_why_not, kernels=True, gathers=True),
        Backend("cuda", _cuda_rows, _cuda_why_not, kernels=True, joins_losses=True),
    )
}
BACKENDS = tuple(_BACKENDS)


def get_backend(name: str) -> Backend:
    """Returns the backend of a name; ValueError if there is none."""
    if name not in _BACKENDS:
        raise ValueError(f"no backend named {name!r}; there are auto, {', '.join(BACKENDS)}")
    return _BACKENDS[name]


def check_backend(name: str, device: torch.device) -> None:
    """Raises ValueError if a backend cannot run on a device."""
    reason = get_backend(name).why_not(device)
    if reason is not None:
        raise ValueError(reason)


def row_operations(name: str, shard: VocabShard | None = None) -> MakeRowOperations:
    """Returns what makes the row operations of a backend, or those of a vocabulary cut over ranks."""
    if shard is not None:
        return partial(VocabParallelRows, shard)
    rows = get_backend(name).rows
    assert rows is not None, f"{name} has no tiles"
    return rows
