"""A policy as a reward model: its implicit reward, the log-ratio to a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models import install_fused_loss
from ..rollout import Prompt
from ..trainer.reference import row_logps
from .encoding import encode_rows, in_batches
from .spec import RewardSpec


class ImplicitReward:
    """Scorer by a policy's implicit reward β(log π − log ref), DPO's; β log π without a reference.

    per_token: divides the log-probs by the tokens of the completion, as SimPO does. `score` and the call are as in
    `RewardModel`.
    """

    __name__ = "implicit_reward"

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        tokenizer: Any,
        *,
        beta: float = 0.1,
        per_token: bool = False,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        self.models = [policy] if reference is None else [policy, reference]
        for model in self.models:
            install_fused_loss(model)
        self.tokenizer, self.beta, self.per_token, self.batch_size = tokenizer, beta, per_token, batch_size
        self.spec = RewardSpec(max_length=max_length, max_prompt_length=max_prompt_length)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the implicit reward of each completion, (R,) float32 on the CPU."""
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        if not features:
            return torch.zeros(0)
        rows = [self._logps(model, features) for model in self.models]  # (R, 2) each
        logp, length = rows[0].unbind(dim=1)
        difference = logp if len(rows) == 1 else logp - rows[1][:, 0]
        return self.beta * (difference / length if self.per_token else difference)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns the rewards as a reward function does."""
        return self.score(prompts, completions).tolist()

    def _logps(self, model: nn.Module, features: list[dict[str, Any]]) -> Tensor:
        """Returns the summed log-prob and the number of tokens of each completion, (R, 2)."""

        def run(batch: Mapping[str, Tensor]) -> Tensor:
            return row_logps(model, batch["input_ids"], batch["attention_mask"], batch["targets"])

        return in_batches(features, model, self.tokenizer, self.batch_size, run)
