"""A thin preference trainer on `transformers.Trainer`: the loss is fused into the model's forward, the rest is theirs.

Checkpoints, resume, logging, schedulers, mixed precision and data parallelism are the Trainer's. Added here: pairs, lists
and single completions as batches, the reference policy (reference.py), losses divided by the items of the whole optimizer step
(all micro-batches, all ranks), and metrics averaged over the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import datasets
    from tqdm.auto import tqdm
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
    from transformers import (
        TrainerCallback as TrainerCallback,
    )  # for the other trainers: what they miss is said here
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(f"the trainer needs more packages: pip install 'xpo-fast[train]' ({error})") from error

from .. import data
from ..data.kinds import KINDS, Kind
from ..files import SavingError, cache_dir, existing_part, saving, size
from ..head import Plan, token_logps
from ..methods.unpaired import kto_kl
from ..models import Head, check_ids, embeddings, install_fused_loss, load_model
from ..models.fused_loss import causal_lm
from ..objective import Objective
from ..precision import warn_if_slow
from ..reduce import sum_over_ranks
from ..reporters import check_reporters
from ..resume import OF_THE_OPTIMIZER, check_made_with, is_checkpoint, last_checkpoint, write_made_with
from .reference import (
    CachedReference,
    LiveReference,
    choose,
    dataset_logps,
    evaluating,
    row_logps,
    row_tokens,
    rows_fingerprint,
)

STATE_FILE = "objective.pt"
_LOSS = "loss of method "  # among the means of an evaluation
_PROBE_TOKENS = 8
_CHECKED_AT_ONCE = 10_000  # rows
_MODEL_FILES = (  # of one form or the other
    "adapter_config.json", "adapter_model.*", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json", "value_head.safetensors", "reward_model.json",
)  # fmt: skip
_OF_NO_MATTER_TO_AN_ADAPTER = (
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
)  # fmt: skip


@dataclass
class MethodConfig(TrainingArguments):
    """`transformers.TrainingArguments`, a method, and how its head runs."""

    method: str = field(
        default="dpo", metadata={"help": "A name in xpo_fast.METHODS, or a sum of them: dpo + 0.5*sft."}
    )
    method_args: dict | str | None = field(
        default=None,
        metadata={"help": 'Hyperparameters, and options of xpo_fast.Objective, for example {"beta": 0.1}.'},
    )
    backend: str = field(default="auto", metadata={"help": "The backend of the head: auto, torch, dense, …"})
    tile_mib: float | None = field(
        default=None, metadata={"help": "Memory for one tile of logits, in MiB. None: the head decides."}
    )

    # Other defaults than TrainingArguments has.
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Must be False: batches are made from columns the model does not know."},
    )
    report_to: Any = field(default="none", metadata={"help": "Where to report: none, tensorboard, wandb, …"})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and inf losses from the log."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: batches are made from columns of the data set")
        if isinstance(self.method_args, str):
            self.method_args = json.loads(self.method_args)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns of it where there is nothing to copy to
        check_reporters(self.report_to)
        if self.tile_mib is not None and self.tile_mib <= 0:
            raise ValueError(f"tile_mib must be positive or None, got {self.tile_mib}")

    def objective(self, **defaults: Any) -> Objective:
        """The objective that these arguments describe; defaults: of hyperparameters that method_args does not have."""
        tile_bytes = None if self.tile_mib is None else int(self.tile_mib * 2**20)
        given: Any = self.method_args or {}
        hyperparameters: Any = {**defaults, **given}
        fixed = sorted({"reduction", "backend", "tile_bytes"} & set(hyperparameters))
        if fixed:
            raise ValueError(f"{', '.join(fixed)} cannot be in method_args: the trainer decides them, or has options")
        return Objective(self.method, backend=self.backend, tile_bytes=tile_bytes, **hyperparameters)


@dataclass
class XPOConfig(MethodConfig):
    """What is asked about training on a data set of preferences."""

    max_length: int = field(
        default=1024, metadata={"help": "Longest prompt and completion in tokens; longer rows are cut."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt in tokens; longer ones lose their beginning. None: no limit."},
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "The reference policy: adapter (the model with its adapter off), cached (log-probs computed once "
            "and kept on disk), copy (a frozen copy in memory), none, or auto: none for a method without a reference, "
            "adapter where there is one, cached otherwise."
        },
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where cached reference log-probs are kept. None: $XPO_FAST_CACHE or ~/.cache/xpo_fast."},
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize. None: one."})


class Means:
    """Weighted means of named scalars, kept as detached sums on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,) each: weighted sum, weight

    def add(self, values: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """values, weights: () each, under the same names, on every rank the same. Where the weight is 0 the value may be NaN."""
        value = torch.stack([x.detach().float() for x in values.values()])
        weight = torch.stack([weights[name].float() for name in values])
        added = torch.stack([torch.where(weight > 0, value * weight, 0.0), weight], dim=1)
        for name, sums in zip(values, added.unbind(0), strict=True):
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def pop(self) -> dict[str, float]:
        """The means over all ranks since the last call; NaN where no weight was added. Every rank must call it."""
        names, sums = list(self._sums), self._summed()
        self._sums = {}
        return {} if sums is None else dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))

    def _summed(self) -> Tensor | None:
        """(M, 2) over all ranks."""
        return sum_over_ranks(torch.stack([*self._sums.values()])) if self._sums else None

    def state_dict(self) -> dict[str, Any]:
        """What has been added, on all ranks; every rank must call it."""
        sums = self._summed()
        return {"names": list(self._sums), "sums": None if sums is None else sums.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device, *, main: bool) -> None:
        """Go on from `state_dict`; main: on one rank only, the others begin at 0."""
        names, sums = state["names"], state["sums"]
        if sums is None:
            self._sums = {}
            return
        sums = (sums if main else torch.zeros_like(sums)).to(device)
        self._sums = dict(zip(names, sums.unbind(0), strict=True))


