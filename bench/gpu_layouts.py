"""Checks and times layouts of rows on a GPU, where attention is FlexAttention: the stage `layouts` of gpu_stages.py.

    python bench/gpu_layouts.py --json layouts.json
    python bench/gpu_layouts.py --quick                 # tiny, on the CPU if there is no GPU

A random Llama reads pairs of rows, packed and with their prompts once; log-probs and gradients are compared with those
of the rows one by one, in the model's own dtype, as a run does before its first step. Then a step (forward, SimPO,
backward) is timed padded, packed and shared, all in turn. FlashAttention is tried where it is installed.

Exit status 1: a layout is wrong or fails.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.utils.import_utils import is_flash_attn_2_available

import xpo_fast as xf
from gpu import about
from gpu_device import lost, peak_mib, synchronize
from report import DEVICE_LOST, Report
from xpo_fast.bench.measure import table, time_interleaved
from xpo_fast.layouts import LAYOUTS, Inputs, attention_of, lay_out, prove
from xpo_fast.models import Head, install_fused_loss


class Size(NamedTuple):
    """A model, and the pairs it reads: how many, and the most tokens of a prompt and of a completion."""

    name: str
    width: int
    layers: int
    vocab: int
    pairs: int
    prompt: int
    completion: int


# Of as many heads, so that FlexAttention's kernels are compiled once for both.
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
SIZES = (Size("tiny", 128, 2, 997, 3, 150, 60), Size("0.2B", 1024, 12, 32000, 8, 768, 256))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEATS = 5


def model_of(size: Size, dtype: torch.dtype, implementation: str, device: torch.device) -> Any:
    """Returns a random model, the same for all implementations."""
    config = transformers.LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        max_position_embeddings=size.prompt + size.completion,
        use_cache=False,
        **HEADS,  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype, attn_implementation=implementation).to(device).train()
    install_fused_loss(model)
    return model


def rows_of(size: Size, layout: str, seed: int, device: torch.device) -> Inputs:
    """Returns pairs of random rows, the chosen ones first, in a layout; prompts are not scored."""
    generator = torch.Generator().manual_seed(seed)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    prompts = [below(size.vocab, size.prompt // 3 + int(below(size.prompt * 2 // 3, 1))) for _ in range(size.pairs)]
    ids, mask = torch.zeros(2, 2 * size.pairs, size.prompt + size.completion, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for r in range(2 * size.pairs):
        prompt = prompts[r % size.pairs]
        row = torch.cat([prompt, below(size.vocab, int(below(size.completion, 1)))])
        ids[r, : len(row)], mask[r, : len(row)] = row, 1
        targets[r, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
    laid = None if layout == "padded" else lay_out(ids, mask, targets != -100, share=layout == "shared").to(device)
    return Inputs(ids.to(device), mask.to(device), targets, laid)


def step(model: Any, objective: xf.Objective, rows: Inputs) -> dict[str, Tensor]:
    """Makes a step's gradients, and drops them; returns its loss when the device is done."""

    def score(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        return {"loss": objective(hidden, head, rows.targets).loss}

    loss = rows.run(model, score)["loss"]
    loss.backward()
    synchronize(loss.device)
    model.zero_grad()
    return {"loss": loss.detach()}


def run(size: Size, dtype: str, implementation: str, args: argparse.Namespace, device: torch.device) -> Iterator[Any]:
    """Yields a record per layout: whether it is right, then the same with the time of a step."""
    model = model_of(size, DTYPES[dtype], implementation, device)
    found: dict[str, dict[str, Any]] = {}
    for layout in LAYOUTS:
        rows = rows_of(size, layout, args.seed, device)
        positions = rows.input_ids.numel() if rows.layout is None else len(rows.layout)
        record = {"model": size.name, "dtype": dtype, "layout": layout, "positions": positions, "right": True}
        record["attention"] = implementation
        if rows.layout is not None:
            proof = prove(model, rows._replace(targets=rows.targets.to(device)), share=layout == "shared")
            record |= {"logps": proof.logps, "gradient": proof.gradient, "right": proof.holds}
            record["attention"] = attention_of(model, device).said
        found[layout] = record
        yield record
    objective = xf.Objective("simpo")
    batches = [{x: rows_of(size, x, args.seed + k, device) for x in LAYOUTS} for k in range(2)]
    calls = {x: lambda batch, x=x: step(model, objective, batch[x]) for x in LAYOUTS}
    for layout, call in calls.items():
        for batch in batches:  # the second one has other lengths, for which FlexAttention compiles once more
            call(batch)
        found[layout]["peak_mib"] = peak_mib(partial(call, batches[0]), device)
    for layout, samples_ms in time_interleaved(calls, batches, 2 if args.quick else REPEATS).items():
        found[layout] |= {"samples_ms": samples_ms, "median_ms": statistics.median(samples_ms)}
        yield found[layout]


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE during the run")
    parser.add_argument("--quick", action="store_true", help="try this script: the tiny model in float32")
    parser.add_argument("--commit", help="commit to record if there is no git")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="seed of the data (default: fresh)")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.quick:
        print("no GPU: --quick tries this script on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(args.json, environment=about(device, args), layouts=[])
    records, problems = report.content["layouts"], report.content["problems"]
    cases = [(size, dtype, "sdpa") for size in SIZES for dtype in DTYPES]
    cases = cases[:1] if args.quick else cases
    if not args.quick and is_flash_attn_2_available():
        cases += [(size, "bfloat16", "flash_attention_2") for size in SIZES]
    for case in cases:
        size, dtype, implementation = case
        where = f"{size.name}, {dtype}, {implementation}"
        report.begin(where)
        try:
            for record in run(*case, args, device):
                if not any(record is x for x in records):
                    records.append(record)
                    if not record["right"]:
                        problems.append(f"wrong: {where}, {record['layout']}")
                report.save()
        except Exception as error:  # the other cases can still run
            problems.append(f"{where}: {type(error).__name__}: {error}"[:500])
            if lost(device):
                report.save()
                return DEVICE_LOST
    report.end()
    columns = ("model", "dtype", "attention", "layout", "positions", "logps", "gradient", "median_ms", "peak_mib")
    cells = [[f"{x:.3g}" if isinstance(x := r.get(c, ""), float) else str(x) for c in columns] for r in records]
    print(table(columns, cells))
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
