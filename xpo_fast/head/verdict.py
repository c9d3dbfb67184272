"""Whether triton's kernels are right on the GPU at hand: the check that stands before `auto`, and what is remembered of it.

The check runs small problems against float64 on the device, twice. A combination of GPU and Triton that nobody has seen it
pass on (`SEEN`) is tried in a process of its own first, `main`, so that an illegal access, a hang or a crash of the compiler
ends that process and no other. The verdict is kept in $XPO_FAST_CACHE/verdicts.json (~/.cache/xpo_fast), by device, driver,
versions, the source of what was checked and what tuning has chosen for the device. To look for one never raises: whatever goes
wrong on the way is a verdict too, one that says that triton could not be checked.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..device import to_device
from ..store import Store, locked
from ..wording import one_line
from . import chunked, dense
from .backends import CHECK, OVERRIDE, TRITON_DTYPES, row_operations
from .operands import Operands, Reference
from .rows import Group
from .spec import Scaling
from .tiling import Tiling

# (compute capability, Triton's minor version) on which the check has been seen to pass: these need no process of their own.
SEEN: frozenset[tuple[str, str]] = frozenset()
CHECKING = "XPO_FAST_CHECKING"  # in the environment of the process of the check's own, which starts no other
STORE = Store("verdicts.json", version=2)
TUNING = Store("tuning.json", version=1)  # kernels/tuning.py's, which imports triton
CHILD_S = 180.0  # to import torch, to compile the kernels
ADOPTED_S = 300.0  # for how long what is not lasting holds for other processes: the ranks of a run
LOGP_ALLOWED = 5e-4  # |Δ|, nats; tensor cores add by cutting off
GRADIENT_ALLOWED = 2.0**-7  # ‖Δ‖ / ‖g‖
_SAYS = "verdict: "  # before the JSON that the process of its own prints
# What only the kernels themselves can be to blame for: what the device reports of them, and how a process ends.
_FAULTS = ("illegal memory access", "launch failure", "misaligned address")
_FAULT_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")

logger = logging.getLogger("xpo_fast")


@dataclass(frozen=True)
class Verdict:
    """lasting: of the kernels themselves, wrong results or a fault; not of a reason that may be gone by the next time, such as
    a GPU that others fill, no compiler or a full disk, which says nothing of the kernels.
    """

    ok: bool
    reason: str = ""
    lasting: bool = True

    def __str__(self) -> str:
        if self.ok:
            return "passed its check"
        return f"failed its check ({self.reason})" if self.lasting else f"could not be checked ({self.reason})"


# --- the check -------------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """What is checked: `forward`, `backward` and `unit_gradients` of chunked.py with a backend's row operations, and what
    else `auto` launches, if there is any.
    """

    loops: Any
    gather: Any = None  # `forward` and `write_gradient` of kernels/gather.py
    top_k: Callable[..., tuple[Tensor, Tensor]] | None = None  # `run` of kernels/topk.py


def triton_kernels() -> Contender:
    """Return what `auto` would launch."""
    from ..kernels import gather, topk  # pyright: ignore[reportMissingImports]

    functions = (chunked.forward, chunked.backward, chunked.unit_gradients)
    loops = SimpleNamespace(**{f.__name__: partial(f, operations=row_operations("triton")) for f in functions})
    return Contender(loops, gather, topk.run)


class Measure(NamedTuple):
    """How far something is off, (), on the device; NaN where a result has one."""

    what: str
    off: Tensor
    allowed: float


_EMPTY = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


class _Poisoned(TorchDispatchMode):
    """Memory that is handed out holds NaN, so that what is not written shows; in this thread, where no flag does it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY:
            out.fill_(math.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)
        return out


SCORED, IGNORED, WIDTH, IGNORE, TOP_K, TEMPERATURE = 40, 3, 64, -100, 5, 0.7
# Rows that are not aligned, and rows that are.
VOCABULARIES = (1031, 4160)
# Several tiles, several steps in each and both lanes; and one tile, whose dW is made in the dtype of the operands.
TILINGS = (Tiling(16, 4, lanes=2), Tiling(64, 4, lanes=2))
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logit", "top1")
DIVERGENCES = ("kl", "reverse_kl")
# Rows in which the last token stands out by some 20, 60 and 100 above all others, the target too: a kernel that reads a row
# once, and that took a first block for the whole, has to read it again. More than 88 is more than float32 has exponents for.
STANDING_OUT = {1: 4.0, 2: 9.5, 3: 14.0}


