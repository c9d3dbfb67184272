"""What every backend is given: the map from hidden states to logits, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import on_host, static_shapes, to_device

# Statistics beyond logp and lse. The first three have gradients of their own, which need the tile again.
DIFFERENTIABLE = ("entropy", "kl", "reverse_kl")
OUTPUTS = (*DIFFERENTIABLE, "log_sum_sq_probs", "mean_logit", "top1")


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
        """dz/d(h Wᵀ + b) apart from the softcap."""
        return self.logit_scale / self.temperature

    @property
    def ceiling(self) -> float | None:
        """The bound on abs(z) that the softcap implies."""
        return None if self.softcap is None else self.softcap / self.temperature


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and statistics: float32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_mixed_gemms(device: torch.device) -> bool:
    """Whether torch.mm gives float32 results of narrower operands there; the meta device stands in for one that does."""
    return device.type in ("cuda", "meta")


def check_targets(targets: Tensor, ignore_index: int, vocab: int) -> None:
    """ValueError for a target (N,) outside the vocabulary; on a device, which would have to be waited for, an assertion."""
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


def scored_positions(
    targets: Tensor,  # (N,) int64
    ignore_index: int,
    vocab: int,
    device: torch.device | None = None,
) -> Tensor:
    """Indices (n,) of the positions to score, in order, on `device` or where the targets are; `check_targets`.

    Targets on a device are waited for, on the host not. While a CUDA graph is captured, they are all N positions.
    """
    check_targets(targets, ignore_index, vocab)
    device = targets.device if device is None else device
    if static_shapes(targets):
        return torch.arange(targets.shape[0], device=device)
    return to_device((targets != ignore_index).nonzero().squeeze(1), device)


def cast_for_autocast(*tensors: Any) -> list[Any]:
    """Under autocast, the tensors in its dtype, float64 left alone; otherwise as they are.

    So are parameters of ZeRO-3, which are no parameters once cast: `whole` gathers them before.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    alone = (t is None or t.dtype == torch.float64 or hasattr(t, "ds_shape") for t in tensors)
    return [t if as_it_is else t.to(dtype) for t, as_it_is in zip(tensors, alone, strict=True)]


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None = None,
) -> None:
    """ValueError unless hidden (…, D), weight (V, D), targets (…) and bias (V,) fit together.

    With an adapter (V, r) hidden is (…, D + r). All are on one device, but for targets on the host.
    """
    if not hidden.is_floating_point() or hidden.dim() < 1:
        raise ValueError(f"hidden must be a float tensor (…, D), got {hidden.dtype} {tuple(hidden.shape)}")
    if adapter is not None:
        _check_adapter(hidden, weight, adapter)
    elif weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V, D) with D = {hidden.shape[-1]} as hidden {tuple(hidden.shape)} has, "
            f"got {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have one token a hidden state: expected {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or compute under torch.autocast"
        )
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias), ("adapter", adapter)):
        if x is not None and x.device != hidden.device and not (x is targets and on_host(x)):
            raise ValueError(f"hidden is on {hidden.device} and {name} on {x.device}: move one of them")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be a float tensor ({weight.shape[0]},), got {bias.dtype} {tuple(bias.shape)}")


def _check_adapter(hidden: Tensor, weight: Tensor, adapter: Tensor) -> None:
    if weight.dim() != 2 or adapter.shape[:-1] != weight.shape[:1] or not adapter.is_floating_point():
        raise ValueError(
            f"weight must be (V, D) and adapter a float tensor (V, r), got {tuple(weight.shape)} and {adapter.dtype} "
            f"{tuple(adapter.shape)}"
        )
    width = weight.shape[1] + adapter.shape[1]
    if hidden.shape[-1] != width:
        raise ValueError(
            f"with an adapter of rank {adapter.shape[1]}, hidden must be [h, x], {width} wide, x = s·dropout(h) Aᵀ: expected "
            f"(…, {width}), got {tuple(hidden.shape)}; `Head.inputs(hidden)` makes it"
        )
