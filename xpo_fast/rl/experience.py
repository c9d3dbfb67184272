"""What a rollout leaves to train on: completions with rewards, and their advantages; batches of them; what to log of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..methods.advantages import group_normalised, leave_one_out, whiten
from ..rollout import Prompt

ADVANTAGES = ("gae", "group", "group_mean", "leave_one_out", "batch", "batch_mean", "reward")
OF_GROUPS = ("group", "group_mean", "leave_one_out")


@dataclass
class Completion:
    """A sampled and scored completion."""

    prompt: Prompt
    prompt_ids: list[int]
    completion: Any  # str, or messages
    ids: list[int]  # with the EOS it ended by
    truncated: bool
    logps: list[float] | None  # the sampler's own
    each: list[float]  # what each reward function said
    reward: float  # what is trained on; NaN where there is none


Groups = list[list[Completion]]  # the completions of a prompt side by side


@dataclass
class Experience:
    """R completions with all that steps on them need, on the CPU; C is the longest completion's tokens."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    counted: Tensor  # (R,) bool: among what the loss's mean divides by
    kept: Tensor  # (R,) bool: of these, the rows whose gradient is not 0 for sure
    columns: dict[str, Tensor]  # (R,) or (R, C): advantage, old_logp, ref_token_logp, old_value, returns, …

    @property
    def lengths(self) -> Tensor:
        """(R,) int64, tokens of each completion."""
        return torch.tensor([len(ids) for ids in self.completion_ids])

    def targets(self, rows: Tensor) -> Tensor:
        """(n, C), not −100 where a token is scored: what `Objective.count_items` looks at."""
        lengths = self.lengths
        at = torch.arange(int(lengths.max()))
        return torch.where(at < lengths[rows][:, None], 0, data.IGNORE_INDEX)


def advantages(
    reward: Tensor,  # (R,)
    valued: Tensor,  # (R,) bool
    how: str,
    group: int,
) -> Tensor:
    """Rewards of groups of so many side by side, less a baseline; 0 where there is none: (R,).

    how: "group" (GRPO), "group_mean" (Dr. GRPO), "leave_one_out" (RLOO); "batch" (all rewards together, whitened:
        REINFORCE++, arXiv 2501.03262), "batch_mean" (their mean subtracted), "reward" (as it is).
    """
    rewards, mask = torch.where(valued, reward, 0.0).view(-1, group), valued.view(-1, group)
    if how in ("group", "group_mean"):
        found = group_normalised(rewards, scale=how == "group", mask=mask)
    elif how == "leave_one_out":
        found = leave_one_out(rewards, mask=mask)
    elif how == "batch":
        found = whiten(rewards, mask)
    else:
        found = rewards - rewards[mask].mean() if how == "batch_mean" else rewards
    return torch.where(mask, found, 0.0).flatten()


def describe(groups: Groups, names: Sequence[str]) -> dict[str, float]:
    """Rewards and lengths of all that was sampled, by TRL's names; names: of the reward functions."""
    rows = [row for group in groups for row in group]
    reward = torch.tensor([row.reward for row in rows])
    each = torch.tensor([row.each for row in rows])  # (R, F)
    found = {"reward": _mean(reward), "reward_std": _std(reward)}
    for name, x in zip(names, each.unbind(1), strict=True):
        found |= {f"rewards/{name}/mean": _mean(x), f"rewards/{name}/std": _std(x)}
    return found | {
        "unrewarded": float(reward.isnan().float().mean()),
        "frac_reward_zero_std": sum(not spread(group) > 0 for group in groups) / len(groups),
        "completions/mean_length": sum(len(row.ids) for row in rows) / len(rows),
        "completions/clipped_ratio": sum(row.truncated for row in rows) / len(rows),
    }


def spread(group: Sequence[Completion]) -> float:
    """The highest reward less the lowest, of those that there are."""
    rewards = [row.reward for row in group if not math.isnan(row.reward)]
    return max(rewards) - min(rewards) if rewards else 0.0


def _mean(x: Tensor) -> float:
    return float(x.nanmean())


def _std(x: Tensor) -> float:
    known = x[~x.isnan()]
    return float(known.std()) if len(known) > 1 else 0.0 if len(known) else math.nan
