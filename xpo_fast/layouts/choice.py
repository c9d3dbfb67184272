"""Chooses the layout of a run: what was asked for, or the one with the fewest tokens that the model can be read in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .inputs import KEY, LaysOut, Wanted, with_target
from .rows import CHOICES
from .support import unsupported

_WORTH = 0.97  # a layout is taken that leaves at most this share of the tokens of the simpler one


@dataclass(frozen=True)
class Chosen:
    """A layout and why: tokens of the sampled batches as padded, packed and shared; empty if they were not counted."""

    layout: str
    why: str
    tokens: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.layout}: {self.why}"


def choose(
    requested: str,
    model: Any,
    batches: Callable[[], Sequence[dict[str, Any]]],
    *,
    hindrance: str | None = None,
    before: str | None = None,
    wanted: Wanted = with_target,
) -> Chosen:
    """Chooses the layout of a run by the model and by some batches of its data, collated and padded.

    requested: a name of CHOICES. batches: called only if tokens must be counted. hindrance: why only padded rows can be
    read, whatever the model. before: of a run that is resumed, the layout that it had, which "auto" keeps to. wanted:
    as for `LaysOut`. Raises ValueError for another name, and for a layout that the model cannot be read in.
    """
    stays = must_stay_padded(requested, model, hindrance)
    if stays is not None:
        return Chosen("padded", stays)
    try:
        tokens = count(batches(), wanted)
    except ValueError as error:
        if requested != "auto":
            raise
        return Chosen("padded", str(error))
    padded, packed, shared = tokens
    if requested != "auto":
        taken, why = requested, "as asked"
    elif before is not None:
        taken, why = before, "as before the checkpoint"
    elif shared <= _WORTH * packed:
        taken, why = "shared", "what rows begin with in common is read once"
    elif packed <= _WORTH * padded:
        taken, why = "packed", "rows have little in common, and padding is left out"
    else:
        taken, why = "padded", "rows have little in common, and little padding"
    of = {"padded": padded, "packed": packed, "shared": shared}[taken]
    saved = f": {of:,} of {padded:,} positions in the batches looked at ({1 - of / padded:.0%} saved)"
    return Chosen(taken, why + (saved if taken != "padded" else ""), tokens)


def must_stay_padded(requested: str, model: Any, hindrance: str | None = None) -> str | None:
    """Returns why a model reads padded rows: that was asked for, or nothing else is right; None if there is a choice.

    The arguments, and what is raised, are as for `choose`.
    """
    check_layout(requested)
    if requested == "padded":
        return "as asked"
    why = hindrance or unsupported(model)
    if why is not None and requested != "auto":
        raise ValueError(f'layout={requested!r}: {why}; use layout="padded", or "auto"')
    return why


def check_layout(name: str) -> None:
    """Raises ValueError for a name that is none of CHOICES."""
    if name not in CHOICES:
        raise ValueError(f"layout must be one of {', '.join(CHOICES)}, got {name!r}")


def count(batches: Sequence[dict[str, Any]], wanted: Wanted = with_target) -> tuple[int, int, int]:
    """Returns the positions that a model computes for these batches when they are padded, packed and shared."""
    padded = packed = shared = 0
    for batch in batches:
        padded += batch["input_ids"].numel()
        packed += len(LaysOut(lambda x: x, "packed", wanted).lay_out(dict(batch))[KEY])
        shared += len(LaysOut(lambda x: x, "shared", wanted).lay_out(dict(batch))[KEY])
    return padded, packed, shared