class Problem:
    """Hidden states, a head and targets, what is right in float64, and how far a contender is off.

    Operands are bfloat16's values in any dtype, which TF32 multiplies exactly: the user's setting changes nothing.
    """

    def __init__(self, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(vocab)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
            return (x * std).to(torch.bfloat16).to(dtype)

        count = SCORED + IGNORED
        # With everything that can be done to logits, and with nothing.
        everything = vocab % 2 == 1
        self.vocab = vocab
        self.scaling = Scaling(temperature=0.5, softcap=80.0, logit_scale=1.25) if everything else Scaling()
        self.weight = normal(vocab, WIDTH, std=3 / WIDTH**0.5)
        self.bias = normal(vocab) if everything else None
        self.hidden, self.u = normal(count, WIDTH), normal(count).float()
        self.ref = Reference(normal(count, WIDTH), normal(vocab, WIDTH, std=1 / WIDTH**0.5)) if everything else None
        # One column has nothing but what stands out: the last, before which sums, and what is cut off of them, are small.
        self.weight[:, -1], self.hidden[:, -1] = 0, 0
        self.weight[-1, -1] = 8
        for row, x in STANDING_OUT.items():
            self.hidden[row, -1] = x
        # On the host, where reading them waits for nothing: ignored ones first, in between and last.
        targets = (torch.arange(count) * 97) % vocab
        targets[[0, count // 2, count - 1]] = IGNORE
        self.targets = targets
        self.at = to_device((targets != IGNORE).nonzero().squeeze(1), device)
        self.y = to_device(targets, device)[self.at]
        self.hidden.masked_fill_(to_device(targets == IGNORE, device).unsqueeze(1), math.nan)  # nobody may read it

    def run(self, contender: Contender) -> dict[str, Tensor]:
        """Return what a contender computes, by name."""
        found: dict[str, Tensor] = {}
        alone = Operands(self.hidden, self.weight, self.targets, self.bias, scaling=self.scaling, ignore_index=IGNORE)
        needs, tiling, loops = (True, True, self.bias is not None, False), TILINGS[0], contender.loops
        found["logp"], found["lse"], _, found["dlogp"] = loops.forward(alone, (), tiling, True)
        _, _, extra, _ = loops.forward(alone, STATISTICS, tiling, False)
        found.update(zip(STATISTICS, extra, strict=True))
        u, v = {"logp": self.u, "entropy": self.u}, {"entropy": found["entropy"]}
        found.update(self._named("backward", loops.backward(alone, tiling, u, v, needs)))
        if self.ref is not None:
            both = replace(alone, ref=self.ref)
            _, _, extra, _ = loops.forward(both, DIVERGENCES, tiling, False)
            found.update(zip(DIVERGENCES, extra, strict=True))
            u, v = dict.fromkeys(DIVERGENCES, self.u), {"reverse_kl": found["reverse_kl"]}
            found.update(self._named("divergences", loops.backward(both, tiling, u, v, needs)))
        for tiling in TILINGS:
            # The first group is longer than the smaller tile: its tiles but the last are made again.
            first = SCORED * 3 // 5
            groups = [Group(self.at[:first], (0,), 0), Group(self.at[first:], (1,), first)]
            name = f"units by {tiling.tile}"
            logp, grads = loops.unit_gradients(
                alone,
                groups if tiling.tile < SCORED else [Group(self.at, (0, 1), 0)],
                tiling,
                lambda logp, group: self.u[group.positions] * (logp / 8).exp(),
                needs,
            )
            found[f"{name}: logp"] = logp
            found.update(self._named(name, grads))
        if contender.gather is not None:
            z, y = self._logits_given(), to_device(self.targets, self.hidden.device)
            found["gather: logp"], normaliser = contender.gather.forward(z, y, TEMPERATURE, IGNORE)
            found["gather: dz"] = out = torch.empty_like(z)
            contender.gather.write_gradient(z, y, normaliser, self.u, TEMPERATURE, IGNORE, out)
        if contender.top_k is not None:
            products = self._products().float()
            bias = None if self.bias is None else self.bias.float()
            values, tokens = contender.top_k(products, self.y, TOP_K, bias=bias, **asdict(self.scaling))
            found |= {"top k: logits": values, "top k: tokens": tokens}
        return found

    def right(self, contender: Contender) -> dict[str, Tensor]:
        """Return what is right, in float64, of the names that `run` gives."""
        with torch.enable_grad():
            leaves = [
                None if x is None else x.double().requires_grad_()
                for x in (self.hidden[self.at], self.weight, self.bias)
            ]
            h, weight, bias = leaves
            assert h is not None and weight is not None
            z = dense.logits(h, weight, bias, self.scaling)
            logprobs = z.log_softmax(dim=1)
            probs, logp = logprobs.exp(), logprobs.gather(1, self.y.unsqueeze(1)).squeeze(1)
            entropy = -(probs * logprobs).sum(dim=1)
            u = self.u[self.at].double()

            def gradients(loss: Tensor) -> list[Tensor]:
                wanted = [x for x in leaves if x is not None]
                grads = list(torch.autograd.grad(loss, wanted, retain_graph=True))
                return [self._spread(grads[0]), *grads[1:]]

            found = {"logp": self._spread(logp), "lse": self._spread(z.logsumexp(dim=1))}
            (found["dlogp"], *_) = gradients(logp.sum())
            found |= {
                "entropy": self._spread(entropy),
                "log_sum_sq_probs": self._spread((2 * logprobs).logsumexp(dim=1)),
                "mean_logit": self._spread(z.mean(dim=1)),
                "top1": self._spread((z.gather(1, self.y.unsqueeze(1)).squeeze(1) >= z.amax(dim=1)).double()),
            }
            found |= self._named("backward", gradients((u * (logp + entropy)).sum()))
            if self.ref is not None:
                ref_hidden, ref_weight, _ = self.ref
                z_ref = dense.logits(ref_hidden[self.at].double(), ref_weight.double(), None, self.scaling)
                log_ratio = z_ref.log_softmax(dim=1) - logprobs
                kl, reverse = (z_ref.softmax(dim=1) * log_ratio).sum(dim=1), -(probs * log_ratio).sum(dim=1)
                found |= {"kl": self._spread(kl), "reverse_kl": self._spread(reverse)}
                found |= self._named("divergences", gradients((u * (kl + reverse)).sum()))
            of_units = gradients((u * 8 * (logp / 8).exp()).sum())
        for tiling in TILINGS:
            name = f"units by {tiling.tile}"
            found |= {f"{name}: logp": found["logp"], **self._named(name, of_units)}
        if contender.gather is not None:
            scaled = self._logits_given().double()[self.at] / TEMPERATURE
            logprobs = scaled.log_softmax(dim=1)
            found["gather: logp"] = self._spread(logprobs.gather(1, self.y.unsqueeze(1)).squeeze(1))
            ones = torch.zeros_like(logprobs).scatter_(1, self.y.unsqueeze(1), 1.0)
            found["gather: dz"] = self._spread((ones - logprobs.exp()) * (u / TEMPERATURE).unsqueeze(1))
        if contender.top_k is not None:
            others = z.detach().scatter(1, self.y.unsqueeze(1), -math.inf)
            found["top k: logits"], found["top k: tokens"] = others.topk(TOP_K, dim=1)
        return {name: x.detach() for name, x in found.items()}

    def measures(self, contender: Contender) -> Iterator[Measure]:
        """Yield how far each result of two runs is off, and in how many elements they differ where kernels alone made it.

        What a GEMM has made may differ: its library may split a sum as it likes.
        """
        with _Poisoned():
            first, second = self.run(contender), self.run(contender)
        right = self.right(contender)
        for name, x in first.items():
            want, where = right[name], f"{name}, V {self.vocab}"
            of_gemm = name.rpartition(": ")[2] in ("dlogp", "hidden", "weight", "bias")
            off = torch.stack([x, second[name]] if of_gemm else [x]).double() - want
            if "tokens" in name or name == "top1":
                yield Measure(where, off.ne(0).sum().double(), 0)
            elif of_gemm or name.endswith("dz"):
                yield Measure(f"∂ {where}", off.flatten(1).norm(dim=1).amax() / want.norm(), GRADIENT_ALLOWED)
            else:
                yield Measure(where, off.abs().amax(), LOGP_ALLOWED)
            if not of_gemm:
                yield Measure(f"elements that change from run to run of {where}", x.ne(second[name]).sum().double(), 0)

    @staticmethod
    def _named(name: str, grads: Iterable[Tensor | None]) -> dict[str, Tensor]:
        return {f"{name}: {of}": g for of, g in zip(("hidden", "weight", "bias"), grads, strict=False) if g is not None}

    def _products(self) -> Tensor:
        """h Wᵀ (n, V) of the scored positions, float64."""
        return self.hidden[self.at].double() @ self.weight.double().T

    def _logits_given(self) -> Tensor:
        """Logits (N, V) in the dtype of the operands, for what is given logits."""
        return self._spread(self._products()).to(self.hidden.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        """x (n, …) at the scored positions of (N, …), 0 elsewhere."""
        return x.new_zeros((self.targets.shape[0], *x.shape[1:])).index_copy(0, self.at, x)


def check(device: torch.device, dtype: torch.dtype, contender: Contender) -> Verdict:
    """Return whether a contender is right on a device, for operands of a dtype; an exception, whatever it is, is a failure.

    In a thread of its own: there autocast, inference mode, modes that intercept operators and the current stream are
    torch's defaults, and what the caller set stays. The device is waited for once.
    """
    try:
        with ThreadPoolExecutor(1) as pool:
            measures = pool.submit(_measured, device, dtype, contender).result()
    # The compiler's, the launcher's, the device's: all of them mean that the kernels do not run.
    except Exception as error:
        return Verdict(False, one_line(error), lasting=any(x in str(error).lower() for x in _FAULTS))
    wrong = [
        f"{what}: {'not finite' if not math.isfinite(off) else f'{off:.2g}'} (allowed {allowed:.2g})"
        for what, off, allowed in measures
        if not off <= allowed
    ]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Verdict(not wrong, f"off by {'; '.join(wrong[:3])}{more}" if wrong else "")


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype, contender: Contender) -> list[tuple[str, float, float]]:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        measures = [m for vocab in VOCABULARIES for m in Problem(vocab, dtype, device).measures(contender)]
        found = torch.stack([m.off for m in measures]).tolist()
    return [(m.what, off, m.allowed) for m, off in zip(measures, found, strict=True)]


# --- in a process of its own -----------------------------------------------------------------------------------------

# It imports what this process would, from PYTHONPATH: not what lies in the folder that it happens to be started in.
_CODE = "import sys; sys.path[:1] == [''] and sys.path.pop(0); from xpo_fast.head.verdict import main; sys.exit(main())"


def command(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the command that checks triton on a device of this process, which is found again by its UUID."""
    words = ["--device", str(device), "--dtype", _name(dtype)]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    words += ["--uuid", str(uuid)] if uuid is not None else []
    return [sys.executable, "-W", "ignore", "-c", _CODE, *words]


def tried(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Return the verdict of a process of its own; RuntimeError where this one cannot have one."""
    if os.environ.get(CHECKING):
        raise RuntimeError("this process is a check itself")
    if getattr(sys, "frozen", False) or not sys.executable:
        raise RuntimeError(
            "a program without a Python of its own cannot start a process for it: set "
            f"{OVERRIDE}=triton to use the kernels all the same, or run `{CHECK}` where xpo_fast is installed"
        )
    return in_child(command(device, dtype))


def in_child(words: Sequence[str], seconds: float = CHILD_S) -> Verdict:
    """Return the verdict of a process that runs a command; what ends it, or its not ending, is one too."""
    environment = {**os.environ, CHECKING: "1", "PYTHONPATH": os.pathsep.join(_import_path())}
    try:
        # A session of its own, so that compilers that it started end with it.
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
    said = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
    found, status = _answer(out.decode(errors="replace")), child.returncode
    if found is not None and (status == 0 or not found.ok):
        return found
    last = f": {said[-1][:200]}" if said else ""
    if status >= 0:
        return Verdict(False, f"its process ended with status {status}{last}", lasting=False)
    name = {x.value: x.name for x in signal.Signals}.get(-status, f"signal {-status}")
    return Verdict(False, f"its process was ended by {name}{last}", lasting=name in _FAULT_SIGNALS)


def _import_path() -> Iterator[str]:
    """sys.path, of which a process of its own can take text alone; "" is the current folder, if there is one."""
    for place in sys.path:
        if isinstance(place, str) and place:
            yield place
        elif place == "":
            with contextlib.suppress(OSError):
                yield os.getcwd()


def _answer(said: str) -> Verdict | None:
    """What a process printed last; None of one that died before it was done with that."""
    lines = [line.removeprefix(_SAYS) for line in said.splitlines() if line.startswith(_SAYS)]
    try:
        return Verdict(**json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and what it started. One that a GPU holds up may stay behind: it is not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    if child.returncode is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="the process of the check",
        description="Check triton's kernels on a device, and print the verdict.",
    )
    parser.add_argument("--device", required=True)
    parser.add_argument("--uuid", help="of the device, if the one of that number is another here")
    parser.add_argument("--dtype", required=True, choices=[_name(x) for x in TRITON_DTYPES])
    args = parser.parse_args(argv)
    if os.environ.get(CHECKING) and hasattr(signal, "alarm"):
        signal.alarm(int(CHILD_S) + 10)  # who started this process may be gone by then
    try:
        device = _device(args.device, args.uuid)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, ValueError, AssertionError) as error:  # the last where torch has no CUDA
        found = Verdict(False, f"its process cannot use the device: {one_line(error)}", lasting=False)
    else:
        try:
            found = check(device, getattr(torch, args.dtype), triton_kernels())
        except Exception as error:  # of importing the kernels
            found = Verdict(False, one_line(error), lasting=False)
    print(f"{_SAYS}{json.dumps(asdict(found))}", flush=True)
    return 0


def _device(name: str, uuid: str | None) -> torch.device:
    """The device of a UUID: this process may number devices otherwise than the one that started it."""
    device = torch.device(name)
    if uuid is None:
        return device
    at = {str(torch.cuda.get_device_properties(k).uuid): k for k in range(torch.cuda.device_count())}
    if uuid not in at:
        raise ValueError(f"no device has the UUID {uuid}; there are {', '.join(at) or 'none'}")
    return torch.device("cuda", at[uuid])


# --- what is remembered ----------------------------------------------------------------------------------------------

_known: dict[tuple[int, torch.dtype], Verdict] = {}
_lock = threading.Lock()


def verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Return whether triton is right on a GPU for operands of a dtype: remembered, written down, or found out now.

    The first failure that a process learns of is a warning. Callers in other threads wait for the one that finds out.
    """
    key = _key(device, dtype)
    found = _known.get(key)
    if found is not None:
        return found
    with _lock:
        found = _known.get(key)
        if found is not None:
            return found
        found = _known[key] = _found_out(torch.device(device.type, key[0]), dtype)
    if not found.ok:
        again = "" if found.lasting else f", and so does a process that starts {ADOPTED_S / 60:g} minutes later"
        warnings.warn(
            f"triton {found}: its kernels for {_name(dtype)} on {describe(device)}. The torch backend computes instead: as "
            f"right, but slower. `{CHECK}` repeats the check{again}, {OVERRIDE}=triton uses the kernels all the same, and "
            f"{OVERRIDE}=torch goes without them and without this warning",
            stacklevel=2,
        )
    return found


def recorded(device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """Return what this process knows or what is written down; nothing is run."""
    found = _known.get(_key(device, dtype))
    if found is not None:
        return found
    try:
        return _read(entry(device, dtype))
    except Exception as error:
        return Verdict(False, one_line(error), lasting=False)


def repeat(devices: Iterable[torch.device]) -> Iterator[tuple[torch.device, torch.dtype, Verdict]]:
    """Check anew, each device and dtype in a process of its own, and write it down.

    Of devices of one name the verdict is one: it is a failure if one of them failed, and one that could not be checked
    changes nothing.
    """
    failed: set[str] = set()
    for device in devices:
        for dtype in TRITON_DTYPES:
            try:
                found, name = tried(device, dtype), entry(device, dtype)
                if name not in failed:
                    _write(name, found)
                if not found.ok and found.lasting:
                    failed.add(name)
            except Exception as error:  # as in `_found_out`
                found = Verdict(False, one_line(error), lasting=False)
            _known[_key(device, dtype)] = found
            yield device, dtype, found


def forget() -> None:
    """Forget what this process knows; what is written down stays."""
    _known.clear()


def _key(device: torch.device, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    index = device.index
    return (torch.cuda.current_device() if index is None else index), dtype


def _found_out(device: torch.device, dtype: torch.dtype) -> Verdict:
    """A verdict in any case: of an exception, whatever it is, that triton could not be checked."""
    try:
        return _read_or_checked(device, dtype)
    except Exception as error:
        return Verdict(False, one_line(error), lasting=False)


def _read_or_checked(device: torch.device, dtype: torch.dtype) -> Verdict:
    name = entry(device, dtype)
    found = _read(name)
    if found is not None:
        return found
    if (_capability(device), _minor(triton_version())) in SEEN:
        found = check(device, dtype, triton_kernels())
        _write(name, found)
        return found
    # One process of a machine for all: the others read what it wrote. If it dies its lock goes, and another begins.
    with locked("verdicts.check", 2 * CHILD_S):
        found = _read(name)
        if found is None:
            logger.warning(
                "checking triton's kernels for %s on %s, in a process of its own, which takes up to a minute, once",
                _name(dtype),
                describe(device),
            )
            found = tried(device, dtype)
            _write(name, found)
    return found


def entry(device: torch.device, dtype: torch.dtype) -> str:
    """Return what a verdict depends on."""
    cuda = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{describe(device)}, {cuda} | {_name(dtype)} | {_sources()} | {_tuned(device)}"


def describe(device: torch.device) -> str:
    """Return the device with its driver, and the versions of what computes on it."""
    return (
        f"{device_name(device)} ({_capability(device)}), driver {_driver()}, torch {torch.__version__}, Triton "
        f"{triton_version()}"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _capability(device: torch.device) -> str:
    if torch.version.hip:
        return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", "gfx")).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _driver() -> str:
    """The version of the kernel module where the system tells; else that of the driver's interface."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            found = re.search(r"\d+\.\d+(\.\d+)*", Path(path).read_text())
            if found:
                return found[0]
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "unknown" if ask is None else str(ask())


def triton_version() -> str:
    """Return the version that is installed, of a triton that may not import; "?" if it does not say."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "?"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@functools.cache
def _sources() -> str:
    """A hash of the source of the kernels, of the loops around them and of the check."""
    spec = importlib.util.find_spec("xpo_fast.kernels")
    assert spec is not None and spec.submodule_search_locations is not None
    kernels = sorted(p for place in spec.submodule_search_locations for p in Path(place).glob("*.py"))
    names = (
        "chunked", "dense", "gemms", "operands", "row_operations", "rows", "spec", "streams", "tiling", "triton", "verdict",
    )  # fmt: skip
    digest = hashlib.sha256()
    for path in (*kernels, *(Path(__file__).with_name(f"{name}.py") for name in names)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _tuned(device: torch.device) -> str:
    """A hash of what tuning has chosen for a device, whatever for; "" where it has chosen nothing."""
    try:
        entries = TUNING.read()
    except (OSError, ValueError):  # the launchers do without, too
        entries = {}
    own = sorted((k, v) for k, v in entries.items() if k.startswith(f"{device_name(device)} | "))
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16] if own else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The file. Of what is not lasting it has when that was, too.


def _entries() -> Mapping[str, Any]:
    """All entries; none of a file that cannot be read: a check costs little to repeat."""
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
    """Add a verdict to the file; but what is not lasting never in the place of what is."""
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
