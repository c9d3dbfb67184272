"""Conversations as a model reads them: the one place that writes messages with a tokenizer's chat template."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .kinds import DataError

logger = logging.getLogger("xpo_fast")

Message = dict[str, Any]  # role, content, and whatever else the chat template reads

# Columns that a row's conversation is written with, beside the messages: the names that TRL has for them.
TOOLS, KWARGS = "tools", "chat_template_kwargs"
CALLS = ("tool_calls", "function_call")
# Where a template does not write these, something is unsaid; other keys only accompany words that it does write.
_TOOL_RESULT = "messages of role tool"
_SAID = (TOOLS, *CALLS, _TOOL_RESULT)
# What `apply_chat_template` takes for itself, or `write` decides.
_NO_VARIABLES = (
    *("conversation", "messages", TOOLS, "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "processor_kwargs", "sanitize_control_tokens"),
)


class Conversation(list):
    """Messages, and what a chat template is told beside them: a list that equals that of its messages.

    tools: the functions that the assistant may call, as JSON schemas; None for none. kwargs: variables of the template
        for this conversation alone (`chat_template_kwargs`).
    """

    def __init__(
        self,
        messages: Iterable[Message] = (),
        *,
        tools: list[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(messages)
        self.tools, self.kwargs = tools, dict(kwargs or {})

    def followed_by(self, completion: list[Message]) -> Conversation:
        """Returns this conversation and what follows it; an answer that it has begun and that goes on is one turn."""
        turns = list(self)
        if self.is_begun and completion:
            first = completion[0]
            both = words(turns[-1]) + words(first)
            turns[-1], completion = {**turns[-1], **first, "content": both}, completion[1:]
        return Conversation([*turns, *completion], tools=self.tools, kwargs=self.kwargs)

    def changed(self, places: Mapping[int, Message]) -> Conversation:
        """Returns this conversation with other messages at these places."""
        turns = [places.get(i, message) for i, message in enumerate(self)]
        return Conversation(turns, tools=self.tools, kwargs=self.kwargs)

    def told(self, kwargs: Mapping[str, Any] | None) -> Conversation:
        """Returns this conversation with further variables of the template; its own come first."""
        return Conversation(self, tools=self.tools, kwargs={**(kwargs or {}), **self.kwargs})

    @property
    def is_begun(self) -> bool:
        """Whether the last message is the assistant's: the beginning of an answer, which a completion continues."""
        return bool(self) and self[-1].get("role") == "assistant"


def words(message: Mapping[str, Any]) -> str:
    """Returns the text of a message, "" for one that only calls tools."""
    return message.get("content") or ""


def as_conversation(messages: list[Message]) -> Conversation:
    """Returns the messages as a `Conversation`, itself if they are one."""
    return messages if isinstance(messages, Conversation) else Conversation(messages)


def prompt_of(row: Mapping[str, Any]) -> Any:
    """Returns the prompt of a row of `load`; a conversation with the tools and variables of the row's columns."""
    prompt, tools, kwargs = row["prompt"], row.get(TOOLS), row.get(KWARGS)
    if isinstance(prompt, str):
        return prompt
    own = as_conversation(prompt)
    return Conversation(prompt, tools=own.tools if tools is None else tools, kwargs={**own.kwargs, **(kwargs or {})})


def template_columns(prompt: Any) -> dict[str, Any]:
    """Returns the columns from which `prompt_of` makes a conversation again, of those that it has."""
    own = Conversation() if isinstance(prompt, str) else as_conversation(prompt)
    return {name: value for name, value in ((TOOLS, own.tools), (KWARGS, own.kwargs)) if value}


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Returns the tools that a row gives, JSON schemas or the JSON text of them; None for none.

    where: the row's place, for errors. Raises DataError for anything else.
    """
    found = parsed(value, TOOLS, where)
    if found is None or found == []:
        return None
    found = [parsed(one, TOOLS, where) for one in found] if isinstance(found, list) else found
    if not (isinstance(found, list) and all(isinstance(one, dict) and one for one in found)):
        raise DataError(
            f"{where}: {TOOLS} must be a list of JSON schemas, one per function, or the JSON text of one; got "
            f"{str(value)[:100]}; write them so, or take the column out"
        )
    return jsonable(found, TOOLS, where)


def read_kwargs(value: Any, where: str) -> dict[str, Any] | None:
    """Returns variables of a chat template from a dict or its JSON text; None for none.

    where: the row's place or the setting, for errors. Raises DataError for anything else, and for a variable that is
    not the template's.
    """
    found = parsed(value, KWARGS, where)
    if found is None or found == {}:
        return None
    if not (isinstance(found, dict) and all(isinstance(name, str) for name in found)):
        raise DataError(
            f"{where}: {KWARGS} must be a dict of variables of the chat template, or its JSON text; got "
            f"{str(value)[:100]}; write them so, or leave them out"
        )
    if taken := [name for name in found if name in _NO_VARIABLES]:
        raise DataError(
            f"{where}: {KWARGS} has {', '.join(taken)}, which is no variable of a template: it is decided here"
            f"{'; give tools in a column of their own' if TOOLS in taken else '; leave it out'}"
        )
    return jsonable(found, KWARGS, where)


def parsed(value: Any, name: str, where: str) -> Any:
    """Returns a value, or what its JSON text says; None for an empty text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(
            f"{where}: {name} is text that is not valid JSON ({error}): {value[:60]!r}; write it as JSON"
        ) from error


