"""Advice about rows: columns that nothing is read from, and the option that reads a row which cannot be read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterator
from typing import Any

from .forms import ANSWERS, CONVERSATIONS, PROMPTS, SYSTEMS, is_message, is_plain_text, is_text, prompts_of
from .kinds import DataError, Kind
from .template import KWARGS, TOOLS, words

# Names that people give to the fields, likeliest first: for the advice of an error, not for reading.
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
# Further names of what answers answer, in small letters and with underscores.
_ASKED = (
    *("prompt", "instruction", *PROMPTS, "text", "user", "human", "request", "context", "post", "dialogue", "passage"),
    *("article", "document", "user_input", "user_prompt", "user_message", "input_text", "prompt_text", "question_text"),
)
# Columns which, beside `text`, say that not all of the row is in the text.
_BESIDE_TEXT = (
    *(*SYSTEMS, "labels", "summary", "highlights", "translation"),
    *(name for field, names in _SYNONYMS.items() for name in (field, *names) if name != "text"),
)


def unread(given: dict[str, Any], read: list[Any]) -> Iterator[str]:
    """Yields a note for each column that looks like something to learn from, and that nothing was read from.

    given: the row as it stands. read: the prompt and the completions that were read from it.
    """
    if is_plain_text({name: value for name, value in given.items() if value is not None}):
        for name in dict.fromkeys(_BESIDE_TEXT):
            if given.get(name) not in (None, ""):
                yield f"{name} is not read beside text (all of the text is learned, and nothing else)"
        return
    asked = [name for name in ("instruction", *PROMPTS) if isinstance(given.get(name), str)]
    text = "".join(_texts(read)) if asked else ""
    for name in asked:
        if given[name].strip() not in text:
            yield f"{name} is not read (the row has its prompt elsewhere)"


def unread_columns(given: dict[str, Any], read: list[Any], kind: Kind, numbers: Container[str]) -> Iterator[str]:
    """Yields the columns that nothing was read from, and that `unread` has no note about.

    given, read: as for `unread`. numbers: the names of the numbers that are read beside the text.
    """
    plain = is_plain_text({name: value for name, value in given.items() if value is not None})
    noted = _BESIDE_TEXT if plain else ("instruction", *PROMPTS)
    fields = {"prompt", "where", *kind.completions, *(name for form in kind.forms for name in form)} - {*kind.numbers}
    fields |= {"text"} if plain else {TOOLS, "kto_tag", *(() if isinstance(read[0], str) else (KWARGS,))}
    fields |= set() if "prompt" in given else {"chosen", "rejected"}  # which tell where their prompt ends
    for name, value in given.items():
        if name in fields or name in noted or name in numbers or value is None or value in ("", []):
            continue
        repeated = name in (*CONVERSATIONS, *ANSWERS, *SYSTEMS, "history")
        if not (repeated and all(text.strip() in "".join(_texts(read)) for text in _texts(value))):
            yield name


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in a text, a message, or lists of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield value["value"] if isinstance(value.get("value"), str) else str(words(value))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
            yield "\n"


def refuse_another_prompt(row: dict[str, Any], prompt: str, where: str) -> None:
    """Raises DataError for a column that could be the prompt of a row whose prompt is what its answers begin with."""
    for name, value in row.items():
        repeated = isinstance(value, str) and re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", prompt)
        if _could_be_prompt(name, value) and not repeated:
            raise DataError(
                f"{where}: the row has no prompt field, and chosen and rejected begin with the same words "
                f"({prompt.strip()[:40]!r}); {name} could be the prompt, too: --columns prompt={name} reads it so; or "
                f"take {name} out of the rows"
            )


def _could_be_prompt(name: str, value: Any) -> bool:
    """Returns whether a column has the name of what answers answer and text in it, or messages under any name."""
    if isinstance(value, list) and value and is_message(value[0]):
        return name not in ("chosen", "rejected", "completion", "completions")
    known = str(name).lower().replace("-", "_").replace(" ", "_") in _ASKED
    return known and isinstance(value, str) and bool(value.strip())


def looks_like(given: dict[str, Any]) -> str:
    """Returns a few words to follow "this looks like ", or "" for a row like none that is known."""
    names = given.keys()
    if (name := next((name for name in CONVERSATIONS if name in given), None)) is not None:
        first = next(iter(given[name]), None) if isinstance(given[name], list) else None
        is_shared = isinstance(first, dict) and "from" in first
        return "ShareGPT (from, value)" if is_shared else f"a conversation ({name})"
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
    """Returns the option that reads the missing fields, as "--columns rejected=loser"; "" where no column fits."""
    listed = given.get("completions")
    if isinstance(listed, list) and listed and isinstance(listed[0], dict) and not is_message(listed[0]):
        missing = ["completions", *missing]  # dicts that hold more than text
    if prompts_of(given) or set(CONVERSATIONS) & given.keys():
        missing = [name for name in missing if name != "prompt"]
    guesses: dict[str, str] = {}
    for name in missing:
        found = [path for path in _paths(given, name) if path not in guesses.values()]
        if not found:
            return ""
        guesses[name] = found[0]
    return "--columns " + ",".join(f"{name}={path}" for name, path in guesses.items()) if guesses else ""


def _paths(given: dict[str, Any], name: str) -> list[str]:
    """Returns columns, and paths into dicts and lists of dicts, that may hold the field `name`; likeliest first."""
    paths: dict[str, Any] = {}
    for column, value in given.items():
        paths[str(column)] = value
        inner = value[0] if isinstance(value, list) and value and not is_message(value[0]) else value
        if isinstance(inner, dict) and not is_message(inner):
            lifted = isinstance(value, list)
            paths |= {f"{column}.{key}": [one] if lifted else one for key, one in inner.items()}
    fits = [path for path, value in paths.items() if _fits(value, name)]
    fitting = {path: path.rpartition(".")[2].lower().replace("-", "_") for path in fits}
    ranked = [path for known in (name, *_SYNONYMS.get(name, ())) for path, key in fitting.items() if key == known]
    ranked += [path for path, key in fitting.items() if name in key.split("_")]
    close = difflib.get_close_matches(name, fitting.values(), n=3, cutoff=0.75)
    return list(dict.fromkeys([*ranked, *(path for path, key in fitting.items() if key in close)]))


def _fits(value: Any, name: str) -> bool:
    """Returns whether a value could be that of the field `name`: text, a number, or a list of one of them."""
    if name == "label":
        return isinstance(value, bool) or value in (0, 1)
    if name in ("reward", "score_chosen", "score_rejected"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in ("scores", "completions"):
        first = value[0] if isinstance(value, list) and value else None
        return isinstance(first, (int, float)) if name == "scores" else is_text(first)
    return is_text(value)
