"""A resumed online run is the run that was stopped: nothing is lost, repeated, or drawn again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_rl import PROMPTS, make_trainer
from xpo_fast.rl import STATE_FILE, last_checkpoint

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "rl_resume.py"
# Four steps a rollout, a checkpoint after every step.
ARGS = {
    "method": "ppo", "prompts_per_rollout": 4, "epochs_per_rollout": 2, "max_steps": 6, "save_strategy": "steps",
    "save_steps": 1, "kl_coef": 0.1, "kl_target": 0.1, "kl_horizon": 50, "ref_mixin": 0.3, "logging_steps": 4,
}  # fmt: skip


def timeless(log):
    return {
        k: v for k, v in log.items() if "time" not in k and "_second" not in k and k not in ("train_loss", "total_flos")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is left alone."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), **ARGS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("after", [2, 4])  # within a rollout, and between two
def test_resumed_is_the_same(tmp_path, whole, after):
    folder = tmp_path / "out"
    shutil.copytree(whole.args.output_dir, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > after:
            (path / "trainer_state.json").write_text('{"global_')  # as a run leaves it that dies here
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"rollout": 1, "half a li')
    assert last_checkpoint(folder) == str(folder / f"checkpoint-{after}")
    trainer = make_trainer(tmp_path, **ARGS)
    trainer.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [timeless(x) for x in trainer.state.log_history] == [timeless(x) for x in whole.state.log_history]
    assert trainer.progress == whole.progress
    for a, b in zip(whole.moving_reference.copy.parameters(), trainer.moving_reference.copy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (folder / "samples.jsonl").read_bytes() == (Path(whole.args.output_dir) / "samples.jsonl").read_bytes()
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["rollout"] for row in rows] == [0] * 16 + [1] * 16


def test_a_checkpoint_of_another_run_is_refused(tmp_path, whole):
    checkpoint = last_checkpoint(whole.args.output_dir)
    other = make_trainer(tmp_path, **{**ARGS, "epochs_per_rollout": 1})
    with pytest.raises(ValueError, match="another run, where steps_per_rollout was 4 and is 2"):
        other.train(resume_from_checkpoint=checkpoint)
    for change, said in (
        ({"prompts": [*PROMPTS[:-1], {"prompt": "w9 w9"}]}, "data was"),
        ({"temperature": 0.9}, "sampling was .*temperature=0.9"),
        ({"method": "ppo_penalty", "kl_coef": None, "kl_target": 1.0, "ref_mixin": 0.0}, "method was ppo"),
        (
            {"rewards": lambda completion_ids, **_: [0.0] * len(completion_ids)},
            "rewards was .*share_of_even.* is .*lambda",
        ),
    ):
        with pytest.raises(ValueError, match=f"another run, where .*{said}"):
            make_trainer(tmp_path, **{**ARGS, **change}).train(resume_from_checkpoint=checkpoint)
    told = make_trainer(tmp_path, **ARGS)
    told.processing_class.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="another run, where chat template was"):
        told.train(resume_from_checkpoint=checkpoint)
    incomplete = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, incomplete)
    (incomplete / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=r"no rl_state\.pt"):
        make_trainer(tmp_path, **ARGS).train(resume_from_checkpoint=str(incomplete))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make_trainer(tmp_path / "empty", **ARGS).train(resume_from_checkpoint=True)


def test_a_new_run_begins_its_own_table(tmp_path):
    args = {**ARGS, "max_steps": 1, "save_strategy": "no"}
    for _ in range(2):
        make_trainer(tmp_path, **args).train()
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 16


def test_killed_twice(tmp_path):
    """SIGKILL at random points of a run in a process of its own; ten times: bench/rl_resume.py."""
    command = [sys.executable, SCRIPT, "--kills", "2", "--steps", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "are the same" in done.stdout
