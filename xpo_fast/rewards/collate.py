"""Batches of reward models' training rows: as the method reads them, and which of their hidden states it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..trainer import row_lengths
from .encoding import both_orders, separators
from .spec import RewardSpec


def read_in_training(spec: RewardSpec, batch: Mapping[str, Tensor], of: str = "") -> Tensor:
    """Returns the positions (R, T) bool of a batch's rows whose hidden states training reads, as `LaysOut.wanted`."""
    read = spec.wanted(batch[of + "attention_mask"], batch[of + "targets"], logps=spec.reads_logps or spec.reads_states)
    if spec.reads_states:  # the state of the last token that is scored, whatever follows it
        read = read | nn.functional.pad(read[:, :-1], (1, 0)) & batch[of + "attention_mask"].bool()
    return read


def read_lengths(encoded: Any, spec: RewardSpec, tokenizer: Any) -> list[int]:
    """Returns the tokens of each encoded row as the model reads it: a preference model, both completions at once."""
    if spec.form != "preference":
        return row_lengths(encoded)
    between, after = separators(tokenizer)
    return [len(row["prompt_ids"]) + len(both_orders(row, between, after)[0]["chosen_ids"]) for row in encoded]


@dataclass
class RewardCollator:
    """`data.Collator` for reward models: adds the ratings (B, K), and both orders of pairs for a preference model."""

    pad_token_id: int
    spec: RewardSpec
    tokenizer: Any

    def __post_init__(self) -> None:
        self._collate = data.Collator(self.pad_token_id, self.spec.kind)
        if self.spec.form == "preference":
            self._between, self._after = separators(self.tokenizer)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.spec.form == "preference":
            pairs = [both_orders(row, self._between, self._after) for row in features]
            # Of both completions in one row everything is read; the masks are of one completion.
            features = [
                {**_without_masks(row), "chosen_ids": a["chosen_ids"], "rejected_ids": b["chosen_ids"]}
                for row, (a, b) in zip(features, pairs, strict=True)
            ]
        batch = self._collate(features)
        if "ratings" in features[0]:
            batch["ratings"] = torch.tensor([row["ratings"] for row in features], dtype=torch.float32)
        return batch


def _without_masks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in row.items() if not name.endswith("_mask")}
