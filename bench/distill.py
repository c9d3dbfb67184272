"""Distils SmolLM2-135M into itself without every second layer, 20 steps by each method: `xpo-fast distill` on the CPU.

    python bench/distill.py --json bench/results/distill-cpu.json
    python bench/distill.py --only "gkd;reverse_kl"

The student has 15 of the teacher's 30 layers, and their weights; a LoRA adapter on them is trained. Shown are the loss
of the first and of the last five steps, the loss of rows held out before and after, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from xpo_fast import cli
from xpo_fast.cli.doctor import versions
from xpo_fast.demo_data import PAIRS
from xpo_fast.files import write_json
from xpo_fast.models import load_model

STEPS = 20
METHODS: dict[str, list[str]] = {
    "gkd": [],
    "forward_kl": [],
    "reverse_kl": [],
    "gkd, half on-policy": ["--on-policy", "0.5", "--max-new-tokens", "24"],
    "sampled_kl": ["--on-policy", "--max-new-tokens", "24"],
}
HOW = ["--lr", "2e-3", "--batch-size", "2", "--max-length", "48", "--eval-split", "2", "--warmup-ratio", "0", "--cpu"]


def make_student(folder: Path) -> None:
    """Saves the teacher without every second layer."""
    model, tokenizer = load_model("smollm2-135m", dtype="float32")
    lm: Any = model
    kept = [layer for k, layer in enumerate(lm.model.layers) if k % 2 == 0]
    for k, layer in enumerate(kept):
        layer.self_attn.layer_idx = k
    lm.model.layers = type(lm.model.layers)(kept)
    lm.config.num_hidden_layers = len(kept)
    if getattr(lm.config, "layer_types", None):
        lm.config.layer_types = lm.config.layer_types[: len(kept)]
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(name: str, student: Path, data: Path, out: Path) -> dict[str, float]:
    """Runs a command and returns its figures."""
    words = ["distill", "--teacher", "smollm2-135m", "--model", str(student), "--method", name.partition(",")[0]]
    words += ["--data", str(data), "--max-steps", str(STEPS), "--output-dir", str(out), "--logging-steps", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([*words, *HOW, *METHODS[name]])
    if code:
        raise SystemExit(code)
    results = json.loads((out / "results.json").read_text())
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    return {
        "first_steps": sum(losses[:5]) / 5,
        "last_steps": sum(losses[-5:]) / 5,
        "held_out_before": results["before"]["eval_loss"],
        "held_out_after": results["after"]["eval_loss"],
        "seconds_per_step": results["train"]["train_runtime"] / STEPS,
    }


def main() -> int:
    """Prints a line a method; exit status 1 if a loss did not fall."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"names with semicolons, of {'; '.join(METHODS)}")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_student(home / "student")
        (home / "pairs.jsonl").write_text("".join(PAIRS.read_text("utf-8").splitlines(keepends=True)[:44]), "utf-8")
        for k, name in enumerate(args.only.split(";") if args.only else METHODS):
            found[name] = run(name, home / "student", home / "pairs.jsonl", home / str(k))
            print(name, {key: round(x, 4) for key, x in found[name].items()}, flush=True)
    if args.json:
        write_json(Path(args.json), {"versions": versions(), "steps": STEPS, "methods": found})
    return int(any(x["held_out_after"] >= x["held_out_before"] for x in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
