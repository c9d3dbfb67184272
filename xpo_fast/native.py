"""The CUDA library of csrc/: loaded by ctypes where it was built, and otherwise the reason why it is not there.

Loading needs neither a GPU nor a driver; a launch without them is a RuntimeError that names the call.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).parent / "_native" / "libxpo_fast_cuda.so"
HOW_TO_BUILD = (
    "install CUDA's nvcc (12.9 or later) and run `XPO_FAST_CUDA=1 pip install --force-reinstall --no-deps .` in a clone "
    "of xpo-fast"
)


@cache
def _load(path: Path) -> ctypes.CDLL | str:
    """The library, or why it cannot be had."""
    if not path.exists():
        return "xpo-fast was installed without it"
    try:
        found = ctypes.CDLL(str(path))
        for name in ("xpo_error", "xpo_architectures"):
            getattr(found, name).restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"it does not load: {error}"
    return found


def why_not() -> str | None:
    """Why the library cannot be had; None if it can."""
    found = _load(PATH)
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    found = _load(PATH)
    if isinstance(found, str):
        raise RuntimeError(f"there is no CUDA library, {found}: {HOW_TO_BUILD}")
    return found


def architectures() -> tuple[str, ...]:
    """What the library was compiled for; the last is PTX, which the driver compiles for what is newer."""
    return tuple(library().xpo_architectures().decode().split())


def check(code: int, name: str) -> None:
    """RuntimeError for the code that a call has returned, but for 0."""
    if code:
        raise RuntimeError(f"{name}: {library().xpo_error(code).decode()} ({code})")


def call(name: str, *arguments: object, device: torch.device) -> None:
    """A launch of the library on a device's current stream; RuntimeError if it fails."""
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else None
        check(getattr(library(), name)(*arguments, ctypes.c_void_p(stream)), name)
