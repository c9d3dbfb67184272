"""--config and config.yaml: options from a file, checked as on the command line, and runs that repeat to the bit."""

from __future__ import annotations

import json
import re

import pytest

from test_cli import home, log_of, train  # noqa: F401  (home is a fixture)
from test_trainer import PEFT_WARNING, make_rows
from xpo_fast import cli
from xpo_fast.cli import config_file
from xpo_fast.cli.options import NOT_OF_A_RUN

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parsed(tmp_path):
    def parse(text: str, *words: str, command: str = "train", name: str = "run.yaml") -> dict:
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = vars(cli.parse([command, "--config", str(tmp_path / name), *words]))
        return {k: v for k, v in found.items() if k not in ("config", "run")}

    return parse


def typed(*words: str, command: str = "train") -> dict:
    return {k: v for k, v in vars(cli.parse([command, *words])).items() if k not in ("config", "run")}


def test_a_file_says_what_the_command_line_says(parsed):
    text = """
    data: pairs.jsonl           # required, and here
    method: simpo
    set: {beta: 2.5, gamma: 1e-1, gamma_beta_ratio: null, label_smoothing: 0.0}
    lr: 1e-5                    # text in YAML 1.1
    max_steps: 7
    full: true
    lora-targets: [q_proj, v_proj]
    gradient-checkpointing: false
    report-to: "none"
    ref-cache:
    """
    words = [
        "--data", "pairs.jsonl", "--method", "simpo", "--set", "beta=2.5", "--set", "gamma=1e-1", "--set",
        "gamma_beta_ratio=null", "--set", "label_smoothing=0.0", "--lr", "1e-5", "--max-steps", "7", "--full",
        "--lora-targets", "q_proj,v_proj",
    ]  # fmt: skip
    assert parsed(text) == typed(*words)


def test_names_of_trl_are_read_from_a_file(parsed):
    text = """
    dataset_name: pairs.jsonl
    model_name_or_path: here/model
    loss_type: [sigmoid, sft]
    loss_weights: [1.0, 0.5]
    beta: 0.3
    learning_rate: 2.0e-5
    per_device_train_batch_size: 2
    use_peft: false
    bf16: true
    lora_target_modules: [q_proj]
    adam_beta2: 0.95
    lr_scheduler_kwargs: {min_lr: 1.0e-6}
    eval_strategy: steps
    eval_steps: 5
    """
    words = [
        "--data", "pairs.jsonl", "--model", "here/model", "--method", "dpo + sft", "--set", "weights=[1.0, 0.5]",
        "--set",
        "beta=0.3", "--lr", "2e-5", "--batch-size", "2", "--full", "--dtype", "bfloat16", "--lora-targets", "q_proj",
        "--train", "adam_beta2=0.95", "--train", 'lr_scheduler_kwargs={"min_lr": 1e-06}', "--eval-steps", "5",
    ]  # fmt: skip
    assert parsed(text) == typed(*words)


def test_json_is_read_too(parsed):
    text = json.dumps({"data": "p.jsonl", "lr": 1e-05, "set": {"beta": 0.5}, "stop": ["\n", "😀"]}, indent="\t")
    words = ["--data", "p.jsonl", "--lr", "1e-05", "--set", "beta=0.5", "--stop", "\n", "--stop", "😀"]
    assert parsed(text, command="rl", name="run.json") == typed(*words, command="rl")


def test_the_command_line_wins(parsed):
    text = (
        "data: a.jsonl\nlr: 1\nlora: true\neval-split: 5\nset: {beta: 1, label_smoothing: 0.1}\ngroup-by-length: true\n"
    )
    words = ["--data", "b.jsonl", "--full", "--eval-data", "c.jsonl", "--set", "beta=2", "--no-group-by-length"]
    found = parsed(text, *words)
    assert (found["data"], found["lr"], found["full"], found["lora"]) == (["b.jsonl"], 1.0, True, False)
    assert (found["eval_data"], found["eval_split"], found["group_by_length"]) == ("c.jsonl", None, False)
    assert dict(found["set"]) == {"beta": 2, "label_smoothing": 0.1}
    stops = parsed("data: a\nstop: [x, y]\n", "--stop", "z", command="rl")["stop"]
    assert stops == ["z"]  # a list is replaced, not made longer


