"""Importance weights and the measures of mismatch: by hand, by TRL's formulas in float64, and in a run's gradients."""

from __future__ import annotations

import math

import pytest
import torch

from test_rl import NEW, make_trainer, step
from test_trainer import assert_same_gradients
from xpo_fast.rl.config import RLConfig
from xpo_fast.rl.mismatch import importance_weights, mismatch

LN2 = math.log(2)
# Ratios 2, 1/4, 8 | 1/2, 2, – | – , – , –: a ragged batch with a row of nothing.
RATIO = torch.tensor([[LN2, -2 * LN2, 3 * LN2], [-LN2, LN2, 50.0], [9.0, 9.0, 9.0]])
MASK = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ({"level": "token"}, [[2, 0.25, 8], [0.5, 2, 1], [1, 1, 1]]),
        ({"level": "token", "upper": 3.0}, [[2, 0.25, 3], [0.5, 2, 1], [1, 1, 1]]),
        ({"level": "token", "lower": 0.4, "upper": 3.0}, [[2, 0.4, 3], [0.5, 2, 1], [1, 1, 1]]),
        ({"level": "token", "mode": "mask", "lower": 0.4, "upper": 3.0}, [[2, 0, 0], [0.5, 2, 1], [1, 1, 1]]),
        ({"level": "token", "mode": "mask", "lower": 0.3}, [[2, 0, 8], [0.5, 2, 1], [1, 1, 1]]),
        ({"level": "sequence"}, [4, 1, 1]),
        ({"level": "sequence", "upper": 3.0}, [3, 1, 1]),
        ({"level": "sequence", "lower": 1.5, "upper": 3.0}, [3, 1.5, 1.5]),
        ({"level": "sequence", "mode": "mask", "upper": 3.0}, [0, 1, 1]),
        ({"level": "sequence", "mode": "mask", "lower": 1.5, "upper": 5.0}, [4, 0, 0]),
    ],
)
def test_weights_by_hand(how, want):
    assert torch.allclose(importance_weights(RATIO, MASK, **how), torch.tensor(want, dtype=torch.float32))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights_are_those_of_trl(mode):
    """As GRPOTrainer of TRL 1.16 has them: exp of the masked difference or its sum, then clamp or masked_fill."""
    torch.manual_seed(0)
    ratio, mask = 0.7 * torch.randn(6, 9, dtype=torch.float64), torch.rand(6, 9) < 0.7
    difference = ratio * mask
    theirs = torch.exp(difference.sum(dim=-1, keepdim=True) if mode.startswith("sequence") else difference)
    low, high = 0.6, 1.7
    if mode.endswith("truncate"):
        theirs = torch.clamp(theirs, min=low, max=high)
    else:
        theirs = theirs.masked_fill((theirs < low) | (theirs > high), 0.0)
    level, bound = mode.split("_")
    ours = importance_weights(ratio, mask, level=level, mode=bound, lower=low, upper=high)
    if level == "token":
        assert torch.equal(ours[mask], theirs[mask])
    else:
        assert torch.equal(ours, theirs[:, 0])


def test_mismatch_by_hand():
    found = mismatch(RATIO, MASK)
    logs, ws = [LN2, -2 * LN2, 3 * LN2, -LN2, LN2], [2, 0.25, 8, 0.5, 2]
    assert found["off_policy/logp_gap"] == pytest.approx(8 * LN2 / 5)
    assert found["off_policy/kl"] == pytest.approx(sum(w - 1 - x for w, x in zip(ws, logs, strict=True)) / 5)
    assert found["off_policy/chi2"] == pytest.approx((4 + 1 / 16 + 64 + 1 / 4 + 4) / 5 - 1)
    assert found["off_policy/chi2_sequence"] == pytest.approx((16 + 1) / 2 - 1)
    assert set(mismatch(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)).values()) == {0.0}
    assert all(map(math.isnan, mismatch(RATIO, torch.zeros_like(MASK)).values()))
    far = mismatch(torch.full((1, 2), 1e4), torch.ones(1, 2, dtype=torch.bool))
    assert all(math.isfinite(torch.tensor(x, dtype=torch.float32)) for x in far.values())


