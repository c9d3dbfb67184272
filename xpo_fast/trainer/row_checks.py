"""Checks of encoded rows without a model: what is scored, how it ends, what is cut, whether the texts are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch import Tensor

from .. import data
from ..data import IGNORE_INDEX, Kind
from ..data.ragged import columns_of, keys_of, scored_of
from ..data.rows import completions_of
from ..rollout import encode_prompts
from .checks import place_in
from .findings import Report, Row

COLLATED, READ, COUNTED = 32, 12, 20_000  # rows collated, rows read as text, rows counted
_MOST_CUT, _LEAST_ENDED, _MOST_TWICE = 0.05, 0.9, 0.01  # shares; beyond them there is a doubt
_OPENING = 4  # at most so many tokens open a prompt, and stay where it is cut
_OMITS = "leaves tokens of the completion out"
_LONG = 12  # characters of a prompt's message by which an answer is recognised as holding it


class Behind(NamedTuple):
    """One row of a batch: a completion behind its prompt."""

    unit: int  # index of its row in the data set
    name: str
    prompt: list[int]
    completion: list[int]
    mask: Sequence[bool] | None = None  # which tokens of the completion are scored; None: all

    @property
    def scored(self) -> list[int]:
        """The places of the scored tokens in the completion."""
        return [k for k in range(len(self.completion)) if self.mask is None or self.mask[k]]


@dataclass
class Rows:
    """The rows of a run, and how they become batches."""

    dataset: datasets.Dataset  # encoded
    kind: Kind
    tokenizer: Any
    max_length: int
    ends: set[int]  # the ids at which sampling stops
    collate: Callable[[list[dict]], dict[str, Tensor]] | None = None  # None: batches have other rows than `sequences`
    texts: datasets.Dataset | None = None  # what `dataset` was encoded from
    held_out: datasets.Dataset | None = None
    max_prompt_length: int | None = None
    score: str = "assistant"  # of a completion of several turns, see `data.encode`
    chat_template_kwargs: Mapping[str, Any] | None = None  # that `dataset` was encoded with

    @cached_property
    def looked_at(self) -> tuple[list[Behind], dict[str, Tensor] | None]:
        """Some rows, evenly spread, in the order of the batch, and the batch that the collator makes of them."""
        units = self.sample(COLLATED)
        features = [self.dataset[i] for i in units]
        batch = None if self.collate is None else self.collate([dict(f) for f in features])
        return sequences(self.kind, features, units), batch

    def where(self, unit: int) -> str:
        """Returns where a row stands in its file."""
        return place_in(self.dataset, unit)

    def sample(self, count: int) -> list[int]:
        """Returns the indices of at most `count` rows, evenly spread."""
        size = len(self.dataset)
        return [i * size // min(count, size) for i in range(min(count, size))]


def sequences(kind: Kind, rows: Sequence[dict[str, Any]], units: Sequence[int] | None = None) -> list[Behind]:
    """Returns the rows of the batch that encoded rows become, in its order; what a shorter list lacks is empty."""
    numbered = list(zip(range(len(rows)) if units is None else units, rows, strict=True))
    if not kind.listed:
        names = [name.removesuffix("_ids") for name in kind.encoded[1:]]
        return [Behind(i, n, r["prompt_ids"], r[f"{n}_ids"], r.get(f"{n}_mask")) for n in names for i, r in numbered]
    longest = max(len(row["completions_ids"]) for row in rows)
    found = []
    for i, row in numbered:
        given, prompt = row["completions_ids"], row["prompt_ids"]
        masks = row.get("completions_mask") or [None] * len(given)
        found += [Behind(i, f"completions[{k}]", prompt, *one) for k, one in enumerate(zip(given, masks, strict=True))]
        found += [Behind(i, "", [], [])] * (longest - len(given))
        if "rejected_ids" in row:
            found.append(Behind(i, "rejected", prompt, row["rejected_ids"], row.get("rejected_mask")))
    return found


def check_rows_of(report: Report, rows: Rows) -> None:
    """Adds what there is to say of the rows of a run, each check by itself."""
    for check in (check_batches, check_ends, check_texts, check_prompts, check_counts, check_numbers):
        attempt(report, check, rows)


def attempt(report: Report, check: Callable[..., None], *given: Any) -> None:
    """Runs a check; its failure is a note, for a run must not end by what only looks at it."""
    try:
        check(report, *given)
    except Exception as error:  # a collator, a tokenizer and a model may raise what they like
        said = f"could not be made: {type(error).__name__}: {error}"
        report.add(check.__name__.removeprefix("check_").replace("_", " "), "note", said)


# --- what is scored ---------------------------------------------------------------------------------------------------


class _Scored(NamedTuple):
    """One row as a batch has it."""

    read: list[int]  # the ids that are attended to
    scored: dict[int, int]  # position in `read` → target


def _in_batch(batch: dict[str, Tensor], r: int) -> _Scored:
    attended = batch["attention_mask"][r].bool()
    at = (attended.long().cumsum(0) - 1).tolist()
    targets = batch["targets"][r].tolist()
    scored = {at[t]: y for t, y in enumerate(targets) if y != IGNORE_INDEX}
    return _Scored(batch["input_ids"][r][attended].tolist(), scored)


def check_batches(report: Report, rows: Rows) -> None:
    """Compares what the collator scores with the tokens of the completions, position by position."""
    expected, batch = rows.looked_at
    if batch is None:
        return
    if len(batch["targets"]) != len(expected):
        said = f"the collator makes {len(batch['targets'])} rows, expected {len(expected)}"
        return report.add("mask", "fault", said)
    wrong: dict[str, list[Behind]] = {}
    omitted: Counter[int] = Counter()
    total = 0
    for r, one in enumerate(expected):
        if not one.completion:
            continue
        found, whole = _in_batch(batch, r), [*one.prompt, *one.completion]
        want = {len(one.prompt) - 1 + k: one.completion[k] for k in one.scored}
        total += len(want)
        if found.read not in (whole, whole[:-1]):
            wrong.setdefault("reads other tokens than those of the row", []).append(one)
        elif any(want.get(t) != y for t, y in found.scored.items()) and all(
            whole[t] == y for t, y in found.scored.items()
        ):
            wrong.setdefault("has each position predict its own token, not the next one (shifted labels)", []).append(
                one
            )
        elif any(t + 1 < len(whole) and whole[t + 1] != y for t, y in found.scored.items()):
            wrong.setdefault("has positions predict other tokens than the next one (shifted labels)", []).append(one)
        elif more := found.scored.keys() - want.keys():
            of = "the prompt" if min(more) < len(one.prompt) - 1 else "a completion that its mask leaves out"
            wrong.setdefault(f"scores tokens of {of}", []).append(one)
        elif want != found.scored:
            missing = [y for t, y in want.items() if t not in found.scored]
            omitted.update(missing)
            wrong.setdefault(_OMITS, []).append(one)
    for how, which in wrong.items():
        if how == _OMITS:
            named = omitted.most_common(1)[0][0]
            how += f", such as {rows.tokenizer.decode([named])!r}"
            how += ", the EOS" if named in rows.ends else ""
            how += ", which is the padding token" if named == rows.tokenizer.pad_token_id else ""
        first = f"first {rows.where(which[0].unit)}, {which[0].name}"
        report.add("mask", "fault", f"the collator {how}, in {len(which)} of {len(expected)} rows ({first})")
    if not wrong:
        report.add("mask", "ok", f"the batches score the completions and nothing else ({total} tokens looked at)")
    shown = next((r for r, one in enumerate(expected) if one.completion), None)
    if shown is not None:
        found = _in_batch(batch, shown)
        tokens = [(y, t - 1 in found.scored) for t, y in enumerate(found.read)]
        one = expected[shown]
        report.row = Row(f"{rows.where(one.unit)}, {one.name}", tokens, rows.tokenizer)


def _scored_ends(rows: Rows) -> Iterator[tuple[Behind, list[int]]]:
    """Yields completions with the tokens of them that a batch scores."""
    expected, batch = rows.looked_at
    for r, one in enumerate(expected):
        if one.completion:
            own = [one.completion[k] for k in one.scored]
            yield one, own if batch is None else [y for _, y in sorted(_in_batch(batch, r).scored.items())]


def check_ends(report: Report, rows: Rows) -> None:
    """Counts the completions whose last scored token is one at which sampling stops."""
    ended = count = cut = 0
    others: Counter[int] = Counter()
    for one, scored in _scored_ends(rows):
        count += 1
        last = _last_word(scored, rows.tokenizer)
        if last in rows.ends:
            ended += 1
        elif len(one.prompt) + len(one.completion) >= rows.max_length:
            cut += 1
        elif last is not None:
            others[last] += 1
    if not count:
        return report.add("end", "fault", "no row has a token that is scored")
    if not rows.ends:
        said = "the tokenizer and the generation config name no EOS: nothing tells the model to stop"
        return report.add("end", "doubt", said)
    why = []
    if cut:
        why.append(f"{cut} of {count} are cut at max_length={rows.max_length}")
    special = [i for i, _ in others.most_common() if i in rows.tokenizer.all_special_ids]
    if special:
        why.append(
            f"{others[special[0]]} end in {rows.tokenizer.decode([special[0]])!r}, which is neither the tokenizer's "
            "EOS nor in the generation config: sampling does not stop there"
        )
    elif others and ended + cut < count:
        why.append(
            "the others end in an ordinary token: padding with the EOS, a chat template without an end, or sampled "
            "answers that were cut?"
        )
    because = f" ({'; '.join(why)})" if why else ""
    level = "fault" if not ended else "doubt" if ended < _LEAST_ENDED * count else "ok"
    share = f"{ended / count:.0%}" if ended in (0, count) else f"{min(max(ended / count, 0.01), 0.99):.0%}"
    report.add("end", level, f"EOS supervised in {share} of completions{because}")


def _last_word(ids: list[int], tokenizer: Any) -> int | None:
    """Returns the last token that is not white space; templates write a line break behind the end of a turn."""
    for token in reversed(ids):
        if tokenizer.decode([token]).strip():
            return token
    return None


# --- the rows' texts --------------------------------------------------------------------------------------------------


def _squash(text: str) -> str:
    """Returns the text without white space, which tokenizers and templates change."""
    return "".join(text.split())


def _read(rows: Rows) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Yields rows, uncut, with index, encoded and as text."""
    if rows.texts is None or len(rows.texts) != len(rows.dataset):
        return
    for i in rows.sample(READ):
        row, text = rows.dataset[i], rows.texts[i]
        longest = max((len(s.completion) for s in sequences(rows.kind, [row])), default=0)
        if row.get("where") == text.get("where") and len(row["prompt_ids"]) + longest < rows.max_length:
            yield i, row, text


