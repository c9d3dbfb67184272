"""The inputs of a call's methods beside the policy's log-probs: columns, the reference's log-probs, statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batch import Batch


@dataclass
class Known:
    """The inputs of a call's methods beside the policy's log-probs."""

    columns: dict[str, Tensor]
    # Values of rows (R,), and the placeholder for units that do not count.
    rows: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)  # (N,)
    discounted_ref: Tensor | None = None  # (R,) the reference's log-probs, discounted by `ld_alpha`
    row_weight: Tensor | None = None  # (R,) the factors of `wpo`

    @property
    def learns(self) -> bool:
        """Returns whether the loss has a gradient in any of these inputs."""
        return any(x.requires_grad for x in (*self.columns.values(), *self.tokens.values()))


def row_sums(batch: Batch, logp: Tensor, positions: Tensor | None = None, ld_alpha: float | None = None) -> Tensor:
    """Returns the sums over rows (R,) of log-probs (n,) at some positions, or at all N.

    ld_alpha: factor of the log-probs beyond the length of a pair's shorter completion; None for 1.
    """
    if ld_alpha is not None:
        beyond = batch.beyond_shorter if positions is None else batch.beyond_shorter[positions]
        logp = torch.where(beyond, ld_alpha * logp, logp)
    return batch.row_sums(logp, positions)
