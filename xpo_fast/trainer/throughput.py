"""Throughput of a training: tokens trained on and the seconds that took, since the last log and altogether."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..reduce import sum_over_ranks
from ..types import IGNORE_INDEX

logger = logging.getLogger("xpo_fast")


def read_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the tokens of a batch's rows, padding and rows without a target left out: () int64."""
    tokens = batch["attention_mask"].sum(dim=1)
    learned = (batch["targets"] != IGNORE_INDEX).any(dim=1)
    texts = len(tokens) - len(learned)  # rows with targets of their own
    return (tokens * torch.nn.functional.pad(learned, (0, texts), value=True)).sum()


class Throughput:
    """Counts tokens and the time of training steps; evaluation, saving and sampling do not count."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # tokens, computed, padded since the last log
        self._total = torch.zeros_like(self._counts)  # of all ranks
        self._total_s, self._paused_s, self._began = 0.0, 0.0, 0.0

    def begin(self) -> None:
        """Starts the clock, before the first step's batches are drawn; later calls change nothing."""
        if not self._began:
            self._began, self._paused_s = time.perf_counter(), 0.0

    def add(self, read: Tensor, computed: int, padded: int) -> None:
        """Adds a step: tokens of its rows () int64, positions that are computed, and those of padded batches."""
        counts = torch.stack([read.to(self._device), *torch.tensor([computed, padded]).to(self._device)])
        self._counts = self._counts + counts

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - began

    def pop(self) -> float:
        """Returns tokens per second since the last call, of all ranks. Every rank must call it."""
        counts = sum_over_ranks(self._counts)
        tokens = int(counts[0])  # waits for the steps
        now = time.perf_counter()
        seconds = max(now - self._began - self._paused_s, 1e-9)
        self._total, self._total_s = self._total + counts, self._total_s + seconds
        self._counts, self._paused_s, self._began = torch.zeros_like(counts), 0.0, now
        return tokens / seconds

    def totals(self) -> dict[str, float]:
        """Returns what was trained on up to the last log, by all ranks: tokens, seconds, positions."""
        tokens, computed, padded = self._total.tolist()
        rate = tokens / self._total_s if self._total_s else 0.0
        counts = {"tokens": tokens, "positions_computed": computed, "positions_padded": padded}
        return {**counts, "seconds": self._total_s, "tokens_per_second": rate}

    def say(self, *, main: bool) -> None:
        """Logs what the whole training was like. Every rank must call it; main: on this one it is logged."""
        if int(sum_over_ranks(self._counts)[0]):
            self.pop()
        tokens, computed, padded = self._total.tolist()
        if main and tokens:
            logger.info(
                "trained on %s tokens, %s per second; %s positions computed, %s in padded batches (%.0f%% saved)",
                *(f"{x:,}" for x in (tokens, round(tokens / self._total_s), computed, padded)),
                100 * (1 - computed / padded),
            )


def saved(computed: int, padded: int, device: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the share of positions saved as a metric, and its weight, for `Means`."""
    share, weight = torch.tensor([1 - computed / max(padded, 1), float(padded)]).to(device)
    return {"tokens_saved": share}, {"tokens_saved": weight}
