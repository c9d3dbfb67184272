"""Runs each of the surveys' last systems by its command on SmolLM2, kills it once, resumes it, compares the results.

    python bench/systems.py --json bench/results/systems-cpu.json
    python bench/systems.py --only rlcd,wins --json /tmp/systems.json

Each is run twice: undisturbed, and with SIGKILL after a random share of that time, then again with --resume (commands
that keep nothing on the way are simply run again). All weights, samples, pairs and figures that a run leaves are
compared, weights bit by bit, figures without times. Eight prompts, short completions and a few steps: what is shown is
that the command works and how long it takes, not a paper's effect. Exit status 1: something failed or differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpo_fast.cli.doctor import versions
from xpo_fast.demo_data import PAIRS
from xpo_fast.files import write_json

SCORES = """
def text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
def few(completions, **_):
    return [-float(len(text(x).split())) for x in completions]
def right(completions, answer, **_):
    return [float(str(a) in text(x)) for x, a in zip(completions, answer)]
"""
PIRATE = "You are a pirate, and answer as one: 'Arr', 'matey', the sea and its rum."
TRAIN = "--max-steps 4 --save-steps 1 --save-total-limit 4 --batch-size 4 --eval-split 4 --logging-steps 1"
RECIPE = "--max-steps 2 --save-steps 1 --batch-size 4 --max-new-tokens 16"
MODELS = "--model {made}/rm-a --model {made}/rm-b --model {made}/rm-c"


@dataclass(frozen=True)
class System:
    """A command, without --output-dir; what it needs made before; and the files by which it can be resumed.

    resumable: a pattern of the first file from which --resume goes on; none for a command that is run again.
    """

    command: str
    needs: tuple[str, ...] = ()
    resumable: str = ""


def trained(command: str, *needs: str) -> System:
    """A command that trains by steps."""
    return System(f"{command} {TRAIN}", needs, "**/checkpoint-*/trainer_state.json")


def recipe(command: str) -> System:
    """A recipe."""
    return System(f"recipe {command} {RECIPE}", (), "**/*.jsonl")


MADE = {
    "dpo": trained("train --data {data}/pairs.jsonl --lr 1e-3"),
    "rm-a": trained("reward --data {data}/pairs.jsonl --seed 1 --lr 1e-3"),
    "rm-b": trained("reward --data {data}/pairs.jsonl --seed 2 --lr 1e-3"),
    "rm-c": trained("reward --data {data}/pairs.jsonl --seed 3 --lr 1e-3"),
}
SYSTEMS = {
    "rlcd": recipe("rlcd --data {data}/prompts.jsonl"),
    "rlcd-dpo": recipe("rlcd-dpo --data {data}/prompts.jsonl"),
    "rmboost": recipe("rmboost --data {data}/prompts.jsonl"),
    "iterated-rlhf": recipe("iterated-rlhf --data {data}/prompts.jsonl --judge function:{data}/score.py:few"),
    "apo-game": recipe("apo-game --data {data}/prompts.jsonl"),
    "bpo": recipe(
        "bpo --data {data}/prompts.jsonl --held-out 2 --judge function:{data}/score.py:few"
    ),
    "opro": recipe(
        "opro --data {data}/sums.jsonl --judge function:{data}/score.py:right --set iterations=2 --set draws.n=4"
    ),
    "contrastive": trained("reward --method contrastive --data {data}/pairs.jsonl"),
    "meta": trained("reward --method meta --data {data}/pairs.jsonl --samples {data}/samples.jsonl"),
    "rlp": trained("reward --method rlp --data {data}/pairs.jsonl --samples {data}/samples.jsonl"),
    "goal_conditioned": trained("reward --method goal_conditioned --data {data}/pairs.jsonl"),
    "pretraining": trained("reward --data {data}/pairs.jsonl --pretrain-data {data}/pairs.jsonl --whiten"),
    "voting": System(
        f"eval-reward --data {{data}}/pairs.jsonl {MODELS} --vote --vote-labels soft --samples {{data}}/samples.jsonl",
        ("rm-a", "rm-b", "rm-c"),
    ),
    "router": System(
        "router --data {data}/domains.jsonl --expert how={made}/rm-a --expert other={made}/rm-b", ("rm-a", "rm-b")
    ),
    "context_distillation": trained(
        f'train --method context_distillation --context "{PIRATE}" --data {{data}}/pairs.jsonl --lr 1e-3'
    ),
    "rahf-single": trained("rahf --signal single --data {data}/pairs.jsonl"),
    "rahf-dual": trained("rahf --signal dual --data {data}/pairs.jsonl"),
    "ranking": System("evaluate ranking {made}/dpo --data {data}/pairs.jsonl --block 4", ("dpo",), "blocks/*"),
    "wins": System(
        "evaluate wins {made}/dpo smollm2-135m --data {data}/prompts.jsonl --judge function:{data}/score.py:few "
        "--max-new-tokens 16 --block 2 --prior 1",
        ("dpo",),
        "blocks/*",
    ),
    "frontier": System(
        "evaluate frontier {made}/dpo --data {data}/prompts.jsonl --judge function:{data}/score.py:few "
        "--max-new-tokens 16 --block 2",
        ("dpo",),
        "blocks/*",
    ),
}  # fmt: skip


def write_data(folder: Path) -> None:
    """Writes the data of all runs, from the packaged pairs; the samples are the other prompts' own completions."""

    def write(name: str, rows: list[Any]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    pairs = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    write("pairs.jsonl", pairs[:24])
    write("prompts.jsonl", pairs[24:32])
    sides = ("chosen", "rejected")
    texts = [[row[side][-1]["content"] for side in sides] for row in pairs[32:48]]
    write(
        "samples.jsonl", [{"prompt": r["prompt"], "completions": t} for r, t in zip(pairs[32:48], texts, strict=True)]
    )
    domains = [{"prompt": row["prompt"], "domain": _domain(row["prompt"])} for row in pairs[:64]]
    write("domains.jsonl", domains)
    sums = [(a, b) for a in (17, 23, 41) for b in (12, 35)]
    write("sums.jsonl", [{"prompt": f"What is {a} + {b}?", "answer": a + b} for a, b in sums])
    (folder / "score.py").write_text(SCORES)


def _domain(prompt: list[dict[str, str]]) -> str:
    return "how" if prompt[-1]["content"].startswith("How") else "other"


def words_of(system: System, out: Path, folder: Path) -> list[str]:
    """Returns the command as words."""
    words = [word.format(data=folder / "data", made=folder / "made") for word in shlex.split(system.command)]
    return [sys.executable, "-m", "xpo_fast.cli", *words, "--output-dir", str(out)]


def run(words: list[str], log: Path, *, kill_after_s: float = 0.0, resumable: Iterator[Any] | None = None) -> float:
    """Runs a command and returns its seconds. Kills it after some, but not before it could be resumed, where asked."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("a") as file:
        child = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        while child.poll() is None:
            time.sleep(0.2)
            if kill_after_s and time.perf_counter() - began > kill_after_s and (resumable is None or next(resumable)):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                return time.perf_counter() - began
    if child.returncode:
        raise RuntimeError(f"exit status {child.returncode}: {' '.join(words)}\n{log.read_text()[-2000:]}")
    if kill_after_s:
        raise RuntimeError("it ended before it was killed")
    return time.perf_counter() - began


def contents(folder: Path) -> dict[str, Any]:
    """Returns what a run left, by name: bytes of weights, values of figures without times; checkpoints left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "checkpoint-" in name or path.name in ("train_log.jsonl", "config.json", "run.json") or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text("utf-8")), folder)
        elif path.suffix == ".jsonl":
            lines = path.read_text("utf-8").splitlines()
            found[name] = [_timeless(json.loads(line), folder) for line in lines]
    return found


