"""TRL's DPOTrainer with the pairwise methods of this project as loss types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer import dpo_config, dpo_trainer, utils

from ...head import shift_labels, token_logps
from ...methods import METHODS
from ...models import Head, no_router_loss
from ...objective import Objective
from ...seeds import draws_by
from ...trainer import load_objective, save_objective
from .base import IGNORE, NOT_FUSED, check_version, take_losses, without_virtual
from .seams import in_layout

# TRL's loss types. Where a method of this project has the same name, the loss is TRL's.
DPO_LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
_PREFIX = "xpo:"


@dataclass
class DPOConfig(dpo_config.DPOConfig):
    """TRL's DPOConfig, whose `loss_type` may also name pairwise methods of `xpo_fast.METHODS`.

    A name that both have is TRL's loss ("ipo"); with the prefix "xpo:" it is this project's ("xpo:ipo"). Losses of both
    cannot be combined. `loss_weights`, `ld_alpha` and `use_weighting` (WPO) act on these methods as on TRL's losses.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*dpo_config.DPOConfig._VALID_DICT_FIELDS, "hyperparameters"]

    beta: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "β (default: that of the method; 0.1 for TRL's losses)."}
    )
    hyperparameters: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Hyperparameters of this project's methods, in the form that `xpo_fast.Objective` takes."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _own_methods(self.loss_type):
            if self.hyperparameters:
                raise ValueError(
                    f"hyperparameters are those of this project's methods, and {', '.join(self.loss_type)} is TRL's, "
                    f"which takes its own fields; {_PREFIX}NAME is this project's where both have one"
                )
            if self.beta is None:
                self.beta = dpo_config.DPOConfig.beta


