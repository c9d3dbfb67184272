"""token_logps and token_stats against the textbook computation in float64: values, every gradient, precision, edges.

Tolerances: float32 log-probs 2e-5 nats and gradients 1e-5 in norm; half precision log-probs 1e-3 nats, computed
from the same operands, and gradients half an epsilon in norm, one rounding of the result.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracle
import xpo_fast as xf

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "top1", "kl", "reverse_kl")
DIFFERENTIABLE = ("logp", "lse", "entropy", "kl", "reverse_kl")

# (N, V, D, chunk_tokens, share ignored)
SHAPES = {
    "one token": (1, 7, 5, None, 0.0),  # no tile is ever full
    "two-word vocabulary": (5, 2, 3, 2, 0.3),  # and a last tile of another length
    "width one": (4, 9, 1, 4, 0.0),  # and exactly one full tile
    "primes": (37, 131, 11, 8, 0.3),  # nothing divides anything
    "tile of one": (6, 13, 4, 1, 0.3),
    "row blocks": (150, 4099, 3, None, 0.0),  # a tile that the row operations cut in blocks, the last one ragged
    "all ignored": (6, 13, 4, 2, 1.0),
}
HEADS = {  # a bias, and what happens to logits after the product
    "plain": (False, {}),
    "bias": (True, {}),
    "softcap": (False, {"softcap": 5.0}),
    "logit_scale": (False, {"logit_scale": 0.25}),
    "temperature": (False, {"temperature": 1.7}),
    "everything": (True, {"softcap": 5.0, "logit_scale": 0.25, "temperature": 0.7}),
}
LEARN = {  # which of hidden, weight, bias want a gradient
    "nothing": (False, False, False),
    "frozen": (True, False, False),
    "trainable": (True, True, True),
    "head only": (False, True, True),
    "bias only": (False, False, True),
}
SCALINGS = pytest.mark.parametrize("head", HEADS)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "dense"])
LEARNS = pytest.mark.parametrize("learn", list(LEARN)[1:])


def problem(shape="primes", with_bias=True, dtype=torch.float32, learn="trainable", spread=3.0):
    """hidden, weight, bias (with the gradients that `learn` names), targets, chunk_tokens.

    shape: one of SHAPES, by name or as it would stand there.
    """
    n, vocab, width, chunk, ignored = SHAPES.get(shape, shape)
    operands = [
        oracle.normal(n, width, seed=1, dtype=dtype),
        oracle.normal(vocab, width, seed=2, std=spread / width**0.5, dtype=dtype),
        oracle.normal(vocab, seed=3, dtype=dtype) if with_bias else None,
    ]
    for x, wanted in zip(operands, LEARN[learn], strict=True):
        if x is not None:
            x.requires_grad_(wanted)
    return operands, oracle.tokens((n,), vocab, ignored), chunk


def reference(kind, operands, targets):
    """The reference of a divergence: with the policy's head, or a head of its own with another width."""
    n, (vocab, width) = targets.shape[0], operands[1].shape
    dtype = operands[0].dtype
    if kind == "same head":
        return {"ref_hidden": oracle.normal(n, width, seed=4, dtype=dtype)}
    return {
        "ref_hidden": oracle.normal(n, width + 2, seed=4, dtype=dtype),
        "ref_weight": oracle.normal(vocab, width + 2, seed=5, std=0.7, dtype=dtype),
        "ref_bias": oracle.normal(vocab, seed=6, dtype=dtype),
    }


def expected(operands, targets, options):
    """The oracle's statistics and the leaves to differentiate them by."""
    wide = oracle.leaves(*operands)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return oracle.stats(wide[0], wide[1], targets, bias=wide[2], **options), wide


def check_gradients(operands, wide, bound):
    for name, x, w in zip(("hidden", "weight", "bias"), operands, wide, strict=True):
        if x is None or not x.requires_grad:
            assert x is None or x.grad is None
            continue
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
        if w.grad is None or not w.grad.any():  # nothing scored, or a gradient that is exactly nothing
            assert not x.grad.any(), name
        else:
            assert oracle.error(x.grad, w.grad) < bound, name


def upstream(n, seed=7):
    return oracle.normal(n, seed=seed)


