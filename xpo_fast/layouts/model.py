"""Installs layouts on a model: its rows come in padded, are read in the current layout, and leave as rows again."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..models.lm_head import causal_lm, names_in_forward, unwrapped
from .attention import current, implementation_of, name_of
from .ways import Attention, attention_for

_NAME = "_xpo_fast_layouts"  # of the handles of its two hooks


def install_layouts(model: nn.Module) -> None:
    """Makes a causal LM or classifier of transformers read rows in the layout of the block `laid_out`, if there is one.

    Two hooks on its backbone: in front of it, ids, positions and masks of padded rows (R, T) become those of the
    layout's sequence (1, N); behind it, hidden states become rows (R, T, D) again, 0 where none was asked for. Outside
    of such a block nothing changes. model: may be a PEFT model; copies of it have the hooks, too.
    """
    backbone = backbone_of(model)
    if getattr(backbone, _NAME, None) is None:
        hooks = _Hooks()
        before = backbone.register_forward_pre_hook(hooks.before, with_kwargs=True)
        behind = backbone.register_forward_hook(hooks.behind, with_kwargs=True, always_call=True)
        setattr(backbone, _NAME, (before, behind))


def remove_layouts(model: nn.Module) -> None:
    """Undoes `install_layouts`."""
    backbone = backbone_of(model)
    for handle in getattr(backbone, _NAME, ()):
        handle.remove()
    if hasattr(backbone, _NAME):
        delattr(backbone, _NAME)


def backbone_of(model: Any) -> nn.Module:
    """Returns the module that turns token ids into the hidden states that the model's head reads.

    It is the outermost one that the model's forward calls and that does not hold the head.
    """
    lm = causal_lm(unwrapped(model))
    base = getattr(lm, "base_model", lm)
    if "decoder" in names_in_forward(type(lm)) and hasattr(base, "decoder"):
        return base.decoder  # OPT's and Whisper's forwards call it directly
    head = lm.get_output_embeddings()
    while head is not None and any(x is head for x in base.modules()):
        inner = base.get_decoder()
        base = inner if inner is not base else base.model  # Llama 4's and Kosmos 2.5's text model has a head of its own
    return base


def decoder_of(model: Any) -> nn.Module:
    """Returns the text model of the backbone, which may have towers for images beside it; else the backbone."""
    backbone: Any = backbone_of(model)
    return backbone.get_decoder() if hasattr(backbone, "get_decoder") else backbone


def configs_of(backbone: nn.Module) -> list[Any]:
    """Returns the configs that the backbone's attention reads its implementation from."""
    found = {id(m.config): m.config for m in backbone.modules() if hasattr(m, "config")}
    return [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]


def attention_of(model: Any, device: torch.device) -> Attention:
    """Returns how a model on a device attends in a layout."""
    backbone: Any = backbone_of(model)
    implementation = implementation_of(backbone.config.get_text_config()._attn_implementation)
    return attention_for(backbone, implementation, device)


def _named(backbone: nn.Module) -> list[tuple[Any, str]]:
    """Returns the backbone's configs and the names of their implementations, all read before one of them is changed."""
    return [(config, config._attn_implementation) for config in configs_of(backbone)]


def _plain(named: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Returns configs and their own implementations, whatever they have at present."""
    return [(config, implementation_of(config._attn_implementation)) for config, _ in named]


def _rename(configs: list[tuple[Any, str]]) -> None:
    """Gives configs their implementations."""
    for config, name in configs:
        if config._attn_implementation != name:
            config._attn_implementation = name


class _Hooks:
    """The two hooks. They keep nothing of the model, so that a deep copy of it has hooks of its own."""

    def before(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Gives the backbone the tokens of the layout's sequence in place of padded rows."""
        layout = current()
        if layout is None:
            return None
        names = ("input_ids", "attention_mask", "position_ids")
        given = dict(zip(names, args, strict=False)) | {n: x for n, x in kwargs.items() if x is not None}
        rows = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        if rows.shape[0] != layout.shape[0] or rows.shape[1] < layout.shape[1]:
            raise ValueError(f"the layout is of rows {layout.shape}, the model is given {tuple(rows.shape)}")
        ways = [(c, plain, attention_for(backbone, plain, rows.device)) for c, plain in _plain(_named(backbone))]
        _rename([(c, name_of(plain, found.way)) for c, plain, found in ways])
        shape = rows.shape[:2]
        taken = {
            name: layout.take(x) if isinstance(x, Tensor) and x.shape[:2] == shape else x for name, x in given.items()
        }
        # A mask of ones, so that transformers does not look for packed rows by itself.
        taken["attention_mask"] = torch.ones(1, len(layout), dtype=torch.int64, device=rows.device)
        taken["position_ids"] = layout.positions[None]
        self.length = shape[1]
        return (), taken

    def behind(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the output with hidden states as rows; called, too, with none where the forward has raised."""
        layout = current()
        if layout is None:
            return None
        # Outside of its forward the model has its own implementation, which is looked at to save it and to sample.
        laid = _named(backbone)
        _rename(_plain(laid))
        if output is None:
            return None
        found = output[0] if isinstance(output, tuple) else output.last_hidden_state
        hidden = layout.put(found, self.length)
        if hidden.requires_grad:
            hidden.register_hook(functools.partial(_to_compute_again, laid))
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output


def _to_compute_again(laid: list[tuple[Any, str]], _: Tensor) -> None:
    """Gives configs their implementations in a layout until a backward ends, in which checkpointed layers run again."""
    own = _plain(laid)
    _rename(laid)
    torch.autograd.Variable._execution_engine.queue_callback(lambda: _rename(own))
