"""The result file of a stage of gpu_stages.py: what was found, and what was being done when the process ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from xpo_fast.files import write_json

DEVICE_LOST = 3  # exit status: an error of a kernel stays with the process, and its results are in the file


class Report:
    """Written anew, whole, at every step: who is killed, or dies of what it is about to do, has said so."""

    def __init__(self, path: Path | None, **content: Any) -> None:
        self.path, self.start = path, time.monotonic()
        self.content = {"ended": False, "doing": "", "contender": "", "problems": [], **content}

    def save(self, **more: Any) -> None:
        self.content |= {**more, "seconds": time.monotonic() - self.start}
        if self.path:
            write_json(self.path, self.content)

    def begin(self, doing: str, contender: str = "") -> None:
        """What comes next, and of whom where it is somebody's who may be left out."""
        self.save(doing=doing, contender=contender)

    def end(self) -> None:
        """All was done, well or badly: `problems` says."""
        self.save(ended=True, doing="", contender="")
