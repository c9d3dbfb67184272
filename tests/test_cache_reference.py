"""`xpo-fast cache-reference`: a run after it computes no reference, and is the run without it."""

from __future__ import annotations

import json
import shlex

import pytest

from test_trainer import make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.trainer import reference


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    return home


def words(home, *more) -> list[str]:
    given = ["--model", home / "model", "--data", home / "pairs.jsonl", "--full", "--cpu", "--eval-split", "3"]
    return [str(x) for x in (*given, "--set", "beta=0.2", "--max-steps", 2, "--lr", 1e-2, "--batch-size", 4, *more)]


def losses(folder) -> list[float]:
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return [log["loss"] for log in map(json.loads, lines) if "loss" in log]


def test_a_run_after_it_computes_nothing(home, tmp_path, monkeypatch, capsys):
    assert cli.main(["cache-reference", *words(home, "--ref-cache", tmp_path / "ref")]) == 0
    said = capsys.readouterr().out.splitlines()
    (key,) = (path for path in (tmp_path / "ref").iterdir())
    assert said[-2] == f"reference log-probs of 12 rows in {tmp_path / 'ref'}, key {key.name}; they are read by"
    before = {path: path.stat().st_mtime_ns for path in key.glob("*.safetensors")}
    assert len(before) == 2 and not (tmp_path / "xpo-fast-out").exists()
    assert cli.main(["train", *words(home, "--reference", "copy", "--output-dir", tmp_path / "copied")]) == 0

    def computed(*args, **kwargs):
        raise AssertionError("the reference is in the cache")

    monkeypatch.setattr(reference, "dataset_logps", computed)
    command = shlex.split(said[-1])
    assert command[:2] == ["xpo-fast", "train"] and command[-4:-1] == ["--reference", "cached", "--ref-cache"]
    # What it says is the whole of the run but where that writes; another machine's folder is found by its content.
    (tmp_path / "ref").rename(tmp_path / "shipped")
    command[-1] = str(tmp_path / "shipped")
    monkeypatch.setattr("xpo_fast.trainer.XPOTrainer.held_out", lambda self: {"eval_loss": 0.0})
    assert cli.main([*command[1:], "--output-dir", str(tmp_path / "cached")]) == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "copied"), abs=1e-6)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shipped" / key.name).glob("*.safetensors")}
    assert after == {path.name: time for path, time in before.items()}


def test_it_goes_on_where_it_was_stopped(home, tmp_path, monkeypatch):
    inner, calls = reference.dataset_logps, []

    def dies(*args, **kwargs):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(reference, "SHARD_ROWS", 4)
    monkeypatch.setattr(reference, "dataset_logps", dies)
    assert cli.main(["cache-reference", *words(home, "--ref-cache", tmp_path / "ref")]) == 130
    assert cli.main(["cache-reference", *words(home, "--ref-cache", tmp_path / "ref")]) == 0
    assert calls == [4, 4, 1, 1, 3]  # 9 rows and 3 held out: the third shard again


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--method", "simpo"], "simpo has no reference policy"),
        (["--method", "tdpo"], "tdpo, set as it is, looks at the reference token by token"),
        (["--reference", "adapter"], "--reference adapter: this command makes the cached one"),
    ],
)
def test_what_has_nothing_to_cache_is_refused(home, tmp_path, capsys, given, says):
    taken = [word for word in words(home, *given) if word not in ("--set", "beta=0.2")]
    assert cli.main(["cache-reference", *taken]) == 2
    assert says in capsys.readouterr().err