def _contents(messages: Any, *, of: str) -> list[str]:
    """Returns the texts of the messages of one role; a text is the assistant's."""
    if isinstance(messages, str):
        return [messages] if of == "assistant" else []
    found = [m.get("content") for m in messages or [] if m.get("role") == of]
    return [text for text in found if isinstance(text, str)]


def check_texts(report: Report, rows: Rows) -> None:
    """Decodes what is scored and compares it with the rows' own answers, and with what was said before them."""
    tokenizer, looked = rows.tokenizer, 0
    lost: list[str] = []
    held: list[str] = []
    differs: list[str] = []
    for i, row, text in _read(rows):
        for one, completion in zip(
            sequences(rows.kind, [row], [i]), completions_of(text, rows.kind).values(), strict=False
        ):
            scored = _squash(tokenizer.decode([one.completion[k] for k in one.scored]))
            name, answers = f"{rows.where(i)}, {one.name}", _contents(completion, of="assistant")
            earlier, answers = (answers[:-1], answers[-1:]) if rows.score == "last" else ([], answers)
            answers = [a for a in answers if _round_trips(tokenizer, a)]
            if text["prompt"]:
                lost += [name] * any(_squash(a) not in scored for a in answers)
            said = [*_contents(text["prompt"], of="user"), *_contents(text["prompt"], of="system")]
            if rows.score != "all":
                said += [*earlier, *_contents(completion, of="user"), *_contents(completion, of="tool")]
            quoted = _squash("".join(answers))
            held += [name] * any(len(s) >= _LONG and s in scored and s not in quoted for s in map(_squash, said))
            cut = rows.max_prompt_length is not None and len(one.prompt) >= rows.max_prompt_length
            if not cut and not _round_trip(rows, data.prompt_of(text), completion, name, one):
                differs.append(name)
            looked += 1
    if not looked:
        return
    if lost:
        said = f"the answer's words are not among those that are scored, in {len(lost)} of {looked} completions"
        report.add("answers", "fault" if len(lost) > looked / 2 else "doubt", f"{said} (first {lost[0]})")
    if held:
        said = f"what is scored holds a message that is not the assistant's, in {len(held)} of {looked} completions"
        report.add("answers", "doubt", f"{said} (first {held[0]})")
    if not lost and not held:
        report.add("answers", "ok", f"what is scored is the answers' text, whole ({looked} completions read)")
    if differs:
        said = "the row's token ids spell another text than its prompt and completion do"
        report.add("template", "fault", f"{said}, in {len(differs)} of {looked} completions (first {differs[0]})")


