"""Data: every form and every fault of the input, token ids against hand-made ones, padding as a property."""

import dataclasses
import gzip
import json
import logging
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpo_fast.data import KINDS, Collator, DataError, Place, encode, load, load_prompts, require

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def user(content):
    return {"role": "user", "content": content}


def answer(content):
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "what is it", "chosen": " a cat", "rejected": " a dog"}
CHAT = {"prompt": [user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what\n\nAssistant: a\n\ncat",
    "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what\n\nAssistant: dog",
}
UNPAIRED = {"prompt": "what is it", "completion": " a cat", "label": True}
LIST = {"prompt": "what is it", "completions": [" a cat", " a dog", " hi"], "scores": [0.5, -1.0, 2.0]}
SCORED = {**PAIR, "score_chosen": 0.1, "score_rejected": -3.0}
GOOD = {"pair": PAIR, "unpaired": UNPAIRED, "list": LIST, "rejected": PAIR, "chosen": PAIR}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def warnings_logged(caplog):
    caplog.set_level(logging.WARNING, logger="xpo_fast")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "xpo_fast"]


def write(path, rows):
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


# --- load: sources --------------------------------------------------------------------------------


def from_jsonl(folder):
    return write(folder / "p.jsonl", [PAIR, PAIR]), ["p.jsonl:1", "p.jsonl:2"]


def from_jsonl_gz(folder):
    return write(folder / "p.jsonl.gz", [PAIR, PAIR]), ["p.jsonl.gz:1", "p.jsonl.gz:2"]


def from_json_lines_with_gaps_and_bom(folder):
    path = folder / "p.json"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(PAIR)}\n\n\r\n{json.dumps(PAIR)}".encode())
    return path, ["p.json:1", "p.json:4"]


def from_json_array(folder):
    path = folder / "p.json"
    path.write_text("\n" + json.dumps([PAIR, PAIR], indent=1))
    return str(path), ["p.json[0]", "p.json[1]"]


def from_parquet(folder):
    datasets.Dataset.from_list([PAIR, PAIR]).to_parquet(folder / "p.parquet")
    return folder / "p.parquet", ["p.parquet[0]", "p.parquet[1]"]


def from_csv(folder):
    datasets.Dataset.from_list([PAIR, PAIR]).to_csv(folder / "p.csv")
    return folder / "p.csv", ["p.csv[0]", "p.csv[1]"]


def from_folder(folder):
    write(folder / "train.jsonl", [PAIR, PAIR])
    return folder, [f"{folder.name}[0]", f"{folder.name}[1]"]


def from_saved_dataset(folder):
    datasets.Dataset.from_list([PAIR, PAIR]).save_to_disk(folder / "saved")
    return folder / "saved", ["saved[0]", "saved[1]"]


def from_dataset(folder):
    return datasets.Dataset.from_list([PAIR, PAIR]), ["dataset[0]", "dataset[1]"]


def from_dataset_dict(folder):
    return datasets.DatasetDict(train=datasets.Dataset.from_list([PAIR])), ["dataset[0]"]


def from_list(folder):
    return [PAIR, PAIR], ["rows[0]", "rows[1]"]


SOURCES = [
    from_jsonl,
    from_jsonl_gz,
    from_json_lines_with_gaps_and_bom,
    from_json_array,
    from_parquet,
    from_csv,
    from_folder,
    from_saved_dataset,
    from_dataset,
    from_dataset_dict,
    from_list,
]


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_rows(make, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    source, where = make(folder)
    rows = load(source, kind="pair")
    assert list(rows) == [{**PAIR, "where": name} for name in where]


@pytest.mark.parametrize(("row", "kind"), [(CHAT, "pair"), (UNPAIRED, "unpaired"), (LIST, "list")])
def test_the_output_format_of_a_data_set_does_not_matter(row, kind):
    source = datasets.Dataset.from_list([row]).with_format("numpy")
    assert load(source, kind=kind)[0] == {**row, "where": "dataset[0]"}


def test_hub_name_and_split_reach_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("org/pairs", kind="pair", split="test")["where"][0] == "org/pairs[0]"
    assert asked == [("org/pairs", "test")]


def test_a_refusing_hub_is_a_data_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"org/pairs.*'train'.*offline.*\.jsonl"):
        load("org/pairs", kind="pair")


# --- load: forms ----------------------------------------------------------------------------------

CAT_AND_DOG = ([answer("cat")], [answer("dog")])
FORMS = {
    "text": (PAIR, "what is it", " a cat", " a dog"),
    "text, prompt shared up to a space": (
        {"chosen": "what is it? a cat", "rejected": "what is it? a cow"},
        *("what is it? a", " cat", " cow"),
    ),
    "text, prompt shared up to a line": (
        {"chosen": "what is it?\ncat", "rejected": "what is it?\ndog"},
        *("what is it?\n", "cat", "dog"),
    ),
    "text, differing right after spaces": (
        {"chosen": "it is  cat", "rejected": "it is  dog"},
        *("it is", "  cat", "  dog"),
    ),
    "text, one answer begins with the other": (
        {"chosen": "is it? yes", "rejected": "is it? yes sir"},
        *("is it?", " yes", " yes sir"),
    ),
    "messages": (CHAT, [user("what")], *CAT_AND_DOG),
    "messages, prompt shared": (
        {"chosen": [user("what"), answer("cat")], "rejected": [user("what"), answer("dog")]},
        *([user("what")], *CAT_AND_DOG),
    ),
    "messages, prompt given and repeated": (
        {"prompt": [user("what")], "chosen": [user("what"), answer("cat")], "rejected": [user("what"), answer("dog")]},
        *([user("what")], *CAT_AND_DOG),
    ),
    "messages, prompt repeated as text": (
        {"prompt": "what", "chosen": [user("what"), answer("cat")], "rejected": [user("what"), answer("dog")]},
        *([user("what")], *CAT_AND_DOG),
    ),
    "prompt text, answers messages": ({**CHAT, "prompt": "what"}, [user("what")], *CAT_AND_DOG),
    "prompt messages, answers text": (
        {"prompt": [user("what")], "chosen": "cat", "rejected": "dog"},
        *([user("what")], *CAT_AND_DOG),
    ),
    "messages with more keys, null prompt": (
        {
            "prompt": None,
            "chosen": [{**user("what"), "id": 1}, {**answer("cat"), "tool_calls": None}],
            "rejected": [{**user("what"), "id": 1, "name": None}, answer("dog")],
            "score": 0.5,
        },
        *([{**user("what"), "id": 1}], *CAT_AND_DOG),
    ),
    "messages that are equal": (
        {"chosen": [user("what"), answer("cat")], "rejected": [user("what"), answer("cat")]},
        *([user("what")], [answer("cat")], [answer("cat")]),
    ),
    "transcripts": (HH, *([user("hi"), answer("hello"), user("what")], [answer("a\n\ncat")], [answer("dog")])),
    "transcripts, a speaker twice in a row": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: well\n\nAssistant: cat", "rejected": "Human: hi\n\nAssistant: dog"},
        *([user("hi")], [answer("well\n\ncat")], [answer("dog")]),
    ),
    "transcripts that are equal": (
        {"chosen": HH["rejected"], "rejected": HH["rejected"]},
        *([user("hi"), answer("hello"), user("what")], [answer("dog")], [answer("dog")]),
    ),
    "transcripts that part early": (
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: cat",
            "rejected": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: what\n\nAssistant: dog",
        },
        *([user("hi")], [answer("cat")], [answer("a"), user("what"), answer("dog")]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_pair_forms(form):
    row, prompt, chosen, rejected = FORMS[form]
    expected = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "where": "rows[0]"}
    assert load([row], kind="pair")[0] == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_read_as_unpaired_is_two_rows(form):
    row, prompt, chosen, rejected = FORMS[form]
    assert list(load([row], kind="unpaired")) == [
        {"prompt": prompt, "completion": chosen, "label": True, "where": "rows[0]"},
        {"prompt": prompt, "completion": rejected, "label": False, "where": "rows[0]"},
    ]


