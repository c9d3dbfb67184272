"""The losses of a call from the policy's log-probs: by method and unit, reduced, or as coefficients ∂loss/∂logp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import to_device
from ..head.rows import Group
from ..methods.math import unchecked
from ..reduce import count_metrics, mean_metrics, reduce_losses
from ..types import LossOutput
from .batch import Batch
from .columns import column, per_token
from .known import Known, row_sums
from .settings import Settings
from .terms import Term

Found = tuple[Tensor, dict[str, Tensor]]  # losses and metrics of a method


class Evaluation:
    """The methods of a call as functions of the policy's log-probs; all other inputs are fixed.

    remembered: the objective's state, read where a method's input is not among the columns.
    """

    def __init__(
        self,
        settings: Settings,
        batch: Batch,
        known: Known,
        remembered: Mapping[str, Tensor],
        denominator: float | Tensor,
    ) -> None:
        self.settings, self.batch, self.known = settings, batch, known
        self.remembered, self.denominator = remembered, denominator

    def denominator_of(self, k: int) -> float | Tensor:
        """Returns the denominator of the k-th method's sum of losses."""
        d = self.denominator
        return d[k] if isinstance(d, Tensor) and d.dim() else d

    def output(self, logp: Tensor) -> LossOutput:
        """Returns loss and metrics from the log-probs (N,) of all positions."""
        found = [self.losses(term, logp) for term in self.settings.terms]
        reduced = self._reduce_terms([losses.detach() for losses, _ in found])
        metrics: dict[str, Tensor] = {}
        for _, own in found:
            metrics = {**own, **metrics}
        valid = self.batch.valid
        total = self.reduce([losses for losses, _ in found])
        return LossOutput(total, mean_metrics(metrics, valid), count_metrics(metrics, valid), tuple(reduced))

    def coefficients(self, logp: Tensor, group: Group) -> Tensor:
        """Returns ∂loss/∂logp (n,) at the positions of a group, from the log-probs (n,) there."""
        at, units = group.positions, group.units
        # Units in between that are not in the group have no scored token, and do not count.
        some = None if self.settings.by_token else torch.arange(units[0], units[-1] + 1, device=logp.device)
        with torch.enable_grad(), unchecked():
            leaf = logp.detach().requires_grad_()
            found = [self.losses(term, leaf, at, some)[0] for term in self.settings.terms]
            (u,) = torch.autograd.grad(self.reduce(found, at, some), leaf)
        return u

    def check(self) -> None:
        """Evaluates all units once on placeholder log-probs, so that a method's error names a unit by its index."""
        logp = self.batch.scored.new_zeros(self.batch.scored.shape, dtype=torch.float32)
        with torch.no_grad():
            for term in self.settings.terms:
                self.losses(term, logp)

    def own_gradient(self, logp: Tensor) -> Tensor:
        """Returns 0 with the gradient of the loss in everything but the policy's log-probs (N,), which are detached."""
        found = (self.losses(term, logp)[0] for term in self.settings.terms)
        return self.reduce([x - x.detach() for x in found])

    def inputs(
        self, term: Term, logp: Tensor, positions: Tensor | None = None, units: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns a method's inputs for some units, or all, from logp (n,) at the positions (n,), or at all N."""
        batch, known, method = self.batch, self.known, term.method
        wanted = {n for n in method.inputs if method.wants(n, term.hyperparameters)}
        remembered = {n: to_device(x, batch.device) for n, x in self.remembered.items() if n in wanted}
        columns = {**remembered, **known.columns}
        if method.layout == "policy":
            single = positions is not None and units is None  # every token is a unit

            def grid(x: Tensor) -> Tensor:
                x = x if positions is None else x[positions]
                return x[:, None] if single else batch.grid(x, positions, units)

            inputs = {"token_logp": logp[:, None] if single else batch.grid(logp, positions, units)}
            inputs["mask"] = grid(batch.scored)
            inputs |= {n: grid(x) for n, x in known.tokens.items() if n in wanted}
            for name, x in columns.items():
                if name in wanted and per_token(batch, name, x):
                    inputs[name] = grid(x.reshape(-1))
                elif name in wanted:
                    at = units if not single else batch.rows[positions]
                    # "II" marks inputs that do not belong to units.
                    shared = x.dim() == 0 or at is None or "II" in method.axes(name)
                    inputs[name] = x if shared else x[at]
            return {n: x for n, x in inputs.items() if n in wanted}
        discounted = self.settings.ld_alpha is not None and term.compares_pairs
        inputs = batch.inputs(
            "logp", row_sums(batch, logp, positions, self.settings.ld_alpha if discounted else None), units, -1.0
        )
        for prefix, (values, absent) in known.rows.items():
            if prefix == "ref_logp" and discounted:
                assert known.discounted_ref is not None
                values = known.discounted_ref
            inputs |= batch.inputs(prefix, values.to(logp.dtype), units, absent)
        if "pos_score" in wanted:
            half = torch.arange(batch.units, device=batch.device)
            some = (half if units is None else units) + batch.units
            inputs |= {n: batch.rejected_grid(x, some) for n, x in known.tokens.items()}
        if batch.layout == "listwise":
            inputs["mask"] = batch.list_mask(units)
        for name, x in columns.items():
            if name in wanted or name == "scores":
                inputs |= column(batch, name, x, units)
        return {n: x for n, x in inputs.items() if n in wanted}

    def losses(self, term: Term, logp: Tensor, positions: Tensor | None = None, units: Tensor | None = None) -> Found:
        """Returns the losses and metrics of one method, by unit, with the modifiers applied.

        Units that do not count get loss 0; their metrics are meaningless and masked by the caller.
        """
        batch, known = self.batch, self.known
        inputs = self.inputs(term, logp, positions, units)
        if term.method.unit == "batch":
            losses, metrics = _evaluate_counted(term, inputs, batch)
        else:
            losses, metrics = term.method(**inputs, **term.hyperparameters)
        if known.row_weight is not None:
            w_w, w_l = batch.inputs("weight", known.row_weight, units, 1.0).values()
            w = w_w * w_l
            losses = losses * (w.clamp(max=1) if self.settings.clamp else w).to(losses.dtype)
        if self.settings.pairs:
            losses, metrics = batch.mean_of_pairs(losses, metrics, units)
        if losses.dim() == 2:  # tokens, 0 outside the mask
            return losses, metrics
        valid = batch.valid if units is None else batch.valid[units]
        return torch.where(valid, losses, 0.0), metrics

    def reduce(self, found: Sequence[Tensor], positions: Tensor | None = None, units: Tensor | None = None) -> Tensor:
        """Returns the weighted sum of the methods' losses: a scalar, or by unit with reduction="none"."""
        reduced = self._reduce_terms(found, positions, units)
        total: Any = sum(term.weight * x for term, x in zip(self.settings.terms, reduced, strict=True))
        return total

    def _reduce_terms(
        self, found: Sequence[Tensor], positions: Tensor | None = None, units: Tensor | None = None
    ) -> list[Tensor]:
        """Returns the reduced losses of each method, without its weight."""
        batch, settings, reduced = self.batch, self.settings, []
        for k, (term, losses) in enumerate(zip(settings.terms, found, strict=True)):
            if settings.reduction == "mean":
                weights = batch.weights(term.method, settings.fixed_length, losses.dtype)
                if weights is not None:
                    if positions is not None:
                        weights = weights[batch.rows[positions] if units is None else units]
                    losses = losses * (weights[:, None] if losses.dim() == 2 else weights)
            reduced.append(reduce_losses(losses, settings.reduction, self.denominator_of(k)))
        return reduced


def _evaluate_counted(term: Term, inputs: Mapping[str, Tensor], batch: Batch) -> Found:
    """Evaluates a method whose losses depend on one another on the units that count alone.

    Returns losses and metrics of all units (U,), 0 and NaN for those that do not count.
    """
    at, shape = batch.counted_indices, batch.counted.shape
    inputs = {n: x[at] if x.dim() else x for n, x in inputs.items()}
    losses, metrics = term.method(**inputs, **term.hyperparameters)

    def spread(x: Tensor, absent: float) -> Tensor:
        return x.new_full(shape, absent).index_put((at,), x)

    return spread(losses, 0.0), {name: spread(x, torch.nan) for name, x in metrics.items()}
