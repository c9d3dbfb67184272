"""What the design promises to cost, held to what PyTorch's profiler saw: matrix products, memory, elements written.

F = 2·N·V·D, one product of the N scored tokens with the head. Ignored tokens are never multiplied.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils import deterministic

import oracle
import xpo_fast as xf
from xpo_fast.head import head_plan
from xpo_fast.head.gemms import release_tiles

VOCAB, WIDTH = 1009, 8


class Forgetful(list):
    """A store of used tiles that keeps none, so that every call has to allocate what it needs."""

    def append(self, memory):
        pass


@pytest.fixture(autouse=True)
def fresh_tiles(monkeypatch):
    monkeypatch.setattr("xpo_fast.head.gemms._used_tiles", Forgetful())


LEARN = {  # which of hidden, weight, bias want a gradient
    "nothing": (False, False, False),
    "frozen": (True, False, False),
    "trainable": (True, True, True),
    "weight only": (False, True, False),
    "bias only": (False, False, True),
}


def operands(learn, shape, vocab=VOCAB, dtype=torch.float32):
    xs = [oracle.normal(*s, seed=1, dtype=dtype) for s in ((*shape, WIDTH), (vocab, WIDTH), (vocab,))]
    return [x.requires_grad_(wanted) for x, wanted in zip(xs, LEARN[learn], strict=True)]


def backward(loss):
    if loss.requires_grad:
        loss.backward()


# Products with the head, in F: log-probs alone; with a statistic that has a gradient of its own.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("learn", "outputs", "passes"),
    [
        ("nothing", (), 1),
        ("frozen", (), 2),
        ("trainable", (), 4),
        ("weight only", (), 3),
        ("bias only", (), 2),
        ("frozen", ("top1", "mean_logit"), 2),  # these have none
        ("frozen", ("entropy",), 3),
        ("trainable", ("entropy",), 4),
        ("nothing", ("kl",), 2),  # and a pass over the reference's head
        ("frozen", ("kl",), 5),  # which is made again, too
    ],
)
def test_passes_of_the_head(learn, outputs, passes, dtype, tmp_path):
    hidden, weight, bias = operands(learn, (100,), dtype=dtype)
    targets = oracle.tokens((100,), VOCAB, 0.4)
    options = {"bias": bias, "outputs": outputs, "chunk_tokens": 16, "backend": "torch"}
    ref = {"ref_hidden": hidden.detach()} if outputs == ("kl",) else {}

    def call():
        found = xf.token_stats(hidden, weight, targets, **options, **ref)
        backward(found.logp.sum() + sum(getattr(found, n).sum() for n in outputs))

    scored = int((targets != oracle.IGNORE).sum())
    meter = oracle.Meter(call, tmp_path)
    assert meter.passes(scored, VOCAB, WIDTH) == passes
    plan = head_plan(hidden, weight, **options)
    assert plan.passes == passes and f"{passes}F" in str(plan)
    assert (plan.backend, plan.tile_tokens) == ("torch", 16)


@pytest.mark.parametrize(
    ("name", "learn", "tile", "passes"),
    [
        ("simpo", "nothing", None, 1),
        ("simpo", "frozen", None, 2),
        ("simpo", "frozen", 8, 2),
        ("simpo", "trainable", None, 3),
        ("simpo", "weight only", None, 2),
        ("simpo", "bias only", None, 1),
        # Pairs of 20 and 14 scored tokens, one a tile of 24.
        ("simpo", "trainable", 24, 3),
        # The first is longer than a tile: 4 of its tokens are made again.
        ("simpo", "trainable", 16, 3 + 4 / 34),
        ("dpo", "nothing", None, 2),
        ("dpo", "trainable", None, 4),  # 1F for the reference's hidden states
        ("dpo", "frozen", None, 3),
        ("sft", "trainable", None, 3),  # the rejected rows never reach the head
    ],
)
def test_passes_of_the_objective(name, learn, tile, passes, tmp_path):
    lengths = torch.tensor([10, 6, 10, 8])  # chosen, chosen, rejected, rejected
    hidden, weight, bias = operands(learn, (4, 12))
    targets = oracle.tokens((4, 12), VOCAB, 0.0).where(torch.arange(12) < lengths[:, None], oracle.IGNORE)
    objective = xf.Objective(name, tile_bytes=tile and tile * VOCAB * 4)
    arguments = {"bias": bias, "ref_hidden": hidden.detach() if objective.method.needs_reference else None}

    def call():
        backward(objective(hidden, weight, targets, **arguments).loss)

    scored = 16 if name == "sft" else 34
    meter = oracle.Meter(call, tmp_path)
    assert meter.passes(scored, VOCAB, WIDTH) == pytest.approx(passes)
    plan = objective.plan(hidden, weight, targets, **arguments)
    assert plan.passes == pytest.approx(passes) and f"{passes:g}F" in str(plan)
    assert plan.tokens == scored and f"{scored} scored tokens" in str(plan)
    assert tile is None or plan.tile_tokens == tile


def test_no_gradient_no_products(tmp_path):
    """Liger multiplies its gradients under no_grad; a parameter that wants one does not bring them back here."""
    hidden, weight, _ = operands("trainable", (4, 12))
    targets = oracle.tokens((4, 12), VOCAB, 0.4)

    def call():
        with torch.no_grad():
            xf.Objective("simpo")(hidden, weight, targets)
            assert xf.Objective("simpo").plan(hidden, weight, targets).passes == 1

    scored = int((targets != oracle.IGNORE).sum())
    assert oracle.Meter(call, tmp_path).passes(scored, VOCAB, WIDTH) == 1


MIB = 2**20
TILE = 40 * MIB
# Beside the tile: blocks of 2 MiB that the row operations and weight conversions work on, a few at once, and what
# is one number a token. A statistic with a gradient keeps more blocks at once than log-probs alone.
SCRATCH = 4 * MIB
SCRATCH_STATS = 14 * MIB


def held(call, learned, tmp_path):
    """Peak bytes of a call beyond what it returns and the gradients it leaves."""
    release_tiles()
    meter = oracle.Meter(call, tmp_path)
    return meter, meter.peak_bytes - sum(x.numel() * x.element_size() for x in learned if x.requires_grad)


@pytest.mark.parametrize("learn", ["nothing", "frozen", "trainable"])
@pytest.mark.parametrize("shape", [(2, 300), (2, 600), (6, 100)], ids=str)
@pytest.mark.parametrize("vocab", [20011, 50021])
def test_memory_is_flat(vocab, shape, learn, tmp_path):
    """Longer rows, more rows, a larger vocabulary: within 10% of the same budget, and never tokens × vocabulary."""
    xs = operands(learn, shape, vocab)
    targets = oracle.tokens(shape, vocab, 0.0)
    objective = xf.Objective("simpo", tile_bytes=TILE)

    def call():
        backward(objective(xs[0], xs[1], targets, bias=xs[2]).loss)

    meter, extra = held(call, xs, tmp_path)
    assert TILE // 2 < meter.largest_bytes <= TILE < targets.numel() * vocab * 4
    assert extra < TILE * 1.1


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("outputs", [(), ("entropy", "kl", "reverse_kl")], ids=["logps", "stats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_the_head(dtype, outputs, learn, tmp_path):
    """A reference's tile shares the budget; bf16 operands have float32 tiles, and dW in float32 until it is done."""
    vocab, n = 20011, 1200
    xs = operands(learn, (n,), vocab, dtype)
    targets = oracle.tokens((n,), vocab, 0.1)
    options = {"outputs": outputs, "tile_bytes": TILE}
    ref = {"ref_hidden": xs[0].detach()} if outputs else {}

    def call():
        found = xf.token_stats(xs[0], xs[1], targets, bias=xs[2], **options, **ref)
        backward(found.logp.sum() + sum(getattr(found, name).sum() for name in outputs))

    meter, extra = held(call, xs, tmp_path)
    wide = 4 * vocab * (WIDTH + 1) if dtype == torch.bfloat16 else 0  # dW and db in float32
    assert meter.largest_bytes <= TILE // (2 if outputs else 1)
    assert extra - wide < TILE + (SCRATCH_STATS if outputs else SCRATCH)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is NaN (the largest integer, in integer tensors) instead of what was there."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.zeros(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def everything(dtype, learn, tile):
    """Results and gradients of each public function, with ignored tokens, a left-out unit and ragged tiles."""
    xs = operands(learn, (6, 5), 131, dtype)
    targets = oracle.tokens((6, 5), 131, 0.3)
    targets[4] = oracle.IGNORE
    head = {"bias": xs[2], "softcap": 4.0}
    ref = {"ref_hidden": xs[0].detach() * 0.7}
    names = ("entropy", "kl", "reverse_kl")
    found = xf.token_stats(
        *xs[:2], targets, outputs=(*names, "mean_logit", "log_sum_sq_probs"), chunk_tokens=tile, **head, **ref
    )
    logp = xf.token_logps(*xs[:2], targets, chunk_tokens=tile, **head)
    out = xf.Objective("dpo", tile_bytes=tile * 131 * 8)(*xs[:2], targets, **head, **ref)
    gathered = xf.gather_logps(xs[0], targets.clamp(max=WIDTH - 1))
    loss = out.loss + logp.sum() + found.lse.sum() + sum(getattr(found, n).sum() for n in names)
    wanted = [x for x in xs if x.requires_grad]
    grads = torch.autograd.grad(loss + gathered.square().sum(), wanted)
    values = [x for x in vars(found).values() if x is not None]
    return [x.detach() for x in (*values, logp, out.loss, *out.metrics.values(), gathered, *grads)]


@pytest.mark.parametrize("tile", [1, 4, 512])
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_element_is_written(dtype, learn, tile, request):
    clean = everything(dtype, learn, tile)
    request.getfixturevalue("poison")
    assert_close(everything(dtype, learn, tile), clean, rtol=0, atol=0)
