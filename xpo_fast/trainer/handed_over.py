"""What the model that was handed to a trainer is, in terms of the PEFT model that is trained.

The reference policy is the model as it was handed over. Of a PEFT model that is one of these, found out by what its
adapter does and not by its kind:

    off   the model with its adapter switched off, if a new adapter was put on it, or one that does nothing yet
    on    the model with its adapter on and its trained weights as they start, if the adapter handed over has learned
          something, or if making it moved a part of the base weights into it (PiSSA, OLoRA)
    lost  neither, if making the adapter changed the base weights and what they compute (LoftQ)

Weights that are trained and that this form computes with are kept as they were, and put in place while the reference is
scored: adapters, copies of modules, and whatever is trained beside an adapter, such as biases.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models import embeddings
from ..models.modes import evaluating, in_place_of, without_adapter
from ..models.value_head import value_head

WEIGHTS = "weights of the reference"  # name of their hash in a checkpoint
_ELEMENTS = 4096  # of each weight, which are compared
_IDLE = 1e-3  # log-probs move by less than that from rounding, nats
_IDS = 16  # tokens of the row on which an adapter is tried
_ROWS = 1 << 14  # of an embedding at a time
_MERGE = "merge it (model.merge_and_unload()) and pass a peft_config for a new one"


class HandedOver:
    """The model as it was handed over. Made before `peft_config`, if any, is put on it; then `settle` is called.

    copied: take a frozen copy now if there is a peft_config, which may change the base weights.
    """

    def __init__(self, model: nn.Module, peft_config: Any, *, copied: bool) -> None:
        self.adapted = hasattr(model, "disable_adapter")
        self.off = False  # whether it is the model that is trained with its adapter switched off
        self.apart: str | None = None  # why the policy does not start as the reference; None if it should
        new = peft_config is not None and not self.adapted
        self._copy = frozen_copy(model) if new and copied else None
        self._before = {name: x.clone() for name, x in _beginnings(model)} if new else {}

    def settle(
        self, strategy: str, requested: str, model: nn.Module, *, sharded: bool = False, averaged: bool = False
    ) -> str:
        """Finds out which form of the model it is, and returns the strategy: "kept" in place of "adapter" if it is on.

        strategy: none, adapter, copy or cached, chosen from `requested`. model: that to be trained, before its first
            step and where it will be. sharded: FSDP or DeepSpeed keep it in parts. averaged: the reference follows the
            policy, with the adapter on, and so must start as the policy does.
        Warns if reference="adapter" asks for something else than the model as it was handed over, and if the policy
        does not start as the reference. Raises ValueError if there is no such reference.
        """
        if strategy == "none" or not hasattr(model, "disable_adapter"):
            return strategy
        if any(getattr(module, "merged", False) for module in model.modules()):
            raise ValueError("the adapter is merged into the base weights and cannot be trained: unmerge it first")
        if averaged:
            requested = "auto"
        if self.adapted:
            strategy = self._with_adapter_of_its_own(strategy, requested, model, sharded)
        else:
            strategy = self._with_new_adapter(strategy, requested, model, sharded, averaged)
        if sharded and strategy in ("kept", "adapter") and Kept(model, off=self.off):
            raise ValueError(
                "weights that the reference computes with are trained, so it needs them as they were, and FSDP and "
                "DeepSpeed keep them in parts: merge the adapter into the model and pass a peft_config for a new one "
                "that trains nothing beside itself"
            )
        return strategy

    def _with_adapter_of_its_own(self, strategy: str, requested: str, model: nn.Module, sharded: bool) -> str:
        if requested == "adapter":
            self.off = True
            if not sharded and warn_of_trained_adapter(model, requested):
                self.apart = "the policy carries an adapter that was trained before, and the reference does not"
            return strategy
        moved = None if sharded else effect_of_adapter(model)
        self.off = moved == 0.0 or (moved is None and strategy == "adapter")
        if moved is None and self.off:
            warnings.warn(
                "whether the model's adapter has been trained cannot be seen before its weights are loaded; the "
                f"reference is the model with its adapter off. If it has been trained, {_MERGE}",
                stacklevel=4,
            )
        return "kept" if strategy == "adapter" and not self.off else strategy

    def _with_new_adapter(self, strategy: str, requested: str, model: nn.Module, sharded: bool, averaged: bool) -> str:
        changed = self._changed(model)
        self.off = not changed
        same = all(adds_up for _, adds_up in changed)  # with the adapter on
        if changed and strategy != "copy" and (requested == "adapter" or not same):
            raise ValueError(
                f"making the adapter changed {len(changed)} of the base weights, such as {changed[0][0]}, so the model "
                "with its adapter off is not the one that was handed over"
                + ("" if same else ", nor is it with its adapter on")
                + ': use reference="copy", which copies the model before'
                + (', or "auto"' if same else "; or leave init_lora_weights at its default")
            )
        moved = 0.0 if same else math.inf
        if not changed and not sharded:
            moved = effect_of_adapter(model) or 0.0
        if moved > _IDLE:
            about = "" if moved == math.inf else f" (it moves log-probs by up to {moved:.3g})"
            if averaged:
                raise ValueError(
                    f"ref_mixin averages the adapter, and the new one is not idle{about}: the reference would not "
                    "start as the model handed over. Leave init_lora_weights at its default, or ref_mixin at 0"
                )
            warnings.warn(
                f"the new adapter is not idle before the first step{about}: the reference is the model as it was "
                "handed over, and the policy does not start there, nor the loss at its known first value. Leave "
                "init_lora_weights at its default to start as the reference",
                stacklevel=4,
            )
            self.apart = "the policy has a new adapter, which is not idle, and the reference has none"
        return "kept" if changed and strategy == "adapter" else strategy

    def _changed(self, model: Any) -> list[tuple[str, bool]]:
        """Returns the base weights that the new adapter changed, and whether base and adapter together are the same."""
        found = []
        modules = dict(model.named_modules())
        for full, p in model.named_parameters(remove_duplicate=False):
            name = _base_name(full)
            before = self._before.get(name)
            if before is None or before.is_meta or p.is_meta:
                continue
            now = _beginning(p)
            if now.shape == before.shape and torch.equal(_bytes(now), _bytes(before)):
                continue
            layer: Any = modules.get(full.rpartition(".base_layer.")[0])
            found.append((name, _adds_up(before, now, layer)))
        return found

    def copy(self, model: nn.Module) -> nn.Module:
        """Returns a frozen copy of the model as it was handed over. model: that to be trained, before any step."""
        return frozen_copy(model) if self._copy is None else self._copy

    def identity(self, copied: nn.Module | None, kept: Kept | None) -> dict[str, str]:
        """Returns what a resumed run must share: a hash of the reference's weights, for `UnitTrainer.made_with`.

        Empty if they follow from the base model and the settings, as those of an adapter made here do.
        """
        if copied is not None:
            return {WEIGHTS: sample_of(copied.named_parameters())}
        return {WEIGHTS: sample_of(kept.weights.items())} if kept and self.adapted and not self.off else {}


class Kept:
    """The trained weights that a PEFT model computes with, as they are now; empty if there are none.

    off: with its adapter switched off. dtype: of the weights that are kept, their own by default. A value head, which
    no log-prob depends on, is left out.
    """

    def __init__(self, model: Any, *, off: bool, dtype: torch.dtype | None = None) -> None:
        self.model, self.off = model, off
        head = value_head(model)
        left_out = set() if head is None else set(head.parameters())
        with self._switched():
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p not in left_out}
        self.weights = {n: p.detach().to(dtype or p.dtype, copy=True) for n, p in trained.items()}
        self._parameters = trained

    def __bool__(self) -> bool:
        return bool(self.weights)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Lets the model compute inside the block as it did when this was made."""
        with self._switched(), in_place_of([(p, self.weights[n]) for n, p in self._parameters.items()]):
            yield

    def _switched(self) -> contextlib.AbstractContextManager:
        return switched_off(self.model) if self.off else contextlib.nullcontext()


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """`without_adapter`, without PEFT's warning of trained biases, which are set back or not looked at here."""
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
            stack.enter_context(without_adapter(model))
        yield


