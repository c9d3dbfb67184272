"""Rows: each is checked and brought into the form of its kind; a `DataError` names the row that cannot be.

`shape_row` takes a row in the fields that forms.py recognises; `check_columns` checks the numbers of a data set against
the methods that are to learn from it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from ..wording import did_you_mean
from .advice import advice, looks_like, refuse_another_prompt, unread, unread_columns
from .forms import (
    ANSWERS,
    CONVERSATIONS,
    PROMPTS,
    SYSTEMS,
    after_system,
    is_plain_text,
    message,
    recognised,
    refuse_unlearned,
    systems_of,
    transcript,
)
from .kinds import KINDS, DataError, Kind, get_kind
from .template import KWARGS, TOOLS, Conversation, Message, prompt_of, read_kwargs, read_tools, words

if TYPE_CHECKING:
    import datasets

_ALIASES = {"prob": "prob_chosen"}
# Every field that some kind of row is read from.
_FIELDS = (
    *("prompt", "chosen", "rejected", "completion", "completions", "text", "instruction", "history", "kto_tag"),
    *(TOOLS, KWARGS),
    *(*CONVERSATIONS, *PROMPTS, *ANSWERS, *SYSTEMS, *_ALIASES.values()),
    *(name for kind in KINDS.values() for name in kind.numbers),
)


def check_names(names: Iterable[str], also: Sequence[str] = ()) -> None:
    """Raises ValueError for a name in `columns` that is no field of a row; also: names beside the usual fields."""
    for name in names:
        if name not in (fields := (*_FIELDS, *also)):
            raise ValueError(
                f"--columns {name}=…: rows have no field {name}; there are {', '.join(fields)}"
                f"{did_you_mean(name, fields)}"
            )


def shape_row(row: Any, kind: Kind, where: str) -> list[dict[str, Any]]:
    """Returns a row of a source in the form of its kind; two rows where a pair is read as unpaired.

    where: its place, for errors, here as in all of this file.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {kind.expected}; got {type(row).__name__}")
    raw_row = {name: value for name, value in row.items() if value is not None}
    given = recognised(raw_row, kind, where)
    if kind.reads_text and is_plain_text(given):
        return [
            {
                "prompt": "",
                kind.name: _text(given["text"], "text", where),
                **_beside(raw_row, "", where),
                "where": where,
            }
        ]
    form = next((form for form in kind.forms if given.keys() >= set(form)), None)
    if form is None:
        raise _without_form(raw_row, given, kind, where)
    pair = {"chosen", "rejected"}
    if "completions" in form:
        _check_list(given["completions"], where)
        raw = completions_of(given, kind)
    elif pair <= given.keys() and (pair <= set(form) or "prompt" not in given):
        raw = {name: given[name] for name in ("chosen", "rejected")}
    else:
        raw = {name: given[name] for name in form if name in ("chosen", "rejected", "completion")}
    prompt, completions = _prompt_and_completions(given.get("prompt"), raw, where)
    if "prompt" not in given and isinstance(prompt, str):
        refuse_another_prompt(raw_row, prompt, where)
    prompt = _with_system(raw_row, prompt, where)
    named = dict(zip(raw, completions))
    if "label" in kind.numbers and "chosen" in named:
        shaped = [{"completion": named[name], "label": name == "chosen"} for name in named]
    elif kind.listed and "chosen" in named:
        scores = [_number(given[f"score_{name}"], f"score_{name}", where) for name in named]
        shaped = [{"completions": completions, "scores": scores}]
    elif kind.half is not None:
        shaped = [{kind.name: named[kind.name if kind.name in named else "completion"]}]
    else:
        shaped = [{**grouped(named), **_extras(given, kind, where)}]
    beside = _beside(raw_row, prompt, where)
    return [{"prompt": prompt, **fields, **beside, "where": where} for fields in shaped]


def _beside(row: dict[str, Any], prompt: Any, where: str) -> dict[str, Any]:
    """Returns the columns of what the chat template is told beside the messages of a row: its tools and variables."""
    given = row.get("prompt")
    own = given if isinstance(given, Conversation) else Conversation()
    tools = own.tools if row.get(TOOLS) is None else read_tools(row[TOOLS], where)
    kwargs = own.kwargs or None if row.get(KWARGS) is None else read_kwargs(row[KWARGS], where)
    if isinstance(prompt, str):
        if tools is not None:
            raise DataError(
                f"{where}: {TOOLS} are given beside text, which no chat template writes; write the row as messages, or "
                f"take {TOOLS} out of the rows"
            )
        return {}
    return {name: value for name, value in ((TOOLS, tools), (KWARGS, kwargs)) if value is not None}


