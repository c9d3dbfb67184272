"""bench/gpu.py runs where there is no GPU: its tiny shapes, its tables and its result file."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_quick(tmp_path):
    """Ours and the materialised loss on a CPU: correct, timed by wall clock and marked so."""
    path = tmp_path / "results.json"
    done = run("--quick", "--shapes", "64x48x1009", "--only", "torch", "triton", "plain", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wall, CPU" in done.stdout

    results = json.loads(path.read_text())
    about = results["environment"]
    assert about["device"] == "cpu" and about["clock"] == "wall, CPU"
    assert {"commit", "seed", "versions", "date"} <= about.keys() and "torch" in about["versions"]
    timed = {(r["case"], r["contender"]) for r in results["timing"] if r.get("median_ms", 0) > 0}
    cases = ("frozen", "trainable", "logps", "gather")
    assert timed >= {(case, who) for case in cases for who in ("floor", "torch", "plain")}
    ours = [r for r in results["timing"] if r["contender"] == "torch"]
    assert all(r["checked"] and not r["outside_tolerance"] and r["errors"] for r in ours)
    assert {name for r in ours for name in r["errors"]} == {"logps", "loss", "hidden_grad", "weight_grad"}


def test_needs_a_gpu():
    done = run()
    assert done.returncode == 2 and "no GPU" in done.stderr


def test_predictions_are_current(monkeypatch, capsys):
    """docs/gpu.md has what bench/predict.py prints, and what bench/launches.py does of one shape."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    launches, predict = map(importlib.import_module, ("launches", "predict"))
    text = (SCRIPT.parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    monkeypatch.setattr(launches, "SHAPES", [launches.Shape(8192, 4096, 128256)])
    monkeypatch.setattr(sys, "argv", ["a script"])

    assert predict.main() == 0
    assert text.endswith("\n\n" + capsys.readouterr().out)
    assert launches.main() == 0
    assert "\n\n" + capsys.readouterr().out + "\n" in text
