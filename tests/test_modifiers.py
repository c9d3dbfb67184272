"""What an objective does beyond one method on its rows: sums of methods, pairs out of lists, LD-DPO, WPO, drawn rivals,
rewards of tokens, and what it remembers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from test_objective import LENGTHS, LISTS, VOCAB, WIDTH, T, gradients_match, lay_out, operands, targets_of

layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
learns = pytest.mark.parametrize("learn", ["frozen", "trainable"])
tiles = pytest.mark.parametrize("tile", [None, 4], ids=["one tile", "longer units"])
FULL = [7, 3, 4, 1, 2, 1, 5, 6, 3, 6]  # no empty row


def packed_as(targets, packed, x):
    return x[targets != oracle.IGNORE] if packed else x


def check(out, loss, xs, wide):
    assert_close(out.loss, loss)
    out.loss.backward()
    loss.backward()
    gradients_match(xs, wide)


@pytest.mark.parametrize(
    ("first", "options"),
    [
        ("dpo + 0.5*sft", {"beta": 0.2}),
        (["dpo", "sft"], {"beta": 0.2, "weights": [1, 0.5]}),
        ([("dpo", {"beta": 0.2}), "sft"], {"weights": [1.0, 0.5], "beta": 3.0}),
    ],
    ids=str,
)
@learns
@tiles
def test_a_sum_of_methods(first, options, learn, tile):
    """Each mean is over what it is a mean of: pairs, and tokens of the chosen rows. Units count as both see them."""
    xs, targets, ref = operands(learn), targets_of(), -oracle.normal(10, seed=4).abs() - 8
    objective = xf.Objective(first, tile_bytes=tile and tile * VOCAB * 8, **options)
    out = objective(xs[0], xs[1], targets, bias=xs[2], ref_logps=ref)
    wide = oracle.leaves(*xs)
    sums, lengths = oracle.row_sums(oracle.stats(*wide[:2], targets, bias=wide[2])["logp"], targets)
    kept = torch.tensor([0, 1, 4])
    h = 0.2 * ((sums - ref)[kept] - (sums - ref)[kept + 5])
    loss = -logsigmoid(h).mean() - 0.5 * sums[kept].sum() / lengths[kept].sum()
    assert objective.count_items(targets).tolist() == [3, int(lengths[kept].sum())]
    sft = -sums[kept].sum() / lengths[kept].sum()
    assert_close(out.losses, (-logsigmoid(h).mean().detach(), sft.detach()))
    check(out, loss, xs, wide)


@layouts
@learns
@tiles
@pytest.mark.parametrize("pairs", ["all", "extremes"])
def test_pairs_out_of_lists(pairs, tile, learn, packed):
    """Each strictly better completion of a list against each worse one, as by a double loop, without empty rows."""
    xs, targets = operands(learn), targets_of()
    scores = torch.tensor([[3.0, 1.0, 3.0, 9.0, 2.0], [0.0, 1.0, 5.0, 1.0, 1.0]])
    ref_hidden = oracle.normal(10, T, WIDTH, seed=8)
    h, y, cu = lay_out(xs[0], targets, packed)
    given = {"ref_hidden": packed_as(targets, packed, ref_hidden), "scores": scores}
    objective = xf.Objective("odpo", pairs=pairs, alpha=0.5, tile_bytes=tile and tile * VOCAB * 8)
    out = objective(h, xs[1], y, bias=xs[2], **given, **cu)
    wide = oracle.leaves(*xs)
    logp = oracle.stats(*wide[:2], targets, bias=wide[2])["logp"]
    ref = oracle.stats(ref_hidden, *wide[1:2], targets, bias=wide[2])["logp"].detach()
    ratio = oracle.row_sums(logp - ref, targets)[0].view(2, LISTS)
    losses = []
    for row, score, mask in zip(ratio, scores, torch.tensor(LENGTHS).view(2, LISTS) > 0, strict=True):
        there = [k for k in range(LISTS) if mask[k]]
        couples = [(i, j) for i in there for j in there if score[i] > score[j]]
        if pairs == "extremes":
            best, worst = max(there, key=lambda k: score[k]), min(there, key=lambda k: score[k])
            couples = [(best, worst)]
        each = [-logsigmoid(0.1 * (row[i] - row[j]) - 0.5 * (score[i] - score[j]).log()) for i, j in couples]
        losses.append(torch.stack(each).mean())
    check(out, torch.stack(losses).mean(), xs, wide)


def test_lists_of_equal_scores_teach_nothing():
    xs, targets = operands(), targets_of(FULL)
    out = xf.Objective("simpo", pairs="all")(xs[0], xs[1], targets, bias=xs[2], scores=torch.ones(2, 5))
    out.loss.backward()
    assert out.loss == 0 and not any(x.grad.any() for x in xs)
    assert out.metrics["rewards/accuracies"].isnan()


@layouts
@learns
@tiles
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_alpha(alpha, tile, learn, packed):
    """Tokens beyond the shorter completion's length count alpha, the policy's and the reference's."""
    xs, targets = operands(learn), targets_of(FULL)
    h, y, cu = lay_out(xs[0], targets, packed)
    ref = -oracle.normal(10, T, seed=4).abs()
    objective = xf.Objective("dpo", ld_alpha=alpha, tile_bytes=tile and tile * VOCAB * 8)
    out = objective(h, xs[1], y, bias=xs[2], ref_logps=packed_as(targets, packed, ref), **cu)
    wide = oracle.leaves(*xs)
    ratio = oracle.stats(*wide[:2], targets, bias=wide[2])["logp"] - ref
    sums = []
    for r in range(10):
        tokens = ratio[r][targets[r] != oracle.IGNORE]
        shorter = min(FULL[r % 5], FULL[r % 5 + 5])
        sums.append(tokens[:shorter].sum() + alpha * tokens[shorter:].sum())
    sums = torch.stack(sums)
    check(out, -logsigmoid(0.1 * (sums[:5] - sums[5:])).mean(), xs, wide)
    if alpha == 1:
        plain = xf.Objective("dpo")(h, xs[1], y, bias=xs[2], ref_logps=packed_as(targets, packed, ref), **cu)
        assert_close(out.loss, plain.loss)


