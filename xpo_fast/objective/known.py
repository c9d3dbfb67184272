"""What a call knows beside the policy's log-probs: columns, the reference's log-probs, further statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..head.rows import sum_rows
from .batch import Batch


@dataclass
class Known:
    """What a call knows before the policy's log-probs, or beside them."""

    columns: dict[str, Tensor]
    # (R,), and what stands in units left out
    rows: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)  # (N,)
    discounted_ref: Tensor | None = None  # (R,) reference log-probs as `ld_alpha` has them
    row_weight: Tensor | None = None  # (R,) what a row's loss is multiplied by

    @property
    def learns(self) -> bool:
        """Whether the loss has a gradient by more than the policy's log-probs."""
        return any(x.requires_grad for x in (*self.columns.values(), *self.tokens.values()))


def row_sums(batch: Batch, logp: Tensor, positions: Tensor | None = None, ld_alpha: float | None = None) -> Tensor:
    """Returns log-probs (n,) of the positions, or of all, summed over rows (R,).

    ld_alpha: what the tokens of a pair beyond its shorter completion are multiplied by; None for no discount.
    """
    if ld_alpha is not None:
        beyond = batch.beyond_shorter if positions is None else batch.beyond_shorter[positions]
        logp = torch.where(beyond, ld_alpha * logp, logp)
    return sum_rows(logp, batch.rows if positions is None else batch.rows[positions], batch.count)
