"""gather_logps by the Triton kernels, against float64; interpreter.py says where they run."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import interpreter
import oracle
import xpo_fast as xf
from interpreter import DEVICE, INTERPRETED, needs_gpu, needs_triton, run_checks
from pairs import in_pairs
from test_gather import expected

pytestmark = interpreter.numpy_warnings
poison = interpreter.poison

BLOCK = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "one token": (1, 2),
    "less than a block": (2, 3, 17),
    "a block": (3, BLOCK),
    "a block and one": (3, BLOCK + 1),
    "ragged": (5, 2 * BLOCK + 999),
}


@needs_triton
def test_in_the_interpreter():
    run_checks(__file__, interpreted=True)


@needs_gpu
def test_on_a_gpu():
    run_checks(__file__, interpreted=False)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes a CPU's logits")
def test_no_kernel_on_a_cpu():
    with pytest.raises(ValueError, match="runs on GPUs, got operands on cpu"):
        xf.gather_logps(torch.randn(3, 5), torch.tensor([0, 1, 2]), backend="triton")


def problem(shape, dtype, ignored=0.3):
    shape = {**SHAPES, "blocks of 16 and one": (3, 16 * 9 + 1)}[shape]
    logits = oracle.normal(*shape, seed=1, std=4, dtype=dtype).to(DEVICE)
    return logits, oracle.tokens(shape[:-1], shape[-1], ignored).to(DEVICE)


def bound(dtype):
    """Of the gradient's relative error. The interpreter cuts off where a GPU rounds."""
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


def gather(logits, targets, **options):
    return xf.gather_logps(logits, targets, backend="triton", **options)


# A dtype is read and written, a shape cut into blocks, a temperature divided by: in twos, not all of them at once.
@in_pairs(("shape", SHAPES), ("dtype", DTYPES), ("temperature", [1.0, 0.6]), ("overwrite", [False, True]))
def check_values_and_gradient(shape, dtype, temperature, overwrite):
    logits, targets = problem(shape, dtype, ignored=0.0 if shape == "one token" else 0.3)
    u = oracle.normal(*targets.shape, seed=2).to(DEVICE)
    want, gradient = expected(logits, targets, u, temperature)
    leaf = logits.clone().requires_grad_()
    model_output = leaf * 1.0
    logp = gather(model_output, targets, temperature=temperature, overwrite_logits=overwrite)
    assert logp.dtype == torch.float32 and logp.shape == targets.shape
    assert_close(logp.double(), want, atol=2e-5, rtol=0)
    assert not logp[targets == oracle.IGNORE].any()

    model_output.retain_grad()
    (logp * u).sum().backward()
    assert oracle.error(leaf.grad, gradient) < bound(dtype)
    assert not leaf.grad[targets == oracle.IGNORE].any()
    assert torch.equal(model_output, model_output.grad) == overwrite
    if not overwrite:
        assert torch.equal(model_output, logits)


@pytest.mark.parametrize("block", [16, 8192])
def check_other_blocks(block):
    """Many blocks to a row, and one that is wider than it."""
    from xpo_fast.kernels import launch

    logits, targets = problem("blocks of 16 and one", torch.float32)
    u = oracle.normal(*targets.shape, seed=2).to(DEVICE)
    want, gradient = expected(logits, targets, u)
    logits.requires_grad_()
    config = launch.config(1, 2, BLOCK=block)
    with launch.override("gather_forward", config), launch.override("gather_backward", config):
        logp = gather(logits, targets)
        (logp * u).sum().backward()
    assert_close(logp.double(), want, atol=2e-5, rtol=0)
    assert oracle.error(logits.grad, gradient) < 1e-5


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def check_strided_rows(overwrite):
    """The first columns of a padded vocabulary: what lies between the rows is neither read nor written."""
    padded = oracle.normal(4, 23, seed=1, dtype=torch.float32).to(DEVICE)
    padded[:, 17:] = float("nan")
    targets = oracle.tokens((4,), 17).to(DEVICE)
    want, gradient = expected(padded[:, :17], targets, 1.0)
    rows = padded.clone()[:, :17].requires_grad_()
    logp = gather(rows.view_as(rows), targets, overwrite_logits=overwrite)
    assert_close(logp.double(), want, atol=2e-5, rtol=0)
    (found,) = torch.autograd.grad(logp.sum(), rows)
    assert oracle.error(found, gradient) < 1e-5
    between = rows.detach().as_strided((3, 6), (23, 1), 17)
    assert between.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2 * BLOCK + 999, 2 * BLOCK, 7])
