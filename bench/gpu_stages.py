"""Runs all GPU checks and benchmarks in three commands: stages, each in a process of its own with its own time limit.

    python3 bench/gpu_stages.py plan                      # prints the commands, files to copy, purpose of each stage
    python3 bench/gpu_stages.py pack build/gpu            # archives the packages for a machine without a network
    python3 bench/gpu_stages.py first --out OUT           # at most six minutes
    python3 bench/gpu_stages.py second --out OUT          # at most seven and a half
    python3 bench/gpu_stages.py third --out OUT           # at most four; needs transformers and peft, too
    python3 bench/gpu_stages.py first --dry --out OUT     # tiny sizes on a CPU

It is made for a machine with a GPU to which this folder is copied; only torch and Triton must be installed there.

An illegal access affects only the process that made it, and a hanging kernel only the process that waits for it, so no
stage can cost another one its time or results. A stage writes its result file during the run. If it ends early, the
file names its current step, and if that was the work of a peer, the stage is run again without that peer. All results
are in OUT/results.json, and all output in OUT/log.txt.

Exit status 1: a stage failed, or did not end in time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = "site.tar.xz"
# Packages that the peers need beyond the machine's torch, Triton, transformers and pandas. TRL's trainers import
# datasets.
PACKAGES = ("trl==1.16.0", "liger_kernel==0.8.5", "datasets", "dill<0.4.2", "multiprocess<0.70.20")
# NVIDIA's compiler for Liger's kernels on Hopper, the largest part of the archive. QuACK 0.6.5 imports with neither
# 4.7.0 nor 4.8.1.
COMPILER = "4.8.1"
COMPILED_PEERS = (
    *(f"nvidia-cutlass-dsl{part}=={COMPILER}" for part in ("", "-libs-core", "-libs-base", "-libs-cu13")),
    "apache-tvm-ffi==0.1.15.post2",
)
PLATFORM = (
    *("--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"),
    *(f"--platform=manylinux{n}_x86_64" for n in ("_2_28", "_2_27", "_2_24", "_2_17", "2014")),
)
GRACE_S = 5.0  # between SIGTERM and SIGKILL
TAIL = 45  # lines of a stage's output that are printed; the log has all of it
OURS = ("triton", "cuda", "torch")  # contenders of gpu.py that a stage is never run without


class Stage(NamedTuple):
    """A program with its time limit and the question that its results answer."""

    name: str
    limit_s: int
    decides: str
    command: tuple[str, ...]  # arguments of python; {out} stands for the result file
    dry: tuple[str, ...] = ()  # further arguments of a dry run
    under: tuple[str, ...] = ()  # a tool that runs the command; not in a dry run
    gate: bool = False  # whether a failure ends the command
    peers: bool = False  # whether it takes --without PEER


def _head(name: str, limit_s: int, shapes: str, contenders: str, decides: str, cases: str = "") -> Stage:
    command = ("bench/gpu.py", "--shapes", *shapes.split(), "--only", *contenders.split(","))
    command += ("--cases", *(cases or "frozen trainable logps").split(), "--json", "{out}")
    return Stage(name, limit_s, decides, command, ("--quick", "--shapes", "64x48x1009"), peers=True)


def _probe(name: str, limit_s: int, sections: str, decides: str, **more: Any) -> Stage:
    command = ("bench/gpu_probe.py", *sections.split(), "--json", "{out}")
    return Stage(name, limit_s, decides, command, ("--quick",), **more)


CONTENDERS = "triton,torch,cuda,TRL,Liger CE,Liger fused"
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
CALLS: dict[str, tuple[Stage, ...]] = {
    "first": (
        _probe("smoke", 40, "smoke", "whether anything runs; if not, the command ends here", gate=True),
        Stage(
            "checks",
            95,
            "whether `auto` may be triton: each variant of the kernels on the device against float64",
            ("bench/gpu_checks.py", "--jobs", "8", "--json", "{out}"),
            ("--quick", "--jobs", "0", "--select", "strided or real or graph_on or (objective and frozen)"),
        ),
        _head(
            "head-4096",
            80,
            "8192x4096x128256",
            CONTENDERS,
            "the aims at D 4096: share of the floor, TRL, Liger, log-probs without gradient, precision, graphs, waits",
        ),
        _head("head-2048", 65, "8192x2048x151936", CONTENDERS, "the aims at D 2048, and peak memory"),
        _probe(
            "probes",
            65,
            "gemms rows steps host",
            "tokens per step, lanes, and which part of the time exceeds its prediction",
        ),
    ),
    "second": (
        _probe("memcheck", 60, "tiny", "no access out of bounds", under=(*SANITIZER, "memcheck")),
        _probe("racecheck", 60, "tiny", "no race in shared memory", under=(*SANITIZER, "racecheck")),
        _probe("synccheck", 40, "tiny", "no barrier that some threads miss", under=(*SANITIZER, "synccheck")),
        _probe("tuning", 110, "tuning", "the default launches: faster ones become the default"),
        _probe("wide-steps", 70, "wide-steps", "the plan's bytes per step, with more values than the first command"),
        _head(
            "head-peers",
            80,
            "2048x4096x128256 8192x4096x128256",
            "triton,torch,cuda,Liger,Liger fused,QuACK CE,plain",
            "the slower peers, and ours as tuned",
            "frozen trainable gather",
        ),
    ),
    "third": (
        Stage(
            "layouts",
            110,
            "whether rows packed or with their prompts once are right by FlexAttention, and faster than padded ones",
            ("bench/gpu_layouts.py", "--json", "{out}"),
            ("--quick",),
        ),
        Stage(
            "offload",
            110,
            "whether activations on the host and steps in the backward are right, and what they save and cost",
            ("bench/gpu_offload.py", "--json", "{out}"),
            ("--quick",),
        ),
    ),
}


# Seconds of a command: its stages, and unpacking the archive before them.
LIMITS_S = {"first": 360, "second": 435, "third": 230}
DRY_FACTOR = 4.0  # longer limits on a CPU, which interprets the kernels
BUILD = "XPO_FAST_CUDA=1 python setup.py build_ext --inplace"


class Ended(NamedTuple):
    """How a stage ended, and how complete its results are."""

    stage: str
    how: str
    well: bool
    seconds: float
    results: str  # whole, partial, broken, none
    doing: str = ""  # the step at which it ended early
    contender: str = ""

    def __str__(self) -> str:
        at = f", at {self.doing}" if self.doing else ""
        return f"{self.stage}: {self.how} after {self.seconds:.0f} s{at}; results: {self.results}"


def read_results(path: Path) -> tuple[str, dict[str, Any]]:
    """Returns how complete a result file is ("none", "broken", "partial" or "whole"), and its content."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return "none", {}
    except ValueError:
        return "broken", {}
    if not isinstance(content, dict):
        return "broken", {}
    return "whole" if content.get("ended") else "partial", content


