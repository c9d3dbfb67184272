"""What errors say: the names that somebody may have meant, and anything on one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean a, b?" with up to three of `names` that resemble `name`, or "" where none does."""
    by_folded: dict[str, str] = {}
    for known in names:
        by_folded.setdefault(_folded(known), known)
    wanted = _folded(name)
    close = difflib.get_close_matches(wanted, by_folded, n=3, cutoff=0.6)
    # Letters in another order come first: difflib finds little that is alike in bate and beta.
    found = [f for f in by_folded if len(wanted) > 2 and sorted(f) == sorted(wanted)]
    found += [f for f in close if f not in found]
    # A name that was cut short resembles the whole one little by its letters alone.
    if len(wanted) > 2:
        found += [f for f in by_folded if f not in found and f.startswith(wanted)]
    return f"; did you mean {', '.join(by_folded[f] for f in found[:3])}?" if found else ""


def one_line(error: BaseException) -> str:
    """Return the message on one line, or the error's type where it has none."""
    return re.sub(r"\s*\n\s*", " ", str(error)).strip() or type(error).__name__


def _folded(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-")
