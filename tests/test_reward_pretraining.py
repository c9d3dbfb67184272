"""Preference-model pre-training: a ranking that goes on from a discriminator's head."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.testing import assert_close

from reward_runs import PROMPTS, SIDES, log_of, reward, run
from reward_runs import home as home
from reward_runs import without_plots as without_plots
from test_reward_model import make_trainer
from test_trainer import PEFT_WARNING, lora, make_model, make_tokenizer
from xpo_fast.models import load_model
from xpo_fast.models.value_head import value_head
from xpo_fast.rewards.model import RewardModel

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_ranking_goes_on_from_the_discriminators_head(tmp_path, adapter):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    first = make_trainer(
        *(tmp_path / "first", "discriminator"),
        model=load_model(str(tmp_path / "base"))[0],
        max_steps=3,
        peft_config=lora() if adapter else None,
    )
    first.train()
    first.save_model()
    folder = str(tmp_path / "first" / "out")
    trained = RewardModel.load(folder)
    second = make_trainer(tmp_path / "second", model=folder, max_steps=1, peft_config=lora() if adapter else None)
    assert torch.equal(value_head(second.model).weight, value_head(trained.model).weight)
    assert value_head(second.model).weight.abs().max() > 0
    ranking = second.reward_model().score(PROMPTS, SIDES[0])
    assert_close(ranking, trained.score(PROMPTS, SIDES[0]), rtol=1e-4, atol=1e-5)
    fresh = make_trainer(tmp_path / "third", max_steps=1)
    assert not torch.equal(value_head(fresh.model).weight, value_head(trained.model).weight)


def test_a_head_of_other_outputs_is_not_lost_in_silence(tmp_path):
    first = make_trainer(tmp_path / "first", "odin", max_steps=1)
    first.train()
    first.save_model()
    with pytest.raises(ValueError, match="1 outputs, the model has one with 2"):
        make_trainer(tmp_path / "second", model=str(tmp_path / "first" / "out"))


def test_pretraining_killed_and_resumed_is_the_same(home, tmp_path, capsys):
    """Killed in the second stage, and resumed: the first stage is not trained again."""
    steps = ("--max-steps", 4, "--save-steps", 2, "--lr", 0.01, "--pretrain-data", home / "judged.jsonl", "--whiten")
    steps += ("--eval-split", 3)
    assert reward(home, tmp_path / "whole", *steps) == 0
    assert f"value head of discriminator in {tmp_path / 'whole' / 'discriminator'}" in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    killed = tmp_path / "killed"
    shutil.rmtree(killed / "checkpoint-4")
    (killed / "reward_model.json").unlink()
    (killed / "discriminator" / "checkpoint-4" / "trainer_state.json").unlink()
    assert reward(home, killed, *steps, "--resume") == 0
    whole, again = RewardModel.load(tmp_path / "whole"), RewardModel.load(killed)
    assert torch.equal(whole.score(PROMPTS, SIDES[0]), again.score(PROMPTS, SIDES[0]))
    assert whole.spec == again.spec and whole.spec.std is not None and log_of(killed) == log_of(tmp_path / "whole")
    first = RewardModel.load(killed / "discriminator")
    assert first.spec.method == "discriminator" and first.spec.std is None
    other = ("--pretrain-data", home / "pairs.jsonl", "--max-steps", 4, "--resume")
    assert reward(home, killed, *other) == 2
    assert "was trained with data" in capsys.readouterr().err

    assert run("merge", tmp_path / "whole", "--output-dir", tmp_path / "merged") == 0
    merged = RewardModel.load(tmp_path / "merged")
    assert merged.spec == whole.spec
    assert_close(merged.score(PROMPTS, SIDES[0]), whole.score(PROMPTS, SIDES[0]), rtol=1e-3, atol=1e-4)