@pytest.mark.parametrize("kind", ["rejected", "chosen"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pair_read_for_one_side_is_that_side(form, kind):
    row, prompt, chosen, rejected = FORMS[form]
    side = {"chosen": chosen, "rejected": rejected}[kind]
    assert list(load([row], kind=kind)) == [{"prompt": prompt, kind: side, "where": "rows[0]"}]


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_with_scores_is_a_list_of_two(form):
    row, prompt, chosen, rejected = FORMS[form]
    [got] = load([{**row, "score_chosen": 3, "score_rejected": 0.25}], kind="list")
    assert got == {
        **{"prompt": prompt, "completions": [chosen, rejected]},
        **{"scores": [3.0, 0.25], "where": "rows[0]"},
    }


ONE_SIDE = {
    "text": ({"prompt": "what", "{}": " cat"}, "what", " cat"),
    "text, whatever the other side": ({"prompt": "what", "{}": " cat", "other": 5}, "what", " cat"),
    "messages": ({"prompt": [user("what")], "{}": [answer("cat")]}, [user("what")], [answer("cat")]),
    "a conversation answers with its last turn": (
        {"{}": [user("hi"), answer("hello"), user("what"), answer("cat")]},
        *([user("hi"), answer("hello"), user("what")], [answer("cat")]),
    ),
    "a transcript answers with its last turn": (
        {"{}": HH["rejected"]},
        *([user("hi"), answer("hello"), user("what")], [answer("dog")]),
    ),
    "prompt repeated as text": (
        {"prompt": "what", "{}": [user("what"), answer("cat")]},
        *([user("what")], [answer("cat")]),
    ),
}


@pytest.mark.parametrize("kind", ["rejected", "chosen"])
@pytest.mark.parametrize("form", ONE_SIDE)
def test_forms_of_one_side(form, kind):
    row, prompt, side = ONE_SIDE[form]
    other = {"rejected": "chosen", "chosen": "rejected"}[kind]
    row = {name.format(kind).replace("other", other): value for name, value in row.items()}
    assert load([row], kind=kind)[0] == {"prompt": prompt, kind: side, "where": "rows[0]"}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        (UNPAIRED, "what is it", " a cat"),
        ({**UNPAIRED, "label": False, "reward": "low"}, "what is it", " a cat"),
        ({"prompt": "what", "completion": [answer("cat")]}, [user("what")], [answer("cat")]),
        ({"completion": [user("what"), answer("cat")]}, [user("what")], [answer("cat")]),
    ],
)
def test_a_completion_is_a_chosen_one_whatever_its_label(row, prompt, chosen):
    assert load([row], kind="chosen")[0] == {"prompt": prompt, "chosen": chosen, "where": "rows[0]"}


LISTS = {
    "text": (LIST, LIST),
    "integers for scores, more fields": (
        {**LIST, "scores": [1, 0, -2], "chosen": " x", "score_chosen": "high"},
        {**LIST, "scores": [1.0, 0.0, -2.0]},
    ),
    "rejected beside scores": ({**LIST, "rejected": " a cow"}, {**LIST, "rejected": " a cow"}),
    "rejected for scores": (
        {"prompt": "what", "completions": [" a", " b"], "rejected": " c", "scores": None},
        {"prompt": "what", "completions": [" a", " b"], "rejected": " c"},
    ),
    "messages": (
        {"prompt": [user("what")], "completions": [[answer("cat")], [answer("dog")]], "scores": [1.0, 2.0]},
        {"prompt": [user("what")], "completions": [[answer("cat")], [answer("dog")]], "scores": [1.0, 2.0]},
    ),
    "prompt messages, completions text": (
        {"prompt": [user("what")], "completions": ["cat", "dog"], "scores": [1.0, 2.0], "rejected": "cow"},
        {
            **{"prompt": [user("what")], "completions": [[answer("cat")], [answer("dog")]]},
            **{"scores": [1.0, 2.0], "rejected": [answer("cow")]},
        },
    ),
    "prompt text, some messages": (
        {"prompt": "what", "completions": ["cat", [answer("dog")]], "scores": [1.0, 2.0]},
        {"prompt": [user("what")], "completions": [[answer("cat")], [answer("dog")]], "scores": [1.0, 2.0]},
    ),
    "messages, prompt repeated as text": (
        {
            "prompt": "what",
            "completions": [[user("what"), answer("cat")], [user("what"), answer("dog")]],
            "scores": [1.0, 2.0],
        },
        {"prompt": [user("what")], "completions": [[answer("cat")], [answer("dog")]], "scores": [1.0, 2.0]},
    ),
    "messages, prompt repeated": (
        {
            "prompt": [user("what")],
            "completions": [[user("what"), answer("cat")], [user("what"), answer("dog")]],
            "scores": [1.0, 2.0],
        },
        {"prompt": [user("what")], "completions": [[answer("cat")], [answer("dog")]], "scores": [1.0, 2.0]},
    ),
}


@pytest.mark.parametrize("form", LISTS)
def test_list_forms(form):
    row, expected = LISTS[form]
    assert load([row], kind="list")[0] == {**expected, "where": "rows[0]"}


def test_lists_may_differ_in_length():
    rows = [LIST, {**LIST, "completions": [" a", " b"], "scores": [1.0, 2.0]}]
    assert [len(row["completions"]) for row in load(rows, kind="list")] == [3, 2]


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        (SCORED, "pair", {"score_chosen": 0.1, "score_rejected": -3.0}),
        # A method decides whether the order of scores matters.
        ({**PAIR, "score_chosen": 1, "score_rejected": 1}, "pair", {"score_chosen": 1.0, "score_rejected": 1.0}),
        ({**PAIR, "prob": 1, "margin": -2}, "pair", {"prob": 1.0, "margin": -2.0}),
        ({**PAIR, "prob_chosen": 0.3, "prob": None}, "pair", {"prob": 0.3}),
        ({**UNPAIRED, "reward": -1, "value": 1e-30}, "unpaired", {"reward": -1.0, "value": 1e-30}),
        ({**UNPAIRED, "label": None, "reward": 0.7}, "unpaired", {"reward": 0.7}),
    ],
)
def test_numbers_are_kept_as_floats(row, kind, expected, tmp_path):
    asked = load(write(tmp_path / "p.jsonl", [row]), kind=kind)
    got = asked[0]
    assert {name: got[name] for name in expected} == expected
    assert all(asked.features[name].dtype == "float64" for name in expected)
    text = {name for name in ("prompt", *KINDS[kind].completions, "label") if row.get(name) is not None}
    assert set(got) == text | set(expected) | {"where"}


def test_numpy_numbers_are_numbers():
    row = {**LIST, "scores": [*np.float32([0.5, 1.0]), np.int64(2)]}
    assert load([row], kind="list")[0]["scores"] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (UNPAIRED, UNPAIRED),
        ({**UNPAIRED, "label": 0, "extra": 1}, {**UNPAIRED, "label": False}),
        ({**UNPAIRED, "label": 1.0}, UNPAIRED),
        (
            {"prompt": "what", "completion": [answer("cat")], "label": 1},
            {"prompt": [user("what")], "completion": [answer("cat")], "label": True},
        ),
        (
            {"prompt": [user("what")], "completion": "cat", "label": False},
            {"prompt": [user("what")], "completion": [answer("cat")], "label": False},
        ),
    ],
)
def test_unpaired_forms(row, expected):
    assert load([row], kind="unpaired")[0] == {**expected, "where": "rows[0]"}


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({**PAIR, "rejected": PAIR["chosen"]}, "chosen equals rejected"),
        ({**CHAT, "chosen": [answer("")]}, "without words"),
        ({**CHAT, "chosen": [answer("a"), user("b"), answer("c")]}, "several turns"),
    ],
)
def test_legal_oddities_are_counted_and_logged_once(row, note, warnings_logged):
    plain = PAIR if isinstance(row["prompt"], str) else CHAT
    assert len(load([plain, row, row], kind="pair")) == 3
    [message] = warnings_logged()
    assert note in message and message.endswith("in 2 of 3 rows")


