"""A loss with the interface of torchtune's LinearCrossEntropyLoss: SimPO on hidden states and the output projection.

torchtune itself is not run here: `Decoder` stands for its TransformerDecoder, and `main` for a recipe, which asks for a
subclass of SFTLoss, calls `set_model_output` once and `loss_fn(outputs, labels)` per step (here on the same pairs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import xpo_fast as xf
from xpo_fast.data import Collator, encode, load
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model


class LinearSimPOLoss(nn.Module):
    objective = xf.Objective("simpo", beta=2.0, gamma=1.0)

    def set_model_output(self, model: Any) -> None:
        model.skip_output_layer = True
        self.linear_projection = model.output

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of outputs (2P, T, D), chosen rows first, and aligned targets (2P, T), -100 ignored."""
        return self.objective(outputs, self.linear_projection.weight, targets).loss


class Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers, self.output, self.skip_output_layer = model.get_decoder(), model.lm_head, False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(tokens).last_hidden_state
        return hidden if self.skip_output_layer else self.output(hidden)


def main(model: Any, tokenizer: Any, steps: int = 5) -> list[float]:
    data: Any = encode(load(PAIRS, kind="pair"), tokenizer, kind="pair", max_length=128)
    batch = Collator(tokenizer.pad_token_id, "pair")(list(data.select(range(4))))
    decoder, loss_fn, losses = Decoder(model), LinearSimPOLoss(), []
    loss_fn.set_model_output(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-5)
    for _ in range(steps):
        loss = loss_fn(decoder(batch["input_ids"]), batch["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)}  loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
