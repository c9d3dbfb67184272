"""csrc/ compiled for the host, where csrc/emulate.h stands in for a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from xpo_fast import native

CSRC = Path(__file__).parents[1] / "csrc"
OPTIONS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or native.why_not(torch.device("cuda")) is not None,
    reason="launches the CUDA library on a GPU, and one of them is missing",
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]  # emulated, and real


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.fail(
            "csrc/ is tested by compiling it for the host, and there is neither g++ nor c++ on PATH: install one",
            pytrace=False,
        )
    return found


def compiled(source: Path, library: Path, *options: str) -> Path:
    """The library of one file of C++ or CUDA."""
    command = [compiler(), *OPTIONS, "-fPIC", "-shared", f"-I{CSRC}", *options]
    done = subprocess.run([*command, "-x", "c++", str(source), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def threaded(source: Path, program: Path) -> None:
    """A program whose launches are threads, watched by ThreadSanitizer; skips where the compiler has none."""
    sanitized = [compiler(), "-std=c++17", "-fsanitize=thread", "-x", "c++"]
    # The headers of the folder that the source is in, and hardly optimised: compiling takes longer than running.
    command = [*sanitized, "-O0", "-DXPO_EMULATE", "-DXPO_EMULATE_THREADS", f"-I{source.parent}", str(source)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if done.returncode == 0:
        return
    trivial = source.with_name("trivial.cpp")
    trivial.write_text("int main() {}\n")
    lacks = subprocess.run([*sanitized, str(trivial), "-o", str(program)], capture_output=True).returncode
    if lacks:
        pytest.skip(f"{compiler()} has no ThreadSanitizer (-fsanitize=thread)")
    pytest.fail(done.stderr, pytrace=False)
