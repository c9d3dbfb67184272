"""The trainer that all trainers here build on: `transformers.Trainer` for losses that are sums over units.

Losses are divided by the items of the whole optimizer step (all micro-batches, all ranks), metrics are averaged over
the same, and a checkpoint or a saved model appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import datasets  # noqa: F401  # which every trainer needs
    from accelerate.utils import AutocastKwargs
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
    from transformers import TrainerCallback as TrainerCallback
    from transformers import set_seed as set_seed
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(f"the trainer needs more packages: pip install 'xpo-fast[train]' ({error})") from error

from ..data import IGNORE_INDEX, Kind
from ..files import SavingError, saving
from ..layouts.inputs import FORWARDS
from ..models import note_name, saving_embeddings
from ..reduce import sum_over_ranks
from ..resume import OF_THE_OPTIMIZER, check_made_with, last_checkpoint, made_with_of, write_made_with
from ..seeds import draws_by
from .arguments import check_trainer_arguments, let_ddp_find_unused_parameters
from .budget import Units, entries
from .checkpoints import (
    check_bases_stay,
    check_room,
    load_renamed,
    reading,
    replace_model,
    replacing,
    trained_at_root,
    unsaved,
)
from .cutting import CutsBatches
from .findings import Report
from .handed_over import adapter_settings
from .in_backward import StepsInBackward, check_in_backward
from .means import Means
from .offload import CudaCopies, check_offload, offloading
from .optimizers import LOMO, check_optimizer, name_of
from .record import findings, memory
from .setup import check_trainable
from .sharding import PROCESSES, ComputesInParts, processes_of, written_by_others
from .throughput import Throughput
from .watching import WatchesSignal

_UNSAVED = (
    "{} weights, such as {}, are trained beside the adapter and are not saved with it, neither in checkpoints nor by "
    "save_model: name their modules in the adapter's modules_to_save, or save the model with merge_and_unload()"
)
_LOSS = "loss of method "  # prefix among the means of an evaluation
_IN_FRONT = "row in front"  # of a checkpoint's settings: the row that is in the first step whatever the seed


class UnitTrainer(ComputesInParts, WatchesSignal, CutsBatches):
    """Trainer whose loss is a sum over units, divided by the items of the whole optimizer step; so are its metrics.

    Subclasses define `kind` (of their data set; None if each row is a unit), `_items` (the loss's denominator for a
    batch) and `_loss`. Batches have `targets`; a row without a target does not count.
    """

    # compute_loss divides by the items of the whole step, so Trainer must not divide by the micro-batches again.
    loss_is_scaled_for_ga = True

    kind: Kind | None = None
    loss_weights: Sequence[float] = (1.0,)  # of the losses that `_loss` returns one by one
    model: Any
    model_wrapped: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, **kwargs: Any) -> None:
        check_trainer_arguments(kwargs)
        let_ddp_find_unused_parameters(kwargs["model"], kwargs["args"])
        super().__init__(**kwargs)
        self.split_rows()
        self.check_sharding()
        self._check_levers(kwargs)
        accelerator: Any = self.accelerator
        if self.args.gradient_checkpointing and accelerator.autocast_handler is None:
            # A layer's weights in 16 bits go with the layer; autocast's cache would hold all of them in the forward.
            accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.train_dataset is not None:
            if apart := unsaved(self.model):
                warnings.warn(_UNSAVED.format(len(apart), apart[0]), stacklevel=3)
            active = getattr(self.model, "active_adapters", ()) if hasattr(self.model, "disable_adapter") else ()
            if len(active) > 1:
                warnings.warn(
                    f"{len(active)} adapters are active together ({', '.join(active)}), and each is saved in a folder "
                    "of its own, none of which is the trained model: save it with merge_and_unload()",
                    stacklevel=3,
                )
        self._eval_means = Means()
        self.given: dict[str, Any] = {}  # added to `made_with` by the caller
        self.report: Report | None = None  # of `preflight`
        self._missing: list[str] = []  # names of weights that were not found in a checkpoint
        self._in_backward: StepsInBackward | None = None  # while it trains with optimizer_in_backward

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings that a resumed run must share with this one; written into every checkpoint, see resume.py."""
        args, template = self.args, str(getattr(self.processing_class, "chat_template", None))
        return {
            "trainer": type(self).__name__,
            "chat template": hashlib.sha256(template.encode()).hexdigest()[:16],
            "adapter": adapter_settings(self.model),
            "rows per step": args.per_device_train_batch_size * args.gradient_accumulation_steps * self.replicas,
            **{name: getattr(args, name) for name in OF_THE_OPTIMIZER},
            "seed": args.seed,
            _IN_FRONT: self.in_front,
            **processes_of(self.accelerator),
            **self.given,
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as Trainer does, after the check that args.preflight asks for (`preflight`, once).

        resume_from_checkpoint: a checkpoint, or True for the last complete one in args.output_dir. Raises ValueError
        if every weight is frozen, if the checkpoint is broken or was made with other settings, if the disk has no room
        for a checkpoint, or for a fault that the check finds with args.preflight "stop".
        """
        check_trainable(self.model)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint is None and self.args.resume_from_checkpoint:
            raise ValueError(
                f"args.resume_from_checkpoint={self.args.resume_from_checkpoint!r} is for the script: pass it on, "
                "train(resume_from_checkpoint=args.resume_from_checkpoint)"
            )
        if resume_from_checkpoint and (apart := unsaved(self.model)):
            raise ValueError(
                f"{resume_from_checkpoint} is not the whole model: {_UNSAVED.format(len(apart), apart[0])}"
            )
        if resume_from_checkpoint:
            made_with = made_with_of(resume_from_checkpoint)
            written_by_others(resume_from_checkpoint, self.accelerator)
            self.in_front = made_with.get(_IN_FRONT)
            check_made_with(resume_from_checkpoint, {k: v for k, v in self.made_with.items() if k != PROCESSES})
        check_bases_stay(self.model, Path(str(self.args.output_dir)))
        strategy = str(getattr(self.args.save_strategy, "value", self.args.save_strategy))
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if strategy != "no" and self.args.should_save and not sharded:
            check_room(self.model, self.args)
        if not hasattr(self.model, "peft_config"):
            self.model.name_or_path = ""  # peft's name for it in later adapters: what it names is no longer this model
        self._throughput = Throughput(self.args.device)
        self._prepare_to_train(resume_from_checkpoint or None)
        self._settle_first(resumed=bool(resume_from_checkpoint))
        self._check_before_training()
        alone = self.args.world_size == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not alone and self.model_wrapped is self.model and vars(self.model).pop("_is_accelerate_prepared", False):
            # An evaluation has prepared the model; accelerate would leave it at that, and each process train alone.
            self.accelerator._models.remove(self.model)
        if self._ready is not None:
            self._ready.release()
        with self._levers(), self.rows_split():
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _check_levers(self, given: dict[str, Any]) -> None:
        """Raises ValueError if the optimizer or a lever of memory cannot be had. given: to this trainer."""
        own = given.get("optimizer_cls_and_kwargs") is not None or any(given.get("optimizers") or ())
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self._asked("activation_offload"):
            check_offload(self.args, sharded=sharded)
        if self._asked("optimizer_in_backward"):
            check_in_backward(self.args, sharded=sharded)
            if own:
                raise ValueError("optimizer_in_backward makes the optimizer of optim=: leave the trainer's own out")
        self._in_its_state = [] if self.train_dataset is None or own else check_optimizer(self.args, self.model)

    def _asked(self, lever: str) -> bool:
        return bool(getattr(self.args, lever, False))

    @contextlib.contextmanager
    def _levers(self) -> Iterator[None]:
        """Trains with activations on the host and steps in the backward, if args ask for that."""
        with contextlib.ExitStack() as stack:
            if self._asked("activation_offload"):
                stack.enter_context(offloading(self.model, CudaCopies(self.args.device)))
            try:
                yield
            finally:
                if self._in_backward is not None:
                    self._in_backward.close()
                    self._in_backward = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs forward and backward of a micro-batch as Trainer does; with args.optimizer_in_backward the step, too."""
        if not self._asked("optimizer_in_backward"):
            return super().training_step(model, inputs, num_items_in_batch)
        if self._in_backward is None:
            self._in_backward = StepsInBackward(self.optimizer)
        with self._in_backward.stepping():
            return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._in_backward is not None:
            return self._in_backward.norm()
        if name_of(self.args.optim) in LOMO:
            return None  # the gradients are gone
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _prepare_to_train(self, checkpoint: str | None) -> None:
        """Does what must be done before the first step, or before training goes on from a checkpoint."""

    def preflight(self) -> Report | None:
        """Checks the run without training; returns and keeps what was found. None: this trainer has no check."""
        return None

    def _check_before_training(self) -> None:
        """Runs `preflight`, unless it has been run, on every process; one of them logs what it finds."""
        asked = getattr(self.args, "preflight", "off")
        if asked == "off":
            return
        before, report = self.report, self.report or self.preflight()
        if report is None:
            return
        if before is None and self.is_world_process_zero():
            report.log()
        if asked == "stop":
            report.raise_for_faults()

    def record(self) -> dict[str, Any]:
        """Returns what the check before training found, and, once there was a step, throughput and memory by owner.

        As JSON values, of this process except for the throughput; `xpo-fast report` shows them.
        """
        found: dict[str, Any] = {"preflight": findings(self.report)}
        if self.state.global_step:
            unwrapped: Any = self.accelerator.unwrap_model(self.model)
            found["throughput"] = self._throughput.totals()
            found["memory"] = memory(unwrapped, self.optimizer, self.args.device)
        return found

    def _items(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns what the loss of a batch is divided by: (), or one entry per loss."""
        raise NotImplementedError

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], denominator: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        """Returns the sum of losses over `denominator`, with a graph; each loss of it; metrics; their counts."""
        raise NotImplementedError

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # Trainer's own casts floats to DeepSpeed's dtype: a log-prob of −200 in bfloat16 is off by up to half a nat.
        return {name: value.to(self.args.device) for name, value in inputs.items()}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Returns the items of the whole optimizer step, all micro-batches of all ranks: (), or one entry per loss."""
        if not batch_samples:
            return None
        items = torch.stack([self._items(batch) for batch in batch_samples]).sum(dim=0)
        return sum_over_ranks(items.to(device)).clamp(min=1)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Returns the micro-batches of the next step and their items; rows that only fill up the ranks do not count."""
        self._throughput.begin()
        drawn = list(map(self._without_repeats, islice(epoch_iterator, num_batches)))
        batches = self._micro_batches(drawn)
        self.check_same_rows(batches)
        items = self._get_num_items_in_batch(batches, device)
        if not batches:
            return [], items
        self._count_tokens(batches, sum(x.padded for x in drawn) if self.budget else None)
        batches = self._begin_step(batches)
        return (entries(batches, len(drawn)) if self.budget else batches), items

    def _begin_step(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Does what a step needs before its first micro-batch; returns its micro-batches."""
        return batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Computes the loss of a micro-batch and adds its metrics to those of the next log."""
        loss, _, metrics, counts = self._loss(model, inputs, num_items_in_batch)
        if model.training:
            self._means.add(metrics, counts)
            self.watch.add(loss, metrics, counts)
        # Data parallelism averages gradients over the ranks, and Trainer the losses it logs: both are sums here.
        loss = self.of_all_rows(loss)
        return (loss, metrics) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as Trainer does, with draws that follow from args.seed alone and leave training's as they were."""
        with draws_by(self.args.seed, self.args.device), self.rows_split():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts as Trainer does, with draws as in `evaluate`."""
        with draws_by(self.args.seed, self.args.device), self.rows_split():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluates as Trainer does; loss and metrics are means over the units of the whole data set."""
        self.make_ready()
        self._eval_means = Means()
        output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop()
        losses = [means.pop(name) for k in range(len(self.loss_weights)) if (name := f"{_LOSS}{k}") in means]
        if losses:
            means["loss"] = sum(w * x for w, x in zip(self.loss_weights, losses, strict=True))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Computes the loss of an evaluation's batch and adds its metrics to those of the evaluation."""
        loss = torch.zeros((), device=self.args.device)
        for batch in map(self._prepare_inputs, self._micro_batches([self._without_repeats(inputs)])):
            items = self._items(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, losses, metrics, counts = self._loss(model, batch, items.clamp(min=1))
            named = {f"{_LOSS}{k}": x for k, x in enumerate(losses)}
            weights = dict(zip(named, items.view(-1), strict=True))
            self._eval_means.add({**metrics, **named}, {**counts, **weights})
        return loss.detach(), None, None  # `evaluation_loop` has the mean of all

    def _without_repeats(self, inputs: Any) -> Any:
        """Removes the targets of the rows that fill the last batches up to equal sizes on all ranks.

        Must be called when the batch has just come from the data loader, which then knows whether it is the last.
        """
        state, ranks = self.accelerator.gradient_state, self.replicas
        if ranks == 1 or not state.end_of_dataloader:
            return inputs
        listed, completions = "list_lengths" in inputs if isinstance(inputs, dict) else False, 1
        if isinstance(inputs, Units):
            units = len(inputs.drawn)
        else:
            completions = len(self.kind.completions) if self.kind else 1
            units = len(inputs["list_lengths" if listed else "targets"]) // completions
        remainder = state.remainder
        if remainder < 0 and not self.args.dataloader_drop_last:
            # accelerate's loader of a resumed epoch, which skips batches, does not know it.
            loader: Any = state.active_dataloader
            remainder = len(loader.dataset) % (units * ranks)
        if remainder <= 0:
            return inputs
        distinct = remainder - self.replica * units
        if isinstance(inputs, Units):
            return Units(inputs.drawn, min(max(distinct, 0), units))
        inputs = dict(inputs)
        for name in (of + "targets" for of in FORWARDS):
            if name in inputs:
                at = torch.arange(len(inputs[name]), device=inputs[name].device)
                at = at // (len(at) // units) if listed else at % units
                inputs[name] = inputs[name].masked_fill((at >= distinct)[:, None], IGNORE_INDEX)
        return inputs

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, complete or not at all; SavingError names the last complete one, which stays."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writes = self.args.should_save
        try:
            with self._throughput.paused(), replacing(folder) if writes else contextlib.nullcontext():
                self.accelerator.wait_for_everyone()
                with saving(folder):
                    if writes:
                        self._save_extra_files(folder)
                    super()._save_checkpoint(model, trial)
        except SavingError as error:
            error.checkpoint = last_checkpoint(folder.parent)
            raise

    def _save_extra_files(self, folder: Path) -> None:
        """Writes the files of a checkpoint that transformers does not know, before its own; called on one rank only."""
        folder.mkdir(parents=True, exist_ok=True)
        write_made_with(folder, self.made_with)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with saving_embeddings(self.model):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model into a folder beside what is there: all of its files, or, if one cannot be written, none.

        Weights and adapters of another model in the folder are deleted, for they might be read in place of this one;
        the base model of the adapter stays.
        """
        if _internal_call:  # into a checkpoint, which appears complete or not at all itself
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        new, earlier = folder / ".model.part", folder / ".model.before"
        check_bases_stay(self.model, folder)
        try:
            with saving(folder):
                super().save_model(str(new), _internal_call=True)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    trained_at_root(new, self.model)
                    replace_model(folder, new, earlier, self.model)
            if not hasattr(self.model, "peft_config"):
                note_name(self.model, str(folder))
        except SavingError as error:
            error.checkpoint = last_checkpoint(str(self.args.output_dir))
            raise
        finally:
            if self.args.should_save:
                shutil.rmtree(new, ignore_errors=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint):
            self._missing = []
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_renamed(self.model, resume_from_checkpoint, self._missing)
        for name, p in self.model.named_parameters():
            if p.requires_grad and not bool(p.isfinite().all()):
                raise ValueError(
                    f"{resume_from_checkpoint} holds NaN or an infinity in {name}: the run had diverged when it was "
                    "written; go on from an earlier checkpoint, or begin anew with a smaller learning rate"
                )

    def _run_epoch(self, **kwargs: Any) -> None:
        # Trainer asks after a step whether it was the last: resumed from the last one's checkpoint, it takes another.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _load_best_model(self) -> None:
        self._missing = []
        super()._load_best_model()
        load_renamed(self.model, str(self.state.best_model_checkpoint), self._missing)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._issue_warnings_after_load(load_result)
        else:
            self._missing = load_result.missing_keys  # for `load_renamed`, which finds or names them

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)), torch.serialization.safe_globals([*self._in_its_state]):
            super()._load_optimizer_and_scheduler(checkpoint)
            groups = getattr(self.optimizer, "param_groups", [])
            names = {*getattr(self.optimizer, "defaults", {})} - {"differentiable"}  # which torch adds when it loads
            for name in sorted(names) if checkpoint else ():
                if any(name not in group for group in groups):  # the first step would need it
                    raise RuntimeError(f"its optimizer has no {name}, which the one asked for has")
