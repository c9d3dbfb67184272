"""Forms of rows that people have: each is brought into the fields that rows.py reads, columns renamed first.

    a row ── renamed (--columns) ──▶ row ── recognised ──▶ prompt, chosen, rejected, completion, completions

Nothing is guessed: where a row could be read in two ways, the error names the option that reads it in one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..wording import did_you_mean
from .kinds import DataError, Kind
from .template import Message, jsonable, parsed, words

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("question", "query", "problem", "input")
ANSWERS = ("response", "output", "answer", "solution")
SYSTEMS = ("system", "system_prompt")
_NOT_BESIDE_TEXT = {
    *("prompt", "chosen", "rejected", "completion", "completions", "instruction"),
    *(*CONVERSATIONS, *PROMPTS, *ANSWERS),
}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# ShareGPT's speakers: models and sites that the conversations were copied from.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model", "chosen", "rejected"), "assistant"),
    "system": "system",
}
_TOOL_SPEAKERS = ("function_call", "function", "observation", "tool", "tool_call", "tool_response")


def parse_columns(text: str) -> dict[str, str]:
    """Parses ``chosen=responses.best,prompt=question`` as {"chosen": "responses.best", "prompt": "question"}."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, sign, path = (piece.strip() for piece in part.partition("="))
        if not (sign and name and path):
            raise ValueError(
                "expected NAME=COLUMN, several with commas between them, as in prompt=question,chosen=responses.best; "
                f"got {text!r}"
            )
        if name in columns:
            raise ValueError(f"{name} is given twice, as {columns[name]} and as {path}: keep one of them")
        columns[name] = path
    return columns


def renamed(row: Any, columns: Mapping[str, str], where: str) -> Any:
    """Returns the row with columns under other names.

    columns: {new name: column}; a column may be a path into dicts (``responses.best``), by position into lists
        (``responses.0.text``), and over lists (``completions.response`` is the response of each). where: the row's
        place, for errors, here as in all of this file.

    A column that is renamed as a whole disappears under its old name; one that had the new name is replaced.
    """
    if not isinstance(row, dict):
        return row
    found = {name: row[x] if x in row else _follow(row, x.split("."), 0, where) for name, x in columns.items()}
    return {name: value for name, value in row.items() if name not in columns.values()} | found


def _follow(value: Any, keys: list[str], depth: int, where: str) -> Any:
    """Follows keys[depth:] into dicts and lists."""
    if depth == len(keys) or value is None:
        return value
    key, path, holder = keys[depth], ".".join(keys), ".".join(keys[:depth])
    if isinstance(value, list):
        if not key.isdigit():
            return [_follow(item, keys, depth, where) for item in value]
        if int(key) < len(value):
            return _follow(value[int(key)], keys, depth + 1, where)
        raise DataError(f"{where}: no column {path}: {holder} has {len(value)} items, counted from 0")
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: no column {path}: {holder} is {type(value).__name__}, expected a dict or a list of dicts"
        )
    if key in value:
        return _follow(value[key], keys, depth + 1, where)
    raise DataError(
        f"{where}: no column {path}: {holder or 'the row'} has {', '.join(map(str, value)) or 'none'}"
        f"{did_you_mean(key, map(str, value))}"
    )


def message(value: Any, name: str, where: str) -> Message:
    """Returns a message: its role, its content and what else it has for the chat template; name: the field it is in.

    It is read from that form or ShareGPT's {"from", "value"}; its content may be in parts of text, and may be None or
    missing beside tool_calls. Other keys that are None are not there. `weight` is read by `refuse_unlearned`, and by no
    template.
    """
    fields = value if isinstance(value, dict) else {}
    if len(fields) == 2 and type(fields.get("role")) is type(fields.get("content")) is str:
        return dict(fields)
    if fields.get("role") is None and fields.get("content") is None and isinstance(fields.get("from"), str):
        shared = {"role": _speaker(fields["from"], name, where), "content": fields.get("value")}
        fields = shared | {key: x for key, x in fields.items() if key not in ("from", "value", *shared)}
    found = {key: x for key, x in fields.items() if key == "content" or not (x is None or key == "weight")}
    if "tool_calls" in found:
        found["tool_calls"] = _calls(found["tool_calls"], name, where)
        found = found if found["tool_calls"] else {key: x for key, x in found.items() if key != "tool_calls"}
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = content = _text_of(content, name, where)
    if not (isinstance(found.get("role"), str) and (isinstance(content, str) or _calls_alone(found))):
        raise DataError(
            f'{where}: {name} must hold messages {{"role": text, "content": text}}; '
            f"got {str(value)[:100]}; rename the keys, or drop the row"
        )
    return found if len(found) == 2 else jsonable(found, f"a message of {name}", where)