def _with_system(row: dict[str, Any], prompt: Any, where: str) -> Any:
    """Returns the prompt after the row's system prompt, if any; DataError for text, which cannot have one."""
    if isinstance(prompt, list):
        return after_system(row, prompt, where)
    if systems := systems_of(row):
        system, how = " and ".join(systems), "write the row as messages"
        if isinstance(row.get("prompt"), str):
            how = "--columns question=prompt reads both as a conversation"
        raise DataError(
            f"{where}: {system} is given beside text, which has no place for a system prompt; {how}, or take {system} "
            "out of the rows"
        )
    return prompt


def shape_prompt(row: Any, where: str) -> dict[str, Any]:
    """Returns a row with its prompt, and its chosen and rejected if any, in the form of `load`; the rest unchanged."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with prompt; got {type(row).__name__}")
    given = {name: value for name, value in row.items() if value is not None}
    if not given.keys() & {"chosen", "completion"}:
        given = recognised(given, None, where)
    if given.keys() & {"chosen", "completion"}:
        kind = KINDS["pair" if {"chosen", "rejected"} <= given.keys() else "chosen"]
        shaped = shape_row(given, kind, where)[0]
        read = {name: x for name, x in shaped.items() if name not in ("where", TOOLS, KWARGS)}
        return row | read | {"prompt": prompt_of(shaped)}
    prompt = given.get("prompt")
    if isinstance(prompt, list) and prompt:
        prompt = _messages(prompt, "prompt", "user", where)
    elif isinstance(prompt, str) and prompt.strip():
        prompt = _encodable(prompt, "prompt", where)
    else:
        raise DataError(
            f"{where}: prompt missing or empty; expected text or a list of messages; got "
            f"{', '.join(sorted(given)) or 'no fields'}; {_advice(given, [['prompt']])}"
        )
    return row | {"prompt": prompt_of({"prompt": _with_system(given, prompt, where), **_beside(given, prompt, where)})}


def _advice(given: dict[str, Any], lacks: list[list[str]]) -> str:
    """Returns the end of a row's error, what to do; lacks: the missing fields, for each form that it could have."""
    option = next(filter(None, (advice(given, missing) for missing in lacks)), "")
    return f"{option} reads it so, if that is what it is" if option else "rename the fields or drop the row"


def _without_form(row: dict[str, Any], given: dict[str, Any], kind: Kind, where: str) -> DataError:
    """Returns the error for a row of no form of its kind, by the nearest form; given: the row as recognised."""
    if len(kind.completions) == 2 and {"completion", "label"} <= row.keys():
        return DataError(
            f"{where}: expected a pair ({kind.expected}); got unpaired data (completion, label); "
            "give it to a method that takes unpaired data (kto), or pair the completions of each prompt"
        )
    # The nearest first; equally near forms in their order.
    forms = sorted(kind.forms, key=lambda form: -len(given.keys() & set(form) - {"prompt"}))
    lacks = [[name for name in form if name not in given] for form in forms]
    seen = looks_like(row)
    what_to_do = _advice(row, lacks)
    if "--columns" not in what_to_do:
        what_to_do = _reader(row, kind, where) or what_to_do
    return DataError(
        f"{where}: {', '.join(lacks[0])} missing or null; expected {kind.expected}; "
        f"got {', '.join(sorted(row)) or 'no fields'}{f' (this looks like {seen})' if seen else ''}; {what_to_do}"
    )


def _reader(row: dict[str, Any], kind: Kind, where: str) -> str:
    """Returns which method or command would read a row that is no pair or list; "" if none would."""
    if not kind.compares or row.keys() & {"chosen", "rejected", "completions"}:
        return ""
    try:
        read = recognised(row, KINDS["chosen"], where)
        prompts = recognised(row, None, where)
    except DataError:
        return ""
    if is_plain_text(row) or "completion" in read:
        return "there is nothing to compare: --method sft reads it, or give it another completion"
    return "xpo-fast rl learns from prompts alone; or give it completions" if "prompt" in prompts else ""