def test_a_list_of_equal_scores_is_counted_and_logged(warnings_logged):
    load([LIST, {**LIST, "scores": [1, 1, 1]}], kind="list")
    [message] = warnings_logged()
    assert "the scores of a list are all equal" in message and message.endswith("in 1 of 2 rows")


def test_clean_data_logs_nothing(warnings_logged):
    load([PAIR], kind="pair")
    load([CHAT], kind="unpaired")
    load([LIST], kind="list")
    load([HH], kind="rejected")
    assert warnings_logged() == []


# --- load: faults ---------------------------------------------------------------------------------

FAULTY_ROWS = {
    "no object": (3, "pair", "expected an object.*got int"),
    "field missing": (
        {"prompt": "a", "chosen": "b", "loser": "c"},
        *("pair", "rejected missing.*expected chosen and rejected.*got chosen, loser, prompt"),
    ),
    "field null": ({**PAIR, "chosen": None}, "pair", "chosen missing or null.*got prompt, rejected"),
    "no field at all": ({}, "pair", "chosen, rejected missing.*got no fields"),
    "label missing": (
        {"prompt": "a", "completion": "b"},
        *("unpaired", "label missing.*expected prompt, completion and label.*got completion, prompt"),
    ),
    "completion missing": ({"prompt": "a", "label": True}, "unpaired", "completion missing"),
    "unpaired for a pair": (UNPAIRED, "pair", r"expected a pair.*got unpaired.*\(kto\)"),
    "label of another type": ({**UNPAIRED, "label": "yes"}, "unpaired", "label must be true.*'yes'"),
    "label of another value": ({**UNPAIRED, "label": 2}, "unpaired", "label must be true.*2"),
    "prompt of another type": ({**PAIR, "prompt": 5}, "pair", "prompt must be text or a list.*int"),
    "completion of another type": ({**PAIR, "rejected": 5}, "pair", "rejected must be text or a list.*int"),
    "empty prompt": ({**PAIR, "prompt": " \n"}, "pair", "prompt is empty"),
    "empty completion": ({**PAIR, "chosen": ""}, "pair", "chosen is empty"),
    "empty unpaired completion": ({**UNPAIRED, "completion": ""}, "unpaired", "completion is empty"),
    "no prompt messages": ({**CHAT, "prompt": []}, "pair", "prompt is empty"),
    "no completion messages": ({**CHAT, "chosen": []}, "pair", "chosen is empty"),
    "message not an object": ({**CHAT, "chosen": ["hi"]}, "pair", 'chosen must hold messages.*"role".*hi'),
    "message with other keys": (
        {**CHAT, "chosen": [{"speaker": "gpt", "words": "cat"}]},
        *("pair", 'chosen must hold messages.*"content".*gpt'),
    ),
    "message content not text": (
        {**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
        *("pair", "chosen must hold messages.*image"),
    ),
    "tool calls": (
        {**CHAT, "chosen": [{**answer(""), "tool_calls": [{}]}]},
        *("pair", "tool_calls of chosen must be a list of calls, one dict each"),
    ),
    "no shared text": ({"chosen": "yes sir", "rejected": "no sir"}, "pair", "no prompt.*add a prompt field"),
    "half a word shared": ({"chosen": "catch", "rejected": "cat"}, "pair", "no prompt.*add a prompt field"),
    "no shared message": (
        {"chosen": [user("a"), answer("b")], "rejected": [user("c"), answer("b")]},
        *("pair", "no prompt.*same messages"),
    ),
    "completion begins with a user turn": (
        {**CHAT, "chosen": [user("b"), answer("c")]},
        *("pair", "chosen must begin and end with an assistant turn.*begins with user"),
    ),
    "completion ends with a user turn": (
        {**CHAT, "rejected": [answer("b"), user("c")]},
        *("pair", "rejected must begin and end with an assistant turn.*ends with user"),
    ),
    "completion repeats the prompt and ends there": (
        {"prompt": [user("a")], "completion": [user("a")], "label": True},
        *("unpaired", "completion must begin.*begins with nothing"),
    ),
    "transcript ends with the human": (
        {"chosen": HH["chosen"] + "\n\nHuman: bye", "rejected": HH["rejected"]},
        *("pair", "chosen must begin and end with an assistant turn.*ends with user"),
    ),
    "a number as text": ({**SCORED, "score_chosen": "0.1"}, "pair", r"score_chosen must be.*got 0.1 \(str\)"),
    "a boolean for a number": ({**PAIR, "margin": True}, "pair", r"margin must be a finite number.*\(bool\)"),
    "NaN": ({**SCORED, "score_rejected": float("nan")}, "pair", "score_rejected must be a finite.*got nan"),
    "infinity": ({**UNPAIRED, "reward": float("inf")}, "unpaired", "reward must be a finite.*got inf"),
    "beyond float32": ({**UNPAIRED, "value": -1e39}, "unpaired", "value must be a finite number.*float32"),
    "beyond any float": ({**UNPAIRED, "value": 10**400}, "unpaired", "value must be a finite number.*100"),
    "a list for a number": ({**PAIR, "prob": [1]}, "pair", r"prob must be a finite number.*\(list\)"),
    "a probability above 1": ({**PAIR, "prob": 1.5}, "pair", r"prob must be a probability in \[0, 1\].*1\.5"),
    "a probability below 0": ({**PAIR, "prob_chosen": -1e-9}, "pair", "prob_chosen must be a probability.*-1e"),
    "two probabilities": ({**PAIR, "prob": 0.5, "prob_chosen": 0.5}, "pair", "prob and prob_chosen.*remove"),
    "score of chosen only": ({**PAIR, "score_chosen": 1}, "pair", "score_chosen is the only score.*score_rejected"),
    "score of rejected only": ({**PAIR, "score_rejected": 1}, "pair", "score_rejected is the only score.*drop"),
    "half of a pair": ({"prompt": "a", "chosen": "b"}, "unpaired", "rejected missing.*got chosen, prompt"),
    "neither label nor reward": ({**UNPAIRED, "label": None, "value": 1.0}, "unpaired", "label missing or null"),
    "completions missing": ({"prompt": "a", "scores": [1, 2]}, "list", "completions missing.*got prompt, scores"),
    "list without prompt": ({**LIST, "prompt": None}, "list", "prompt missing or null"),
    "scores missing": ({**LIST, "scores": None}, "list", "scores missing.*expected prompt, completions and"),
    "a pair without scores as a list": (PAIR, "list", "score_chosen, score_rejected missing"),
    "a pair with one score as a list": (
        {**PAIR, "score_chosen": 1.0},
        *("list", "score_rejected missing.*got chosen, prompt, rejected, score_chosen"),
    ),
    "one completion": ({**LIST, "completions": [" a"], "scores": [1]}, "list", "two or more.*got 1; drop the row"),
    "no completion": ({**LIST, "completions": [], "scores": []}, "list", "two or more.*got 0; drop the row"),
    "a text for a list": ({**LIST, "completions": "abc"}, "list", "completions must be a list.*got str; drop"),
    "a conversation for a list": (
        {"prompt": [user("a")], "completions": [answer("b"), answer("c")], "scores": [1, 2]},
        *("list", r"completions\[0\] must be text or a list of messages; got dict"),
    ),
    "more completions than scores": ({**LIST, "scores": [1, 2]}, "list", "got 2 scores for 3 completions; give"),
    "more scores than completions": ({**LIST, "scores": [1, 2, 3, 4]}, "list", "got 4 scores for 3 completions"),
    "one number for scores": ({**LIST, "scores": 1.0}, "list", "scores must be a list.*got float; drop the row"),
    "a score that is NaN": ({**LIST, "scores": [1, float("nan"), 2]}, "list", r"scores\[1\] must be a finite.*nan"),
    "a score that is null": ({**LIST, "scores": [1, 2, None]}, "list", r"scores\[2\] must be a finite.*None"),
    "an empty completion of a list": ({**LIST, "completions": ["a", "b", " "]}, "list", r"completions\[2\] is empty"),
    "a null completion of a list": ({**LIST, "completions": ["a", None, "b"]}, "list", r"completions\[1\] must be"),
    "an empty rejected of a list": ({**LIST, "rejected": ""}, "list", "rejected is empty"),
    "a list's completion ends with a user turn": (
        {**LIST, "completions": ["a", [answer("b"), user("c")], "d"]},
        *("list", r"completions\[1\] must begin and end with an assistant turn.*ends with user"),
    ),
    "rejected missing": ({"prompt": "a", "chosen": "b"}, "rejected", "rejected missing.*got chosen, prompt"),
    "chosen missing": ({"prompt": "a", "rejected": "b"}, "chosen", "chosen missing.*got prompt, rejected"),
    "empty rejected": ({"prompt": "a", "rejected": " "}, "rejected", "rejected is empty"),
    "empty chosen completion": ({"prompt": "a", "completion": ""}, "chosen", "completion is empty"),
    "one text without a prompt": ({"rejected": "what is it"}, "rejected", "no prompt.*add a prompt field"),
    "one message without a prompt": ({"chosen": [answer("a")]}, "chosen", "no prompt.*beginning of chosen; add"),
    "another conversation for an answer": (
        {"prompt": "what", "completion": [user("hi"), answer("cat")], "label": True},
        *("unpaired", "completion must begin and end.*begins with user"),
    ),
    "half a surrogate pair": ({**PAIR, "chosen": "a\ud83d"}, "pair", "chosen holds half a surrogate"),
    "half a surrogate pair in a message": (
        {**CHAT, "prompt": [user("\ud83d")]},
        *("pair", "prompt holds half a surrogate"),
    ),
}


@pytest.mark.parametrize("fault", FAULTY_ROWS)
def test_a_faulty_row_is_named_with_its_line(fault, tmp_path):
    row, kind, message = FAULTY_ROWS[fault]
    good = GOOD[kind]
    with pytest.raises(DataError, match=rf"^p\.jsonl:2: .*{message}"):
        load(write(tmp_path / "p.jsonl", [good, row]), kind=kind)
    with pytest.raises(DataError, match=rf"^rows\[1\]: .*{message}"):
        load([good, row], kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_one_data_set_has_one_form(kind):
    rows = [{**row, "score_chosen": 1, "score_rejected": 0} for row in (PAIR, CHAT)]
    with pytest.raises(DataError, match=r"^rows\[1\]: this row is a conversation where rows\[0\] is text"):
        load(rows, kind=kind)


@pytest.mark.parametrize(
    ("kind", "without", "extra"),
    [
        ("pair", PAIR, {"score_chosen": 1.0, "score_rejected": 0.0}),
        ("pair", PAIR, {"prob": 0.5}),
        ("pair", PAIR, {"margin": 0.5}),
        ("unpaired", UNPAIRED, {"reward": 0.5}),
        ("unpaired", UNPAIRED, {"value": 0.5}),
        ("unpaired", {**UNPAIRED, "label": None, "reward": 1.0}, {"label": False}),
        ("list", LIST, {"rejected": " x"}),
        ("list", {**LIST, "scores": None, "rejected": " x"}, {"scores": [1, 2, 3]}),
    ],
)
def test_the_first_row_that_lacks_what_others_have_is_named(kind, without, extra, tmp_path):
    with_it = {**without, **extra}
    names = ", ".join(extra)
    for rows, lacks, has in (([with_it, with_it, without, with_it], 3, 1), ([without, without, with_it], 1, 3)):
        path = write(tmp_path / "p.jsonl", rows)
        expected = rf"^p\.jsonl:{lacks}: {names} missing or null, which p\.jsonl:{has} has; give it in every row"
        with pytest.raises(DataError, match=expected):
            load(path, kind=kind)


LINE = json.dumps(PAIR).encode()
BROKEN_GZIP = bytearray(gzip.compress(LINE))
BROKEN_GZIP[12:20] = b"\xff" * 8
FAULTY_BYTES = {
    "broken line": ("p.jsonl", LINE + b'\n{"prompt": "a",}\n', r"^p\.jsonl:2: not valid JSON.*column \d+"),
    "line cut short": ("p.jsonl", LINE + b"\n" + LINE[:-9], r"^p\.jsonl:2: not valid JSON"),
    "broken array": ("p.json", b"[\n" + LINE + b",\n" + LINE + b"\n" + LINE + b"]", r"^p\.json:4: not valid JSON"),
    "array cut short": ("p.json", b"[" + LINE + b",\n" + LINE, r"^p\.json:2: not valid JSON"),
    "object over several lines": ("p.json", b'{\n"data": []}', r"^p\.json:1: not valid JSON.*array of objects"),
    "not UTF-8": ("p.jsonl", LINE + b'\n{"prompt": "\xe9"}', r"^p\.jsonl:2: not UTF-8"),
    "array not UTF-8": ("p.json", b'[\n\n"\xe9"]', r"^p\.json:3: not UTF-8"),
    "empty": ("p.jsonl", b"", r"^p\.jsonl: no rows; expected chosen and rejected"),
    "blank": ("p.jsonl", b"\n \n", r"^p\.jsonl: no rows"),
    "empty array": ("p.json", b"[]", r"^p\.json: no rows"),
    "gzip in name only": ("p.jsonl.gz", LINE, r"^p\.jsonl\.gz:1: cannot be read.*[Nn]ot a gzip"),
    "damaged gzip": ("p.jsonl.gz", BROKEN_GZIP, r"^p\.jsonl\.gz:1: cannot be read"),
    "empty gzip": ("p.jsonl.gz", gzip.compress(b""), r"^p\.jsonl\.gz: no rows"),
    "parquet in name only": ("p.parquet", b"text", r"^p\.parquet: not a readable \.parquet file"),
    "unknown type": ("p.txt", LINE, r"^p\.txt: a file of unknown type; expected a \.jsonl"),
}


@pytest.mark.parametrize("fault", FAULTY_BYTES)
def test_a_faulty_file_is_named(fault, tmp_path):
    name, content, message = FAULTY_BYTES[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name, kind="pair")


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_truncated_gzip_says_from_where_on(kept, tmp_path):
    # Prompts that do not compress, so that the break falls somewhere in the middle.
    noise = random.Random(0)
    rows = [{**PAIR, "prompt": noise.randbytes(200).hex()} for _ in range(2000)]
    whole = write(tmp_path / "whole.jsonl.gz", rows).read_bytes()
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=r"^p\.jsonl\.gz:\d+: cannot be read.*download it again") as caught:
        load(path, kind="pair")
    line = int(str(caught.value).split(":")[1])
    assert 1 < line < 2000


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "pairs.jsonl", "~/no.parquet", "x.json.gz"])
def test_a_missing_file_lists_what_is_accepted(source):
    with pytest.raises(DataError, match=r"no such file.*\.jsonl.*\.parquet.*hub name.*list of dicts"):
        load(source, kind="pair")


