"""csrc/ compiled for the host, where csrc/emulate.h stands in for a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
OPTIONS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compiled(source: Path, library: Path, *options: str) -> Path:
    """The library of one file of C++ or CUDA."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.fail(
            "csrc/ is tested by compiling it for the host, and there is neither g++ nor c++ on PATH: install one",
            pytrace=False,
        )
    command = [compiler, *OPTIONS, "-fPIC", "-shared", f"-I{CSRC}", *options]
    done = subprocess.run(
        [*command, "-x", "c++", str(source), "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return library
