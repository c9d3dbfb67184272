"""Gates that need no GPU: every kernel × feature flag compiled for each target, its resources in a table.

    python -m xpo_fast.kernels.gates --json bench/results/kernels-compiled.json

A kernel file declares what is compiled: a function `variants()` that yields `Variant`s, one with a `tunable` for each
target as that target's default has it. A variant fails that spills, uses local memory, wants more shared memory than
the target has, waits for loads that it should have made asynchronous, moves elements one by one where its rows are
aligned, or takes more instructions a logit than its file allows it.
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
from collections.abc import Callable, Iterator
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
    tunable: where its blocks, warps and stages come from, in place of what is said here. wide_loops: over how many loops
    every access to global memory must move 8 or 16 bytes, since rows are aligned. instructions: how many the loops over
    a row may take a logit on NVIDIA, BLOCK logits going through each at a time.
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
            raise ValueError(f"{self.kernel.__name__} takes {arguments}, got {self.signature} and {self.constexprs}")
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
    wide_loops: int  # innermost ones whose every access to global memory moves 8 bytes or more
    instructions: float  # a logit, in the loop over a row that takes the most; 0 without such a loop, and on AMD
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


def _compiled(variant: Variant, target: str) -> Any:
    launch = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options = {**launch, "enable_fp_fusion": variant.fp_fusion}
    return triton.compile(variant.source, target=TARGETS[target], options=options)


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile one variant for one target and read what it takes."""
    try:
        compiled = _compiled(variant, target)
    except Exception as error:  # Triton's, LLVM's or the assembler's: the others are still to be compiled
        measures = (
            "registers",
            "spills",
            "stack_bytes",
            "shared_bytes",
            "async_copies",
            "wide_loops",
            "instructions",
        )
        found: dict[str, Any] = dict.fromkeys(measures, 0)
        problems = [f"{type(error).__name__}: {str(error).splitlines()[-1]}"]
    else:
        if TARGETS[target].backend == "hip":
            found = _read_amd(compiled)
        else:
            found = _read_nvidia(compiled, variant.constexprs.get("BLOCK", 0) / (32 * variant.num_warps))
        found["shared_bytes"] = compiled.metadata.shared
        problems = list(_problems(variant, target, found))
    return Resources(
        variant.kernel.__name__,
        variant.name,
        target,
        **found,
        warps=variant.num_warps,
        problems=tuple(problems),
    )


def _problems(variant: Variant, target: str, found: dict[str, Any]) -> Iterator[str]:
    if found["spills"]:
        yield f"{found['spills']} spills"
    if found["stack_bytes"]:
        yield f"{found['stack_bytes']} bytes of stack a thread"
    if found["shared_bytes"] > SHARED_LIMIT_KIB[target] * 1024:
        yield f"{found['shared_bytes']} bytes of shared memory, {target} has {SHARED_LIMIT_KIB[target]} KiB"
    if variant.async_copies and TARGETS[target].backend == "cuda" and not found["async_copies"]:
        yield "no asynchronous copy"
    if found["wide_loops"] < variant.wide_loops:
        yield f"{found['wide_loops']} loops with wide loads and stores alone, expected {variant.wide_loops}"
    nvidia = TARGETS[target].backend == "cuda"
    if variant.instructions is not None and nvidia and not found["instructions"]:
        yield "no loop over a row"
    if variant.instructions is not None and found["instructions"] > variant.instructions:
        yield f"{found['instructions']:.1f} instructions a logit, expected at most {variant.instructions:g}"


def _read_nvidia(compiled: Any, columns: float) -> dict[str, Any]:
    """columns: of a thread, in one round of a loop over a row, as the kernel has it."""
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
        "wide_loops": sum(loop.wide for loop in _loops(_SASS, sass)),
        "instructions": _instructions_a_logit(compiled.asm["ptx"], sass, columns) if columns else 0,
    }


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        "async_copies": len(re.findall(r"buffer_load_\w+.*\blds\b", text)),
        "wide_loops": sum(loop.wide for loop in _loops(_AMD, text)),
        "instructions": 0,
    }