def _check_list(completions: Any, where: str) -> None:
    if not isinstance(completions, list):
        raise DataError(
            f"{where}: completions must be a list of texts or of conversations; "
            f"got {type(completions).__name__}; drop the row, or give a list"
        )
    if (n := len(completions)) < 2:
        raise DataError(f"{where}: completions must be two or more, to be compared; got {n}; drop the row")


def completions_of(row: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """Returns a row's completions by name, those of a list as ``completions[i]``, in the order of the batch's rows."""
    if not kind.listed:
        return {name: row[name] for name in kind.completions}
    named = {f"completions[{i}]": completion for i, completion in enumerate(row["completions"])}
    return {**named, "rejected": row["rejected"]} if "rejected" in row else named


def grouped(named: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that `completions_of` names one by one: its inverse."""
    listed = [value for name, value in named.items() if name.startswith("completions[")]
    others = {name: value for name, value in named.items() if not name.startswith("completions[")}
    return {"completions": listed, **others} if listed else others


def _extras(given: dict[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """Returns the numbers that a row carries beside its text: label, scores and those of `Kind.numbers`."""
    extras: dict[str, Any] = {}
    scores = [name for name in ("score_chosen", "score_rejected") if name in given]
    if len(scores) == 1 and scores[0] in kind.numbers:
        raise DataError(
            f"{where}: {scores[0]} is the only score; expected both score_chosen and score_rejected, or "
            "neither; give the other, or drop the row"
        )
    for name in kind.numbers:
        aliases = [alias for alias in (name, _ALIASES.get(name)) if alias in given]
        if len(aliases) > 1:
            raise DataError(f"{where}: {' and '.join(aliases)} are two names of one number; remove either field")
        for alias in aliases:
            if kind.listed:
                extras[name] = _numbers_of_list(given[alias], alias, len(given["completions"]), where)
            else:
                extras[name] = _READERS.get(name, _number)(given[alias], alias, where)
    return extras


def _numbers_of_list(value: Any, name: str, count: int, where: str) -> list[float]:
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {name} must be a list of numbers, one per completion; got {type(value).__name__}; "
            "drop the row, or give a list"
        )
    if len(value) != count:
        raise DataError(
            f"{where}: expected one of {name} per completion; got {len(value)} {name} for {count} completions; "
            "give the others, or drop the row"
        )
    return [_number(number, f"{name}[{i}]", where) for i, number in enumerate(value)]


def _number(value: Any, name: str, where: str) -> float:
    # Batches hold float32. A NaN is not within its range either, and an int may be beyond any float.
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise DataError(
            f"{where}: {name} must be a finite number; got {str(value)[:50]} ({type(value).__name__}); "
            "write it as a number within float32's range, or drop the row"
        )
    return float(value)


def _probability(value: Any, name: str, where: str) -> float:
    number = _number(value, name, where)
    if not 0 <= number <= 1:
        raise DataError(
            f"{where}: {name} must be a probability in [0, 1], that chosen beats rejected; got {number:g}; "
            "rescale it, or drop the row"
        )
    return number


def _label(value: Any, name: str, where: str) -> bool:
    if value not in (0, 1):
        raise DataError(f"{where}: {name} must be true (desirable) or false; got {value!r}")
    return bool(value)


_READERS: dict[str, Callable[[Any, str, str], Any]] = {"prob": _probability, "label": _label}


def _prompt_and_completions(prompt: Any, named: dict[str, Any], where: str) -> tuple[Any, list[Any]]:
    """Returns the prompt and the completions after it, all text or all lists of messages.

    named: {field: completion}; a prompt of None is the beginning that they share.
    """
    names = list(named)
    values: list[Any] = list(named.values())
    if prompt is None and all(isinstance(v, str) and re.match(r"\s*(Human|Assistant):", v) for v in values):
        values = [transcript(value) for value in values]
    if all(isinstance(value, str) for value in (values if prompt is None else [prompt, *values])):
        if prompt is None:
            prompt, values = _split_text(values, where)
        return _text(prompt, "prompt", where), [_text(v, n, where) for n, v in zip(names, values)]
    completions = [_messages(v, n, "assistant", where) for n, v in zip(names, values)]
    # Beside a prompt of text, "completion" is its answer; the others may be whole conversations that repeat it.
    answer = names == ["completion"] and prompt is not None
    if answer or not (prompt is None or isinstance(prompt, str)):
        prompt = _messages(prompt, "prompt", "user", where)
        if all(completion[: len(prompt)] == prompt for completion in completions):
            completions = [completion[len(prompt) :] for completion in completions]
    else:
        prompt, completions = _split_messages(prompt, completions, names, where)
    for name, completion, value in zip(names, completions, named.values()):
        if isinstance(value, list):
            refuse_unlearned(value[-len(completion) :] if completion else [], name, where)
        roles = [turn["role"] for turn in completion] or ["nothing"]
        if roles[0] != "assistant" or roles[-1] != "assistant":
            raise DataError(
                f"{where}: what follows the prompt in {name} must begin and end with an assistant turn; it "
                f"begins with {roles[0]}, ends with {roles[-1]}; drop the row, or cut it after an answer"
            )
    return prompt, completions


def _text(value: str, name: str, where: str) -> str:
    if not value.strip():
        raise DataError(f"{where}: {name} is empty; expected text; drop the row")
    return _encodable(value, name, where)


def _encodable(value: str, name: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair ({error.reason})"
        raise DataError(f"{where}: {name} holds {found}; repair or drop the row") from error
    return value


def _messages(value: Any, name: str, role: str, where: str) -> list[Message]:
    """Returns messages as a chat template takes them; a string becomes one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, name, where)}]
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be text or a list of messages; got {type(value).__name__}")
    if not value:
        raise DataError(f"{where}: {name} is empty; expected at least one message; drop the row")
    found = [message(one, name, where) for one in value]
    for one in found:
        _encodable(words(one), name, where)
    return found


