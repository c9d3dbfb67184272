"""How each kernel is launched: a fixed default by target, or what was measured here, which this command does.

    python -m xpo_fast.kernels.tuning --vocab 128256 --dtype bfloat16

A kernel file declares what it can be launched with (`declare`), a launcher asks (`lookup`). Nothing is measured unless
the command is run: it times every candidate on the GPU at hand, refuses one whose results differ from the default's,
and keeps the fastest in $XPO_FAST_CACHE/tuning.json (~/.cache/xpo_fast), by device, Triton's version, the kernel's
source and the problem. What is running has read the file already: tune before.

Exit status 1: a problem could not be tuned; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs

from xpo_fast.store import Store
from xpo_fast.wording import one_line

from . import gates

STORE = Store("tuning.json", version=1)
COMMAND = "python -m xpo_fast.kernels.tuning"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
INPUTS = 3  # sets, in turn
CYCLES_PER_MS = 2_000_000  # of a device's clock, or a few less
# Of a result in float32: what the order of a sum may change.
ROUNDING = 1e-5
LOGPS = "token_logps"  # without gradient: by tiles, or by the kernel of logps.py
ENOUGH_TOKENS = 16384  # more change nothing about which is faster

Name = TypeVar("Name")
Input = TypeVar("Input")
Key: TypeAlias = tuple[object, ...]  # what a problem's best depends on: dtypes, `bucket`s of sizes
Timer: TypeAlias = Callable[[Mapping[Any, Callable[[tuple], object]], Sequence[tuple], int], dict[Any, list[float]]]


@dataclass(frozen=True)
class Config:
    """What a launch takes besides its arguments; as keywords: `**config.options`."""

    num_warps: int
    num_stages: int
    constexprs: tuple[tuple[str, int], ...] = ()

    @functools.cached_property
    def options(self) -> dict[str, int]:
        return {**dict(self.constexprs), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def narrowed(self, columns: int) -> Config:
        """As is, or for rows shorter than BLOCK: no wider than they need, and no warp with little to do."""
        block = bucket(columns)
        if block >= self.options["BLOCK"]:
            return self
        return config(max(1, min(self.num_warps, block // 128)), self.num_stages, BLOCK=block)

    def __str__(self) -> str:
        blocks = ", ".join(f"{name} {value}" for name, value in self.constexprs)
        return f"{blocks}, {self.num_warps} warps, {self.num_stages} stages"


def config(num_warps: int, num_stages: int, **constexprs: int) -> Config:
    return Config(num_warps, num_stages, tuple(constexprs.items()))


@dataclass(frozen=True)
class Workload:
    """What the command is asked to tune for."""

    vocab: int
    dtype: torch.dtype
    tokens: int
    width: int  # D
    device: torch.device


@dataclass(frozen=True)
class Problem:
    """What is timed: `run` launches by way of `lookup` and returns what was written into memory of its own."""

    key: Key
    inputs: Callable[[int], tuple]  # seed → arguments of `run`
    run: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Tunable:
    """The candidates of a launch: `Config`s, or whatever a launcher chooses between that JSON can hold.

    kernels: whose source a measurement holds for. candidates: by target, the fixed default first.
    """

    kernels: tuple[Any, ...]
    candidates: Mapping[str, tuple[Any, ...]]
    problems: Callable[[Workload], Iterable[Problem]]

    @property
    def source(self) -> str:
        return "+".join(kernel.cache_key[:16] for kernel in self.kernels)


_tunables: dict[str, Tunable] = {}
# Not a context variable: autograd launches from threads of its own.
_overrides: dict[str, Any] = {}


def declare(name: str, tunable: Tunable) -> Tunable:
    assert name not in _tunables and set(tunable.candidates) == set(gates.TARGETS), name
    _tunables[name] = tunable
    return tunable


def tunable(name: str) -> Tunable:
    if name not in _tunables:
        load()
    return _tunables[name]


def load() -> list[str]:
    """All names: those that the kernel files declare, and what chooses between kernel files."""
    for module in gates.modules():
        importlib.import_module(f"{__package__}.{module}")
    if LOGPS not in _tunables:
        from . import logps, one_read

        ways = dict.fromkeys(gates.TARGETS, (False, True))
        declare(LOGPS, Tunable((one_read.one_read, logps.logps_pass), ways, _logps_problems))
    return sorted(_tunables)


def bucket(size: int) -> int:
    """The power of two that is not below a size: sizes that are tuned as one."""
    return triton.next_power_of_2(size)


def target(device: torch.device) -> str:
    """Whose defaults a device gets: the target that it is or, of NVIDIA's, the last one not after it."""
    if device.type != "cuda":  # Triton's interpreter
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    archs = {int(t.arch): name for name, t in gates.TARGETS.items() if t.backend == "cuda"}
    return archs[max((arch for arch in archs if arch <= 10 * major + minor), default=min(archs))]


