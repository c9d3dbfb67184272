"""Preference training on `transformers.Trainer`: the loss is fused into the model's forward, the rest is Trainer's.

Checkpoints, resume, logging, schedulers, mixed precision and data parallelism are the Trainer's. Added here: pairs,
lists and single completions as batches, and the reference policy (reference.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import data
from ..data import KINDS, Kind
from ..data.topk import TOPK
from ..files import cache_dir
from ..head import Plan
from ..layouts import Chosen, Inputs, LaysOut
from ..methods.unpaired import kto_kl
from ..models import Head, padding_id
from ..models.lm_head import causal_lm
from ..objective import Objective
from ..reduce import mixed, sum_over_ranks
from ..rollout.sampling import eos_ids
from .arguments import changed
from .base import UnitTrainer
from .budget import coupled
from .checkpoints import load_objective, reading, save_objective
from .checks import check_head, check_rows
from .config import XPOConfig
from .context import at_places, check_context, check_teacher, context_lengths, encode_for
from .findings import Report
from .grouping import as_targets, by_half, grouped_targets, own_targets
from .handed_over import WEIGHTS, HandedOver
from .layout import settle_layout_of
from .mixtures import checked_coefficient, with_router_loss
from .preflight import Run, preflight
from .reference import KEPT, CachedReference, LiveReference, choose, dataset_logps, row_logps, rows_fingerprint
from .row_checks import Rows
from .sequence_parallel import check_exchange, check_objective
from .setup import map_splits, prepare_model, some_rows, with_lengths, with_tokenizer
from .sharding import check_reference, sharding_of
from .teachers import vocabulary
from .topk import check_topk


class XPOTrainer(UnitTrainer):
    """Trainer of a causal LM on preferences.

    model: a causal LM of transformers, a PEFT model, or a name for `load_model`; peft_config makes it a PEFT model.
    train_dataset, eval_dataset: anything `data.load` reads, or what `data.encode` returns; eval_dataset may be a dict
        of them, as Trainer's may.
    processing_class: the tokenizer. Without a pad token it pads with EOS, which stays a token to learn.
    objective: an `Objective` to use in place of the one that args describe.
    Other arguments are Trainer's.

    The reference policy is the model as it is handed over here, with its adapter if it carries one. "auto" is, for a
    PEFT model, "adapter", the model with its adapter switched off, where that is the same; and else "kept", the model
    with the weights in training kept as they were handed over. reference="adapter" is the model without its adapter
    even if the adapter has been trained before (a warning says so).
    """

    args: XPOConfig
    kind: Kind
    taught = False  # whether a teacher, another model, stands where the reference stands
    splits_rows = True

    def __init__(
        self,
        model: nn.Module | str,
        args: XPOConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        args = XPOConfig() if args is None else args
        model, processing_class = with_tokenizer(model, processing_class)

        if objective is not None and (idle := sorted({"method", "method_args", "tile_mib"} & set(changed(args)))):
            raise ValueError(f"objective= stands in for {', '.join(idle)} of the arguments: give one of the two")
        self.objective = objective if objective is not None else args.objective()
        self.kind = KINDS[self.objective.data_kind]
        self.loss_weights = [term.weight for term in self.objective.terms]
        self._columns = {name for m in self.objective.methods for name in m.columns}
        self._columns |= set(TOPK) if self.objective.reads_topk else set()
        self._columns |= {"scores"} if self.objective.pairs else set()
        self._estimates_kl = "kl" in self._columns
        check_context(self.objective, args.context)
        check_teacher(self.objective, taught=self.taught)

        copied = args.reference == "copy" and self.objective.needs_reference
        handed_over = HandedOver(model, peft_config, copied=copied)
        model = prepare_model(model, args, peft_config)
        self.reference, self.reference_reason = self._choose_reference(args, model)
        self.args = args
        self._tokenizer, self._unwrapped = processing_class, model
        self._texts: datasets.Dataset | None = None  # what the training rows were encoded from
        pad = padding_id(model, processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=LaysOut(kwargs.pop("data_collator", None) or data.Collator(pad, self.kind.name)),
            train_dataset=self._encode(train_dataset),
            eval_dataset=map_splits(eval_dataset, self._encode),
            processing_class=processing_class,
            **kwargs,
        )
        self._router, self._router_share = checked_coefficient(model, args, cut=self.row_shard is not None), 1.0
        self._check_parallelism()
        self._prepared = False
        self.layout: Chosen | None = None  # how the model reads rows; None before `prepare`
        self._live: LiveReference | None = None
        self._cached: CachedReference | None = None
        self._differs: str | None = None  # why policy and reference differ before the first step
        self._make_reference(handed_over)

    def _choose_reference(self, args: XPOConfig, model: nn.Module) -> tuple[str, str]:
        """Returns where the reference's log-probs come from, and why."""
        return choose(args.reference, self.objective, model)

    def _make_reference(self, handed_over: HandedOver) -> None:
        """Makes the reference of the model that is there now, before its first step."""
        args, model = self.args, self._unwrapped
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        settled = handed_over.settle(self.reference, args.reference, model, sharded=sharded)
        if settled != self.reference:
            self.reference, self.reference_reason = settled, KEPT
        self._differs = handed_over.differs
        if self.reference == "cached":
            folder = Path(args.ref_cache_dir or cache_dir() / "reference")
            how: Any = {"dtype": str(self.accelerator.mixed_precision), "adapter_off": handed_over.off}
            how["accelerator"] = self.accelerator
            self._cached = CachedReference(model, folder, kind=self.kind, **how)
        elif self.reference != "none":
            self._live = LiveReference(self.reference, model, self.accelerator, args.backend, handed_over)

    def _encode(self, dataset: Any) -> Any:
        """Loads and encodes a data set, unless it is encoded, and checks its columns and token ids."""
        if dataset is None:
            return None
        if self.objective.reads_topk:
            check_topk(dataset, vocabulary(self._unwrapped), self.args.max_length)
        elif left := [name for name in TOPK if name in (getattr(dataset, "column_names", None) or ())]:
            raise ValueError(f"{' and '.join(left)} are for topk_kl, {self.objective} reads none: remove these columns")
        rows, wanted = None, {*self.kind.encoded, *(["ref_prompt_ids"] if self.objective.reads_context else [])}
        if not (isinstance(dataset, datasets.Dataset) and wanted <= set(dataset.column_names)):
            rows = data.load(dataset, kind=self.kind.name)
            dataset = encode_for(rows, self._tokenizer, self.objective, self.args)
        unread = [] if self._estimates_kl else ["kl_completion"]
        if not self.objective.has_rejected and self.kind.listed:
            unread.append("rejected")
        names = [f"{name}_{what}" for name in unread for what in ("ids", "mask")]
        dataset = dataset.remove_columns([name for name in names if name in dataset.column_names])
        data.check_columns(dataset, self.kind.name, self.objective.rehearse)
        check_rows(self._unwrapped, self._tokenizer, dataset, lengths=context_lengths(dataset))
        if self._texts is None:
            self._texts = rows
        return with_lengths(dataset, self.args)

    def _with_reference(self, dataset: datasets.Dataset | None, label: str) -> Any:
        """Adds the columns of cached reference log-probs, if the reference is cached and they are missing."""
        if dataset is None or self._cached is None or self.kind.reference[0] in dataset.column_names:
            return dataset
        with self.rows_split():
            shown = self.is_world_process_zero() and not self.args.disable_tqdm
            how: Any = {"label": label, "progress": shown, **self._forwards()}
            return self._cached.attach(dataset, self.model, self.accelerator, self.data_collator, **how)

    def _forwards(self) -> dict[str, Any]:
        """Returns how many rows and tokens a forward without gradient reads, and the backend of its head."""
        args = self.args
        return {"batch_size": args.per_device_eval_batch_size, "tokens": args.tokens_per_batch, "backend": args.backend}

    def prepare(self) -> None:
        """Checks the fused head, settles the layout, and caches the reference; `train` and `evaluate` call it."""
        if self._prepared:
            return
        self.make_ready()
        if self._cached is not None and sharding_of(self.accelerator):
            self._cached.sharded(self.model)
        if rows := some_rows(self.train_dataset, self.eval_dataset):
            completion = rows[0][self.kind.encoded[1]]
            ids = rows[0]["prompt_ids"] + (completion[0] if self.kind.listed else completion)
            check_head(self.model, ids, self.args.device, self.args.backend)
            if self.row_shard is not None:
                check_exchange(self.model, ids, self.row_shard, self.args.device, self.args.backend)
            self.layout = settle_layout_of(self, rows)
        self.train_dataset = self._with_reference(self.train_dataset, "")
        self.eval_dataset = map_splits(self.eval_dataset, lambda d: self._with_reference(d, " (eval)"))
        self._prepared = True

    def _prepare_to_train(self, checkpoint: str | None) -> None:
        self.prepare()
        if checkpoint is not None:
            with reading(checkpoint):
                load_objective(self.objective, checkpoint, self.args.device)

    def preflight(self) -> Report | None:
        """Checks the run before training: rows, mask, template, reference, loss and options, see docs/preflight.md.

        Nothing of the run changes: random numbers, modes, the objective's state and the order of the data stay.
        Returns what was found, and keeps it in `report`; None without rows to train on. Every process must call it.
        """
        if self.train_dataset is None:
            return None
        self.prepare()
        rows = Rows(
            self.train_dataset,
            self.kind,
            self._tokenizer,
            self.args.max_length,
            eos_ids(self._tokenizer, self._unwrapped),
            collate=self.data_collator,
            texts=self._texts,
            held_out=self.eval_dataset if isinstance(self.eval_dataset, datasets.Dataset) else None,
            score=self.args.score,
            chat_template_kwargs=self.args.chat_template_kwargs,
            max_prompt_length=self.args.max_prompt_length,
        )
        names = " + ".join(m.name for m in self.objective.methods)
        apart = self.reference == "none" or self.objective.reads_context or self.objective.reads_teacher
        self.report = preflight(
            Run(
                f"{type(self).__name__}, {names} on {len(self.train_dataset):,} {self.kind.unit}",
                self.model,
                self.accelerator,
                rows,
                self.args.backend,
                prepare=self._prepare_inputs,
                collate=self.data_collator,
                items=self._items,
                loss=self._loss,
                objective=self.objective,
                given=self._columns_of,
                reference=None if apart else self._reference_rows,
                cached=self._live is None,
                trained=self._why_not_reference,
                looks_at_model=not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
            )
        )
        return self.report

    @property
    def _half(self) -> int | None:
        return self.kind.half

    def _save_extra_files(self, folder: Path) -> None:
        super()._save_extra_files(folder)
        save_objective(self.objective, folder)

    @cached_property
    def _rows(self) -> str:
        return rows_fingerprint(self.train_dataset)[:16]

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings that a resumed run must share with this one: those of `UnitTrainer`, method, reference, rows."""
        method = str(self.objective)
        about = {"method": method, "reference": self.reference, "rows": self._rows}
        if self.args.context is not None:
            about["context"] = hashlib.sha256(self.args.context.encode()).hexdigest()[:16]
        if self._cached is not None:
            about[WEIGHTS] = self._cached.weights[:16]
        return {**super().made_with, **about, **({} if self._live is None else self._live.identity)}

    @property
    def reference_folder(self) -> Path | None:
        """The folder of the cached reference's files; None if the reference is not cached."""
        return None if self._cached is None else self._cached.folder

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Returns batches of eval_dataset (default: the trainer's own), encoded and with its reference."""
        self.prepare()
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._with_reference(self._encode(eval_dataset), " (eval)")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Returns batches of test_dataset, encoded and with its reference."""
        self.prepare()
        return super().get_test_dataloader(self._with_reference(self._encode(test_dataset), " (test)"))

    def completion_logps(self, dataset: Any) -> Tensor:
        """Returns the policy's log-prob and the length of each row's completions: (N, S, 2), see `batch_logps`."""
        encoded = self._encode(dataset)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(total=len(encoded), unit="row", desc="log-probs", disable=hidden) as bar, self.rows_split():
            how: Any = {"advance": bar.update, **self._forwards()}
            return dataset_logps(encoded, self.model, self.accelerator, self.data_collator, self.kind, **how)

    def held_out(self) -> dict[str, float]:
        """Evaluates on eval_dataset; returns metrics without timings.

        For pairs, eval_likelier_per_token is the share in which the chosen completion is likelier per token, which is
        informative before training too, when every implicit reward is 0.
        """
        metrics = {k: v for k, v in self.evaluate().items() if not k.endswith(("_runtime", "_second", "_time"))}
        if len(self.kind.completions) == 2:
            logp, length = self.completion_logps(self.eval_dataset).unbind(dim=-1)  # (P, 2)
            mean = logp / length
            scored = (length > 0).all(dim=1)
            metrics["eval_likelier_per_token"] = float((mean[:, 0] > mean[:, 1])[scored].float().mean())
        return metrics

    def plan(self) -> Plan:
        """Returns how the head will run on a batch of the first training rows."""
        dataset: Any = self.train_dataset
        rows = list(dataset.select(range(min(len(dataset), self.args.per_device_train_batch_size))))
        with self.rows_split():
            targets, how = own_targets(
                *grouped_targets(self.kind, self._prepare_inputs(self.data_collator(rows))), self._half
            )
        head = Head.from_model(causal_lm(self.model))
        hidden = head.weight.new_zeros(()).expand(*targets.shape, head.width).requires_grad_()
        with torch.enable_grad():
            return self.objective.plan(hidden, head, targets, **how)

    def _items(self, batch: dict[str, Tensor]) -> Tensor:
        targets, how = grouped_targets(self.kind, batch)
        return self.objective.count_items(targets, **how)

    def _coupled(self) -> list[str]:
        return coupled(self.objective)

    def _begin_step(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Returns the micro-batches of a step, on which KTO's reference point is estimated."""
        self._router_share = 1 / (len(batches) * self.accelerator.num_processes)
        if not self._estimates_kl:
            return batches
        # One estimate for the whole step, so that it does not depend on how the step is cut into micro-batches.
        self._estimate_kl(self.model_wrapped, batches)
        return [{k: v for k, v in b.items() if not k.startswith("kl_")} for b in batches]

    def _estimate_kl(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """Estimates KTO's reference point, () in nats, from the mismatched rows of these batches on all ranks."""
        policy, reference = [], []
        for batch in batches:
            batch = self._prepare_inputs(batch)
            rows = Inputs.of(batch, "kl_")
            with self.accelerator.autocast():
                logps, lengths = row_logps(model, *rows, backend=self.args.backend).unbind(dim=1)
            ref_logps = batch["kl_ref_logps"] if self._live is None else self._live.logps(model, rows)
            policy.append(logps[lengths > 0])
            reference.append(ref_logps[lengths > 0])
        logps, ref_logps = torch.cat(policy), torch.cat(reference)
        total = sum_over_ranks(torch.tensor(logps.numel(), device=logps.device))
        state = self.objective.state
        if "kl" not in state or total >= 2:  # the odd row at the end of an epoch keeps the previous estimate
            state["kl"] = kto_kl(logps, ref_logps)
        return state["kl"]

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], denominator: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        rows = Inputs.of(inputs)
        targets, given = own_targets(*self._columns_of(inputs), self._half)
        references = self._references(model, rows, inputs)
        for _, reference in references:
            if "ref_hidden" in reference:
                reference["ref_hidden"] = as_targets(reference["ref_hidden"], self._half)

        def fused(hidden: Tensor, head: Head) -> dict[str, Any]:
            hidden = as_targets(hidden, self._half)
            how = {"denominator": denominator, **given}
            out = mixed([(w, self.objective(hidden, head, targets, **how, **own)) for w, own in references])
            return {"loss": out.loss, "losses": out.losses, "metrics": out.metrics, "counts": out.counts}

        out = with_router_loss(model, rows, fused, self._router, share=self._router_share)
        return out["loss"], out["losses"], out["metrics"], out["counts"]

    def _columns_of(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Returns targets, and the arguments of the objective about their groups and columns."""
        targets, given = grouped_targets(self.kind, inputs)
        given |= {n: as_targets(x, self._half) if n in TOPK else x for n, x in inputs.items() if n in self._columns}
        if "value" in self._columns and "value" not in given:
            given["value"] = self._value.to(targets.device)
        return targets, given

    def _references(
        self, model: nn.Module, rows: Inputs, inputs: dict[str, Tensor]
    ) -> list[tuple[float, dict[str, Any]]]:
        """Returns the arguments of the objective about each reference, and the weight of its loss in the sum."""
        return [(1.0, self._reference(model, rows, inputs))]

    def _reference(self, model: nn.Module, rows: Inputs, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the arguments of the objective that are about the reference."""
        if self.reference == "none":
            return {}
        if self._live is None:
            logps = inputs["ref_logps"]
        elif self.objective.needs_reference_hidden:
            if not self.objective.reads_context:
                return self._live.hidden_states(model, rows)
            under = Inputs.of(inputs, "ref_")
            found = self._live.hidden_states(model, under)
            return {**found, "ref_hidden": at_places(found["ref_hidden"], under.targets, rows.targets)}
        elif self.objective.needs_reference_tokens:
            logps = self._live.token_logps(model, rows)
        else:
            logps = self._live.logps(model, rows)
        return {"ref_logps": by_half(logps, self._half) if logps.dim() == 1 else as_targets(logps, self._half)}

    def _reference_rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the reference's log-prob of each row of a batch, (R,)."""
        if self._live is None:
            return batch["ref_logps"]
        return self._live.logps(self.model, Inputs.of(batch))

    def _why_not_reference(self) -> str | None:
        """Returns why policy and reference differ before the first step; None if they should not."""
        if self.state.global_step:
            return "the policy has been trained"
        if self._cached is not None and self._cached.differs(self.model):
            return "its weights have been changed since then"
        return self._differs

    @cached_property
    def _value(self) -> Tensor:
        """The value of a prompt if the data set has no column for it: the mean reward, () float32."""
        dataset = self.eval_dataset if self.train_dataset is None else self.train_dataset
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        return torch.tensor(dataset["reward"]).float().mean()

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluates as `UnitTrainer` does; KTO's reference point is estimated on all of it, the state is restored."""
        state = self.objective.state_dict()
        try:
            if self._estimates_kl:
                self.objective.state.pop("kl", None)
                self._estimate_kl(
                    self.model_wrapped, (b for x in dataloader for b in self._micro_batches([self._without_repeats(x)]))
                )
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.objective.load_state_dict(state)

    def _check_parallelism(self) -> None:
        if self.row_shard is not None:
            check_objective(self.objective)
        check_reference(self.reference, self.model, self.accelerator)
