"""Predicts the runs of docs/7b.md, 7B and 8B models on one GPU, and runs of which others have published the peak.

    python bench/seven.py --json bench/results/fit-7b.json      # then python bench/figures.py

Nothing is measured: `xpo-fast fit` predicts, and the published figures are those of their sources.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from xpo_fast.cli.doctor import versions
from xpo_fast.files import write_json
from xpo_fast.fit.predict import CUDA_RUNTIME, SLACK, Prediction, default_lora, predict
from xpo_fast.fit.question import Question
from xpo_fast.fit.shapes import shape
from xpo_fast.fit.table import activations, columns

GIB = 2**30
TORCHTUNE = "https://github.com/pytorch/torchtune, README.md, commit a9ea6d5, Memory and training speed"
# Two rows of 2,048 tokens of which all are scored.
PACKED: dict[str, Any] = {"method": "sft", "units": ((1, (2047,)),), "batch_size": 2, "eval_batch_size": 1}
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}
FULL: dict[str, Any] = {"full": True, "lora": None}
PAIRS: dict[str, Any] = {"units": ((512, (512, 512)),), "layout": "auto", "eval_batch_size": 1}
BACKWARD: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0.0}

# Dense bfloat16 products with float32 sums, TFLOP/s, by the vendor's data sheets; a run reaches about SHARE of it.
CARDS = {"RTX 4090": 165, "RTX 4080": 97, "RTX 3060": 25, "RTX A6000": 155, "A100 80GB": 312}
SHARE = 0.4


class Recipe(NamedTuple):
    """A run of docs/7b.md: its memory in GiB, a card, a shape, options behind model and data, the question's fields."""

    memory: int
    card: str
    shape: str
    options: str
    fields: dict[str, Any]


_LORA = "--gradient-checkpointing --batch-size"
_FULL = (
    "--full --dtype bfloat16 --reference cached --optim adafactor --optimizer-in-backward --max-grad-norm 0 "
    "--gradient-checkpointing --batch-size"
)
_FULL_FIELDS = FULL | BACKWARD | CHECKPOINTED | {"optim": "adafactor", "reference": "cached"}
RECIPES = {
    "LoRA, 24 GiB": Recipe(24, "RTX 4090", "llama-3.1-8b", f"{_LORA} 2", CHECKPOINTED | {"batch_size": 2}),
    "QLoRA, 16 GiB": Recipe(
        16,
        "RTX 4080",
        "llama-3.1-8b",
        f"--quantize 4bit {_LORA} 2",
        CHECKPOINTED | {"quantize": "4bit", "batch_size": 2},
    ),
    "QLoRA, 12 GiB": Recipe(
        12,
        "RTX 3060",
        "llama-3.1-8b",
        f"--quantize 4bit {_LORA} 1 --tile-mib 512",
        CHECKPOINTED | {"quantize": "4bit", "batch_size": 1, "tile_mib": 512},
    ),
    "full, 80 GiB": Recipe(80, "A100 80GB", "llama-3.1-8b", f"{_FULL} 2", _FULL_FIELDS | {"batch_size": 2}),
    "full, 48 GiB": Recipe(
        48, "RTX A6000", "llama-3.1-8b", f"{_FULL} 1 --tile-mib 512", _FULL_FIELDS | {"batch_size": 1, "tile_mib": 512}
    ),
}


def _torchtune_lora() -> Any:
    lora = default_lora()
    lora.r, lora.lora_alpha = 8, 16
    lora.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return lora


# The published peak in GiB, and the fields of the question.
PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "LoRA": (16.2, CHECKPOINTED),
    "QLoRA": (7.4, CHECKPOINTED | {"quantize": "4bit"}),
    "full, paged 8-bit AdamW in the backward": (
        18.9,
        FULL | BACKWARD | CHECKPOINTED | {"optim": "paged_adamw_8bit", "trained_dtype": "bfloat16"},
    ),
}


def _minutes(recipe: Recipe) -> float:
    """Returns minutes per 1,000 pairs: 8 FLOP per weight and token, with the reference and what is computed again."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape(recipe.shape)).parameters())
    prompt, completions = PAIRS["units"][0]
    flop = 8 * weights * (prompt + sum(completions)) * 1000
    return flop / (SHARE * CARDS[recipe.card] * 1e12) / 60


def entry(name: str, found: Prediction, began: float) -> dict[str, Any]:
    """Returns a prediction as JSON values."""
    largest = found.largest
    alive = largest.peak - largest.owners.get(SLACK, 0) - CUDA_RUNTIME
    return {
        "name": name,
        "peak": found.peak,
        "alive": alive,
        "fits": found.fits,
        "phase": largest.name,
        "columns": columns(largest),
        "activations": activations(largest),
        "predict_s": time.perf_counter() - began,
    }


def main() -> int:
    """Predicts all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    llama, recipes, published = shape("llama-3.1-8b"), [], []
    for name, recipe in RECIPES.items():
        began = time.perf_counter()
        config = shape(recipe.shape)
        given: dict[str, Any] = {"config": config, "lora": default_lora(), "memory": recipe.memory * GIB}
        found = predict(Question(**given | PAIRS | recipe.fields))
        about = {**recipe._asdict(), "memory": recipe.memory * GIB, "minutes": _minutes(recipe)}
        recipes.append(entry(name, found, began) | {k: v for k, v in about.items() if k != "fields"})
        fits = "fits" if found.fits else "does not fit"
        print(f"{name:<44} {found.peak / GIB:6.2f} of {recipe.memory} GiB: {fits}", flush=True)
    for name, (peak, fields) in PUBLISHED.items():
        began = time.perf_counter()
        given = {"config": llama, "lora": _torchtune_lora(), "memory": 24 * GIB} | PACKED | fields
        line = entry(name, predict(Question(**given)), began)
        published.append(line | {"published": peak, "source": TORCHTUNE})
        print(
            f"{name:<44} {line['alive'] / GIB:6.2f} alive, published {peak}: {line['alive'] / GIB / peak - 1:+.1%}",
            flush=True,
        )
    write_json(args.json, {"versions": versions(), "recipes": recipes, "published": published})
    return 0


if __name__ == "__main__":
    sys.exit(main())
