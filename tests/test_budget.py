"""Budgets of tokens: how units are cut, that a step is the same however it is cut, and what the log says of tokens."""

from __future__ import annotations

import functools
import logging
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import test_reward_model
import test_rl
import xpo_fast as xf
from ranks import run_world
from test_rl_parallel import Fixed, with_holes_by_id
from test_trainer import PEFT_WARNING, SHRINK, StopAt, assert_same_gradients, first_step, make_rows, make_trainer
from xpo_fast.layouts import Inputs, LaysOut, beside
from xpo_fast.layouts.rows import LEAST_SAVED
from xpo_fast.rl import RLConfig
from xpo_fast.trainer import XPOConfig
from xpo_fast.trainer.budget import Budget, KeepsUnits, LongestFirst, Size, computed, coupled, cut, unit_tokens
from xpo_fast.trainer.reference import batch_logps
from xpo_fast.trainer.throughput import Throughput, read_tokens

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

ROWS, TOKENS = 10, 60  # a step; most of its units are cut apart
SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}


def same(want: dict, got: dict, rtol: float = 2e-6) -> None:
    """The same but for what depends on time, and for what is saved, of which the cut decides a part."""
    assert want.keys() == got.keys()
    for name in want:
        if not name.endswith(("_second", "_runtime", "tokens_saved")) and "time" not in name:
            assert got[name] == pytest.approx(want[name], rel=rtol, abs=rtol), name


class Recorded:
    """Keeps the batches of a training, and those of an evaluation."""

    def __init__(self, trainer) -> None:
        self.batches, self.evaluated, self.loss = [], [], trainer._loss
        trainer._loss = self

    def __call__(self, model, inputs, denominator):
        (self.batches if model.training else self.evaluated).append(inputs)
        return self.loss(model, inputs, denominator)


# --- how units are cut --------------------------------------------------------------------------------------------

PADDED = st.builds(Size, st.integers(1, 5), st.integers(1, 50))
LAID_OUT = st.integers(1, 99).map(lambda n: Size(2, n, n))
FORWARDS = st.one_of(
    st.lists(st.tuples(PADDED), max_size=40),
    st.lists(st.tuples(LAID_OUT), max_size=40),
    st.lists(st.tuples(PADDED, PADDED), max_size=40),
    st.lists(st.tuples(LAID_OUT, LAID_OUT), max_size=40),
)


def tokens(forwards: list[Size]) -> int:
    """What units take together in one forward, counted one by one."""
    if forwards[0].laid_out is None:
        return len(forwards) * max(f.rows for f in forwards) * max(f.width for f in forwards)
    return sum(f.laid_out for f in forwards)


