"""Writes the page: one HTML document with its style and charts inside, which needs no network and no script."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..version import __version__
from .blocks import Tile
from .comparison import MOST_RUNS, comparison
from .parts import parts_of, tiles_of
from .run import Run
from .series import number

_HERE = Path(__file__).parent


def render(runs: Sequence[Run], *, samples: int = 12) -> str:
    """Returns the page of one run, or of several compared, as HTML.

    samples: pairs of completions that are shown at most. Raises ValueError for more runs than colours tell apart, and
    for a run that is named twice.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"expected 1 to {MOST_RUNS} runs, which colours can tell apart, got {len(runs)}")
    folders = [run.folder.resolve() for run in runs]
    if twice := next((f for f in folders if folders.count(f) > 1), None):
        raise ValueError(f"{twice} was named twice: name each run once")
    names = _names(runs)
    loader = jinja2.FileSystemLoader(_HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters["breakable"] = _breakable
    one = len(runs) == 1
    return environment.get_template("page.html").render(
        title=names[0] if one else " · ".join(names),
        heads=[_head(run, name) for run, name in zip(runs, names, strict=True)],
        tiles=tiles_of(runs[0]) if one else list[Tile](),
        parts=parts_of(runs[0], samples) if one else comparison(runs, names),
        notes=[f"{name}: {note}" if not one else note for run, name in zip(runs, names) for note in run.notes],
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        version=__version__,
        one=one,
    )


def _breakable(text: str) -> Any:
    """Returns a name, escaped, with places where a line may break."""
    return Markup(re.sub(r"([/_])(?=\w)", r"\1<wbr>", str(escape(text))))


def _names(runs: Sequence[Run]) -> list[str]:
    """Returns a name for each run, their paths where their folders' names are the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else run.folder.as_posix() for run, name in zip(runs, names)]


def _head(run: Run, name: str) -> dict[str, str]:
    """Returns what a run is, in words: its method, model, data, and whether it is finished."""
    steps, planned = (number(run.state.get(k)) for k in ("global_step", "max_steps"))
    at = f" at step {steps:.0f} of {planned:.0f}" if math.isfinite(steps) and planned > 0 else ""
    status = "finished" if run.finished else f"not finished{at}"
    if not run.finished and steps >= planned > 0:
        status = f"all {planned:.0f} steps trained, not measured after them"
    kinds = {"train": "Preference training", "reward": "Reward model", "rl": "Online RL", "recipe": "Recipe"}
    kinds["distill"] = "Distillation"
    if run.method == "sft":
        kinds["train"] = "Supervised fine-tuning"
    how = "" if run.command == "trainer" else "every weight" if run.options.get("full") else "adapter"
    model = run.options.get("model") or run.recipe.get("model") or ""
    data = run.options.get("data") or []
    shown = ", ".join(map(str, data)) if isinstance(data, list) else str(data)
    facts = {"method": run.method, "model": str(model), "trained": how, "data": shown}
    return {
        "name": name,
        "kind": kinds.get(run.command, "Training"),
        "status": status,
        "facts": " · ".join(x for x in facts.values() if x),
    }