def lookup(name: str, device: torch.device, key: Key) -> Any:
    """What to launch with: what was measured for a problem like this, else the default of the device's target.

    Waits for nothing: a problem's first call may read the file, all others a dictionary.
    """
    return _overrides[name] if name in _overrides else _chosen(name, device, key)


@functools.cache
def _chosen(name: str, device: torch.device, key: Key) -> Any:
    candidates = tunable(name).candidates[target(device)]
    known = {} if knobs.runtime.interpret else _entries()
    measured = known.get(_entry(name, device, key)) if known else None
    # What is not among the candidates is not launched, whatever the file says.
    return next((c for c in candidates if measured is not None and _encoded(c) == measured), candidates[0])


def prefers_fused(device: torch.device, dtype: torch.dtype, vocab: int, width: int, tokens: int) -> bool:
    """Whether log-probs without gradient are faster by the kernel of logps.py than by tiles: no, unless measured.

    dtype: the weight's. tokens: scored.
    """
    return lookup(LOGPS, device, _logps_key(dtype, vocab, width, tokens))


def _logps_key(dtype: torch.dtype, vocab: int, width: int, tokens: int) -> Key:
    return dtype, bucket(vocab), bucket(width), bucket(min(tokens, ENOUGH_TOKENS))


def _logps_problems(workload: Workload) -> Iterator[Problem]:
    import xpo_fast

    from . import logps

    w = workload

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = normal(w, 2 * seed, w.tokens, w.width)
        weight = normal(w, 2 * seed + 1, w.vocab, w.width).mul_(3 / w.width**0.5)
        return hidden, weight, tokens(w, seed)

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        if not prefers_fused(w.device, w.dtype, w.vocab, w.width, w.tokens):
            return (xpo_fast.token_logps(hidden, weight, targets, backend="triton"),)
        logp = torch.empty(w.tokens, dtype=torch.float32, device=w.device)
        logps.run(hidden, weight, targets, out={"logp": logp})
        return (logp,)

    yield Problem(_logps_key(w.dtype, w.vocab, w.width, w.tokens), inputs, run)


def row_candidates(
    *shapes: tuple[int, int], without: Mapping[str, tuple[tuple[int, int], ...]] | None = None
) -> dict[str, tuple[Config, ...]]:
    """Of a kernel without a pipeline: (BLOCK, warps), the default first, for all targets but those that spill."""
    stages = {target: 2 if t.backend == "hip" else 3 for target, t in gates.TARGETS.items()}  # Triton's own
    return {
        target: tuple(
            config(warps, n, BLOCK=block)
            for block, warps in shapes
            if (block, warps) not in (without or {}).get(target, ())
        )
        for target, n in stages.items()
    }


def normal(workload: Workload, seed: int, *shape: int) -> Tensor:
    """Standard normal numbers: never zeros, on which GPUs are faster."""
    generator = torch.Generator(workload.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=workload.device).to(workload.dtype)


