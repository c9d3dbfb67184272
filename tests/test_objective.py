"""Every method through the objective, against its own function on materialised float64 log-probs and plain autograd.

Tests over METHODS make a method's columns from the names it takes, so a new method is covered as it is registered.
"""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from pairs import in_pairs

VOCAB, WIDTH, T = 29, 6, 7
# Scored tokens of the rows: ragged pairs; a full row; one token; an empty rejected row and an empty chosen one, so
# that units 2 and 3 are left out of pairs; padding between tokens comes from `lay_out`.
LENGTHS = [7, 3, 4, 0, 2, 1, 5, 0, 3, 6]
TILES = {"one tile": None, "several units": 16, "longer units": 4, "one token": 1}  # tokens of a tile
LEARN = {"frozen": (True, False), "trainable": (True, True), "head only": (False, True)}
LISTS = 5  # rows a list: two of them, of four and of four completions, one of them alone at its end


def rising(shape):
    return torch.arange(shape.numel(), dtype=torch.float64).view(shape) % 7 / 7


# What a caller gives, by the shape that INPUTS gives the input: (U,), (U, K) or (R, T); else `drawn`.
COLUMNS = {
    "desirable": lambda shape: torch.arange(shape.numel()) % 3 != 1,
    "kl": lambda shape: torch.tensor(0.3, dtype=torch.float64),
    "delta": lambda shape: torch.tensor(-0.2, dtype=torch.float64),
    "m0": lambda shape: torch.tensor(0.5, dtype=torch.float64),
    "s": lambda shape: torch.tensor(2.0, dtype=torch.float64),
    "score_w": lambda shape: rising(shape) + 1.5,
    "score_l": lambda shape: -rising(shape),
    "prob_w": lambda shape: rising(shape),
    "scores": lambda shape: rising(shape),
    "logp_sft": lambda shape: -oracle.normal(*shape, seed=11).abs(),
    "ref_pos_logp_l": lambda shape: -oracle.normal(*shape, seed=11).abs() - 5,
    "old_logp": lambda shape: -oracle.normal(*shape, seed=14).abs() - 3,
    "ptx_logp": lambda shape: -oracle.normal(3, 4, seed=15).abs(),
    "ptx_mask": lambda shape: torch.ones(3, 4, dtype=torch.bool).tril(),
}


def drawn(shape):
    return oracle.normal(*shape, seed=13)


# Settings that bring a method's optional inputs into play, or leave chance out.
HYPER = {"beta_dpo": {"keep": 1.0}, "cispo": {"eps": 0.2}}
SAMPLED = {"cringe"}  # draws tokens: test_cringe
THROUGH_HEAD = [n for n, m in sorted(xf.METHODS.items()) if m.layout != "reward" and "returns" not in m.inputs]
THROUGH_HEAD = [
    n for n in THROUGH_HEAD if n not in SAMPLED | {"topk_kl"}
]  # whose columns are K wide: test_distillation


def hyper_of(method):
    switches = {switch: 0.1 for switch in method.uses.values() if not method.defaults[switch]}
    return {**switches, **HYPER.get(method.name, {})}


every_method = pytest.mark.parametrize("name", THROUGH_HEAD)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
learns = pytest.mark.parametrize("learn", LEARN)


def operands(learn="trainable", dtype=torch.float64, rows=10):
    """hidden (R, T, D), weight (V, D), bias (V,)."""
    hidden = oracle.normal(rows, T, WIDTH, seed=1, dtype=dtype)
    weight, bias = (oracle.normal(*s, seed=2, std=0.7, dtype=dtype) for s in ((VOCAB, WIDTH), (VOCAB,)))
    wants_hidden, wants_head = LEARN[learn]
    return (hidden.requires_grad_(wants_hidden), weight.requires_grad_(wants_head), bias.requires_grad_(wants_head))


def targets_of(lengths=LENGTHS):
    """(R, T): each row's tokens scattered over its positions, the rest ignored."""
    g = torch.Generator().manual_seed(5)
    targets = oracle.tokens((len(lengths), T), VOCAB, 0.0, seed=6)
    for row, n in zip(targets, lengths, strict=True):
        row[torch.randperm(T, generator=g)[n:]] = oracle.IGNORE
    return targets


