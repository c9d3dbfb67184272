"""Liger's classes with the import replaced: its documented ORPO, on SmolLM2-135M-Instruct and the packaged pairs.

    python examples/liger_swap.py

    -from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss
    +from xpo_fast.integrations.liger import LigerFusedLinearORPOLoss

If Liger is installed, the same lines also run with its own class, uncompiled, and the two are compared.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from xpo_fast.data import Collator, encode, load
from xpo_fast.demo_data import PAIRS
from xpo_fast.integrations.liger import LigerFusedLinearORPOLoss
from xpo_fast.models import SMOLLM2, hidden_states, load_model


def main(model: Any, tokenizer: Any, pairs: int = 4) -> dict[str, tuple[float, Any, Any]]:
    """Returns the loss and the gradients of hidden states and head, ours and, if it is installed, Liger's."""
    data: Any = encode(load(PAIRS, kind="pair"), tokenizer, kind="pair", max_length=128)
    batch = Collator(tokenizer.pad_token_id, "pair")(list(data.select(range(pairs))))
    target = batch.pop("targets")  # (2P, T) aligned, the chosen rows first: as Liger has them
    lm_head = model.get_output_embeddings()
    with torch.no_grad():
        states = hidden_states(model, batch)  # (2P, T, D)

    def run(name: str, orpo_loss: Any) -> tuple[float, Any, Any]:
        x = states.clone().requires_grad_()
        y, (chosen_logps, rejected_logps, *_) = orpo_loss(lm_head.weight, x, target)
        d_x, d_weight = torch.autograd.grad(y, (x, lm_head.weight))
        margin = (chosen_logps - rejected_logps).mean()
        print(f"{name:<10}loss {y:.5f}  mean log-prob, chosen minus rejected: {margin:+.5f}")
        return y.item(), d_x, d_weight

    found = {"xpo_fast": run("xpo_fast", LigerFusedLinearORPOLoss())}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel import chunked_loss

        found["Liger"] = run("Liger", chunked_loss.LigerFusedLinearORPOLoss(compiled=False))
        for what, ours, theirs in zip(("hidden states", "head"), found["xpo_fast"][1:], found["Liger"][1:]):
            print(f"gradients of the {what} differ by {(ours - theirs).norm() / theirs.norm():.0e} of their norm")
    return found


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
