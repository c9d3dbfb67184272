"""Reward functions: the weighted sum, what is left out of it, and what every fault says."""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import math
import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch

from xpo_fast.data.template import Conversation
from xpo_fast.rewards import RewardError, Rewards, load_reward
from xpo_fast.rewards.judges import Judge, RewardJudge, group_scores
from xpo_fast.rollout import Samples

NAN = math.nan


def make_samples(rows: int = 3) -> Samples:
    return Samples(
        prompts=[f"p{i}" for i in range(rows)],
        prompt_ids=[[1, i] for i in range(rows)],
        completion_ids=[[5] * (i + 1) for i in range(rows)],
        completions=["x" * (i + 1) for i in range(rows)],
        finish=["stop"] * rows,
    )


def returning(values, name="f"):
    def function(**_):
        return values

    function.__name__ = name
    return function


def length(completions, **_):
    return [len(c) for c in completions]


def test_weighted_sum_by_hand():
    # 2·(1, 2, 3) − 0.5·(4, 0, 8)
    scored = Rewards([length, returning([4, 0.0, 8], "g")], weights=[2, -0.5])(make_samples())
    assert scored.rewards.tolist() == [0.0, 4.0, 2.0] and scored.rewards.dtype == torch.float32
    assert scored.each.tolist() == [[1.0, 4.0], [2.0, 0.0], [3.0, 8.0]]
    assert scored.names == ["length", "g"] and scored.valued.all()


def test_trl_signature_and_columns():
    seen = {}

    def f(prompts, completions, completion_ids, answer, **rest):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, rest=rest)
        return [0.0] * len(prompts)

    Rewards(f)(make_samples(2), {"answer": ["a", "b"], "other": [1, 2]})
    assert seen == {
        "prompts": ["p0", "p1"],
        "completions": ["x", "xx"],
        "ids": [[5], [5, 5]],
        "answer": ["a", "b"],
        "rest": {"other": [1, 2]},
    }


def test_without_var_keywords_a_function_gets_what_it_names():
    assert Rewards(lambda completions: [1.0] * len(completions))(make_samples(), {"a": [1] * 3}).rewards.sum() == 3


def test_none_does_not_apply_and_nan_has_no_reward(caplog):
    f, g = returning([1.0, None, NAN, None, 1.0], "f"), returning([10.0, 10.0, 10.0, None, math.inf], "g")
    with caplog.at_level(logging.WARNING):
        scored = Rewards([f, g])(make_samples(5))
    # row 1: g alone; row 2: f is NaN; row 3: none applies; row 4: g is infinite
    assert torch.equal(scored.rewards.nan_to_num(-1), torch.tensor([11.0, 10.0, -1.0, -1.0, -1.0]))
    assert scored.valued.tolist() == [True, True, False, False, False]
    assert scored.each.isnan().tolist() == [[False] * 2, [True, False], [True, False], [True] * 2, [False] * 2]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "'f'" in said[0] and "1 of 5" in said[0] and "row 2" in said[0]
    assert "'g'" in said[1] and "row 4" in said[1]


def test_a_weight_of_zero_does_not_revive_an_infinity():
    assert not Rewards([returning([math.inf] * 3)], weights=[0.0])(make_samples()).valued.any()