def run_stage(
    stage: Stage, out: Path, limit_s: float, environment: dict[str, str], *, dry: bool, without: Sequence[str] = ()
) -> Ended:
    """Runs a stage in a process group of its own, which has ended on return; the log gets its output."""
    result = out / f"{stage.name}.json"
    result.unlink(missing_ok=True)
    arguments = [argument.replace("{out}", str(result)) for argument in (*stage.command, *(stage.dry if dry else ()))]
    arguments += ["--without", *without] if without else []
    if stage.under and not dry and shutil.which(stage.under[0]) is None:
        return Ended(stage.name, f"not run: no {stage.under[0]} here", False, 0.0, "none")
    command = [*(() if dry else stage.under), sys.executable, *arguments]
    if stage.under:  # a memory checker sees the driver's allocations, not a cache's blocks within them
        environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n=== {stage.name}: {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        in_time = True
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            end_group(process)
    status = process.returncode
    with (out / "log.txt").open("rb") as log:
        log.seek(begin)
        print("\n".join(log.read().decode(errors="replace").splitlines()[-TAIL:]), flush=True)
    results, content = read_results(result)
    how = "ended well"
    if not in_time:
        how = f"out of time ({limit_s:.0f} s)"
    elif status < 0:
        how = f"killed by {signal.Signals(-status).name}"
    elif status == 3:
        how = "lost its device (exit status 3)"
    elif status:
        how = f"failed (exit status {status})"
    doing = "" if results == "whole" else content.get("doing", "")
    well = in_time and status == 0 and (results == "whole" or "{out}" not in stage.command)
    if well is False and how == "ended well":
        how = "ended without all results"
    seconds = time.monotonic() - start
    return Ended(stage.name, how, well, seconds, results, doing, content.get("contender", "") if doing else "")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process group, and waits a limited time for its first process."""
    for kind, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 4 * GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
        if process.poll() is not None and kind == signal.SIGKILL:
            return


def run_call(
    stages: Sequence[Stage], out: Path, environment: dict[str, str], *, dry: bool, limit_s: float = float("inf")
) -> list[Ended]:
    """Runs the stages in order until the time is used up, and writes the summary after each."""
    start, found = time.monotonic(), []
    with_peers: dict[str, Any] = {}  # results of stages that were run again, by stage and peer

    def save() -> None:
        results = {stage.name: read_results(out / f"{stage.name}.json")[1] for stage in stages} | with_peers
        content = {"stages": [e._asdict() for e in found], "results": {k: v for k, v in results.items() if v}}
        made = out / "results.json.tmp"
        made.write_text(json.dumps(content, indent=1) + "\n")
        made.replace(out / "results.json")

    for stage in stages:
        without: list[str] = []
        left_s = stage.limit_s * (DRY_FACTOR if dry else 1.0)
        while True:
            left_s = min(left_s, limit_s - (time.monotonic() - start))
            if left_s <= 0:
                found.append(Ended(stage.name, "not run: no time is left", False, 0.0, "none"))
                break
            ended = run_stage(stage, out, left_s, environment, dry=dry, without=without)
            found.append(ended)
            print(f"--- {ended}", flush=True)
            save()
            left_s -= ended.seconds
            peer = ended.contender
            if ended.well or not stage.peers or not peer or peer in (*OURS, *without) or "time" in ended.how:
                break
            with_peers[f"{stage.name}, ended at {peer}"] = read_results(out / f"{stage.name}.json")[1]
            without.append(peer)
        if stage.gate and not found[-1].well:
            found.append(Ended(stage.name, "nothing more is run: everything needs what failed", False, 0.0, "none"))
            break
    save()
    return found


@contextlib.contextmanager
def prepared(archive: Path | None, out: Path, dry: bool) -> Iterator[dict[str, str]]:
    """Yields environment variables for stages: this checkout and the archive's packages importable, and no network."""
    with tempfile.TemporaryDirectory(prefix="gpu-site-") as site:
        if archive is not None:
            with tarfile.open(archive, "r:xz") as packed:
                packed.extractall(site, filter="data")
        package = Path(site) / "xpo_fast"
        package.mkdir()
        for path in (ROOT / "xpo_fast").iterdir():
            if path.name not in ("kernels", "__pycache__"):
                (package / path.name).symlink_to(path)
        (package / "kernels").symlink_to(ROOT / "kernels")
        # Some packages have *.pth files, which Python reads in site folders but not on PYTHONPATH.
        (Path(site) / "sitecustomize.py").write_text(f"import site\n\nsite.addsitedir({site!r})\n")
        paths = [site, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "XPO_FAST_CACHE": str(out / "cache"),
        }
        if dry:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        yield environment


def pack(folder: Path, *, compiler: bool) -> Path:
    """Archives the packages for the machine's Python and returns the path. compiler: COMPILED_PEERS too."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [*PACKAGES, *(COMPILED_PEERS if compiler else ())]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    with tempfile.TemporaryDirectory(dir=folder) as site:
        subprocess.run([*pip, *PLATFORM, "--target", site, *wanted], check=True)
        # Most of it is x86 machine code: a filter makes its jumps compress, and one dictionary holds all of it.
        filters = [
            {"id": lzma.FILTER_X86},
            {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 * 2**20},
        ]
        made = folder / f"{ARCHIVE}.tmp"
        with lzma.open(made, "wb", filters=filters) as file, tarfile.open(fileobj=file, mode="w|") as packed:
            packed.add(site, ".")
    return made.replace(folder / ARCHIVE)


def plan(folder: Path) -> str:
    """Returns the instructions for the run: files to copy, and the commands with their stages."""
    archive = folder / ARCHIVE
    size = f"{archive.stat().st_size / 2**20:.0f} MiB" if archive.exists() else "not there yet"
    shown = archive.relative_to(ROOT) if archive.is_relative_to(ROOT) else archive
    library = [*(ROOT / "xpo_fast" / "_native").glob("*.so")]
    lines = [
        "To copy, with the files of this repository:",
        f"  {shown} ({size}): the peers and their dependencies; made by",
        f"    `python3 bench/gpu_stages.py pack {shown.parent}`",
        f"  xpo_fast/_native ({'built' if library else f'missing: {BUILD}'})",
    ]
    for name, stages in CALLS.items():
        lines += ["", f"The {name} command, at most {LIMITS_S[name]} s:", ""]
        lines.append(f'  python3 bench/gpu_stages.py {name} --archive {shown} --out "$OUT"')
        lines.append("")
        lines += [f"  {stage.name:<11} {stage.limit_s:>4} s  {stage.decides}" for stage in stages]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, stages in CALLS.items():
        call = commands.add_parser(name, help=", ".join(stage.name for stage in stages))
        call.add_argument("--out", type=Path, required=True, help="folder for the results")
        call.add_argument("--archive", type=Path, help="archive of the packages that the machine lacks, made by `pack`")
        call.add_argument(
            "--limit-s", type=float, default=LIMITS_S[name], help="seconds for all stages (default: %(default)s)"
        )
        call.add_argument("--only", nargs="+", choices=[s.name for s in stages], help="run only these stages")
        call.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, with longer time limits")
    for name in ("plan", "pack"):
        other = commands.add_parser(name)
        other.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "gpu")
        if name == "pack":
            other.add_argument("--small", action="store_true", help="leave out the compiler for Hopper")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = parse_arguments(arguments)
    if args.command == "plan":
        print(plan(args.folder))
        return 0
    if args.command == "pack":
        made = pack(args.folder, compiler=not args.small)
        print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in CALLS[args.command] if stage.name in (args.only or [stage.name])]
    limit_s = args.limit_s * (DRY_FACTOR if args.dry else 1.0)
    start = time.monotonic()
    with prepared(args.archive, args.out.resolve(), args.dry) as environment:
        limit_s -= time.monotonic() - start
        found = run_call(stages, args.out.resolve(), environment, dry=args.dry, limit_s=limit_s)
    for stage in stages:
        if read_results(args.out / f"{stage.name}.json")[1]:  # results.json contains it
            (args.out / f"{stage.name}.json").unlink()
    print("\n" + "\n".join(map(str, found)) + f"\n{time.monotonic() - start:.0f} s in all")
    return 0 if all(ended.well for ended in found) else 1


if __name__ == "__main__":
    sys.exit(main())
