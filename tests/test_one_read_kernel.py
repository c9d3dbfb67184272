"""The kernel that reads each product once, against float64: values, gradients, traffic.

interpreter.py says where the checks run. The interpreter is made to round to bfloat16 as GPUs do.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.testing import assert_close

import interpreter
import oracle
import test_head
from interpreter import DEVICE, INTERPRETED, needs_gpu, needs_triton, poison, run_checks  # noqa: F401
from pairs import in_pairs

pytestmark = interpreter.numpy_warnings
BLOCK = 128  # columns; c is a logit of the first of them, or the target's
INF = float("inf")
SOME = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logit", "top1")


@needs_triton
def test_in_the_interpreter():
    run_checks(__file__, interpreted=True)


@needs_gpu
def test_on_a_gpu():
    run_checks(__file__, interpreted=False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if not INTERPRETED and DEVICE != "cuda":
        yield
        return
    from xpo_fast.kernels import launch, one_read  # noqa: F401, declares what is overridden

    if INTERPRETED:
        rounded_to_nearest(monkeypatch)
    with contextlib.ExitStack() as stack:
        for name in (n + m for n in ("one_read", "one_read_statistics") for m in ("", "_gradient")):
            stack.enter_context(launch.override(name, launch.config(4, 3, BLOCK=BLOCK)))
        yield


def rounded_to_nearest(monkeypatch):
    """float32 to bfloat16, which the interpreter cuts off."""
    from triton.runtime import interpreter as triton_interpreter

    convert = triton_interpreter._convert_float

    def convert_float(x, kind, to, rounding):
        if (str(kind), str(to)) == ("fp32", "bf16"):
            return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy().reshape(-1)
        return convert(x, kind, to, rounding)

    monkeypatch.setattr(triton_interpreter, "_convert_float", convert_float)


# --- distributions, (n, V) products and (n,) targets -----------------------------------------------------------------


def ordinary(n, vocab):
    return oracle.normal(n, vocab, seed=1, std=3.0, dtype=torch.float32), oracle.tokens((n,), vocab, 0.0)


def confident(n, vocab):
    """p_y up to 1 − 1e−12."""
    x, y = ordinary(n, vocab)
    x[torch.arange(n), y] = x.logsumexp(1) + torch.linspace(2.0, 27.0, n)
    return x, y


def surprised(n, vocab):
    """The target 50 below the top, which is in the first block, or in another, so that c is 50 below it, too."""
    x, y = ordinary(n, vocab)
    x[torch.arange(n), torch.arange(n) * 37 % vocab] = 25.0
    x[torch.arange(n), y] = -25.0
    return x, y


def rivalled(n, vocab):
    """Half-way, or a little further, to one other token, and a rest: two entries that are rounded, of like size."""
    x, y = ordinary(n, vocab)
    rows = torch.arange(n)
    top = x.logsumexp(1) + 3.0
    x[rows, (y + 1) % vocab] = top
    x[rows, y] = top + torch.linspace(-0.2, 4.0, n)
    return x, y


def crowded(n, vocab):
    """Two to four tokens of one logit beside the target's."""
    x, y = ordinary(n, vocab)
    for k in range(2, 5):
        x[torch.arange(n) % 3 == k - 2, :k] = 12.34
    y = torch.full_like(y, 5)
    return x, y


def flat(n, vocab):
    x, y = ordinary(n, vocab)
    return x * 1e-3, y


def risen(n, vocab):
    """The largest logit up to 150 above everything before it: c is chosen anew."""
    x, y = ordinary(n, vocab)
    y = torch.where(y == vocab - 1, 0, y)
    x[:, -1] = torch.linspace(15.0, 150.0, n)
    return x, y


def rising(n, vocab):
    _, y = ordinary(n, vocab)
    return (torch.arange(vocab) * 0.9 - 80.0).repeat(n, 1).float(), y