@layouts
@learns
@pytest.mark.parametrize("clamp", [True, False])
def test_wpo(clamp, learn, packed):
    """w = exp of the mean of log p − log Σp² over tokens, no gradient through it, at most 1 a pair if clamped."""
    xs, targets = operands(learn), targets_of()
    h, y, cu = lay_out(xs[0], targets, packed)
    out = xf.Objective("simpo", wpo=True, clamp=clamp)(h, xs[1], y, bias=xs[2], **cu)
    wide = oracle.leaves(*xs)
    found = oracle.stats(*wide[:2], targets, bias=wide[2])
    sums, lengths = oracle.row_sums(found["logp"], targets)
    adjusted, _ = oracle.row_sums((found["logp"] - found["log_sum_sq_probs"]).detach(), targets)
    kept = torch.tensor([0, 1, 4])
    w = (adjusted / lengths).exp()
    w = w[kept] * w[kept + 5]
    margin = 2 * (sums / lengths)[kept] - 2 * (sums / lengths)[kept + 5] - 1
    check(out, (-logsigmoid(margin) * (w.clamp(max=1) if clamp else w)).mean(), xs, wide)


@learns
def test_wpo_of_pairs_out_of_lists(learn):
    """Each pair of a list has its own weight."""
    xs, targets = operands(learn), targets_of(FULL)
    scores = torch.tensor([[3.0, 1.0, 3.0, 9.0, 2.0], [0.0, 1.0, 5.0, 1.0, 1.0]])
    out = xf.Objective("simpo", pairs="all", wpo=True)(xs[0], xs[1], targets, bias=xs[2], scores=scores)
    wide = oracle.leaves(*xs)
    found = oracle.stats(*wide[:2], targets, bias=wide[2])
    lengths = torch.tensor(FULL)
    mean = (oracle.row_sums(found["logp"], targets)[0] / lengths).view(2, LISTS)
    adjusted = oracle.row_sums((found["logp"] - found["log_sum_sq_probs"]).detach(), targets)[0]
    w = (adjusted / lengths).exp().view(2, LISTS)
    losses = []
    for k, score in enumerate(scores):
        couples = [(i, j) for i in range(LISTS) for j in range(LISTS) if score[i] > score[j]]
        each = [-logsigmoid(2 * (mean[k, i] - mean[k, j]) - 1) * (w[k, i] * w[k, j]).clamp(max=1) for i, j in couples]
        losses.append(torch.stack(each).mean())
    check(out, torch.stack(losses).mean(), xs, wide)


