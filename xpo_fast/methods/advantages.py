"""Advantages from rewards. All are targets: nothing here carries a gradient, and masked entries are 0 in every result.

A mask is bool and may be left-padded, ragged or full of holes; values outside it do not matter, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .math import check


def _centred(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x minus its mean over the last dimension, 0 outside the mask; and the count (…, 1), at least 1."""
    if x.shape[-1] == 0:
        return x, mask.sum(dim=-1, keepdim=True)
    # Equal entries differ from one of them by exactly 0; from their rounded mean they need not.
    some = torch.where(mask, x, -torch.inf).amax(dim=-1, keepdim=True)
    x = torch.where(mask, x - some, 0.0)
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(mask, x - x.sum(dim=-1, keepdim=True) / count, 0.0), count


def _variance(centred: Tensor, count: Tensor) -> Tensor:
    """Returns the unbiased variance; 0 for a single entry."""
    return centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)


def _full(mask: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()


@torch.no_grad()
def gae(
    reward: Tensor,  # (B, T)
    value: Tensor,  # (B, T) V of the state in which the token was chosen
    mask: Tensor,  # (B, T)
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Computes generalised advantage estimation (arXiv 1506.02438): (advantage, returns), (B, T) each.

    A_t = δ_t + γλ A_t', δ_t = r_t + γ V_t' − V_t; returns = A + V. t' is the next token of the mask, so that masked
    tokens, at the ends and in the middle, are stepped over; after the last one V and A are 0.
    """
    check(0 <= gamma <= 1, "gamma in [0, 1]", gamma)
    check(0 <= lam <= 1, "lam in [0, 1]", lam)
    mask = mask.bool()
    reward, value = torch.where(mask, reward, 0.0), torch.where(mask, value, 0.0)
    advantage = torch.zeros_like(value)
    last = next_value = torch.zeros_like(value[:, :1].sum(dim=1))
    for t in reversed(range(value.shape[1])):
        here, v = mask[:, t], value[:, t]
        found = reward[:, t] + gamma * next_value - v + gamma * lam * last
        last, next_value = torch.where(here, found, last), torch.where(here, v, next_value)
        advantage[:, t] = torch.where(here, found, 0.0)
    return advantage, advantage + value


@torch.no_grad()
def group_normalised(
    rewards: Tensor,  # (G, K) K completions of each of G prompts
    eps: float = 1e-4,
    scale: bool = True,
    mask: Tensor | None = None,  # (G, K) where K varies
) -> Tensor:
    """Computes GRPO's advantages (arXiv 2402.03300): (reward − mean) / (std + eps) over a prompt's completions, (G, K).

    std is unbiased (K − 1). `scale=False` subtracts the mean only, as Dr. GRPO (arXiv 2503.20783) does. Equal
    rewards, and a single completion, give exactly 0.
    """
    centred, count = _centred(rewards, _full(mask, rewards))
    return centred / (_variance(centred, count).sqrt() + eps) if scale else centred


@torch.no_grad()
def leave_one_out(
    rewards: Tensor,  # (G, K) K completions of each of G prompts
    mask: Tensor | None = None,  # (G, K) where K varies
) -> Tensor:
    """Computes RLOO's advantages (arXiv 2402.14740): reward − mean of the prompt's other rewards, (G, K). Survey S48.

    A prompt with a single completion inside the mask has no baseline: 0. Raises ValueError for K = 1.
    """
    if rewards.shape[-1] == 1:
        raise ValueError("leave_one_out compares completions of a prompt: expected at least 2 of each, got 1")
    centred, count = _centred(rewards, _full(mask, rewards))
    return centred * count / (count - 1).clamp(min=1)


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor,  # as x
    eps: float = 1e-8,
) -> Tensor:
    """Returns (x − mean) / √(var + eps) over all entries of the mask together, var unbiased; 0 for a single entry."""
    mask = mask.bool()
    centred, count = _centred(x.reshape(1, -1), mask.reshape(1, -1))
    return (centred * (_variance(centred, count) + eps).rsqrt()).view(x.shape)


# How online training turns rewards into advantages; "gae" needs a critic's values, all others are `advantages`.
ADVANTAGES = ("gae", "group", "group_mean", "leave_one_out", "batch", "batch_mean", "reward")
OF_GROUPS = ("group", "group_mean", "leave_one_out")  # those that compare the completions of one prompt


def advantages(
    reward: Tensor,  # (R,) those of a prompt side by side
    valued: Tensor,  # (R,) bool, whether there is a reward
    how: str,
    group: int,  # completions per prompt
) -> Tensor:
    """Subtracts a baseline from every reward, and scales: (R,), 0 where there is no reward.

    how: "group" (GRPO), "group_mean" (Dr. GRPO), "leave_one_out" (RLOO); "batch" (all rewards together, whitened:
        REINFORCE++, arXiv 2501.03262), "batch_mean" (their mean subtracted), "reward" (the reward itself).
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
