"""Tells which models can be read in which layout."""

from __future__ import annotations

from typing import Any

from .model import backbone_of


def unsupported(model: Any) -> str | None:
    """Returns why the rows of a model must stay padded; None if they need not."""
    backbone: Any = backbone_of(model)
    if not backbone._can_set_attn_implementation():
        return f"{type(backbone).__name__} computes attention by itself, not through transformers' interface"
    return None
