"""A context in front of every prompt, which the reference reads and the policy does not: context distillation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .encode import encode_rows, leading_ids, with_column
from .kinds import DataError
from .template import Conversation, as_conversation, prompt_of, words

if TYPE_CHECKING:
    import datasets


def under_context(prompt: Any, context: str) -> Any:
    """Returns a prompt with a context in front of it.

    Text follows the context as it is: what stands between is for the context to end with. Messages get it, without
    space around it, as their system turn, or, if they begin with one, in front of its text, an empty line between.
    """
    if isinstance(prompt, str):
        return context + prompt
    own, context = as_conversation(prompt), context.strip()
    if own and own[0].get("role") in ("system", "developer"):
        return own.changed({0: {**own[0], "content": f"{context}\n\n{words(own[0])}"}})
    return Conversation([{"role": "system", "content": context}, *own], tools=own.tools, kwargs=own.kwargs)


def add_context(
    encoded: datasets.Dataset,
    rows: datasets.Dataset,
    tokenizer: Any,
    context: str,
    *,
    name: str = "ref_prompt_ids",
    score: str = "assistant",
    num_proc: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    """Adds the ids of each row's prompt under a context, as the column `name`, to encoded rows of the kind "chosen".

    encoded, rows: what `encode` made, and from what. The other arguments are those of `encode`. A row of the reference
    is these ids and the row's own `chosen_ids`, so that lengths cut the same tokens of both; neither the
    context nor a prompt behind it is cut. Raises DataError for a row whose completion has other tokens behind the
    context, and for messages that the chat template refuses to write with a system turn.
    """
    leading = leading_ids(tokenizer, context if isinstance(rows[0]["prompt"], str) else [])

    def ids(batch: dict[str, list], at: list[int]) -> dict[str, list]:
        each = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        given = {**batch, "prompt": [under_context(prompt_of(row), context) for row in each]}
        how: Any = {"score": score, "chat_template_kwargs": chat_template_kwargs}
        found = encode_rows(given, tokenizer, "chosen", leading, sys.maxsize, None, **how)
        wanted = encoded.select(at)["chosen_ids"]
        together = zip(found["prompt_ids"], found["chosen_ids"], wanted, batch["where"], strict=True)
        return {name: [_prompt(*one) for one in together]}

    made = rows.map(
        ids, with_indices=True, batched=True, remove_columns=rows.column_names, num_proc=num_proc, desc="context"
    )
    return with_column(encoded, name, made[name])


def _prompt(prompt: list[int], completion: list[int], wanted: list[int], where: str) -> list[int]:
    """Returns the ids in front of the completion's `wanted` ids; of a text alone its first token is among them."""
    for skip in (0, 1):
        if completion[skip : skip + len(wanted)] == wanted:
            return prompt + completion[:skip]
    raise DataError(
        f"{where}: the completion has other tokens behind the context than without it, so the reference's "
        "distributions are of other tokens than the policy's; end the context with a line break, and prompts with a "
        "word, or use a chat template that writes an answer alike with and without a system turn"
    )