def _round_trips(tokenizer: Any, text: str) -> bool:
    """Returns whether the tokenizer can spell the text: not if words of it are unknown, or lower-cased."""
    return bool(_squash(text)) and _squash(tokenizer.decode(data.tokenize(tokenizer, [text])[0])) == _squash(text)


def _round_trip(rows: Rows, prompt: Any, completion: Any, name: str, one: Behind) -> bool:
    """Returns whether a row's ids spell its text as the template writes it, but for special tokens around it."""
    tokenizer = rows.tokenizer
    whole = data.render(tokenizer, prompt, [completion], name, rows.chat_template_kwargs)[1]
    if not _round_trips(tokenizer, whole):
        return True
    ids, special = [*one.prompt, *one.completion], set(tokenizer.all_special_ids)
    found = _squash(tokenizer.decode(ids))
    before, text, after = found.partition(_squash(whole))
    if not text:
        return False
    marks = {_squash(tokenizer.decode([i])) for i in ids if i in special}
    for mark in sorted(marks, key=len, reverse=True):
        before, after = before.replace(mark, ""), after.replace(mark, "")
    return not before and not after


def check_prompts(report: Report, rows: Rows) -> None:
    """Compares the prompts' ids with those that sampling will begin with, and looks for a doubled BOS."""
    tokenizer, looked = rows.tokenizer, 0
    bos = tokenizer.bos_token_id
    others: list[tuple[str, bool]] = []
    twice = [
        rows.where(i)
        for i in rows.sample(READ)
        if bos is not None and bos != tokenizer.eos_token_id and rows.dataset[i]["prompt_ids"][:2] == [bos, bos]
    ]
    for i, row, text in _read(rows):
        if not text["prompt"]:
            continue
        (sampled,) = encode_prompts([data.prompt_of(text)], tokenizer, rows.chat_template_kwargs)
        looked += 1
        if sampled != row["prompt_ids"] and not _is_cut(sampled, row["prompt_ids"]):
            others.append((rows.where(i), sampled[: len(row["prompt_ids"])] == row["prompt_ids"]))
    if twice:
        report.add("prompts", "fault", f"prompts begin with two BOS tokens (first {twice[0]})")
    if others:
        said = f"{len(others)} of {looked} prompts have other token ids than sampling will give them"
        rewritten = all(prefix for _, prefix in others)
        why = "the template writes the prompt otherwise before an answer" if rewritten else "is the template another?"
        report.add("prompts", "doubt" if rewritten else "fault", f"{said}: {why} (first {others[0][0]})")
    elif looked:
        report.add("prompts", "ok", f"prompts have the token ids that sampling begins with ({looked} looked at)")