def check_aligned_rows(vocab, dtype):
    """Where blocks are full there is no mask: one ends where the row does, another before; or there is none."""
    rows = torch.full((5, 2 * BLOCK + 1008), float("nan"), dtype=dtype, device=DEVICE)
    rows[:, :vocab] = oracle.normal(5, vocab, seed=1, std=4, dtype=dtype)
    logits, targets = rows[:, :vocab].clone(), oracle.tokens((5,), vocab).to(DEVICE)
    targets[0] = vocab - 1
    u = oracle.normal(5, seed=2, dtype=torch.float32).to(DEVICE)
    u[1] = 0
    want, gradient = expected(logits, targets, u)
    leaf = rows.requires_grad_()
    logp = gather(leaf.view_as(leaf)[:, :vocab], targets, overwrite_logits=True)
    assert_close(logp.double(), want, atol=2e-5, rtol=0)
    (logp * u).sum().backward()
    assert oracle.error(rows.detach()[:, :vocab], gradient) < bound(dtype)
    assert rows[:, vocab:].isnan().all()


def check_offsets_beyond_int32():
    """The last of three rows lies 2³¹ elements and more after the first; untouched memory costs nothing on a CPU."""
    stride, vocab = 2**30 + 16, 21
    torch.use_deterministic_algorithms(False)  # or all of it would be written
    memory = torch.empty(2 * stride + vocab, dtype=torch.bfloat16, device=DEVICE)
    logits = memory.as_strided((3, vocab), (stride, 1))
    logits.copy_(oracle.normal(3, vocab, seed=1, std=4))
    targets = torch.tensor([3, oracle.IGNORE, 20], device=DEVICE)
    u = torch.tensor([1.0, 1.0, -2.0], device=DEVICE)
    want, gradient = expected(logits, targets, u)
    logits.requires_grad_()
    logp = gather(logits.view_as(logits), targets, overwrite_logits=True)
    assert_close(logp.double(), want, atol=2e-5, rtol=0)
    (logp * u).sum().backward()
    assert oracle.error(logits.detach(), gradient) < bound(torch.bfloat16)


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def check_rows_that_are_not_read(overwrite):
    """NaN logits of an ignored row, and of one with u = 0, do not reach the gradient: it is zero there."""
    logits, targets = problem("ragged", torch.float32, ignored=0.0)
    targets[1] = oracle.IGNORE
    u = oracle.normal(5, seed=2, dtype=torch.float32).to(DEVICE)
    u[3] = 0
    want, gradient = expected(logits, targets, u)
    logits[1] = float("nan")
    logits[3] = float("nan")
    leaf = logits.requires_grad_()
    logp = gather(leaf * 1.0, targets, overwrite_logits=overwrite)
    assert logp[3].isnan() and logp[1] == 0
    scored = torch.tensor([0, 2, 4], device=DEVICE)
    assert_close(logp[scored].double(), want[scored], atol=2e-5, rtol=0)
    u[1] = float("nan")
    logp.backward(u)
    assert oracle.error(leaf.grad, gradient) < 1e-5
    assert not leaf.grad[[1, 3]].any()


