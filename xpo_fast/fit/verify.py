"""Takes some steps of a run on its largest batch for real, in a process of its own, and measures its memory.

`python -m xpo_fast.fit.verify FILE` reads a question as JSON, and prints what it measured as a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from .question import Question

STEPS = 3
_EOS = 7  # a token that no row of `unit_rows` ends with, and that random weights hardly ever draw


def measure(question: Question, model: str | None = None, *, timeout_s: float | None = None) -> dict[str, Any]:
    """Returns the bytes at the peak of a run on the question's largest batch: peak, and on CUDA reserved.

    model: a name for `load_model`; None: random weights of the question's configuration. Raises RuntimeError with the
    end of what the process wrote if it fails, and TimeoutError after `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "question.json"
        file.write_text(json.dumps({"question": as_json(question), "model": model, "folder": folder}))
        command = [sys.executable, "-m", "xpo_fast.fit.verify", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{STEPS} steps did not end within {timeout_s:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}, as when memory runs out"]
        raise RuntimeError("the run failed: " + " | ".join(lines[-3:]))
    return json.loads(done.stdout.splitlines()[-1])


def as_json(question: Question) -> dict[str, Any]:
    """Returns a question as JSON values."""
    found = {f.name: getattr(question, f.name) for f in dataclasses.fields(question)}
    lora = None if question.lora is None else question.lora.to_dict()
    if lora is not None:
        lora["target_modules"] = sorted(x) if isinstance(x := lora["target_modules"], set) else x
    return found | {"config": question.config.to_dict(), "lora": lora}


def from_json(found: dict[str, Any]) -> Question:
    """Returns the question of `as_json`."""
    from peft import LoraConfig
    from transformers import AutoConfig

    config = dict(found["config"])
    lora = None
    if found["lora"] is not None:
        names = ["task_type", "r", "lora_alpha", "lora_dropout", "target_modules"]
        lora = LoraConfig(**{name: found["lora"][name] for name in names})
    units = tuple((prompt, tuple(completions)) for prompt, completions in found["units"])
    of: Any = AutoConfig.for_model(config.pop("model_type"), **config)
    made: dict[str, Any] = {"config": of, "lora": lora, "units": units, "objectives": tuple(found["objectives"])}
    make: Any = Question
    return make(**{**found, **made})


def main() -> None:
    """Measures one run and prints it."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    trainer = _trainer(from_json(given["question"]), given["model"], given["folder"])
    trainer.train()
    import torch

    found = trainer.record()["memory"]
    peak: dict[str, Any] = {"what": found["what"], "peak": found["peak_bytes"]}
    if trainer.args.device.type == "cuda":
        peak["reserved"] = torch.cuda.max_memory_reserved()
    print(json.dumps(peak))


def _trainer(question: Question, name: str | None, folder: str) -> Any:
    """Returns a trainer whose every batch is the question's largest."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM

    from ..data import KINDS
    from ..models import load_model
    from ..rewards.trainer import RewardConfig, RewardTrainer
    from ..rl import RLConfig, RLTrainer
    from ..trainer import XPOConfig, XPOTrainer
    from .phases import unit_rows

    dtype = getattr(torch, question.trained_dtype if question.full else question.dtype)
    options: dict[str, Any] = {} if question.attention is None else {"attn_implementation": question.attention}
    if question.quantize:
        raise ValueError("quantize: random weights are not quantised; verify without it")
    if name is None:
        model: Any = AutoModelForCausalLM.from_config(question.config, dtype=dtype, **options)
    else:
        model, _ = load_model(name, dtype=dtype, **options)
    on_cpu = question.device == "cpu"
    count = len(question.rows)
    how: Any = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": question.batch_size if question.command == "rl" else count,
        "per_device_eval_batch_size": question.eval_batch_size,
        "gradient_accumulation_steps": question.grad_accum,
        "max_grad_norm": question.max_grad_norm,
        "optim": question.optim,
        "optim_args": ",".join(f"{k}={v}" for k, v in question.optim_arguments.items()) or None,
        "optimizer_in_backward": question.optimizer_in_backward,
        "activation_offload": question.activation_offload,
        "layout": question.layout,
        "bf16": question.mixed and question.dtype == "bfloat16",
        "fp16": question.mixed and question.dtype == "float16",
        "use_cpu": on_cpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "preflight": "off",
        "method": question.method,
        "method_args": dict(question.settings),
    }
    if question.gradient_checkpointing:
        names = {f.name for f in dataclasses.fields(XPOConfig)}
        how["activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"] = True
    tokenizer = words(question.config.get_text_config().vocab_size)
    shared: Any = {"processing_class": tokenizer, "peft_config": question.lora}
    if question.command == "rl":
        prompt, (new, *_) = question.units[0]
        prompts = [{"prompt": " ".join([f"t{8 + k}"] * prompt)} for k in range(question.prompts * STEPS)]
        more = {"num_generations": question.generations, "prompts_per_rollout": question.prompts}
        sizes = {"max_new_tokens": new, "generation_batch_size": question.generation_batch_size, "log_samples": False}
        config = RLConfig(**how, **more, **sizes, **question.rl, reference=question.reference)
        return RLTrainer(model, _rewards, config, train_dataset=prompts, **shared)
    how["train_sampling_strategy"] = "sequential"
    if question.command == "reward":

        class Encoded(RewardTrainer):
            def _encode(self, dataset: Any) -> Any:
                return dataset

        config: Any = RewardConfig(**how, reference=question.reference, objectives=_objectives(question))
        run: Any = Encoded
        kind, mismatched = config.spec().kind, False
    else:
        how |= {"ref_cache_dir": folder, "tile_mib": question.tile_mib, "reference": question.reference}
        config, run = XPOConfig(**how), XPOTrainer
        objective = config.objective()
        kind, mismatched = objective.data_kind, any("kl" in m.columns for m in objective.methods)
    rows = unit_rows(KINDS[kind], question, question.rows, mismatched=mismatched)
    data = datasets.Dataset.from_list(rows * (STEPS * question.grad_accum))
    return run(model, config, train_dataset=data, **shared)


def _objectives(question: Question) -> list[str] | None:
    return list(question.objectives) if question.objectives != ("reward",) else None


def _rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(k) for k in range(len(completions))]


def words(vocab: int) -> Any:
    """Returns a tokenizer whose words t0, t1, … are its tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab)}, unk_token=f"t{_EOS - 1}"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=f"t{_EOS}", pad_token="t0", unk_token=f"t{_EOS - 1}"
    )


if __name__ == "__main__":
    main()
