"""`xpo-fast check`, and the screen of the check in the commands that train."""

from __future__ import annotations

import json

import pytest
import torch

from test_trainer import PEFT_WARNING, make_model, make_rows, make_tokenizer
from xpo_fast import cli

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
REWARD = """
def tokens(completion_ids, **_):
    with open({calls!r}, "a") as file:
        file.write(f"{{len(completion_ids)}} ")
    return [float(len(ids) + sum(ids) % 3) for ids in completion_ids]

def nothing(completion_ids, **_):
    return [1.0 for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, pairs, pairs whose scores say otherwise, prompts and rewards."""
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    pairs = make_rows(20)
    for name, scores in (("pairs", (2.0, 1.0)), ("swapped", (1.0, 2.0))):
        rows = [{**row, "score_chosen": scores[0] + i, "score_rejected": scores[1] + i} for i, row in enumerate(pairs)]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in pairs))
    (home / "reward.py").write_text(REWARD.format(calls=str(home / "calls")))
    return home


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(home, command, data, *options) -> int:
    words = ["--model", str(home / "model"), "--cpu", "--batch-size", "4", "--lora-targets", "q_proj,v_proj"]
    return cli.main([command, "--data", str(home / data), *words, *options])


def test_check_says_what_train_would_and_writes_nothing(home, tmp_path, capsys):
    assert run(home, "check", "pairs.jsonl", "--beta", "0.3", "--epochs", "2") == 0
    text = capsys.readouterr().out
    assert text.startswith("preflight  XPOTrainer, dpo on 18 pairs")
    for words in (
        "first loss 0.6931, expected ln 2 = 0.6931",
        "ok    options: options looked at: beta=0.3",
        "pairs.jsonl:",
    ):
        assert words in text
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_check_has_exit_code_1_for_a_fault_and_0_for_a_doubt(home, capsys):
    assert run(home, "check", "swapped.jsonl") == 1
    assert "fault numbers: score_chosen is below score_rejected in 100% of pairs" in capsys.readouterr().out
    assert run(home, "check", "pairs.jsonl", "--method", "f_dpo", "--set", "alpha=0.9") == 0
    assert "doubt options: alpha=0.9 changes nothing" in capsys.readouterr().out


def test_check_of_rl_asks_the_rewards_for_one_rollout(home, capsys):
    words = ["--method", "grpo", "--max-new-tokens", "8", "--num-generations", "4"]
    assert run(home, "check", "prompts.jsonl", *words, "--reward", f"{home}/reward.py:tokens") == 0
    text = capsys.readouterr().out
    assert text.startswith("preflight  RLTrainer, grpo on 20 prompts")
    for check in ("prompts", "end", "head", "rewards", "log-probs", "sampler"):
        assert f"ok    {check}: " in text
    assert (home / "calls").read_text() == "4 "
    assert run(home, "check", "prompts.jsonl", *words, "--reward", f"{home}/reward.py:nothing") == 0
    assert "doubt rewards: each of 4 completions has the reward 1: they are not told apart" in capsys.readouterr().out


def test_check_refuses_what_it_cannot_check(home, capsys):
    assert run(home, "check", "prompts.jsonl", "--method", "grpo") == 2
    assert "nothing rewards a completion" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(home, "check", "pairs.jsonl", "--preflight", "on")


def test_check_refuses_options_that_the_method_does_not_read(home, capsys):
    rewarded = ["--reward", f"{home}/reward.py:tokens"]
    assert run(home, "check", "pairs.jsonl", *rewarded, "--temperature", "0.5") == 2
    assert "--reward, --temperature: not read by xpo-fast train, which trains by dpo" in capsys.readouterr().err
    assert run(home, "check", "prompts.jsonl", "--method", "grpo", *rewarded, "--score", "all") == 2
    assert "--score: not read by xpo-fast rl, which trains by grpo" in capsys.readouterr().err


def test_check_of_rl_writes_prompts_with_the_variables_of_the_run(home, tmp_path, capsys):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'w1 w2 w3 ' if think }}"
    (tmp_path / "template.jinja").write_text(template)
    (tmp_path / "asked.jsonl").write_text('{"prompt": [{"role": "user", "content": "w4"}]}\n' * 2)
    words = ["--method", "grpo", "--max-new-tokens", "8", "--num-generations", "4", "--chat-template", "template.jinja"]
    words += ["--reward", f"{home}/reward.py:tokens", "--chat-template-kwargs", "think=true"]
    assert run(tmp_path, "check", "asked.jsonl", *words, "--model", str(home / "model")) == 0
    assert "ok    prompts: prompts have 4 (at most 4) tokens" in capsys.readouterr().out


