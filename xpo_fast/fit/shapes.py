"""Configurations of models by name, folder, known shape, or number of weights."""

from __future__ import annotations

import re
from typing import Any

from ..wording import did_you_mean

# Of the models' own config.json: type, layers, width, MLP's width, heads, key heads, vocabulary, tied head, and more.
_SHAPES: dict[str, tuple[str, int, int, int, int, int, int, bool, dict[str, Any]]] = {
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 49152, True, {}),
    "smollm2-360m": ("llama", 32, 960, 2560, 15, 5, 49152, True, {}),
    "smollm2-1.7b": ("llama", 24, 2048, 8192, 32, 32, 49152, True, {}),
    "llama-2-7b": ("llama", 32, 4096, 11008, 32, 32, 32000, False, {}),
    "llama-2-13b": ("llama", 40, 5120, 13824, 40, 40, 32000, False, {}),
    "llama-3.2-1b": ("llama", 16, 2048, 8192, 32, 8, 128256, True, {"head_dim": 64}),
    "llama-3.2-3b": ("llama", 28, 3072, 8192, 24, 8, 128256, True, {"head_dim": 128}),
    "llama-3.1-8b": ("llama", 32, 4096, 14336, 32, 8, 128256, False, {}),
    "llama-3.1-70b": ("llama", 80, 8192, 28672, 64, 8, 128256, False, {}),
    "mistral-7b": ("mistral", 32, 4096, 14336, 32, 8, 32768, False, {"sliding_window": None}),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 4864, 14, 2, 151936, True, {}),
    "qwen2.5-1.5b": ("qwen2", 28, 1536, 8960, 12, 2, 151936, True, {}),
    "qwen2.5-3b": ("qwen2", 36, 2048, 11008, 16, 2, 151936, True, {}),
    "qwen2.5-7b": ("qwen2", 28, 3584, 18944, 28, 4, 152064, False, {}),
    "qwen2.5-14b": ("qwen2", 48, 5120, 13824, 40, 8, 152064, False, {}),
    "qwen2.5-32b": ("qwen2", 64, 5120, 27648, 40, 8, 152064, False, {}),
    "qwen3-0.6b": ("qwen3", 28, 1024, 3072, 16, 8, 151936, True, {"head_dim": 128}),
    "qwen3-1.7b": ("qwen3", 28, 2048, 6144, 16, 8, 151936, True, {"head_dim": 128}),
    "qwen3-4b": ("qwen3", 36, 2560, 9728, 32, 8, 151936, True, {"head_dim": 128}),
    "qwen3-8b": ("qwen3", 36, 4096, 12288, 32, 8, 151936, False, {"head_dim": 128}),
    "qwen3-14b": ("qwen3", 40, 5120, 17408, 40, 8, 151936, False, {"head_dim": 128}),
    "gemma-2-2b": ("gemma2", 26, 2304, 9216, 8, 4, 256000, True, {"head_dim": 256}),
    "gemma-2-9b": ("gemma2", 42, 3584, 14336, 16, 8, 256000, True, {"head_dim": 256}),
}
SHAPES = tuple(_SHAPES)
_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
_POSITIONS = 1 << 17
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}


def shape(name: str) -> Any:
    """Returns the configuration of a known shape. Raises ValueError for another name."""
    from transformers import AutoConfig

    if name.lower() not in _SHAPES:
        raise ValueError(f"no shape {name!r}{did_you_mean(name.lower(), SHAPES)} There are {', '.join(SHAPES)}")
    kind, layers, *sizes, tied, more = _SHAPES[name.lower()]
    fields: dict[str, Any] = dict(zip(_FIELDS, sizes, strict=True)) | {"tie_word_embeddings": tied}
    return AutoConfig.for_model(kind, num_hidden_layers=layers, max_position_embeddings=_POSITIONS, **fields, **more)


def of_size(weights: float) -> Any:
    """Returns the configuration of a Llama 3 with about as many weights: heads of 128, eight heads of keys.

    Width, depth and the MLP keep the proportions of Llama 3.1 8B. Raises ValueError below a million weights.
    """
    from transformers import AutoConfig

    if weights < 1e6:
        raise ValueError(f"expected at least a million weights, got {weights:g}")
    vocab = 128256 if weights > 5e8 else 49152

    def count(layers: int, width: int) -> float:
        kv = width * max(128 * min(8, width // 128), 128) * 2
        return layers * (2 * width * width + kv + 3 * width * (7 * width // 2)) + vocab * width * (1 + (weights > 5e9))

    grid = [(layers, width) for width in range(128, 16384 + 1, 128) for layers in range(2, 129)]
    like = [(n, w) for n, w in grid if 96 <= w / n <= 160] or grid
    layers, width = min(like, key=lambda x: (abs(count(*x) - weights), x))
    return AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_attention_heads=width // 128,
        num_key_value_heads=_key_heads(width // 128),
        vocab_size=vocab,
        tie_word_embeddings=weights <= 5e9,
        max_position_embeddings=_POSITIONS,
    )


def _key_heads(heads: int) -> int:
    """Returns the largest number up to 8 that divides the heads."""
    return max(n for n in range(1, 9) if heads % n == 0)


def number(text: str) -> float:
    """Returns the number of "7B", "135M" or "1.5e9". Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmb]?)\s*", text.lower())
    try:
        return float(found[1]) * _UNITS[found[2]] if found else float("nan_")
    except ValueError:
        raise ValueError(f"expected a number of weights such as 7B or 135M, got {text!r}") from None
