"""Derives seeds from a run's seed and their purpose: the same in every process, and after a resume."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, device


def seed_for(*parts: Any) -> int:
    """Returns a seed of 31 bits from the `str` of numbers or words: seed_for(run_seed, "rollout", 3)."""
    return random.Random("/".join(map(str, parts))).getrandbits(31)


def seed_of_repr(*parts: Any) -> int:
    """Returns a seed of 31 bits from the `repr` of the parts, for any texts. Recipes use it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def seed_at(seed: int, *place: int) -> int:
    """Returns a seed of 31 bits for a request to a server: seed is the rollout's, place is (prompt, copy)."""
    import numpy as np

    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0]) >> 1


def permutation(count: int, *parts: Any) -> Tensor:
    """Returns a permutation of 0 … count − 1, (count,) int64, from `seed_for` of the parts."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_for(*parts)))


@contextlib.contextmanager
def draws_by(seed: int, where: device) -> Iterator[None]:
    """Seeds torch's generators, of the CPU and of this device, inside; they go on afterwards as if nothing was drawn.

    Dropout, data loaders and methods such as beta_dpo draw from them.
    """
    import torch

    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
