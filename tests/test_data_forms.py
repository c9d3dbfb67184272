"""Forms of rows that people have: what each is read as, what is refused and with which advice; sources and mixtures."""

import importlib
import json
import random
import re
import resource
import shlex
import subprocess
import sys
import tracemalloc
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from test_data import answer, tokenizer, user, words, write
from xpo_fast import Objective, data
from xpo_fast.cli import build_parser, loading, options
from xpo_fast.data import DataError, encode, load, load_prompts, origins
from xpo_fast.data.forms import parse_columns, renamed
from xpo_fast.rewards.encoding import load_ratings
from xpo_fast.rewards.trainer import RewardConfig

# Not the functions of their names.
ARROW, LOAD, SOURCES = (importlib.import_module(f"xpo_fast.data.{name}") for name in ("arrow", "load", "sources"))

datasets = pytest.importorskip("datasets")
DOCS = Path(__file__).parents[1] / "docs" / "data.md"


def human(words):
    return {"from": "human", "value": words}


def gpt(words):
    return {"from": "gpt", "value": words}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# --- what is read -------------------------------------------------------------------------------------------------

TALK = [user("hi"), answer("hello"), user("what")]
SYSTEM = {"role": "system", "content": "be brief"}
ULTRA = [{"response": "cat", "overall_score": 3.5}, {"response": "dog", "overall_score": 1}]
# Of each: the row, its kind, and what it is read as, without `where`.
READ = {
    "messages": ({"messages": [*TALK, answer("cat")]}, "chosen", {"prompt": TALK, "chosen": [answer("cat")]}),
    "messages of parts of text": (
        {"messages": [user([{"type": "text", "text": "a "}, {"text": "b"}]), answer([{"text": "cat"}])]},
        *("chosen", {"prompt": [user("a b")], "chosen": [answer("cat")]}),
    ),
    "text": ({"text": "a cat", "id": 3}, "chosen", {"prompt": "", "chosen": "a cat"}),
    "prompt and response": ({"prompt": "what", "response": " cat"}, *("chosen", {"prompt": "what", "chosen": " cat"})),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "be brief"}, human("what"), gpt("cat")]},
        *("chosen", {"prompt": [SYSTEM, user("what")], "chosen": [answer("cat")]}),
    ),
    "sharegpt, other speakers, system beside it": (
        {
            "conversations": [{"from": "user", "value": "what"}, {"from": "ChatGPT", "value": "cat"}],
            "system": "be brief",
        },
        *("chosen", {"prompt": [SYSTEM, user("what")], "chosen": [answer("cat")]}),
    ),
    "sharegpt with a label": (
        {"conversations": [human("what"), gpt("cat")], "kto_tag": False},
        *("unpaired", {"prompt": [user("what")], "completion": [answer("cat")], "label": False}),
    ),
    "a pair of llama-factory": (
        {"conversations": [human("what")], "chosen": gpt("cat"), "rejected": gpt("dog")},
        *("pair", {"prompt": [user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}),
    ),
    "one side of such a pair": (
        {"conversations": [human("what")], "chosen": gpt("cat"), "rejected": gpt("dog")},
        *("rejected", {"prompt": [user("what")], "rejected": [answer("dog")]}),
    ),
    "messages that end with the chosen answer": (
        {"messages": [user("what"), answer("cat")], "chosen": "cat", "rejected": "dog"},
        *("pair", {"prompt": [user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}),
    ),
    "alpaca": (
        {"instruction": "what", "input": "", "output": "cat"},
        *("chosen", {"prompt": [user("what")], "chosen": [answer("cat")]}),
    ),
    "alpaca with input, history and system": (
        {"instruction": "what", "input": "this", "output": "cat", "history": [["hi", "hello"]], "system": "be brief"},
        *("chosen", {"prompt": [SYSTEM, *TALK[:2], user("what\nthis")], "chosen": [answer("cat")]}),
    ),
    "alpaca, a pair": (
        {"instruction": "what", "chosen": "cat", "rejected": "dog"},
        *("pair", {"prompt": [user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}),
    ),
    "alpaca, two outputs": (
        {"instruction": "what", "output": ["cat", "dog"]},
        *("pair", {"prompt": [user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}),
    ),
    "a question beside a pair": (
        {"question": "what", "chosen": " cat", "rejected": " dog"},
        *("pair", {"prompt": "what", "chosen": " cat", "rejected": " dog"}),
    ),
    "a question and a system prompt": (
        {"system": "be brief", "question": "what", "chosen": "cat", "rejected": "dog"},
        *("pair", {"prompt": [SYSTEM, user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}),
    ),
    "a question that both sides begin with": (
        {"question": "what is", "chosen": "what is it? a cat", "rejected": "what is it? a dog"},
        *("pair", {"prompt": "what is it? a", "chosen": " cat", "rejected": " dog"}),
    ),
    "a question, an answer and a label": (
        {"query": "what", "answer": " cat", "label": 1},
        *("unpaired", {"prompt": "what", "completion": " cat", "label": True}),
    ),
    "a problem that its messages repeat": (
        {"problem": "what", "solution": "cat", "answer": "c", "messages": [user("what"), answer("cat")]},
        *("chosen", {"prompt": [user("what")], "chosen": [answer("cat")]}),
    ),
    "a question of one word, or a part of one, that both sides begin with": (
        {"question": "No", "chosen": "No way", "rejected": "Nothing"},
        *("pair", {"prompt": "No", "chosen": "No way", "rejected": "Nothing"}),
    ),
    "an instruction of one word that both sides begin with": (
        {"instruction": "Tell", "chosen": "Tell me", "rejected": "Tell you"},
        *("pair", {"prompt": [user("Tell")], "chosen": [answer("Tell me")], "rejected": [answer("Tell you")]}),
    ),
    "a question of one word on a line of its own in both sides": (
        {"question": "what", "chosen": "what\ncat", "rejected": "what\ndog"},
        *("pair", {"prompt": "what\n", "chosen": "cat", "rejected": "dog"}),
    ),
    "a system prompt beside whole conversations": (
        {"system": "be brief", "chosen": [user("what"), answer("cat")], "rejected": [user("what"), answer("dog")]},
        *("pair", {"prompt": [SYSTEM, user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}),
    ),
    "a system prompt beside a prompt of messages": (
        {"system_prompt": "be brief", "prompt": [user("what")], "completion": [answer("cat")], "label": True},
        *("unpaired", {"prompt": [SYSTEM, user("what")], "completion": [answer("cat")], "label": True}),
    ),
    "a system prompt that the conversation begins with": (
        {"system": "be brief ", "system_prompt": "", "messages": [SYSTEM, user("what"), answer("cat")]},
        *("chosen", {"prompt": [SYSTEM, user("what")], "chosen": [answer("cat")]}),
    ),
    "weights of what is not learned": (
        {"messages": [user("hi"), {**answer("hello"), "weight": 0}, user("what"), {**answer("cat"), "weight": 1}]},
        *("chosen", {"prompt": TALK, "chosen": [answer("cat")]}),
    ),
    "whole conversations beside whatever else": (
        {
            "chosen": [user("what"), answer("cat")],
            "rejected": [user("what"), answer("dog")],
            "query": "a",
            "question": "b",
        },
        *("pair", {"prompt": [user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]}),
    ),
    "ultrafeedback, binarized": (
        {
            "prompt": "what",
            "chosen": [user("what"), answer("cat")],
            "rejected": [user("what"), answer("dog")],
            "messages": [user("what"), answer("cat")],
            "score_chosen": 8,
            "score_rejected": 7.5,
        },
        "pair",
        {
            "prompt": [user("what")],
            "chosen": [answer("cat")],
            "rejected": [answer("dog")],
            "score_chosen": 8.0,
            "score_rejected": 7.5,
        },
    ),
}


@pytest.mark.parametrize("form", READ)
def test_forms(form, tmp_path):
    row, kind, expected = READ[form]
    assert load([row], kind=kind)[0] == {**expected, "where": "rows[0]"}
    # From parquet, where each row has the fields of all the others, as nulls.
    datasets.Dataset.from_list([row, {**row, "unlike": 1}]).to_parquet(tmp_path / "p.parquet")
    assert load(tmp_path / "p.parquet", kind=kind)[1] == {**expected, "where": "p.parquet[1]"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "what", "answer": 4}, {"prompt": "what"}),
        ({"messages": TALK}, {"prompt": TALK}),
        ({"conversations": [human("what"), gpt("cat")]}, {"prompt": [user("what")], "chosen": [answer("cat")]}),
        ({"instruction": "what", "input": "this"}, {"prompt": [user("what\nthis")]}),
        (
            {"instruction": "what", "output": ["cat", "dog"]},
            {"prompt": [user("what")], "chosen": [answer("cat")], "rejected": [answer("dog")]},
        ),
    ],
)
def test_prompts_keep_the_columns_that_they_are_read_from(row, expected):
    once = load_prompts([row])
    assert once == [{**row, **expected, "where": "rows[0]"}]
    assert load_prompts(once) == once


# --- columns of other names ---------------------------------------------------------------------------------------


def test_columns_of_other_names():
    row = {"q": "what", "r": {"best": " cat", "all": [{"t": " dog"}, {"t": " cow"}]}, "rating": 3, "a.b": 1}
    assert renamed(row, {"prompt": "q", "chosen": "r.best", "rejected": "r.all.1.t", "x": "a.b"}, "here") == {
        "r": row["r"],
        "rating": 3,
        "prompt": "what",
        "chosen": " cat",
        "rejected": " cow",
        "x": 1,
    }
    assert renamed({"a": 1, "b": 2}, {"a": "b", "b": "a"}, "here") == {"a": 2, "b": 1}
    assert renamed({"a": None}, {"b": "a.c"}, "here") == {"a": None, "b": None}
    assert parse_columns("prompt=q, chosen = r.best") == {"prompt": "q", "chosen": "r.best"}
    ultra = {"instruction": "what", "completions": ULTRA}
    columns = {"completions": "completions.response", "scores": "completions.overall_score"}
    assert load([ultra], kind="list", columns=columns)[0] == {
        "prompt": [user("what")],
        "completions": [[answer("cat")], [answer("dog")]],
        "scores": [3.5, 1.0],
        "where": "rows[0]",
    }
    steer = {"prompt": "what", "response": " cat", "helpfulness": 4, "verbosity": None}
    assert load([steer], kind="unpaired", columns={"reward": "helpfulness"})[0] == {
        "prompt": "what",
        "completion": " cat",
        "reward": 4.0,
        "where": "rows[0]",
    }
    rows, ratings = load_ratings([steer], ["helpful", "verbosity"], columns={"helpful": "helpfulness"})
    assert rows[0]["completion"] == " cat" and ratings[0][0] == 4 and str(ratings[0][1]) == "nan"
    assert load_prompts([{"q": "what", "gold": "4"}], columns={"prompt": "q", "truth": "gold"}) == [
        {"prompt": "what", "truth": "4", "where": "rows[0]"}
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "qestion"}, r"rows\[0\]: no column qestion: the row has question, r; did you mean question\?$"),
        ({"chosen": "r.bset"}, r"no column r\.bset: r has best, all, n; did you mean best\?$"),
        ({"chosen": "r.n.x"}, r"no column r\.n\.x: r\.n is int, expected a dict or a list of dicts"),
        ({"chosen": "r.all.2"}, r"no column r\.all\.2: r\.all has 1 items, counted from 0"),
        ({"chosen": "r.all.x"}, r"no column r\.all\.x: r\.all has t$"),
        ({"chosn": "question"}, r"--columns chosn=…: rows have no field chosn; .*; did you mean chosen.*\?$"),
    ],
)
def test_columns_that_are_not_there(columns, message):
    row = {"question": "what", "r": {"best": " cat", "all": [{"t": " dog"}], "n": 1}}
    with pytest.raises(ValueError, match=message):
        load([row], kind="pair", columns=columns)