@pytest.mark.parametrize(
    ("text", "words", "same"),
    [
        ("method: dpo\n", "--loss_type ipo", "--method ipo"),
        ("loss_type: sppo_hard\n", "--method dpo", "--method dpo"),
        ("method: simpo\nset: {beta: 2}\n", "--method dpo", "--method dpo --set beta=2"),
        ("dtype: auto\nfull: true\n", "--bf16", "--full --dtype bfloat16"),
        ("bf16: true\nfull: true\n", "--dtype float16", "--full --dtype float16"),
        ("dtype: bfloat16\n", "--fp16 false", "--dtype bfloat16"),
        ("full: true\n", "--no-lora", "--full"),
        ("full: true\n", "--no-full", ""),
        ("push-to-hub: me/it\n", "--no-push-to-hub", ""),
    ],
)  # fmt: skip
def test_the_command_line_wins_by_other_names_too(parsed, text, words, same):
    assert parsed("data: a\n" + text, *words.split()) == typed("--data", "a", *same.split())


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("method: simpo\nset: {beta: 2, gamma: 1}\n", "--method dpo", "run.yaml:3: gamma is no hyperparameter of dpo"),
        ("method: simpo\ngamma: 1\n", "--loss_type ipo", "run.yaml:3: gamma is no hyperparameter of ipo"),
        ("bf16: true\nfull: true\n", "--lora", "run.yaml:2: --bf16 is mixed precision, which goes with --full"),
        ("packing: [false, x]\n", "", "run.yaml:2: one value is taken there, got another, 'x'"),
        ("model: [a, --b]\n", "", "run.yaml:2: model: no value of its list begins with --, got '--b'"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_command_line_is_told_with_its_line(parsed, capsys, text, words, message):
    with pytest.raises(SystemExit):
        parsed("data: a\n" + text, *words.split())
    assert message in capsys.readouterr().err


def test_a_name_that_stands_for_an_option_of_another_command(parsed, capsys):
    with pytest.raises(SystemExit):
        parsed("data: a\nscale_rewards: none\n", command="reward")
    message = "run.yaml:2: it stands for --advantage, which xpo-fast reward does not have"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_numbers_inside_a_value_are_read_as_json_reads_them(parsed, name):
    text = (
        '{"data": "a", "set": {"weights": [1.0, 1e-1, Infinity]}, '
        '"train": {"lr_scheduler_kwargs": {"num_cycles": 5e-1, "a": "1"}}}'
    )
    found = parsed(text, name=name)
    assert found["set"] == [("weights", [1.0, 0.1, float("inf")])]
    assert found["train"] == [("lr_scheduler_kwargs", {"num_cycles": 0.5, "a": "1"})]


def test_yaml_writes_of_numbers_and_words_inside_a_value(parsed):
    found = parsed("data: a\nset: {weights: [.5, -.inf, yes, ~, 2026-01-01, '1e-1', sgd], clip: .inf}\n")
    assert dict(found["set"]) == {
        "weights": [0.5, float("-inf"), True, None, "2026-01-01", "1e-1", "sgd"], "clip": float("inf"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: a\nlerning-rate: 1\n",
         "run.yaml:2: xpo-fast train has no option lerning-rate; did you mean learning_rate"),
        ("data: a\nlr: abc\n", "run.yaml:2: argument --lr: invalid float value: 'abc'"),
        ("data: a\n\nreference: adaptor\n", "run.yaml:3: argument --reference: invalid choice: 'adaptor'"),
        ("data: a\nset: beta\n", "run.yaml:2: argument --set: expected NAME=VALUE, got 'beta'"),
        ("data: a\nfull: maybe\n", "run.yaml:2: argument --full: expected true or false, got 'maybe'"),
        ("data: a\nmodel: [a, b]\n", "run.yaml:2: argument --model: takes one value, got another, 'b'"),
        ("data: a\nmodel: {a: b}\n", "run.yaml:2: model takes one value, got a mapping"),
        ("data: a\nlr: 1\nlr: 2\n", "run.yaml:3: lr came twice"),
        ("data: a\neval_packing: true\n", "run.yaml:2: --eval_packing true: evaluations read rows in the layout of"),
        ("data: a\nlora: true\nfull: true\n", "argument --full: not allowed with argument --lora"),
        ("data: a\nconfig: b.yaml\n", "run.yaml:2: a configuration cannot name another one"),
        ("lr: 1\n", "the following arguments are required: --data"),
        ("- data\n", "run.yaml: expected options, one NAME: VALUE per line, got a sequence"),
        ("data: a\n  lr: [\n", "run.yaml:2: not valid YAML"),
        ("data: a\nnum_generations: 4\n", "run.yaml:2: xpo-fast train has no option num_generations"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_told_with_its_line(parsed, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        parsed(text)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2 and message in lines[0], lines


def test_settings_of_rl_in_a_file(parsed, capsys):
    text = "data: a\nmethod: grpo\nset: {kl_horizon: 5, value_clip: 0.1}\n"
    found = parsed(text, "--method", "dapo", "--set", "value_clip=0.3", command="rl")
    assert dict(found["set"]) == {"kl_horizon": 5, "value_clip": 0.3}
    with pytest.raises(SystemExit):
        parsed("data: a\nkl-horizon: 5\n", command="rl")
    assert "run.yaml:2: --kl-horizon is a value of --set: write --set kl_horizon=5" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"data": }'])
def test_json_that_is_none_is_told(parsed, capsys, text):
    with pytest.raises(SystemExit):
        parsed(text, name="run.json")
    assert "run.json:1: not valid JSON" in capsys.readouterr().err


def test_two_files(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", "a.yaml", "--config=b.yaml"])
    assert "--config came twice; write the options into one file" in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", "nowhere.yaml"])
    assert "--config nowhere.yaml: cannot be read (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--data", "a b.jsonl", "--set", "beta=0.1", "--set", 'loss="true"', "--set", "f=word",
                   "--lr", "1e-7", "--eval-split", "0.25", "--warmup-steps", "3",
                   "--train", 'lr_scheduler_kwargs={"a": [1, null]}', "--full"]),
        ("train", ["--data", "a", "--eval-data", "b", "--set", "clamp=false", "--set", "weights=[1, 0.1]",
                   "--push-to-hub", "--quantize", "4bit", "--lora", "--optim", "sgd", "--model", "1.10",
                   "--max-steps", "-1"]),
        ("reward", ["--data", "a", "--objectives", "x,y", "--objective-weights", "0.1,2", "--head-only",
                    "--push-to-hub", "n"]),
        ("rl", ["--data", "a", "--eval-data", "b", "--reward", "f.py:g=0.5", "--reward", "h.py:i", "--stop", "\n",
                "--stop", "1",
                "--api-key", "secret", "--top-p", "0.9", "--advantage", "gae"]),
        ("rl", ["--data=--a", "--data", "b", "--stop=--END", "--stop=-1", "--set", "eps=Infinity",
                "--set", "x=[1e-7, -Infinity]",
                "--run_name", "12"]),
        ("eval-reward", ["--data", "a", "--model", "m", "--model", "n", "--beta", "0.2"]),
        ("recipe", ["raft", "--data", "a", "--judge", "llm", "--set", "draws.n=4", "--train", "warmup_steps=10"]),
    ],
)  # fmt: skip
def test_what_is_written_is_read_as_the_same_options(tmp_path, command, words):
    args = cli.parse([command, *words, "--output-dir", str(tmp_path / "out")])
    config_file.write(args, tmp_path / "out", command)
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "secret" not in text and text.startswith("# Written by xpo-fast ")
    name = words[:1] if command == "recipe" else []
    back = cli.parse([command, *name, "--config", str(tmp_path / "out" / "config.yaml")])
    kept = [{k: v for k, v in vars(a).items() if k not in NOT_OF_A_RUN} for a in (args, back)]
    assert kept[0] == kept[1]


