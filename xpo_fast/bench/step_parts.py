"""Has the parts of the cases of whole steps: the model, its trainers, their steps, TRL's step, the bare products."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from peft import LoraConfig

from .. import data
from ..demo_data import PAIRS
from ..layouts import LAYOUTS, LaysOut
from ..models import load_model
from ..trainer import XPOConfig, XPOTrainer, row_lengths
from ..trainer.budget import computed
from .contenders import needed
from .work import Settings

TRL = ("TRL", "TRL, activations kept")

Step = Callable[[Any], Any]
Sizes = tuple[int, int]  # of one input: positions of padded rows, and those that are scored


@dataclass
class Case:
    """Contenders that run on the same inputs, and what they are."""

    steps: Mapping[str, Step]
    inputs: Sequence[Any]
    tokens: Mapping[str, int]  # positions that the model computes for all inputs, by contender
    missing: Mapping[str, str]  # why a contender is not measured, by its name


class Bench:
    """What the cases share: the rows, the model, and its trainers."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        torch.manual_seed(0)
        _, self.tokenizer = load_model(settings.model, dtype="float32")
        count = settings.batch * settings.repeats
        rows = data.load(settings.data or str(PAIRS), kind="pair").shuffle(seed=0)
        rows = rows.select(range(min(len(rows), 4 * count)))
        encoded = data.encode(rows, self.tokenizer, kind="pair", max_length=10**6)
        fits = [i for i, length in enumerate(row_lengths(encoded)) if length <= settings.max_length]
        if len(fits) < settings.batch:
            raise ValueError(
                f"expected {settings.batch} pairs of at most {settings.max_length} tokens for a batch, got {len(fits)} "
                "of those looked at: give a larger --max-length, or other --data"
            )
        self.pairs = rows.select(fits[: max(len(fits[:count]) // settings.batch, 1) * settings.batch])

    @property
    def lora(self) -> LoraConfig:
        """The adapter that is trained."""
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    def trainer(self, method: str, rows: Any) -> XPOTrainer:
        """Returns a trainer of a copy of the model, whose adapter is not idle."""
        config = XPOConfig(
            str(self.folder / method), method=method, max_length=self.settings.max_length, use_cpu=True,
            per_device_train_batch_size=self.settings.batch, layout="padded", preflight="off",
            ref_cache_dir=str(self.folder / "reference"), disable_tqdm=True,
            reference="cached" if method == "dpo" else "auto",
        )  # fmt: skip
        model = load_model(self.settings.model, dtype="float32")[0]
        made = XPOTrainer(model, config, train_dataset=rows, processing_class=self.tokenizer, peft_config=self.lora)
        move(made.model)
        if method == "dpo":  # any numbers will do for the time
            rows = made.train_dataset
            for name in made.kind.reference:
                rows = data.with_column(rows, name, [-50.0] * len(rows))
            made.train_dataset = rows
        return made

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Returns random token ids of a shape."""
        vocab = len(self.tokenizer)
        return torch.randint(min(100, vocab // 2), vocab, shape, generator=generator)

    def inputs(self, trainer: XPOTrainer, *, alike: bool = False) -> list[list[dict[str, Any]]]:
        """Returns the trainer's rows in batches. alike: of like length."""
        rows: list[Any] = list(trainer.train_dataset)
        if alike:
            rows.sort(key=lambda row: sum(len(x) for n, x in row.items() if n.endswith("_ids")))
        size = self.settings.batch
        return [rows[k : k + size] for k in range(0, len(rows), size)]


def move(model: Any) -> None:
    """Draws the adapter's second factor, which begins at 0, so that no gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(1e-3 * torch.randn(p.shape, generator=generator))


def step_of(trainer: Any, layout: str) -> Step:
    """Returns the step of a trainer on rows in a layout: the batch made, forward, backward."""

    def step(rows: list[dict[str, Any]]) -> float:
        collate = trainer.data_collator
        collate.layout = layout
        batch = trainer._prepare_inputs(collate(rows))
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        loss = trainer.training_step(trainer.model, batch, items)
        trainer.model.zero_grad()
        return float(loss)

    return step


def gradient_of(trainer: Any, layout: str, rows: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
    """Returns the loss and the gradient of all trained weights for rows in a layout."""
    collate = trainer.data_collator
    collate.layout = layout
    batch = trainer._prepare_inputs(collate(rows))
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    loss = float(trainer.training_step(trainer.model, batch, items))
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.model.zero_grad()
    return loss, found


def difference(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Returns by how much loss and gradient of rows differ from padded rows, relatively, in the worst layout."""
    want, gradient = gradient_of(trainer, "padded", rows)
    worst = 0.0
    for layout in LAYOUTS[1:]:
        loss, found = gradient_of(trainer, layout, rows)
        worst = max(worst, abs(loss - want) / max(abs(want), 1.0), float((found - gradient).norm() / gradient.norm()))
    return worst


def positions(trainer: Any, inputs: list[list[dict[str, Any]]]) -> dict[str, int]:
    """Returns the positions that the model computes for all inputs, by layout."""
    counted: dict[str, int] = dict.fromkeys(LAYOUTS, 0)
    for rows in inputs:
        for layout in LAYOUTS:
            counted[layout] += computed(LaysOut(trainer.data_collator.collate, layout)(rows))
    return counted


def floor_of(model: Any, inputs: Sequence[Any], batches: Sequence[Mapping[str, Any]], *, backward: bool = True) -> Step:
    """Returns the bare products of the padded rows of inputs: of each linear layer but the adapter's, and of the head.

    batches: the collated inputs. backward: with those of the gradients of the layers' inputs.
    """
    sizes: dict[int, Sizes] = {}
    for rows, batch in zip(inputs, batches):
        sizes[id(rows)] = batch["input_ids"].numel(), int((batch["targets"] != data.IGNORE_INDEX).sum())
    head = model.get_output_embeddings().weight.detach()
    weights = [
        m.weight.detach() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in name
    ]
    layers = [w for w in weights if w.data_ptr() != head.data_ptr()]

    def step(rows: Any) -> None:
        count, scored = sizes[id(rows)]
        products(layers, count)
        products([head], scored)

    def products(of: Sequence[torch.Tensor], count: int) -> None:
        for w in of:
            y = torch.mm(torch.ones(count, w.shape[1]), w.T)
            if backward:
                torch.mm(y, w)

    return step


def trl_step(bench: Bench, name: str) -> Step:
    """Returns TRL's DPO step with precomputed reference log-probs on the same rows. name: of TRL."""
    with needed("TRL 1.16", "trl==1.16.0"):
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

    own: dict[str, Any] = {} if name == TRL[0] else {"gradient_checkpointing": False}
    config = DPOConfig(
        str(bench.folder / "trl"), max_length=bench.settings.max_length, use_cpu=True, bf16=False, report_to=[],
        per_device_train_batch_size=bench.settings.batch, precompute_ref_log_probs=False, disable_tqdm=True, **own,
    )  # fmt: skip
    model = load_model(bench.settings.model, dtype="float32")[0]
    made: Any = DPOTrainer(
        model, args=config, train_dataset=bench.pairs, processing_class=bench.tokenizer, peft_config=bench.lora
    )
    move(made.model)
    made.precompute_ref_logps, made.current_gradient_accumulation_steps = True, 1  # as in `train`
    rows: list[Any] = list(made.train_dataset)
    for row in rows:
        row |= {"ref_chosen_logps": -50.0, "ref_rejected_logps": -50.0}

    def step(given: list[dict[str, Any]]) -> float:
        batch = made._prepare_inputs(made.data_collator([rows[row["number"]] for row in given]))
        loss = made.training_step(made.model, batch)
        made.model.zero_grad()
        return float(loss)

    return step
