"""Online RL in layouts: the same run as on padded rows, with each prompt read once per micro-batch.

Completions follow from the prompt and the copy, so that runs differ in the layout alone. Steps are those of SGD: AdamW
divides a gradient that is rounding alone by its own size.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ranks import run_world
from test_rl import PEFT_WARNING, assert_same_gradients, lora, make_model, make_tokenizer, make_trainer, step
from test_rl_resume import timeless
from xpo_fast.layouts import check
from xpo_fast.objective import Objective
from xpo_fast.rl import last_checkpoint
from xpo_fast.rl.experience import cuts_freely
from xpo_fast.rollout import Samples, sample_logps

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

SYSTEM = "w80 w81 w82 w83 w84 w85 w86 w87 w88"
PROMPTS = [{"prompt": f"{SYSTEM} {text}"} for text in ("w1 w2", "w3", "w4 w5 w6 w7 w8 w9 w10 w11", "w7 w8")]
NEW = 6
TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(7)]


class Fixed:
    """A rollout of ragged completions, of one token, too, some of which begin alike."""

    def update(self, model) -> None:
        pass

    def generate(self, prompts, n=1, *, sampling, seed):
        tokenizer, ids = make_tokenizer(), []
        for prompt in prompts:
            for k in range(n):
                draw = random.Random(f"{prompt}/{k}")
                begins = [3 + k % 2] * draw.randrange(NEW - 1)
                ids.append([*begins, *(draw.randrange(3, 90) for _ in range(draw.randrange(1, NEW - len(begins) + 1)))])
        texts = [p for p in prompts for _ in range(n)]
        return Samples(
            texts, [tokenizer(p)["input_ids"] for p in texts], ids, tokenizer.batch_decode(ids), ["stop"] * len(ids)
        )


def rewards(completion_ids, **_):
    """Some completions have none."""
    return [math.nan if ids[-1] % 5 == 0 else sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def by_ids(completion_ids, **_):
    """None is its group's mean, so that no completion is spared."""
    return [math.sqrt(sum(ids)) for ids in completion_ids]


def one_prompt_differs(completion_ids, prompt_index, **_):
    """All completions but those of one prompt have one reward."""
    return [float(len(ids)) if i == 1 else 1.0 for ids, i in zip(completion_ids, prompt_index, strict=True)]


CASES = {
    "grpo": {"method_args": {"beta": 0.1}, "epochs_per_rollout": 2},
    "spared": {"method": "grpo"},
    "adapter": {"method": "grpo", "method_args": {"beta": 0.1}, "peft_config": lora(), "learning_rate": 0.3},
    "averaged adapter": {
        "method": "grpo", "method_args": {"beta": 0.1}, "peft_config": lora(), "ref_mixin": 0.5, "learning_rate": 0.3,
    },
    "ppo": {"kl_coef": 0.1, "epochs_per_rollout": 2, "ref_mixin": 0.5},
    "ppo_ptx": {"method_args": {"gamma": 0.5}, "kl_coef": 0.1, "ptx_dataset": TEXTS},
    "rloo": {}, "gspo": {"epochs_per_rollout": 2}, "bnpo": {}, "ppo_penalty": {"kl_coef": 0.0, "kl_target": 0.1},
}  # fmt: skip


def trainer_of(folder: Path, name: str, layout: str, score=rewards, **args):
    """Of 16 completions of 4 prompts in a step of micro-batches of 4."""
    given = {
        "method": name, "prompts_per_rollout": 4, "gradient_accumulation_steps": 4, "prompts": PROMPTS,
        "max_new_tokens": NEW, "per_device_eval_batch_size": 4, "optim": "sgd", "learning_rate": 0.03, "max_steps": 3,
        "max_grad_norm": 1.0,
        **CASES.get(name, {}), **args,
    }  # fmt: skip
    trainer = make_trainer(folder, score, layout=layout, **given)
    trainer.rollout = Fixed()
    return trainer