def lay_out(hidden, targets, packed):
    """Padded rows as they are; or packed without their ignored positions: hidden, targets, {cu_seqlens}."""
    if not packed:
        return hidden, targets, {}
    real = targets != oracle.IGNORE
    cu_seqlens = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    return hidden[real], targets[real], {"cu_seqlens": cu_seqlens}


def list_size(method):
    return LISTS if method.layout == "listwise" else None


def given_to(method, rows):
    """The columns and the reference's hidden states that a call of this method needs, for padded rows."""
    size = LISTS if rows >= LISTS else 2
    units = {"pairwise": rows // 2, "listwise": rows // size}.get(method.layout, rows)
    size = size - ("logp_l" in method.inputs)  # the last row of a list is the rejected one
    shapes = {"": (), "U": (units,), "UK": (units, size), "UT": (rows, T), "II": ()}
    columns = {n: COLUMNS.get(n, drawn)(torch.Size(shapes[method.axes(n)[0]])) for n in method.columns}
    reads = method.reads_reference(hyper_of(method))
    return columns, {"ref_hidden": oracle.normal(rows, T, WIDTH, seed=12)} if reads else {}


def of_tokens(method, targets, packed, given):
    """Columns and hidden states of tokens, laid out as `lay_out` lays out the rows."""
    real = targets != oracle.IGNORE
    by_token = {n for n in given if n == "ref_hidden" or (*method.axes(n), "")[0] == "UT"}
    return {n: x[real] if packed and n in by_token else x for n, x in given.items()}


def known_of(method, wide, targets, ref, **options):
    """Everything that the objective derives, materialised, by the inputs' names; and which units count."""
    hidden, weight, bias = wide
    found = oracle.stats(hidden, weight, targets, bias=bias, **options, **ref)
    tokens = {"token_logp": found["logp"], "entropy": found["entropy"]}
    if ref:
        reference = oracle.stats(ref["ref_hidden"], weight, targets, bias=bias, **options)["logp"]
        tokens["ref_token_logp"] = reference.detach()
    lengths = oracle.row_sums(tokens["token_logp"], targets)[1]
    if method.layout == "policy":
        return {**tokens, "mask": targets != oracle.IGNORE}, lengths > 0
    rows = {"logp": "token_logp", "ref_logp": "ref_token_logp"}
    rows = {name: oracle.row_sums(tokens[t], targets)[0] for name, t in rows.items() if t in tokens}
    rows["len"] = lengths
    if ref:
        rows |= {name: oracle.row_sums(found[name], targets)[0] for name in ("kl", "reverse_kl", "jsd")}
    if method.layout == "pairwise":
        known = {n + s: x for n, xs in rows.items() for s, x in zip(("_w", "_l"), xs.chunk(2), strict=True)}
        read = [known["len" + s] > 0 for s in ("_w", "_l") if "logp" + s in method.inputs]
        return known, torch.stack(read).all(0)
    if method.layout == "listwise":
        known = {n + "s": x.view(-1, LISTS) for n, x in rows.items()}
        keep = known["lens"] > 0
        if "logp_l" not in method.inputs:
            return {**known, "mask": keep}, keep.any(1)
        last = {"logp_l": known["logps"][:, -1]}
        known = {n: x[:, :-1] for n, x in known.items()}
        return {**known, **last, "mask": keep[:, :-1]}, keep[:, :-1].any(1) & keep[:, -1]
    return {**rows, "length": lengths}, lengths > 0


def materialised(method, hidden, weight, bias, targets, columns, ref=None, *, hyper=None, **options):
    """Losses (of kept units only; of tokens (R, T)), their metrics, the kept units and their items."""
    known, keep = known_of(method, (hidden, weight, bias), targets, ref or {}, **options)
    hyper = hyper_of(method) if hyper is None else hyper
    wanted = {n for n in method.inputs if method.wants(n, hyper)}
    inputs = {n: x for n, x in {**known, **columns}.items() if n in wanted}
    if method.layout == "policy":
        losses, metrics = method(**inputs, **hyper)
        return losses, metrics, keep, items_of(method, known, keep)
    losses, metrics = method(**{n: x[keep] if x.dim() else x for n, x in inputs.items()}, **hyper)
    return losses, metrics, keep, items_of(method, known, keep)


def items_of(method, known, keep):
    """What the mean divides by, by the words of Method.denominator."""
    if method.denominator != "tokens":
        return keep.any().long() if method.denominator == "local_tokens" else keep.sum()
    if method.layout == "policy":
        return known["mask"].sum()
    return sum(known["len" + s][keep].sum() for s in ("_w", "_l") if "logp" + s in method.inputs)


def mean_of(method, losses, items, targets):
    """The loss with reduction="mean"."""
    tokens = (targets != oracle.IGNORE).sum(1)
    if method.denominator == "row_means":
        losses = losses / tokens.clamp(min=1)[:, None]
    elif method.denominator == "local_tokens":
        losses = losses / tokens.sum()
    elif method.denominator == "fixed_length":
        losses = losses / T
    return losses.sum() / items


def gradients_match(xs, wide, rtol=1e-9):
    for x, w in zip(xs, wide, strict=True):
        if x.requires_grad:
            assert x.grad.dtype == x.dtype
            assert oracle.error(x.grad, w.grad) < rtol
        else:
            assert x.grad is None


# Rows are laid out before anything is tiled: a method has both layouts and every tile, not each tile in both layouts.
@in_pairs(
    ("name", THROUGH_HEAD),
    (
        "learn, backend, tile",
        [(learn, *way) for learn in LEARN for way in (*(("torch", t) for t in TILES), ("dense", "one tile"))],
    ),
    ("packed", [False, True]),
)
def test_loss_and_gradients(name, packed, learn, backend, tile):
    method, hyper = xf.METHODS[name], hyper_of(xf.METHODS[name])
    xs, targets = operands(learn), targets_of()
    columns, ref = given_to(method, len(LENGTHS))
    h, y, cu = lay_out(xs[0], targets, packed)
    given = of_tokens(method, targets, packed, {**columns, **ref})
    options = {"fixed_length": T} if method.denominator == "fixed_length" else {}
    tile_bytes = TILES[tile] and TILES[tile] * VOCAB * 8
    objective = xf.Objective(name, backend=backend, tile_bytes=tile_bytes, **options, **hyper)
    out = objective(h, xs[1], y, bias=xs[2], list_size=list_size(method), **cu, **given)

    wide = oracle.leaves(*xs)
    losses, metrics, _, items = materialised(method, *wide, targets, columns, ref)
    loss = mean_of(method, losses, items, targets)
    assert out.loss.shape == () and out.loss.requires_grad
    assert_close(out.loss, loss)
    assert set(out.metrics) == set(metrics) == set(out.counts)
    for key, values in metrics.items():
        assert not out.metrics[key].requires_grad
        assert_close(out.metrics[key], values.nanmean(), msg=lambda m, key=key: f"{key}: {m}", equal_nan=True)
        assert out.counts[key] == (~values.isnan()).sum()
    count = objective.count_items(y, list_size=list_size(method), **cu)
    assert count == items and count.dtype == torch.int64 and count.shape == ()

    (out.loss * 3).backward()
    (loss * 3).backward()
    gradients_match(xs, wide)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["simpo", "kto", "sft"])
