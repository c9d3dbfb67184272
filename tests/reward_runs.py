"""What tests of reward models share: rows, a model of rewards far from mean 0 and deviation 1, and the command."""

from __future__ import annotations

import json
import re

import pytest
import torch

from test_reward_model import make_samples
from test_trainer import make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.models.value_head import attach_value_head
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.spec import RewardSpec


def scorer(**spec) -> RewardModel:
    """A reward model whose rewards are far from mean 0 and deviation 1."""
    model = make_model()
    head = attach_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1.0, 2.0, 32))
        head.bias.fill_(7.0)
    return RewardModel(model, make_tokenizer(), RewardSpec(**spec))


ROWS = make_rows(6)
PROMPTS = [row["prompt"] for row in ROWS]
SIDES = [[row[name] for row in ROWS] for name in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    files = {"pairs": make_rows(12), "samples": make_samples(), "judged": make_rows(12, "unpaired", seed=2)}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    for command in ("eval_reward", "reward"):
        monkeypatch.setattr(f"xpo_fast.cli.{command}.can_plot", lambda: False)


def run(*options) -> int:
    return cli.main([str(option) for option in options])


def reward(home, output, *options, model=None) -> int:
    fixed = ("--cpu", "--batch-size", 4, "--logging-steps", 1, "--lora-targets", "q_proj,v_proj", "--max-length", 64)
    given = ("--data", home / "pairs.jsonl", "--model", model or home / "model", "--output-dir", output)
    return run("reward", *given, *fixed, "--preflight", "off", "--eval-split", 0, *options)


def log_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not re.search("second|time|train_loss", k)} for line in lines]