@layouts
@learns
@tiles
def test_cringe_draws_likely_rivals(tile, learn, packed):
    """With one rival to draw from, the likeliest token but the target: a plain computation on every logit."""
    xs, targets = operands(learn), targets_of()
    h, y, cu = lay_out(xs[0], targets, packed)
    scaling = {"temperature": 0.8, "softcap": 5.0, "logit_scale": 1.5}
    objective = xf.Objective("cringe", top_k=1, tile_bytes=tile and tile * VOCAB * 8)
    out = objective(h, xs[1], y, bias=xs[2], **scaling, **cu)
    wide = oracle.leaves(*xs)
    kept, losses = [0, 1, 4], []
    for k in kept:
        _, logp_w = oracle.logprobs(wide[0][k], *wide[1:], **scaling)
        z_l, logp_l = oracle.logprobs(wide[0][k + 5], *wide[1:], **scaling)

        def at(x, row):
            there = targets[row] != oracle.IGNORE
            return x[there].gather(1, targets[row][there][:, None])[:, 0]

        there = targets[k + 5] != oracle.IGNORE
        rivals = z_l[there].scatter(1, targets[k + 5][there][:, None], -torch.inf).amax(1)
        gate = torch.sigmoid(-(at(logp_w, k).sum() - at(logp_l, k + 5).sum())).detach()
        contrast = torch.log1p((at(z_l, k + 5) - rivals).exp()).sum()
        losses.append(gate * (-at(logp_w, k).sum() + contrast))
    check(out, torch.stack(losses).mean(), xs, wide)


def test_cringe_is_seedable_and_draws_among_the_top_k():
    from xpo_fast.head.operands import Operands
    from xpo_fast.head.sampled import sample_rivals

    hidden, weight, bias = (x.detach() for x in operands())
    targets = targets_of()
    flat, y = hidden.flatten(0, 1), targets.flatten()
    z = oracle.logprobs(flat, weight, bias)[0]
    z.scatter_(1, y.clamp(min=0)[:, None], -torch.inf)
    best = z.topk(3).indices
    seen = set()
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        drawn = sample_rivals(Operands(flat, weight, y, bias, ignore_index=oracle.IGNORE), 4, 3, g)
        rank = (best == drawn[:, None]).int()
        assert rank.sum(1)[y != oracle.IGNORE].eq(1).all() and not drawn[y == oracle.IGNORE].any()
        seen |= set(rank.argmax(1)[y != oracle.IGNORE].tolist())
    assert seen == {0, 1, 2}
    first, again = (xf.Objective("cringe", seed=3)(hidden, weight, targets, bias=bias).loss for _ in range(2))
    other = xf.Objective("cringe", seed=4)(hidden, weight, targets, bias=bias).loss
    assert first == again != other


@layouts
def test_token_reward(packed):
    hidden, weight, bias = operands()
    targets = targets_of()
    h, y, cu = lay_out(hidden, targets, packed)
    ref = packed_as(targets, packed, -oracle.normal(10, T, seed=4).abs())
    out = xf.Objective("token_dpo", beta=0.3)(h, weight, y, bias=bias, ref_logps=ref, **cu)
    logp = xf.token_logps(h, weight, y, bias=bias).detach()
    # Of pairs that count: 2 and 3 have an empty half.
    counts = torch.tensor([k not in (2, 3) for k in [*range(5)] * 2])
    counts = packed_as(targets, packed, counts[:, None].expand(10, T)) & (y != oracle.IGNORE)
    assert out.token_reward.shape == y.shape and not out.token_reward.requires_grad
    assert_close(out.token_reward, torch.where(counts, 0.3 * (logp - ref), 0.0))
    assert xf.Objective("dpo")(h, weight, y, bias=bias, ref_logps=ref, **cu).token_reward is None


# --- what is remembered ---


def rewards_of(xs, targets, ref, beta=1.0):
    logp = oracle.stats(*oracle.leaves(*xs)[:2], targets, bias=xs[2])["logp"].detach()
    return beta * (oracle.row_sums(logp, targets)[0] - ref)


