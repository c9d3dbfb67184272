"""The operands of the head as one value, which `Operands.admit` casts, gathers, cuts and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..device import on_host
from .sharded import gathered, refuse_sharded, unpartitioned
from .spec import Scaling, cast_for_autocast
from .vocab_parallel import VocabShard, shard_of

_UNSCALED = Scaling()


class HeadLike(Protocol):
    """A head in place of a weight: the weight, and all that a model's forward does to its products (`models.Head`)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    adapter: Tensor | None

    def inputs(self, hidden: Tensor) -> Tensor:
        """Returns the hidden states (…, D) as the head multiplies them: [h, x] (…, D + r) with an adapter."""
        ...


class Reference(NamedTuple):
    """The hidden states and the head of a reference, which get no gradient."""

    hidden: Tensor  # (…, Dr)
    weight: Any = None  # (V, Dr), or a HeadLike; None stands for the policy's, until `admit`
    bias: Tensor | None = None  # (V,)


@dataclass(frozen=True)
class Operands:
    """The operands of a call's logits, z = softcap(logit_scale · (hidden Wᵀ + bias)) / temperature, and its targets.

    A public function makes them from its arguments; `admit` returns the operands that this rank multiplies.
    """

    hidden: Tensor  # (…, D), or with an adapter [h, x] (…, D + r)
    weight: Any  # (V, D); before `admit` it may be a HeadLike
    targets: Tensor  # (…) integer
    bias: Tensor | None = None  # (V,)
    adapter: Tensor | None = None  # (V, r)
    ref: Reference | None = None
    weight_grad: Tensor | None = None  # (V, D), the buffer to which the backward adds dW
    shard: VocabShard | None = None
    scaling: Scaling = _UNSCALED
    ignore_index: int = -100
    selected: Tensor | None = None  # (K,) or (…, K) integer: the ids of `TokenStats.selected_logp`; not in `packed`

    @property
    def trainable(self) -> bool:
        """Returns whether any parameter of the head requires a gradient."""
        return any(x is not None and x.requires_grad for x in (self.weight, self.bias, self.adapter))

    @property
    def vocab(self) -> int:
        """Returns the number of tokens of the vocabulary, of all ranks' shards together."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    def admit(self, *, gather: bool = True, teacher: bool = False) -> Operands:
        """Returns the operands that this rank multiplies: cast for autocast, gathered, cut to its shard, and checked.

        They are cast before they are gathered, so that a sharded parameter is gathered in the dtype in which it is
        multiplied. A HeadLike is first replaced by its fields.
        gather: False leaves a DTensor as it is, for a plan. teacher: whether the reference is a teacher, whose
        vocabulary may be larger. Raises ValueError for operands that do not fit together.
        """
        given = self._without_heads()
        hidden, weight_grad, shard = given.hidden, given.weight_grad, given.shard
        ref_hidden, ref_weight, ref_bias = given.ref or (None, None, None)
        if given.adapter is not None and ref_hidden is not None and ref_weight is None:
            raise ValueError(
                "with an adapter the policy's weight and bias need not be the reference's (DoRA scales the rows of the "
                "weight, lora_bias adds to the bias): pass ref_weight=, and ref_bias= if it has one, with ref_hidden="
            )
        theirs = "teacher" if teacher else "ref"  # the caller's names of them begin so
        refs = f"{theirs}_weight", f"{theirs}_bias"
        heads = {"weight": given.weight, "bias": given.bias, refs[0]: ref_weight, refs[1]: ref_bias}
        adapter = {"adapter": given.adapter}  # which its GEMMs cast
        if not gather:
            heads, adapter = (dict(zip(x, unpartitioned(*x.values()))) for x in (heads, adapter))
        hidden, ref_hidden, *cast = cast_for_autocast(hidden, ref_hidden, *heads.values())
        parts = {**dict(zip(heads, cast)), **adapter}
        if gather:
            named = {"hidden": hidden, "targets": given.targets, f"{theirs}_hidden": ref_hidden}
            refuse_sharded(**named, weight_grad=weight_grad, selected_ids=given.selected)
            parts = dict(zip(parts, gathered(weight_grad=weight_grad, **parts)))
        if shard is not None:
            parts["weight_grad"] = weight_grad
            parts = dict(zip(parts, shard.tokens(**parts)))
            weight_grad, hidden = parts.pop("weight_grad"), shard.replicated(hidden)
        ref_weight, ref_bias = (parts.pop(name) for name in refs)
        check_operands(hidden, targets=given.targets, **parts)
        if given.selected is not None:
            _check_selected(given.selected, given.targets, hidden.device)
        ref = None
        if ref_hidden is not None:
            if ref_weight is None:
                ref_weight, ref_bias = parts["weight"], parts["bias"] if ref_bias is None else ref_bias
            ref = Reference(ref_hidden, ref_weight, ref_bias)
            _check_reference(ref, given.targets, parts["weight"].shape[0], "teacher" if teacher else "reference")
        return dataclasses.replace(given, hidden=hidden, ref=ref, weight_grad=weight_grad, **parts)

    def _without_heads(self) -> Operands:
        """Returns the operands with every HeadLike replaced by its fields.

        Raises ValueError for a field that was given beside a HeadLike, and for a reference's that has an adapter or a
        scaling unlike the policy's.
        """
        operands = self
        scaling, ref = self.scaling, self.ref
        if not isinstance(self.weight, Tensor):
            head = _head("weight", self.weight)
            given = {"bias": self.bias, "adapter": self.adapter, "softcap": scaling.softcap}
            twice = [name for name, x in given.items() if x is not None]
            twice += ["logit_scale"] * (scaling.logit_scale != 1)
            if twice:
                raise ValueError(
                    f"{' and '.join(twice)} came beside a Head, which has its own: leave it out, or pass head.weight"
                )
            scaling = Scaling(scaling.temperature, head.softcap, float(head.logit_scale))
            operands = dataclasses.replace(
                operands,
                hidden=_inputs(head, self.hidden),
                weight=head.weight,
                bias=head.bias,
                adapter=head.adapter,
                scaling=scaling,
            )
        if ref is not None and ref.weight is not None and not isinstance(ref.weight, Tensor):
            head = _head("ref_weight", ref.weight)
            if head.adapter is not None:
                raise ValueError("the reference's Head has an adapter: merge or disable it, then read the Head again")
            theirs, ours = (head.softcap, float(head.logit_scale)), (scaling.softcap, scaling.logit_scale)
            if theirs != ours:
                raise ValueError(
                    f"the reference's Head has softcap and logit_scale {theirs} and the policy's {ours}: one call has "
                    "one scaling; compute the reference's log-probs by token_logps and pass them as ref_logps="
                )
            if ref.bias is not None:
                raise ValueError("ref_bias came beside a Head, which has its own: leave it out, or pass head.weight")
            operands = dataclasses.replace(operands, ref=Reference(ref.hidden, head.weight, head.bias))
        return operands

    def flat(self) -> Operands:
        """Returns the operands with one axis of positions, (N, …), int64 targets and a detached reference."""
        ref = self.ref
        if ref is not None:
            bias = None if ref.bias is None else ref.bias.detach()
            ref = Reference(ref.hidden.detach().reshape(-1, ref.hidden.shape[-1]), ref.weight.detach(), bias)
        selected = None if self.selected is None else self.selected.long()
        if selected is not None and selected.dim() > 1:
            selected = selected.reshape(self.targets.numel(), selected.shape[-1])
        return dataclasses.replace(
            self,
            hidden=self.hidden.reshape(-1, self.hidden.shape[-1]),
            targets=self.targets.reshape(-1).long(),
            ref=ref,
            selected=selected,
        )

    # A custom operator takes tensors, numbers and strings only.

    def packed(self) -> tuple[Any, ...]:
        """Returns the fields but `selected` as a custom operator's arguments; `unpacked` is the inverse."""
        s = self.scaling
        return (
            *(self.hidden, self.weight, self.bias, self.adapter, self.targets),
            *(self.ref or (None, None, None)),
            self.weight_grad,
            [s.temperature, s.softcap or 0.0, s.logit_scale],
            self.ignore_index,
            "" if self.shard is None else self.shard.handle(),
        )

    @classmethod
    def unpacked(cls, *fields: Any) -> Operands:
        """Returns the operands from the arguments of a custom operator, see `packed`."""
        hidden, weight, bias, adapter, targets, *ref, weight_grad, scaling, ignore_index, shard = fields
        return cls(
            hidden,
            weight,
            targets,
            bias,
            adapter,
            None if ref[0] is None else Reference(*ref),
            weight_grad,
            shard_of(shard),
            unpacked_scaling(scaling),
            ignore_index,
        )


