"""The rivals that `cringe` samples from the most likely tokens but the target."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import test_head
from xpo_fast.head import sampled
from xpo_fast.head.operands import Operands
from xpo_fast.head.spec import Scaling

INF, NAN = float("inf"), float("nan")


def operands(dtype=torch.float32, vocab=37, ignored=0.3):
    hidden = oracle.normal(11, 6, seed=1, dtype=dtype)
    weight, bias = oracle.normal(vocab, 6, seed=2, dtype=dtype), oracle.normal(vocab, seed=3, dtype=dtype)
    return [hidden, weight, bias, oracle.tokens((11,), vocab, ignored)]


def rivals(hidden, weight, bias, targets, *, tile=7, k=5, seed=0, **scaling):
    generator = torch.Generator(hidden.device).manual_seed(seed)
    given = Operands(hidden, weight, targets, bias, scaling=Scaling(**scaling), ignore_index=oracle.IGNORE)
    return sampled.sample_rivals(given, tile, k, generator)


@pytest.mark.parametrize("vocab", [2, 4])
def test_fewer_tokens_than_k(vocab):
    hidden, weight, bias, targets = operands(vocab=vocab)
    drawn = rivals(hidden, weight, bias, targets)
    scored = targets != oracle.IGNORE
    assert drawn[scored].ne(targets[scored]).all() and 0 <= drawn.min() <= drawn.max() < vocab


@pytest.mark.parametrize(
    ("head", "dtype"),
    [(h, torch.float32) for h in test_head.HEADS] + [("everything", d) for d in (torch.bfloat16, torch.float64)],
    ids=str,
)
def test_what_is_drawn(head, dtype):
    """Whatever the dtype and what is done to logits: never the target, nothing where ignored, by the seed."""
    hidden, weight, bias, targets = operands(dtype)
    with_bias, options = test_head.HEADS[head]
    given = (hidden, weight, bias if with_bias else None, targets)
    want = [rivals(*given, seed=seed, **options) for seed in (0, 1)]
    for seed, tile in ((0, 4), (1, 11)):
        drawn = rivals(*given, seed=seed, tile=tile, **options)
        assert torch.equal(drawn, want[seed])
        assert not drawn[targets == oracle.IGNORE].any() and not drawn.eq(targets).any()
    assert not torch.equal(*want)


def test_nothing_scored():
    hidden, weight, bias, targets = operands(ignored=1.0)
    assert not rivals(hidden, weight, bias, targets).any()


def test_the_draws_depend_on_the_seed_alone():
    """Not on the tiles: another budget, the same tokens."""
    given = operands()
    want = rivals(*given, tile=11)
    assert all(torch.equal(rivals(*given, tile=tile), want) for tile in (1, 2, 7, 100))
    assert not torch.equal(rivals(*given, tile=11, seed=1), want)


@pytest.mark.parametrize("target", [0, 6])
def test_the_draws_follow_the_softmax_of_the_top_k(target):
    """χ² of 20 000 draws with 4 degrees of freedom: above 18.5 once in a thousand seeds. Draws are independent."""
    count, k = 20_000, 5
    z = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -8.0, -9.0])  # the seventh is not among the likeliest
    hidden, weight = torch.ones(count, 1), z.unsqueeze(1)
    drawn = rivals(hidden, weight, None, torch.full((count,), target), tile=4096, k=k)
    best = z.double().scatter(0, torch.tensor(target), -INF).topk(k)
    p = torch.zeros(len(z), dtype=torch.float64).scatter(0, best.indices, best.values.softmax(0))
    seen = torch.bincount(drawn, minlength=len(z))
    assert not seen[p == 0].any()
    there = p > 0
    assert ((seen - count * p).square()[there] / (count * p)[there]).sum() < 18.5
    # In pairs, 24 degrees of freedom: above 51.2 once in a thousand seeds.
    pairs = torch.bincount(drawn[::2] * len(z) + drawn[1::2], minlength=len(z) ** 2).double()
    want = (p[:, None] * p).flatten() * (count // 2)
    there = want > 0
    assert ((pairs - want).square()[there] / want[there]).sum() < 51.2


def test_a_token_that_is_ruled_out_is_not_drawn():
    """Where fewer tokens than k have a logit, those that have none are among the k and never drawn."""
    hidden, weight, bias, targets = operands(ignored=0.0)
    bias[2:] = -INF
    bias[targets] = 0.0  # which the target of another position may be
    allowed = bias == 0
    allowed[:2] = True
    for seed in range(20):
        assert allowed[rivals(hidden, weight, bias, targets, k=40, seed=seed)].all()


def test_a_logit_that_is_no_number_does_not_stop_it():
    """The loss says so; nothing here can without waiting for the device."""
    hidden, weight, bias, targets = operands(ignored=0.0)
    hidden[3] = NAN
    drawn = rivals(hidden, weight, bias, targets)
    assert 0 <= drawn.min() <= drawn.max() < len(weight)


@pytest.mark.parametrize("k", [1, 5])
def test_shapes_that_do_not_depend_on_values(k, monkeypatch):
    """In a CUDA graph every position is worked on, and an ignored one gets 0 all the same."""
    given = operands()
    want = rivals(*given, k=k)
    monkeypatch.setattr("xpo_fast.head.spec.static_shapes", lambda targets: True)
    drawn = rivals(*given, k=k)
    ignored = given[-1] == oracle.IGNORE
    assert not drawn[ignored].any() and not drawn.eq(given[-1]).any()
    if k == 1:
        assert torch.equal(drawn, want)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device(monkeypatch):
    """Once the positions are known: nothing is asked for whose shape or value the host would wait for."""
    given = operands(ignored=0.0)
    monkeypatch.setattr(sampled, "scored_positions", lambda targets, *_: torch.arange(len(targets)))
    with Operations() as seen:
        rivals(*given)
    assert "exponential_" in seen.names
    assert not {"_local_scalar_dense", "nonzero", "multinomial", "masked_select"} & seen.names