@settings(max_examples=300, deadline=None)
@given(sizes=FORWARDS, budget=st.integers(1, 300))
def test_every_unit_is_in_one_micro_batch_within_the_budget_and_the_longest_comes_first(sizes, budget):
    parts = cut(sizes, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    alone = [max(tokens([f]) for f in forwards) for forwards in sizes]
    for part in parts:
        takes = max(tokens(list(forwards)) for forwards in zip(*(sizes[i] for i in part), strict=True))
        assert takes <= budget or len(part) == 1
        assert [alone[i] for i in part] == sorted((alone[i] for i in part), reverse=True)
    firsts = [alone[part[0]] for part in parts]
    assert firsts == sorted(firsts, reverse=True) and (not firsts or firsts[0] == max(alone))
    # No two neighbours that would fit into one.
    for a, b in pairwise(parts):
        grown = [*(sizes[i] for i in a), sizes[b[0]]]
        assert max(tokens(list(forwards)) for forwards in zip(*grown, strict=True)) > budget


def test_what_all_units_begin_with_is_counted_once():
    sizes = [(Size(2, 30, 40),)] * 4
    assert [len(p) for p in cut(sizes, 100)] == [2, 2]
    assert [len(p) for p in cut(sizes, 100, common=20)] == [4]  # 20 + 4·20


def test_without_padding_room_is_used_and_with_it_lengths_are_kept_together():
    lengths = [60, 60, 40, 40]
    assert cut([(Size(1, n, n),) for n in lengths], 100) == [[0, 2], [1, 3]]
    assert cut([(Size(1, n),) for n in lengths], 100) == [[0], [1], [2, 3]]


class Texts:
    """A collator of rows `ids`, each a unit of one row that is read to its end."""

    def __call__(self, rows):
        width = max(len(row["ids"]) for row in rows)
        ids = torch.tensor([row["ids"] + [0] * (width - len(row["ids"])) for row in rows])
        mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "targets": torch.where(mask == 1, ids, -100)}


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=30), min_size=1, max_size=12),
    system=st.integers(0, 2 * LEAST_SAVED),
    budget=st.integers(1, 90),
    layout=st.sampled_from(["padded", "packed", "shared"]),
)
def test_a_layouts_own_tokens_are_within_the_budget(rows, system, budget, layout):
    collate = LaysOut(Texts(), layout)
    units = KeepsUnits(collate)([{"ids": [3] * system + row} for row in rows]).drawn
    found = Budget(budget, collate).numbered(units)
    assert sorted(i for part, _ in found for i in part) == list(range(len(rows)))
    for part, batch in found:
        assert computed(batch) <= budget or len(part) == 1
        assert [row[m == 1].tolist() for row, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == [
            [3] * system + rows[i] for i in part
        ]


# --- a step is the same however it is cut -------------------------------------------------------------------------


def a_step(folder: Path, method: str, **args):
    """The log and gradients of a step, an evaluation before it, and the batches of both."""
    kind = xf.Objective(method).data_kind
    trainer = make_trainer(folder, method=method, rows=ROWS, eval_rows=make_rows(7, kind, seed=5), **args)
    recorded = Recorded(trainer)
    trainer.prepare()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p *= SHRINK
    evaluated = trainer.evaluate()
    batches, trainer.state.log_history = recorded.evaluated, []
    recorded.evaluated = []
    log, gradients = first_step(trainer)
    return log, gradients, evaluated, recorded.batches, batches


@pytest.mark.parametrize(
    ("method", "layout"),
    [("dpo", "padded"), ("dpo", "packed"), ("dpo", "shared"), ("kto", "padded"), ("kto", "shared"), ("lipo", "packed"),
     ("lipo", "shared"), ("sft", "padded"), ("sft", "packed"), ("dpo + 0.5*sft", "shared")],
)  # fmt: skip
def test_a_step_equals_one_without_a_budget(tmp_path, method, layout):
    budget = 25 if method in ("kto", "sft") else TOKENS
    want_log, want, want_eval, *_ = a_step(
        tmp_path / "one", method, layout=layout, per_device_train_batch_size=ROWS, per_device_eval_batch_size=7
    )
    got_log, got, got_eval, trained, evaluated = a_step(
        tmp_path / "cut", method, layout=layout, tokens_per_batch=budget, per_device_eval_batch_size=2, **SMALL
    )
    assert method != "kto" or want_log["kl"] > 0.1
    same(want_log, got_log)
    same(want_eval, got_eval)
    assert_same_gradients(want, got)
    for batches, units in ((trained, ROWS), (evaluated, 7)):
        assert 1 < len(batches) < units
        for batch in batches:
            alone = batch.get("list_lengths", batch["targets"][:: 1 if budget == 25 else 2])
            assert computed(batch) <= budget or len(alone) == 1


@pytest.mark.parametrize("method", ["bradley_terry", "k_wise", "regression", "grm", "preference_model"])
def test_a_step_of_a_reward_model_equals_one_without_a_budget(tmp_path, method):
    def step(name: str, **args):
        trainer = test_reward_model.make_trainer(tmp_path / name, method, **args)
        recorded = Recorded(trainer)
        log, gradients = test_rl.step(trainer)
        return log, gradients, recorded.batches

    count = len(test_reward_model.rows_for(method))
    want_log, want, _ = step("one", per_device_train_batch_size=count)
    budget = 120 if method in ("k_wise", "preference_model") else 40
    got_log, got, batches = step(
        "cut", per_device_train_batch_size=2, gradient_accumulation_steps=-(-count // 2), tokens_per_batch=budget
    )
    same(want_log, got_log)
    assert_same_gradients(want, got, rtol=2e-6)
    assert 1 < len(batches) < count and all(computed(batch) <= budget for batch in batches)


@pytest.mark.parametrize("options", [{"method": "grpo"}, {"method": "ppo", "kl_coef": 0.1}, {"method": "dr_grpo"}])
def test_a_step_of_online_rl_equals_one_without_a_budget(tmp_path, options):
    def step(name: str, **args):
        trainer = test_rl.make_trainer(
            tmp_path / name, test_rl.with_holes, prompts_per_rollout=4, max_steps=2, **options, **args
        )
        recorded = Recorded(trainer)
        _, gradients = test_rl.step(trainer)
        return trainer.state.log_history[:2], gradients, recorded.batches

    want_logs, want, _ = step("one", per_device_train_batch_size=16, gradient_accumulation_steps=1)
    got_logs, got, batches = step(
        "cut", per_device_train_batch_size=4, gradient_accumulation_steps=4, tokens_per_batch=21
    )
    for a, b in zip(want_logs, got_logs, strict=True):
        same(a, b)
    assert_same_gradients(want, got, rtol=2e-6)
    assert {len(batch["targets"]) for batch in batches} != {4}
    assert all(computed(batch) <= 21 for batch in batches)


def test_the_log_of_online_rl_weighs_each_step_alike(tmp_path):
    """However many micro-batches it has."""

    def loss(name: str, **args):
        trainer = test_rl.make_trainer(
            tmp_path / name,
            test_rl.with_holes,
            method="dr_grpo",
            prompts_per_rollout=4,
            max_steps=3,
            logging_steps=3,
            **args,
        )
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    one = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    found = loss("one", **one)
    assert abs(found) > 1e-3 and loss("cut", tokens_per_batch=21, **one) == pytest.approx(found, rel=1e-4)


def test_dropout_layers_and_the_data_loaders_workers_change_nothing_of_the_cut(tmp_path):
    def batches(name: str, **args):
        trainer = make_trainer(tmp_path / name, rows=ROWS, tokens_per_batch=TOKENS, **SMALL, **args)
        recorded = Recorded(trainer)
        trainer.train()
        return [batch["input_ids"].tolist() for batch in recorded.batches]

    assert batches("without") == batches("with", dataloader_num_workers=2, dataloader_prefetch_factor=2)


# --- which row comes first ----------------------------------------------------------------------------------------


def rows_with_a_long_one(count: int, at: int) -> list[dict]:
    rows = make_rows(count)
    rows[at] = {**rows[at], "rejected": rows[at]["rejected"] + " w1" * 20}
    return rows


def order_of(folder: Path, rows, **args) -> list[list[int]]:
    """The numbers of the rows of each step, in two epochs."""
    trainer = make_trainer(
        folder, method="simpo", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3, **args
    )
    trainer.train_dataset = trainer._encode(rows)
    ids = {tuple(row["prompt_ids"] + row["chosen_ids"]): k for k, row in enumerate(trainer.train_dataset)}
    steps, begin = [], trainer._begin_step

    def seen(batches):
        chosen = []
        for batch in batches:
            texts, masks = batch["input_ids"].chunk(2)[0], batch["attention_mask"].chunk(2)[0]
            chosen += [tuple(text[mask == 1].tolist()) for text, mask in zip(texts, masks, strict=True)]
        steps.append([ids[text] for text in chosen])
        return begin(batches)

    trainer._begin_step = seen
    trainer.train()
    return steps


@pytest.mark.parametrize(("strategy", "seed"), [("random", 0), ("random", 1), ("random", 2), ("sequential", 0)])
def test_the_longest_row_is_the_first_of_the_first_step_and_the_others_stay_where_they_were(tmp_path, seed, strategy):
    how = {"seed": seed, "train_sampling_strategy": strategy}
    rows = rows_with_a_long_one(9, at=7)
    plain = order_of(tmp_path / "plain", rows, **how)
    cut_ = order_of(tmp_path / "cut", rows, tokens_per_batch=TOKENS, **how)
    assert len(plain) == len(cut_) == 6 and cut_[0][0] == 7
    flat = [k for step in plain[:3] for k in step]
    at = flat.index(7)
    flat[0], flat[at] = flat[at], flat[0]
    assert [sorted(step) for step in cut_[:3]] == [sorted(flat[k : k + 3]) for k in (0, 3, 6)]
    assert [sorted(step) for step in cut_[3:]] == [sorted(step) for step in plain[3:]]


def test_which_row_is_the_longest_depends_on_the_layout(tmp_path):
    trainer = make_trainer(tmp_path, method="lipo", rows=8)
    for layout in ("padded", "packed", "shared"):
        collate = LaysOut(trainer.data_collator.collate, layout)
        sizes = [KeepsUnits(collate).unit(row).forwards[0] for row in trainer.train_dataset]
        exact = torch.tensor([size.tokens(0) for size in sizes])
        about = torch.from_numpy(unit_tokens(trainer.train_dataset, layout))
        # A row's last token predicts nothing, and is computed only where rows are padded.
        completions = torch.tensor([len(row["completions_ids"]) for row in trainer.train_dataset])
        apart = about - exact
        if layout == "padded":
            assert (apart == 0).all()
        elif layout == "packed":
            assert torch.equal(apart, completions)
        else:
            assert (about <= exact + completions).all()  # short common beginnings stand in every row


def test_a_sampler_without_the_row_is_left_alone():
    assert list(LongestFirst([4, 2, 0], 1)) == [4, 2, 0] and len(LongestFirst([4, 2], 1)) == 2


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_unit_longer_than_the_budget_goes_alone_with_a_warning(tmp_path, caplog, layout):
    rows = rows_with_a_long_one(8, at=5)

    def step(name: str, **args):
        trainer = make_trainer(tmp_path / name, layout=layout, per_device_train_batch_size=8, **args)
        trainer.train_dataset = trainer._encode(rows)
        recorded = Recorded(trainer)
        return *first_step(trainer, shrink=SHRINK), recorded.batches

    want_log, want, _ = step("one")
    with caplog.at_level(logging.WARNING, "xpo_fast"):
        got_log, got, batches = step("cut", tokens_per_batch=30)
    same(want_log, got_log)
    assert_same_gradients(want, got)
    takes = computed(batches[0])
    assert len(batches[0]["targets"]) == 2 and takes > 30
    said = [r.getMessage() for r in caplog.records if "tokens_per_batch" in r.getMessage()]
    assert len(said) == 1
    assert f"rows[5] takes {takes} tokens, and tokens_per_batch is 30: it goes alone" in said[0]
    trainer = make_trainer(tmp_path / "stop", layout=layout, tokens_per_batch=30, preflight="stop")
    trainer.train_dataset = trainer._encode(rows)
    with pytest.raises(ValueError, match=rf"takes {takes} tokens, and tokens_per_batch is 30: raise tokens_per_batch"):
        trainer.train()


# --- resume, ranks, reference -------------------------------------------------------------------------------------


def run_of(folder: Path, **args):
    return make_trainer(
        folder, rows=12, save_strategy="steps", save_steps=1, per_device_train_batch_size=2, max_steps=-1,
        gradient_accumulation_steps=2, lr_scheduler_type="linear", num_train_epochs=2, learning_rate=1e-3, **args,
    )  # fmt: skip


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """By their budgets, runs that nobody stops."""

    @functools.cache
    def found(budget: int | None):
        whole = run_of(tmp_path_factory.mktemp("whole"), tokens_per_batch=budget)
        whole.train()
        return whole

    return found


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, step, left_alone):
    whole = left_alone(TOKENS)
    part = run_of(tmp_path / "part", tokens_per_batch=TOKENS)
    part.add_callback(StopAt(step))
    part.train()
    resumed = run_of(tmp_path / "part", tokens_per_batch=TOKENS)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    logs = [[(x["loss"], x["tokens_saved"]) for x in t.state.log_history if "loss" in x] for t in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


@pytest.mark.parametrize("first, then", [(None, TOKENS), (TOKENS, None), (TOKENS, 2 * TOKENS)])
def test_a_run_may_resume_with_another_budget(tmp_path, first, then, left_alone):
    """It goes on with the order that it began with, so that every row is read once."""
    whole = left_alone(first)
    part = run_of(tmp_path / "part", tokens_per_batch=first)
    part.add_callback(StopAt(1))
    part.train()
    resumed = run_of(tmp_path / "part", tokens_per_batch=then)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


ON_TWO_RANKS = ("dpo", "kto")


def rl_run(folder: Path, ranks: int, **args):
    cut_to = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4 // ranks}
    trainer = test_rl.make_trainer(folder, with_holes_by_id, prompts_per_rollout=4, max_steps=2, **cut_to, **args)
    trainer.rollout = Fixed()
    _, gradients = test_rl.step(trainer)
    return trainer.state.log_history[:2], gradients


def _on_two_ranks(folder: Path, rank: int) -> dict:
    warnings.filterwarnings("ignore", PEFT_WARNING, FutureWarning)
    found = {}
    for method in ON_TWO_RANKS:
        # 10 rows on two ranks: 6 and 4, and repeats that must not count; the ranks have unequal numbers of parts.
        log, gradients, evaluated, batches, _ = a_step(
            folder / method, method, per_device_train_batch_size=3, gradient_accumulation_steps=2, layout="padded",
            tokens_per_batch=TOKENS, ddp_backend="gloo", train_sampling_strategy="sequential",
        )  # fmt: skip
        found[method] = log, gradients, evaluated, [int(read_tokens(b)) for b in batches]
    return found | {"rl": rl_run(folder / "rl", 2, tokens_per_batch=21)}


def test_two_processes_equal_one(tmp_path):
    ranks = run_world(tmp_path / "two", 2, functools.partial(_on_two_ranks, tmp_path))
    fillers = 0
    for method in ON_TWO_RANKS:
        want_log, want, want_eval, *_ = a_step(
            tmp_path / f"{method}-one", method, per_device_train_batch_size=ROWS, layout="padded",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        (log, gradients, evaluated, first), (*_, second) = ranks[0][method], ranks[1][method]
        same(want_log, log)
        same(want_eval, evaluated)
        assert_same_gradients(want, {n.removeprefix("module."): g for n, g in gradients.items()}, rtol=1e-5)
        assert len(first) == len(second)
        fillers += (first + second).count(0)
    assert fillers  # else nothing was evened out
    want_logs, want = rl_run(tmp_path / "rl-one", 1)
    logs, gradients = ranks[0]["rl"]
    assert_same_gradients(want, {n.removeprefix("module."): g for n, g in gradients.items()}, rtol=1e-5)
    for a, b in zip(want_logs, logs, strict=True):
        same(a, b, rtol=1e-4)


@pytest.mark.parametrize("method", ["dpo", "kto", "lipo"])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_cached_log_probs_are_computed_within_the_budget(tmp_path, monkeypatch, method, layout):
    sizes = []

    def spied(model, batch, *args, **kwargs):
        rows = Inputs.of(batch)
        rows = beside(rows, Inputs.of(batch, "kl_")) if "kl_input_ids" in batch else rows
        sizes.append(rows.input_ids.numel() if rows.layout is None else len(rows.layout))
        return batch_logps(model, batch, *args, **kwargs)

    monkeypatch.setattr("xpo_fast.trainer.reference.batch_logps", spied)

    def cached(name: str, budget: int | None) -> torch.Tensor:
        trainer = make_trainer(
            tmp_path / name, method=method, rows=ROWS, layout=layout, reference="cached", tokens_per_batch=budget,
            per_device_eval_batch_size=ROWS,
        )  # fmt: skip
        trainer.prepare()
        kind, found = trainer.kind, trainer.train_dataset
        columns = [found[n] for n in kind.reference if n in found.column_names]
        return torch.tensor([x for column in columns for row in column for x in (row if kind.listed else [row])])

    want = cached("one", None)
    assert len(sizes) == 1
    sizes.clear()
    torch.testing.assert_close(cached("cut", TOKENS), want, rtol=1e-5, atol=1e-5)
    assert 1 < len(sizes) < ROWS and max(sizes) <= TOKENS


# --- what is refused ----------------------------------------------------------------------------------------------


def test_methods_that_couple_the_units_of_a_micro_batch_are_refused(tmp_path):
    for method in ("beta_dpo", "aot", "aot_unpaired", "bco", "dpo + 0.5*aot"):
        assert coupled(xf.Objective(method))
        with pytest.raises(ValueError, match=rf"tokens_per_batch: the loss of {coupled(xf.Objective(method))[0]} dep"):
            make_trainer(tmp_path, method=method, tokens_per_batch=TOKENS)
    with pytest.raises(ValueError, match="tokens_per_batch: the loss of odin depends on"):
        test_reward_model.make_trainer(tmp_path, "odin", tokens_per_batch=TOKENS)
    with pytest.raises(ValueError, match="tokens_per_batch: the loss of bnpo depends on"):
        test_rl.make_trainer(tmp_path, method="bnpo", tokens_per_batch=TOKENS)
    with pytest.raises(ValueError, match="tokens_per_batch: the loss of ppo_ptx depends on"):
        test_rl.make_trainer(tmp_path, method="ppo_ptx", tokens_per_batch=TOKENS, ptx_dataset=["w1 w2"])
    refused = {name for name, m in xf.METHODS.items() if "logit" not in m.inputs and coupled_alone(name)}
    assert refused == {"beta_dpo", "aot", "aot_unpaired", "bco", "bnpo", "ppo_ptx"}


def coupled_alone(name: str) -> bool:
    try:
        return bool(coupled(xf.Objective(name)))
    except ValueError:  # not a method of an Objective
        return False


def test_a_budget_is_a_number_of_tokens(tmp_path):
    for kind in (XPOConfig, RLConfig):
        with pytest.raises(ValueError, match="tokens_per_batch must be an integer of at least 1, or None, got 0"):
            kind(output_dir=str(tmp_path), use_cpu=True, tokens_per_batch=0)


# --- throughput ---------------------------------------------------------------------------------------------------


def test_tokens_that_are_trained_on():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    targets = torch.full((3, 4), -100)
    targets[0, 1] = targets[2, 3] = 5
    assert int(read_tokens({"attention_mask": mask[:3], "targets": targets})) == 3 + 4
    assert int(read_tokens({"attention_mask": mask, "targets": targets})) == 3 + 4 + 1  # a text behind the rows


def test_time_outside_of_steps_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("xpo_fast.trainer.throughput.time.perf_counter", lambda: now[0])
    found = Throughput(torch.device("cpu"))
    with found.paused():
        now[0] += 50  # before it begins
    found.begin()
    found.add(torch.tensor(600), 400, 800)
    now[0] += 2
    with found.paused():
        now[0] += 30
    now[0] += 1
    found.begin()
    assert found.pop() == 200
    found.add(torch.tensor(100), 100, 100)
    now[0] += 1
    assert found.pop() == 100


def test_the_log_has_tokens_a_second_and_what_was_saved(tmp_path, caplog):
    rows = [{"prompt": "w1 w2 w3", "chosen": " w4", "rejected": " w5 w6 w7 w8"}] * 4  # 5 and 8 tokens with EOS
    with caplog.at_level(logging.INFO, "xpo_fast"):
        trainer = make_trainer(tmp_path, method="simpo", layout="packed", tokens_per_batch=48, max_steps=2)
        trainer.train_dataset = trainer._encode(rows)
        trainer.train()
    read, packed, padded = 4 * (5 + 8), 4 * (4 + 7), 4 * (8 + 8)
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert all(x["tokens_per_second"] > 0 for x in logs)
    assert [x["tokens_saved"] for x in logs] == pytest.approx([1 - packed / padded] * 2)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("trained on")]
    assert len(said) == 1
    assert said[0].startswith(f"trained on {2 * read} tokens, ")
    assert said[0].endswith(f"; {2 * packed} positions computed, {2 * padded} in padded batches (31% saved)")
