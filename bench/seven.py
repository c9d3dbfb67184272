"""Predicts the runs of docs/7b.md, 7B and 8B models on one GPU, and runs of which others have published the peak.

    python bench/seven.py --json bench/results/fit-7b.json      # then python bench/figures.py

Nothing is measured: `xpo-fast fit` predicts, and the published figures are those of their sources.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

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

# Of docs/7b.md: the memory in GiB, the command's options behind model and data, and the fields of the question.
RECIPES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "LoRA, DPO, 24 GiB": (24, "--gradient-checkpointing --batch-size 2", CHECKPOINTED | {"batch_size": 2}),
    "QLoRA, DPO, 16 GiB": (
        16,
        "--quantize 4bit --gradient-checkpointing --batch-size 2",
        CHECKPOINTED | {"quantize": "4bit", "batch_size": 2},
    ),
    "QLoRA, DPO, 12 GiB": (
        12,
        "--quantize 4bit --gradient-checkpointing --batch-size 1 --tile-mib 512",
        CHECKPOINTED | {"quantize": "4bit", "batch_size": 1, "tile_mib": 512},
    ),
    "full, DPO, 80 GiB": (
        80,
        "--full --dtype bfloat16 --reference cached --optim adafactor --optimizer-in-backward --max-grad-norm 0 "
        "--gradient-checkpointing --batch-size 2",
        FULL | BACKWARD | CHECKPOINTED | {"optim": "adafactor", "reference": "cached", "batch_size": 2},
    ),
    "full, DPO, 48 GiB, Qwen2.5-3B": (
        48,
        "--full --dtype bfloat16 --reference cached --optim adafactor --optimizer-in-backward --max-grad-norm 0 "
        "--gradient-checkpointing --batch-size 1 --tile-mib 512",
        FULL
        | BACKWARD
        | CHECKPOINTED
        | {"optim": "adafactor", "reference": "cached", "batch_size": 1, "tile_mib": 512},
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
        FULL
        | BACKWARD
        | CHECKPOINTED
        | {"optim": "paged_adamw_8bit", "trained_dtype": "bfloat16"},
    ),
}


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
    for name, (memory, options, fields) in RECIPES.items():
        began = time.perf_counter()
        given: dict[str, Any] = {"config": llama, "lora": default_lora(), "memory": memory * GIB} | PAIRS | fields
        found = predict(Question(**given))
        recipes.append(entry(name, found, began) | {"memory": memory * GIB, "options": options})
        print(
            f"{name:<44} {found.peak / GIB:6.2f} of {memory} GiB: {'fits' if found.fits else 'does not fit'}",
            flush=True,
        )
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
