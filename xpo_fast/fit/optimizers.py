"""The optimizer of a run: torch's and transformers' own, and the state of those that need a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Bytes of state per weight of those of bitsandbytes, which keeps weights of fewer than 4,096 numbers in float32 (its
# `min_8bit_size`), and per block of 256 a float32 for each of its two or one moments.
_BITSANDBYTES = {"adamw": 2, "lion": 1}
_LEAST, _BLOCK = 4096, 256
_PROJECTED_RANK = {"galore": 128, "apollo": 256}  # transformers' default of optim_args, for r
KNOWN = (
    *("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("galore_adamw", "galore_adafactor", "apollo_adamw", "lomo", "adalomo"),
)


def check(name: str) -> None:
    """Raises ValueError for an optimizer whose state is not known here."""
    if name not in KNOWN:
        raise ValueError(f"optim={name}: fit does not know what it keeps; it knows {', '.join(KNOWN)}")


def make(name: str, parameters: Iterable[Tensor], arguments: dict[str, Any], *, on_cpu: bool) -> torch.optim.Optimizer:
    """Returns the optimizer of transformers' name, of weights without contents. arguments: of `optim_args`."""
    check(name)
    trained = list(parameters)
    if name == "adamw_torch":
        return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, foreach=not on_cpu)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(trained, lr=1e-5, scale_parameter=False, relative_step=False)
    if name in ("sgd", "adagrad", "rmsprop"):
        kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}[name]
        return kind(trained, lr=1e-5)
    return _State(name, trained, arguments)


class _State(torch.optim.Optimizer):
    """Keeps as many bytes per weight as an optimizer of another package keeps on the device, and does nothing else."""

    def __init__(self, name: str, parameters: list[Tensor], arguments: dict[str, Any]) -> None:
        super().__init__(parameters, {})
        self._name, self._arguments = name, arguments

    def step(self, closure: Any = None) -> None:
        """Makes the state of the weights that have a gradient, if it is missing."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p] and (size := self._bytes(p)):
                    self.state[p] = {"bytes": p.new_empty(size, dtype=torch.uint8)}

    def _bytes(self, p: Tensor) -> int:
        count, kind = p.numel(), self._name.removeprefix("paged_").partition("_")[0]
        if self._name == "adamw_torch_fused":  # which is not made for the meta device
            return 2 * p.nbytes
        if self._name.startswith("paged_") or kind == "lomo":  # on the host; none
            return 0
        if kind == "adalomo":
            return 4 * (sum(p.shape) if p.dim() > 1 else count)
        if kind in _PROJECTED_RANK and p.dim() == 2 and min(p.shape) > (rank := self._rank(kind)):
            short, long = sorted(p.shape)
            projector = 0 if kind == "apollo" else short * rank  # APOLLO's is drawn anew from a seed
            moments = rank + long if self._name.endswith("adafactor") else 2 * rank * long
            return 4 * (projector + moments)
        moments = _BITSANDBYTES.get(kind, 2)
        if self._name.endswith("8bit") and count >= _LEAST:
            return moments * (count + 4 * -(-count // _BLOCK))
        return 4 * moments * count

    def _rank(self, kind: str) -> int:
        return int(self._arguments.get("rank", _PROJECTED_RANK[kind]))