def tokens(workload: Workload, seed: int) -> Tensor:
    """(N,) targets."""
    w = workload
    generator = torch.Generator(w.device).manual_seed(seed)
    return torch.randint(w.vocab, (w.tokens,), generator=generator, device=w.device)


@contextlib.contextmanager
def override(name: str, choice: Any) -> Iterator[None]:
    """All launches take this, in every thread, while the context lasts; nests."""
    assert name in _tunables, name
    before = dict(_overrides)
    _overrides[name] = choice
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


# The file.


def cache_file() -> Path:
    return STORE.path


def _entry(name: str, device: torch.device, key: Key) -> str:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return " | ".join(map(str, (machine, f"Triton {triton.__version__}", name, tunable(name).source, *key)))


def _encoded(choice: Any) -> Any:
    return choice.options if isinstance(choice, Config) else choice


@functools.cache
def _entries() -> dict[str, Any]:
    try:
        return STORE.read()
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{STORE.path} cannot be used ({error}), so kernels are launched with fixed defaults: delete it, or tune "
            f"again with `{COMMAND}`",
            stacklevel=2,
        )
        return {}


def save(entries: Mapping[str, Any]) -> Path:
    """Add entries to the file, where they take the place of older ones; others', written meanwhile too, stay."""
    STORE.add(entries)
    forget()
    return STORE.path


def forget() -> None:
    """What was read from the file: it is read again."""
    _entries.cache_clear()
    _chosen.cache_clear()


# Measuring.


@dataclass(frozen=True)
class Trial:
    choice: Any
    time_ms: float | None  # None: refused
    refused: str = ""


def sample_with_events(
    calls: Mapping[Name, Callable[[Input], object]],
    inputs: Sequence[Input],
    repeats: int,
    ahead_ms: float = 2.0,
) -> dict[Name, list[float]]:
    """Milliseconds of device time, a sample a call and repeat, all calls in turn on inputs that rotate; warm up before.

    ahead_ms: how long the device is kept busy before each call, so that the host has launched all of it when it begins.
    """
    names = list(calls)
    samples_ms: dict[Name, list[float]] = {name: [] for name in names}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(repeats):
        arguments = inputs[repeat % len(inputs)]
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            torch.cuda._sleep(round(ahead_ms * CYCLES_PER_MS))
            start.record()
            found = calls[name](arguments)
            end.record()
            end.synchronize()
            samples_ms[name].append(start.elapsed_time(end))
            del found
    return samples_ms


def time_with_events(
    calls: Mapping[Any, Callable[[tuple], object]], inputs: Sequence[tuple], repeats: int
) -> dict[Any, list[float]]:
    """`sample_with_events` after each call on each input."""
    for arguments in inputs:
        for call in calls.values():
            call(arguments)
    return sample_with_events(calls, inputs, repeats)


def tune(
    name: str,
    problem: Problem,
    device: torch.device,
    *,
    timer: Timer = time_with_events,
    repeats: int = 30,
) -> list[Trial]:
    """Every candidate's median time, the default's first; raises what the default raises."""

    def run(choice: Any, arguments: tuple) -> Sequence[Tensor]:
        with override(name, choice):
            return problem.run(*arguments)

    default, *others = tunable(name).candidates[target(device)]
    inputs = [problem.inputs(seed) for seed in range(INPUTS)]
    refused: dict[Any, str] = {}
    with _poisoned_allocations():
        want = run(default, inputs[0])
        for choice in others:
            try:
                excess = difference(run(choice, inputs[0]), want)
            except Exception as error:  # the compiler's, the launcher's: the others are still to be tried
                refused[choice] = one_line(error)[:200]
                continue
            if not excess <= 1:
                refused[choice] = f"differs from the default, {excess:.3g} times what rounding explains"
    del want
    calls = {c: functools.partial(run, c) for c in (default, *others) if c not in refused}
    samples_ms = timer(calls, inputs, repeats)
    return [
        Trial(c, None if c in refused else statistics.median(samples_ms[c]), refused.get(c, ""))
        for c in (default, *others)
    ]


