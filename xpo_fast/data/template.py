"""Conversations as a model reads them: the one place that writes messages with a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .kinds import DataError

Message = dict[str, Any]  # role, content, and whatever else the chat template reads


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
            words = (turns[-1].get("content") or "") + (first.get("content") or "")
            turns[-1], completion = {**turns[-1], **first, "content": words}, completion[1:]
        return Conversation([*turns, *completion], tools=self.tools, kwargs=self.kwargs)

    @property
    def is_begun(self) -> bool:
        """Whether the last message is the assistant's: the beginning of an answer, which a completion continues."""
        return bool(self) and self[-1].get("role") == "assistant"


def as_conversation(messages: list[Message]) -> Conversation:
    """Returns the messages as a `Conversation`, itself if they are one."""
    return messages if isinstance(messages, Conversation) else Conversation(messages)


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
