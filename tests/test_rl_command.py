"""`xpo-fast rl`: a run on a tiny model, going on with it, and what is said of mistakes."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from transformers import TrainerState

import vllm_stand_in
from test_trainer import PEFT_WARNING, make_model, make_tokenizer
from xpo_fast import cli, models
from xpo_fast.cli import rl_rewards, training
from xpo_fast.models.value_head import attach_value_head
from xpo_fast.rewards.model import RewardModel

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
    return cli.main(
        [
            "rl",
            *(
                "--data",
                str(home / "prompts.jsonl"),
                "--model",
                str(home / "model"),
                "--output-dir",
                str(output),
                "--cpu",
            ),
            *(["--reward", f"{home / 'reward.py'}:{reward}"] if reward else []),
            *(
                "--batch-size",
                "8",
                "--num-generations",
                "4",
                "--max-new-tokens",
                "5",
                "--lora-targets",
                "q_proj,v_proj",
            ),
            *options,
        ]
    )


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
    options = "--max-steps", "2", "--epochs-per-rollout", "2", "--value-head-lr", "0.01", "--save-steps", "2"
    assert run(home, out, "--full", "--method", "ppo", *options) == 0
    groups = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"]
    assert sorted({group["lr"] for group in groups}) == [1e-6, 0.01]
    assert (out / "value_head.safetensors").is_file()
    model, _ = models.load_model(str(out))  # a plain causal LM
    assert not any("value_head" in name for name in model.state_dict())


@pytest.mark.parametrize("options", [("--full",), ("--vllm-memory", "0.2")])
def test_vllm_samples_from_the_policy(home, tmp_path, monkeypatch, options):
    (llm := vllm_stand_in.install(monkeypatch, make_tokenizer())).made.clear()
    out = tmp_path / "out"
    assert run(home, out, "--vllm", "--max-steps", "2", "--lr", "0.01", "--eval-split", "0", *options) == 0
    (engine,) = llm.made
    full = "--full" in options
    assert engine.folder == str(home / "model") and engine.memory == (0.3 if full else 0.2)
    assert engine.lora_rank == (None if full else 16) and engine.awake == set()
    assert engine.calls.count("load") == (2 if full else 0) and engine.calls.count("generate 8") == 2
    logs = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    gaps = [log["off_policy/logp_gap"] for log in logs if "loss" in log]
    assert len(gaps) == 2 and max(gaps) < 1e-4  # the second step's are those of the weights that the first has changed


def test_what_comes_with_dapo_is_said(home, tmp_path, capsys):
    assert run(home, tmp_path / "dapo", "--method", "dapo", "--max-steps", "1") == 0
    said = capsys.readouterr().out
    assert "replaced, in 10 draws at most (--max-draws); the last 1 of 5 tokens cost up to 1 (--overlong)" in said
    options = "--max-draws", "1", "--overlong", "mask", "--set", "show_samples=0"
    assert run(home, tmp_path / "less", "--method", "dapo", "--max-steps", "1", *options) == 0
    less = capsys.readouterr().out
    assert "draws at most" not in less and "truncated completions are not trained on" in less
    assert "3 of 8 completions, by reward" not in less and "of 8 completions, by reward" not in less


def test_samples_are_shown(home, tmp_path, capsys):
    assert run(home, tmp_path / "out", "--max-steps", "2") == 0
    said = capsys.readouterr().out
    assert said.count("3 of 8 completions, by reward") == 2 and "step 2, rollout 1: " in said
    assert re.search(r"reward +advantage +tokens +prompt +completion", said)


def test_an_ensemble_is_measured_once(home, tmp_path, capsys, monkeypatch):
    members = []
    for seed in (1, 2):
        model = make_model(seed)
        torch.manual_seed(seed)
        attach_value_head(model, std=1.0)
        RewardModel(model, make_tokenizer()).save(tmp_path / f"member-{seed}")
        members += ["--reward-model", str(tmp_path / f"member-{seed}")]
    options = (*members, "--ensemble", "worst=2", "--lr", "0.01", "--save-steps", "2")

    def go(folder, *more):
        return run(home, tmp_path / folder, *options, *more, reward=None)

    assert go("whole", "--max-steps", "3") == 0
    assert "2*reward_ensemble" in capsys.readouterr().out
    moments = json.loads((tmp_path / "whole" / "reward_ensemble.json").read_text())
    assert moments["members"] == [str(tmp_path / "member-1"), str(tmp_path / "member-2")]
    assert moments["how"] == "worst" and len(moments["mean"]) == 2 and min(moments["std"]) > 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    first = [row["rewards"]["reward_ensemble"] for row in rows[:8]]
    prompts, completions = ([row[name] for row in rows[:8]] for name in ("prompt", "completion"))
    scores = [RewardModel.load(tmp_path / f"member-{seed}").score(prompts, completions) for seed in (1, 2)]
    of = zip(scores, moments["mean"], moments["std"], strict=True)
    want = torch.stack([(x - mean) / std for x, mean, std in of]).amin(0)
    torch.testing.assert_close(torch.tensor(first), want, rtol=1e-4, atol=1e-4)
    assert [row["reward"] for row in rows[:8]] == pytest.approx([2 * x for x in first])

    assert go("parts", "--max-steps", "2") == 0
    monkeypatch.setattr("xpo_fast.rewards.ensemble.RewardEnsemble.standardise", pytest.fail)
    assert go("parts", "--max-steps", "3", "--resume") == 0
    weights = [models.load_model(str(tmp_path / x))[0].state_dict() for x in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))

    capsys.readouterr()
    for more, said in (
        (("--ensemble", "mean"), "how was 'worst' and is 'mean': go on with the same"),
        (("--ensemble-coef", "2"), "coef was 1.0 and is 2.0"),
        (("--reward-model", str(tmp_path / "member-1")), "members was"),
    ):
        assert go("parts", "--max-steps", "3", "--resume", *more) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "parts" / "reward_ensemble.json").unlink()
    assert go("parts", "--max-steps", "3", "--resume") == 2
    assert "expected the moments of the ensemble that the run began with" in capsys.readouterr().err


def test_mistakes(home, tmp_path, capsys):
    out = tmp_path / "out"
    for options, said in (
        ((), "nothing rewards a completion"),
        (("--reward", "nowhere.py:f"), "no file 'nowhere.py'"),
        (("--reward", f"{home / 'reward.py'}:none"), "there are absent, brevity, share"),
        (("--reward", f"{home / 'reward.py'}:share=much"), "expected NAME=WEIGHT with a number"),
        (("--reward-model", "a", "--ensemble", "mean"), "two or more --reward-model, got 1"),
        (
            ("--reward-model", "a", "--reward-model", "b", "--ensemble", "best"),
            "expected mean, worst, uncertainty, got 'best'",
        ),
        (("--reward-model", "a=2", "--reward-model", "b", "--ensemble", "mean"), "--ensemble HOW=WEIGHT"),
        (("--reward", f"{home / 'reward.py'}:share", "--value-head-lr", "0"), "--value-head-lr must be positive"),
        (
            ("--reward", f"{home / 'reward.py'}:share", "--value-head-lr", "0.1"),
            "value_head_learning_rate is the critic's",
        ),
        (("--reward", f"{home / 'reward.py'}:share", "--method", "dpo"), "dpo does not learn from scored completions"),
        (("--reward", f"{home / 'reward.py'}:share", "--server", "http://x", "--full"), "--server needs what sends it"),
        (("--reward", f"{home / 'reward.py'}:share", "--eval-split", "10"), "leaves none to train on"),
    ):
        assert run(home, out, *options, reward=None) == 2
        assert said in capsys.readouterr().err
    for options, said in (
        (("--vllm-memory", "0.2"), "--vllm-memory is for --vllm"),
        (("--vllm", "--server", "http://x"), "--vllm samples on this device: leave out --server"),
        (("--vllm", "--continuous-batching"), "leave out --server and --continuous-batching"),
        (("--server-folder", "a"), "--server-folder is for --server"),
        (
            ("--server", "http://x", "--server-folder", "a", "--server-lora", "b"),
            "--server-lora and --server-folder say each how",
        ),
    ):
        assert run(home, out, *options) == 2
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
        args = argparse.Namespace(
            reward_model=[str(tmp_path)], judge=str(home / "model"), judge_by=judge_by, ensemble=None,
            reward_max_length=64,
        )  # fmt: skip
        reward, judge = rl_rewards.reward_models(args, torch.device("meta"))
        assert {p.device.type for p in reward.model.parameters()} == {"meta"}
        assert reward.spec.max_length == 64
    judge = rl_rewards.reward_models(argparse.Namespace(**{**vars(args), "judge_by": "grade"}), torch.device("meta"))[1]
    assert {p.device.type for p in judge.choice.model.parameters()} == {"meta"}


def test_a_resumed_log_has_every_step_once(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path), resume="last", overwrite=False)
    callback, path = training.json_log(args), tmp_path / "train_log.jsonl"

    def log(*steps):
        for step in steps:
            callback.on_log(None, TrainerState(global_step=step), None, logs={"loss": 1.0})

    log(0)
    assert not path.exists()  # nor is that of an earlier run touched, until training begins
    callback.on_train_begin(None, TrainerState(global_step=0), None)
    log(1, 2, 3, 4)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    path.write_text(path.read_text() + "\n")
    callback = training.json_log(args)
    log(0)  # the measurement before training, again
    callback.on_train_begin(None, TrainerState(global_step=2), None)
    log(3, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    training.json_log(args).on_train_begin(None, TrainerState(global_step=0), None)  # a run of its own
    assert path.read_text() == ""


def test_a_key_is_in_no_file():
    args = argparse.Namespace(api_key="secret", seed=1, run=None)
    assert training.report_header(args)["options"] == {"seed": 1}
