"""The rival tokens of `cringe`: for each rejected token another one that the policy finds likely, and both logits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..head.operands import Operands
from ..head.plan import PlanOptions, fit_tiles
from ..head.sampled import picked_logits, sample_rivals
from ..head.spec import scored_positions
from .batch import Batch
from .known import Known


@dataclass
class Rivals:
    """Draws rivals from the `top_k` most likely tokens, by one generator over all calls if there is a `seed`."""

    top_k: int
    seed: int | None
    options: PlanOptions
    _generator: torch.Generator | None = None
    _loaded: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, value, kinds in (("top_k", self.top_k, (int,)), ("seed", self.seed, (int, type(None)))):
            if type(value) not in kinds:
                raise ValueError(f"expected {name} to be int, got {value!r}")
        if self.top_k < 1:
            raise ValueError(f"expected top_k of at least 1, got {self.top_k}")

    @property
    def state(self) -> Tensor | None:
        """Returns the state of the seed's generator; None before its first draw."""
        return self._loaded if self._generator is None else self._generator.get_state()

    @state.setter
    def state(self, state: Tensor | None) -> None:
        """Restores the state of the seed's generator; None for its beginning."""
        self._generator, self._loaded = None, state

    def add(self, known: Known, batch: Batch, operands: Operands) -> None:
        """Draws a rival of every rejected token, and adds both tokens' logits, differentiable, to `known.tokens`."""
        if batch.static and self.seed is not None:
            raise ValueError("seed= cannot be captured into a CUDA graph: a replay would draw the same; leave it out")
        generator = self._seeded(operands.hidden.device)
        hidden, weight, vocab = operands.hidden, operands.weight, operands.vocab
        tiling, *_ = fit_tiles("torch", vocab, weight.dtype, weight.device, self.options.tile_bytes, dz=False)
        targets = batch.rejected_targets
        tokens = sample_rivals(replace(operands, targets=targets, ref=None), tiling.step, self.top_k, generator)
        at = scored_positions(targets, batch.ignore_index, vocab, batch.device)
        rejected = (batch.rows >= batch.units) & batch.scored
        h, y = hidden[at], batch.device_targets[at]
        if batch.static:  # `at` contains positions that must not be read
            h, y = (torch.where(r, x, 0) for r, x in ((rejected[at, None], h), (rejected[at], y)))
        twice = replace(operands, hidden=torch.cat([h, h]), targets=torch.cat([y, tokens[at]]))
        scores = picked_logits(twice).chunk(2)
        for name, score in zip(("neg_score", "pos_score"), scores, strict=True):
            known.tokens[name] = score.new_zeros(batch.rows.shape).index_put((at,), score)
        known.tokens["mask"] = rejected

    def _seeded(self, device: torch.device) -> torch.Generator | None:
        """Returns the generator of this call's draws, or None without a seed.

        Calls with gradient share one generator; a call without gradient gets a new one, so that an evaluation is
        repeatable and does not change the draws of training.
        """
        if self.seed is None:
            return None
        if not torch.is_grad_enabled():
            return torch.Generator(device).manual_seed(self.seed)
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
            if self._loaded is not None:
                self._generator.set_state(self._loaded.cpu())
        return self._generator
