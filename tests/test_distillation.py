"""integrations.liger.distillation against the textbook computation in float64: values, every gradient, cost, edges."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import oracle
from xpo_fast.integrations.liger.distillation import distillation_loss

# tokens, student's vocabulary and width, teacher's vocabulary and width, share ignored
SHAPES = {
    "one token": (1, 7, 5, 7, 5, 0.0),
    "ragged": (37, 131, 11, 131, 9, 0.3),
    "a larger vocabulary": (11, 131, 5, 160, 8, 0.3),
    "row blocks": (150, 4099, 3, 4099, 2, 0.0),  # a tile in several blocks, the last one ragged
    "all ignored": (6, 13, 4, 13, 4, 1.0),
}
OPTIONS = [
    {"beta": 0.5},
    {"beta": 0.1, "temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.2},
    {"beta": 0.0, "temperature": 0.5},
    {"beta": 1.0, "hard_weight": 0.0},
    {"beta": 0.9, "soft_weight": 0.0},
    {"divergence": "cosine", "beta": 0.8, "temperature": 3.0},
    {"divergence": "cosine", "hard_weight": 0.0},
]


def draw(tokens, vocab, width, teacher_vocab, teacher_width, ignored, dtype=torch.float64, std=1.0):
    shapes = [(tokens, width), (vocab, width), (vocab,)]
    shapes += [(tokens, teacher_width), (teacher_vocab, teacher_width), (teacher_vocab,)]
    drawn = [oracle.normal(*shape, seed=k, std=std, dtype=dtype) for k, shape in enumerate(shapes)]
    return drawn[:3], drawn[3:], oracle.tokens((tokens,), vocab, ignored)


def textbook(student, teacher, targets, divergence="jsd", beta=0.5, temperature=1.0, soft_weight=0.5, hard_weight=0.5):
    """loss, soft and hard, all logits at once and every gradient by autograd."""
    scored = targets != oracle.IGNORE
    h, w, b = student
    z, _ = oracle.logprobs(h[scored], w, b)
    t, _ = oracle.logprobs(teacher[0][scored], teacher[1], teacher[2])
    count = max(1, int(scored.sum()))
    hard = F.cross_entropy(z, targets[scored], reduction="sum") / count
    z = F.pad(z, (0, t.shape[1] - z.shape[1]))
    if divergence == "cosine":
        soft = beta * (1 - F.cosine_similarity(z, t, dim=1)).sum() / count
    else:
        p, q = (z / temperature).softmax(1), (t / temperature).softmax(1)

        def kl(x, y):
            return (x * (x.log() - y.log())).sum() / count

        m = beta * q + (1 - beta) * p
        soft = kl(q, p) if beta == 0 else kl(p, q) if beta == 1 else beta * kl(q, m) + (1 - beta) * kl(p, m)
    return soft_weight * soft + hard_weight * hard, soft, hard


def call(student, teacher, targets, **options):
    hidden, weight, bias = student
    heads = dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True))
    return distillation_loss(hidden, weight, targets, bias=bias, **heads, **options)


def gradients(loss, leaves, scale=1.0):
    (loss * scale).backward()
    return [x.grad for x in leaves if x.requires_grad]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(shape, options, dtype):
    student, teacher, targets = draw(*shape)
    leaves = oracle.leaves(*student)
    expected = textbook(leaves, teacher, targets, **options)
    wanted = gradients(expected[0], leaves, 3.0)
    mine = oracle.leaves(*student, dtype=dtype)
    tile_bytes = 2 * 8 * shape[3] * dtype.itemsize if shape[0] < 100 else None  # of 8 tokens
    found = call(mine, [x.to(dtype) for x in teacher], targets, parts=True, tile_bytes=tile_bytes, **options)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        assert_close(x.detach().double(), y.detach(), **tolerance)
    for x, y in zip(gradients(found.loss, mine, 3.0), wanted, strict=True):
        assert x.dtype == dtype
        assert_close(x.double(), y, **tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision(options):
    """From the same operands: sums in float32, and one rounding of each gradient."""
    student, teacher, targets = draw(*SHAPES["ragged"], std=0.7)
    for dtype in (torch.bfloat16, torch.float16):
        narrow, other = ([x.to(dtype) for x in xs] for xs in (student, teacher))
        leaves = oracle.leaves(*narrow)
        expected = textbook(leaves, [x.double() for x in other], targets, **options)[0]
        wanted = gradients(expected, leaves)
        mine = oracle.leaves(*narrow, dtype=dtype)
        found = call(mine, other, targets, tile_bytes=2 * 8 * 131 * 4, **options).loss
        assert found.dtype == torch.float32
        assert_close(found.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
        for x, y in zip(gradients(found, mine), wanted, strict=True):
            assert x.dtype == dtype
            assert oracle.error(x, y) < torch.finfo(dtype).eps  # half of it, and the GEMM's operands


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    student, teacher, targets = draw(5, 7, 3, 9, 2, 0.3)
    leaves = [x.requires_grad_() for x in student]
    assert torch.autograd.gradcheck(lambda *s: call(s, teacher, targets, **options).loss, leaves)


@pytest.mark.parametrize("divergence", ["jsd", "cosine"])
def test_a_student_that_is_its_teacher(divergence):
    student, _, targets = draw(*SHAPES["ragged"])
    for beta in (0.0, 0.3, 1.0):
        found = call(student, student, targets, divergence=divergence, beta=beta, hard_weight=0.0)
        assert_close(found.loss, torch.zeros_like(found.loss), atol=1e-12, rtol=0)


def test_beta_turns_the_divergence_round():
    student, teacher, targets = draw(11, 23, 5, 23, 5, 0.0)
    for beta in (0.0, 0.2, 0.5):
        one = call(student, teacher, targets, beta=beta).soft
        assert_close(one, call(teacher, student, targets, beta=1 - beta).soft)
    half = call(student, teacher, targets, beta=0.5).soft
    assert 0 < half < torch.log(torch.tensor(2.0))


# Products in F = 2·N·V·D, N the scored tokens; the teacher's are of its own V·D.
@pytest.mark.parametrize(
    ("learn", "options", "passes"),
    [
        ((False, False, False), {}, (1, 1)),
        ((True, False, False), {}, (2, 1)),
        ((True, True, True), {}, (3, 1)),
        ((False, True, False), {}, (2, 1)),
        ((False, False, True), {}, (1, 1)),
        ((True, True, True), {"soft_weight": 0.0}, (3, 0)),
        ((True, True, True), {"soft_weight": 0.0, "parts": True}, (3, 1)),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_cost(learn, options, passes, grad, tmp_path):
    student, teacher, targets = draw(100, 1009, 8, 1013, 16, 0.4, dtype=torch.float32)
    student = [x.requires_grad_(wanted) for x, wanted in zip(student, learn, strict=True)]

    def once():
        with torch.set_grad_enabled(grad):
            loss = call(student, teacher, targets, tile_bytes=2 * 16 * 1013 * 4, **options).loss
            if loss.requires_grad:
                loss.backward()

    meter, scored = oracle.Meter(once, tmp_path), int((targets != oracle.IGNORE).sum())
    of_teacher = sum(a * b * c for a, b, c in meter.products if 16 in (b, c) and 1013 in (b, c))
    assert of_teacher == passes[1] * scored * 1013 * 16
    own = meter.passes(scored, 1009, 8) - of_teacher / (scored * 1009 * 8)
    assert own == pytest.approx(passes[0] if grad else 1, rel=0.02)


def test_memory_is_that_of_the_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr("xpo_fast.head.gemms._used_tiles", [])
    student, teacher, targets = draw(400, 2003, 4, 2003, 4, 0.0, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in student]
    meter = oracle.Meter(lambda: call(leaves, teacher, targets, tile_bytes=2 * 16 * 2003 * 4).loss.backward(), tmp_path)
    assert meter.largest_bytes <= 16 * 2003 * 4


def test_ignored_positions_are_not_read():
    student, teacher, targets = draw(*SHAPES["ragged"])
    leaves = oracle.leaves(*student)
    clean = call(leaves, teacher, targets)
    wanted = gradients(clean.loss, leaves)
    for x in (student[0], teacher[0]):
        x[targets == oracle.IGNORE] = torch.nan
    leaves = oracle.leaves(*student)
    found = call(leaves, teacher, targets)
    assert torch.equal(found.loss, clean.loss)
    assert all(map(torch.equal, gradients(found.loss, leaves), wanted))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_tokens_that_a_bias_rules_out(beta):
    """−∞ in the same places of both: 0·∞ counts as 0."""
    student, teacher, targets = draw(5, 9, 3, 9, 3, 0.0)
    student[2][7:] = teacher[2][7:] = -torch.inf
    targets = targets.clamp(max=6)
    leaves = oracle.leaves(*student)
    loss = call(leaves, teacher, targets, beta=beta, temperature=2.0).loss
    cut = [student[0], student[1][:7], student[2][:7]]
    fewer = oracle.leaves(*cut)
    expected = call(fewer, (teacher[0], teacher[1][:7], teacher[2][:7]), targets, beta=beta, temperature=2.0)
    assert_close(loss, expected.loss)
    for x, y in zip(gradients(loss, leaves), gradients(expected.loss, fewer), strict=True):
        assert_close(x[: y.shape[0]], y)
        assert (x[y.shape[0] :] == 0).all()


@pytest.mark.parametrize("divergence", ["jsd", "cosine"])
def test_extreme_logits(divergence):
    """Sure of one token, the teacher of another; and no logit at all."""
    weight = 1e3 * torch.eye(5)
    hidden = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).requires_grad_()
    teacher = torch.tensor([[0, 1.0, 0, 0, 0], [0, 0, 0, 1.0, 0]])
    targets = torch.tensor([2, 3])
    for beta in (0.0, 0.5, 1.0):
        found = distillation_loss(
            hidden, weight, targets, teacher_hidden=teacher, teacher_weight=weight, divergence=divergence, beta=beta
        )
        (grad,) = torch.autograd.grad(found.loss, hidden)
        assert found.loss.isfinite() and grad.isfinite().all()


def test_shapes_of_rows_and_retained_graphs():
    student, teacher, targets = draw(12, 23, 5, 23, 4, 0.3)
    flat = call(student, teacher, targets).loss
    hidden = student[0].view(3, 4, 5).requires_grad_()
    found = call((hidden, *student[1:]), (teacher[0].view(3, 4, 4), *teacher[1:]), targets.view(3, 4))
    assert torch.equal(found.loss, flat)
    once = torch.autograd.grad(found.loss, hidden, retain_graph=True)[0]
    again = torch.autograd.grad(2 * found.loss, hidden)[0]
    assert once.shape == hidden.shape
    assert_close(again, 2 * once)
    assert not found.soft.requires_grad and not found.hard.requires_grad


def test_no_second_derivative():
    student, teacher, targets = draw(5, 7, 3, 7, 3, 0.0)
    loss = call([x.requires_grad_() for x in student], teacher, targets).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student[0], create_graph=True)


def test_autocast():
    student, teacher, targets = draw(*SHAPES["ragged"], dtype=torch.float32, std=0.5)
    leaves = oracle.leaves(*student, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(leaves, teacher, targets).loss
    narrow = call([x.bfloat16() for x in student], [x.bfloat16() for x in teacher], targets).loss
    assert torch.equal(found, narrow)
    assert all(x.dtype == torch.float32 for x in gradients(found, leaves))


def test_errors():
    student, teacher, targets = draw(5, 7, 3, 7, 3, 0.0)
    for options, message in (
        ({"divergence": "kl"}, "no divergence named 'kl'; there are jsd, cosine"),
        ({"beta": 1.1}, r"beta in \[0, 1\], got 1.1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"tile_bytes": 0}, "at least one byte"),
    ):
        with pytest.raises(ValueError, match=message):
            call(student, teacher, targets, **options)
    with pytest.raises(ValueError, match="of the teacher: targets must have one token a hidden state"):
        call(student, (teacher[0][:4], *teacher[1:]), targets)
    with pytest.raises(ValueError, match="teacher's vocabulary of 6 must hold the student's of 7"):
        call(student, (teacher[0], teacher[1][:6], teacher[2][:6]), targets)
    with pytest.raises(ValueError, match="target 7 at position 2 is outside the vocabulary of 7"):
        call(student, teacher, targets.index_fill(0, torch.tensor([2]), 7))
