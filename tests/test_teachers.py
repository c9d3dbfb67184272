"""Distillation from teachers: the head's JSD, losses and gradients of methods in float64, TRL's, memory, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from xpo_fast.head import Jsd
from xpo_fast.methods.distillation import topk_divergence

WIDTH, TEACHERS = 11, 9  # of the hidden states
SETTINGS = [Jsd(0.0), Jsd(1.0), Jsd(0.5), Jsd(0.1, 2.0), Jsd(0.9, 0.5), Jsd(0.0, 1.7), Jsd(1.0, 0.7)]
HEADS = {"plain": {}, "capped": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3}}
# tokens, vocabulary, tokens of a tile, share ignored: ragged tiles, one token, blocks of rows, nothing to score
SHAPES = {"ragged": (37, 131, 8, 0.3), "one": (1, 7, 4, 0.0), "blocks": (37, 4099, 32, 0.1), "none": (6, 13, 2, 1.0)}


def draw(shape, dtype=torch.float64):
    n, vocab, _, ignored = SHAPES[shape]
    sizes = [(n, WIDTH), (vocab, WIDTH), (vocab,), (n, TEACHERS), (vocab, TEACHERS), (vocab,)]
    drawn = [oracle.normal(*size, seed=k, std=0.7, dtype=dtype) for k, size in enumerate(sizes)]
    return drawn[:3], drawn[3:], oracle.tokens((n,), vocab, ignored)


def divergence(z, t, beta, temperature=1.0):
    """GKD's divergence of rows from all logits, by the definition: (n,)."""
    log_p, log_q = (z / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (q * (log_q - log_p)).sum(1)
    if beta == 1:
        return (p * (log_p - log_q)).sum(1)
    m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - m)).sum(1) + (1 - beta) * (p * (log_p - m)).sum(1)


def final(hidden, weight, bias, options):
    return oracle.logprobs(hidden, weight, bias, **options)[0]


def teacher_of(teacher):
    return dict(zip(("ref_hidden", "ref_weight", "ref_bias"), teacher, strict=True))


# --- the head ---


@pytest.mark.parametrize(
    ("shape", "head", "settings"),
    [
        *(("ragged", head, settings) for head in HEADS for settings in SETTINGS),
        *((shape, "capped", settings) for shape in ("one", "none") for settings in SETTINGS[2:4]),
        *(("blocks", "plain", settings) for settings in SETTINGS[:3]),
    ],
)
def test_jsd_of_the_head(shape, settings, head):
    student, teacher, targets = draw(shape)
    scored, options = targets != oracle.IGNORE, HEADS[head]
    up = oracle.normal(len(targets), seed=9)
    for trained in ((0,), (0, 1, 2), (1,)):
        wide = [x.clone().requires_grad_(k in trained) for k, x in enumerate(student)]
        t = final(teacher[0][scored], teacher[1], teacher[2], options)
        wanted = divergence(final(wide[0][scored], wide[1], wide[2], options), t, *settings)
        (wanted * up[scored]).sum().backward()
        for backend in ("torch", "dense"):
            mine = [x.clone().requires_grad_(k in trained) for k, x in enumerate(student)]
            found = xf.token_stats(
                mine[0], mine[1], targets, outputs=("jsd",), bias=mine[2], jsd=settings, backend=backend,
                chunk_tokens=SHAPES[shape][2] if backend == "torch" else None, **teacher_of(teacher), **options,
            ).jsd  # fmt: skip
            assert_close(found[scored].detach(), wanted.detach(), rtol=1e-9, atol=1e-12)
            assert not found[~scored].any()
            (found * up).sum().backward()
            for x, y in zip(mine, wide, strict=True):
                assert (x.grad is None) == (y.grad is None)
                if x.grad is not None:
                    assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-12)


def test_jsd_beside_the_other_statistics():
    """All outputs at once are what each is alone, and so is the gradient of their sum."""
    student, teacher, targets = draw("ragged")
    names = ("entropy", "kl", "jsd", "reverse_kl", "top1")
    values, gradients = [], []
    for outputs in (names, *((name,) for name in names)):
        hidden = student[0].clone().requires_grad_()
        stats = xf.token_stats(
            hidden, student[1], targets, outputs=outputs, jsd=Jsd(0.3, 2.0) if "jsd" in outputs else None,
            chunk_tokens=8, **teacher_of(teacher) if {"kl", "jsd", "reverse_kl"} & set(outputs) else {},
        )  # fmt: skip
        values.append({name: getattr(stats, name) for name in outputs})
        learns = [x for x in values[-1].values() if x.requires_grad]
        if learns:
            sum(x.sum() for x in learns).backward()
            gradients.append(hidden.grad)
    for one in values[1:]:
        for name, x in one.items():
            assert torch.equal(x, values[0][name]) or (x - values[0][name]).abs().max() < 1e-12, name
    assert_close(gradients[0], sum(gradients[1:]))


