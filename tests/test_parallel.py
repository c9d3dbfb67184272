"""Heads in parts, on two to four processes, against the textbook computation in one process.

The parts are vocabulary-parallel shards, or those of FSDP2, DTensors and ZeRO-3.
A world of gloo processes runs every case once and saves what each rank found. Tolerances: 1e-5 in float32, for
gradients in norm, 1e-10 in float64; statistics of a cut vocabulary are the same bit by bit on its ranks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import oracle
import xpo_fast as xf
from ranks import found_by
from xpo_fast.head import head_plan, units
from xpo_fast.head.operands import Operands
from xpo_fast.head.rows import Group
from xpo_fast.head.spec import Scaling
from xpo_fast.models import install_fused_loss

WORLD = 4
N, VOCAB, WIDTH, CHUNK = 37, 131, 11, 8  # nothing divides anything: five tiles, the last one ragged
EVERYTHING = {"softcap": 5.0, "logit_scale": 0.25, "temperature": 0.7}
STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "top1", "kl", "reverse_kl")
DIFFERENTIABLE = ("logp", "lse", "entropy", "kl", "reverse_kl")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Cut(NamedTuple):
    """A vocabulary over the first ranks of the world."""

    rows: tuple[int, ...]
    vocab: int | None = None
    starts: tuple[int, ...] | None = None


CUTS = {
    "two": Cut((70, 61)),
    "three, one of a single token": Cut((1, 100, 30)),
    "four, padded": Cut((36, 36, 36, 36), VOCAB),  # Megatron's: equal rows, the last rank's beyond the vocabulary
    "against the ranks' order": Cut((70, 61), None, (61, 0)),
    "row blocks": Cut((4000, 99)),  # of another length on each rank
}


class Case(NamedTuple):
    cut: str
    learn: str = "hidden weight bias"
    dtype: torch.dtype = torch.float32
    options: dict = {}  # noqa: RUF012
    outputs: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ("logp",)
    data: str = "some ignored"
    ref: str | None = None
    n: int = N
    vocab: int = VOCAB
    chunk: int | None = CHUNK
    weight_grad: bool = False
    compiled: bool = False


CASES = {
    f"{cut}, {learn}, {str(dtype)[6:]}": Case(cut, learn, dtype, EVERYTHING)
    for cut in list(CUTS)[:4]
    for learn in ("hidden", "hidden weight bias")
    for dtype in TOLERANCE
} | {
    "plain": Case("two", "hidden weight"),
    "nothing to learn": Case("two", "", options=EVERYTHING),
    "head only": Case("three, one of a single token", "weight bias", options=EVERYTHING),
    "bias only": Case("three, one of a single token", "bias"),
    "temperature": Case("two", options={"temperature": 1.7}),
    "negative scale": Case("two", options={"logit_scale": -0.5}),
    "lse, frozen": Case("four, padded", "hidden", torch.float64, EVERYTHING, upstream=("logp", "lse")),
    "lse alone, frozen": Case("two", "hidden", upstream=("lse",)),
    "all ignored": Case("three, one of a single token", data="all ignored"),
    "all ignored, frozen": Case("two", "hidden", data="all ignored"),
    "one rank's targets": Case("three, one of a single token", data="one rank's"),
    "sure tokens": Case("two", data="sure", upstream=("logp", "lse")),
    "sure tokens, frozen": Case("two", "hidden", data="sure"),
    "a rank ruled out": Case("two", "hidden weight", data="ruled out", outputs=STATS, ref="own head",
                             upstream=DIFFERENTIABLE),
    "row blocks": Case("row blocks", n=150, vocab=4099, chunk=None, upstream=("logp", "lse")),
    "tiles of one": Case("four, padded", n=6, chunk=1),
    "one token": Case("two", n=1, chunk=None, data="all scored"),
    "weight_grad": Case("four, padded", weight_grad=True),
    "compiled": Case("two", options=EVERYTHING, compiled=True),
    "compiled, frozen": Case("two", "hidden", upstream=("logp", "lse"), compiled=True),
} | {
    f"statistics, {learn}, {ref}, {str(dtype)[6:]}": Case(
        "three, one of a single token", learn, dtype, EVERYTHING, STATS, DIFFERENTIABLE, ref=ref
    )
    for learn, ref in (("hidden", "own head"), ("hidden weight bias", "same head"))
    for dtype in TOLERANCE
}  # fmt: skip


class Problem(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    targets: torch.Tensor
    ref: dict
    upstream: dict


def problem(case: Case) -> Problem:
    """The whole head's operands in the case's dtype, the same on every rank."""
    dtype, n, vocab = case.dtype, case.n, case.vocab
    spread = 40.0 if case.data == "sure" else 3.0
    hidden = oracle.normal(n, WIDTH, seed=1, dtype=dtype)
    weight = oracle.normal(vocab, WIDTH, seed=2, std=spread / WIDTH**0.5, dtype=dtype)
    bias = oracle.normal(vocab, seed=3, dtype=dtype)
    targets = oracle.tokens((n,), vocab, {"all ignored": 1.0, "all scored": 0.0}.get(case.data, 0.3))
    if case.data == "one rank's":
        targets = targets.where(targets == oracle.IGNORE, 1 + targets % 100)
    if case.data == "sure":  # every other token so likely that the other rank has nothing, or so unlikely
        likeliest = (hidden @ weight.T + bias).argmax(1)
        targets = targets.where((targets == oracle.IGNORE) | (torch.arange(n) % 2 == 0), likeliest)
    if case.data == "ruled out":
        bias[:70] = -torch.inf
        targets = targets.where(targets == oracle.IGNORE, 70 + targets % 61)
    ref = {}
    if case.ref:
        ref = {"ref_hidden": oracle.normal(n, WIDTH, seed=4, dtype=dtype)}
    if case.ref == "own head":
        ref["ref_hidden"] = oracle.normal(n, WIDTH + 2, seed=4, dtype=dtype)
        ref["ref_weight"] = oracle.normal(vocab, WIDTH + 2, seed=5, std=0.7, dtype=dtype)
        ref["ref_bias"] = oracle.normal(vocab, seed=6, dtype=dtype)
        if case.data == "ruled out":
            ref["ref_bias"][:70] = -torch.inf
    upstream = {name: oracle.normal(n, seed=7 + k) for k, name in enumerate(case.upstream)}
    return Problem(hidden, weight, bias, targets, ref, upstream)


def learning(case: Case, operands: Problem) -> dict[str, torch.Tensor]:
    found = {name: getattr(operands, name) for name in case.learn.split()}
    for x in found.values():
        x.requires_grad_()
    return found


def has_bias(case: Case) -> bool:
    return "bias" in case.learn or case.data == "ruled out" or bool(case.options)


def own_rows(x: torch.Tensor, cut: Cut, rank: int, vocab: int) -> torch.Tensor:
    """A rank's shard of (V, …), NaN in rows that are no tokens."""
    start = sum(cut.rows[:rank]) if cut.starts is None else cut.starts[rank]
    rows = x[start : min(start + cut.rows[rank], vocab)]
    padding = rows.new_full((cut.rows[rank] - rows.shape[0], *x.shape[1:]), torch.nan)
    return torch.cat([rows, padding])


