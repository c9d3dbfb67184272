"""Rows of reward models: loaded with several ratings each, as token ids, and in the batches they are scored in."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..data import KINDS, DataError
from ..data.rows import check_names, shape_row, unread_of
from ..layouts import LaysOut, Wanted, with_target
from ..models import check_ids, check_lengths, padding_id
from ..models.modes import evaluating
from ..rollout import Prompt
from .layout import tokens
from .spec import RewardSpec

logger = logging.getLogger("xpo_fast")

# A preference model reads: prompt, first completion, _BETWEEN, second completion, _AFTER.
_BETWEEN, _AFTER = "\n\nSecond answer:\n", "\n\nThe better answer:"


def load_ratings(
    source: Any,
    objectives: Sequence[str],
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    seed: int = 42,
) -> tuple[Any, list[list[float]]]:
    """Returns rows of prompt and completion as `data.load` does, and the ratings (N, K) of each row, NaN where null.

    objectives: the K names of the ratings. The other arguments are those of `data.load`. Raises DataError for a row
    that lacks an objective, has a value that is neither a finite number nor null, or has only nulls.
    """

    def shape(row: Any, where: str) -> list[dict[str, Any]]:
        ratings = _ratings(row, objectives, where) if isinstance(row, dict) else []
        # A row of this kind must have a number, hence the reward; the ratings are kept beside the rows.
        read = {**row, "label": None, "reward": 0.0, "value": None} if isinstance(row, dict) else row
        return [{**shaped, "ratings": ratings} for shaped in shape_row(read, KINDS["unpaired"], where)]

    check_names(columns or (), also=objectives)
    rows = data.load_rows(
        source,
        shape,
        split=split,
        columns=columns,
        config=config,
        seed=seed,
        unread=lambda made, row: unread_of(made, row, KINDS["unpaired"], objectives),
        expected=f"prompt, completion and {', '.join(objectives)}",
    )
    return rows.remove_columns("ratings"), list(rows["ratings"])


def _ratings(row: Mapping[Any, Any], objectives: Sequence[str], where: str) -> list[float]:
    missing = [name for name in objectives if name not in row]
    if missing:
        raise DataError(
            f"{where}: {', '.join(missing)} missing; expected prompt, completion and the numbers "
            f"{', '.join(objectives)}; got {', '.join(map(str, row))}"
        )
    found = [_rating(row[name], name, where) for name in objectives]
    if all(map(math.isnan, found)):
        raise DataError(f"{where}: {', '.join(objectives)} are null; rate the completion, or drop the row")
    return found


def _rating(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}: {name} must be a finite number or null; got {value!r}")
    return float(value)


def encode_rows(
    tokenizer: Any,
    spec: RewardSpec,
    prompts: Sequence[Prompt],
    named: Mapping[str, Sequence[Any]],
    *,
    own: bool = False,
) -> list[dict[str, Any]]:
    """Returns token ids and masks as `data.encode` makes them: prompt_ids; chosen_ids, rejected_ids, or both; …_mask.

    spec: gives max_length, max_prompt_length and chat_template_kwargs; a warning says how many rows they cut. prompts:
    text, messages, or each a `Conversation` with tools and variables of its own. named: the completions under the names
    chosen, rejected or both, one per prompt. own: they follow the prompts' own ids, see `data.split_ids`. Each row's
    ids follow from the row alone. Raises ValueError for another number of completions than of prompts.
    """
    if any(len(completions) != len(prompts) for completions in named.values()):
        raise ValueError(
            f"expected a completion for each of {len(prompts)} prompts, got "
            f"{', '.join(str(len(x)) for x in named.values())}"
        )
    if not len(prompts):
        return []
    columns = {
        "prompt": list(prompts),
        **{name: list(map(_as_messages, prompts, completions)) for name, completions in named.items()},
        "where": [f"row {i}" for i in range(len(prompts))],
    }
    kind = "pair" if len(named) > 1 else next(iter(named))
    # Of any text, not of the first prompt, which may be a conversation, or empty, where the others are not.
    opening = data.leading_ids(tokenizer, "a")
    longest = sys.maxsize if spec.max_length is None else spec.max_length
    how: Any = {"own": own, "chat_template_kwargs": spec.chat_template_kwargs}
    encoded = data.encode_rows(columns, tokenizer, kind, opening, longest, spec.max_prompt_length, **how)
    cut, prompts_cut = sum(encoded["completions_cut"]), sum(encoded["prompt_cut"])
    if cut or prompts_cut:
        logger.warning(
            "max_length=%s, max_prompt_length=%s: %d of %d completions are read without their end and EOS, %d of %d "
            "prompts without their start; only a larger length, or None, has all of them read",
            *(spec.max_length, spec.max_prompt_length, cut, sum(encoded["count"]), prompts_cut, len(prompts)),
        )
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def _as_messages(prompt: Prompt, completion: Any) -> Any:
    """Returns the completion; a text that answers a prompt of messages becomes the assistant's message."""
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def in_batches(
    features: list[dict[str, Any]],
    model: nn.Module,
    tokenizer: Any,
    batch_size: int,
    run: Callable[[Mapping[str, Any]], Tensor],
    *,
    layout: str = "padded",
    wanted: Wanted = with_target,
) -> Tensor:
    """Returns run(batch) → (R, …) of all rows, in eval mode without gradient: float32 on the CPU, in the rows' order.

    Rows of similar length share a batch. layout: a name of `layouts.LAYOUTS`; in one that is not padded, rows of one
    prompt follow one another, and a row that is alone in its batch is read as it is. wanted: as for `LaysOut`.
    """
    order = _order(features, by_prompt=layout != "padded")
    collate = LaysOut(data.Collator(padding_id(model, tokenizer), "chosen"), wanted=wanted)
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            part = [features[i] for i in order[start : start + batch_size]]
            collate.layout = layout if len(part) > 1 else "padded"
            found.append(run({k: v.to(device) for k, v in collate(part).items()}).float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def _order(features: Sequence[Mapping[str, Any]], *, by_prompt: bool) -> list[int]:
    """Returns the rows' numbers by length; by_prompt: side by side where the prompt is the same, by their longest."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(features):
        groups.setdefault(tuple(row["prompt_ids"]) if by_prompt else i, []).append(i)
    inside = [sorted(group, key=lambda i: tokens(features[i])) for group in groups.values()]
    return [i for group in sorted(inside, key=lambda group: tokens(features[group[-1]])) for i in group]


def check_features(model: nn.Module, tokenizer: Any, features: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, naming the row, for a token without an embedding, and for more tokens than positions."""
    for row in features:
        check_ids(model, tokenizer, [*row["prompt_ids"], *row["chosen_ids"]], row["where"])
    remedy = "leave longer ones out, or cut them by max_length"
    check_lengths(model, [*map(tokens, features)], lambda i: features[i]["where"], remedy)


def separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the token ids between and after the two completions that a preference model reads."""
    return data.tokenize_after(tokenizer, _BETWEEN), data.tokenize_after(tokenizer, _AFTER)


def both_orders(row: Mapping[str, Any], between: list[int], after: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the two rows by which a preference model reads an encoded pair: chosen before rejected, and reversed."""
    w, l = row["chosen_ids"], row["rejected_ids"]  # noqa: E741
    orders = (w, l), (l, w)
    kept = {name: row[name] for name in ("prompt_ids", "where") if name in row}
    first, second = ({**kept, "chosen_ids": [*a, *between, *b, *after]} for a, b in orders)
    return first, second
