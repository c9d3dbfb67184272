"""DPO in a bare loop: hidden states and the head go in, a loss comes out, and no logits are made.

    python examples/dpo_loop.py

SmolLM2-135M-Instruct with a LoRA adapter learns the packaged pairs; each step takes new pairs. The reference is the
model with its adapter switched off, so the loss begins at ln 2 = 0.6931. `xpo_fast.trainer.XPOTrainer` adds what a long
run needs: checkpoints, evaluation, cached references, several processes, logging.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import xpo_fast as xf
from xpo_fast.data import Collator, encode, load
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, hidden_states, load_model


def main(model: Any, tokenizer: Any, steps: int = 12, pairs: int = 4, lr: float = 2e-4) -> list[float]:
    """Returns the loss of each step."""
    torch.manual_seed(0)
    policy: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr)
    objective, head = xf.Objective("dpo", beta=0.1), xf.Head.from_model(policy)
    data: Any = encode(load(PAIRS, kind="pair"), tokenizer, kind="pair", max_length=128)
    collate = Collator(tokenizer.pad_token_id, "pair")
    losses = []
    for batch in DataLoader(data.select(range(steps * pairs)), batch_size=pairs, collate_fn=collate):
        targets = batch.pop("targets")  # (2P, T) aligned, the chosen rows first; -100 but for the answers
        hidden = hidden_states(policy, batch)  # (2P, T, D)
        with torch.no_grad(), policy.disable_adapter():
            ref_hidden = hidden_states(policy, batch)
        if not losses:
            print(objective.plan(hidden, head, targets, ref_hidden=ref_hidden), "\n")
        out = objective(hidden, head, targets, ref_hidden=ref_hidden)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        margin, accuracy = out.metrics["rewards/margins"], out.metrics["rewards/accuracies"]
        print(f"step {len(losses):>2}  loss {out.loss:.4f}  margin {margin:+.3f}  accuracy {accuracy:.2f}", flush=True)
    return losses


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
