"""Writes train_log.jsonl: every log of a run, one JSON object per line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import finite, saving, write_atomically


def json_log(args: argparse.Namespace) -> Any:
    """Returns a callback that appends every log to train_log.jsonl in --output-dir.

    The file of an earlier run stays until training begins. A resumed run removes the lines of steps after its
    checkpoint, which it trains again, and does not write what it measures before them.
    """
    from transformers import TrainerCallback

    path = Path(args.output_dir) / "train_log.jsonl"
    waiting: list[str] | None = []  # lines until training begins

    class JsonLog(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal waiting
            if not state.is_world_process_zero:
                return
            first, waiting = waiting or [], None
            if not state.global_step:
                write_atomically(path, "".join(first).encode())
                return
            if not path.is_file():
                return
            kept, last = [], 0
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    step = json.loads(line)["step"]
                except ValueError:  # was being written when the run died
                    continue
                if last <= step <= state.global_step:
                    kept.append(line)
                    last = step
            write_atomically(path, "".join(kept).encode())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not (state.is_world_process_zero and logs):
                return
            line = json.dumps(finite({"step": state.global_step, **logs})) + "\n"
            if waiting is not None:
                waiting.append(line)
                return
            with saving(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)

    return JsonLog()
