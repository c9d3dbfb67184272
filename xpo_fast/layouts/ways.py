"""Choice of the way in which a model attends in a layout: from its class, config and device, and nothing else.

| way      | a layer is                                               | where                                          |
|----------|----------------------------------------------------------|------------------------------------------------|
| segments | a call of the model's own function for each segment      | anywhere                                       |
| flex     | one call of FlexAttention, with a mask by blocks         | a GPU: sdpa, eager; everywhere: flex_attention |
| varlen   | one call of FlashAttention, each segment a sequence      | where the model has some FlashAttention        |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..device import has_triton

SEGMENTS, FLEX, VARLEN = "segments", "flex", "varlen"
_LEAST_HEAD = 16  # numbers of a head, of which a kernel of FlexAttention makes products


class Attention(NamedTuple):
    """A way to attend, and the words for it in a log."""

    way: str
    said: str


def attention_for(backbone: Any, implementation: str, device: Any, *, training: bool | None = None) -> Attention:
    """Returns how a model attends in a layout.

    backbone: a `PreTrainedModel`. implementation: the name of its attention in transformers, such as "sdpa".
    training: whether its dropout is on; None: as it is now.
    """
    if "flash" in implementation:
        return Attention(VARLEN, f"FlashAttention varlen ({implementation})")
    why = ""
    if implementation != "flex_attention":
        training = backbone.training if training is None else training
        why = _why_not_flex(backbone, implementation, torch.device(device), training)
    if why:
        return Attention(SEGMENTS, f"{implementation} per segment ({why})")
    return Attention(FLEX, "FlexAttention with a block mask")


def _why_not_flex(backbone: Any, implementation: str, device: torch.device, training: bool) -> str:
    """Returns why a model that has another attention does not attend by FlexAttention, or ""."""
    config = backbone.config.get_text_config()
    if device.type != "cuda":
        return f"on {device.type}"
    if implementation not in ("sdpa", "eager"):
        return "an attention of its own"
    if not has_triton():
        return "FlexAttention needs Triton"
    if not getattr(backbone, "_supports_flex_attn", False):
        return f"{type(backbone).__name__} does not take FlexAttention"
    if backbone.dtype == torch.float64:
        return "FlexAttention has no float64"
    # Configs name it attention_dropout, attn_pdrop, attention_probs_dropout_prob, …
    dropouts = {n: x for n, x in vars(config).items() if "att" in n and "drop" in n and isinstance(x, float) and x > 0}
    if training and dropouts:
        return "FlexAttention has no dropout: " + ", ".join(f"{n} is {x}" for n, x in dropouts.items())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"FlexAttention needs heads of {_LEAST_HEAD} at least, got {head}" if head < _LEAST_HEAD else ""
