"""What goes wrong in an online run is said, and nothing is lost: resumed, it is the run that was not disturbed.

Every fault comes at the third rollout, when no checkpoint is due; the run then has to write one itself.
"""

from __future__ import annotations

import json
import math
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from ranks import run_world
from test_rl import NEW, PROMPTS, make_model, make_tokenizer, make_trainer, share_of_even
from test_rl_resume import timeless
from test_rollout import StandIn
from test_trainer import PEFT_WARNING, lora
from xpo_fast.rewards import RewardError, Rewards
from xpo_fast.rl import last_checkpoint
from xpo_fast.rollout import RolloutError, ServerRollout

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

ARGS = {
    "method": "grpo", "kl_coef": 0.1, "max_steps": 4, "save_strategy": "steps", "save_steps": 100, "logging_steps": 2,
    "eval_dataset": PROMPTS,
}  # fmt: skip


def sound(completion_ids, **_):
    return share_of_even(completion_ids)


def raises(completion_ids, **_):
    raise RuntimeError("no more")


def leaves(completion_ids, **_):
    raise SystemExit(0)  # as executed completions do


def returns(value):
    return lambda completion_ids, **_: value


def blocks(completion_ids, **_):
    threading.Event().wait(60)


def at_third(fault, call=3):
    """`sound`, but at the third call the fault."""
    calls = []

    def reward(completion_ids, **columns):
        calls.append(0)
        return (fault if len(calls) == call else sound)(completion_ids, **columns)

    return reward


def reward(completion_ids, **_):
    return sound(completion_ids)


def run(folder: Path, function=reward, *, resume=None, **args):
    trainer = make_trainer(folder, Rewards(function, timeout_s=5.0), **{**ARGS, **args})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_run(trainer, whole) -> None:
    for (name, a), b in zip(whole.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [timeless(x) for x in trainer.state.log_history] == [timeless(x) for x in whole.state.log_history]
    assert trainer.progress == whole.progress
    files = [Path(t.args.output_dir) / "samples.jsonl" for t in (trainer, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    return run(tmp_path_factory.mktemp("whole"))


# --- faults that end a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (raises, RewardError, "'reward' raised RuntimeError on 8 completions: no more"),
        (leaves, RewardError, "'reward' raised SystemExit on 8"),
        (returns(None), RewardError, "'reward': expected a list of 8 numbers or None.* got NoneType"),
        (returns([0.0] * 7), RewardError, "'reward': expected a list of 8 numbers .* got 7"),
        (returns(["0.5"] * 8), RewardError, "'reward': .* entry 0 is str '0.5'"),
        (returns(iter([0.5] * 8)), RewardError, "'reward': .* got list_iterator"),
        (returns([math.nan] * 8), ValueError, "no completion of rollout 2 has a reward: reward returned NaN or None"),
        (returns([None] * 8), ValueError, "no completion of rollout 2 has a reward"),
        (
            returns([3e38, -3e38] * 4),
            ValueError,
            r"advantages of rollout 2 are not finite: rewards from -3e\+38 to 3e\+38; reward function 'reward' gave "
            r"3e\+38 for 'w.* of 'w",
        ),
    ],
    ids=["raises", "exits", "None", "wrong length", "strings", "iterator", "NaN", "Nones", "beyond float32"],
)
def test_a_reward_function_that_fails(tmp_path, whole, fault, error, said):
    with pytest.raises(error, match=said):
        run(tmp_path, at_third(fault))
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    assert_same_run(run(tmp_path, resume=True), whole)


def test_a_log_prob_that_is_nan_is_the_samplers(tmp_path):
    """And no reward function is blamed for it; a server is named by its address."""
    trainer = make_trainer(tmp_path, shift=math.nan, temperature=1.0)
    for sampler in ("Recorded", "http://host:8000"):
        with pytest.raises(ValueError, match=rf"the sampler {sampler} gave nan as the log-prob of token 0 of .* of 'w"):
            trainer.train()
        trainer.rollout.url = "http://host:8000"


def test_a_reference_that_has_no_finite_log_probs_is_named(tmp_path):
    trainer = make_trainer(tmp_path, kl_coef=0.1)
    with torch.no_grad():
        trainer.moving_reference.copy.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"rollout 0 are not finite: the reference has log-probs that are not, .*'w"):
        trainer.train()


def test_one_that_blocks(tmp_path, whole):
    trainer = make_trainer(tmp_path, Rewards(at_third(blocks), timeout_s=2.0), **ARGS)
    with pytest.raises(RewardError, match=r"'reward' did not return within 2 s for 8 completions"):
        trainer.train()
    assert_same_run(run(tmp_path, resume=True), whole)


def test_an_interrupt_goes_through_and_what_is_done_again_is_the_same(tmp_path, whole):
    def interrupted(completion_ids, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, at_third(interrupted), save_steps=1)
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        run(other, at_third(interrupted))
    assert last_checkpoint(other / "out") is None  # nobody had asked for one so far
    assert_same_run(run(tmp_path, resume=True), whole)