@BACKENDS
@LEARNS
@pytest.mark.parametrize(
    ("shape", "head"), [(s, "everything") for s in SHAPES] + [("primes", h) for h in HEADS if h != "everything"]
)
def test_logps(shape, head, learn, backend):
    with_bias, options = HEADS[head]
    if learn == "bias only" and not with_bias:
        learn = "head only"
    operands, targets, chunk = problem(shape, with_bias, learn=learn, spread=8.0)
    hidden, weight, bias = operands
    logp = xf.token_logps(hidden, weight, targets, bias=bias, chunk_tokens=chunk, backend=backend, **options)
    want, wide = expected(operands, targets, options)
    assert logp.dtype == torch.float32 and not logp[targets == oracle.IGNORE].any()
    assert_close(logp.double(), want["logp"], atol=2e-5, rtol=0)
    if head == "bias":
        assert want["logp"].min() < -20  # far from zero, where float32 is coarser
    u = upstream(len(targets))
    (logp * u).sum().backward()
    (want["logp"] * u).sum().backward()
    check_gradients(operands, wide, 1e-5)

    with torch.no_grad():
        again = xf.token_logps(hidden, weight, targets, bias=bias, chunk_tokens=chunk, backend=backend, **options)
    assert not again.requires_grad
    assert_close(again, logp.detach(), atol=0, rtol=0)