@pytest.mark.parametrize(
    ("text", "message"), [("prompt", "expected NAME="), ("a=b,a=c", "a is given twice"), ("a=", "expected NAME=")]
)
def test_columns_that_cannot_be_parsed(text, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse_columns(text)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--data", "x", "--columns", text])
    assert "argument --columns: " in capsys.readouterr().err
    twice = build_parser().parse_args(["train", "--data", "x", "--columns", "a=b", "--columns", "a=c"])
    with pytest.raises(options.UsageError, match="--columns: a given twice"):
        options.reading(twice)


# --- what is refused ----------------------------------------------------------------------------------------------

PAIR = {"chosen": " cat", "rejected": " dog"}
REFUSED = {
    "a system prompt beside text": (
        {"system": "a", "prompt": "b", **PAIR},
        *("pair", "system is given beside text, which has no place for a system prompt"),
    ),
    "a system prompt beside text with a response": (
        {"system_prompt": "a", "prompt": "b", "response": "c"},
        *("chosen", "system_prompt is given beside text"),
    ),
    "two prompts": ({"question": "a", "query": "b", **PAIR}, "pair", "question and query could each be the prompt"),
    "two answers": (
        {"prompt": "a", "response": "b", "answer": "c"},
        "chosen",
        "response and answer could each be the completion",
    ),
    "two conversations": (
        {"messages": [user("a"), answer("b")], "conversations": [human("c"), gpt("d")]},
        *("chosen", "messages and conversations could each be the conversation"),
    ),
    "a prompt that its messages do not repeat": (
        {"prompt": "other", "messages": [user("a"), answer("b")]},
        *("chosen", "prompt is no turn of messages"),
    ),
    "an answer that its messages do not repeat": (
        {"problem": "a", "solution": "c", "messages": [user("a"), answer("b")]},
        *("chosen", "solution and the last turn of messages could each be the completion"),
    ),
    "an answer before the pair": (
        {"messages": [user("a"), answer("b")], **PAIR},
        *("pair", "messages ends with an assistant turn that is none of chosen, rejected"),
    ),
    "names of their own": ({"prompt": "a", "winner": "b", "loser": "c"}, "pair", "chosen, rejected missing"),
    "names with a part": (
        {"prompt": "a", "chosen_response": "b", "rejected_response": "c"},
        "pair",
        "chosen, rejected missing",
    ),
    "answers in a dict": ({"prompt": "a", "answers": {"best": "b", "worst": "c"}}, "pair", "chosen, rejected missing"),
    "a rating": ({"prompt": "a", "response": "b", "helpfulness": 3}, "unpaired", "label missing"),
    "ultrafeedback": (
        {"instruction": "a", "completions": ULTRA},
        *("list", r"scores missing.*\(this looks like UltraFeedback with its completions in dicts\)"),
    ),
    "a prompt beside a text": ({"prompt": "a", "text": "b"}, "chosen", "chosen missing"),
    "responses and ratings": (
        {"prompt": "a", "responses": ["b", "c"], "ratings": [1, 2]},
        "list",
        "completions, scores missing",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_the_option_that_a_refusal_names_reads_the_row(fault):
    row, kind, message = REFUSED[fault]
    with pytest.raises(DataError, match=rf"^rows\[0\]: .*{message}") as caught:
        load([row], kind=kind)
    [option] = re.findall(r"--columns (\S+)", str(caught.value))
    assert len(load([row], kind=kind, columns=parse_columns(option))) == 1


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (
            {"conversations": [human("a"), {"from": "function_call", "value": "{}"}]},
            "chosen",
            "looks like ShareGPT with tool calls",
        ),
        (
            {"conversations": [human("a"), {"from": "alien", "value": "b"}]},
            "chosen",
            "a turn from 'alien'; expected one of human",
        ),
        (
            {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "chosen",
            "tool_calls of messages must be a list of calls",
        ),
        ({"messages": [user("a"), answer("b")], "tools": "[{}]"}, "chosen", "tools must be a list of JSON schemas"),
        (
            {"messages": [user([{"type": "image_url"}]), answer("b")]},
            "chosen",
            "a part of type 'image_url'.*text alone",
        ),
        (
            {"question": "a", "answer": "b", "images": ["c"]},
            "chosen",
            "images is given, and models here read text alone",
        ),
        ({"messages": [user("a"), answer("b"), user("c")]}, "chosen", "messages ends with a turn of user"),
        ({"messages": [answer("b")]}, "chosen", "messages is one turn; expected a conversation"),
        ({"messages": []}, "chosen", "messages must be a list of messages; got none"),
        ({"messages": "a"}, "chosen", "messages must be a list of messages; got str"),
        ({"instruction": "a", "history": ["b"], "output": "c"}, "chosen", "history must hold pairs"),
        (
            {"prompt": "a", "messages": [user("b"), answer("c")], "label": True},
            "unpaired",
            "take prompt out of the rows",
        ),
        (
            {"messages": [user("a"), answer("b")]},
            "pair",
            r"\(this looks like a conversation \(messages\)\); .*--method sft reads it",
        ),
        (
            {"conversations": [human("a"), gpt("b")]},
            "pair",
            r"looks like ShareGPT \(from, value\)\).*--method sft reads it",
        ),
        ({"instruction": "a", "output": "b"}, "pair", r"looks like Alpaca.*--method sft reads it"),
        ({"text": "a"}, "pair", r"looks like plain text\).*--method sft reads it"),
        ({"question": "a"}, "pair", "xpo-fast rl learns from prompts alone"),
        ({"text": " "}, "chosen", "text is empty"),
        (
            {"system": "a", "messages": [SYSTEM, user("a"), answer("b")]},
            "chosen",
            "system and the first message are different system",
        ),
        (
            {"system": "a", "system_prompt": "b", "question": "c", "answer": "d"},
            "chosen",
            "system and system_prompt are different",
        ),
        (
            {"system": "a", "question": "b c", "chosen": "b c d", "rejected": "b c e"},
            "pair",
            "given beside text.*write the row as messages",
        ),
        (
            {"messages": [user("a"), {**answer("b"), "weight": 0}]},
            "chosen",
            "messages has a message to learn with weight 0",
        ),
        (
            {"prompt": [user("a")], "chosen": [{**answer("b"), "weight": 0}], "rejected": [answer("c")]},
            "pair",
            "chosen has a message to learn with weight 0",
        ),
        ({"conversations": [human("a"), {**gpt("b"), "weight": 0.5}], "label": True}, "unpaired", "with weight 0.5"),
    ],
)
def test_what_is_not_read_says_what_it_looks_like(row, kind, message):
    with pytest.raises(DataError, match=rf"^rows\[0\]: .*{message}"):
        load([row], kind=kind)


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        ({"prompt": "a", "input": "b", "completion": "c"}, ["input is not read (the row has its prompt elsewhere)"]),
        ({"prompt": "a: b", "input": "b", "question": "a", "completion": "c"}, []),
        ({"instruction": "a", "input": "b", "output": "c"}, []),
        (
            {"text": "a", "label": 0, "summary": "b"},
            ["summary is not read beside text", "label is not read beside text"],
        ),
        ({"text": "a", "summary": None}, []),
    ],
)
def test_columns_that_are_not_read_are_counted_in_a_note(row, notes, caplog):
    load([row, row], kind="chosen")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(notes)
    assert all(note in one and one.endswith("in 2 of 2 rows") for note, one in zip(notes, said))


