"""The objective on the `cuda` backend: losses of the segment kernels, run on the host, against materialised float64.

Each test also asserts the launches: a method that has a kernel uses it, and there is none where the pure function is
called for.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.testing import assert_close

import oracle
import test_objective
import xpo_fast as xf
from pairs import in_pairs
from test_objective import (
    LEARN,
    TILES,
    VOCAB,
    T,
    given_to,
    gradients_match,
    lay_out,
    layouts,
    learns,
    operands,
    targets_of,
)
from test_segments import host, library  # noqa: F401
from test_waits import UNCAPTURED, static  # noqa: F401
from xpo_fast import native
from xpo_fast.objective import segments

ROWS = len(test_objective.LENGTHS)
with_entropy = test_objective.hyper_of


def hyper_of(method):
    """What brings the optional inputs into play, but for entropy, which has no kernel."""
    return {k: v for k, v in with_entropy(method).items() if k != "entropy_coef"}


WITH_KERNELS = [n for n in test_objective.THROUGH_HEAD if segments.supports(n, hyper_of(xf.METHODS[n])) is None]
every = pytest.mark.parametrize("name", WITH_KERNELS)


@pytest.fixture
def launches(host, monkeypatch):  # noqa: F811
    """How many launches of each kind there were."""
    made: Counter[str] = Counter()
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *a, **k: (made.update([name]), call(name, *a, **k)))
    monkeypatch.setattr(native, "why_not", lambda *_: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("xpo_fast.head.backends._no_gpu", lambda device: None)
    monkeypatch.setattr(test_objective, "hyper_of", hyper_of)
    return made


def run(objective, learn="trainable", packed=False, **given):
    """(output, operands), backward done."""
    xs, targets = operands(learn), targets_of()
    h, y, cu = lay_out(xs[0], targets, packed)
    method = objective.methods[0]
    columns, ref = given_to(method, ROWS)
    options = {n: given.pop(n) for n in ("denominator",) if n in given}
    given = {**columns, **ref, **given}
    if "ref_logps" in given:
        del given["ref_hidden"]
    out = objective(
        h, xs[1], y, bias=xs[2], **cu, **options, **test_objective.of_tokens(method, targets, packed, given)
    )
    out.loss.sum().backward()
    return out, xs


def both(method, *args, tile=8, options=None, **kwargs):
    """By the kernels, and by the pure functions."""
    options = {"tile_bytes": tile * VOCAB * 8, **(options or {})}
    return [run(xf.Objective(method, backend=b, **options), *args, **kwargs) for b in ("cuda", "torch")]


def assert_same(ours, theirs):
    (out, xs), (expected, wide) = ours, theirs
    assert_close(out.loss, expected.loss)
    assert_close(out.metrics, expected.metrics, equal_nan=True)
    assert_close(out.counts, expected.counts)
    assert_close(out.losses, expected.losses)
    gradients_match(xs, wide)


# Each method with each tile, and in both layouts, which each tile has with half of the methods.
@in_pairs(
    ("name", WITH_KERNELS),
    ("learn, tile", [("frozen", "one tile"), ("head only", "several units"), *(("trainable", t) for t in TILES)]),
    ("packed", [False, True]),
)
def test_loss_and_gradients(name, packed, learn, tile, launches):
    test_objective.test_loss_and_gradients(name, packed, learn, "cuda", tile)
    assert bool(launches) == (name != "slic")  # which is given logp_sft there


@pytest.mark.parametrize(
    ("name", "learn", "tile", "count"),
    [
        ("dpo", "frozen", 8, 1),
        ("dpo", "trainable", 8, 4),  # three pairs of 8 tokens that count
        ("dpo", "trainable", 16, 3),
        ("dpo", "trainable", 4, 4),  # a pair is longer than a tile, and one group still
        ("kto", "trainable", 31, 2),
        ("ppo", "trainable", 8, 5),  # 31 tokens, four tiles
        ("dpo + 0.5*ipo", "trainable", 8, 8),
    ],
)
def test_a_launch_a_term_for_the_batch_and_for_each_group(name, learn, tile, count, launches):
    run(xf.Objective(name, backend="cuda", tile_bytes=tile * VOCAB * 8), learn)
    assert launches.total() == count and len(launches) == 1


@layouts
@learns
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo + 0.5*ipo + 2*simpo", {}),
        ("grpo + 0.3*gspo", {"weights": None, "beta": 0.1}),
        ("dr_grpo", {"fixed_length": 5}),
        ("dr_grpo", {}),
        *((n, {"reduction": "sum"}) for n in ("dpo", "kto", "grpo")),
    ],
    ids=str,
)
def test_terms_and_reductions(name, options, learn, packed, launches):
    assert_same(*both(name, learn, packed, options=options))
    assert launches


@learns
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dpo", {"ref_logps": -20 - torch.arange(10.0)}),  # float32, and one a row
        ("dpo", {"denominator": 7.0}),
        ("dpo + 0.5*ipo", {"denominator": torch.tensor([3, 5])}),
        ("kto", {"denominator": torch.tensor(0)}),
        ("kto", {"desirable": torch.tensor(True)}),
        ("grpo", {"advantage": torch.tensor(0.7)}),
        ("ppo", {"old_logp": torch.tensor(-3.0)}),
        ("ppo", {"advantage": oracle.normal(ROWS, T, seed=3)}),
        ("ppo", {"old_logp": None}),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_ways_to_give_inputs(name, given, learn, launches):
    assert_same(*both(name, learn, **given))
    assert launches


def test_rows_of_one_position(launches):
    """Where an advantage a token and one a row look the same."""
    xs, targets, advantage = operands(), targets_of()[:, :1].clone(), oracle.normal(ROWS, seed=3)
    targets[2:5] = oracle.IGNORE
    results = []
    for shape, backend in (((ROWS,), "cuda"), ((ROWS, 1), "cuda"), ((ROWS,), "torch")):
        objective = xf.Objective("reinforce", backend=backend, tile_bytes=3 * VOCAB * 8)
        out = objective(xs[0][:, :1], xs[1], targets, advantage=advantage.view(shape))
        results.append((out.loss, *torch.autograd.grad(out.loss, xs[:2])))
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])
    assert launches


@learns
@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_nothing_to_score(name, learn, launches):
    objective = xf.Objective(name, backend="cuda")
    xs = operands(learn)
    targets = torch.full((ROWS, T), oracle.IGNORE)
    columns, ref = given_to(objective.method, ROWS)
    out = objective(xs[0], xs[1], targets, bias=xs[2], **columns, **ref)
    out.loss.backward()
    assert launches and out.loss == 0 and all(x.isnan() for x in out.metrics.values())
    assert all((x.grad == 0).all() for x in xs if x.requires_grad)


@learns
def test_what_is_remembered(learn, launches):
    """KTO's reference point is read from the state; BCO's shift is learned from call to call."""
    for name, columns in (("kto", {"kl": None}), ("bco", {"delta": None})):
        found = []
        for backend in ("cuda", "torch"):
            objective = xf.Objective(name, backend=backend)
            if name == "kto":
                objective.load_state_dict({"kl": torch.tensor(0.7, dtype=torch.float64)})
            out = [run(objective, learn, **columns) for _ in range(2)]
            found.append((out[-1], objective.state_dict()))
        assert_same(found[0][0], found[1][0])
        assert_close(found[0][1], found[1][1])
    assert launches.total() == (4 if learn == "frozen" else 6)


@in_pairs(("name", [n for n in WITH_KERNELS if n not in UNCAPTURED]), ("packed", [False, True]), ("learn", LEARN))
def test_captured(name, packed, learn, static, launches):  # noqa: F811
    """Every position is scored, the ignored ones as nothing; of packed rows by the pure functions."""
    assert_same(*both(name, learn, packed, options=hyper_of(xf.METHODS[name])))
    assert bool(launches) == (not packed and name != "slic")


@pytest.mark.parametrize(
    ("name", "options", "given"),
    [
        ("dpo", {"ld_alpha": 0.5}, {}),
        ("simpo", {"wpo": True}, {}),
        ("dpo", {"reduction": "none"}, {}),
        ("grpo", {"entropy_coef": 0.1}, {}),
        ("grpo", {}, {"advantage": oracle.normal(ROWS, seed=3).requires_grad_()}),
        ("dpo + sft", {}, {}),
        ("nca", {}, {}),
        ("slic", {}, {"logp_sft": oracle.normal(ROWS // 2, seed=3)}),
    ],
    ids=str,
)
@learns
def test_where_the_pure_functions_are_called_for(name, options, given, learn, launches):
    results = both(name, learn, options=options, **given)
    assert not launches
    assert_same(*results)


def test_other_backends_have_none(launches):
    for backend in ("auto", "torch", "dense"):
        run(xf.Objective("dpo", backend=backend))
    assert not launches
