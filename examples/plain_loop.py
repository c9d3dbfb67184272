"""DPO in a bare PyTorch loop: hidden states and the head go in, a loss comes out, and no logits are made.

    python examples/plain_loop.py

SmolLM2-135M-Instruct, all weights trained in float32; each step sees pairs that it has not seen before. The reference is
a frozen copy, so the loss begins at ln 2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader

import xpo_fast as xf
from xpo_fast.data import Collator, encode, load
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, hidden_states, load_model


def main(model: Any, tokenizer: Any, steps: int = 8, pairs: int = 2, lr: float = 1e-5) -> list[float]:
    """The losses of the steps."""
    data: Any = encode(load(PAIRS, kind="pair"), tokenizer, kind="pair", max_length=128)
    collate = Collator(tokenizer.pad_token_id, "pair")
    reference = copy.deepcopy(model).requires_grad_(False)
    head, ref_head = xf.Head.from_model(model), xf.Head.from_model(reference)
    objective = xf.Objective("dpo", beta=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for batch in DataLoader(data.select(range(steps * pairs)), batch_size=pairs, collate_fn=collate):
        targets = batch.pop("targets")  # (2P, T) chosen rows, then rejected ones; -100 but for answers
        hidden = hidden_states(model, batch)  # (2P, T, D)
        with torch.no_grad():
            ref: Any = {"ref_hidden": hidden_states(reference, batch), "ref_weight": ref_head.weight}
        if not losses:
            print(objective.plan(hidden, head.weight, targets, **ref), "\n")
        out = objective(hidden, head.weight, targets, **head.kwargs(), **ref)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        margin, accuracy = out.metrics["rewards/margins"], out.metrics["rewards/accuracies"]
        print(f"{len(losses)}  loss {out.loss:.4f}  margin {margin:+.3f}  accuracy {accuracy:.2f}", flush=True)
    return losses


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
