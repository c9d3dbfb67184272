"""The CUDA library: how setup.py builds it, what the compiler reports of its kernels, and what is said if
something is missing.

What nvcc does is checked by a stand-in wherever that is enough; the library itself is built once, if there is an nvcc.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import sass
import xpo_fast as xf
from host_compile import compiled
from xpo_fast import native
from xpo_fast.cli import doctor
from xpo_fast.head import cuda
from xpo_fast.head.backends import check_backend

ROOT = Path(__file__).parents[1]
LIBRARY = Path("xpo_fast", "_native", "libxpo_fast_cuda.so")
TARGETS = ("sm_80", "sm_90a", "sm_100f")


def build(root, into, **environment):
    """`setup.py build_ext` without what this environment says of CUDA."""
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "XPO_FAST_CUDA")}
    command = [sys.executable, "-W", "always", "setup.py", "build_ext", "--build-lib", str(into)]
    command += ["--build-temp", str(into)]
    done = subprocess.run(command, cwd=root, env={**env, **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# --- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """What setup.py reads, with a kernel that nobody compiles."""
    root = tmp_path / "clone"
    (root / "xpo_fast").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "xpo_fast/version.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "xpo_fast" / "__init__.py").touch()
    (root / "csrc").mkdir()
    for name in ("one.cu", "two.cu", "some.cuh"):
        (root / "csrc" / name).touch()
    return root


def stand_in(folder, fails=False, unknown="none", version="13.0"):
    """An nvcc that writes its arguments to the library, one more line each time it runs, and does not know a target."""
    work = 'while [ "$1" != -o ]; do args="$args $1"; shift; done; echo "$args" > "$2"'
    script = f"""#!/bin/sh
case "$*" in *{unknown}*) echo "nvcc fatal: Unsupported gpu architecture" >&2; exit 1;; esac
case "$*" in *--dryrun*) exit {3 * fails};; --version) echo "release {version}"; exit 0;; esac
echo run >> {folder}/runs
{'echo "error: no such architecture" >&2; exit 3' if fails else f'echo "ptxas info" >&2; {work}'}
"""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(script)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IEXEC)
    return str(folder)


def runs(folder):
    path = folder / "runs"
    return len(path.read_text().split()) if path.exists() else 0


WITHOUT = {"PATH": "/nowhere"}


def test_built_from_every_kernel_file_once(clone, tmp_path):
    """And again when something in csrc/ is newer; the compiler's report lies beside the library."""
    home, into = stand_in(tmp_path / "cuda"), tmp_path / "lib"
    environment = {"CUDA_HOME": home, "PATH": os.defpath}
    code, text = build(clone, into, **environment)
    assert code == 0, text
    arguments = (into / LIBRARY).read_text().split()
    assert {"csrc/one.cu", "csrc/two.cu"} <= set(arguments) and "csrc/some.cuh" not in arguments
    assert all(any(f"code={target}" in a for a in arguments) for target in (*TARGETS, "compute_90"))
    report = (into / LIBRARY).with_name("ptxas.txt").read_text().splitlines()
    assert report[0] == "release 13.0" and report[2:] == ["ptxas info"]
    assert report[1].startswith(f"{home}/bin/nvcc ") and set(arguments) <= set(report[1].split())
    assert sorted(p.name for p in (into / LIBRARY).parent.iterdir()) == [LIBRARY.name, "ptxas.txt"]
    assert build(clone, into, **environment)[0] == 0 and runs(tmp_path / "cuda") == 1
    later = (into / LIBRARY).stat().st_mtime + 10
    os.utime(clone / "csrc" / "some.cuh", (later, later))
    assert build(clone, into, **environment)[0] == 0 and runs(tmp_path / "cuda") == 2


