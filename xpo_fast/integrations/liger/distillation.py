"""Distillation from a teacher's head: both heads' tiles side by side, loss and gradient computed while they are live.

No coefficient of a token depends on anything outside its tile, so that a trainable head costs 3F and the teacher 1F.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...head.autograd import refuse_double_backward
from ...head.chunked import Gradients, Passes
from ...head.divergence import COPIES, jsd, normalised
from ...head.operands import Operands, reference
from ...head.plan import fit_tiles
from ...head.row_operations import RowOperations, row_blocks
from ...head.units import scaled_to
from ...methods.math import check
from .classes import Loss, function

Function = TypeVar("Function")
DIVERGENCES = ("jsd", "cosine")
_TINY = 1e-12  # least norm of logits that a cosine divides by


class Distilled(NamedTuple):
    """Result of `distillation_loss`: means over the scored tokens, () each."""

    loss: Tensor  # soft_weight · soft + hard_weight · hard; differentiable
    soft: Tensor  # the divergence from the teacher; detached
    hard: Tensor  # the cross-entropy of the targets; detached


class _Recipe(NamedTuple):
    """Settings of a `distillation_loss`."""

    divergence: str
    beta: float
    temperature: float
    soft_weight: float
    hard_weight: float
    soft: bool  # whether the divergence is computed
    hard: bool  # whether the cross-entropy is


def _untraced(function: Function) -> Function:
    """Returns a function that torch.compile does not trace: its tiles are in memory that is kept from call to call."""
    disabled: Any = torch.compiler.disable(function)
    return disabled


@_untraced
def distillation_loss(
    hidden: Tensor,  # (…, D) the student's
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (…) integer, aligned
    *,
    teacher_hidden: Tensor,  # (…, Dt)
    teacher_weight: Tensor,  # (Vt, Dt), Vt ≥ V
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    soft_weight: float = 0.5,
    hard_weight: float = 0.5,
    parts: bool = False,
    ignore_index: int = -100,
    tile_bytes: int | None = None,
) -> Distilled:
    """Computes soft_weight · (mean divergence from a teacher) + hard_weight · (mean cross-entropy), without the logits.

    With z and t the logits of student and teacher, p = softmax(z/τ), q = softmax(t/τ), τ = `temperature`, a token has

        jsd:     β KL(q‖m) + (1−β) KL(p‖m), m = β q + (1−β) p   (generalised Jensen–Shannon, GKD, arXiv 2306.13649)
                 β = 0: KL(q‖p); β = 1: KL(p‖q)
        cosine:  β (1 − cos(z, t))
        hard:    −log softmax(z)_y

    each averaged over the tokens whose target is not `ignore_index`; 0 if there are none. If the teacher's vocabulary
    is larger, the student's logits are padded with zeros. Differentiable in hidden, weight and bias; the teacher gets
    no gradient. Nothing at an ignored position is read.
    parts: also compute the part whose weight is 0, which is returned as 0 otherwise.

    1F without gradient, 2F with a frozen head, 3F with a trainable one, and 1F of the teacher's head; F = 2·N·V·D FLOP.
    Raises ValueError for operands that do not fit, β outside [0, 1] (jsd) or negative, a temperature that is not
    positive, an unknown divergence, and (on CPU) a target outside the vocabulary.
    """
    teacher = reference(teacher_hidden, teacher_weight, teacher_bias)
    operands = Operands(hidden, weight, targets, bias, ref=teacher, ignore_index=ignore_index)
    operands = operands.admit(teacher=True).flat()
    if divergence not in DIVERGENCES:
        raise ValueError(f"no divergence named {divergence!r}; there are {', '.join(DIVERGENCES)}")
    if divergence == "jsd" and not 0 <= beta <= 1:
        raise ValueError(f"expected beta in [0, 1], got {beta}")
    if divergence == "cosine" and not 0 <= beta < math.inf:
        raise ValueError(f"expected beta >= 0, got {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    recipe = _Recipe(
        divergence,
        float(beta),
        float(temperature),
        float(soft_weight),
        float(hard_weight),
        soft=bool(soft_weight) or parts,
        hard=bool(hard_weight) or parts,
    )
    student = operands.hidden, operands.weight, operands.bias
    needs = (*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in student), False)
    return Distilled(*_Distillation.apply(*student, operands, recipe, needs, tile_bytes))


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Operands,
        recipe: _Recipe,
        needs: tuple[bool, ...],  # hidden, weight, bias, adapter
        tile_bytes: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher = operands.ref
        assert teacher is not None
        vocab = teacher.weight.shape[0]
        wider = vocab > weight.shape[0]
        # The student's logits padded; and a softmax for each part where one does not serve both.
        copies = COPIES + wider + (wider or recipe.temperature != 1)
        options = {"heads": 2, "copies": copies, "dz": any(needs), "learns": needs[1]}
        tiling, *_ = fit_tiles("torch", vocab, weight.dtype, weight.device, tile_bytes, **options)
        passes = Passes(operands if recipe.soft else replace(operands, ref=None), tiling, RowOperations)
        sums, grads = _pass(passes, recipe, needs)
        count = (operands.targets != operands.ignore_index).sum().to(sums.device).clamp(min=1)
        soft, hard = (sums / count).unbind()
        ctx.count, ctx.dtypes = count, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*grads[:3])
        loss = recipe.soft_weight * soft + recipe.hard_weight * hard
        ctx.mark_non_differentiable(soft, hard)
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        refuse_double_backward("distillation_loss")
        factor = upstream[0] / ctx.count
        grads = (
            None if g is None else scaled_to(g, factor, dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, *[None] * 4)


def _pass(passes: Passes, recipe: _Recipe, needs: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns Σ soft and Σ hard over the scored tokens, (2,), and the gradients of their weighted sum."""
    with_dz = any(needs)
    spans = passes.spans(with_dz)
    found = torch.zeros((2, len(passes)), dtype=passes.gemms.dtype, device=passes.hidden.device)
    grads = Gradients(passes, spans, needs, passes.early_grad_dtype)
    at_target = found.new_full((1, 1), -recipe.hard_weight)
    for step in passes.steps(spans):
        with passes.rows(step):
            y, rows, tile_dz = passes.y[step.at], found[:, step.at], step.own_dz
            for b in row_blocks(step.z):
                z, t = step.z[b], None
                passes.gemms.finish(z)
                if step.z_ref is not None:
                    assert passes.ref_gemms is not None
                    t = step.z_ref[b]
                    passes.ref_gemms.finish(t)
                dz = _losses(z, t, y[b].unsqueeze(1), recipe, rows[:, b], at_target if with_dz else None)
                if with_dz:
                    assert tile_dz is not None
                    if dz is not None and passes.ignored is not None:
                        dz.masked_fill_(passes.ignored[step.at][b].unsqueeze(1), 0)
                    tile_dz[b] = 0 if dz is None else dz
                del dz  # before the next is made
        if step.last and with_dz:
            grads.add(step, None)
    return passes.masked(found).sum(dim=1), grads.finished()


