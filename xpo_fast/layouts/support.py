"""Tells which models can read rows in a layout: those whose tokens meet in transformers' attention interface alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..models.lm_head import causal_lm, names_in_forward
from .attention import implementation_of
from .model import backbone_of, decoder_of

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what the code that attends by the interface names
# Layer types of a config whose tokens meet by attention under a mask made of positions, and those of none that meet.
_ATTEND = ("full_attention", "sliding_attention", "chunked_attention", "reference_sliding_attention")
_ALONE = ("moe", "mlp", "dense", "sparse")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Attention modules that do more than their code shows by the names in it.
_OF_CLASS = {"DogeAttention": "DogeAttention makes a mask of its own, of its values"}


def unsupported(model: Any) -> str | None:
    """Returns why a model's rows must stay padded, in a phrase, or None if packed and shared rows are right for it.

    Right for rows of text: log-probs and gradients are those of each row alone. model: a causal LM or a classifier of
    transformers, or a PEFT model of one. Its config and the code of its modules are read, nothing is run.
    """
    if getattr(causal_lm(model).config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    backbone, decoder = backbone_of(model), decoder_of(model)
    types = getattr(decoder.config, "layer_types", None) or getattr(decoder.config, "layers_block_type", None)
    others = sorted(set(types or ()) - {*_ATTEND, *_ALONE})
    if others:
        return f"layers that are not plain attention ({', '.join(others)})"
    if not types and getattr(decoder, "_is_stateful", False):
        return "layers with a state that is carried from token to token"
    modules = list(_own(decoder))
    if any(isinstance(x, _CONVOLUTIONS) for x in modules):
        return "convolutions over neighbouring tokens"
    attention = [x for x in modules if _INTERFACE in names_in_forward(type(x))]
    found = {id(x) for x in attention}
    for x in modules:
        kind = type(x).__name__
        if kind in _OF_CLASS:
            return _OF_CLASS[kind]
        if "Attention" in kind and not any(id(y) in found for y in x.modules()):
            return f"{kind} does not attend by transformers' attention interface"
    if not attention:
        return "no attention by transformers' attention interface"
    if not _takes_positions(backbone, decoder):
        return "it takes no position_ids"
    if not any(getattr(x, "is_causal", True) for x in attention):
        return "a model that reads ahead"
    if any("create_position_ids_from_input_ids" in names_in_forward(type(x)) for x in modules):
        return "positions are counted from its padding token's id"
    for x in attention:
        names = names_in_forward(type(x))
        if "arange" in names and "position_ids" not in names:
            return f"{type(x).__name__} counts positions by itself"
        eager = implementation_of(x.config._attn_implementation) == "eager"
        if eager and not hasattr(inspect.getmodule(type(x)), "eager_attention_forward"):
            return f"{type(x).__name__} has no eager attention"
    return None


def _takes_positions(backbone: nn.Module, decoder: nn.Module) -> bool:
    """Tells whether a text model takes position_ids, and the model around it, if there is one, hands them on."""
    outer, inner = (inspect.signature(type(x).forward).parameters for x in (backbone, decoder))
    return "position_ids" in inner and ("position_ids" in outer or "kwargs" in outer)


def _own(decoder: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules of a text model, without those of other models within it, such as an encoder of sounds."""
    from transformers import PreTrainedModel

    yield decoder
    for child in decoder.children():
        if not isinstance(child, PreTrainedModel):
            yield from _own(child)
