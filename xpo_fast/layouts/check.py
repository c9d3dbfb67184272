"""Proves a layout before it is used: log-probs and gradients of a few rows against the same rows one by one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..head import token_logps
from ..models import Head
from ..models.lm_head import causal_lm
from ..models.modes import eval_mode
from ..precision import tf32_step
from ..types import IGNORE_INDEX
from .inputs import Inputs
from .rows import lay_out

if TYPE_CHECKING:
    from accelerate import Accelerator

_NUMBERS = 2**26  # of the gradient that are looked at, at most, and one weight at least


@dataclass(frozen=True)
class Proof:
    """How far log-probs (root of the mean square, nats) and the gradient (relative) of a layout are off, and may be."""

    logps: float
    gradient: float
    allowed_logps: float
    allowed_gradient: float
    rows: int

    @property
    def holds(self) -> bool:
        """Whether both are within rounding; NaN is not."""
        return self.logps <= self.allowed_logps and self.gradient <= self.allowed_gradient

    def __str__(self) -> str:
        return (
            f"of {self.rows} rows, log-probs differ by {self.logps:.2g} (at most {self.allowed_logps:.2g} is rounding) "
            f"and the gradient by {self.gradient:.2g} of its norm (at most {self.allowed_gradient:.2g})"
        )


def prove(
    model: nn.Module, rows: Inputs, *, share: bool, accelerator: Accelerator | None = None, backend: str = "auto"
) -> Proof:
    """Compares rows in a layout with the same rows one by one and without padding, in eval mode.

    The gradient is that of a weighted sum of the rows' log-probs by the trained weights, from the first ones on. Rows
    share whatever they begin with in common, so that the tree of the layout is as deep as they allow. Nothing of the
    model changes. model: not wrapped for several processes, with `install_fused_loss`.
    """
    scored = rows.targets != IGNORE_INDEX
    layout = lay_out(rows.input_ids, rows.attention_mask, scored, share=share, least=1)
    weights = list(_first(p for p in model.parameters() if p.requires_grad))
    alone, together = torch.zeros(2, *scored.shape, dtype=torch.float64)
    own = [torch.zeros_like(p, dtype=torch.float32) for p in weights]
    with eval_mode(model):
        for r in scored.any(dim=1).nonzero()[:, 0].tolist():
            columns = rows.attention_mask[r].nonzero()[:, 0]
            row = Inputs(*(x[r : r + 1, columns] for x in rows[:3]))
            logps, gradient = _measured(model, row, [r], weights, accelerator, backend)
            alone[r, columns.cpu()] = logps[0]
            for total, x in zip(own, gradient, strict=True):
                total += x
        laid = rows._replace(layout=layout.to(rows.input_ids.device))
        together, gradient = _measured(model, laid, range(len(scored)), weights, accelerator, backend)
    off = (together - alone)[scored.cpu()]
    apart = math.hypot(*(float((a - b).norm()) for a, b in zip(gradient, own, strict=True)))
    norm = math.hypot(*(float(x.norm()) for x in own))
    step = _step(model, accelerator)
    return Proof(
        float(off.square().mean().sqrt()) if len(off) else 0.0,
        apart / norm if norm else apart,
        1e-4 + 8 * step,
        step**0.5,
        len(scored),
    )


def _measured(
    model: nn.Module,
    rows: Inputs,
    numbers: Sequence[int],
    weights: list[nn.Parameter],
    accelerator: Accelerator | None,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the rows' log-probs (R, T), float64 on the CPU, and the gradient of their sum, row n times ±1/(n + 1)."""

    def score(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        return {"logps": token_logps(hidden, head, rows.targets, backend=backend)}

    with contextlib.nullcontext() if accelerator is None else accelerator.autocast():
        logps = rows.run(model, score)["logps"]
    if not weights:
        return logps.detach().double().cpu(), []
    by = torch.tensor([(-1) ** n / (n + 1) for n in numbers], device=logps.device)
    gradient = torch.autograd.grad((logps.sum(dim=1) * by).sum(), weights, allow_unused=True)
    found = [torch.zeros_like(p) if x is None else x for p, x in zip(weights, gradient, strict=True)]
    return logps.detach().double().cpu(), [x.float() for x in found]


def _first(weights: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Yields weights as long as they have no more than _NUMBERS elements, and one at least."""
    taken = 0
    for p in weights:
        if taken and taken + p.numel() > _NUMBERS:
            return
        taken += p.numel()
        yield p


def _step(model: nn.Module, accelerator: Accelerator | None) -> float:
    """Returns the relative rounding of the model's products."""
    lm = causal_lm(model)
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(getattr(accelerator, "mixed_precision", None)))
    dtypes = {lm.dtype, *([mixed] if mixed else [])}
    quantised = 2.0**-7 if getattr(lm, "is_quantized", False) else 0.0
    return max(quantised, tf32_step(next(lm.parameters()).device), *(torch.finfo(x).eps for x in dtypes))