def test_a_folder_without_data_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="datasets cannot load split 'train'"):
        load(tmp_path, kind="pair")


@pytest.mark.parametrize(
    ("source", "message"),
    [([], "rows: no rows"), (3, "expected a .jsonl.*got int"), ({"test": [PAIR]}, "no split 'train'; it has test")],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(DataError, match=message):
        load(source, kind="pair")


def test_a_streaming_data_set_is_refused():
    with pytest.raises(DataError, match="got IterableDataset"):
        load(datasets.Dataset.from_list([PAIR]).to_iterable_dataset(), kind="pair")


@pytest.mark.parametrize("use", [lambda k: load([PAIR], kind=k), lambda k: Collator(0, k)])
def test_unknown_kind(use):
    kinds = "pair, unpaired, list, rejected, chosen"
    with pytest.raises(ValueError, match=f"kind must be one of {kinds}; got 'triple'"):
        use("triple")


def test_a_missing_dependency_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets.*pip install 'xpo-fast\[train\]'"):
        load([PAIR], kind="pair")
    assert require("json", "train") is json


# --- encode ---------------------------------------------------------------------------------------

WORDS = ["<unk>", "<s>", "</s>", "<u>", "<a>", "<think>", "what", "is", "it", "a", "cat", "dog", "hi", "hello"]
WORDS += ["one", "two", "three", "four", "five", "six"]
ID = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = (
    "<s>{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}{{ m.content }}"
    "{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


# Python 3.12 and later warn of any fork beside threads; datasets forks its workers.
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def words(text):
    return [ID[word] for word in text.split()]


def tokenizer(template=None, bos=False, eos: str | None = "</s>", adds_eos=False):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if bos or adds_eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if adds_eos else ''}"
        special = [("<s>", ID["<s>"]), ("</s>", ID["</s>"])]
        core.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    extra = {"additional_special_tokens": ["<u>", "<a>", "<think>"]}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, unk_token="<unk>", chat_template=template, **extra
    )


