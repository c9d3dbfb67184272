"""Loads the CUDA library of csrc/ by ctypes and calls it, or says why it cannot be loaded or used.

Loading needs neither a GPU nor a driver; `why_not(device)` asks both, before the first launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).parent / "_native" / "libxpo_fast_cuda.so"
HOW_TO_BUILD = (
    "install CUDA's nvcc (12.9 or later for all targets, an older one for fewer) and run `XPO_FAST_CUDA=1 pip install "
    "--force-reinstall --no-deps .` in a clone of xpo-fast"
)
# CUDA's errors: no driver or an old one, no GPU, no code for the GPU.
_INSUFFICIENT_DRIVER, _NO_DEVICE, _NO_IMAGE = 35, 100, 209

# Called before each launch with its name, the tensors it reads and those it writes: tests compare these with the waits
# between streams.
watch: Callable[[str, Sequence[Tensor], Sequence[Tensor]], None] | None = None


class Usable(ctypes.Structure):
    """XpoUsable of csrc/xpo.h."""

    _fields_ = (("driver", ctypes.c_int32), ("runtime", ctypes.c_int32), ("capability", ctypes.c_int32))


@cache
def _load(path: Path) -> ctypes.CDLL | str:
    """Returns the library, or why it cannot be loaded."""
    if not path.exists():
        return "xpo-fast was installed without it"
    try:
        found = ctypes.CDLL(str(path))
        for name in ("xpo_error", "xpo_architectures"):
            getattr(found, name).restype = ctypes.c_char_p
        found.xpo_usable.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        return f"it does not load: {error}"
    return found


def why_not(device: torch.device | None = None) -> str | None:
    """Returns why the library cannot be loaded, or used on a device if one is given, and what to do; else None."""
    found = _load(PATH)
    if isinstance(found, str):
        return f"{found}: {HOW_TO_BUILD}, or pass backend='torch'"
    if device is None:
        return None
    with _on(device):
        where = PATH, torch.cuda.current_device() if _is_gpu(device) else None
        reason = None if where in _usable else _unusable()
    if reason is None:
        _usable.add(where)
    return reason


_usable: set[tuple[Path, int | None]] = set()  # libraries, and devices known to run them


def _unusable() -> str | None:
    """Returns why the current device cannot run the kernels, or None."""
    found = Usable()
    code = library().xpo_usable(ctypes.byref(found))
    if code == 0:
        return None
    if code == _NO_DEVICE or (code == _INSUFFICIENT_DRIVER and found.driver == 0):
        return "there is no NVIDIA GPU here, or no driver for it: install NVIDIA's driver, or pass backend='torch'"
    if code == _INSUFFICIENT_DRIVER:
        return (
            f"the driver is too old: it supports CUDA {_version(found.driver)}, and the library was compiled with CUDA "
            f"{_version(found.runtime)}: update the driver, compile the library with the nvcc of CUDA "
            f"{found.driver // 1000}, or pass backend='triton'"
        )
    if code == _NO_IMAGE:
        return (
            f"it has no code for the GPU, which is sm_{found.capability}: it was compiled for "
            f"{', '.join(architectures())}; pass backend='triton'"
        )
    return f"CUDA refuses it, {library().xpo_error(code).decode()} ({code}): pass backend='triton'"


def _version(number: int) -> str:
    """Returns the name of a CUDA release: "12.9" for 12090."""
    return f"{number // 1000}.{number % 1000 // 10}"


def library() -> ctypes.CDLL:
    """Returns the library; raises RuntimeError if it cannot be loaded."""
    found = _load(PATH)
    if isinstance(found, str):
        raise RuntimeError(f"there is no CUDA library, {found}: {HOW_TO_BUILD}")
    return found


def architectures() -> tuple[str, ...]:
    """Returns the targets of the library: machine code, and compute_90 PTX that the driver compiles for newer GPUs."""
    return tuple(library().xpo_architectures().decode().split())


def check(code: int, name: str) -> None:
    """Raises RuntimeError for the code of a call, unless it is 0."""
    if code:
        raise RuntimeError(f"{name}: {library().xpo_error(code).decode()} ({code})")


def call(
    name: str,
    *arguments: object,
    device: torch.device,
    reads: Sequence[Tensor | None] = (),
    writes: Sequence[Tensor | None] = (),
) -> None:
    """Launches on a device's current stream; raises RuntimeError if that fails. reads, writes: for `watch`."""
    if watch is not None:
        watch(name, [x for x in reads if x is not None], [x for x in writes if x is not None])
    with _on(device):
        stream = torch.cuda.current_stream(device).cuda_stream if _is_gpu(device) else None
        check(getattr(library(), name)(*arguments, ctypes.c_void_p(stream)), name)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


def _on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Makes the device the current one inside, if it is a GPU."""
    return torch.cuda.device(device) if _is_gpu(device) else nullcontext()
