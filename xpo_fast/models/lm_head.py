"""Reads the LM head of a `transformers` causal LM: its layer, its adapter, and the scale and softcap of its logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..head.sharded import gathered, is_sharded, unpartitioned

# Attributes of a text config by which a model's forward changes the products h Wᵀ: a softcap, or a factor with its
# power. They count only if the code of that forward names them: a multimodal model may leave out what its text model
# does.
_CAP = "softcap"
_ACTS: dict[str, int | str] = {
    "final_logit_softcapping": _CAP,
    "logits_soft_cap": _CAP,
    "output_logit_soft_cap": _CAP,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,
}
_ALSO_CALLED = {"final_logit_softcapping": "logit_softcap"}  # a module that is made from the attribute
# Model types for which an attribute has another power; 0: it acts before the head.
ACTS_OF: dict[str, Mapping[str, int | str]] = {"hyperclovax": {"logits_scaling": 1}, "minicpm3": {"logits_scaling": 0}}
# Model types that change logits in a way no Head can express.
_NOT_HEADS = {"chameleon": "sets the logits of image tokens to the least number"}
# Packages whose hooks on a head, and replacements of its forward, gather, move or cast and do not change its logits.
_LEAVE_LOGITS = ("accelerate", "deepspeed", "torch.distributed", "trl", __name__.split(".")[0])
# Attribute of a config: the rows of the weight beyond this number are padding, whose logits the model drops.
_UNPADDED = "unpadded_vocab_size"
_KEEP = "keep it in 16 or 32 bits (llm_int8_skip_modules, modules_to_not_convert)"


@dataclass
class Head:
    """An LM head: z = softcap(logit_scale · (h Wᵀ + x Bᵀ + bias)), with x = project(h) if a LoRA adapter is on it.

    The same call for all models: token_logps(hidden, Head.from_model(model), targets).
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0
    adapter: Tensor | None = None  # B (V, r), the columns of several adapters side by side
    project: Callable[[Tensor], Tensor] | None = None  # h (…, D) → x = s·dropout(h) Aᵀ (…, r)

    @classmethod
    def from_model(cls, model: Any) -> Head:
        """Reads the head of a causal LM of `transformers`, with what its forward does to logits.

        A PEFT model's head is read as its adapters are at the moment: LoRA as `adapter`, DoRA as a copy of the weight
        with scaled rows and an `adapter`, merged or disabled adapters as the plain layer, modules_to_save as the
        trained copy. Raises ValueError, with the reason, for a head that is not linear or is quantised, for one whose
        forward was replaced or has hooks (except those that gather, move or cast: FSDP's, DeepSpeed's, accelerate's,
        TRL's), for an adapter of another kind, and for an encoder-decoder.
        """
        return cls(**_read(model))

    def inputs(self, hidden: Tensor) -> Tensor:
        """Returns what is multiplied: hidden (…, D) itself without an adapter, with one [h, x] (…, D + r).

        A call that takes a Head does it where it is given hidden (…, D). Do it yourself where a wrapper must see it, as
        `install_fused_loss` does, or if two calls are to share one dropout.
        """
        if self.project is None:
            return hidden
        return torch.cat([hidden, self.project(hidden).to(hidden.dtype)], dim=-1)

    def cast_to(self, dtype: torch.dtype) -> Head:
        """Returns the head with what FSDP2 still has in parts in a dtype, as its mixed precision casts what it gathers.

        Where the head is in a group of its own, whose forward is not run, nothing else casts it. A head that is whole
        is returned as it is.
        """
        named = {name: getattr(self, name) for name in ("weight", "bias", "adapter")}
        cast = {n: x.to(dtype) for n, x in named.items() if x is not None and is_sharded(x) and x.dtype != dtype}
        return replace(self, **cast) if cast else self

    @property
    def width(self) -> int:
        """The width of `inputs`: D, or D + r with an adapter."""
        return self.weight.shape[1] + (0 if self.adapter is None else self.adapter.shape[1])