def _calls(value: Any, name: str, where: str) -> list[Any]:
    """Returns the calls of tools of a message, a list of dicts or its JSON text."""
    found = parsed(value, f"tool_calls of {name}", where)
    if found is None:
        return []
    if not (isinstance(found, list) and all(isinstance(call, dict) and call for call in found)):
        raise DataError(
            f"{where}: tool_calls of {name} must be a list of calls, one dict each; got {str(value)[:100]}; write them "
            "so, or drop the row"
        )
    return found


def _calls_alone(fields: dict[str, Any]) -> bool:
    """Returns whether a message has no content, and calls tools: it needs none then."""
    return fields.get("content") is None and bool(fields.get("tool_calls"))


def transcript(whole: str) -> list[Message]:
    """Returns Anthropic's "\\n\\nHuman: … \\n\\nAssistant: …" as messages.

    Adjacent turns of one speaker, which the data has, become one: many chat templates refuse them.
    """
    _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + whole.lstrip())
    messages: list[Message] = []
    for speaker, text in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{text.strip()}".strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def _speaker(speaker: str, name: str, where: str) -> str:
    if speaker.lower() in _TOOL_SPEAKERS:
        raise DataError(
            f"{where}: {name} looks like ShareGPT with tool calls (a turn from {speaker}), which are not supported; "
            "write them as turns of human and gpt, or drop the row"
        )
    if speaker.lower() not in _SPEAKERS:
        raise DataError(
            f"{where}: {name} has a turn from {speaker!r}; expected one of {', '.join(_SPEAKERS)}; rename it, or drop "
            "the row"
        )
    return _SPEAKERS[speaker.lower()]


def _text_of(parts: list[Any], name: str, where: str) -> str:
    """Joins the text of a message's parts."""
    texts = []
    for part in parts:
        form = (part.get("type") or "text") if isinstance(part, dict) else type(part).__name__
        if form != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: {name} must hold messages of text; got a part of type {form!r} ({str(part)[:60]}); "
                "models here read text alone: drop the row, or write what it shows as text"
            )
        texts.append(part["text"])
    return "".join(texts)