def test_an_evaluation_that_fails(tmp_path, whole):
    """Of evaluations at every step the second fails: the resumed run goes on behind it."""
    args = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(RewardError, match="no more"):
        run(tmp_path, at_third(raises, call=4), **args)
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    resumed = run(tmp_path, resume=True, **args)
    assert [log["step"] for log in resumed.state.log_history if "eval_reward" in log] == [1, 3, 4]
    resumed.state.log_history = [log for log in resumed.state.log_history if "eval_reward" not in log]
    assert_same_run(resumed, whole)


def test_before_the_first_step_there_is_nothing_to_lose(tmp_path, whole):
    with pytest.raises(RewardError, match="no more"):
        run(tmp_path, at_third(raises, call=1))
    assert last_checkpoint(tmp_path / "out") is None
    assert_same_run(run(tmp_path), whole)


def tables(capsys) -> str:
    """What was printed beside Trainer's own logs."""
    printed = capsys.readouterr().out.splitlines()
    return "\n".join(line for line in printed if not line.startswith(("{", "[")))


def test_all_that_is_remembered_comes_back(tmp_path, capsys):
    """An averaged adapter, a critic with a rate of its own, and samples that wait for a log."""
    args = {
        "method": "ppo", "peft_config": lora(), "ref_mixin": 0.3, "value_head_learning_rate": 1e-2, "show_samples": 2,
        "max_steps": 5, "logging_steps": 3,
    }  # fmt: skip
    whole = run(tmp_path / "whole", **args)
    shown = tables(capsys)
    assert shown.count("2 of 8 completions, by reward") == 1 and "step 3, rollout 2:" in shown
    for call in (3, 4):  # before the table, and behind it
        folder = tmp_path / f"{call}"
        with pytest.raises(RewardError, match="no more"):
            run(folder, at_third(raises, call), **args)
        resumed = run(folder, resume=True, **args)
        assert tables(capsys) == shown
        assert_same_run(resumed, whole)
        average, want = resumed.moving_reference.average, whole.moving_reference.average
        assert average.keys() == want.keys() and len(want) > 0
        assert all(torch.equal(x, want[n]) for n, x in average.items())


def test_samples_wait_in_the_checkpoint(tmp_path, capsys):
    """Of the rollout of two steps the first is saved, and the second logs."""
    args = {"epochs_per_rollout": 2, "show_samples": 8, "max_steps": 2, "logging_steps": 2, "save_steps": 1}
    run(tmp_path, **args)
    shown = tables(capsys)
    run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-1"), **args)
    assert tables(capsys) == shown and "8 of 8 completions" in shown


# --- a server ---------------------------------------------------------------------------------------------------------


def served(folder: Path, server: StandIn, model, **options):
    """A trainer whose completions come from a server that has the policy's weights."""
    trainer = make_trainer(folder, reward, model=model, **{**ARGS, "eval_dataset": None, "temperature": 1.0})
    options = {"retries": 1, "backoff_s": 0.01, "concurrency": 2, "push": lambda model, rollout: None, **options}
    trainer.rollout = ServerRollout(server.url, make_tokenizer(), **options)
    return trainer


def started(port: int = 0, **options) -> tuple[StandIn, torch.nn.Module]:
    model = make_model()
    return StandIn(model, make_tokenizer(), port, **options), model


def test_a_server_that_dies_within_a_rollout(tmp_path):
    server, model = started()
    alone = served(tmp_path / "whole", server, model)
    alone.train()
    server.stop()

    server, model = started(dies_after=2 * 8 + 3)  # three of the third rollout's eight
    with pytest.raises(RolloutError, match=r"gave no answer in 2 attempts.* 3 of 8 completions were finished"):
        served(tmp_path, server, model).train()
    server.stop()
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")

    server, model = started(server.server_port)
    resumed = served(tmp_path, server, model)
    resumed.train(resume_from_checkpoint=True)
    assert len(server.asked) == 2 * 8
    assert_same_run(resumed, alone)

    # One that comes back in time is no fault at all.
    server.faults, server.asked = [None] * 19 + ["cut", 503], []
    again = served(tmp_path / "again", server, model := make_model(), retries=3)
    server.rollout.update(model)
    again.train()
    server.stop()
    assert len(server.asked) == 4 * 8 + 2
    assert_same_run(again, alone)


# --- faults of single completions -------------------------------------------------------------------------------------


