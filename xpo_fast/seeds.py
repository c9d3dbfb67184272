"""Derives seeds from a run's seed and what they are for, so that a draw is the same in every process and after a resume."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def seed_for(*parts: Any) -> int:
    """Returns a seed of 31 bits by the `str` of the parts, which are numbers or words: seed_for(run_seed, "rollout", 3)."""
    return random.Random("/".join(map(str, parts))).getrandbits(31)


def seed_of_repr(*parts: Any) -> int:
    """Returns a seed of 31 bits by the `repr` of the parts, which tells any texts apart. Recipes draw by it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def seed_at(seed: int, *place: int) -> int:
    """Returns a seed of 31 bits for a place of a rollout, (prompt, copy), whose seed is given. Requests to a server draw by it."""
    import numpy as np

    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0]) >> 1


def permutation(count: int, *parts: Any) -> Tensor:
    """Returns a permutation of 0 … count − 1, (count,) int64, by the seed of the parts, see `seed_for`."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_for(*parts)))
