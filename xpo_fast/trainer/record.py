"""What a run leaves for its report beside metrics: the findings of the preflight, throughput, and memory by owner."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .findings import Report


def findings(report: Report | None) -> dict[str, Any] | None:
    """Returns what a check before training has found as JSON values; None if there was no check."""
    if report is None:
        return None
    row = None if report.row is None else {"where": report.row.where, "text": report.row.text(colours=False)}
    found = [{"check": f.check, "level": f.level, "text": f.text} for f in report.findings]
    return {"title": report.title, "seconds": report.seconds, "findings": found, "row": row}


def memory(model: torch.nn.Module, optimizer: Any, device: torch.device) -> dict[str, Any]:
    """Returns this process's peak of memory and the bytes of what it holds by owner, as JSON values.

    Called after training. peak: on CUDA what torch has allocated at most, else the largest resident memory of the
    process, which includes libraries and loading; None where the system does not tell. Gradients are counted as the
    weights that have one.
    """
    weights = {id(p): p for p in model.parameters()}.values()
    trained, frozen = ([p for p in weights if p.requires_grad == flag] for flag in (True, False))
    held = {
        "weights, trained": trained,
        "weights, frozen": frozen,
        "gradients": trained,
        "optimizer": _state(optimizer),
    }
    owners = {name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in held.items()}
    if device.type == "cuda":
        return {"what": "CUDA, allocated", "peak_bytes": torch.cuda.max_memory_allocated(device), "owners": owners}
    return {"what": "resident memory of the process", "peak_bytes": _resident_peak(), "owners": owners}


def _state(optimizer: Any) -> list[torch.Tensor]:
    """Returns the tensors of an optimizer's state, as torch or accelerate's wrapper of it has them."""
    state = getattr(optimizer, "state", None) or {}
    entries = [values for values in state.values() if isinstance(values, dict)]
    return [x for values in entries for x in values.values() if isinstance(x, torch.Tensor)]


def _resident_peak() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
