"""Small functions that the methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..device import on_host
from ..wording import did_you_mean

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


def past_overflow(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """fn(x), fn torch.exp or torch.expm1, continued along its tangent from where the dtype's range is nearly used up.

    The value is exact up to there (x = 76 in float32), and beyond it finite, increasing, and with a slope.
    """
    top = math.log(torch.finfo(x.dtype).max) - 12
    return fn(x.clamp(max=top)) + math.exp(top) * torch.relu(x - top)


def check(condition: bool, expected: str, got: object) -> None:
    """Raise the ValueError of a hyperparameter out of range."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        near = did_you_mean(str(value), choices)
        raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}{near}")


def check_bool(name: str, x: Tensor) -> None:
    if x.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {x.dtype}")


_unchecked = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Data is not checked in the block: it has been before, all of it."""
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


def check_rows(ok: Tensor, expected: str, remedy: str, **values: Tensor) -> None:
    """Raise the ValueError of bad data: the first row where `ok` (U,) is false, its values, and what to do.

    On a device, which would have to be waited for, an assertion of the device's fails in its place. A compiled graph is
    not broken for it: there, and inside `unchecked`, nothing is checked.
    """
    if torch.compiler.is_compiling() or _unchecked.get():
        return
    if not on_host(ok):
        message = f"expected {expected}; {remedy}"
        torch._assert_async(ok.all(), message)  # pyright: ignore[reportPrivateImportUsage]
        return
    if bool(ok.all()):
        return
    ok = torch.atleast_1d(ok)
    row = int((~ok).nonzero()[0])
    got = ", ".join(f"{name} = {float(x.expand_as(ok)[row]):g}" for name, x in values.items())
    raise ValueError(f"expected {expected}, got {got} in row {row}; {remedy}")


def k1(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """log π − log ref, an unbiased estimate of KL(π ‖ ref) in tokens drawn from π; its own gradient is not KL's.

    k1, k2, k3: Schulman, "Approximating KL divergence", 2020.
    """
    return token_logp - ref_token_logp


def k2(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """½(log π − log ref)², biased and of low variance; its gradient is that of KL(π ‖ ref) in expectation."""
    return 0.5 * (token_logp - ref_token_logp) ** 2


def k3(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """ref/π − 1 − log(ref/π) ≥ 0, an unbiased estimate of KL(π ‖ ref) of low variance: the KL term of GRPO."""
    log_ratio = ref_token_logp - token_logp
    return past_overflow(torch.expm1, log_ratio) - log_ratio


def win_rates(wins: Tensor) -> Tensor:  # (K, K) → (K,)
    """Returns the mean P(i beats j) over the others j, NaN where none is known; ½ for a single candidate.

    wins: P(i beats j), NaN where unknown; the diagonal is not read.
    """
    if len(wins) == 1:
        return torch.full((1,), 0.5)
    return wins.masked_fill(torch.eye(len(wins), dtype=torch.bool), math.nan).nanmean(dim=1)
