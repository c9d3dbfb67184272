"""Gates that need no GPU: every kernel × feature flag compiled for each target, its resources in a table.

    python -m xpo_fast.kernels.gates --json bench/results/kernels-compiled.json

A kernel file declares what is compiled: a function `variants()` that yields `Variant`s, one with a `tunable` for each
target as that target's default has it. A variant fails that spills, uses local memory, wants more shared memory than
the target has, or waits for loads that it should have made asynchronous.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from .tuning import Config, Tunable

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # a program


@dataclass(frozen=True)
class Variant:
    """A kernel as one set of flags specialises it.

    signature: argument → Triton type ("*bf16", "i64", "fp32"), without the constexprs. divisible: the arguments that
    are multiples of 16 (pointers: aligned to 16 bytes), which decides whether loads are wide. async_copies: whether
    loads must be asynchronous on NVIDIA (cp.async or TMA). fp_fusion: whether products and sums are fused, which a launch
    says, too: Triton's default is about to change. representative: whether the test suite compiles it.
    tunable: where its blocks, warps and stages come from, in place of what is said here.
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

    def configured(self, candidates: bool = False) -> Iterator[Variant]:
        """This variant as it is launched: by each target's default, or by every candidate."""
        if self.tunable is None:
            yield self
            return
        targets: dict[Config, list[str]] = {}
        for target in self.targets:
            for config in self.tunable.candidates[target][: None if candidates else 1]:
                targets.setdefault(config, []).append(target)
        for config, its in targets.items():
            yield replace(self.launched(config), name=f"{self.name}, {config}", targets=tuple(its))

    def launched(self, config: Config) -> Variant:
        """This variant with one configuration."""
        return replace(
            self,
            constexprs={**self.constexprs, **dict(config.constexprs)},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            tunable=None,
        )

    @property
    def source(self) -> ASTSource:
        arguments = self.kernel.arg_names
        # Without the constexprs in it the signature does not tell the positions of the others.
        signature = {name: self.signature.get(name, "constexpr") for name in arguments}
        unknown = set(self.signature) | set(self.constexprs)
        unknown -= set(arguments)
        if unknown or {n for n, t in signature.items() if t == "constexpr"} != set(self.constexprs):
            raise ValueError(
                f"{self.kernel.__name__} takes {arguments}, got {self.signature} and {self.constexprs}"
            )
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(arguments)
            if name in self.divisible and name in self.signature
        }
        constexprs = {(arguments.index(name),): value for name, value in self.constexprs.items()}
        return ASTSource(self.kernel, signature, constexprs, divisible)


@dataclass(frozen=True)
class Resources:
    """What one compiled variant takes of one target."""

    kernel: str
    variant: str
    target: str
    registers: int  # a thread
    spills: int  # instructions that load or store local memory (NVIDIA), registers spilt (AMD)
    stack_bytes: int  # a thread
    shared_bytes: int  # a program
    async_copies: int  # instructions
    warps: int
    problems: tuple[str, ...] = ()


def modules() -> list[str]:
    """The kernel files beside this one that declare variants."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [name for name in sorted(names) if name != "gates" and hasattr(_module(name), "variants")]


def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")


def variants(module: str, candidates: bool = False) -> list[Variant]:
    return [v for declared in _module(module).variants() for v in declared.configured(candidates)]


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile one variant for one target and read what it takes."""
    launch = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options = {**launch, "enable_fp_fusion": variant.fp_fusion}
    try:
        compiled = triton.compile(variant.source, target=TARGETS[target], options=options)
    except Exception as error:  # Triton's, LLVM's or the assembler's: the others are still to be compiled
        found = dict.fromkeys(("registers", "spills", "stack_bytes", "shared_bytes", "async_copies"), 0)
        problems = [f"{type(error).__name__}: {str(error).splitlines()[-1]}"]
    else:
        read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
        found = {**read(compiled), "shared_bytes": compiled.metadata.shared}
        problems = list(_problems(variant, target, found))
    return Resources(
        variant.kernel.__name__,
        variant.name,
        target,
        **found,
        warps=variant.num_warps,
        problems=tuple(problems),
    )


def _problems(variant: Variant, target: str, found: dict[str, int]) -> Iterator[str]:
    if found["spills"]:
        yield f"{found['spills']} spills"
    if found["stack_bytes"]:
        yield f"{found['stack_bytes']} bytes of stack a thread"
    if found["shared_bytes"] > SHARED_LIMIT_KIB[target] * 1024:
        yield f"{found['shared_bytes']} bytes of shared memory, {target} has {SHARED_LIMIT_KIB[target]} KiB"
    if variant.async_copies and TARGETS[target].backend == "cuda" and not found["async_copies"]:
        yield "no asynchronous copy"


def _read_nvidia(compiled: Any) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _output(tools / "nvdisasm", "-c", cubin.name)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": _number(r"STACK:(\d+)", usage),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "async_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", sass)),
    }


def _read_amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        "async_copies": len(re.findall(r"buffer_load_\w+.*\blds\b", text)),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern}")
    return int(found[1])


def _output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def _compile_nth(module: str, n: int, target: str, candidates: bool) -> Resources:
    return compile_variant(variants(module, candidates)[n], target)


def table(found: list[Resources]) -> str:
    header = [
        "kernel",
        "variant",
        "target",
        "registers",
        "spills",
        "stack B",
        "shared B",
        "async",
        "warps",
        "",
    ]
    rows = [
        [
            r.kernel, r.variant, r.target,
            *map(str, (r.registers, r.spills, r.stack_bytes, r.shared_bytes, r.async_copies, r.warps)),
            "; ".join(r.problems) or "ok",
        ]
        for r in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [header, *rows])


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=style)
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="of these kernel files alone")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--representative", action="store_true", help="the variants of the test suite alone")
    parser.add_argument("--candidates", action="store_true", help="as every candidate of tuning, too")
    parser.add_argument("--jobs", type=int, default=1, help="compile in this many processes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    work = [
        (module, n, target, args.candidates)
        for module in args.modules or modules()
        for n, variant in enumerate(variants(module, args.candidates))
        for target in args.targets
        if target in variant.targets and (variant.representative or not args.representative)
    ]
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs) as pool:
            found = list(pool.map(_compile_nth, *zip(*work)))
    else:
        found = [_compile_nth(*item) for item in work]
    print(table(found))
    failed = [r for r in found if r.problems]
    print(f"{len(found)} compiled with Triton {triton.__version__}, {len(failed)} failed")
    if args.json:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        content = {"triton": triton.__version__, "date": date, "compiled": [asdict(r) for r in found]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
