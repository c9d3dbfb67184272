"""token_stats(selected_ids=): log-probs of any K ids a position, against all logits in float64.

Tolerances as in test_head.py: float32 2e-5 nats and gradients 1e-5 in norm; bf16 1e-3 nats and 2^-8 in norm.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from interpreter import DEVICE, needs_triton, numpy_warnings, run_checks
from ranks import found_by
from xpo_fast.head import head_plan

pytestmark = numpy_warnings
IGNORE = -100
N, VOCAB, WIDTH, RANK, CHUNK = 37, 131, 11, 3, 8  # nothing divides anything: the last of five tiles is ragged
EVERYTHING = {"softcap": 5.0, "logit_scale": 0.25, "temperature": 0.7}
VALUES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-3}
GRADIENTS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


def ids_of(kind: str, targets: torch.Tensor) -> torch.Tensor:
    """Selected ids; those per position are out of the vocabulary where the target is ignored, and not read there."""
    if kind == "none":
        return torch.zeros(0, dtype=torch.long)
    if kind == "one":
        return torch.tensor([VOCAB - 1])
    if kind == "same, one twice":
        return torch.tensor([7, 0, 7, VOCAB - 1], dtype=torch.int32)
    per_position = oracle.tokens((*targets.shape, 5), VOCAB, 0.0, seed=11)
    per_position[..., 1] = per_position[..., 3]
    per_position[..., 4] = targets
    return per_position.masked_fill((targets == IGNORE)[..., None], -100)


IDS = ("none", "one", "same, one twice", "per position")


def problem(learn: str, dtype=torch.float32, *, with_bias=True, with_adapter=False, ignored=0.3):
    """Leaves by name, and targets; those whose names `learn` has want a gradient."""
    leaves = {
        "hidden": oracle.normal(N, WIDTH + RANK * with_adapter, seed=1, dtype=dtype),
        "weight": oracle.normal(VOCAB, WIDTH, seed=2, std=0.9, dtype=dtype),
        "bias": oracle.normal(VOCAB, seed=3, dtype=dtype) if with_bias else None,
        "adapter": oracle.normal(VOCAB, RANK, seed=4, dtype=dtype) if with_adapter else None,
    }
    leaves = {name: x for name, x in leaves.items() if x is not None}
    for name, x in leaves.items():
        x.requires_grad_(name in learn.split())
    return leaves, oracle.tokens((N,), VOCAB, ignored)


def textbook(leaves: dict, targets: torch.Tensor, ids: torch.Tensor, options: dict):
    """The log-probs of the ids and of the targets and the entropy, 0 where ignored, from float64 logits; the leaves."""
    wide = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in leaves.items()}
    weight = torch.cat([wide["weight"], wide["adapter"]], 1) if "adapter" in wide else wide["weight"]
    scored = targets != IGNORE
    _, every = oracle.logprobs(wide["hidden"][scored], weight, wide.get("bias"), **options)
    ids = ids.long().expand(*targets.shape, -1)
    blank = every.new_zeros(ids.shape)
    selected = blank.index_put((scored.nonzero()[:, 0],), every.gather(1, ids[scored]))
    logp = torch.where(
        scored, oracle.stats(wide["hidden"], weight, targets, bias=wide.get("bias"), **options)["logp"], 0
    )
    entropy = oracle.stats(wide["hidden"], weight, targets, bias=wide.get("bias"), **options)["entropy"]
    return selected, logp, entropy, wide


def call(leaves: dict, targets: torch.Tensor, ids: torch.Tensor, **options) -> xf.types.TokenStats:
    return xf.token_stats(targets=targets, selected_ids=ids, **leaves, **options)


def upstream(shape, seed: int, dtype) -> torch.Tensor:
    return oracle.normal(*shape, seed=seed, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(
    ("learn", "dtype", "adapter", "options"),
    [
        ("hidden weight bias", torch.float64, False, EVERYTHING),
        ("hidden weight bias", torch.float32, False, {}),
        ("hidden", torch.float32, False, {"temperature": 1.7}),
        ("hidden adapter", torch.float32, True, EVERYTHING),
        ("bias", torch.float32, False, {}),
        ("hidden weight bias", torch.bfloat16, False, EVERYTHING),
    ],
)
def test_values_and_every_gradient(backend, ids, learn, dtype, adapter, options):
    leaves, targets = problem(learn, dtype, with_adapter=adapter)
    selected_ids = ids_of(ids, targets)
    found = call(leaves, targets, selected_ids, backend=backend, outputs=("entropy",), chunk_tokens=CHUNK, **options)
    selected, logp, entropy, wide = textbook(leaves, targets, selected_ids, options)
    assert found.selected_logp.shape == (N, selected_ids.shape[-1]) and found.selected_logp.is_contiguous()
    assert found.selected_logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found.selected_logp.double(), selected, rtol=0, atol=VALUES[dtype])
    assert not found.selected_logp[targets == IGNORE].any()
    u, v = upstream(selected.shape, 5, found.logp.dtype), upstream(logp.shape, 6, found.logp.dtype)
    ((found.selected_logp * u).sum() + (found.logp * v).sum() + 0.3 * found.entropy.sum()).backward()
    ((selected * u).sum() + (logp * v).sum() + 0.3 * entropy.sum()).backward()
    for name in learn.split():
        assert leaves[name].grad.dtype == dtype
        assert oracle.error(leaves[name].grad, wide[name].grad) < GRADIENTS[dtype], name


@pytest.mark.parametrize("ids", IDS[1:])
def test_they_alone_have_a_gradient(ids):
    """Not added to another statistic's, and given twice it is the sum of both."""
    leaves, targets = problem("hidden weight bias", torch.float64)
    found = call(leaves, targets, ids_of(ids, targets), chunk_tokens=CHUNK)
    selected, _, _, wide = textbook(leaves, targets, ids_of(ids, targets), {})
    u = upstream(selected.shape, 5, torch.float64)
    (found.selected_logp * u).sum().backward()
    (selected * u).sum().backward()
    for name, x in leaves.items():
        assert oracle.error(x.grad, wide[name].grad) < 1e-12, name