@BACKENDS
@LEARNS
@pytest.mark.parametrize(
    ("shape", "head", "ref"),
    [(s, "everything", "same head") for s in SHAPES] + [("primes", h, "own head") for h in HEADS],
)
def test_stats(shape, head, ref, learn, backend):
    """Every statistic asked for at once; a gradient through all that have one."""
    with_bias, options = HEADS[head]
    learn = "head only" if learn == "bias only" and not with_bias else learn
    operands, targets, chunk = problem(shape, with_bias, learn=learn)
    hidden, weight, bias = operands
    ref = reference(ref, operands, targets)
    found = xf.token_stats(
        hidden, weight, targets, bias=bias, outputs=STATS, chunk_tokens=chunk, backend=backend, **options, **ref
    )
    want, wide = expected(operands, targets, {**options, **ref})
    for name in ("logp", "lse", *STATS):
        x = getattr(found, name)
        assert x.requires_grad == (name in DIFFERENTIABLE), name
        assert x.dtype == (torch.bool if name == "top1" else torch.float32)
        assert_close(x.double(), want[name].double(), atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for i, name in enumerate(DIFFERENTIABLE):
        u = upstream(len(targets), seed=7 + i)
        (getattr(found, name) * u).sum().backward(retain_graph=True)
        (want[name] * u).sum().backward(retain_graph=True)
    check_gradients(operands, wide, 1e-5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_one_gradient_at_a_time(name, learn):
    """A statistic alone: the backward has no upstream gradient for the others."""
    operands, targets, chunk = problem(learn=learn)
    hidden, weight, bias = operands
    options = {"softcap": 5.0, **reference("own head", operands, targets)}
    outputs = () if name in ("logp", "lse") else (name,)
    found = xf.token_stats(
        hidden, weight, targets, bias=bias, outputs=outputs, chunk_tokens=chunk, backend="torch", **options
    )
    assert all((getattr(found, n) is None) == (n not in outputs) for n in STATS)
    want, wide = expected(operands, targets, options)
    u = upstream(len(targets))
    (getattr(found, name) * u).sum().backward()
    (want[name] * u).sum().backward()
    check_gradients(operands, wide, 1e-5)


@BACKENDS
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("outputs", [(), ("entropy", "kl", "reverse_kl")])
def test_gradcheck(outputs, learn, backend):
    with_bias, options = HEADS["everything"]
    operands, targets, _ = problem("tile of one", with_bias, torch.float64, learn)
    ref = reference("own head", operands, targets)

    def call(hidden, weight, bias):
        s = xf.token_stats(
            hidden, weight, targets, bias=bias, outputs=outputs, chunk_tokens=4, backend=backend, **options, **ref
        )
        assert s.logp.dtype == torch.float64
        return (s.logp, s.lse, *(getattr(s, n) for n in outputs))

    assert torch.autograd.gradcheck(call, operands)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, head, learn):
    with_bias, options = HEADS[head]
    operands, targets, chunk = problem("primes", with_bias, dtype, learn)
    hidden, weight, bias = operands
    found = xf.token_stats(
        hidden, weight, targets, bias=bias, outputs=("entropy",), chunk_tokens=chunk, backend="torch", **options
    )
    want, wide = expected(operands, targets, options)
    u = upstream(len(targets))
    for name in ("logp", "lse", "entropy"):
        assert getattr(found, name).dtype == torch.float32
        assert_close(getattr(found, name).double(), want[name], atol=1e-3, rtol=0)
    logp = xf.token_logps(hidden, weight, targets, bias=bias, chunk_tokens=chunk, backend="torch", **options)
    (logp * u).sum().backward()
    (want["logp"] * u).sum().backward()
    check_gradients(operands, wide, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_confident_tokens(learn):
    """At p_y = 0.998, W[y] − bf16(p)·W is mostly rounding: p_y − 1 has to be formed before it is rounded."""
    weight = oracle.normal(67, 16, seed=1, dtype=torch.bfloat16)
    targets = torch.arange(40) % 67
    rows = weight[targets].double()
    hidden = (rows / rows.norm(dim=1, keepdim=True) ** 2 * 15.5).bfloat16()
    operands = [hidden.requires_grad_(), weight.requires_grad_(LEARN[learn][1]), None]
    want, wide = expected(operands, targets, {})
    assert 0.99 < want["logp"].exp().median() < 0.9999
    xf.token_logps(hidden, weight, targets, chunk_tokens=16, backend="torch").sum().backward()
    want["logp"].sum().backward()
    check_gradients(operands, wide, 4e-3)


def test_weight_gradient_over_many_tiles():
    """Liger's bf16 accumulation goes from 0.28% to 1.3% wrong over 256 chunks; ours must not depend on their number."""
    hidden, weight = (oracle.normal(n, 16, seed=n, dtype=torch.bfloat16) for n in (512, 53))
    targets = oracle.tokens((512,), 53, 0.0)
    wide = oracle.leaves(hidden, weight)
    oracle.stats(*wide, targets)["logp"].sum().backward()
    errors = {}
    for tiles in (1, 256):
        w = weight.clone().requires_grad_()
        xf.token_logps(hidden, w, targets, chunk_tokens=512 // tiles, backend="torch").sum().backward()
        errors[tiles] = oracle.error(w.grad, wide[1].grad)
    assert errors[1] < 4e-3 and errors[256] < 1.1 * errors[1], errors


@BACKENDS
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_huge_logits(backend, learn, shape="primes"):
    """Logits of ±1e4: nothing overflows, and logp of −2e4 is right to float32's own 1e-7 of it."""
    operands, targets, chunk = problem(shape, learn=learn)
    with torch.no_grad():
        operands[1].mul_(1e4 / 10)
    want, wide = expected(operands, targets, {})
    assert want["logp"].min() < -1e4
    hidden, weight, bias = operands
    found = xf.token_stats(
        hidden, weight, targets, bias=bias, outputs=("entropy",), chunk_tokens=chunk, backend=backend
    )
    assert_close(found.logp.double(), want["logp"], atol=1e-2, rtol=1e-6)
    assert_close(found.entropy.double(), want["entropy"], atol=1e-2, rtol=0)
    (found.logp + found.entropy).sum().backward()
    (want["logp"] + want["entropy"]).sum().backward()
    check_gradients(operands, wide, 1e-2)


@BACKENDS
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_padded_vocabulary(backend, learn, shape="primes"):
    """A bias of −∞ rules tokens out of policy and reference: p·log p is 0 there, not NaN."""
    operands, targets, chunk = problem(shape, learn=learn)
    operands[2].detach()[-5:] = -float("inf")
    targets = torch.where(targets >= 131 - 5, 0, targets)
    options = reference("same head", operands, targets)
    hidden, weight, bias = operands
    found = xf.token_stats(
        hidden, weight, targets, bias=bias, outputs=STATS, chunk_tokens=chunk, backend=backend, **options
    )
    want, wide = expected(operands, targets, {**options, "ref_weight": weight.detach(), "ref_bias": bias.detach()})
    for name in ("logp", "lse", "entropy", "log_sum_sq_probs", "kl", "reverse_kl"):
        assert_close(getattr(found, name).double(), want[name], atol=2e-5, rtol=1e-5)
    for name in DIFFERENTIABLE:
        getattr(found, name).sum().backward(retain_graph=True)
        want[name].sum().backward(retain_graph=True)
    check_gradients(operands, wide, 1e-5)


@BACKENDS
def test_ruled_out_by_the_policy_alone(backend):
    """A target that cannot be has logp −∞; a reference that allows it is infinitely far, but not the other way."""
    hidden, weight = oracle.normal(2, 4, seed=1).requires_grad_(), oracle.normal(5, 4, seed=2)
    bias = torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor([4]), -float("inf"))
    ref = {"ref_hidden": oracle.normal(2, 4, seed=3), "ref_weight": weight}
    targets = torch.tensor([4, 1])
    found = xf.token_stats(hidden, weight, targets, bias=bias, outputs=STATS, backend=backend, **ref)
    want, wide = expected([hidden, weight, bias], targets, ref)
    for name in ("logp", "kl", "reverse_kl", "entropy", "mean_logit"):
        assert_close(getattr(found, name), want[name])
    assert found.logp.isinf().tolist() == [True, False] and found.kl.isinf().all()
    (found.logp + found.reverse_kl).sum().backward()
    (want["logp"] + want["reverse_kl"]).sum().backward()
    check_gradients([hidden, weight, None], [wide[0], wide[1], None], 1e-12)


@BACKENDS
@LEARNS
@pytest.mark.parametrize("outputs", [(), STATS], ids=["logps", "stats"])
def test_nothing_at_an_ignored_position_is_read(outputs, backend, learn, shape="primes"):
    """Not the hidden states, nor the reference's, nor the upstream gradient: NaN there leaves no trace."""
    operands, targets, chunk = problem(shape, learn=learn)
    hidden, weight, bias = operands
    ignored = targets == oracle.IGNORE
    ref = reference("same head", operands, targets)
    with torch.no_grad():
        hidden[ignored] = float("nan")
        ref["ref_hidden"][ignored] = float("nan")
    found = xf.token_stats(
        hidden, weight, targets, bias=bias, outputs=outputs, chunk_tokens=chunk, backend=backend, **ref
    )
    want, wide = expected(operands, targets, ref)
    for name in ("logp", "lse", *outputs):
        assert_close(getattr(found, name).double(), want[name].double(), atol=2e-5, rtol=1e-5)
    u = torch.where(ignored, float("nan"), upstream(len(targets)))
    for name in DIFFERENTIABLE if outputs else ("logp", "lse"):
        getattr(found, name).backward(u, retain_graph=True)
        want[name].backward(u.nan_to_num(), retain_graph=True)
    check_gradients(operands, wide, 1e-5)


@BACKENDS
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_a_scored_nan_stays_with_its_token(backend, learn, shape="primes"):
    operands, targets, chunk = problem(shape, learn=learn)
    hidden, weight, bias = operands
    bad = int((targets != oracle.IGNORE).nonzero()[3])
    with torch.no_grad():
        hidden[bad] = float("nan")
    logp = xf.token_logps(hidden, weight, targets, bias=bias, chunk_tokens=chunk, backend=backend)
    assert logp.isnan().nonzero().tolist() == [[bad]]
    logp.sum().backward()
    assert hidden.grad.isnan().any(1).nonzero().tolist() == [[bad]]


@BACKENDS
@LEARNS
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (3, 4)])
def test_no_scored_token(shape, learn, backend):
    """Zero rows, zero positions or nothing scored: zeros with a graph, and zero gradients (or DDP hangs)."""
    operands = [
        torch.randn(x, requires_grad=wants) for x, wants in zip(((*shape, 5), (7, 5), (7,)), LEARN[learn], strict=True)
    ]
    targets = torch.full(shape, oracle.IGNORE)
    found = xf.token_stats(
        *operands[:2], targets, bias=operands[2], outputs=STATS, ref_hidden=torch.randn(*shape, 5), backend=backend
    )
    assert all(x.shape == shape and not x.any() for x in vars(found).values() if x is not None)
    (found.logp + found.lse + found.entropy + found.kl).sum().backward()
    for x in operands:
        assert (x.grad is not None) == x.requires_grad
        assert x.grad is None or (x.grad.shape == x.shape and not x.grad.any())


