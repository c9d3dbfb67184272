"""Predictions as text, as JSON values, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import size
from .model import FROZEN, REFERENCE, TRAINED
from .phases import CACHE_OF_KEYS, CASTS, OPTIMIZER
from .predict import RUNTIME, SLACK, Phase, Prediction
from .trace import GRADIENTS, HEAD, TILE

# Columns of the table, and the owners that each sums up; activations are all others.
COLUMNS = {
    "weights": (TRAINED, FROZEN, CASTS),
    "gradients": (GRADIENTS, "buckets of gradients"),
    "optimizer": (OPTIMIZER,),
    "activations": (),
    "head": (TILE, HEAD, "gradient of the head"),
    "reference": (REFERENCE,),
    "sampling": (CACHE_OF_KEYS, "probabilities of the next token"),
    "gathered": ("layers gathered",),
    "allocator": (SLACK,),
    "runtime": tuple(RUNTIME.values()),
}
_COLOURS = dict(
    zip(
        COLUMNS,
        ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#ccb974", "#bbbbbb", "#8c8c8c"),
        strict=True,
    )
)


def columns(phase: Phase) -> dict[str, int]:
    """Returns the bytes of a phase's peak by column."""
    place = {owner: column for column, owners in COLUMNS.items() for owner in owners}
    found = dict.fromkeys(COLUMNS, 0)
    for owner, held in phase.owners.items():
        found[place.get(owner, "activations")] += held
    return found


def activations(phase: Phase) -> dict[str, int]:
    """Returns the bytes of activations by kind, the largest first."""
    named = {owner for owners in COLUMNS.values() for owner in owners}
    return dict(sorted(((k, v) for k, v in phase.owners.items() if k not in named), key=lambda x: -x[1]))


def text(prediction: Prediction) -> str:
    """Returns the table of phases and owners, and what it comes to."""
    rows = [(phase, columns(phase)) for phase in prediction.phases]
    used = [name for name in COLUMNS if any(held[name] for _, held in rows)]
    wide = max(len(phase.name) for phase, _ in rows)
    lines = [f"{'GiB':<{wide}}  {'peak':>8}" + "".join(f"{name:>13}" for name in used)]
    for phase, held in rows:
        mark = " ←" if phase is prediction.largest else ""
        cells = "".join(f"{held[name] / 2**30:>13.2f}" for name in used)
        lines.append(f"{phase.name:<{wide}}  {phase.peak / 2**30:>8.2f}{cells}{mark}")
    kinds = ", ".join(f"{kind} {size(held)}" for kind, held in activations(prediction.largest).items() if held >= 2**20)
    if kinds:
        lines.append(f"activations at the largest peak: {kinds}")
    return "\n".join(lines)


def verdict(prediction: Prediction) -> str:
    """Returns whether the run fits, in a sentence."""
    memory, peak = prediction.question.memory, prediction.peak
    if memory is None:
        return f"peak {size(peak)}"
    return f"peak {size(peak)} of {size(memory)}: {'fits' if prediction.fits else 'does not fit'}"


def as_json(prediction: Prediction) -> dict[str, Any]:
    """Returns a prediction as JSON values, sizes in bytes."""
    return {
        "peak": prediction.peak,
        "phase": prediction.largest.name,
        "memory": prediction.question.memory,
        "fits": prediction.fits,
        "batch_size": prediction.question.batch_size,
        "longest": prediction.question.longest,
        "phases": [
            {"name": phase.name, "peak": phase.peak, "owners": phase.owners, "columns": columns(phase)}
            for phase in prediction.phases
        ],
    }


def plot(prediction: Prediction, file: Path, title: str) -> None:
    """Draws a stacked bar per phase, with the device's memory as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    phases, gib = prediction.phases, 2**30
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.5 * len(phases)), layout="constrained")
    left = [0.0] * len(phases)
    places = list(range(len(phases)))[::-1]
    for name in COLUMNS:
        widths = [columns(phase)[name] / gib for phase in phases]
        if any(widths):
            axes.barh(places, widths, left=left, color=_COLOURS[name], label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total, place, f" {total:.1f}", va="center")
    if prediction.question.memory is not None:
        axes.axvline(prediction.question.memory / gib, color="black", linestyle="--", label="the device")
    axes.set_yticks(places, [phase.name for phase in phases])
    axes.set_xlabel("GiB")
    axes.margins(x=0.08)
    axes.set_title(title, fontsize=10)
    axes.legend(ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.25), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