def test_bco_remembers_the_mean_reward():
    """Over all rows so far that count; updated before use; kept by state_dict; unchanged without gradient."""
    targets, columns = targets_of(), {"desirable": torch.arange(10) % 2 == 0}
    objective, seen = xf.Objective("bco", beta=0.1), []
    for seed in range(3):
        xs, ref = operands(), -oracle.normal(10, seed=seed).abs() - 8
        out = objective(xs[0], xs[1], targets, bias=xs[2], ref_logps=ref, **columns)
        kept = torch.tensor(LENGTHS) > 0
        rewards = rewards_of(xs, targets, ref, 0.1)[kept]
        seen.append(rewards)
        delta = torch.cat(seen).mean()
        assert_close(objective.state["delta"].double(), delta)
        sign = torch.where(columns["desirable"][kept], 1, -1)
        assert_close(out.loss.detach().double(), -logsigmoid(sign * (rewards - delta)).mean())
    saved = objective.state_dict()
    other = xf.Objective("bco", beta=0.1)
    other.load_state_dict(saved)
    with torch.no_grad():
        losses = [o(xs[0], xs[1], targets, bias=xs[2], ref_logps=ref, **columns).loss for o in (objective, other)]
    assert losses[0] == losses[1]
    assert_close(objective.state, saved)


def test_beta_dpo_remembers_margins():
    """Momentum 0.9 of mean and deviation of M, moved by the batch before it is used."""
    targets, objective = targets_of(), xf.Objective("beta_dpo", keep=1.0)
    xs = operands()
    states = []
    for seed in range(2):
        ref = -oracle.normal(10, seed=seed).abs() - 8
        ratio = rewards_of(xs, targets, ref)
        kept = torch.tensor([0, 1, 4])
        margins = ratio[kept] - ratio[kept + 5]
        before = objective.state_dict()
        out = objective(xs[0], xs[1], targets, bias=xs[2], ref_logps=ref)
        if before:
            assert_close(objective.state["m0"].double(), 0.9 * before["m0"].double() + 0.1 * margins.mean())
        beta = (0.1 * (1 + 0.6 * (margins.mean() - objective.state["m0"].double()))).clamp(min=1e-3)
        assert_close(out.loss.detach().double(), -logsigmoid(beta * margins).mean())
        states.append(objective.state_dict())
    assert states[0]["m0"] != states[1]["m0"] and states[0]["s"] != states[1]["s"]


def test_kto_takes_its_reference_point_from_the_state():
    xs, targets = operands(), targets_of()
    given = {"desirable": torch.arange(10) % 2 == 0, "ref_logps": torch.full((10,), -9.0)}
    objective = xf.Objective("kto")
    with pytest.raises(ValueError, match="missing kl"):
        objective(xs[0], xs[1], targets, bias=xs[2], **given)
    objective.state["kl"] = torch.tensor(0.7)
    found = objective(xs[0], xs[1], targets, bias=xs[2], **given).loss
    expected = xf.Objective("kto")(xs[0], xs[1], targets, bias=xs[2], kl=torch.tensor(0.7), **given).loss
    assert_close(found, expected)


# --- errors ---