def frozen_copy(model: nn.Module) -> nn.Module:
    """Returns a frozen deep copy of the model, with its adapter if it has one."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def warn_of_trained_adapter(model: nn.Module, reference: str) -> bool:
    """Warns if reference="adapter", the model without its adapter, is not that handed over; returns whether it does."""
    differs = reference == "adapter" and bool(effect_of_adapter(model))
    if differs:
        warnings.warn(
            'the model carries a trained adapter, and reference="adapter" is the model with its adapter off: its base, '
            'not the model as handed over. To compare with that, use reference="auto"',
            stacklevel=3,
        )
    return differs


def effect_of_adapter(model: Any) -> float | None:
    """Returns by how much the adapter of a PEFT model moves log-probs, at most: 0.0 only if it does nothing at all.

    Compares one short row, and every embedding if the adapter is on the embeddings. None if the weights are not there.
    """
    if any(p.is_meta or p.numel() == 0 for p in model.parameters()):
        return None
    embedding = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    count = embeddings(model)
    row = torch.linspace(0, count - 1, _IDS, device=device).long()[None]

    def logps() -> Tensor:
        return model(input_ids=row, attention_mask=torch.ones_like(row)).logits.float().log_softmax(dim=-1)

    def difference(compute: Any) -> float:
        on = compute()
        with switched_off(model):
            off = compute()
        return 0.0 if torch.equal(on, off) else max(float((on - off).abs().max()), torch.finfo(torch.float32).tiny)

    with evaluating(model):
        found = difference(logps)
        if found == 0.0 and type(embedding) is not nn.Embedding:  # some tokens' rows may have been trained alone
            for ids in torch.arange(count, device=device).split(_ROWS):
                found = max(found, difference(lambda ids=ids: embedding(ids[None])))
    return found


def adapter_identity(model: Any) -> dict[str, Any]:
    """Returns what the output of a model with adapters depends on beside its weights: their settings and scales."""
    configs = getattr(model, "peft_config", None) or {}
    if not configs:
        return {}
    active = model.active_adapters
    settings = {n: c.to_dict() if hasattr(c, "to_dict") else str(c) for n, c in configs.items()}
    for config in settings.values():
        if isinstance(config, dict):
            for name in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
                config.pop(name, None)
    scales = {n: m.scaling for n, m in model.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
    return {"active": active() if callable(active) else active, "settings": settings, "scales": scales}


def sample_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a hash of the names of weights and of the beginning of each, which costs little."""
    digest = hashlib.sha256()
    for name, x in weights:
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(b"" if x.is_meta else _bytes(_beginning(x)).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _beginnings(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters(remove_duplicate=False):
        yield name, _beginning(p)


def _beginning(x: Tensor) -> Tensor:
    return x.data.reshape(-1)[:_ELEMENTS]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else x.new_zeros(0, dtype=torch.uint8)


def _base_name(name: str) -> str:
    """Returns the name that a weight of a PEFT model had in the base model."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _adds_up(before: Tensor, now: Tensor, layer: Any) -> bool:
    """Tells whether a changed base weight and its adapter's update are, up to rounding, the weight before."""
    if not hasattr(layer, "get_delta_weight") or now.shape != before.shape or not before.is_floating_point():
        return False
    with torch.no_grad():
        update: Any = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
    delta = _beginning(update)
    parts = [x.double() for x in (before, now, delta)]
    rounding = torch.finfo(before.dtype).eps * max(float(x.abs().max()) for x in parts)
    return bool((parts[1] + parts[2] - parts[0]).abs().max() <= 8 * rounding)