def difference(found: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest |found − want| as a multiple of what rounding explains; ∞ where it explains nothing."""
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in want]:
        return float("inf")
    worst = 0.0
    for x, y in zip(found, want):
        kind = torch.finfo(y.dtype)
        relative = max(kind.eps, ROUNDING)
        size = torch.linalg.vector_norm(y, dtype=torch.float32) / max(1, y.numel()) ** 0.5
        for a, b in zip(x.split(64), y.split(64)):  # a copy in float32 need not fit
            a, b = a.float(), b.float()
            allowed = relative * b.abs() + ROUNDING * size + kind.tiny * kind.eps
            excess = ((a - b).abs() / allowed).nan_to_num(float("inf"), float("inf"))
            same = (a == b) | (a.isnan() & b.isnan())
            worst = max(worst, excess.masked_fill_(same, 0).max().item() if excess.numel() else 0.0)
    return worst


@contextlib.contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Memory that is handed out holds NaN: what a candidate does not write differs from the default's."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _gpu() -> torch.device | None:
    if knobs.runtime.interpret or not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def _table(trials: Sequence[Trial], best: Trial) -> str:
    default_ms = trials[0].time_ms
    assert default_ms is not None
    names = [str(trial.choice) for trial in trials]
    width = max(map(len, names))
    lines = []
    for name, trial in zip(names, trials):
        if trial.time_ms is None:
            lines.append(f"  {name:<{width}}  refused: {trial.refused}")
        else:
            note = " default" * (trial is trials[0]) + " fastest" * (trial is best)
            lines.append(f"  {name:<{width}}  {trial.time_ms:9.4f} ms  {default_ms / trial.time_ms:5.2f}x{note}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(COMMAND, description=summary, epilog=details, formatter_class=style)
    parser.add_argument("--vocab", nargs="+", type=int, default=[32000, 128256, 151936], metavar="V")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--kernels", nargs="+", choices=load(), metavar="NAME", help="of: %(choices)s")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 1024, ENOUGH_TOKENS], metavar="N",
        help="rows; all but the first only for what depends on how many there are (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--width", type=int, default=4096, metavar="D", help="of a hidden state (%(default)s)")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args(arguments)
    device = _gpu()
    if device is None:
        print("no GPU to tune for (or TRITON_INTERPRET is set): fixed defaults stay in use", file=sys.stderr)
        return 2
    work: dict[tuple[str, Key], Problem] = {}
    for name in args.kernels or load():
        for dtype in args.dtype:
            for vocab in args.vocab:
                for n in args.tokens:
                    workload = Workload(vocab, DTYPES[dtype], n, args.width, device)
                    for problem in tunable(name).problems(workload):
                        work.setdefault((name, problem.key), problem)
    failed = 0
    for n, ((name, key), problem) in enumerate(work.items(), 1):
        print(f"[{n}/{len(work)}] {name}: {', '.join(map(str, key))}", flush=True)
        try:
            trials = tune(name, problem, device, timer=time_with_events, repeats=args.repeats)
        except Exception as error:  # the device's memory may not hold it; the others are still to be tuned
            failed += 1
            print(f"  not tuned, {one_line(error)[:200]}", flush=True)
            continue
        best = min((t for t in trials if t.time_ms is not None), key=lambda t: t.time_ms or 0.0)
        print(_table(trials, best), flush=True)
        # At once: what is interrupted keeps what it has measured.
        save({_entry(name, device, key): _encoded(best.choice)})
    print(f"{len(work) - failed} tuned, {failed} failed; {cache_file()}")
    return 1 if failed else 0


if __name__ == "__main__":
    # The kernel files know this file by its name, not as __main__.
    sys.exit(importlib.import_module("xpo_fast.kernels.tuning").main())
