"""Times bfloat16 and float32 on this CPU: a layer's products, the head, a real model's forward, backward and sampling.

The settings are the CPU's own instructions, and fewer of them. Each runs in a process of its own, because torch and
oneDNN read the setting once. The two dtypes take turns on the same model; a ratio is the median over repeats of the
ratio within a repeat. `auto` is the dtype that `xpo_fast.precision` chooses for a bfloat16 checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import precision
from ..head import token_logps
from ..models import hidden_states, load_model
from .measure import time_interleaved
from .work import Record, Settings, Work, chosen, timed

SETTINGS = {
    "the CPU's own": {},
    "without bfloat16 instructions": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
DTYPES = (torch.float32, torch.bfloat16)
ROWS, LENGTH = 4, 32  # few tokens: without instructions for bfloat16, its backward is 70 times as slow
NEW_TOKENS = 16
SCORED = 256
SETTING_S = 120.0  # of one setting, for estimates

Call = Callable[[torch.dtype], Any]


def works(settings: Settings) -> Iterator[Work]:
    """Yields the settings of the suite `precision`."""
    for name in chosen(SETTINGS, settings):
        yield Work("precision", name, SETTING_S, functools.partial(_in_fresh_process, name, settings))


def _in_fresh_process(setting: str, settings: Settings) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        repeats = 1 if settings.quick else settings.repeats
        threads = str(torch.get_num_threads())
        command = [sys.executable, "-m", "xpo_fast.bench.precision", str(path), "--repeats", str(repeats)]
        command += ["--threads", threads, "--model", settings.model]
        done = subprocess.run(command, env=os.environ | SETTINGS[setting], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"precision, {setting}, ended with {done.returncode}:\n{done.stderr}")
        return json.loads(path.read_text(encoding="utf-8"))


def parts(name: str) -> dict[str, Call]:
    """Returns the calls to be timed, by name, as functions of the dtype. name: of the model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    models: dict[torch.dtype, Any] = {}
    for dtype in DTYPES:
        model, _ = load_model(name, dtype=dtype)
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
        token_logps(leaf, heads[dtype], targets).sum().backward()

    inner = config.intermediate_size
    return {
        f"x Wᵀ, 1024 × {width} × {inner}": lambda d: operands[d][0] @ operands[d][1].T,
        f"dy W, 1024 × {inner} × {width}": lambda d: operands[d][2] @ operands[d][1],
        f"the head, forward and backward, {SCORED} tokens": head,
        f"the model's forward, {ROWS} × {LENGTH} tokens": without_gradient,
        f"the model with LoRA, forward and backward, {ROWS} × {LENGTH} tokens": lambda d: (
            forward(d).float().sum().backward()
        ),
        f"{NEW_TOKENS} tokens sampled after {ROWS} × {LENGTH}": sample,
    }


def measured(model: str, repeats: int) -> list[Record]:
    """Returns the times with the instructions that this process was started with; float32's time is the floor."""
    auto = {
        "instructions": precision.instructions(),
        "auto": precision.name_of(precision.fastest(torch.device("cpu"))),
        "why": str(precision.support(torch.bfloat16, torch.device("cpu"))),
    }
    records = []
    for name, call in parts(model).items():
        contenders = {precision.name_of(d): lambda _, d=d, call=call: call(d) for d in DTYPES}
        time_interleaved(contenders, [None], 1)
        for dtype, times in timed(time_interleaved(contenders, [None], repeats), "float32").items():
            records.append({"contender": f"{name}: {dtype}", "ours": False, "params": auto, **times})
    return records


def main() -> None:
    """Measures with the instructions that this process was started with, and writes the records to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.path.write_text(json.dumps(measured(args.model, args.repeats)), encoding="utf-8")


if __name__ == "__main__":
    main()
