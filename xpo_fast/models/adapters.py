"""PEFT adapters: the model each goes on, nothing of it missing, and what it learned still there when it is merged.

An adapter may go on a model that other adapters were merged into. Its `base_model_name_or_path` then names the last of
those: FOLDER/adapter_config.json. The file, and not the folder, for peft would load the base of a folder and put one
adapter in the place of the other without a word; of a file it says that it is no model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..precision import HALVES, name_of
from .limits import embeddings
from .lm_head import causal_lm

ADAPTER, MODEL = "adapter_config.json", "config.json"  # the files by which folders of the two are known
KEPT = 0.98  # of an adapter's update: what 16 bits must keep of it
_NAME = "default"  # peft's for an adapter that is alone
_COUNT = "embeddings_when_loaded"


def adapter_of(name: str, options: dict[str, Any]) -> str | None:
    """Returns the folder or hub name of the adapter that `name` stands for; None if it stands for a whole model.

    name: a folder, which is an adapter's if it has one, a hub name, or either with /adapter_config.json or
    /config.json, which say that the adapter or the whole model there is meant.
    """
    folder, _, file = name.replace(os.sep, "/").rpartition("/")
    if file in (ADAPTER, MODEL):
        return folder if file == ADAPTER else None
    if Path(name).is_dir():
        return name if (Path(name) / ADAPTER).is_file() else None
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None  # a folder that does not exist, or a name without an owner, as of the hub's oldest models
    if not holds(name, ADAPTER, options):
        return None
    if options.get("revision"):
        raise ValueError(
            f"{name!r} is an adapter: its revision {options['revision']!r} cannot be told from one of its base model; "
            "download it (hf download) and name the folder"
        )
    return name


def holds(name: str, file: str, options: dict[str, Any]) -> bool:
    """Returns whether a folder, or a name on the hub if it answers or has been downloaded, has a file."""
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    from transformers.utils.hub import cached_file

    kinds = ("gated_repo", "missing_entries", "connection_errors")
    quietly = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    return cached_file(name, file, **_where(options), **quietly) is not None


def _where(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in ("cache_dir", "token")}


def base_of(adapter: str, options: dict[str, Any] | None = None) -> str:
    """Returns the name of the model that an adapter goes on, as `adapter_of` reads it.

    options: of `from_pretrained`. Raises ValueError if the adapter names none, or a folder that does not exist.
    """
    from peft import PeftConfig

    base = str(PeftConfig.from_pretrained(adapter, **_where(options or {})).base_model_name_or_path or "")
    if not base:
        raise ValueError(
            f"the adapter in {adapter!r} does not name the model that it goes on: write its folder or hub name into "
            f"{ADAPTER} there, as base_model_name_or_path"
        )
    if base.endswith(f"/{ADAPTER}"):
        under = base.removesuffix(f"/{ADAPTER}")
        if os.path.isabs(under) and not Path(base).is_file():
            raise ValueError(
                f"the adapter in {adapter!r} was trained on top of the adapter in {under!r}, and there is none: put it "
                f"back, or write the folder that it is in now into {Path(adapter) / ADAPTER}, with /{ADAPTER} at its "
                "end, as base_model_name_or_path"
            )
        return base
    # An adapter may lie in the folder of its own base model, or another one have been put there since.
    whole = (Path(base) / MODEL).is_file() and (Path(base) / ADAPTER).is_file()
    return f"{base}/{MODEL}" if whole else base


def chain(name: str, options: dict[str, Any]) -> tuple[list[str], str]:
    """Returns the adapters that make up a model, the last trained first, and the name of the whole model below them.

    Raises ValueError if they go round in a circle, and as `base_of` does.
    """
    adapters: list[str] = []
    while (adapter := adapter_of(name, options)) is not None:
        if any(_same(adapter, other) for other in adapters):
            raise ValueError(
                f"the adapters {' and '.join(map(repr, adapters))} are each on top of the other: one was saved over "
                f"what it was trained on; write the model that {adapters[-1]!r} goes on into {ADAPTER} there, as "
                "base_model_name_or_path"
            )
        adapters.append(adapter)
        name = base_of(adapter, options)
    return adapters, name


def _same(a: str, b: str) -> bool:
    return a == b or (Path(a).is_dir() and Path(b).is_dir() and Path(a).samefile(b))


def put_on(base: Any, adapter: str, options: dict[str, Any]) -> Any:
    """Returns the PEFT model of a base model and a saved adapter, whose embeddings may be more than the base's.

    Raises ValueError for weights that the adapter should have and has not, or that have no place in the model.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, load_peft_weights
    from peft.utils.save_and_load import set_peft_model_state_dict

    renamed = getattr(base, "_checkpoint_conversion_mapping", None) or None
    config = PeftConfig.from_pretrained(adapter, **_where(options))
    weights = load_peft_weights(adapter, device="cpu", key_mapping=renamed, **_where(options))
    if config.is_prompt_learning:
        raise ValueError(
            f"the adapter in {adapter!r} is of {type(config).__name__}, which adds positions of its own: not supported"
        )
    config.inference_mode = True
    _resize(base, weights)
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type or ""), PeftModel)
    with _about_ties():
        adapted = kind(base, config, _NAME)
    found = set_peft_model_state_dict(adapted, weights, adapter_name=_NAME)
    lacking = {name for name in found.missing_keys if _NAME in name.split(".")}  # of the adapter, not of its base
    state = adapted.state_dict(keep_vars=True)
    loaded = {id(x) for name, x in state.items() if name not in lacking}  # layers may share a weight of the adapter
    missing = {name for name in lacking if id(state[name]) not in loaded}
    for what, names in (("lacks", missing), ("has weights without a place in its base model:", found.unexpected_keys)):
        if names:
            raise ValueError(
                f"the adapter in {adapter!r} {what} {shortened(names)}: it is broken, or of another model or version "
                "of peft; copy it again, or save it again where it was trained"
            )
    return adapted.eval()