def test_a_system_prompt_stands_before_prompts_alone():
    row = {"system": "be brief", "prompt": [user("what")]}
    once = load_prompts([row])
    assert once == [{**row, "prompt": [SYSTEM, user("what")], "where": "rows[0]"}]
    assert load_prompts(once) == once
    with pytest.raises(DataError, match=r"^rows\[0\]: system is given beside text.*--columns question=prompt"):
        load_prompts([{**row, "prompt": "what"}])


# --- what was loaded and is loaded again --------------------------------------------------------------------------

SEVERAL = [{"prompt": f"what {word}", "chosen": f" {word}", "rejected": " no", "prob": 0.5} for word in "abc"]


def test_what_was_loaded_and_changed_is_checked_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, SEVERAL)
    rows = load(path, kind="pair")
    assert load(rows, kind="pair") is rows
    part = rows.shuffle(seed=1).select([0, 2])
    assert load(part, kind="pair") is part
    more = rows.map(lambda row: {"tag": 1})
    assert load(more, kind="pair") is more
    emptied = rows.map(lambda row: {"chosen": "" if row["where"].endswith(":2") else row["chosen"]})
    with pytest.raises(DataError, match=r"^a\.jsonl:2: chosen is empty"):
        load(emptied, kind="pair")
    with pytest.raises(DataError, match=r"^a\.jsonl:1: prob must be a probability"):
        load(rows.map(lambda row: {"prob": 7.0}), kind="pair")
    whole = {name: [user("what"), answer(name)] for name in ("chosen", "rejected")}
    talks = load(rows.map(lambda row: {"prompt": [user("what")], **whole}), kind="pair")
    assert talks[2]["chosen"] == [answer("chosen")] and talks[2]["where"] == "a.jsonl:3"