ERRORS = [
    (("dpo + kto",), {}, "different layouts"),
    (("dpo + ",), {}, "sum of them"),
    (("dpo + nope",), {}, "no method named 'nope'"),
    (([],), {}, "at least one method"),
    ((["dpo", "sft"],), {"weights": [1.0]}, "a weight for each of 2"),
    ((["dpo", "sft"],), {"gamma": 1.0}, "none of dpo, sft has a hyperparameter gamma"),
    ((["dpo", ("sft", {"beta": 1.0})],), {}, "sft has no hyperparameter beta"),
    (("dpo",), {"pairs": "some"}, "all, extremes"),
    (("kto",), {"pairs": "all"}, "pairs= is for pairwise methods, kto is unpaired"),
    (("kto",), {"wpo": True}, "wpo= is for pairwise"),
    (("dpo",), {"ld_alpha": 2.0}, r"ld_alpha in \[0, 1\], got 2"),
    (("dpo",), {"ld_alpha": 0.5, "pairs": "all"}, "pairs that come as pairs"),
    (("dr_grpo",), {"fixed_length": 0}, "fixed_length of at least one"),
    (("grpo",), {"fixed_length": 5}, "fixed_length= is for dr_grpo"),
    (("dpo",), {"wpo": "no"}, "wpo to be bool, got 'no'"),
    (("simpo",), {"ld_alpha": 0.5}, "compare a pair with a reference, not simpo"),
    (("sft",), {"pairs": "all"}, "nothing but its scores"),
    (("haf",), {"pairs": "all"}, "nothing but its scores"),
    (([("bco", {"beta": 0.1}), "bco"],), {}, "bco twice"),
    (("gspo + grpo",), {"reduction": "none"}, "of tokens and of rows"),
    (([("dpo", 0.5), "sft"],), {}, "weights go into weights="),
    (({"dpo": 1.0},), {}, "expected a list of names"),
    (("dpo + 0.5*sft",), {"weights": [1, 1]}, "weights came twice"),
    ((["dpo", "sft"],), {"weights": [1, float("nan")]}, "finite weights"),
    (("cringe",), {"top_k": 0}, "top_k of at least 1"),
    (("cringe",), {"pairs": "all"}, "single tokens"),
    (("bradley_terry",), {}, r"reads no token.*METHODS\['bradley_terry'\]"),
]