def causal_lm(model: Any) -> Any:
    """Returns the `transformers` causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module"}  # where wrappers keep what they wrap


def unwrapped(model: Any) -> Any:
    """Returns the model without the wrappers that accelerate puts around it (DDP, torch.compile)."""
    if not _WRAPPED & model._modules.keys():  # accelerate takes milliseconds to look for what is installed
        return model
    try:
        from accelerate.utils import extract_model_from_parallel
    except ImportError:
        return model
    return extract_model_from_parallel(model)


def head_layer(lm: Any) -> nn.Module:
    """Returns the module that a causal LM calls on its last hidden states to get logits; ValueError if it has none."""
    layer = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(
            f"{type(lm).__name__} has no output embeddings: expected a causal LM with one linear layer behind its last "
            "hidden states"
        )
    return layer


def _read(model: Any) -> dict[str, Any]:
    """Returns the fields of `Head` for a causal LM of `transformers`, PEFT-wrapped or not, as its adapters are now."""
    lm = causal_lm(model)
    layer = head_layer(lm)
    if (why := _NOT_HEADS.get(getattr(lm.config, "model_type", ""))) is not None:
        raise _refused(type(lm).__name__, why, "take its logits")
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(
            f"expected a decoder-only causal LM, got {type(lm).__name__}: an encoder-decoder's logits are not those of "
            "its head alone (Bart and Marian add final_logits_bias)"
        )
    active = _active(layer)
    fields = _read_layer(active, type(lm).__name__) | {"logit_scale": 1.0, "softcap": None}
    for x in dict.fromkeys((layer, active, getattr(active, "base_layer", active))):
        _refuse_changes(x, type(lm).__name__)
    config = lm.config.get_text_config() if hasattr(lm.config, "get_text_config") else lm.config
    named = _names_behind_head(lm, layer)
    for attribute, act in {**_ACTS, **ACTS_OF.get(getattr(config, "model_type", ""), {})}.items():
        value = getattr(config, attribute, None)
        if value is None or not named & {attribute, _ALSO_CALLED.get(attribute)}:
            continue
        if act == _CAP:
            fields["softcap"] = float(value)
        else:
            fields["logit_scale"] *= float(value) ** int(act)
    vocab = getattr(config, _UNPADDED, None)
    if vocab is not None and vocab < _shape(fields["weight"])[0]:
        names = [x for x in ("weight", "bias", "adapter") if fields[x] is not None]
        cut = unpartitioned(*(fields[x] for x in names))
        fields |= {name: x[:vocab] for name, x in zip(names, cut, strict=True)}
    return fields


def _names_behind_head(lm: nn.Module, layer: nn.Module) -> set[str]:
    """Returns the names and strings in the code of the forwards through which a head's output is returned."""
    paths = [name.split(".") for name, x in lm.named_modules(remove_duplicate=False) if x is layer]
    above = {".".join(path[:k]) for path in paths for k in range(len(path))} | {""}
    return set().union(*(names_in_forward(type(lm.get_submodule(name))) for name in above))


@cache
def names_in_forward(kind: type) -> frozenset[str]:
    """Returns the names and strings in a class's forward, and in those of its bases as far as they call super()."""
    found: set[str] = set()
    for base in kind.__mro__:
        if "forward" in vars(base):
            code = getattr(inspect.unwrap(vars(base)["forward"]), "__code__", None)
            if code is None:
                break
            found |= {*code.co_names, *(x for x in code.co_consts if isinstance(x, str))}
            if "super" not in code.co_names:
                break
    return frozenset(found)


def _active(layer: nn.Module) -> nn.Module:
    """Returns the copy in use if a PEFT wrapper holds trained copies of the layer (modules_to_save), else the layer."""
    if not hasattr(layer, "modules_to_save") or not hasattr(layer, "original_module"):
        return layer
    wrapper: Any = layer
    names = [] if wrapper.disable_adapters else list(wrapper.active_adapters)
    return wrapper.modules_to_save[names[0]] if names else wrapper.original_module