class DPOTrainer(dpo_trainer.DPOTrainer):
    """TRL's DPOTrainer, with the pairwise methods of this project as loss types, see `DPOConfig`.

    Such a loss is computed by `xpo_fast.Objective` inside the model's forward: 3F with a trainable head, where
    log-probs and then the loss of them take 4F. Its reference is TRL's: a reference model, the adapter disabled or kept
    as "ref", or `precompute_ref_log_probs`; a method that needs no reference loads none. Columns of the data set that a
    method takes by name (`score_w`, `score_l`, `prob_w`, …) are passed to it. Logged are the method's metrics and
    `num_tokens`; not `entropy`, `logits/*` and `mean_token_accuracy`, which would cost another pass. The state of
    `beta_dpo` is part of the checkpoints.

    Raises ValueError at the start for a loss type that neither knows, hyperparameters out of range or of none of its
    methods, a missing column, a reference for a method without one, images, and precomputed log-probs of the reference
    for a method that compares single tokens. An evaluation draws by the seed, and leaves what training draws and
    remembers as it was.
    """

    model: Any
    accelerator: Any
    args: Any
    objective: Objective | None = None
    _columns: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: dpo_config.DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        check_version()
        if args is not None and _own_methods(args.loss_type):
            self.objective = objective_of(args)
            self.objective.rehearse()
            if self.objective.reads_topk:
                raise ValueError(
                    "topk_kl reads a teacher's likeliest tokens of one completion, which pairs have no column for: "
                    "train by xpo_fast.trainer.XPOTrainer"
                )
            _ = self.objective.data_kind  # which raises for what no data set can teach
            self._columns = _columns(self.objective, train_dataset, eval_dataset)
            if not self.objective.needs_reference:
                given = {"ref_model=": ref_model is not None, "precompute_ref_log_probs": args.precompute_ref_log_probs}
                if any(given.values()):
                    idle = " and ".join(name for name, there in given.items() if there)
                    raise ValueError(f"{self.objective} compares with no reference: leave out {idle}")
                ref_model = _NoModel()
        fused = self.objective is None or (args is not None and args.precompute_ref_log_probs)
        token = NOT_FUSED.set(not fused)
        try:
            super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *rest, **kwargs)
        finally:
            NOT_FUSED.reset(token)
        if self.objective is None:
            return
        self._check_objective(self.objective)
        take_losses(self, router_loss=True)
        if self._columns:
            self.data_collator = _WithColumns(self.data_collator, self._columns)
        self.add_callback(_SaveState(self.objective))

    @property
    def ref_model(self) -> Any:
        """Returns TRL's reference model; None if it has none."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        self._ref_model = None if isinstance(model, _NoModel) else model

    def _check_objective(self, objective: Objective) -> None:
        """Raises ValueError for settings that do not go with an objective."""
        refused = {
            "data with images": self._is_vision_dataset,
            "precompute_ref_log_probs, for it compares single tokens": (
                self.precompute_ref_logps and objective.needs_reference_tokens
            ),
            "sync_ref_model, for it has no reference": self.args.sync_ref_model and not objective.needs_reference,
            "a sharded reference, for it compares whole distributions": (
                objective.needs_reference_hidden and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            ),
        }
        for what, found in refused.items():
            if found:
                raise ValueError(f"{objective} does not go with {what}")
        if objective.needs_reference_hidden and self._reference_head().adapter is not None:
            raise ValueError(
                f"{objective} compares whole distributions, and the reference's lm_head carries an adapter: merge "
                "that one first, or take lm_head out of its target_modules"
            )

    @torch.no_grad()
    def _reference_head(self) -> Head:
        """Returns the head that `compute_ref_log_probs` uses at each step."""
        unwrap = self.accelerator.unwrap_model
        if self.ref_model is not None or not is_peft_model(unwrap(self.model)):
            return Head.from_model(unwrap(self.ref_model or self.model))
        model = unwrap(self.model)
        with utils.use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return Head.from_model(model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self._columns]))

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Returns TRL's log-probs of the reference, of inputs without the columns that are for the method."""
        return super().compute_ref_log_probs(model, {k: x for k, x in inputs.items() if k not in self._columns})

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        objective = self.objective
        if objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        mode = "train" if self.model.training else "eval"
        own = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", *self._columns}
        arguments = {k: x for k, x in inputs.items() if k not in own}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        targets = shift_labels(labels)  # (2P, T)
        known = {name: inputs[name] for name in self._columns} | self._reference(inputs, targets)

        def loss_of(hidden: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
            out = objective(without_virtual(hidden, targets), head, targets, **known)
            return out.loss, out.metrics

        routed = {"output_router_logits": True} if self.aux_loss_enabled else no_router_loss(self.model)
        with in_layout(self.model, arguments | routed, targets):
            found = model(**arguments, fused_loss=loss_of, **routed)
        (loss, metrics), aux_loss = found if self.aux_loss_enabled else (found, None)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            metrics = {**metrics, "aux_loss": aux_loss.detach()}
        found = self.accelerator.gather(torch.stack(list(metrics.values()))[None]).nanmean(0)
        for name, x in zip(metrics, found.tolist(), strict=True):
            if x == x:
                self._metrics[mode][name].append(x)
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**arguments)

    def _reference(self, inputs: dict[str, Any], targets: Tensor) -> dict[str, Any]:
        """Returns the objective's arguments of the reference, which runs as in `compute_ref_log_probs`."""
        objective = self.objective
        assert objective is not None
        if not objective.needs_reference:
            return {}
        if self.precompute_ref_logps:
            return {"ref_logps": torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])}
        model = self.model if self.ref_model is None else self.ref_model
        found: dict[str, Any] = {}

        def reference_of(hidden: Tensor, head: Head) -> Tensor:
            hidden = without_virtual(hidden, targets)
            if objective.needs_reference_hidden:
                found.update(ref_hidden=hidden, ref_weight=head)
                return hidden
            found["ref_logps"] = token_logps(hidden, head, targets)
            return found["ref_logps"]

        def run(*, labels: Tensor, fused_lm_head: bool, **arguments: Any) -> Any:
            with in_layout(model, arguments, targets):
                model(**arguments, fused_loss=reference_of, **no_router_loss(model))
            return utils.FusedCausalLMOutput(log_probs=labels.new_zeros(labels[:, 1:].shape, dtype=torch.float32))

        self.compute_ref_log_probs(run, inputs)
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as TRL does; what an objective remembers and draws in training stays as it was."""
        if self.objective is None:
            return super().evaluation_loop(*args, **kwargs)
        state = self.objective.state_dict()
        try:
            with draws_by(self.args.seed, self.args.device):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self.objective.load_state_dict(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.objective is not None:
            load_objective(self.objective, resume_from_checkpoint, self.args.device)


class _SaveState(TrainerCallback):
    """Writes the state of the objective into every checkpoint."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes it into the checkpoint that was just saved, on the first rank."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_objective(self.objective, folder)


