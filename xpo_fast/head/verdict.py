"""Whether triton's kernels are right on a GPU: the verdict that `auto` asks for, and where it is kept.

A combination of GPU and Triton version on which nobody has seen the check pass (`SEEN`) is checked in a process of its
own first. The verdict is kept in $XPO_FAST_CACHE/verdicts.json (~/.cache/xpo_fast), by device, driver, versions, source
of the checked code, and tuned launches of the device. Asking for a verdict never raises: any error on the way becomes a
verdict that says that triton could not be checked.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..precision import name_of
from ..store import TUNING, Store, locked
from ..wording import one_line
from .backends import CHECK, OVERRIDE, TRITON_DTYPES
from .check import Verdict, check, triton_kernels
from .check_process import CHILD_S, check_in_child

# (compute capability, minor version of Triton) on which the check has been seen to pass: no process of its own is
# needed.
SEEN: frozenset[tuple[str, str]] = frozenset()
STORE = Store("verdicts.json", version=2)
ADOPTED_S = 300.0  # for how long other processes, such as the ranks of a run, adopt a verdict that is not lasting

logger = logging.getLogger("xpo_fast")

_known: dict[tuple[int, torch.dtype], Verdict] = {}
_lock = threading.Lock()


def verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Returns whether triton is right on a GPU for operands of a dtype: as known, as recorded, or by a check now.

    The first failure that a process learns of is a warning. Callers in other threads wait for the one that checks.
    """
    key = _key(device, dtype)
    found = _known.get(key)
    if found is not None:
        return found
    with _lock:
        found = _known.get(key)
        if found is not None:
            return found
        found = _known[key] = _determine(torch.device(device.type, key[0]), dtype)
    if not found.ok:
        again = "" if found.lasting else f", and so does a process that starts {ADOPTED_S / 60:g} minutes later"
        warnings.warn(
            f"triton {found}: its kernels for {name_of(dtype)} on {describe(device)}. The torch backend computes "
            f"instead: as right, but slower. `{CHECK}` repeats the check{again}, {OVERRIDE}=triton uses the kernels "
            f"all the same, and {OVERRIDE}=torch goes without them and without this warning",
            stacklevel=2,
        )
    return found


def recorded(device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """Returns the verdict that this process knows or that is recorded, else None; runs nothing."""
    found = _known.get(_key(device, dtype))
    if found is not None:
        return found
    try:
        return _read(entry(device, dtype))
    except Exception as error:
        return Verdict(False, one_line(error), lasting=False)


def repeat(devices: Iterable[torch.device]) -> Iterator[tuple[torch.device, torch.dtype, Verdict]]:
    """Checks every device and dtype again, each in a process of its own, records the verdicts and yields them.

    Devices of the same name share a verdict: it is a failure if one of them fails, and one that cannot be checked does
    not change it.
    """
    failed: set[str] = set()
    for device in devices:
        for dtype in TRITON_DTYPES:
            try:
                found, name = check_in_child(device, dtype), entry(device, dtype)
                if name not in failed:
                    _write(name, found)
                if not found.ok and found.lasting:
                    failed.add(name)
            except Exception as error:  # the other devices can still be checked
                found = Verdict(False, one_line(error), lasting=False)
            _known[_key(device, dtype)] = found
            yield device, dtype, found


def forget() -> None:
    """Discards what this process knows; the recorded verdicts stay."""
    _known.clear()


def _key(device: torch.device, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    index = device.index
    return (torch.cuda.current_device() if index is None else index), dtype


def _determine(device: torch.device, dtype: torch.dtype) -> Verdict:
    """A verdict in any case: an exception becomes one that says that triton could not be checked."""
    try:
        return _read_or_check(device, dtype)
    except Exception as error:
        return Verdict(False, one_line(error), lasting=False)


def _read_or_check(device: torch.device, dtype: torch.dtype) -> Verdict:
    name = entry(device, dtype)
    found = _read(name)
    if found is not None:
        return found
    if (_capability(device), _minor(triton_version())) in SEEN:
        found = check(device, dtype, triton_kernels())
        _write(name, found)
        return found
    # One process per machine checks, and the others read its verdict. If it dies its lock is released, and another
    # starts.
    with locked("verdicts.check", 2 * CHILD_S):
        found = _read(name)
        if found is None:
            logger.warning(
                "checking triton's kernels for %s on %s, in a process of its own, which takes up to a minute, once",
                name_of(dtype),
                describe(device),
            )
            found = check_in_child(device, dtype)
            _write(name, found)
    return found


def entry(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the name under which a verdict is recorded: everything it depends on."""
    cuda = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{describe(device)}, {cuda} | {name_of(dtype)} | {_sources()} | {_tuned(device)}"


def describe(device: torch.device) -> str:
    """Returns the device, its driver, and the versions of torch and Triton."""
    return (
        f"{device_name(device)} ({_capability(device)}), driver {_driver()}, torch {torch.__version__}, Triton "
        f"{triton_version()}"
    )


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, under which its tuned launches are kept too."""
    return torch.cuda.get_device_name(device)


def _capability(device: torch.device) -> str:
    if torch.version.hip:
        return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", "gfx")).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _driver() -> str:
    """The version of the kernel module, or that of the driver's interface if the system does not tell."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            found = re.search(r"\d+\.\d+(\.\d+)*", Path(path).read_text())
            if found:
                return found[0]
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "unknown" if ask is None else str(ask())


def triton_version() -> str:
    """Returns the installed version without importing triton, which may fail; "?" if it is not known."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "?"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@functools.cache
def _sources() -> str:
    """A hash of the source of the kernels, of the loops around them, and of the check."""
    spec = importlib.util.find_spec("xpo_fast.kernels")
    assert spec is not None and spec.submodule_search_locations is not None
    kernels = sorted(p for place in spec.submodule_search_locations for p in Path(place).glob("*.py"))
    names = (
        *("check", "chunked", "dense", "gemms", "operands", "row_operations"),
        *("rows", "spec", "streams", "tiling", "triton"),
    )
    digest = hashlib.sha256()
    for path in (*kernels, *(Path(__file__).with_name(f"{name}.py") for name in names)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _tuned(device: torch.device) -> str:
    """A hash of all tuned launches of a device; "" if there are none."""
    try:
        entries = TUNING.read()
    except (OSError, ValueError):  # the launchers then use defaults too
        entries = {}
    own = sorted((k, v) for k, v in entries.items() if k.startswith(f"{device_name(device)} | "))
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16] if own else ""


def _entries() -> Mapping[str, Any]:
    """All entries; none if the file cannot be read, since a check costs little to repeat."""
    try:
        return STORE.read()
    except (OSError, ValueError) as error:
        logger.info("%s cannot be read (%s): what is written there is found out again", STORE.name, error)
        return {}


def _read(name: str) -> Verdict | None:
    found = _entries().get(name)
    if not isinstance(found, dict) or not isinstance(found.get("ok"), bool):
        return None
    lasting, at = "at" not in found, found.get("at")
    if not lasting and not (isinstance(at, (int, float)) and 0 <= time.time() - at < ADOPTED_S):
        return None
    return Verdict(found["ok"], str(found.get("reason", "")), lasting)


def _write(name: str, found: Verdict) -> None:
    """Records a verdict, but never one that is not lasting in place of one that is."""
    value = {"ok": found.ok, "reason": found.reason}
    if not found.lasting:
        before = _read(name)
        if before is not None and before.lasting:
            return
        value["at"] = time.time()
    try:
        STORE.add({name: value})
    except OSError as error:
        logger.info("the verdict of the check is not kept: %s", error)
