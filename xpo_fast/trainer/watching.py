"""Gives a watcher of signal.py the numbers of a run's first steps, and says or stops for what it finds.

The numbers stay on the device until a window of steps ends or a checkpoint is written: a run waits for them twice, and
has ten sums over its ranks, of a handful of numbers each. All ranks see the same numbers, and so decide the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..head.sharded import is_sharded
from ..reduce import sum_over_ranks
from .sharding import sharding_of
from .signal import About, Finding, NoSignalError, Watcher

logger = logging.getLogger("xpo_fast")

# The metrics that are watched.
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
_KEY = "WatchesSignal"  # among the states of a checkpoint's trainer_state.json
_TENSORS, _ELEMENTS = 64, 256  # of the trained weights that are compared, and of each


class WatchesSignal(Trainer):
    """Mixin that says within a run's first steps, once, why it learns nothing, by args.on_no_signal.

    "warn" logs the line; "stop" writes a checkpoint (unless save_strategy is "no"), ends training on all ranks, and
    `train` raises `NoSignalError`, as it does when a run that was stopped is resumed and is still to stop.
    """

    report: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.watch = Watch(self)
        self.add_callback(self.watch)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; raises NoSignalError if the run was stopped because it learns nothing."""
        output = super().train(*args, **kwargs)
        if self.watch.stopped is not None:
            raise self.watch.stopped
        return output

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if (found := self.watch.end_step(grad_norm, kwargs.get("learning_rate"))) is not None:
            self._say(found)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _say(self, found: Finding) -> None:
        step, args = self.state.global_step, self.args
        asked = getattr(args, "on_no_signal", "ignore")
        said = f"no signal after step {step}: {found}"
        if self.is_world_process_zero() and asked == "warn":
            logger.warning("%s", said)
        if self.report is not None:
            self.report.findings.append(found)
        if asked == "stop":
            strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
            folder = None if strategy == "no" else str(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}")
            self.control.should_save = self.control.should_save or folder is not None
            self.control.should_training_stop = True
            self.watch.stopped = _error(said, folder)
        self.watch.line = said

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if kept := self.watch.state_dict():
            states: Any = self.state.stateful_callbacks
            states[_KEY] = {"args": {}, "attributes": kept}
        super()._save_checkpoint(model, trial)


