"""The part of `RewardTrainer` that reads the policy's own samples beside the pairs, for `rlp` and `meta`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..layouts import Inputs, LaysOut
from ..methods.reward import spread
from ..models import padding_id
from ..models.value_head import ValueHead, value_head
from ..trainer import UnitTrainer, check_rows, row_lengths
from ..trainer.reference import rows_fingerprint
from .collate import read_in_training
from .config import RewardConfig
from .samples import INNER_LR, PREFIX, PolicySamples, load_samples, moved, states_of_samples, two_views, valid_samples
from .spec import READS_VIEWS, RewardSpec, check_samples


class ReadsSamples(UnitTrainer):
    """Trainer that deals a batch of samples beside each micro-batch, which the step alone determines.

    `meta` takes the gradient of each micro-batch at weights that tell its samples apart better; `rlp` adds the loss of
    two views of their states.
    """

    args: RewardConfig
    spec: RewardSpec
    samples: PolicySamples | None = None
    view_dropout: float

    def dealt(self, samples: Any, tokenizer: Any, model: Any) -> PolicySamples:
        """Returns the policy's samples as batches, read in the layout of the pairs."""
        args, how = self.args, self.args.encoding()
        rows, groups = load_samples(samples, least=2 if self.spec.method == "meta" else 1)
        encoded = data.encode(rows, tokenizer, kind="chosen", **how)
        check_rows(model, tokenizer, encoded, lengths=row_lengths(encoded))
        own = data.Collator(padding_id(model, tokenizer), "chosen")
        layout = getattr(self.data_collator, "layout", "padded")
        collate = LaysOut(own, layout, partial(read_in_training, self.spec))
        count = args.sample_prompts or args.per_device_train_batch_size
        return PolicySamples(encoded, groups, count, args.seed, collate)

    def _begin_step(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if self.samples is None:
            return batches
        first = self.state.global_step * self.args.gradient_accumulation_steps
        return [{**batch, **self.samples.batch(first + k)} for k, batch in enumerate(batches)]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs forward and backward of a micro-batch; for `meta` at weights moved to tell the samples apart."""
        if self.spec.method != "meta":
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        gain = self._spread(model, self._prepare_inputs(inputs))
        rate = INNER_LR if self.args.inner_lr is None else self.args.inner_lr
        self._means.add({"spread": gain}, {"spread": torch.ones_like(gain)})
        with moved(model, gain, rate):
            return super().training_step(model, inputs, num_items_in_batch)

    def _spread(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Returns J of a batch's samples, (), the mean over its prompts."""
        unwrapped: Any = self.accelerator.unwrap_model(model)
        head, rows = value_head(unwrapped), Inputs.of(inputs, PREFIX)
        assert head is not None

        def read(hidden: Tensor, _: Any) -> dict[str, Tensor]:
            return {"outputs": self.spec.read(head, hidden, rows.attention_mask, rows.targets)}

        with self.compute_loss_context_manager():
            rewards = self.spec.mix(rows.run(model, read)["outputs"])
        lists = int(inputs[PREFIX + "lists"])
        return spread(rewards.view(lists, -1), valid_samples(inputs).view(lists, -1)).mean()

    def sample_views(self, model: nn.Module, inputs: dict[str, Tensor], head: ValueHead) -> dict[str, Tensor]:
        """Returns two views of the states of a batch's samples; none in an evaluation, which has no samples."""
        width, states = head.weight.shape[1], head.weight.new_zeros(0, head.weight.shape[1], dtype=torch.float32)
        if PREFIX + "targets" in inputs:
            states = states_of_samples(model, inputs, self.spec, width)
        return two_views("sample_view", states, self.view_dropout, training=model.training)

    @property
    def of_samples(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one: the samples, and how they are read."""
        found: dict[str, Any] = {"view_dropout": self.view_dropout} if self.spec.method in READS_VIEWS else {}
        if self.samples is None:
            return found
        rows = rows_fingerprint(self.samples.rows)[:16]
        return {**found, "samples": rows, "sample_prompts": self.samples.prompts, "inner_lr": self.args.inner_lr}


def check_reading(args: RewardConfig, given: bool, *, trains: bool) -> None:
    """Raises ValueError for samples that are missing or not read, and where they cannot be."""
    if given or trains:
        check_samples(args.method, given)
    if not given:
        return
    if args.world_size > 1:
        raise ValueError(f"{args.method} reads samples in a forward of its own, in one process; got {args.world_size}")
    for name in ("tokens_per_batch", "optimizer_in_backward"):
        if getattr(args, name):
            raise ValueError(f"{name}: not with {args.method}, which reads samples beside each batch: leave it out")
