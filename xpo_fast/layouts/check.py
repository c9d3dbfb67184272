"""Proves a layout before it is used: log-probs and gradients of a few rows against the same rows one by one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

Reads = Callable[[Tensor, Inputs], Tensor]  # from hidden states (R, T, D) and rows, those that are read, (R, K, D)

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
    model: nn.Module,
    rows: Inputs,
    *,
    share: bool,
    accelerator: Accelerator | None = None,
    backend: str = "auto",
    wanted: Tensor | None = None,
    reads: Reads | None = None,
) -> Proof:
    """Compares rows in a layout with the same rows one by one and without padding, in eval mode.

    The gradient is that of a weighted sum of the rows' log-probs by the trained weights, from the first ones on; where
    gradients are off there is none. Rows share whatever they begin with in common, so that the tree of the layout is as
    deep as they allow. Nothing of the model changes. model: not wrapped for several processes, with
    `install_fused_loss`.

    wanted: (R, T) bool, the positions that the layout is asked for; None: those with a target. reads: selects hidden
    states that a value head reads. It may be 0, so what is compared of them is the log-prob that the LM head makes of
    each for the row's first token.
    """
    width, count = rows.targets.shape[1], len(rows.targets)
    with_target = rows.targets != IGNORE_INDEX
    asked = with_target if wanted is None else wanted & rows.attention_mask.bool()
    scored = with_target & asked
    layout = lay_out(rows.input_ids, rows.attention_mask, asked, share=share, least=1)
    weights = list(_first(p for p in model.parameters() if p.requires_grad)) if torch.is_grad_enabled() else []
    own = [torch.zeros_like(p, dtype=torch.float32) for p in weights]
    device = rows.targets.device
    by = torch.tensor([(-1) ** r / (r + 1) for r in range(count)], device=device) * asked.any(dim=1)
    how: Any = {"weights": weights, "accelerator": accelerator, "backend": backend, "reads": reads}
    with eval_mode(model):
        laid = rows._replace(layout=layout.to(device))
        together, gradient = _measured(model, laid, scored, by, **how)  # (R, T + K)
        alone = torch.zeros_like(together)
        for r in by.nonzero()[:, 0].tolist():
            columns = rows.attention_mask[r].nonzero()[:, 0]
            row = rows.each(lambda x, r=r, columns=columns: x[r : r + 1, columns])
            found, added = _measured(model, row, scored[r : r + 1, columns], by[r : r + 1], **how)
            alone[r, columns.cpu()] = found[0, : len(columns)]
            alone[r, width:] = found[0, len(columns) :]
            for total, x in zip(own, added, strict=True):
                total += x
    off = (together - alone)[by.bool().cpu()]
    # What is read is a few numbers beside many log-probs of targets, with which it is not averaged.
    parts = off[:, :width][scored[by.bool()].cpu()], off[:, width:].flatten()
    apart = math.hypot(*(float((a - b).norm()) for a, b in zip(gradient, own, strict=True)))
    norm = math.hypot(*(float(x.norm()) for x in own))
    step = _step(model, accelerator)
    return Proof(
        float(torch.stack([x.square().mean().sqrt() for x in parts if len(x)] or [torch.zeros(())]).max()),
        apart / norm if norm else apart,
        1e-4 + 8 * step,
        step**0.5,
        count,
    )


def _measured(
    model: nn.Module,
    rows: Inputs,
    scored: Tensor,  # (R, T) bool, the targets whose log-probs are compared
    by: Tensor,  # (R,) the weights of rows in the sum whose gradient is compared
    *,
    weights: list[nn.Parameter],
    accelerator: Accelerator | None,
    backend: str,
    reads: Reads | None,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the rows' log-probs (R, T + K), float64 on the CPU, and a gradient; the last K are of what is read."""

    def score(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        targets = rows.targets.masked_fill(~scored, IGNORE_INDEX)
        logps = token_logps(hidden, head, targets, backend=backend)
        if reads is not None:
            states = reads(hidden, rows)  # (R, K, D)
            first = rows.input_ids[:, :1].repeat(1, states.shape[1])
            logps = torch.cat([logps, token_logps(states, head, first, backend=backend)], dim=1)
        return {"logps": logps}

    with contextlib.nullcontext() if accelerator is None else accelerator.autocast():
        logps = rows.run(model, score)["logps"]
    if not logps.requires_grad:  # gradients are off, or a value head is trained alone
        return logps.detach().double().cpu(), [torch.zeros_like(p, dtype=torch.float32) for p in weights]
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
    """Returns the relative rounding of the model's products; norms are in float32 in a model of float64, too."""
    lm = causal_lm(model)
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(getattr(accelerator, "mixed_precision", None)))
    dtypes = {lm.dtype, torch.float32, *([mixed] if mixed else [])}
    quantised = 2.0**-7 if getattr(lm, "is_quantized", False) else 0.0
    return max(quantised, tf32_step(next(lm.parameters()).device), *(torch.finfo(x).eps for x in dtypes))
