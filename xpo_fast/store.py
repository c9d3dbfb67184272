"""What processes of a machine find out for one another: entries of a JSON file in the cache folder, and a lock of theirs."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import cache_dir, write_json

WAIT_S = 10.0  # for who writes; to write takes milliseconds


@dataclass(frozen=True)
class Store:
    """A file of the cache folder. version: of its layout, or of what an entry means."""

    name: str
    version: int

    @property
    def path(self) -> Path:
        return _folder() / self.name

    def read(self) -> dict[str, Any]:
        """Return the entries; none where there is no file, or one of another version. OSError, or ValueError for no file of ours."""
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        if not isinstance(content, dict) or not isinstance(content.get("version"), int):
            raise ValueError("it has no version")
        if content["version"] != self.version:
            return {}
        if not isinstance(content.get("entries"), dict):
            raise ValueError("it has no entries")
        return content["entries"]

    def add(self, entries: Mapping[str, Any]) -> None:
        """Add entries, where they take the place of older ones; others', written meanwhile too, stay.

        What is no file of ours, or one of another version, is kept beside it. Raises OSError where nothing can be written.
        """
        with locked(self.path.stem, WAIT_S):
            known = {}
            with contextlib.suppress(ValueError):
                known = self.read()
            if not known and self.path.exists():
                os.replace(self.path, self.path.with_suffix(".json.old"))
            write_json(self.path, {"version": self.version, "entries": {**known, **entries}})


TUNING = Store("tuning.json", version=1)  # what `xpo-fast tune` measures


def _folder() -> Path:
    try:
        return cache_dir()
    except RuntimeError as error:  # of a user without a home
        raise FileNotFoundError(f"no folder to keep it in, set XPO_FAST_CACHE to one: {error}") from error


@contextlib.contextmanager
def locked(name: str, seconds: float) -> Iterator[None]:
    """While no other process is inside; or, where there are no locks or another holds it too long, all the same."""
    try:
        import fcntl

        _folder().mkdir(parents=True, exist_ok=True)
        lock = (_folder() / f"{name}.lock").open("a")
    except (ImportError, OSError):
        yield
        return
    with lock:
        until = time.monotonic() + seconds
        held = False
        while not held:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= until:
                    break
                time.sleep(0.05)
            except OSError:
                break
        try:
            yield
        finally:
            if held:  # by name: a process that was forked meanwhile has the file open, too
                fcntl.flock(lock, fcntl.LOCK_UN)