def encoded(rows, tok, kind="pair", **options) -> list[Any]:
    return list(encode(load(rows, kind=kind), tok, kind=kind, **options))


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("written", ["", "<s> "])
def test_text_has_one_bos_in_front_and_one_eos_at_the_end(bos, adds_eos, written):
    row = {"prompt": f"{written}what is it", "chosen": " a cat", "rejected": " a dog </s>"}
    [got] = encoded([row], tokenizer(bos=bos, adds_eos=adds_eos))
    assert got == {
        "prompt_ids": words(("<s> " if bos or written else "") + "what is it"),
        "chosen_ids": words("a cat </s>"),
        "rejected_ids": words("a dog </s>"),
        "where": "rows[0]",
    }


def test_text_without_an_eos_token_ends_with_its_last_word():
    [got] = encoded([PAIR], tokenizer(eos=None))
    assert got["chosen_ids"] == words("a cat")


def test_a_token_across_the_boundary_is_the_completions():
    # "it" + "cat" is one unknown word when read together.
    [got] = encoded([{"prompt": "what is it", "chosen": "cat", "rejected": " dog"}], tokenizer())
    assert got["prompt_ids"] == words("what is")
    assert (got["chosen_ids"], got["rejected_ids"]) == (words("<unk> </s>"), words("it dog </s>"))
    assert (got["chosen_mask"], got["rejected_mask"]) == ([True, True], [False, True, True])


@pytest.mark.parametrize("bos", [False, True])
def test_a_conversation_is_what_the_template_writes(bos, warnings_logged):
    row = {"prompt": [user("hi"), answer("hello"), user("what")], **{k: CHAT[k] for k in ("chosen", "rejected")}}
    [got] = encoded([row], tokenizer(TEMPLATE, bos=bos))
    assert got["prompt_ids"] == words("<s> <u> hi <a> hello </s> <u> what <a>")
    assert (got["chosen_ids"], got["rejected_ids"]) == (words("cat </s>"), words("dog </s>"))
    assert warnings_logged() == []


def test_an_empty_turn_still_has_its_end():
    [got] = encoded([{**CHAT, "chosen": [answer("")]}], tokenizer(TEMPLATE))
    assert got["chosen_ids"] == words("</s>")


def test_a_generation_prompt_that_no_answer_has_is_left_out_and_said(warnings_logged):
    thinking = TEMPLATE.replace("add_generation_prompt %}<a>", "add_generation_prompt %}<a> <think>")
    assert thinking != TEMPLATE
    got = encoded([CHAT, CHAT], tokenizer(thinking))
    for row in got:
        assert row["prompt_ids"] == words("<s> <u> what <a>")
        assert (row["chosen_ids"], row["rejected_ids"]) == (words("cat </s>"), words("dog </s>"))
    [message] = warnings_logged()
    assert "in 2 of 2 rows the chat template" in message


def test_unpaired_rows_carry_label_and_mismatched_completion():
    rows = [
        {"prompt": "one", "completion": " cat", "label": True},
        {"prompt": "two", "completion": " dog", "label": False},
        {"prompt": "three", "completion": " hi", "label": True},
    ]
    got = encoded(rows, tokenizer(), "unpaired")
    assert got[0] == {
        "prompt_ids": words("one"),
        "completion_ids": words("cat </s>"),
        "kl_completion_ids": words("dog </s>"),
        "label": True,
        "where": "rows[0]",
    }
    assert [row["kl_completion_ids"] for row in got[1:]] == [words("hi </s>"), words("cat </s>")]
    assert [row["label"] for row in got] == [True, False, True]


def test_rows_without_a_label_have_no_mismatched_completion():
    rows = [{"prompt": "one", "completion": " cat", "reward": 0.1, "value": -2}]
    assert encoded(rows, tokenizer(), "unpaired") == [
        {
            **{"prompt_ids": words("one"), "completion_ids": words("cat </s>")},
            **{"reward": 0.1, "value": -2.0, "where": "rows[0]"},
        }
    ]
    labelled = [{**rows[0], "label": True}, {**rows[0], "label": False}]
    assert all({"label", "reward", "kl_completion_ids"} <= set(r) for r in encoded(labelled, tokenizer(), "unpaired"))


def test_numbers_of_a_pair_outlast_encoding():
    numbers = {"score_chosen": 0.1, "score_rejected": -3.0, "prob": 1 / 3, "margin": 2.0}
    [got] = encoded([{**PAIR, **numbers}], tokenizer())
    assert {name: got[name] for name in numbers} == numbers


def test_lists_of_text():
    rows = [LIST, {**LIST, "completions": [" hello", " hi"], "scores": [1.0, 0.1]}]
    first, second = encoded(rows, tokenizer(bos=True), "list")
    assert first == {
        "prompt_ids": words("<s> what is it"),
        "completions_ids": [words("a cat </s>"), words("a dog </s>"), words("hi </s>")],
        "scores": [0.5, -1.0, 2.0],
        "where": "rows[0]",
    }
    assert second["completions_ids"] == [words("hello </s>"), words("hi </s>")] and second["scores"] == [1.0, 0.1]


def test_lists_of_messages_with_a_rejected_one():
    row = {"prompt": [user("what")], "completions": ["a cat", [answer("dog")]], "rejected": "hi"}
    assert encoded([row], tokenizer(TEMPLATE), "list") == [
        {
            "prompt_ids": words("<s> <u> what <a>"),
            "completions_ids": [words("a cat </s>"), words("dog </s>")],
            "rejected_ids": words("hi </s>"),
            "where": "rows[0]",
        }
    ]


@pytest.mark.parametrize("kind", ["rejected", "chosen"])
def test_one_side(kind):
    for row, tok, prompt in (
        (PAIR, tokenizer(), "what is it"),
        (HH, tokenizer(TEMPLATE), "<s> <u> hi <a> hello </s> <u> what <a>"),
    ):
        [got] = encoded([row], tok, kind)
        [pair] = encoded([row], tok)
        assert got == {"prompt_ids": words(prompt), f"{kind}_ids": pair[f"{kind}_ids"], "where": "rows[0]"}


def test_a_list_is_cut_as_a_whole(caplog):
    caplog.set_level(logging.INFO, logger="xpo_fast")
    row = {
        "prompt": "one two three four five six",
        "completions": [" a cat dog", " hi"],
        "rejected": " a cat dog hi hello what",
    }
    [got] = encoded([row], tokenizer(), "list", max_length=8)
    assert got["prompt_ids"] == words("three four five six")  # at half: the longest would leave it less
    assert got["completions_ids"] == [words("a cat dog </s>"), words("hi </s>")]
    assert got["rejected_ids"] == words("a cat dog hi")
    [record] = [r for r in caplog.records if r.name == "xpo_fast"]
    assert "1 of 3 completions cut" in record.getMessage() and "1 of 1 prompts cut" in record.getMessage()


