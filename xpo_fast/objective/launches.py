"""The objective's losses by the segment kernels: passes a batch's rows, inputs and denominators to the launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..device import to_device
from ..head.rows import Group
from ..methods.inputs import INPUTS
from ..types import LossOutput
from . import segments
from .batch import Batch
from .columns import per_token
from .known import Known
from .terms import Term

# Inputs that the kernels accept for every method.
_LENGTHS = ("len_w", "len_l", "length")


@dataclass(frozen=True)
class _Launch:
    """The arguments that all launches of a term share."""

    term: Term
    by_unit: Mapping[str, Tensor]  # (U,)
    others: Mapping[str, Tensor]  # (N,) by token, or () one number
    weights: Tensor | None  # (U,)
    denominator: float | Tensor | None


@dataclass(frozen=True)
class Launches:
    """The kernels of a call, one launch per term, in place of `Evaluation`: same `output` and `coefficients`."""

    batch: Batch
    launches: Sequence[_Launch]

    @classmethod
    def of(
        cls,
        terms: Sequence[Term],
        batch: Batch,
        known: Known,
        state: Mapping[str, Tensor],
        denominators: Sequence[float | Tensor],
        reduction: str,
        fixed_length: int | None,
        dtype: torch.dtype,
    ) -> Launches | None:
        """Returns the launches of a call, or None if the methods' pure functions must be evaluated instead.

        That is so for a method without a kernel and for an input with a gradient; while torch.compile traces, since it
        fuses the functions itself; and for packed rows while a CUDA graph is captured, since their offsets are on the
        host, from which nothing may be copied.
        """
        columns = {**state, **known.columns}
        if (
            reduction == "none"
            or batch.device.type not in segments.DEVICES
            or dtype not in segments.DTYPES
            or torch.compiler.is_compiling()
            or (batch.static and batch.packed)
            or native.why_not() is not None
            or known.learns
            or any(segments.supports(t.method.name, t.hyperparameters, tuple(columns)) for t in terms)
        ):
            return None
        columns = {n: to_device(x, batch.device) for n, x in columns.items()}
        launches = []
        for term, denominator in zip(terms, denominators, strict=True):
            weights = None
            if reduction == "sum":
                denominator = None
            else:
                weights = batch.weights(term.method, fixed_length, dtype)
                denominator = denominator.to(dtype) if isinstance(denominator, Tensor) else denominator
            inputs = _inputs(term, batch, known, columns, dtype)
            launches.append(_Launch(term, *inputs, weights, denominator))
        return cls(batch, launches)

    def output(self, logp: Tensor) -> LossOutput:
        """Returns loss, metrics and counts from the log-probs (N,) of all positions, 0 where ignored."""
        found = [self._evaluate(launch, logp, self.batch.row_bounds) for launch in self.launches]
        metrics: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for result in found:
            metrics, counts = {**result.metrics, **metrics}, {**result.counts, **counts}
        weights = [launch.term.weight for launch in self.launches]
        losses = [result.loss for result in found]
        total: Any = losses[0] if weights == [1] else sum(w * x for w, x in zip(weights, losses, strict=True))
        return LossOutput(total, metrics, counts, tuple(x.detach() for x in losses))

    def coefficients(self, logp: Tensor, group: Group) -> Tensor:
        """Returns ∂loss/∂logp (n,) at the positions of a group, from the log-probs (n,) there."""
        bounds = self.batch.unit_bounds
        first, *more = (self._evaluate(launch, logp, bounds, group, launch.term.weight).u for launch in self.launches)
        return sum(more, first)

    def _evaluate(
        self,
        launch: _Launch,
        logp: Tensor,  # (n,)
        bounds: Tensor,  # (R + 1,)
        group: Group | None = None,
        scale: float = 1.0,
    ) -> segments.Evaluation:
        """Launches a term's kernel for the batch, or for the units of a group."""
        method, units = launch.term.method, slice(0, self.batch.units)
        if group is not None and group.units:
            # Units in between that are not in the group have no scored position.
            units = slice(group.units[0], group.units[-1] + 1)
            rows = self.batch.index.shape[1]
            bounds = bounds[rows * units.start : rows * units.stop + 1]
        return segments.evaluate(
            method.name,
            launch.term.hyperparameters,
            logp,
            bounds,
            start=0 if group is None else group.start,
            interleaved=group is not None and method.layout == "pairwise",
            weights=None if launch.weights is None else launch.weights[units],
            denominator=launch.denominator,
            scale=scale,
            positions=group.positions if group is not None and method.layout == "policy" else None,
            **{name: x[units] for name, x in launch.by_unit.items()},
            **launch.others,
        )


def _inputs(
    term: Term, batch: Batch, known: Known, columns: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns a method's inputs other than the policy's log-probs: those with an entry per unit, and the rest."""
    method = term.method
    rows = {"len": batch.lengths, **{n: x for n, (x, _) in known.rows.items() if n == "ref_logp"}}
    by_unit: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    if method.layout == "pairwise":  # the chosen rows are the first half, the rejected the second
        for name, x in rows.items():
            by_unit[name + "_w"], by_unit[name + "_l"] = x.view(2, batch.units).unbind()
    elif method.layout == "unpaired":
        by_unit = {"length" if name == "len" else name: x for name, x in rows.items()}
    else:
        others = {"mask": batch.scored, **known.tokens}
    for name, x in columns.items():
        if not method.wants(name, term.hyperparameters):
            continue
        if per_token(batch, name, x):
            others[name] = x.reshape(-1)
        elif "U" in INPUTS[name].axes:
            by_unit[name] = x.expand(batch.units)
        else:  # one number for all tokens, or for the call
            others[name] = x.expand(batch.scored.shape) if "UT" in INPUTS[name].axes else x

    def wanted(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        takes = {n: x for n, x in inputs.items() if method.wants(n, term.hyperparameters) or n in _LENGTHS}
        return {n: x.to(dtype) if x.is_floating_point() else x for n, x in takes.items()}

    return wanted(by_unit), wanted(others)
