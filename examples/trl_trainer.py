"""Inside TRL: `install()` puts this engine under TRL's trainers, and DPOTrainer gains this project's losses.

    python examples/trl_trainer.py

Runs of SmolLM2-135M-Instruct with LoRA from the same start: TRL alone; with `install()`; with prompts read once,
too: the same losses; and SimPO, which TRL's DPOTrainer does not have. The seconds include TRL's own work.
"""

from __future__ import annotations

import copy
from typing import Any

import trl
from peft import LoraConfig

from xpo_fast.data import load
from xpo_fast.demo_data import PAIRS
from xpo_fast.integrations import trl as engine
from xpo_fast.models import SMOLLM2, load_model


def main(model: Any, tokenizer: Any, steps: int = 3, folder: str = "runs/trl_trainer") -> dict[str, list[float]]:
    """Returns the loss of each step of each run."""
    data = load(PAIRS, kind="pair").remove_columns("where")

    def run(name: str, module: Any, **options: Any) -> list[float]:
        args = module.DPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=2e-4,
            max_length=128,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            dataloader_pin_memory=False,
            **options,
        )
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        operands: Any = {"train_dataset": data, "processing_class": tokenizer, "peft_config": lora}
        trainer = module.DPOTrainer(copy.deepcopy(model), args=args, **operands)
        seconds = trainer.train().metrics["train_runtime"]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{name:<16}{seconds:6.1f} s ", *(f"{loss:.4f}" for loss in losses), flush=True)
        return losses

    found = {"TRL": run("TRL", trl)}
    with engine.install():  # engine.install() by itself lasts until engine.uninstall()
        found["installed"] = run("TRL, installed", trl)
    with engine.install(layout="shared"):
        found["shared"] = run("TRL, shared", trl)
    found["simpo"] = run("SimPO", engine, loss_type="simpo", hyperparameters={"beta": 2.0, "gamma": 1.0})
    return found


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