def _read_layer(layer: nn.Module, owner: str) -> dict[str, Any]:
    """Returns weight, bias, adapter and project of a linear head, with or without LoRA."""
    if not hasattr(layer, "base_layer") and not hasattr(layer, "token_adapter"):
        return _linear(layer, owner) | {"adapter": None, "project": None}
    try:
        from peft.tuners.lora.layer import Linear as LoraLinear
        from peft.tuners.lora.variants import DoraLinearVariant
    except ImportError as error:
        raise ImportError("an adapter on the LM head needs peft: pip install 'xpo-fast[train]'") from error
    if not isinstance(layer, LoraLinear) or type(layer).forward is not LoraLinear.forward:
        raise _refused(owner, f"carries an adapter of a kind that is not low-rank as LoRA is ({type(layer).__name__})")
    fields = _linear(layer.get_base_layer(), owner) | {"adapter": None, "project": None}
    names = [x for x in layer.active_adapters if x in layer.lora_A]
    if layer.disable_adapters and layer.merged:
        raise _refused(owner, "carries a LoRA adapter that is merged and disabled: unmerge it first")
    if layer.disable_adapters or layer.merged or not names:
        return fields
    for x in names:
        variant = layer.lora_variant.get(x)
        if variant is not None and type(variant) is not DoraLinearVariant:
            raise _refused(owner, f"carries a variant of LoRA that is not supported ({type(variant).__name__})")
    adapters: dict[str, Any] = {x: layer.lora_B[x] for x in names}
    fields["adapter"] = torch.cat(unpartitioned(*(b.weight for b in adapters.values())), dim=1)
    fields["project"] = partial(_project, layer, names)
    for x, b in adapters.items():
        if b.bias is not None:
            bias, added = unpartitioned(fields["bias"], b.bias)
            added = added * layer.scaling[x]
            fields["bias"] = added if bias is None else bias + added
    if any(x in layer.lora_variant for x in names):
        _scale_rows(layer, names, fields, owner)
    return fields


def _project(layer: Any, names: list[str], hidden: Tensor) -> Tensor:
    """Computes what the matrices B of LoRA adapters meet: s·dropout(h) Aᵀ of each adapter, side by side, (…, Σr)."""
    parts = []
    for x in names:
        a = layer.lora_A[x]
        h = layer.lora_dropout[x](hidden.to(a.weight.dtype))
        # ZeRO-3 gathers for a module that is called; under FSDP2 a head in a group of its own is still in parts here.
        product = nn.functional.linear(h, *gathered(weight=a.weight)) if is_sharded(a.weight) else a(h)
        parts.append(product * layer.scaling[x])
    return torch.cat(parts, dim=-1)


