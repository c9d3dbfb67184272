"""How kernels are launched: what a kernel file declares, and the lookup of a launch's configuration.

A kernel file declares each launch and its candidate configurations (`declare`), and the variants that gates.py compiles
(`Variant`). A launcher asks for its configuration (`lookup`): the candidate that `xpo-fast tune` found fastest on this
device, or the fixed default of the device's target. Nothing is measured here. The measurements lie in
$XPO_FAST_CACHE/tuning.json (~/.cache/xpo_fast), by device, Triton version, source of the kernel, and problem. A process
reads that file once: tune before you train.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xpo_fast.store import TUNING

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # per program

Key: TypeAlias = tuple[object, ...]  # what the fastest configuration depends on: dtypes, and sizes rounded by `bucket`


@dataclass(frozen=True)
class Config:
    """The options of a launch besides its arguments; pass them as `**config.options`."""

    num_warps: int
    num_stages: int
    constexprs: tuple[tuple[str, int], ...] = ()

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return {**dict(self.constexprs), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def narrowed(self, columns: int) -> Config:
        """Returns this configuration, or for rows shorter than BLOCK one with a smaller block and fewer warps."""
        block = bucket(columns)
        if block >= self.options["BLOCK"]:
            return self
        return config(max(1, min(self.num_warps, block // 128)), self.num_stages, BLOCK=block)

    def __str__(self) -> str:
        blocks = ", ".join(f"{name} {value}" for name, value in self.constexprs)
        return f"{blocks}, {self.num_warps} warps, {self.num_stages} stages"


def config(num_warps: int, num_stages: int, **constexprs: int) -> Config:
    """Returns a Config with its constexprs given as keywords."""
    return Config(num_warps, num_stages, tuple(constexprs.items()))


@dataclass(frozen=True)
class Workload:
    """The sizes, dtype and device that `xpo-fast tune` tunes for, and the operands made for them."""

    vocab: int
    dtype: torch.dtype
    tokens: int
    width: int  # D
    device: torch.device

    def normal(self, seed: int, *shape: int) -> Tensor:
        """Returns standard normal numbers: GPUs multiply zeros faster, so zeros would be timed wrongly."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def targets(self, seed: int) -> Tensor:
        """Returns random targets (N,) int64."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(self.vocab, (self.tokens,), generator=generator, device=self.device)


@dataclass(frozen=True)
class Problem:
    """One call to be timed: `run` launches through `lookup` and returns the tensors that the kernel wrote."""

    key: Key
    inputs: Callable[[int], tuple]  # seed → arguments of `run`
    run: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Tunable:
    """The candidates of one launch: `Config`s, or any choice of a launcher that JSON can hold.

    kernels: the kernels whose source a measurement is valid for. candidates: by target, the fixed default first.
    """

    kernels: tuple[Any, ...]
    candidates: Mapping[str, tuple[Any, ...]]
    problems: Callable[[Workload], Iterable[Problem]]

    @property
    def source(self) -> str:
        """A hash of the kernels' source."""
        return "+".join(kernel.cache_key[:16] for kernel in self.kernels)


_tunables: dict[str, Tunable] = {}
# Not a context variable: autograd launches from threads of its own.
_overrides: dict[str, Any] = {}


def declare(name: str, tunable: Tunable) -> Tunable:
    """Registers the candidates of a launch under a name, and returns them."""
    assert name not in _tunables and set(tunable.candidates) == set(TARGETS), name
    _tunables[name] = tunable
    return tunable


def tunable(name: str) -> Tunable:
    """Returns what was declared under a name; raises KeyError if its file has not been imported."""
    return _tunables[name]


def tunables() -> list[str]:
    """Returns the declared names, sorted."""
    return sorted(_tunables)


def bucket(size: int) -> int:
    """Returns the smallest power of two that is at least `size`: sizes with the same one are tuned together."""
    return triton.next_power_of_2(size)


def target(device: torch.device) -> str:
    """Returns the target whose defaults a device gets: its own, or the newest NVIDIA target that is not newer."""
    if device.type != "cuda":  # Triton's interpreter
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    archs = {int(t.arch): name for name, t in TARGETS.items() if t.backend == "cuda"}
    return archs[max((arch for arch in archs if arch <= 10 * major + minor), default=min(archs))]


def row_candidates(
    *shapes: tuple[int, int], without: Mapping[str, tuple[tuple[int, int], ...]] | None = None
) -> dict[str, tuple[Config, ...]]:
    """Returns the candidates of a kernel without a software pipeline, by target.

    shapes: (BLOCK, warps), the default first. without: by target, the shapes that it does not get because they spill.
    """
    stages = {name: 2 if t.backend == "hip" else 3 for name, t in TARGETS.items()}  # Triton's own defaults
    without = without or {}
    return {
        name: tuple(config(warps, n, BLOCK=b) for b, warps in shapes if (b, warps) not in without.get(name, ()))
        for name, n in stages.items()
    }


