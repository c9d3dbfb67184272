"""Rows that are cut over two and four ranks, against whole rows in one process, and against plain float64 code.

A world of gloo processes runs every case once and saves what each rank found. Tolerances: 1e-5 in float32, for
gradients in norm, 1e-10 in float64; what a rank says of whole rows is the same bit by bit on all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid
from torch.profiler import ProfilerActivity, profile

import oracle
import xpo_fast as xf
from ranks import found_by
from xpo_fast.models import install_fused_loss

VOCAB, WIDTH, ROWS, LENGTH = 23, 7, 6, 13
ENDS = [0, 7, 8, 13, 13, 22, 31]  # packed: a row of one token, an empty one, one in three chunks
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SCALING: dict[str, Any] = {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}
# Widths of the chunks, padded and packed, by what they try.
CUTS = {
    2: {"ragged": ((5, 8), (10, 21)), "a token": ((1, 12), (30, 1)), "nothing": ((13, 0), (0, 31))},
    4: {"ragged": ((4, 3, 5, 1), (9, 6, 8, 8)), "nothing": ((6, 0, 1, 6), (7, 1, 5, 18))},
}
UNSCORED = {"nothing": slice(0, 6)}  # positions of a rank of four that has none to score


class Case(NamedTuple):
    method: str
    options: dict = {}  # noqa: RUF012
    inputs: tuple[str, ...] = ()  # see `given_of`
    packed: bool = False
    dtype: torch.dtype = torch.float64
    frozen: bool = False


PAIRS = ("ref_hidden",)
CASES = {
    "dpo": Case("dpo", {}, PAIRS),
    "dpo, float32": Case("dpo", {}, PAIRS, dtype=torch.float32),
    "dpo, packed": Case("dpo", {}, PAIRS, packed=True),
    "dpo, ref_logps by row": Case("dpo", {}, ("ref_logps",)),
    "dpo, frozen head": Case("dpo", {}, PAIRS, packed=True, dtype=torch.float32, frozen=True),
    "ld_alpha by token": Case("dpo", {"ld_alpha": 0.3}, ("ref_tokens",)),
    "wpo": Case("dpo", {"wpo": True}, PAIRS, packed=True),
    "simpo + sft": Case("simpo + 0.5*sft"),
    "sft alone": Case("sft"),  # whose head need not read the rejected rows
    "beta_dpo": Case("beta_dpo", {"keep": 1.0}, PAIRS),
    "token_dpo": Case("token_dpo", {}, ("ref_tokens",)),
    "tdpo": Case("tdpo", {}, PAIRS),
    "tdpo, packed": Case("tdpo", {}, PAIRS, packed=True, dtype=torch.float32),
    "kto": Case("kto", {}, ("ref_hidden", "desirable", "kl")),
    "kto, packed": Case("kto", {}, ("ref_logps", "desirable", "kl"), packed=True),
    "bco": Case("bco", {}, ("ref_hidden", "desirable")),
    "lipo": Case("lipo", {}, ("ref_hidden", "scores")),
    "lipo, packed": Case("lipo", {}, ("ref_hidden", "scores"), packed=True, dtype=torch.float32),
    "pairs of lists": Case("dpo", {"pairs": "all"}, ("ref_hidden", "scores")),
    "grpo": Case("grpo", {"beta": 0.1}, ("ref_tokens", "old_logp", "advantage")),
    "grpo, packed": Case("grpo", {}, ("old_logp", "advantage"), packed=True),
    "grpo by token, packed": Case("grpo", {}, ("old_logp", "advantages"), packed=True, dtype=torch.float32),
    "gspo": Case("gspo", {}, ("old_logp", "advantage"), dtype=torch.float32),
    "dapo": Case("dapo", {}, ("old_logp", "advantages")),
    "entropy": Case("grpo", {"entropy_coef": 0.2}, ("old_logp", "advantage")),
    "by token": Case("grpo", {"reduction": "none"}, ("old_logp", "advantage")),
    "dr_grpo": Case("dr_grpo", {}, ("old_logp", "advantage", "denominator"), packed=True),
    "sum": Case("dpo", {"reduction": "sum"}, PAIRS),
}  # fmt: skip
# The other cuts are about rows, not about methods.
EVERYWHERE = (
    "dpo", "dpo, packed", "sft alone", "wpo", "tdpo, packed", "kto, packed", "lipo", "grpo by token, packed", "gspo",
    "entropy",
)  # fmt: skip
CUT_CASES = [
    (world, cut, name)
    for world, cuts in CUTS.items()
    for cut in cuts
    for name in (CASES if cut == "ragged" else EVERYWHERE)
]
BY_TOKEN = ("ref_tokens", "old_logp", "advantages")


def whole_rows(case: Case, cut: str = "ragged") -> dict[str, Any]:
    """The operands of whole rows: padded (6, 13) or packed (31,)."""
    shape, dtype = ((31,) if case.packed else (ROWS, LENGTH)), case.dtype
    targets = oracle.tokens(shape, VOCAB, 0.2, seed=1)
    if case.packed:
        targets[7] = 3  # the row of one token
    else:
        targets[:, UNSCORED.get(cut, slice(0))] = oracle.IGNORE
        targets[1, -4:] = oracle.IGNORE
    return {
        "hidden": oracle.normal(*shape, WIDTH, seed=2, dtype=dtype),
        "targets": targets,
        "weight": oracle.normal(VOCAB, WIDTH, seed=3, dtype=dtype),
        "bias": oracle.normal(VOCAB, seed=4, dtype=dtype),
        "ref_hidden": oracle.normal(*shape, WIDTH, seed=5, dtype=dtype),
        "ref_weight": oracle.normal(VOCAB, WIDTH, seed=6, dtype=dtype),
        "ref_logps": -oracle.normal(ROWS, seed=7, std=9.0, dtype=dtype).abs(),
        "ref_tokens": -oracle.normal(*shape, seed=8, dtype=dtype).abs(),
        "old_logp": -2 - oracle.normal(*shape, seed=9, dtype=dtype).abs(),
        "advantage": oracle.normal(ROWS, seed=10, dtype=dtype),
        "advantages": oracle.normal(*shape, seed=11, dtype=dtype),
        "desirable": torch.tensor([True, False, False, True, True, False]),
        "kl": torch.tensor(0.3, dtype=dtype),
        "scores": oracle.normal(2, 3, seed=12, dtype=dtype),
        "denominator": torch.tensor(5),
    }


def call(case: Case, cut: str = "ragged", widths: tuple[int, ...] = (), rank: int = 0, **more) -> dict[str, Any]:
    """What a call finds: on whole rows, or on this rank's chunk of them."""
    full = whole_rows(case, cut)
    at = slice(sum(widths[:rank]), sum(widths[: rank + 1])) if widths else slice(None)
    own = {n: x[..., at] if n in (*BY_TOKEN, "targets") else x for n, x in full.items()}
    own |= {n: full[n][..., at, :].clone() for n in ("hidden", "ref_hidden")}
    hidden = own["hidden"].requires_grad_()
    weight, bias = (own[n].requires_grad_(not case.frozen) for n in ("weight", "bias"))
    names = {"ref_tokens": "ref_logps", "advantages": "advantage"}
    given = {names.get(n, n): own[n] for n in case.inputs}
    if "ref_hidden" in given:
        given["ref_weight"] = own["ref_weight"]
    if case.packed:
        given["cu_seqlens"] = torch.tensor(ENDS)
    objective = xf.Objective(case.method, tile_bytes=4 * 8 * VOCAB, backend="torch", **case.options)
    out = objective(hidden, weight, own["targets"], bias=bias, **SCALING, **given, **more)
    (out.loss * coefficients(out.loss)).sum().backward()
    found = {"loss": out.loss.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": bias.grad}
    found |= {"token_reward": out.token_reward, "losses": torch.stack([x.sum() for x in out.losses])}
    return {**found, **{f"state {n}": x for n, x in objective.state_dict().items()}, **out.metrics}


def coefficients(losses: torch.Tensor) -> torch.Tensor | float:
    """What multiplies losses that are not reduced, so that their gradients differ."""
    return torch.arange(1.0, losses.numel() + 1, dtype=losses.dtype).view(losses.shape) if losses.dim() else 1.0


# --- what the ranks run -----------------------------------------------------------------------------------------------


def run_cases(rank: int, world: int) -> dict[str, dict]:
    shard, found = xf.RowShard(), {}
    for _, cut, name in (x for x in CUT_CASES if x[0] == world):
        case = CASES[name]
        found[f"{name}, {cut}"] = call(case, cut, CUTS[world][cut][case.packed], rank, row_shard=shard)
    return found


@contextmanager
def gathers():
    """The bytes that this rank sends in each all-gather."""
    sent: list[int] = []
    gather = dist.all_gather

    def counted(found, x, group=None):
        sent.append(x.nbytes)
        return gather(found, x, group=group)

    with patch.object(dist, "all_gather", counted):
        yield sent


def run_costs(rank: int) -> dict[str, Any]:
    """Of a forward and a backward: the bytes of each all-gather, and once how many collectives of any kind ran."""
    found: dict[str, Any] = {}
    for name in ("dpo", "tdpo, packed", "entropy", "simpo + sft"):
        case = CASES[name]
        with gathers() as found[name]:
            call(case, "ragged", CUTS[2]["ragged"][case.packed], rank, row_shard=xf.RowShard())
    labels = oracle.tokens((3, 10), VOCAB)[:, 5 * rank : 5 * rank + 5]
    with gathers() as found["shift_labels"]:
        xf.shift_labels(labels, row_shard=xf.RowShard())
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        call(CASES["dpo"], "ragged", CUTS[2]["ragged"][False], rank, row_shard=xf.RowShard())
    found["collectives"] = sum(e.count for e in prof.key_averages() if e.key.startswith("c10d::"))
    return found


def run_seams(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Targets of chunks of labels, of some widths, and losses of labels that were shifted in three ways."""
    shard, found = xf.RowShard(), {}
    labels = oracle.tokens((3, 10), VOCAB, 0.1)
    for widths in {2: ((4, 6), (0, 10), (10, 0)), 4: ((3, 0, 1, 6), (0, 0, 9, 1), (2, 3, 5, 0))}[world]:
        own = labels.split(widths, dim=1)[rank]
        found[f"{widths}"] = xf.shift_labels(own, row_shard=shard)
        found[f"{widths} packed"] = xf.shift_labels(own[0], row_shard=shard)
    found["chunk"] = shard.chunk(xf.shift_labels(labels))
    hidden = shard.chunk(oracle.normal(2, 10, WIDTH, seed=1), dim=1)
    weight, labels = oracle.normal(VOCAB, WIDTH, seed=2), labels[:2]
    aligned = {
        "before": shard.chunk(xf.shift_labels(labels)),
        "by row_shard": xf.shift_labels(shard.chunk(labels), row_shard=shard),
        "locally": xf.shift_labels(shard.chunk(labels)),
    }
    for how, targets in aligned.items():
        found[f"loss {how}"] = xf.Objective("simpo")(hidden, weight, targets, row_shard=shard).loss
    return found


def balanced_call(shard: xf.RowShard | None) -> dict[str, Any]:
    """A loss that knows the order of positions, and labels, of whole rows or of balanced chunks."""
    labels, length = oracle.tokens((6, 16), VOCAB, 0.2, seed=1), 16
    hidden, ref = oracle.normal(6, length, WIDTH, seed=2), -oracle.normal(6, length, seed=3).abs()
    if shard is None:
        targets = xf.shift_labels(labels)
    else:
        targets = xf.shift_labels(shard.chunk(labels), row_shard=shard)
        hidden, ref = shard.chunk(hidden, dim=1), shard.chunk(ref)
    hidden.requires_grad_()
    weight = oracle.normal(VOCAB, WIDTH, seed=4).requires_grad_()
    out = xf.Objective("dpo", ld_alpha=0.3)(hidden, weight, targets, ref_logps=ref, row_shard=shard)
    out.loss.backward()
    return {"loss": out.loss.detach(), "targets": targets, "d_hidden": hidden.grad, "d_weight": weight.grad}


def run_balanced(rank: int) -> dict[str, Any]:
    shard = xf.RowShard(balanced=True)
    with pytest.raises(ValueError) as error:
        shard.chunk(torch.arange(13))
    odd: dict[str, Any] = {"hidden": torch.zeros(2, 3 + rank, WIDTH), "weight": torch.zeros(VOCAB, WIDTH)}
    with pytest.raises(ValueError) as pieces:
        xf.Objective("simpo")(**odd, targets=torch.zeros(2, 3 + rank, dtype=torch.long), row_shard=shard)
    return {**balanced_call(shard), "errors": [str(error.value), str(pieces.value)]}


def run_rows(rank: int) -> dict[str, Any]:
    """Sums of rows, a weight_grad, and the plan."""
    shard, case = xf.RowShard(), CASES["dpo"]
    full = whole_rows(case)
    at = slice(0, 5) if rank == 0 else slice(5, 13)
    hidden = full["hidden"][:, at].clone().requires_grad_()
    weight, targets = full["weight"].requires_grad_(), full["targets"][:, at]
    logps, lengths = xf.sequence_logps(hidden, weight, targets, row_shard=shard)
    (logps * torch.arange(1.0, 7.0)).sum().backward()
    found = {
        "logps": logps.detach(),
        "lengths": lengths,
        "d_hidden": hidden.grad.clone(),
        "d_weight": weight.grad.clone(),
    }
    packed = whole_rows(CASES["dpo, packed"])
    at = slice(0, 10) if rank == 0 else slice(10, 31)
    offsets = torch.tensor(ENDS)
    found["packed"] = xf.sequence_logps(
        packed["hidden"][at], weight, packed["targets"][at], cu_seqlens=offsets, row_shard=shard
    )[0].detach()
    buffer = torch.ones_like(weight)
    call_ = {"ref_hidden": full["ref_hidden"][:, slice(0, 5) if rank == 0 else slice(5, 13)], "row_shard": shard}
    xf.Objective("dpo")(hidden, weight, targets, weight_grad=buffer, **call_).loss.backward()
    found["weight_grad"] = buffer - 1
    found["plan"] = xf.Objective("dpo").plan(hidden, weight, targets, **call_)
    return found


def run_refusals(rank: int) -> dict[str, str]:
    """The error of each call, by what is wrong with it."""
    shard, case = xf.RowShard(), CASES["grpo, packed"]
    full = whole_rows(case)
    at = slice(0, 10) if rank == 0 else slice(10, 31)
    hidden, targets = full["hidden"][at], full["targets"][at]
    given: dict[str, Any] = {"cu_seqlens": torch.tensor(ENDS), "old_logp": full["old_logp"][at], "row_shard": shard}
    given["advantage"] = full["advantage"]
    weight, found = full["weight"].requires_grad_(), {}

    def refused(name: str, method: str = "grpo", h=hidden, y=targets, **more) -> None:
        with pytest.raises(ValueError) as error:
            xf.Objective(method)(h, weight, y, **{**given, **more})
        found[name] = str(error.value)

    none: dict[str, Any] = {"old_logp": None, "advantage": None}
    refused("another row count", method="kto", cu_seqlens=torch.tensor([0, 31] if rank else ENDS), **none)
    refused("other offsets", cu_seqlens=torch.tensor([0, 9 - rank, *ENDS[2:]]))
    refused("offsets too short", cu_seqlens=torch.tensor([*ENDS[:-1], 30]))
    refused("another column", advantage=full["advantage"] + rank)
    refused("another dtype", old_logp=given["old_logp"].to(torch.float32 if rank else torch.float64))
    refused("a chunk of another width", old_logp=given["old_logp"][: 10 - rank])
    refused("one rank's operands", h=hidden[:, : WIDTH - rank])
    refused("one rank's column", **({"old_logp": None} if rank else {}))
    refused("a column that learns", advantage=full["advantage"].clone().requires_grad_())
    refused("another setting", method=["grpo", "dapo"][rank])
    refused("another temperature", temperature=1.0 + rank)
    refused("another denominator", denominator=torch.tensor(3 + rank))
    refused("a target too large", y=torch.where(torch.arange(len(targets)) == 3, VOCAB, targets) if rank else targets)
    refused("no chunk", y=targets[None], h=hidden[None])
    refused("no shard", row_shard=dist.group.WORLD)
    refused("cringe", method="cringe")
    cut = xf.VocabShard.agree(12 - rank, VOCAB)
    refused("one group twice", vocab_shard=cut)
    with patch("torch.compiler.is_compiling", return_value=True):
        refused("compiled")
    by_row = torch.full((6,), 1.0, dtype=torch.float64)
    chunks: dict[str, Any] = {
        "h": full["hidden"][6 * rank : 6 * rank + 6],
        "y": full["targets"][6 * rank : 6 * rank + 6],
    }
    short: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 2, 4, 6, 8, 10, 12]),
        "old_logp": by_row,
        "advantage": by_row,
    }
    refused("by token or by row", **chunks, **short)
    found["still in step"] = float(xf.Objective("grpo")(hidden.detach(), weight.detach(), targets, **given).loss)
    return found


def run_mesh(rank: int) -> dict[str, dict]:
    """Rows cut over two ranks, and the vocabulary over two others: ranks 0 and 1 have the first chunk."""
    groups = {ranks: dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))}
    chunk, part = divmod(rank, 2)
    shard = xf.RowShard(groups[part, part + 2])
    vocabulary = xf.VocabShard.agree(12 - part, VOCAB, group=groups[2 * chunk, 2 * chunk + 1])
    at, found = slice(12 * part, 12 + 11 * part), {}
    for name in ("dpo", "tdpo, packed", "entropy"):
        case = CASES[name]
        own = {n: x[at] if n in ("weight", "bias", "ref_weight") else x for n, x in whole_rows(case).items()}
        with patch(f"{__name__}.whole_rows", lambda *_, own=own: own):
            widths = CUTS[2]["ragged"][case.packed]
            found[name] = call(case, "ragged", widths, chunk, row_shard=shard, vocab_shard=vocabulary)
    return found


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **sizes, **heads))
    install_fused_loss(model)
    return model


def model_loss(model: Any, method: str, shard: xf.RowShard | None = None) -> torch.Tensor:
    """Of two pairs, padded at the right; with a shard, from this rank's chunk of them."""
    ids = oracle.tokens((4, 10), VOCAB, 0.0, seed=3)
    labels = ids.clone()
    labels[:, :2] = labels[1, 7:] = labels[2, 3:] = oracle.IGNORE  # the third row ends before the second chunk
    positions = torch.arange(10).expand(4, -1)
    if shard is not None:
        ids, labels, positions = (shard.chunk(x).contiguous() for x in (ids, labels, positions))
    targets = xf.shift_labels(labels, row_shard=shard)
    given: dict[str, Any] = {"ref_logps": torch.tensor([-20.0, -9.0, -5.0, -18.0])} if method == "dpo" else {}

    def fused(hidden, head):
        return xf.Objective(method)(hidden, head, targets, row_shard=shard, **given).loss

    return model(input_ids=ids, position_ids=positions, fused_loss=fused)


def model_grads(model: Any) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run_ulysses(rank: int) -> dict[str, tuple]:
    """Loss and gradients of a Llama whose attention is DeepSpeed's Ulysses, by how the gradients are reduced."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from deepspeed.utils import safe_get_full_grad

    found = {}
    # Its all-reduce by shared memory would be compiled first.
    with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        deepspeed.init_distributed("gloo", verbose=False)
    mpu: Any = UlyssesSPAttentionHF.register_with_transformers(tiny_model(), "sdpa", 2, 4)
    shard = xf.RowShard(mpu.get_sequence_parallel_group())
    for method in ("dpo", "simpo"):
        model = tiny_model()
        loss = model_loss(model, method, shard)
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        found[f"summed, {method}"] = loss.detach(), model_grads(model)
    model = torch.nn.parallel.DistributedDataParallel(tiny_model())
    loss = model_loss(model, "simpo", shard)
    (loss * shard.world).backward()
    found["DDP, simpo"] = loss.detach(), model_grads(model)
    for stage in (2, 3):
        config = {
            "train_micro_batch_size_per_gpu": 4, "sequence_parallel_size": 2, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }  # fmt: skip
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
        loss = model_loss(engine, "dpo", shard)
        engine.backward(loss * (shard.world if stage == 3 else 1))
        read: Any = safe_get_full_grad
        grads = {n: read(p).clone() for n, p in engine.module.named_parameters()}
        found[f"ZeRO-{stage}, dpo"] = loss.detach(), grads
        engine.destroy()
    return found


def run_two(rank: int) -> dict:
    return {
        "cases": run_cases(rank, 2),
        "costs": run_costs(rank),
        "seams": run_seams(rank, 2),
        "balanced": run_balanced(rank),
        "rows": run_rows(rank),
        "refusals": run_refusals(rank),
        "ulysses": run_ulysses(rank) if sys.platform == "linux" else {},  # last, since it replaces sdpa
    }


def run_four(rank: int) -> dict:
    return {
        "cases": run_cases(rank, 4),
        "seams": run_seams(rank, 4),
        "mesh": run_mesh(rank),
        "balanced": run_balanced(rank),
    }


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return found_by(tmp_path_factory, 2, run_two)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict]:
    return found_by(tmp_path_factory, 4, run_four)


@pytest.fixture
def found(request, world) -> list[dict]:
    return request.getfixturevalue({2: "two", 4: "four"}[world])


def total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).sum(0)


def check(ranks: list[dict], case: Case, cut: str, *, parts: bool = True) -> None:
    """Each rank has the whole rows' loss, and its chunk of their gradient; the parts of the head's add up."""
    want = call(case, cut)
    bound = TOLERANCE[case.dtype]
    axis = 0 if case.packed else 1
    chunked = {"d_hidden": axis, **({"token_reward": axis} if want["token_reward"] is not None else {})}
    for name, x in want.items():
        if x is None:
            assert all(found[name] is None for found in ranks), name
        elif name in chunked:
            whole = torch.cat([found[name] for found in ranks], dim=chunked[name])
            assert whole.shape == x.shape
            assert oracle.error(whole, x) < bound, name
        elif name in ("d_weight", "d_bias"):
            if parts:
                assert oracle.error(total(found[name] for found in ranks), x) < bound, name
        else:
            for found in ranks:
                assert torch.equal(found[name].nan_to_num(), ranks[0][name].nan_to_num()), f"{name}: ranks differ"
                torch.testing.assert_close(
                    found[name], x, rtol=bound, atol=bound, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize(("world", "cut", "name"), CUT_CASES)
def test_rows_in_parts_are_whole_rows(found, world, cut, name):
    check([rank["cases"][f"{name}, {cut}"] for rank in found], CASES[name], cut)


def plain_logps(full: dict, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Log-prob of each target in float64, 0 where ignored."""
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    z = 5.0 * torch.tanh(0.5 * z / 5.0) / 0.7
    y = full["targets"]
    logp = z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return torch.where(y == oracle.IGNORE, 0.0, logp)


def test_the_losses_are_those_of_plain_code(two, four):
    """DPO, SimPO with SFT, and GRPO, written out in float64."""
    full = whole_rows(CASES["dpo"])
    logp = plain_logps(full, full["hidden"], full["weight"], full["bias"])
    ref = plain_logps(full, full["ref_hidden"], full["ref_weight"], None)
    scored = full["targets"] != oracle.IGNORE
    assert scored.any(1).all()
    (w, lo), (rw, rl), (nw, nl) = (x.sum(1).chunk(2) for x in (logp, ref, scored))
    ratio, a = (logp - full["old_logp"]).exp(), full["advantage"][:, None]
    simpo, sft = xf.METHODS["simpo"].defaults, xf.METHODS["sft"].denominator
    nll = -{"tokens": w.sum() / nw.sum(), "row_means": (w / nw).mean()}.get(sft, w.mean())
    want = {
        "dpo": -logsigmoid(0.1 * ((w - rw) - (lo - rl))).mean(),
        "simpo + sft": -logsigmoid(simpo["beta"] * (w / nw - lo / nl) - simpo["gamma"]).mean() + 0.5 * nll,
        "by token": -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * scored,
    }
    for ranks in (two, four):
        for name, loss in want.items():
            torch.testing.assert_close(ranks[0]["cases"][f"{name}, ragged"]["loss"], loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["dpo", "tdpo, packed", "entropy"])
def test_rows_and_vocabulary_in_parts(four, name):
    """On two axes of a mesh: the same loss and states everywhere; the parts of the head's gradient as on each axis."""
    case = CASES[name]
    found = [rank["mesh"][name] for rank in four]
    for part in (0, 1):
        check(found[part::2], case, "ragged", parts=False)
    want = call(case)
    for n in ("d_weight", "d_bias"):
        halves = [found[part][n] + found[part + 2][n] for part in (0, 1)]
        assert oracle.error(torch.cat(halves), want[n]) < TOLERANCE[case.dtype], n


# Bytes that rank 0 sends, of chunks that are padded to 8 positions of 6 rows, or to 21 positions: the header; targets
# (8), the columns by token (8) and what must be the same; and the statistics of tokens.
COSTS = {
    "dpo": [64, 48 * 8, 48 * 8 * 2],  # logp, and the reference's
    "tdpo, packed": [64, 21 * 8 + 7 * 8, 21 * 4 * 3],  # with kl, in float32
    "entropy": [64, 48 * 16 + 6 * 8, 48 * 8 * 2],
    "simpo + sft": [64, 48 * 8, 48 * 8],
    "shift_labels": [4 * 8],  # of three rows
}


@pytest.mark.parametrize("name", COSTS)
def test_what_a_call_exchanges(two, name):
    """Three all-gathers in the forward, none in the backward, and no size that knows the vocabulary or the width."""
    assert [rank["costs"][name] for rank in two] == [COSTS[name]] * 2


def test_the_gathers_are_all_collectives(two):
    assert [rank["costs"]["collectives"] for rank in two] == [3, 3]


@pytest.mark.parametrize("world", [2, 4])
def test_labels_at_the_seams(found, world):
    labels = oracle.tokens((3, 10), VOCAB, 0.1)
    want = xf.shift_labels(labels)
    seams = [rank["seams"] for rank in found]
    for widths in (n for n in seams[0] if n.startswith("(")):
        packed = widths.endswith("packed")
        joined = torch.cat([x[widths] for x in seams], dim=-1)
        assert torch.equal(joined, want[0] if packed else want), widths
    assert torch.equal(torch.cat([x["chunk"] for x in seams], dim=1), want)


@pytest.mark.parametrize("world", [2, 4])
def test_labels_that_are_shifted_locally_have_another_loss(found, world):
    loss = {how: found[0]["seams"][f"loss {how}"] for how in ("before", "by row_shard", "locally")}
    whole = xf.Objective("simpo")(
        oracle.normal(2, 10, WIDTH, seed=1), oracle.normal(VOCAB, WIDTH, seed=2),
        xf.shift_labels(oracle.tokens((3, 10), VOCAB, 0.1)[:2]),
    )  # fmt: skip
    torch.testing.assert_close(loss["before"], whole.loss, rtol=1e-10, atol=1e-10)
    assert torch.equal(loss["by row_shard"], loss["before"])
    assert abs(loss["locally"] - loss["before"]) > 1e-3


# The pieces of a row that each rank has, in the head-tail order of torch's context_parallel.
HEAD_TAIL = {2: [(0, 3), (1, 2)], 4: [(0, 7), (1, 6), (2, 5), (3, 4)]}


@pytest.mark.parametrize("world", HEAD_TAIL)
def test_balanced_chunks(found, world):
    want = balanced_call(None)
    size = 16 // (2 * world)
    for rank, pieces in zip(found, HEAD_TAIL[world], strict=True):
        at = torch.cat([torch.arange(size * k, size * (k + 1)) for k in pieces])
        own = rank["balanced"]
        assert torch.equal(own["targets"], want["targets"][:, at])
        torch.testing.assert_close(own["loss"], want["loss"], rtol=1e-10, atol=1e-10)
        assert oracle.error(own["d_hidden"], want["d_hidden"][:, at]) < 1e-10
        assert "need rows of a multiple of" in own["errors"][0]
        assert "two pieces of equal width, got [3, 4" in own["errors"][1]
    assert oracle.error(total(rank["balanced"]["d_weight"] for rank in found), want["d_weight"]) < 1e-10


def test_sums_of_rows(two):
    full = whole_rows(CASES["dpo"])
    hidden, weight = full["hidden"].requires_grad_(), full["weight"].requires_grad_()
    z = hidden @ weight.T
    y = full["targets"]
    logp = torch.where(y == -100, 0.0, z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0])
    (logp.sum(1) * torch.arange(1.0, 7.0)).sum().backward()
    packed = whole_rows(CASES["dpo, packed"])
    flat = xf.token_logps(packed["hidden"], weight, packed["targets"]).detach()
    for rank in two:
        torch.testing.assert_close(rank["rows"]["logps"], logp.detach().sum(1), rtol=1e-10, atol=1e-10)
        assert rank["rows"]["lengths"].tolist() == (y != -100).sum(1).tolist()
        sums = oracle.row_sums(flat, packed["targets"], torch.tensor(ENDS))[0]
        torch.testing.assert_close(rank["rows"]["packed"], sums, rtol=1e-10, atol=1e-10)
    assert oracle.error(torch.cat([rank["rows"]["d_hidden"] for rank in two], dim=1), hidden.grad) < 1e-10
    assert oracle.error(total(rank["rows"]["d_weight"] for rank in two), weight.grad) < 1e-10


def test_parts_of_dw_are_added_to_a_buffer(two):
    full = whole_rows(CASES["dpo"])
    weight = full["weight"].requires_grad_()
    xf.Objective("dpo")(full["hidden"], weight, full["targets"], ref_hidden=full["ref_hidden"]).loss.backward()
    assert oracle.error(total(rank["rows"]["weight_grad"] for rank in two), weight.grad) < 1e-10


def test_the_plan_of_a_chunk(two):
    plans = [rank["rows"]["plan"] for rank in two]
    targets = whole_rows(CASES["dpo"])["targets"]
    assert [plan.tokens for plan in plans] == [int((x != -100).sum()) for x in targets.split((5, 8), dim=1)]
    assert [plan.passes for plan in plans] == [5, 5]  # 4F, and 1F for the reference
    assert all("rows are cut over 2 ranks" in str(plan) and "live" not in str(plan) for plan in plans)


@pytest.mark.skipif(sys.platform != "linux", reason="the extra [dev] has DeepSpeed on Linux alone")
@pytest.mark.parametrize("name", ["summed, dpo", "summed, simpo", "DDP, simpo", "ZeRO-2, dpo", "ZeRO-3, dpo"])
def test_a_model_under_ulysses_is_a_model_of_whole_rows(two, name):
    """Summed over the ranks of a row, as ZeRO-2 does; or averaged over them, as DDP and ZeRO-3 do."""
    model = tiny_model()
    want = model_loss(model, name.split(", ")[1])
    want.backward()
    for rank in two:
        loss, grads = rank["ulysses"][name]
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        for n, p in model.named_parameters():
            assert oracle.error(grads[n], p.grad) < 1e-5, n


FITTING = "the ranks of row_shard must give the same"
REFUSALS = {
    "another row count": f"{FITTING} number of rows, got [6, 1]",
    "other offsets": "cu_seqlens is not by token and must be the same on all ranks",
    "offsets too short": "cu_seqlens must rise from 0 to the number of positions, 31",
    "another column": "advantage is not by token and must be the same on all ranks",
    "another dtype": f"{FITTING} names, dtypes and shapes of inputs",
    "a chunk of another width": ("rank 1 of row_shard refuses its part", "old_logp must be (21,), as this rank's"),
    "one rank's operands": ("rank 1 of row_shard refuses its part", "weight must be (V, D) with D = 6"),
    "one rank's column": f"{FITTING} names, dtypes and shapes of inputs",
    "a column that learns": "advantage has a gradient of its own, which every rank of row_shard would add",
    "another setting": f"{FITTING} settings of the objective",
    "another temperature": f"{FITTING} settings of the objective and scalars of the call",
    "another denominator": "denominator is not by token and must be the same",
    "a target too large": "target 23 at position 13 is outside the vocabulary of 23 tokens",
    "no chunk": "row_shard takes this rank's chunk of each row",
    "no shard": "row_shard must be a RowShard(group), got ProcessGroup",
    "cringe": "cringe draws a rival of each rejected token of whole rows",
    "one group twice": "row_shard and vocab_shard are over one group",
    "compiled": "torch.compile and CUDA graphs cannot record",
    "by token or by row": "is on some ranks of row_shard either one entry per token or one per row",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_call_that_does_not_fit_is_refused_on_all_ranks(two, name):
    want = REFUSALS[name]
    for rank, part in zip(two, want if isinstance(want, tuple) else (want, want), strict=True):
        assert part in rank["refusals"][name]


def test_after_refusals_the_ranks_are_in_step(two):
    assert two[0]["refusals"]["still in step"] == two[1]["refusals"]["still in step"]


@pytest.mark.parametrize("name", ["tp_size", "cp_size"])
def test_trainers_keep_layers_whole(tmp_path, name):
    """Refused where it is asked for, and where `accelerate launch` has configured it."""
    from accelerate import ParallelismConfig

    from xpo_fast.trainer import XPOConfig
    from xpo_fast.trainer.arguments import check_parallelism

    whole = f"{name}=2 of parallelism_config: this trainer keeps layers and the order of tokens whole"
    with pytest.raises(ValueError, match=whole):
        XPOConfig(output_dir=str(tmp_path), use_cpu=True, parallelism_config=ParallelismConfig(**{name: 2}))
    sizes = {"tp_size": 1, "cp_size": 1, "sp_size": 1}
    with pytest.raises(ValueError, match=whole):
        check_parallelism(splits_rows=True, **{**sizes, name: 2})
    with pytest.raises(ValueError, match=f"{name}=2, sp_size=2 of parallelism_config: this trainer keeps rows and"):
        check_parallelism(**{**sizes, "sp_size": 2, name: 2})
    check_parallelism(**sizes)
    check_parallelism(splits_rows=True, **{**sizes, "sp_size": 2})


def test_rows_are_cut_over_a_process_group():
    with pytest.raises(ValueError, match=r"cut over the ranks of a process group: call init_process_group\(\) first"):
        xf.RowShard()
