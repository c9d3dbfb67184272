"""Cuts an Experience into the micro-batches of a step, with the pretraining texts that ppo_ptx mixes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import data
from ..data import pad_rows
from ..objective import Objective
from ..seeds import permutation
from ..types import IGNORE_INDEX
from .config import RLConfig
from .experience import Experience

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Batches:
    """Maker of a step's micro-batches."""

    args: RLConfig
    objective: Objective
    accelerator: Accelerator
    pad: int
    texts: list[list[int]]  # token ids of pretraining texts; none for a method that mixes in none

    def step(
        self, experience: Experience, step: int, *, spare: bool
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Returns this process's micro-batches of a step of the run, and the denominators of their losses, () each.

        spare: rows with gradient 0 are left out of the batches; the denominators count them.
        """
        args, ranks = self.args, self.accelerator.num_processes
        rollout, at = divmod(step, args.steps_per_rollout)
        epoch, part = divmod(at, args.minibatches)
        order = permutation(len(experience.kept), args.seed, "order", rollout + 1, epoch)
        rows = order.chunk(args.minibatches)[part]
        kept = rows[experience.kept[rows]]
        if spare:  # then it does not matter which rows share a batch: those of similar length do, for less padding
            sizes = [len(experience.prompt_ids[i]) + len(experience.completion_ids[i]) for i in kept.tolist()]
            kept = kept[torch.tensor(sizes, dtype=torch.int64).argsort(stable=True)]
        size = args.per_device_train_batch_size
        micro = kept.split(size) if len(kept) else ()
        spared = rows[experience.counted[rows] & ~experience.kept[rows]]
        counts = [
            self.objective.count_items(experience.targets(of)) for of in (*micro, *((spared,) if len(spared) else ()))
        ]
        none = self.objective.count_items(torch.full((1, 1), IGNORE_INDEX))
        items = {
            "policy": torch.stack([none, *counts]).sum(dim=0).clamp(min=1),
            "tokens": experience.lengths[rows[experience.counted[rows]]].sum().clamp(min=1),
        }
        per_step = args.gradient_accumulation_steps * ranks
        mine = range(self.accelerator.process_index, per_step, ranks)
        batches = [
            self.batch(experience, micro[k] if k < len(micro) else None, (step * per_step + k) * size) for k in mine
        ]
        return batches, {name: x.to(args.device) for name, x in items.items()}

    def batch(self, experience: Experience, rows: Tensor | None, first_text: int) -> dict[str, Tensor]:
        """Returns rows (n,) as a batch, with pretraining texts from number `first_text` on.

        rows None: a single token without a target, from which nothing is learned; other processes wait for this one.
        """
        chosen = torch.zeros(1, dtype=torch.int64) if rows is None else rows
        pairs = [(experience.prompt_ids[i], experience.completion_ids[i]) for i in chosen.tolist()]
        texts = []
        if rows is None:
            pairs = [(pairs[0][0][:1], pairs[0][1][:1] or pairs[0][0][:1])]
        elif self.texts:
            size = self.args.per_device_train_batch_size
            texts = [self.texts[(first_text + k) % len(self.texts)] for k in range(size)]
        batch = pad_rows([*pairs, *((ids[:1], ids[1:]) for ids in texts)], self.pad)
        targets = batch["targets"]
        batch["targets"] = targets[: len(pairs)]
        if self.texts:
            batch["ptx_targets"] = targets[len(pairs) :]
        if rows is None:
            batch["targets"] = torch.full_like(batch["targets"], IGNORE_INDEX)
        for name, x in experience.columns.items():
            x = x[chosen]
            if x.dim() == 2:
                placed = torch.zeros(batch["targets"].shape, dtype=x.dtype)
                for k, (prompt, ids) in enumerate(pairs):
                    placed[k, len(prompt) - 1 : len(prompt) - 1 + len(ids)] = x[k, : len(ids)]
                x = placed
            batch[name] = x
        return batch


def pretraining_texts(dataset: Any, objective: Objective, tokenizer: Any, longest: int) -> list[list[int]]:
    """Returns the token ids of the texts that ppo_ptx mixes in, cut at `longest` tokens; none for other methods.

    dataset: strings, or rows with `text`, as `data.read` takes them. Texts of fewer than two tokens are left out.
    Raises ValueError where the method mixes in text and there is none, or the other way round.
    """
    wanted = any("ptx_logp" in m.columns for m in objective.methods)
    if wanted != (dataset is not None):
        raise ValueError(
            f"{objective} mixes in pretraining text: pass ptx_dataset=, strings or rows with a text"
            if wanted
            else f"ptx_dataset= is for ppo_ptx, {objective} mixes in no text"
        )
    if not wanted:
        return []
    rows = dataset if isinstance(dataset, list) else [row for _, row in data.read(dataset, "train")]
    texts = [row if isinstance(row, str) else row.get("text") for row in rows]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("ptx_dataset: expected strings, or rows with a text, and at least one")
    ids = [ids[:longest] for ids in tokenizer(texts, verbose=False)["input_ids"] if len(ids) > 1]
    if not ids:
        raise ValueError("ptx_dataset: no text has two tokens or more")
    return ids
