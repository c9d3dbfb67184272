"""An Actor with the interface of OpenRLHF (not run here): action log-probs without logits, and PPO on its samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import xpo_fast as xf
from xpo_fast.methods.advantages import group_normalised
from xpo_fast.models import SMOLLM2, hidden_states, load_model


class Actor(nn.Module):
    def __init__(self, model: Any, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns log-probs (B, A) of the last A tokens of sequences (B, T), 0 outside action_mask (B, A)."""
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        batch = {"input_ids": sequences, "attention_mask": attention_mask, "position_ids": position_ids}
        head, first = xf.Head.from_model(self.model), sequences.shape[1] - action_mask.shape[1]
        hidden = hidden_states(self.model, batch)[:, first - 1 : -1]  # (B, A, D), each of the token before
        targets = sequences[:, first:].masked_fill(~action_mask, -100)
        return xf.token_logps(hidden, head, targets, temperature=self.temperature)


def main(model: Any, tokenizer: Any, samples: int = 4, epochs: int = 4, tokens: int = 24) -> list[float]:
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    starts = ["To keep cut apples from going brown,"] * samples + ["A metaphor is"] * samples
    prompt = tokenizer(starts, padding=True, return_tensors="pt", return_token_type_ids=False)
    sequences = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=tokens)
    actions = sequences[:, prompt["input_ids"].shape[1] :]  # (B, A)
    ends = (actions == tokenizer.eos_token_id).long()
    mask = ends.cumsum(1) == ends  # up to and including the first EOS
    texts = tokenizer.batch_decode(actions, skip_special_tokens=True)
    rewards = torch.tensor([len(text.split()) / max(1, len(text)) for text in texts])  # words per character
    advantage = group_normalised(rewards.view(2, samples)).flatten()
    actor, losses = Actor(model), []
    inputs = sequences, mask, torch.cat([prompt["attention_mask"], mask], dim=1)
    with torch.no_grad():
        known = {"advantage": advantage, "old_logp": actor(*inputs), "mask": mask, "eps": 0.2}
    optimizer = torch.optim.AdamW(actor.parameters(), lr=2e-6)
    for _ in range(epochs):
        token_losses, metrics = xf.METHODS["ppo"](token_logp=actor(*inputs), **known)
        loss = token_losses.sum() / mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {loss:+.4f}  clipped {metrics['clip_ratio/region_mean'].nanmean():.0%}", flush=True)
    return losses


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
