"""Layouts of trainers as a whole: those that no forward asks, and RewardTrainer, whose forward is a classifier's."""

from __future__ import annotations

from typing import Any

from trl.trainer import base_trainer, reward_trainer

from ...trainer.layout import hindrance_of
from .seams import THEIRS, TRAINERS, current_layouts, in_layout

_SERVED = (*(module.__name__ for module in TRAINERS), reward_trainer.__name__)


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    """Makes a trainer of TRL, and refuses, or says, that its rows must stay padded."""
    THEIRS[base_trainer._BaseTrainer, "__init__"](self, *args, **kwargs)
    layouts = current_layouts()
    if layouts is not None:
        # What TRL has of the trainer's classes: those of others go by the one that they are made from.
        theirs = [c for c in type(self).__mro__ if c.__module__.startswith("trl.")]
        computes = next((c for c in theirs if "compute_loss" in vars(c)), theirs[0])
        if computes.__module__ in _SERVED:
            layouts.meet(self.model, _hindrance(self))
        else:
            why = "layouts are for trainers on TRL's fused head (SFT, DPO, KTO, GRPO, RLOO) and for reward models"
            layouts.stay_padded(theirs[0].__name__, why)


def _hindrance(trainer: Any) -> str | None:
    """Returns why a trainer's rows must stay padded, whatever its model; None if they need not."""
    parallel = trainer.accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        return "rows or layers are split over processes, in which layouts have not been tried"
    return hindrance_of(trainer)


def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Computes RewardTrainer's loss in a layout; the classifier's own forward pools the rows' hidden states."""
    given = {name: x for name, x in inputs.items() if name != "margin"}
    with in_layout(self.model, given, None):
        return THEIRS[reward_trainer.RewardTrainer, "compute_loss"](self, model, inputs, *args, **kwargs)