def run(folder: Path, name: str, layout: str, score=rewards, **args):
    """The logs, the first gradients, and what training has added to the weights."""
    trainer = trainer_of(folder, name, layout, score, **args)
    trained = {n: p for n, p in trainer.policy.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    assert trainer.layout is None
    _, gradients = step(trainer)
    assert trainer.layout.layout == layout
    logs = [timeless(log) for log in trainer.state.log_history[:-1]]
    assert all((log.pop("tokens_saved") > 0) == (layout != "padded") for log in logs)
    return logs, gradients, {n: p.detach() - before[n] for n, p in trained.items()}


def assert_same_run(want, got) -> None:
    assert len(want[0]) == len(got[0]) >= 2
    for a, b in zip(want[0], got[0], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5, nan_ok=True), name
    assert_same_gradients(want[1], got[1], rtol=1e-5)
    assert_same_gradients(want[2], got[2], rtol=1e-4)  # float32 rounds weights to 1e-5 of it


def lengths_read(trainer) -> list[list[int]]:
    """The lengths of the sequences of each forward from now on: of its tokens (R, T)."""
    found: list[list[int]] = []
    backbone = trainer.policy.get_decoder()
    backbone.embed_tokens.register_forward_hook(lambda module, args, out: found.append(list(args[0].shape)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_on_padded_rows(tmp_path, name):
    want = run(tmp_path / "padded", name, "padded")
    for layout in ("packed", "shared"):
        assert_same_run(want, run(tmp_path / layout, name, layout))


def test_groups_meet_where_the_cut_is_free():
    assert cuts_freely(Objective("grpo")) and cuts_freely(Objective("ppo + 0.5*rloo"))
    assert not cuts_freely(Objective("bnpo")) and not cuts_freely(Objective("grpo + ppo_ptx"))


@pytest.mark.parametrize(("name", "meet"), [("grpo", True), ("spared", True), ("bnpo", False)])
def test_a_prompt_is_read_once_per_micro_batch(tmp_path, name, meet):
    """meet: a prompt's completions share a micro-batch; if they must not, what happens to meet there is read once."""
    trainer = trainer_of(tmp_path, name, "shared", by_ids, max_steps=1, preflight="off")
    batches = []
    inner = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: batches.append(inputs) or inner(model, inputs, *rest)
    read = lengths_read(trainer)
    trainer.train()
    texts = [
        [ids[:size] for ids, size in zip(b["input_ids"].tolist(), b["attention_mask"].sum(dim=1).tolist(), strict=True)]
        for b in batches
    ]
    assert all((len({row[9] for row in of}) == 1) == meet for of in texts)
    tokens = [len(b["layout"]) for b in batches]
    assert read[-4:] == [[1, n] for n in tokens]
    for n, of in zip(tokens, texts, strict=True):
        tree = len({tuple(row[:k]) for row in of for k in range(1, len(row) + 1)})  # where each beginning stands once
        assert tree <= n <= tree + 8 and n < 0.8 * sum(map(len, of))
    if name == "grpo":  # whose log-probs have been measured before, in the same batches
        assert read[-8:-4] == read[-4:]


def test_scores_of_tokens_are_those_of_padded_rows():
    samples = Fixed().generate([row["prompt"] for row in PROMPTS], 3, sampling=None, seed=0)
    samples.completion_ids[4] = []
    model = make_model()
    want = sample_logps(model, samples, temperature=0.7, batch_size=4)
    assert want.abs().sum(dim=1)[[0, 4, 5]].gt(0).tolist() == [True, False, True]
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    tokens = []
    for layout in ("padded", "packed", "shared"):
        read.clear()
        found = sample_logps(model, samples, temperature=0.7, batch_size=4, layout=layout)
        assert torch.allclose(found, want, atol=1e-5)
        tokens.append(sum(read))
    assert tokens[0] > tokens[1] > 1.5 * tokens[2]


def test_nothing_to_learn_from(tmp_path):
    """A micro-batch without a row is a single token, in every layout."""
    trainer = trainer_of(tmp_path, "spared", "shared", lambda completions, **_: [1.0] * len(completions), max_steps=1)
    read = lengths_read(trainer)
    _, gradients = step(trainer)
    assert read[-4:] == [[1, 1]] * 4 and gradients and not any(g.any() for g in gradients.values())


def test_auto_takes_what_saves_most_and_says_so(tmp_path, caplog):
    with caplog.at_level("INFO", logger="xpo_fast"):
        trainer = trainer_of(tmp_path, "grpo", "auto", max_steps=1)
        trainer.train()
    padded, packed, shared = trainer.layout.tokens
    assert trainer.layout.layout == "shared" and shared < 0.6 * packed < packed <= padded
    assert "layout shared: what rows begin with in common is read once" in caplog.text
    assert f"{shared:,} of {padded:,} positions" in caplog.text and "of 3 rows, log-probs differ by" in caplog.text


def test_a_layout_that_does_not_prove_itself_is_not_used(tmp_path, caplog, monkeypatch):
    """Positions that are not those in the rows."""
    right = check.lay_out

    def wrong(*args, **how):
        layout = right(*args, **how)
        return replace(layout, positions=torch.arange(len(layout)))

    monkeypatch.setattr(check, "lay_out", wrong)
    trainer = trainer_of(tmp_path, "grpo", "auto", max_steps=1)
    trainer.train()
    assert trainer.layout.layout == "padded" and "shared did not prove itself" in trainer.layout.why
    assert "layout shared is not used, rows stay padded" in caplog.text


def test_a_check_with_a_rollout_reads_it_as_the_run_will(tmp_path):
    trainer = trainer_of(tmp_path, "grpo", "shared")
    read = lengths_read(trainer)
    report = trainer.preflight(sample=True)
    assert not report.faults and trainer.layout.layout == "shared" and read[-1][0] == 1
    assert any("log-probs are those of the model's own logits" in f.text for f in report.findings)


@pytest.mark.parametrize("after", [1, 2])  # within a rollout, and between two
def test_a_resumed_run_keeps_its_layout(tmp_path, after):
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = trainer_of(tmp_path / "whole", "ppo", "packed", **args)
    whole.train()
    folder = tmp_path / "again" / "out"
    shutil.copytree(whole.args.output_dir, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > after:
            shutil.rmtree(path)
    assert "xpo_fast" not in (folder / f"checkpoint-{after}" / "config.json").read_text()
    trainer = trainer_of(tmp_path / "again", "ppo", "auto", **args)  # which would take shared
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    assert str(trainer.layout).startswith("packed: as before the checkpoint")
    for (name, a), b in zip(whole.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [timeless(x) for x in trainer.state.log_history] == [timeless(x) for x in whole.state.log_history]
    assert json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])["rollout"] == 1


ON_TWO_RANKS = {"ppo": rewards, "spared": one_prompt_differs}


def _on_two_ranks(folder: Path, rank: int) -> dict:
    # One prompt's rows in a step of "spared" are one micro-batch: the other process has none.
    return {
        name: run(folder / name, name, "shared", score, gradient_accumulation_steps=2, max_steps=2)
        for name, score in ON_TWO_RANKS.items()
    }


def test_two_processes_train_as_one_on_padded_rows(tmp_path):
    found = run_world(tmp_path / "two", 2, partial(_on_two_ranks, tmp_path))[0]
    for name, (logs, gradients, weights) in found.items():
        gradients = {n.removeprefix("module."): g for n, g in gradients.items()}
        want = run(tmp_path / f"one-{name}", name, "padded", ON_TWO_RANKS[name], max_steps=2)
        assert_same_run(want, (logs, gradients, weights))
