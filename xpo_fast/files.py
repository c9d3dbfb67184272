"""Writes files and folders that appear whole or not at all, and says why one cannot be written."""

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

_PART = ".part"  # ends the names of temporary folders


def cache_dir() -> Path:
    """Returns the folder for models, log-probs and measurements: $XPO_FAST_CACHE, or ~/.cache/xpo_fast."""
    return Path(os.environ.get("XPO_FAST_CACHE") or Path.home() / ".cache" / "xpo_fast")


class SavingError(OSError):
    """Names what cannot be written, why, and how much room is left. Nothing half-written stays behind.

    checkpoint: the last whole checkpoint of the run, if the error is about one and there is one.
    """

    checkpoint: str | None = None


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Raises SavingError, naming `path`, for what torch, safetensors, tokenizers and Python raise about files."""
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
    """Returns the path, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _why_not_written(error: Exception) -> str | None:
    """Returns the reason in the system's words; None for an error that is not about writing a file."""
    kind, text = type(error), " ".join(str(error).split())
    if isinstance(error, OSError):
        reason = error.strerror or text
    elif kind.__name__ == "SafetensorError" or kind is Exception:  # the latter is what tokenizers raises
        reason = text
    elif isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        reason = "the file ended before all of it was written"  # torch does not say why
    else:
        return None
    limited = any(x in reason for x in ("too large", "ended before"))
    return reason + "; a quota, or a limit on the size of files (ulimit -f)?" * limited


def _room(path: Path) -> str:
    """Returns " (1.5 GiB free there)", or "" if the disk does not answer."""
    with contextlib.suppress(OSError):  # the disk itself is gone
        return f" ({size(shutil.disk_usage(existing_part(path)).free)} free there)"
    return ""


def size(count: float) -> str:
    """Formats a number of bytes: "512 bytes", "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def check_writable(folder: Path, what: str) -> None:
    """Raises ValueError, naming the argument `what`, if no file can be made in the folder, which need not exist."""
    there = existing_part(folder)
    try:
        # A folder and a file in it: in /proc, only making one shows that it is refused.
        with _folder_in(there, ".xpo-fast-") as probe:
            (probe / "probe").write_bytes(b"probe")
    except OSError as error:
        reason = f"cannot be written ({error.strerror})" if there.is_dir() else "is a file, not a folder"
        raise ValueError(f"{what} {folder}: {there} {reason}; name a folder that can be written") from error


def finite(value: Any) -> Any:
    """Returns the value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _folder_in(folder: Path, prefix: str) -> Iterator[Path]:
    """Yields a temporary folder, under a name of its own on any machine; its files follow the umask."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=prefix, suffix=_PART, ignore_cleanup_errors=True) as made:
        yield Path(made)


@contextlib.contextmanager
def appearing(path: Path, *, sole_writer: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or a folder to, and renames it to `path` when the block ends without an error.

    A reader, or a run that was killed here, sees the old file or all of the new one; of a folder that is replaced it
    may find neither. The parent folder is made if there is none. Raises SavingError, naming `path`, for errors about
    files in the block.
    sole_writer: no other process writes `path`; the leftovers of a killed one are deleted first.
    """
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if sole_writer:
            for left in path.parent.glob(f".{path.name}.*{_PART}"):
                shutil.rmtree(left, ignore_errors=True)
        with _folder_in(path.parent, f".{path.name}.") as folder:
            part = folder / path.name
            yield part
            if part.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            os.replace(part, path)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file and its folder, in place of what is there; the file appears whole, see `appearing`."""
    with appearing(path) as part:
        part.write_bytes(content)


def publish(path: Path, content: bytes) -> None:
    """Writes a file and its folder, unless the file exists: if several processes write it, the first one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _folder_in(path.parent, f".{path.name}.") as folder:
        (folder / path.name).write_bytes(content)
        with contextlib.suppress(FileExistsError):
            os.link(folder / path.name, path)


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    """Writes a value as JSON, its folder too, with NaN and infinities as null; the file appears whole."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=ensure_ascii) + "\n"
    write_atomically(path, text.encode())
