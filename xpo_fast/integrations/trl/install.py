"""TRL 1.16 on this engine: `install()` for the trainers on its fused head, subclasses for what that does not reach.

    from xpo_fast.integrations.trl import install
    install()            # SFT, DPO, KTO, GRPO, RLOO, AsyncGRPO: log-probs and their statistics are this engine's

`DPOTrainer` with `DPOConfig` (trl_dpo.py) is TRL's with the pairwise methods of this project as further `loss_type`s.
`CPOTrainer`, `ORPOTrainer`, `TPOTrainer` and `OnlineDPOTrainer` (trl_experimental.py) are TRL's experimental ones without
their logits: the same losses and metrics. These five need no `install()`.

Not reached, and run as they are: GKD, GOLD, SDFT, SDPO and the distillation trainers, which compare whole distributions
of a teacher and a student; A2PO, which makes logits of its own. BCO is no longer in TRL: its pairwise form is DPO's
`bco_pair`, its unpaired one the method `bco` of `xpo_fast.trainer`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ...head import token_stats
from ...head.autograd import refuse_double_backward, scale_saved, token_stats_backward
from ...head.autograd import token_stats as token_stats_operator
from ...head.backends import check_backend
from ...head.choice import choose_backend, named_backend
from ...head.operands import Operands, check_operands
from ...head.plan import fit
from ...head.row_operations import copies
from ...head.sharded import gathered, is_partitioned, is_sharded
from ...head.spec import Scaling, accumulation_dtype
from ...models import Head, install_fused_loss
from ...models.lm_head import ACTS_OF

try:
    import trl
    from trl.kernels import chunked_logprob
    from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer, sft_trainer, utils
except ImportError as error:
    raise ImportError(
        "xpo_fast.integrations.trl needs TRL 1.16: pip install 'xpo-fast[train]' 'trl==1.16.*'"
    ) from error

if TYPE_CHECKING:
    from .dpo import DPO_LOSS_TYPES as DPO_LOSS_TYPES
    from .dpo import DPOConfig as DPOConfig
    from .dpo import DPOTrainer as DPOTrainer
    from .experimental import CPOTrainer as CPOTrainer
    from .experimental import OnlineDPOTrainer as OnlineDPOTrainer
    from .experimental import ORPOTrainer as ORPOTrainer
    from .experimental import TPOTrainer as TPOTrainer

logger = logging.getLogger("xpo_fast")
VERSION = "1.16"
IGNORE = -100

# --- TRL's function of the head ---------------------------------------------------------------------------------------

# What TRL calls the outputs, and what `token_stats` does. log_probs are always made.
_OUTPUTS = {
    "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "top1",
}  # fmt: skip
# The model whose forward runs, if its head is to be read anew: TRL hands on only the weight under an adapter, and only a
# gathered copy of one that FSDP2 keeps in parts, whose gradient it would not average.
_READ: ContextVar[Any] = ContextVar("_READ", default=None)
# Whether a trainer is being made that never asks its models for `fused_lm_head`.
NOT_FUSED: ContextVar[bool] = ContextVar("NOT_FUSED", default=False)


@dataclass
class HeadFunction:
    """Stands where TRL has `ChunkedLogProbFunction`: the same `apply`, by this engine.

    With a frozen head the gradient is made while the tile is live, 2F, where TRL makes the tile again, 3F; a trainable
    head takes 4F in both (`DPOTrainer` of this module, with this project's methods: 3F). Logits are float32.
    `is_top1` counts a tie for the largest logit as a hit, TRL only if the target is the first of those tied.
    """

    backend: str = "auto"
    tile_bytes: int | None = None
    # Whether the last backward had a gradient of entropy: beside one ∂logp/∂hidden is not worth saving, 3F, not 4F.
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
        model = _READ.get()
        if model is not None:
            # TRL's own softcap and scale are for hidden states as its forward takes them.
            head = dataclasses.replace(Head.from_model(model), softcap=head.softcap, logit_scale=head.logit_scale)
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
            stats = token_stats(
                hidden, head.weight, targets, outputs=names, temperature=temperature, tile_bytes=self.tile_bytes,
                backend=self.backend, **head.kwargs(),
            )  # fmt: skip
            return {name: getattr(stats, name) for name in ("logp", *names)}
        scaling = Scaling(float(temperature), head.softcap, float(head.logit_scale))
        weight, bias = gathered(weight=head.weight, bias=head.bias)
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
        scaling: Scaling,
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
        backend = choose_backend(options.backend, w.device, w.dtype)
        check_backend(backend, w.device)
        tiling, *_ = fit(
            backend, w.shape[0], dtype, w.device, options.tile_bytes,
            copies=copies(names, scaling.softcap is not None), dz=any(needs), learns=needs[1],
        )  # fmt: skip
        ctx.scaling, ctx.how = scaling, (list(tiling), backend)
        operands = Operands(h, w, targets, b, scaling=scaling, ignore_index=IGNORE)
        logp, _, extra, dlogp = token_stats_operator(*operands.packed(), *ctx.how, ",".join(names), save)
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
        if entropy is not None:
            ctx.options.entropy_learns = d_entropy is not None
        if d_entropy is None and ctx.saves:
            grads = None if d_logp is None else scale_saved(dlogp, d_logp.unsqueeze(1)).to(hidden.dtype)
            return grads, *[None] * 7
        upstream = {n: d for n, d in (("logp", d_logp), ("entropy", d_entropy)) if d is not None}
        needs = ctx.needs_input_grad[:3]
        if not upstream or not any(needs):
            return (None,) * 8
        h, w, b = _cast(ctx.dtype, hidden, weight, bias)
        # A float32 weight under autocast gets its gradient unrounded.
        wide = weight.dtype == accumulation_dtype(ctx.dtype) != ctx.dtype
        d_weight = torch.zeros_like(weight) if needs[1] and wide else None
        operands = Operands(h, w, targets, b, weight_grad=d_weight, scaling=ctx.scaling, ignore_index=IGNORE)
        values = {} if d_entropy is None else {"entropy": entropy}
        found = token_stats_backward(
            *operands.packed(),
            *ctx.how,
            list(upstream.values()),
            ",".join(upstream),
            list(values.values()),
            ",".join(values),
            [*needs, False],
        )
        grads = (found[0], found[1] if d_weight is None else d_weight, found[2])
        given = (hidden, weight, bias)
        own = (g.to(x.dtype) if need else None for g, x, need in zip(grads, given, needs, strict=True))
        return *own, *[None] * 5


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.detach().to(dtype) for x in tensors]


def _scores_only_labels(device: torch.device) -> bool:
    """TRL picks the labelled positions out on Triton's devices and scores all others elsewhere, for Neuron's sake."""
    return device.type in ("cpu", "mps") or chunked_logprob._use_triton(device)


# --- any linear head, LoRA on it included -----------------------------------------------------------------------------


_NOT_TRLS = (
    "take xpo_fast.trainer, or a method of xpo_fast in this module's DPOTrainer, which go by the model's forward"
)
# Of these the scale that their config speaks of is on the hidden states, which TRL does not take from their forward.
_SCALED_BEFORE_THE_HEAD = [name for name, acts in ACTS_OF.items() if 0 in acts.values()]


class _NoLayer:
    """Where TRL's trainers refuse every adapter on a head, in the place of PEFT's BaseTunerLayer: nothing is one."""


def _add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """`trl.trainer.utils.add_fused_lm_head`, with LoRA and DoRA on the head, and with a head in an FSDP2 group of its own.

    ValueError for a head that is not linear, is quantised, or carries an adapter of another kind: TRL would multiply by
    whatever its `weight` is. And for a model whose logits are not what TRL takes them for.
    """
    if NOT_FUSED.get():
        return
    with torch.no_grad():
        head = Head.from_model(model)
    if head.adapter is not None and cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32=True does not go with an adapter on lm_head: samples would not see it")
    before, own = vars(model).get("forward"), model.forward
    _THEIRS[utils, "add_fused_lm_head"](
        model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=outputs
    )
    chunked = model.forward.__func__
    read = inspect.getclosurevars(chunked).nonlocals
    try:
        _check_logits(model, own, head, read["final_logit_softcapping"], float(read["logit_scale"]))
    except ValueError:
        if before is None:
            del model.forward
        else:
            model.forward = before
        raise

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        layer = self.get_output_embeddings()
        if not fused_lm_head or not (_carries_adapter(layer) or isinstance(layer, FSDPModule)):
            return chunked(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        if not installed():
            raise ValueError(
                "TRL's own function leaves an adapter on lm_head out, and the gradient of a head in an FSDP2 group of its "
                "own unaveraged: call install() again"
            )
        token = _READ.set(self)
        try:
            return chunked(self, *args, fused_lm_head=True, **kwargs)
        finally:
            _READ.reset(token)

    model.forward = MethodType(forward, model)  # not a closure over the model: a deep copy runs its own weights


def _carries_adapter(layer: Any) -> bool:
    """By what TRL asks; without PEFT none does."""
    kind = _THEIRS.get((dpo_trainer, "BaseTunerLayer"))
    return kind is not None and isinstance(layer, kind)


def _check_logits(model: Any, own: Any, head: Head, softcap: float | None, logit_scale: float) -> None:
    """ValueError unless TRL's softcap, its scale and its way from the backbone to the head make the model's own logits.

    own: the model's forward. It runs on two tokens, if its weights are there: not on the meta device, nor in parts.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    ours, theirs = (head.softcap, head.logit_scale), (softcap, logit_scale)
    if config.model_type in _SCALED_BEFORE_THE_HEAD:
        ours = (head.softcap, logit_scale)
    if ours[0] != theirs[0] or not math.isclose(ours[1], theirs[1], rel_tol=1e-6):
        raise ValueError(
            f"TRL takes {name} for one with softcap {theirs[0]} and logit scale {theirs[1]:g}, its forward has "
            f"{ours[0]} and {ours[1]:g}: {_NOT_TRLS}"
        )
    if any(x.is_meta or is_sharded(x) or is_partitioned(x) for x in model.parameters()):
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(1, 3, device=model.get_input_embeddings().weight.device)[None]
            try:
                want = own(input_ids=ids).logits.float()
            except Exception as error:
                # It asks for more than tokens, or for another device than it will be on.
                logger.warning(
                    "TRL's log-probs of %s are not compared with its own: its forward does not run on two tokens here "
                    "(%s: %s)", name, type(error).__name__, error,
                )  # fmt: skip
                return
            try:
                z = logit_scale * model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
            except Exception as error:
                raise ValueError(
                    f"TRL does not come by the hidden states that {name} has before lm_head: {_NOT_TRLS}"
                ) from error
    finally:
        for module, training in modes:
            module.training = training
    allowed = 8 * torch.finfo(z.dtype).eps * max(1.0, float(z.abs().max()))
    z = z.float() if softcap is None else softcap * torch.tanh(z.float() / softcap)
    found = z.to(want.device)[..., : want.shape[-1]].log_softmax(-1)
    error = float((found - want.log_softmax(-1)).abs().max())
    if error > allowed:
        raise ValueError(
            f"the forward of {name} does more to its hidden states before lm_head, or to its logits, than TRL knows of: "
            f"log-probs would be off by {error:.1e}; {_NOT_TRLS}"
        )


# --- install ----------------------------------------------------------------------------------------------------------

_SIGNATURES = (
    (
        chunked_logprob.ChunkedLogProbFunction.forward,
        "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
    ),
    (utils.add_fused_lm_head, "model temperature cast_lm_head_to_fp32 outputs"),
)
_TRAINERS = (sft_trainer, dpo_trainer, kto_trainer, grpo_trainer, rloo_trainer)
# What is replaced, as TRL has it, and with what, beside the function itself.
_FUNCTION: Any = (utils, "_ChunkedLogProbFunction")
_THEIRS: dict[Any, Any] = {
    _FUNCTION: chunked_logprob.ChunkedLogProbFunction,
    (utils, "_use_triton"): chunked_logprob._use_triton,
    **{(module, "add_fused_lm_head"): utils.add_fused_lm_head for module in (utils, *_TRAINERS)},
    **{(module, "BaseTunerLayer"): module.BaseTunerLayer for module in _TRAINERS if hasattr(module, "BaseTunerLayer")},
}
_OURS: dict[str, Any] = {
    "_use_triton": _scores_only_labels,
    "add_fused_lm_head": _add_fused_lm_head,
    "BaseTunerLayer": _NoLayer,
}


def _theirs() -> dict[Any, Any]:
    """`_THEIRS`, and what other modules of TRL have taken over by name, before or after `install`: AsyncGRPO's does."""
    name = "add_fused_lm_head"
    modules = [m for key, m in list(sys.modules.items()) if key.startswith("trl.") and name in vars(m)]
    return {**_THEIRS, **{(module, name): _THEIRS[utils, name] for module in modules}}


class Installed:
    """What `install` returns: nothing to hold on to, but as a context manager it puts back on leaving what was before."""

    def __init__(self, before: Mapping[Any, Any]) -> None:
        self._before = dict(before)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        _put(self._before)
        if not installed():
            _put(_theirs())


def install(*, backend: str = "auto", tile_bytes: int | None = None) -> Installed:
    """Put this engine behind TRL's fused head, for every trainer of this process that has one, made before or after.

    Replaces `trl.trainer.utils._ChunkedLogProbFunction`, which TRL looks up at each call, and beside it the switch by
    which TRL scores masked positions, too, where there is no Triton. SFT, DPO, KTO, GRPO and RLOO trainers made from then
    on fuse LoRA and DoRA on `lm_head`, which TRL refuses (AsyncGRPO's still does), and refuse other adapters there, heads
    that are not linear and quantised ones, and models whose softcap, scale or layer before the head TRL does not know (MPT,
    RecurrentGemma, ModernBertDecoder, …; two tokens are run to find out), with the reason. A second call changes the options. `uninstall()` undoes it,
    and so does leaving `with install():`.

    backend, tile_bytes: as `token_stats` has them.
    Raises ValueError for another TRL than 1.16, for one whose functions are not what they were there, and where somebody
    else has replaced them.
    """
    check_version()
    if named_backend(backend) == "dense":
        raise ValueError("the dense backend makes all logits, to be compared with: pass backend='torch'")
    for function, expected in _SIGNATURES:
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            raise ValueError(
                f"{function.__qualname__} of TRL {trl.__version__} takes ({found}), expected ({expected}): "
                f"it is not TRL {VERSION} as released"
            )
    theirs = _theirs()
    before = {place: getattr(*place) for place in theirs}
    for place, now in before.items():
        if now not in (theirs[place], _OURS.get(place[1])) and not isinstance(now, HeadFunction):
            raise ValueError(
                f"{place[0].__name__}.{place[1]} has been replaced by {now!r}: undo that before, two cannot take the "
                "same seam"
            )
    ours = {place: _OURS.get(place[1]) for place in theirs}
    _put({**ours, _FUNCTION: HeadFunction(backend, tile_bytes)})
    return Installed(before)


def uninstall() -> None:
    """Undo `install`; nothing happens if there is nothing to undo."""
    if installed():
        _put(_theirs())


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


# --- the trainers of this project -------------------------------------------------------------------------------------


def take_losses(trainer: Any) -> None:
    """Teach a trainer's model, and its reference model, `fused_loss`; ValueError for what does not go with it."""
    if trainer.args.torch_compile:
        raise ValueError(
            f"{type(trainer).__name__} takes its hidden states out of the model's forward, which torch_compile=True "
            "would compile as a whole: leave it out, and compile the decoder, model.get_decoder().compile()"
        )
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            install_fused_loss(trainer.accelerator.unwrap_model(model))


def without_virtual(
    hidden: Tensor,  # (R, P + T, D)
    targets: Tensor,  # (R, T)
) -> Tensor:
    """(R, T, D): without the P virtual tokens that prompt-learning adapters put before."""
    return hidden[:, -targets.shape[1] :]