def _resize(base: Any, weights: dict[str, torch.Tensor]) -> None:
    """Gives the base model as many token embeddings as the adapter was saved with, if it was saved with them."""
    layer = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is layer)
    saved = (weights.get(f"base_model.model.{name}{part}.weight") for part in ("", ".base_layer"))
    count = next((len(x) for x in saved if x is not None), embeddings(base))
    if count != embeddings(base):
        base.resize_token_embeddings(count, mean_resizing=False)  # the adapter's own values follow


@contextlib.contextmanager
def _about_ties() -> Iterator[None]:
    """Silences what peft says about adapters on tied weights, which `merge` unties."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message=r"Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message=r"All adapters are already merged")
        yield


def merge(adapted: Any, adapters: list[str] | None = None, *, widen: bool = True) -> Any:
    """Merges the adapters of a PEFT model, by default the active ones, into its base model, which it returns.

    A layer that is tied to another, as the LM head may be to the embeddings, is untied from it first, or both would
    get the update of one. Sums are made in float32. If the base's 16 bits keep less than 98% of the update, most of
    it being smaller than half a step of a weight, then the model becomes float32 (widen), or the update is rounded;
    a warning says which, and how much 16 bits keep. Raises ValueError for a quantised base model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    lm = causal_lm(adapted)
    if getattr(lm, "is_quantized", False):
        raise ValueError(
            "an adapter cannot be merged into quantised weights, which would round it away: load its base model "
            "without quantisation, merge the adapter, save that, and quantise it"
        )
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    _untie(adapted, layers)
    rounded: list[tuple[nn.Parameter, torch.Tensor]] = []
    learned = kept = 0.0
    for layer in layers:
        weight = _weight(layer)
        if weight is None or weight.dtype not in HALVES:
            continue
        before = weight.data
        weight.data = before.float()
        layer.merge(adapter_names=adapters)
        rounded.append((weight, weight.data.to(before.dtype)))
        update, left = ((x.float() - before).flatten() for x in (weight.data, rounded[-1][1]))
        learned += float(update @ update)
        kept += float(update @ left)
    with _about_ties():
        merged = adapted.merge_and_unload(adapter_names=adapters)
    loses = learned > 0 and kept / learned < KEPT
    if loses:
        _warn_of_rounding(kept / learned, name_of(rounded[0][1].dtype), widened=widen)
    if loses and widen:
        merged.float()
    else:
        for weight, value in rounded:
            weight.data = value
    settle_ties(merged)
    return merged.requires_grad_(True)  # peft has frozen the base model, which may be trained again