@pytest.mark.parametrize(
    "values",
    [
        (1, 2.5, None),
        [True, np.float32(2.5), None],
        [torch.tensor(1.0), np.int64(2), torch.tensor(3)],
        np.array([1.0, 2.0, 3.0]),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        [1, 10**400, -3],
    ],
    ids=["tuple", "bool and numpy", "0-d tensors", "array", "tensor", "bfloat16 with a graph", "beyond float"],
)
def test_kinds_of_numbers(values):
    scored = Rewards(returning(values))(make_samples())
    first = values[0].item() if hasattr(values[0], "item") else values[0]
    assert scored.each[0, 0] == float(first)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "got NoneType"),
        (3.0, "got float"),
        ("abc", "got str 'abc'"),
        ({"a": 1, "b": 2, "c": 3}, "got dict"),
        ([1.0, 2.0], "list of 3 numbers or None, one a completion; got 2"),
        ([1.0] * 4, "got 4"),
        ([1.0, "2", 3.0], "entry 1 is str '2'"),
        ([1.0, 2.0, [3.0]], "entry 2 is list"),
        (torch.ones(3, 1), "entry 0 is list"),
        ([torch.ones(2)] * 3, "entry 0 is Tensor"),
        (torch.ones(3, dtype=torch.complex64), "entry 0 is complex"),
        (torch.ones(3, device="meta"), "got Tensor, of which none can be made"),
        ((x for x in (1.0, 2.0, 3.0)), "got generator"),
        (np.array(["1", "2", "3"]), "entry 0 is str '1'"),
        (torch.tensor(1.0), "got float"),
        (iter([1.0, 2.0, 3.0]), "got list_iterator"),
    ],
)
def test_what_is_no_list_of_numbers_is_named(values, said):
    with pytest.raises(RewardError, match="'bad'") as error:
        Rewards([length, returning(values, "bad")])(make_samples())
    assert said in str(error.value)


def test_an_exception_is_named_and_kept():
    def bad(completions, **_):
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"'bad' raised KeyError on 3 completions: 'answer'") as error:
        Rewards([length, bad])(make_samples())
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_leaving_is_an_exception_and_an_interrupt_is_none(timeout_s):
    """Completions that are executed call exit(); Ctrl-C is for the run."""

    def leaves(**_):
        raise SystemExit(0)

    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(RewardError, match="'leaves' raised SystemExit on 3 completions"):
        Rewards(leaves, timeout_s=timeout_s)(make_samples())
    with pytest.raises(KeyboardInterrupt):
        Rewards(interrupted, timeout_s=timeout_s)(make_samples())


def test_sums_that_float32_does_not_hold(caplog):
    f, g = returning([3e38, 1.0, 3e38], "f"), returning([3e38, 1.0, -3e38], "g")
    with caplog.at_level(logging.WARNING):
        scored = Rewards([f, g])(make_samples())
    assert scored.valued.tolist() == [False, True, True]
    assert ["1 of 3" in r.getMessage() for r in caplog.records] == [True]


def test_a_missing_column_is_named():
    def needs(completions, answer, **_):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'needs' needs answer, .*they have prompts, .*, gold"):
        Rewards(needs)(make_samples(), {"gold": [1, 2, 3]})


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_one_that_blocks_is_given_up(kind):
    released = threading.Event()

    def plain(completions, **_):
        released.wait(30)
        return [0.0] * len(completions)

    async def asynchronous(completions, **_):
        await asyncio.sleep(30)
        return [0.0] * len(completions)

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"did not return within 0\.2 s for 3 completions"):
        Rewards(plain if kind == "plain" else asynchronous, timeout_s=0.2)(make_samples())
    assert time.monotonic() - start < 10
    released.set()


def test_within_a_limit_values_and_exceptions_are_the_same():
    def bad(**_):
        raise ZeroDivisionError("no")

    assert Rewards(length, timeout_s=30)(make_samples()).rewards.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(RewardError, match="raised ZeroDivisionError") as error:
        Rewards(bad, timeout_s=30)(make_samples())
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_no_graph_is_kept_of_a_reward_model(timeout_s):
    weight = torch.ones(3, requires_grad=True)

    def model(completions, **_):
        scores = weight * 2
        assert not scores.requires_grad
        return scores

    assert Rewards(model, timeout_s=timeout_s)(make_samples()).rewards.tolist() == [2.0] * 3


def test_an_async_function():
    async def f(completions, **_):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    assert Rewards(f)(make_samples()).rewards.tolist() == [1.0, 2.0, 3.0]


