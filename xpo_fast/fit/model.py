"""The model of a run without contents: its own class from its configuration, with adapter or packed weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import METHODS
from ..models import install_fused_loss
from ..models.lm_head import causal_lm, head_layer
from ..models.value_head import attach_value_head
from ..objective.terms import parse_terms
from ..rewards.spec import RewardSpec
from .question import Question
from .trace import Recorder, record_weights

TRAINED, FROZEN, REFERENCE = "weights, trained", "weights, frozen", "reference's weights"
# Bytes beside each packed weight: of 4 bits a float32 per 64 weights, itself in 8 bits per 256 (nf4, double
# quantisation: Dettmers et al., arXiv 2305.14314, section 3); of 8 bits a float32 per row.
_BLOCK = 64


def make(
    question: Question, recorder: Recorder, recomputing: Callable[[], contextlib.AbstractContextManager]
) -> nn.Module:
    """Returns the policy, or reward model, with the fused loss. recomputing: a context for checkpointed layers."""
    model: Any = _on_meta(question)
    if question.lora is not None:
        from ..trainer import with_adapter

        with torch.device("meta"):
            model = with_adapter(model, question.lora)
    install_fused_loss(model)
    outputs = _outputs(question)
    if outputs:
        with torch.device("meta"):
            attach_value_head(model, outputs)
    if question.command == "reward" and not (question.method in METHODS and METHODS[question.method].trains_head):
        head: Any = head_layer(causal_lm(model))
        if head.weight is not causal_lm(model).get_input_embeddings().weight:
            head.requires_grad_(False)
    record_weights(model, recorder, lambda x: TRAINED if x.requires_grad else FROZEN)
    if question.gradient_checkpointing:
        how = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), recomputing())}
        lm = causal_lm(model)  # transformers before 5.20 has the older name alone
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable(how)
        if question.lora is not None:
            model.enable_input_require_grads()
    model.train()
    layer: Any = head_layer(causal_lm(model))
    recorder.head_shape = tuple(layer.weight.shape)
    return model


def make_reference(question: Question, recorder: Recorder) -> nn.Module:
    """Returns the frozen copy that serves as the reference."""
    model = _on_meta(question).requires_grad_(False)
    install_fused_loss(model)
    record_weights(model, recorder, lambda _: REFERENCE)
    return model.eval()


def _outputs(question: Question) -> int:
    """Returns the outputs of the value head of a reward model or critic; 0 without one."""
    if question.command == "reward":
        return RewardSpec(method=question.method, objectives=question.objectives).outputs
    if question.command == "rl":
        advantage = question.rl.get("advantage", "auto")
        own = parse_terms(question.method, None, {})[0].method.card.rl.advantage
        return int((own if advantage == "auto" else advantage) == "gae")
    return 0


def _on_meta(question: Question) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(question.config)
    dtype = getattr(torch, question.trained_dtype if question.full else question.dtype)
    name = question.attention
    if name is not None and name.startswith(("flash", "flex")):
        name = "sdpa"  # which is counted as flash attention, and needs no package
    how = {} if name is None else {"attn_implementation": name}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how)
        if question.quantize:
            _pack(model, question.quantize)
    return model.requires_grad_(question.full)


def _pack(model: nn.Module, quantize: str) -> None:
    """Replaces the linear layers but the head by packed ones."""
    head = head_layer(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, _Packed(child, quantize))


class _Packed(nn.Linear):
    """A linear layer whose weight is kept in 4 or 8 bits, and unpacked for each product as bitsandbytes does."""

    def __init__(self, layer: nn.Linear, quantize: str) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        count = layer.weight.numel()
        packed = count // 2 if quantize == "4bit" else count
        self.dtype = layer.weight.dtype
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8), requires_grad=False)
        scales = count // _BLOCK + 4 * (count // _BLOCK // 256) if quantize == "4bit" else 4 * layer.out_features
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        if layer.bias is not None:
            self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Returns x Wᵀ + b."""
        out: Any = _Product.apply(input, self.weight, (self.out_features, self.in_features), self.dtype)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Unpacks the weight, and multiplies."""
        ctx.save_for_backward(packed)
        ctx.shape, ctx.dtype = shape, dtype
        return x.to(dtype) @ packed.new_empty(shape, dtype=dtype).T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        """Unpacks the weight again."""
        (packed,) = ctx.saved_tensors
        return upstream[0] @ packed.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None
