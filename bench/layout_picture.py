"""Draws docs/layouts.png: a pair and a prompt's three completions in each layout, and who sees whom.

    python bench/layout_picture.py --plot docs/layouts.png

The rows are padded and laid out by the library itself; a square of the mask is drawn where token k ≤ q < ends[k].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from xpo_fast.data import pad_rows
from xpo_fast.layouts import Layout, lay_out

PROMPTS, LENGTHS = (7, 4), ((4, 2), (3, 1, 2))  # tokens of two prompts, and of the completions of each
PROMPT, PADDING = "#4a4a4a", "#ececec"
COMPLETIONS = ("#2f7ebc", "#e1812c", "#3a923a")


def rows() -> list[tuple[list[int], list[int]]]:
    """Returns (prompt ids, completion ids) of each row; all ids differ but for those of a prompt."""
    found, taken = [], 0
    for p, (count, lengths) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        prompt = [1000 * (p + 1) + i for i in range(count)]
        for size in lengths:
            found.append((prompt, list(range(1 + taken, 1 + taken + size))))
            taken += size
    return found


def colours(pairs: list[tuple[list[int], list[int]]]) -> dict[int, str]:
    """Returns the colour of each token id."""
    found = {i: PROMPT for prompt, _ in pairs for i in prompt}
    number = [k for lengths in LENGTHS for k in range(len(lengths))]
    for k, (_, ids) in zip(number, pairs, strict=True):
        found |= dict.fromkeys(ids, COMPLETIONS[k])
    return found


def draw_rows(axis, ids: torch.Tensor, mask: torch.Tensor, colour: dict[int, str], title: str) -> None:
    """Draws tokens (R, T) as squares with their positions."""
    for r, c in np.ndindex(*ids.shape):
        real = bool(mask[r, c])
        fill = colour[int(ids[r, c])] if real else PADDING
        axis.add_patch(Rectangle((c, -r), 0.92, 0.86, color=fill))
        if real:
            axis.text(c + 0.46, -r + 0.4, str(int(mask[r, : c + 1].sum()) - 1), color="white", ha="center", va="center")
    frame(axis, ids.shape[1], ids.shape[0], title)


def draw_sequence(axis, layout: Layout, ids: torch.Tensor, colour: dict[int, str], title: str) -> None:
    """Draws the tokens of a layout in one line with their positions."""
    for n, (token, at) in enumerate(zip(layout.take(ids)[0].tolist(), layout.positions.tolist(), strict=True)):
        axis.add_patch(Rectangle((n, 0), 0.92, 0.86, color=colour[token]))
        axis.text(n + 0.46, 0.4, str(at), color="white", ha="center", va="center", fontsize=7)
    frame(axis, 46, 1, title)


def draw_mask(axis, layout: Layout, ids: torch.Tensor, colour: dict[int, str]) -> None:
    """Draws which tokens (columns) each token (rows) sees."""
    tokens, ends = layout.take(ids)[0].tolist(), layout.ends.tolist()
    for q in range(len(layout)):
        for k in range(q + 1):
            if q < ends[k]:
                axis.add_patch(Rectangle((k, -q), 0.92, 0.92, color=colour[tokens[k]]))
    frame(axis, len(layout), len(layout), "what each token of the shared layout sees")


def frame(axis, width: int, height: int, title: str) -> None:
    """Sets the limits of a drawing."""
    axis.set_xlim(-0.2, width + 0.2)
    axis.set_ylim(-height + 0.9, 1.2)
    axis.set_aspect("equal")
    axis.axis("off")
    axis.set_title(title, loc="left", fontsize=9)


def main() -> int:
    """Draws the picture and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    pairs = rows()
    batch = pad_rows(pairs, 0)
    ids, mask, wanted = batch["input_ids"], batch["attention_mask"], batch["targets"] != -100
    colour = colours(pairs)
    packed = lay_out(ids, mask, wanted, share=False)
    shared = lay_out(ids, mask, wanted, share=True, least=1)
    figure = plt.figure(figsize=(10, 6.2), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=[6, 1, 1], width_ratios=[1, 1])
    draw_rows(figure.add_subplot(grid[0, 0]), ids, mask, colour, f"padded: {ids.numel()} positions")
    draw_mask(figure.add_subplot(grid[0, 1]), shared, ids, colour)
    draw_sequence(figure.add_subplot(grid[1, :]), packed, ids, colour, f"packed: {len(packed)} tokens")
    draw_sequence(figure.add_subplot(grid[2, :]), shared, ids, colour, f"shared: {len(shared)} tokens")
    figure.savefig(args.plot, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