def test_a_bfloat16_teacher_of_a_float32_student():
    student, teacher, targets = draw("ragged", torch.float32)
    narrow = [x.bfloat16() for x in teacher]
    found = xf.token_stats(student[0], student[1], targets, outputs=("jsd",), **teacher_of(narrow)).jsd
    t = final(*(x.double() for x in narrow), {})
    wanted = divergence(final(student[0].double(), student[1].double(), None, {}), t, 0.5)
    assert_close(found.double(), torch.where(targets != oracle.IGNORE, wanted, 0.0), rtol=1e-4, atol=1e-5)


def test_152k_tokens_stay_within_a_tile(tmp_path, monkeypatch):
    """No tensor is larger than the budget of a tile, of 8 positions and not of all 40, for two heads of 151,936."""
    monkeypatch.setattr("xpo_fast.head.gemms._used_tiles", [])
    vocab = 151_936
    budget = 8 * vocab * 4
    hidden = oracle.normal(40, 4, seed=0, dtype=torch.float32).requires_grad_()
    weight = oracle.normal(vocab, 4, seed=1, dtype=torch.float32)
    theirs = oracle.normal(40, 2, seed=2, dtype=torch.float32), oracle.normal(vocab, 2, seed=3, dtype=torch.float32)
    targets = oracle.tokens((2, 40), vocab, 0.0)
    targets[1] = oracle.IGNORE  # no rejected row
    objective = xf.Objective("gkd", tile_bytes=budget)

    def step():
        given = {"ref_hidden": theirs[0].expand(2, 40, 2), "ref_weight": theirs[1]}
        objective(hidden.expand(2, 40, 4), weight, targets, **given).loss.backward()

    assert oracle.Meter(step, tmp_path).largest_bytes <= budget