def test_a_template_that_rewrites_the_prompt_does_so_for_a_list(warnings_logged):
    thinking = TEMPLATE.replace("add_generation_prompt %}<a>", "add_generation_prompt %}<a> <think>")
    row = {"prompt": [user("what")], "completions": ["cat", "a dog", "hi"], "scores": [1, 2, 3]}
    [got] = encoded([row], tokenizer(thinking), "list")
    assert got["prompt_ids"] == words("<s> <u> what <a>")
    assert got["completions_ids"] == [words("cat </s>"), words("a dog </s>"), words("hi </s>")]
    [message] = warnings_logged()
    assert "in 1 of 1 rows the chat template" in message


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "three"]), min_size=2, max_size=8))
def test_the_mismatched_completion_is_of_the_next_other_prompt(prompts):
    rows = [{"prompt": p, "completion": f" {w}", "label": True} for p, w in zip(prompts, WORDS[6:])]
    got = encoded(rows, tokenizer(), "unpaired")
    for i, row in enumerate(got):
        later = [(i + k) % len(rows) for k in range(1, len(rows))]
        others = [j for j in later if prompts[j] != prompts[i]] or later
        assert row["kl_completion_ids"] == got[others[0]]["completion_ids"]


def test_rows_of_one_prompt_only_are_said(warnings_logged):
    encoded([PAIR], tokenizer(), "unpaired")
    [message] = warnings_logged()
    assert "all 2 rows have the same prompt" in message


PROMPT = "one two three four five six"
CUTS = [
    # (max_length, max_prompt_length), prompt, chosen ("a cat dog </s>" uncut), rejected ("hi </s>" uncut)
    ((10, None), PROMPT, "a cat dog </s>", "hi </s>"),  # fits exactly
    ((9, None), "<s> three four five six", "a cat dog </s>", "hi </s>"),  # the prompt gives way, BOS stays
    ((8, None), "<s> four five six", "a cat dog </s>", "hi </s>"),
    ((7, None), "<s> five six", "a cat dog </s>", "hi </s>"),  # the prompt is at its half: completions next
    ((6, None), "<s> five six", "a cat dog", "hi </s>"),
    ((2, None), "<s>", "a", "hi"),
    ((50, 3), "<s> five six", "a cat dog </s>", "hi </s>"),  # the cap holds although all would fit
    ((50, 1), "<s>", "a cat dog </s>", "hi </s>"),
    ((6, 2), "<s> six", "a cat dog </s>", "hi </s>"),
    ((6, 40), "<s> five six", "a cat dog", "hi </s>"),
]


@pytest.mark.parametrize(("lengths", "prompt", "chosen", "rejected"), CUTS)
def test_truncation(lengths, prompt, chosen, rejected, caplog):
    caplog.set_level(logging.INFO, logger="xpo_fast")
    max_length, max_prompt_length = lengths
    full = "<s> two three four five six"
    row = {"prompt": full.removeprefix("<s> "), "chosen": " a cat dog", "rejected": " hi"}
    [got] = encoded([row], tokenizer(bos=True), max_length=max_length, max_prompt_length=max_prompt_length)
    expected = full if prompt == PROMPT else prompt
    assert got["prompt_ids"] == words(expected)
    assert (got["chosen_ids"], got["rejected_ids"]) == (words(chosen), words(rejected))
    cut = (chosen != "a cat dog </s>") + (rejected != "hi </s>")
    [record] = [r for r in caplog.records if r.name == "xpo_fast"]
    assert f"{cut} of 2 completions cut" in record.getMessage()
    assert f"{int(expected != full)} of 1 prompts cut" in record.getMessage()
    assert record.levelno == (logging.WARNING if cut else logging.INFO)


def test_a_prompt_without_bos_is_cut_from_the_left():
    [got] = encoded([{**PAIR, "prompt": PROMPT}], tokenizer(), max_prompt_length=2)
    assert got["prompt_ids"] == words("five six")


def test_the_mismatched_completion_is_cut_to_fit_beside_its_prompt():
    rows = [
        {"prompt": PROMPT, "completion": " a cat", "label": True},
        {"prompt": "hi", "completion": " one two three four five six", "label": True},
    ]
    got = encoded(rows, tokenizer(), "unpaired", max_length=9)
    assert got[0]["kl_completion_ids"] == words("one two three")
    assert got[1]["kl_completion_ids"] == words("a cat </s>")


@FORKS
def test_number_of_processes_changes_nothing(warnings_logged):
    rows = [{"prompt": w, "chosen": f" {w} a", "rejected": " cat"} for w in WORDS[6:12]]
    lists = [
        {"prompt": w, "completions": [" a", " cat", " dog"][: 2 + i % 2], "scores": [i, 1.0, 2.0][: 2 + i % 2]}
        for i, w in enumerate(WORDS[6:12])
    ]
    one, two = (encoded(lists, tokenizer(), "list", num_proc=n) for n in (None, 2))
    assert one == two
    for kind in ("pair", "unpaired"):
        one, two = (encoded(rows, tokenizer(), kind, num_proc=n, max_length=3) for n in (None, 2))
        assert one == two
    assert [m.split(", ")[0].split(": ")[1] for m in warnings_logged()] == [
        "6 of 12 completions cut at the end (without EOS)"
    ] * 4


def test_encoding_faults():
    chat, text, one = load([CHAT], kind="pair"), load([PAIR], kind="pair"), load([UNPAIRED], kind="unpaired")
    with pytest.raises(DataError, match=r"^rows\[0\]: a conversation.*no chat template.*--chat-template FILE"):
        encode(chat, tokenizer(), kind="pair")
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"^rows\[0\]: the chat template refuses.*roles must alternate"):
        encode(chat, tokenizer(refusing), kind="pair")
    with pytest.raises(DataError, match=r"^rows\[0\]: the only row.*two or more"):
        encode(one, tokenizer(), kind="unpaired")
    with pytest.raises(ValueError, match=r"takes what load.*'unpaired'.*completion.*got prompt, chosen"):
        encode(text, tokenizer(), kind="unpaired")
    with pytest.raises(ValueError, match=r"completions, prompt, scores, where or completions, prompt, rejected"):
        encode(text, tokenizer(), kind="list")
    with pytest.raises(ValueError, match=r"max_length must be at least 2.*got 1"):
        encode(text, tokenizer(), kind="pair", max_length=1)
    with pytest.raises(ValueError, match=r"max_prompt_length must be at least 1.*got 0"):
        encode(text, tokenizer(), kind="pair", max_prompt_length=0)
    with pytest.raises(DataError, match="no rows to encode"):
        encode(text.select([]), tokenizer(), kind="pair")


@FORKS
@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_completion_without_a_token_is_named(num_proc):
    rows = load([CHAT, {**CHAT, "rejected": [answer("")]}], kind="pair")
    bare = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(DataError, match=r"^rows\[1\]: rejected has no token"):
        encode(rows, tokenizer(bare), kind="pair", num_proc=num_proc)


def test_a_completion_of_a_list_without_a_token_is_named():
    row = {"prompt": [user("what")], "completions": ["cat", [answer("")]], "scores": [1, 2]}
    bare = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(DataError, match=r"^rows\[1\]: completions\[1\] has no token"):
        encoded([{**row, "completions": ["cat", "dog"]}, row], tokenizer(bare), "list")


# --- prompts alone --------------------------------------------------------------------------------