def test_what_a_function_does_to_its_lists_stays_there():
    def vandal(prompts, completions, completion_ids, answer):
        for held in (prompts, completions, answer):
            held.clear()
        for ids in completion_ids:
            ids.clear()
        return [1.0, 2.0, 3.0]

    samples, answer = make_samples(), ["a", "b", "c"]
    scored = Rewards([vandal, length])(samples, {"answer": answer})
    assert samples == make_samples() and answer == ["a", "b", "c"]
    assert scored.rewards.tolist() == [2.0, 4.0, 6.0]


def test_names_are_told_apart():
    class Model:
        def __call__(self, completions, **_):
            return [0.0] * len(completions)

    partial = functools.partial(length)
    assert Rewards([length, partial, Model(), Model()]).names == ["length", "length_2", "Model", "Model_2"]


def test_no_samples_no_calls():
    scored = Rewards(returning(None))(make_samples(0))
    assert scored.rewards.shape == (0,) and scored.each.shape == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "one reward function or more"),
        (([length, 3],), "one reward function or more"),
        (([length], [1.0, 2.0]), "weight for each of 1"),
        (([length], [NAN]), "finite weight"),
    ],
)
def test_what_makes_no_rewards(arguments, said):
    with pytest.raises(ValueError, match=said):
        Rewards(*arguments)
    with pytest.raises(ValueError, match="timeout_s"):
        Rewards(length, timeout_s=0)


def test_columns_that_do_not_fit():
    with pytest.raises(ValueError, match="'answer' to have an entry for each of 3 samples, got 2"):
        Rewards(length)(make_samples(), {"answer": [1, 2]})
    with pytest.raises(ValueError, match="'prompts' would hide"):
        Rewards(length)(make_samples(), {"prompts": [1, 2, 3]})


