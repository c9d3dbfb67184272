"""Products on the caller's stream; with two lanes, their rows on another, where they hide behind the next product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Row operations are short and few beside a product's blocks: they go first when both could.
    return torch.cuda.Stream(device, priority=-1)


class Lanes:
    """Two streams of one device, or the caller's alone, on which nothing hides; `join` ends it.

    Memory that both use must be freed where an event keeps the other away: the allocator knows of one stream alone.
    """

    def __init__(self, device: torch.device, two: bool) -> None:
        self._side = _side_stream(device) if two and device.type == "cuda" else None

    @property
    def ahead(self) -> int:
        """How many products are in memory at once."""
        return 1 if self._side is None else 2

    def join(self) -> None:
        """The caller's stream after the other."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def mark(self) -> Any:
        """An event after what has been begun on the current stream."""
        return None if self._side is None else torch.cuda.current_stream(self._side.device).record_event()

    def wait(self, event: Any) -> None:
        """The current stream after an event, if there is one."""
        if self._side is not None and event is not None:
            torch.cuda.current_stream(self._side.device).wait_event(event)

    @contextmanager
    def other(self) -> Iterator[None]:
        """The other stream as the current one."""
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            yield