class Watch(TrainerCallback):
    """The numbers of a run's steps, for its `Watcher`. trainer: a `UnitTrainer`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.watcher: Watcher | None = None  # while training, unless what it finds is ignored
        self.stopped: NoSignalError | None = None
        self.line: str | None = None  # what has been said
        self._looks = False  # at the step under way
        self._sums: dict[str, Tensor] = {}  # of its micro-batches: the loss; of each metric (2,), its sum and weight
        self._beside: dict[str, float] = {}  # numbers of it that are known on the host
        self._weights: _Weights | None = None
        self._step = -1  # the last one that was taken

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to watch, or goes on from what the checkpoint says."""
        asked = getattr(args, "on_no_signal", "ignore")
        self.watcher, self.stopped, self.line, self._weights, self._looks = None, None, None, None, False
        self._sums, self._beside, self._step = {}, {}, state.global_step
        if asked == "ignore":
            return
        self.watcher = Watcher(args.learning_rate, state.max_steps, _about(self.trainer))
        kept = (state.stateful_callbacks or {}).get(_KEY) if state.global_step else None
        if kept is not None:
            attributes = dict(kept["attributes"])
            self.line = attributes.pop("line")
            self.watcher.load_state_dict(attributes)
            if self.line is not None and asked == "stop":
                raise _error(self.line, None)
        elif state.global_step:  # of a run that was not watched: its first steps are over
            self.watcher.closed += ["first", "steady"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides whether the step is looked at, and keeps the weights before the first one behind the warm-up."""
        if self.watcher is None:
            return
        rate = self._rate()
        self._looks = self.watcher.looks(rate)
        if self._looks and self._weights is None and self.watcher.warm(rate):
            self._weights = _Weights(self.trainer)

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch: its share of the step's loss (), metrics and what they are means over, () each."""
        if not self._looks:
            return
        parts = {"loss": loss.detach().float()}
        for name in NAMES:
            if name in metrics:
                value, weight = metrics[name].detach().float(), counts[name].float()
                parts[name] = torch.stack([torch.where(weight > 0, value * weight, 0.0), weight])
        self._sums = {name: x + self._sums[name] if name in self._sums else x for name, x in parts.items()}

    def note(self, numbers: Mapping[str, float]) -> None:
        """Adds numbers of the step under way that are the same on all ranks, as those of its rollout."""
        self._beside |= numbers

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks which weights have a gradient."""
        if self._looks and self._weights is not None:
            self._weights.see()

    def end_step(self, grad_norm: Any, rate: float | None) -> Finding | None:
        """Ends a step of the optimizer; returns what is found. Every rank must call it."""
        watcher, step = self.watcher, self.trainer.state.global_step
        if watcher is None or step == self._step:
            return None
        self._step = step
        sums, self._sums = self._sums, {}
        if self.trainer.accelerator.optimizer_step_was_skipped:  # of float16, while its scale is sought
            return None
        rate = math.nan if rate is None else float(rate)
        numbers: dict[str, Any] = {"learning_rate": rate}
        if self._looks:
            numbers |= self._numbers(sums, grad_norm, ends=watcher.ends(rate))
        self._beside = {}
        found = watcher.step(numbers)
        if not watcher.looks(rate):
            self._weights = None
        return found

    def _numbers(self, sums: dict[str, Tensor], grad_norm: Any, *, ends: bool) -> dict[str, Any]:
        device = self.trainer.args.device
        parts = [x.view(-1) for x in sums.values()]
        if ends and self._weights is not None:
            sums, parts = {**sums, "moved": parts[0]}, [*parts, self._weights.moved().to(device)]
        numbers: dict[str, Any] = dict(self._beside)
        if parts:
            summed = sum_over_ranks(torch.cat(parts))
            for name, x in zip(sums, summed.split([len(x) for x in parts]), strict=True):
                numbers[name] = x[0] if len(x) == 1 else x[0] / x[1]  # NaN without any
        if grad_norm is not None:
            norm = grad_norm.full_tensor() if is_sharded(grad_norm) else torch.as_tensor(grad_norm)
            numbers["grad_norm"] = norm.detach().to(device, torch.float32)
        return numbers

    def _rate(self) -> float:
        rate = self.trainer._get_learning_rate()
        return math.nan if rate is None else float(rate)

    def state_dict(self) -> dict[str, Any]:
        """Returns, as JSON values, what a resumed run must know; {} where nothing is watched."""
        return {} if self.watcher is None else {**self.watcher.state_dict(), "line": self.line}


class _Weights:
    """Some elements of some of the weights in training, as they are when it is made."""

    def __init__(self, trainer: Any) -> None:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        # FSDP1 has its weights in another place between steps, DeepSpeed rounds them from others.
        trained = [] if sharding_of(trainer.accelerator) not in ("", "FSDP2") else trained
        self._weights = trained[:: max(len(trained) // _TENSORS, 1)]
        self._before = [_some(p).clone() for p in self._weights]
        self._seen: list[Tensor | None] = [None] * len(self._weights)

    def see(self) -> None:
        """Marks the elements whose gradient is not 0 in the step under way."""
        for k, p in enumerate(self._weights):
            if p.grad is not None:
                here, before = _some(p.grad) != 0, self._seen[k]
                self._seen[k] = here if before is None else here | before

    def moved(self) -> Tensor:
        """Returns the number of elements that have changed, of those marked, and the number of these: (2,) float32.

        Where no gradient was there to be seen, as with an optimizer that frees them, all are looked at.
        """
        count = torch.zeros(2)
        blind = all(seen is None for seen in self._seen)
        for p, before, seen in zip(self._weights, self._before, self._seen, strict=True):
            if seen is None and not blind:
                continue
            marked = torch.ones_like(before, dtype=torch.bool) if seen is None else seen
            changed = (_some(p) != before) & marked
            count = count.to(changed.device) + torch.stack([changed.sum(), marked.sum()])
        return count.float()


def _some(x: Tensor) -> Tensor:
    """Returns some elements of this rank's part of a tensor, from all over it: (≤ 256,)."""
    own: Any = x.detach()
    flat = (own.to_local() if is_sharded(own) else own).reshape(-1)
    return flat[:: max(flat.numel() // _ELEMENTS, 1)][:_ELEMENTS]


def _error(said: str, folder: str | None) -> NoSignalError:
    kept = "" if folder is None else f"; the checkpoint is {folder}"
    return NoSignalError(f"{said}{kept}. Or train all the same, with on_no_signal='warn'", folder)


def _about(trainer: Any) -> About:
    args = trainer.args
    trained = next((p for p in trainer.model.parameters() if p.requires_grad), None)
    terms = getattr(getattr(trainer, "objective", None), "terms", ())
    betas = [float(t.hyperparameters["beta"]) for t in terms if t.hyperparameters.get("beta")]
    return About(
        online=not trainer.reads_rows,
        rewards=", ".join(getattr(getattr(trainer, "rewards", None), "names", ())),
        max_new_tokens=getattr(args, "max_new_tokens", None),
        temperature=getattr(args, "temperature", None),
        masks_cut=getattr(args, "overlong_handling", None) == "mask",
        dtype="torch.float32" if trained is None else str(trained.dtype),
        **({"beta": min(betas)} if betas else {}),
    )