def test_what_was_loaded_as_another_kind_is_shaped_for_this_one():
    rows = load(SEVERAL, kind="pair")
    assert load(rows, kind="chosen")[:] == load(SEVERAL, kind="chosen")[:]
    assert load(load(rows, kind="chosen"), kind="chosen").column_names == ["prompt", "chosen", "where"]


def test_text_that_was_loaded_is_checked_again_as_text():
    rows = load([{"text": "a cat"}, {"text": "a dog"}], kind="chosen")
    part = rows.select([1])
    assert load(part, kind="chosen") is part
    with pytest.raises(DataError, match=r"^rows\[0\]: text is empty"):
        load(rows.map(lambda row: {"chosen": " "}), kind="chosen")


# --- text without a prompt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["", "<s> "])
def test_all_of_a_text_is_learned_after_bos(written):
    [row] = encode(load([{"text": f"{written}a cat"}], kind="chosen"), tokenizer(bos=True), kind="chosen")
    assert (row["prompt_ids"], row["chosen_ids"]) == (words("<s>"), words("a cat </s>"))


def test_without_bos_the_first_token_of_a_text_is_its_prompt():
    rows = load([{"text": "a cat is"}, {"prompt": "what", "completion": " dog"}], kind="chosen")
    text, other = encode(rows, tokenizer(), kind="chosen")
    assert (text["prompt_ids"], text["chosen_ids"]) == (words("a"), words("cat is </s>"))
    assert (other["prompt_ids"], other["chosen_ids"]) == (words("what"), words("dog </s>"))
    only = load([{"text": "cat"}], kind="chosen")
    with pytest.raises(DataError, match=r"^rows\[0\]: chosen has no token"):
        encode(only, tokenizer(eos=None), kind="chosen")


