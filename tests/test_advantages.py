"""Advantages and estimators of the divergence: literal values, what they are for, TRL's formulas, extremes.

Literal values were worked out by hand from the definitions, with 30-digit arithmetic where a root or an
exponential is in them; the line above each one gives the steps.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from oracle import normal
from xpo_fast.methods.advantages import gae, group_normalised, leave_one_out, whiten
from xpo_fast.methods.math import k1, k2, k3

F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)


def tensor(*values, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# --- Generalised advantage estimation ---

REWARD, VALUE = [[0.0, 0.0, 1.0, 9.0], [1.0, -1.0, 0.5, 2.0]], [[0.5, 0.25, 0.75, 9.0], [0.0, 1.0, 0.5, 0.25]]
MASK = torch.tensor([[True, True, True, False], [True] * 4])
GAE = [
    # deltas -0.25, 0.5, 0.25; 2, -1.5, 0.25, 1.75. From the end, A_t = delta_t + 0.95 A_t+1: 0.25, 0.7375,
    # 0.450625; 1.75, 1.9125, 0.316875, 2.30103125
    ({}, [[0.450625, 0.7375, 0.25], [2.30103125, 0.316875, 1.9125, 1.75]]),
    # deltas with 0.9 V_t+1: -0.275, 0.425, 0.25; 1.9, -1.55, 0.225, 1.75. A_t = delta_t + 0.45 A_t+1: 0.25,
    # 0.5375, -0.033125; 1.75, 1.0125, -1.094375, 1.40753125
    ({"gamma": 0.9, "lam": 0.5}, [[-0.033125, 0.5375, 0.25], [1.40753125, -1.094375, 1.0125, 1.75]]),
]


@pytest.mark.parametrize(("hyper", "expected"), GAE, ids=["default", "gamma 0.9, lam 0.5"])
@DTYPES
def test_gae_literal(hyper, expected, dtype):
    value = torch.tensor(VALUE, dtype=dtype)
    advantage, returns = gae(torch.tensor(REWARD, dtype=dtype), value, MASK, **hyper)
    wanted = torch.zeros(2, 4, dtype=dtype).masked_scatter(MASK, tensor(*expected[0], *expected[1], dtype=dtype))
    assert_close(advantage, wanted)
    assert_close(returns, torch.where(MASK, wanted + value, 0.0))


def plain_gae(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    """Σ_k (γλ)^k δ_t+k, the definition."""
    after = [*value[1:], 0.0]
    delta = [r + gamma * v1 - v for r, v1, v in zip(reward, after, value)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_its_definition_over_the_tokens_of_each_row(gamma, lam):
    # full, with tokens in the middle that are not the policy's, of one token, of none
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0], mask[1], mask[2] = True, False, torch.arange(7) == 3
    reward, value = normal(6, 7, seed=1), normal(6, 7, seed=2)
    advantage, returns = gae(reward, value, mask, gamma=gamma, lam=lam)
    for i in range(6):
        expected = plain_gae(reward[i][mask[i]].tolist(), value[i][mask[i]].tolist(), gamma, lam)
        assert_close(advantage[i][mask[i]], tensor(*expected))
        assert_close(returns[i][mask[i]], tensor(*expected) + value[i][mask[i]])
    assert not advantage[~mask].any() and not returns[~mask].any()


def test_gae_from_monte_carlo_to_temporal_difference():
    reward, value, mask = normal(3, 6, seed=1), normal(3, 6, seed=2), torch.ones(3, 6).bool()
    to_go = reward.flip(1).cumsum(1).flip(1)
    advantage, returns = gae(reward, value, mask, gamma=1.0, lam=1.0)
    assert_close(returns, to_go)  # whatever the values are
    assert_close(advantage, to_go - value)
    advantage, returns = gae(reward, value, mask, gamma=0.9, lam=0.0)
    after = torch.cat([value[:, 1:], torch.zeros(3, 1, dtype=F64)], 1)
    assert_close(returns, reward + 0.9 * after)
    assert_close(advantage, reward + 0.9 * after - value)


def test_gae_of_a_value_that_is_right_is_the_surprise():
    reward, mask = normal(2, 5, seed=1), torch.ones(2, 5).bool()
    value = reward.flip(1).cumsum(1).flip(1)  # what comes, without noise
    for lam in (0.0, 0.5, 1.0):
        advantage, returns = gae(reward, value, mask, lam=lam)
        assert_close(advantage, torch.zeros(2, 5, dtype=F64), rtol=0, atol=1e-12)
        assert_close(returns, value)


@DTYPES
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf], ids=str)
def test_gae_reads_nothing_outside_the_mask(dtype, junk):
    reward, value = torch.tensor(REWARD, dtype=dtype), torch.tensor(VALUE, dtype=dtype)
    mask = MASK.clone()
    mask[1] = tensor(1, 0, 1, 0).bool()
    clean = gae(reward, value, mask)
    dirty = gae(reward.masked_fill(~mask, junk), value.masked_fill(~mask, junk), mask)
    for found, expected in zip(dirty, clean):
        assert_close(found, expected, rtol=0, atol=0)
        assert (found[~mask] == 0).all()


def test_gae_is_a_target_without_a_graph():
    value = torch.tensor(VALUE, requires_grad=True)
    advantage, returns = gae(torch.tensor(REWARD), value, MASK)
    assert not advantage.requires_grad and not returns.requires_grad


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_gae_of_nothing(shape):
    nothing = torch.zeros(shape)
    assert all(x.shape == shape for x in gae(nothing, nothing, nothing.bool()))


@pytest.mark.parametrize(
    ("key", "value"), [("gamma", -0.1), ("gamma", 1.1), ("lam", -0.1), ("lam", 1.1), ("lam", math.nan)]
)
def test_gae_out_of_range(key, value):
    with pytest.raises(ValueError, match=key):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool(), **{key: value})


# --- Groups ---

# deviations (-1.5, -0.5, 0.5, 1.5) and (-1, 3, -1, -1); the sums of their squares 5 and 12, over K - 1 = 3
GROUPS = [[1.0, 2.0, 3.0, 4.0], [0.0, 4.0, 0.0, 0.0]]


@DTYPES
def test_group_normalised_literal(dtype):
    rewards = torch.tensor(GROUPS, dtype=dtype)
    # 1 / (sqrt(5 / 3) + 1e-4) = 0.77453667, 1 / (2 + 1e-4) = 0.49997500
    wanted = [
        [-1.16180501083, -0.387268336944, 0.387268336944, 1.16180501083],
        [-0.49997500125, 1.49992500375, -0.49997500125, -0.49997500125],
    ]
    rtol = 1e-6 if dtype == torch.float32 else 1e-10
    assert_close(group_normalised(rewards), torch.tensor(wanted, dtype=dtype), rtol=rtol, atol=0)
    centred = torch.tensor([[-1.5, -0.5, 0.5, 1.5], [-1.0, 3.0, -1.0, -1.0]], dtype=dtype)
    assert_close(group_normalised(rewards, scale=False), centred)
    # 1 / (2 + 2)
    assert_close(group_normalised(rewards, eps=2.0)[1], centred[1] / 4)


def test_group_normalised_has_mean_0_and_deviation_1():
    found = group_normalised(5 + 3 * normal(6, 8, seed=1), eps=0.0)
    assert_close(found.mean(1), torch.zeros(6, dtype=F64), rtol=0, atol=1e-12)
    assert_close(found.std(1), torch.ones(6, dtype=F64))
    assert_close(group_normalised(10 * normal(6, 8, seed=1), eps=0.0), group_normalised(normal(6, 8, seed=1), eps=0.0))


@DTYPES
@pytest.mark.parametrize("scale", [True, False])
def test_a_group_without_differences_has_no_advantage(dtype, scale):
    for rewards in (torch.full((2, 4), 0.1), torch.full((2, 4), 1e4), torch.tensor([[3.0], [7.0]])):
        found = group_normalised(rewards.to(dtype), scale=scale)
        assert (found == 0).all(), "alike to the last bit, so exactly 0, whatever rounding says of their mean"
    assert (leave_one_out(torch.full((2, 4), 0.1, dtype=dtype)).abs() < 1e-7).all()


@DTYPES
def test_leave_one_out_literal(dtype):
    # 1 - 9/3, 2 - 8/3, 3 - 7/3, 4 - 2; 0 - 4/3, 4 - 0, ...
    wanted = [[-2.0, -2 / 3, 2 / 3, 2.0], [-4 / 3, 4.0, -4 / 3, -4 / 3]]
    assert_close(leave_one_out(torch.tensor(GROUPS, dtype=dtype)), torch.tensor(wanted, dtype=dtype))


@pytest.mark.parametrize("k", [2, 3, 8])
def test_leave_one_out_is_its_definition_and_sums_to_nothing(k):
    rewards = normal(5, k, seed=k) + 100
    found = leave_one_out(rewards)
    for g in range(5):
        for i in range(k):
            others = torch.cat([rewards[g, :i], rewards[g, i + 1 :]])
            assert_close(found[g, i], rewards[g, i] - others.mean())
    assert_close(found.sum(1), torch.zeros(5, dtype=F64), rtol=0, atol=1e-10)
    assert_close(found, group_normalised(rewards, scale=False) * k / (k - 1))
    assert_close(leave_one_out(rewards + 7.5), found)


def test_leave_one_out_needs_another():
    with pytest.raises(ValueError, match=r"at least 2.*got 1"):
        leave_one_out(torch.tensor([[3.0], [7.0]]))


@pytest.mark.parametrize("function", [group_normalised, leave_one_out])
@pytest.mark.parametrize("junk", [0.5, math.nan, math.inf], ids=str)
def test_groups_of_different_sizes(function, junk):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0] * 5]).bool()
    rewards = normal(4, 5, seed=1)
    found = function(rewards.masked_fill(~mask, junk), mask=mask)
    for i in range(2):
        assert_close(found[i][mask[i]], function(rewards[i][mask[i]][None])[0])
    assert (found[2:] == 0).all() and (found[~mask] == 0).all()  # one alone has nothing to be compared with


@pytest.mark.parametrize("k", [1, 4])
def test_agrees_with_trls_advantages(k):
    # trl 1.16, trainer/grpo_trainer.py and rloo_trainer.py, _generate_and_score_completions; nanstd divides
    # by K - 1
    rewards = normal(3 * k, seed=1)
    grouped = rewards.view(-1, k)
    mean = grouped.mean(1).repeat_interleave(k)
    std = (grouped.std(1) if k > 1 else torch.zeros(3, dtype=F64)).repeat_interleave(k)
    assert_close(group_normalised(grouped).flatten(), (rewards - mean) / (std + 1e-4))
    assert_close(group_normalised(grouped, scale=False).flatten(), rewards - mean)
    if k > 1:
        baselines = ((grouped.sum(1, keepdim=True) - grouped) / (k - 1)).view(-1)
        assert_close(leave_one_out(grouped).flatten(), rewards - baselines)


@pytest.mark.parametrize("function", [group_normalised, leave_one_out])
def test_no_groups_are_legal(function):
    assert function(torch.zeros(0, 4)).shape == (0, 4)


# --- Whitening ---


@DTYPES
def test_whiten_literal(dtype):
    x = torch.tensor([[1.0, 2.0, 50.0], [3.0, 50.0, 6.0]], dtype=dtype)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    # mean 3, deviations (-2, -1, 0, 3), variance 14 / 3: times 1 / sqrt(14 / 3) = 0.46291005
    wanted = [[-0.925820099773, -0.462910049886, 0.0], [0.0, 0.0, 1.38873014966]]
    assert_close(whiten(x, mask), torch.tensor(wanted, dtype=dtype), rtol=1e-6, atol=1e-7)


def test_whiten_has_mean_0_and_variance_1_over_the_mask():
    x, mask = 5 + 3 * normal(6, 7, seed=1), normal(6, 7, seed=2) > 0
    found = whiten(x, mask)
    assert found[mask].mean().abs() < 1e-12
    assert found[mask].var().item() == pytest.approx(1, rel=1e-6)
    assert (found[~mask] == 0).all()
    assert_close(whiten(2 * x + 9, mask), found)


@DTYPES
@pytest.mark.parametrize("junk", [math.nan, math.inf], ids=str)
def test_whiten_reads_nothing_outside_the_mask(dtype, junk):
    x, mask = normal(4, 5, seed=1, dtype=dtype), normal(4, 5, seed=2) > 0
    assert_close(whiten(x.masked_fill(~mask, junk), mask), whiten(x, mask), rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize("kept", [0, 1, 5])
def test_whiten_without_variation_is_nothing(dtype, kept):
    mask = torch.arange(5)[None] < kept
    found = whiten(torch.full((1, 5), 2.0, dtype=dtype), mask)
    assert found.tolist() == [[0.0] * 5]


# --- k1, k2, k3 ---

# d = ref - logp
POINTS = [
    # d, k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1
    (0.3, -0.3, 0.045, 0.0498588075760031),
    (-0.4, 0.4, 0.08, 0.0703200460356393),
    (0.0, 0.0, 0.0, 0.0),
    (2.0, -2.0, 2.0, 4.38905609893065),
    (-50.0, 50.0, 1250.0, 49.0),
    (50.0, -50.0, 1250.0, 5.18470552858707e21),
    (-1999.0, 1999.0, 1998000.5, 1998.0),
]


@pytest.mark.parametrize(("d", "one", "two", "three"), POINTS)
@DTYPES
def test_k_literal_and_slope(d, one, two, three, dtype):
    start = 0.0 if abs(d) < 1 else -2000.0 if d > 0 else -1.0
    for function, value, slope in ((k1, one, 1.0), (k2, two, -d), (k3, three, -math.expm1(d))):
        logp = tensor(start, dtype=dtype).requires_grad_()
        found = function(logp, tensor(start + d, dtype=dtype))
        assert_close(found, tensor(value, dtype=dtype), rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(found.sum(), logp)
        assert_close(gradient, tensor(slope, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", [k1, k2, k3])
def test_k_gradcheck(function):
    assert torch.autograd.gradcheck(function, (normal(6, seed=1).requires_grad_(), normal(6, seed=2).requires_grad_()))


def test_k1_and_k3_are_unbiased_and_k2_is_nearly():
    logp, ref = normal(7, seed=1).log_softmax(0), normal(7, seed=2).log_softmax(0)
    divergence = (logp.exp() * (logp - ref)).sum()
    for function in (k1, k3):
        assert_close((logp.exp() * function(logp, ref)).sum(), divergence)
    near = (logp + 0.01 * normal(7, seed=3)).log_softmax(0)
    divergence = (logp.exp() * (logp - near)).sum()
    assert_close((logp.exp() * k2(logp, near)).sum(), divergence, rtol=0.02, atol=0)


def test_k3s_variance_is_less_than_k1s_and_it_is_never_negative():
    logp = normal(50, seed=1).log_softmax(0)
    ref = (logp + 0.1 * normal(50, seed=2)).log_softmax(0)

    def variance(function):
        x = function(logp, ref)
        mean = (logp.exp() * x).sum()
        return (logp.exp() * (x - mean) ** 2).sum()

    assert variance(k3) < variance(k1) / 50
    d = torch.cat(
        [torch.linspace(-60, 60, 2001), 10 ** torch.linspace(-20, 0, 500), -(10 ** torch.linspace(-20, 0, 500))]
    )
    for dtype in (torch.float32, F64):
        assert (k3(torch.zeros_like(d, dtype=dtype), d.to(dtype)) >= 0).all()
        assert (k2(torch.zeros_like(d, dtype=dtype), d.to(dtype)) >= 0).all()


@pytest.mark.parametrize("d", [1e-2, -1e-2, 1e-3, -1e-3, 1e-4])
def test_k3_is_accurate_near_the_reference(d):
    """In float32, where e^d - d - 1 taken literally is 24% off at 1e-3: that is where most tokens are."""
    x = torch.tensor([d])
    exact = x.double().square() / 2 + x.double() ** 3 / 6 + x.double() ** 4 / 24
    assert_close(k3(torch.zeros(1), x), exact.float(), rtol=2e-3, atol=0)
