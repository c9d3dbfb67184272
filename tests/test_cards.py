"""What is said of the methods: cards against the survey's Table 1, `xpo-fast methods`, docs/methods.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import xpo_fast as xf
from inputs import WITHOUT_DEFAULT, columns
from xpo_fast import cli
from xpo_fast.cli import cards
from xpo_fast.methods.inputs import INPUTS, LAYOUTS
from xpo_fast.methods.survey import ATTRIBUTES
from xpo_fast.rewards.spec import USES

METHODS = sorted(xf.METHODS)
TABLE1 = json.loads((Path(__file__).parent / "survey_table1.json").read_text(encoding="utf-8"))
ROWS = TABLE1["rows"]
DOCS = Path(__file__).parents[1] / "docs" / "methods.md"

# Where a card says something else than Table 1, on purpose: (method, attribute) → the card's word, and why.
DISAGREEMENTS = {
    ("cpo", "RL1"): ("Free", "a uniform reference cancels in CPO's loss, which reads none: S54"),
    ("cringe", "RL1"): ("Free", "the loss compares logits of one model, S29–30"),
}
# Papers of Table 1 with neither a method nor a recipe, and why.
LEFT_OUT: dict[str, str] = {}


def words(row) -> dict[str, str]:
    return dict(zip(TABLE1["attributes"].split(), row["attributes"].split(), strict=True))


# --- Table 1 ---


def test_table_1_is_whole():
    assert tuple(TABLE1["attributes"].split()) == tuple(ATTRIBUTES)
    assert [row["citation"] for row in ROWS] == [2, 3, *range(7, 38)]
    for row in ROWS:
        for attribute, word in words(row).items():
            assert word in (*ATTRIBUTES[attribute][2], "-"), (row["paper"], attribute)


@pytest.mark.parametrize("row", ROWS, ids=[row["paper"] for row in ROWS])
def test_every_paper_has_a_method_or_a_recipe(row):
    if row["paper"] in LEFT_OUT:
        assert row["method"] is None and row["recipe"] is None, "it is no longer left out"
        return
    assert row["method"] or row["recipe"], "neither method nor recipe: add one, or the reason to LEFT_OUT"
    assert row["method"] in (None, *METHODS) and row["recipe"] in (None, *TABLE1["recipes"])


@pytest.mark.parametrize("row", [r for r in ROWS if r["method"]], ids=lambda row: row["method"])
def test_cards_say_what_table_1_says(row):
    name = row["method"]
    agreed = {a: DISAGREEMENTS.get((name, a), (word, "Table 1"))[0] for a, word in words(row).items()}
    assert xf.METHODS[name].card.attributes == agreed


def test_disagreements_are_some():
    table = {row["method"]: words(row) for row in ROWS}
    for (name, attribute), (word, why) in DISAGREEMENTS.items():
        assert table[name][attribute] != word and why, f"{name}, {attribute}: no disagreement"


@pytest.mark.parametrize("name", METHODS)
def test_cards_use_the_words_of_table_1(name):
    card = xf.METHODS[name].card
    for attribute, word in card.attributes.items():
        assert word in (*ATTRIBUTES[attribute][2], "-"), attribute
    assert card.paper and card.equation and card.survey != ""
    if card.survey:
        assert re.match(r"S\d", card.survey)


# --- xpo-fast methods ---


def listed(capsys, *options) -> list[str]:
    assert cli.main(["methods", *options]) == 0
    table, _, _ = capsys.readouterr().out.partition("\n\n")
    return [line.split()[0] for line in table.splitlines()[1:]]


def test_the_table_has_every_method(capsys):
    assert listed(capsys) == METHODS


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_filters_by_attribute(attribute, capsys):
    option, _, taken = ATTRIBUTES[attribute]
    has = {name: xf.METHODS[name].card.attributes[attribute] for name in METHODS}
    for word in taken:
        expected = [n for n in METHODS if has[n] in (word, "Hybrid")]
        for spelling in (word, word.lower(), word.upper()):
            assert listed(capsys, "--where", f"{option}={spelling}") == expected
    assert listed(capsys, "--where", f"{option}=none") == [n for n in METHODS if has[n] == "-"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_filters_by_layout(layout, capsys):
    assert listed(capsys, "--where", f"data={layout}") == [n for n in METHODS if xf.METHODS[n].layout == layout] != []


def test_filters_add_up(capsys):
    free = listed(capsys, "--where", "reference=free", "--where", "length=control", "--where", "data=pairwise")
    assert "simpo" in free and not {"rdpo", "orpo", "dpo"} & set(free)
    assert listed(capsys, "--where", "data=unpaired", "--where", "feedback-form=list") == []


def test_no_method_is_said_to_be_none(capsys):
    assert cli.main(["methods", "--where", "data=unpaired", "--where", "feedback-form=list"]) == 0
    assert "no method is like that" in capsys.readouterr().out


def test_an_unknown_value_is_told_the_known_ones(capsys):
    assert cli.main(["methods", "--where", "policy=maybe"]) == 2
    err = capsys.readouterr().err
    assert "--where policy" in err and "maybe" in err and all(word in err for word in ("on", "off", "hybrid", "none"))


def test_an_unknown_name_is_told_the_known_ones(capsys):
    assert cli.main(["methods", "--where", "polcy=on"]) == 2
    err = capsys.readouterr().err
    assert "did you mean policy" in err and all(a.name in err for a in ATTRIBUTES.values())


@pytest.mark.parametrize("other", [["--card", "dpo"], ["--markdown"]])
def test_filters_are_for_the_table(other, capsys):
    assert cli.main(["methods", "--where", "sft=merge", *other]) == 2
    assert "leave out --where" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_card(name, capsys):
    assert cli.main(["methods", "--card", name]) == 0
    text, method = capsys.readouterr().out, xf.METHODS[name]
    assert method.card.paper in text and method.card.equation in text
    for key in method.inputs:
        assert f"{key} {cards.shape(method, key)}" in text
    for key, default in method.defaults.items():
        assert f"{key}={default!r}" in text
    for attribute, word in method.card.attributes.items():
        assert word == "-" or re.search(rf"{attribute} .*{word}", text)
    assert (method.card.survey or "-") in text


def test_an_unknown_card_is_told_the_known_ones(capsys):
    assert cli.main(["methods", "--card", "dop"]) == 2
    err = capsys.readouterr().err
    assert "no method named 'dop'" in err and "dpo" in err


def test_every_input_has_a_meaning():
    assert all(known.axes and known.meaning for known in INPUTS.values())
    assert {n for m in xf.METHODS.values() for n in m.inputs} <= set(INPUTS)


WORDS = [(n, k) for n in METHODS for k, v in xf.METHODS[n].defaults.items() if isinstance(v, str)]


@pytest.mark.parametrize(("name", "key"), WORDS, ids=[f"{n}-{k}" for n, k in WORDS])
def test_choices_are_those_that_the_method_takes_and_its_docstring_tells(name, key):
    method = xf.METHODS[name]
    with pytest.raises(ValueError, match=f"{key} to be one of ") as refused:
        method(**columns(name, optional=True), **{**WITHOUT_DEFAULT.get(name, [{}])[0], key: "?"})
    (taken,) = re.findall(r"to be one of (.*), got '\?'", str(refused.value))
    assert method.choices[key] == tuple(taken.split(", "))
    for word in set(taken.split(", ")) - {method.defaults[key]}:
        assert re.search(rf"\b{word}\b", method.__doc__), f"the docstring does not tell what {word} is"


def test_the_command_reward_offers_all_that_trains_a_reward_model():
    (method,) = (action for action in cli.parsers()["reward"]._actions if action.dest == "method")
    assert sorted(method.choices) == sorted(USES)


# --- docs/methods.md ---


def test_docs_are_current():
    expected = cards.markdown()
    assert DOCS.is_file() and DOCS.read_text(encoding="utf-8") == expected, (
        f"docs/methods.md is not what the registry says: {cards.REGENERATE}"
    )


def test_markdown_is_what_the_docs_are_made_of(capsys):
    assert cli.main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == cards.markdown()


def test_markdown_has_everything():
    text = cards.markdown()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert sections.keys() - {"Attributes"} == set(METHODS)
    for name, method in xf.METHODS.items():
        for key in (*method.inputs, *method.defaults):
            assert f"`{key}" in sections[name]
        assert method.card.equation in sections[name]
    for line in text.splitlines():  # a bar within a cell would make another column
        if line.startswith("|"):
            assert not re.search(r"`[^`|]*(?<!\\)\|[^`|]*`", line), line


def test_plain_text_survives_markdown():
    assert cards._escape("Q* of logp_w and x_(i), a <b> in `a_*b`") == (r"Q\* of logp_w and x\_(i), a \<b> in `a_*b`")
