"""Votes of several reward models on labels: flipped, dropped and softened, and planted noise that they find."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from reward_runs import home as home
from reward_runs import log_of, reward, run
from reward_runs import without_plots as without_plots
from test_reward_model import make_trainer
from test_trainer import PEFT_WARNING, make_rows
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.report import score_pairs
from xpo_fast.rewards.spec import READS_SAMPLES
from xpo_fast.rewards.voting import adapted, auc, vote

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def test_a_vote_by_hand():
    margins = np.array([[-3.0, -1.0], [-0.5, 0.3], [0.2, 0.2], [4.0, 2.0]])
    votes = vote(margins, flip=0.25, drop=0.25)
    assert votes.mean.tolist() == pytest.approx([-2.0, -0.1, 0.2, 3.0])
    assert votes.std.tolist() == pytest.approx([1.0, 0.4, 0.0, 1.0])
    assert votes.flipped.tolist() == [True, False, False, False]
    assert votes.dropped.tolist() == [False, True, False, False]
    # of the label that comes: (σ(3) + σ(1))/2
    assert votes.prob[0] == pytest.approx((0.9525741268224334 + 0.7310585786300049) / 2)
    assert votes.prob[3] == pytest.approx((0.9820137900379085 + 0.8807970779778823) / 2)
    assert vote(margins, flip=1.0).flipped.tolist() == [True, True, False, False]  # a positive mean keeps its label
    assert not vote(margins, flip=0.0).flipped.any()


def test_adapted_pairs_are_read_by_train_and_reward():
    from xpo_fast import data

    rows = [{**row, "prob": 0.9, "where": f"a:{i}"} for i, row in enumerate(make_rows(4))]
    votes = vote(np.array([[-3.0, -1.0], [-0.5, 0.3], [0.2, 0.2], [4.0, 2.0]]), flip=0.25, drop=0.25)
    hard, soft, margin = (adapted(rows, votes, labels) for labels in ("hard", "soft", "margin"))
    assert [row["prompt"] for row in hard] == [rows[i]["prompt"] for i in (0, 2, 3)]
    assert (hard[0]["chosen"], hard[0]["rejected"]) == (rows[0]["rejected"], rows[0]["chosen"])
    assert hard[1]["chosen"] == rows[2]["chosen"] and "prob" not in hard[1]
    assert [row["flipped"] for row in hard] == [True, False, False]
    assert hard[0]["strength_mean"] == pytest.approx(-2.0) and hard[0]["strength_std"] == pytest.approx(1.0)
    assert [row["margin"] for row in margin] == pytest.approx([2.0, 0.2, 3.0])
    assert data.load(soft, kind="pair")["prob"] == pytest.approx([votes.prob[i] for i in (0, 2, 3)])
    assert data.load(margin, kind="pair")["margin"] == pytest.approx([2.0, 0.2, 3.0])
    with pytest.raises(ValueError, match=r"labels to be one of hard, soft, margin.*did you mean soft"):
        adapted(rows, votes, "sofft")
    with pytest.raises(ValueError, match="expected the 4 pairs"):
        adapted(rows[:3], votes)


@pytest.mark.parametrize(
    ("margins", "how", "said"),
    [
        (np.zeros((0, 2)), {}, "one or more pairs"),
        (np.zeros(3), {}, r"margins \(P, M\)"),
        (np.array([[math.nan]]), {}, "finite margins, got 1"),
        (np.ones((2, 2)), {"flip": 0.7, "drop": 0.4}, "at most 1 together"),
    ],
)
def test_votes_that_cannot_be_taken(margins, how, said):
    with pytest.raises(ValueError, match=said):
        vote(margins, **how)


def test_auc_counts_ties_as_half():
    assert auc(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])) == pytest.approx(2.5 / 4)
    with pytest.raises(ValueError, match="positives and negatives, got 2 and 0"):
        auc(np.ones(2), np.array([True, True]))


def test_voting_finds_planted_label_noise(tmp_path):
    """A fifth of the labels is wrong; three tiny reward models of other seeds find which, and flip them back."""
    g = torch.Generator().manual_seed(5)
    noisy = torch.rand(96, generator=g) < 0.2
    rows = []
    for wrong, n in zip(noisy.tolist(), torch.randint(10, 60, (96,), generator=g).tolist()):
        good, bad = f" w{n} w5", f" w{n} w6"  # the last word is all that counts
        rows.append({"prompt": f"w{n // 2}", "chosen": bad if wrong else good, "rejected": good if wrong else bad})
    margins = []
    for seed in range(3):
        made = make_trainer(
            tmp_path, rows=rows, seed=seed, max_steps=12, per_device_train_batch_size=16, learning_rate=3e-3
        )
        made.train()
        margins.append(score_pairs(str(seed), made.reward_model(), rows).margin)
    votes = vote(np.stack(margins, axis=1), flip=0.3)
    assert auc(-votes.mean, noisy.numpy()) >= 0.9
    fixed = adapted(rows, votes)
    before, after = (np.mean([row["chosen"].endswith("w5") for row in x]) for x in (rows, fixed))
    assert before < 0.85 and after > 0.95


def test_samples_by_command_and_a_vote(home, tmp_path, capsys):
    short, models = ("--max-steps", 2, "--lr", 0.01), []
    for k, method in enumerate(("meta", "rlp", "contrastive")):
        models += [tmp_path / method]
        further = ("--samples", home / "samples.jsonl") if method in READS_SAMPLES else ("--view-dropout", 0.2)
        assert reward(home, models[-1], "--method", method, "--seed", k, *short, *further) == 0
        assert RewardModel.load(models[-1]).spec.method == method
    for method, name in (("meta", "spread"), ("rlp", "views_loss"), ("contrastive", "contrastive_loss")):
        assert any(name in line for line in log_of(tmp_path / method)), name
    capsys.readouterr()
    given = [x for model in models for x in ("--model", model)]
    how = ("--vote", "--vote-flip", 0.25, "--vote-drop", 0.25, "--vote-labels", "soft", "--output-dir", tmp_path / "v")
    assert run("eval-reward", "--data", home / "pairs.jsonl", *given, *how, "--cpu") == 0
    report = json.loads((tmp_path / "v" / "report.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "v" / "voted.jsonl").read_text().splitlines()]
    assert report["vote"]["pairs"] == 12 and report["vote"]["dropped"] == 3 == 12 - len(rows)
    assert report["vote"]["flipped"] == sum(row["flipped"] for row in rows) <= 3
    assert all(0 < row["prob"] < 1 for row in rows) and "vote of 3 models on 12 pairs" in capsys.readouterr().out
    given = ("--data", tmp_path / "v" / "voted.jsonl", "--model", home / "model", "--output-dir", tmp_path / "again")
    assert run("reward", *given, *short, "--cpu", "--method", "preference_model", "--eval-split", 0) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--vote",), "--vote takes two or more --model"),
        (("--vote-flip", "0.1"), "--vote-flip is for --vote"),
        (("--vote", "--model", "b", "--vote-flip", "0.8", "--vote-drop", "0.3"), "at most 1 together; got 0.8 and 0.3"),
    ],
)
def test_votes_by_command_are_checked_first(home, tmp_path, capsys, options, said):
    given = ("--data", home / "pairs.jsonl", "--model", "a", "--output-dir", tmp_path / "out", "--cpu")
    assert run("eval-reward", *given, *options) == 2
    assert said in capsys.readouterr().err
