"""gather_logps, for those who have logits: values, gradients, and the gradient in the logits' own memory."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import oracle
import xpo_fast as xf

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # logits
    "one token": (1, 2),
    "rows": (3, 5, 17),
    "more than a cache block": (40, 30011),  # rows are widened some at a time; the last block is ragged
}


def problem(shape, dtype, ignored=0.3):
    shape = SHAPES[shape]
    return oracle.normal(*shape, seed=1, std=4, dtype=dtype), oracle.tokens(shape[:-1], shape[-1], ignored)


def expected(logits, targets, u, temperature=1.0):
    """The log-probs and the gradient of their sum weighted by u."""
    wide = logits.detach().double().requires_grad_()
    scored = targets != oracle.IGNORE
    logp = (wide / temperature).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * scored
    (logp * u).sum().backward()
    return logp.detach(), wide.grad


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient(shape, dtype, temperature, overwrite):
    logits, targets = problem(shape, dtype, ignored=0.0 if shape == "one token" else 0.3)
    u = oracle.normal(*targets.shape, seed=2)
    want, gradient = expected(logits, targets, u, temperature)
    leaf = logits.clone().requires_grad_()
    model_output = leaf * 1.0  # what a model returns: not a leaf, and nobody else's
    logp = xf.gather_logps(model_output, targets, temperature=temperature, overwrite_logits=overwrite)
    exact = dtype == torch.float64
    assert logp.dtype == (torch.float64 if exact else torch.float32) and logp.shape == targets.shape
    assert_close(logp.double(), want, atol=1e-12 if exact else 2e-5, rtol=0)
    assert not logp[targets == oracle.IGNORE].any()

    model_output.retain_grad()
    (logp * u).sum().backward()
    bound = 1e-12 if exact else 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert oracle.error(leaf.grad, gradient) < bound
    assert not leaf.grad[targets == oracle.IGNORE].any()
    assert torch.equal(model_output, model_output.grad) == overwrite
    if not overwrite:
        assert torch.equal(model_output, logits)


@pytest.mark.parametrize("overwrite", [False, True])
def test_memory(overwrite, tmp_path):
    """No float32 copy of bf16 logits: one gradient, or none beside the logits, and blocks of rows of a few MiB."""
    targets = oracle.tokens((300,), 30011)
    leaf = oracle.normal(300, 30011, seed=1, dtype=torch.bfloat16).requires_grad_()
    logits, size = leaf * 1.0, leaf.numel() * 2

    def call():
        logp = xf.gather_logps(logits, targets, overwrite_logits=overwrite)
        return torch.autograd.grad(logp.sum(), logits)

    extra = oracle.Meter(call, tmp_path).peak_bytes - (0 if overwrite else size)
    assert 0 < extra < 10 * 2**20 < size


def test_overwriting_what_somebody_reads():
    """A second backward, or a producer that kept its output (tanh of a softcap), is an error, never a wrong number."""
    logits, targets = problem("rows", torch.float32)
    loss = xf.gather_logps(logits.requires_grad_() * 1.0, targets, overwrite_logits=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        xf.gather_logps(logits.tanh(), targets, overwrite_logits=True).sum().backward()


def test_gradcheck():
    logits, targets = problem("rows", torch.float64)

    def call(x):
        return xf.gather_logps(x, targets, temperature=1.3)

    assert torch.autograd.gradcheck(call, logits.requires_grad_())


def test_backward_again():
    logits, targets = problem("rows", torch.float64)
    loss = xf.gather_logps(logits.requires_grad_(), targets).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="gather_logps has no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_nan_at_ignored_positions(overwrite):
    """Neither logits nor upstream gradients are read there; the gradient is zero, not NaN · 0."""
    logits, targets = problem("rows", torch.float32)
    ignored = targets == oracle.IGNORE
    u = oracle.normal(*targets.shape, seed=2)
    want, gradient = expected(logits, targets, u)
    logits[ignored] = float("nan")
    logits.requires_grad_()
    logp = xf.gather_logps(logits * 1.0, targets, overwrite_logits=overwrite)
    assert_close(logp.double(), want, atol=2e-5, rtol=0)
    logp.backward(torch.where(ignored, float("nan"), u).float())
    assert oracle.error(logits.grad, gradient) < 1e-5


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def test_no_scored_token(shape):
    logits = torch.randn(*shape, 5, requires_grad=True)
    logp = xf.gather_logps(logits, torch.full(shape, oracle.IGNORE))
    assert logp.shape == shape and not logp.any()
    logp.sum().backward()
    assert logits.grad.shape == logits.shape and not logits.grad.any()


def test_extremes():
    """Logits of 1e4, tokens ruled out by −∞, int32 targets, another ignore_index, strided logits."""
    logits = torch.tensor([[1e4, -1e4, 0.0, -float("inf")], [5.0, 5.0, -float("inf"), -float("inf")]])
    logits = torch.stack([logits, logits], dim=1)[:, 0].requires_grad_()
    targets = torch.tensor([1, 7], dtype=torch.int32)
    logp = xf.gather_logps(logits, targets, ignore_index=7)
    assert logp.tolist() == [-2e4, 0.0]
    logp.sum().backward()
    assert logits.grad.tolist() == [[-1, 1, 0, 0], [0, 0, 0, 0]]
    assert_close(xf.gather_logps(logits, torch.tensor([0, 1])), torch.tensor([0.0, -0.6931472]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(3, 5).long()}, r"float logits \(…, V\).*int64"),
        ({"targets": torch.ones(4).long()}, r"\(3, 5\) and \(4,\)"),
        ({"targets": torch.ones(3)}, "integer token ids, got torch.float32"),
        ({"targets": torch.ones(3).bool()}, "integer token ids, got torch.bool"),
        ({"targets": torch.tensor([0, 5, 0])}, "target 5 at position 1 .*vocabulary of 5"),
        ({"targets": torch.tensor([0, 0, -1])}, "target -1 at position 2"),
        ({"targets": torch.ones(3, device="meta").long()}, "cpu.*meta"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("inf")}, "temperature must be positive and finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        xf.gather_logps(**{"logits": torch.randn(3, 5), "targets": torch.tensor([0, 1, -100]), **change})