@pytest.mark.parametrize(("args", "options", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_setup_errors(args, options, message):
    with pytest.raises(ValueError, match=message):
        xf.Objective(*args, **options)


CALLS = [
    ("lipo", {}, {}, "pass scores=.* or list_size="),
    ("lipo", {}, {"list_size": 3, "scores": torch.zeros(2, 3)}, "multiple of them, got 10 rows"),
    ("lipo", {}, {"scores": torch.zeros(3, 5)}, r"scores must be a tensor \(2, 5\).*got \(3, 5\)"),
    ("dpo", {"pairs": "all"}, {"list_size": 5}, "missing scores"),
    ("dpo", {"pairs": "all"}, {"scores": torch.zeros(2, 4), "list_size": 5}, r"scores must be a tensor \(2, 5\)"),
    ("dpo", {"ld_alpha": 0.5}, {"ref_logps": torch.zeros(10)}, "single tokens.*ref_logps= shaped as targets"),
    ("grpo", {"beta": 0.1}, {"advantage": torch.zeros(10)}, "compares with a reference.*log-prob of each token"),
    ("nn", {}, {"list_size": 1, "ref_logps": torch.zeros(10)}, "lists of 1 rows"),
    ("simpo", {"pairs": "all"}, {"scores": torch.full((2, 5), torch.nan)}, "finite scores"),
    ("dpo", {}, {"ref_logps": None, "ref_hidden": torch.zeros(5, 14, 6)}, r"ref_hidden must be \(10, 7\)"),
    ("dpo + sft", {}, {"denominator": torch.ones(1)}, r"denominator must be \(\) or \(2,\)"),
    ("odpo", {}, {"score_w": torch.tensor([1.0, 1, 1, 1, 0]), "score_l": torch.zeros(5)}, "row 4"),
    ("grpo", {}, {"advantage": torch.zeros(9)}, r"advantage must be a tensor \(10,\) or \(10, 7\)"),
    ("grpo", {}, {"advantage": torch.zeros(10), "old_logp": torch.zeros(10)}, r"old_logp must be a tensor \(10, 7\)"),
    ("grpo", {}, {}, "missing advantage"),
]


@pytest.mark.parametrize(("name", "options", "given", "message"), CALLS, ids=[m for *_, m in CALLS])
def test_call_errors(name, options, given, message):
    xs, targets = operands(), targets_of()
    if "ref_logps" not in given and xf.Objective(name, **options).needs_reference and name != "grpo":
        given = {**given, "ref_logps": torch.zeros(10)}
    with pytest.raises(ValueError, match=message):
        xf.Objective(name, **options)(xs[0], xs[1], targets, bias=xs[2], **given)


@learns
@pytest.mark.parametrize("name", ["odpo", "sppo", "dro", "haf", "grm"])
def test_columns_of_left_out_units_do_not_matter(name, learn):
    """NaN there: neither the loss nor the gradient of a column that has one."""
    xs, targets = operands(learn), targets_of()
    units = 5 if xf.METHODS[name].layout == "pairwise" else 10
    left_out = torch.tensor([2, 3] if units == 5 else [3, 7])
    results = []
    for value in (0.5, float("nan")):
        made = {"score_w": 1.0, "score_l": 0.2, "prob_w": 0.5}
        names = list(xf.METHODS[name].columns)
        columns = {n: torch.full((units,), made.get(n, 0.3), dtype=torch.float64) for n in names}
        columns = {n: x.index_fill(0, left_out, value).requires_grad_() for n, x in columns.items()}
        ref = {"ref_logps": torch.full((10,), -9.0)}
        out = xf.Objective(name)(xs[0], xs[1], targets, bias=xs[2], **ref, **columns)
        carriers = [x for n, x in columns.items() if n in ("value", "reward_w", "reward_l")]
        grads = torch.autograd.grad(out.loss, [*(x for x in xs if x.requires_grad), *carriers])
        results.append((out.loss.detach(), *grads))
    assert_close(*results)


def test_reference_tokens_of_rows_of_one_token():
    """As many packed rows as positions: only the name tells log-probs of tokens from sums over rows."""
    hidden, weight, bias = operands()
    h, y = hidden[:4, 0], torch.tensor([1, 2, 3, 4])
    cu, ref = torch.arange(5), torch.tensor([-1.0, -2.0, -3.0, -4.0])
    given = {"cu_seqlens": cu, "bias": bias, "advantage": torch.ones(4)}
    losses = [
        xf.Objective("grpo", beta=0.1)(h, weight, y, **given, **{way: ref}).loss
        for way in ("ref_logps", "ref_token_logp")
    ]
    assert_close(*losses)
    empty = torch.tensor([0, 2, 3, 4, 4])  # rows of 2, 1, 1, 0
    summed = xf.Objective("dpo")(
        h, weight, y, cu_seqlens=empty, bias=bias, ref_logps=torch.tensor([-3.0, -3.0, -4.0, 0])
    )
    tokens = xf.Objective("dpo")(h, weight, y, cu_seqlens=empty, bias=bias, ref_token_logp=ref)
    assert_close(summed.loss, tokens.loss)


def test_the_draws_of_cringe_go_on_after_a_restart():
    xs, targets = operands("frozen"), targets_of()

    def losses(objective, count):
        return [objective(xs[0], xs[1], targets, bias=xs[2]).loss.item() for _ in range(count)]

    whole = losses(xf.Objective("cringe", seed=3), 4)
    first = xf.Objective("cringe", seed=3)
    begun = losses(first, 2)
    with torch.no_grad():
        losses(first, 3)  # an evaluation takes nothing from the draws of training
    again = xf.Objective("cringe", seed=3)
    again.load_state_dict(first.state_dict())
    assert begun + losses(again, 2) == whole


# --- policy ---


@layouts
@learns
def test_long_rows_of_token_losses_still_cost_3f(learn, packed, tmp_path):
    """Tokens are units: a row longer than a tile is not made twice."""
    xs, targets = operands(learn), targets_of()
    h, y, cu = lay_out(xs[0], targets, packed)
    scored = int((targets != oracle.IGNORE).sum())
    objective = xf.Objective("grpo", tile_bytes=2 * VOCAB * 8)
    plan = objective.plan(h, xs[1], y, bias=xs[2], **cu)
    assert plan.passes == (3 if learn == "trainable" else 2)

    def call():
        out = objective(h, xs[1], y, bias=xs[2], advantage=oracle.normal(10, seed=5), **cu)
        out.loss.backward()
        return out

    assert oracle.Meter(call, tmp_path).passes(scored, VOCAB, WIDTH) == plan.passes


@layouts
def test_advantages_of_rows_and_of_tokens(packed):
    xs, targets = operands(), targets_of()
    h, y, cu = lay_out(xs[0], targets, packed)
    row = oracle.normal(10, seed=5)
    each = packed_as(targets, packed, row[:, None].expand(10, T))
    losses = [xf.Objective("grpo")(h, xs[1], y, bias=xs[2], advantage=a, **cu).loss for a in (row, each)]
    assert_close(*losses)
