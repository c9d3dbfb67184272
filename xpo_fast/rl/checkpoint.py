"""The file that an online run adds to a checkpoint, and the checkpoint that is written when a run fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import SavingError
from ..resume import last_checkpoint as last_complete_checkpoint
from ..trainer import reading

logger = logging.getLogger("xpo_fast")

STATE_FILE = "rl_state.pt"


@dataclass
class Progress:
    """How far a run has got, beside the weights."""

    kl_coef: float
    rollouts: int = 0  # collected
    cursor: int = 0  # prompts drawn, pass after pass
    samples_bytes: int = 0  # length of SAMPLES_FILE


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Returns the last complete checkpoint of an online run, or None."""
    return last_complete_checkpoint(output_dir, STATE_FILE)


def load_state(folder: Path) -> dict[str, Any]:
    """Reads STATE_FILE of a checkpoint onto the CPU; raises ValueError where it is missing or broken."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"no {STATE_FILE} in {folder}: expected a checkpoint of an online run")
    with reading(str(folder)):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def saved_if_it_fails(save: Callable[[], None]) -> Iterator[None]:
    """Calls `save` before an Exception that the block raises passes on; a KeyboardInterrupt passes at once."""
    try:
        yield
    except Exception:
        try:
            save()
        except SavingError as second:  # the first failure is the one to mend
            logger.warning("%s", second)
        raise