class UnitTrainer(Trainer):
    """A Trainer whose loss is a sum over units: divided by those of the whole optimizer step, metrics averaged over the same.

    A subclass has the `kind` of its data set, None if each row is a unit; `_items`, what its loss divides by; and `_loss`.
    Batches have `targets`: a row without one does not count.
    """

    # compute_loss divides by the items of the whole step, so Trainer must not divide by the micro-batches again.
    loss_is_scaled_for_ga = True

    kind: Kind | None = None
    loss_weights: Sequence[float] = (1.0,)  # of the losses that `_loss` gives one by one
    model: Any
    model_wrapped: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} devices, and DataParallel splits pairs apart: start one process a "
                "device with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one device"
            )
        if self.train_dataset is not None:
            _check_trains(self.model)
        self._means = Means()
        self._eval_means = Means()
        self.given: dict[str, Any] = {}  # what else a run that goes on from a checkpoint must have alike

    @property
    def made_with(self) -> dict[str, Any]:
        """What a run must go on with; in every checkpoint, see resume.py. What may change from run to run is left out."""
        args = self.args
        configs = getattr(self.model, "peft_config", {})
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "trainer": type(self).__name__,
            "adapter": {
                name: {k: v for k, v in config.to_dict().items() if k not in _OF_NO_MATTER_TO_AN_ADAPTER}
                for name, config in configs.items()
            },
            "rows per step": step,
            **{name: getattr(args, name) for name in OF_THE_OPTIMIZER},
            "seed": args.seed,
            **self.given,
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint in {self.args.output_dir}")
        if resume_from_checkpoint:
            check_made_with(resume_from_checkpoint, self.made_with)
        self._check_room()
        self._prepare_to_train(resume_from_checkpoint or None)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _prepare_to_train(self, checkpoint: str | None) -> None:
        """Do what must be done before the first step, or before going on from a checkpoint."""

    def _items(self, batch: dict[str, Tensor]) -> Tensor:
        """What the loss divides by, in a batch: (), or one entry a loss."""
        raise NotImplementedError

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], denominator: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        """The batch's sum of losses over `denominator`, with a graph; each loss of it; metrics, and their counts."""
        raise NotImplementedError

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # Trainer's own casts floats to DeepSpeed's dtype: a log-prob of −200 in bfloat16 is off by up to half a nat.
        return {name: value.to(self.args.device) for name, value in inputs.items()}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The items of the whole optimizer step: all micro-batches of all ranks. (), or one entry a method."""
        if not batch_samples:
            return None
        items = torch.stack([self._items(batch) for batch in batch_samples]).sum(dim=0)
        return sum_over_ranks(items.to(device)).clamp(min=1)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        return super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        loss, _, metrics, counts = self._loss(model, inputs, num_items_in_batch)
        if model.training:
            self._means.add(metrics, counts)
        # Data parallelism averages gradients over the ranks, and Trainer the losses it logs: both are sums here.
        loss = loss * self.accelerator.num_processes
        return (loss, metrics) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_means = Means()
        output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop()
        names = [f"{_LOSS}{k}" for k in range(len(self.loss_weights))]
        own = [means.pop(name) for name in names if name in means]
        if own:
            means["loss"] = sum(w * x for w, x in zip(self.loss_weights, own, strict=True))
        for name, value in means.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(self._without_repeats(inputs))
        items = self._items(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, losses, metrics, counts = self._loss(model, inputs, items.clamp(min=1))
        own = {f"{_LOSS}{k}": x for k, x in enumerate(losses)}
        weights = dict(zip(own, items.view(-1), strict=True))
        self._eval_means.add({**metrics, **own}, {**counts, **weights})
        return loss.detach(), None, None

    def _without_repeats(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unscore the rows with which the last batches are filled up to be as long on every rank.

        To be called when the batch has just come from the data loader, which knows then whether it is the last.
        """
        state, ranks = self.accelerator.gradient_state, self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        listed, blocks = "list_lengths" in inputs, len(self.kind.completions) if self.kind else 1
        units = len(inputs["list_lengths" if listed else "targets"]) // blocks
        own = state.remainder - self.accelerator.process_index * units
        inputs = dict(inputs)
        for name in ("targets", "kl_targets"):
            if name in inputs:
                at = torch.arange(len(inputs[name]), device=inputs[name].device)
                at = at // (len(at) // units) if listed else at % units
                inputs[name] = inputs[name].masked_fill((at >= own)[:, None], data.IGNORE_INDEX)
        return inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means.pop())
        super().log(logs, start_time)

    # --- saving and going on --------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, whole or not at all: SavingError names the last whole one, which stays as it is."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        before = folder.with_name(f".{folder.name}.before")  # a checkpoint of the same step, of an earlier run
        mine = self.args.should_save
        if mine and folder.exists():
            # A run that was killed here may have left half a checkpoint, and the whole one aside.
            if is_checkpoint(before) and not is_checkpoint(folder):
                shutil.rmtree(folder)
            else:
                shutil.rmtree(before, ignore_errors=True)
                folder.rename(before)
        self.accelerator.wait_for_everyone()
        try:
            with saving(folder):
                if mine:
                    self._save_own(folder)
                super()._save_checkpoint(model, trial)
        except BaseException as error:
            # Whole, it stays: transformers uploads it, and removes older ones, once it is written.
            if mine and is_checkpoint(folder):
                shutil.rmtree(before, ignore_errors=True)
            elif mine:
                shutil.rmtree(folder, ignore_errors=True)
                if before.exists():
                    before.rename(folder)
            if isinstance(error, SavingError):
                error.checkpoint = last_checkpoint(folder.parent)
            raise
        if mine:
            shutil.rmtree(before, ignore_errors=True)

    def _save_own(self, folder: Path) -> None:
        """Begin a checkpoint with the files that transformers does not know; on one rank only."""
        folder.mkdir(parents=True, exist_ok=True)
        write_made_with(folder, self.made_with)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model into a folder beside what is there: all of its files, or, where one cannot be written, none.

        Weights and adapters of another model that lie there go, for they might be read in its place; those that the adapter
        is for stay.
        """
        if _internal_call:  # into a checkpoint, which is whole or not at all itself
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        part, before = folder / ".model.part", folder / ".model.before"
        try:
            with saving(folder):
                super().save_model(str(part), _internal_call=True)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._exchange(folder, part, before)
        except SavingError as error:
            error.checkpoint = last_checkpoint(str(self.args.output_dir))
            raise
        finally:
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _exchange(self, folder: Path, part: Path, before: Path) -> None:
        """Move the files of `part` into `folder`, and those of other models out of it; all, or none."""
        if before.exists():  # of a run that was killed here
            _move(before, folder, [path.name for path in before.iterdir()])
            before.rmdir()
        new = [path.name for path in part.iterdir()]
        there = {path.name for path in folder.iterdir()}
        stale = {path.name for pattern in _MODEL_FILES for path in folder.glob(pattern)}
        configs = getattr(self.model, "peft_config", {}).values()
        bases = [Path(config.base_model_name_or_path) for config in configs if config.base_model_name_or_path]
        if any(base.is_dir() and base.samefile(folder) for base in bases):
            stale = {name for name in stale if name.startswith("adapter_")}
        before.mkdir()
        try:
            _move(folder, before, there & ({*new} | stale))
            _move(part, folder, new)
        except BaseException:
            _move(folder, part, [name for name in new if not (part / name).exists()])
            _move(before, folder, [path.name for path in before.iterdir()])
            before.rmdir()
            raise
        shutil.rmtree(before, ignore_errors=True)

    def _check_room(self) -> None:
        """Refuse to train where the disk has no room for one checkpoint."""
        args = self.args
        strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
        if strategy == "no" or not args.should_save or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        adapted = hasattr(self.model, "disable_adapter")
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        saved = trained if adapted else sum(p.numel() * p.element_size() for p in self.model.parameters())
        adam = "adam" in str(args.optim).lower() and not args.save_only_model
        needed = saved + (2 * trained if adam else 0)
        free = shutil.disk_usage(existing_part(Path(str(args.output_dir)))).free
        if free < needed:
            raise ValueError(
                f"{args.output_dir} has room for {size(free)}, and a checkpoint takes about {size(needed)} (model {size(saved)}"
                f"{f', optimizer {size(2 * trained)}' if adam else ''}): make room, or name another output folder"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, p in self.model.named_parameters():
            if p.requires_grad and not bool(p.isfinite().all()):
                raise ValueError(
                    f"{resume_from_checkpoint} holds NaN or an infinity in {name}: the run had diverged when it was written; "
                    "go on from an earlier checkpoint, or begin anew with a smaller learning rate"
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            groups = getattr(self.optimizer, "param_groups", [])
            for name in getattr(self.optimizer, "defaults", {}) if checkpoint else ():
                if any(name not in group for group in groups):  # the first step would miss it
                    raise RuntimeError(f"its optimizer has no {name}, which the one asked for has")


class XPOTrainer(UnitTrainer):
    """Train a causal LM on preferences.

    model: a causal LM of transformers, a PEFT model, or a name for `load_model`; peft_config makes it a PEFT model.
    train_dataset, eval_dataset: anything `data.load` reads, or what `data.encode` returns; eval_dataset may be a dict
        of them, as Trainer's may.
    processing_class: the tokenizer. Without a pad token it pads with EOS, which stays a token to learn.
    objective: an `Objective` to use in place of the one that args describe.
    The reference policy is the model as it is handed over here; with reference="adapter", which "auto" is for a PEFT model,
    its base model, which is the same unless its adapter has learned before (a warning says so). Other arguments are
    Trainer's.
    """

    args: XPOConfig
    kind: Kind

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

        self.objective = objective if objective is not None else args.objective()
        self.kind = KINDS[self.objective.data_kind]
        self.loss_weights = [term.weight for term in self.objective.terms]
        self._columns = {name for m in self.objective.methods for name in m.columns}
        self._columns |= {"scores"} if self.objective.pairs else set()
        self._estimates_kl = "kl" in self._columns

        model = ready(model, args, peft_config)
        self.reference, self.reference_reason = choose(args.reference, self.objective, model)
        warn_of_trained_adapter(model, self.reference)
        self.args = args
        self._tokenizer, self._embedded = processing_class, model
        pad: Any = processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None) or data.Collator(pad, self.kind.name),
            train_dataset=self._encode(train_dataset),
            eval_dataset=each(eval_dataset, self._encode),
            processing_class=processing_class,
            **kwargs,
        )
        self._check_parallelism()
        self._prepared = False
        self._live: LiveReference | None = None
        self._cached: CachedReference | None = None
        if self.reference in ("copy", "adapter"):
            self._live = LiveReference(self.reference, model, self.accelerator, args.backend)
        elif self.reference == "cached":
            folder = Path(args.ref_cache_dir or cache_dir() / "reference")
            dtype = str(self.accelerator.mixed_precision)
            self._cached = CachedReference(model, folder, dtype=dtype, kind=self.kind)

    # --- data -----------------------------------------------------------------------------------------------------

    def _encode(self, dataset: Any) -> Any:
        if dataset is None:
            return None
        rows, given = None, dataset
        if not (isinstance(dataset, datasets.Dataset) and set(self.kind.encoded) <= set(dataset.column_names)):
            args: XPOConfig = self.args
            rows = data.load(dataset, kind=self.kind.name)
            dataset = data.encode(
                rows,
                self._tokenizer,
                kind=self.kind.name,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                num_proc=args.dataset_num_proc,
            )
        unread = [] if self._estimates_kl else ["kl_completion_ids"]
        if not self.objective.has_rejected and self.kind.listed:
            unread.append("rejected_ids")
        dataset = dataset.remove_columns([name for name in unread if name in dataset.column_names])
        data.check_columns(dataset, self.kind.name, self.objective.rehearse)
        check_rows(self._embedded, self._tokenizer, dataset, given, rows)
        return with_lengths(dataset, self.args)

    def _with_reference(self, dataset: datasets.Dataset | None, label: str) -> Any:
        if dataset is None or self._cached is None or self.kind.reference[0] in dataset.column_names:
            return dataset
        return self._cached.attach(
            dataset,
            self.model,
            self.accelerator,
            self.data_collator,
            batch_size=self.args.per_device_eval_batch_size,
            backend=self.args.backend,
            label=label,
            progress=self.is_world_process_zero() and not self.args.disable_tqdm,
        )

    def prepare(self) -> None:
        """Check the fused head against the model, and cache the reference; `train` and `evaluate` call it."""
        if self._prepared:
            return
        some = self.train_dataset or self.eval_dataset
        some = next(iter(some.values())) if isinstance(some, dict) else some
        if some:
            self._check_head(some[0])
        self.train_dataset = self._with_reference(self.train_dataset, "")
        self.eval_dataset = each(self.eval_dataset, lambda d: self._with_reference(d, " (eval)"))
        self._prepared = True

    def _prepare_to_train(self, checkpoint: str | None) -> None:
        self.prepare()
        if checkpoint is not None and (path := Path(checkpoint) / STATE_FILE).is_file():
            with reading(checkpoint):
                self.objective.load_state_dict(torch.load(path, map_location=self.args.device))

    def _save_own(self, folder: Path) -> None:
        super()._save_own(folder)
        save_objective(self.objective, folder)

    @cached_property
    def _rows(self) -> str:
        return rows_fingerprint(self.train_dataset)[:16]

    @property
    def made_with(self) -> dict[str, Any]:
        about = {"method": str(self.objective), "reference": self.reference, "rows": self._rows}
        return {**super().made_with, **about}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self.prepare()
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._with_reference(self._encode(eval_dataset), " (eval)")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        self.prepare()
        return super().get_test_dataloader(self._with_reference(self._encode(test_dataset), " (test)"))

    def completion_logps(self, dataset: Any) -> Tensor:
        """Policy log-prob and length of every row's completions: (N, S, 2), see `reference.batch_logps`."""
        encoded = self._encode(dataset)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(total=len(encoded), unit="row", desc="log-probs", disable=hidden) as bar:
            return dataset_logps(
                encoded,
                self.model,
                self.accelerator,
                self.data_collator,
                self.kind,
                batch_size=self.args.per_device_eval_batch_size,
                backend=self.args.backend,
                advance=bar.update,
            )

    def held_out(self) -> dict[str, float]:
        """`evaluate` on eval_dataset; of pairs, also how often the chosen completion is likelier per token.

        The latter says something before training too, when every implicit reward is 0.
        """
        metrics = {k: v for k, v in self.evaluate().items() if not k.endswith(("_runtime", "_second", "_time"))}
        if len(self.kind.completions) == 2:
            logp, length = self.completion_logps(self.eval_dataset).unbind(dim=-1)  # (P, 2)
            mean = logp / length
            scored = (length > 0).all(dim=1)
            metrics["eval_likelier_per_token"] = float((mean[:, 0] > mean[:, 1])[scored].float().mean())
        return metrics

    def plan(self) -> Plan:
        """How the head will run on a batch of the first training rows."""
        dataset: Any = self.train_dataset
        rows = list(dataset.select(range(min(len(dataset), self.args.per_device_train_batch_size))))
        targets, layout = self._layout(self._prepare_inputs(self.data_collator(rows)))
        head = Head.from_model(causal_lm(self.model))
        hidden = head.weight.new_zeros(()).expand(*targets.shape, head.width).requires_grad_()
        with torch.enable_grad():
            return self.objective.plan(hidden, head.weight, targets, **head.kwargs(), **layout)

    def _layout(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return layout(self.kind, inputs)

    # --- the loss -------------------------------------------------------------------------------------------------

    def _items(self, batch: dict[str, Tensor]) -> Tensor:
        targets, layout = self._layout(batch)
        return self.objective.count_items(targets, **layout)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._estimates_kl and batches:
            # One estimate for the whole step, so that it does not depend on how the step is cut into micro-batches.
            self._estimate_kl(self.model_wrapped, batches)
            batches = [{k: v for k, v in b.items() if not k.startswith("kl_")} for b in batches]
        return batches, items

    def _estimate_kl(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """KTO's reference point from the mismatched rows of these batches on all ranks. () in nats."""
        policy, reference = [], []
        for batch in batches:
            batch = self._prepare_inputs(batch)
            rows = (batch["kl_input_ids"], batch["kl_attention_mask"], batch["kl_targets"])
            with self.accelerator.autocast():
                logps, lengths = row_logps(model, *rows, backend=self.args.backend).unbind(dim=1)
            ref_logps = batch["kl_ref_logps"] if self._live is None else self._live.logps(model, *rows)
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
        """The batch's sum of losses over `denominator`, with a graph; each method's; metrics, and their counts."""
        rows = (inputs["input_ids"], inputs["attention_mask"], inputs["targets"])
        targets, given = self._layout(inputs)
        given |= {n: x for n, x in inputs.items() if n in self._columns}
        if "value" in self._columns and "value" not in given:
            given["value"] = self._value.to(targets.device)
        given |= self._reference(model, rows, inputs)
        packed = "cu_seqlens" in given
        if packed and "ref_hidden" in given:
            given["ref_hidden"] = given["ref_hidden"].flatten(0, 1)

        def fused(hidden: Tensor, head: Head) -> dict[str, Any]:
            hidden = hidden.flatten(0, 1) if packed else hidden
            out = self.objective(hidden, head.weight, targets, **head.kwargs(), denominator=denominator, **given)
            return {"loss": out.loss, "losses": out.losses, "metrics": out.metrics, "counts": out.counts}

        out = model(input_ids=rows[0], attention_mask=rows[1], fused_loss=fused)
        return out["loss"], out["losses"], out["metrics"], out["counts"]

    def _reference(
        self, model: nn.Module, rows: tuple[Tensor, Tensor, Tensor], inputs: dict[str, Tensor]
    ) -> dict[str, Any]:
        """What the objective is told of the reference."""
        if self.reference == "none":
            return {}
        if self._live is None:
            logps = inputs["ref_logps"]
        elif self.objective.needs_reference_hidden:
            return self._live.hidden_states(model, *rows[:2])
        elif self.objective.needs_reference_tokens:
            logps = self._live.token_logps(model, *rows)
        else:
            logps = self._live.logps(model, *rows)
        if self.kind.half is not None:
            if logps.dim() == 2:
                return {"ref_logps": logps.flatten()}
            halves = (logps, torch.zeros_like(logps))
            logps = torch.cat(halves[::-1] if self.kind.half else halves)
        return {"ref_logps": logps}

    @cached_property
    def _value(self) -> Tensor:
        """The value of a prompt where the data set has none: the mean reward, () float32."""
        dataset = self.eval_dataset if self.train_dataset is None else self.train_dataset
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        return torch.tensor(dataset["reward"]).float().mean()

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        state = self.objective.state_dict()
        if self._estimates_kl:
            self.objective.state.pop("kl", None)
            self._estimate_kl(self.model_wrapped, (self._without_repeats(batch) for batch in dataloader))
        output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.objective.load_state_dict(state)
        return output

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check_parallelism(self) -> None:
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("tensor, context and sequence parallelism split what one loss needs; use data parallelism")
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and self.reference in ("copy", "cached"):
            raise ValueError(
                f"reference={self.reference!r} needs the whole model on every rank, which FSDP and DeepSpeed do not "
                'keep: use LoRA with reference="adapter"'
            )

    def _check_head(self, row: dict[str, Any]) -> None:
        completion = row[self.kind.encoded[1]]
        completion = completion[0] if self.kind.listed else completion
        check_head(self.model, row["prompt_ids"] + completion, self.args.device, self.args.backend)


def check_head(model: nn.Module, ids: list[int], device: torch.device, backend: str) -> None:
    """Refuse a model whose own logits are not what the fused head makes of its hidden states; ids: of any text."""
    tokens = torch.tensor([ids[: _PROBE_TOKENS + 1]], device=device)
    inputs = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
    targets = tokens[:, 1:]

    def fused(hidden: Tensor, head: Head) -> Tensor:
        if hidden.shape[:2] != targets.shape:
            raise ValueError(
                f"expected one hidden state a token, {tuple(targets.shape)}, got {tuple(hidden.shape[:2])}: "
                "the model or its adapter adds positions of its own, which is not supported"
            )
        return token_logps(hidden, head.weight, targets, **head.kwargs(), backend=backend)

    with evaluating(model):
        logps = model(**inputs, fused_loss=fused)
        logits = model(**inputs).logits  # (1, 8, V)
    expected = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    tolerance = 1e-3 + torch.finfo(logits.dtype).eps * float(logits.float().abs().max())
    if not bool(logits.isfinite().all()):
        broken = next((n for n, p in model.named_parameters() if not bool(p.isfinite().all())), None)
        raise ValueError(
            "the model's logits are not finite"
            + (f": {broken} holds NaN or an infinity; " if broken else f" in {logits.dtype}; ")
            + "use a model that was saved before it diverged, or load it in float32"
        )
    difference = float((logps - expected).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"{type(causal_lm(model)).__name__} does more to its logits than a linear head with bias, scale "
            f"and softcap: log-probs from hidden states differ from the model's own by {difference:.3g} (at most "
            f"{tolerance:.3g} is rounding). Training would be silently wrong, so it is refused"
        )


def save_objective(objective: Objective, folder: str | Path) -> None:
    """Write what the objective remembers into a checkpoint; nothing where it remembers nothing."""
    remembered = objective.state_dict()
    if remembered:
        torch.save({name: x.cpu() for name, x in remembered.items()}, Path(folder) / STATE_FILE)


@contextlib.contextmanager
def reading(folder: str) -> Iterator[None]:
    """Raise ValueError, naming the checkpoint, for what torch and safetensors raise of files that are broken or do not fit."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError, EOFError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"cannot go on from {folder}: it is broken, or of another model ({' '.join(lines[-1].split())}); name another "
            "checkpoint, or begin anew"
        ) from error


def _move(source: Path, target: Path, names: Iterable[str]) -> None:
    """Move files and folders, in place of what is there under their names."""
    for name in names:
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        os.replace(source / name, target / name)


def _check_trains(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"nothing would be trained: each of the model's {len(parameters)} parameters is frozen (requires_grad is False), as "
            "after merging an adapter; call model.requires_grad_(True), or pass a peft_config"
        )


def check_rows(model: nn.Module, tokenizer: Any, encoded: datasets.Dataset, *sources: Any) -> None:
    """Refuse, by name, a token id that the model has no embedding for.

    sources: what `encoded` was made of; the first one with a row for each of its rows, and `where` that stands, is quoted.
    """
    from pyarrow.compute import max as maximum  # pyright: ignore[reportAttributeAccessIssue]

    for name in (n for n in encoded.column_names if n.endswith("_ids")):
        column: Any = encoded.with_format("arrow").select_columns([name])
        highest = -1
        for table in column.iter(batch_size=_CHECKED_AT_ONCE):
            ids: Any = table[name].combine_chunks()
            while hasattr(ids.type, "value_type"):
                ids = ids.flatten()
            highest = max(highest, maximum(ids).as_py() or 0)
        if highest >= embeddings(model):
            rows: Any = encoded.select_columns([name])
            for i, row in enumerate(rows):
                found = row[name]
                flat = [x for part in found for x in (part if isinstance(part, list) else [part])]
                check_ids(model, tokenizer, flat, _place(i, len(encoded), sources))
    check_ids(model, tokenizer, [tokenizer.pad_token_id], "the padding token")


def _place(i: int, count: int, sources: Iterable[Any]) -> str:
    for rows in sources:
        if isinstance(rows, datasets.Dataset) and "where" in rows.column_names and len(rows) == count:
            return rows[i]["where"]
    return f"row {i}"


def with_lengths(dataset: Any, args: TrainingArguments) -> Any:
    """An encoded data set with the column that batches of rows of like length are made by, where args ask for them."""
    name = args.length_column_name
    if args.train_sampling_strategy in ("random", "sequential") or name in dataset.column_names:
        return dataset
    return data.with_column(dataset, name, [row_tokens(row) for row in dataset])


def each(dataset: Any, fn: Any) -> Any:
    """fn of a data set, or of each of a dict of them."""
    if isinstance(dataset, dict) and not isinstance(dataset, datasets.DatasetDict):
        return {name: fn(one) for name, one in dataset.items()}
    return fn(dataset)


def layout(kind: Kind, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Return targets as the objective takes them, and how: pairs of which one half is read have an empty other half."""
    targets = inputs["targets"]
    if kind.listed:
        lists = inputs["list_lengths"].shape[0]
        return targets, {"list_size": targets.shape[0] // max(lists, 1)}
    if kind.half is None:
        return targets, {}
    count, length = targets.shape
    lengths = torch.zeros(2, count, dtype=torch.int64, device=targets.device)
    lengths[kind.half] = length
    ends = lengths.flatten().cumsum(0)
    return targets.flatten(), {"cu_seqlens": torch.cat([ends.new_zeros(1), ends])}


def with_tokenizer(
    model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model, loaded if it is a name, and its tokenizer, which pads with EOS if it has nothing else."""
    if isinstance(model, str):
        model, own = load_model(model)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise ValueError("the trainer needs the model's tokenizer: pass processing_class=tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def ready(model: nn.Module, args: TrainingArguments, peft_config: Any) -> nn.Module:
    """The model as it is trained: with an adapter if one is asked for, and with the fused loss."""
    if peft_config is not None:
        set_seed(args.seed)  # the adapter begins at random, before Trainer would see to that
        model = with_adapter(model, peft_config)
    install_fused_loss(model)
    warn_of_lost_updates(model, args)
    mixed = [torch.bfloat16] * args.bf16 + [torch.float16] * args.fp16
    for dtype in (next(model.parameters()).dtype, *mixed):
        warn_if_slow(dtype, args.device)
    return model


def with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs peft: pip install 'xpo-fast[train]'") from error
    if hasattr(model, "disable_adapter"):
        raise ValueError(
            "the model carries an adapter already: pass it without peft_config, or merge the adapter first"
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(f"{type(peft_config).__name__} adds positions of its own, which is not supported; use LoRA")
    try:
        return get_peft_model(model, peft_config)  # type: ignore[arg-type]
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"{error} Its linear modules are {', '.join(linear)}") from error


def warn_of_trained_adapter(model: nn.Module, reference: str) -> None:
    """A reference that is the model with its adapter off is not the model as handed over where that adapter has learned."""
    if reference != "adapter":
        return
    trained = any(".lora_B." in name and bool(p.any()) for name, p in model.named_parameters())
    if trained:
        warnings.warn(
            "the model carries an adapter that is not zero, and the reference is the model with its adapter off: its base, not "
            "the model as handed over. To compare with that, merge the adapter (model.merge_and_unload()) and pass a "
            "peft_config for a new one",
            stacklevel=3,
        )


def warn_of_lost_updates(model: nn.Module, args: TrainingArguments) -> None:
    """Adam moves a weight by about the learning rate; under half a step of its dtype, that is no move at all."""
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if trained and args.learning_rate < 1e-5:
        warnings.warn(
            f"{sum(p.numel() for p in trained):,} weights in {trained[0].dtype} are trained with a learning rate of "
            f"{args.learning_rate:g}: most updates round to nothing. Load the model in float32 and set bf16=True "
            "(mixed precision), or use LoRA",
            stacklevel=3,
        )