def test_reductions(name, reduction, learn):
    """With "none" a left-out unit keeps its place, with loss 0."""
    method, xs, targets = xf.METHODS[name], operands(learn), targets_of()
    columns, ref = given_to(method, len(LENGTHS))
    out = xf.Objective(name, reduction=reduction)(xs[0], xs[1], targets, bias=xs[2], **ref, **columns)
    wide = oracle.leaves(*xs)
    losses, _, keep, _ = materialised(method, *wide, targets, columns, ref)
    if reduction == "sum":
        assert_close(out.loss, losses.sum())
        u = oracle.normal(seed=3)
    else:
        losses = torch.zeros(keep.shape, dtype=torch.float64).masked_scatter(keep, losses)
        assert_close(out.loss, losses)
        u = oracle.normal(len(keep), seed=3)
    (out.loss * u).sum().backward()
    (losses * u).sum().backward()
    gradients_match(xs, wide)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("dpo", {"beta": 0.7, "label_smoothing": 0.2}),  # Liger's sigmoid ignores the smoothing
        ("simpo", {"gamma_beta_ratio": 0.3, "beta": 3.0}),
        ("ipo", {"variant": "sum"}),
    ],
)
def test_hyperparameters_and_scaling(name, hyper, learn):
    """What the model does to logits, and the method's own settings, reach where they belong; the reference's too."""
    method, xs, targets = xf.METHODS[name], operands(learn), targets_of()
    scaling = {"temperature": 0.8, "softcap": 4.0, "logit_scale": 1.5}
    ref_hidden = oracle.normal(len(LENGTHS), T, WIDTH, seed=8)
    ref = {"ref_hidden": ref_hidden} if method.needs_reference else {}
    objective = xf.Objective(name, tile_bytes=16 * VOCAB * 8, **hyper)
    out = objective(xs[0], xs[1], targets, bias=xs[2], **scaling, **ref)
    wide = oracle.leaves(*xs)
    losses, _, _, items = materialised(method, *wide, targets, {}, ref, hyper=hyper, **scaling)
    default, *_ = materialised(method, *wide, targets, {}, ref, hyper={}, **scaling)
    assert (default - losses).abs().min() > 1e-3
    assert_close(out.loss, losses.sum() / items)
    out.loss.backward()
    (losses.sum() / items).backward()
    gradients_match(xs, wide)


