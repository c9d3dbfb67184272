"""TRL 1.16 on this engine: `install()` for the trainers on its fused head, subclasses for what that does not reach.

    from xpo_fast.integrations.trl import install
    install()            # SFT, DPO, KTO, GRPO, RLOO, AsyncGRPO: log-probs and their statistics are this engine's

`DPOTrainer` with `DPOConfig` is TRL's with the pairwise methods of this project as further `loss_type`s. `CPOTrainer`,
`ORPOTrainer`, `TPOTrainer` and `OnlineDPOTrainer` are TRL's experimental ones without their logits: the same losses and
metrics. These five need no `install()`.

Not reached, and run as they are: GKD, GOLD, SDFT, SDPO and the distillation trainers, which compare whole distributions
of a teacher and a student; A2PO, which makes logits of its own. BCO is no longer in TRL: its pairwise form is DPO's
`bco_pair`, its unpaired one the method `bco` of `xpo_fast.trainer`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..head import shift_labels, token_logps, token_stats
from ..head.autograd import refuse_double_backward, scale_saved, token_stats_backward
from ..head.autograd import token_stats as token_stats_operator
from ..head.plan import check_backend, choose_backend, fit
from ..head.sharded import whole
from ..head.spec import accumulation_dtype, check_operands
from ..lm_head import _read_layer
from ..methods import METHODS
from ..models import install_fused_loss
from ..objective import Objective
from ..types import Head

try:
    import trl
    from transformers import PretrainedConfig
    from trl.kernels import chunked_logprob
    from trl.trainer import (
        dpo_config,
        dpo_trainer,
        grpo_trainer,
        kto_trainer,
        rloo_trainer,
        sft_trainer,
        utils,
    )
except ImportError as error:
    raise ImportError(
        "xpo_fast.integrations.trl needs TRL 1.16: pip install 'xpo-fast[train]' 'trl==1.16.*'"
    ) from error

VERSION = "1.16"
_IGNORE = -100

# --- TRL's function of the head ---------------------------------------------------------------------------------------

# What TRL calls the outputs, and what `token_stats` does. log_probs are always made.
_OUTPUTS = {
    "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "top1",
}  # fmt: skip
_SIGNATURES = (
    (
        chunked_logprob.ChunkedLogProbFunction.forward,
        "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
    ),
    (utils.add_fused_lm_head, "model temperature cast_lm_head_to_fp32 outputs"),
)
_TRAINERS = (sft_trainer, dpo_trainer, kto_trainer, grpo_trainer, rloo_trainer)
# The model whose forward runs, if its head carries an adapter: TRL hands on the weight under it only.
_ADAPTED: ContextVar[Any] = ContextVar("_ADAPTED", default=None)


@dataclass
class HeadFunction:
    """Stands where TRL has `ChunkedLogProbFunction`: the same `apply`, by this engine.

    With a frozen head the gradient is made while the tile is live, 2F, where TRL makes the tile again, 3F; a trainable
    head takes 4F in both (`DPOTrainer` of this module, with this project's methods: 3F). Logits are float32.
    `is_top1` counts a tie for the largest logit as a hit, TRL only if the target is the first of those tied.
    """

    backend: str = "auto"
    tile_bytes: int | None = None
    # Once a gradient of entropy has come, ∂logp/∂hidden is not saved beside it any more: 3F, not 4F.
    entropy_learns: bool = field(default=False, compare=False, repr=False)

    def apply(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,) −100 is ignored
        temperature: float,
        chunk_size: int | None = None,  # TRL's; tiles are of `tile_bytes`
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), (N,) each, None if not in `outputs`.

        The first two are differentiable in hidden, weight and bias.
        """
        names = tuple(ours for theirs, ours in _OUTPUTS.items() if theirs in outputs)
        head = Head(weight, bias, final_logit_softcapping, logit_scale)
        model = _ADAPTED.get()
        if model is not None:
            adapted = Head.from_model(model)
            head = dataclasses.replace(adapted, softcap=head.softcap, logit_scale=head.logit_scale)
        found = self.statistics(head.inputs(hidden), head, targets, names, temperature)
        return found["logp"], *(found.get(name) for name in _OUTPUTS.values())

    def statistics(
        self,
        hidden: Tensor,  # (N, D), as `Head.inputs` makes them
        head: Head,
        targets: Tensor,  # (N,)
        names: tuple[str, ...],
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """logp and the statistics `names` of `token_stats`, in the order of TRL's outputs, (N,) each."""
        if head.adapter is not None:
            options: dict[str, Any] = {"tile_bytes": self.tile_bytes, "backend": self.backend}
            stats = token_stats(
                hidden,
                head.weight,
                targets,
                outputs=names,
                temperature=temperature,
                **head.kwargs(),
                **options,
            )
            return {name: getattr(stats, name) for name in ("logp", *names)}
        scaling = (float(temperature), float(head.softcap or 0.0), float(head.logit_scale))
        weight, bias = whole(weight=head.weight, bias=head.bias)
        grad = torch.is_grad_enabled()
        found = _HeadFunction.apply(hidden, weight, bias, targets, scaling, names, grad, self)
        stats = dict(zip(("logp", *names), found, strict=True))
        if "top1" in stats:
            stats["top1"] = stats["top1"] > 0
        return stats


class _HeadFunction(torch.autograd.Function):
    """The operator of `head/autograd.py` with the entropy's gradient made only if one is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: tuple[float, float, float],
        names: tuple[str, ...],
        grad: bool,
        options: HeadFunction,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needs = tuple(ctx.needs_input_grad[:3]) if grad else (False, False, False)
        save = needs[0] and not any(needs[1:]) and not ("entropy" in names and options.entropy_learns)
        h, w, b = _cast(dtype, hidden, weight, bias)
        check_operands(h, w, targets, b)
        backend = choose_backend(options.backend, w.device)
        check_backend(backend, w.device)
        fp32_bytes = w.numel() * (accumulation_dtype(dtype).itemsize - dtype.itemsize)
        tiling, *_ = fit(
            backend, w.shape[0], dtype, w.device, options.tile_bytes,
            dz=any(needs), dw_bytes=fp32_bytes if needs[1] else 0, tokens=h.shape[0],
        )  # fmt: skip
        ctx.rest = (*scaling, _IGNORE, *tiling, backend)
        logp, _, extra, dlogp = token_stats_operator(
            h, w, b, targets, None, None, None, None, *ctx.rest, ",".join(names), save
        )
        found = dict(zip(names, (row.clone() for row in extra), strict=True))
        ctx.mark_non_differentiable(*(x for name, x in found.items() if name != "entropy"))
        ctx.saves, ctx.dtype, ctx.options = save, dtype, options
        ctx.save_for_backward(hidden, weight, bias, targets, dlogp if save else None, found.get("entropy"))
        return logp, *found.values()

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, *d_rest: Tensor | None) -> tuple:
        refuse_double_backward("the fused head")
        hidden, weight, bias, targets, dlogp, entropy = ctx.saved_tensors
        d_entropy = d_rest[0] if entropy is not None else None  # names are in the order of _OUTPUTS
        if d_entropy is not None:
            ctx.options.entropy_learns = True
        elif ctx.saves:
            grads = None if d_logp is None else scale_saved(dlogp, d_logp.unsqueeze(1)).to(hidden.dtype)
            return grads, *[None] * 7
        upstream = {n: d for n, d in (("logp", d_logp), ("entropy", d_entropy)) if d is not None}
        needs = ctx.needs_input_grad[:3]
        if not upstream or not any(needs):
            return (None,) * 8
        with utils.maybe_gather_lm_head_ctx(weight, bias):
            h, w, b = _cast(ctx.dtype, hidden, weight, bias)
            # A float32 weight under autocast gets its gradient unrounded.
            wide = weight.dtype == accumulation_dtype(ctx.dtype) != ctx.dtype
            d_weight = torch.zeros_like(weight) if needs[1] and wide else None
            found = token_stats_backward(
                h, w, b, targets, None, None, None, d_weight, *ctx.rest,
                list(upstream.values()), ",".join(upstream),
                [] if d_entropy is None else [entropy], "" if d_entropy is None else "entropy",
                *needs,
            )  # fmt: skip
            grads = (found[0], found[1] if d_weight is None else d_weight, found[2])
        operands = (hidden, weight, bias)
        return *(
            g.to(x.dtype) if need else None for g, x, need in zip(grads, operands, needs, strict=True)
        ), *[None] * 5


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.detach().to(dtype) for x in tensors]


def _scores_only_labels(device: torch.device) -> bool:
    """TRL picks the labelled positions out on Triton's devices and scores all others elsewhere, for Neuron's sake."""
    return device.type in ("cpu", "mps") or chunked_logprob._use_triton(device)


# --- LoRA on the head -------------------------------------------------------------------------------------------------


class _AdapterCheck(type):
    """What `isinstance(head, BaseTunerLayer)` asks where TRL refuses any adapter: whether it is one that is not fused."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if _carries_adapter(instance):
            _read_layer(instance, "the model")  # ValueError for one that cannot be fused
        return False


class _UnfusedAdapter(metaclass=_AdapterCheck):
    pass


def _carries_adapter(layer: Any) -> bool:
    """What TRL asks; without PEFT none does."""
    kind = _THEIRS.get((dpo_trainer, "BaseTunerLayer"))
    return kind is not None and isinstance(layer, kind)


def _add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """`trl.trainer.utils.add_fused_lm_head`, whose forward also says whose head it runs where that has an adapter."""
    adapted = _carries_adapter(model.get_output_embeddings())
    if adapted and cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32=True does not go with an adapter on lm_head: samples would not see it"
        )
    chunked = _THEIRS[utils, "add_fused_lm_head"]
    chunked(model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=outputs)
    if adapted:
        model._forward_of_trl = (
            model.forward
        )  # a bound method, not a closure: a deep copy then runs its own weights
        model.forward = MethodType(functools.wraps(type(model).forward)(_forward_with_adapter), model)


def _forward_with_adapter(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
    if not fused_lm_head:
        return self._forward_of_trl(*args, **kwargs)
    if not installed():
        raise ValueError("TRL's own function leaves the adapter on lm_head out: call install() again")
    token = _ADAPTED.set(self)
    try:
        return self._forward_of_trl(*args, fused_lm_head=True, **kwargs)
    finally:
        _ADAPTED.reset(token)


# --- install ----------------------------------------------------------------------------------------------------------

_OURS: dict[Any, Any] = {
    (utils, "_use_triton"): _scores_only_labels,
    **{(module, "add_fused_lm_head"): _add_fused_lm_head for module in (utils, *_TRAINERS)},
    **{(m, "BaseTunerLayer"): _UnfusedAdapter for m in _TRAINERS if hasattr(m, "BaseTunerLayer")},
}
_FUNCTION: Any = (utils, "_ChunkedLogProbFunction")
_THEIRS: dict[Any, Any] = {
    (module, name): getattr(module, name, None) for module, name in (_FUNCTION, *_OURS)
}


class Installed:
    """What `install` returns: nothing to hold on to, but as a context manager it puts back on leaving what was before."""

    def __init__(self, before: Mapping[Any, Any]) -> None:
        self._before = dict(before)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        _put(self._before)


def install(*, backend: str = "auto", tile_bytes: int | None = None) -> Installed:
    """Put this engine behind TRL's fused head, for every trainer of this process that has one, made before or after.

    Replaces `trl.trainer.utils._ChunkedLogProbFunction`, which TRL looks up at each call, and beside it the switch by
    which TRL scores masked positions, too, where there is no Triton. In the SFT, DPO, KTO, GRPO and RLOO trainers made
    from then on, LoRA and DoRA on `lm_head`, which TRL refuses, are fused; other adapters there are refused with the
    reason. A second call changes the options. `uninstall()` undoes it, and so does leaving `with install():`.

    backend, tile_bytes: as `token_stats` has them.
    Raises ValueError for another TRL than 1.16, for one whose functions are not what they were there, and where somebody
    else has replaced them.
    """
    check_version()
    if backend == "dense":
        raise ValueError("the dense backend makes all logits, to be compared with: pass backend='auto'")
    choose_backend(backend, torch.device("cpu"))
    for function, expected in _SIGNATURES:
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            raise ValueError(
                f"{function.__qualname__} of TRL {trl.__version__} takes ({found}), expected ({expected}): "
                f"it is not TRL {VERSION} as released"
            )
    before = {(module, name): getattr(module, name, None) for module, name in _THEIRS}
    for place, now in before.items():
        if now not in (_THEIRS[place], _OURS.get(place)) and not isinstance(now, HeadFunction):
            raise ValueError(
                f"{place[0].__name__}.{place[1]} has been replaced by {now!r}: undo that before, two cannot take the "
                "same seam"
            )
    _put({**_OURS, _FUNCTION: HeadFunction(backend, tile_bytes)})
    return Installed(before)


def uninstall() -> None:
    """Undo `install`; nothing happens if there is nothing to undo."""
    if installed():
        _put(_THEIRS)


def installed() -> bool:
    return isinstance(getattr(*_FUNCTION), HeadFunction)


def check_version() -> None:
    """ValueError unless TRL is the version that this module was written against."""
    if trl.__version__.split(".")[:2] != VERSION.split("."):
        raise ValueError(
            f"expected TRL {VERSION}, got {trl.__version__}, whose internals are not known here: "
            f"pip install 'trl=={VERSION}.*'"
        )


def _put(functions: Mapping[Any, Any]) -> None:
    for (module, name), function in functions.items():
        setattr(module, name, function)


# --- DPO --------------------------------------------------------------------------------------------------------------

# Loss types of TRL's own, whose meaning is TRL's where a method of this project has the same name.
DPO_LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
_PREFIX = "xpo:"


@dataclass
class DPOConfig(dpo_config.DPOConfig):
    """TRL's DPOConfig, whose `loss_type` may also name pairwise methods of `xpo_fast.METHODS`.

    A name that TRL has, too, is TRL's ("ipo"); with "xpo:" before it, it is this project's ("xpo:ipo"). Loss types of both
    do not go together. `loss_weights`, `ld_alpha` and `use_weighting` (WPO) act on these methods as on TRL's losses.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*dpo_config.DPOConfig._VALID_DICT_FIELDS, "hyperparameters"]

    beta: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "β; by default the method's own, 0.1 for TRL's losses."},
    )
    hyperparameters: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Hyperparameters of this project's methods, as `xpo_fast.Objective` takes them."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is None and not _own_methods(self.loss_type):
            self.beta = dpo_config.DPOConfig.beta


class DPOTrainer(dpo_trainer.DPOTrainer):
    """TRL's DPOTrainer, with the pairwise methods of this project as loss types, see `DPOConfig`.

    Such a loss is computed by `xpo_fast.Objective` inside the model's forward: 3F with a trainable head, where log-probs
    first and the loss then take 4F. Its reference is TRL's: a reference model, the adapter switched off or kept as "ref",
    or `precompute_ref_log_probs`. A method that needs none loads none. Columns of the data set that a method takes by name
    (`score_w`, `score_l`, `prob_w`, …) reach it. Logged: the method's metrics, `num_tokens`; not `entropy`, `logits/*` and
    `mean_token_accuracy`, which would cost another pass. What `beta_dpo` remembers is in the checkpoints.

    Raises ValueError at the start for what does not go together: a name that neither knows, hyperparameters out of range, a
    missing column, a mixture-of-experts loss, images, a reference that is precomputed where single tokens are compared.
    """

    model: Any
    ref_model: Any
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
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        check_version()
        if args is not None and _own_methods(args.loss_type):
            self.objective = objective_of(args)
            self.objective.rehearse()
            self._columns = _columns(self.objective, train_dataset)
            if ref_model is None and not self.objective.needs_reference:
                ref_model = _NoModel()
        super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        if self.objective is None:
            return
        if isinstance(self.ref_model, _NoModel):
            self.ref_model = None
        self._check_objective(self.objective)
        install_fused_loss(self.model)
        if self.ref_model is not None:
            install_fused_loss(self.accelerator.unwrap_model(self.ref_model))
        if self._columns:
            self.data_collator = _WithColumns(self.data_collator, self._columns)
        from ..trainer import _SaveState

        self.add_callback(_SaveState(self.objective))

    def _check_objective(self, objective: Objective) -> None:
        refused = {
            "mixtures of experts: set router_aux_loss_coef=0.0": self.aux_loss_enabled,
            "data with images": self._is_vision_dataset,
            "precompute_ref_log_probs, for it compares single tokens": (
                self.precompute_ref_logps and objective.needs_reference_tokens
            ),
            "sync_ref_model, for it has no reference": self.args.sync_ref_model
            and not objective.needs_reference,
            "a sharded reference, for it compares whole distributions": (
                objective.needs_reference_hidden and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            ),
        }
        for what, found in refused.items():
            if found:
                raise ValueError(f"{objective} does not go with {what}")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self._columns]))

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return super().compute_ref_log_probs(
            model, {k: x for k, x in inputs.items() if k not in self._columns}
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        objective = self.objective
        if objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        mode = "train" if self.model.training else "eval"
        own = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", *self._columns}
        arguments = {k: x for k, x in inputs.items() if k not in own}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, _IGNORE)
        targets = shift_labels(labels)  # (2P, T)
        known = {name: inputs[name] for name in self._columns} | self._reference(inputs, targets)

        def loss_of(hidden: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
            out = objective(_real(hidden, targets), head.weight, targets, **head.kwargs(), **known)
            return out.loss, out.metrics

        loss, metrics = model(**arguments, fused_loss=loss_of)
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
        """What the objective is told of the reference, by `compute_ref_log_probs`' way to it."""
        objective = self.objective
        assert objective is not None
        if not objective.needs_reference:
            return {}
        if self.precompute_ref_logps:
            return {"ref_logps": torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])}
        model = self.ref_model or self.model
        found: dict[str, Any] = {}

        def reference_of(hidden: Tensor, head: Head) -> Tensor:
            hidden = _real(hidden, targets)
            if objective.needs_reference_hidden:
                if head.adapter is not None:
                    raise ValueError(
                        f"{objective} compares with the reference's head, which carries an adapter"
                    )
                found.update(ref_hidden=hidden, ref_weight=head.weight, ref_bias=head.bias)
                return hidden
            found["ref_logps"] = token_logps(hidden, head.weight, targets, **head.kwargs())
            return found["ref_logps"]

        def run(*, labels: Tensor, fused_lm_head: bool, **arguments: Any) -> Any:
            model(**arguments, fused_loss=reference_of)
            return utils.FusedCausalLMOutput(
                log_probs=labels.new_zeros(labels[:, 1:].shape, dtype=torch.float32)
            )

        self.compute_ref_log_probs(run, inputs)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        from ..trainer import _STATE_FILE

        path = Path(resume_from_checkpoint) / _STATE_FILE
        if self.objective is not None and path.is_file():
            self.objective.load_state_dict(torch.load(path, map_location=self.args.device))


