"""Shares measurements between processes of a machine: JSON files in the cache folder, and locks."""

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

WAIT_S = 10.0  # longest wait for another writer; writing takes milliseconds


@dataclass(frozen=True)
class Store:
    """A JSON file of entries in the cache folder. version: of its layout, or of the meaning of an entry."""

    name: str
    version: int

    @property
    def path(self) -> Path:
        """The file; FileNotFoundError if the user has no home and XPO_FAST_CACHE is not set."""
        return _folder() / self.name

    def read(self) -> dict[str, Any]:
        """Returns the entries; none if there is no file, or one of another version.

        Raises OSError if the file cannot be read, ValueError if it is not a file of this class.
        """
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
        """Adds entries in place of those of the same key; entries that other processes have added stay.

        A file of another kind or version is kept beside it. Raises OSError if nothing can be written.
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
    """Returns `cache_dir()`, with FileNotFoundError for a user without a home."""
    try:
        return cache_dir()
    except RuntimeError as error:
        raise FileNotFoundError(f"no folder to keep it in, set XPO_FAST_CACHE to one: {error}") from error


@contextlib.contextmanager
def locked(name: str, seconds: float) -> Iterator[None]:
    """Holds a lock; without locks, or if another process holds it longer than `seconds`, continues all the same."""
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
            if held:  # explicitly: a process forked meanwhile has the file open, too
                fcntl.flock(lock, fcntl.LOCK_UN)
