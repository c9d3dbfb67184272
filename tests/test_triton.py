"""The `triton` backend and its row kernel against float64, and against what the other backends are tested by.

interpreter.py says where the checks run. The interpreter rounds to bfloat16 by cutting off.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import interpreter
import oracle
import test_compile
import test_head
import test_objective
import xpo_fast as xf
from interpreter import DEVICE, INTERPRETED, needs_gpu, needs_triton, run_checks
from xpo_fast.head import head_plan
from xpo_fast.head.choice import choose_backend
from xpo_fast.head.operands import Operands
from xpo_fast.head.spec import Scaling
from xpo_fast.head.tiling import Tiling
from xpo_fast.head.units import pack, unit_loss

pytestmark = interpreter.numpy_warnings
interpreted = pytest.mark.skipif(not INTERPRETED, reason="of operands on the CPU")


@needs_triton
def test_in_the_interpreter():
    run_checks(__file__, interpreted=True)


@needs_gpu
def test_on_a_gpu():
    run_checks(__file__, interpreted=False)


def test_choice(monkeypatch):
    """`auto` never interprets; where the kernels cannot run, a ValueError says what to do."""
    cpu = torch.device("cpu")
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        assert choose_backend("auto", cpu, torch.float32) == "torch"
    monkeypatch.delenv("TRITON_INTERPRET")
    arguments = (torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, -100]))
    monkeypatch.setattr("xpo_fast.device._HAS_TRITON", True)
    with pytest.raises(ValueError, match="runs on GPUs, got operands on cpu: move them, or pass backend='torch'"):
        xf.token_logps(*arguments, backend="triton")
    objective = xf.Objective("sft", backend="triton")  # which does not know the device yet
    with pytest.raises(ValueError, match="runs on GPUs"):
        objective(torch.zeros(2, 3, 4), arguments[1], torch.zeros(2, 3, dtype=torch.long))
    monkeypatch.setattr("xpo_fast.device._HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton"):
        xf.token_logps(*arguments, backend="triton")


# --- the kernel ------------------------------------------------------------------------------------------------------

# (n, V), in blocks of 128
TILES = {
    "one token": (1, 7),
    "two-word vocabulary": (2, 2),
    "a block": (3, 128),
    "a block and one": (2, 129),
    "ragged blocks": (3, 300),
    "none": (0, 5),
}
HEADS = test_head.HEADS
ALONE = ("bias", "softcap", "logit_scale", "temperature")  # what "everything" has, one at a time
STATISTICS = ("logp", "lse", *test_head.STATS)
# As test_head.SHAPES: "primes" with fewer tokens, which the interpreter takes one by one. The last tile and the last
# step of each tile are shorter.
FEW = (6, 131, 11, 4, 0.3)
DIFFERENTIABLE = test_head.DIFFERENTIABLE


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Blocks so small that a short row has several, and tiles several steps; no warnings about IEEE arithmetic."""
    if INTERPRETED or DEVICE == "cuda":
        monkeypatch.setattr("xpo_fast.head.plan._step_tokens", lambda *_: 3)
    with np.errstate(all="ignore"), blocks(128):
        yield


