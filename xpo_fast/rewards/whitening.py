"""The part of `RewardTrainer` that measures mean and deviation of the rewards, which whiten them from then on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..layouts import Inputs
from ..models.modes import evaluating
from ..models.value_head import value_head
from ..reduce import sum_over_ranks
from ..trainer import UnitTrainer
from .config import RewardConfig
from .spec import RewardSpec

WHITEN_AT_MOST = 1000  # units of the data that mean and standard deviation are measured on


class Whitens(UnitTrainer):
    """Trainer whose spec has mean and standard deviation of the rewards once `train` has ended, if args ask for it."""

    args: RewardConfig
    spec: RewardSpec

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as `UnitTrainer` does; with args.whiten then measures mean and deviation of the rewards.

        They are measured on the rows held out, of several sets of them on the first, or else on training rows.
        """
        found = super().train(*args, **kwargs)
        if self.args.whiten:
            held = self.eval_dataset
            self.whiten(next(iter(held.values())) if isinstance(held, dict) else held)
        return found

    def whiten(self, encoded: Any = None) -> None:
        """Sets the spec's mean and standard deviation to those of the rewards of at most `WHITEN_AT_MOST` units.

        encoded: rows of `eval_dataset`; None: of the training rows. Raises ValueError if all rewards are equal.
        """
        rows = self.train_dataset if encoded is None else encoded
        rows = rows.select(np.unique(np.linspace(0, len(rows) - 1, WHITEN_AT_MOST).astype(int)))
        self.spec = dataclasses.replace(self.spec, mean=None, std=None)
        found: list[Tensor] = []
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        head = value_head(unwrapped)
        assert head is not None
        with evaluating(self.model), torch.no_grad(), self.compute_loss_context_manager():
            for drawn in self.get_eval_dataloader(rows):
                for batch in map(self._prepare_inputs, self._micro_batches([self._without_repeats(drawn)])):
                    of = Inputs.of(batch)
                    outputs = of.run(self.model, lambda hidden, _, of=of: self.spec.read(head, hidden, *of[1:3]))
                    found.append(self.spec.mix(outputs)[(of.targets != data.IGNORE_INDEX).any(dim=1)].double())
        x = torch.cat(found)
        count, total = sum_over_ranks(torch.stack([x.new_tensor(len(x)), x.sum()]))
        mean = total / count
        std = (sum_over_ranks(((x - mean) ** 2).sum()) / (count - 1)).sqrt()
        if not 0 < float(std) < math.inf:
            raise ValueError(
                f"whiten: {int(count)} rewards of standard deviation {float(std):g}; expected two or more that differ"
            )
        self.spec = dataclasses.replace(self.spec, mean=float(mean), std=float(std))