def test_mismatch_is_kl_and_chi2_of_the_distributions():
    """Drawn from μ, the means tend to KL(μ‖π) and χ²(π‖μ), which are sums over the vocabulary."""
    torch.manual_seed(1)
    mu, pi = (0.5 * torch.randn(2, 11, dtype=torch.float64)).softmax(dim=-1)
    drawn = torch.multinomial(mu, 200_000, replacement=True)[:, None]
    found = mismatch((pi / mu).log()[drawn], torch.ones_like(drawn, dtype=torch.bool))
    assert found["off_policy/kl"] == pytest.approx(float((mu * (mu / pi).log()).sum()), rel=0.02)
    assert found["off_policy/chi2"] == pytest.approx(float((pi**2 / mu).sum() - 1), rel=0.02)
    assert found["off_policy/chi2_sequence"] == pytest.approx(found["off_policy/chi2"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": "row"}, "level of token, sequence"),
        ({"mode": "drop"}, "mode of truncate, mask"),
        ({"lower": 2.0, "upper": 2.0}, "0 ≤ lower < upper"),
        ({"lower": -0.1}, "0 ≤ lower < upper"),
    ],
)
def test_weights_that_there_are_not(options, said):
    with pytest.raises(ValueError, match=said):
        importance_weights(RATIO, MASK, **options)


def test_a_run_weighs_masks_and_logs(tmp_path):
    """A sampler that thinks its tokens e^0.5 less likely than they are."""
    one = step(make_trainer(tmp_path, shift=0.0, temperature=1.0))[1]
    w = math.exp(0.5)
    log, got = step(make_trainer(tmp_path, shift=-0.5, temperature=1.0, off_policy_mode="mask"))
    assert_same_gradients({n: w * g for n, g in one.items()}, got, rtol=1e-4)
    want = {
        "off_policy/logp_gap": 0.5, "off_policy/kl": w - 1.5, "off_policy/chi2": w * w - 1, "off_policy/weight": w,
        "off_policy/outside": 0.0,
    }  # fmt: skip
    assert {name: log[name] for name in want} == pytest.approx(want, rel=1e-3)
    assert log["off_policy/chi2_sequence"] <= math.exp(NEW) - 1 + 1e-2
    log, got = step(make_trainer(tmp_path, shift=-0.5, temperature=1.0, off_policy_mode="mask", off_policy_cap=1.5))
    assert log["off_policy/weight"] == 0 and log["off_policy/outside"] == 1
    assert all(not g.any() for g in got.values())
    floor = {"off_policy_floor": 1.75, "off_policy_cap": 3.0}
    log, got = step(make_trainer(tmp_path, shift=-0.5, temperature=1.0, **floor))
    assert_same_gradients({n: 1.75 * g for n, g in one.items()}, got, rtol=1e-4)
    assert log["off_policy/outside"] == 1


def test_a_samplers_log_probs_at_the_temperature_are_corrected_for(tmp_path):
    """At temperature 0.7 a sampler is corrected for where it says that its log-probs are those of the draws."""
    silent = make_trainer(tmp_path, shift=-0.5)
    assert "off_policy/weight" not in step(silent)[0]
    told = make_trainer(tmp_path, shift=-0.5)
    told.rollout.logps_as_drawn = True
    assert step(told)[0]["off_policy/weight"] == pytest.approx(math.exp(0.5), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"off_policy_mode": "trunkate"}, "did you mean truncate"),
        ({"off_policy_floor": 2.0}, "below off_policy_cap=2"),
        ({"off_policy_floor": -1.0}, "0 or more"),
        ({"off_policy": "none", "off_policy_floor": 0.5}, "off_policy_floor bounds the weights"),
        ({"off_policy": "none", "off_policy_mode": "mask"}, "off_policy_mode bounds the weights"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        RLConfig(str(tmp_path), **options)