# --- what a rank runs -------------------------------------------------------------------------------------------------


def run_case(case: Case, rank: int, group, **agreed) -> dict[str, torch.Tensor]:
    cut, whole = CUTS[case.cut], problem(case)
    shard = agree(cut, rank, group, **agreed)
    parts = {name: own_rows(getattr(whole, name), cut, rank, case.vocab) for name in ("weight", "bias")}
    own = whole._replace(**parts)
    ref = {k: v if k == "ref_hidden" else own_rows(v, cut, rank, case.vocab) for k, v in own.ref.items()}
    leaves = learning(case, own)
    options = {**case.options, **ref, "outputs": case.outputs, "chunk_tokens": case.chunk}
    if case.weight_grad:
        options["weight_grad"] = torch.ones_like(own.weight, requires_grad=False)
    token_stats: Any = xf.token_stats
    if case.compiled:
        token_stats = torch.compile(token_stats, fullgraph=True, backend="aot_eager")
    stats = token_stats(
        own.hidden, own.weight, own.targets, bias=own.bias if has_bias(case) else None, vocab_shard=shard, **options
    )  # fmt: skip
    found = {name: getattr(stats, name).detach() for name in ("logp", "lse", *case.outputs)}
    if leaves:
        sum((getattr(stats, name) * u).sum() for name, u in own.upstream.items()).backward()
    found |= {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    if case.weight_grad:
        found["d_weight"] = options["weight_grad"] - 1
    return found


def agree(cut: Cut, rank: int, group, **agreed) -> xf.VocabShard:
    start = None if cut.starts is None else cut.starts[rank]
    return xf.VocabShard.agree(cut.rows[rank], cut.vocab, start=start, group=group, **agreed)


def adapted(learn: str) -> dict[str, torch.Tensor]:
    """hidden, weight, bias and adapter with a LoRA adapter of rank 2; some of them learn."""
    h, weight, bias, *_ = problem(ADAPTED)
    x, adapter = oracle.normal(N, 2, seed=10), oracle.normal(VOCAB, 2, seed=11)
    found = {"hidden": torch.cat([h, x], 1), "weight": weight, "bias": bias, "adapter": adapter}
    return {name: t.requires_grad_(name in learn) for name, t in found.items()}


ADAPTED = Case("four, padded", dtype=torch.float64, options=EVERYTHING)
ADAPTER_LEARNS = ("hidden", "hidden adapter", "hidden weight bias adapter")


def run_adapter(rank: int, group) -> dict[str, dict]:
    targets, u, cut = problem(ADAPTED).targets, oracle.normal(N, seed=7), CUTS[ADAPTED.cut]
    shard, found = agree(cut, rank, group), {}
    for learn in ADAPTER_LEARNS:
        own = adapted("")
        own |= {name: own_rows(own[name], cut, rank, VOCAB) for name in ("weight", "bias", "adapter")}
        hidden, weight, bias, adapter = (x.requires_grad_(name in learn) for name, x in own.items())
        logp = xf.token_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            adapter=adapter,
            vocab_shard=shard,
            chunk_tokens=CHUNK,
            **EVERYTHING,
        )
        (logp * u).sum().backward()
        found[learn] = {"logp": logp.detach()} | {name: x.grad for name, x in own.items() if x.requires_grad}
    return found


def run_half(rank: int, group) -> dict[str, torch.Tensor]:
    return run_case(Case("two", dtype=torch.bfloat16, options=EVERYTHING), rank, group)


def run_partial(rank: int, group) -> dict[str, torch.Tensor]:
    return run_case(CASES["plain"], rank, group, sum_hidden_grad=False)