@contextlib.contextmanager
def blocks(columns):
    """The row kernels', half as wide where there are statistics."""
    if not INTERPRETED and DEVICE != "cuda":
        yield
        return
    from xpo_fast.kernels import launch, one_read, rows

    with contextlib.ExitStack() as stack:
        for names, n in (((), columns), (STATISTICS, columns // 2)):
            config = launch.config(max(1, min(16, n // 128)), 2, BLOCK=n)
            for gradient in (False, True):
                stack.enter_context(launch.override(rows._tunable(names, gradient), config))
                stack.enter_context(launch.override(one_read._tunable(names, gradient), config))
        yield


def tile(shape, head="everything", scale=3.0):
    """products, their reference's, targets, and everything that is done to them: for the kernel and for the oracle."""
    n, vocab = shape
    with_bias, options = HEADS[head]
    names = ("products", "ref_products", "bias", "ref_bias")
    shapes = ((n, vocab), (n, vocab), (vocab,), (vocab,))
    tensors = {
        name: oracle.normal(*s, seed=k, std=scale if k < 2 else 1.0, dtype=torch.float32)
        for k, (name, s) in enumerate(zip(names, shapes, strict=True))
        if with_bias or "bias" not in name
    }
    return tensors, oracle.tokens((n,), vocab, 0.0), options


def on_device(tensors):
    return {name: x.to(DEVICE, copy=True) for name, x in tensors.items()}


def oracle_of(tensors, targets, options):
    """The statistics as functions of the products: the head is the identity."""
    products = tensors["products"].double().requires_grad_()
    found = oracle.stats(
        products,
        torch.eye(products.shape[1], dtype=torch.float64),
        targets,
        bias=tensors["bias"].double() if "bias" in tensors else None,
        ref_hidden=tensors["ref_products"].double(),
        ref_weight=torch.eye(products.shape[1], dtype=torch.float64),
        ref_bias=tensors["ref_bias"].double() if "bias" in tensors else None,
        **options,
    )
    return found, products


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def kernel_of(tensors):
    from xpo_fast.kernels import rows

    tensors = on_device(tensors)
    return rows, tensors.pop("products"), tensors


@pytest.mark.parametrize("wanted", [*STATISTICS, STATISTICS], ids=str)
def check_each_statistic(wanted):
    """Alone and with all others, over several blocks."""
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    tensors, targets, options = tile(TILES["ragged blocks"])
    rows, products, others = kernel_of(tensors)
    if not {"kl", "reverse_kl"} & set(wanted):
        others = {k: x for k, x in others.items() if not k.startswith("ref")}
    out = {name: poisoned(len(targets)) for name in wanted}
    rows.run(products, targets.to(DEVICE), out=out, **others, **options)
    want, _ = oracle_of(tensors, targets, options)
    for name in wanted:
        assert_close(out[name].cpu().double(), want[name].double(), atol=2e-5, rtol=1e-5)
    assert_close(products.cpu(), tensors["products"], rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "head"), [(s, "everything") for s in TILES] + [("ragged blocks", h) for h in HEADS])
def check_tile(shape, head):
    """All statistics, then the gradient of all that have one, in place, to the last element."""
    n, vocab = TILES[shape]
    tensors, targets, options = tile((n, vocab), head)
    rows, products, others = kernel_of(tensors)
    out = {name: poisoned(n) for name in STATISTICS}
    rows.run(products, targets.to(DEVICE), out=out, **others, **options)
    want, leaf = oracle_of(tensors, targets, options)
    for name in STATISTICS:
        assert_close(out[name].cpu().double(), want[name].double(), atol=2e-5, rtol=1e-5)
    u = {name: oracle.normal(n, seed=9 + k) for k, name in enumerate(DIFFERENTIABLE)}
    sum((want[name] * u[name]).sum() for name in DIFFERENTIABLE).backward()
    upstream = on_device({name: x.float() for name, x in u.items()})
    values = {name: out[name] for name in ("entropy", "reverse_kl")}
    rows.run(products, targets.to(DEVICE), upstream=upstream, values=values, grad=products, **others, **options)
    assert n == 0 or oracle.error(products.cpu(), leaf.grad) < 1e-5


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("head", ["plain", "everything"])
def check_each_gradient(name, head):
    tensors, targets, options = tile(TILES["ragged blocks"], head)
    rows, products, others = kernel_of(tensors)
    if "kl" not in name:
        others = {k: x for k, x in others.items() if not k.startswith("ref")}
    want, leaf = oracle_of(tensors, targets, options)
    u = oracle.normal(len(targets), seed=9)
    (want[name] * u).sum().backward()
    values = {name: want[name].detach().float().to(DEVICE)} if name in ("entropy", "reverse_kl") else {}
    grad = poisoned(*products.shape)
    upstream = {name: u.float().to(DEVICE)}
    rows.run(products, targets.to(DEVICE), upstream=upstream, values=values, grad=grad, **others, **options)
    assert oracle.error(grad.cpu(), leaf.grad) < 1e-5
    assert_close(products.cpu(), tensors["products"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def check_gradient_in_the_dtype_of_the_gemms(dtype):
    """Statistics and dz in one call, rows of both further apart than they are long, nothing written between them."""
    tensors, targets, options = tile(TILES["ragged blocks"])
    rows, products, others = kernel_of({k: x for k, x in tensors.items() if not k.startswith("ref")})
    n, vocab = products.shape
    apart = poisoned(n, vocab + 20)
    apart[:, :vocab] = products
    memory = poisoned(n, vocab + 84, dtype=dtype)
    out = {name: poisoned(n) for name in ("logp", "lse", "entropy")}
    u = oracle.normal(n, seed=9, dtype=torch.float32)
    grad = memory[:, :vocab]
    upstream = {"logp": u.to(DEVICE)}
    rows.run(apart[:, :vocab], targets.to(DEVICE), out=out, upstream=upstream, grad=grad, **others, **options)
    want, leaf = oracle_of(tensors, targets, options)
    (want["logp"] * u).sum().backward()
    for name, x in out.items():
        assert_close(x.cpu().double(), want[name], atol=2e-5, rtol=1e-5)
    assert oracle.error(grad.float().cpu(), leaf.grad) < {torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    assert memory[:, vocab:].isnan().all() and not memory[:, :vocab].isnan().any()
    assert_close(apart[:, :vocab], products, rtol=0, atol=0)


def check_confident_tokens():
    """1 − p_y is what is rounded: right to bfloat16 where p_y is 0.9999."""
    products = torch.zeros(3, 40)
    targets = torch.tensor([0, 17, 39])
    products[torch.arange(3), targets] = torch.tensor([9.0, 11.0, 13.0])
    rows, z, _ = kernel_of({"products": products})
    grad = poisoned(3, 40, dtype=torch.bfloat16)
    one = {"logp": torch.ones(3, device=DEVICE)}
    rows.run(z, targets.to(DEVICE), upstream=one, grad=grad)
    found = grad.cpu()[torch.arange(3), targets].double()
    want = 1 - products.double().softmax(1)[torch.arange(3), targets]
    assert_close(found, want, rtol=2**-7, atol=0)


def check_logits_out_of_the_ordinary():
    """Huge, all alike, one alone, a lane that starts with −∞, rising all along the row; NaN stays with its row."""
    inf, vocab = float("inf"), 270
    products = oracle.normal(7, vocab, seed=1, dtype=torch.float32)
    products[0] *= 1e4
    products[1] = -3.0
    products[2] = torch.where(torch.arange(vocab) == 203, 2.0, -inf)
    products[3, :130] = -inf
    products[4] = torch.arange(vocab) * 2.0
    products[5] = -torch.arange(vocab) * 2.0
    products[6, 240] = float("nan")
    targets = torch.tensor([1, 2, 203, 175, 269, 269, 3])
    names = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logit", "top1")
    rows, z, _ = kernel_of({"products": products})
    out = {name: poisoned(7) for name in names}
    rows.run(z, targets.to(DEVICE), out=out, upstream={"logp": torch.ones(7, device=DEVICE)}, grad=z)
    p = products[:6].double().softmax(1)
    log_p = products[:6].double().log_softmax(1)
    want = {
        "logp": log_p.gather(1, targets[:6, None])[:, 0],
        "lse": products[:6].double().logsumexp(1),
        "entropy": -oracle.expectation(p, log_p),
        "log_sum_sq_probs": p.square().sum(1).log(),
        "mean_logit": products[:6].double().mean(1),
        "top1": torch.tensor([bool(products[i].max() == products[i, targets[i]]) for i in range(6)]),
    }
    for name in names:
        found = out[name].cpu().double()
        assert_close(found[:6], want[name].double(), atol=2e-5, rtol=1e-6)
        assert found[6].isnan() or name == "top1"
    one_hot = torch.nn.functional.one_hot(targets[:6], vocab)
    assert_close(z[:6].cpu().double(), one_hot - p, atol=1e-6, rtol=0)
    assert z[6].isnan().all()


@interpreted
def check_the_second_read_begins_where_the_first_has_ended(monkeypatch):
    """What was read last is what a cache still holds."""
    from triton.runtime import interpreter as triton_interpreter

    seen = []
    builder = triton_interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def noted_load(self, pointers, mask, *rest):
        if pointers.data.size == 128:
            seen.append(int(pointers.data.reshape(-1)[0]))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    products = oracle.normal(1, 300, seed=1, dtype=torch.float32)
    rows, z, _ = kernel_of({"products": products})
    u = {"lse": torch.ones(1)}
    rows.run(z, torch.tensor([3]), upstream=u, grad=poisoned(1, 300))
    blocks_read = [(address - z.data_ptr()) // (4 * 128) for address in seen]
    assert blocks_read == [2, 1, 0, 0, 1, 2]


def check_softcap_is_precise():
    """tanh without cancellation near zero, and flat far away."""
    x = torch.cat([torch.logspace(-6, 3, 60), -torch.logspace(-6, 3, 60), torch.zeros(1)])[None]
    rows, z, _ = kernel_of({"products": x})
    out = {"logp": poisoned(1), "mean_logit": poisoned(1)}
    for y in range(0, 121, 7):
        rows.run(z, torch.tensor([y], device=DEVICE), out=out, softcap=30.0, temperature=0.5)
        want = 60 * torch.tanh(x.double() / 30)
        assert_close(out["logp"].cpu().double(), want.log_softmax(1)[:, y], atol=1e-5, rtol=1e-6)


@blocks(4096)
def check_full_blocks():
    """At the width that GPUs are given, with many warps on a row; again, for the same bits."""
    n = 2 if INTERPRETED else 300
    tensors, targets, options = tile((n, 4096 + 1000))
    rows, products, others = kernel_of(tensors)
    targets_on, one = targets.to(DEVICE), {"logp": torch.ones(n, device=DEVICE)}
    want, _ = oracle_of(tensors, targets, options)
    for _ in range(2):
        out = {name: poisoned(n) for name in STATISTICS}
        rows.run(products, targets_on, out=out, **others, **options)
        for name in STATISTICS:
            assert_close(out[name].cpu().double(), want[name].double(), atol=2e-5, rtol=1e-5)
    others = {k: x for k, x in others.items() if not k.startswith("ref")}
    grads = [poisoned(*products.shape, dtype=torch.bfloat16) for _ in range(2)]
    for grad in grads:
        rows.run(products, targets_on, upstream=one, grad=grad, **others, **options)
    assert_close(grads[0], grads[1], rtol=0, atol=0)


# --- the backend -----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("shape", "head", "learn"),
    [(s, "everything", "trainable") for s in test_head.SHAPES if s not in ("primes", "row blocks")]
    + [(FEW if h in ALONE else "primes", h, "frozen") for h in HEADS]
    + [(FEW, "plain", "trainable"), (FEW, "everything", "bias only")],
)
def check_logps(shape, head, learn):
    test_head.test_logps(shape, head, learn, "triton")


@interpreted
@pytest.mark.parametrize(
    ("shape", "head", "ref", "learn"),
    [("one token", "everything", "same head", "frozen"), ("all ignored", "everything", "same head", "trainable")]
    + [("tile of one", h, "own head", "trainable") for h in HEADS]
    + [("tile of one", "everything", "own head", learn) for learn in ("frozen", "bias only")],
)
def check_stats(shape, head, ref, learn):
    test_head.test_stats(shape, head, ref, learn, "triton")


STATS = {"outputs": test_head.STATS}
EDGES = [
    (test_head.test_huge_logits, {"learn": "frozen", "shape": FEW}),
    (test_head.test_padded_vocabulary, {"learn": "trainable", "shape": FEW}),
    (test_head.test_ruled_out_by_the_policy_alone, {}),
    (test_head.test_nothing_at_an_ignored_position_is_read, {"learn": "trainable", "shape": FEW, **STATS}),
    (test_head.test_a_scored_nan_stays_with_its_token, {"learn": "frozen", "shape": FEW}),
    (test_head.test_a_scored_nan_stays_with_its_token, {"learn": "trainable", "shape": FEW}),
    (test_head.test_no_scored_token, {"learn": "frozen", "shape": (3, 4)}),
    (test_head.test_no_scored_token, {"learn": "trainable", "shape": (0,)}),
    (test_head.test_operands_as_they_come, {}),
    (test_head.test_autocast, {"learn": "trainable"}),
    # float64: torch's operations
    (test_head.test_gradcheck, {"learn": "trainable", "outputs": ("entropy", "kl", "reverse_kl")}),
]


@interpreted
@pytest.mark.parametrize(("test", "options"), EDGES, ids=[test.__name__ for test, _ in EDGES])
def check_edges(test, options):
    test(backend="triton", **options)


@pytest.mark.parametrize("learn", ["nothing", "frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def check_on_the_device(dtype, learn):
    """Log-probs and gradients of operands in their own dtype, with tiles that end anywhere."""
    operands, targets, chunk = test_head.problem("primes", True, dtype, learn)
    options = {"softcap": 5.0, "temperature": 0.7}
    want, wide = test_head.expected(operands, targets, options)
    on = [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in operands]
    logp = xf.token_logps(on[0], on[1], targets.to(DEVICE), bias=on[2], chunk_tokens=chunk, backend="triton", **options)
    assert_close(logp.cpu().double(), want["logp"], atol=2e-5 if dtype == torch.float32 else 1e-3, rtol=0)
    if learn == "nothing":
        return
    logp.sum().backward()
    want["logp"].sum().backward()
    for x, y in zip(operands, on, strict=True):
        x.grad = None if y.grad is None else y.grad.cpu()
    # Products and dz are rounded, then the result.
    test_head.check_gradients(operands, wide, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile_tokens", [64, 8, 3])
def check_units(tile_tokens, dtype):
    """A loss of whole units while their tile is live, some of them longer than the tile."""
    operands, targets, _ = test_head.problem("primes", True, dtype)
    index = (targets != oracle.IGNORE).nonzero()[:, 0]
    lengths = [5, 0, 3, len(index) - 8]
    unit = torch.full(targets.shape, 4).index_put((index,), torch.arange(4).repeat_interleave(torch.tensor(lengths)))
    options = {"softcap": 5.0, "temperature": 0.7}

    def total(logp, some=range(4), at=slice(None)):
        sums = torch.stack([logp[unit.to(logp.device)[at] == k].sum() for k in some])
        return torch.nn.functional.softplus(-0.1 * sums).sum()

    def coefficients(logp, group):
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            return torch.autograd.grad(total(leaf, group.units, group.positions), leaf)[0]

    on = [x.detach().to(DEVICE).requires_grad_() for x in operands]
    groups = pack(index.to(DEVICE), lengths, tile_tokens)
    plan = head_plan(on[0], on[1], bias=on[2], chunk_tokens=tile_tokens, backend="triton")
    assert plan.tiling == Tiling(tile_tokens, 3)
    given = Operands(on[0], on[1], targets.to(DEVICE), on[2], scaling=Scaling(**options), ignore_index=oracle.IGNORE)
    loss, logp = unit_loss(given, groups, plan, coefficients, total)
    want, wide = test_head.expected(operands, targets, options)
    assert_close(logp.cpu().double(), want["logp"], atol=2e-5 if dtype == torch.float32 else 1e-3, rtol=0)
    loss.backward()
    total(want["logp"]).backward()
    for x, y in zip(operands, on, strict=True):
        x.grad = y.grad.cpu()
    test_head.check_gradients(operands, wide, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@interpreted
@pytest.mark.parametrize("outputs", ["", "entropy,kl,reverse_kl,top1"])
def check_operator(outputs):
    """Schema, fake tensors, autograd registration and AOT dispatch."""
    arguments = test_compile.head_arguments(trainable=bool(outputs), outputs=outputs, save_grad=not outputs)
    arguments = ["triton" if isinstance(x, str) and x == "torch" else x for x in arguments]
    torch.library.opcheck(torch.ops.xpo_fast.token_stats.default, arguments)


def compare_with_dense(name, learn, backend):
    """A method's loss and gradients in float32, several tiles to a call, against the dense ones in float64."""
    method = xf.METHODS[name]
    targets = test_objective.targets_of()
    columns, ref = test_objective.given_to(method, len(targets))
    hyper = test_objective.hyper_of(method)
    results = []
    for chosen, dtype in ((backend, torch.float32), ("dense", torch.float64)):
        hidden, weight, bias = test_objective.operands(learn, dtype)
        out = xf.Objective(name, backend=chosen, tile_bytes=16 * test_objective.VOCAB * 4, **hyper)(
            hidden,
            weight,
            targets,
            bias=bias,
            **{k: x.to(dtype) for k, x in ref.items()},
            **{k: x.to(dtype) if x.is_floating_point() else x for k, x in columns.items()},
        )
        out.loss.backward()
        results.append((out.loss.detach(), *(x.grad for x in (hidden, weight, bias) if x.requires_grad)))
    (loss, *grads), (want, *wanted) = results
    assert_close(loss.double(), want, atol=1e-5, rtol=1e-5)
    for x, y in zip(grads, wanted, strict=True):
        assert oracle.error(x, y) < 2e-5


@interpreted
@pytest.mark.parametrize(
    ("name", "learn"),
    [(name, learn) for name in ("dpo", "token_dpo") for learn in ("frozen", "trainable")]
    + [("simpo", "trainable"), ("kto", "frozen"), ("grpo", "trainable")],
)
def check_objective(name, learn, monkeypatch):
    """A method by log-ratios, by mean log-probs, by rows, by a divergence, by tokens."""
    calls = []
    from xpo_fast.kernels import one_read

    run = one_read.run
    monkeypatch.setattr("xpo_fast.kernels.one_read.run", lambda *a, **k: (calls.append(k), run(*a, **k)))
    compare_with_dense(name, learn, "triton")
    assert calls


@interpreted
@pytest.mark.parametrize("outputs", [(), ("entropy",)], ids=str)
def check_without_a_tile(outputs, monkeypatch):
    """Where it was measured to be faster, log-probs without gradient come from the kernel that keeps no logit."""
    from xpo_fast.kernels import logps

    calls = []
    run = logps.run
    monkeypatch.setattr(logps, "run", lambda *a, **k: (calls.append(k), run(*a, **k)))
    monkeypatch.setattr("xpo_fast.head.triton.prefers_fused", lambda *_: True)
    operands, targets, _ = test_head.problem("primes", True, torch.float32)
    options = {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3}
    want, _ = test_head.expected(operands, targets, options)
    with torch.no_grad():
        hidden, weight, bias = operands
        found = xf.token_stats(hidden, weight, targets, bias=bias, outputs=outputs, backend="triton", **options)
    assert len(calls) == 1
    for name in ("logp", "lse", *outputs):
        assert_close(getattr(found, name).double(), want[name].detach(), atol=2e-5, rtol=1e-5)
    frozen = weight.detach(), targets
    xf.token_logps(hidden, *frozen, bias=bias.detach(), backend="triton", **options).sum().backward()
    assert len(calls) == 1  # the gradient is made of the tile
