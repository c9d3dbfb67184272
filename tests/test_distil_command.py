"""`xpo-fast distill`: a run and its resumed half, on-policy, several teachers, dry run, refusals by name."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest

from test_distil_trainer import wider
from test_trainer import PEFT_WARNING, VOCAB, WORDS, make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.cli.distill import weighted
from xpo_fast.cli.parser import UsageError

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    teachers = {"teacher": wider(), "other": wider(6), "larger": wider(7, vocab_size=VOCAB + 7), "model": make_model()}
    for name, model in {**teachers, "shuffled": wider(8), "smaller": wider(9, vocab_size=VOCAB - 2)}.items():
        model.save_pretrained(home / name)
        words = [*WORDS[1:], WORDS[0]] if name == "shuffled" else WORDS
        make_tokenizer(vocabulary=words).save_pretrained(home / name)
    rows = [{"prompt": f"{WORDS[i]} w2", "completion": f" {WORDS[i + 1]} w3"} for i in range(12)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def distill(home, output, *options, teacher="teacher") -> int:
    names = [str(home / name) for name in teacher.split()]
    return cli.main([
        "distill", "--teacher", *names, "--data", str(home / "rows.jsonl"), "--model", str(home / "model"),
        "--output-dir", str(output), "--cpu", "--batch-size", "4", "--logging-steps", "1", "--lora-targets",
        "q_proj,v_proj", *options,
    ])  # fmt: skip


def results(output) -> dict:
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("options", [(), ("--on-policy", "0.5", "--max-new-tokens", "4", "--method", "reverse_kl")])
def test_a_run_and_a_resumed_one_that_ends_alike(home, tmp_path, capsys, options):
    whole, part = tmp_path / "whole", tmp_path / "part"
    how = ("--eval-split", "2", "--lr", "2e-2", "--max-steps", "4", "--save-steps", "2", *options)
    assert distill(home, whole, *how) == 0
    shown = capsys.readouterr().out
    assert f"reference  teacher: {home / 'teacher'}" in shown and "Fault" not in shown and "held out: 2 rows" in shown
    assert ("on-policy  0.5 of the steps" in shown) == bool(options)
    found = results(whole)
    assert found["command"] == "distill"
    if not options:
        assert found["after"]["eval_loss"] != found["before"]["eval_loss"]
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-4")
    (part / "results.json").unlink()
    assert distill(home, part, *how, "--resume") == 0
    assert results(part)["after"]["eval_loss"] == found["after"]["eval_loss"]
    shutil.rmtree(part / "checkpoint-4")
    assert distill(home, part, *how, "--resume", teacher="other") == 2
    assert "teacher" in capsys.readouterr().err


def test_every_weight_of_teachers_by_shares_on_its_own_completions(home, tmp_path, capsys):
    how = ("--full", "--method", "sampled_kl", "--on-policy", "--max-new-tokens", "3", "--max-steps", "2")
    assert distill(home, tmp_path / "out", *how, teacher="teacher:3 other") == 0
    shown = capsys.readouterr().out
    assert f"0.75*{home / 'teacher'} + 0.25*{home / 'other'}" in shown and "full fine-tuning" in shown
    logged = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert all(line["on_policy"] == 1 for line in logged if "loss" in line)


def test_dry_run(home, tmp_path, capsys):
    assert distill(home, tmp_path / "out", "--dry-run", teacher="teacher larger:0.5") == 0
    shown = capsys.readouterr().out
    assert f"1*{home / 'teacher'}, 0.5*{home / 'larger'}" in shown and "gkd(beta=0.5, temperature=1.0)" in shown
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_has_spoken_before(home, tmp_path, capsys):
    """The folder has the teacher's tokens of every row, and train learns of them without the teacher."""
    folder = tmp_path / "spoken"
    cached = ("distill", "--teacher", str(home / "larger"), "--data", str(home / "rows.jsonl"), "--model")
    cached = (*cached, str(home / "model"), "--cpu", "--batch-size", "4", "--cache-teacher", str(folder))
    assert cli.main([*cached, "--cache-tokens", "5"]) == 0
    assert f"--method topk_kl --model {home / 'model'} --data {folder}" in capsys.readouterr().out
    found = datasets.Dataset.load_from_disk(str(folder))
    assert len(found) == 12 and not (tmp_path / "out").exists()
    assert all(len(one) == 5 and max(one) < VOCAB for row in found.to_list() for one in row["topk_ids"])
    how = ("--method", "topk_kl", "--model", str(home / "model"), "--cpu", "--lora-targets", "q_proj,v_proj")
    how = (*how, "--batch-size", "4", "--max-steps", "6", "--lr", "2e-2", "--eval-data", str(folder))
    assert cli.main(["train", *how, "--data", str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    before, after = (results(tmp_path / "out")[name]["eval_loss"] for name in ("before", "after"))
    assert after < before
    for data, further, said in (
        (folder, ("--dry-run",), "--dry-run: of rows of text"),
        (folder, ("--fit",), "--fit: of rows of text"),
        (home / "rows.jsonl", (), "distill --cache-teacher DIR has written"),
        (folder, ("--data", str(folder), str(folder)), "one folder"),
    ):
        assert cli.main(["train", *how, "--data", str(data), "--output-dir", str(tmp_path / "no"), *further]) == 2
        assert said in capsys.readouterr().err
    for further, said in (
        ((), "name a new folder"),
        (("--teacher", str(home / "other")), "tokens of one teacher, got 2"),
        (("--lr", "1e-3", "--resume"), "does not read --lr, --resume"),
    ):
        assert cli.main([*cached, *further]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "teacher", "said"),
    [
        (("--method", "gdk"), "teacher", "no method named 'gdk'"),
        (("--method", "dpo"), "teacher", "dpo learns of no teacher: expected forward_kl, reverse_kl, gkd, sampled_kl"),
        (("--method", "sampled_kl"), "teacher", "set on_policy=1, got 0"),
        (("--on-policy", "1.5"), "teacher", "from 0 to 1"),
        (("--temperature", "0.5"), "teacher", "--temperature is for --on-policy"),
        (("--fit",), "teacher", "leave --fit out"),
        (("--set", "lmbda=1"), "teacher", "has no hyperparameter lmbda"),
        (("--teachr", "x"), "teacher", "--teacher"),
        ((), "teachr", "teacher"),
        ((), "shuffled", "the teacher's tokenizer is not the student's"),
        (("--dry-run",), "shuffled", "the teacher's tokenizer is not the student's"),
        ((), "smaller", "does not hold the student's of 97"),
        ((), "teacher:0", "with a weight > 0"),
        ((), "teacher:x", "with a weight > 0, such as"),
        (("--cache-tokens", "3"), "teacher", "is for --cache-teacher"),
        (("--cache-teacher", "new", "--on-policy"), "teacher", "does not read --on-policy"),
        (("--method", "topk_kl"), "teacher", "reads what a teacher has said before"),
        (("--stop", "w3"), "teacher", "--stop is for --on-policy"),
        (("--stop", "", "--on-policy"), "teacher", "stop"),
    ],
    ids=str,
)
def test_refusals(home, tmp_path, capsys, options, teacher, said):
    try:
        code = distill(home, tmp_path / "out", *options, teacher=teacher)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--method", "gkd"),
        ("train", "--method", "sampled_kl", "--dry-run"),
        ("check", "--method", "gkd"),
        ("cache-reference", "--method", "reverse_kl"),
        ("rl", "--method", "sampled_kl", "--reward", "math:sin"),
    ],
    ids=" ".join,
)
def test_other_commands_name_this_one(home, tmp_path, capsys, words):
    how = ("--data", str(home / "rows.jsonl"), "--model", str(home / "model"), "--cpu")
    assert cli.main([*words, *how]) == 2
    assert "another model: train by xpo-fast distill --teacher MODEL" in capsys.readouterr().err


def test_names_with_weights(tmp_path):
    assert weighted("a/b:0.5") == ("a/b", 0.5) and weighted("a/b") == ("a/b", 1.0)
    assert weighted("c:/models/x") == ("c:/models/x", 1.0)
    (tmp_path / "run:2").mkdir()
    assert weighted(f"{tmp_path}/run:2") == (f"{tmp_path}/run:2", 1.0)
    assert weighted(f"{tmp_path}/run:2:3") == (f"{tmp_path}/run:2", 3.0)
    for text in ("a:-1", "a:x", "a:", "a:nan", ":2"):
        with pytest.raises(UsageError, match="weight > 0"):
            weighted(text)
