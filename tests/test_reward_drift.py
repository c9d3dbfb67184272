"""Drift of the policy's samples from a reward model's data, and preferences by agreement of samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch.testing import assert_close

from reward_runs import PROMPTS, SIDES, reward, run, scorer
from reward_runs import home as home
from reward_runs import without_plots as without_plots
from test_trainer import PEFT_WARNING, make_rows
from xpo_fast.rewards.agreement import clusters, confident_pairs, overlap
from xpo_fast.rewards.drift import Drift, distances
from xpo_fast.rewards.samples import load_samples

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def test_distances_by_hand():
    states = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    # S = diag(2/3, 8/3), tr/2 = 5/3; s = ½: Σ = diag(7/6, 13/6)
    (found,) = distances(states, np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), shrinkage=0.5)
    assert found.tolist() == pytest.approx([3 / 7, 0.0, 3 / 7 + 3 / 13])
    with pytest.raises(ValueError, match="two or more rows"):
        distances(states[:1])
    with pytest.raises(ValueError, match="states that differ"):
        distances(np.ones((3, 2)))
    g = np.random.default_rng(0)
    (near,) = distances(g.normal(size=(4000, 8)), g.normal(size=(4000, 8)), shrinkage=0.0)
    assert near.mean() == pytest.approx(1.0, rel=0.05)


def test_states_are_what_the_rewards_are_read_from():
    model = scorer(mean=0.5, std=2.0)
    found = model.states(PROMPTS, SIDES[0])
    rewards = found @ model.head.weight[0] + model.head.bias
    assert_close((rewards - 0.5) / 2.0, model.score(PROMPTS, SIDES[0]), rtol=1e-4, atol=1e-5)
    assert model.states([], []).shape == (0, 32)
    with pytest.raises(ValueError, match="preference_model has no hidden state of one completion"):
        scorer(method="preference_model").states(PROMPTS, SIDES[0])


def test_drift_is_seen_where_samples_are_of_another_kind():
    pairs = make_rows(40)
    alike = [{"prompt": r["prompt"], "chosen": r["chosen"]} for r in make_rows(30, seed=5)]
    strange = [{"prompt": "w1", "chosen": " w7" * (30 + i % 5)} for i in range(30)]
    near, far = Drift(pairs, alike), Drift(pairs, strange)
    found, off = near.add("a", scorer()), far.add("a", scorer())
    assert abs(found["auc"] - 0.5) < 0.2 and off["auc"] > 0.95
    assert off["distance_samples"] > 1.5 * off["distance"] and found["samples"] == 30 and found["completions"] == 40
    assert near.disagreement() is None
    model = scorer()
    held = pairs[1::2]
    rewards = model.score([r["prompt"] for r in held] * 2, [r[n] for n in ("chosen", "rejected") for r in held])
    drawn = model.score([r["prompt"] for r in alike], [r["chosen"] for r in alike])
    shift = (drawn.mean() - rewards.mean()) / rewards.std(correction=0)
    assert found["reward_shift"] == pytest.approx(float(shift), rel=1e-3, abs=1e-4)
    near.add("the same, whitened", scorer(mean=3.0, std=4.0))
    assert near.disagreement() == pytest.approx({"pairs": 0.0, "samples": 0.0}, abs=1e-5)
    with pytest.raises(ValueError, match="four or more pairs, and samples; got 2 and 30"):
        Drift(pairs[:2], alike)


def test_what_most_samples_say_is_preferred():
    texts = ["the answer is 4", "It is a dog.", "The answer is 4!", "the answer was 4", "no"]
    assert clusters(texts) == [[0, 2, 3], [1], [4]]
    assert overlap("a b c", "B c d") == 0.5 and overlap("", "") == 1.0
    assert clusters(["1", "2", "11"], alike=lambda a, b: a[0] == b[0]) == [[0, 2], [1]]
    rows, groups = load_samples([{"prompt": "q", "completions": texts}, {"prompt": "r", "completions": ["a", "b"]}])
    (pair,) = confident_pairs(rows, groups)
    assert pair == {"prompt": "q", "chosen": texts[0], "rejected": "no", "confidence": 0.6}
    assert confident_pairs(rows, groups, least=0.7) == []  # and of r neither sample is the majority
    with pytest.raises(ValueError, match=r"least in \(0, 1\]"):
        confident_pairs(rows, groups, least=0.0)


def test_drift_and_agreement_by_command(home, tmp_path, capsys):
    agreed = [{"prompt": f"w{i}", "completions": [" w3 w4", " w3 w4", " w9 w8 w7"]} for i in range(4)]
    (home / "agreed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in agreed))
    given = ("--samples", home / "agreed.jsonl", "--method", "rlp", "--confident-pairs", 0.6, "--max-steps", 2)
    assert reward(home, tmp_path / "rlp", *given) == 0
    assert "4 that the policy's samples agree on beside 12" in capsys.readouterr().out
    given = ("--model", tmp_path / "rlp", "--samples", home / "agreed.jsonl", "--output-dir", tmp_path / "measured")
    assert run("eval-reward", "--data", home / "pairs.jsonl", *given, "--cpu") == 0
    (row,) = json.loads((tmp_path / "measured" / "report.json").read_text())["drift"]["models"]
    assert row["samples"] == 12 and 0 <= row["auc"] <= 1
    assert "rlp on 12 samples: rewards" in capsys.readouterr().out
    assert reward(home, tmp_path / "no", "--method", "meta", "--samples", "s", "--confident-pairs", 0.5) == 2
    assert "--confident-pairs is for rlp, not for meta" in capsys.readouterr().err