def test_prompts_come_in_every_form():
    pair = {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4", "answer": 5}
    talk = [{"role": "user", "content": "w1"}]
    (row,) = load_prompts([pair])
    assert row == {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4", "answer": 5, "where": "rows[0]"}
    assert load_prompts([{"prompt": talk, "answer": None}]) == [{"prompt": talk, "answer": None, "where": "rows[0]"}]
    (row,) = load_prompts([{"prompt": "w1", "completion": " w2"}])
    assert row == {"prompt": "w1", "completion": " w2", "chosen": " w2", "where": "rows[0]"}
    for bad, message in (
        ({"prompt": " "}, r"rows\[0\]: prompt missing or empty"),
        ({"title": "w1"}, "prompt missing or empty; .*; got title"),
        ({"prompt": []}, "missing or empty"),
        ({"prompt": [1]}, "must hold messages"),
        (3, "an object"),
    ):
        with pytest.raises(DataError, match=message):
            load_prompts([bad])
    with pytest.raises(DataError, match=r"rows\[1\]: this row is a conversation where rows\[0\] is text"):
        load_prompts([{"prompt": "w1"}, {"prompt": talk}])
    with pytest.raises(DataError, match="no rows"):
        load_prompts([])


def test_a_column_where_is_kept():
    for row in ({"prompt": "w1", "where": "mine"}, {"prompt": "w1", "completion": " w2", "where": "mine"}):
        (kept,) = load_prompts([row])
        assert kept["where"] == "mine" and not isinstance(kept["where"], Place)
    talk = [{"role": "user", "content": "w1"}]
    with pytest.raises(DataError, match=r"rows\[1\]: this row is a conversation where rows\[0\] is text"):
        load_prompts([{"prompt": "w1", "where": "mine"}, {"prompt": talk, "where": "yours"}])


def test_loaded_rows_remember_their_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w1"}\n{"prompt": "w2"}\n')
    again = load_prompts(load_prompts(file)[1:])
    assert [row["where"] for row in again] == ["prompts.jsonl:2"] and isinstance(again[0]["where"], Place)


def test_prompts_with_columns_for_functions(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w1", "answer": 1}\n{"prompt": "w2"}\n')
    assert [row.get("answer") for row in load_prompts(file)] == [1, None]
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: answer missing or null, which prompts\.jsonl:1 has"):
        load_prompts(file, alike=True)
    file.write_text('{"prompt": "w1", "answer": 1}\n{"prompt": "w2", "answer": null}\n')
    assert [row["answer"] for row in load_prompts(file, alike=True)] == [1, None]


# --- collate --------------------------------------------------------------------------------------

EOS = 2  # also the padding, the case in which masking by id goes wrong
IDS = st.lists(st.integers(0, 9), min_size=1, max_size=7)
PAIRS = st.lists(st.fixed_dictionaries(dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), IDS)), min_size=1)
LABELLED = st.fixed_dictionaries(
    {**dict.fromkeys(("prompt_ids", "completion_ids", "kl_completion_ids"), IDS), "label": st.booleans()}
)


LISTED = st.fixed_dictionaries(
    {**dict.fromkeys(("prompt_ids", "rejected_ids"), IDS), "completions_ids": st.lists(IDS, min_size=2, max_size=4)}
)


def check_rows(batch, rows, multiple, prefix=""):
    """Read the tensors back into (prompt, completion), which they must hold and nothing else."""
    ids, mask, targets = (batch[prefix + name] for name in ("input_ids", "attention_mask", "targets"))
    assert ids.shape == mask.shape == targets.shape
    assert ids.dtype == mask.dtype == targets.dtype == torch.int64
    longest = max(len(p) + len(c) for p, c in rows)
    assert longest <= ids.shape[1] < longest + (multiple or 1) and ids.shape[1] % (multiple or 1) == 0
    assert len(rows) == len(ids)
    for (prompt, completion), row_ids, row_mask, row_targets in zip(rows, ids, mask, targets):
        length = len(prompt) + len(completion)
        assert row_ids[:length].tolist() == prompt + completion
        assert (row_ids[length:] == EOS).all()
        assert row_mask.tolist() == [1] * length + [0] * (ids.shape[1] - length)
        scored = (row_targets != -100).nonzero().flatten()
        assert scored.tolist() == list(range(len(prompt) - 1, length - 1))
        assert torch.equal(row_targets[scored], row_ids[scored + 1])
        assert row_targets[scored].tolist() == completion


@settings(deadline=None)
@given(rows=PAIRS, multiple=st.sampled_from([None, 1, 8]))
def test_pairs_are_chosen_rows_then_rejected_rows(rows, multiple):
    batch = Collator(EOS, "pair", pad_to_multiple_of=multiple)(rows)
    halves = [[(row["prompt_ids"], row[name]) for row in rows] for name in ("chosen_ids", "rejected_ids")]
    check_rows(batch, halves[0] + halves[1], multiple)
    assert set(batch) == {"input_ids", "attention_mask", "targets"}


@settings(deadline=None)
@given(rows=st.lists(LABELLED, min_size=1), multiple=st.sampled_from([None, 8]))
def test_unpaired_rows_and_their_mismatched_ones(rows, multiple):
    batch = Collator(EOS, "unpaired", pad_to_multiple_of=multiple)(rows)
    check_rows(batch, [(row["prompt_ids"], row["completion_ids"]) for row in rows], multiple)
    check_rows(batch, [(row["prompt_ids"], row["kl_completion_ids"]) for row in rows], multiple, "kl_")
    assert batch["desirable"].dtype == torch.bool
    assert batch["desirable"].tolist() == [row["label"] for row in rows]
    assert "ref_logps" not in batch and "kl_ref_logps" not in batch


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(LISTED, min_size=1, max_size=5), last=st.booleans(), multiple=st.sampled_from([None, 8]))
def test_lists_side_by_side(rows, last, multiple):
    longest = max(len(row["completions_ids"]) for row in rows)
    layout: list[Any] = []
    for row in rows:
        row["scores"] = [float(i) for i, _ in enumerate(row["completions_ids"])]
        listed = [(row["prompt_ids"], completion) for completion in row["completions_ids"]]
        rejected = (row["prompt_ids"], row["rejected_ids"] if last else row.pop("rejected_ids"))
        layout += [*listed, *[None] * (longest - len(listed)), *[rejected] * last]
    batch = Collator(EOS, "list", pad_to_multiple_of=multiple)(rows)
    scores = batch.pop("scores")
    assert batch.pop("list_lengths").tolist() == [len(row["completions_ids"]) for row in rows]
    there = [r for r, row in enumerate(layout) if row]
    check_rows({name: value[there] for name, value in batch.items()}, [layout[r] for r in there], multiple)
    missing = [r for r, row in enumerate(layout) if not row]
    assert len(layout) == len(batch["targets"])
    assert (batch["targets"][missing] == -100).all() and (batch["input_ids"][missing] == EOS).all()
    assert (batch["attention_mask"].sum(dim=1) > 0).all() and (batch["attention_mask"][missing, 1:] == 0).all()
    assert scores.dtype == torch.float32 and scores.shape == (len(rows), longest)
    for row, got in zip(rows, scores):
        assert got[: len(row["scores"])].tolist() == row["scores"] and got[len(row["scores"]) :].isnan().all()


@settings(deadline=None, max_examples=20)
@given(rows=PAIRS)
def test_one_side_is_a_row_each(rows):
    for kind in ("rejected", "chosen"):
        batch = Collator(EOS, kind)(rows)
        check_rows(batch, [(row["prompt_ids"], row[f"{kind}_ids"]) for row in rows], None)
        assert set(batch) == {"input_ids", "attention_mask", "targets"}