def _split_text(values: list[str], where: str) -> tuple[str, list[str]]:
    """Splits two texts after the prompt that they share: at a line's end, or the space before the words that differ."""
    if len(values) == 1:
        raise DataError(
            f"{where}: no prompt: the row has no prompt field, and one text does not tell where its prompt ends; "
            "add a prompt field"
        )
    shared = os.path.commonprefix(values)  # noqa: RUF071 (it compares texts)
    cut = len(shared.rstrip(" ")) if shared.endswith(" ") else max(shared.rfind(" "), shared.rfind("\n") + 1)
    if not shared[:cut].strip():
        raise DataError(
            f"{where}: no prompt: the row has no prompt field, and chosen and rejected do not begin with a "
            "shared one; add a prompt field"
        )
    return shared[:cut], [value[cut:] for value in values]


def _split_messages(
    prompt: str | None, completions: list[list], names: list[str], where: str
) -> tuple[list, list[list]]:
    """Splits conversations after the prompt that they share; each keeps at least its last message as completion."""
    opens_with_answer = completions[0][0]["role"] == "assistant"
    if isinstance(prompt, str) and opens_with_answer:
        return _messages(prompt, "prompt", "user", where), completions
    shortest = min(map(len, completions))
    shared = 0
    while shared < shortest - 1 and all(c[shared] == completions[0][shared] for c in completions):
        shared += 1
    following = [completion[shared] for completion in completions]
    words_of = [(one["role"], words(one)) for one in following]
    if words_of[0][0] != "assistant" and all(one == words_of[0] for one in words_of):
        keys = dict.fromkeys(key for one in following for key in one if any(one[key] != x.get(key) for x in following))
        if keys:
            raise DataError(
                f"{where}: message {shared} of {' and '.join(names)} is the same but for {', '.join(keys)}; expected "
                "the same messages up to the answer: take what differs out of the messages"
            )
    if not shared:
        raise DataError(
            f"{where}: no prompt: expected the same messages at the beginning of {' and '.join(names)}; "
            "add a prompt field, or begin with the conversation that is answered"
        )
    return completions[0][:shared], [completion[shared:] for completion in completions]