def objective_of(args: dpo_config.DPOConfig) -> Objective:
    """The objective that a DPOConfig whose loss types are this project's describes."""
    options: dict[str, Any] = {"weights": args.loss_weights, "ld_alpha": args.ld_alpha}
    if args.use_weighting:
        options |= {"wpo": True, "clamp": False}
    given = {"beta": args.beta, "label_smoothing": args.label_smoothing or None}
    options |= {name: x for name, x in given.items() if x is not None}
    own = getattr(args, "hyperparameters", None) or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"expected hyperparameters as a dict, or as JSON that begins with {{, got {own!r}")
    return Objective(list(_own_methods(args.loss_type)), **{**options, **own})


def _own_methods(loss_types: Sequence[str]) -> tuple[str, ...]:
    """The methods of this project that loss types name; none if they are TRL's. ValueError for unknown and mixed ones."""
    pairwise = [name for name, method in METHODS.items() if method.layout == "pairwise"]
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


def _columns(objective: Objective, dataset: Any) -> tuple[str, ...]:
    """The columns of a data set that the methods take; ValueError for one that they cannot do without."""
    present = set() if dataset is None else set(next(iter(dataset)))
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
                    f"{method.name} needs the column {name!r}, a number a pair: the data has {sorted(present)}"
                )
    return tuple(dict.fromkeys(found))


@dataclass
class _WithColumns:
    """A collator that puts columns of numbers into the batch, (P,) each."""

    collate: Any
    columns: Sequence[str]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = {n: torch.tensor([float(e[n]) for e in examples]) for n in self.columns}
        return {**self.collate(examples), **columns}


class _NoModel(nn.Module):
    """Where TRL would load a reference model that no loss looks at."""

    config = PretrainedConfig()


def _real(hidden: Tensor, targets: Tensor) -> Tensor:
    """Without the virtual tokens that prompt-learning adapters put before."""
    return hidden[:, -targets.shape[1] :]


def __getattr__(name: str) -> Any:
    # Not before they are wanted: TRL warns when its experimental part is imported.
    if name in ("CPOTrainer", "ORPOTrainer", "TPOTrainer", "OnlineDPOTrainer"):
        from . import trl_experimental

        return getattr(trl_experimental, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
