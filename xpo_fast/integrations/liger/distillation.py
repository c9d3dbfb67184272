"""Distillation from a teacher's head: Liger's names of `head.distillation.distillation_loss`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...head.distillation import distillation_loss
from ...methods.math import check
from .classes import Loss, function

Distilled = Tensor | tuple[Tensor, Tensor, Tensor]


def _form(divergence: str, name: str, doc: str) -> Callable[..., Distilled]:
    def distil(
        student_input: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (N, Dt)
        teacher_weight: Tensor,  # (Vt, Dt), Vt ≥ V
        true_labels: Tensor,  # (N,)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (Vt,)
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> Distilled:
        found = distillation_loss(
            student_input,
            student_weight,
            true_labels,
            teacher_hidden=teacher_input,
            teacher_weight=teacher_weight,
            bias=student_bias,
            teacher_bias=teacher_bias,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            soft_weight=weight_soft_loss,
            hard_weight=weight_hard_loss,
            parts=return_soft_hard_loss,
            ignore_index=ignore_index,
        )
        return (found.loss, found.soft, found.hard) if return_soft_hard_loss else found.loss

    distil.__name__ = distil.__qualname__ = name
    distil.__doc__ = doc + "\n\nReturns the loss (), or with `return_soft_hard_loss` (loss, soft, hard), () each."
    return distil


liger_fused_linear_jsd = _form(
    "jsd", "liger_fused_linear_jsd", "Generalised Jensen–Shannon distillation (GKD, arXiv 2306.13649)."
)
liger_fused_linear_cosine = _form(
    "cosine", "liger_fused_linear_cosine", "Distillation by the logits' cosine, β(1 − cos), at any temperature."
)  # fmt: skip

_OPTIONS = "weight_hard_loss weight_soft_loss beta ignore_index temperature compiled chunk_size return_soft_hard_loss"
_OPERANDS = "student_input student_weight teacher_input teacher_weight true_labels student_bias teacher_bias"


def _check(temperature: float) -> None:
    check(temperature > 0, "temperature > 0", temperature)


class LigerFusedLinearJSDLoss(Loss, of=liger_fused_linear_jsd, options=_OPTIONS, operands=_OPERANDS, check=_check):
    """`liger_fused_linear_jsd`."""


class LigerFusedLinearCosineSimilarityLoss(
    Loss, of=liger_fused_linear_cosine, options=_OPTIONS, operands=_OPERANDS, check=_check
):
    """`liger_fused_linear_cosine`."""


LigerFusedLinearJSDFunction = function("LigerFusedLinearJSDFunction", liger_fused_linear_jsd)
LigerFusedLinearCosineSimilarityFunction = function(
    "LigerFusedLinearCosineSimilarityFunction", liger_fused_linear_cosine
)