def _is_cut(whole: list[int], kept: list[int]) -> bool:
    """Returns whether `kept` is the end of `whole`, perhaps behind its first tokens, as max_prompt_length leaves it."""
    left = len(whole) - len(kept)
    return left > 0 and any(whole[:n] + whole[left + n :] == kept for n in range(min(_OPENING + 1, len(kept))))


# --- counts -----------------------------------------------------------------------------------------------------------


def check_counts(report: Report, rows: Rows) -> None:
    """Counts tokens, and rows that are cut, empty, there twice, or held out as well."""
    kind, count = rows.kind, min(len(rows.dataset), COUNTED)
    columns = columns_of(rows.dataset, kind, count)
    prompt = columns["prompt_ids"].lengths
    answers = [column for name, column in columns.items() if name != "prompt_ids"]
    lengths = np.concatenate([c.lengths for c in answers])
    both = np.concatenate([prompt[c.row] + c.lengths for c in answers])
    counts = np.concatenate(
        [scored_of(rows.dataset, name, c, count) for name, c in columns.items() if name != "prompt_ids"]
    )
    scored, read = int(counts.sum()), int(both.sum())
    report.add(
        "lengths",
        "ok",
        f"prompts have {_middle(prompt)} tokens, completions {_middle(lengths)}; {scored / max(read, 1):.0%} of tokens "
        "are scored",
    )
    empty = int((counts == 0).sum())
    if empty:
        said = f"{empty} of {len(lengths)} completions have no token to be scored, and do not count"
        report.add("lengths", "fault" if empty == len(lengths) else "doubt", said)
    full = np.concatenate([(prompt[c.row] + c.lengths >= rows.max_length) & ~c.ends(rows.ends) for c in answers])
    if full.any():
        level = "doubt" if full.mean() > _MOST_CUT else "note"
        said = f"{full.mean():.0%} of completions are cut at max_length={rows.max_length}"
        report.add("lengths", level, said.replace("0%", "under 1%") if full.mean() < 0.005 else said)
    keys = keys_of(columns, count)
    twice = len(keys) - len(set(keys))
    if twice:
        level = "doubt" if twice > _MOST_TWICE * len(keys) else "note"
        report.add("rows", level, f"{twice} of {len(keys)} rows are there more than once")
    if kind.completions == ("chosen", "rejected"):
        pairs = zip(columns["chosen_ids"].parts(), columns["rejected_ids"].parts(), strict=True)
        same = [i for i, (chosen, rejected) in enumerate(pairs) if chosen == rejected]
        if same:
            said = f"chosen and rejected are the same tokens in {len(same)} of {len(keys)} pairs"
            report.add("rows", "fault" if len(same) == len(keys) else "doubt", f"{said} (first {rows.where(same[0])})")
    if rows.held_out is not None and set(kind.encoded) <= set(rows.held_out.column_names):
        held = min(len(rows.held_out), COUNTED)
        shared = len(set(keys_of(columns_of(rows.held_out, kind, held), held)) & set(keys))
        if shared:
            report.add("rows", "doubt", f"{shared} of {held} rows held out are trained on as well")


