"""A rank that is killed: the others end and say so, and `--resume auto` goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import threading
import time
from functools import partial

import pytest
from safetensors.torch import load_file

from ranks import run_world
from test_trainer import make_model, make_tokenizer
from xpo_fast import cli


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    rows = [{"prompt": f"w{i} w2", "chosen": f" w{i + 1} w3", "rejected": f" w{90 - i}"} for i in range(24)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def train(home, output, *options) -> int:
    return cli.main([
        "train", "--data", str(home / "pairs.jsonl"), "--model", str(home / "model"), "--output-dir", str(output),
        "--cpu", "--batch-size", "2", "--logging-steps", "1", "--save-steps", "2", "--max-steps", "6", "--lr", "1e-2",
        "--lora-targets", "q_proj,v_proj", "--eval-split", "0", "--layout", "padded", "--preflight", "off",
        "--resume", "auto", *options,
    ])  # fmt: skip


def left(output) -> tuple[dict, list]:
    """The weights, and the loss and the norm of the gradient of each step."""
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return load_file(output / "adapter_model.safetensors"), [(x["loss"], x["grad_norm"]) for x in lines if "loss" in x]


def assert_same(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys() and all((a[0][k] == b[0][k]).all() for k in a[0])


def _run(home, output, killed: bool, rank: int) -> tuple[int, str, float]:
    """Trains; with `killed`, rank 1 kills itself soon after the checkpoint of step 2, and the others return when."""
    whole = output / "checkpoint-2" / "trainer_state.json"
    seen = []

    def watch() -> None:
        while not whole.is_file():
            time.sleep(0.005)
        seen.append(time.monotonic())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if killed:
        threading.Thread(target=watch, daemon=True).start()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = train(home, output)
    return status, said.getvalue(), time.monotonic() - seen[0] if seen else 0.0


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_as_it_was(home, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for status, said, _ in run_world(tmp_path / "undisturbed", 2, partial(_run, home, whole, False)):
        assert status == 0, said
    ((status, said, seconds),) = run_world(tmp_path / "killed", 2, partial(_run, home, part, True), lost=[1])
    assert status == 2 and seconds < 60
    assert "rank 0 of 2 stops: another process of this run has ended" in said
    assert "the same command with --resume goes on from it" in said
    assert not (part / "adapter_model.safetensors").exists()
    for status, said, _ in run_world(tmp_path / "again", 2, partial(_run, home, part, False)):
        assert status == 0, said
    assert_same(left(whole), left(part))


def test_auto_begins_where_there_is_no_whole_checkpoint(home, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(home, whole) == 0
    (part / "checkpoint-2").mkdir(parents=True)  # written half when the run was killed
    assert train(home, part) == 0
    assert_same(left(whole), left(part))
    shutil.rmtree(part / "checkpoint-6")
    (part / "adapter_model.safetensors").unlink()
    assert train(home, part) == 0  # from step 4
    assert_same(left(whole), left(part))
    assert train(home, part) == 0  # from step 6, which was the last
    assert json.loads((part / "trainer_state.json").read_text())["global_step"] == 6
    assert_same(left(whole), left(part))
