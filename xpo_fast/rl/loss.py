"""The loss of a micro-batch of completions: the policy's, of pretraining texts beside them, and the critic's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..head import token_logps
from ..layouts import Inputs
from ..methods import METHODS
from ..models import Head
from ..models.value_head import ValueHead
from ..objective import Objective
from ..reduce import count_metrics, mean_metrics, reduce_losses
from ..trainer.mixtures import with_router_loss
from ..types import IGNORE_INDEX
from .config import RLConfig


def batch_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    denominator: dict[str, Tensor],
    *,
    objective: Objective,
    critic: ValueHead | None,
    args: RLConfig,
    router: float = 0.0,
) -> dict[str, Any]:
    """Computes the loss of a micro-batch of `Batches.batch` in one forward of the model.

    denominator: "policy" and "tokens" of the step, and its number of micro-batches, "batches", () each. router: the
    coefficient of the router's auxiliary loss. Returns loss (), with a graph; losses, those of the
    objective's terms one by one; metrics, () each; and counts, what each metric is a mean over.
    """
    rows = Inputs.of(inputs)
    count = len(rows.targets)
    columns = {name for m in objective.methods for name in m.columns}
    given: dict[str, Any] = {n: x for n, x in inputs.items() if n in columns or n == "ref_token_logp"}
    scaled: dict[str, Any] = {"temperature": args.temperature, "denominator": denominator["policy"]}

    def fused(hidden: Tensor, head: Head) -> dict[str, Any]:
        if "ptx_targets" in inputs:
            text = inputs["ptx_targets"]
            tiles: Any = {"backend": args.backend, "tile_bytes": objective.tile_bytes}
            given["ptx_logp"] = token_logps(hidden[count:], head, text, **tiles)
            given["ptx_mask"] = text != IGNORE_INDEX
        out = objective(hidden[:count], head, rows.targets, **scaled, **given)
        loss, metrics, counts = out.loss, dict(out.metrics), dict(out.counts)
        if critic is not None:
            value = critic(hidden[:count])[..., 0]
            of_values, about, counted = _critic_loss(value, inputs, args.value_clip, denominator["tokens"])
            loss = loss + args.vf_coef * of_values
            metrics |= about
            counts |= counted
        return {"loss": loss, "losses": out.losses, "metrics": metrics, "counts": counts}

    return with_router_loss(model, rows, fused, router, share=1 / denominator["batches"] if router else 1.0)


def _critic_loss(
    value: Tensor,  # (R, T)
    inputs: dict[str, Tensor],
    value_clip: float,
    denominator: Tensor,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Returns the critic's loss over the denominator, its metrics, and their counts."""
    mask = inputs["targets"] != IGNORE_INDEX
    losses, about = METHODS["ppo_value"](
        value=value, old_value=inputs["old_value"], returns=inputs["returns"], mask=mask, value_clip=value_clip
    )
    about = {**about, "value/loss": torch.where(mask, losses.detach(), torch.nan)}
    rows = mask.any(dim=1)
    return reduce_losses(losses, "mean", denominator), mean_metrics(about, rows), count_metrics(about, rows)
