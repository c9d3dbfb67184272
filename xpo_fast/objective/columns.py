"""The columns of a call: checked as the caller gives them, and read as inputs of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .batch import HARMLESS, Batch


def check_columns(batch: Batch, given: Mapping[str, Tensor | None], supplied: set[str]) -> dict[str, Tensor]:
    """Returns the caller's columns on the call's device.

    supplied: columns that the objective provides if the caller does not. Raises ValueError for a column that is
    missing, unknown, or of a wrong shape or device.
    """
    takes = dict.fromkeys(n for m in batch.methods for n in m.columns)
    needed = dict.fromkeys(n for m in batch.methods for n in m.columns if n in m.required)
    if batch.pairs:  # a list's columns cannot say more of each of its pairs
        takes = {n: None for m in batch.methods for n in ("scores", *m.columns) if n == "scores" or m.axes(n) == ("",)}
        needed = {n: None for n in takes if n == "scores" or n in needed}
    unknown = sorted(set(given) - set(takes))
    missing = [n for n in needed if given.get(n) is None and n not in supplied]
    if unknown or missing:
        raise ValueError(
            f"{batch.name}: "
            + "; ".join(f"{what} {', '.join(n)}" for what, n in (("missing", missing), ("unknown", unknown)) if n)
            + f". It takes the columns: {', '.join(takes) or 'none'}"
        )
    columns = {name: x for name, x in given.items() if x is not None}
    for name, x in columns.items():
        expected = _column_shapes(batch, name)
        if not isinstance(x, Tensor) or (expected and tuple(x.shape) not in expected):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            shapes = " or ".join(dict.fromkeys(str(shape) for shape in expected))
            if expected == [(), ()]:
                raise ValueError(f"{batch.name}: {name} must be one number () for all units, got {got}")
            raise ValueError(f"{batch.name}: {name} must be a tensor {shapes}, got {got}")
        columns[name] = batch.placed(name, x)
    return columns


def _column_shapes(batch: Batch, name: str) -> list[tuple[int, ...]]:
    """Returns the shapes that a column may have; none if it may have any."""
    method = next((m for m in batch.methods if name in m.inputs), None)
    if method is None or batch.pairs:
        return [(batch.units, batch.index.shape[1])] if name == "scores" else [(batch.units,), ()]
    width = batch.index.shape[1] - batch.has_rejected
    sizes = {"": (), "U": (batch.units,), "UK": (batch.units, width), "UT": tuple(batch.shape)}
    axes = method.axes(name)
    return [] if "II" in axes else [sizes[a] for a in axes] + [()]


def per_token(batch: Batch, name: str, x: Tensor) -> bool:
    """Returns whether a column has one entry per token.

    Where every packed row has one position, a column (N,) is read as one entry per row.
    """
    axes = batch.methods[0].axes(name)
    per_row = x.shape == (batch.units,) and "U" in axes
    return "UT" in axes and x.dim() > 0 and x.shape == batch.shape and not per_row


def column(batch: Batch, name: str, x: Tensor, units: Tensor | None) -> dict[str, Tensor]:
    """Returns a caller's column as inputs of some units, or with None of all.

    Units that do not count get a number that every method accepts.
    """
    if batch.pairs and name == "scores":
        return batch.inputs("score", x.reshape(-1), units, 0.0)
    if x.dim() == 0:
        return {name: x}
    valid = batch.valid
    if units is not None:
        x, valid = x[units], valid[units]
    if x.dim() == 1 and x.is_floating_point():
        x = torch.where(valid, x, HARMLESS.get(name, 0.0))
    return {name: x}


def check_logps(batch: Batch, name: str, values: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Returns log-probs detached, on the call's device and at least in float32.

    Raises ValueError for values of none of the shapes.
    """
    if values.shape not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must be {expected}, got {tuple(values.shape)}")
    values = batch.placed(name, values.detach())
    return values if values.dtype == torch.float64 else values.float()
