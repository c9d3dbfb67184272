"""Choice of the backend of a call: the one that was named, or the one that `auto` stands for on its device."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import device as devices
from . import verdict
from .backends import BACKENDS, CHECK, OVERRIDE, TRITON_DTYPES, get_backend, why_not_triton
from .verdict import Verdict

_UNKNOWN = f"triton has not been checked here yet; the first call does it, and so does `{CHECK}`"
logger = logging.getLogger("xpo_fast")


class Choice(NamedTuple):
    """A backend, and the reason why `auto` stands for it; "" if it was asked for, or is the only one."""

    backend: str
    why: str = ""


def named_backend(backend: str, device: torch.device | None = None, *, sharded: bool = False) -> str:
    """Returns the backend named by the argument or, if that is "auto", by $XPO_FAST_BACKEND; else "auto".

    The variable is ignored where it names triton or cuda and the device is no GPU, and for a vocabulary that is cut
    over ranks (`sharded`). Raises ValueError for a backend that does not exist.
    """
    if backend != "auto":
        return get_backend(backend).name
    named = _override()
    if named not in ("", "auto", *BACKENDS):
        raise ValueError(f"{OVERRIDE} names no backend: {named!r}; there are auto, {', '.join(BACKENDS)}")
    if named in ("", "auto") or sharded:
        return "auto"
    on_gpu = device is None or device.type == "cuda"
    return named if on_gpu or not get_backend(named).kernels else "auto"


@torch.compiler.assume_constant_result
def _override() -> str:
    return os.environ.get(OVERRIDE, "")


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, *, sharded: bool = False) -> str:
    """Returns the name of the backend to use for operands of a dtype on a device: see `choice`."""
    return choice(backend, device, dtype, sharded=sharded).backend


def choice(
    backend: str, device: torch.device, dtype: torch.dtype, *, sharded: bool = False, run: bool = True
) -> Choice:
    """Returns the backend to use: `auto` is triton on a GPU where it passed its check (head/verdict.py), else torch.

    The first call for a device and dtype may run the check. With run=False, while a CUDA graph is captured and while
    torch.compile traces, only a recorded verdict is read. sharded: the vocabulary is cut over ranks. Raises ValueError
    for a backend that does not exist.
    """
    named = named_backend(backend, device, sharded=sharded)
    if named != "auto":
        return Choice(named, f"{OVERRIDE} is {named}" if backend == "auto" else "")
    if device.type != "cuda":
        return Choice("torch")
    if sharded:
        return Choice("torch", "auto is torch: a vocabulary that is cut over ranks takes no other")
    if dtype not in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return Choice("torch", f"auto is torch: triton has no kernels for {name}")
    if torch.compiler.is_compiling() or devices.capturing():
        return Choice(*_recorded_choice(device, dtype))
    return _choice_on(device, dtype, verdict.verdict if run else verdict.recorded)


@torch.compiler.assume_constant_result
def _recorded_choice(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Returns the choice by recorded verdicts alone; torch.compile calls this function and does not trace it."""
    found = _choice_on(device, dtype, verdict.recorded)
    if found.why.endswith(_UNKNOWN):
        _log_once(f"{found.why}; call once before compiling or capturing")
    return found.backend, found.why


@functools.cache
def _log_once(text: str) -> None:
    """Logs a line once per process; not by `warnings`, which some users turn into errors."""
    logger.warning(text)


def _choice_on(
    device: torch.device, dtype: torch.dtype, get_verdict: Callable[[torch.device, torch.dtype], Verdict | None]
) -> Choice:
    """Returns the choice on a GPU, by the verdict that `get_verdict` returns; None if there is none yet."""
    reason = why_not_triton(device)
    if reason is not None:
        return Choice("torch", f"auto is torch: {reason}")
    found = get_verdict(device, dtype)
    if found is None:
        return Choice("torch", f"auto is torch: {_UNKNOWN}")
    if found.ok:
        return Choice("triton", f"auto is triton, which passed its check on {torch.cuda.get_device_name(device)}")
    return Choice("torch", f"auto is torch: triton {found}")
