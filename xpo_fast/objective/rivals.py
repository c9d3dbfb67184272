"""`cringe`'s rivals: for each rejected token, another that the policy finds likely, and the logits of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..head.operands import Operands
from ..head.plan import PlanOptions, fit
from ..head.sampled import picked_logits, sample_rivals
from ..head.spec import scored_positions
from .batch import Batch
from .known import Known


@dataclass
class Rivals:
    """Draws them from the `top_k` likeliest; by `seed`, if there is one, going on from call to call."""

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
        """Where `seed` has got to; None at its beginning."""
        return self._loaded if self._generator is None else self._generator.get_state()

    @state.setter
    def state(self, state: Tensor | None) -> None:
        self._generator, self._loaded = None, state

    def add(self, known: Known, batch: Batch, operands: Operands) -> None:
        """Adds the logit of every rejected token and that of its rival, with their gradients, to `known.tokens`."""
        if batch.static and self.seed is not None:
            raise ValueError("seed= cannot be captured into a CUDA graph: a replay would draw the same; leave it out")
        generator = self._draws(operands.hidden.device)
        hidden, weight, vocab = operands.hidden, operands.weight, operands.vocab
        tiling, *_ = fit("torch", vocab, weight.dtype, weight.device, self.options.tile_bytes, dz=False)
        targets = batch.rejected_targets
        tokens = sample_rivals(replace(operands, targets=targets, ref=None), tiling.step, self.top_k, generator)
        at = scored_positions(targets, batch.ignore_index, vocab, batch.device)
        rejected = (batch.rows >= batch.units) & batch.scored
        h, y = hidden[at], batch.device_targets[at]
        if batch.static:  # `at` has positions that are not to be read
            h, y = (torch.where(r, x, 0) for r, x in ((rejected[at, None], h), (rejected[at], y)))
        twice = replace(operands, hidden=torch.cat([h, h]), targets=torch.cat([y, tokens[at]]))
        scores = picked_logits(twice).chunk(2)
        for name, score in zip(("neg_score", "pos_score"), scores, strict=True):
            known.tokens[name] = score.new_zeros(batch.rows.shape).index_put((at,), score)
        known.tokens["mask"] = rejected

    def _draws(self, device: torch.device) -> torch.Generator | None:
        """Without gradient anew in every call."""
        if self.seed is None:
            return None
        if not torch.is_grad_enabled():
            return torch.Generator(device).manual_seed(self.seed)
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
            if self._loaded is not None:
                self._generator.set_state(self._loaded.cpu())
        return self._generator
