"""Whitened rewards: mean and deviation as a saved property of the model, which every consumer reads."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from reward_runs import PROMPTS, ROWS, SIDES, scorer
from reward_runs import home as home
from reward_runs import without_plots as without_plots
from test_reward_model import make_trainer
from test_trainer import PEFT_WARNING, make_rows
from xpo_fast.models.value_head import value_head
from xpo_fast.rewards.judges import RewardJudge, group_wins
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.report import score_pairs, summary
from xpo_fast.rewards.spec import SPEC_FILE, RewardSpec, load_spec, save_spec

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def test_every_consumer_reads_whitened_rewards():
    plain, white = scorer(), scorer(mean=7.5, std=2.5)
    raw = plain.score(PROMPTS, SIDES[0])
    expected = (raw - 7.5) / 2.5
    assert_close(white.score(PROMPTS, SIDES[0]), expected)
    assert white(PROMPTS, SIDES[0]) == pytest.approx(expected.tolist(), rel=1e-5)  # as a reward of RL
    assert_close(RewardJudge(white).score(PROMPTS, SIDES[0]), expected)
    assert_close(white.outputs(PROMPTS, SIDES[0]), plain.outputs(PROMPTS, SIDES[0]))  # what is merged and compared
    # probabilities are those that were fitted
    p = torch.sigmoid(raw - plain.score(PROMPTS, SIDES[1]))
    assert_close(white.compare(PROMPTS, *SIDES), p, rtol=1e-4, atol=1e-6)
    assert_close(RewardJudge(white).compare(PROMPTS, *SIDES), p, rtol=1e-4, atol=1e-6)
    groups = [list(two) for two in zip(*SIDES)]
    tables = [group_wins(RewardJudge(model), PROMPTS, groups) for model in (plain, white)]
    assert_close(*tables, rtol=1e-4, atol=1e-6)
    figures = [summary(score_pairs("a", model, ROWS)) for model in (plain, white)]
    for name in ("accuracy", "log_loss", "brier", "calibration_error"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-4), name
    assert figures[1]["margin_std"] == pytest.approx(figures[0]["margin_std"] / 2.5, rel=1e-4)


def test_an_ensemble_of_whitened_models_has_one_zero():
    from xpo_fast.rewards.ensemble import RewardEnsemble

    plain, white = scorer(), scorer(mean=7.5, std=2.5)
    both = RewardEnsemble([plain, white], "worst").score(PROMPTS, SIDES[0])
    assert_close(both, torch.minimum(plain.score(PROMPTS, SIDES[0]), white.score(PROMPTS, SIDES[0])))


def test_the_length_rule_sees_the_whitened_reward():
    spec = RewardSpec(mean=1.0, std=2.0, length_alpha=3.0, length_lam=0.5, length_target=4.0)
    outputs, lengths = torch.tensor([[5.0], [1.0]], dtype=torch.float64), torch.tensor([5.0, 1.0], dtype=torch.float64)
    # (5−1)/2 = 2, 2/8 − 0.5·1; 0 − 0.5·3
    assert_close(spec.combine(outputs, lengths), torch.tensor([-0.25, -1.5], dtype=torch.float64))


def test_moments_are_saved_and_folders_without_them_load(tmp_path):
    model = scorer(mean=0.5, std=2.0)
    model.save(tmp_path / "white")
    again = RewardModel.load(tmp_path / "white")
    assert again.spec == model.spec and again.scale == 2.0
    assert_close(again.score(PROMPTS, SIDES[0]), model.score(PROMPTS, SIDES[0]))
    save_spec(RewardSpec(), tmp_path)
    assert not {"mean", "std"} & set(json.loads((tmp_path / SPEC_FILE).read_text()))  # as earlier versions wrote it
    assert load_spec(tmp_path) == RewardSpec()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"mean": 1.0}, "mean and std, or neither"),
        ({"mean": 1.0, "std": 0.0}, "std > 0"),
        ({"mean": math.nan, "std": 1.0}, "finite mean"),
        ({"method": "preference_model", "mean": 0.0, "std": 1.0}, "no reward to whiten"),
    ],
)
def test_moments_that_cannot_be(spec, said):
    with pytest.raises(ValueError, match=said):
        RewardSpec(**spec)


@pytest.mark.parametrize("held_out", [True, False])
def test_whitening_measures_what_was_trained(tmp_path, held_out):
    rows, held = make_rows(8), make_rows(5, seed=3)
    trainer = make_trainer(tmp_path, rows=rows, eval_rows=held if held_out else None, max_steps=2, whiten=True)
    trainer.train()
    trainer.save_model()
    scored = RewardModel.load(tmp_path / "out")
    assert scored.spec.std is not None and scored.spec == trainer.spec
    found = held if held_out else rows
    rewards = scored([r["prompt"] for r in found] * 2, [r[n] for n in ("chosen", "rejected") for r in found])
    assert np.mean(rewards) == pytest.approx(0, abs=1e-4) and np.std(rewards, ddof=1) == pytest.approx(1, rel=1e-4)


def test_whitening_needs_rewards_that_differ(tmp_path):
    trainer = make_trainer(tmp_path, rows=make_rows(4))
    with torch.no_grad():
        value_head(trainer.model).weight.zero_()
    with pytest.raises(ValueError, match="8 rewards of standard deviation 0"):
        trainer.whiten()
    with pytest.raises(ValueError, match="no reward to whiten"):
        make_trainer(tmp_path, "preference_model", whiten=True)