def test_by_hand():
    """Two tokens, logits 0 and ln 3: probabilities 1/4 and 3/4. ∂(log p_0)/∂z = (3/4, −3/4)."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [3.0]]).log1p() * torch.tensor([[1.0], [1.0]])
    weight[1] = torch.tensor(3.0).log()
    found = xf.token_stats(hidden, weight, torch.tensor([1]), selected_ids=torch.tensor([0, 1, 0]))
    assert_close(found.selected_logp, torch.tensor([[0.25, 0.75, 0.25]]).log())
    found.selected_logp[0, 0].backward()
    assert_close(hidden.grad, torch.tensor([[-0.75]]) * torch.tensor(3.0).log())


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("shape", [(3, 5), (4,), ()])
def test_shapes(shape, ids):
    hidden, weight = oracle.normal(*shape, WIDTH, seed=1), oracle.normal(VOCAB, WIDTH, seed=2)
    targets = oracle.tokens(shape, VOCAB, 0.0)
    selected_ids = ids_of(ids, targets)
    found = xf.token_stats(hidden, weight, targets, selected_ids=selected_ids)
    assert found.selected_logp.shape == (*shape, selected_ids.shape[-1])
    every = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert_close(
        found.selected_logp.double(), every.gather(-1, selected_ids.long().expand(*shape, -1)), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_nothing_is_read_where_the_target_is_ignored(backend):
    leaves, targets = problem("hidden weight bias")
    with torch.no_grad():
        leaves["hidden"][targets == IGNORE] = torch.nan
    found = call(leaves, targets, ids_of("per position", targets), backend=backend)
    found.selected_logp.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())
    none = call(leaves, torch.full_like(targets, IGNORE), torch.tensor([1, 2]), backend=backend)
    assert none.selected_logp.shape == (N, 2) and not none.selected_logp.any()


def test_every_other_statistic_is_as_without_them():
    leaves, targets = problem("")
    with_ids = call(leaves, targets, torch.tensor([3, 1]), chunk_tokens=CHUNK, outputs=("entropy", "top1"))
    without = xf.token_stats(targets=targets, chunk_tokens=CHUNK, outputs=("entropy", "top1"), **leaves)
    for name in ("logp", "lse", "entropy", "top1"):
        assert torch.equal(getattr(with_ids, name), getattr(without, name)), name
    assert without.selected_logp is None


def test_an_id_ruled_out_has_no_probability():
    leaves, targets = problem("hidden weight bias")
    with torch.no_grad():
        leaves["bias"][5] = -torch.inf
        targets[targets == 5] = 6
    found = call(leaves, targets, torch.tensor([5, 6]), chunk_tokens=CHUNK)
    scored = targets != IGNORE
    assert (found.selected_logp[scored, 0] == -torch.inf).all()
    found.selected_logp[:, 1].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


def test_dpo_on_first_tokens_without_another_pass():
    """The teacher's most likely ids, in one call with the log-probs of the targets: what top-k distillation needs."""
    leaves, targets = problem("hidden weight bias", torch.float64, ignored=0.0)
    every = oracle.logprobs(leaves["hidden"].detach(), leaves["weight"].detach(), leaves["bias"].detach())[1]
    top = every.topk(4)
    found = call(leaves, targets, top.indices)
    assert_close(found.selected_logp, top.values)