@pytest.mark.parametrize("name", [n for n in THROUGH_HEAD if given_to(xf.METHODS[n], 10)[1]])
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_ways_to_give_a_reference(name, learn):
    """Its hidden states with a head of its own, of another width; or its log-probs. No gradient goes there."""
    method, xs, targets = xf.METHODS[name], operands(learn), targets_of()
    columns, _ = given_to(method, len(LENGTHS))
    ref = {
        "ref_hidden": oracle.normal(len(LENGTHS), T, 4, seed=8).requires_grad_(),
        "ref_weight": oracle.normal(VOCAB, 4, seed=9).requires_grad_(),
        "ref_bias": oracle.normal(VOCAB, seed=10).requires_grad_(),
    }
    tokens = oracle.stats(*list(ref.values())[:2], targets, bias=ref["ref_bias"])["logp"]
    objective = xf.Objective(name, **hyper_of(method))
    columns["list_size"] = list_size(method)
    ways = [ref]
    if not objective.needs_reference_hidden:
        ways.append({"ref_logps": tokens})
        if not objective.needs_reference_tokens:
            ways.append({"ref_logps": oracle.row_sums(tokens, targets)[0]})
        else:
            with pytest.raises(ValueError, match="single tokens"):
                objective(xs[0], xs[1], targets, ref_logps=torch.zeros(len(LENGTHS)), **columns)
    else:
        with pytest.raises(ValueError, match=r"whole distributions.*ref_hidden="):
            objective(xs[0], xs[1], targets, ref_logps=tokens, **columns)
    results = []
    for way in ways:
        out = objective(xs[0], xs[1], targets, bias=xs[2], **way, **columns)
        grads = torch.autograd.grad(out.loss, [x for x in xs if x.requires_grad])
        results.append((out.loss.detach(), *grads, *out.metrics.values()))
    for result in results:
        assert_close(result, results[0], equal_nan=True)
    implied = objective(xs[0], xs[1], targets, bias=xs[2], ref_hidden=xs[0], **columns)
    same = {"ref_hidden": xs[0], "ref_weight": xs[1], "ref_bias": xs[2]}
    assert_close(implied.loss, objective(xs[0], xs[1], targets, bias=xs[2], **same, **columns).loss)


OF_ONE_BATCH = [n for n in THROUGH_HEAD if xf.METHODS[n].unit == "batch"]  # whose losses depend on one another


def test_a_reference_that_no_method_reads_is_ignored():
    """Whatever it is: of another width, dtype or vocabulary."""
    hidden, weight, _ = operands()
    objective, targets = xf.Objective("simpo"), targets_of()
    want = objective(hidden, weight, targets).loss
    for ref in ({"ref_hidden": hidden[..., :2].float()}, {"ref_hidden": hidden, "ref_weight": weight[:3]}):
        assert objective(hidden, weight, targets, **ref).loss == want
        assert objective.plan(hidden, weight, targets, **ref) == objective.plan(hidden, weight, targets)