def test_completions_without_a_reward_are_left_out_and_the_run_goes_on(tmp_path):
    """NaN, an infinity and None, one of each in a group of four, twice."""

    def holes(completion_ids, **_):
        rewards = share_of_even(completion_ids)
        return [(x, math.nan, math.inf, None)[(i + i // 4) % 4] for i, x in enumerate(rewards)]

    def half(completion_ids, **_):
        rewards = share_of_even(completion_ids)
        return [math.nan if i % 2 else x for i, x in enumerate(rewards)]

    lone = make_trainer(tmp_path / "lone", holes, **ARGS)
    before = [p.clone() for p in lone.model.parameters()]
    lone.train()  # a lone reward of a group says nothing
    assert all(torch.equal(a, b) for a, b in zip(before, lone.model.parameters(), strict=True))
    some = make_trainer(tmp_path / "some", half, **ARGS)
    some.train()
    logs = [log for log in some.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(log["unrewarded"] == 0.5 and math.isfinite(log["grad_norm"]) for log in logs)
    lines = (tmp_path / "some" / "out" / "samples.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert len(told) == 32 and all((x["reward"] is None) == (i % 2 == 1) for i, x in enumerate(told))
    assert not any(x["trained"] for x in told if x["reward"] is None) and any(x["trained"] for x in told)


def test_a_rollout_of_equal_groups_is_logged_and_the_next_one_learned_from(tmp_path):
    trainer = make_trainer(
        tmp_path, at_third(returns([0.5] * 8), call=1), **{**ARGS, "logging_steps": 1, "kl_coef": 0.0}
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["groups/dropped"] == 1 and logs[0]["grad_norm"] == 0
    assert logs[1]["groups/dropped"] < 1 and logs[1]["grad_norm"] > 0 and trainer.progress.rollouts == 4


def test_a_completion_without_an_eos_is_trained_on_as_it_is(tmp_path):
    """Nothing is put behind it: what is scored, measured and trained on are the sampled tokens."""
    seen = []

    def ids(completion_ids, **_):
        seen.extend(completion_ids)
        return share_of_even(completion_ids)

    trainer = make_trainer(tmp_path, ids, **{**ARGS, "max_steps": 1, "max_new_tokens": 12})
    trained = []
    inner = trainer.training_step
    trainer.training_step = lambda model, inputs, items: (
        trained.extend(row[row >= 0].tolist() for row in inputs["targets"]) or inner(model, inputs, items)
    )
    trainer.train()
    (samples,) = trainer.rollout.samples
    assert "length" in samples.finish and seen == samples.completion_ids
    for row, finish in zip(samples.completion_ids, samples.finish, strict=True):
        assert (row[-1] == 1) == (finish == "stop") and (finish == "stop" or len(row) == 12)
    assert sorted(trained) == sorted(samples.completion_ids)


# --- what looks odd and is right --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "ppo", "rloo", "reinforce"])
@pytest.mark.parametrize(
    "odd",
    [
        {"prompts": PROMPTS[:1]},
        {"prompts": [{"prompt": "w1"}] * 3},
        {"prompts": [{"prompt": "w1"}], "max_new_tokens": 1},
    ],
    ids=["one prompt", "equal prompts", "one token"],
)
def test_little_is_enough(tmp_path, method, odd):
    trainer = make_trainer(tmp_path, method=method, max_steps=2, kl_coef=0.1, **odd)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    lengths = {len(ids) for s in trainer.rollout.samples for ids in s.completion_ids}
    assert lengths == {1} if odd.get("max_new_tokens") else max(lengths) == NEW


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "prompt_index"])
def test_a_column_that_would_hide_the_samples_is_refused_before_the_run(tmp_path, name):
    with pytest.raises(ValueError, match=f"the column '{name}' is what reward functions are told"):
        make_trainer(tmp_path, prompts=[{"prompt": "w1", name: 3}])


def test_a_column_where_is_the_users(tmp_path):
    told = []

    def place(where, **_):
        told.append(where)
        return [0.0, 1.0] * (len(where) // 2)

    make_trainer(
        tmp_path, place, prompts=[{"prompt": "w1", "where": "here"}, {"prompt": "w2", "where": "there"}]
    ).train()
    assert sorted(told[0]) == ["here"] * 4 + ["there"] * 4
    with pytest.raises(RewardError, match="'place' needs where, which the data have not"):
        make_trainer(tmp_path, place).train()


# --- several processes ------------------------------------------------------------------------------------------------


def fails_on(rank: int, folder: Path, completion_ids, **_):
    marker = folder / f"calls-{rank}"
    count = int(marker.read_text()) + 1 if marker.exists() else 1
    marker.write_text(str(count))
    if rank == 1 and count == 3:
        raise RuntimeError("no more")
    return share_of_even(completion_ids)


def _fails_and_goes_on(folder: Path, rank: int) -> tuple[str, dict, dict]:
    def trainer(place: Path):
        return make_trainer(place, partial(fails_on, rank, folder), **{**ARGS, "eval_dataset": None})

    said = ""
    try:
        trainer(folder).train()
    except (RewardError, RolloutError) as error:
        said = f"{type(error).__name__}: {error}"
    resumed, whole = trainer(folder), trainer(folder / "whole")
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    whole.train()
    return said, resumed.model.state_dict(), whole.model.state_dict()


def test_where_one_process_fails_all_do_with_a_checkpoint(tmp_path):
    (first, resumed, whole), (second, *_) = run_world(tmp_path / "world", 2, partial(_fails_and_goes_on, tmp_path))
    assert second.startswith("RewardError: reward function 'fails_on' raised RuntimeError")
    assert first.startswith("RolloutError: process 1 failed: RewardError: reward function 'fails_on'")
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))
