"""transformers.Trainer with this loss by `compute_loss_func`: SimPO, without a subclass and without all logits.

    python examples/hf_trainer.py

The model is asked for its hidden states and for the logits of one position only, since it always makes some. Trainer
does not divide such a loss, so it is divided by the pairs of a whole optimizer step here, and is the same however the
step is split into micro-batches. Every step sees the same pairs, so that the loss can be seen to fall.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments

import xpo_fast as xf
from xpo_fast.data import Collator, encode, load
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model


def main(model: Any, tokenizer: Any, steps: int = 5, micro_batches: int = 2, folder: str = "runs/hf_trainer") -> list:
    """Returns the loss of each step."""
    pairs, collate = 4, Collator(tokenizer.pad_token_id, "pair")
    objective = xf.Objective("simpo", beta=2.0, gamma=1.0)

    def with_labels(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(rows)
        batch["labels"] = batch.pop("targets")
        return {**batch, "output_hidden_states": True, "logits_to_keep": 1}

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        hidden, head = outputs.hidden_states[-1], xf.Head.from_model(model)
        denominator = None if num_items_in_batch is None else pairs  # None in an evaluation
        return objective(hidden, head, labels, denominator=denominator).loss

    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=pairs // micro_batches,
        learning_rate=1e-5,
        gradient_accumulation_steps=micro_batches,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        prediction_loss_only=True,
        dataloader_pin_memory=False,
    )
    data = encode(load(PAIRS, kind="pair"), tokenizer, kind="pair", max_length=128).select(range(pairs))
    trainer = Trainer(model, args, data_collator=with_labels, train_dataset=data, compute_loss_func=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*load_model(SMOLLM2, dtype="float32"))
