"""Recognise the forms of row that people have, and bring them into those that `data_rows` reads.

    a row ── renamed (--columns) ──▶ row ── recognised ──▶ prompt, chosen, rejected, completion, completions

Nothing is guessed: of a row that could be read in two ways, the error names the option that reads it in one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ..wording import did_you_mean
from .kinds import DataError, Kind

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("question", "query", "problem", "input")
ANSWERS = ("response", "output", "answer", "solution")
SYSTEMS = ("system", "system_prompt")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# ShareGPT's speakers, which are the names of what they were copied from.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model", "chosen", "rejected"), "assistant"),
    "system": "system",
}  # fmt: skip
_TOOL_SPEAKERS = ("function_call", "function", "observation", "tool", "tool_call", "tool_response")
# Names that people give to what is missing, likeliest first: for the advice of an error, not for reading.
_SYNONYMS = {
    "prompt": ("instruction", *PROMPTS, "user", "source"),
    "chosen": ("best", "preferred", "better", "winner", "win", "accepted", "positive", "good"),
    "rejected": ("worst", "dispreferred", "worse", "loser", "lose", "declined", "negative", "bad"),
    "completion": (*ANSWERS, "generation", "target", "reply", "text"),
    "completions": ("responses", "outputs", "answers", "generations", "candidates", "response", "text"),
    "scores": ("ratings", "rewards", "overall_score", "rating", "score", "reward"),
    "label": ("kto_tag", "desirable", "is_desirable", "accepted"),
    "reward": ("score", "rating", "overall_score", "helpfulness", "quality"),
    "score_chosen": ("chosen_score", "chosen_rating", "rating_chosen"),
    "score_rejected": ("rejected_score", "rejected_rating", "rating_rejected"),
}
_NUMBERS = ("reward", "score_chosen", "score_rejected")
# What may stand beside a text to say that not all of the row is in the text.
_BESIDE_TEXT = tuple(dict.fromkeys([
    *SYSTEMS, "labels", "summary", "highlights", "translation",
    *(name for field, names in _SYNONYMS.items() for name in (field, *names) if name != "text"),
]))  # fmt: skip


# --- columns by other names -----------------------------------------------------------------------


def parse_columns(text: str) -> dict[str, str]:
    """Read ``chosen=responses.best,prompt=question`` as {"chosen": "responses.best", "prompt": "question"}."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, sign, path = (piece.strip() for piece in part.partition("="))
        if not (sign and name and path):
            raise ValueError(
                f"expected NAME=COLUMN, several with commas between them, as in prompt=question,chosen=responses.best; got {text!r}"
            )
        if name in columns:
            raise ValueError(f"{name} is given twice, as {columns[name]} and as {path}: keep one of them")
        columns[name] = path
    return columns


def renamed(row: Any, columns: Mapping[str, str], where: str) -> Any:
    """Return the row with its columns under the names that are asked for.

    columns: {name: column}; a column may be a path into dicts (``responses.best``), by position into lists
        (``responses.0.text``), and over lists (``completions.response`` is the response of each).

    A column that is renamed as a whole is not there under its old name any more; one that had the new name is replaced.
    """
    if not isinstance(row, dict):
        return row
    found = {name: row[path] if path in row else _at(row, path.split("."), 0, where) for name, path in columns.items()}
    return {name: value for name, value in row.items() if name not in columns.values()} | found


def _at(value: Any, keys: list[str], depth: int, where: str) -> Any:
    if depth == len(keys) or value is None:
        return value
    key, path, holder = keys[depth], ".".join(keys), ".".join(keys[:depth])
    if isinstance(value, list):
        if not key.isdigit():
            return [_at(item, keys, depth, where) for item in value]
        if int(key) < len(value):
            return _at(value[int(key)], keys, depth + 1, where)
        raise DataError(f"{where}: no column {path}: {holder} has {len(value)} items, counted from 0")
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: no column {path}: {holder} is {type(value).__name__}, expected a dict or a list of dicts"
        )
    if key in value:
        return _at(value[key], keys, depth + 1, where)
    raise DataError(
        f"{where}: no column {path}: {holder or 'the row'} has {', '.join(map(str, value)) or 'none'}"
        f"{did_you_mean(key, map(str, value))}"
    )


