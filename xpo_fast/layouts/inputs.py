"""Rows as a model is given them: padded, with the layout that they are read in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import no_router_loss, z_coefficient
from ..types import IGNORE_INDEX
from .attention import laid_out
from .model import install_layouts
from .rows import Layout, lay_out
from .split import current_shard, own_chunk

# Of a forward whose model has a chunk of each row: its attention is to exchange heads with the ranks of the others.
ROWS_SPLIT = "rows_split"
KEY = "layout"  # of a batch's layout among its tensors
# Prefixes of the rows of a batch that are read in a forward of their own: the mismatched rows of KTO, and those that
# the reference alone reads, with a context in front.
FORWARDS = ("", "kl_", "ref_")
Wanted = Callable[[Mapping[str, Tensor], str], Tensor]  # from a batch and the prefix of its keys, positions (R, T) bool


def with_target(batch: Mapping[str, Tensor], of: str = "") -> Tensor:
    """Returns the positions (R, T) bool of a batch's rows that have a target."""
    return batch[of + "targets"] != IGNORE_INDEX


class Inputs(NamedTuple):
    """R padded rows, and the layout in which a model reads them; None: as they are."""

    input_ids: Tensor  # (R, T)
    attention_mask: Tensor  # (R, T)
    targets: Tensor  # (R, T) aligned, −100 where not scored
    layout: Layout | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], prefix: str = "") -> Inputs:
        """Returns the rows of a collated batch whose keys begin with `prefix`."""
        ids, mask, targets = (batch[prefix + name] for name in ("input_ids", "attention_mask", "targets"))
        return cls(ids, mask, targets, batch.get(prefix + KEY))

    @property
    def own_targets(self) -> Tensor:
        """The targets of the positions that `run` gives hidden states of: (R, T), or of this rank's chunk (R, w)."""
        return own_chunk(self.targets, IGNORE_INDEX)

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Returns the rows in no layout, with each of their three tensors (R, T) changed."""
        return Inputs(change(self.input_ids), change(self.attention_mask), change(self.targets))

    def run(self, model: nn.Module, fused_loss: Callable[..., Any], *, router_loss: bool = False) -> Any:
        """Returns fused_loss(hidden (R, T, D), head) inside the model's forward, which reads the rows in the layout.

        Hidden states are 0 where the layout was not asked for them. model: has `install_fused_loss`; may be wrapped.
        In a block `split_over` the model reads this rank's chunk of each row, at the positions of whole rows, and
        hidden states are (R, w, D).
        router_loss: return the pair of that and the auxiliary loss () of a mixture of experts' router, and third its
        z-loss () where the config has a router_z_loss_coef.
        """
        if (shard := current_shard()) is not None:
            assert self.layout is None and not router_loss, "rows that are cut over ranks are padded, without routers"
            ids = own_chunk(self.input_ids, 0)
            at = torch.arange(shard.rank * ids.shape[1], (shard.rank + 1) * ids.shape[1], device=ids.device)
            at, split = at.expand_as(ids).contiguous(), {ROWS_SPLIT: True, **no_router_loss(model)}
            return model(input_ids=ids, position_ids=at, fused_loss=fused_loss, **split)
        routed = {"output_router_logits": True} if router_loss else no_router_loss(model)
        if router_loss and z_coefficient(model):
            routed["router_z_loss"] = True
        if self.layout is not None:
            install_layouts(model)
        with laid_out(self.layout):
            rows = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
            return model(**rows, fused_loss=fused_loss, **routed)


@dataclass
class LaysOut:
    """A collator that adds to another's batches, on the CPU, the layout in which their rows are to be read.

    layout: a name of LAYOUTS, which may be changed between batches; "padded" adds nothing. wanted: the positions
    whose hidden states are read; those with a target by default.
    """

    collate: Callable[..., dict[str, Any]]
    layout: str = "padded"
    wanted: Wanted = with_target

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        return self.lay_out(self.collate(features))

    def lay_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch on the CPU with the layout of its rows, those of `FORWARDS`."""
        if self.layout != "padded":
            for prefix in FORWARDS:
                if prefix + "input_ids" in batch:
                    rows = Inputs.of(batch, prefix)
                    wanted = self.wanted(batch, prefix)
                    batch[prefix + KEY] = lay_out(*rows[:2], wanted, share=self.layout == "shared")
        return batch


def beside(first: Inputs, second: Inputs) -> Inputs:
    """Returns the rows of both, the shorter padded at the end; laid out anew if both are, what they share once."""
    width = max(first.input_ids.shape[1], second.input_ids.shape[1])

    def wide(x: Tensor, fill: int) -> Tensor:
        return nn.functional.pad(x, (0, width - x.shape[1]), value=fill)

    fills = (0, 0, IGNORE_INDEX)
    ids, mask, targets = (
        torch.cat([wide(a, fill), wide(b, fill)]) for a, b, fill in zip(first[:3], second[:3], fills, strict=True)
    )
    if first.layout is None or second.layout is None:
        return Inputs(ids, mask, targets)
    share = first.layout.shares and second.layout.shares
    layout = lay_out(ids, mask, targets != IGNORE_INDEX, share=share)
    return Inputs(ids, mask, targets, layout.to(ids.device))
