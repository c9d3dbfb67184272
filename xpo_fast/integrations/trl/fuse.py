"""TRL's `add_fused_lm_head` for any linear head: LoRA and DoRA on it, and a head in an FSDP2 group of its own."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from types import MethodType
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from trl.kernels import chunked_logprob
from trl.trainer import dpo_trainer, utils

from ...head import shift_labels
from ...head.sharded import is_partitioned, is_sharded
from ...models import Head
from ...models.lm_head import ACTS_OF
from .base import NOT_FUSED
from .head import READ_FROM
from .seams import THEIRS, in_layout, installed

logger = logging.getLogger("xpo_fast")
_INSTEAD = "take xpo_fast.trainer, or a method of xpo_fast in this module's DPOTrainer, which go by the model's forward"
_ROWS = ("input_ids", "attention_mask")  # the first arguments of a forward
# Model types whose config has a scale of the hidden states, which TRL takes from before the forward applies it.
_SCALED_BEFORE_THE_HEAD = [name for name, acts in ACTS_OF.items() if 0 in acts.values()]


class NoLayer:
    """Replacement of PEFT's BaseTunerLayer where TRL's trainers refuse every adapter on a head: nothing is one."""


def scores_only_labels(device: torch.device) -> bool:
    """Returns whether TRL should select the labelled positions: here on CPU and MPS, too, where TRL scores all."""
    return device.type in ("cpu", "mps") or chunked_logprob._use_triton(device)


def add_fused_lm_head(
    model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple[str, ...] = ("log_probs",)
) -> None:
    """Teaches a model's forward `fused_lm_head=True`, as TRL's function of this name, with an adapter on the head, too.

    Raises ValueError for a head that is not linear, is quantised, or carries an adapter of another kind than LoRA and
    DoRA: TRL would multiply by whatever its `weight` is. And for a model whose logits TRL would compute otherwise than
    its forward does.
    """
    if NOT_FUSED.get():
        return
    with torch.no_grad():
        head = Head.from_model(model)
    if head.adapter is not None and cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32=True does not go with an adapter on lm_head: samples would not see it")
    before, own = vars(model).get("forward"), model.forward
    THEIRS[utils, "add_fused_lm_head"](
        model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=outputs
    )
    chunked = model.forward.__func__
    read = inspect.getclosurevars(chunked).nonlocals
    try:
        _check_logits(model, own, head, read["final_logit_softcapping"], float(read["logit_scale"]))
    except ValueError:
        if before is None:
            del model.forward
        else:
            model.forward = before
        raise

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return chunked(self, *args, **kwargs)
        labels = kwargs.get("labels")
        given = dict(zip(_ROWS, args, strict=False)) | {name: x for name, x in kwargs.items() if name != "labels"}
        with in_layout(self, given, None if labels is None else shift_labels(labels)):
            return fused(self, *args, **kwargs)

    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.get_output_embeddings()
        if not (_carries_adapter(layer) or isinstance(layer, FSDPModule)):
            return chunked(self, *args, fused_lm_head=True, **kwargs)
        if not installed():
            raise ValueError(
                "TRL's own function leaves an adapter on lm_head out, and the gradient of a head in an FSDP2 group "
                "of its own unaveraged: call install() again"
            )
        token = READ_FROM.set(self)
        try:
            return chunked(self, *args, fused_lm_head=True, **kwargs)
        finally:
            READ_FROM.reset(token)

    model.forward = MethodType(forward, model)  # not a closure over the model: a deep copy runs its own weights


def _carries_adapter(layer: Any) -> bool:
    """Returns whether TRL takes a layer for one of PEFT's; no layer is one without PEFT."""
    kind = THEIRS.get((dpo_trainer, "BaseTunerLayer"))
    return kind is not None and isinstance(layer, kind)


def _check_logits(model: Any, own: Any, head: Head, softcap: float | None, logit_scale: float) -> None:
    """Raises ValueError unless TRL's softcap, scale and hidden states lead to the logits of the model's own forward.

    own: that forward. It runs on two tokens, unless weights are on the meta device or sharded.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    ours, theirs = (head.softcap, head.logit_scale), (softcap, logit_scale)
    if config.model_type in _SCALED_BEFORE_THE_HEAD:
        ours = (head.softcap, logit_scale)
    if ours[0] != theirs[0] or not math.isclose(ours[1], theirs[1], rel_tol=1e-6):
        raise ValueError(
            f"TRL takes {name} for one with softcap {theirs[0]} and logit scale {theirs[1]:g}, its forward has "
            f"{ours[0]} and {ours[1]:g}: {_INSTEAD}"
        )
    if any(x.is_meta or is_sharded(x) or is_partitioned(x) for x in model.parameters()):
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(1, 3, device=model.get_input_embeddings().weight.device)[None]
            try:
                want = own(input_ids=ids).logits.float()
            except Exception as error:
                # It needs more than tokens, or will be on another device.
                logger.warning(
                    "TRL's log-probs of %s are not compared with its own: its forward does not run on two tokens here "
                    "(%s: %s)",
                    name,
                    type(error).__name__,
                    error,
                )
                return
            try:
                z = logit_scale * model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
            except Exception as error:
                raise ValueError(
                    f"TRL does not come by the hidden states that {name} has before lm_head: {_INSTEAD}"
                ) from error
    finally:
        for module, training in modes:
            module.training = training
    allowed = 8 * torch.finfo(z.dtype).eps * max(1.0, float(z.abs().max()))
    z = z.float() if softcap is None else softcap * torch.tanh(z.float() / softcap)
    found = z.to(want.device)[..., : want.shape[-1]].log_softmax(-1)
    error = float((found - want.log_softmax(-1)).abs().max())
    if error > allowed:
        raise ValueError(
            f"the forward of {name} does more to its hidden states before lm_head, or to its logits, than TRL knows "
            f"of: log-probs would be off by {error:.1e}; {_INSTEAD}"
        )
