"""The auxiliary losses of a mixture of experts' router, beside a loss that is fused into the model's forward.

That of load balancing is transformers' own: `load_balancing_loss_func` of the module that defines the model's class, of
the router's logits of every layer and of the tokens that the attention mask lets through, prompts and completions
alike. The z-loss is of the same logits and tokens.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .lm_head import causal_lm, unwrapped

_FUNCTION = "load_balancing_loss_func"
# config.model_type of those whose router returns its logits as its linear makes them, and takes a softmax of them:
# read in transformers 5.24. A router of sigmoids has no sum of exponentials to hold down.
_RAW = (
    *("dbrx", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "jamba", "minimax", "mixtral", "olmoe"),
    *("phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
)


def asks_router_loss(model: Any) -> bool:
    """Returns whether the model's config has output_router_logits=True."""
    config = causal_lm(unwrapped(model)).config
    return any(getattr(c, "output_router_logits", False) for c in (config, config.get_text_config()))


def no_router_loss(model: Any) -> dict[str, bool]:
    """Returns the argument of a fused forward that leaves the router's loss out: {} where the config asks for none."""
    return {"output_router_logits": False} if asks_router_loss(model) else {}


def router_coefficient(model: Any) -> float:
    """Returns config.router_aux_loss_coef if the config has output_router_logits=True, else 0.

    Raises ValueError for a model whose router's loss is asked for and cannot be computed.
    """
    if not asks_router_loss(model):
        return 0.0
    lm = causal_lm(unwrapped(model))
    config = lm.config.get_text_config()
    found = getattr(config, "router_aux_loss_coef", None)
    if found is None:
        raise _no_loss(lm, "its config has no router_aux_loss_coef")
    if found:
        _parts(lm)
    elif z_coefficient(model):
        raise _no_loss(lm, "router_z_loss_coef needs a router_aux_loss_coef above 0 beside it, and it is 0")
    return float(found)


def z_coefficient(model: Any) -> float:
    """Returns config.router_z_loss_coef if the config has output_router_logits=True, else 0; 0 where it has none.

    Raises ValueError for one that is negative or not finite, and for a model that is not known to give the logits of
    its router before their softmax.
    """
    if not asks_router_loss(model):
        return 0.0
    lm = causal_lm(unwrapped(model))
    config = lm.config.get_text_config()
    found = float(getattr(config, "router_z_loss_coef", None) or 0.0)
    if not 0 <= found < math.inf:
        raise _no_loss(lm, f"router_z_loss_coef must be finite and 0 or more, got {found:g}")
    if found and config.model_type not in _RAW:
        raise _no_loss(
            lm,
            f"its config asks for a z-loss (router_z_loss_coef={found:g}), which is of logits before a softmax; those "
            f"are known of {', '.join(_RAW)}, not of {config.model_type}: set router_z_loss_coef = 0",
        )
    return found


def refuse_router_loss(model: Any, what: str) -> None:
    """Raises ValueError if the config asks for the router's loss. what: that does not add it, "a reward model"."""
    if asks_router_loss(model):
        raise ValueError(
            f"the router's auxiliary loss is not added to that of {what}: set model.config.output_router_logits = False"
        )


@contextlib.contextmanager
def without_router_logits(model: Any) -> Iterator[None]:
    """Samples without the router's loss: transformers would compute it of a mask that is longer than the new tokens."""
    config = causal_lm(unwrapped(model)).config
    asking = [c for c in (config, config.get_text_config()) if getattr(c, "output_router_logits", False)]
    for c in asking:
        c.output_router_logits = False
    try:
        yield
    finally:
        for c in asking:
            c.output_router_logits = True


@contextlib.contextmanager
def router_logits(lm: Any) -> Iterator[list[Any]]:
    """Yields a list that, after a forward of the causal LM inside the block, holds its router's logits, layer by layer.

    A forward that ends at the head has them, too: they are what the module below the head returns.
    """
    found: list[Any] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found[:] = [getattr(output, "router_logits", None)]

    handle = lm.base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def router_loss(lm: Any, logits: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Returns the auxiliary loss (), with a graph. logits: of each layer (R·T, E). arguments: of the forward.

    Raises ValueError for a model that returns no logits of a router, and for rows that were read in a layout.
    """
    function, experts, chosen = _parts(lm)
    if not isinstance(logits, tuple) or not logits:
        raise _no_loss(lm, "its decoder returns no router_logits")
    mask = arguments.get("attention_mask")
    rows = logits[0].shape[0]
    if mask is not None and mask.numel() != rows:
        raise _no_loss(lm, f"{rows} tokens were routed of rows of {tuple(mask.shape)}: read them padded")
    return function(logits, experts, chosen, mask)


def router_z_loss(logits: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Returns the router's z-loss (), with a graph: the mean of (log Σ_e exp x_e)² over layers and unpadded tokens.

    ST-MoE (arXiv 2202.08906), equation 5. x: the logits of each layer (R·T, E), before their softmax. arguments: of the
    forward. Layers have a mean, as in transformers' loss of load balancing, not a sum. As `router_loss` has checked.
    """
    device = logits[0].device
    x = torch.stack([layer.to(device) for layer in logits])  # (layers, R·T, E)
    if (mask := arguments.get("attention_mask")) is not None:
        x = x[:, (mask.reshape(-1) != 0).to(device)]
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).logsumexp(dim=-1).square()
    return squares.sum() / max(squares.numel(), 1)


def _parts(lm: Any) -> tuple[Any, int, int]:
    """Returns transformers' function, the number of experts, and of those that a token goes to."""
    modules = [sys.modules[kind.__module__] for kind in type(lm).__mro__ if kind.__module__ in sys.modules]
    function = next((f for m in modules if (f := getattr(m, _FUNCTION, None)) is not None), None)
    experts, chosen = getattr(lm, "num_experts", None), getattr(lm, "num_experts_per_tok", None)
    if function is None or experts is None or chosen is None:
        raise _no_loss(lm, f"transformers has no {_FUNCTION} for it, or it does not say how many experts there are")
    return function, experts, chosen


def _no_loss(lm: Any, why: str) -> ValueError:
    return ValueError(
        f"the auxiliary loss of the router of {type(lm).__name__} cannot be computed: {why}. Set "
        "model.config.output_router_logits = False to train without it"
    )
