"""Two streams of a device: GEMMs run on the caller's, row operations on another, beside the next GEMM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Row operations have fewer and shorter blocks than a GEMM, so they have priority.
    return torch.cuda.Stream(device, priority=-1)


class Lanes:
    """The caller's stream of a device and a side stream beside it, or with two=False the caller's alone.

    `join` must be called at the end. Memory that both streams use may be freed only where an event orders the other
    stream before that, since the allocator knows of one stream only.
    """

    def __init__(self, device: torch.device, two: bool) -> None:
        self._side = _side_stream(device) if two and device.type == "cuda" else None

    @property
    def ahead(self) -> int:
        """Returns the number of steps whose products are in memory at once."""
        return 1 if self._side is None else 2

    def join(self) -> None:
        """Orders later work on the caller's stream after all work on the side stream."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def mark(self) -> Any:
        """Returns an event recorded on the current stream, or None without a side stream."""
        return None if self._side is None else torch.cuda.current_stream(self._side.device).record_event()

    def wait(self, event: Any) -> None:
        """Orders later work on the current stream after an event, if there is one."""
        if self._side is not None and event is not None:
            torch.cuda.current_stream(self._side.device).wait_event(event)

    @contextmanager
    def other(self) -> Iterator[None]:
        """Makes the side stream, if there is one, the current one in a `with` block."""
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            yield