def is_message(value: Any) -> bool:
    """Returns whether the value is one message, in either form."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def refuse_unlearned(turns: list[Any], name: str, where: str) -> None:
    """Raises DataError for a message that would be learned although its weight says otherwise."""
    for turn in turns:
        if isinstance(turn, dict) and turn.get("weight") not in (None, 1):
            raise DataError(
                f"{where}: {name} has a message to learn with weight {turn['weight']}, which says not to learn it as "
                "it is; expected weight 1, or none; drop the row, or cut it after an answer to learn"
            )


def _conversation(value: Any, name: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {name} must be a list of messages; got {'none' if value == [] else type(value).__name__}; "
            "drop the row"
        )
    return [message(one, name, where) for one in value]


def recognised(given: dict[str, Any], kind: Kind | None, where: str) -> dict[str, Any]:
    """Returns the row with the fields that rows.py reads for its kind; as it is where it has them or nothing like them.

    given: the fields that are not null. kind: None for rows of which only the prompt is needed.

    A prompt is a conversation where it is read from one (`CONVERSATIONS`), from Alpaca's instruction, or beside a
    system prompt; else (`PROMPTS`) it is text.
    """
    _refuse_media(given, where)
    given = dict(given)
    for name in ("chosen", "rejected", "completion"):
        if is_message(given.get(name)):  # LLaMA-Factory's pairs
            given[name] = [given[name]]
    ranked = given.get("output") if "instruction" in given and "prompt" not in given else None
    if isinstance(ranked, list) and len(ranked) == 2 and not {"chosen", "rejected"} & given.keys():
        given["chosen"], given["rejected"] = ranked
    if kind is None:
        return given if "prompt" in given else _prompt_alone(given, where)
    if "label" in kind.numbers and "kto_tag" in given:
        given.setdefault("label", given["kto_tag"])
    answers = next((names for names in kind.answers if given.keys() >= set(names)), ())
    if answers:
        return given if "prompt" in given else _with_prompt(given, answers, where)
    return _with_completion(given, kind, where) if ("completion",) in kind.answers else given


def _with_prompt(given: dict[str, Any], answers: tuple[str, ...], where: str) -> dict[str, Any]:
    """Adds the prompt from another column, unless the answers include it."""
    texts = [given[name] for name in answers]
    if answers == ("completions",) and isinstance(texts[0], list):
        texts = texts[0]
    if any(
        all(_includes_prompt(text, prompt) for text in texts)
        for prompt in ("", *(given[name] for name in prompts_of(given)))
    ):
        return given
    conversation = _single(given, CONVERSATIONS, where)
    plain = _single(given, prompts_of(given), where)
    if conversation is None:
        prompt = _plain_prompt(given, where)
        return given if prompt is None else {**given, "prompt": prompt}
    turns = _conversation(given[conversation], conversation, where)
    if turns[-1]["role"] == "assistant":
        if _said(turns[-1]) not in map(_said, texts):
            raise DataError(
                f"{where}: {conversation} ends with an assistant turn that is none of {', '.join(answers)}: it is not "
                f"plain where the prompt ends; --columns prompt={conversation} takes all of it as the prompt"
            )
        turns = turns[:-1]
    _refuse_two_prompts(given, turns, plain, conversation, "prompt", where)
    return {**given, "prompt": after_system(given, turns, where)}


def _with_completion(given: dict[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """Adds a prompt and one completion, from the columns that hold them."""
    conversation = _single(given, CONVERSATIONS, where)
    named = [column for column in ANSWERS if is_text(given.get(column))]
    plain = "prompt" if "prompt" in given else _single(given, prompts_of(given), where)
    if conversation is not None:
        turns = _conversation(given[conversation], conversation, where)
        refuse_unlearned(given[conversation][-1:], conversation, where)
        target = "chosen" if "chosen" in kind.completions else None
        _refuse_two_prompts(given, turns, plain, conversation, target, where)
        if turns[-1]["role"] != "assistant" or len(turns) == 1:
            wrong = "is one turn" if len(turns) == 1 else f"ends with a turn of {turns[-1]['role']}"
            raise DataError(
                f"{where}: {conversation} {wrong}; expected a conversation whose last turn, of the assistant, is what "
                "is learned; drop the row, or cut it after an answer"
            )
        if named and words(turns[-1]).strip() not in [_last_text(given[column]).strip() for column in named]:
            raise DataError(
                f"{where}: {' and '.join(named)} and the last turn of {conversation} could each be the completion; "
                f"{_how_to_choose(conversation, target, ' and '.join(named))}"
            )
        return {**given, "prompt": after_system(given, turns[:-1], where), "completion": turns[-1:]}
    if plain is None or not named:
        return given
    if len(named) > 1 and "instruction" in given and "prompt" not in given and "output" in named:
        named = ["output"]
    if len(named) > 1:
        raise DataError(
            f"{where}: {' and '.join(named)} could each be the completion; --columns completion={named[0]} reads "
            f"{named[0]}"
        )
    prompt = given["prompt"] if plain == "prompt" else _plain_prompt(given, where)
    return {**given, "prompt": prompt, "completion": given[named[0]]}


def _prompt_alone(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Adds the prompt, and the answer as `chosen` where a conversation or Alpaca's output holds one."""
    conversation = _single(given, CONVERSATIONS, where)
    if conversation is None:
        prompt = _plain_prompt(given, where)
        if prompt is None:
            return given
        answer = given.get("output") if "instruction" in given else None
        answered = {"chosen": answer} if isinstance(answer, str) else {}
        return {**given, "prompt": prompt, **answered}
    turns = _conversation(given[conversation], conversation, where)
    _refuse_two_prompts(given, turns, _single(given, prompts_of(given), where), conversation, "prompt", where)
    answered = {"chosen": turns[-1:]} if turns[-1]["role"] == "assistant" and len(turns) > 1 else {}
    return {**given, "prompt": after_system(given, turns[: len(turns) - len(answered)], where), **answered}


def prompts_of(given: dict[str, Any]) -> tuple[str, ...]:
    """Returns the columns that could be the prompt of a row without a conversation."""
    texts = {name: given[name] for name in ("instruction", *PROMPTS) if isinstance(given.get(name), str)}
    names = [name for name, text in texts.items() if text.strip()]
    return tuple(name for name in names if name != "input" or "instruction" not in names)