def jsonable(value: Any, name: str, where: str) -> Any:
    """Returns a value as JSON has it; DataError for one that JSON has not, or that is not UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {name} cannot be kept as JSON ({error}); expected text, numbers, lists and dicts of them"
        ) from error


def write(
    tokenizer: Any,
    messages: list[Message],
    where: str,
    *,
    answer: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Returns a conversation as the chat template writes it.

    answer: an answer follows: the text ends with the generation prompt, or, where the conversation has begun an answer,
        with the words of it. kwargs: variables of the template; the conversation's own come first. where: its place,
        for errors. Raises DataError if there is no template, or if the template refuses the conversation.
    """
    conversation = as_conversation(messages)
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: a conversation, and the tokenizer has no chat template to write it with; "
            "pass one (--chat-template FILE), or give prompt and completions as text"
        )
    begun = answer and conversation.is_begun
    if begun and (calls := [key for key in CALLS if conversation[-1].get(key)]):
        raise DataError(
            f"{where}: the prompt ends with {' and '.join(calls)} of the assistant, and no answer goes on behind them; "
            "put what the tools answered into the prompt, or begin the completion with the call"
        )
    try:
        return tokenizer.apply_chat_template(
            list(conversation),
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=answer and not begun,
            continue_final_message=begun,
            **{**(kwargs or {}), **conversation.kwargs},
        )
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise DataError(
            f"{where}: the chat template refuses this conversation ({error}); "
            "drop the row, or pass another template (--chat-template FILE)"
        ) from error


def check_continued(conversation: Conversation, completion: list[Message], where: str) -> None:
    """Raises DataError where a completion has another value of a key than the answer has that it goes on with."""
    if not (conversation.is_begun and completion):
        return
    begun, first = conversation[-1], completion[0]
    if keys := [key for key in first if key in begun and key not in ("role", "content") and first[key] != begun[key]]:
        raise DataError(
            f"{where}: {', '.join(keys)} of the answer that the prompt has begun is another one in the completion, "
            "which goes on with the same message; give it once, or the same"
        )


