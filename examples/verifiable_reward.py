"""GRPO, PPO or RLOO on sums that a program can check: SmolLM2-135M learns to answer in a form and to add.

    python examples/verifiable_reward.py --method grpo
    python examples/verifiable_reward.py --method grpo --shuffled     # the control

Shown a sum answered in words and one answered in square brackets, the model is to answer another in brackets and say no
more, `[12]`. The reward is 0.5 for the form and 0.5 more for the right number; without sampling the model is no nearer to
it than with, so that growing sure of itself is not enough. The control deals each rollout's rewards out anew: they say
nothing of the completions then, and what still rises is not learned from them.
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
SHOWN = [("system", "Add."),
         ("user", "2 + 5"), ("assistant", "It is 7."), ("user", "4 + 2"), ("assistant", "[6]")]  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "method_args": {"beta": 0.01}},
    "ppo": {"method": "ppo", "kl_coef": 0.05, "epochs_per_rollout": 2, "learning_rate": 1.5e-4,
            "value_head_learning_rate": 3e-3},
    "rloo": {"method": "rloo", "kl_coef": 0.01},
}  # fmt: skip


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts, and the answers that the reward function is given."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        said = [*SHOWN, ("user", f"{a} + {b}")]
        rows.append({"prompt": [{"role": role, "content": text} for role, text in said], "answer": a + b})
    return rows


def correct(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """0.5 for a number in brackets and nothing else, 1 if it is the answer."""
    found = [FORM.fullmatch(messages[-1]["content"]) for messages in completions]
    return [0.5 + 0.5 * (int(m[1]) == a) if m else 0.0 for m, a in zip(found, answer, strict=True)]


def shuffled() -> Any:
    """The same rewards, dealt to other completions; by the number of the call."""
    calls = itertools.count()

    def shuffled(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
        rewards = correct(completions, answer)
        random.Random(next(calls)).shuffle(rewards)
        return rewards

    return shuffled


def main(model: Any, tokenizer: Any, method: str, *, control: bool = False, steps: int = 30, seed: int = 0):
    """Rewards for sums held out, before and after, and the log of the steps."""
    args = RLConfig(
        f"runs/{method}{'-shuffled' if control else ''}-{seed}", max_steps=steps, seed=seed, num_generations=8,
        prompts_per_rollout=4, per_device_train_batch_size=32, max_new_tokens=12, warmup_steps=5, logging_steps=1,
        lr_scheduler_type="constant_with_warmup", save_strategy="no", **{"learning_rate": 3e-4, **METHODS[method]},
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = RLTrainer(
        model, shuffled() if control else correct, args, train_dataset=sums(512, seed), eval_dataset=sums(64, -1),
        processing_class=tokenizer, peft_config=adapter,
    )  # fmt: skip
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
    parser.add_argument("--json", type=Path, help="write rewards and log there")
    given = parser.parse_args()
    smollm2 = load_model(SMOLLM2, dtype=fastest())
    found = main(*smollm2, given.method, control=given.shuffled, steps=given.steps, seed=given.seed)
    print(f"{given.method}: reward of sums held out {found['before']:.3f}, then {found['after']:.3f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