def test_load_reward(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def brevity(completions, **_):\n    return [-len(c) for c in completions]\n")
    assert Rewards(load_reward(f"{file}:brevity"))(make_samples()).rewards.tolist() == [-1.0, -2.0, -3.0]
    assert load_reward("math:sqrt") is math.sqrt
    for spec, said in (
        ("brevity", "file.py:function"),
        (f"{file}:brevityy", "there are brevity"),
        (f"{tmp_path}/none.py:f", "no file"),
        ("no_such_package_here:f", "cannot import"),
    ):
        with pytest.raises(ValueError, match=said):
            load_reward(spec)


# --- what functions edit --------------------------------------------------------------------------------------------


class Dear:
    """An object that counts its copies, or has none."""

    copies = 0

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def __deepcopy__(self, memo):
        if self.fails:
            raise RuntimeError("there is one of it")
        type(self).copies += 1
        return Dear()


def talk(count: int) -> list:
    """One conversation with tools, in `count` rows, as a rollout has the prompt of a group."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    return [Conversation([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], tools=tools)] * count


def test_what_a_function_edits_nobody_else_sees():
    """trl#3079: a function that completes the prompt's messages, strips an answer, or pops from a column."""
    answers = [[{"role": "assistant", "content": " 4"}] for _ in range(2)]
    samples = Samples(talk(2), [[1], [1]], [[2, 3], [4]], answers, ["stop"] * 2)
    columns = {
        "facts": [{"is": ["a"], "by": OrderedDict(x=[1])}, ({"deep": [1]}, "b")],
        "numbers": [torch.ones(1), np.ones(1)],
        "prompt_index": [0, 0],
    }
    before = copy.deepcopy((samples, columns))
    lengths, seen = [], []

    def careless(prompts, completions, completion_ids, facts, numbers, **_):
        for prompt, completion, ids in zip(prompts, completions, completion_ids):
            assert isinstance(prompt, Conversation) and prompt.tools[0]["function"]["name"] == "add"
            prompt.append(completion[0])
            prompt[0]["content"][0]["text"] = "changed"
            completion[0]["content"] = completion[0]["content"].strip()
            lengths.append(len(prompt))
            ids.clear()
        prompts[0].tools.append("changed")
        facts[0]["is"].pop()
        facts[0]["by"]["x"].append(2)
        facts[1][0]["deep"].append(2)
        numbers[0] += 1
        numbers[1][0] = 7
        facts.clear()
        return [0.0, 0.0]

    def second(**given):
        seen.append(given)
        return [0.0, 0.0]

    Rewards([careless, second])(samples, columns)
    assert lengths == [2, 2]  # the rows of a group do not share their prompt
    given = dict(seen[0])
    found = (Samples(given.pop("prompts"), [[1], [1]], given.pop("completion_ids"), given.pop("completions"),
                     ["stop"] * 2), given)  # fmt: skip
    for theirs, ours in ((samples, columns), found):
        assert theirs == before[0] and theirs.prompts[0].tools == talk(1)[0].tools
        assert ours["facts"] == before[1]["facts"] and [float(x.sum()) for x in ours["numbers"]] == [1, 1]
        assert type(ours["facts"][0]["by"]) is OrderedDict


def test_objects_are_copied_once_for_a_function_or_named(caplog):
    image, lock = Dear(), Dear(fails=True)
    seen = {}
    Rewards(lambda image, lock, **_: seen.update(image=image, lock=lock) or [0.0] * 3)(
        make_samples(), {"image": [image] * 3, "lock": [lock] * 3}
    )
    assert Dear.copies == 1 and seen["image"][0] is seen["image"][2] is not image
    assert seen["lock"][0] is lock
    assert [r.getMessage() for r in caplog.records if "Dear" in r.getMessage()] == [
        "a Dear of the data cannot be copied (RuntimeError: there is one of it): reward functions are given the object "
        "itself, and what one edits in it the others see"
    ]


def test_only_what_a_function_takes_is_copied():
    Dear.copies = 0
    assert Rewards(lambda completions: [0.0] * len(completions))(make_samples(), {"image": [Dear()] * 3}).valued.all()
    assert Dear.copies == 0


@pytest.mark.parametrize("rule", ["score", "compare"])
def test_what_a_judge_of_the_users_own_edits_nobody_else_sees(rule):
    class Careless(Judge):
        def clear(self, prompts, *sides):
            for row in zip(prompts, *sides):
                for turns in row:
                    turns.append("changed")
            return torch.zeros(len(prompts))

        if rule == "score":
            score = lambda self, prompts, completions, **_: self.clear(prompts, completions)  # noqa: E731
        else:
            compare = lambda self, prompts, first, second, **_: self.clear(prompts, first, second)  # noqa: E731

    prompts, groups = [[{"role": "user"}]], [[[{"content": "a"}], [{"content": "b"}]]]
    group_scores(Careless(), prompts, groups)
    assert prompts == [[{"role": "user"}]] and groups == [[[{"content": "a"}], [{"content": "b"}]]]


# --- whose NaN it is ------------------------------------------------------------------------------------------------


class BrokenModel:
    """A reward model whose second reward is NaN."""

    __name__ = "broken"

    def score(self, prompts, completions):
        return torch.tensor([1.0, NAN, 3.0][: len(prompts)])

    def __call__(self, prompts, completions, **_):
        return self.score(prompts, completions).tolist()


@pytest.mark.parametrize(
    "function, who", [(BrokenModel(), "broken"), (RewardJudge(BrokenModel()), "RewardJudge")], ids=["model", "judge"]
)
def test_a_reward_that_is_nan_is_named_with_its_row(function, who, caplog):
    """A reward model's NaN does not mean that it has none to give, as a judge's NaN does."""
    scored = Rewards([length, function])(make_samples())
    assert [r.getMessage() for r in caplog.records] == [
        f"reward function {who!r} returned NaN or an infinity for 1 of 3 completions (the first is row 1, 'xx', of the "
        "prompt 'p1'): they have no reward and are left out"
    ]
    assert scored.valued.tolist() == [True, False, True]


def test_a_judge_names_the_model_whose_score_is_nan(caplog):
    scores = group_scores(RewardJudge(BrokenModel()), ["p"], [["a", "b", "c"]])[0]
    assert scores.isnan().tolist() == [False, True, False]
    assert "the judge's model 'broken' returned NaN" in caplog.text and "'b', of the prompt 'p'" in caplog.text