def _losses(
    z: Tensor,  # (r, V), overwritten
    t: Tensor | None,  # (r, Vt), the teacher's, overwritten; None without a divergence
    y: Tensor,  # (r, 1)
    recipe: _Recipe,
    found: Tensor,  # (2, r), soft and hard, written
    at_target: Tensor | None,  # (1, 1), −hard_weight; None where no gradient is wanted
) -> Tensor | None:
    """Writes the losses of rows and returns ∂(weighted sum)/∂z (r, V), or None where it is 0 or not wanted."""
    own, slope, scale = None, None, 0.0
    if recipe.hard:
        own = normalised(z)
        found[1] = (own[1] - z.gather(1, y)).squeeze(1)
    if t is not None:
        divergence = (
            jsd(z, t, recipe.beta, recipe.temperature, own) if recipe.divergence == "jsd" else _cosine(z, t, recipe)
        )
        found[0], slope, scale = divergence
        slope, scale = slope[:, : z.shape[1]], scale * recipe.soft_weight
    if at_target is None:
        return None
    if own is None:
        return None if slope is None else slope.mul_(scale)
    dz = own[0].mul_(recipe.hard_weight)
    if slope is not None:
        dz.add_(slope, alpha=scale)
    return dz.scatter_add_(1, y, at_target.expand_as(y))


def _cosine(z: Tensor, t: Tensor, recipe: _Recipe) -> tuple[Tensor, Tensor, float]:
    """Returns what `jsd` does, of β (1 − c) with gradient −β (t̂ − c ẑ)/|z|, 0 where z is 0; without a temperature."""
    norm, t_norm = (x.norm(dim=1, keepdim=True) for x in (z, t))
    zero, norm = norm == 0, norm.clamp_(min=_TINY)
    unit, t_unit = z.div_(norm), t.div_(t_norm.clamp_(min=_TINY))[:, : z.shape[1]]
    cosine = (unit * t_unit).sum(dim=1, keepdim=True)
    slope = unit.mul_(cosine).sub_(t_unit).div_(norm).masked_fill_(zero, 0)
    return recipe.beta * (1 - cosine.squeeze(1)), slope, recipe.beta


def _form(divergence: str, name: str, doc: str) -> Callable[..., Tensor | tuple[Tensor, Tensor, Tensor]]:
    """Returns Liger's function of a divergence."""

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
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
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
    "jsd", "liger_fused_linear_jsd", "Computes generalised Jensen–Shannon distillation (GKD, arXiv 2306.13649)."
)
liger_fused_linear_cosine = _form(
    "cosine",
    "liger_fused_linear_cosine",
    "Computes distillation by the cosine of logits, β(1 − cos); the temperature is ignored.",
)

_OPTIONS = "weight_hard_loss weight_soft_loss beta ignore_index temperature compiled chunk_size return_soft_hard_loss"
_OPERANDS = "student_input student_weight teacher_input teacher_weight true_labels student_bias teacher_bias"


def _check(temperature: float) -> None:
    check(temperature > 0, "temperature > 0", temperature)


class LigerFusedLinearJSDLoss(Loss, of=liger_fused_linear_jsd, options=_OPTIONS, operands=_OPERANDS, check=_check):
    """Module of `liger_fused_linear_jsd`."""


class LigerFusedLinearCosineSimilarityLoss(
    Loss, of=liger_fused_linear_cosine, options=_OPTIONS, operands=_OPERANDS, check=_check
):
    """Module of `liger_fused_linear_cosine`."""


LigerFusedLinearJSDFunction = function("LigerFusedLinearJSDFunction", liger_fused_linear_jsd)
LigerFusedLinearCosineSimilarityFunction = function(
    "LigerFusedLinearCosineSimilarityFunction", liger_fused_linear_cosine
)