def test_refusals_of_the_head():
    student, teacher, targets = draw("one")

    def call(**options):
        return xf.token_stats(student[0], student[1], targets, **options)

    for options, message in (
        ({"outputs": ("jsd",)}, "jsd need the reference's hidden states"),
        ({"outputs": ("kl",), "jsd": Jsd(), **teacher_of(teacher)}, 'about the output "jsd"'),
        ({"outputs": ("jsd",), "jsd": Jsd(1.5), **teacher_of(teacher)}, r"beta in \[0, 1\]"),
        ({"outputs": ("jsd",), "jsd": Jsd(0.5, 0.0), **teacher_of(teacher)}, "temperature of the divergence > 0"),
        ({"outputs": ("jds",)}, "no statistic named jds; there are entropy, kl, reverse_kl, jsd"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)


# --- the methods ---

ROWS = [5, 1, 8]  # tokens of completions


def batch(vocab=131, dtype=torch.float64):
    """Rows as a pairwise method takes them, with no rejected ones: hidden, head, teacher, targets (2P, T)."""
    count, longest = len(ROWS), max(ROWS)
    targets = oracle.tokens((2 * count, longest), vocab, 0.0)
    for i, n in enumerate([*ROWS, 0, 0, 0]):
        targets[i, n:] = oracle.IGNORE
    sizes = [(2 * count, longest, WIDTH), (vocab, WIDTH), (2 * count, longest, TEACHERS), (vocab, TEACHERS)]
    return *(oracle.normal(*size, seed=k, std=0.6, dtype=dtype) for k, size in enumerate(sizes)), targets


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("method", "hyper", "settings"),
    [
        ("forward_kl", {}, (0, 1.0)),
        ("reverse_kl", {}, (1, 1.0)),
        ("gkd", {}, (0.5, 1.0)),
        ("gkd", {"beta": 0.0}, (0, 1.0)),
        ("gkd", {"beta": 0.2, "temperature": 3.0}, (0.2, 3.0)),
    ],
)
def test_divergences_as_methods(method, hyper, settings, trainable):
    hidden, weight, theirs, head, targets = batch()
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    scored = targets != oracle.IGNORE
    wanted = divergence(leaves[0][scored] @ leaves[1].T, theirs[scored] @ head.T, *settings).sum() / sum(ROWS)
    wanted.backward()
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    out = xf.Objective(method, tile_bytes=2 * 8 * 131 * 4, **hyper)(*mine, targets, ref_hidden=theirs, ref_weight=head)
    out.loss.backward()
    assert_close(out.loss.detach(), wanted.detach(), rtol=1e-9, atol=1e-12)
    for x, y in zip(mine, leaves, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-12)
    logps = (theirs @ head.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert_close(out.metrics["logps/teacher"], torch.where(scored, logps, 0).sum() / len(ROWS), rtol=1e-6, atol=1e-6)


def test_soft_and_hard_targets_together():
    hidden, weight, theirs, head, targets = batch()
    scored = targets != oracle.IGNORE
    z = hidden[scored] @ weight.T
    soft = divergence(z, theirs[scored] @ head.T, 0.3, 2.0).sum()
    hard = torch.nn.functional.cross_entropy(z, targets[scored], reduction="sum")
    given = {"ref_hidden": theirs, "ref_weight": head}
    found = xf.Objective("gkd + 0.5*sft", beta=0.3, temperature=2.0)(hidden, weight, targets, **given).loss
    assert_close(found, (soft + 0.5 * hard) / sum(ROWS))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("given", ["hidden states", "log-probs"])
def test_sampled_kl(trainable, given):
    hidden, weight, theirs, head, targets = (x[:3] if x.dim() == 3 or x.dtype == torch.int64 else x for x in batch())
    scored = targets != oracle.IGNORE

    def logps(h, w):
        return (h @ w.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]

    old = logps(hidden, weight) + 0.1 * oracle.normal(*targets.shape, seed=8)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    teacher = logps(theirs, head)
    wanted = -((logps(*leaves) - old).exp() * (teacher - old))[scored].sum() / sum(ROWS)
    wanted.backward()
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    reference = {"ref_hidden": theirs, "ref_weight": head} if given == "hidden states" else {"ref_token_logp": teacher}
    out = xf.Objective("sampled_kl", tile_bytes=8 * 131 * 8)(*mine, targets, old_logp=old, **reference)
    out.loss.backward()
    assert_close(out.loss.detach(), wanted.detach(), rtol=1e-6, atol=1e-6)
    for x, y in zip(mine, leaves, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-7)


def test_sampled_kl_is_reverse_kl_in_expectation():
    """Over all tokens of a position, weighted by the policy, values and gradients are those of KL(π ‖ teacher)."""
    z, t = oracle.normal(7, seed=1), oracle.normal(7, seed=2)
    z.requires_grad_()
    logp, teacher = z.log_softmax(0), t.log_softmax(0)
    losses, metrics = xf.METHODS["sampled_kl"](
        token_logp=logp[:, None], ref_token_logp=teacher[:, None], mask=torch.ones(7, 1, dtype=torch.bool)
    )
    p = logp.exp().detach()
    kl = (logp.exp() * (logp - teacher)).sum()
    assert_close((p * losses[:, 0]).sum(), kl)
    assert_close((p * metrics["kl"][:, 0]).sum(), kl.detach())
    ours, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in ((p * losses[:, 0]).sum(), kl))
    assert_close(ours, theirs)


def topk_by_hand(z, ids, log_q):
    """KL of k tokens and the rest, from all logits: (n,)."""
    p, q = z.softmax(1).gather(1, ids), log_q.exp()
    rest_p, rest_q = 1 - p.sum(1), 1 - q.sum(1)
    return (q * (log_q - p.log())).sum(1) + rest_q * (rest_q / rest_p).log()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_topk_kl(trainable, packed):
    hidden, weight, theirs, head, targets = batch()
    log_q, ids = (theirs @ head.T).log_softmax(-1).topk(5)
    scored = targets != oracle.IGNORE
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    wanted = topk_by_hand(leaves[0][scored] @ leaves[1].T, ids[scored], log_q[scored]).sum() / sum(ROWS)
    wanted.backward()
    log_q[~scored] = torch.nan
    ids[~scored] = -1  # not read
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    given = (mine[0], targets, ids, log_q)
    how = {}
    if packed:
        keep = torch.arange(max(ROWS)) < torch.tensor([*ROWS, 0, 0, 0])[:, None]
        given = tuple(x[keep] for x in given)
        how = {"cu_seqlens": torch.tensor([0, *torch.tensor([*ROWS, 0, 0, 0]).cumsum(0).tolist()])}
    objective = xf.Objective("topk_kl", tile_bytes=8 * 131 * 8)
    out = objective(given[0], mine[1], given[1], topk_ids=given[2], topk_logp=given[3], **how)
    out.loss.backward()
    assert_close(out.loss.detach(), wanted.detach(), rtol=1e-6, atol=1e-9)
    for x, y in zip(mine, leaves, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-9)
    plan = objective.plan(given[0], mine[1], given[1], topk_ids=given[2], topk_logp=given[3], **how)
    assert plan.passes == (4 if trainable else 3)


