"""Splits the rows of --data into rows to train on and rows held out."""

from __future__ import annotations

import argparse
import random
from typing import TYPE_CHECKING, Any

from .options import HELD_OUT_AT_MOST, count
from .parser import UsageError

if TYPE_CHECKING:
    import datasets


def hold_out(args: argparse.Namespace, rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Returns the rows to train on, and the rows of --eval-split or None; rows of one prompt stay together."""
    import numpy as np

    wanted = min(len(rows) // 10, HELD_OUT_AT_MOST) if args.eval_split is None else count(args.eval_split, len(rows))
    if wanted == 0:
        return rows, None
    from ..data import prompt_keys

    # Numbers for prompts, and arrays of rows: a file may have more of them than lists would fit into memory.
    _, firsts, group = np.unique(prompt_keys(rows), return_index=True, return_inverse=True)
    order: Any = np.argsort(firsts)  # as they come in the data
    sizes = np.bincount(group)
    random.Random(args.seed).shuffle(order)
    left, chosen = wanted, np.zeros(len(order), dtype=bool)
    for prompt in order:  # a prompt seen in training says little about what was learned
        if sizes[prompt] <= left:
            chosen[prompt] = True
            left -= int(sizes[prompt])
        if not left:
            break
    is_held = chosen[group]
    held, kept = np.flatnonzero(is_held), np.flatnonzero(~is_held)
    if not len(kept) or not len(held):
        if args.eval_split is None:
            return rows, None
        raise UsageError(
            f"--eval-split {args.eval_split:g} of {len(rows)} rows with {len(order)} different prompts leaves "
            f"{len(kept)} rows to train on and {len(held)} to evaluate; rows of one prompt stay together"
        )
    return rows.select(kept), rows.select(held)
