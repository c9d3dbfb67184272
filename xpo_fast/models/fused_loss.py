"""Runs a loss inside the forward of a `transformers` causal LM, on its last hidden states, in place of its logits."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from .lm_head import Head, before_head, causal_lm
from .router_loss import asks_router_loss, router_logits, router_loss, router_z_loss

# The arguments of a forward that are about logits, or about what is made of them.
_ABOUT_LOGITS = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict", "targets", "use_cache")


def hidden_states(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Returns `Head.inputs` of the last hidden states, as the model's LM head takes them, without computing logits.

    batch: the keyword arguments of the model's forward (input_ids or inputs_embeds, attention_mask, position_ids,
        pixel_values, …); those about logits, labels and targets are left out.
    Returns (R, T, D), or (R, T, D + r) with a LoRA adapter of rank r on the head, to go with `Head.from_model(model)`:

        head = Head.from_model(model)
        objective(hidden_states(model, batch), head, targets)

    The model may be a PEFT model. A model wrapped for several processes (DDP, FSDP, DeepSpeed) needs its wrapper around
    the loss, too: use `install_fused_loss`. Raises ValueError for a head that `Head.from_model` refuses.
    """
    head = Head.from_model(model)
    inputs = _before_logits(model, batch)
    return head.inputs(before_head(model, lambda: model(**inputs)))


def own_logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Returns the logits (R, T, V) of the model's own forward without a cache. batch: as for `hidden_states`."""
    return model(**_before_logits(model, batch)).logits


def install_fused_loss(model: nn.Module) -> None:
    """Makes `model(..., fused_loss=f)` return f(hidden, head) in place of logits.

    f takes the last hidden states (R, T, D) and the `Head`, and runs inside the model's forward, where the hooks of DDP
    and FSDP see that the head's weight is used. Without the keyword the forward is unchanged. A PEFT model passes the
    keyword on to its base model. With output_router_logits=True, of a mixture of experts, it returns
    (f(hidden, head), aux_loss), see `router_loss`; where the config asks for that, it must be told which of the two;
    with router_z_loss=True beside it, (f(hidden, head), aux_loss, z_loss).

    Raises ValueError for a model that is not a decoder-only causal LM, and for a head that `Head.from_model` refuses.
    What the class's own code does to its logits behind the head is not read; `trainer.check_head`, which the trainers
    call, compares log-probs instead.
    """
    lm = causal_lm(model)
    config = getattr(lm, "config", None)
    if config is None or not hasattr(lm, "get_decoder"):
        raise ValueError(f"expected a decoder-only causal LM of transformers, got {type(lm).__name__}")
    Head.from_model(lm)
    if getattr(lm, "_forward_without_fused_loss", None) is None:
        # Bound methods, not closures over `lm`: a deep copy of the model then runs its own weights.
        lm._forward_without_fused_loss = lm.forward
        lm.forward = MethodType(_with_fused_loss(type(lm).forward), lm)


def remove_fused_loss(model: nn.Module) -> None:
    """Undoes `install_fused_loss`."""
    lm = causal_lm(model)
    original = lm.__dict__.pop("_forward_without_fused_loss", None)
    if getattr(original, "__func__", None) is type(lm).forward:
        del lm.forward
    elif original is not None:
        lm.forward = original


def _before_logits(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the keyword arguments of a forward that act before its head, and switches the cache off."""
    given = {k: v for k, v in arguments.items() if v is not None and k not in _ABOUT_LOGITS}
    parameters = inspect.signature(type(causal_lm(model)).forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given["use_cache"] = False
    return given


def _with_fused_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the forward that replaces a class's own on a model, with the same signature and docstring."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, fused_loss: Callable[[Tensor, Head], Any] | None = None, **kwargs: Any) -> Any:
        if fused_loss is None:
            return self._forward_without_fused_loss(*args, **kwargs)
        routed, with_z = kwargs.get("output_router_logits"), kwargs.pop("router_z_loss", False)
        if routed is None and asks_router_loss(self):
            raise ValueError(
                "the config asks for the router's auxiliary loss: pass output_router_logits=True for (loss, aux_loss), "
                "False for the loss alone, or set model.config.output_router_logits = False"
            )
        inputs = _before_logits(self, kwargs)
        with router_logits(self) if routed else contextlib.nullcontext([None]) as found:
            hidden = before_head(self, lambda: self._forward_without_fused_loss(*args, **inputs))
        head = Head.from_model(self).cast_to(hidden.dtype)
        loss = fused_loss(head.inputs(hidden), head)
        if not routed:
            return loss
        aux = router_loss(self, found[0], inputs)
        return (loss, aux, router_z_loss(found[0], inputs)) if with_z else (loss, aux)

    return forward