# --- messages -------------------------------------------------------------------------------------


def message(value: Any, name: str, where: str) -> dict[str, str]:
    """Return a message as {"role", "content"}, of that form, of ShareGPT's {"from", "value"}, or with parts of text."""
    fields = value if isinstance(value, dict) else {}
    if fields.get("tool_calls"):
        raise DataError(f"{where}: {name} holds tool_calls, which are not supported; write them as content")
    role, content = fields.get("role"), fields.get("content")
    if role is None and content is None and isinstance(fields.get("from"), str):
        role, content = _speaker(fields["from"], name, where), fields.get("value")
    if isinstance(content, list):
        content = _text_of(content, name, where)
    if not (isinstance(role, str) and isinstance(content, str)):
        raise DataError(
            f'{where}: {name} must hold messages {{"role": text, "content": text}}; '
            f"got {str(value)[:100]}; rename the keys, or drop the row"
        )
    return {"role": role, "content": content}


def _speaker(speaker: str, name: str, where: str) -> str:
    if speaker.lower() in _TOOL_SPEAKERS:
        raise DataError(
            f"{where}: {name} looks like ShareGPT with tool calls (a turn from {speaker}), which are not supported; "
            "write them as turns of human and gpt, or drop the row"
        )
    if speaker.lower() not in _SPEAKERS:
        raise DataError(
            f"{where}: {name} has a turn from {speaker!r}; expected one of {', '.join(_SPEAKERS)}; rename it, or drop the row"
        )
    return _SPEAKERS[speaker.lower()]


def _text_of(parts: list[Any], name: str, where: str) -> str:
    """The text of content in parts, one after another."""
    texts = []
    for part in parts:
        kind = (part.get("type") or "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: {name} must hold messages of text; got a part of type {kind!r} ({str(part)[:60]}); "
                "models here read text alone: drop the row, or write what it shows as text"
            )
        texts.append(part["text"])
    return "".join(texts)


