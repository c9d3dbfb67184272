"""The layout in which a scorer's model reads rows: as asked, or shared where the model can, and proved before use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..layouts import Inputs, Reads, must_stay_padded, prove
from ..models import padding_id
from ..models.modes import evaluating

logger = logging.getLogger("xpo_fast")

_AMONG = 8  # rows, the shortest ones, of which the longest stands in the proof beside the shortest

Row = Mapping[str, Any]  # prompt_ids, chosen_ids, as `encode_rows` makes them


class ScorerLayout:
    """Settles a scorer's layout, once, on the first rows of which there are two or more.

    requested: a name of `layouts.CHOICES`; "auto" is shared where the model can be read in it, else padded. off: is
    given some rows, and whether they share what they begin with in common; returns how far the model's results are from
    those of each row alone, None for rounding. Raises ValueError for another name, and for a layout that the model
    cannot be read in.
    """

    def __init__(self, requested: str, model: nn.Module, off: Callable[[Inputs, bool], str | None]) -> None:
        stays = must_stay_padded(requested, model)
        self._model, self._off = model, off
        self._layout = "shared" if requested == "auto" else requested
        self._settled = None if stays is None else "padded"
        if stays is not None and requested == "auto":
            logger.info("layout padded: %s", stays)

    def settle(self, rows: Sequence[Row], tokenizer: Any) -> str:
        """Returns the layout to read encoded rows in; warns, once, if it does not prove itself and they stay padded."""
        if self._settled is None and len(rows) > 1:
            batch = data.Collator(padding_id(self._model, tokenizer), "chosen")(_some(rows))
            device = next(self._model.parameters()).device
            inputs = Inputs.of(batch).each(lambda x: x.to(device))
            with evaluating(self._model):
                off = self._off(inputs, self._layout == "shared")
            if off is not None:
                logger.warning("layout %s is not used, rows stay padded: %s", self._layout, off)
            self._settled = self._layout if off is None else "padded"
        return self._settled or "padded"


def off_of(
    model: nn.Module, rows: Inputs, share: bool, *, wanted: Tensor | None = None, reads: Reads | None = None
) -> str | None:
    """Returns how far a causal LM's log-probs of rows in a layout are from those of each alone; None for rounding.

    The arguments are those of `layouts.prove`.
    """
    proof = prove(model, rows, share=share, wanted=wanted, reads=reads)
    return None if proof.holds else str(proof)


def off_by(alone: Tensor, together: Tensor, dtype: torch.dtype) -> str | None:
    """Returns how far results (R, K) of a model of this dtype are apart; None for rounding."""
    # Rounding of batches of different shapes is far below the square root of a dtype's step.
    near = torch.finfo(dtype).eps ** 0.5
    if torch.allclose(alone, together, rtol=near, atol=near):
        return None
    return f"of {len(alone)} rows, results differ by {float((alone - together).abs().max()):.2g} (not by rounding)"


def _some(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the shortest row, another short one, and that one's completion behind the prompt of the first."""
    first, *others = sorted(rows, key=tokens)[:_AMONG]
    return [{**first}, {**others[-1]}, {**others[-1], "prompt_ids": first["prompt_ids"]}]


def tokens(row: Row) -> int:
    """Returns the number of tokens of an encoded row."""
    return len(row["prompt_ids"]) + len(row["chosen_ids"])
