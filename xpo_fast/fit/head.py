"""The tiles of the LM head on the device that is asked about."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..head.plan import PlanOptions, fit_tiles
from ..head.tiling import DEFAULT_TILE_BYTES, SHARE_OF_CARD, buffer_rows
from ..objective import Objective
from ..types import IGNORE_INDEX
from .trace import HEAD, Recorder

_FLOAT32 = 4


@dataclass(frozen=True)
class Tiles:
    """The tiles of a head on a device: weights (V, D) of a dtype, the device's memory, and the option tile_mib."""

    device: str
    vocab: int
    dtype: torch.dtype
    memory: int | None = None
    tile_mib: float | None = None

    def of_call(self, tokens: int, dz: bool) -> int:
        """Returns the bytes of a tile at a frozen head, from the tokens of a call and whether it has a gradient."""
        return self.size(tokens, dz=dz)

    def size(self, tokens: int, *, dz: bool, learns: bool = False, unit_tokens: int = 0) -> int:
        """Returns the bytes of a tile and of a step's logits beside it, see `Plan.tile_bytes`.

        tokens: that are scored. dz, learns, unit_tokens: as for `fit_tiles`.
        """
        budget = DEFAULT_TILE_BYTES[self.device]
        if self.device == "cuda" and self.memory is not None:
            budget = int(SHARE_OF_CARD * self.memory)
        budget = budget if self.tile_mib is None else int(self.tile_mib * 2**20)
        backend = "triton" if self.device == "cuda" else "torch"
        where = torch.device(self.device)
        tiling, own, logits = fit_tiles(
            backend, self.vocab, self.dtype, where, budget, dz=dz, learns=learns, unit_tokens=unit_tokens
        )
        rounded = (lambda n: buffer_rows(tokens, n)) if self.device == "cuda" else (lambda n: min(tokens, n))
        tile, step = map(rounded, tiling[:2])
        return self.vocab * ((0 if own is None else tile * own.itemsize) + logits * step * _FLOAT32)


class Planned(Objective):
    """An objective whose tiles take the memory of another device's."""

    _tokens: int | None = None  # of a float32 tile

    def settle(self, tiles: Tiles, dtype: torch.dtype | None, recorder: Recorder) -> None:
        """Says what is computed with. dtype: of the head's products, if precision is mixed."""
        self._tiles, self._dtype, self._recorder = tiles, dtype, recorder

    def __call__(self, hidden: Tensor, weight: Any, targets: Tensor, **given: Any) -> Any:
        """Computes the loss as `Objective` does, at a trainable head by a float32 tile of as many bytes."""
        if weight.weight.requires_grad:
            scored = int((targets != IGNORE_INDEX).sum())
            size = self._tiles.size(scored, dz=True, learns=True)
            self._tokens = max(size // (_FLOAT32 * self._tiles.vocab), 1)
        with self._recorder.labelled(HEAD):
            if self._dtype is not None:
                hidden = hidden.to(self._dtype)
                weight = dataclasses.replace(weight, weight=weight.weight.to(self._dtype))
            return super().__call__(hidden, weight, targets, **given)

    @property
    def plan_options(self) -> PlanOptions:
        """Returns the options of the head's plan."""
        return PlanOptions("torch", None, self._tokens)
