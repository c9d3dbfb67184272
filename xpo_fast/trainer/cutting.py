"""The part of `UnitTrainer` that cuts what data loaders draw into micro-batches by tokens, and counts tokens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from ..reduce import most_over_ranks
from .budget import WINDOW, Budget, KeepsUnits, LongestFirst, Parts, computed, unit_tokens
from .checks import place_in
from .means import Means
from .sequence_parallel import SplitsRows
from .throughput import Throughput, read_tokens, saved

logger = logging.getLogger("xpo_fast")


class CutsBatches(SplitsRows, Trainer):
    """Trainer whose args may have `tokens_per_batch`: then data loaders draw rows, which are cut when a step is drawn.

    The micro-batches of a step are handed to Trainer as `Parts`, which it takes for one, so that its steps, schedules
    and logs are those of a run without a budget.
    """

    data_collator: Any
    reads_rows = True  # whether data loaders draw the rows that batches are made of

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.in_front: int | None = None  # the row that is in the first step whatever the seed
        self._means = Means()
        self._throughput = Throughput(self.args.device)
        if getattr(self.args, "tokens_per_batch", None) is not None and (names := self._coupled()):
            raise ValueError(
                f"tokens_per_batch: the loss of {' and '.join(names)} depends on which units share a micro-batch, and "
                "a budget of tokens decides that by their lengths: leave it out, or use another method"
            )

    @property
    def budget(self) -> Budget | None:
        """The budget of tokens by which what data loaders draw is cut; None if there is none."""
        tokens: int | None = getattr(self.args, "tokens_per_batch", None)
        return Budget(tokens, self.data_collator) if tokens is not None and self.reads_rows else None

    def _coupled(self) -> list[str]:
        """Returns the names of the methods whose losses depend on which units share a micro-batch."""
        return []

    def _row_tokens(self, rows: Any, layout: str) -> np.ndarray:
        """Returns about how many tokens each row of an encoded data set takes in a layout, (N,)."""
        return unit_tokens(rows, layout)

    def _settle_first(self, *, resumed: bool) -> None:
        """Puts the longest row into the first step of a run with a budget; warns if it is longer than the budget.

        With preflight "stop" such a row is a ValueError. resumed: the order is that of the checkpoint.
        """
        self.in_front = self.in_front if resumed else None
        if (budget := self.budget) is None:
            return
        rows: Any = self.train_dataset
        longest = int(self._row_tokens(rows, getattr(self.data_collator, "layout", "padded")).argmax())
        takes = max(size.tokens(0) for size in KeepsUnits(budget.collate).unit(rows[longest]).forwards)
        self.in_front = self.in_front if resumed else longest
        if takes <= budget.tokens:
            return
        said = f"{place_in(rows, longest)} takes {takes:,} tokens, and tokens_per_batch is {budget.tokens:,}"
        if getattr(self.args, "preflight", "off") == "stop":
            raise ValueError(f'{said}: raise tokens_per_batch, lower max_length, or set preflight="warn"')
        if self.is_world_process_zero():
            logger.warning("%s: it goes alone, as does whatever else is longer", said)

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        budget, collate = self.budget, self.data_collator
        if budget is not None and not is_training:
            ranks = self.replicas
            kwargs["batch_size"] = max(kwargs["batch_size"], min(WINDOW, -(-len(dataset) // ranks)))
        try:
            self.data_collator = collate if budget is None else KeepsUnits(collate)
            loader: Any = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collate
        if is_training and self.in_front is not None:
            sampler = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
            if hasattr(sampler, "sampler"):  # batch_rebalance has none
                loader.set_sampler(LongestFirst(sampler.sampler, self.in_front))
        return loader

    def _micro_batches(self, drawn: Sequence[Any]) -> list[dict[str, Any]]:
        """Returns the batches that are computed of those that a data loader has drawn; of all ranks equally many."""
        budget = self.budget
        if budget is None or not drawn:
            return list(drawn)
        batches = budget.batches([unit for units in drawn for unit in units.drawn[: units.counted]])
        missing = most_over_ranks(max(len(batches), 1), self.args.device) - len(batches)
        return [budget.filler([unit for units in drawn for unit in units.drawn])] * missing + batches

    def _count_tokens(self, batches: Sequence[dict[str, Tensor]], padded: int | None = None) -> None:
        """Adds a step's tokens to those of the next log. padded: positions of its padded batches, if others than it."""
        positions = sum(computed(batch) for batch in batches)
        padded = sum(batch["input_ids"].numel() for batch in batches) if padded is None else padded
        self._throughput.add(torch.stack([read_tokens(batch) for batch in batches]).sum(), positions, padded)
        self._means.add(*saved(positions, padded, self.args.device))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs forward and backward of a micro-batch, or of several that Trainer takes for one; returns their loss."""
        if not isinstance(inputs, Parts):
            return super().training_step(model, inputs, num_items_in_batch)
        state, loss = self.accelerator.gradient_state, torch.zeros((), device=self.args.device)
        each = self.is_deepspeed_enabled or state.plugin_kwargs.get("sync_each_batch", False)
        for k, part in enumerate(inputs, start=1):
            last = k == len(inputs)
            state._set_sync_gradients(last)
            with contextlib.nullcontext() if each or last else self.accelerator.no_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns the floating-point operations of a micro-batch, or of several that Trainer takes for one."""
        if isinstance(inputs, Parts):
            return sum(map(self.floating_point_ops, inputs))
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for part in inputs if isinstance(inputs, Parts) else [inputs]:
            super()._track_num_input_tokens(part)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._throughput.paused():
            return super()._evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does, with the means of the metrics and tokens per second since the last log of a loss."""
        if "loss" in logs:
            logs.update(self._means.pop() | {"tokens_per_second": self._throughput.pop()})
        super().log(logs, start_time)
        if "train_runtime" in logs:
            self._throughput.say(main=self.is_world_process_zero())