def test_topk_divergence():
    """By hand; between 0 and the whole vocabulary's; equal to it for k = V; with absent ids and a sure teacher."""
    q, p = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
    # 0.5 log 2 + 0 + 0.25 log(0.25 / 0.5) = 0.25 log 2
    assert_close(topk_divergence(p, q), torch.tensor([0.1732868]))
    z, t = oracle.normal(6, 9, seed=1).requires_grad_(), oracle.normal(6, 9, seed=2)
    log_p, log_q = z.log_softmax(1), t.log_softmax(1)
    full, last = divergence(z, t, 0), 0.0
    for k in (1, 3, 8, 9):
        best, ids = log_q.topk(k)
        found = topk_divergence(log_p.gather(1, ids), best)
        assert (found >= last - 1e-12).all() and (found <= full + 1e-12).all()
        last = found.detach()
    assert_close(last, full.detach(), rtol=1e-6, atol=1e-9)
    best, ids = log_q.topk(3)
    wide = torch.cat([best, torch.full((6, 2), -torch.inf)], 1), torch.cat([ids, torch.zeros_like(ids[:, :2])], 1)
    more = topk_divergence(log_p.gather(1, wide[1]), wide[0])
    assert_close(more, topk_divergence(log_p.gather(1, ids), best))
    (gradient,) = torch.autograd.grad(more.sum(), z)
    assert gradient.isfinite().all()
    sure = torch.tensor([[0.0, -200.0]], requires_grad=True)
    for log_q in (torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-1e-9, -30.0]]), torch.full((1, 2), -torch.inf)):
        found = topk_divergence(sure, log_q)
        (gradient,) = torch.autograd.grad(found, sure)
        assert found.isfinite().all() and gradient.isfinite().all()


def test_refusals_of_topk_kl():
    hidden, weight, _, _, targets = batch()
    ids, logp = torch.zeros(6, 8, 2, dtype=torch.long), torch.full((6, 8, 2), -1.0)
    for method, given, message in (
        ("topk_kl", {}, "pass topk_ids= and topk_logp="),
        ("topk_kl", {"topk_ids": ids}, "pass topk_ids= and topk_logp="),
        ("topk_kl", {"topk_ids": ids[:, :7], "topk_logp": logp}, r"must be \(6, 8, 'K'\)"),
        ("topk_kl", {"topk_ids": ids + 131, "topk_logp": logp}, "selected id 131 is outside the vocabulary of 131"),
        ("sft", {"topk_ids": ids}, "topk_ids= is for topk_kl"),
    ):
        with pytest.raises(ValueError, match=message):
            xf.Objective(method)(hidden, weight, targets, **given)
    with pytest.raises(ValueError, match="of one completion"):
        _ = xf.Objective("topk_kl + 0.5*dpo").data_kind


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.1, 0.9), (0.7, 2.0)])
def test_gkd_is_trls(beta, temperature):
    """Value and gradient of `GKDTrainer.generalized_jsd_loss` of TRL 1.16 on the same batch, float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    hidden, weight, theirs, head, targets = batch(dtype=torch.float32)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = GKDTrainer.generalized_jsd_loss(
        leaves[0] @ leaves[1].T, theirs @ head.T, labels=targets, beta=beta, temperature=temperature
    )
    wanted.backward()
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    objective = xf.Objective("gkd", beta=beta, temperature=temperature)
    out = objective(*mine, targets, ref_hidden=theirs, ref_weight=head)
    out.loss.backward()
    assert_close(out.loss, wanted, rtol=1e-5, atol=1e-6)
    for x, y in zip(mine, leaves, strict=True):
        assert oracle.error(x.grad, y.grad) < 1e-5


def test_refusals_of_the_methods():
    for method, hyper, message in (
        ("gdk", {}, r"no method named 'gdk'.*gkd"),
        ("forward_lk", {}, r"no method named 'forward_lk'.*forward_kl"),
        ("gkd", {"lmbda": 0.5}, "gkd has no hyperparameter lmbda"),
        ("gkd", {"beta": 1.5}, r"beta in \[0, 1\]"),
        ("gkd + dpo", {}, "would have to be a teacher and not to be: train with dpo"),
        ([("gkd", {"beta": 0.1}), ("gkd", {"beta": 0.9})], {}, "one objective has one gkd"),
    ):
        with pytest.raises(ValueError, match=message):
            xf.Objective(method, **hyper)
    hidden, weight, _, _, targets = batch()
    with pytest.raises(ValueError, match="pass ref_hidden="):
        xf.Objective("gkd")(hidden, weight, targets)
    with pytest.raises(ValueError, match="whole distributions"):
        xf.Objective("reverse_kl")(hidden, weight, targets, ref_logps=torch.zeros(6))
