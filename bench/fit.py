"""Compares what `xpo-fast fit` predicts with what runs take: nine of SmolLM2-135M's shape on the CPU, or on a GPU.

    python bench/fit.py --json bench/results/fit-cpu.json
    python bench/fit.py --device cuda --json bench/results/fit-cuda.json   # also Qwen2.5-7B's shape, LoRA and full

Each run takes three steps on its largest batch, with random weights, in a process of its own; its peak is the resident
memory of that process, or what torch has reserved on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from xpo_fast.cli.doctor import versions
from xpo_fast.files import write_json
from xpo_fast.fit.predict import CUDA_RUNTIME, default_lora, predict
from xpo_fast.fit.question import Question
from xpo_fast.fit.shapes import shape
from xpo_fast.fit.table import columns
from xpo_fast.fit.verify import measure

PAIRS = ((80, (160, 90)), (120, (60, 110)), (70, (100, 100)), (40, (130, 45)))
SINGLE = tuple((prompt, (max(completions),)) for prompt, completions in PAIRS)
FULL: dict[str, Any] = {"full": True, "lora": None}
CASES: dict[str, dict[str, Any]] = {
    "LoRA, DPO": {},
    "LoRA, DPO, checkpointing": {"gradient_checkpointing": True},
    "full, DPO, cached reference": FULL | {"reference": "cached"},
    "full, DPO, copied reference": FULL | {"reference": "copy"},
    "full, SimPO": FULL | {"method": "simpo"},
    "full, SimPO, steps in the backward": FULL
    | {"method": "simpo", "optimizer_in_backward": True, "max_grad_norm": 0.0},
    "LoRA, KTO": {"method": "kto", "units": SINGLE},
    "LoRA, GRPO": {"command": "rl", "method": "grpo", "units": ((64, (96,)),)},
    "LoRA, reward model": {"command": "reward", "method": "bradley_terry"},
}
SEVEN = {"units": ((1024, (1024, 1024)),), "batch_size": 1, "eval_batch_size": 1, "gradient_checkpointing": True}
ON_GPU: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B, LoRA, DPO, checkpointing": SEVEN,
    "Qwen2.5-7B, full, SimPO, checkpointing, adafactor": SEVEN | FULL | {"method": "simpo", "optim": "adafactor"},
}


def question(name: str, device: str) -> Question:
    """Returns the question of a case."""
    large = name in ON_GPU
    of: dict[str, Any] = {
        "config": shape("qwen2.5-7b" if large else "smollm2-135m"),
        "lora": default_lora(),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "units": PAIRS,
        "device": device,
        "batch_size": 8,
        "layout": "padded",
    }
    return Question(**of | (ON_GPU if large else CASES)[name])


def main() -> int:
    """Measures every case, and returns 1 if a prediction is off by more than 10%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", help="names of cases, or beginnings of them (default: all)")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --json FILE has measured, and measure the rest"
    )
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of each run")
    args = parser.parse_args()
    names = [*CASES, *(ON_GPU if args.device == "cuda" else ())]
    if args.cases:
        names = [name for name in names if name.startswith(tuple(args.cases))]
    results: list[dict[str, Any]] = []
    if args.resume and args.json.is_file():
        before = json.loads(args.json.read_text(encoding="utf-8"))["runs"]
        results = [run for run in before if "failed" not in run and run["case"] in CASES | ON_GPU]
        names = [name for name in names if name not in {run["case"] for run in results}]
    print(f"{'':<52}{'predicted':>11}{'measured':>11}{'off':>8}")
    for name in names:
        asked, began = question(name, args.device), time.perf_counter()
        found = predict(asked)
        predicted = found.peak - (CUDA_RUNTIME if args.device == "cuda" else 0)
        entry: dict[str, Any] = {"case": name, "predicted": predicted, "phase": found.largest.name}
        entry |= {"owners": columns(found.largest), "predict_s": time.perf_counter() - began}
        try:
            measured = measure(asked, timeout_s=args.timeout_s)
        except (RuntimeError, TimeoutError) as error:
            results.append(entry | {"failed": str(error)})
            print(f"{name:<52}{error}", flush=True)
        else:
            peak = measured.get("reserved", measured["peak"])
            results.append(entry | {"measured": peak, "off": predicted / peak - 1, **measured})
            print(f"{name:<52}{predicted / 2**20:>11.0f}{peak / 2**20:>11.0f}{predicted / peak - 1:>+8.1%}", flush=True)
        results.sort(key=lambda run: [*CASES, *ON_GPU].index(run["case"]))
        write_json(args.json, {"versions": versions(), "device": args.device, "runs": results})
    return int(any("failed" in x or abs(x["off"]) > 0.1 for x in results))


if __name__ == "__main__":
    sys.exit(main())