def take_operands(hidden: Tensor, weight: Any, targets: Tensor, options: dict[str, Any]) -> Operands:
    """Returns the operands of a call, and removes those of its `options` that they consist of (as in `token_stats`)."""

    def take(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    ref = reference(*(options.pop(name, None) for name in ("ref_hidden", "ref_weight", "ref_bias")))
    scaling = Scaling(**take("temperature", "softcap", "logit_scale"))
    shard = options.pop("vocab_shard", None)
    given = take("bias", "adapter", "weight_grad", "ignore_index")
    return Operands(hidden, weight, targets, ref=ref, shard=shard, scaling=scaling, **given)


def unpacked_scaling(numbers: Sequence[float]) -> Scaling:
    """Returns the scaling from its numbers in `Operands.packed`, where 0 stands for no softcap."""
    temperature, softcap, logit_scale = numbers
    return Scaling(temperature, softcap or None, logit_scale)


def reference(hidden: Tensor | None, weight: Any, bias: Tensor | None) -> Reference | None:
    """Returns the reference of a call, or None if its hidden states are not given."""
    return None if hidden is None else Reference(hidden, weight, bias)


def _head(name: str, head: Any) -> HeadLike:
    """Returns what came in place of a weight. Raises ValueError if it is no head."""
    if not hasattr(head, "inputs"):
        raise ValueError(
            f"{name} must be a tensor (V, D) or a Head, got {type(head).__name__}: pass its weight, or "
            "Head.from_model(model)"
        )
    return head


def _inputs(head: HeadLike, hidden: Tensor) -> Tensor:
    """Returns the head's inputs; `hidden` itself if it is not D wide, since it then is [h, x] (…, D + r) already."""
    shape = getattr(head.weight, "ds_shape", head.weight.shape)  # of a parameter that ZeRO-3 has in parts, the whole's
    return hidden if hidden.shape[-1] != shape[1] else head.inputs(hidden)


def check_operands(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, adapter: Tensor | None = None
) -> None:
    """Raises ValueError unless hidden (…, D), weight (V, D), targets (…) and bias (V,) fit together.

    With an adapter (V, r) hidden is (…, D + r). All must be on one device, but targets may be on the host.
    """
    if not hidden.is_floating_point() or hidden.dim() < 1:
        raise ValueError(f"hidden must be a float tensor (…, D), got {hidden.dtype} {tuple(hidden.shape)}")
    if adapter is not None:
        _check_adapter(hidden, weight, adapter)
    elif weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V, D) with D = {hidden.shape[-1]} as hidden {tuple(hidden.shape)} has, "
            f"got {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have one token a hidden state: expected {tuple(hidden.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or compute under torch.autocast"
        )
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias), ("adapter", adapter)):
        if x is not None and x.device != hidden.device and not (x is targets and on_host(x)):
            raise ValueError(f"hidden is on {hidden.device} and {name} on {x.device}: move one of them")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be a float tensor ({weight.shape[0]},), got {bias.dtype} {tuple(bias.shape)}")


