"""Words error messages: similar names, and everything on one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean a, b?" with up to three of `names` similar to `name`, or "" if there are none."""
    by_folded: dict[str, str] = {}
    for known in names:
        by_folded.setdefault(_folded(known), known)
    wanted = _folded(name)
    close = difflib.get_close_matches(wanted, by_folded, n=3, cutoff=0.6)
    # The same letters in another order come first: difflib finds bate and beta little alike.
    found = [f for f in by_folded if len(wanted) > 2 and sorted(f) == sorted(wanted)]
    found += [f for f in close if f not in found]
    # A name that was cut short: difflib finds it little like the whole one.
    if len(wanted) > 2:
        found += [f for f in by_folded if f not in found and f.startswith(wanted)]
    return f"; did you mean {', '.join(by_folded[f] for f in found[:3])}?" if found else ""


def one_line(error: BaseException) -> str:
    """Returns the message on one line, or the error's type if it has none."""
    return re.sub(r"\s*\n\s*", " ", str(error)).strip() or type(error).__name__


def _folded(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-")
