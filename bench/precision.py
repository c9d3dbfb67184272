"""Times bfloat16 and float32 on this CPU: a layer's products, the head, a real model's forward, backward and sampling.

    python bench/precision.py --json bench/results/precision-cpu.json

The settings are the CPU's own instructions, and fewer of them. Each runs in a process of its own, because torch and
oneDNN read the setting once. The two dtypes take turns on the same model; a ratio is the median over repeats of the
ratio within a repeat. `auto` is the dtype that `xpo_fast.precision` chooses for a bfloat16 checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import xpo_fast as xf
from measure import environment, ratio, table, time_interleaved
from xpo_fast import precision
from xpo_fast.files import write_json
from xpo_fast.models import hidden_states, load_model

SETTINGS = {
    "the CPU's own": {},
    "without bfloat16 instructions": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
DTYPES = (torch.float32, torch.bfloat16)
ROWS, LENGTH = 4, 32  # few tokens: without instructions for bfloat16, its backward is 70 times as slow
NEW_TOKENS = 16
SCORED = 256

Call = Callable[[torch.dtype], Any]


def parts() -> dict[str, Call]:
    """Returns the calls to be timed, by name, as functions of the dtype."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    models: dict[torch.dtype, Any] = {}
    for dtype in DTYPES:
        model, _ = load_model("smollm2-135m", dtype=dtype)
        models[dtype] = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    config = models[torch.float32].config
    width, vocab = config.hidden_size, config.vocab_size
    ids = torch.randint(vocab, (ROWS, LENGTH))
    x, w = torch.randn(1024, width), torch.randn(config.intermediate_size, width)
    dy = torch.randn(1024, config.intermediate_size)
    operands = {d: (x.to(d), w.to(d), dy.to(d)) for d in DTYPES}
    hidden, targets = torch.randn(SCORED, width), torch.randint(vocab, (SCORED,))
    heads = {d: models[d].get_output_embeddings().weight.detach() for d in DTYPES}

    def forward(dtype: torch.dtype) -> Any:
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return hidden_states(models[dtype].base_model.model, batch)

    def without_gradient(dtype: torch.dtype) -> None:
        with torch.no_grad():
            forward(dtype)

    def sample(dtype: torch.dtype) -> None:
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        models[dtype].generate(**batch, **length, do_sample=False, pad_token_id=0)

    def head(dtype: torch.dtype) -> None:
        leaf = hidden.to(dtype).requires_grad_()
        xf.token_logps(leaf, heads[dtype], targets).sum().backward()

    return {
        "x Wᵀ, 1024 × 576 × 1536": lambda d: operands[d][0] @ operands[d][1].T,
        "dy W, 1024 × 1536 × 576": lambda d: operands[d][2] @ operands[d][1],
        f"the head, forward and backward, {SCORED} tokens": head,
        f"SmolLM2-135M forward, {ROWS} × {LENGTH} tokens": without_gradient,
        f"SmolLM2-135M with LoRA, forward and backward, {ROWS} × {LENGTH} tokens": lambda d: (
            forward(d).float().sum().backward()
        ),
        f"SmolLM2-135M, {NEW_TOKENS} tokens sampled after {ROWS} × {LENGTH}": sample,
    }


def measured(repeats: int) -> dict[str, Any]:
    """Returns the times with the instructions that this process was started with."""
    device = torch.device("cpu")
    found: dict[str, Any] = {
        "instructions": precision.instructions(),
        "auto": precision.name_of(precision.fastest(device)),
        "why": str(precision.support(torch.bfloat16, device)),
        "times": {},
    }
    for name, call in parts().items():
        contenders = {precision.name_of(d): lambda _, d=d, call=call: call(d) for d in DTYPES}
        time_interleaved(contenders, [None], 1)
        samples_ms = time_interleaved(contenders, [None], repeats)
        found["times"][name] = {
            "float32_ms": min(samples_ms["float32"]),
            "bfloat16_ms": min(samples_ms["bfloat16"]),
            "ratio": ratio(samples_ms["bfloat16"], samples_ms["float32"]),
        }
        print(f"{name}: {found['times'][name]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.child.write_text(json.dumps(measured(args.repeats)))
        return
    found = {}
    for name, variables in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "times.json"
            command = [sys.executable, __file__, "--child", str(path), "--repeats", str(args.repeats)]
            subprocess.run(command, env=os.environ | variables, check=True)
            found[name] = json.loads(path.read_text()) | {"variables": variables}
    names = list(found[next(iter(found))]["times"])
    rows = [
        [part, *(f"{found[s]['times'][part]['float32_ms']:.1f}, {found[s]['times'][part]['ratio']:.2f}" for s in found)]
        for part in names
    ]
    rows.append(["`auto`, of a bfloat16 checkpoint", *(found[s]["auto"] for s in found)])
    print(precision.processor(torch.device("cpu")))
    print(table(["float32 in ms, bfloat16 over float32", *found], rows))
    if args.json:
        write_json(args.json, {"environment": environment(), "settings": found})


if __name__ == "__main__":
    main()