def objective_of(args: dpo_config.DPOConfig) -> Objective:
    """Returns the objective of a DPOConfig whose loss types are methods of this project."""
    options: dict[str, Any] = {"weights": args.loss_weights, "ld_alpha": args.ld_alpha}
    if args.use_weighting:
        options |= {"wpo": True, "clamp": False}
    tau = None if args.discopop_tau == dpo_config.DPOConfig.discopop_tau else args.discopop_tau
    given = {"beta": args.beta, "label_smoothing": args.label_smoothing or None, "tau": tau}
    options |= {name: x for name, x in given.items() if x is not None}
    own = getattr(args, "hyperparameters", None) or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"expected hyperparameters as a dict, or as JSON that begins with {{, got {own!r}")
    return Objective(list(_own_methods(args.loss_type)), **{**options, **own})


def _own_methods(loss_types: Sequence[str]) -> tuple[str, ...]:
    """Returns the methods of this project among loss types: all or none. ValueError for unknown and mixed ones."""
    pairwise = [name for name, method in METHODS.items() if method.layout == "pairwise"]
    if not loss_types:
        raise ValueError("expected at least one loss type, got none")
    theirs = [name for name in loss_types if name in DPO_LOSS_TYPES]
    own = [name.removeprefix(_PREFIX) for name in loss_types if name not in DPO_LOSS_TYPES]
    for name in own:
        if name not in pairwise:
            raise ValueError(
                f"no loss type named {name!r}; there are {', '.join(DPO_LOSS_TYPES)} of TRL's and "
                f"{', '.join(pairwise)} of xpo_fast's"
            )
    if theirs and own:
        raise ValueError(
            f"{', '.join(theirs)} of TRL's and {', '.join(own)} of xpo_fast's do not go into one loss"
            + "".join(f"; {_PREFIX}{name} is xpo_fast's {name}" for name in theirs if name in pairwise)
        )
    return tuple(own)


def _columns(objective: Objective, train: Any, evaluation: Any) -> tuple[str, ...]:
    """Returns the columns of the training data that the methods take.

    Raises ValueError for a column that a method needs and the training data lack, and for one of these that the
    evaluation data lack.
    """
    present = set() if train is None else set(next(iter(train)))
    found = []
    for term in objective.terms:
        method = term.method
        remembered = {n for n in method.columns if method.state and method.axes(n) == ("",)}
        for name in method.columns:
            if name in remembered or not method.wants(name, term.hyperparameters):
                continue
            if name in present:
                found.append(name)
            elif name in method.required:
                raise ValueError(
                    f"{method.name} needs the column {name!r}, a number per pair: the data has {sorted(present)}"
                )
    found = tuple(dict.fromkeys(found))
    for dataset in evaluation.values() if isinstance(evaluation, Mapping) else [evaluation]:
        missing = [] if dataset is None else [name for name in found if name not in next(iter(dataset))]
        if missing:
            raise ValueError(
                f"the evaluation's data has no column {', '.join(missing)}, which the training's has: add it, or take "
                "it out of both"
            )
    return found


@dataclass
class _WithColumns:
    """A collator that adds columns of numbers to the batch, (P,) each."""

    collate: Any
    columns: Sequence[str]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = {n: torch.tensor([float(e[n]) for e in examples]) for n in self.columns}
        return {**self.collate(examples), **columns}


class _NoModel:
    """Passed to TRL as the reference model where no loss uses one, so that none is loaded; `ref_model` is then None."""
