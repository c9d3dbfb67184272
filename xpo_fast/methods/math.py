"""The arithmetic and the checks that several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..device import on_host
from ..wording import did_you_mean

Losses = tuple[Tensor, dict[str, Tensor]]  # one loss per unit, and detached metrics by name

# A mean log-prob of exactly 0 (a probability that rounds to 1) has infinite odds. The largest log-prob
# admitted is far above float32's resolution of log-probs, so no finite case is changed.
_MAX_LOGP = -1e-10


def log1mexp(x: Tensor) -> Tensor:
    """Returns log(1 − eˣ), x < 0, accurate at both ends (Mächler 2012, "Accurately computing log(1 − exp(−|a|))")."""
    half = -math.log(2.0)
    # Each branch sees only arguments it can differentiate: the gradient of the one not taken is multiplied by zero.
    near = torch.log(-torch.expm1(x.clamp(min=half)))
    return torch.where(x > half, near, torch.log1p(-torch.exp(x.clamp(max=half))))


def log_odds(logp: Tensor) -> Tensor:
    """Returns log(p / (1 − p)) from log p ≤ 0."""
    logp = logp.clamp(max=_MAX_LOGP)
    return logp - log1mexp(logp)


def past_overflow(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns fn(x), fn torch.exp or torch.expm1, continued along its tangent near the end of the dtype's range.

    The value is exact up to there (x = 76 in float32), and beyond it finite, increasing, and with a slope.
    """
    top = math.log(torch.finfo(x.dtype).max) - 12
    return fn(x.clamp(max=top)) + math.exp(top) * torch.relu(x - top)


def smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    """Returns −(1−ε) log σ(h) − ε log σ(−h)."""
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def pair_metrics(
    reward_w: Tensor, reward_l: Tensor, logp_w: Tensor | None = None, logp_l: Tensor | None = None, **others: Tensor
) -> dict[str, Tensor]:
    """Returns the metrics of pairs by TRL's names, detached, one entry per pair."""
    named = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/accuracies": (reward_w > reward_l).to(reward_w.dtype),
        "rewards/margins": reward_w - reward_l,
        "logps/chosen": logp_w,
        "logps/rejected": logp_l,
        **others,
    }
    return {name: value.detach() for name, value in named.items() if value is not None}


def check(condition: bool, expected: str, got: object) -> None:
    """Raises the ValueError of a hyperparameter that is out of range."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got!r}")


def check_beta(beta: float) -> None:
    """Raises ValueError unless beta > 0."""
    check(beta > 0, "beta > 0", beta)


def check_smoothing(label_smoothing: float) -> None:
    """Raises ValueError unless label_smoothing is in [0, 0.5)."""
    check(0 <= label_smoothing < 0.5, "label_smoothing in [0, 0.5)", label_smoothing)


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises the ValueError of an option that is none of its choices."""
    if value not in choices:
        words = [str(c) for c in choices]
        near = did_you_mean(str(value), words)
        raise ValueError(f"expected {name} to be one of {', '.join(words)}, got {value!r}{near}")


def check_lengths(length: Tensor | None, name: str, why: str) -> Tensor:
    """Returns the lengths. Raises ValueError where they are missing."""
    if length is None:
        raise ValueError(f"missing {name}: {why} needs the completions' lengths in tokens")
    return length


def check_bool(name: str, x: Tensor) -> None:
    """Raises ValueError unless the dtype is bool."""
    if x.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {x.dtype}")


_unchecked = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Switches `check_rows` off in the block, for data that have all been checked before."""
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


def check_rows(ok: Tensor, expected: str, remedy: str, **values: Tensor) -> None:
    """Raises the ValueError of bad data: the first row where `ok` (U,) is false, its values, and what to do.

    On a GPU, which the host would have to wait for, an assertion on the device fails instead. Nothing is checked in a
    compiled graph, which the check would break, and inside `unchecked`.
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
    """Returns log π − log ref, an unbiased estimate of KL(π ‖ ref) in tokens drawn from π.

    Its own gradient is not KL's. k1, k2, k3: Schulman, "Approximating KL divergence", 2020.
    """
    return token_logp - ref_token_logp


def k2(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """Returns ½(log π − log ref)², biased, of low variance. Its gradient is that of KL(π ‖ ref) in expectation."""
    return 0.5 * (token_logp - ref_token_logp) ** 2


def k3(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """Returns ref/π − 1 − log(ref/π) ≥ 0, an unbiased estimate of KL(π ‖ ref) of low variance: the KL term of GRPO."""
    log_ratio = ref_token_logp - token_logp
    return past_overflow(torch.expm1, log_ratio) - log_ratio


def win_rates(wins: Tensor) -> Tensor:  # (K, K) → (K,)
    """Returns the mean P(i beats j) over the others j, NaN where none is known; ½ for a single candidate.

    wins: P(i beats j), NaN where unknown; the diagonal is not read.
    """
    if len(wins) == 1:
        return torch.full((1,), 0.5)
    return wins.masked_fill(torch.eye(len(wins), dtype=torch.bool), math.nan).nanmean(dim=1)
