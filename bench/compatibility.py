"""Tries combinations of versions: a virtual environment of its own for each, and a part of the tests in it.

    python bench/compatibility.py --json bench/results/compatibility.json
    python bench/compatibility.py --only 5.24 --json bench/results/compatibility.json

The environments are made in a temporary folder and deleted afterwards. What the running environment has in the wanted
version, torch above all, is not installed again: the new one sees it behind its own packages. The file is written after
each combination, and keeps what it has of the others. A combination that was not tried is in it, with the reason.
Warnings are no failures here: those of a newer library are about what it will change. Exit status 1: tests failed in a
combination.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xpo_fast.bench.measure import environment, read_json, versions
from xpo_fast.files import write_json

ROOT = Path(__file__).resolve().parent.parent
NEWEST = {"accelerate": "1.15.0", "peft": "0.21.0", "datasets": "5.2.0", "trl": "1.16.0", "liger-kernel": "0.8.5"}
OLDEST = {"accelerate": "1.10.0", "peft": "0.18.0", "datasets": "4.7.0"}
CUDA = "its wheel for this platform is a build for CUDA of 0.5 to 0.9 GB beside CUDA's libraries: --cuda tries it"
TOOLS = ("pytest", "hypothesis", "pytest-benchmark", "matplotlib", "pyyaml", "shtab", "gguf")
# Files of tests, and what pytest selects of them: the head, trainers, references, adapters, layouts; and the
# integrations, if installed.
TESTS = (
    ("tests/test_head.py", "padded_vocabulary or no_scored_token or sequence_logps"),
    (
        "tests/test_trainer.py",
        "accumulation_equals or every_reference_starts or resuming_gives or saved_adapter or trains_on_its_data",
    ),
    ("tests/test_layout_rows.py", ""),
)
INTEGRATIONS = (
    ("tests/test_trl.py", "runs_are_the_same and (SFT or DPO or KTO or GRPO)"),
    ("tests/test_liger.py", "test_dpo or test_kto"),
)
LIMIT_S = 900


class Combination(NamedTuple):
    """Versions by package, and why they are not tried without being asked for."""

    versions: dict[str, str]
    not_by_default: str = ""

    @property
    def name(self) -> str:
        """Returns the versions in a line."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


# In order of priority: where the time ends, the others are not tried.
TRANSFORMERS = ("5.24.0", "5.20.2", "5.22.2", "5.18.0", "5.21.1", "5.19.0", "5.23.0")
COMBINATIONS = (
    Combination({"torch": "2.13.0", "transformers": "5.17.0", **OLDEST}),
    # Its peft imports a class that transformers 5 does not have: the reason for the bound in pyproject.toml.
    Combination({"torch": "2.13.0", "transformers": "5.17.0", **OLDEST, "peft": "0.17.0"}),
    *(Combination({"torch": "2.13.0", "transformers": version, **NEWEST}) for version in TRANSFORMERS),
    *(
        Combination({"torch": torch, "transformers": "5.23.0", **NEWEST}, CUDA)
        for torch in ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.14.1", "2.15.0")
    ),
)


def attempt(combination: Combination) -> dict[str, Any]:
    """Returns what came of a combination: `outcome`, the counts of tests, and `why`."""
    with tempfile.TemporaryDirectory(prefix="xpo-fast-versions-") as folder:
        python = Path(folder) / "bin" / "python"
        here = versions([*combination.versions, *TOOLS])
        of = combination.versions
        wanted = [f"{name}=={v}" for name, v in of.items() if here.get(name, "").partition("+")[0] != v]
        wanted += [name for name in TOOLS if name not in here]
        try:
            _call([sys.executable, "-m", "venv", folder])
            paths = sysconfig.get_paths(vars={"base": folder, "platbase": folder})
            Path(paths["purelib"], "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
            if wanted:
                _call([str(python), "-m", "pip", "install", "--quiet", *wanted])
        except subprocess.CalledProcessError as error:
            last = [line for line in error.stderr.splitlines() if "ERROR" in line] or error.stderr.splitlines()[-1:]
            return {"outcome": "does not install", "why": (last or [""])[0].removeprefix("ERROR: ")}
        return _tested(python, [*TESTS, *(INTEGRATIONS if "trl" in of else ())])


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _tested(python: Path, tests: Sequence[tuple[str, str]]) -> dict[str, Any]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    counts: dict[str, int] = {}
    failures: list[str] = []
    for path, select in tests:
        command = [str(python), "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-rf"]
        command += ["-o", "filterwarnings=default", path, *(["-k", select] if select else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            failures.append(f"{path}: over {LIMIT_S} s")
            continue
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
        for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]):
            counts[what] = counts.get(what, 0) + int(count)
        failures += [line.removeprefix("FAILED ").split(" - ")[0] for line in lines if line.startswith("FAILED")]
        if done.returncode not in (0, 1) or counts.get("error"):
            reasons = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]
            failures.append(f"{path}: {reasons[-1] if reasons else lines[-1]}")
    outcome = f"{counts.get('passed', 0)} tests pass"
    if failures:
        outcome += f", {len(failures)} fail"
    return {"outcome": outcome, "counts": counts, "failures": failures, "why": "; ".join(failures[:4])}


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="combinations with TEXT in their versions"
    )
    parser.add_argument("--cuda", action="store_true", help="also those whose torch is a build for CUDA")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no combination after this time")
    args = parser.parse_args()
    runs = {run["name"]: run for run in read_json(args.json).get("runs", [])}
    begun = time.monotonic()
    for c in COMBINATIONS:
        about = {"name": c.name, "versions": c.versions, "python": ".".join(map(str, sys.version_info[:3]))}
        wanted = not args.only or any(text in c.name for text in args.only)
        if c.not_by_default and not args.cuda:
            runs.setdefault(c.name, {**about, "outcome": "not tried", "why": c.not_by_default})
        elif not wanted or time.monotonic() - begun > 60 * args.minutes:
            runs.setdefault(c.name, {**about, "outcome": "not tried", "why": ""})
        else:
            print(f"trying {c.name}", file=sys.stderr, flush=True)
            start = time.monotonic()
            runs[c.name] = {**about, **attempt(c), "commit": environment()["commit"]}
            print(f"  {runs[c.name]['outcome']}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        known = [runs[x.name] for x in COMBINATIONS if x.name in runs]
        write_json(args.json, {"system": environment()["system"], "runs": known})
    return 1 if any(run.get("failures") for run in runs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
