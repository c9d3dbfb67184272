"""Keeps a run alive when the reader of its output is gone, as in `xpo-fast train … | head -3`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Outliving:
    """A stream that drops text once its reader has closed the pipe."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.closed_by_reader = False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        self.closed_by_reader = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # so does the rest of the buffers when Python ends
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Inside, nothing fails because the reader of stdout or stderr is gone."""
    own = sys.stdout, sys.stderr
    outliving: Any = [_Outliving(stream) for stream in own]
    sys.stdout, sys.stderr = outliving
    try:
        yield
    finally:
        for stream in outliving:
            stream.flush()
        sys.stdout, sys.stderr = own
