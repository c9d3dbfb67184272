"""Objective: hidden states and a head in, one method's loss and metrics out. It composes the arrows and owns no loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .head import head_plan, token_logps
from .head.plan import Plan, choose_backend
from .head.rows import packed_rows, sum_rows
from .head.spec import Scaling, cast_for_autocast, check_operands, scored_positions
from .head.units import Group, UnitLoss, pack
from .methods import Method, get_method
from .reduce import REDUCTIONS, mean_metrics, reduce_losses
from .types import LossOutput

_OF_NO_MATTER_TO_THE_PLAN = {
    "temperature", "softcap", "logit_scale", "ref_weight", "ref_bias", "ref_logps", "denominator",
}  # fmt: skip


class Objective:
    """A method through the head.

        objective = Objective("simpo", beta=2.0, gamma=1.0)
        out = objective(hidden, weight, targets)
        out.loss.backward()

    method: a name of METHODS; further keyword arguments are its hyperparameters. reduction: "mean" over units (over
    tokens for `sft`), "sum" or "none". tile_bytes: the budget of the tile of logits, 256 MiB on CPU if not given.
    Raises ValueError for an unknown method, hyperparameter, reduction or backend.
    """

    def __init__(
        self,
        method: str,
        *,
        reduction: str = "mean",
        backend: str = "auto",
        tile_bytes: int | None = None,
        **hyperparameters: Any,
    ) -> None:
        self.method = get_method(method)
        self.method.check_hyperparameters(hyperparameters)
        if reduction not in REDUCTIONS:
            raise ValueError(f"no reduction named {reduction!r}; there are {', '.join(REDUCTIONS)}")
        choose_backend(backend, torch.device("cpu"))
        self.reduction, self.backend, self.tile_bytes = reduction, backend, tile_bytes
        self.hyperparameters = {**self.method.defaults, **hyperparameters}

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.hyperparameters.items())
        return f"Objective({self.method.name!r}{options}, reduction={self.reduction!r})"

    def __call__(
        self,
        hidden: Tensor,  # (R, T, D), or (N, D) packed
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (R, T), or (N,) packed; aligned
        *,
        cu_seqlens: Tensor | None = None,  # (R + 1,) offsets of packed rows
        bias: Tensor | None = None,  # (V,)
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        ref_hidden: Tensor | None = None,  # shaped as hidden, width Dr
        ref_weight: Tensor | None = None,  # (V, Dr); the policy's weight if not given
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (R,) log-probs of the rows under the reference, summed
        denominator: float | Tensor | None = None,
        **columns: Tensor,
    ) -> LossOutput:
        """The loss, differentiable in hidden, weight and bias, and detached metrics.

        Rows: pairwise methods take R = 2P rows, the P chosen ones and then the P rejected; unpaired ones a row a unit.
        The reference is `ref_hidden` (with `ref_weight`, or the policy's head), or `ref_logps`; a method without a
        reference reads neither. denominator: what the sum of losses is divided by, the items (`count_items`) of a
        whole optimizer step over micro-batches and ranks; those of this call if not given. columns: the method's
        other inputs by name, one entry a unit or a scalar.

        A unit with a row that has no scored token is left out: zero loss, not counted. With none left the loss is 0,
        with a graph. What it costs: see `plan`.

        Raises ValueError for operands, rows or columns that do not fit, a missing reference or column, an unknown
        column, and (on CPU) a target outside the vocabulary.
        """
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = cast_for_autocast(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias
        )
        check_operands(hidden, weight, targets, bias)
        batch = _Batch(self.method, targets, cu_seqlens, ignore_index)
        options: dict[str, Any] = {
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "ignore_index": ignore_index,
            "tile_bytes": self.tile_bytes,
            "backend": self.backend,
        }
        known = batch.columns(columns) | batch.sides("len", batch.lengths, absent=1.0)
        if self.method.needs_reference:
            if ref_logps is not None and ref_hidden is not None:
                raise ValueError("the reference came twice: pass either ref_hidden= or ref_logps=")
            if ref_logps is None:
                ref_logps = self._reference(batch, weight, bias, ref_hidden, ref_weight, ref_bias, options)
            known |= batch.sides("ref_logp", batch.check_rows("ref_logps", ref_logps))
        if denominator is None:
            denominator = batch.items.sum()

        def evaluate(row_logps: Tensor, units: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            """Losses and metrics of the units given, or all, from the log-probs of all rows (R,)."""
            inputs = known | batch.sides("logp", row_logps)
            valid = batch.valid
            if units is not None:
                inputs = {name: x[units] if x.dim() else x for name, x in inputs.items()}
                valid = valid[units]
            losses, metrics = self.method(**inputs, **self.hyperparameters)
            return torch.where(valid, losses, 0.0), metrics

        def reduced(losses: Tensor) -> Tensor:
            return reduce_losses(losses, self.reduction, denominator)

        def coefficients(logp: Tensor, positions: Tensor, units: Sequence[int]) -> Tensor:
            """∂loss/∂logp at the positions (n,) of some units."""
            rows = batch.rows[positions]
            with torch.enable_grad():
                row_logps = sum_rows(logp, rows, batch.count).requires_grad_()
                losses, _ = evaluate(row_logps, torch.tensor(units, device=logp.device))
                (u,) = torch.autograd.grad(reduced(losses), row_logps)
            return u[rows]

        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._evaluates_live(flat, weight, bias):
            tile_tokens = self._head_plan(flat, weight, bias, batch).tile_tokens
            loss, logp = UnitLoss.apply(
                flat,
                weight,
                bias,
                batch.targets,
                Scaling(temperature, softcap, logit_scale),
                batch.groups(tile_tokens, weight.shape[0]),
                tile_tokens,
                coefficients,
                lambda logp: reduced(evaluate(sum_rows(logp, batch.rows, batch.count))[0]),
            )
            losses, metrics = evaluate(sum_rows(logp, batch.rows, batch.count))
            if losses.requires_grad:  # by a column: logp carries no gradient here
                loss = loss + reduced(losses - losses.detach())
        else:
            logp = token_logps(flat, weight, batch.targets, bias=bias, **options)
            losses, metrics = evaluate(sum_rows(logp, batch.rows, batch.count))
            loss = reduced(losses)
        return LossOutput(loss, mean_metrics(metrics, batch.valid))

    def count_items(
        self, targets: Tensor, cu_seqlens: Tensor | None = None, *, ignore_index: int = -100
    ) -> Tensor:
        """What `denominator` counts in a batch: units, or the tokens read by `sft`. A () int64 tensor."""
        return _Batch(self.method, targets, cu_seqlens, ignore_index).items.sum()

    def plan(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ignore_index: int = -100,
        **others: Any,
    ) -> Plan:
        """How a call with these arguments will run: backend, tile and passes. Print it."""
        unknown = sorted(set(others) - _OF_NO_MATTER_TO_THE_PLAN - set(self.method.columns))
        if unknown:
            raise ValueError(f"{self.method.name}: unknown {', '.join(unknown)}")
        hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
        check_operands(hidden, weight, targets, bias)
        batch = _Batch(self.method, targets, cu_seqlens, ignore_index)
        plan = self._head_plan(hidden, weight, bias, batch)
        passes, why = plan.passes, plan.why
        tokens = int((batch.targets != ignore_index).sum())
        if self._evaluates_live(hidden, weight, bias):
            groups = batch.groups(plan.tile_tokens, weight.shape[0])
            again = sum(
                len(index) - -(-len(index) // -(-len(index) // plan.tile_tokens)) for index, _ in groups
            )
            passes = passes - 1 + (again / tokens if tokens else 0)
            why = f"the loss of whole {self.method.unit}s is evaluated while their tile is live"
            if again:
                why += f"; units longer than a tile make {again} tokens' logits again"
        if self.method.needs_reference and ref_hidden is not None:
            passes, why = passes + 1, why + "; 1F of it for the reference"
        return Plan(plan.backend, tokens, plan.tile_tokens, plan.vocab, plan.dtype, passes, why)

    def _head_plan(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: _Batch) -> Plan:
        unit_tokens = batch.longest_unit if self._evaluates_live(hidden, weight, bias) else 0
        return head_plan(
            hidden,
            weight,
            bias=bias,
            tile_bytes=self.tile_bytes,
            backend=self.backend,
            unit_tokens=unit_tokens,
        )

    def _evaluates_live(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the gradient is made at 3F, unit by unit, in the forward."""
        return (
            torch.is_grad_enabled()
            and (weight.requires_grad or (bias is not None and bias.requires_grad))
            and self.reduction != "none"
            and self.method.unit != "batch"
            and choose_backend(self.backend, hidden.device) != "dense"
            and not torch.compiler.is_compiling()
        )

    def _reference(
        self,
        batch: _Batch,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """The rows' log-probs (R,) under the reference, from its hidden states."""
        if ref_hidden is None:
            raise ValueError(
                f"{self.method.name} compares with a reference: pass ref_hidden= (and ref_weight= unless it has the "
                "policy's head) or ref_logps=, the summed log-prob of each row"
            )
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        flat = ref_hidden.reshape(-1, ref_hidden.shape[-1])
        with torch.no_grad():
            try:
                logp = token_logps(flat, ref_weight, batch.targets, bias=ref_bias, **options)
            except ValueError as error:
                raise ValueError(f"of the reference: {error}") from None
        return sum_rows(logp, batch.rows, batch.count)


class _Batch:
    """Rows and units of a call: which row belongs to which unit, which of them count."""

    def __init__(self, method: Method, targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> None:
        self.method, self.ignore_index = method, ignore_index
        self.rows, self.count = packed_rows(targets, cu_seqlens)
        self.paired = method.layout == "pairwise"
        if self.paired and self.count % 2:
            raise ValueError(
                f"{method.name} takes pairs, the chosen rows and then as many rejected ones: expected an even number "
                f"of rows, got {self.count}"
            )
        flat = targets.reshape(-1).long()
        self.device, self.units = flat.device, self.count // 2 if self.paired else self.count
        self._sides = 2 if self.paired else 1
        self.lengths = sum_rows((flat != ignore_index).long(), self.rows, self.count)
        self.read = [k for k, side in enumerate(("_w", "_l")) if side in method.sides] if self.paired else [0]
        lengths = self.lengths.view(self._sides, self.units)[self.read]
        self.valid = (lengths > 0).all(dim=0)
        tokens = lengths.sum(dim=0) if method.denominator == "tokens" else torch.ones_like(lengths[0])
        self.items = tokens * self.valid
        # The head need not see a row that the method does not read, nor a unit that does not count.
        counted = torch.zeros_like(self.lengths, dtype=torch.bool).view(self._sides, self.units)
        counted[self.read] = self.valid
        self.targets = torch.where(counted.view(-1)[self.rows], flat, ignore_index)

    def sides(self, prefix: str, values: Tensor, absent: float = -1.0) -> dict[str, Tensor]:
        """(R,) values of rows as the method's inputs, "logp" → logp_w, logp_l; `absent` in units left out."""
        if not values.is_floating_point():
            values = values.float()
        single = "length" if prefix == "len" else prefix
        names = (prefix + "_w", prefix + "_l") if self.paired else (single,)
        parts = zip(names, values.view(self._sides, self.units), strict=True)
        return {name: torch.where(self.valid, x, absent) for name, x in parts if name in self.method.inputs}

    def columns(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's inputs that come from the caller; ValueError for a missing, unknown or misshapen one."""
        takes = self.method.columns
        unknown = sorted(set(given) - set(takes))
        missing = [name for name in takes if name in self.method.required and given.get(name) is None]
        if unknown or missing:
            raise ValueError(
                f"{self.method.name}: "
                + "; ".join(
                    f"{what} {', '.join(n)}" for what, n in (("missing", missing), ("unknown", unknown)) if n
                )
                + f". It takes the columns: {', '.join(takes) or 'none'}"
            )
        for name, x in given.items():
            if x is not None and (not isinstance(x, Tensor) or x.shape not in ((), (self.units,))):
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"{self.method.name}: {name} must be a tensor ({self.units},) or (), got {got}"
                )
            if x is not None and x.device != self.device:
                raise ValueError(f"{self.method.name}: {name} is on {x.device} and targets on {self.device}")
        return {name: x for name, x in given.items() if x is not None}

    def check_rows(self, name: str, values: Tensor) -> Tensor:
        """`values` detached, if it has one entry a row; else ValueError."""
        if values.shape != (self.count,) or values.device != self.device:
            raise ValueError(
                f"{name} must be ({self.count},) on {self.device}, one entry a row, got {tuple(values.shape)} on "
                f"{values.device}"
            )
        return values.detach().float() if values.dtype != torch.float64 else values.detach()

    @cached_property
    def _by_unit(self) -> tuple[Tensor, list[int]]:
        """The scored positions sorted by unit, and each unit's number of them."""
        index = (self.targets != self.ignore_index).nonzero().squeeze(1)
        unit = self.rows[index] % max(1, self.units)
        lengths = torch.bincount(unit, minlength=self.units).tolist()
        return index[unit.argsort(stable=True)], lengths

    @property
    def longest_unit(self) -> int:
        return max(self._by_unit[1], default=0)

    def groups(self, tile_tokens: int, vocab: int) -> list[Group]:
        """Whole units packed into tiles; ValueError on CPU for a target outside the vocabulary."""
        scored_positions(self.targets, self.ignore_index, vocab)
        return pack(*self._by_unit, tile_tokens)
