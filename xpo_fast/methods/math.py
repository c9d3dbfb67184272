"""Small functions that the methods share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A mean log-prob of exactly 0 (a probability that rounds to 1) has infinite odds. The largest log-prob
# admitted is far above float32's resolution of log-probs, so no finite case is changed.
_MAX_LOGP = -1e-10


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, accurate at both ends (Mächler 2012, "Accurately computing log(1 − exp(−|a|))")."""
    half = -math.log(2.0)
    # Each branch sees only arguments it can differentiate: the gradient of the one not taken is multiplied by zero.
    near = torch.log(-torch.expm1(x.clamp(min=half)))
    return torch.where(x > half, near, torch.log1p(-torch.exp(x.clamp(max=half))))


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 − p)) from log p ≤ 0."""
    logp = logp.clamp(max=_MAX_LOGP)
    return logp - log1mexp(logp)


def check(condition: bool, expected: str, got: object) -> None:
    """Raise the ValueError of a hyperparameter out of range."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{name} to be one of {', '.join(choices)}", value)