def test_implicit_rewards_are_of_prompts_with_the_variables_given(home, tmp_path, capsys):
    tokens, policy = make_tokenizer(), make_model()
    tokens.chat_template = "{{ 'w1 w2' if think }}{% for m in messages %} {{ m.content }}{% endfor %}"
    policy.save_pretrained(tmp_path / "policy"), tokens.save_pretrained(tmp_path / "policy")
    say = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    row = {"prompt": say("user", "w4"), "chosen": say("assistant", "w5"), "rejected": say("assistant", "w6")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    words = ["eval-reward", "--data", "pairs.jsonl", "--reference", "none", "--cpu", "--beta", "1"]
    thinks = ["--chat-template-kwargs", "think=true"]
    assert cli.main([*words, "--policy", "policy", "--output-dir", "told", *thinks]) == 0
    (told,) = [json.loads(line) for line in (tmp_path / "told" / "scores.jsonl").read_text().splitlines()]
    ids = torch.tensor([tokens("w1 w2 w4 w5", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logp = policy.double()(input_ids=ids).logits[0, 2].log_softmax(-1)[ids[0, 3]]
    assert float(logp) in [pytest.approx(x, abs=1e-4) for x in flat(told)]
    assert cli.main([*words, "--model", "policy", *thinks]) == 2
    assert "--chat-template-kwargs are for --policy" in capsys.readouterr().err


def flat(value) -> list[float]:
    """Returns the numbers in nested lists and dicts."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, float) else [x for one in inner for x in flat(one)]


def test_a_run_resumes_only_with_the_same_variables_of_the_template(home, tmp_path, capsys):
    more = ["--save-steps", "1", "--eval-split", "0", "--output-dir", "kept", "--preflight", "off"]
    assert run(home, "train", "pairs.jsonl", *more, "--max-steps", "1") == 0
    capsys.readouterr()
    assert (
        run(home, "train", "pairs.jsonl", *more, "--max-steps", "2", "--resume", "--chat-template-kwargs", "a=1") == 2
    )
    assert '--chat-template-kwargs was not given and is {"a": 1}' in capsys.readouterr().err


def test_train_prints_the_screen_once_stops_for_a_fault_and_can_be_told_not_to_look(home, tmp_path, capsys, caplog):
    more = ["--max-steps", "1", "--eval-split", "0"]
    assert run(home, "train", "swapped.jsonl", *more, "--output-dir", "warned") == 0
    out, err = capsys.readouterr()
    assert out.count("fault numbers") == 1 and "preflight  XPOTrainer" in out
    assert not [r for r in caplog.records if "preflight" in r.getMessage()] and "preflight" not in err
    assert run(home, "train", "swapped.jsonl", *more, "--output-dir", "stopped", "--preflight", "stop") == 2
    out, err = capsys.readouterr()
    assert "fault numbers" in out and "the check before training found 1 fault: numbers: score_chosen is" in err
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    (tmp_path / "run.yaml").write_text("preflight: off\n")
    assert run(home, "train", "swapped.jsonl", *more, "--output-dir", "off", "--config", "run.yaml") == 0
    assert "preflight  " not in capsys.readouterr().out
    assert run(home, "check", "swapped.jsonl", "--config", "off/config.yaml") == 1  # of a run that did not look


def test_reward_and_rl_print_the_screen(home, capsys):
    assert run(home, "reward", "pairs.jsonl", "--max-steps", "1", "--output-dir", "reward", "--eval-split", "0") == 0
    out = capsys.readouterr().out
    assert "preflight  RewardTrainer, bradley_terry on 20 pairs" in out and "fault" not in out and "doubt" not in out
    words = ["--max-steps", "1", "--max-new-tokens", "8", "--num-generations", "4", "--output-dir", "rl"]
    assert run(home, "rl", "prompts.jsonl", *words, "--reward", f"{home}/reward.py:tokens") == 0
    out = capsys.readouterr().out
    assert "preflight  RLTrainer, grpo on 20 prompts" in out and "note  rollout: " in out


def test_check_of_a_reward_model(home, capsys):
    assert run(home, "check", "pairs.jsonl", "--method", "bradley_terry") == 0
    assert capsys.readouterr().out.startswith("preflight  RewardTrainer, bradley_terry on 18 pairs")
    assert run(home, "check", "swapped.jsonl", "--method", "bradley_terry") == 1
    assert run(home, "check", "pairs.jsonl", "--method", "bradley_terry", "--score", "all") == 2
    assert "--score: not read by xpo-fast reward, which trains by bradley_terry" in capsys.readouterr().err
    assert run(home, "check", "pairs.jsonl", "--objectives", "a,b") == 2
    assert "--objectives: not read by xpo-fast train, which trains by dpo" in capsys.readouterr().err