def check_extremes():
    """Logits of 1e4, −∞ for tokens ruled out, int32 targets, another ignore_index."""
    logits = torch.tensor([[1e4, -1e4, 0.0, -float("inf")], [5.0, 5.0, -float("inf"), -float("inf")]])
    logits = logits.to(DEVICE).requires_grad_()
    targets = torch.tensor([1, 7], dtype=torch.int32, device=DEVICE)
    logp = gather(logits, targets, ignore_index=7)
    assert logp.tolist() == [-2e4, 0.0]
    logp.sum().backward()
    assert logits.grad.tolist() == [[-1, 1, 0, 0], [0, 0, 0, 0]]
    assert_close(gather(logits, torch.tensor([0, 2], device=DEVICE)).tolist(), [0.0, -float("inf")])


@pytest.mark.parametrize("row", [[0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0], [-float("inf")] * 3])
def check_not_a_number(row):
    """A row without a softmax has no log-prob, whichever lane the cause is in."""
    assert gather(torch.tensor([row], device=DEVICE), torch.tensor([2], device=DEVICE)).isnan().all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def check_no_scored_token(shape):
    logits = torch.randn(*shape, 5, device=DEVICE, requires_grad=True)
    logp = gather(logits, torch.full(shape, oracle.IGNORE, device=DEVICE))
    assert logp.shape == shape and not logp.any()
    logp.sum().backward()
    assert logits.grad.shape == logits.shape and not logits.grad.any()


def check_overwriting_what_somebody_reads():
    """What a kernel writes is not seen by autograd unless it is told."""
    logits, targets = problem("less than a block", torch.float32)
    loss = gather(logits.requires_grad_() * 1.0, targets, overwrite_logits=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def check_operators():
    """opcheck: schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes."""
    logits, targets = problem("less than a block", torch.bfloat16)
    logits, targets = logits.flatten(0, 1), targets.flatten()
    u = oracle.normal(6, seed=2, dtype=torch.float32).to(DEVICE)
    arguments = (logits.clone().requires_grad_(), targets, 0.8, oracle.IGNORE, False, True)
    torch.library.opcheck(torch.ops.xpo_fast.gather_logps.default, arguments)
    _, normaliser = torch.ops.xpo_fast.gather_logps(*arguments)
    arguments = (logits, targets, u, 0.8, oracle.IGNORE, normaliser.detach())
    torch.library.opcheck(torch.ops.xpo_fast.gather_logps_backward.default, arguments)
    for given in (arguments, (*arguments[:-1], None)):
        torch.library.opcheck(torch.ops.xpo_fast.gather_logps_overwrite.default, given)


def check_compiled():
    """torch.compile sees what the backward overwrites."""
    logits, targets = problem("less than a block", torch.float32)
    logits.requires_grad_()

    def loss(logits, targets):
        logp = gather(logits * 2, targets, temperature=0.7, overwrite_logits=True)
        return logp.square().sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found = call(logits, targets)
        results.append((found.detach(), *torch.autograd.grad(found, logits)))
    assert_close(*results)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.randn(3, 5).double(), "float64"),
        (torch.randn(5, 3).T, r"stride 1 along V, got .*\(1, 3\).*backend='auto'"),
    ],
    ids=["float64", "transposed"],
)
def check_errors(logits, message):
    logits, targets = logits.to(DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    with pytest.raises(ValueError, match=message):
        gather(logits, targets)
    assert_close(
        xf.gather_logps(logits, targets), logits.log_softmax(-1).diagonal().to(xf.gather_logps(logits, targets))
    )
    with pytest.raises(ValueError, match="no backend named 'cuda'; there are auto, torch, triton"):
        xf.gather_logps(logits, targets, backend="cuda")


@pytest.mark.skipif(DEVICE != "cpu", reason="on a device a bad target trips an assertion of the device")
def check_target_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"target 5 at position 1 .*vocabulary of 5"):
        gather(torch.randn(3, 5), torch.tensor([0, 5, -100]))