@dataclass(frozen=True)
class _Assembly:
    """How an assembler is written: patterns of a line, and bytes by what an access's name says of them."""

    label: str  # one group: the label
    branch: str  # one group: the label that it goes to
    access: str  # two groups: of global memory a load or a store, and how much
    bytes: Callable[[str], int]
    instruction: str


def _ptx_bytes(suffix: str) -> int:
    vector = re.search(r"\.v(\d)", suffix)
    return (int(vector[1]) if vector else 1) * int(re.findall(r"\d+", suffix)[-1]) // 8


def _sass_bytes(suffix: str) -> int:
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
    return int(bits[1]) // 8 if bits else 4


def _amd_bytes(suffix: str) -> int:
    dwords = re.match(r"dword(?:x(\d))?", suffix)
    return 4 * int(dwords[1] or 1) if dwords else 2 if "short" in suffix else 1


_PTX = _Assembly(
    label=r"^(\$\w+):",
    branch=r"\bbra(?:\.uni)?\s+(\$\w+);",
    access=r"\b(ld|st)\.global([.:\w]+)",
    bytes=_ptx_bytes,
    instruction=r"^\s[^.].*;",
)
_SASS = _Assembly(
    label=r"^(\.L\w+):",
    branch=r"\bBRA\b.*`\((\.L\w+)\)",
    access=r"\b(LD|ST)G(\.[.\w]+)",
    bytes=_sass_bytes,
    instruction=r"^\s+/\*[0-9a-f]+\*/.*;",
)
_AMD = _Assembly(
    label=r"^(\.L\w+):",
    branch=r"\bs_c?branch\w*\s+(\.L\w+)",
    access=r"\b(?:global|buffer|flat)_(load|store)_(\w+)",
    bytes=_amd_bytes,
    instruction=r"^\s+[a-z]",
)


@dataclass(frozen=True)
class _Loop:
    """An innermost loop that moves global memory: what a thread does in one round of it."""

    instructions: int
    loads: int  # bytes
    stores: int  # bytes
    wide: bool  # every access moves 8 bytes or more

    def rounds_of(self, other: _Loop) -> int:
        """How many rounds of another loop this one's is, the other unrolled; 0 if it is not that loop."""
        times = (self.loads + self.stores) // (other.loads + other.stores)
        return times if (times * other.loads, times * other.stores) == (self.loads, self.stores) else 0


def _loops(assembly: _Assembly, text: str) -> list[_Loop]:
    """The innermost loops that move global memory: what lies between a label and the last branch back to it."""
    lines = text.splitlines()
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for n, line in enumerate(lines):
        if label := re.search(assembly.label, line):
            labels[label[1]] = n
        branch = re.search(assembly.branch, line)
        if branch and branch[1] in labels:
            ends[labels[branch[1]]] = n
    found = []
    for start, end in ends.items():
        if any(start < other < end for other in ends):
            continue
        body = lines[start : end + 1]
        moved = {"l": 0, "s": 0}
        widths = []
        for kind, suffix in (access for line in body for access in re.findall(assembly.access, line)):
            widths.append(assembly.bytes(suffix))
            moved[kind[0].lower()] += widths[-1]
        if widths:
            count = sum(bool(re.search(assembly.instruction, line)) for line in body)
            found.append(_Loop(count, moved["l"], moved["s"], min(widths) >= 8))
    return found


def _instructions_a_logit(ptx: str, sass: str, columns: float) -> float:
    """Of the loop over a row that takes the most: of those with wide loads and stores alone, if there are such.

    The assembler unrolls loops: by the bytes that a round moves it is told how often. 0 where no loop is one of PTX's.
    """
    before = _loops(_PTX, ptx)
    loops = _loops(_SASS, sass)
    most = 0.0
    for loop in [loop for loop in loops if loop.wide] or loops:
        rounds = min((times for other in before if (times := loop.rounds_of(other))), default=0)
        if rounds:
            most = max(most, loop.instructions / (rounds * columns))
    return round(most, 2)


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
        "wide",
        "instr./logit",
        "warps",
        "",
    ]
    rows = [
        [
            r.kernel, r.variant, r.target,
            *map(str, (r.registers, r.spills, r.stack_bytes, r.shared_bytes, r.async_copies, r.wide_loops)),
            f"{r.instructions:.1f}", str(r.warps),
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