@BACKENDS
def test_operands_as_they_come(backend):
    """Rows of any shape, int32 targets, another ignore_index, strided hidden states, a transposed weight."""
    base = oracle.normal(3, 8, 4, seed=1)
    hidden = base.transpose(1, 2)[:, :, ::2].requires_grad_()  # (3, 4, 4), no dense stride
    weight = oracle.normal(4, 11, seed=2).T.requires_grad_()
    targets = oracle.tokens((3, 4), 11)
    want, wide = expected([hidden, weight, None], targets, {})
    hidden.retain_grad()
    logp = xf.token_logps(
        hidden, weight, targets.where(targets >= 0, 99).int(), ignore_index=99, chunk_tokens=2, backend=backend
    )
    assert_close(logp, want["logp"])
    logp.sum().backward()
    want["logp"].sum().backward()
    check_gradients([hidden, weight, None], wide, 1e-12)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_backward_again(learn):
    """retain_graph gives the same gradient twice, and leaves the first one alone; then the graph is gone."""
    operands, targets, chunk = problem(learn=learn)
    wanted = [x for x in operands if x.requires_grad]
    loss = xf.token_logps(*operands[:2], targets, bias=operands[2], chunk_tokens=chunk, backend="torch").sum()
    first = torch.autograd.grad(loss * 3, wanted, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(loss * 3, wanted, retain_graph=True)
    last = torch.autograd.grad(loss * 3, wanted)
    for x in (first, second, last):
        assert_close(x, tuple(copies), rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_no_second_derivative(learn):
    operands, targets, _ = problem(learn=learn)
    loss = xf.token_logps(*operands[:2], targets, bias=operands[2], backend="torch").sum()
    with pytest.raises(RuntimeError, match="second derivative"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.* with create_graph=True")
        loss.backward(create_graph=True)


@BACKENDS
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_autocast(backend, learn):
    """float32 parameters, products of their bf16 values, gradients in float32."""
    operands, targets, chunk = problem(learn=learn)
    hidden, weight, bias = operands
    rounded = [x.detach().bfloat16() for x in operands]
    with torch.autocast("cpu", torch.bfloat16):
        logp = xf.token_logps(hidden, weight, targets, bias=bias, chunk_tokens=chunk, backend=backend)
    want, wide = expected(rounded, targets, {})
    assert_close(logp.double(), want["logp"], atol=1e-3, rtol=0)
    logp.sum().backward()
    want["logp"].sum().backward()
    check_gradients(operands, wide, 4e-3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(1, 9))
def test_order_does_not_matter(random, chunk):
    """Permuted tokens, cut into tiles anywhere: permuted log-probs and gradients, the same dW."""
    (hidden, weight, bias), targets, _ = problem(dtype=torch.float64)
    order = list(range(len(targets)))
    random.shuffle(order)
    results = []
    for o, c in ((torch.arange(len(order)), 5), (torch.tensor(order), chunk)):
        logp = xf.token_logps(hidden[o], weight, targets[o], bias=bias, chunk_tokens=c, backend="torch")
        grads = torch.autograd.grad((logp * upstream(len(order))[o]).sum(), (hidden, weight, bias))
        results.append((logp.detach()[o.argsort()], *grads))
    assert_close(*results, rtol=1e-12, atol=1e-12)


def test_settings_of_the_process_are_left_alone():
    """bf16 products with float32 results borrow a global switch of PyTorch's; threads must not leave it turned."""
    (hidden, weight, _), targets, _ = problem(dtype=torch.bfloat16, learn="nothing")
    hidden, targets = hidden.repeat(40, 1), targets.repeat(40)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    want = xf.token_logps(hidden, weight, targets, chunk_tokens=16)
    try:
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(xf.token_logps, hidden, weight, targets, chunk_tokens=16) for _ in range(24)]
        assert setting.fp32_precision == before
    finally:
        setting.fp32_precision = before
    for call in calls:
        assert_close(call.result(), want, rtol=0, atol=0)


def test_inference_mode_first():
    """Memory made under inference_mode and used again must not keep later calls from having a gradient."""
    operands, targets, chunk = problem("tile of one")
    with torch.inference_mode():
        want = xf.token_logps(*operands[:2], targets, bias=operands[2], chunk_tokens=chunk)
    logp = xf.token_logps(*operands[:2], targets, bias=operands[2], chunk_tokens=chunk)
    logp.sum().backward()
    assert_close(logp.detach(), want.clone())
    assert not any(x.grad.is_inference() for x in operands)


def test_sequence_logps_and_shift_labels():
    """Rows of labels, as transformers has them; the same rows packed, with an empty one, give the same sums."""
    labels = torch.tensor([[1, 4, 2, 3], [5, oracle.IGNORE, 6, 0], [oracle.IGNORE] * 4])
    targets = xf.shift_labels(labels)
    assert targets.tolist() == [[4, 2, 3, -100], [-100, 6, 0, -100], [-100] * 4]
    assert xf.shift_labels(labels, ignore_index=7)[0].tolist() == [4, 2, 3, 7]
    hidden, weight = oracle.normal(3, 4, 5, seed=1), oracle.normal(8, 5, seed=2)
    total, length = xf.sequence_logps(hidden, weight, targets, temperature=0.5)
    want = oracle.stats(hidden, weight, targets, temperature=0.5)["logp"]
    assert_close(total, want.sum(1))
    assert length.tolist() == [3, 2, 0] and length.dtype == torch.int64 and not total[2].any()

    real = targets != oracle.IGNORE
    cu_seqlens = torch.tensor([0, 3, 5, 5], dtype=torch.int32)
    packed = xf.sequence_logps(hidden[real], weight, targets[real], cu_seqlens=cu_seqlens, temperature=0.5)
    assert_close(packed, (total, length))