# --- the plan and the cost ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("learn", "passes"), [("", 1), ("hidden", 3), ("hidden weight bias", 4)])
def test_the_plan_says_what_they_cost(learn, passes, tmp_path):
    leaves, targets = problem(learn)
    plan = head_plan(**leaves, selected_ids=torch.tensor([1, 2]))
    assert plan.passes == passes and "selected ids are read by torch" in str(plan)
    assert ("selected_logp makes each tile again" in str(plan)) == (learn == "hidden")

    def run():
        out = call(leaves, targets, torch.tensor([1, 2]), chunk_tokens=CHUNK)
        if learn:
            out.selected_logp.sum().backward()

        return out

    meter = oracle.Meter(run, tmp_path)
    assert meter.passes(int((targets != IGNORE).sum()), VOCAB, WIDTH) == passes
    assert meter.largest_bytes <= 4 * max(CHUNK * VOCAB, VOCAB * WIDTH)  # a tile, or dW


@needs_triton
def test_beside_interpreted_kernels():
    run_checks(__file__, interpreted=True)


@pytest.mark.parametrize("learn", ["", "hidden", "hidden weight bias"])
def check_beside_kernels(learn):
    leaves, targets = problem(learn)
    leaves = {name: x.detach().to(DEVICE).requires_grad_(x.requires_grad) for name, x in leaves.items()}
    ids = ids_of("per position", targets)
    found = call(leaves, targets, ids, backend="triton", chunk_tokens=CHUNK, **EVERYTHING)
    selected, _, _, wide = textbook({k: x.cpu() for k, x in leaves.items()}, targets, ids, EVERYTHING)
    assert_close(found.selected_logp.double().cpu(), selected, rtol=0, atol=2e-5)
    if learn:
        u = upstream(selected.shape, 5, torch.float32)
        (found.selected_logp * u.to(DEVICE)).sum().backward()
        (selected * u).sum().backward()
    for name in learn.split():
        assert oracle.error(leaves[name].grad.cpu(), wide[name].grad) < 1e-5, name


def test_compiled():
    leaves, targets = problem("hidden weight bias")
    ids = ids_of("per position", targets)

    def loss(hidden, weight, bias):
        out = xf.token_stats(hidden, weight, targets, bias=bias, selected_ids=ids, chunk_tokens=CHUNK)
        return out.selected_logp.square().sum() + out.logp.sum()

    expected = torch.autograd.grad(loss(**leaves), list(leaves.values()))
    found = torch.autograd.grad(
        torch.compile(loss, backend="aot_eager", fullgraph=True)(**leaves), list(leaves.values())
    )
    assert_close(found, expected)


