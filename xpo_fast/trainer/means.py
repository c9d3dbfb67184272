"""Means of metrics over micro-batches and ranks, until the next log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reduce import sum_over_ranks


class Means:
    """Weighted means of named scalars, kept as detached sums on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,) each: weighted sum, weight

    def add(self, values: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Adds scalars with their weights.

        values, weights: () each, under the same names, which must be the same on every rank. A value may be NaN where
        its weight is 0.
        """
        value = torch.stack([x.detach().float() for x in values.values()])
        weight = torch.stack([weights[name].float() for name in values])
        added = torch.stack([torch.where(weight > 0, value * weight, 0.0), weight], dim=1)
        for name, sums in zip(values, added.unbind(0), strict=True):
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def pop(self) -> dict[str, float]:
        """Returns the means over all ranks since the last call, NaN without weight. Every rank must call it."""
        names, sums = list(self._sums), self._over_ranks()
        self._sums = {}
        return {} if sums is None else dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))

    def _over_ranks(self) -> Tensor | None:
        """Returns the sums of all ranks, (M, 2); None without any."""
        return sum_over_ranks(torch.stack([*self._sums.values()])) if self._sums else None

    def state_dict(self) -> dict[str, Any]:
        """Returns what all ranks have added; every rank must call it."""
        sums = self._over_ranks()
        return {"names": list(self._sums), "sums": None if sums is None else sums.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device, *, main: bool) -> None:
        """Restores a `state_dict`. main: of the one rank that holds the restored sums; the others start at 0."""
        sums = torch.zeros(0, 2) if state["sums"] is None else state["sums"]
        sums = (sums if main else torch.zeros_like(sums)).to(device)
        self._sums = dict(zip(state["names"], sums.unbind(0), strict=True))
