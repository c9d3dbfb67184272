"""KTO: one row per completion, labelled desirable or not."""

from __future__ import annotations

import torch
from torch import Tensor

from ...device import to_device
from ...head.spec import accumulation_dtype
from ...methods import METHODS
from .classes import Loss, function
from .units import Found, Pick, logit_sums, padded_rows, reference_logps, unit_loss


def liger_fused_linear_kto(
    _input: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (B, T)
    preference_labels: Tensor | None,  # (B,) bool
    bias: Tensor | None = None,  # (V,)
    ref_input: Tensor | None = None,  # (B, T, Dr)
    ref_weight: Tensor | None = None,  # (V, Dr); the policy's head if not given
    ref_bias: Tensor | None = None,  # (V,)
    kl: Tensor | None = None,  # () or (1,), or (B,) one per row, in nats; 0 if not given
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> Found:
    """Computes KTO (arXiv 2402.01306), `METHODS["kto"]`: the mean over rows of 1 − σ(±β(log π − log ref − kl)).

    The sign is + for the rows labelled True, − for the others. Rewards are β(log π − log ref).

    Returns loss (), (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
    rejected_rewards_sum), () each: sums over the rows labelled True (chosen) and over the others.
    """
    operands = padded_rows(_input, weight, target, bias, ignore_index)
    scored = operands.targets != ignore_index
    lengths = scored.sum(dim=1)
    rows = tuple(lengths.shape)
    if preference_labels is None or preference_labels.shape != rows or preference_labels.dtype != torch.bool:
        got = None if preference_labels is None else (preference_labels.dtype, tuple(preference_labels.shape))
        raise ValueError(f"preference_labels must be a bool tensor {rows}, True where chosen, got {got}")
    chosen = to_device(preference_labels, scored.device)
    length = lengths.clamp(min=1) if average_log_prob else torch.ones_like(lengths)
    ref_logp = lengths.new_zeros(rows, dtype=accumulation_dtype(operands.weight.dtype))
    if use_ref_model:
        ref_logp = reference_logps((ref_input, ref_weight, ref_bias), operands).sum(dim=1) / length
    shifted = ref_logp
    if kl is not None:
        if tuple(kl.shape) not in ((), (1,), rows):
            raise ValueError(f"kl must be one number, or one a row {rows}, got {tuple(kl.shape)}")
        # log π − log ref − kl, for each row's own kl
        shifted = ref_logp + to_device(kl.detach(), scored.device).to(ref_logp.dtype)
    counted = (lengths > 0).sum().clamp(min=1)
    zero = ref_logp.new_zeros(())

    def evaluate(logp: Tensor, pick: Pick) -> Found:
        score = logp.sum(dim=1) / pick(length)
        given = {"logp": score, "ref_logp": pick(shifted), "desirable": pick(chosen), "kl": zero}
        losses, _ = METHODS["kto"](**given, beta=beta)
        return torch.where(pick(lengths) > 0, losses, 0.0).sum() / counted, (score,)

    loss, (score,) = unit_loss(operands, evaluate)
    sums = (score, logit_sums(operands, scored), beta * (score - ref_logp))
    return loss, tuple(torch.where(side, x, 0.0).sum() for x in sums for side in (chosen, ~chosen))


class LigerFusedLinearKTOLoss(
    Loss,
    of=liger_fused_linear_kto,
    options="ignore_index beta compiled use_ref_model average_log_prob chunk_size",
    operands="_input lin_weight target bias preference_labels ref_input ref_weight ref_bias kl",
    use_ref_model=False,
    preference_labels=None,
):
    """Module of `liger_fused_linear_kto`; the labels come after the bias, and use_ref_model is False by default."""


LigerFusedLinearKTOFunction = function("LigerFusedLinearKTOFunction", liger_fused_linear_kto)
