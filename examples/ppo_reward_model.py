"""PPO against a reward model, with a critic on the policy's trunk, adaptive KL, and the adapter off as the reference.

    python examples/ppo_reward_model.py
    python examples/ppo_reward_model.py --reward-model runs/reward_model     # the one that reward_model.py saves

SmolLM2-135M-Instruct with LoRA answers the packaged questions. A reward model scores the answers (if none is given, one
is trained briefly on the packaged pairs), and a truncated answer loses 1. The divergence from the reference, times a
coefficient, is subtracted from the reward; each rollout may change the coefficient by up to a fifth, up if the
divergence is above KL_TARGET nats per answer, down if it is below. Answers to held-out questions are scored before and
after training, and the reward, divergence and length of every rollout are printed.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from peft import LoraConfig

from xpo_fast.data import load, load_prompts
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.precision import fastest
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer
from xpo_fast.rl import RLTrainer
from xpo_fast.rl.config import RLConfig

HELD_OUT = 32
KL_TARGET = 4.0


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def trained(model: Any, tokenizer: Any, steps: int) -> RewardModel:
    """Returns a reward model trained on the pairs whose questions are not held out."""
    run: Any = {"max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 4, "save_strategy": "no"}
    run |= {"learning_rate": 2e-4, "value_head_learning_rate": 1e-3, "max_length": 128}
    args = RewardConfig("runs/ppo_reward_model/reward", **run)
    pairs: Any = load(PAIRS, kind="pair")
    pairs = pairs.select(range(len(pairs) - HELD_OUT))
    operands: Any = {"train_dataset": pairs, "processing_class": tokenizer, "peft_config": lora()}
    trainer = RewardTrainer(model, args, **operands)
    trainer.train()
    return trainer.reward_model()


def main(
    model: Any,
    tokenizer: Any,
    reward_model: RewardModel | None = None,
    *,
    rollouts: int = 8,
    prompts: int = 8,
    generations: int = 2,
    tokens: int = 64,
    reward_steps: int = 12,
    folder: str = "runs/ppo_reward_model",
) -> dict[str, Any]:
    """Returns the evaluations before and after, the log of the rollouts, the policy and its reward model."""
    reward_model = reward_model or trained(copy.deepcopy(model), tokenizer, reward_steps)
    rows = [{"prompt": row["prompt"]} for row in load_prompts(PAIRS)]
    answers = prompts * generations
    rollout: Any = {"prompts_per_rollout": prompts, "num_generations": generations, "max_new_tokens": tokens}
    reward: Any = {"kl_coef": 0.05, "kl_target": KL_TARGET, "kl_horizon": answers, "missing_eos_penalty": 1.0}
    critic: Any = {"vf_coef": 0.1, "value_clip": 0.2, "gamma": 1.0, "lam": 0.95}
    steps: Any = {"epochs_per_rollout": 2, "max_steps": 2 * rollouts, "per_device_train_batch_size": answers}
    steps |= {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 2, "save_strategy": "no"}
    args = RLConfig(folder, method="ppo", **rollout, **reward, **critic, **steps)
    data: Any = {"train_dataset": rows[:-HELD_OUT], "eval_dataset": rows[-HELD_OUT:], "processing_class": tokenizer}
    trainer = RLTrainer(model, reward_model, args, peft_config=lora(), **data)
    before = trainer.evaluate()
    trainer.train()
    found = {"before": before, "after": trainer.evaluate(), "policy": trainer.model, "reward_model": reward_model}
    return found | {"log": [entry for entry in trainer.state.log_history if "loss" in entry]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reward-model", metavar="FOLDER")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--reward-steps", type=int, default=12, help="steps of the reward model, if none is given")
    given = parser.parse_args()
    scorer = given.reward_model and RewardModel.load(given.reward_model, dtype=fastest())
    smollm2 = load_model(SMOLLM2, dtype=fastest())
    found = main(*smollm2, scorer, rollouts=given.rollouts, reward_steps=given.reward_steps)
    print("\nrollout   reward   KL, nats   coef.    tokens  truncated   variance explained by the critic")
    for k, told in enumerate(found["log"]):
        print(
            f"{k + 1:>7}{told['reward']:>+9.3f}{told['objective/kl']:>+11.2f}{told['kl_coef']:>8.4f}"
            f"{told['completions/mean_length']:>10.1f}{told['completions/clipped_ratio']:>11.0%}"
            f"{told['value/explained']:>+23.2f}"
        )
    for name in ("before", "after"):
        told = {key.removeprefix("eval_"): x for key, x in found[name].items()}
        print(f"held out, {name}: reward {told['reward']:+.3f}, {told['completions/mean_length']:.1f} tokens")