def is_message(value: Any) -> bool:
    """Return whether the value is one message, in either form."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def refuse_unlearned(turns: list[Any], name: str, where: str) -> None:
    """DataError for messages that would be learned, and whose weight says that they are not to be."""
    for turn in turns:
        if isinstance(turn, dict) and turn.get("weight") not in (None, 1):
            raise DataError(
                f"{where}: {name} has a message to learn with weight {turn['weight']}, which says not to learn it as it is; expected "
                "weight 1, or none; drop the row, or cut it after an answer to learn"
            )


def _conversation(value: Any, name: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {name} must be a list of messages; got {'none' if value == [] else type(value).__name__}; drop the row"
        )
    return [message(one, name, where) for one in value]


# --- forms ----------------------------------------------------------------------------------------


def recognised(given: dict[str, Any], kind: Kind | None, where: str) -> dict[str, Any]:
    """Return the row with the fields that `data_rows` reads for its kind; as it is where it has them, or has nothing like it.

    given: the fields that are not null. kind: None for rows whose prompt is all that is asked for.

    A prompt is a conversation where it comes of one (`CONVERSATIONS`), of Alpaca's instruction, or beside a system prompt;
    else (`PROMPTS`) the text that it is.
    """
    given = dict(given)
    for name in ("chosen", "rejected", "completion"):
        if is_message(given.get(name)):  # LLaMA-Factory's pairs
            given[name] = [given[name]]
    two = given.get("output") if "instruction" in given and "prompt" not in given else None
    if isinstance(two, list) and len(two) == 2 and not {"chosen", "rejected"} & given.keys():
        given["chosen"], given["rejected"] = two
    if kind is None:
        return given if "prompt" in given else _prompt_alone(given, where)
    if "label" in kind.numbers and "kto_tag" in given:
        given.setdefault("label", given["kto_tag"])
    answers = next((names for names in kind.answers if given.keys() >= set(names)), ())
    if answers:
        return given if "prompt" in given else _with_prompt(given, answers, where)
    return _with_answer(given, kind, where) if ("completion",) in kind.answers else given


def _with_prompt(given: dict[str, Any], answers: tuple[str, ...], where: str) -> dict[str, Any]:
    """The row with the prompt that another column says, unless the answers tell it themselves."""
    texts = [given[name] for name in answers]
    if answers == ("completions",) and isinstance(texts[0], list):
        texts = texts[0]
    if any(
        all(_tells_its_prompt(text, begun) for text in texts)
        for begun in ("", *(given[name] for name in _prompts(given)))
    ):
        return given
    conversation = _only(given, CONVERSATIONS, where)
    plain = _only(given, _prompts(given), where)
    if conversation is None:
        prompt = _plain_prompt(given, where)
        return given if prompt is None else {**given, "prompt": prompt}
    turns = _conversation(given[conversation], conversation, where)
    _refuse_media(given, where)
    if turns[-1]["role"] == "assistant":
        if turns[-1]["content"] not in [_words(text) for text in texts]:
            raise DataError(
                f"{where}: {conversation} ends with an assistant turn that is none of {', '.join(answers)}: it is not plain "
                f"where the prompt ends; --columns prompt={conversation} takes all of it as the prompt"
            )
        turns = turns[:-1]
    _refuse_two_prompts(given, turns, plain, conversation, "prompt", where)
    return {**given, "prompt": after_system(given, turns, where)}


def _with_answer(given: dict[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """The row with a prompt and one completion, of whichever columns say them."""
    conversation = _only(given, CONVERSATIONS, where)
    named = [column for column in ANSWERS if _is_text(given.get(column))]
    plain = "prompt" if "prompt" in given else _only(given, _prompts(given), where)
    if conversation is not None:
        turns = _conversation(given[conversation], conversation, where)
        _refuse_media(given, where)
        refuse_unlearned(given[conversation][-1:], conversation, where)
        target = "chosen" if "chosen" in kind.completions else None
        _refuse_two_prompts(given, turns, plain, conversation, target, where)
        if turns[-1]["role"] != "assistant" or len(turns) == 1:
            wrong = "is one turn" if len(turns) == 1 else f"ends with a turn of {turns[-1]['role']}"
            raise DataError(
                f"{where}: {conversation} {wrong}; expected a conversation whose last turn, of the assistant, is what is "
                "learned; drop the row, or cut it after an answer"
            )
        if named and turns[-1]["content"].strip() not in [_words(given[column]).strip() for column in named]:
            raise DataError(
                f"{where}: {' and '.join(named)} and the last turn of {conversation} could each be the completion; "
                f"{_or_take_out(conversation, target, ' and '.join(named))}"
            )
        return {**given, "prompt": after_system(given, turns[:-1], where), "completion": turns[-1:]}
    if plain is None or not named:
        return given
    if len(named) > 1 and "instruction" in given and "prompt" not in given and "output" in named:
        named = ["output"]
    if len(named) > 1:
        raise DataError(
            f"{where}: {' and '.join(named)} could each be the completion; --columns completion={named[0]} reads {named[0]}"
        )
    prompt = given["prompt"] if plain == "prompt" else _plain_prompt(given, where)
    return {**given, "prompt": prompt, "completion": given[named[0]]}


def _prompt_alone(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with its prompt, and with what was answered as `chosen` where a conversation or Alpaca's output says it."""
    conversation = _only(given, CONVERSATIONS, where)
    if conversation is None:
        prompt = _plain_prompt(given, where)
        if prompt is None:
            return given
        answer = given.get("output") if "instruction" in given else None
        answered = {"chosen": answer} if isinstance(answer, str) else {}
        return {**given, "prompt": prompt, **answered}
    turns = _conversation(given[conversation], conversation, where)
    _refuse_media(given, where)
    _refuse_two_prompts(given, turns, _only(given, _prompts(given), where), conversation, "prompt", where)
    answered = {"chosen": turns[-1:]} if turns[-1]["role"] == "assistant" and len(turns) > 1 else {}
    return {**given, "prompt": after_system(given, turns[: len(turns) - len(answered)], where), **answered}


def _prompts(given: dict[str, Any]) -> tuple[str, ...]:
    """The columns that could be the prompt of a row without a conversation."""
    names = tuple(
        name for name in ("instruction", *PROMPTS) if isinstance(given.get(name), str) and given[name].strip()
    )
    return tuple(name for name in names if name != "input") if "instruction" in names else names


