"""Files that appear whole or not at all, where they are kept, what is said where they cannot be written, and values as JSON takes
them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return where converted models, reference log-probs and measurements are kept: $XPO_FAST_CACHE, or ~/.cache/xpo_fast."""
    return Path(os.environ.get("XPO_FAST_CACHE") or Path.home() / ".cache" / "xpo_fast")


class SavingError(OSError):
    """Raised where something cannot be written: what, why, and how much room is left. Nothing half-written stays behind.

    checkpoint: the last whole checkpoint of the run, where the error is about one and there is one.
    """

    checkpoint: str | None = None


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Raise SavingError, which names `path`, for what the writers of torch, safetensors, tokenizers and Python raise inside.

    Other errors go through: they are not about files.
    """
    try:
        yield
    except SavingError:
        raise
    except Exception as error:
        reason = _why_not_written(error)
        if reason is None:
            raise
        raise SavingError(f"cannot write {path}: {reason}{_room(Path(path))}") from error


def existing_part(path: Path) -> Path:
    """Return the path, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _why_not_written(error: Exception) -> str | None:
    """The reason in the system's words; None for an error that is not about writing a file."""
    kind, text = type(error), " ".join(str(error).split())
    if isinstance(error, OSError):
        reason = error.strerror or text
    elif kind.__name__ == "SafetensorError" or kind is Exception:  # the latter is what tokenizers raises
        reason = text
    elif isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        reason = "the file ended before all of it was written"  # torch says nothing of why
    else:
        return None
    limited = ("too large", "ended before")
    hint = "; a quota, or a limit on the size of files (ulimit -f)?" if any(x in reason for x in limited) else ""
    return reason + hint


def _room(path: Path) -> str:
    try:
        free = shutil.disk_usage(existing_part(path)).free
    except OSError:  # the disk itself is gone
        return ""
    return f" ({size(free)} free there)"


def size(count: float) -> str:
    """Return a number of bytes in the unit that reads best."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def check_writable(folder: Path, what: str) -> None:
    """Raise ValueError, naming the option or argument `what`, where no file can be made in the folder, which need not exist."""
    there = existing_part(folder)
    reason = None
    if not there.is_dir():
        reason = f"{there} is a file, not a folder"
    else:
        try:
            # A folder and a file in it: /proc lets nobody make one, and says so only then.
            with _folder_in(there, ".xpo-fast-") as probe:
                (probe / "probe").write_bytes(b"probe")
        except OSError as error:
            reason = f"{there} cannot be written ({error.strerror})"
    if reason is not None:
        raise ValueError(f"{what} {folder}: {reason}; name a folder that can be written")


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has none of them."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _folder_in(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder that goes afterwards, under a name that no process on any machine has; files in it are as the umask says."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=prefix, ignore_cleanup_errors=True) as made:
        yield Path(made)


def write_atomically(path: Path, content: bytes) -> None:
    """Elsewhere first, then renamed: a reader, or a run that died here, never sees half of it."""
    with saving(path), _folder_in(path.parent, f".{path.name}.") as folder:
        (folder / path.name).write_bytes(content)
        os.replace(folder / path.name, path)


def publish(path: Path, content: bytes) -> None:
    """Write a file, its folder too, unless it is there: of several processes that write it at once, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _folder_in(path.parent, f".{path.name}.") as folder:
        (folder / path.name).write_bytes(content)
        with contextlib.suppress(FileExistsError):
            os.link(folder / path.name, path)


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(value), indent=1, ensure_ascii=ensure_ascii) + "\n"
    write_atomically(path, text.encode())