def unwritten(
    tokenizer: Any,
    messages: list[Message],
    where: str,
    *,
    start: int = 0,
    answers: int = sys.maxsize,
    kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Returns what a conversation has, beside roles and words, that the chat template does not write; by its effect.

    Each thing is taken out, and the template writes the rest: where the text stays the same, it was not written. A
    template may read a key and leave it out all the same, as those do that drop the reasoning of earlier turns. Only
    variables are looked up in the template, because one may have the value that the template has by default.

    start: the first message to look at; the tools and variables belong to message 0. answers: the first message of a
    completion, each of which is looked at by itself. where, kwargs: as for `write`. Raises DataError if it leaves out
    tools, a call of a tool, or what a tool answered: then something is unsaid; and if it writes the arguments of a
    call, given as JSON text, as a quotation of that text.
    """
    conversation = as_conversation(messages)
    keys = {key: [i for i, m in enumerate(conversation) if i >= start and key in m] for key in _keys(conversation)}
    results = [i for i, m in enumerate(conversation) if i >= start and m["role"] in ("tool", "function")]
    if not (conversation.tools or conversation.kwargs or results or any(keys.values())):
        return []
    text = write(tokenizer, conversation, where, kwargs=kwargs)
    _refuse_quoted(conversation[start:], text, where)

    def same(other: Conversation) -> bool:
        try:
            return write(tokenizer, other, where, kwargs=kwargs) == text
        except DataError:  # it cannot do without
            return False

    found = []
    if conversation.tools and not start:
        bare = Conversation(conversation, kwargs=conversation.kwargs)
        found += [TOOLS] * same(bare)
    for key, places in keys.items():
        # What is said is looked for in each message; of other keys, whether any message has it written.
        groups = [[i] for i in places] if key in CALLS else [places] if places else []
        lost = [
            group for group in groups if same(conversation.changed({i: _less(conversation[i], key) for i in group}))
        ]
        learned = [] if lost or len(places) == 1 or key in CALLS else [i for i in places if i >= answers]
        if any(same(conversation.changed({i: _less(conversation[i], key)})) for i in learned):
            found.append(f"{key} of some answers")
        found += [key] * bool(lost)
    other = {i: {**conversation[i], "content": words(conversation[i]) + " +1"} for i in results}
    found += [_TOOL_RESULT] * any(same(conversation.changed({i: m})) for i, m in other.items())
    if not start:
        found += [name for name in conversation.kwargs if name not in variables(tokenizer, conversation.tools)]
    if said := [name for name in found if name in _SAID]:
        raise DataError(
            f"{where}: the chat template does not write {' and '.join(said)}, and so what they say would be lost; pass "
            f"a template that does (--chat-template FILE), or take {'them' if len(said) > 1 else 'it'} out of the rows"
        )
    return found


def _refuse_quoted(messages: list[Message], text: str, where: str) -> None:
    calls = [call for m in messages for call in m.get("tool_calls") or [] if isinstance(call, dict)]
    for call in calls:
        of = call.get("function", call)
        given = of.get("arguments") if isinstance(of, dict) else None
        if isinstance(given, str) and given not in text and json.dumps(given, ensure_ascii=False) in text:
            raise DataError(
                f"{where}: the chat template quotes the arguments of a tool call, which are JSON text already "
                f"({given[:60]}): give them as an object, as the template expects"
            )


def _keys(conversation: Conversation) -> list[str]:
    return list(dict.fromkeys(key for m in conversation if len(m) > 2 for key in m if key not in ("role", "content")))


def _less(message: Message, key: str) -> Message:
    """Returns the message without a key; with words, if it has none of its own then."""
    return {"content": "", **{k: x for k, x in message.items() if k != key and not (k == "content" and x is None)}}


def variables(tokenizer: Any, tools: list[Any] | None = None) -> set[str]:
    """Returns the names of the variables that the chat template reads."""
    return _variables(tokenizer.get_chat_template(tools=tools))


@functools.lru_cache(maxsize=16)
def _variables(template: str) -> set[str]:
    import jinja2
    import jinja2.meta

    # transformers' own tag is not jinja's.
    text = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return jinja2.meta.find_undeclared_variables(environment.parse(text))


def unwritten_of(
    tokenizer: Any, prompt: Any, completions: list[Any], where: str, kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns what the chat template does not write of a prompt and its completions, see `unwritten`; none of text."""
    if isinstance(prompt, str):
        return []
    conversation, found = as_conversation(prompt), {}
    start, answers = 0, len(conversation) - conversation.is_begun
    for whole in map(conversation.followed_by, completions) if completions else [conversation]:
        found |= dict.fromkeys(unwritten(tokenizer, whole, where, start=start, answers=answers, kwargs=kwargs))
        start = answers
    return [*found]


def place_of(row: Mapping[str, Any], k: int) -> str:
    """Returns where a row with a prompt, number k of a run, stands in its source, for errors."""
    return str(row.get("where", f"prompt {k}"))


def check_written(tokenizer: Any, rows: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any] | None = None) -> None:
    """Warns of what the chat template does not write of prompts, before a run; see `unwritten` for what it refuses.

    rows: of `load_prompts`. kwargs: variables of the run.
    """
    if rows:
        warn_of_unread(tokenizer, kwargs, rows[0]["prompt"])
    lost = (unwritten_of(tokenizer, row["prompt"], [], place_of(row, k), kwargs) for k, row in enumerate(rows))
    warn_of_unwritten(itertools.chain.from_iterable(lost), len(rows))


def warn_of_unwritten(unwritten: Iterable[str], rows: int) -> None:
    """Warns of what the chat template does not write; unwritten: its names, one per row that has it."""
    for name, count in Counter(unwritten).items():
        logger.warning("the chat template does not write %s, which %d of %d rows have", name, count, rows)


def warn_of_unread(tokenizer: Any, kwargs: Mapping[str, Any] | None, prompt: Any) -> None:
    """Warns of variables of a run that no row can read; prompt: one of the run's."""
    if kwargs and isinstance(prompt, str):
        logger.warning("%s are not read: the rows are text, which no chat template writes", KWARGS)
        return
    known = variables(tokenizer) if kwargs and tokenizer.chat_template else set()
    if kwargs and known and (lost := [name for name in kwargs if name not in known]):
        others = ", ".join(sorted(known - {*_NO_VARIABLES})) or "none"
        logger.warning("the chat template does not read %s of %s; it reads %s", ", ".join(lost), KWARGS, others)
