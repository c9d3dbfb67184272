"""Training of a reward model: the methods of methods/reward.py on a value head's outputs for a whole batch.

Checkpoints, resume and the rest are transformers' Trainer's, as in trainer/; the rewards, and the log-probs that GRM
and HAF need, come from one forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import data
from ..data import KINDS, DataError, Kind
from ..head import sequence_logps
from ..layouts import Chosen, Inputs, LaysOut
from ..methods import get_method, of_valid
from ..methods.math import check_choice, pair_metrics
from ..methods.reward import odin
from ..models import Head, install_fused_loss, load_model, padding_id, refuse_router_loss
from ..models.fused_loss import causal_lm
from ..models.value_head import (
    SavesValueHead,
    ValueHead,
    attach_value_head,
    detach_value_head,
    load_value_head,
    value_head,
)
from ..reduce import count_metrics, mean_metrics
from ..rollout.sampling import eos_ids
from ..trainer import HandedOver, check_head, check_rows, map_splits, warn_of_lost_updates, with_adapter, with_lengths
from ..trainer.base import PreTrainedTokenizerBase, set_seed
from ..trainer.findings import Report
from ..trainer.layout import hindrance_of, settle_layout_of
from ..trainer.preflight import Run, preflight
from ..trainer.reference import LiveReference, rows_fingerprint
from ..trainer.row_checks import Rows
from ..trainer.setup import some_rows
from ..trainer.sharding import check_reference
from .collate import RewardCollator, read_in_training, read_lengths
from .config import RewardConfig as RewardConfig
from .config import checked_settings as checked_settings
from .encoding import load_ratings
from .goals import contrast, goal_state, save_goal
from .model import RewardModel
from .sampled import ReadsSamples, check_reading
from .samples import VIEW_DROPOUT, two_views
from .spec import SOFT_LABELS, SPEC_FILE, fields_of, save_spec
from .whitening import Whitens


class RewardTrainer(SavesValueHead, Whitens, ReadsSamples):
    """Trainer of a reward model.

    model: a causal LM of transformers, a PEFT model, or a name for `load_model`. If it has a value head (a reward
        model's folder has one), training continues from it. `gated` on a model that `regression` has trained learns the
        gate alone, as ArmoRM does.
    train_dataset, eval_dataset: anything `data.load` reads, of the method's kind. For `regression` rows of prompt,
        completion and the numbers named in args.objectives; a number that is null is left out of the loss.
    samples: what a policy has sampled, for `rlp` and `meta`: anything `load_samples` reads.
    processing_class, peft_config: as in `XPOTrainer`.

    A model of `discriminator` continues as a ranking one, its value head with it: the preference-model pre-training of
    arXiv 2112.00861. With args.whiten the spec has mean and standard deviation of the rewards after `train`; those of a
    model that training continues from are dropped.

    Pairs may have `prob`, the probability that the chosen completion is the better one: preference_model learns from
    it, and bradley_terry by −p log σ(h) − (1−p) log σ(−h), if the data have no margin.

    The weights of a new value head are drawn with standard deviation 1/(D + 1), its bias is 0. (Stiennon et al., arXiv
    2009.01325, draw them with variance 1/(D + 1), which is wider by √(D + 1).) The rewards are read at the last token,
    EOS unless the completion was cut. ODIN's correlations are those of a micro-batch.
    """

    args: RewardConfig
    kind: Kind

    def __init__(
        self,
        model: nn.Module | str,
        args: RewardConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        samples: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or RewardConfig()
        self.spec = args.spec()
        self.view_dropout = VIEW_DROPOUT if args.view_dropout is None else args.view_dropout
        check_reading(args, samples is not None, trains=train_dataset is not None)
        # ODIN has no entry in METHODS: it is a function of the rewards of a whole batch.
        self.method = None if self.spec.form == "odin" else get_method(self.spec.method)
        needs_reference = self.method is not None and self.method.needs_reference
        if needs_reference and args.reference == "none":
            raise ValueError(
                f'{self.spec.method} compares the policy with a reference: use reference="auto", "copy" or "adapter"'
            )
        self.kind = KINDS[self.spec.kind]
        self.settings = checked_settings(args)
        compares = needs_reference or self.settings.get("regulariser") == "dpo"
        if args.reference not in ("auto", "none") and not compares:
            raise ValueError(f'{self.spec.method} has no reference: use reference="auto", got {args.reference!r}')
        if isinstance(model, str):
            folder = Path(model)
            model, tokenizer = load_model(model)
            processing_class = processing_class or tokenizer
            # A value head without a spec beside it belongs to something else, a critic perhaps.
            if (folder / SPEC_FILE).is_file():
                load_value_head(model, folder)
        if processing_class is None:
            raise ValueError("the trainer needs the model's tokenizer: pass processing_class=tokenizer")
        warn_of_lost_updates(model, args)
        compares = compares and args.reference != "none"
        handed_over = HandedOver(model, peft_config, copied=compares and args.reference == "copy")
        set_seed(args.seed)  # adapter and head are drawn at random here, before Trainer sets the seed
        # A gate is trained alone on rewards that the model already has.
        self.gate_alone = self.spec.form == "gated" and value_head(model) is not None
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        refuse_router_loss(model, "a reward model")
        install_fused_loss(model)
        if self.gate_alone:
            if args.weight_decay:
                raise ValueError("weight_decay would shrink the rewards that a gate is learned for: set it to 0")
            model.requires_grad_(False)
            if value_head(model).outputs < self.spec.outputs:  # type: ignore[union-attr]
                _extend_with_gate(model)
        if not (self.method and self.method.trains_head):
            _freeze_lm_head(model)
        # Narrow enough for the loss to begin at ln 2: the length bias of wider ones has to be unlearned (docs/log.md).
        attach_value_head(model, self.spec.outputs, std=1 / (_width_of(model) + 1))
        self.args, self._tokenizer, self._embedded = args, processing_class, model
        self._texts: Any = None  # what the training rows were encoded from
        own = RewardCollator(padding_id(model, processing_class), self.spec, processing_class)
        collator = kwargs.pop("data_collator", None) or own
        super().__init__(
            model=model,
            args=args,
            data_collator=LaysOut(collator, wanted=partial(read_in_training, self.spec)),
            train_dataset=self._encode(train_dataset),
            eval_dataset=map_splits(eval_dataset, self._encode),
            processing_class=processing_class,
            **kwargs,
        )
        self._reference: LiveReference | None = None
        if compares:
            strategy = "adapter" if hasattr(model, "disable_adapter") else "copy"
            if args.reference != "auto":
                check_choice("reference", args.reference, ("adapter", "copy"))
                strategy = args.reference
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            strategy = handed_over.settle(strategy, args.reference, model, sharded=sharded)
            check_reference(strategy, model, self.accelerator)
            self._reference = LiveReference(strategy, model, self.accelerator, args.backend, handed_over)
        self.make_ready()
        # The reward is read at the last token; log-probs, and the gate behind the prompt, must not see what follows.
        of_tokens = self.spec.reads_logps or self.spec.reads_states or self.spec.form == "gated"
        if of_tokens and self.train_dataset is not None:
            row = self.train_dataset[0]
            check_head(model, row["prompt_ids"] + row["chosen_ids"], self.args.device, args.backend)
        self.layout: Chosen | None = None  # how the model reads rows; None without any
        if rows := some_rows(self.train_dataset, self.eval_dataset):
            self.layout = settle_layout_of(self, rows, lambda hidden, rows: self.spec.states(hidden, *rows[1:3]))
        self.samples = None if samples is None else self.dealt(samples, self._tokenizer, self._embedded)

    def _encode(self, dataset: Any) -> Any:
        if dataset is None:
            return None
        ratings = None
        if self.spec.form == "objectives":
            dataset, ratings = load_ratings(dataset, self.spec.objectives)
        else:
            dataset = data.load(dataset, kind=self.kind.name)
        name, inputs = self.spec.method, self.method.inputs if self.method else ()
        if "ranks" in inputs and "scores" not in dataset.column_names:
            raise DataError(f"{name} ranks the completions of a prompt by their scores; got lists without scores")
        if "desirable" in inputs and "label" not in dataset.column_names:
            raise DataError(f"{name} learns from the label of each row; got rows without label")
        encoded = data.encode(dataset, self._tokenizer, kind=self.kind.name, **self.args.encoding())
        names = [f"{name}_{what}" for name in ("kl_completion", "rejected") for what in ("ids", "mask")]
        unread = {*names} & {*encoded.column_names} if "rejected" not in self.kind.completions else set()
        encoded = encoded.remove_columns(sorted(unread))
        lengths = read_lengths(encoded, self.spec, self._tokenizer)
        check_rows(self._embedded, self._tokenizer, encoded, lengths=lengths)
        self._texts = dataset if self._texts is None else self._texts
        if ratings is not None:
            encoded = data.with_column(encoded, "ratings", ratings)
        return with_lengths(encoded, self.args)

    def preflight(self) -> Report | None:
        """Checks the run before training: rows, what is scored, and that the loss is the same padded and in parts.

        Nothing of the run changes. Returns what was found, and keeps it in `report`; None without rows to train on.
        """
        if self.train_dataset is None:
            return None
        both, rated = self.spec.form == "preference", self.spec.form == "objectives"
        rows = Rows(
            self.train_dataset.remove_columns("reward") if rated else self.train_dataset,
            self.kind,
            self._tokenizer,
            self.args.max_length,
            eos_ids(self._tokenizer, self._embedded),
            collate=None if both else self.data_collator,  # whose rows hold both completions of a pair
            texts=self._texts,
            chat_template_kwargs=self.args.chat_template_kwargs,
            max_prompt_length=self.args.max_prompt_length,
        )
        run = Run(
            f"{type(self).__name__}, {self.spec.method} on {len(self.train_dataset):,} {self.kind.unit}",
            self.model,
            self.accelerator,
            rows,
            self.args.backend,
            prepare=self._prepare_inputs,
            collate=self.data_collator,
            items=self._items,
            loss=self._loss,
            coupled=self.method is None or self.method.unit == "batch",
            looks_at_model=not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
        )
        self.report = preflight(run)
        return self.report

    def _coupled(self) -> list[str]:
        return [self.spec.method] if self.method is None or self.method.unit == "batch" else []

    def _row_tokens(self, rows: Any, layout: str) -> np.ndarray:
        if self.spec.form == "preference":  # whose two rows hold the same tokens, in either order
            return np.array(read_lengths(rows, self.spec, self._tokenizer))
        return super()._row_tokens(rows, layout)

    def reward_model(self) -> RewardModel:
        """Returns the model in training as a `RewardModel` that shares its weights."""
        model: Any = self.accelerator.unwrap_model(self.model)
        how: Any = {"layout": self.args.layout if hindrance_of(self) is None else "padded"}
        return RewardModel(model, self._tokenizer, self.spec, batch_size=self.args.per_device_eval_batch_size, **how)

    @cached_property
    def _rows(self) -> str:
        return rows_fingerprint(self.train_dataset)[:16]

    @property
    def made_with(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote a checkpoint."""
        plain = dataclasses.replace(self.spec, mean=None, std=None)
        spec = {**fields_of(plain), "max_length": self.args.max_length}
        about = {"reward model": spec, "settings": self.settings, "rows": self._rows}
        about |= {} if self._reference is None else self._reference.identity
        about |= {**self.of_samples, "value_head_learning_rate": self.args.value_head_learning_rate}
        return {**super().made_with, **about}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        save_spec(self.spec, output_dir or str(self.args.output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model as `UnitTrainer` does; with goal_conditioned the goal beside it, of the training rows."""
        super().save_model(output_dir, _internal_call)
        if self.spec.reads_states and not _internal_call and self.args.should_save and self.train_dataset is not None:
            save_goal(goal_state(self.reward_model(), self.train_dataset), output_dir or str(self.args.output_dir))

    def _items(self, batch: dict[str, Tensor]) -> Tensor:
        return self._valid(batch).sum()

    def _valid(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the units that count, (U,) bool."""
        scored = (batch["targets"] != data.IGNORE_INDEX).any(dim=1)
        if self.kind.listed:
            return scored.view(batch["list_lengths"].shape[0], -1).any(dim=1)
        return scored.view(len(self.kind.completions), -1).all(dim=0)

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], denominator: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        rows = Inputs.of(inputs)
        unwrapped: Any = self.accelerator.unwrap_model(model)
        head = value_head(unwrapped)
        assert head is not None
        valid = self._valid(inputs)
        divisor = valid.sum().clamp(min=1) if denominator is None else denominator
        reference = None if self._reference is None else self._reference.logps(model, rows)
        asked = () if self.method is None else self.method.inputs
        views: dict[str, Tensor] = {}
        if "sample_view" in asked:
            views = self.sample_views(model, inputs, head)

        def fused(hidden: Tensor, lm_head: Head) -> dict[str, Any]:
            outputs = self.spec.read(head, hidden, rows.attention_mask, rows.targets)
            logps = self._logps(hidden, lm_head, rows.targets) if self.spec.reads_logps else None
            if self.spec.reads_states:
                states, targets = hidden[..., : head.weight.shape[1]].chunk(2), rows.targets.chunk(2)
                views["near_w"] = contrast(states[0], targets[0], alike=True)
                views["apart_l"] = contrast(states[1], targets[1], alike=False)
            if "view" in asked:
                width = head.weight.shape[1]
                w, l = self.spec.states(hidden, *rows[1:3])[:, 0, :width].float().chunk(2)  # noqa: E741
                views.update(two_views("view", w - l, self.view_dropout, training=model.training))
            losses, metrics = self._losses(inputs, head, outputs, logps, reference, valid, views)
            loss = torch.where(valid, losses, 0.0).sum() / divisor
            return {"loss": loss, "metrics": mean_metrics(metrics, valid), "counts": count_metrics(metrics, valid)}

        out = rows.run(model, fused)
        return out["loss"], (out["loss"].detach(),), out["metrics"], out["counts"]

    def _logps(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Returns the summed log-prob of each row (R,); GRM's language model head is frozen."""
        if not (self.method and self.method.trains_head):
            parts = {k: x.detach() for k, x in vars(head).items() if isinstance(x, Tensor)}
            head = dataclasses.replace(head, **parts)
        return sequence_logps(hidden, head, targets, backend=self.args.backend)[0]

    def _losses(
        self,
        inputs: dict[str, Tensor],
        head: ValueHead,
        outputs: Tensor,  # (R, K)
        logps: Tensor | None,  # (R,)
        ref_logps: Tensor | None,  # (R,)
        valid: Tensor,  # (U,)
        views: Mapping[str, Tensor],  # of the method's inputs, (U,), (U, D) or (S, D)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the method's losses (U,), meaningless where not valid, and its metrics."""
        method, form = self.method, self.spec.form
        if method is None:
            return self._odin(inputs, head, outputs, valid)
        given: dict[str, Any] = {**self.settings, **views}
        if form == "preference":
            # Both orders of every pair, with the probability of the one that comes first.
            z, z_swapped = outputs[:, 0].chunk(2)
            p = inputs.get("prob_w", torch.ones_like(z))
            losses, _ = method(logit=outputs[:, 0], prob_w=torch.cat([p, 1 - p]), **given)
            _, metrics = method(logit=(z - z_swapped).detach() / 2, prob_w=p, **given)
            return losses.view(2, -1).mean(dim=0), metrics
        if form == "gated":
            count = len(self.spec.objectives)
            rewards, gate = outputs.split(count, dim=1)
            rewards = rewards.detach() if self.gate_alone else rewards
            w, l = rewards.chunk(2)  # noqa: E741
            gate = gate[: len(w)]  # the prompt's, which both completions share
            return method(rewards_w=w, rewards_l=l, gate_w=gate, gate_l=gate, **given)
        if form == "objectives":
            ratings = inputs["ratings"]
            return method(rewards=outputs, targets=ratings, mask=ratings.isfinite(), **given)
        reward = outputs[:, 0]
        if "desirable" in method.inputs:
            return method(logit=reward, desirable=inputs["desirable"], **given)
        if "ranks" in method.inputs:
            scores = inputs["scores"]
            mask = (inputs["targets"] != data.IGNORE_INDEX).any(dim=1).view(scores.shape)
            ranks = 1 + (scores[:, None, :] > scores[:, :, None]).sum(dim=-1)
            return method(rewards=reward.view(scores.shape), ranks=ranks, mask=mask, **given)
        given |= _sides("reward", reward)
        soft = "prob_w" in inputs and method.name in SOFT_LABELS
        if "margin" in method.inputs and "margin" in inputs:
            if soft:
                raise ValueError(f"{method.name} takes prob or a margin of a pair, the data have both: drop one")
            given["margin"] = inputs["margin"]
        if logps is not None:
            given |= _sides("logp", logps) | ({} if ref_logps is None else _sides("ref_logp", ref_logps))
        losses, metrics = of_valid(method, given, valid)
        if soft:
            # A soft label: the cross-entropy of p, the two orders weighted by their probabilities.
            p = inputs["prob_w"]
            given |= {"reward_w": given["reward_l"], "reward_l": given["reward_w"]}
            losses = p * losses + (1 - p) * of_valid(method, given, valid)[0]
        return losses, metrics

    def _odin(
        self, inputs: dict[str, Tensor], head: ValueHead, outputs: Tensor, valid: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns ODIN's loss of the batch, repeated for each of its pairs, and its metrics."""
        lengths = (inputs["targets"] != data.IGNORE_INDEX).sum(dim=1)
        quality, length = outputs.unbind(dim=1)
        sides = _sides("quality", quality) | _sides("length", length) | _sides("len", lengths)
        sides = {name: x[valid] for name, x in sides.items()}
        metrics = pair_metrics(*quality.chunk(2))
        if not valid.any():
            return outputs.sum() * valid, metrics
        weights = {"weight_quality": head.weight[0].float(), "weight_length": head.weight[1].float()}
        return odin(**sides, **weights, **self.settings).expand(len(valid)), metrics


def _freeze_lm_head(model: nn.Module) -> None:
    """Freezes the LM head: wrappers for several processes take a trainable weight without a gradient for a mistake."""
    lm: Any = causal_lm(model)
    weight = lm.get_output_embeddings().weight
    if weight is not lm.get_input_embeddings().weight:
        lm.get_output_embeddings().requires_grad_(False)


def _extend_with_gate(model: nn.Module) -> None:
    """Replaces a value head of K rewards by one of the same K rewards and K gate logits, which weigh them equally."""
    present = value_head(model)
    assert present is not None
    count = present.outputs
    detach_value_head(model)
    made = attach_value_head(model, 2 * count)
    with torch.no_grad():
        made.weight[:count] = present.weight
        made.bias[:count] = present.bias


def _width_of(model: nn.Module) -> int:
    """Returns D, the width of the hidden states that a causal LM's head reads."""
    weight: Any = causal_lm(model).get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[1]


def _sides(name: str, x: Tensor) -> dict[str, Tensor]:
    """Returns the chosen and the rejected half of x (2P,), under the names of a method's inputs."""
    w, l = x.chunk(2)  # noqa: E741
    return {f"{name}_w": w, f"{name}_l": l}