def test_a_batch_by_hand():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, EOS], "rejected_ids": [8], "where": "p.jsonl:1"},
        {"prompt_ids": [5], "chosen_ids": [EOS], "rejected_ids": [9, 9], "where": "p.jsonl:2"},
    ]
    batch = Collator(EOS, "pair")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 2, 2, 2], [5, 6, 8, 2], [5, 9, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    n = -100
    assert batch["targets"].tolist() == [[n, 7, 2, n], [2, n, n, n], [n, 8, n, n], [9, 9, n, n]]


def test_lists_by_hand():
    rows = [
        {"prompt_ids": [5, 6], "completions_ids": [[7, EOS], [8], [9]], "scores": [1.0, 0.1, -3.0], "where": "a"},
        {"prompt_ids": [5], "completions_ids": [[EOS], [9, 9, 4]], "scores": [2.0, 3.0], "where": "b"},
    ]
    batch = Collator(0, "list")(rows)
    n, nan = -100, float("nan")
    assert batch["input_ids"].tolist() == [
        *([5, 6, 7, 2], [5, 6, 8, 0], [5, 6, 9, 0]),
        *([5, 2, 0, 0], [5, 9, 9, 4], [0, 0, 0, 0]),
    ]
    assert batch["attention_mask"].tolist() == [
        *([1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]),
        *([1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]),
    ]
    assert batch["targets"].tolist() == [
        *([n, 7, 2, n], [n, 8, n, n], [n, 9, n, n]),
        *([2, n, n, n], [9, 9, 4, n], [n, n, n, n]),
    ]
    expected = torch.tensor([[1.0, 0.1, -3.0], [2.0, 3.0, nan]])
    torch.testing.assert_close(batch["scores"], expected, rtol=0, atol=0, equal_nan=True)
    assert batch["list_lengths"].tolist() == [3, 2]
    assert set(batch) == {"input_ids", "attention_mask", "targets", "list_lengths", "scores"}


def test_a_rejected_one_is_the_last_of_its_list():
    rows = [
        {"prompt_ids": [5], "completions_ids": [[6], [7], [8]], "rejected_ids": [3]},
        {"prompt_ids": [1], "completions_ids": [[6], [7]], "rejected_ids": [4]},
    ]
    batch = Collator(0, "list")(rows)
    assert batch["input_ids"].tolist() == [*([5, 6], [5, 7], [5, 8], [5, 3]), *([1, 6], [1, 7], [0, 0], [1, 4])]
    assert batch["targets"][:, 0].tolist() == [6, 7, 8, 3, 6, 7, -100, 4]
    assert set(batch) == {"input_ids", "attention_mask", "targets", "list_lengths"}


def test_numbers_are_columns_under_the_methods_names():
    pair = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    numbers = {"score_chosen": 0.1, "score_rejected": 2.0, "prob": 0.25, "margin": -1.0}
    batch = Collator(0, "pair")([{**pair, **numbers}, {**pair, **numbers, "score_chosen": 3.0}])
    expected = {"score_w": [0.1, 3.0], "score_l": [2.0, 2.0], "prob_w": [0.25, 0.25], "margin": [-1.0, -1.0]}
    assert set(batch) == {"input_ids", "attention_mask", "targets", *expected}
    for name, values in expected.items():
        assert batch[name].dtype == torch.float32 and torch.equal(batch[name], torch.tensor(values))
    row = {"prompt_ids": [5], "completion_ids": [6], "reward": 0.1, "value": -2.0}
    batch = Collator(0, "unpaired")([row, row])
    assert set(batch) == {"input_ids", "attention_mask", "targets", "reward", "value"}
    assert torch.equal(batch["reward"], torch.tensor([0.1, 0.1])) and batch["value"].tolist() == [-2, -2]
    batch = Collator(0, "unpaired")([{**row, "label": True, "kl_completion_ids": [8]}])
    assert batch["desirable"].tolist() == [True] and batch["kl_input_ids"].tolist() == [[5, 8]]


def test_numbers_of_a_list_are_one_per_completion(monkeypatch):
    numbers = {"scores": "scores", "places": "ranks"}
    monkeypatch.setitem(KINDS, "list", dataclasses.replace(KINDS["list"], numbers=numbers))
    rows = [{**LIST, "places": [1, 3, 2]}, {**LIST, "completions": ["a", "b"], "scores": [1, 0], "places": [1, 2]}]
    assert load(rows, kind="list")["places"] == [[1.0, 3.0, 2.0], [1.0, 2.0]]
    batch = Collator(0, "list")(encoded(rows, tokenizer(), "list"))
    assert batch["ranks"].nan_to_num(-1).tolist() == [[1, 3, 2], [1, 2, -1]]
    with pytest.raises(DataError, match="one of places per completion; got 2 places for 3 completions"):
        load([{**LIST, "places": [1, 2]}], kind="list")


def test_reference_log_probs_follow_their_rows():
    pair = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    rows = [{**pair, "ref_logp_chosen": -i, "ref_logp_rejected": -10.0 - i} for i in (1.0, 2.0)]
    ref_logps = Collator(EOS, "pair")(rows)["ref_logps"]
    assert ref_logps.dtype == torch.float32 and ref_logps.tolist() == [-1, -2, -11, -12]
    row = {"prompt_ids": [5], "completion_ids": [6], "kl_completion_ids": [7], "label": True}
    rows = [{**row, "ref_logp": -i, "kl_ref_logp": -10.0 - i} for i in (1.0, 2.0)]
    batch = Collator(EOS, "unpaired")(rows)
    assert batch["ref_logps"].tolist() == [-1, -2] and batch["kl_ref_logps"].tolist() == [-11, -12]
    assert batch["ref_logps"].dtype == batch["kl_ref_logps"].dtype == torch.float32
    for kind in ("rejected", "chosen"):
        rows = [{**pair, f"ref_logp_{kind}": -i} for i in (1.0, 2.0)]
        assert Collator(EOS, kind)(rows)["ref_logps"].tolist() == [-1, -2]


# The second list lacks a completion; a table of the whole data set may hold something in its place.
@pytest.mark.parametrize("place", [[], [-99.0]])
def test_reference_log_probs_of_lists(place):
    rows = [
        {"prompt_ids": [5], "completions_ids": [[6], [7], [8]], "ref_logp": [-1.0, -2.0, -3.0]},
        {"prompt_ids": [1], "completions_ids": [[6], [7]], "ref_logp": [-4.0, -5.0, *place]},
    ]
    ref_logps = Collator(0, "list")(rows)["ref_logps"]
    assert ref_logps.dtype == torch.float32 and ref_logps.tolist() == [-1, -2, -3, -4, -5, 0]
    for row, last in zip(rows, (-10.0, -11.0)):
        row["rejected_ids"], row["ref_logp"] = [3], [*row["ref_logp"], last]
    assert Collator(0, "list")(rows)["ref_logps"].tolist() == [-1, -2, -3, -10, -4, -5, 0, -11]


def test_too_few_reference_log_probs_are_named():
    row = {"prompt_ids": [5], "completions_ids": [[6], [7]], "ref_logp": [-1.0], "where": "p.jsonl:7"}
    with pytest.raises(DataError, match=r"^p\.jsonl:7: expected a ref_logp for each of 2 completions; got 1; comp"):
        Collator(0, "list")([row])


def test_from_file_to_batch(tmp_path):
    rows = encoded(write(tmp_path / "p.jsonl", [HH, HH]), tokenizer(TEMPLATE))
    batch = Collator(EOS, "pair")(rows)
    assert batch["targets"][0][batch["targets"][0] != -100].tolist() == words("a cat </s>")
    assert batch["targets"][3][batch["targets"][3] != -100].tolist() == words("dog </s>")


def test_lists_from_file_to_batch(tmp_path):
    rows = [
        {"prompt": [user("what")], "completions": ["a cat", "hi"], "scores": [1 / 3, 2]},
        {"prompt": "hi", "completions": [[answer("dog")], "hello", "cat"], "scores": [0, -1, 0.1]},
    ]
    batch = Collator(EOS, "list")(encoded(write(tmp_path / "p.jsonl.gz", rows), tokenizer(TEMPLATE), "list"))
    scored = [row[row != -100].tolist() for row in batch["targets"]]
    assert scored == [words(text) for text in ("a cat </s>", "hi </s>", "", "dog </s>", "hello </s>", "cat </s>")]
    scores = torch.tensor([[1 / 3, 2, float("nan")], [0, -1, 0.1]])
    torch.testing.assert_close(batch["scores"], scores, rtol=0, atol=0, equal_nan=True)
