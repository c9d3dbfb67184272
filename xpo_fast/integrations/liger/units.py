"""The head under a loss that is a sum over units of padded rows: pairs, rows or tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...device import to_device, to_host
from ...head import token_logps
from ...head.operands import Operands
from ...head.plan import plan_of
from ...head.rows import Group
from ...head.sharded import unpartitioned
from ...head.spec import Scaling, accumulation_dtype, check_targets
from ...head.units import pack
from ...head.units import unit_loss as unit_loss_of
from ...methods.math import unchecked

Pick = Callable[[Tensor], Tensor]  # of (R,) or (R, T) what belongs to the rows under evaluation
Found = tuple[Tensor, tuple[Tensor, ...]]  # a loss () and what is returned beside it
Reference = tuple[Tensor | None, Tensor | None, Tensor | None]  # ref_input, ref_weight, ref_bias


def operands(
    hidden: Tensor,  # (R, T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R, T)
    bias: Tensor | None,  # (V,)
    *,
    narrows: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias that fit together, gathered, and cast as autocast says.

    narrows: the weight is cast to the dtype of the hidden states.
    """
    if narrows:
        (weight,) = unpartitioned(weight)
        weight = weight.to(hidden.dtype)
    if targets.dim() != 2:
        raise ValueError(f"expected padded rows, targets (B, T), got {tuple(targets.shape)}")
    admitted = Operands(hidden, weight, targets, bias, scaling=Scaling()).admit()
    return admitted.hidden, admitted.weight, admitted.bias


def unit_loss(
    hidden: Tensor,  # (R, T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T)
    ignore_index: int,
    evaluate: Callable[[Tensor, Pick], Found],
    *,
    unit_rows: int = 1,
    temperature: float = 1.0,
) -> Found:
    """evaluate's loss (), differentiable, and what it finds beside it, detached, at the log-probs of all rows.

    evaluate(logp (r, T), pick) → the part of the loss (), already divided by what it is a mean over, that some rows have;
    log-probs are 0 where ignored, and pick gives it the same rows of what it has besides. A unit is the rows k, k + U, …,
    `unit_rows` of them, U = R/unit_rows; with 0 each token is one, and evaluate sees tokens as rows (n, 1).
    """
    flat, flat_targets = hidden.flatten(0, 1), targets.flatten().long()
    shape, width = targets.shape, targets.shape[1]
    beside: list[tuple[Tensor, ...]] = []

    def total(logp: Tensor) -> Tensor:
        loss, found = evaluate(logp.view(shape), lambda x: x)
        beside.append(tuple(x.detach() for x in found))
        return loss

    trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and trainable) or torch.compiler.is_compiling():
        options = {"temperature": temperature, "ignore_index": ignore_index}
        return total(token_logps(flat, weight, flat_targets, bias=bias, **options)), beside[0]

    count = shape[0] // max(unit_rows, 1)
    home = to_host(flat_targets)
    check_targets(home, ignore_index, weight.shape[0])
    positions = (home != ignore_index).nonzero().squeeze(1)
    lengths: list[int] = []
    if unit_rows:
        unit = (positions // width) % count
        lengths = torch.bincount(unit, minlength=count).tolist()
        positions = positions[unit.argsort(stable=True)]
    positions = to_device(positions, hidden.device)
    scaling = Scaling(float(temperature))
    operands = Operands(
        flat, weight, to_device(flat_targets, hidden.device), bias, scaling=scaling, ignore_index=ignore_index
    )
    plan = plan_of(operands, unit_tokens=max(lengths, default=0))
    if unit_rows:
        groups = pack(positions, lengths, plan.tile_tokens)
    else:
        starts = range(0, positions.shape[0], plan.tile_tokens)
        groups = [Group(positions[a : a + plan.tile_tokens], (), a) for a in starts]

    def coefficients(logp: Tensor, group: Group) -> Tensor:
        """∂loss/∂logp (n,) at the positions of a group."""
        at = group.positions
        with torch.enable_grad(), unchecked():
            leaf = logp.detach().requires_grad_()
            if unit_rows:
                units = torch.arange(group.units[0], group.units[-1] + 1, device=logp.device)
                rows = torch.cat([units + k * count for k in range(unit_rows)])
                grid = leaf.new_zeros(home.shape).index_put((at,), leaf).view(shape)
                part, _ = evaluate(grid[rows], lambda x: x[rows])
            else:
                rows = at // width
                part, _ = evaluate(leaf[:, None], lambda x: x[rows] if x.dim() == 1 else x.flatten()[at, None])
            (u,) = torch.autograd.grad(part, leaf)
        return u

    loss, _ = unit_loss_of(operands, groups, plan, coefficients, total)
    return loss, beside[0]


def reference_logps(
    reference: Reference,  # (R, T, Dr), (V, Dr), (V,)
    policy: tuple[Tensor, Tensor | None],  # its head, the reference's where that comes without
    targets: Tensor,  # (R, T)
    ignore_index: int,
    temperature: float = 1.0,
) -> Tensor:
    """The tokens' log-probs under the reference (R, T), detached, 0 where ignored."""
    hidden, weight, bias = reference
    if hidden is None:
        raise ValueError("use_ref_model=True needs ref_input=, the reference's hidden states")
    if weight is None:
        weight, bias = policy[0], policy[1] if bias is None else bias
    if weight.shape[0] != policy[0].shape[0]:
        raise ValueError(
            f"the reference must have the policy's vocabulary of {policy[0].shape[0]}, got {weight.shape[0]}"
        )
    options = {"temperature": temperature, "ignore_index": ignore_index}
    with torch.no_grad():
        try:
            return token_logps(hidden, weight, targets, bias=bias, **options)
        except ValueError as error:
            raise ValueError(f"of the reference: {error}") from None


def logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor) -> Tensor:
    """The sum of the logits over the vocabulary and the scored (R, T) tokens of each row: (R,), detached.

    Σ_t Σ_v (h_t·W_v + b_v) = (Σ_t h_t)·(Σ_v W_v) + n Σ_v b_v, so it takes no product with the head.
    """
    with torch.no_grad():
        dtype = accumulation_dtype(weight.dtype)
        rows = [torch.where(at[:, None], h, 0).sum(dim=0, dtype=dtype) for h, at in zip(hidden, scored)]
        # In blocks: a narrow sum with a wide result would widen all of the weight first.
        columns = torch.stack([block.sum(dim=0, dtype=dtype) for block in weight.split(4096)]).sum(dim=0)
        sums = torch.stack(rows) @ columns if rows else columns.new_zeros(0)
        return sums if bias is None else sums + scored.sum(dim=1) * bias.sum(dtype=dtype)
