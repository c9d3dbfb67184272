"""GRPO, PPO or RLOO on sums that a program can check: SmolLM2-135M learns to answer in a form and to add.

    python examples/verifiable_reward.py --method grpo
    python examples/verifiable_reward.py --method grpo --shuffled     # the control

The prompt shows a sum answered in words and one answered in square brackets. The model is to answer another sum in
brackets and say no more, `[12]`. The reward is 0.5 for the form and 0.5 more for the right number. Greedy decoding gets
no more of it than sampling does, so becoming more certain is not enough. The control shuffles each rollout's rewards:
they then say nothing about the completions, and whatever still rises was not learned from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig

from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.precision import fastest
from xpo_fast.rl import RLTrainer
from xpo_fast.rl.config import RLConfig

FORM = re.compile(r"\s*\[\s*(\d+)\s*\]\s*")
SHOWN = [("system", "Add."), ("user", "2 + 5"), ("assistant", "It is 7."), ("user", "4 + 2"), ("assistant", "[6]")]
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"method_args": {"beta": 0.01}},
    "ppo": {"kl_coef": 0.05, "epochs_per_rollout": 2, "learning_rate": 1.5e-4, "value_head_learning_rate": 3e-3},
    "rloo": {"kl_coef": 0.01},
}


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Returns prompts, each with the answer that the reward function is given."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        said = [*SHOWN, ("user", f"{a} + {b}")]
        rows.append({"prompt": [{"role": role, "content": text} for role, text in said], "answer": a + b})
    return rows


def correct(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """Returns 0.5 for a number in brackets and nothing else, 1 if it is the answer, 0 otherwise."""
    found = [FORM.fullmatch(messages[-1]["content"]) for messages in completions]
    return [0.5 + 0.5 * (int(m[1]) == a) if m else 0.0 for m, a in zip(found, answer, strict=True)]


def shuffled() -> Any:
    """Returns a reward function that shuffles the rewards of `correct`, seeded by the index of the call."""
    calls = itertools.count()

    def shuffled(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
        rewards = correct(completions, answer)
        random.Random(next(calls)).shuffle(rewards)
        return rewards

    return shuffled


def main(model: Any, tokenizer: Any, method: str, *, control: bool = False, steps: int = 30, seed: int = 0):
    """Returns the rewards of held-out sums, before and after, and the log of the steps."""
    folder = f"runs/{method}{'-shuffled' if control else ''}-{seed}"
    rollout: Any = {"prompts_per_rollout": 4, "num_generations": 8, "max_new_tokens": 12}
    optimizer = {"learning_rate": 3e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5} | METHODS[
        method
    ]
    run: Any = {"max_steps": steps, "per_device_train_batch_size": 32, "logging_steps": 1, "save_strategy": "no"}
    args = RLConfig(folder, method=method, seed=seed, **rollout, **optimizer, **run)
    data: Any = {"train_dataset": sums(512, seed), "eval_dataset": sums(64, -1), "processing_class": tokenizer}
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = RLTrainer(model, shuffled() if control else correct, args, peft_config=adapter, **data)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"method": method, "shuffled": control, "seed": seed, "before": before, "after": after, "log": log}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="grpo")
    parser.add_argument("--shuffled", action="store_true", help="the control")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the rewards and the log to")
    given = parser.parse_args()
    smollm2 = load_model(SMOLLM2, dtype=fastest())
    found = main(*smollm2, given.method, control=given.shuffled, steps=given.steps, seed=given.seed)
    print(f"{given.method}: reward on held-out sums {found['before']:.3f}, then {found['after']:.3f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
