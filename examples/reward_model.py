"""A Bradley–Terry reward model, compared with the reward that a DPO policy implies, on the same held-out pairs.

    python examples/reward_model.py

SmolLM2-135M-Instruct with LoRA is trained twice from the same start on the same packaged pairs: with a value head that
learns which answer is preferred (the explicit reward), and by DPO, whose policy scores an answer by β(log π − log ref)
(the implicit reward). Both are measured on 60 held-out pairs; the reward model before training, too, and after it has
been loaded from the folder that it was saved in.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from peft import LoraConfig

from xpo_fast.data import load
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.precision import fastest
from xpo_fast.rewards.model import ImplicitReward, RewardModel
from xpo_fast.rewards.report import PairScores, compare, score_pairs, summary
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer
from xpo_fast.trainer import XPOConfig, XPOTrainer

HELD_OUT = 60
BETA = 0.1


def main(
    model: Any, tokenizer: Any, steps: int = 16, batch: int = 8, folder: str = "runs/reward_model"
) -> dict[str, PairScores]:
    """Returns the held-out scores by scorer; saves the reward model in `folder`, DPO's adapter in `folder`-dpo."""
    pairs: Any = load(PAIRS, kind="pair")
    cut = len(pairs) - HELD_OUT
    held_out = pairs.select(range(cut, len(pairs)))
    settings: Any = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 2e-4,
        "warmup_steps": 0.1,
        "max_length": 128,
        "logging_steps": 8,
        "save_strategy": "no",
    }
    operands: Any = {
        "train_dataset": pairs.select(range(cut)),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    }

    args = RewardConfig(folder, method="bradley_terry", value_head_learning_rate=1e-3, **settings)
    trainer = RewardTrainer(copy.deepcopy(model), args, **operands)
    untrained = score_pairs("untrained", trainer.reward_model(), held_out)
    trainer.train()
    trainer.reward_model().save(folder)
    loaded = RewardModel.load(folder, dtype=model.dtype)  # the adapter on the base model that it names
    explicit = score_pairs("explicit", loaded, held_out)

    args = XPOConfig(f"{folder}-dpo", method="dpo", method_args={"beta": BETA}, **settings)
    dpo = XPOTrainer(copy.deepcopy(model), args, **operands)
    dpo.train()
    dpo.save_model()
    policy = ImplicitReward(dpo.model, model, tokenizer, beta=BETA)
    implicit = score_pairs("implicit", policy, held_out)
    return {scores.name: scores for scores in (untrained, explicit, implicit)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="steps of 8 pairs in each training")
    parser.add_argument("--folder", default="runs/reward_model")
    given = parser.parse_args()
    found = main(*load_model(SMOLLM2, dtype=fastest()), steps=given.steps, folder=given.folder)
    print(f"\n{HELD_OUT} pairs held out   accuracy [95%]          log-loss   score and length correlate by")
    for scores in found.values():
        told = summary(scores)
        low, high = told["accuracy_95"]
        print(
            f"{scores.name:<19}{told['accuracy']:.3f} [{low:.3f}, {high:.3f}]{told['log_loss']:>12.4f}"
            f"{told['length_correlation']:>+12.2f}"
        )
    both = compare(found["explicit"], found["implicit"])
    print(
        f"\nexplicit − implicit: {both['accuracy_difference']:+.3f} ± {both['standard_error']:.3f} of accuracy; the "
        f"same choice in {both['same_choice']:.0%} of pairs, margins correlate by {both['margin_correlation']:.2f}"
    )
    print(f"plots: xpo-fast eval-reward --model {given.folder} --policy {given.folder}-dpo --data {PAIRS}")
