"""Trains a reward model on Anthropic's HH pairs: held-out accuracy before and after one epoch.

    python bench/reward_hh.py --data hh-rlhf-harmless-test.jsonl.gz --json bench/results/reward-hh.json \\
        --plot docs/reward_hh.png

The model is SmolLM2-135M-Instruct in bfloat16 with LoRA on its last layers and a value head, the loss Bradley–Terry.
The seed draws the held-out pairs (no prompt is in both parts), the order, the adapter and the head. `before` is the
same model with its random head. The gain is paired: both accuracies are of the same held-out pairs. `the shorter` is
the accuracy of always preferring the shorter answer. Exit status 1: a seed's gain is below two standard errors.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import logging as transformers_logging

from xpo_fast import data
from xpo_fast.bench.measure import environment, read_json, table
from xpo_fast.files import write_json
from xpo_fast.models import load_model
from xpo_fast.rewards.report import compare, plot, score_pairs, summary
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="pairs of chosen and rejected transcripts")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--json", metavar="FILE", type=Path, help="write the results to FILE; runs that it has are not repeated")
    add("--plot", metavar="FILE", help="write a plot of the first seed's scores after training to FILE")
    add("--held-out", type=int, default=900, help="number of pairs to measure on")
    add("--train-pairs", type=int, default=1412, help="number of pairs to train on")
    add("--max-length", type=int, default=128, help="in tokens; longer prompts are cut at their beginning")
    add("--layers", type=int, default=10, help="number of last layers with an adapter")
    add("--rank", type=int, default=16)
    add("--lr", type=float, default=1e-4, help="learning rate of the adapter")
    add("--value-head-lr", type=float, default=1e-3)
    add("--batch-size", type=int, default=16)
    args = parser.parse_args()
    logging.getLogger("xpo_fast").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()

    runs = {run["seed"]: run for run in read_json(args.json).get("runs", [])}
    for seed in args.seeds:
        if seed not in runs:
            runs[seed] = run(args, seed, args.plot if seed == args.seeds[0] else None)
        if args.json:
            write_json(args.json, {"runs": [runs[seed] for seed in sorted(runs)]})
    rows = [
        [
            str(r["seed"]),
            *(f"{x:.3f}" for x in (r["before"]["accuracy"], r["after"]["accuracy"])),
            "[{:.3f}, {:.3f}]".format(*r["after"]["accuracy_95"]),
            "{accuracy_difference:+.3f} ± {standard_error:.3f}".format(**r["gain"]),
            f"{r['before']['log_loss']:.3f}",
            f"{r['after']['log_loss']:.3f}",
            f"{1 - r['after']['longer_wins']:.3f}",
            f"{r['cpu_s']:.0f}",
        ]
        for r in (runs[seed] for seed in args.seeds)
    ]
    header = ["seed", "before", "after", "95%", "gain ± standard error", "log-loss before", "after", "the shorter"]
    print(table([*header, "CPU s"], rows))
    gains = [runs[seed]["gain"] for seed in args.seeds]
    return int(any(g["accuracy_difference"] < 2 * g["standard_error"] for g in gains))


def run(args: argparse.Namespace, seed: int, picture: str | None) -> dict[str, Any]:
    """Trains with a seed and returns the record of the run. picture: file for a plot of the scores after training."""
    train, held = split(data.load(args.data, kind="pair"), args.held_out, args.train_pairs, seed)
    model, tokenizer = load_model("smollm2-135m", dtype="bfloat16")
    layers: Any = model.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model,
            config(args, seed, folder),
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=args.rank,
                lora_alpha=2 * args.rank,
                target_modules=[f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
                layers_to_transform=list(range(layers - args.layers, layers)),
            ),
        )
        start, cpu = time.perf_counter(), time.process_time()
        before = score_pairs("before", trainer.reward_model(), held)
        show(before)
        trainer.train()
        after = score_pairs("after", trainer.reward_model(), held)
        show(after)
    if picture:
        plot(after, picture)
    return {
        "seed": seed,
        "environment": environment(),
        "data": Path(args.data).name,
        "options": {n: x for n, x in vars(args).items() if n not in ("data", "seeds", "json", "plot")},
        "train_pairs": len(train),
        "before": summary(before),
        "after": summary(after),
        "gain": compare(after, before),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
    }


def config(args: argparse.Namespace, seed: int, folder: str) -> RewardConfig:
    """Returns the settings of the trainer."""
    return RewardConfig(
        output_dir=folder,
        use_cpu=True,
        seed=seed,
        max_length=args.max_length,
        learning_rate=args.lr,
        value_head_learning_rate=args.value_head_lr,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=2 * args.batch_size,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )


def split(rows: Any, held: int, train: int, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Returns rows to train on and held-out rows, which share no prompt. held, train: their numbers."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(rows["prompt"]):
        groups.setdefault(json.dumps(prompt, sort_keys=True), []).append(i)
    order = list(groups)
    random.Random(seed).shuffle(order)
    taken: list[int] = []
    while len(taken) < held:
        taken += groups[order.pop()]
    rest = [i for prompt in order for i in groups[prompt]][:train]
    return rows.select(rest), [rows[i] for i in taken]


def show(scores: Any) -> None:
    """Prints the accuracy, the log-loss and the share of pairs whose longer answer wins."""
    figures = summary(scores)
    low, high = figures["accuracy_95"]
    accuracy = f"accuracy {figures['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {figures['pairs']} pairs"
    rest = f"log-loss {figures['log_loss']:.4f}, longer wins {figures['longer_wins']:.3f}"
    print(f"{scores.name}: {accuracy}, {rest}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
