"""Kills a random rank of a run under torchrun, again and again, and compares it with an undisturbed run.

    python bench/killed_rank.py --kills 3 --json bench/results/killed-rank-cpu.json

Two processes train an adapter of a tiny random model by DPO, on gloo. One of them gets SIGKILL a random time after a
checkpoint; torchrun ends the other and starts both again, and `--resume auto` goes on from the last whole checkpoint.
The weights and the losses of all steps are compared with those of a run that nothing happened to. Exit status 1:
anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rl_resume import tiny
from xpo_fast.cli.doctor import versions
from xpo_fast.files import write_json

RANKS = 2


def write_inputs(folder: Path) -> None:
    """Writes a tiny model, its tokenizer and forty pairs."""
    given = tiny()
    given["model"].save_pretrained(folder / "model")
    given["processing_class"].save_pretrained(folder / "model")
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{7 * i % 90} w1 w{i}"}
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def command(folder: Path, out: Path, steps: int, restarts: int) -> list[str]:
    """Returns the words of the run under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    launch += ["--max-restarts", str(restarts), "-m", "xpo_fast.cli"]
    train = f"train --cpu --max-steps {steps} --batch-size 2 --save-steps 5 --logging-steps 1 --lr 1e-3 --resume auto"
    files = ["--data", str(folder / "pairs.jsonl"), "--model", str(folder / "model"), "--output-dir", str(out)]
    return [sys.executable, *launch, *train.split(), "--eval-split", "0", "--lora-targets", "q_proj,v_proj", *files]


def ranks_of(parent: int) -> dict[int, int]:
    """Returns the process ids of the ranks under a process, by rank (Linux)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            words = (stat.parent / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        found |= {int(word[5:]): int(stat.parent.name) for word in words if word.startswith(b"RANK=")}
    return found


def run(folder: Path, out: Path, steps: int, kills: int, chance: random.Random) -> dict[str, Any]:
    """Runs to the end with some kills; returns what came of it."""
    log = out.with_suffix(".log")
    killed: list[dict[str, Any]] = []
    began = time.perf_counter()
    with log.open("w") as file:
        child = subprocess.Popen(command(folder, out, steps, kills + 2), stdout=file, stderr=subprocess.STDOUT)
        targets = sorted(chance.sample(range(5, steps - 5, 5), kills))
        while child.poll() is None:
            time.sleep(0.05)
            at = targets[0] if targets else None
            if at is not None and (out / f"checkpoint-{at}" / "trainer_state.json").is_file():
                time.sleep(chance.uniform(0, 0.3))
                ranks = ranks_of(child.pid)
                rank = chance.choice(sorted(ranks))
                others = [pid for r, pid in ranks.items() if r != rank]
                os.kill(ranks[rank], signal.SIGKILL)
                then = time.perf_counter()
                while any(Path(f"/proc/{pid}").exists() for pid in others):
                    time.sleep(0.05)
                killed.append({"after": at, "rank": rank, "others_ended_s": round(time.perf_counter() - then, 1)})
                targets.pop(0)
    if child.returncode:
        raise RuntimeError(f"exit status {child.returncode}\n{log.read_text()[-3000:]}")
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text("utf-8").splitlines()]
    losses = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line}
    weights = hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
    found = {"weights": weights, "losses": losses, "killed": killed, "seconds": round(time.perf_counter() - began, 1)}
    return found | {"restarts": log.read_text().count("will restart worker group")}


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the ranks and of the times at which they are killed"
    )
    parser.add_argument("--folder", type=Path, help="keep data, models and logs there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Without the last, torchrun keeps one store for all restarts, and what the killed processes wrote into it is read
    # by those that follow: they connect to addresses that are gone, or hang (pytorch#135712, #167288).
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_inputs(folder)
        whole = run(folder, folder / "whole", args.steps, 0, random.Random(args.seed))
        killed = run(folder, folder / "killed", args.steps, args.kills, random.Random(args.seed))
    differ = [name for name in ("weights", "losses") if whole[name] != killed[name]]
    result = {"ranks": RANKS, "steps": len(whole["losses"]), "killed": killed["killed"], "differ": differ}
    result["restarts"] = killed["restarts"]
    result |= {"seconds": [whole["seconds"], killed["seconds"]]}
    print(json.dumps(result, indent=1))
    if args.json:
        write_json(args.json, {"versions": versions(), **result})
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