def ruled_out(n, vocab):
    """−∞ in all of the first block, whose largest logit is no use, and elsewhere; the target of some rows."""
    x, y = ordinary(n, vocab)
    x[:, : min(BLOCK, vocab // 2)] = -INF
    x[:, ::5] = -INF
    x[:, -1] = 0.5
    return x, y


DISTRIBUTIONS = (ordinary, confident, surprised, rivalled, crowded, flat, risen, rising, ruled_out)
SHAPES = {"ragged": (6, 300), "whole blocks": (5, 2 * BLOCK), "a block and one": (4, BLOCK + 1), "odd": (5, 77)}


def truth(products, y, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """Statistics and ∂logp/∂products in float64, without a difference that cancels."""
    x = products.double() if bias is None else products.double() + bias.double()
    x = x * logit_scale
    slope = torch.full_like(x, logit_scale / temperature)
    if softcap is not None:
        slope = slope * (1 - torch.tanh(x / softcap) ** 2)
        x = softcap * torch.tanh(x / softcap)
    z, rows = x / temperature, torch.arange(len(y))
    lse = z.logsumexp(1)
    p = (z - lse[:, None]).exp()
    log_p = z - lse[:, None]
    dz = -p
    dz[rows, y] = p.clone().index_put((rows, y), p.new_zeros(())).sum(1)
    found = {
        "logp": log_p[rows, y],
        "lse": lse,
        "entropy": -oracle.expectation(p, log_p),
        "log_sum_sq_probs": p.square().sum(1).log(),
        "mean_logit": z.mean(1),
        "top1": (z[rows, y] >= z.amax(1)).double(),
    }
    return found, dz * slope


def run(products, y, names, dtype=None, bias=None, **options):
    """Statistics, and the gradient as it is to be multiplied, (n, V), with the factor of each row (n,)."""
    from xpo_fast.kernels import one_read

    n, vocab = products.shape
    apart = torch.full((n, vocab + 64), float("nan"), device=DEVICE)
    apart[:, :vocab] = products.to(DEVICE)
    out = {name: torch.full((n,), float("nan"), device=DEVICE) for name in names}
    memory = factor = grad = None
    if dtype is not None:
        memory = torch.full((n, vocab + 128), float("nan"), dtype=dtype, device=DEVICE)
        grad, factor = memory[:, :vocab], torch.full((n,), float("nan"), device=DEVICE)
    bias = None if bias is None else bias.to(DEVICE)
    one_read.run(apart[:, :vocab], y.to(DEVICE), bias=bias, out=out, grad=grad, factor=factor, **options)
    assert torch.equal(apart[:, :vocab].cpu(), products) or products.isnan().any()
    if memory is None:
        return {name: x.cpu().double() for name, x in out.items()}, None, None
    assert memory[:, vocab:].isnan().all()
    return {name: x.cpu().double() for name, x in out.items()}, grad.cpu(), factor.cpu()


def row_errors(found, want):
    return (found - want).norm(dim=1) / want.norm(dim=1)


HEADS = {name: (bias, options) for name, (bias, options) in test_head.HEADS.items()}


# What is kept of a row is decided by its distribution, and then rounded: each has both dtypes, and all shapes.
@in_pairs(("distribution", DISTRIBUTIONS), ("shape", SHAPES), ("dtype", [torch.float32, torch.bfloat16]))
def check_gradient(distribution, shape, dtype):
    """dH within 2⁻⁸ a row in bfloat16, with a head as random as it can be, and each entry within two roundings."""
    products, y = distribution(*SHAPES[shape])
    found, grad, factor = run(products, y, ("logp", "lse"), dtype)
    want, dz = truth(products, y)
    # A logit itself has this rounding.
    size = products.masked_fill(products.isinf(), 0).abs().amax(1).double()
    assert ((found["logp"] - want["logp"]).abs()[want["logp"] > -INF] <= 1e-5 + 2e-7 * size.amax()).all()
    assert_close(found["lse"], want["lse"], atol=1e-5, rtol=2e-7)
    learns = want["logp"] > -INF
    spread = grad.double() * factor[:, None].double()
    head = oracle.normal(products.shape[1], 64, seed=7)
    bound = 2e-5 if dtype == torch.float32 else 2**-8
    assert (row_errors(spread @ head, dz @ head)[learns] < bound).all()
    assert (row_errors(spread, dz)[learns] < bound).all()
    rows = torch.arange(len(y))[learns]
    entries = 2**-7 if dtype == torch.bfloat16 else 2e-5 + 2e-7 * float(size.amax())
    assert_close(spread[rows, y[rows]], dz[rows, y[rows]], rtol=entries, atol=1e-30)
    assert_close(spread[rows], dz[rows], rtol=entries, atol=1e-30)


GRADIENTS = (None, torch.float32, torch.bfloat16)
# Every two of a distribution, a head and a gradient meet; the head with everything has all three.
STATISTICS = [
    (distribution, head, gradient)
    for d, distribution in enumerate((ordinary, surprised, risen))
    for h, head in enumerate(HEADS)
    for g, gradient in enumerate(GRADIENTS)
    if head == "everything" or (d + h + g) % 3 == 0
]


@pytest.mark.parametrize(("distribution", "head", "dtype"), STATISTICS)
def check_statistics(distribution, head, dtype):
    """With and without a gradient, and with all that is done to logits."""
    products, y = distribution(*SHAPES["ragged"])
    with_bias, options = HEADS[head]
    bias = oracle.normal(products.shape[1], seed=5, dtype=torch.float32) if with_bias else None
    found, grad, factor = run(products, y, SOME, dtype, bias, **options)
    want, dz = truth(products, y, bias, **options)
    for name in SOME:
        assert_close(found[name], want[name], atol=2e-5, rtol=2e-6)
    if grad is not None:
        spread = grad.double() * factor[:, None].double()
        assert (row_errors(spread, dz) < (5e-5 if dtype == torch.float32 else 2**-8)).all()


def check_softcap_near_the_cap():
    """The target's slope is next to nothing there, and its entry not the largest."""
    products, y = ordinary(6, 300)
    products[torch.arange(6), y] = torch.linspace(80.0, 130.0, 6)
    products[torch.arange(6), (y + 7) % 300] = 40.0
    _, grad, factor = run(products, y, ("logp",), torch.bfloat16, softcap=30.0)
    _, dz = truth(products, y, softcap=30.0)
    assert (row_errors(grad.double() * factor[:, None].double(), dz) < 2**-8).all()


def check_target_outside_the_vocabulary():
    """The host asserts; the kernel writes nothing beyond its row."""
    products, _ = ordinary(3, 70)
    found, *_ = run(products, torch.tensor([70, -1, 1 << 30]), ("logp",), torch.bfloat16)
    assert found["logp"].isnan().all()


@pytest.mark.parametrize("name", SOME)
def check_each_statistic(name):
    products, y = ordinary(*SHAPES["ragged"])
    found, *_ = run(products, y, (name,))
    assert_close(found[name], truth(products, y)[0][name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (0, 5)], ids=str)
def check_small(shape):
    """A vocabulary of one token has nothing to learn."""
    n, vocab = shape
    products, y = oracle.normal(n, vocab, seed=1, dtype=torch.float32), oracle.tokens((n,), vocab, 0.0)
    found, grad, factor = run(products, y, SOME, torch.bfloat16)
    want, dz = truth(products, y)
    assert_close(found["logp"], want["logp"], atol=1e-6, rtol=1e-6)
    assert_close(grad.double() * factor[:, None].double(), dz, atol=1e-7, rtol=2**-8)


def check_out_of_the_ordinary():
    """Huge logits; a single finite logit, the target or not; none; +∞; NaN, of the target or not, stays in its row."""
    vocab = 270
    products, _ = ordinary(8, vocab)
    products[0] *= 1e4
    products[1] = torch.where(torch.arange(vocab) == 203, 2.0, -INF)
    products[2] = products[1]
    products[3] = -INF
    products[4, 140] = INF
    products[5, 240] = float("nan")
    products[6, 9] = float("nan")
    y = torch.tensor([1, 203, 7, 5, 3, 4, 9, 269])
    found, grad, factor = run(products, y, ("logp", "lse", "entropy"), torch.float32)
    want, dz = truth(products, y)
    for row in (0, 1, 7):
        assert_close(found["logp"][row], want["logp"][row], atol=1e-5, rtol=1e-6)
        assert_close(grad[row].double() * factor[row].double(), dz[row], atol=1e-6, rtol=1e-4)
    assert_close(found["lse"][[0, 1, 2, 7]], want["lse"][[0, 1, 2, 7]], atol=1e-5, rtol=1e-6)
    assert found["logp"][2] == -INF and found["lse"][3] == -INF and found["entropy"][1] == 0
    for row in (3, 4, 5, 6):
        assert found["logp"][row].isnan()
        assert (grad[row] * factor[row]).isnan().all()


def check_negative_scale_and_full_blocks(monkeypatch):
    """At the width that GPUs are given, with a logit_scale below 0; again, for the same bits."""
    from xpo_fast.kernels import launch

    products, y = ordinary(2 if INTERPRETED else 300, 2 * 1024 + 1000)
    want, dz = truth(products, y, logit_scale=-0.7)
    with launch.override("one_read_gradient", launch.config(4, 3, BLOCK=1024)):
        first, second = (run(products, y, ("logp",), torch.bfloat16, logit_scale=-0.7) for _ in range(2))
    assert_close(first[0]["logp"], want["logp"], atol=1e-5, rtol=1e-6)
    assert (row_errors(first[1].double() * first[2][:, None], dz) < 2**-8).all()
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
def check_traffic(monkeypatch):
    """6 bytes a logit and the block in which c is looked for; a row that is read again, twice that."""
    from triton.runtime import interpreter as triton_interpreter

    moved = {"read": 0, "written": 0}
    builder = triton_interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        found = load(self, pointers, mask, *rest)
        moved["read"] += int(mask.data.sum()) * found.data.dtype.itemsize
        return found

    def counted_store(self, pointers, value, mask, *rest):
        moved["written"] += int(mask.data.sum()) * value.data.dtype.itemsize
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    per_row = 64  # targets, statistics, the target's own logit and entry
    n, vocab = 3, 50 * BLOCK + 3
    for distribution, reads in ((ordinary, 1), (risen, 2)):
        products, y = distribution(n, vocab)
        if distribution is risen:
            products[:, -1] = 200.0
        moved.update(read=0, written=0)
        run(products, y, ("logp", "lse"), torch.bfloat16)
        assert 0 <= moved["read"] - n * (4 * vocab * reads + 4 * BLOCK) <= n * per_row
        assert 0 <= moved["written"] - n * 2 * vocab * reads <= n * per_row