def test_texts_are_held_out_by_what_they_say():
    rows = load([{"text": f"{word} cat"} for word in ("a", "a", "is", "it", "what")], kind="chosen")
    kept, held = loading.hold_out(Namespace(eval_split=2.0, seed=0), rows)
    assert len(held) == 2 and not set(kept["chosen"]) & set(held["chosen"])


# --- sources and mixtures -----------------------------------------------------------------------------------------


def texts(path, count, word):
    return str(write(path, [{"text": f"{word} {i}"} for i in range(count)]))


def test_several_files_one_after_another(tmp_path):
    (tmp_path / "a").mkdir()
    one, two = texts(tmp_path / "p.jsonl", 2, "a"), texts(tmp_path / "a" / "p.jsonl", 1, "b")
    rows = load([one, two], kind="chosen")
    assert list(rows["chosen"]) == ["a 0", "a 1", "b 0"]
    assert list(rows["where"]) == [f"{one}:1", f"{one}:2", f"{two}:1"]
    assert origins(rows) == {one: 2, two: 1}
    other = write(tmp_path / "q.jsonl", [{"messages": [user("a"), answer("b")]}])
    with pytest.raises(DataError, match=r"^q\.jsonl:1: this row is a conversation where p\.jsonl:1 is text"):
        load([one, other], kind="chosen")
    other.write_text("")
    with pytest.raises(DataError, match=r"^q\.jsonl: no rows"):
        load([one, other], kind="chosen")


