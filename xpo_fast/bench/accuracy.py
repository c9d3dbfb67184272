"""Compares results with float64's, and says which errors are too large for a time to be given."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .problem import Results

# Largest absolute error of a log-prob; for the others, the norm of the error divided by the norm of the truth.
# 2⁻⁸ is the largest relative error of one rounding to bf16.
TOLERANCES = {
    "fp32": {"logps": 2e-5, "loss": 1e-5, "hidden_grad": 1e-5, "weight_grad": 1e-5},
    "bf16": {"logps": 1e-3, "loss": 1e-3, "hidden_grad": 2**-8, "weight_grad": 2**-8},
}
# A peer with larger errors is wrong, not only imprecise.
PEER_TOLERANCES = {
    "fp32": {"logps": 1e-3, "loss": 1e-4, "hidden_grad": 1e-3, "weight_grad": 1e-3},
    "bf16": {"logps": 0.2, "loss": 0.02, "hidden_grad": 0.1, "weight_grad": 0.1},
}
BLOCK = 8192  # rows of a gradient whose error is computed at a time: a gradient may be gigabytes


def errors_of(found: Results, truth: Results) -> dict[str, float | None]:
    """Returns the error of each result by name; None for NaN and infinities, which JSON does not have."""
    errors = {}
    for name, value in found.items():
        error = _largest_error(value, truth[name]) if name == "logps" else _relative_error(value, truth[name])
        errors[name] = error if math.isfinite(error) else None
    return errors


def _largest_error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item()


def _relative_error(found: Tensor, truth: Tensor) -> float:
    """Returns the norm of the error divided by the norm of the truth."""
    error = norm = 0.0
    for f, t in zip(torch.atleast_1d(found).split(BLOCK), torch.atleast_1d(truth).split(BLOCK), strict=True):
        error += (f.double() - t).square().sum().item()
        norm += t.double().square().sum().item()
    return (error / norm) ** 0.5 if norm else math.inf if error else 0.0


def wrong(errors: Mapping[str, float | None], dtype: str, *, ours: bool) -> list[str]:
    """Returns the names of the results whose error is above its tolerance. dtype: "fp32" or "bf16"."""
    tolerances = (TOLERANCES if ours else PEER_TOLERANCES)[dtype]
    return [name for name, error in errors.items() if error is None or error > tolerances[name]]
