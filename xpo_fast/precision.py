"""Tells which dtypes a device multiplies natively; `dtype="auto"` and the head choose by it.

A CPU without instructions for bfloat16 multiplies it in a scalar loop, 5 to 70 times slower than float32 (docs/log.md).
There a model is faster in float32, in whatever dtype its checkpoint was saved, although it takes twice the memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import cache_dir, publish

HALVES = (torch.bfloat16, torch.float16)
# If only a measurement can tell, a half is native if its products take at most this multiple of float32's time.
_NATIVE_BELOW = 1.1
# Environment variables that select other instructions than the CPU's best: with them its flags do not tell what runs.
_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_DEFAULT_FPMATH_MODE")
_TOKENS, _WIDTH, _OUTPUTS = 32, 576, 1536  # of the product that is measured


@dataclass(frozen=True)
class Support:
    """Whether a device multiplies a dtype natively, and how that is known."""

    dtype: torch.dtype
    native: bool
    why: str

    def __str__(self) -> str:
        return f"{'native' if self.native else 'not native'}: {self.why}"


def support(dtype: torch.dtype, device: torch.device) -> Support:
    """Tells whether a device multiplies a dtype natively: by its instructions, or by a measurement if they do not tell.

    The measurement takes some milliseconds, once per processor, version of torch and setting: it is kept in the cache
    folder, so that all processes that share the folder get the same answer.
    """
    if dtype not in HALVES:
        return Support(dtype, True, f"every device multiplies {name_of(dtype)}")
    if device.type == "cuda":
        return _on_cuda(dtype, device)
    known = _by_instructions(dtype) if device.type == "cpu" else None
    if known is not None:
        return known
    if device.type == "meta":
        return Support(dtype, True, "nothing is computed there")
    factor = slowdown(dtype, device)
    why = f"measured: {factor:.2g} times float32's time (delete {_folder()} to measure again)"
    return Support(dtype, factor <= _NATIVE_BELOW, why)


def native(dtype: torch.dtype, device: torch.device) -> bool:
    """Tells whether a device multiplies a dtype natively."""
    return support(dtype, device).native


def tf32_step(device: torch.device) -> float:
    """Returns the relative rounding of TF32 if a device may multiply float32 numbers in it, and 0 if not."""
    return 2.0**-10 if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else 0.0


def fastest(device: torch.device | None = None) -> torch.dtype:
    """Returns the dtype in which frozen weights cost least on a device: bfloat16 if it is native there, else float32.

    float16 is never chosen: its range is too small for the activations of many models.
    """
    device = default_device() if device is None else device
    return torch.bfloat16 if native(torch.bfloat16, device) else torch.float32


def resolve(
    dtype: str | torch.dtype, saved: torch.dtype | None, device: torch.device | None = None
) -> str | torch.dtype:
    """Returns the dtype to load a checkpoint in.

    dtype: "auto", or the user's choice, which is kept, with one warning if the device is slow in it.
    saved: the checkpoint's dtype; None if its config does not tell.
    "auto" is the checkpoint's dtype if the device multiplies it natively, else float32. A float32 checkpoint is not
    narrowed: that would change its numbers.
    """
    device = default_device() if device is None else device
    if dtype != "auto":
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        warn_if_slow(wanted, device)
        return wanted
    if saved is None:
        return "auto"
    return saved if native(saved, device) else torch.float32


def widened(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Converts a model, unless quantised, to float32 in place if the device does not multiply its dtype natively."""
    device = default_device() if device is None else device
    if getattr(model, "is_quantized", False):
        return model
    slow = {p.dtype for p in model.parameters() if p.dtype in HALVES and not native(p.dtype, device)}
    return model.float() if slow else model


def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Warns, once per dtype and device, if a device does not multiply a dtype natively, and how much slower it is."""
    if dtype in HALVES and (dtype, device) not in _warned and not native(dtype, device):
        _warned.add((dtype, device))
        warnings.warn(
            f"{processor(device)} does not multiply {name_of(dtype)} natively: its products take "
            f"{slowdown(dtype, device):.2g} times as long as float32's. It is used as asked for; float32, which dtype "
            "'auto' is here, is faster and takes twice the memory",
            stacklevel=3,
        )


_warned: set[tuple[torch.dtype, torch.device]] = set()


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def default_device() -> torch.device:
    """Returns the device that training uses by default: the accelerator, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