def unit_loss(rank: int | None, group=None):
    """A trainable head's loss of single tokens, −Σ u·logp, made while their tile is live; rank None: the whole head."""
    case = Case("four, padded", dtype=torch.float64, options=EVERYTHING)
    whole = problem(case)
    shard, operands = None, whole
    if rank is not None:
        cut = CUTS[case.cut]
        shard = agree(cut, rank, group)
        parts = {name: own_rows(getattr(whole, name), cut, rank, VOCAB) for name in ("weight", "bias")}
        operands = whole._replace(**parts)
    leaves = learning(case, operands)
    hidden, weight, bias, targets, _, upstream = operands
    if shard is not None:
        weight, bias = shard.tokens(weight=weight, bias=bias)
        hidden = shard.replicated(hidden)
    plan = head_plan(hidden, weight, bias=bias, chunk_tokens=CHUNK, vocab_shard=shard)
    scored = (targets != oracle.IGNORE).nonzero().squeeze(1)
    starts = range(0, len(scored), 2 * CHUNK)  # groups longer than a tile: a part is made again
    groups = [Group(scored[a : a + 2 * CHUNK], (), a) for a in starts]
    u = upstream["logp"]
    given = Operands(
        hidden, weight, targets, bias, shard=shard, scaling=Scaling(**EVERYTHING), ignore_index=oracle.IGNORE
    )
    loss, _ = units.unit_loss(
        given, groups, plan, lambda logp, group: -u[group.positions], lambda logp: -(u * logp).sum()
    )
    loss.backward()
    return {"loss": loss.detach(), "plan": str(plan)} | {f"d_{n}": x.grad for n, x in leaves.items()}


