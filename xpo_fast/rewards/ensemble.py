"""Several reward models as one scorer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json
from ..methods.reward import ensemble
from ..rollout import Prompt
from .model import RewardModel
from .spec import RewardSpec


@dataclass
class RewardEnsemble:
    """Several reward models as one, see `methods.reward.ensemble`; how: "mean", "worst" or "uncertainty".

    A reward learned from comparisons has an arbitrary zero and, to a degree, an arbitrary scale. Without `standardise`,
    which brings the members to one zero and scale, "worst" would select the model with the lowest zero, and
    "uncertainty" would measure how far the zeros lie apart.
    """

    models: Sequence[RewardModel]
    how: str = "mean"
    coef: float = 1.0
    __name__ = "reward_ensemble"
    is_logit = False
    moments: Tensor | None = None  # (2, E): mean and standard deviation that standardise each member's rewards

    def standardise(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> None:
        """Sets the moments by which each member's rewards of these completions have mean 0 and standard deviation 1.

        Raises ValueError if a member gives all of them the same reward.
        """
        rewards = torch.stack([model.score(prompts, completions) for model in self.models], dim=-1)
        if len(rewards) < 2 or not (rewards.std(0) > 0).all():
            raise ValueError(
                f"expected completions to which every member gives different rewards, got {len(rewards)} of standard "
                f"deviation {rewards.std(0, correction=0).tolist()}"
            )
        self.moments = torch.stack([rewards.mean(0), rewards.std(0)])

    def save_moments(self, path: str | Path, names: Sequence[str]) -> None:
        """Writes the moments, the members' names and how they are combined, for `load_moments`."""
        assert self.moments is not None
        mean, std = self.moments.tolist()
        write_json(Path(path), {**self._about(names), "mean": mean, "std": std})

    def load_moments(self, path: str | Path, names: Sequence[str]) -> None:
        """Loads the moments that this ensemble saved. Raises ValueError for no file, or another ensemble's."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"no {path.name} in {path.parent}: expected the moments of the ensemble that the run began with"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        for what, value in self._about(names).items():
            if found[what] != value:
                raise ValueError(f"{path}: {what} was {found[what]!r} and is {value!r}: go on with the same")
        self.moments = torch.tensor([found["mean"], found["std"]])

    def _about(self, names: Sequence[str]) -> dict[str, Any]:
        return {"members": list(names), "how": self.how, "coef": self.coef}

    @property
    def tokenizer(self) -> Any:
        """The first member's tokenizer."""
        return self.models[0].tokenizer

    @property
    def spec(self) -> RewardSpec:
        """The first member's spec."""
        return self.models[0].spec

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the combined reward of each completion, (R,) float32 on the CPU."""
        rewards = torch.stack([model.score(prompts, completions) for model in self.models], dim=-1)
        if self.moments is not None:
            rewards = (rewards - self.moments[0]) / self.moments[1]
        return ensemble(rewards, self.how, self.coef)

    def compare(self, prompts: Sequence[Prompt], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """Returns P(first beats second), (R,): σ of the difference of the ensemble's rewards."""
        return torch.sigmoid(self.score(prompts, first) - self.score(prompts, second))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns the rewards as a reward function does."""
        return self.score(prompts, completions).tolist()
