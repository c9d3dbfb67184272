"""Batches: encoded rows become right-padded tensors, in the row layout of `Objective`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import IGNORE_INDEX
from .kinds import DataError, get_kind
from .rows import filled
from .topk import TOPK, pad_topk

# Prompt ids, completion ids, and which of these are scored (None: all).
Row = tuple[list[int], list[int], "list[bool] | None"]


@dataclass
class Collator:
    """Pads encoded rows of a kind into a batch: a callable for `DataLoader` and for trainers.

    pair: the P chosen rows, then the P rejected rows (R = 2P). unpaired, rejected, chosen: one row per unit (R = B or
    P). list: the K rows of a prompt side by side (R = P·K), K the longest list of the batch, and where the data has
    `rejected`, that completion as one more row after them (R = P·(K + 1)). A completion that a shorter list lacks is a
    row without a target, with one position to attend to: attention over none is NaN in some kernels.

    ``targets[r, t]`` is the token that position t predicts, ``input_ids[r, t + 1]``, where that token belongs to the
    completion and the row's mask, if it has one, says that it is scored, and −100 elsewhere. Padding is known by length
    and never by id: EOS is scored even where ``pad_token_id`` is the same id.

    Returns input_ids, attention_mask, targets (R, T) int64, and those of the following that the rows carry:

    * pair: score_w, score_l, prob_w, margin (P,) float32;
    * unpaired: desirable (B,) bool, reward, value (B,) float32; kl_input_ids, kl_attention_mask, kl_targets (B, T')
      int64, the prompts with their mismatched completions; kl_ref_logps (B,) float32;
    * chosen: ref_input_ids, ref_attention_mask, ref_targets (P, T') int64, the completions behind the prompts that the
      reference alone reads, `ref_prompt_ids` of `add_context`; topk_ids (P, T, K) int64 and topk_logp float32, a
      teacher's likeliest tokens at the positions of `targets`, see `pad_topk`;
    * list: list_lengths (P,) int64, and scores (P, K) float32, NaN where a completion is missing;
    * ref_logps (R,) float32, from the columns `Kind.reference`: for a list one log-prob per row, 0 for a missing one.

    Raises DataError for a list with fewer reference log-probs than completions; ValueError for an unknown kind.
    """

    pad_token_id: int
    kind: str
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        get_kind(self.kind)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        kind = get_kind(self.kind)
        if kind.listed:
            return self._lists(features)
        batch = self._pad([_row(row, name) for name in kind.completions for row in features])
        batch |= _column(features, kind.reference[: len(kind.completions)], "ref_logps", torch.float32)
        for name, key in kind.numbers.items():
            batch |= _column(features, [name], key, torch.bool if name == "label" else torch.float32)
        if "kl_completion_ids" in features[0]:
            mismatched = self._pad([_row(row, "kl_completion") for row in features])
            batch |= {f"kl_{name}": value for name, value in mismatched.items()}
            batch |= _column(features, ["kl_ref_logp"], "kl_ref_logps", torch.float32)
        if "ref_prompt_ids" in features[0]:
            own = [{**row, "prompt_ids": row["ref_prompt_ids"]} for row in features]
            under = [_row(row, name) for name in kind.completions for row in own]
            batch |= {f"ref_{name}": value for name, value in self._pad(under).items()}
        if TOPK[0] in features[0]:
            batch |= pad_topk(features, batch["targets"].shape[1])
        return batch

    def _lists(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["completions_ids"]) for row in features)
        last = "rejected_ids" in features[0]
        rows: list[Row] = []
        for row in features:
            masks = row.get("completions_mask") or [None] * len(row["completions_ids"])
            found: list[Row] = [(row["prompt_ids"], *x) for x in zip(row["completions_ids"], masks, strict=True)]
            rows += filled(found, longest, ([], [], None))
            rows += [_row(row, "rejected")] if last else []
        batch = self._pad(rows)
        batch["list_lengths"] = torch.tensor([len(row["completions_ids"]) for row in features])
        for name, key in get_kind(self.kind).numbers.items():
            if name in features[0]:
                numbers = [filled(row[name], longest, math.nan) for row in features]
                batch[key] = torch.tensor(numbers, dtype=torch.float32)  # (P, K)
        if "ref_logp" in features[0]:
            ref_logps: list[float] = []
            for row in features:
                given, count = row["ref_logp"], len(row["completions_ids"])
                if len(given) < count + last:
                    raise DataError(
                        f"{row.get('where', 'a row')}: expected a ref_logp for each of {count + last} completions; "
                        f"got {len(given)}; compute the reference's log-probs again"
                    )
                ref_logps += filled(given[:count], longest, 0.0) + (given[-1:] if last else [])
            batch["ref_logps"] = torch.tensor(ref_logps, dtype=torch.float32)  # (R,)
        return batch

    def _pad(self, rows: list[Row]) -> dict[str, Tensor]:
        pairs, masks = [row[:2] for row in rows], [row[2] for row in rows]
        return pad_rows(pairs, self.pad_token_id, masks, multiple=self.pad_to_multiple_of or 1, last=True)


def _row(row: dict[str, Any], name: str) -> Row:
    return row["prompt_ids"], row[f"{name}_ids"], row.get(f"{name}_mask")


def pad_rows(
    rows: Sequence[tuple[list[int], list[int]]],
    pad: int,
    masks: Sequence[Sequence[bool] | None] | None = None,
    *,
    multiple: int = 1,
    last: bool = False,
) -> dict[str, Tensor]:
    """Right-pads prompts with their completions: input_ids, attention_mask, targets, (R, T) int64 each.

    rows: (prompt ids, completion ids). pad: the id of padding. masks: of each row which tokens of its completion are
        scored, None for all. multiple: T is rounded up to a multiple of it. last: keep the last token of each row,
        which predicts nothing.

    Targets are the scored tokens, each at the position that predicts it, and −100 elsewhere. An empty row
    has one position to attend to: attention over none is NaN in some kernels.
    """
    longest = max(len(prompt) + len(completion) for prompt, completion in rows) - (not last)
    shape = (len(rows), -(-longest // multiple) * multiple)
    input_ids = torch.full(shape, pad, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for r, ((prompt, completion), mask) in enumerate(zip(rows, masks or [None] * len(rows), strict=True)):
        ids = torch.tensor([*prompt, *completion], dtype=torch.int64)
        read = ids if last else ids[:-1]
        input_ids[r, : len(read)] = read
        attention_mask[r, : max(len(read), 1)] = 1
        scored = ids[len(prompt) :]
        if mask is not None:
            scored = scored.where(torch.tensor(mask, dtype=torch.bool), IGNORE_INDEX)
        targets[r, len(prompt) - 1 : len(ids) - 1] = scored
    return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}


def _column(features: list[dict[str, Any]], names: Sequence[str], key: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns ``{key: (len(names) · B,)}``, or nothing where the rows carry none of `names`."""
    if not any(name in row for row in features for name in names):
        return {}
    return {key: torch.tensor([row[name] for name in names for row in features], dtype=dtype)}