@pytest.mark.parametrize("name", [n for n in THROUGH_HEAD if n not in [*OF_ONE_BATCH, "bnpo"]])
@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_micro_batches(name, learn):
    """Losses and gradients of micro-batches over the global count add up to those of the big batch."""
    method, targets = xf.METHODS[name], targets_of()
    columns, ref = given_to(method, len(LENGTHS))
    objective = xf.Objective(name, **hyper_of(method))
    size = {"pairwise": 2, "listwise": LISTS}.get(method.layout, 1)
    units, cut = len(LENGTHS) // size, 1

    def part(x, units_of):  # rows of some units: pairs are halves, the rows of a list stand together
        if method.layout == "pairwise":
            return x.unflatten(0, (-1, units))[:, units_of].flatten(0, 1)
        return x.unflatten(0, (units, -1))[units_of].flatten(0, 1)

    def column(n, x, units_of):
        return x if not x.dim() or "II" in method.axes(n) else x[units_of]

    results = []
    for cuts in ([slice(None)], [slice(0, cut), slice(cut, None)]):
        xs, total = operands(learn), 0.0
        items = sum(objective.count_items(part(targets, c), list_size=list_size(method)) for c in cuts)
        for c in cuts:
            cols = {n: column(n, x, c) for n, x in columns.items()}
            refs = {n: part(x, c) for n, x in ref.items()}
            call = partial(objective, bias=xs[2], denominator=items, list_size=list_size(method))
            out = call(part(xs[0], c), xs[1], part(targets, c), **refs, **cols)
            out.loss.backward()
            total = total + out.loss.detach()
        results.append((total, *(x.grad for x in xs if x.requires_grad)))
    assert_close(*results)


@learns
def test_hidden_states_used_twice(learn):
    """One forward of the model feeds a loss and log-probs; their gradients add up in all that is shared."""
    xs, targets = operands(learn), targets_of()
    out = xf.Objective("simpo")(xs[0], xs[1], targets, bias=xs[2])
    logp = xf.token_logps(xs[0], xs[1], targets, bias=xs[2])
    (out.loss + 0.5 * logp.sum()).backward()
    wide = oracle.leaves(*xs)
    losses, _, _, items = materialised(xf.METHODS["simpo"], *wide, targets, {})
    logp = oracle.stats(wide[0], wide[1], targets, bias=wide[2])["logp"]
    (losses.sum() / items + 0.5 * logp.sum()).backward()
    gradients_match(xs, wide)


@learns
def test_backward_again(learn):
    xs, targets = operands(learn), targets_of()
    wanted = [x for x in xs if x.requires_grad]
    loss = xf.Objective("simpo")(xs[0], xs[1], targets, bias=xs[2]).loss
    first = torch.autograd.grad(loss * 2, wanted, retain_graph=True)
    copies = tuple(g.clone() for g in first)
    second = torch.autograd.grad(loss * 2, wanted, retain_graph=True)
    last = torch.autograd.grad(loss * 2, wanted)
    for grads in (first, second, last):
        assert_close(grads, copies)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = xf.Objective("simpo")(xs[0], xs[1], targets, bias=xs[2]).loss
    with pytest.raises(RuntimeError, match="no second derivative"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.* with create_graph=True")
        loss.backward(create_graph=True)


@learns
@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, tile, learn):
    """One rounding of the gradients, with the loss scaled as fp16 training scales it: unscaled they underflow."""
    xs, targets = operands(learn, dtype), targets_of()
    items, scale, wide = 1e6, 2.0**16, oracle.leaves(*xs)
    objective = xf.Objective("simpo", tile_bytes=tile and tile * VOCAB * 4)
    out = objective(xs[0], xs[1], targets, bias=xs[2], denominator=items)
    loss = materialised(xf.METHODS["simpo"], *wide, targets, {})[0].sum() / items
    assert out.loss.dtype == torch.float32
    single = dtype == torch.float32
    assert_close(out.loss.double(), loss, atol=0, rtol=1e-5 if single else 1e-3)
    (out.loss * scale).backward()
    (loss * scale).backward()
    gradients_match(xs, wide, 1e-5 if single else torch.finfo(dtype).eps / 2)


