"""Measures the memory of each rank of a run in parts, on processes of one machine, beside what is predicted.

    python bench/scale_memory.py --json bench/results/scale-cpu.json

DPO in full with a copy as the reference, of a random Llama of 36 million weights whose vocabulary is most of it, in
float32 on gloo. Each rank notes its resident memory after a step and the peak during the last step, beyond what it had
when all was imported. Beside them: the arithmetic of bench/scale.py, 16 bytes a weight for what is trained and 4 for
the reference, divided by the ranks where they are in parts, and the peak that `xpo-fast fit` predicts. Linux alone.
Exit status 1: a peak is off by more than a fifth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scale import FLOAT32, STATE
from xpo_fast.cli.doctor import versions
from xpo_fast.files import write_json
from xpo_fast.fit.predict import RUNTIME, predict
from xpo_fast.fit.question import Question

RUNS = [("ddp", 1), *((layout, ranks) for layout in ("ddp", "fsdp", "zero3") for ranks in (2, 4))]
STEPS, PAIRS, PROMPT, ANSWER = 4, 2, 16, 48
SIZES = {
    "vocab_size": 32768, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
ALLOWED = 0.2
# Freed memory goes back to the system at once: what is resident is what is held.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
}  # fmt: skip


def config() -> Any:
    """Returns the configuration of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES)


def status_mib(field: str) -> float:
    """Returns a line of this process's status: VmRSS, or VmHWM, the peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def engine(layout: str, ranks: int) -> dict[str, Any]:
    """Returns the settings by which Trainer keeps a model in parts."""
    if layout == "fsdp":
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if layout == "zero3":
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        zero = {"stage": 3, **dict.fromkeys(sizes, "auto")}
        return {"deepspeed": {**dict.fromkeys(names, "auto"), "zero_optimization": zero}}
    return {}


@contextlib.contextmanager
def on_cpu(layout: str) -> Iterator[None]:
    """Lets accelerate and DeepSpeed shard on the CPU: accelerate looks for FSDP where processes have accelerators."""
    if layout == "zero3":
        import deepspeed  # pyright: ignore[reportMissingImports]

        with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
            yield
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make_state = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        shared = PartialState._shared_state
        if kwargs.get("fsdp_plugin") is not None and shared.get("device") is not None:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        make_state(self, *args, **kwargs)

    with patch.object(AcceleratorState, "__init__", init):
        yield


def of_this_rank(layout: str, ranks: int, folder: Path) -> None:
    """Trains some steps, and writes what this rank held, in MiB, into a file of its own."""
    import torch
    from transformers import LlamaForCausalLM, TrainerCallback

    from xpo_fast.fit.verify import words
    from xpo_fast.trainer import XPOConfig, XPOTrainer

    if layout == "zero3":
        import deepspeed  # noqa: F401  # pyright: ignore[reportMissingImports]
    torch.manual_seed(0)
    rows = [
        {"prompt": " ".join(["t8"] * PROMPT), "chosen": " t9" * (ANSWER - 1), "rejected": " t10" * (ANSWER - 1)}
    ] * (STEPS * PAIRS * ranks)
    tokenizer = words(SIZES["vocab_size"])
    before = status_mib("VmRSS")
    found: dict[str, float] = {}

    class Notes(TrainerCallback):
        """Resets the peak before the last step, and reads it after."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS - 1:
                found["held_mib"] = status_mib("VmRSS") - before
                Path("/proc/self/clear_refs").write_text("5")
            elif state.global_step == STEPS:
                found["peak_mib"] = status_mib("VmHWM") - before

    with on_cpu(layout):
        args = XPOConfig(
            output_dir=str(folder / "out"), method="dpo", reference="copy", use_cpu=True, max_steps=STEPS,
            per_device_train_batch_size=PAIRS, layout="padded", preflight="off", save_strategy="no", report_to="none",
            disable_tqdm=True, logging_strategy="no", train_sampling_strategy="sequential",
            **({"ddp_backend": "gloo"} if ranks > 1 else {}), **engine(layout, ranks),
        )  # fmt: skip
        trainer = XPOTrainer(LlamaForCausalLM(config()), args, train_dataset=rows, processing_class=tokenizer)
        trainer.add_callback(Notes())
        trainer.train()
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def measured(layout: str, ranks: int) -> list[dict[str, float]]:
    """Returns what each rank of a run held. Raises RuntimeError with the end of what the run wrote if it fails."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        own = [str(Path(__file__).resolve()), "--rank-of", layout, "--ranks", str(ranks), "--folder", folder]
        done = subprocess.run(
            [sys.executable, *launch, *own], capture_output=True, text=True, env=os.environ | ENVIRONMENT
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def expected(layout: str, ranks: int) -> dict[str, float]:
    """Returns what the arithmetic and `fit` say of a rank, in MiB, beside the runtime."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        weights = LlamaForCausalLM(config()).num_parameters()
    units = ((PROMPT, (ANSWER, ANSWER)),)
    asked = Question(
        config(), method="dpo", full=True, dtype="float32", reference="copy", units=units, batch_size=PAIRS,
        layout="padded", device="cpu", ranks=ranks, sharding=layout,
    )  # fmt: skip
    phases = [x for x in predict(asked).phases if x.name == "later steps"]
    peak = max(x.peak - x.owners[RUNTIME["cpu"]] for x in phases)
    parts = 1 if layout == "ddp" else ranks
    return {
        "weights": weights, "state_mib": (STATE + FLOAT32) * weights / parts / 2**20, "predicted_mib": peak / 2**20
    }  # fmt: skip


def main() -> int:
    """Measures every run, and returns 1 if a peak is off by more than `ALLOWED`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep what --json FILE has measured, predict it anew")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        of_this_rank(args.rank_of, args.ranks, args.folder)
        return 0
    before = json.loads(args.json.read_text("utf-8"))["runs"] if args.resume and args.json.is_file() else []
    known = {(run["layout"], run["ranks"]): run for run in before}
    results = []
    print(f"{'':<12}{'state':>9}{'held':>9}{'predicted':>11}{'peak':>9}{'off':>8}")
    for layout, ranks in RUNS:
        found, began = expected(layout, ranks), time.perf_counter()
        run = known.get((layout, ranks))
        each = measured(layout, ranks) if run is None else run["each"]
        most = {name: max(own[name] for own in each) for name in each[0]}
        off = found["predicted_mib"] / most["peak_mib"] - 1
        results.append({"layout": layout, "ranks": ranks, **found, **most, "off": off, "each": each})
        results[-1]["seconds"] = time.perf_counter() - began if run is None else run["seconds"]
        print(
            f"{layout:<6}{ranks:<6}{found['state_mib']:>9.0f}{most['held_mib']:>9.0f}{found['predicted_mib']:>11.0f}"
            f"{most['peak_mib']:>9.0f}{off:>+8.1%}",
            flush=True,
        )
        if args.json:
            write_json(args.json, {"versions": versions(), "device": "cpu", "runs": results})
    return int(any(abs(x["off"]) > ALLOWED for x in results))


if __name__ == "__main__":
    sys.exit(main())