def _middle(lengths: np.ndarray) -> str:
    return f"{int(np.median(lengths))} (at most {int(lengths.max())})" if len(lengths) else "no"


def _check_numbers_of_batches(report: Report, rows: Rows) -> None:
    """Compares the numbers beside the tokens of a batch with those of its rows."""
    _, batch = rows.looked_at
    if batch is None:
        return
    features = [rows.dataset[i] for i in rows.sample(COLLATED)]
    own = data.Collator(rows.tokenizer.pad_token_id or 0, rows.kind.name)(features)
    for name in sorted({*rows.kind.numbers.values(), "ref_logps", "list_lengths"} & own.keys() & batch.keys()):
        if not np.array_equal(
            own[name].numpy(force=True), batch[name].numpy(force=True), equal_nan=own[name].is_floating_point()
        ):
            said = f"the collator gives other numbers as {name} than the rows have, or in another order"
            report.add("numbers", "fault", said)


def check_numbers(report: Report, rows: Rows) -> None:
    """Compares the rows' scores with which completion is the chosen one, and looks for labels that are all alike."""
    dataset, names = rows.dataset, set(rows.dataset.column_names)
    attempt(report, _check_numbers_of_batches, rows)
    if len(rows.kind.completions) == 2:
        signs = []
        if {"score_chosen", "score_rejected"} <= names:
            w, l = (np.array(dataset[n], dtype=float) for n in ("score_chosen", "score_rejected"))  # noqa: E741
            signs.append(("score_chosen is below score_rejected", w < l))
        if "prob" in names:
            signs.append(("prob, that chosen is the better one, is under 0.5", np.array(dataset["prob"]) < 0.5))
        if "margin" in names:
            signs.append(("margin is negative", np.array(dataset["margin"], dtype=float) < 0))
        for what, wrong in signs:
            share = float(wrong.mean()) if len(wrong) else 0.0
            if share > 0.05:
                level = "fault" if share > 0.5 else "doubt"
                swapped = ": are chosen and rejected swapped?" if level == "fault" else ""
                report.add("numbers", level, f"{what} in {share:.0%} of pairs{swapped}")
            elif len(wrong):
                report.add("numbers", "ok", f"{what} in {share:.0%} of pairs")
    if "label" in names:
        labels = np.array(dataset["label"], dtype=bool)
        if len(labels) and labels.all() == labels.any():
            report.add("numbers", "doubt", f"all {len(labels)} labels are {bool(labels[0])}: nothing is told apart")
    for name in {"reward", "margin"} & names:
        values = np.array(dataset[name], dtype=float)
        if len(values) > 1 and np.ptp(values) == 0:
            report.add("numbers", "doubt", f"{name} is {values[0]:g} in all {len(values)} rows")
    if "scores" in names:
        flat = sum(len(set(row)) < 2 for row in dataset["scores"])
        if flat:
            level = "doubt" if flat > _MOST_CUT * len(dataset) else "note"
            report.add("numbers", level, f"all scores are equal in {flat} of {len(dataset)} lists, which teach nothing")
