"""An actor's update as verl 0.9 makes it (not run here), with Liger's import replaced: packed rows, entropy, PPO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import xpo_fast as xf

# The line. verl/utils/experimental/torch_functional.py has `from liger_kernel.ops import …`; where verl must stay as it
# is, set liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction to this before verl is imported.
from xpo_fast.integrations.liger import LigerFusedLinearScaledCrossEntropyFunction
from xpo_fast.models import SMOLLM2, hidden_states, load_model, own_logits


def log_probs_and_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Calls it as verl does for its impl_backend liger: hidden (1, N, D) without padding, tokens (1, N)."""
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, tokens.reshape(-1)
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*flat, temperature, -100, 1, True)
    return -nll.view(tokens.shape), entropy.view(tokens.shape)


def main(model: Any, tokenizer: Any, epochs: int = 4, temperature: float = 0.8, bonus: float = 1e-3) -> list[float]:
    texts = ["Apples brown when cut, unless", "A metaphor says", "Rain is water that"]
    rows = [tokenizer(text + " it is what it is.")["input_ids"] for text in texts]
    ids = torch.cat([torch.tensor(row) for row in rows])[None]  # (1, N)
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = {"input_ids": ids, "position_ids": places}  # without padding: the positions say where rows begin
    predicts = ids.roll(-1, 1)
    mask = places.roll(-1, 1) > 0  # not from the last token of a row
    advantage = torch.cat([torch.full((len(row),), a) for row, a in zip(rows, (1.0, -0.5, -0.5))])[None]
    weight, losses = xf.Head.from_model(model).weight, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)
    old: Any = None
    for _ in range(epochs):
        logp, entropy = log_probs_and_entropy(hidden_states(model, packed), weight, predicts, temperature)
        old = logp.detach() if old is None else old
        ratio = (logp - old).exp()
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = (policy - bonus * entropy)[mask].mean()
        with torch.no_grad():
            every = (own_logits(model, packed).double() / temperature).log_softmax(-1)
            apart = (every.gather(-1, predicts[..., None])[..., 0] - logp)[mask].abs().max()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {loss:+.5f}  entropy {entropy[mask].mean():.3f}  from all logits {apart:.0e}", flush=True)
    return losses


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
