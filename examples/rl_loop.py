"""GRPO in a bare loop: sample, reward, compare, take a step. No trainer: read it from top to bottom.

    python examples/rl_loop.py

SmolLM2-135M-Instruct with a LoRA adapter answers the packaged questions, several times each. The reward is brevity: 1 − the
share of the allowed tokens that an answer takes. GRPO compares each answer with the others to the same question.
`xpo_fast.rl.RLTrainer` adds what a long run needs: checkpoints, a reference, critics, several processes, logging.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import xpo_fast as xf
from xpo_fast.data import load_prompts
from xpo_fast.demo_data import PAIRS
from xpo_fast.methods.advantages import group_normalised
from xpo_fast.models import SMOLLM2, hidden_states, load_model
from xpo_fast.rewards import Rewards
from xpo_fast.rollout import GenerateRollout, Sampling, pad_rows

TOKENS = 24  # that an answer may have


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1 - len(ids) / TOKENS for ids in completion_ids]


def main(
    model: Any, tokenizer: Any, rollouts: int = 12, prompts: int = 4, answers: int = 4, lr: float = 5e-4
) -> list[tuple[float, float]]:
    """Returns the mean reward and the loss of each rollout."""
    torch.manual_seed(0)
    policy: Any = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr)
    rollout, rewards, objective = GenerateRollout(policy, tokenizer), Rewards(brevity), xf.Objective("grpo", eps=0.2)
    questions, told = [row["prompt"] for row in load_prompts(PAIRS)], []
    for k in range(rollouts):
        asked = questions[k * prompts : (k + 1) * prompts]
        samples = rollout.generate(asked, answers, sampling=Sampling(TOKENS), seed=k)
        reward = rewards(samples).rewards  # (R,), the answers to a question side by side
        advantage = group_normalised(reward.view(prompts, answers)).flatten()
        batch = pad_rows(list(zip(samples.prompt_ids, samples.completion_ids)), tokenizer.pad_token_id)
        targets = batch.pop("targets")  # (R, T) aligned; -100 but for answers
        old_logp = torch.zeros(targets.shape)
        old_logp[targets != -100] = torch.tensor([x for logps in samples.logps or () for x in logps])
        for _ in range(2):  # the first step is on-policy, its loss is 0; the second has a ratio to clip
            hidden, head = hidden_states(policy, batch), xf.Head.from_model(policy)  # (R, T, D)
            out = objective(hidden, head, targets, advantage=advantage, old_logp=old_logp)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        told.append((reward.mean().item(), out.loss.item()))
        print(f"rollout {k + 1:>2}  reward {reward.mean():.3f}  loss {out.loss:+.4f}", flush=True)
    return told


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