@functools.cache
def processor(device: torch.device) -> str:
    """Returns the name of a device's model, as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
        for key, value in fields.items():
            if key.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine()


def instructions() -> str:
    """Returns the vector instructions that torch uses on this CPU, and those for products of halves that it has."""
    found = [name for name, has in _CPU_FLAGS.items() if has()]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *found])


def settings() -> dict[str, str]:
    """Returns the environment variables, with values, that hold torch to other instructions than the CPU's best."""
    return {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}


def _flag(name: str) -> bool:
    """Tells whether torch finds an instruction set on this CPU; False if this torch does not know it."""
    return bool(getattr(torch.cpu, name, lambda: False)())


_CPU_FLAGS: dict[str, Callable[[], bool]] = {
    "avx512_bf16": functools.partial(_flag, "_is_avx512_bf16_supported"),
    "amx": functools.partial(_flag, "_is_amx_tile_supported"),
    "amx_fp16": functools.partial(_flag, "_is_amx_fp16_supported"),
}
_NEEDED = {torch.bfloat16: ("avx512_bf16", "amx"), torch.float16: ("amx_fp16",)}


def _on_cuda(dtype: torch.dtype, device: torch.device) -> Support:
    if dtype == torch.float16:
        return Support(dtype, True, "every GPU that torch runs on multiplies float16")
    with torch.cuda.device(device):
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    reason = "has instructions for it" if has else "emulates it"
    return Support(dtype, has, f"{processor(device)} {reason}")


def _by_instructions(dtype: torch.dtype) -> Support | None:
    """Tells what follows from oneDNN and the CPU's flags; None if only a measurement can tell."""
    if not torch.backends.mkldnn.is_available():
        return None
    onednn: Any = torch.ops.mkldnn
    has = onednn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported
    if not has():
        held = "".join(f", held to {value} by {name}" for name, value in settings().items())
        return Support(dtype, False, f"oneDNN has no {name_of(dtype)} products for {instructions()}{held}")
    found = [name for name in _NEEDED[dtype] if _CPU_FLAGS[name]()]
    if found and not settings():
        return Support(dtype, True, f"the CPU has {', '.join(found)}")
    return None  # oneDNN may emulate them, as it does bfloat16 on CPUs that have AVX-512 alone


def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the time of a linear layer's products, forward and backward, in a dtype over the time in float32."""
    setting = "".join(f" {name}={value}" for name, value in settings().items())
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    key = f"{processor(device)} {capability}{setting} {name_of(dtype)} torch {torch.__version__}"
    return _slowdown(dtype, device, key)


@functools.cache
def _slowdown(dtype: torch.dtype, device: torch.device, key: str) -> float:
    path = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    factor = _kept(path)
    if factor is None:
        factor = _measure(dtype, device)
        content = json.dumps({"what": key, "times float32": round(factor, 3)}) + "\n"
        with suppress(OSError):  # a cache that cannot be written costs the next process the same milliseconds
            if path.exists() and _kept(path) is None:  # half a file, left by a process that was killed
                path.unlink()
            publish(path, content.encode())
            factor = _kept(path) or factor
    return factor


def _folder() -> Path:
    return cache_dir() / "precision"


def _kept(path: Any) -> float | None:
    """Returns the factor in a file of the cache; None if it is missing or broken."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["times float32"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(dtype: torch.dtype, device: torch.device) -> float:
    """Measures x Wᵀ and dy W (torch picks other code for the untransposed W), best of three, in turn in both dtypes."""
    x = torch.zeros(_TOKENS, _WIDTH, device=device)
    w = torch.zeros(_OUTPUTS, _WIDTH, device=device)
    dy = torch.zeros(_TOKENS, _OUTPUTS, device=device)
    operands = {d: (x.to(d), w.to(d), dy.to(d)) for d in (torch.float32, dtype)}
    best = dict.fromkeys(operands, float("inf"))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(4):  # the first warms up
            for d, (x, w, dy) in operands.items():
                _wait(device)
                start = time.perf_counter()
                torch.mm(x, w.T)
                torch.mm(dy, w)
                _wait(device)
                best[d] = min(best[d], time.perf_counter() - start)
    return best[dtype] / best[torch.float32]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