def _only(given: dict[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """The one of these columns that the row has."""
    found = [name for name in names if name in given]
    if len(found) > 1 and any(given[name] != given[found[0]] for name in found):
        talk = names is CONVERSATIONS
        raise DataError(
            f"{where}: {' and '.join(found)} could each be the {'conversation' if talk else 'prompt'}; "
            f"--columns {found[1] if talk else 'prompt'}={found[0]} reads {found[0]}"
        )
    return found[0] if found else None


def _refuse_two_prompts(
    given: dict[str, Any],
    turns: list[dict[str, str]],
    plain: str | None,
    conversation: str,
    target: str | None,
    where: str,
) -> None:
    """DataError for a prompt beside a conversation that does not repeat it. target: what --columns names to read it."""
    said = [turn["content"].strip() for turn in turns]
    if plain is not None and _words(given[plain]).strip() not in said:
        raise DataError(
            f"{where}: {plain} is no turn of {conversation}, and each could be the prompt; "
            f"{_or_take_out(conversation, target, plain)}"
        )


def _or_take_out(conversation: str, target: str | None, others: str) -> str:
    if target is None:
        return f"take {others} out of the rows, or {conversation}"
    return f"--columns {target}={conversation} reads the conversation, as it stands"


def _plain_prompt(given: dict[str, Any], where: str) -> Any:
    """The prompt that a column of text says: Alpaca's as a conversation, and any beside a system prompt; or None."""
    column = _only(given, _prompts(given), where)
    if column is None:
        return None
    _refuse_media(given, where)
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
    """Return the system prompts that a row has in columns of their own."""
    return {name: given[name] for name in SYSTEMS if isinstance(given.get(name), str) and given[name].strip()}


def after_system(given: dict[str, Any], turns: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """Return the turns behind the system prompt that the row has in a column of its own, once; DataError for two of them."""
    says = systems_of(given)
    begun = bool(turns) and turns[0]["role"] == "system"
    said = {text.strip() for text in says.values()} | ({turns[0]["content"].strip()} if begun else set())
    if says and len(said) > 1:
        raise DataError(
            f"{where}: {' and '.join([*says, *(['the first message'] if begun else [])])} are different system prompts; "
            "expected one; take the other out of the row"
        )
    return turns if begun or not says else [{"role": "system", "content": next(iter(says.values()))}, *turns]


def _refuse_media(given: dict[str, Any], where: str) -> None:
    for name in _MEDIA:
        if given.get(name):
            raise DataError(
                f"{where}: {name} is given, and models here read text alone; drop the row, or take the column out"
            )
    if given.get("tools") not in (None, "", "[]", []):
        raise DataError(f"{where}: tools are given, which are not supported; drop the row, or take the column out")


def _is_text(value: Any) -> bool:
    return (
        isinstance(value, str)
        or is_message(value)
        or (isinstance(value, list) and bool(value) and is_message(value[0]))
    )


def _words(value: Any) -> str:
    """The text of a completion: its own, or that of its last message."""
    last = value[-1] if isinstance(value, list) and value else value
    return str(last.get("content", last.get("value"))) if isinstance(last, dict) else str(last)


def _repeats(text: str, prompt: str) -> bool:
    """Whether a text begins with the prompt, rather than with the same word or a part of it."""
    if not (prompt and text.startswith(prompt)):
        return False
    rest = text[len(prompt) :]
    # Of one word, as "Tell" before "Tell me", this may be chance.
    return not prompt[-1].isalnum() or rest[:1] == "\n" or (rest[:1].isspace() and len(prompt.split()) > 1)


def _tells_its_prompt(value: Any, prompt: str) -> bool:
    """Whether a completion is a whole conversation or transcript, or text that begins with the prompt."""
    if isinstance(value, str):
        opening = value.lstrip()
        return opening.startswith(("Human:", "Assistant:")) or _repeats(value, prompt)
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else None
    if first is None:
        return True  # what this is an error of, is said by who reads it
    speaker = first.get("role", first.get("from"))
    return not isinstance(speaker, str) or _SPEAKERS.get(speaker.lower(), speaker) != "assistant"


def unread(given: dict[str, Any], read: list[Any]) -> Iterator[str]:
    """Yield a note for each column that looks like something to learn from, and that nothing was read from.

    read: the prompt and the completions that the row was read as.
    """
    if is_plain_text({name: value for name, value in given.items() if value is not None}):
        for name in _BESIDE_TEXT:
            if given.get(name) not in (None, ""):
                yield f"{name} is not read beside text (all of the text is learned, and nothing else)"
        return
    said = "".join(value if isinstance(value, str) else "\n".join(turn["content"] for turn in value) for value in read)
    for name in ("instruction", *PROMPTS):
        if isinstance(given.get(name), str) and given[name].strip() not in said:
            yield f"{name} is not read (the row has its prompt elsewhere)"


def is_plain_text(given: dict[str, Any]) -> bool:
    """Return whether a row is a text to learn all of: one beside which nothing could be a prompt or a completion."""
    others = {
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "completions",
        "instruction",
        *CONVERSATIONS,
        *PROMPTS,
        *ANSWERS,
    }
    return isinstance(given.get("text"), str) and not others & given.keys()


# --- what is said of a row that cannot be read ----------------------------------------------------


def looks_like(given: dict[str, Any]) -> str:
    """Return what a row seems to be, in a few words that follow "this looks like "; nothing where it is like none."""
    names = given.keys()
    conversation = next((name for name in CONVERSATIONS if name in given), None)
    if conversation is not None:
        first = next(iter(given[conversation]), None) if isinstance(given[conversation], list) else None
        return (
            "ShareGPT (from, value)"
            if isinstance(first, dict) and "from" in first
            else f"a conversation ({conversation})"
        )
    if {"chosen", "rejected"} <= names:
        return "a pair"
    if {"completion", "label"} <= names:
        return "unpaired data (completion, label)"
    if "completions" in given:
        listed = given["completions"]
        dicts = isinstance(listed, list) and listed and isinstance(listed[0], dict)
        return "UltraFeedback with its completions in dicts" if dicts else "a list of completions"
    if "instruction" in given:
        return "Alpaca (instruction, output)" if "output" in given else "instructions without answers"
    return "plain text" if is_plain_text(given) else ""


def advice(given: dict[str, Any], missing: list[str]) -> str:
    """Return the option that gives a row what it lacks, as "--columns rejected=loser"; nothing where no column is like it."""
    listed = given.get("completions")
    if isinstance(listed, list) and listed and isinstance(listed[0], dict) and not is_message(listed[0]):
        missing = ["completions", *missing]  # which hold more than text
    if _prompts(given) or set(CONVERSATIONS) & given.keys():
        missing = [name for name in missing if name != "prompt"]
    guesses: dict[str, str] = {}
    for name in missing:
        found = [path for path in _paths(given, name) if path not in guesses.values()]
        if not found:
            return ""
        guesses[name] = found[0]
    return "--columns " + ",".join(f"{name}={path}" for name, path in guesses.items()) if guesses else ""


def _paths(given: dict[str, Any], name: str) -> list[str]:
    """Columns, and paths into dicts and lists of dicts, that may be what people call `name`; likeliest first."""
    paths: dict[str, Any] = {}
    for column, value in given.items():
        paths[str(column)] = value
        inner = value[0] if isinstance(value, list) and value and not is_message(value[0]) else value
        if isinstance(inner, dict) and not is_message(inner):
            lifted = isinstance(value, list)
            paths |= {f"{column}.{key}": [one] if lifted else one for key, one in inner.items()}
    fitting = {
        path: path.rpartition(".")[2].lower().replace("-", "_") for path, value in paths.items() if _fits(value, name)
    }
    synonyms = _SYNONYMS.get(name, ())
    ranked = [path for known in (name, *synonyms) for path, key in fitting.items() if key == known]
    ranked += [path for path, key in fitting.items() if name in key.split("_")]
    close = difflib.get_close_matches(name, fitting.values(), n=3, cutoff=0.75)
    return list(dict.fromkeys([*ranked, *(path for path, key in fitting.items() if key in close)]))


def _fits(value: Any, name: str) -> bool:
    """Whether a value could be what is called `name`: text, a number, or a list of one of them."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "label":
        return isinstance(value, bool) or value in (0, 1)
    if name in _NUMBERS:
        return number
    if name == "scores":
        return isinstance(value, list) and bool(value) and isinstance(value[0], (int, float))
    if name == "completions":
        return isinstance(value, list) and bool(value) and (isinstance(value[0], str) or _is_text(value[0]))
    return _is_text(value)