# --- what is refused ---------------------------------------------------------------------------------------

WRONG = {
    "too large": (torch.tensor([1, VOCAB]), rf"selected id {VOCAB} is outside the vocabulary of {VOCAB}"),
    "negative": (torch.tensor([-1]), "selected id -1 is outside"),
    "at a scored position": (torch.full((N, 2), VOCAB + 3), rf"selected id {VOCAB + 3} is outside"),
    "a list": ([1, 2], r"must be a tensor of token ids, got list"),
    "float": (torch.tensor([1.0]), r"integer token ids, got torch.float32"),
    "bool": (torch.tensor([True]), r"integer token ids, got torch.bool"),
    "one number": (torch.tensor(1), r"must be \(K,\).*got \(\)"),
    "another length": (torch.zeros(N + 1, 2, dtype=torch.long), rf"or \({N}, 'K'\).*got \({N + 1}, 2\)"),
}


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name, backend):
    leaves, targets = problem("")
    ids, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(leaves, targets, ids, backend=backend)


def test_once_differentiable():
    leaves, targets = problem("hidden")
    found = call(leaves, targets, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found.selected_logp.sum(), leaves["hidden"], create_graph=True)


def test_losses_do_not_take_them():
    leaves, targets = problem("")
    with pytest.raises((TypeError, ValueError), match="selected_ids"):
        xf.Objective("simpo")(
            leaves["hidden"][:4].view(2, 2, -1),
            leaves["weight"],
            targets[:4].view(2, 2),
            selected_ids=torch.tensor([1]),
        )
    with pytest.raises(TypeError, match="selected_ids"):
        xf.token_logps(leaves["hidden"], leaves["weight"], targets, selected_ids=torch.tensor([1]))


# --- a vocabulary over ranks -------------------------------------------------------------------------------

CUT = (70, 62)  # one row of padding beyond the vocabulary


def run_cut(rank: int) -> dict:
    found = {}
    first = sum(CUT[:rank])
    for kind in IDS:
        for dtype in (torch.float64, torch.float32):
            leaves, targets = problem("hidden weight bias", dtype)
            ids = ids_of(kind, targets)
            own = {
                k: torch.nn.functional.pad(x.detach(), (0, 0, 0, 1) if x.dim() == 2 else (0, 1))[
                    first : first + CUT[rank]
                ].requires_grad_()
                for k, x in leaves.items()
                if k != "hidden"
            }
            shard = xf.VocabShard.agree(CUT[rank], VOCAB)
            out = call({**own, "hidden": leaves["hidden"]}, targets, ids, vocab_shard=shard, chunk_tokens=CHUNK,
                       **EVERYTHING)  # fmt: skip
            u = upstream(out.selected_logp.shape, 5, dtype)
            ((out.selected_logp * u).sum() + out.logp.sum()).backward()
            grads = {k: x.grad for k, x in {**own, "hidden": leaves["hidden"]}.items()}
            found[kind, dtype] = {"selected": out.selected_logp.detach(), **grads}
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return found_by(tmp_path_factory, 2, run_cut)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", IDS)
def test_a_cut_vocabulary_is_the_whole(ranks, kind, dtype):
    leaves, targets = problem("hidden weight bias", dtype)
    ids = ids_of(kind, targets)
    selected, logp, _, wide = textbook(leaves, targets, ids, EVERYTHING)
    ((selected * upstream(selected.shape, 5, dtype)).sum() + logp.sum()).backward()
    own = [found[kind, dtype] for found in ranks]
    assert torch.equal(own[0]["selected"], own[1]["selected"])
    assert_close(own[0]["selected"].double(), selected, rtol=0, atol=VALUES[dtype] * 5)
    for found in own:
        assert oracle.error(found["hidden"], wide["hidden"].grad) < GRADIENTS[dtype]
    for name in ("weight", "bias"):
        whole = torch.cat([found[name] for found in own])
        assert not whole[VOCAB:].any() and oracle.error(whole[:VOCAB], wide[name].grad) < GRADIENTS[dtype], name