@pytest.mark.parametrize(
    ("first", "then", "times"),
    [
        ({"unknown": "compute_100f", "version": "12.0"}, {"version": "12.9"}, 2),
        ({"unknown": "compute_100f"}, {}, 2),
        ({"version": "12.9"}, {"version": "13.0"}, 2),
        ({}, {}, 1),
    ],
)
def test_built_again_by_another_nvcc(clone, tmp_path, first, then, times):
    """In the same place, with what was built before kept: targets that the first did not know are there again."""
    into = tmp_path / "lib"
    environment = {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": os.defpath}
    stand_in(tmp_path / "cuda", **first)
    assert build(clone, into, **environment)[0] == 0
    stand_in(tmp_path / "cuda", **then)
    code, text = build(clone, into, **environment)
    assert code == 0 and "is built without" not in text and runs(tmp_path / "cuda") == times
    arguments = (into / LIBRARY).read_text()
    assert all(f"code={name}" in arguments for name in (*TARGETS, "compute_90"))


def test_a_library_that_cannot_be_built_again_is_not_kept(clone, tmp_path):
    """An install takes all that lies in build/."""
    into, environment = tmp_path / "lib", {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": os.defpath}
    stand_in(tmp_path / "cuda")
    assert build(clone, into, **environment)[0] == 0
    stand_in(tmp_path / "cuda", fails=True, version="13.1")
    code, text = build(clone, into, **environment)
    assert code == 0 and "installed without its CUDA library" in text
    assert not list((into / LIBRARY).parent.iterdir())


@pytest.mark.parametrize("wanted", ["", "0", "1"])
def test_without_nvcc(clone, tmp_path, wanted):
    code, text = build(clone, tmp_path / "lib", XPO_FAST_CUDA=wanted, **WITHOUT)
    assert not (tmp_path / "lib" / LIBRARY).exists()
    if wanted == "1":
        assert code != 0 and "there is no nvcc on PATH, nor in CUDA_HOME" in text
    else:
        assert code == 0, text


@pytest.mark.parametrize("wanted", ["", "0", "1"])
def test_nvcc_that_fails(clone, tmp_path, wanted):
    """A warning with its output, or if the library is asked for, an error; if it is not wanted nvcc does not run."""
    home = stand_in(tmp_path / "cuda", fails=True)
    environment = {"CUDA_HOME": home, "PATH": os.defpath, "XPO_FAST_CUDA": wanted}
    code, text = build(clone, tmp_path / "lib", **environment)
    assert ("error: no such architecture" in text) == (wanted != "0") == bool(runs(tmp_path / "cuda"))
    assert ("xpo-fast is installed without its CUDA library" in text) == (wanted == "")
    assert (code != 0) == (wanted == "1")
    assert not (tmp_path / "lib" / LIBRARY).exists()


@pytest.mark.parametrize(
    ("unknown", "dropped"),
    [("compute_100f", ["sm_100f"]), ("a,code", ["sm_90a"]), ("compute_[89]0", ["sm_80", "sm_90a", "compute_90"])],
)
def test_targets_that_nvcc_does_not_know_are_left_out(clone, tmp_path, unknown, dropped):
    """By name, whether or not the library is asked for; what it was built for is in it."""
    home, into = stand_in(tmp_path / "cuda", unknown=unknown), tmp_path / "lib"
    code, text = build(clone, into, CUDA_HOME=home, PATH=os.defpath, XPO_FAST_CUDA="1")
    assert code == 0 and f"is built without {', '.join(dropped)}, which {home}/bin/nvcc does not know" in text
    arguments = (into / LIBRARY).read_text()
    kept = [name for name in (*TARGETS, "compute_90") if name not in dropped]
    assert f'-DXPO_ARCHITECTURES="{" ".join(kept)}"' in arguments
    assert all((f"code={name}" in arguments) == (name in kept) for name in (*TARGETS, "compute_90"))


# --- the library -----------------------------------------------------------------------------------------------------

nvcc = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(nvcc is None, reason="there is no nvcc to build the CUDA library with")


@pytest.fixture(scope="session")
def built():
    """csrc/ built by setup.py into build/, where the next run finds it, unless what is installed is as new."""
    into = ROOT / "build" / "tests"
    into.mkdir(parents=True, exist_ok=True)
    with (into / "lock").open("w") as lock:  # test processes side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        installed = (ROOT / LIBRARY).parent
        if installed.is_dir() and not (into / LIBRARY).exists():
            shutil.copytree(installed, (into / LIBRARY).parent, copy_function=shutil.copy2, dirs_exist_ok=True)
        code, text = build(ROOT, into, XPO_FAST_CUDA="1")
    assert code == 0, text
    return into / LIBRARY


@pytest.fixture
def library(built, monkeypatch):
    monkeypatch.setattr(native, "PATH", built)
    return native.library()


class Taken(NamedTuple):
    """What ptxas reports of a kernel: bytes, but for registers per thread."""

    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int


def kernels(report):
    """(kernel, target) → what it takes."""
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        name, target = re.findall(r"'(\S+)'", part)[:2]
        sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert sizes and registers, part
        assert 0 < int(registers[1]) <= 255
        found[name, target] = Taken(*map(int, sizes.groups()), int(registers[1]), int(shared[1]) if shared else 0)
    return found


def spilling(found):
    return {kernel: x for kernel, x in found.items() if x.stack or x.spill_stores or x.spill_loads}


class Instance(NamedTuple):
    """What a row kernel is compiled as."""

    grad: str
    kept: bool
    statistics: bool
    softcap: bool


def instance(name):
    """None for a kernel that is not of rows."""
    match = re.search(r"row_passI(f|6__half|13__nv_bfloat16|v)" + r"Lb([01])E" * 3, name)
    return match and Instance(match[1], *(x == "1" for x in match.groups()[1:]))


def too_large(found):
    """Row kernels of which a multiprocessor does not have as many blocks as the plans count on."""
    source = (ROOT / "csrc" / "rows.cu").read_text()
    threads, most, least, shared = (
        int(re.search(rf"\b{n} = (\d+)", source)[1]) for n in ("MAX_THREADS", "MOST_BLOCKS", "BLOCKS", "STATIC_SHARED")
    )
    large = {}
    for (name, target), x in found.items():
        if kind := instance(name):
            registers = x.registers + -x.registers % 8  # given in eights
            blocks = 65536 // (registers * threads)
            if blocks < (most if kind.kept else least) or not 0 < x.shared <= shared:
                large[name, target] = x
    return large


@needs_nvcc
def test_no_kernel_spills(built):
    found = kernels(built.with_name("ptxas.txt").read_text())
    assert not spilling(found)
    by_target = Counter(target for _, target in found)
    assert set(by_target) == set(TARGETS) and len(set(by_target.values())) == 1
    # float32, bfloat16, float16 kept and not, and no gradient; with and without statistics, softcap.
    assert sum("row_pass" in name for name, _ in found) == len(TARGETS) * (2 * 3 + 1) * 4


@needs_nvcc
def test_as_many_blocks_fit_as_plans_count_on(built):
    """By registers, and by static shared memory; one register or one byte more, and they do not."""
    found = kernels(built.with_name("ptxas.txt").read_text())
    assert not too_large(found)
    kept, other = (
        {k: x for k, x in found.items() if (i := instance(k[0])) and i.kept == keeps} for keeps in (True, False)
    )
    assert kept and len(too_large({k: x._replace(registers=41) for k, x in kept.items()})) == len(kept)
    assert other and len(too_large({k: x._replace(registers=65) for k, x in other.items()})) == len(other)
    assert len(too_large({k: x._replace(shared=513) for k, x in kept.items()})) == len(kept)


# Instructions per logit that the shortest way around a hot loop may have, without softcap: of a read that makes sums,
# and of what turns kept columns, or columns read again, into dz.
MOST_INSTRUCTIONS = {"sums": 20, "sums with statistics": 27, "kept to dz": 18, "read again to dz": 26}


def too_long(found):
    """(target, kernel, loop) → its instructions per logit where they are more; and how many loops there were."""
    long, count = {}, 0
    for (target, name), kernel in found.items():
        kind = instance(name)
        if kind is None or kind.softcap:
            continue
        at_once = 4 if kind.grad == "f" else 8  # logits of a vector of dz; an exponential each
        hot = [loop for loop in kernel.loops() if kernel.around(loop, 1) is not None]
        sums = kernel.per_logit(hot[0], 5, 4)  # one more, to raise the sums; without keeping columns, of four vectors
        rates = {"sums with statistics" if kind.statistics else "sums": sums}
        if kind.grad != "v":
            last = min(kernel.per_logit(loop, at_once, at_once) for loop in hot[1:])
            rates["kept to dz" if kind.kept else "read again to dz"] = last
        count += len(rates)
        long |= {(target, name, k): x for k, x in rates.items() if x > MOST_INSTRUCTIONS[k]}
    return long, count


needs_sass = pytest.mark.skipif(
    nvcc is None or sass.tools() is None,
    reason="there is no nvcc, or neither CUDA's nor Triton's cuobjdump and nvdisasm",
)


@pytest.fixture(scope="session")
def dump(built):
    return sass.dump(built)


@needs_sass
def test_instructions_of_hot_loops(dump):
    """No more than stated, no float64 arithmetic anywhere; with more of either it is found."""
    found = sass.parse(dump)
    assert {target for target, _ in found} == {"sm_80", "sm_90a", "sm_100"}
    assert Counter(target for target, _ in found).most_common()[-1][1] == 28 + 3
    long, count = too_long(found)
    assert not long and count == 3 * (14 + 12)  # kernels without softcap, and those of them with a gradient
    in_float64 = {k for k, kernel in found.items() if any(sass.FLOAT64.match(x.name) for x in kernel.instructions)}
    assert not in_float64

    one = next(k for k in found if k[0] == "sm_90a" and instance(k[1]) == ("f", True, False, False))
    worse = []
    for x in found[one].instructions:
        worse += (
            [x]
            if x.name != sass.EXPONENTIAL
            else [x, *(sass.Instruction(x.address + k, None, "FADD", "") for k in range(1, 5))]
        )
    assert set(too_long({one: sass.Kernel(worse)})[0]) == {(*one, "sums"), (*one, "kept to dz")}


SASS = """
code for sm_00
		Function : f
        /*0000*/                   MOV R0, RZ ;    /* 0x0 */
        /*0010*/              @!P1 BRA 0x60 ;
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/                   MUFU.EX2 R1, R1 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   BRA 0x80 ;
        /*0060*/                   DADD R2, R2, R2 ;
        /*0070*/                   MUFU.EX2 R1, R1 ;
        /*0080*/                   BRA.U !UP0, 0x0 ;
        /*0090*/                   EXIT ;
"""


def test_loops_are_found():
    """Around the outer loop by either way; around the inner one; no way with three exponentials but twice the inner."""
    (kernel,) = sass.parse(SASS).values()
    inner, outer = sass.Loop(2, 4), sass.Loop(0, 8)
    assert kernel.loops() == [outer, inner]
    assert [kernel.around(outer, n) for n in (0, 1, 2, 3, 4)] == [5, 5, 7, 10, 10]
    assert [kernel.around(inner, n) for n in (1, 2, 3)] == [3, 3, None]
    assert kernel.per_logit(inner, 1, 1) == 1.5 and kernel.per_logit(inner, 3, 1) == float("inf")
    assert [x.name for x in kernel.instructions if sass.FLOAT64.match(x.name)] == ["DADD"]
    assert kernel.instructions[1] == (0x10, "!P1", "BRA", "0x60")


@needs_nvcc
def test_a_spill_is_found(tmp_path):
    """32 sums a thread in 24 registers."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void spills(float* x) { float s[32]; for (int k = 0; k < 32; ++k) s[k] = x[k * 32];\n"
        "for (int i = 0; i < 99; ++i)\n#pragma unroll\n for (int k = 0; k < 32; ++k) s[k] += s[(k + 7) % 32] * x[i];\n"
        "for (int k = 0; k < 32; ++k) x[k] = s[k]; }"
    )
    command = ["nvcc", "-arch=sm_80", "-maxrregcount=24", "-Xptxas", "-v", "-cubin", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert list(spilling(kernels(done.stderr))) == [("_Z6spillsPf", "sm_80")]


@needs_nvcc
def test_loads_without_a_gpu_and_links_no_cuda(library, built):
    assert native.why_not() is None and native.architectures() == (*TARGETS, "compute_90")
    linked = subprocess.run(["ldd", str(built)], capture_output=True, text=True, check=True).stdout
    assert not re.search("cuda|torch|c10", linked.replace(str(built), ""))
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(built)], capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert {"xpo_rows", "xpo_rows_planned", "xpo_plan_rows", "xpo_error", "xpo_architectures", "xpo_usable"} <= names
    assert all(name.startswith("xpo_") for name in names)


@needs_nvcc
def test_nothing_to_do_needs_no_device(library):
    cuda.run(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), grad=torch.zeros(0, 5))


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the launch would not fail")
def test_a_launch_without_a_gpu_is_an_error(library):
    with pytest.raises(RuntimeError, match=r"^xpo_rows: .*CUDA.* \(\d+\)$"):
        cuda.run(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), grad=torch.zeros(2, 5))


@needs_nvcc
def test_a_call_that_makes_no_sense_is_an_error(library):
    with pytest.raises(RuntimeError, match=r"xpo_rows: a size is negative or beyond .* \(-2\)"):
        native.call("xpo_rows", ctypes.byref(cuda._Rows(n=-1)), device=torch.device("cpu"))


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_what_the_library_is_for(library, built):
    """And that it is of no use where there is no driver."""
    found = doctor._library()
    assert found.startswith(
        f"{built}, for sm_80, sm_90a, sm_100f, compute_90; of no use here, there is no NVIDIA GPU here"
    )


# --- where something is missing --------------------------------------------------------------------------------------


@pytest.fixture
def missing(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "PATH", tmp_path / "library.so")
    return native.PATH


def test_no_library(missing, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("xpo_fast.head.backends._no_gpu", lambda device: None)
    assert doctor._library().startswith("absent, xpo-fast was installed without it: install CUDA's nvcc")
    arguments = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, -100])
    message = r"xpo-fast was installed without it: install CUDA's nvcc .* pip install .*, or pass backend='torch'"
    with pytest.raises(ValueError, match=message):
        xf.token_logps(*arguments, backend="cuda")
    objective = xf.Objective("sft", backend="cuda")
    with pytest.raises(ValueError, match=message):
        objective(torch.zeros(2, 3, 4), arguments[1], torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="there is no CUDA library"):
        native.library()


@pytest.mark.parametrize("content", ["not a library", "another library"])
def test_a_library_that_does_not_load(missing, content):
    if content == "another library":
        shutil.copy(torch._C.__file__ or "", missing)
    else:
        missing.write_text(content)
    assert native.why_not() is not None and "it does not load" in (native.why_not() or "")
    assert "absent, it does not load" in doctor._library()


def test_no_device(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda *_: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and torch sees none: pass backend='torch'"):
        check_backend("cuda", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="runs on GPUs, got operands on cpu: move them"):
        check_backend("cuda", torch.device("cpu"))
    check_backend("cuda", torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="this torch is for ROCm: pass backend='triton'"):
        check_backend("cuda", torch.device("cuda"))


# A library of which each call says what the driver has just been said to be.
STUB = """
#include "xpo.h"
static int code, driver, capability, asked;
XPO_EXPORT void is(int c, int d, int k) { code = c, driver = d, capability = k; }
XPO_EXPORT int times() { return asked; }
XPO_EXPORT int xpo_usable(XpoUsable* found) {
    *found = {driver, 13000, capability};
    ++asked;
    return code;
}
XPO_EXPORT const char* xpo_error(int) { return "out of memory"; }
XPO_EXPORT const char* xpo_architectures() { return "sm_80 sm_90a compute_90"; }
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "stub.cpp").write_text(STUB)
    monkeypatch.setattr(native, "PATH", compiled(tmp_path / "stub.cpp", tmp_path / "stub.so"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("xpo_fast.head.backends._no_gpu", lambda device: None)
    return native.library()


@pytest.mark.parametrize(
    ("code", "driver", "capability", "reason"),
    [
        (35, 12090, 0, "supports CUDA 12.9, and the library was compiled with CUDA 13.0: update the driver"),
        (35, 0, 0, "there is no NVIDIA GPU here, or no driver for it"),
        (100, 13000, 0, "there is no NVIDIA GPU here, or no driver for it"),
        (209, 13000, 75, r"no code for the GPU, which is sm_75: .* sm_80, sm_90a, compute_90; pass backend='triton'"),
        (2, 13000, 90, r"CUDA refuses it, out of memory \(2\): pass backend='triton'"),
    ],
)
def test_a_device_that_does_not_run_the_library(stub, code, driver, capability, reason):
    """A sentence before anything is launched, from the head and from `doctor`; asked again, as it may pass."""
    stub["is"](code, driver, capability)
    assert native.why_not() is None and stub.times() == 0
    arguments = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, 1])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the cuda backend cannot use the library of csrc/, .*{reason}"):
            xf.token_logps(*arguments, backend="cuda")
    assert re.search(f"for sm_80, sm_90a, compute_90; of no use here, .*{reason}", doctor._library())
    assert stub.times() == 3
    stub["is"](0, driver, 90)
    for _ in range(2):
        assert native.why_not(torch.device("cpu")) is None
    assert stub.times() == 4 and doctor._library().endswith("for sm_80, sm_90a, compute_90")


def test_importing_loads_no_library():
    script = "import xpo_fast; from xpo_fast import native; assert not native._load.cache_info().misses"
    subprocess.run([sys.executable, "-c", script], check=True)