def test_a_run_is_repeated_to_the_bit_by_the_file_that_it_wrote(home, tmp_path, capsys):  # noqa: F811
    first, second = tmp_path / "a b", tmp_path / "second"
    assert (
        train(home, first, "--max-steps", "4", "--lr", "0.02", "--set", "beta=0.3", "--seed", "7", "--eval-split", "4")
        == 0
    )
    again = (first / "config.yaml").read_text().splitlines()[1]
    assert again == f"# xpo-fast train --config '{first}/config.yaml' --output-dir '{first}-2'"
    assert cli.main(["train", "--config", str(first / "config.yaml"), "--output-dir", str(second)]) == 0
    losses = [[e["loss"] for e in log_of(folder) if "loss" in e] for folder in (first, second)]
    results = [json.loads((folder / "results.json").read_text())["after"] for folder in (first, second)]
    assert len(losses[0]) == 4 and losses[0] == losses[1] and results[0] == results[1]
    # Going on with a run leaves what it began with.
    before = (second / "config.yaml").read_text()
    assert re.search("^max-steps: 4$", before, re.MULTILINE)
    words = ["train", "--config", str(second / "config.yaml"), "--max-steps", "5", "--resume"]
    assert cli.main(words) == 0 and (second / "config.yaml").read_text() == before
    assert log_of(second)[-2]["step"] == 5 or log_of(second)[-1]["step"] == 5
    capsys.readouterr()


@pytest.mark.parametrize("command", ["reward", "rl"])
def test_other_commands_write_the_file_too(home, tmp_path, capsys, command):  # noqa: F811
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in make_rows(4)))
    (tmp_path / "short.py").write_text(
        "def short(completion_ids, **given):\n    return [-len(c) for c in completion_ids]\n"
    )
    more = {
        "reward": ["--data", str(home / "pairs.jsonl")],
        "rl": [
            "--data",
            str(prompts),
            "--reward",
            f"{tmp_path}/short.py:short",
            "--max-new-tokens",
            "3",
            "--num-generations",
            "2",
        ],
    }[command]
    words = ["--model", str(home / "model"), "--cpu", "--max-steps", "1", "--batch-size", "4", "--output-dir", str(out)]
    assert cli.main([command, *more, *words]) == 0
    back = cli.parse([command, "--config", str(out / "config.yaml")])
    assert (back.model, back.max_steps, back.cpu) == (str(home / "model"), 1, True)
    capsys.readouterr()
