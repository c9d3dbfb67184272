"""Adds the auxiliary loss of a mixture of experts' router to that of a micro-batch, as TRL 1.16 does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts import Inputs
from ..models import router_coefficient, z_coefficient
from ..types import IGNORE_INDEX


def checked_coefficient(model: Any, args: Any, *, cut: bool = False) -> float:
    """Returns the coefficient of the router's auxiliary loss, 0 where the config does not ask for it.

    cut: rows are cut over ranks. Raises ValueError where the loss cannot be computed: of a part of the rows, and for a
    budget of tokens, by which micro-batches have shares of the step of any size.
    """
    found = router_coefficient(model)
    z_coefficient(model)
    if found and cut:
        raise ValueError(
            "sp_size: the router's auxiliary loss is of whole rows, which it cuts over ranks: leave it out, or set "
            "model.config.output_router_logits = False"
        )
    if found and getattr(args, "tokens_per_batch", None) is not None:
        raise ValueError(
            "tokens_per_batch: the router's auxiliary loss is the mean of those of micro-batches, which a budget of "
            "tokens cuts unevenly: leave it out, or set model.config.output_router_logits = False"
        )
    return found


def with_router_loss(
    model: nn.Module, rows: Inputs, fused: Callable[..., dict[str, Any]], coefficient: float, *, share: float | Tensor
) -> dict[str, Any]:
    """Returns fused(hidden, head) of rows, in training its loss plus coefficient · share · aux_loss.

    aux_loss is that of the micro-batch's tokens, padding left out. So is the z_loss (ST-MoE, arXiv 2202.08906), added
    times router_z_loss_coef where the config has one. share: 1 over the micro-batches of the step, of all ranks, so
    that the step has their mean, as in TRL. They are among the metrics. An evaluation's loss is the method's alone. A
    micro-batch without a target, which only fills up the ranks, has none.
    """
    if not coefficient or not model.training:
        return rows.run(model, fused)
    out, aux, *z = rows.run(model, fused, router_loss=True)
    counts = (rows.targets != IGNORE_INDEX).any().to(aux.dtype)
    loss = out["loss"] + coefficient * share * counts * aux.to(out["loss"].device)
    beside = {"aux_loss": torch.where(counts > 0, aux.detach(), 0.0)}
    for x in z:
        loss = loss + z_coefficient(model) * share * counts * x.to(loss.device)
        beside["z_loss"] = torch.where(counts > 0, x.detach(), 0.0)
    return {
        **out,
        "loss": loss,
        "metrics": {**out["metrics"], **beside},
        "counts": {**out["counts"], **dict.fromkeys(beside, counts)},
    }
