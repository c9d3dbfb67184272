"""The recipe rlp: reward models on the data's pairs, on pairs that most samples agree on, and on the samples."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from test_contrastive import scripted, selected
from test_recipes import home as home
from test_recipes import lines, setup
from test_recipes import quiet as quiet
from test_trainer import PEFT_WARNING, make_rows
from xpo_fast.data import DataError, load_prompts
from xpo_fast.recipes import RECIPES, override, training
from xpo_fast.recipes.loop import run
from xpo_fast.recipes.selection import SELECTORS
from xpo_fast.rewards.agreement import overlaps
from xpo_fast.rewards.trainer import RewardTrainer

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def agreed(table, **arguments):
    return SELECTORS["agreed"](table, torch.Generator(), arguments)


def test_the_share_of_words_in_common_is_a_table():
    found = overlaps(["a b", None, "B c d", ""])
    n = math.nan
    expected = torch.tensor([[1.0, n, 0.25, 0.0], [n, n, n, n], [0.25, n, 1.0, 0.0], [0.0, n, 0.0, 1.0]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_what_most_samples_say_and_the_datas_pair_are_picked():
    """Of five samples 1, 2 and 4 say the same: by hand. The data's own answers stand behind them."""
    texts = ["x", "a b c", "a b d", "y", "b c a d", None, None]
    table = overlaps(texts)
    own = {"chosen": 5, "rejected": 6}
    assert agreed(table) == [own, {"chosen": 1, "rejected": 3, "confidence": 0.6}]
    assert agreed(table[:5, :5]) == [{"chosen": 1, "rejected": 3, "confidence": 0.6}]
    assert agreed(table, least=0.61) == [own] and agreed(table, least=1.0) == [own]
    # From 0.75 of the words on: b c a d is like both others, which chains them; above, they are four kinds of three.
    assert agreed(table, same=0.75)[1]["confidence"] == 0.6 and agreed(table, same=0.8) == [own]
    assert agreed(overlaps(["a", "a", "b", "b"])) == [] and agreed(overlaps(["a", "a"])) == []
    assert agreed(overlaps([None, None])) == [{"chosen": 0, "rejected": 1}]


def majority(prompt: str, draws: random.Random) -> str:
    """Most samples say w1 w2, the others w9."""
    return " w9" if draws.random() < 0.3 else " w1 w2"


def test_the_reward_model_learns_pairs_agreement_and_samples(home, tmp_path, monkeypatch):
    given: list[tuple[list, list]] = []
    whole = RewardTrainer.__init__

    def watched(self, model, args=None, *, train_dataset=None, samples=None, **more):
        given.append((list(train_dataset), samples))
        whole(self, model, args, train_dataset=train_dataset, samples=samples, **more)

    monkeypatch.setattr(RewardTrainer, "__init__", watched)
    recipe = override(RECIPES["rlp"], {"then": None, "rounds": 1})
    outcome = run(recipe, setup(home, tmp_path, judge=None, rollout=scripted(majority)))
    assert outcome.reward_model == str(tmp_path / "reward_model")
    ((pairs, samples),) = given
    rows = make_rows(4)
    drawn = [line for k in (0, 1) for line in lines(tmp_path / "iteration-000" / f"samples-0000{k}.jsonl")]
    told = [line["completions"][:4] for line in drawn]
    assert [(row["prompt"], row["completions"]) for row in samples] == [
        (row["prompt"], texts) for row, texts in zip(rows, told, strict=True)
    ]
    counts = [texts.count(" w1 w2") for texts in told]
    assert {*counts} & {1, 3} and [line["draw"] for line in drawn] == [[0, 0, 0, 0, -1, -2]] * 4
    expected = []
    for row, count in zip(rows, counts, strict=True):
        expected.append((row["prompt"], row["chosen"], row["rejected"]))
        most, least = (" w1 w2", " w9") if count > 2 else (" w9", " w1 w2")
        if count not in (0, 2, 4):  # all agree, or two against two
            expected.append((row["prompt"], most, least))
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == expected
    (log,) = [x for x in json.loads((tmp_path / "iteration-000" / "train_log.json").read_text()) if "loss" in x]
    assert log["views_loss"] > 0
    assert all(row.get("confidence", 0.75) == 0.75 for row in selected(tmp_path))


def test_it_takes_turns_with_ppo_and_reads_the_newest_policys_samples(home, tmp_path):
    run(RECIPES["rlp"], setup(home, tmp_path, judge=None, training={"learning_rate": 3e-2}))
    parts = ["1-rlp", "2-ppo", "3-rlp", "4-ppo"]
    assert sorted(p.name for p in tmp_path.glob("[0-9]-*")) == parts
    models = [json.loads((tmp_path / part / "run.json").read_text())["model"] for part in parts]
    assert models == [str(home), str(home), *[str(tmp_path / "2-ppo" / "model")] * 2]
    first, second = (lines(tmp_path / part / "iteration-000" / "samples-00000.jsonl") for part in (parts[0], parts[2]))
    assert [a["completions"][:4] for a in first] != [b["completions"][:4] for b in second]
    assert [a["completions"][4:] for a in first] == [b["completions"][4:] for b in second]


def test_empty_samples_and_the_datas_own_answers_are_no_samples(home, tmp_path):
    """With nothing but empty samples the method has nothing to read, and says so."""
    recipe = override(RECIPES["rlp"], {"then": None, "rounds": 1})
    with pytest.raises(ValueError, match=r"recipe rlp: every sample is empty, and rlp learns from them"):
        run(recipe, setup(home, tmp_path / "empty", judge=None, rollout=scripted(lambda prompt, _: " ")))
    half = scripted(lambda prompt, draws: " " if draws.random() < 0.5 else " w1")
    found = []
    given = setup(home, tmp_path / "half", judge=None, rollout=half, said=found)
    run(recipe, given)
    it = training.Iteration(recipe, given, None, 0, tmp_path / "half" / "iteration-000", [], [])
    assert {text for row in training.samples_of(it) for text in row["completions"]} == {" w1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select.least": 0}, "select=agreed with .*least in"),
        ({"select.same": 2}, r"select=agreed with .*same in \[0, 1\], got 2"),
        ({"select.min_gap": 1}, "unexpected keyword argument 'min_gap'"),
        ({"gold": False}, r"both of gold and rival, or neither, for agreed, got \(False, True\)"),
        ({"iterations": 2}, "one iteration of a reward model"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES["rlp"], settings)


def test_it_needs_pairs(home, tmp_path):
    prompts = load_prompts([{"prompt": "w1 w2"}])
    with pytest.raises(DataError, match="recipe rlp needs chosen and rejected in every row"):
        run(RECIPES["rlp"], setup(home, tmp_path, rows=prompts, judge=None))
    assert override(RECIPES["rlp"], {"gold": False, "rival": False}).columns == ()
