"""The `cuda` backend's losses: from token log-probs to the loss, its metrics and ∂loss/∂logp in one launch (csrc/segments.cu).

The pure functions of methods/ are the definition, which tests hold the kernels to. `supports` says which of them there is
a kernel for; whoever asks calls the pure function where it says why not.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..methods import Method, get_method

# What a library is called with, and has a kernel for; tests add to both.
DEVICES = {"cuda"}
SUFFIXES = {torch.float32: ""}

# --- the structs of csrc/segments.h -----------------------------------------------------------------------------------

_INT, _REAL, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _fields(**kinds: str) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in _KINDS.items() for name in kinds.get(kind, "").split()]


_KINDS = {"ints": _INT, "reals": _REAL, "pointers": _POINTER}


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("tokens", "start", "units")),
        *((name, _POINTER) for name in ("logp", "offsets", "weights", "denominator")),
        ("scale", _REAL),
        *((name, _POINTER) for name in ("u", "sums", "values", "loss", "means", "counts", "ticket")),
    ]
