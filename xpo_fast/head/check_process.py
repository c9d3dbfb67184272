"""Runs the check in a process of its own: a fault, a hang or a crash of the compiler ends only that process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from ..precision import name_of
from ..wording import one_line
from .backends import CHECK, OVERRIDE, TRITON_DTYPES
from .check import Verdict, check, triton_kernels

CHECKING = "XPO_FAST_CHECKING"  # set in the environment of the check's process, which must not start another
CHILD_S = 180.0  # enough to import torch and to compile the kernels
_PREFIX = "verdict: "  # of the line on which the process prints its verdict as JSON
# Signals that end a process for its own fault.
_FAULT_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")

# It imports from PYTHONPATH, which is this process's sys.path, and not from the folder that it happens to be started
# in.
_CODE = (
    "import sys; sys.path[:1] == [''] and sys.path.pop(0); "
    "from xpo_fast.head.check_process import main; sys.exit(main())"
)


def command(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Returns the command that checks triton on a device of this process; the child finds the device by its UUID."""
    words = ["--device", str(device), "--dtype", name_of(dtype)]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    words += ["--uuid", str(uuid)] if uuid is not None else []
    return [sys.executable, "-W", "ignore", "-c", _CODE, *words]


def check_in_child(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Returns the verdict of a child process; raises RuntimeError if this process cannot start one."""
    if os.environ.get(CHECKING):
        raise RuntimeError("this process is a check itself")
    if getattr(sys, "frozen", False) or not sys.executable:
        raise RuntimeError(
            "a program without a Python of its own cannot start a process for it: set "
            f"{OVERRIDE}=triton to use the kernels all the same, or run `{CHECK}` where xpo_fast is installed"
        )
    return in_child(command(device, dtype))


def in_child(words: Sequence[str], seconds: float = CHILD_S) -> Verdict:
    """Runs a command and returns the verdict it prints; a crash or a timeout is a failing verdict."""
    environment = {**os.environ, CHECKING: "1", "PYTHONPATH": os.pathsep.join(_import_path())}
    try:
        # In a session of its own, so that compilers that it started can be ended with it.
        child = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Verdict(False, f"its process could not be started: {one_line(error)}", lasting=False)
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"it did not end within {seconds:g} s", lasting=False)
    finally:
        _end(child)
    errors = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
    found, status = _answer(out.decode(errors="replace")), child.returncode
    if found is not None and (status == 0 or not found.ok):
        return found
    last = f": {errors[-1][:200]}" if errors else ""
    if status >= 0:
        return Verdict(False, f"its process ended with status {status}{last}", lasting=False)
    name = {x.value: x.name for x in signal.Signals}.get(-status, f"signal {-status}")
    return Verdict(False, f"its process was ended by {name}{last}", lasting=name in _FAULT_SIGNALS)


def _import_path() -> Iterator[str]:
    """The entries of sys.path that are strings, as PYTHONPATH needs; "" is the current folder, if that still exists."""
    for place in sys.path:
        if isinstance(place, str) and place:
            yield place
        elif place == "":
            with contextlib.suppress(OSError):
                yield os.getcwd()


def _answer(output: str) -> Verdict | None:
    """The last verdict that a process printed; None if there is none, or only a part of one."""
    lines = [line.removeprefix(_PREFIX) for line in output.splitlines() if line.startswith(_PREFIX)]
    try:
        return Verdict(**json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a process and those it started. One that hangs in the GPU's driver may stay behind: it is not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    if child.returncode is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=5)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks triton's kernels in this process, and prints the verdict."""
    parser = argparse.ArgumentParser(
        prog="the process of the check", description="Check triton's kernels on a device, and print the verdict."
    )
    parser.add_argument("--device", required=True)
    parser.add_argument("--uuid", help="the device's UUID, since devices may be numbered differently here")
    parser.add_argument("--dtype", required=True, choices=[name_of(x) for x in TRITON_DTYPES])
    args = parser.parse_args(argv)
    if os.environ.get(CHECKING) and hasattr(signal, "alarm"):
        signal.alarm(int(CHILD_S) + 10)  # the process that started this one may be gone by then
    try:
        device = _device(args.device, args.uuid)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, ValueError, AssertionError) as error:  # AssertionError: torch has no CUDA
        found = Verdict(False, f"its process cannot use the device: {one_line(error)}", lasting=False)
    else:
        try:
            found = check(device, getattr(torch, args.dtype), triton_kernels())
        except Exception as error:  # importing the kernels failed
            found = Verdict(False, one_line(error), lasting=False)
    print(f"{_PREFIX}{json.dumps(asdict(found))}", flush=True)
    return 0


def _device(name: str, uuid: str | None) -> torch.device:
    """The device with a UUID, since this process may number devices differently from the one that started it."""
    device = torch.device(name)
    if uuid is None:
        return device
    at = {str(torch.cuda.get_device_properties(k).uuid): k for k in range(torch.cuda.device_count())}
    if uuid not in at:
        raise ValueError(f"no device has the UUID {uuid}; there are {', '.join(at) or 'none'}")
    return torch.device("cuda", at[uuid])
