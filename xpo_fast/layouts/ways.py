"""Tells in which way a model attends in a layout: from its class, config and device, and nothing else.

So a proof of the layout in eval mode, training and evaluation attend alike.

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


def attention_for(backbone: Any, implementation: str, device: torch.device) -> Attention:
    """Returns how a model attends in a layout.

    backbone: a `PreTrainedModel`. implementation: the name of its attention in transformers, such as "sdpa".
    """
    if "flash" in implementation:
        return Attention(VARLEN, f"FlashAttention varlen ({implementation})")
    why_not = None if implementation == "flex_attention" else _why_not_flex(backbone, implementation, device)
    if why_not:
        return Attention(SEGMENTS, f"{implementation} per segment ({why_not})")
    return Attention(FLEX, "FlexAttention with a block mask")


def _why_not_flex(backbone: Any, implementation: str, device: torch.device) -> str | None:
    """Returns why a model that has another attention does not attend by FlexAttention; None if it does."""
    config = backbone.config.get_text_config()
    if device.type != "cuda":
        return f"on {device.type}"
    if implementation not in ("sdpa", "eager"):
        return "FlexAttention need not be the same"
    if not has_triton():
        return "FlexAttention needs Triton"
    if not backbone._supports_flex_attn:
        return f"{type(backbone).__name__} does not take FlexAttention"
    if backbone.dtype == torch.float64:
        return "FlexAttention has no float64"
    # Configs name it attention_dropout, attn_pdrop, attention_probs_dropout_prob, …
    for name, value in vars(config).items():
        if "att" in name and "drop" in name and value:
            return f"FlexAttention has no dropout, and {name} is {value}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"FlexAttention needs heads of {_LEAST_HEAD} at least, not {head}" if head < _LEAST_HEAD else None
