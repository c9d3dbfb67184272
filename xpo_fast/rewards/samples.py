"""The policy's own samples beside a reward model's pairs: read by prompt, and dealt out batch by batch.

`rlp` learns their features without labels; `meta` raises how far the model tells them apart before each step.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from .. import data
from ..data import KINDS, DataError
from ..data.rows import filled, shape_row
from ..layouts import Inputs

PREFIX = "sample_"
VIEW_DROPOUT, INNER_LR = 0.1, 1e-3


def load_samples(source: Any, *, least: int = 1, **how: Any) -> tuple[Any, list[list[int]]]:
    """Returns what a policy has sampled, as rows of kind "chosen" (`data.load`), and the numbers of each prompt's rows.

    source: rows of prompt and completions (K texts), or prompt and completion; scores are not read. least: the samples
    that a prompt must have. how: further arguments of `data.load`. Raises DataError for rows of another form, and if a
    prompt has fewer samples.
    """

    def shape(row: Any, where: str) -> list[dict[str, Any]]:
        several = row.get("completions") if isinstance(row, dict) else None
        if several is None:
            return shape_row(row, KINDS["chosen"], where)
        if not isinstance(several, list) or not several:
            raise DataError(f"{where}: completions must be a list of one or more samples; got {several!r}")
        about = {name: x for name, x in row.items() if name not in ("completions", "scores")}
        return [line for one in several for line in shape_row({**about, "chosen": one}, KINDS["chosen"], where)]

    how = {"split": "train", "columns": None, "config": None, "seed": 42, **how}
    rows: Any = data.load_rows(source, shape, expected="prompt and completions", **how)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        key = json.dumps([row.get(name) for name in ("prompt", data.TOOLS, data.KWARGS)], sort_keys=True)
        groups.setdefault(key, []).append(i)
    for group in groups.values():
        if len(group) < least:
            raise DataError(
                f"{rows[group[0]]['where']}: expected {least} or more samples of a prompt, which are told apart; got "
                f"{len(group)}; sample again, or drop the prompts with fewer"
            )
    return rows, list(groups.values())


@dataclass
class PolicySamples:
    """Encoded samples, dealt out prompt by prompt in one order drawn from the seed, round and round.

    A batch follows from its number alone, so that a resumed run reads what it would have read.
    """

    rows: Any  # encoded, of kind "chosen"
    groups: list[list[int]]  # the rows of each prompt
    prompts: int  # of a batch
    seed: int
    collate: Any  # a `LaysOut` of rows

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self._order = torch.randperm(len(self.groups), generator=generator).tolist()

    def batch(self, number: int) -> dict[str, Any]:
        """Returns batch `number` of samples, its keys with `PREFIX`: P·K rows, those of a prompt side by side.

        P is `prompts`, or all that there are, and K the most samples of one; rows without a target fill up the others.
        """
        count = min(self.prompts, len(self._order))
        lists = [self.groups[self._order[(number * count + i) % len(self._order)]] for i in range(count)]
        most = max(map(len, lists))
        empty = {"prompt_ids": [], "chosen_ids": []}
        rows = [row for one in lists for row in filled([self.rows[i] for i in one], most, empty)]
        names = ("prompt_ids", "chosen_ids", "chosen_mask")
        found = self.collate([{n: row[n] for n in names if n in row} for row in rows])
        return {**{PREFIX + name: x for name, x in found.items()}, PREFIX + "lists": torch.tensor(count)}


def valid_samples(batch: Mapping[str, Tensor]) -> Tensor:
    """Returns which rows of a batch's samples are there, (S,) bool: lists are filled up to the longest."""
    return (batch[PREFIX + "targets"] != data.IGNORE_INDEX).any(dim=1)


def states_of_samples(model: nn.Module, batch: Mapping[str, Tensor], spec: Any, width: int) -> Tensor:
    """Returns the hidden states (S, D) that the rewards of a batch's samples would be read from, float32."""
    rows = Inputs.of(batch, PREFIX)
    found = rows.run(model, lambda hidden, head: {"states": spec.states(hidden, *rows[1:3])[:, 0, :width].float()})
    return found["states"][valid_samples(batch)]


def two_views(of: str, states: Tensor, p: float, *, training: bool) -> dict[str, Tensor]:
    """Returns the states (N, D) under two dropout masks, as `of` and other_`of`; outside training twice as they are."""
    return {name: dropout(states, p, training) for name in (of, f"other_{of}")}


@contextlib.contextmanager
def moved(model: nn.Module, gain: Tensor, rate: float) -> Iterator[None]:
    """Moves the trained weights θ to θ + rate·∂gain/∂θ in the block; afterwards they are θ again, bit by bit.

    gain: (), with a graph. Gradients that have been accumulated are left alone. Raises ValueError if the gain does not
    depend on the weights, or its gradient is not finite.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(gain, weights, allow_unused=True)
    pairs = [(p, g) for p, g in zip(weights, found, strict=True) if g is not None]
    if not pairs or not all(math.isfinite(float(g.abs().sum())) for _, g in pairs):
        raise ValueError("the inner step has no finite gradient: expected rewards that the trained weights change")
    before = [p.detach().clone() for p, _ in pairs]
    try:
        with torch.no_grad():
            for p, g in pairs:
                p.add_(g.to(p.dtype), alpha=rate)
        yield
    finally:
        with torch.no_grad():
            for (p, _), kept in zip(pairs, before, strict=True):
                p.copy_(kept)
