"""PAFT: an SFT adapter and a DPO adapter, trained side by side on the same base model and merged by PEFT.

    python examples/paft.py

SmolLM2-135M-Instruct and the packaged pairs. SFT learns the preferred answers with an l1 penalty, which keeps its
adapter sparse, so that the two interfere less; DPO learns the preference (arXiv 2406.17923). PEFT merges the two
adapters into one: `cat` adds both weight differences exactly; `ties` keeps the largest entries of each, and of these
the ones with the prevailing sign. For held-out pairs it prints the nats per token of the preferred answers, and how
often the preferred answer gained more likelihood than the other. `xpo-fast recipe paft` does the same in steps that can
be resumed.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from xpo_fast.data import load
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.precision import fastest
from xpo_fast.rewards.model import ImplicitReward
from xpo_fast.rewards.report import PairScores, score_pairs
from xpo_fast.trainer import XPOConfig, XPOTrainer

METHODS = ("sft", "dpo")
L1 = 1e-5
MERGES: dict[str, dict[str, Any]] = {"cat": {}, "ties": {"density": 0.5}}


class Sparse(TrainerCallback):
    """Adds the gradient of L1·‖θ‖₁ before each optimizer step."""

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.add_(weight.detach().sign(), alpha=L1)


def train(method: str, model: Any, tokenizer: Any, pairs: Any, steps: int, folder: str) -> None:
    """Trains an adapter for the model and saves it in folder/method."""
    optimizer: Any = {"learning_rate": 2e-4, "warmup_steps": 0.1, "per_device_train_batch_size": 8, "max_steps": steps}
    run: Any = {"max_length": 128, "logging_steps": 4, "save_strategy": "no"}
    args = XPOConfig(f"{folder}/{method}", method=method, **run, **optimizer)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    operands: Any = {"train_dataset": pairs, "processing_class": tokenizer, "peft_config": lora}
    penalties = [Sparse()] if method == "sft" else []
    trainer = XPOTrainer(copy.deepcopy(model), args, callbacks=penalties, **operands)
    trainer.train()
    trainer.save_model()


def main(
    model: Any, tokenizer: Any, steps: int = 12, held_out: int = 40, folder: str = "runs/paft"
) -> dict[str, PairScores]:
    """Returns the log-probs of the held-out pairs under the base, each adapter and each merged one."""
    pairs: Any = load(PAIRS, kind="pair")
    cut = len(pairs) - held_out
    for method in METHODS:
        train(method, model, tokenizer, pairs.select(range(cut)), steps, folder)
    base = copy.deepcopy(model)
    both: Any = PeftModel.from_pretrained(base, f"{folder}/sft", adapter_name="sft")
    both.load_adapter(f"{folder}/dpo", adapter_name="dpo")
    for how, options in MERGES.items():
        both.add_weighted_adapter(list(METHODS), [1.0, 1.0], how, combination_type=how, **options)
        both.save_pretrained(folder, selected_adapters=[how])  # in folder/how
    found = {}
    rows = pairs.select(range(cut, len(pairs)))
    for name in ("base", *METHODS, *MERGES):
        if name != "base":
            both.set_adapter(name)
        scorer = ImplicitReward(model if name == "base" else both, None, tokenizer, beta=1.0)
        found[name] = score_pairs(name, scorer, rows)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of 8 pairs for each adapter")
    parser.add_argument("--folder", type=Path, default="runs/paft")
    given = parser.parse_args()
    smollm2 = load_model(SMOLLM2, dtype=fastest())
    found = main(*smollm2, steps=given.steps, folder=str(given.folder))
    print("\n      nats per token   preferred gained more")
    for name, scores in found.items():
        nats = -scores.chosen.sum() / scores.chosen_tokens.sum()
        gained = f"{(scores.margin > found['base'].margin).mean():.0%}" if name != "base" else "–"
        print(f"{name:<8}{nats:>12.4f}{gained:>24}")
