"""Measures completions token by token: log-probs and entropy of the policy, values of its critic, the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..head import token_logps, token_stats
from ..models import Head
from ..models.value_head import ValueHead
from ..rollout import score_tokens
from .collect import Completion
from .config import RLConfig
from .reference import MovingReference

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Measure:
    """Measurement of completions by a run's models, in eval mode, without gradient, shared among the processes."""

    policy: Any
    critic: ValueHead | None
    reference: MovingReference | None
    accelerator: Accelerator
    args: RLConfig
    tile_bytes: int | None  # budget of the head's tile
    pad: int

    def __call__(self, rows: list[Completion], which: Tensor, *, by_policy: bool) -> dict[str, Tensor]:
        """Measures the rows `which` (R,) bool: (R, C) float32 on the CPU each, 0 for other rows and after a row's end.

        ref_token_logp if there is a reference; with by_policy also old_logp, entropy, and old_value if there is a
        critic. C is the longest completion of all rows. Every process must call it.
        """
        from accelerate.utils import gather_object

        order = sorted(which.nonzero()[:, 0].tolist(), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].ids))
        mine = order[self.accelerator.process_index :: self.accelerator.num_processes]
        pairs = [(rows[i].prompt_ids, rows[i].ids) for i in mine]
        size: Any = {"batch_size": self.args.per_device_eval_batch_size, "pad": self.pad}
        found: dict[str, Tensor] = {}
        with self.accelerator.autocast():
            if by_policy:
                names = ["old_logp", "entropy", *(("old_value",) if self.critic is not None else ())]
                found |= score_tokens(self.policy, pairs, names, self._by_policy, **size)
            if self.reference is not None:
                with self.reference.scoring() as model:
                    found |= score_tokens(model, pairs, ["ref_token_logp"], self._by_reference, **size)
        width = max(1, *(len(row.ids) for row in rows))
        measured = {name: torch.zeros(len(rows), width) for name in found}
        for at, values in gather_object([(mine, found)]):
            for name, x in values.items():
                measured[name][at, : x.shape[1]] = x
        return measured

    @property
    def _options(self) -> dict[str, Any]:
        return {"temperature": self.args.temperature, "tile_bytes": self.tile_bytes, "backend": self.args.backend}

    def _by_policy(self, hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
        stats = token_stats(hidden, head, targets, outputs=("entropy",), **self._options)
        assert stats.entropy is not None
        values = {} if self.critic is None else {"old_value": self.critic(hidden)[..., 0]}
        return {"old_logp": stats.logp, "entropy": stats.entropy, **values}

    def _by_reference(self, hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
        return {"ref_token_logp": token_logps(hidden, head, targets, **self._options)}
