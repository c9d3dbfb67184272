"""Writes the result file of a stage of gpu_stages.py, which also says what the process was doing if it ended early."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from xpo_fast.files import write_json

DEVICE_LOST = 3  # exit status: a kernel's error has made the device unusable for this process; the file has its results


class Report:
    """Result file that is rewritten atomically before each step, so that it names the step that ends the process."""

    def __init__(self, path: Path | None, **content: Any) -> None:
        self.path, self.start = path, time.monotonic()
        self.content = {"ended": False, "doing": "", "contender": "", "problems": [], **content}

    def save(self, **more: Any) -> None:
        """Adds to the content and writes the file, if there is one."""
        self.content |= {**more, "seconds": time.monotonic() - self.start}
        if self.path:
            write_json(self.path, self.content)

    def begin(self, doing: str, contender: str = "") -> None:
        """Records what is done next, and the contender whose work it is, if any."""
        self.save(doing=doing, contender=contender)

    def end(self) -> None:
        """Records that all was done; `problems` says what failed."""
        self.save(ended=True, doing="", contender="")