def notes_of(row: dict[str, Any], raw: dict[str, Any], kind: Kind) -> Iterator[str]:
    """Yields warnings about a row that is legal; raw: the row of the source that it was made from."""
    completions = completions_of(row, kind).values()
    if "chosen" in row and row["chosen"] == row.get("rejected"):
        yield "chosen equals rejected (the pair teaches nothing)"
    if len(set(row.get("scores", ()))) == 1:
        yield "the scores of a list are all equal (its order teaches nothing)"
    if isinstance(row["prompt"], list):
        turns = [turn for completion in completions for turn in completion]
        if not all(words(turn).strip() or turn.get("tool_calls") for turn in turns):
            yield "an assistant turn without words (only its end is scored)"
        if any(turn["role"] != "assistant" for turn in turns):
            yield "a completion of several turns (the assistant's are scored, unless --score says otherwise)"
    yield from unread(raw, [row["prompt"], *completions])


def unread_of(
    row: dict[str, Any], raw: dict[str, Any], kind: Kind, numbers: Sequence[str] | None = None
) -> Iterator[str]:
    """Yields the columns of a row of the source that nothing was read from; row: what was made of it.

    numbers: the columns of numbers that are read; None for those of the kind.
    """
    if numbers is None:
        numbers = (*kind.numbers, *(_ALIASES[name] for name in kind.numbers if name in _ALIASES))
    yield from unread_columns(raw, [row["prompt"], *completions_of(row, kind).values()], kind, numbers)


def check_alike(row: dict[str, Any], first: dict[str, Any]) -> None:
    """Raises DataError for a shaped row that is text where the first is a conversation, or that has other fields."""
    form, first_form = ("text" if isinstance(x["prompt"], str) else "a conversation" for x in (row, first))
    if form != first_form:
        raise DataError(
            f"{row['where']}: this row is {form} where {first['where']} is {first_form}; "
            "give all rows of a data set in one form"
        )
    for has, lacks in ((first, row), (row, first)):
        if missing := [name for name in has if name not in lacks and name not in (TOOLS, KWARGS)]:
            raise DataError(
                f"{lacks['where']}: {', '.join(missing)} missing or null, which {has['where']} has; "
                "give it in every row, or in none"
            )


_CHECKED_AT_ONCE = 1000  # pairs of lists are made of them


def check_columns(
    dataset: datasets.Dataset, kind: str, rehearse: Callable[[Mapping[str, torch.Tensor | None]], None]
) -> None:
    """Raises DataError for a data set, loaded or encoded, whose numbers are not those that the methods need.

    The error names the column that is missing, or the first row that a method refuses.

    kind: the data set's, as for `load`. rehearse: raises ValueError for columns that the methods refuse; it is given
        {the methods' name: the numbers of some rows, or None before they are read}, as `Objective.rehearse`.
    """
    has, fields = set(dataset.column_names), get_kind(kind).numbers
    # The trainer estimates KTO's kl, and has a value for data without.
    given: dict[str, Any] = {"kl": None, **({"value": None} if "reward" in has else {})}
    given |= {"rejected": None} if {"rejected", "rejected_ids"} & has else {}
    try:
        rehearse(given | {column: None for field, column in fields.items() if field in has})
    except ValueError as error:
        raise DataError(
            f"{error}. The data set has {', '.join(sorted(has - {'where'}))}; beside the completions its rows may "
            f"have {', '.join(fields) or 'nothing'}"
        ) from None
    for start in range(0, len(dataset), _CHECKED_AT_ONCE):
        rows = dataset[start : start + _CHECKED_AT_ONCE]
        numbers = {column: _numbers(rows[field]) for field, column in fields.items() if field in has}
        try:
            rehearse(given | numbers)
        except ValueError:
            for i in range(min(_CHECKED_AT_ONCE, len(dataset) - start)):
                try:
                    rehearse(given | {name: x[i : i + 1] for name, x in numbers.items()})
                except ValueError as error:
                    where = rows["where"][i] if "where" in has else f"row {start + i}"
                    raise DataError(f"{where}: {error}") from None
            raise


def _numbers(values: list[Any]) -> torch.Tensor:
    """Returns the numbers of U rows (U,), or of lists (U, K), with the last number of a shorter list repeated."""
    if values and isinstance(values[0], list):
        longest = max(map(len, values))
        values = [filled(row, longest, row[-1]) for row in values]
    return torch.tensor(values)


def filled(values: list[Any], length: int, fill: Any) -> list[Any]:
    """Returns the list, filled up to a length."""
    return [*values, *[fill] * (length - len(values))]
