"""Settles the layout of a trainer's batches before the first step: chosen, proved on two units, and said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layouts import Chosen, Inputs, LaysOut, Reads, Wanted, attention_of, choose, prove, with_target
from ..models.router_loss import asks_router_loss
from .reference import row_tokens

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("xpo_fast.layout")  # of its own: the command line shows its notes, too

_BATCHES, _AMONG = 8, 64  # batches whose tokens are counted; rows of which the two shortest prove the layout


def settle_layout(
    requested: str,
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    accelerator: Accelerator,
    *,
    batch_size: int,
    hindrance: str | None = None,
    backend: str = "auto",
    wanted: Wanted = with_target,
    reads: Reads | None = None,
) -> Chosen:
    """Returns the layout to train in. Logs which and why; warns, with the figures, where it does not prove itself.

    rows: of the training data, encoded. collate: makes padded batches of them. hindrance: why only padded rows can be
    read, whatever the model. wanted, reads: what is read of a batch besides log-probs of targets, see `LaysOut` and
    `prove`. Raises ValueError for a layout that the model cannot be read in. Every process must call it, before the
    model is wrapped.
    """

    def some() -> dict[str, Any]:
        shortest = sorted((rows[i] for i in range(min(len(rows), _AMONG))), key=row_tokens)[:2]
        return collate([dict(row) for row in shortest])

    chosen = choose(requested, model, lambda: sampled(rows, collate, batch_size), hindrance=hindrance, wanted=wanted)
    return proven(chosen, requested, model, some, accelerator, backend=backend, wanted=wanted, reads=reads)


def sampled(
    rows: Sequence[Mapping[str, Any]], collate: Callable[[Sequence[Any]], dict[str, Any]], batch_size: int
) -> list[dict[str, Any]]:
    """Returns some batches of encoded rows in random order, padded, for `choose` to count; always the same ones."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [collate([rows[int(i)] for i in part]) for part in order[: _BATCHES * batch_size].split(batch_size)]


def proven(
    chosen: Chosen,
    requested: str,
    model: nn.Module,
    some: Callable[[], dict[str, Any]],
    accelerator: Accelerator,
    *,
    backend: str = "auto",
    wanted: Wanted = with_target,
    reads: Reads | None = None,
) -> Chosen:
    """Returns the chosen layout if it proves itself, else the padded one. Logs which and why, or warns with figures.

    some: a padded batch of the rows that it is proved on; called only if there is something to prove. wanted, reads: as
    for `settle_layout`. An error is a reason to pad, too, but raised if the layout was asked for by name.
    """
    if chosen.layout != "padded":
        batch, device = some(), accelerator.device
        inputs = Inputs.of(batch).each(lambda x: x.to(device))
        how: Any = {"wanted": wanted(batch, "").to(device), "reads": reads}
        share = chosen.layout == "shared"
        try:
            proof: Any = prove(model, inputs, share=share, accelerator=accelerator, backend=backend, **how)
            holds = proof.holds
        except Exception as error:  # whatever a model's own code, or a compiler, makes of a sequence
            if requested != "auto":
                raise
            proof, holds = f"{type(error).__name__}: {error}", False
        if not holds:
            if accelerator.is_main_process:
                logger.warning("layout %s is not used, rows stay padded: %s", chosen.layout, proof)
            chosen = Chosen("padded", f"{chosen.layout} did not prove itself: {proof}", chosen.tokens)
        elif accelerator.is_main_process:
            attention = attention_of(model, accelerator.device)
            logger.info("layout %s; %s; %s", chosen, attention.said, proof)
    elif requested != "padded" and accelerator.is_main_process:
        logger.info("layout %s", chosen)
    return chosen


def settle_layout_of(trainer: Any, rows: Sequence[Mapping[str, Any]], reads: Reads | None = None) -> Chosen | None:
    """Settles the layout of a trainer's batches, of which `rows` are some, and has its collator lay them out.

    reads: as for `settle_layout`. Returns None, and does nothing, if the trainer's collator has been replaced.
    """
    collator = trainer.data_collator
    if not isinstance(collator, LaysOut):
        return None
    chosen = settle_layout(
        trainer.args.layout,
        trainer.model,
        rows,
        collator.collate,
        trainer.accelerator,
        batch_size=trainer.args.per_device_train_batch_size,
        hindrance=hindrance_of(trainer),
        backend=trainer.args.backend,
        wanted=collator.wanted,
        reads=reads,
    )
    collator.layout = chosen.layout
    return chosen


def hindrance_of(trainer: Any) -> str | None:
    """Returns why a trainer's rows must stay padded, whatever its model; None if they need not."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "FSDP and DeepSpeed keep the model in parts, in which layouts have not been tried"
    if trainer.args.torch_compile:
        return "torch_compile compiles the model's forward, in which a layout cannot be put"
    if getattr(trainer.args, "neftune_noise_alpha", None):
        return "the noise of neftune_noise_alpha is scaled by the length of padded rows"
    if asks_router_loss(trainer.model):
        return "the router's auxiliary loss (output_router_logits) counts the tokens of padded rows"
    return None
