"""Gates that need no GPU: compiles every kernel with every set of flags for each target, and checks its resources.

    python -m xpo_fast.kernels.gates --json bench/results/kernels-compiled.json

A kernel file declares what is compiled by a function `variants()` that yields `Variant`s; one with a `tunable` is
compiled in each target's default configuration. A variant fails if it spills registers, uses local memory, needs more
shared memory than the target has, loads synchronously where it should load asynchronously, moves single elements though
its rows are aligned, or takes more instructions per logit than its file allows.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from .assembly import AMD, SASS, instructions_per_logit, loops
from .launch import SHARED_LIMIT_KIB, TARGETS, Variant


@dataclass(frozen=True)
class Resources:
    """The resources of one variant compiled for one target, and the gates it fails."""

    kernel: str
    variant: str
    target: str
    registers: int  # per thread
    spills: int  # instructions that access local memory (NVIDIA), spilled registers (AMD)
    stack_bytes: int  # per thread
    shared_bytes: int  # per program
    async_copies: int  # instructions
    wide_loops: int  # innermost loops whose accesses to global memory all move 8 bytes or more
    instructions: float  # per logit, in the most expensive loop over a row; 0 if there is none, and on AMD
    warps: int
    problems: tuple[str, ...] = ()


def modules() -> list[str]:
    """Imports the files beside this one, and returns the names of those that declare variants."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [name for name in sorted(names) if name != "gates" and hasattr(module(name), "variants")]


def module(name: str) -> Any:
    """Imports and returns a kernel file."""
    return importlib.import_module(f"{__package__}.{name}")


def variants(name: str, candidates: bool = False) -> list[Variant]:
    """Returns the variants of a kernel file, in each target's default configuration or in every candidate."""
    return [v for declared in module(name).variants() for v in declared.configured(candidates)]


def compiled(variant: Variant, target: str) -> Any:
    """Returns what Triton's compiler makes of a variant for a target."""
    launch = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options = {**launch, "enable_fp_fusion": variant.fp_fusion}
    return triton.compile(variant.source, target=TARGETS[target], options=options)


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compiles one variant for one target and returns its resources."""
    try:
        made = compiled(variant, target)
    except Exception as error:  # by Triton, LLVM or the assembler: the other variants can still be compiled
        measures = ["registers", "spills", "stack_bytes", "shared_bytes", "async_copies", "wide_loops", "instructions"]
        found: dict[str, Any] = dict.fromkeys(measures, 0)
        problems = [f"{type(error).__name__}: {str(error).splitlines()[-1]}"]
    else:
        if TARGETS[target].backend == "hip":
            found = _read_amd(made)
        else:
            found = _read_nvidia(made, variant.constexprs.get("BLOCK", 0) / (32 * variant.num_warps))
        found["shared_bytes"] = made.metadata.shared
        problems = list(_problems(variant, target, found))
    name = variant.kernel.__name__
    return Resources(name, variant.name, target, **found, warps=variant.num_warps, problems=tuple(problems))


def _problems(variant: Variant, target: str, found: dict[str, Any]) -> Iterator[str]:
    """Yields the gates that compiled code fails."""
    nvidia = TARGETS[target].backend == "cuda"
    if found["spills"]:
        yield f"{found['spills']} spills"
    if found["stack_bytes"]:
        yield f"{found['stack_bytes']} bytes of stack a thread"
    if found["shared_bytes"] > SHARED_LIMIT_KIB[target] * 1024:
        yield f"{found['shared_bytes']} bytes of shared memory, {target} has {SHARED_LIMIT_KIB[target]} KiB"
    if variant.async_copies and nvidia and not found["async_copies"]:
        yield "no asynchronous copy"
    if found["wide_loops"] < variant.wide_loops:
        yield f"{found['wide_loops']} loops with wide loads and stores alone, expected {variant.wide_loops}"
    if variant.instructions is not None and nvidia and not found["instructions"]:
        yield "no loop over a row"
    if variant.instructions is not None and found["instructions"] > variant.instructions:
        yield f"{found['instructions']:.1f} instructions a logit, expected at most {variant.instructions:g}"


def _read_nvidia(made: Any, columns: float) -> dict[str, Any]:
    """Returns the resources of a cubin. columns: logits per thread in one round of a loop over a row, 0 if none."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _output(tools / "nvdisasm", "-c", cubin.name)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": _number(r"STACK:(\d+)", usage),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "async_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", sass)),
        "wide_loops": sum(loop.wide for loop in loops(SASS, sass)),
        "instructions": instructions_per_logit(made.asm["ptx"], sass, columns) if columns else 0,
    }


def _read_amd(made: Any) -> dict[str, Any]:
    """Returns the resources that the AMD assembly states."""
    text = made.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        "async_copies": len(re.findall(r"buffer_load_\w+.*\blds\b", text)),
        "wide_loops": sum(loop.wide for loop in loops(AMD, text)),
        "instructions": 0,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern}")
    return int(found[1])


def _output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def _compile_nth(name: str, n: int, target: str, candidates: bool) -> Resources:
    """Compiles the n-th variant of a file: what a process of the pool is sent."""
    return compile_variant(variants(name, candidates)[n], target)


_HEADER = (
    *("kernel", "variant", "target", "registers", "spills", "stack B", "shared B"),
    *("async", "wide", "instr./logit", "warps", ""),
)


def table(found: list[Resources]) -> str:
    """Returns the resources as a table, one line per variant and target."""
    rows = [_HEADER]
    for r in found:
        counts = r.registers, r.spills, r.stack_bytes, r.shared_bytes, r.async_copies, r.wide_loops
        measured = *map(str, counts), f"{r.instructions:.1f}", str(r.warps)
        rows.append((r.kernel, r.variant, r.target, *measured, "; ".join(r.problems) or "ok"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> int:
    """Compiles what the command line asks for and prints the table; returns 1 if a variant fails a gate."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=style)
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="compile the kernels of these files only")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="targets to compile for (default: all)"
    )
    parser.add_argument("--representative", action="store_true", help="compile only the variants of the test suite")
    parser.add_argument("--candidates", action="store_true", help="compile every candidate of `xpo-fast tune` too")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the resources to FILE")
    args = parser.parse_args()
    work = [
        (name, n, target, args.candidates)
        for name in args.modules or modules()
        for n, variant in enumerate(variants(name, args.candidates))
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