def test_weights_are_shares_of_the_rows(tmp_path):
    one, two = texts(tmp_path / "a.jsonl", 4000, "a"), texts(tmp_path / "b.jsonl", 4000, "b")
    rows = load([f"{one}:7", f"{two}:3"], kind="chosen", seed=1)
    counts = origins(rows)
    # All of the larger share is taken, once; sqrt(.7·.3·5714) = 35 rows is the deviation of the other.
    assert counts["a.jsonl"] == 4000 and abs(counts["b.jsonl"] / len(rows) - 0.3) < 0.025
    assert len(set(rows["where"])) == len(rows)
    again, other = (load([f"{one}:0.7", f"{two}:0.3"], kind="chosen", seed=seed) for seed in (1, 2))
    assert list(again["where"]) == list(rows["where"]) != list(other["where"])
    for path, count in ((one, 20), (two, 20)):
        write(Path(path), [{"prompt": f"w {i}"} for i in range(count)])
    prompts = load_prompts([f"{one}:0.5", f"{two}:0.5"], seed=3)
    assert max(origins(prompts).values()) == 20 == len({row["where"] for row in prompts if "a.js" in row["where"]}) or (
        origins(prompts)["b.jsonl"] == 20
    )


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["a.jsonl:0.5"], r"^a\.jsonl: a weight is a share .*; give another source"),
        (["a.jsonl:0.5", "b.jsonl"], r"^a\.jsonl: a weight .*; give each of them one"),
        (["a.jsonl:0", "b.jsonl:1"], "weight must be positive and finite; got 0"),
        (["a.jsonl:nan", "b.jsonl:1"], "weight must be positive and finite; got nan"),
        (["a.jsonl:test"], r"a\.jsonl is one file, without splits"),
        (["a.jsonl:b:c"], "expected NAME, NAME:SPLIT, NAME:WEIGHT or NAME:SPLIT:WEIGHT"),
        (["a.jsonl:"], "expected NAME, NAME:SPLIT"),
    ],
)
def test_sources_that_are_refused(specs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        texts(tmp_path / f"{name}.jsonl", 1, name)
    with pytest.raises(DataError, match=message):
        load(specs, kind="chosen")


def test_what_exists_is_a_path_whatever_colons_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "a:0.5.jsonl", 3, "a")
    texts(tmp_path / "b:test", 1, "b")
    assert origins(load("a:0.5.jsonl", kind="chosen")) == {"a:0.5.jsonl": 3}
    assert set(origins(load(["a:0.5.jsonl:1", "a:0.5.jsonl:3"], kind="chosen"))) == {"a:0.5.jsonl"}
    with pytest.raises(DataError, match=r"^b:test: a file of unknown type"):
        load("b:test", kind="chosen")
    for name in (r"C:\data\p.jsonl", "https://host/p.jsonl"):
        with pytest.raises(DataError, match="no such file or folder") as caught:
            load(name, kind="chosen")
        assert str(caught.value).startswith(f"{name}: ")