def run_costs(rank: int, group) -> dict:
    """Passes, memory and collectives of calls with all scored, in eight tiles."""
    n, vocab, width, tiles = 64, 300, 16, 8
    rows = (200, 100)[rank]
    shard = xf.VocabShard.agree(rows, group=group)
    hidden = oracle.normal(n, width, seed=1, dtype=torch.float32)
    weight = oracle.normal(vocab, width, seed=2, dtype=torch.float32).split((200, 100))[rank].clone()
    targets = oracle.tokens((n,), vocab, 0.0)
    options = {"vocab_shard": shard, "tile_bytes": 200 * 4 * n // tiles}  # of the largest shard
    found = {}
    for name, learn in (("nothing", ""), ("frozen", "hidden"), ("trainable", "hidden weight")):
        h, w = (x.clone().requires_grad_(which in learn) for which, x in (("hidden", hidden), ("weight", weight)))

        def call(h=h, w=w, learns=bool(learn)):
            with torch.set_grad_enabled(learns):
                logp = xf.token_logps(h, w, targets, **options)
            if learns:
                logp.sum().backward()

        plan = head_plan(h, w, **options) if learn else None
        with tempfile.TemporaryDirectory() as folder:
            meter = oracle.Meter(call, Path(folder))
        with (
            patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers,
            patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
        ):
            call()
        found[name] = {
            "passes": meter.passes(n, rows, width),
            "planned": plan and (plan.passes, plan.tile_tokens),
            "gathers": [tuple(c.args[1].shape) for c in gathers.call_args_list],
            "sums": [tuple(c.args[0].shape) for c in sums.call_args_list],
            "largest_bytes": meter.largest_bytes,
        }
    return found


METHODS = {  # what is evaluated live at 3F, what looks at the whole batch, what needs more than log-probs
    "dpo": {},
    "simpo + 0.5*sft": {},
    "beta_dpo": {"keep": 1.0},  # which draws nothing: draws would have to be the same on all ranks
    "tdpo": {},
    "dpo with wpo": {"wpo": True},
}


def objective_problem() -> tuple[torch.Tensor, ...]:
    """hidden, targets and ref_hidden of three pairs, one of which is left out."""
    hidden, ref = (oracle.normal(6, 7, WIDTH, seed=seed) for seed in (40, 41))
    targets = oracle.tokens((6, 7), VOCAB, 0.3)
    targets[1] = oracle.IGNORE
    return hidden, targets, ref


def run_objective(name: str, weight: torch.Tensor, bias: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients, in tiles of 11 tokens, or more where the vocabulary is cut."""
    hidden, targets, ref = objective_problem()
    hidden.requires_grad_()
    objective = xf.Objective(name.split(" with ")[0], tile_bytes=11 * 8 * VOCAB, **METHODS[name])
    out = objective(hidden, weight, targets, bias=bias, ref_hidden=ref, **EVERYTHING, **options)
    out.loss.backward()
    return {
        "loss": out.loss.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": bias.grad, **out.metrics,
    }  # fmt: skip


def run_objectives(rank: int, group) -> dict:
    """On a cut vocabulary, padded."""
    cut = CUTS["four, padded"]
    shard, found = agree(cut, rank, group), {}
    for name in METHODS:
        weight, bias = (own_rows(x, cut, rank, VOCAB).requires_grad_() for x in shared_head())
        found[name] = run_objective(name, weight, bias, vocab_shard=shard)
    hidden, targets, ref = objective_problem()
    options = {"bias": bias, "ref_hidden": ref, "vocab_shard": shard}
    found["plan"] = str(xf.Objective("dpo").plan(hidden.requires_grad_(), weight, targets, **options))
    with pytest.raises(ValueError, match="reads single logits, which no rank has all of"):
        xf.Objective("cringe")(hidden, weight, targets, **options)
    return found


def run_objective_on_dtensors(rank: int) -> dict:
    """Every rank with the same tokens, so that the mean of the gradients is each one's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, found = init_device_mesh("cpu", (4,)), {}
    for name in METHODS:
        weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in shared_head())
        with CommDebugMode() as mode:
            own = run_objective(name, weight, bias)
        counts = {str(op).rsplit(".", 1)[-1]: k for op, k in mode.get_comm_counts().items()}
        assert counts["all_gather_into_tensor"] == 2, counts  # weight and bias, for policy and reference together
        found[name] = {k: x.full_tensor() if k in ("d_weight", "d_bias") else x for k, x in own.items()}
    return found


DISAGREEMENTS = {  # (rows, vocab, start) of two ranks
    "a gap": (((70, None, 0), (61, None, 71)), "follow on each other.*0:70 on rank 0, 71:131 on rank 1"),
    "an overlap": (((70, None, 0), (61, None, 69)), "follow on each other"),
    "no token on a rank": (((70, 70, None), (61, 70, None)), "none of them empty"),
    "no rows on a rank": (((70, None, None), (0, None, None)), "none of them empty"),
    "too few": (((70, 140, None), (61, 140, None)), r"140 tokens end at 131, in rows \[70, 61\]"),
    "two vocabularies": (((70, 131, None), (61, 130, None)), r"same vocab, got \[131, 130\]"),
    "one start": (((70, None, 0), (61, None, None)), r"on all ranks .* or on none, got \[0, None\]"),
}


def run_disagreements(rank: int, group) -> dict[str, str]:
    def error(rows, vocab, start) -> str:
        try:
            xf.VocabShard.agree(rows, vocab, start=start, group=group)
        except ValueError as error:
            return str(error)
        return "no error"

    return {name: error(*ranks[rank]) for name, (ranks, _) in DISAGREEMENTS.items()}


def run_refusals(rank: int, group) -> dict[str, str]:
    """Errors that need no other rank."""
    shard = xf.VocabShard.agree((70, 61)[rank], group=group)
    hidden, weight, targets = torch.zeros(3, 4), torch.zeros(shard.rows, 4), torch.tensor([0, 69, 130])
    calls = {
        "rows": lambda: xf.token_logps(hidden, weight[1:], targets, vocab_shard=shard),
        "bias": lambda: xf.token_logps(hidden, weight, targets, bias=torch.zeros(131), vocab_shard=shard),
        "dense": lambda: xf.token_logps(hidden, weight, targets, vocab_shard=shard, backend="dense"),
        "target": lambda: xf.token_logps(hidden, weight, targets + 1, vocab_shard=shard),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        found[name] = str(caught.value)
    return found


PLACEMENTS = {  # mesh, placements of the weight
    "replicated": ((4,), "R"),
    "rows": ((4,), "0"),
    "columns": ((4,), "1"),
    "replicated rows": ((2, 2), "R0"),  # HSDP's
    "rows and columns": ((2, 2), "01"),
    "rows of rows": ((2, 2), "00"),
}
SCORED = (5, 9, 0, 3)  # tokens of each rank


def rank_problem(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, targets and ∂L/∂logp of a rank's own tokens; rank 2 has none to score."""
    hidden = oracle.normal(11, WIDTH, seed=20 + rank)
    targets = oracle.tokens((11,), VOCAB, 0.0, seed=rank)
    targets[SCORED[rank] :] = oracle.IGNORE
    return hidden, targets, oracle.normal(11, seed=30 + rank)


def shared_head() -> tuple[torch.Tensor, torch.Tensor]:
    return oracle.normal(VOCAB, WIDTH, seed=2), oracle.normal(VOCAB, seed=3)


def run_dtensor(shape: tuple[int, ...], kinds: str, rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    placements = [Replicate() if k == "R" else Shard(int(k)) for k in kinds]
    weight, bias = shared_head()
    weight = distribute_tensor(weight, mesh, placements).requires_grad_()
    bias = distribute_tensor(bias, mesh, [Shard(0)] + [Replicate()] * (mesh.ndim - 1)).requires_grad_()
    hidden, targets, u = rank_problem(rank)
    hidden.requires_grad_()
    with CommDebugMode() as forward:
        logp = xf.token_logps(hidden, weight, targets, bias=bias, chunk_tokens=2)
    with CommDebugMode() as backward:
        (logp * u).sum().backward()
    with CommDebugMode() as frozen, torch.no_grad():
        again = xf.token_logps(hidden, weight, targets, bias=bias)
    assert weight.grad.placements == weight.placements
    return {
        "logp": logp.detach(), "again": again, "d_hidden": hidden.grad, "d_weight": weight.grad.full_tensor(),
        "d_bias": bias.grad.full_tensor(), "collectives": [
            {str(op).rsplit(".", 1)[-1]: k for op, k in mode.get_comm_counts().items()}
            for mode in (forward, backward, frozen)
        ],
    }  # fmt: skip


def run_dtensor_errors(rank: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4,))
    hidden, targets, _ = rank_problem(rank)
    weight = shared_head()[0]
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    partial = DTensor.from_local(weight, mesh, [Partial()]).requires_grad_()
    calls = {
        "hidden": lambda: xf.token_logps(distribute_tensor(hidden, mesh, [Shard(0)]), weight, targets),
        "weight_grad": lambda: xf.token_logps(hidden, sharded, targets, weight_grad=torch.zeros_like(weight)),
        "partial": lambda: xf.token_logps(hidden, partial, targets),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        found[name] = str(caught.value)
    return found


def run_tensor_parallel(rank: int) -> dict[str, torch.Tensor]:
    """A DTensor's rows as a rank's shard of the vocabulary: never gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4,))
    weight = distribute_tensor(shared_head()[0], mesh, [Shard(0)]).requires_grad_()
    own = weight.to_local()
    shard = xf.VocabShard.agree(own.shape[0], group=mesh.get_group())
    hidden, targets, u = rank_problem(1)
    hidden.requires_grad_()
    logp = xf.token_logps(hidden, own, targets, vocab_shard=shard)
    (logp * u).sum().backward()
    return {"logp": logp.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad.full_tensor()}


FSDP = {  # tied embeddings, whether the head is gathered apart from the model, mesh
    "in the model's group": (False, False, (4,)),
    "tied": (True, False, (4,)),
    "in a group of its own": (False, True, (4,)),
    "in a group of its own, HSDP": (False, True, (2, 2)),
}
ROWS, LENGTH, TOKENS = 8, 6, 57


def make_model(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def model_loss(model: nn.Module, rows: slice, ranks: int) -> torch.Tensor:
    """−Σ log p of some rows over the scored tokens of all, times the ranks that it is a mean over."""
    install_fused_loss(model)
    ids = oracle.tokens((ROWS, LENGTH), TOKENS, 0.0, seed=5)
    labels = ids.where(torch.arange(LENGTH) < 1 + torch.arange(ROWS)[:, None], oracle.IGNORE)
    targets = xf.shift_labels(labels)

    def loss(hidden, head):
        logp = xf.token_logps(hidden, head, targets[rows], chunk_tokens=4)
        return -logp.sum() * ranks / (targets != oracle.IGNORE).sum()

    return model(input_ids=ids[rows], fused_loss=loss)


def run_fsdp(tied: bool, apart: bool, shape: tuple[int, ...], rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model(tied)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    parts = [*model.model.layers, *([model.lm_head] if apart else [])]
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    per_rank = ROWS // WORLD
    loss = model_loss(model, slice(rank * per_rank, (rank + 1) * per_rank), WORLD)
    loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {
        "loss": loss.detach() / WORLD,
        "local": tuple(model.lm_head.weight.to_local().shape),
        "grads": grads,
    }


def run_all(rank: int) -> dict:
    groups = {size: dist.new_group(range(size)) for size in (2, 3, 4)}
    found: dict = {}
    for name, case in CASES.items():
        size = len(CUTS[case.cut].rows)
        if rank < size:
            found[name] = run_case(case, rank, groups[size])
    if rank < 4:
        found["units"] = unit_loss(rank, groups[4])
        found["adapter"] = run_adapter(rank, groups[4])
        found["objectives"] = run_objectives(rank, groups[4])
    if rank < 2:
        for run in (run_half, run_partial, run_costs, run_disagreements, run_refusals):
            found[run.__name__] = run(rank, groups[2])
    found |= {name: run_dtensor(*options, rank) for name, options in PLACEMENTS.items()}
    found["objectives on dtensors"] = run_objective_on_dtensors(rank)
    found["dtensor errors"] = run_dtensor_errors(rank)
    found["tensor parallel"] = run_tensor_parallel(rank)
    return found | {f"fsdp {name}": run_fsdp(*options, rank) for name, options in FSDP.items()}


# --- ZeRO-3 -----------------------------------------------------------------------------------------------------------

ZERO_RANKS, MICRO = 2, 2  # processes, micro-batches a step
ZERO = {  # what is made of the model, the loss
    "log-probs": ("", "log-probs"),
    "objective": ("", "objective"),
    "tied": ("tied", "log-probs"),
    "tied, checkpointing": ("tied checkpointing", "objective"),
    "frozen": ("frozen", "objective"),
    "bias, padded": ("bias padded", "objective"),
    "LoRA": ("lora", "objective"),
    "two LoRAs": ("loras", "log-probs"),
    "DoRA": ("dora", "log-probs"),
}


def zero_model(made: str) -> nn.Module:
    model: Any = make_model("tied" in made)
    if "frozen" in made:
        model.lm_head.weight.requires_grad_(False)
    if "bias" in made:
        model.lm_head.bias = nn.Parameter(oracle.normal(TOKENS, seed=9, dtype=torch.float32))
    if "padded" in made:
        model.config.unpadded_vocab_size = TOKENS - 2
    if "checkpointing" in made:
        model.gradient_checkpointing_enable()
    if "ora" in made:
        from peft import LoraConfig, get_peft_model

        options = {"r": 3, "target_modules": ["q_proj", "lm_head"], "use_dora": "dora" in made}
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
        if "loras" in made:
            model.add_adapter("other", LoraConfig(init_lora_weights=False, **options | {"r": 2}))
            model.base_model.set_adapter(["default", "other"])
    install_fused_loss(model)
    return model


def zero_loss(model: Any, rows: slice, loss: str, heads: list | None = None) -> torch.Tensor:
    """What some rows contribute to the loss of all; how ZeRO-3 has the head before and after it is put into `heads`."""
    ids = oracle.tokens((ROWS, LENGTH), TOKENS - 2, 0.0, seed=5)
    labels = ids.where(torch.arange(LENGTH) < 1 + torch.arange(ROWS)[:, None], oracle.IGNORE)
    targets = xf.shift_labels(labels)
    objective = xf.Objective("simpo", tile_bytes=5 * TOKENS * 4)

    def own(hidden, head):
        if loss == "objective":
            return objective(hidden, head, targets[rows], denominator=ROWS // 2).loss
        logp = xf.token_logps(hidden, head, targets[rows], chunk_tokens=4)
        return -logp.sum() / (targets != oracle.IGNORE).sum()

    def fused(hidden, head):
        def status():
            return getattr(getattr(head.weight, "ds_status", None), "name", None)

        before = status()
        found = own(hidden, head)
        heads is None or heads.append((before, status()))
        return found

    return model(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]), fused_loss=fused)


def zero_rows() -> list[slice]:
    """Of every rank and micro-batch."""
    size = ROWS // ZERO_RANKS // MICRO
    return [slice(start, start + size) for start in range(0, ROWS, size)]


def zero_engine(model: nn.Module, **options) -> Any:
    import deepspeed

    learn = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **options},
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(learn, lr=0.0), config=config)[0]


def zero_step(engine: Any, rank: int, loss: str, heads: list | None = None) -> tuple[torch.Tensor, dict]:
    """The loss of this rank's rows and the whole gradients of a step."""
    from deepspeed.utils import safe_get_full_grad

    slices, total = zero_rows(), torch.zeros(())
    for rows in slices[rank * MICRO : (rank + 1) * MICRO]:
        own = zero_loss(engine, rows, loss, heads)
        engine.backward(own * len(slices))  # a mean over ranks and micro-batches
        total += own.detach()
        if engine.is_gradient_accumulation_boundary():
            learn = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
            grads = {n: safe_get_full_grad(p).clone() for n, p in learn.items()}
        engine.step()
    return total, grads


def run_zero(made: str, loss: str, rank: int) -> dict:
    import deepspeed

    engine = zero_engine(zero_model(made))
    layer = engine.module.get_output_embeddings()
    weight = dict((layer.base_layer if "ora" in made else layer).named_parameters(recurse=False))["weight"]
    gathered, heads = deepspeed.zero.GatheredParameters, []
    with patch.object(gathered, "__enter__", autospec=True, side_effect=gathered.__enter__) as gathers:
        total, grads = zero_step(engine, rank, loss, heads)
    shape = tuple(weight.shape)
    engine.eval()
    with torch.no_grad():
        again = sum(zero_loss(engine, rows, loss) for rows in zero_rows()[rank * MICRO : (rank + 1) * MICRO])
    found = {
        "loss": total, "again": again, "grads": grads, "shape": shape, "gathers": gathers.call_count,
        "heads": heads, "external": sum(len(m._external_params) for m in engine.module.modules()),
    }  # fmt: skip
    engine.destroy()
    return found


def run_zero_ahead(rank: int) -> dict:
    """A forward that takes another way than the one that ZeRO-3 has gathered the head ahead for."""
    engine = zero_engine(zero_model(""), stage3_prefetch_bucket_size=1)
    ids = oracle.tokens((2, LENGTH), TOKENS, 0.0, seed=5)
    for _ in range(2 * MICRO):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    heads: list = []
    total, grads = zero_step(engine, rank, "log-probs", heads)
    engine.destroy()
    return {"loss": total, "grads": grads, "heads": heads}


def run_zero_calls(rank: int) -> dict:
    """A head in parts, outside of any model's forward; no engine has it."""
    import deepspeed
    from torch.distributed.tensor.debug import CommDebugMode

    weight, bias = (x.float() for x in shared_head())
    layer = nn.Linear(WIDTH, VOCAB)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    deepspeed.zero.Init(module=layer, dtype=torch.float32)
    hidden, targets, u = (x.float() if x.is_floating_point() else x for x in rank_problem(1))
    hidden.requires_grad_()
    with CommDebugMode() as forward:
        logp = xf.token_logps(hidden, layer.weight, targets, bias=layer.bias, chunk_tokens=2)
    with CommDebugMode() as backward:
        d_weight, d_bias = torch.autograd.grad((logp * u).sum(), [layer.weight, layer.bias])
    with torch.autocast("cpu", torch.bfloat16):
        half = xf.token_logps(hidden, layer.weight, targets, bias=layer.bias)
        want = xf.token_logps(hidden, weight, targets, bias=bias)
    with pytest.raises(ValueError, match="weight_grad is for a weight that this rank has whole, and weight is kept in"):
        xf.token_logps(hidden, layer.weight, targets, weight_grad=torch.zeros_like(weight))
    assert layer.weight.shape == layer.bias.shape == (0,)
    return {
        "logp": logp.detach(),
        "d_weight": d_weight,
        "d_bias": d_bias,
        "half": half.detach(),
        "half wanted": want.detach(),
        "collectives": [sum(mode.get_comm_counts().values()) for mode in (forward, backward)],
    }


def run_all_zero(rank: int) -> dict:
    import deepspeed

    # Its all-reduce by shared memory would be compiled first.
    with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        found: dict = {name: run_zero(*case, rank) for name, case in ZERO.items()}
    return found | {"ahead": run_zero_ahead(rank), "calls": run_zero_calls(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return found_by(tmp_path_factory, WORLD, run_all)


@pytest.fixture(scope="module")
def zero_ranks(tmp_path_factory) -> list[dict]:
    if sys.platform != "linux":
        pytest.skip("the extra [dev] has DeepSpeed on Linux alone")
    return found_by(tmp_path_factory, ZERO_RANKS, run_all_zero)


# --- a vocabulary over ranks ------------------------------------------------------------------------------------------


def expected(case: Case) -> dict[str, torch.Tensor]:
    """The textbook's statistics and gradients, in float64 from the same operands."""
    operands = problem(case)
    wide = operands._replace(
        hidden=operands.hidden.double(), weight=operands.weight.double(), bias=operands.bias.double()
    )
    leaves = learning(case, wide)
    ref = {k: v.double() for k, v in wide.ref.items()}
    options = {**case.options, **ref, "bias": wide.bias if has_bias(case) else None}
    stats = oracle.stats(wide.hidden, wide.weight, wide.targets, **options)
    found = {name: stats[name].detach() for name in ("logp", "lse", *case.outputs)}
    if leaves:
        loss = sum((stats[name] * u).sum() for name, u in wide.upstream.items())
        if loss.requires_grad:
            loss.backward()
    return found | {f"d_{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}


def joined(cut: Cut, parts: list[torch.Tensor], vocab: int) -> torch.Tensor:
    """The shards of (V, …) as one; what is in the rows of padding must be 0."""
    order = range(len(parts)) if cut.starts is None else sorted(range(len(parts)), key=lambda r: cut.starts[r])
    together = torch.cat([parts[r] for r in order])
    assert not together[vocab:].any()
    return together[:vocab]


def check_gradient(found: torch.Tensor, want: torch.Tensor, bound: float, name: str) -> None:
    assert found.shape == want.shape
    if not want.any():
        assert not found.any(), name
    else:
        assert oracle.error(found, want) < bound, name


@pytest.mark.parametrize("name", CASES)
def test_a_cut_vocabulary_is_the_whole(ranks, name):
    case = CASES[name]
    cut, want, bound = CUTS[case.cut], expected(case), TOLERANCE[case.dtype]
    found = [r[name] for r in ranks[: len(cut.rows)]]
    for stat in ("logp", "lse", *case.outputs):
        for own in found[1:]:
            assert torch.equal(own[stat], found[0][stat]), stat
        same = {"check_dtype": False} if stat == "top1" else {}
        torch.testing.assert_close(found[0][stat].double(), want[stat].double(), rtol=bound, atol=bound, **same)
    for leaf in case.learn.split():
        if leaf == "hidden":
            for own in found:
                check_gradient(own["d_hidden"], want["d_hidden"], bound, leaf)
        else:
            parts = [own[f"d_{leaf}"] for own in found]
            check_gradient(joined(cut, parts, case.vocab), want[f"d_{leaf}"], bound, leaf)


def test_half_precision_is_as_good_as_a_whole_head(ranks):
    """One rounding to bfloat16 of each rank's part of dH, and one of their sum."""
    case = Case("two", dtype=torch.bfloat16, options=EVERYTHING)
    want, found = expected(case), [r["run_half"] for r in ranks[:2]]
    torch.testing.assert_close(found[0]["logp"].double(), want["logp"], rtol=0, atol=1e-5)
    eps = torch.finfo(torch.bfloat16).eps
    check_gradient(found[0]["d_hidden"], want["d_hidden"], eps, "hidden")
    for leaf in ("weight", "bias"):
        parts = joined(CUTS["two"], [own[f"d_{leaf}"] for own in found], VOCAB)
        check_gradient(parts, want[f"d_{leaf}"], eps / 2, leaf)


def test_parts_of_dh_can_be_left_to_who_sums_them(ranks):
    want = expected(CASES["plain"])["d_hidden"]
    parts = [r["run_partial"]["d_hidden"] for r in ranks[:2]]
    check_gradient(parts[0] + parts[1], want, 1e-5, "hidden")
    assert oracle.error(parts[0], want) > 0.1


def test_units_of_a_cut_vocabulary(ranks):
    want = unit_loss(None)
    found = [r["units"] for r in ranks]
    for own in found:
        assert torch.equal(own["loss"], found[0]["loss"])
        torch.testing.assert_close(own["loss"], want["loss"], rtol=1e-10, atol=1e-10)
        check_gradient(own["d_hidden"], want["d_hidden"], 1e-10, "hidden")
        assert "of 131, rank" in own["plan"] and "exchanged once a tile" in own["plan"]
    for leaf in ("weight", "bias"):
        parts = joined(CUTS["four, padded"], [own[f"d_{leaf}"] for own in found], VOCAB)
        check_gradient(parts, want[f"d_{leaf}"], 1e-10, leaf)


@pytest.mark.parametrize("learn", ADAPTER_LEARNS)
def test_an_adapter_on_a_cut_vocabulary(ranks, learn):
    own = adapted(learn)
    wide = torch.cat([own["weight"], own["adapter"]], dim=1)
    logp = oracle.stats(own["hidden"], wide, problem(ADAPTED).targets, bias=own["bias"], **EVERYTHING)["logp"]
    (logp * oracle.normal(N, seed=7)).sum().backward()
    found = [r["adapter"][learn] for r in ranks]
    for name in learn.split():
        if name == "hidden":
            for part in found:
                check_gradient(part[name], own[name].grad, 1e-10, name)
        else:
            parts = joined(CUTS[ADAPTED.cut], [part[name] for part in found], VOCAB)
            check_gradient(parts, own[name].grad, 1e-10, name)
    for part in found:
        torch.testing.assert_close(part["logp"], logp.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("what", "passes", "gathers", "sums"),
    [("nothing", 1, 8, 0), ("frozen", 2, 8, 1), ("trainable", 4, 16, 1)],
)
def test_what_a_cut_vocabulary_costs(ranks, what, passes, gathers, sums):
    for own in (r["run_costs"][what] for r in ranks[:2]):
        assert own["passes"] == passes
        assert own["planned"] in (
            None,
            (passes, 8),
        )  # as many tokens a tile on both ranks, whose shards differ
        assert own["gathers"] == [(3, 8)] * gathers
        assert own["sums"] == [(64, 16)] * sums
        assert own["largest_bytes"] <= 2 * 2**20  # a block of rows; the tile is kept from call to call


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_all_learn_of_it(ranks, name):
    messages = {r["run_disagreements"][name] for r in ranks[:2]}
    assert len(messages) == 1
    with pytest.raises(ValueError, match=DISAGREEMENTS[name][1]):
        raise ValueError(*messages)


def test_refusals_of_a_cut_vocabulary(ranks):
    for own, rows in zip((r["run_refusals"] for r in ranks[:2]), (70, 61)):
        assert f"weight is ({rows - 1}, 4) and the ranks agreed on {rows} rows" in own["rows"]
        assert "bias is (131,)" in own["bias"]
        assert "takes the torch backend, got 'dense'" in own["dense"]
        assert "target 131 at position 2 is outside the vocabulary of 131" in own["target"]


def test_a_vocabulary_is_cut_over_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        xf.VocabShard.agree(5)


@pytest.mark.parametrize("how", ["objectives", "objectives on dtensors"])
@pytest.mark.parametrize("name", METHODS)
def test_objectives_of_a_head_in_parts(ranks, name, how):
    want = run_objective(name, *(x.requires_grad_() for x in shared_head()))
    found = [r[how][name] for r in ranks]
    for own in found:
        assert own.keys() == want.keys()
        for key in want.keys() - {"d_hidden", "d_weight", "d_bias"}:
            torch.testing.assert_close(own[key], want[key], rtol=1e-8, atol=1e-8)
        check_gradient(own["d_hidden"], want["d_hidden"], 1e-8, "hidden")
    for leaf in ("d_weight", "d_bias"):
        parts = [own[leaf] for own in found]
        if how == "objectives":
            parts = [joined(CUTS["four, padded"], parts, VOCAB)]
        for part in parts:
            check_gradient(part, want[leaf], 1e-8, leaf)


def test_the_plan_of_an_objective_on_a_cut_vocabulary(ranks):
    for own in ranks:
        plan = own["objectives"]["plan"]
        assert "4F: the loss of whole pairs" in plan and "what 4 ranks found is exchanged once a tile" in plan


# --- weights in parts -------------------------------------------------------------------------------------------------


def over_all_ranks() -> dict:
    """The head's gradients of the mean over ranks of their losses, and each rank's own log-probs and dH."""
    weight, bias = (x.requires_grad_() for x in shared_head())
    found: dict = {"logp": [], "d_hidden": []}
    for rank in range(WORLD):
        hidden, targets, u = rank_problem(rank)
        hidden.requires_grad_()
        logp = oracle.stats(hidden, weight, targets, bias=bias)["logp"]
        if logp.requires_grad:
            ((logp * u).sum() / WORLD).backward()
        found["logp"].append(logp.detach())
        found["d_hidden"].append(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad * WORLD)
    return found | {"d_weight": weight.grad, "d_bias": bias.grad}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_dtensor_is_gathered_once_a_call(ranks, name):
    want = over_all_ranks()
    for rank, own in enumerate(r[name] for r in ranks):
        torch.testing.assert_close(own["logp"], want["logp"][rank], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own["again"], want["logp"][rank], rtol=1e-10, atol=1e-10)
        check_gradient(own["d_hidden"], want["d_hidden"][rank], 1e-10, "hidden")
        check_gradient(own["d_weight"], want["d_weight"], 1e-10, "weight")
        check_gradient(own["d_bias"], want["d_bias"], 1e-10, "bias")
        forward, backward, frozen = own["collectives"]
        cuts = sum(k != "R" for k in PLACEMENTS[name][1])  # mesh dimensions that the weight is cut over
        assert forward == frozen == {"all_gather_into_tensor": cuts + 1}  # and the bias, over one
        assert sum(backward.values()) == 2 * len(PLACEMENTS[name][0])


def test_refusals_of_dtensors(ranks):
    for own in (r["dtensor errors"] for r in ranks):
        assert "expected hidden to be a plain tensor, got a DTensor" in own["hidden"]
        assert "weight_grad is for a weight that this rank has whole" in own["weight_grad"]
        assert "expected weight to be a DTensor that is replicated or sharded" in own["partial"]


def test_the_rows_of_a_dtensor_are_a_cut_vocabulary(ranks):
    hidden, targets, u = rank_problem(1)
    weight = shared_head()[0].requires_grad_()
    hidden.requires_grad_()
    logp = oracle.stats(hidden, weight, targets)["logp"]
    (logp * u).sum().backward()
    for own in (r["tensor parallel"] for r in ranks):
        torch.testing.assert_close(own["logp"], logp.detach(), rtol=1e-10, atol=1e-10)
        check_gradient(own["d_hidden"], hidden.grad, 1e-10, "hidden")
        check_gradient(own["d_weight"], weight.grad, 1e-10, "weight")


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_equals_one_process(ranks, name):
    model = make_model(FSDP[name][0])
    want = model_loss(model, slice(None), 1)
    want.backward()
    found = [r[f"fsdp {name}"] for r in ranks]
    assert sum(own["local"][0] for own in found) == TOKENS * (WORLD // FSDP[name][2][-1])  # it is in parts
    torch.testing.assert_close(sum(own["loss"] for own in found), want.detach(), rtol=1e-5, atol=1e-5)
    for own in found:
        assert own["grads"].keys() == dict(model.named_parameters()).keys()
        for parameter, p in model.named_parameters():
            check_gradient(own["grads"][parameter], p.grad, 1e-5, parameter)


def check_zero(found: list[dict], made: str, loss: str) -> None:
    model = zero_model(made)
    want = sum(zero_loss(model, rows, loss) for rows in zero_rows())
    want.backward()
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(sum(own["loss"] for own in found), want.detach(), rtol=1e-5, atol=1e-5)
    for own in found:
        assert own["grads"].keys() == learn.keys()
        for name, p in learn.items():
            check_gradient(own["grads"][name], p.grad, 1e-5, name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", ZERO)
def test_zero_3_equals_one_process(zero_ranks, name):
    made, loss = ZERO[name]
    found = [r[name] for r in zero_ranks]
    check_zero(found, made, loss)
    for own in found:
        torch.testing.assert_close(own["again"], own["loss"])
        assert own["shape"] == (0,)
        if "ora" not in made:  # PEFT reads weights of its modules before it calls them
            # What ZeRO-3 would gather for the whole of the model's forward and backward.
            assert own["external"] == 0
        if "tied" not in made:  # whose embeddings may still be there
            assert own["gathers"] == MICRO
            assert own["heads"] == [(None if {"bias", "dora"} & set(made.split()) else "NOT_AVAILABLE",) * 2] * MICRO


def test_a_head_that_zero_3_gathers_ahead_is_waited_for(zero_ranks):
    found = [r["ahead"] for r in zero_ranks]
    assert all(("INFLIGHT", "AVAILABLE") in own["heads"] for own in found)
    check_zero(found, "", "log-probs")


def test_calls_on_what_zero_3_has_taken_away(zero_ranks):
    weight, bias = (x.float().requires_grad_() for x in shared_head())
    hidden, targets, u = rank_problem(1)
    logp = oracle.stats(hidden, weight.double(), targets, bias=bias.double())["logp"]
    (logp * u).sum().backward()
    for own in (r["calls"] for r in zero_ranks):
        torch.testing.assert_close(own["logp"].double(), logp.detach(), rtol=1e-5, atol=1e-5)
        check_gradient(own["d_weight"], weight.grad, 1e-5, "weight")
        check_gradient(own["d_bias"], bias.grad, 1e-5, "bias")
        assert torch.equal(own["half"], own["half wanted"])
        assert own["collectives"] == [2, 0]  # of weight and bias, once, and nothing for the backward
