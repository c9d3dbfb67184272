"""Online RL on several processes: the same run as on one, where the samples are the same."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from ranks import run_world
from test_rl import NEW, assert_same_gradients, make_tokenizer, make_trainer, step
from xpo_fast.rollout import Samples


class Fixed:
    """A rollout whose completions follow from the prompt and the copy alone, however prompts are shared out."""

    def update(self, model) -> None:
        pass

    def generate(self, prompts, n=1, *, sampling, seed):
        tokenizer = make_tokenizer()
        rows = [(p, random.Random(f"{p}/{k}")) for p in prompts for k in range(n)]
        ids = [[r.randrange(3, 90) for _ in range(r.randrange(1, NEW + 1))] for _, r in rows]
        return Samples(
            [p for p, _ in rows], [tokenizer(p)["input_ids"] for p, _ in rows], ids, tokenizer.batch_decode(ids),
            ["stop"] * len(rows),
        )  # fmt: skip


ON_TWO_RANKS = {"grpo": {}, "ppo": {"kl_coef": 0.1, "epochs_per_rollout": 2}, "bnpo": {}}


def fixed_run(folder: Path, method: str, ranks: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4 // ranks}
    trainer = make_trainer(
        folder, with_holes_by_id, method=method, prompts_per_rollout=4, max_steps=2, **cut, **ON_TWO_RANKS[method]
    )
    trainer.rollout = Fixed()
    _, gradients = step(trainer)
    timed = ("time", "_second")
    logs = [{k: v for k, v in log.items() if not any(t in k for t in timed)} for log in trainer.state.log_history[:2]]
    return logs, gradients


def with_holes_by_id(completion_ids, **_):
    return [math.nan if ids[0] % 5 == 0 else sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def _on_two_ranks(folder: Path, rank: int) -> dict:
    return {method: fixed_run(folder / method, method, 2) for method in ON_TWO_RANKS}


def test_two_processes_train_as_one(tmp_path):
    """Rollouts shared out, advantages of all rows together, and denominators of the whole step."""
    found = run_world(tmp_path / "two", 2, partial(_on_two_ranks, tmp_path))[0]
    for method, (logs, gradients) in found.items():
        want_logs, want = fixed_run(tmp_path / f"one-{method}", method, 1)
        gradients = {n.removeprefix("module."): g for n, g in gradients.items()}
        assert_same_gradients(want, gradients, rtol=1e-5)
        assert want_logs[0]["unrewarded"] > 0
        for a, b in zip(want_logs, logs, strict=True):
            for name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (method, name)
