"""The objective's losses by the segment kernels: rows, inputs and denominators of a batch as one launch takes them."""

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
from .known import Known
from .terms import Term

# Which kernels take of every method.
_LENGTHS = ("len_w", "len_l", "length")


@dataclass(frozen=True)
class _Launch:
    """What a term's launches have in common."""

    term: Term
    of_units: Mapping[str, Tensor]  # (U,)
    others: Mapping[str, Tensor]  # (N,) by token, or () one number
    weights: Tensor | None  # (U,)
    denominator: float | Tensor | None


@dataclass(frozen=True)
class Launches:
    """A launch a term: for the loss and the metrics of a batch, or ∂loss/∂logp of some of its units."""

    batch: Batch
    each: Sequence[_Launch]

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
        """None where the pure functions are called for: by a method without a kernel, or an input with a gradient.

        So they are while torch.compile traces, which fuses them itself, and for packed rows while a CUDA graph is captured:
        their offsets are on the host, from where nothing may be copied.
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
        each = []
        for term, denominator in zip(terms, denominators, strict=True):
            weights = None
            if reduction == "sum":
                denominator = None
            else:
                weights = batch.weights(term.method, fixed_length, dtype)
                denominator = denominator.to(dtype) if isinstance(denominator, Tensor) else denominator
            inputs = _inputs(term, batch, known, columns, dtype)
            each.append(_Launch(term, *inputs, weights, denominator))
        return cls(batch, each)

    def whole(self, logp: Tensor) -> LossOutput:
        """Loss, metrics and counts from the log-probs (N,) of all positions, 0 where ignored."""
        found = [self._evaluate(launch, logp, self.batch.row_bounds) for launch in self.each]
        metrics: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for one in found:
            metrics, counts = {**one.metrics, **metrics}, {**one.counts, **counts}
        weights = [launch.term.weight for launch in self.each]
        losses = [one.loss for one in found]
        total: Any = losses[0] if weights == [1] else sum(w * x for w, x in zip(weights, losses, strict=True))
        return LossOutput(total, metrics, counts, tuple(x.detach() for x in losses))

    def coefficients(self, logp: Tensor, group: Group) -> Tensor:
        """∂loss/∂logp (n,) at the positions of a group."""
        first, *more = (
            self._evaluate(launch, logp, self.batch.unit_bounds, group, launch.term.weight).u for launch in self.each
        )
        return sum(more, first)

    def _evaluate(
        self,
        launch: _Launch,
        logp: Tensor,  # (n,)
        bounds: Tensor,  # (R + 1,)
        group: Group | None = None,
        scale: float = 1.0,
    ) -> segments.Evaluation:
        method, units = launch.term.method, slice(0, self.batch.units)
        if group is not None and group.units:
            # Units between these have nothing to score, and no position.
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
            **{name: x[units] for name, x in launch.of_units.items()},
            **launch.others,
        )


def _inputs(
    term: Term, batch: Batch, known: Known, columns: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method's inputs by unit, and the others; but for the log-probs."""
    method = term.method
    rows = {"len": batch.lengths, **{n: x for n, (x, _) in known.rows.items() if n == "ref_logp"}}
    of_units: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    if method.layout == "pairwise":  # the chosen rows are one half of all, the rejected the other
        for name, x in rows.items():
            of_units[name + "_w"], of_units[name + "_l"] = x.view(2, batch.units).unbind()
    elif method.layout == "unpaired":
        of_units = {"length" if name == "len" else name: x for name, x in rows.items()}
    else:
        others = {"mask": batch.scored, **known.tokens}
    for name, x in columns.items():
        if not method.wants(name, term.hyperparameters):
            continue
        if batch.per_token(name, x):
            others[name] = x.reshape(-1)
        elif "U" in INPUTS[name].axes:
            of_units[name] = x.expand(batch.units)
        else:  # one number for all tokens, or all there is
            others[name] = x.expand(batch.scored.shape) if "UT" in INPUTS[name].axes else x

    def read(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        takes = {n: x for n, x in inputs.items() if method.wants(n, term.hyperparameters) or n in _LENGTHS}
        return {n: x.to(dtype) if x.is_floating_point() else x for n, x in takes.items()}

    return read(of_units), read(others)