def _scale_rows(layer: Any, names: list[str], fields: dict[str, Any], owner: str) -> None:
    """Applies DoRA (arXiv 2402.09353, eq. 5): the rows of W and B times m / ‖W + s B A‖, the norm taken as a constant.

    The scaled W is a copy, (V, D), through which the gradient reaches m.
    """
    if len(names) > 1:
        raise _refused(owner, f"carries {len(names)} active adapters, of which one is DoRA: activate one")
    (name,) = names
    if layer.lora_B[name].bias is not None:
        raise _refused(owner, "carries a DoRA adapter with lora_bias, whose norm has no agreed meaning")
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        raise _refused(
            owner, "carries a DoRA adapter with dropout, which would multiply by the weight twice: set lora_dropout=0"
        )
    scale = layer.scaling[name]
    weight, a, b, magnitude = unpartitioned(
        fields["weight"], *(x[name].weight for x in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    )
    with torch.no_grad():
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares, w_a = weight.new_empty(weight.shape[0], dtype=wide), weight.to(a.dtype) @ a.T
        for part, rows in zip(squares.split(4096), weight.split(4096), strict=True):
            part.copy_(rows.to(wide).square().sum(dim=1))
        squares += 2 * scale * (w_a * b).sum(dim=1)
        squares += scale**2 * ((b @ (a @ a.T)) * b).sum(dim=1)
        norm = squares.sqrt_()
    gain = (magnitude / norm.to(a.dtype)).unsqueeze(1)
    fields["weight"] = weight * gain.to(weight.dtype)
    fields["adapter"] = fields["adapter"] * gain


def _linear(layer: Any, owner: str) -> dict[str, Any]:
    """Returns weight and bias of a layer h Wᵀ + b with a float weight (V, D); ValueError for another layer."""
    # Reading a module's attribute makes ZeRO-3 gather it, and then for all of the model's forward and backward.
    parameters = dict(layer.named_parameters(recurse=False))
    weight, bias = (parameters[x] if x in parameters else getattr(layer, x, None) for x in ("weight", "bias"))
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        kind = f"({type(layer).__module__}.{type(layer).__name__})"
        if _quantised(layer, weight):
            raise _refused(owner, f"has a quantised weight {kind}", _KEEP)
        raise _refused(owner, f"is not a plain linear layer {kind}", "take its logits")
    if weight is None or len(_shape(weight)) != 2 or _quantised(layer, weight):
        what = "none" if weight is None else f"{type(weight).__name__} {weight.dtype} {tuple(weight.shape)}"
        raise _refused(owner, f"must have a (V, D) float weight, got {what}", _KEEP)
    return {"weight": weight, "bias": bias}


def _refuse_changes(layer: Any, owner: str) -> None:
    """Raises ValueError for hooks or a replaced forward that may change what a layer takes or returns."""
    hooks, forwards = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()], []
    if "forward" in vars(layer):
        accelerates = getattr(layer, "_hf_hook", None)  # accelerate's forward runs it around the previous forward
        hooks += getattr(accelerates, "hooks", [accelerates])
        previous = getattr(layer, "_old_forward", None)
        is_own = getattr(previous, "__func__", previous) is type(layer).forward
        forwards = [layer.forward, None if is_own else previous]
    changes = [("a forward hook", x) for x in hooks] + [("a forward of its own", x) for x in forwards]
    for what, x in ((what, x) for what, x in changes if x is not None):
        while isinstance(x, partial):
            x = x.func
        module = getattr(x, "__module__", None) or type(x).__module__
        if not any(f"{module}.".startswith(f"{name}.") for name in _LEAVE_LOGITS):
            name = getattr(x, "__qualname__", type(x).__qualname__)
            raise _refused(owner, f"has {what}, which may change its logits ({module}.{name})", "remove it")


def _shape(x: Any) -> tuple[int, ...]:
    """Returns the shape of a parameter, of the complete one if ZeRO-3 keeps it in parts."""
    return tuple(getattr(x, "ds_shape", x.shape))


def _quantised(layer: Any, weight: Any) -> bool:
    """Tells whether a layer's weight is packed, or a tensor of another library's class that unpacks itself."""
    if not isinstance(weight, Tensor):
        return hasattr(layer, "qweight")
    return not weight.is_floating_point() or type(weight).__module__.split(".")[0] not in ("torch", "deepspeed")


def _refused(owner: str, why: str, what_to_do: str | None = None) -> ValueError:
    advice = what_to_do or "take lm_head out of the adapter's target_modules, or merge the adapter first"
    return ValueError(f"the LM head of {owner} {why}; {advice}")


class _Reached(BaseException):
    """Ends a forward at its head; its argument is the hidden states that the head was called with."""


def _stop(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else next(iter(kwargs.values())))


def before_head(model: Any, run: Callable[[], Any]) -> Tensor:
    """Runs the model's forward up to its head and returns the hidden states (R, T, D) that it calls the head with.

    run: calls the model's forward, which ends at the head. What the forward does between its decoder and its head (a
    cast, a division, a transform) is applied.
    """
    lm = causal_lm(model)
    hook: Any = _stop
    handle = head_layer(lm).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        (hidden,) = reached.args
    else:
        raise ValueError(f"the forward of {type(lm).__name__} does not call its output embeddings")
    finally:
        handle.remove()
    if hidden.dim() != 3:
        shape = tuple(hidden.shape)
        raise ValueError(f"expected hidden states (R, T, D) at the head of {type(lm).__name__}, got {shape}")
    return hidden