def lookup(name: str, device: torch.device, key: Key) -> Any:
    """Returns the candidate measured as fastest for a problem, or the default of the device's target.

    Never waits for the device. The first call for a problem may read tuning.json; later calls read a dictionary.
    """
    return _overrides[name] if name in _overrides else _chosen(name, device, key)


@functools.cache
def _chosen(name: str, device: torch.device, key: Key) -> Any:
    candidates = tunable(name).candidates[target(device)]
    known = {} if knobs.runtime.interpret else _entries()
    measured = known.get(entry(name, device, key)) if known else None
    # Whatever the file says, only a candidate is launched.
    return next((c for c in candidates if measured is not None and encoded(c) == measured), candidates[0])


@contextlib.contextmanager
def override(name: str, choice: Any) -> Iterator[None]:
    """Makes `lookup` return `choice` in every thread while the context lasts; contexts may be nested."""
    assert name in _tunables, name
    before = dict(_overrides)
    _overrides[name] = choice
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def entry(name: str, device: torch.device, key: Key) -> str:
    """Returns the name of a measurement in the file: device, Triton version, launch, source of the kernels, problem."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return " | ".join(map(str, (machine, f"Triton {triton.__version__}", name, tunable(name).source, *key)))


def encoded(choice: Any) -> Any:
    """Returns a candidate as the file stores it."""
    return choice.options if isinstance(choice, Config) else choice


@functools.cache
def _entries() -> dict[str, Any]:
    try:
        return TUNING.read()
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{TUNING.path} cannot be used ({error}), so kernels are launched with fixed defaults: delete it, or tune "
            "again with `xpo-fast tune`",
            stacklevel=2,
        )
        return {}


def save(entries: Mapping[str, Any]) -> None:
    """Adds measurements to the file, where they replace older ones of the same name; all others stay."""
    TUNING.add(entries)
    forget()


def forget() -> None:
    """Discards what was read from the file: the next `lookup` reads it again."""
    _entries.cache_clear()
    _chosen.cache_clear()


@dataclass(frozen=True)
class Variant:
    """A kernel as one set of flags specialises it.

    signature: argument → Triton type ("*bf16", "i64", "fp32"), without the constexprs.
    divisible: the arguments that are multiples of 16 (pointers: aligned to 16 bytes); wide loads need it.
    targets: the targets it is compiled for.
    async_copies: whether loads must be asynchronous on NVIDIA (cp.async or TMA).
    fp_fusion: whether a product and a sum may be fused. Launches set it explicitly too, because Triton's default is
        about to change.
    representative: whether the test suite compiles it.
    tunable: the candidates for blocks, warps and stages, which then replace those of this variant.
    wide_loops: how many loops must move 8 or 16 bytes in every access to global memory, as aligned rows allow.
    instructions: the most instructions per logit that a loop over a row may take on NVIDIA, where each round of the
        loop handles BLOCK logits.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] = tuple(TARGETS)
    async_copies: bool = False
    fp_fusion: bool = True
    representative: bool = False
    tunable: Tunable | None = None
    wide_loops: int = 0
    instructions: float | None = None

    def configured(self, candidates: bool = False) -> Iterator[Variant]:
        """Yields this variant with each target's default configuration, or with every candidate."""
        if self.tunable is None:
            yield self
            return
        targets: dict[Config, list[str]] = {}
        for name in self.targets:
            for choice in self.tunable.candidates[name][: None if candidates else 1]:
                targets.setdefault(choice, []).append(name)
        for choice, names in targets.items():
            yield replace(self.launched(choice), name=f"{self.name}, {choice}", targets=tuple(names))

    def launched(self, choice: Config) -> Variant:
        """Returns this variant with one configuration."""
        return replace(
            self,
            constexprs={**self.constexprs, **dict(choice.constexprs)},
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
            tunable=None,
        )

    @property
    def source(self) -> ASTSource:
        """The source that Triton compiles; raises ValueError if signature and constexprs are not the arguments."""
        arguments = self.kernel.arg_names
        # The constexprs too: without them Triton miscounts the positions of the other arguments.
        signature = {name: self.signature.get(name, "constexpr") for name in arguments}
        unknown = (set(self.signature) | set(self.constexprs)) - set(arguments)
        if unknown or {n for n, t in signature.items() if t == "constexpr"} != set(self.constexprs):
            raise ValueError(f"{self.kernel.__name__} takes {arguments}, got {self.signature} and {self.constexprs}")
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(arguments)
            if name in self.divisible and name in self.signature
        }
        constexprs = {(arguments.index(name),): value for name, value in self.constexprs.items()}
        return ASTSource(self.kernel, signature, constexprs, divisible)
