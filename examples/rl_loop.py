"""GRPO in a bare loop, to be read from top to bottom: sample, reward, compare, take two steps.

    python examples/rl_loop.py

SmolLM2-135M-Instruct with a LoRA adapter answers the packaged questions, each several times. The reward is the share of
short words: 0.51 in the first rollout and 0.76 in the twelfth, a minute or two later; untrained, 0.55 there. GRPO
compares every answer with the others to the same question. `xpo_fast.rl.RLTrainer` adds what a long run needs: a
reference, a critic, checkpoints, several processes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import xpo_fast as xf
from xpo_fast.data import load_prompts, pad_rows
from xpo_fast.demo_data import PAIRS
from xpo_fast.methods.advantages import group_normalised
from xpo_fast.models import SMOLLM2, hidden_states, load_model
from xpo_fast.rewards import Rewards
from xpo_fast.rollout import GenerateRollout, Sampling

TOKENS = 16  # that an answer may have


def short_words(completions: list[Any], **_: Any) -> list[float]:
    """Returns the share of each answer's words that have at most four letters."""
    words = [[word.strip(".,:;!?*\"'()") for word in messages[-1]["content"].split()] for messages in completions]
    return [sum(len(word) <= 4 for word in said) / max(len(said), 1) for said in words]


def main(
    model: Any, tokenizer: Any, rollouts: int = 12, prompts: int = 4, answers: int = 4, lr: float = 1e-3
) -> list[tuple[float, float]]:
    """Returns the mean reward and the loss of each rollout."""
    torch.manual_seed(0)
    policy: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr)
    rollout, rewards = GenerateRollout(policy, tokenizer), Rewards(short_words)
    objective, head = xf.Objective("grpo", eps=0.2), xf.Head.from_model(policy)
    questions = [row["prompt"] for row in load_prompts(PAIRS)]
    log = []
    for k in range(rollouts):
        asked = questions[k * prompts : (k + 1) * prompts]
        samples = rollout.generate(asked, answers, sampling=Sampling(TOKENS), seed=k)
        reward = rewards(samples).rewards  # (R,), the answers to a question side by side
        advantage = group_normalised(reward.view(prompts, answers)).flatten()  # (R,)
        batch = pad_rows(list(zip(samples.prompt_ids, samples.completion_ids)), tokenizer.pad_token_id)
        targets = batch.pop("targets")  # (R, T) aligned; -100 except in answers
        old_logp = torch.zeros(targets.shape)
        old_logp[targets != -100] = torch.tensor([x for logps in samples.logps or () for x in logps])
        for _ in range(2):  # the first step is on-policy, and its loss 0; the second has a ratio to clip
            hidden = hidden_states(policy, batch)  # (R, T, D)
            out = objective(hidden, head, targets, advantage=advantage, old_logp=old_logp)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        log.append((reward.mean().item(), out.loss.item()))
        print(f"rollout {k + 1:>2}  reward {reward.mean():.3f}  loss {out.loss:+.4f}", flush=True)
    return log


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
