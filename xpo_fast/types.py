"""The values that travel between the arrows: head in, token statistics out, loss out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .lm_head import read


@dataclass
class TokenStats:
    """Statistics of the next-token distribution at every position, each shaped like `targets`.

    float32 (float64 for float64 operands); 0, or False, where the target is ignored; None if not asked for.
    With z the final logits (scaled, capped, divided by the temperature) and p = softmax z:
    """

    logp: Tensor  # z_y − lse; differentiable
    lse: Tensor  # log Σ e^z; differentiable
    entropy: Tensor | None = None  # −Σ p log p; differentiable
    kl: Tensor | None = None  # KL(ref ‖ policy) over the vocabulary; differentiable in the policy
    reverse_kl: Tensor | None = None  # KL(policy ‖ ref); differentiable in the policy
    log_sum_sq_probs: Tensor | None = None  # log Σ p²; detached
    mean_logit: Tensor | None = None  # mean of z over the vocabulary; detached
    top1: Tensor | None = None  # bool: no token is likelier than the target


@dataclass
class Head:
    """An LM head: z = softcap(logit_scale · (h Wᵀ + x Bᵀ + bias)), x = project(h) where a LoRA adapter is on it.

    One call for all models:

        head = Head.from_model(model)
        token_logps(head.inputs(hidden), head.weight, targets, **head.kwargs())
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0
    adapter: Tensor | None = None  # B (V, r), the columns of several adapters side by side
    project: Callable[[Tensor], Tensor] | None = None  # h (…, D) → x = s·dropout(h) Aᵀ (…, r)

    @classmethod
    def from_model(cls, model: Any) -> Head:
        """Read the head of a causal LM of `transformers`, with what its forward does to logits.

        A PEFT model's is read as its adapters are at the moment: LoRA as `adapter`, DoRA as a copy of the weight with
        scaled rows and an `adapter`, merged and disabled ones as the plain layer, modules_to_save as the trained copy.
        Raises ValueError, with the reason, for a head that is not linear, for a quantised one, for one with a forward or
        with forward hooks put on it (but those that gather, move or cast: FSDP's, DeepSpeed's, accelerate's, TRL's), for an
        adapter of another kind, and for an encoder-decoder.
        """
        return cls(**read(model))

    def inputs(self, hidden: Tensor) -> Tensor:
        """What goes with `weight` and `kwargs()`: hidden (…, D) itself, or with an adapter [h, x] (…, D + r)."""
        if self.project is None:
            return hidden
        return torch.cat([hidden, self.project(hidden).to(hidden.dtype)], dim=-1)

    @property
    def width(self) -> int:
        """Of `inputs`: D, or D + r."""
        return self.weight.shape[1] + (0 if self.adapter is None else self.adapter.shape[1])

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `token_stats` that this head implies, apart from its weight."""
        given = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        return given if self.adapter is None else given | {"adapter": self.adapter}


@dataclass
class LossOutput:
    """What an objective returns: a differentiable scalar and detached tensors to log."""

    loss: Tensor  # (), or one entry a unit with reduction="none"
    metrics: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)  # how many entries each metric is the mean of
    losses: tuple[Tensor, ...] = ()  # the loss of each method of a sum, before its weight, detached
    token_reward: Tensor | None = None  # shaped as targets: token_dpo's β(log π − log ref)
