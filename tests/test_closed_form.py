"""The algorithms against policies that are known in closed form, see bench/closed_form.py."""

import pytest
import torch

import closed_form


@pytest.mark.parametrize("name", closed_form.ALGORITHMS)
def test_converges_to_the_known_policy(name, monkeypatch):
    monkeypatch.setattr(closed_form, "LEARNING_RATE", 0.1)
    found = closed_form.run(name, seed=1, steps=150)
    assert found["start"] > 0.4
    assert found["distance"] < closed_form.TOLERANCE


def test_k3_in_the_loss_leads_elsewhere():
    bandit = closed_form.Bandit(1)
    assert closed_form.distance(bandit.optimum(), bandit.forward_optimum()) > 0.05


def test_optima_are_optimal():
    """No policy near them does better at what they are said to maximise."""
    bandit = closed_form.Bandit(0)
    ref, beta = bandit.log_ref.exp(), closed_form.BETA

    def reverse(p):
        return float((p * bandit.reward).sum() - beta * (p * (p / ref).log()).sum())

    def forward(p):
        return float((p * bandit.reward).sum() - beta * (ref * (ref / p).log()).sum())

    for value, optimum in ((reverse, bandit.optimum()), (forward, bandit.forward_optimum())):
        assert abs(float(optimum.sum()) - 1) < 1e-9
        for _ in range(50):
            near = (optimum.log() + 0.05 * torch.randn(closed_form.ACTIONS, dtype=torch.float64)).softmax(0)
            assert value(near) < value(optimum)