@learns
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, learn):
    """float32 parameters keep float32 gradients, of the loss that their rounded values give."""
    xs, targets = operands(learn, torch.float32), targets_of()
    with torch.autocast("cpu", dtype):
        out = xf.Objective("dpo")(xs[0], xs[1], targets, bias=xs[2], ref_hidden=xs[0].detach() * 0.9)
        plan = xf.Objective("dpo").plan(xs[0].to(dtype), xs[1], targets, bias=xs[2])
        assert plan.passes == (3 if learn == "trainable" else 2)
    wide = oracle.leaves(*(x.to(dtype) for x in xs))
    ref = {"ref_hidden": (xs[0].detach() * 0.9).to(dtype).double()}
    losses, _, _, items = materialised(xf.METHODS["dpo"], *wide, targets, {}, ref)
    assert_close(out.loss.double(), losses.sum() / items, atol=1e-3, rtol=0)
    (out.loss * 2**10).backward()
    (losses.sum() / items * 2**10).backward()
    gradients_match(xs, wide, torch.finfo(dtype).eps / 2)


@learns
def test_a_column_may_carry_a_gradient(learn):
    """SLiC's regulariser: the log-probs of a target completion, which are the policy's own."""
    xs, targets, sft = operands(learn), targets_of(), COLUMNS["logp_sft"](torch.Size((5,))).requires_grad_()
    xf.Objective("slic", lam=0.5)(xs[0], xs[1], targets, bias=xs[2], logp_sft=sft).loss.backward()
    wide, wide_sft = oracle.leaves(*xs), sft.detach().clone().requires_grad_()
    columns = {"logp_sft": wide_sft}
    losses, _, _, items = materialised(xf.METHODS["slic"], *wide, targets, columns, hyper={"lam": 0.5})
    (losses.sum() / items).backward()
    gradients_match([*xs, sft], [*wide, wide_sft])


@learns
@layouts
def test_left_out_units_do_not_matter(learn, packed):
    """Liger's NaNs: an ignored half, masked positions. There is NaN in both, and in the data of dropped units."""
    xs, targets = operands(learn), targets_of()
    method = xf.METHODS["slic"]
    columns, _ = given_to(method, len(LENGTHS))
    clean = xf.Objective("dpo")(xs[0], xs[1], targets, bias=xs[2], ref_logps=-torch.ones(10))
    rows = torch.tensor([2, 3, 7, 8])  # of units 2 (rejected row empty) and 3 (chosen row empty)
    ref_logps = -torch.ones(10).index_fill(0, rows, float("nan"))
    columns["logp_sft"][2:4] = float("nan")
    slic = xf.Objective("slic")(xs[0], xs[1], targets, bias=xs[2], **columns).loss
    hidden = xs[0].detach().clone()
    hidden[rows] = float("nan")
    hidden[targets == oracle.IGNORE] = float("nan")
    hidden.requires_grad_(xs[0].requires_grad)
    h, y, cu = lay_out(hidden, targets, packed)
    out = xf.Objective("dpo")(h, xs[1], y, bias=xs[2], ref_logps=ref_logps, **cu)
    assert_close(out.loss, clean.loss)
    assert_close(out.metrics, clean.metrics)
    wanted = [x for x in xs if x.requires_grad]
    expected = torch.autograd.grad(clean.loss, wanted)
    wanted[0] = hidden if xs[0].requires_grad else wanted[0]
    assert_close(torch.autograd.grad(out.loss, wanted), expected)
    assert_close(slic, xf.Objective("slic")(h, xs[1], y, bias=xs[2], **columns, **cu).loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(slic, [x for x in xs if x.requires_grad]))


NOTHING = {  # the rows' lengths, of at most 3 positions
    "nothing scored": [0] * 4,
    "chosen rows empty": [0, 0, 3, 1],
    "each pair half empty": [0, 2, 3, 0],
    "no rows": [],
}


