"""Files that appear whole or not at all, where they are kept, and values as JSON takes them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return where converted models, reference log-probs and measurements are kept: $XPO_FAST_CACHE, or ~/.cache/xpo_fast."""
    return Path(os.environ.get("XPO_FAST_CACHE") or Path.home() / ".cache" / "xpo_fast")


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has none of them."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, content: bytes) -> None:
    """Under another name first, then renamed: a reader, or a run that died here, never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(path: Path, content: bytes) -> None:
    """Write a file, its folder too, unless it is there: of several processes that write it at once, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(value), indent=1, ensure_ascii=ensure_ascii) + "\n"
    write_atomically(path, text.encode())
