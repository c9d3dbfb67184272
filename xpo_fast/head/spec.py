"""The map from hidden states to logits, as plain values, and the dtypes and positions that every backend shares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device import on_host, static_shapes, to_device

# Statistics beyond logp and lse. The differentiable ones have gradients of their own, which need each tile again.
OF_REFERENCE = ("kl", "reverse_kl", "jsd")
DIFFERENTIABLE = ("entropy", *OF_REFERENCE)
OUTPUTS = (*DIFFERENTIABLE, "log_sum_sq_probs", "mean_logit", "top1")


class Jsd(NamedTuple):
    """The settings of the statistic "jsd": β JSD as in GKD (arXiv 2306.13649), of logits divided by the temperature."""

    beta: float = 0.5
    temperature: float = 1.0

    def output(self) -> str:
        """Returns the name of the statistic with its settings, by which operators know it; `jsd_of` reads it."""
        beta, temperature = float(self.beta), float(self.temperature)
        if not 0 <= beta <= 1:
            raise ValueError(f"expected beta in [0, 1], 0 KL(ref ‖ policy) and 1 KL(policy ‖ ref), got {self.beta!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"expected a temperature of the divergence > 0, got {self.temperature!r}")
        return f"jsd:{beta!r}:{temperature!r}"


def jsd_of(output: str) -> Jsd | None:
    """Returns the settings that are in an output's name; None for another statistic."""
    name, *settings = output.split(":")
    return Jsd(*map(float, settings)) if name == "jsd" else None


def statistic(output: str) -> str:
    """Returns the name of an output's statistic, without settings."""
    return output.partition(":")[0]


def compares(outputs: Iterable[str]) -> bool:
    """Returns whether one of the outputs compares the policy with the reference."""
    return any(statistic(name) in OF_REFERENCE for name in outputs)


def differentiable(outputs: Iterable[str]) -> list[str]:
    """Returns the names of those statistics among the outputs that have gradients of their own."""
    return sorted({statistic(name) for name in outputs} & set(DIFFERENTIABLE))


@dataclass(frozen=True)
class Scaling:
    """z = softcap(logit_scale · (h Wᵀ + b)) / temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "softcap"):
            x = getattr(self, name)
            if x is not None and not 0 < x < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {x}")
        if not 0 < abs(self.logit_scale) < math.inf:
            raise ValueError(f"logit_scale must be finite and not 0, got {self.logit_scale}")

    @property
    def gain(self) -> float:
        """Returns dz/d(h Wᵀ + b) without the softcap's slope."""
        return self.logit_scale / self.temperature

    @property
    def ceiling(self) -> float | None:
        """Returns the bound on |z| that the softcap implies, or None without one."""
        return None if self.softcap is None else self.softcap / self.temperature

    def final(self, z: Tensor) -> Tensor:
        """Returns the final logits of h Wᵀ + b, under autograd."""
        z = z * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of logits and statistics: float32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_mixed_gemms(device: torch.device) -> bool:
    """Returns whether torch.mm has float32 results of narrower operands there; the meta device stands in for CUDA."""
    return device.type in ("cuda", "meta")


def check_targets(targets: Tensor, ignore_index: int, vocab: int) -> None:
    """Raises ValueError for a target (N,) outside the vocabulary; on a device, trips an assertion, without waiting."""
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if not on_host(targets):
        message = f"a target is outside the vocabulary of {vocab} tokens"
        torch._assert_async(~bad.any(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"target {int(targets[at])} at position {at} is outside the vocabulary of {vocab} tokens; "
            f"targets are token ids in [0, {vocab}) or ignore_index={ignore_index}"
        )


def check_selected(ids: Tensor, vocab: int) -> None:
    """Raises ValueError for a selected id outside the vocabulary; on a device, trips an assertion, without waiting."""
    bad = (ids < 0) | (ids >= vocab)
    if not on_host(ids):
        message = f"a selected id is outside the vocabulary of {vocab} tokens"
        torch._assert_async(~bad.any(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif bool(bad.any()):
        raise ValueError(
            f"selected id {int(ids[bad][0])} is outside the vocabulary of {vocab} tokens: selected_ids are ids in "
            f"[0, {vocab}) at every scored position"
        )


def scored_positions(
    targets: Tensor,  # (N,) int64
    ignore_index: int,
    vocab: int,
    device: torch.device | None = None,
) -> Tensor:
    """Checks the targets, and returns the indices (n,) of the positions to score, in order.

    They are on `device`, by default the targets' device. The host waits for targets on a device. While a CUDA graph is
    captured, it does not, and all N positions are returned.
    """
    check_targets(targets, ignore_index, vocab)
    device = targets.device if device is None else device
    if static_shapes(targets):
        return torch.arange(targets.shape[0], device=device)
    return to_device((targets != ignore_index).nonzero().squeeze(1), device)


def cast_for_autocast(*tensors: Any) -> list[Any]:
    """Returns the tensors in autocast's dtype if it is enabled, else as they are; float64 tensors are not cast.

    Nor are parameters of ZeRO-3, since a cast copy is no parameter that could be gathered: `gathered` casts them. A
    tensor that comes twice is cast once, so that a weight of policy and reference is gathered once.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    given = {id(t): t for t in tensors}
    alone = {at for at, t in given.items() if t is None or t.dtype == torch.float64 or hasattr(t, "ds_shape")}
    cast = {at: t if at in alone else t.to(dtype) for at, t in given.items()}
    return [cast[id(t)] for t in tensors]