@learns
@layouts
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("dpo", "simpo", "tdpo", "aot") for k in NOTHING]
    # `sft` reads the chosen rows alone, and every row is a unit of `kto`.
    + [(n, k) for n in ("sft", "kto", "lipo", "grpo", "bnpo", "gspo") for k in ("nothing scored", "no rows")]
    + [("sft", "chosen rows empty")],
)
def test_nothing_to_learn(name, kind, packed, learn):
    """Loss 0 with a graph, zero gradients of the right shape, so that no rank waits for another."""
    xs, targets = operands(learn, torch.float32, rows=len(NOTHING[kind])), targets_of(NOTHING[kind])
    columns, ref = given_to(xf.METHODS[name], len(targets))
    h, y, cu = lay_out(xs[0], targets, packed)
    columns = of_tokens(xf.METHODS[name], targets, packed, columns)
    ref = of_tokens(xf.METHODS[name], targets, packed, ref)
    ref = {n: x.float() for n, x in ref.items()}
    cu["list_size"] = 2 if xf.METHODS[name].layout == "listwise" else None
    objective = xf.Objective(name)
    out = objective(h, xs[1], y, bias=xs[2], **cu, **ref, **columns)
    assert out.loss == 0 and out.loss.requires_grad
    assert objective.count_items(y, **cu) == 0
    assert all(x.isnan() for x in out.metrics.values())  # the mean of nothing
    counted = objective(h, xs[1], y, bias=xs[2], denominator=objective.count_items(y, **cu), **cu, **ref, **columns)
    assert counted.loss == 0  # every micro-batch of a step may be like this one: 0 of 0 items
    out.loss.backward()
    for x in xs:
        assert (x.grad is not None) == x.requires_grad
        assert x.grad is None or (x.grad.shape == x.shape and not x.grad.any())


def test_metrics():
    """TRL's names and values: β-scaled log-ratios, the share won, nats; an empty half left out of the means."""
    hidden, weight, _ = operands("frozen")
    targets = targets_of()
    ref = -oracle.normal(10, seed=1).abs() - 9
    metrics = xf.Objective("dpo", beta=0.5)(hidden, weight, targets, ref_logps=ref).metrics
    logp = oracle.row_sums(oracle.stats(hidden, weight, targets)["logp"], targets)[0].detach()
    kept = torch.tensor([0, 1, 4])
    chosen, rejected = logp[kept], logp[kept + 5]
    r_w, r_l = 0.5 * (chosen - ref[kept]), 0.5 * (rejected - ref[kept + 5])
    want = {
        "rewards/chosen": r_w,
        "rewards/rejected": r_l,
        "rewards/accuracies": (r_w > r_l).double(),
        "rewards/margins": r_w - r_l,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    assert_close(metrics, {name: x.mean() for name, x in want.items()})
    assert 0 < metrics["rewards/accuracies"] < 1


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_orpo_of_a_certain_model(learn):
    """Where p rounds to 1 the odds are infinite: Liger's ORPO gives NaN."""
    weight = torch.eye(4).requires_grad_(LEARN[learn][1])
    targets = torch.tensor([[1, 2], [3, 0]])
    hidden = (100 * torch.eye(4)[targets]).requires_grad_()
    out = xf.Objective("orpo")(hidden, weight, targets)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(hidden.grad).all()
    assert weight.grad is None or torch.isfinite(weight.grad).all()


def test_no_grad():
    xs, targets = operands("trainable"), targets_of()
    with torch.no_grad():
        out = xf.Objective("simpo")(xs[0], xs[1], targets, bias=xs[2])
    assert not out.loss.requires_grad
    assert_close(out.loss, xf.Objective("simpo")(xs[0], xs[1], targets, bias=xs[2]).loss.detach())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.permutations(range(5)), st.integers(1, 30), st.lists(st.integers(0, T), min_size=10, max_size=10), st.booleans()
)
def test_order_tile_and_layout_do_not_matter(order, tile, lengths, packed):
    """Pairs of any lengths in another order, another tile, padded or packed: the same loss, dW and row gradients."""
    order = torch.tensor(order)
    rows = torch.cat([order, order + 5])
    results = []
    targets = targets_of(lengths)
    for r, size, pack in ((torch.arange(10), None, False), (rows, tile * VOCAB * 8, packed)):
        xs = operands()
        h, y, cu = lay_out(xs[0][r], targets[r], pack)
        out = xf.Objective("simpo", tile_bytes=size)(h, xs[1], y, bias=xs[2], **cu)
        out.loss.backward()
        results.append((out.loss.detach(), *(x.grad for x in xs)))
    assert_close(*results)