def _warn_of_rounding(kept: float, dtype: str, *, widened: bool) -> None:
    outcome = (
        f"so the model is in float32, twice as large; to have it in {dtype} all the same, load it with that dtype"
        if widened
        else "and the rest is gone from this model; load it in float32 to keep all of it"
    )
    warnings.warn(
        f"the update of the adapter is smaller than the steps of {dtype}: weights in {dtype} keep {max(kept, 0):.1%} "
        f"of it, {outcome}",
        stacklevel=3,
    )


def _weight(layer: Any) -> nn.Parameter | None:
    """Returns the weight that the adapter of a layer is merged into, if it is one."""
    weight = layer.get_param() if hasattr(layer, "get_param") else getattr(layer.get_base_layer(), "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _untie(adapted: Any, layers: list[Any]) -> None:
    """Gives layers with an adapter weights of their own where they share them with another layer."""
    owners: dict[int, int] = {}
    for module in adapted.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    for layer in layers:
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and owners.get(id(weight), 0) > 1:
            owners[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def settle_ties(model: Any) -> None:
    """Makes the config of a model whose LM head is not its embeddings say so: it would be tied at loading elsewhere."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        return
    if (head := model.get_output_embeddings()) is None:
        return
    layers = [model.get_input_embeddings(), head]
    a, b = (getattr(layer, "weight", None) for layer in layers)
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    if a is None or b is None or a is b or not any(getattr(c, "tie_word_embeddings", False) for c in configs):
        return
    if a.shape == b.shape and a.data_ptr() == b.data_ptr():
        return
    for config in configs:
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def note_name(model: Any, name: str, adapter: str | None = None) -> None:
    """Makes peft name the model rightly in adapters trained on it: with its place, and the adapter merged last.

    name: the folder or hub name of a whole model. adapter: that of the adapter merged into it last, if any.
    """
    at = adapter or name
    at = os.path.abspath(at) if Path(at).is_dir() else at
    model.name_or_path = f"{at}/{ADAPTER}" if adapter else at
    setattr(model, _COUNT, embeddings(model))


def folders_below(model: Any) -> list[tuple[Path, bool]]:
    """Returns the folders of what the adapter of a PEFT model was trained on, and whether each is an adapter's."""
    found: list[tuple[Path, bool]] = []
    for config in getattr(model, "peft_config", {}).values():
        name = str(config.base_model_name_or_path or "")
        with contextlib.suppress(ValueError, OSError):  # about folders that are gone
            adapters, whole = chain(name, {}) if name.endswith(f"/{ADAPTER}") else ([], name)
            found += [(Path(x), True) for x in adapters]
            found.append((Path(whole.removesuffix(f"/{MODEL}")), False))
    return [(path, adapter) for path, adapter in found if path.is_dir()]


@contextlib.contextmanager
def saving_embeddings(model: Any) -> Iterator[None]:
    """Makes `save_pretrained` of a PEFT model save its token embeddings if their number is not that at loading.

    peft would look for the config of the base model, and assume that nothing was resized where it finds none: offline,
    or on top of another adapter.
    """
    lm = causal_lm(model)
    count = getattr(lm, _COUNT, None)
    if not hasattr(model, "peft_config") or count is None:
        yield
        return
    weight = lm.get_input_embeddings().weight
    in_parts = len(getattr(weight, "ds_shape", weight.shape)) != 2  # FSDP's part of it, of any size
    resized = not in_parts and count != embeddings(lm)
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=resized)
    try:
        yield
    finally:
        del model.save_pretrained


def shortened(names: Any) -> str:
    """Returns names in order, those of layers that differ in their number as one, and no more than eight."""
    from transformers.utils.loading_report import update_key_name

    listed = sorted(update_key_name(dict.fromkeys(sorted(names), "")))
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
