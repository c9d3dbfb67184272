"""`weight_grad`: dW goes straight into a buffer, such as Megatron's main_grad or an existing weight.grad."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from xpo_fast.head import head_plan

VOCAB, WIDTH = 57, 6


def operands(dtype=torch.float64):
    hidden, weight, bias = (
        oracle.normal(*s, seed=k, dtype=dtype).requires_grad_()
        for k, s in enumerate(((4, 9, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
    )
    return hidden, weight, bias, oracle.tokens((4, 9), VOCAB, 0.3)


def buffer(weight):
    """Something is there already: another micro-batch's gradient."""
    return oracle.normal(*weight.shape, seed=9).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def stats_loss(hidden, weight, bias, targets, **options):
    found = xf.token_stats(
        hidden, weight, targets, bias=bias, outputs=("entropy",), softcap=4.0, chunk_tokens=5, **options
    )
    return (found.logp * torch.linspace(1, 2, 9)).sum() + found.entropy.sum()


def logps_loss(hidden, weight, bias, targets, **options):
    return xf.token_logps(hidden, weight, targets, bias=bias, chunk_tokens=5, **options).sum()


def objective_loss(name, **hyperparameters):
    def loss(hidden, weight, bias, targets, **options):
        ref = {"ref_hidden": hidden.detach() * 0.9} if xf.METHODS[name].needs_reference else {}
        objective = xf.Objective(name, tile_bytes=7 * VOCAB * 8, **hyperparameters)
        return objective(hidden, weight, targets, bias=bias, **ref, **options).loss

    return loss


# At 4F; with a statistic's own gradient; unit by unit at 3F; a method of the whole batch, at 4F.
LOSSES = {
    "token_logps": logps_loss,
    "token_stats": stats_loss,
    "dpo": objective_loss("dpo"),
    "aot": objective_loss("aot"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_dw_is_added(name, dtype):
    """What was there, and dW in the accumulation dtype; the other gradients as ever."""
    loss = LOSSES[name]
    hidden, weight, bias, targets = operands(dtype)
    wanted = torch.autograd.grad(loss(hidden, weight, bias, targets), (hidden, weight, bias))
    into = buffer(weight)
    before = into.clone()
    found = loss(hidden, weight, bias, targets, weight_grad=into)
    found.backward()
    assert weight.grad is None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2**-8)
    assert oracle.error(into, before + wanted[1]) < tolerance
    assert oracle.error(into - before, wanted[1]) < 100 * tolerance  # of which the difference loses some
    assert_close((hidden.grad, bias.grad), (wanted[0], wanted[2]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_two_micro_batches(name):
    """Both forwards, then both backwards; into weight.grad itself."""
    loss = LOSSES[name]
    hidden, weight, bias, targets = operands()
    parts = slice(0, 2), slice(2, 4)
    want = sum(torch.autograd.grad(loss(hidden[p], weight, bias, targets[p]), weight)[0] for p in parts)
    weight.grad = torch.zeros_like(weight)
    losses = [loss(hidden[p], weight, bias, targets[p], weight_grad=weight.grad) for p in parts]
    for found in losses:
        found.backward()
    assert_close(weight.grad, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "aot"])
def test_scaled_loss(name):
    """A loss scaler's scale, or 1 over the micro-batches."""
    loss = LOSSES[name]
    hidden, weight, bias, targets = operands()
    want = torch.autograd.grad(loss(hidden, weight, bias, targets), (hidden, weight, bias))
    into = torch.zeros_like(weight)
    (0.25 * loss(hidden, weight, bias, targets, weight_grad=into, grad_scale=0.25)).backward()
    for x, y in zip((hidden.grad, into, bias.grad), want, strict=True):
        assert_close(x, 0.25 * y, rtol=1e-10, atol=1e-12)


def test_another_scale_than_was_said():
    hidden, weight, bias, targets = operands()
    loss = LOSSES["dpo"](hidden, weight, bias, targets, weight_grad=torch.zeros_like(weight))
    with pytest.raises(RuntimeError, match=r"1 times the loss.*pass what the loss is multiplied by as grad_scale= 0.5"):
        (0.5 * loss).backward()


def test_nothing_without_gradient():
    hidden, weight, bias, targets = operands()
    into = buffer(weight)
    with torch.no_grad():
        for loss in LOSSES.values():
            loss(hidden, weight, bias, targets, weight_grad=into)
    assert_close(into, buffer(weight), rtol=0, atol=0)


def test_no_scored_token():
    hidden, weight, bias, targets = operands()
    into = buffer(weight)
    for loss in LOSSES.values():
        loss(hidden, weight, bias, torch.full_like(targets, oracle.IGNORE), weight_grad=into).backward()
    assert_close(into, buffer(weight), rtol=0, atol=0)


def test_in_the_plan():
    """No float32 dW beside the narrow one, and that is said."""
    with torch.device("meta"):
        hidden = torch.empty(9000, 2048, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(151936, 2048, dtype=torch.bfloat16, requires_grad=True)
        into = torch.empty(151936, 2048)
    plans = [head_plan(hidden, weight, weight_grad=x) for x in (None, into)]
    assert [plan.accumulator_bytes for plan in plans] == [2 * 151936 * 2048, 0]
    assert "593.5 MiB beside the gradient of the head" in str(plans[0]) and "beside" not in str(plans[1])


def test_compiled():
    """With the graph broken around nothing: the buffer is an input that the backward writes."""
    hidden, weight, bias, targets = operands()
    want = torch.autograd.grad(logps_loss(hidden, weight, bias, targets), weight)[0]
    into = torch.zeros_like(weight)
    loss = torch.compile(logps_loss, backend="aot_eager")
    loss(hidden, weight, bias, targets, weight_grad=into).backward()
    assert_close(into, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, g: (w, g[:-1]), r"weight_grad must be torch.float64 \(57, 6\) on cpu, got torch.float64 \(56, 6\)"),
        (lambda w, g: (w, g.float()), "weight_grad must be torch.float64"),
        (lambda w, g: (w, g.T.contiguous().T), "weight_grad must be contiguous"),
        (lambda w, g: (w, g.requires_grad_()), "require no gradient"),
        (lambda w, g: (w.detach(), g), "weight requires no gradient: leave it out"),
    ],
)
def test_buffers_that_do_not_fit(change, message):
    hidden, weight, bias, targets = operands()
    weight, into = change(weight, buffer(weight))
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=message):
            loss(hidden, weight, bias, targets, weight_grad=into)


def test_not_for_all():
    hidden, weight, bias, targets = operands()
    into = buffer(weight)
    with pytest.raises(ValueError, match="dense backend has no use for weight_grad"):
        logps_loss(hidden, weight, bias, targets, weight_grad=into, backend="dense")
    with pytest.raises(ValueError, match=r"cringe.*weight_grad"):
        objective_loss("cringe")(hidden, weight, bias, targets, weight_grad=into)