def _timeless(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        timed = re.compile("time|second|_per_|throughput|memory|peak|mib")
        value = {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in value.items()}
        return {k: _timeless(v, folder) for k, v in value.items() if k != "resume" and not timed.search(k)}
    if isinstance(value, list):
        return [_timeless(v, folder) for v in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def measure(name: str, folder: Path, chance: random.Random) -> dict[str, Any]:
    """Runs a system, kills and resumes it, and returns seconds and what differs."""
    system = SYSTEMS[name]
    for need in system.needs:
        if not (folder / "made" / need / "results.json").is_file():
            run(words_of(MADE[need], folder / "made" / need, folder), folder / "logs" / f"{need}.log")
    whole, part = folder / "whole" / name, folder / "killed" / name
    seconds = run(words_of(system, whole, folder), folder / "logs" / f"{name}.log")
    words = words_of(system, part, folder)

    def resumable() -> Iterator[bool]:
        while True:
            yield not system.resumable or any(part.glob(system.resumable))

    log = folder / "logs" / f"{name}-killed.log"
    killed = run(words, log, kill_after_s=seconds * chance.uniform(0.4, 0.8), resumable=resumable())
    again = run([*words, *(["--resume"] if system.resumable else [])], log)
    one, other = contents(whole), contents(part)
    differ = sorted(k for k in one.keys() | other.keys() if k not in one or k not in other or one[k] != other[k])
    return {
        "seconds": round(seconds, 1),
        "killed_after_s": round(killed, 1),
        "resumed_s": round(again, 1),
        "compared": len(one),
        "weights": sum(k.endswith(".safetensors") for k in one),
        "differ": differ,
    }


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="comma-separated names of systems")
    parser.add_argument("--folder", type=Path, default=Path("runs/systems"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the times at which runs are killed")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(SYSTEMS)
    if unknown := [name for name in names if name not in SYSTEMS]:
        parser.error(f"no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = json.loads(args.json.read_text("utf-8"))["systems"] if args.json.is_file() else {}
    write_data(args.folder.resolve() / "data")
    failed = False
    for name in names:
        try:
            results[name] = measure(name, args.folder.resolve(), random.Random(f"{args.seed} {name}"))
        except RuntimeError as error:
            results[name] = {"failed": str(error)[-500:]}
            print(error, flush=True)
        failed |= bool(results[name].get("failed") or results[name]["differ"])
        print(name, results[name], flush=True)
        write_json(args.json, {"versions": versions(), "systems": results})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
