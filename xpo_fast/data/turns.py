"""Turns: what of a completion is scored, in characters of the text that the chat template writes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from .kinds import DataError
from .template import Conversation, Message, write

SCORES = ("assistant", "last", "all")  # of a completion of several turns: the assistant's, its last one, or all
_MARK = "\ue000"  # of private use: no text that is trained on has it


def check_score(score: str) -> None:
    """Raises ValueError for a name that is none of `SCORES`."""
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")


def scored_spans(
    tokenizer: Any, conversation: Conversation, completion: list[Message], text: str, where: str, score: str
) -> list[tuple[int, int]]:
    """Returns the parts of a text that are scored, as (start, end) in characters.

    A template that marks what the assistant says ({% generation %}) decides. Otherwise a turn goes from behind the
    generation prompt to its end, which is scored as the end of an answer is.

    conversation: the prompt. text: of the prompt and the completion, a list of messages. score: one of `SCORES`.
    Raises DataError, with the row's place `where`, if nothing of the completion is the assistant's, or if the template
    writes a turn in a way that does not tell where it begins or ends.
    """
    if score == "all" or len(completion) == 1:
        return [(0, len(text))]
    whole = conversation.followed_by(completion)
    first = len(conversation) - conversation.is_begun
    turns = [m for m in range(first, len(whole)) if whole[m].get("role") == "assistant"]
    if not turns:
        raise DataError(
            f"{where}: no turn of a completion is the assistant's, so nothing of it is scored; expected one or more; "
            "drop the row, or score all of it (--score all)"
        )
    turns = turns[-1:] if score == "last" else turns
    # What the completion's first turn begins behind is the prompt, whose tokens are known.
    starts = [0 if m == first else _start(tokenizer, whole, m, text, where) for m in turns]
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=conversation.tools)):
        spans = [(max(a, starts[0]), b) for a, b in _marked(tokenizer, whole, text, where) if b > starts[0]]
    else:
        spans = [(start, _end(tokenizer, whole, m, text, where)) for start, m in zip(starts, turns)]
    edges = [edge for span in spans for edge in span]
    if not edges or edges != sorted(edges):
        raise _unclear(where)
    return spans


def _marked(tokenizer: Any, whole: Conversation, text: str, where: str) -> Sequence[tuple[int, int]]:
    """Returns the parts of the text between the template's {% generation %} and {% endgeneration %}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # its annotation is of one text, and it returns lists
    [rendered], [spans] = render(
        [list(whole)],
        tools=whole.tools,
        chat_template=tokenizer.get_chat_template(tools=whole.tools),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **whole.kwargs},
    )
    if rendered != text:
        raise _unclear(where)
    return spans


def _start(tokenizer: Any, whole: Conversation, m: int, text: str, where: str) -> int:
    """Returns where turn m begins: behind the generation prompt that stands before it."""
    if whole[m - 1].get("role") == "assistant":  # no generation prompt is written between two turns of one speaker
        marked = [*whole[:m], _with_mark(whole[m], front=True), *whole[m + 1 :]]
        return _shared(text, _write(tokenizer, whole, marked, where))
    before = _write(tokenizer, whole, whole[:m], where, answer=True)
    # A generation prompt may have more than answers do (an empty thought): the turn begins where the two part.
    if text.startswith(before) or text.startswith(_write(tokenizer, whole, whole[:m], where)):
        return _shared(text, before)
    raise _unclear(where)


def _end(tokenizer: Any, whole: Conversation, m: int, text: str, where: str) -> int:
    """Returns where turn m ends, with what the template writes at its end."""
    if m == len(whole) - 1:
        return len(text)
    until = _write(tokenizer, whole, whole[: m + 1], where)
    if text.startswith(until):
        return len(until)
    # The template writes the turn otherwise when others follow. Its end is what stands behind its words in both.
    turn, later = _with_mark(whole[m]), whole[m + 1 :]
    end = _shared(until[::-1], _write(tokenizer, whole, [*whole[:m], turn], where)[::-1])
    rest = _shared(text[::-1], _write(tokenizer, whole, [*whole[:m], turn, *later], where)[::-1])
    if rest == len(text):  # the mark is not written, and so the turn's words may not be
        raise _unclear(where)
    return len(text) - rest + _shared(until[len(until) - end :], text[len(text) - rest :])


def _write(
    tokenizer: Any, whole: Conversation, messages: Sequence[Message], where: str, *, answer: bool = False
) -> str:
    """Returns some messages of a conversation as the template writes them; DataError if it refuses them."""
    try:
        part = Conversation(messages, tools=whole.tools, kwargs=whole.kwargs)
        return write(tokenizer, part, where, answer=answer)
    except DataError as error:
        raise _unclear(where) from error


def _with_mark(turn: Message, *, front: bool = False) -> Message:
    words = turn.get("content") or ""
    return {**turn, "content": _MARK + words if front else words + _MARK}


def _shared(a: str, b: str) -> int:
    """Returns the number of characters with which both texts begin."""
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 (it compares texts)


def _unclear(where: str) -> DataError:
    return DataError(
        f"{where}: the chat template does not tell where the assistant's turns of a completion begin and end (it "
        "writes a turn otherwise when others follow); score all of it (--score all), give the last turn alone as the "
        "completion and the turns before it as the prompt, or pass a template with {% generation %} (--chat-template "
        "FILE)"
    )
