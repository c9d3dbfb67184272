"""The values that travel between the arrows: head in, token statistics out, loss out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Where transformers models keep what their forward does to logits: attribute of the config → how it acts.
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap")
_MULTIPLIER_NAMES = ("logit_scale", "lm_head_multiplier")
_DIVISOR_NAMES = ("logits_scaling",)


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
    """An LM head: z = softcap(logit_scale · (h Wᵀ + bias))."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def from_model(cls, model: Any) -> Head:
        """Read the head of a causal LM of `transformers`, with what its forward does to logits.

        Raises ValueError if the output embedding is not a plain linear map (an adapter on it, a quantised one).
        """
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: expected a causal LM")
        if hasattr(layer, "base_layer"):
            raise ValueError(
                f"the LM head of {type(model).__name__} carries an adapter ({type(layer).__name__}); "
                "take lm_head out of the adapter's target_modules, or merge the adapter first"
            )
        weight = getattr(layer, "weight", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"the LM head must be a linear layer with a (V, D) float weight, got {layer}")
        config = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = 1.0
        for name in _MULTIPLIER_NAMES:
            scale *= getattr(config, name, None) or 1.0
        for name in _DIVISOR_NAMES:
            scale /= getattr(config, name, None) or 1.0
        softcap = next((s for name in _SOFTCAP_NAMES if (s := getattr(config, name, None))), None)
        return cls(weight, getattr(layer, "bias", None), softcap, float(scale))

    def kwargs(self) -> dict:
        """The keyword arguments of `token_stats` that this head implies, apart from its weight."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


@dataclass
class LossOutput:
    """What an objective returns: a differentiable scalar and detached tensors to log."""

    loss: Tensor  # (), or one entry a unit with reduction="none"
    metrics: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)  # how many entries each metric is the mean of
    losses: tuple[Tensor, ...] = ()  # the loss of each method of a sum, before its weight, detached
    token_reward: Tensor | None = None  # shaped as targets: token_dpo's β(log π − log ref)