def _single(given: dict[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """Returns the one of these columns that the row has, or None; DataError for several that differ."""
    found = [name for name in names if name in given]
    if len(found) > 1 and any(given[name] != given[found[0]] for name in found):
        conversations = names is CONVERSATIONS
        raise DataError(
            f"{where}: {' and '.join(found)} could each be the {'conversation' if conversations else 'prompt'}; "
            f"--columns {found[1] if conversations else 'prompt'}={found[0]} reads {found[0]}"
        )
    return found[0] if found else None


def _refuse_two_prompts(
    given: dict[str, Any], turns: list[Message], plain: str | None, conversation: str, target: str | None, where: str
) -> None:
    """Raises DataError for a prompt beside a conversation that does not repeat it.

    plain: the prompt's column. target: the field that --columns reads the conversation as; None if there is none.
    """
    contents = [words(turn).strip() for turn in turns]
    if plain is not None and _last_text(given[plain]).strip() not in contents:
        raise DataError(
            f"{where}: {plain} is no turn of {conversation}, and each could be the prompt; "
            f"{_how_to_choose(conversation, target, plain)}"
        )


def _how_to_choose(conversation: str, target: str | None, others: str) -> str:
    if target is None:
        return f"take {others} out of the rows, or {conversation}"
    return f"--columns {target}={conversation} reads the conversation, as it stands"


def _plain_prompt(given: dict[str, Any], where: str) -> Any:
    """Returns the prompt from a column of text, or None: as a conversation from Alpaca, and beside a system prompt."""
    column = _single(given, prompts_of(given), where)
    if column is None:
        return None
    text = given[column]
    system = any(isinstance(given.get(name), str) for name in SYSTEMS)
    if column != "instruction" and not system:
        return text
    context = given.get("input") if column == "instruction" else None
    if isinstance(context, str) and context.strip():
        text = f"{text}\n{context}"
    past = given.get("history") if column == "instruction" else None
    turns = []
    for pair in past or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(words, str) for words in pair)):
            raise DataError(
                f"{where}: history must hold pairs of an instruction and its output; got {str(pair)[:60]}; drop the row"
            )
        turns += [{"role": role, "content": words} for role, words in zip(("user", "assistant"), pair)]
    return after_system(given, [*turns, {"role": "user", "content": text}], where)


def systems_of(given: dict[str, Any]) -> dict[str, str]:
    """Returns the system prompts that a row has in columns of their own, {column: text}."""
    return {name: given[name] for name in SYSTEMS if isinstance(given.get(name), str) and given[name].strip()}


def after_system(given: dict[str, Any], turns: list[Message], where: str) -> list[Message]:
    """Returns the turns after the system prompt that the row has in a column of its own; DataError for two of them."""
    systems = systems_of(given)
    has_first = bool(turns) and turns[0]["role"] == "system"
    texts = {text.strip() for text in systems.values()} | ({words(turns[0]).strip()} if has_first else set())
    if systems and len(texts) > 1:
        raise DataError(
            f"{where}: {' and '.join([*systems, *(['the first message'] if has_first else [])])} are different system "
            "prompts; expected one; take the other out of the row"
        )
    if has_first or not systems:
        return turns
    return [{"role": "system", "content": next(iter(systems.values()))}, *turns]


def _refuse_media(given: dict[str, Any], where: str) -> None:
    """Raises DataError for a row with images, video or audio in a column of their own."""
    for name in _MEDIA:
        value = given.get(name)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(not (part is None or part == "" or part is False) for part in parts):
            raise DataError(
                f"{where}: {name} is given, and models here read text alone; drop the row, or take the column out"
            )


def is_text(value: Any) -> bool:
    """Returns whether a value could be a completion: text, a message or a list of messages."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(value, str) or is_message(first)


def _said(value: Any) -> tuple[str, Any]:
    """Returns the text of a completion, or of its last message, and the tools that it calls."""
    last = value[-1] if isinstance(value, list) and value else value
    if not isinstance(last, dict):
        return str(last), None
    content = last.get("content", last.get("value"))
    return "" if content is None else str(content), last.get("tool_calls") or None


def _last_text(value: Any) -> str:
    """Returns the text of a completion, or of its last message."""
    return _said(value)[0]


def _repeats(text: str, prompt: str) -> bool:
    """Returns whether a text begins with the prompt, rather than with the same word or a part of it."""
    if not (prompt and text.startswith(prompt)):
        return False
    rest = text[len(prompt) :]
    # For one word, as "Tell" before "Tell me", this may be chance.
    return not prompt[-1].isalnum() or rest[:1] == "\n" or (rest[:1].isspace() and len(prompt.split()) > 1)


def _includes_prompt(value: Any, prompt: str) -> bool:
    """Returns whether a completion is a whole conversation or transcript, or text that begins with the prompt."""
    if isinstance(value, str):
        return value.lstrip().startswith(("Human:", "Assistant:")) or _repeats(value, prompt)
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else None
    if first is None:
        return True  # an error that rows.py reports
    speaker = first.get("role", first.get("from"))
    return not isinstance(speaker, str) or _SPEAKERS.get(speaker.lower(), speaker) != "assistant"


def is_plain_text(given: dict[str, Any]) -> bool:
    """Returns whether all of a row's `text` is to be learned: nothing beside it could be a prompt or a completion."""
    return isinstance(given.get("text"), str) and given.keys().isdisjoint(_NOT_BESIDE_TEXT)