def _check_adapter(hidden: Tensor, weight: Tensor, adapter: Tensor) -> None:
    """Raises ValueError unless weight (V, D), adapter (V, r) and hidden (…, D + r) fit together."""
    if weight.dim() != 2 or adapter.shape[:-1] != weight.shape[:1] or not adapter.is_floating_point():
        raise ValueError(
            f"weight must be (V, D) and adapter a float tensor (V, r), got {tuple(weight.shape)} and {adapter.dtype} "
            f"{tuple(adapter.shape)}"
        )
    width = weight.shape[1] + adapter.shape[1]
    if hidden.shape[-1] != width:
        raise ValueError(
            f"with an adapter of rank {adapter.shape[1]}, hidden must be [h, x], {width} wide, x = s·dropout(h) Aᵀ: "
            f"expected (…, {width}), got {tuple(hidden.shape)}; `Head.inputs(hidden)` makes it"
        )


def _check_selected(ids: Tensor, targets: Tensor, device: torch.device) -> None:
    """Raises ValueError unless selected ids are integers (K,) or (…, K) on the device or the host."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"selected_ids must be a tensor of token ids, got {type(ids).__name__}: pass torch.tensor(…)")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"selected_ids must be integer token ids, got {ids.dtype}")
    if ids.dim() != 1 and (ids.dim() < 1 or ids.shape[:-1] != targets.shape):
        raise ValueError(
            f"selected_ids must be (K,), the same at every position, or {(*targets.shape, 'K')}, K ids a position, got "
            f"{tuple(ids.shape)}"
        )
    if ids.device != device and not on_host(ids):
        raise ValueError(f"hidden is on {device} and selected_ids on {ids.device}: move one of them")


def _check_reference(ref: Reference, targets: Tensor, vocab: int, name: str) -> None:
    """Raises ValueError unless a reference, or a teacher (`name`), fits the targets and the vocabulary."""
    shape = tuple(ref.hidden.shape)
    if name == "reference" and shape[:-1] != tuple(targets.shape):
        raise ValueError(
            f"the operands of the reference: ref_hidden must be {tuple(targets.shape)}, as targets are, by its width, "
            f"got {shape}"
        )
    try:
        check_operands(ref.hidden, ref.weight, targets, ref.bias)
    except ValueError as error:
        raise ValueError(f"the operands of the {name}: {error}") from None
    own = ref.weight.shape[0]
    if name == "teacher" and own < vocab:
        raise ValueError(f"the teacher's vocabulary of {own} must hold the student's of {vocab}")
    if name == "reference" and own != vocab:
        raise ValueError(f"the reference must have the policy's vocabulary of {vocab}, got {own}")