def test_splits_and_configurations_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(path, split, **further):
        asked.append((path, split, further))
        return datasets.Dataset.from_list([{"text": f"{path} {split}"}] * 40)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("org/a:test", kind="chosen")
    rows = load(["org/a:train[:10%]:1", "org/b:3"], kind="chosen", split="valid", config="en")
    assert asked == [
        ("org/a", "test", {}),
        ("org/a", "train[:10%]", {"name": "en"}),
        ("org/b", "valid", {"name": "en"}),
    ]
    assert set(origins(rows)) == {"org/a", "org/b"} and origins(rows)["org/b"] == 40
    file = texts(tmp_path / "a.jsonl", 1, "a")
    with pytest.raises(DataError, match=r"--data-config en: .*a\.jsonl is a file"):
        load(file, kind="chosen", config="en")
    with pytest.raises(ValueError, match="config='en' is of a hub name"):
        load([{"text": "a"}], kind="chosen", config="en")


def test_a_folder_has_splits_and_slices(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    texts(folder / "train.jsonl", 10, "a")
    texts(folder / "test.jsonl", 4, "b")
    rows = load([f"{folder}:test", f"{folder}:train[:20%]"], kind="chosen")
    assert list(rows["chosen"]) == ["b 0", "b 1", "b 2", "b 3", "a 0", "a 1"]


# --- files of any size --------------------------------------------------------------------------------------------


def peak_mib(path, rows, monkeypatch):
    """The most that Python's own objects take while a file goes from load to encode."""
    for module in (ARROW, LOAD):
        monkeypatch.setattr(module, "_AT_ONCE", 100)
    rng = random.Random(0)
    vocabulary = ["what", "is", "it", "a", "cat", "dog", "one", "two"]
    with path.open("w") as file:
        for i in range(rows):
            row = {
                "prompt": f"{vocabulary[i % 7]} {i}",
                "completion": " " + " ".join(rng.choices(vocabulary, k=20)),
                "label": i % 2,
            }
            file.write(json.dumps(row | {"completion": row["completion"] + "x" * 4000}) + "\n")
    tracemalloc.start()
    try:
        kept, held = loading.hold_out(Namespace(eval_split=None, seed=0), load(path, kind="unpaired"))
        encoded = encode(kept, tokenizer(), kind="unpaired", max_length=16)
        assert len(encoded) + len(held) == rows
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    # A list of all rows would be 4 and 12 MiB of text alone.
    few, many = (peak_mib(tmp_path / f"{rows}.jsonl", rows, monkeypatch) for rows in (1000, 3000))
    assert many < few + 3, (few, many)


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_an_array_is_read_in_blocks_wherever_they_end(block, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(SOURCES, "_BLOCK", block)
    rows = [{"text": 'a "\\ ] , \u00e9 \n[', "n": [1, 2.5e-3, {"x": None}]}, {"text": "b", "t": True, "m": -12}]
    (tmp_path / "a.json").write_text(" " + json.dumps(rows * 3, **layout) + "\n \n", encoding="utf-8")
    assert [row for _, row in data.read(tmp_path / "a.json", "train")] == rows * 3


@pytest.mark.parametrize("block", [1, 1000])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text": "b"', r"^a\.json:2: not valid JSON"),
        ('[{"text": "a"},\n{"text" "b"}, {"text": "c"}]', r"^a\.json:2: not valid JSON \(Expecting ':' delimiter\)"),
        ('[{"text": "a"}\n\n{"text": "b"}]', r"^a\.json:3: not valid JSON \(Expecting ',' delimiter\)"),
        ('[{"text": "a"}]\n\n{"text": "b"}', r"^a\.json:\d: not valid JSON \(Extra data\)"),
        ('[{"text": "a"},\n]', r"^a\.json:2: not valid JSON"),
        ("[1, 2, 34]", r"^a\.json\[0\]: expected an object"),
    ],
)
def test_an_array_that_is_broken_says_where(block, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(SOURCES, "_BLOCK", block)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.json", kind="chosen")


def test_what_was_written_is_gone_at_the_end(tmp_path):
    path = texts(tmp_path / "a.jsonl", 3, "a")
    code = f"from xpo_fast import data; print(data.load({path!r}, kind='chosen').cache_files[0]['filename'])"
    env = {"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(str(tmp_path / "xpo_fast-")), done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("xpo_fast-")] == []


def test_a_full_disk_is_said_in_a_line_and_leaves_nothing(tmp_path, monkeypatch):
    path = texts(tmp_path / "a.jsonl", 3000, "a" * 1000)
    load(path, kind="chosen")  # makes the folder
    folder = Path(ARROW._folder().name)
    before = set(folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DataError, match=r"the rows cannot be written to .*File too large.*TMPDIR"):
            load(path, kind="chosen")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(folder.iterdir()) == before


# --- docs/data.md -------------------------------------------------------------------------------------------------

EXAMPLES = re.findall(r"```json\n(.*)\n```\n```sh\nxpo-fast (.*)\n```", DOCS.read_text(encoding="utf-8"))


def test_every_example_of_the_page_has_its_command():
    assert len(EXAMPLES) == DOCS.read_text(encoding="utf-8").count("```json") > 20


@pytest.mark.parametrize(("row", "command"), EXAMPLES)
def test_the_examples_of_the_page_are_read_by_their_commands(row, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(row + "\n", encoding="utf-8")
    args = build_parser().parse_args(shlex.split(command))
    how: dict[str, Any] = options.reading(args)
    if command.startswith(("rl", "recipe")):
        [found] = load_prompts(args.data, **how)
    elif getattr(args, "objectives", None):
        (found,), ratings = load_ratings(args.data, args.objectives, **how)
        assert len(ratings[0]) == len(args.objectives)
    else:
        reward = command.startswith("reward")
        kind = (
            RewardConfig(method=args.method, output_dir="o").spec().kind if reward else Objective(args.method).data_kind
        )
        loaded = load(args.data, kind=kind, **how)
        if not reward:
            data.check_columns(loaded, kind, Objective(args.method).rehearse)
        found = loaded[0]
    said = str(found["prompt"]) or found["chosen"]
    assert "rain" in said or "6 times 7" in said
