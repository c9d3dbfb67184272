"""The head under a loss that is a sum over units of padded rows: pairs, rows or tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...device import to_device, to_host
from ...head import units
from ...head.operands import Operands
from ...head.plan import plan_of
from ...head.rows import Group
from ...head.sharded import refuse_sharded
from ...head.spec import Scaling, accumulation_dtype, check_targets
from ...head.statistics import statistics
from ...methods.math import unchecked

Pick = Callable[[Tensor], Tensor]  # selects from (R,) or (R, T) the rows under evaluation
Found = tuple[Tensor, tuple[Tensor, ...]]  # a loss () and what is returned beside it
ReferenceInputs = tuple[Tensor | None, Tensor | None, Tensor | None]  # ref_input, ref_weight, ref_bias


def padded_rows(
    hidden: Tensor,  # (R, T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R, T)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
) -> Operands:
    """Returns the operands of padded rows, admitted, with the targets on the device of the hidden states."""
    if targets.dim() != 2:
        raise ValueError(f"expected padded rows, targets (B, T), got {tuple(targets.shape)}")
    refuse_sharded(_input=hidden, target=targets)  # by Liger's names
    scaling = Scaling()  # explicit: torch.compile cannot trace the default
    operands = Operands(hidden, weight, targets, bias, scaling=scaling, ignore_index=ignore_index).admit()
    return replace(operands, targets=to_device(targets, operands.hidden.device))


def unit_loss(operands: Operands, evaluate: Callable[[Tensor, Pick], Found], *, unit_rows: int = 1) -> Found:
    """Returns the loss (), differentiable in the operands, and what `evaluate` finds beside it at all rows, detached.

    operands: those of `padded_rows`. evaluate(logp (r, T), pick) returns the part of the loss () of some rows, already
    divided by what the loss is a mean over. Log-probs are 0 where ignored, and pick selects the same rows of other
    data. A unit is the rows k, k + U, …, `unit_rows` of them, U = R/unit_rows; with 0 each token is a unit, and
    evaluate is given tokens as rows (n, 1).
    """
    shape, width, ignore_index = operands.targets.shape, operands.targets.shape[1], operands.ignore_index
    beside: list[tuple[Tensor, ...]] = []

    def total(logp: Tensor) -> Tensor:
        loss, found = evaluate(logp.view(shape), lambda x: x)
        beside.append(tuple(x.detach() for x in found))
        return loss

    if not (torch.is_grad_enabled() and operands.trainable) or torch.compiler.is_compiling():
        return total(statistics(operands).logp), beside[0]

    operands, count = operands.flat(), shape[0] // max(unit_rows, 1)
    home = to_host(operands.targets)
    check_targets(home, ignore_index, operands.vocab)
    positions = (home != ignore_index).nonzero().squeeze(1)
    lengths: list[int] = []
    if unit_rows:
        unit = (positions // width) % count
        lengths = torch.bincount(unit, minlength=count).tolist()
        positions = positions[unit.argsort(stable=True)]
    positions = to_device(positions, operands.hidden.device)
    plan = plan_of(operands, unit_tokens=max(lengths, default=0))
    if unit_rows:
        groups = units.pack(positions, lengths, plan.tile_tokens)
    else:
        starts = range(0, positions.shape[0], plan.tile_tokens)
        groups = [Group(positions[a : a + plan.tile_tokens], (), a) for a in starts]

    def coefficients(logp: Tensor, group: Group) -> Tensor:
        """Returns ∂loss/∂logp (n,) at the positions of a group."""
        at = group.positions
        with torch.enable_grad(), unchecked():
            leaf = logp.detach().requires_grad_()
            if unit_rows:
                first = torch.arange(group.units[0], group.units[-1] + 1, device=logp.device)
                rows = torch.cat([first + k * count for k in range(unit_rows)])
                grid = leaf.new_zeros(home.shape).index_put((at,), leaf).view(shape)
                part, _ = evaluate(grid[rows], lambda x: x[rows])
            else:
                rows = at // width
                part, _ = evaluate(leaf[:, None], lambda x: x[rows] if x.dim() == 1 else x.flatten()[at, None])
            (u,) = torch.autograd.grad(part, leaf)
        return u

    loss, _ = units.unit_loss(operands, groups, plan, coefficients, total)
    return loss, beside[0]


def reference_logps(reference: ReferenceInputs, policy: Operands) -> Tensor:
    """Returns the log-probs (R, T) of the policy's targets under the reference, detached, 0 where ignored.

    A reference without a weight has the policy's head.
    """
    hidden, weight, bias = reference
    if hidden is None:
        raise ValueError("use_ref_model=True needs ref_input=, the reference's hidden states")
    if weight is None:
        weight, bias = policy.weight, policy.bias if bias is None else bias
    with torch.no_grad():
        try:
            operands = replace(policy, hidden=hidden, weight=weight, bias=bias).admit()
            if operands.vocab == policy.vocab:
                return statistics(operands).logp
        except ValueError as error:
            raise ValueError(f"of the reference: {error}") from None
    raise ValueError(f"the reference must have the policy's vocabulary of {policy.vocab}, got {operands.vocab}")


def logit_sums(operands: Operands, scored: Tensor) -> Tensor:
    """Returns the sum of each row's logits over the vocabulary and its scored (R, T) tokens: (R,), detached.

    Σ_t Σ_v (h_t·W_v + b_v) = (Σ_t h_t)·(Σ_v W_v) + n Σ_v b_v, so that no product with the head is needed.
    """
    weight, bias = operands.weight, operands.bias
    with torch.no_grad():
        dtype = accumulation_dtype(weight.dtype)
        rows = [torch.where(at[:, None], h, 0).sum(dim=0, dtype=dtype) for h, at in zip(operands.hidden, scored)]
        # In blocks: a sum of 16-bit values with a wider result would first widen all of the weight.
        columns = torch.stack([block.sum(dim=0, dtype=dtype) for block in weight.split(4096)]).sum(dim=0)
        sums = torch.stack(rows) @ columns if rows else columns.new_zeros(0)
        return sums if bias is None else sums + scored.sum(dim=1) * bias.sum(dtype=dtype)
