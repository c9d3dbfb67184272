"""Rows of reward models: loaded with several ratings each, as token ids, and in the batches they are scored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..data import KINDS, DataError
from ..data.rows import check_names, shape_row, unread_of
from ..models import check_ids
from ..models.modes import evaluating
from ..rollout import Prompt
from .spec import RewardSpec

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

    spec: gives max_length, max_prompt_length and chat_template_kwargs. prompts: text, messages, or each a
    `Conversation` with tools and variables of its own. named: the completions under the names chosen, rejected or
    both, one per prompt. own: they follow the prompts' own ids, see `data.split_ids`. Raises ValueError for another
    number of completions than of prompts.
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
    opening = data.leading_ids(tokenizer, prompts[0])
    limits = (spec.max_length, spec.max_prompt_length, spec.chat_template_kwargs)
    encoded = data.encode_rows(columns, tokenizer, kind, opening, *limits, own=own)
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
    run: Callable[[Mapping[str, Tensor]], Tensor],
) -> Tensor:
    """Returns run(batch) → (R, …) of all rows, in eval mode without gradient: float32 on the CPU, in the rows' order.

    Rows of similar length share a batch.
    """
    lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in features]
    order = sorted(range(len(features)), key=lengths.__getitem__)
    collate = data.Collator(pad_id(tokenizer), "chosen")
    for i, row in enumerate(features):
        check_ids(model, tokenizer, [*row["prompt_ids"], *row["chosen_ids"]], f"row {i}")
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = collate([features[i] for i in order[start : start + batch_size]])
            found.append(run({k: v.to(device) for k, v in batch.items()}).float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the token ids between and after the two completions that a preference model reads."""
    return data.tokenize_after(tokenizer, _BETWEEN), data.tokenize_after(tokenizer, _AFTER)


def both_orders(
    row: Mapping[str, Any], between: list[int], after: list[int]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Returns the two rows by which a preference model reads an encoded pair: chosen before rejected, and reversed."""
    w, l = row["chosen_ids"], row["rejected_ids"]  # noqa: E741
    orders = (w, l), (l, w)
    first, second = ({"prompt_ids": row["prompt_ids"], "chosen_ids": [*a, *between, *b, *after]} for a, b in orders)
    return first, second


def pad_id(tokenizer: Any) -> int:
    """Returns the id of the pad token, or else of the EOS. Raises ValueError if the tokenizer has neither."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found
    raise ValueError("the tokenizer has neither a pad token nor an EOS: set tokenizer.pad_token")
