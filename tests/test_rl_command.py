"""`xpo-fast rl`: a run on a tiny model, going on with it, and what is said of mistakes."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from transformers import TrainerState

from test_trainer import PEFT_WARNING, make_model, make_tokenizer
from xpo_fast import cli, models
from xpo_fast.cli import options as common
from xpo_fast.cli import rl as rl_command
from xpo_fast.reward_model import RewardModel
from xpo_fast.value_head import attach_value_head

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

REWARD = """
def share(completion_ids, wanted, **_):
    return [sum(i % 2 == w for i in ids) / len(ids) for ids, w in zip(completion_ids, wanted)]

def brevity(completion_ids):
    return [-len(ids) for ids in completion_ids]

def absent(completion_ids, answer):
    return [0.0 for _ in completion_ids]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, prompts and reward functions."""
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    rows = [{"prompt": f"w{i} w{i + 1}", "wanted": 0} for i in range(10)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "reward.py").write_text(REWARD)
    return home


def run(home, output, *options, reward="share") -> int:
    return cli.main([
        "rl", "--data", str(home / "prompts.jsonl"), "--model", str(home / "model"), "--output-dir", str(output), "--cpu",
        *(["--reward", f"{home / 'reward.py'}:{reward}"] if reward else []), "--batch-size", "8", "--num-generations", "4",
        "--max-new-tokens", "5", "--lora-targets", "q_proj,v_proj", *options,
    ])  # fmt: skip


def test_a_run_and_going_on_with_it(home, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    options = (
        "--reward", f"{home / 'reward.py'}:brevity=0.01", "--lr", "0.01", "--eval-split", "2", "--set", "eps=0.1",
        "--prompts-per-rollout", "4", "--kl-coef", "0.01",
    )  # fmt: skip
    assert run(home, out, "--max-steps", "4", *options) == 0
    text = capsys.readouterr().out
    assert "1*share, 0.01*brevity" in text and "4 prompts × 4 completions, 2 steps on each" in text
    assert "grpo(eps=0.1, beta=0.0, entropy_coef=0.0), advantages: group, lr 0.01" in text
    assert "8 prompts to train on, 2 held out" in text and "adapter, kl_coef 0.01" in text
    assert "held out: 2 prompts" in text
    results = json.loads((out / "results.json").read_text())
    assert {"eval_reward", "eval_rewards/share/mean"} <= results["after"].keys() & results["before"].keys()
    logs = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert sum("loss" in log for log in logs) == 4
    assert len((out / "samples.jsonl").read_text().splitlines()) == 32

    assert run(home, other, "--max-steps", "3", "--save-steps", "3", *options) == 0
    capsys.readouterr()
    assert run(home, other, "--max-steps", "4", *options) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert run(home, other, "--max-steps", "4", "--resume", *options) == 0
    resumed = json.loads((other / "results.json").read_text())
    assert resumed["after"]["eval_reward"] == results["after"]["eval_reward"]
    weights = [models.load_model(str(x))[0].state_dict() for x in (out, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_every_weight_with_a_critic(home, tmp_path):
    out = tmp_path / "out"
    assert run(home, out, "--full", "--method", "ppo", "--max-steps", "2", "--epochs-per-rollout", "2") == 0
    assert (out / "value_head.safetensors").is_file()
    model, _ = models.load_model(str(out))  # a plain causal LM
    assert not any("value_head" in name for name in model.state_dict())


def test_mistakes(home, tmp_path, capsys):
    out = tmp_path / "out"
    for options, said in (
        ((), "nothing rewards a completion"),
        (("--reward", "nowhere.py:f"), "no file 'nowhere.py'"),
        (("--reward", f"{home / 'reward.py'}:none"), "there are absent, brevity, share"),
        (("--reward", f"{home / 'reward.py'}:share=much"), "expected NAME=WEIGHT with a number"),
        (("--reward", f"{home / 'reward.py'}:share", "--method", "dpo"), "dpo does not learn from scored completions"),
        (("--reward", f"{home / 'reward.py'}:share", "--server", "http://x", "--full"), "--server needs --lora"),
        (("--reward", f"{home / 'reward.py'}:share", "--eval-split", "10"), "leaves none to train on"),
    ):  # fmt: skip
        assert run(home, out, *options, reward=None) == 2
        assert said in capsys.readouterr().err
    assert run(home, out, "--max-steps", "1", reward="absent") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"xpo-fast: .*'absent' needs answer, which the data have not: .*wanted.*", said)
    assert "where" not in said


def test_models_that_reward_go_where_the_policy_is(home, tmp_path):
    model = make_model()
    attach_value_head(model)
    RewardModel(model, make_tokenizer()).save(tmp_path)
    for judge_by in ("grade", "compare"):
        args = argparse.Namespace(reward_model=[str(tmp_path)], judge=str(home / "model"), judge_by=judge_by)
        reward, judge = rl_command._models_that_reward(args, torch.device("meta"))
        assert {p.device.type for p in reward.model.parameters()} == {"meta"}
    judge = rl_command._models_that_reward(
        argparse.Namespace(**{**vars(args), "judge_by": "grade"}), torch.device("meta")
    )[1]
    assert {p.device.type for p in judge.choice.model.parameters()} == {"meta"}


def test_a_resumed_log_has_every_step_once(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path), resume="last", overwrite=False)
    callback, path = common.json_log(args), tmp_path / "train_log.jsonl"

    def log(*steps):
        for step in steps:
            callback.on_log(None, TrainerState(global_step=step), None, logs={"loss": 1.0})

    log(0, 1, 2, 3, 4)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    path.write_text(path.read_text() + "\n")
    log(0)  # the measurement before training, again
    callback.on_train_begin(None, TrainerState(global_step=2), None)
    log(3, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    args.resume = None
    assert common.checkpoint(args) is None and not path.exists()


def test_a_key_is_in_no_file():
    args = argparse.Namespace(api_key="secret", seed=1, run=None)
    assert common.begun(args)["options"] == {"seed": 1}
