"""The function of the head that TRL's trainers call, on this engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...head import token_stats
from ...head.autograd import refuse_double_backward, scale_saved, token_stats_backward
from ...head.autograd import token_stats as token_stats_operator
from ...head.backends import check_backend
from ...head.choice import choose_backend
from ...head.operands import Operands, check_operands
from ...head.plan import fit_tiles
from ...head.row_operations import copies
from ...head.sharded import gathered
from ...head.spec import Scaling, accumulation_dtype
from ...models import Head
from .base import IGNORE
from .layout import Layouts

# TRL's name of each output beside log_probs, and that of `token_stats`.
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}
# The model whose forward runs, where its head must be read again: TRL passes only the weight under an adapter, and of a
# weight that FSDP2 shards only a gathered copy, whose gradient it would not average.
READ_FROM: ContextVar[Any] = ContextVar("READ_FROM", default=None)


@dataclass
class HeadFunction:
    """Replacement of TRL's `ChunkedLogProbFunction`: the same `apply`, by this engine.

    With a frozen head the gradient is made while the tile is live: 2F, where TRL computes the tile again: 3F. A
    trainable head takes 4F in both (3F with `DPOTrainer` of this package and the methods of this project). Logits are
    float32. `is_top1` counts a tie for the largest logit as a hit; TRL does so only if the target is the first of the
    tied tokens.
    """

    backend: str = "auto"
    tile_bytes: int | None = None
    layouts: Layouts | None = field(default=None, compare=False, repr=False)  # those of `install(layout=…)`
    # Whether the last backward had a gradient of entropy: saving ∂logp/∂hidden then makes 4F of 3F, and is left out.
    entropy_learns: bool = field(default=False, compare=False, repr=False)

    def apply(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,) −100 is ignored
        temperature: float,
        chunk_size: int | None = None,  # not used: tiles are of `tile_bytes`
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """Returns (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), (N,) each, None if not in `outputs`.

        log_probs is always computed. It and entropy are differentiable in hidden, weight and bias.
        """
        if self.layouts is not None:
            self.layouts.check_asked()
        names = tuple(ours for theirs, ours in _OUTPUTS.items() if theirs in outputs)
        head = Head(weight, bias, final_logit_softcapping or None, logit_scale)
        model = READ_FROM.get()
        if model is not None:
            # The hidden states are as TRL takes them from the backbone, and so are its softcap and scale.
            head = dataclasses.replace(Head.from_model(model), softcap=head.softcap, logit_scale=head.logit_scale)
        found = self.statistics(head.inputs(hidden), head, targets, names, temperature)
        return found["logp"], *(found.get(name) for name in _OUTPUTS.values())

    def statistics(
        self,
        hidden: Tensor,  # (N, D) or, with an adapter, (N, D + r), as `Head.inputs` returns them
        head: Head,
        targets: Tensor,  # (N,)
        names: tuple[str, ...],
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """Computes logp and the statistics `names` of `token_stats`, in the order of TRL's outputs, (N,) each."""
        if head.adapter is not None:
            options = {"temperature": temperature, "tile_bytes": self.tile_bytes, "backend": self.backend}
            stats = token_stats(hidden, head, targets, outputs=names, **options)
            return {name: getattr(stats, name) for name in ("logp", *names)}
        scaling = Scaling(float(temperature), head.softcap, float(head.logit_scale))
        weight, bias = gathered(weight=head.weight, bias=head.bias)
        grad = torch.is_grad_enabled()
        found = HeadStatistics.apply(hidden, weight, bias, targets, scaling, names, grad, self)
        stats = dict(zip(("logp", *names), found, strict=True))
        if "top1" in stats:
            stats["top1"] = stats["top1"] > 0
        return stats


class HeadStatistics(torch.autograd.Function):
    """The operator of head/autograd.py, with the gradient of the entropy computed only where it is asked for."""

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
        """Returns logp and the statistics `names`, (N,) each. grad: whether the caller has gradients enabled."""
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needs = tuple(ctx.needs_input_grad[:3]) if grad else (False, False, False)
        saves = needs[0] and not any(needs[1:]) and not ("entropy" in names and options.entropy_learns)
        given = Operands(hidden, weight, targets, bias, scaling=scaling, ignore_index=IGNORE)
        operands = _cast(dtype, given)
        check_operands(operands.hidden, operands.weight, targets, operands.bias)
        backend = choose_backend(options.backend, weight.device, dtype)
        check_backend(backend, weight.device)
        tiling, *_ = fit_tiles(
            backend,
            weight.shape[0],
            dtype,
            weight.device,
            options.tile_bytes,
            copies=copies(names, scaling.softcap is not None),
            dz=any(needs),
            learns=needs[1],
        )
        ctx.scaling, ctx.tiled = scaling, (list(tiling), backend)
        logp, _, extra, dlogp = token_stats_operator(*operands.packed(), *ctx.tiled, ",".join(names), saves)
        found = dict(zip(names, (row.clone() for row in extra), strict=True))
        ctx.mark_non_differentiable(*(x for name, x in found.items() if name != "entropy"))
        ctx.saves, ctx.dtype, ctx.options = saves, dtype, options
        ctx.save_for_backward(hidden, weight, bias, targets, dlogp if saves else None, found.get("entropy"))
        return logp, *found.values()

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, *d_rest: Tensor | None) -> tuple:
        """Returns the gradients of hidden, weight and bias; from the saved ∂logp/∂hidden where that is enough."""
        refuse_double_backward("the fused head")
        hidden, weight, bias, targets, dlogp, entropy = ctx.saved_tensors
        d_entropy = d_rest[0] if entropy is not None else None  # the entropy is the first of _OUTPUTS
        if entropy is not None:
            ctx.options.entropy_learns = d_entropy is not None
        if d_entropy is None and ctx.saves:
            d_hidden = None if d_logp is None else scale_saved(dlogp, d_logp.unsqueeze(1)).to(hidden.dtype)
            return d_hidden, *[None] * 7
        upstream = {n: d for n, d in (("logp", d_logp), ("entropy", d_entropy)) if d is not None}
        needs = ctx.needs_input_grad[:3]
        if not upstream or not any(needs):
            return (None,) * 8
        # A float32 weight under autocast gets its gradient unrounded.
        wide = weight.dtype == accumulation_dtype(ctx.dtype) != ctx.dtype
        d_weight = torch.zeros_like(weight) if needs[1] and wide else None
        given = Operands(hidden, weight, targets, bias, weight_grad=d_weight, scaling=ctx.scaling, ignore_index=IGNORE)
        operands = _cast(ctx.dtype, given)
        values = {} if d_entropy is None else {"entropy": entropy}
        found = token_stats_backward(
            *operands.packed(),
            *ctx.tiled,
            list(upstream.values()),
            ",".join(upstream),
            list(values.values()),
            ",".join(values),
            [*needs, False],
        )
        grads = (found[0], found[1] if d_weight is None else d_weight, found[2])
        learning = (hidden, weight, bias)
        own = (g.to(x.dtype) if need else None for g, x, need in zip(grads, learning, needs, strict=True))
        return *own, *[None] * 5


def _cast(dtype: torch.dtype, operands: Operands) -> Operands:
    """Returns the operands in a dtype, detached."""
    o = operands
    hidden, weight, bias = (None if x is None else x.detach().to(dtype) for x in (o.hidden, o.weight, o.bias))
    assert hidden is not None
    return dataclasses.replace(operands, hidden=hidden, weight=weight, bias=bias)
