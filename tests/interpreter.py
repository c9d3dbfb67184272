"""Where the kernels of Triton are checked: interpreted on the CPU, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when a kernel is declared. So the checks of a file, its functions check_*, run in a
process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux alone")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="launches the kernels on a GPU, and there is none")
# NumPy's, in the interpreter; the last of Triton 3.6, which needs NumPy < 2.4 there.
numpy_warnings = [
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def run_checks(file: str, *, interpreted: bool) -> None:
    """The checks of a test file, all of which pass and one of which there is."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-o", "python_functions=check_*", file]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN or an invalid token, so that what is not written shows; IEEE arithmetic does not warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)
