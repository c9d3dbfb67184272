"""invariant=True: a row's log-prob has the same bits alone, in any batch, padded or packed, by any tile, on any rank.

Values and gradients are held to plain float64 computations as well, as those of the default path are.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

import oracle
import xpo_fast as xf
from ranks import found_by
from xpo_fast.head import head_plan, invariance
from xpo_fast.head.gemms import Gemms
from xpo_fast.head.row_operations import row_blocks
from xpo_fast.head.rows import sum_rows

IGNORE = -100
VOCAB, WIDTH, RANK, ROWS = 1009, 33, 5, 40  # odd sizes: rows of logits start anywhere in a cache line
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
EVERYTHING = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5}
CASES = [
    ("float32", "plain"),
    ("float32", "everything"),
    ("float32", "adapter"),
    ("bfloat16", "plain"),
    ("bfloat16", "adapter"),
    ("float64", "everything"),
]


class Case:
    """A pool of ragged rows, a head and the options of a call."""

    def __init__(self, dtype: str, kind: str) -> None:
        kind_dtype = DTYPES[dtype]
        wide = torch.promote_types(kind_dtype, torch.float32)  # of bias and adapter
        lengths = torch.randint(1, 10, (ROWS,), generator=torch.Generator().manual_seed(1)).tolist()
        lengths[0], lengths[1] = 1, 150  # a row of one token, and one longer than a product
        width = WIDTH + RANK * (kind == "adapter")
        self.hidden = [oracle.normal(n, width, seed=10 + i, dtype=kind_dtype) for i, n in enumerate(lengths)]
        self.targets = [oracle.tokens((n,), VOCAB, ignored=0.2, seed=10 + i) for i, n in enumerate(lengths)]
        self.weight = oracle.normal(VOCAB, WIDTH, seed=1, std=0.3, dtype=kind_dtype)
        self.options: dict = {}
        if kind == "everything":
            self.options = {**EVERYTHING, "bias": oracle.normal(VOCAB, seed=2, dtype=wide)}
        elif kind == "adapter":
            self.options = {"adapter": oracle.normal(VOCAB, RANK, seed=3, dtype=wide)}

    def packed(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = [len(self.targets[i]) for i in rows]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        return torch.cat([self.hidden[i] for i in rows]), torch.cat([self.targets[i] for i in rows]), offsets

    def padded(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = pad_sequence([self.hidden[i] for i in rows], batch_first=True, padding_value=math.nan)
        return hidden, pad_sequence([self.targets[i] for i in rows], batch_first=True, padding_value=IGNORE)

    def score(self, rows: list[int], packed: bool = True, **options) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The log-probs of each row, and their sums."""
        options = {"invariant": True, **self.options, **options}
        if packed:
            hidden, targets, offsets = self.packed(rows)
            logps = list(xf.token_logps(hidden, self.weight, targets, **options).split(offsets.diff().tolist()))
            return logps, xf.sequence_logps(hidden, self.weight, targets, cu_seqlens=offsets, **options)[0]
        hidden, targets = self.padded(rows)
        logps = xf.token_logps(hidden, self.weight, targets, **options)
        logps = [x[: len(self.targets[i])] for i, x in zip(rows, logps, strict=True)]
        return logps, xf.sequence_logps(hidden, self.weight, targets, **options)[0]


@cache
def case_of(dtype: str, kind: str) -> Case:
    return Case(dtype, kind)


@cache
def alone(dtype: str, kind: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The log-probs of each row of the pool and their sums, each row in a call of its own."""
    found = [case_of(dtype, kind).score([i]) for i in range(ROWS)]
    return [logps[0] for logps, _ in found], torch.cat([sums for _, sums in found])


def assert_as_alone(dtype: str, kind: str, rows: list[int], **how) -> None:
    logps, sums = case_of(dtype, kind).score(rows, **how)
    want, want_sums = alone(dtype, kind)
    for i, x in zip(rows, logps, strict=True):
        assert torch.equal(x, want[i]), (i, rows, how)
    assert torch.equal(sums, want_sums[rows])


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_row_has_the_bits_that_it_has_alone(dtype, kind, data):
    rows = data.draw(st.permutations(range(ROWS)))[: data.draw(st.integers(2, ROWS))]
    how = {
        "packed": data.draw(st.booleans()),
        "chunk_tokens": data.draw(st.sampled_from([None, 1, 100, 128, 300])),
        "tile_bytes": data.draw(st.sampled_from([None, 1, 10**6])),
    }
    assert_as_alone(dtype, kind, rows, **how)


@pytest.mark.parametrize(("dtype", "kind"), CASES)
def test_threads_make_no_difference(dtype, kind):
    rows = list(range(ROWS))
    with threads(1):
        alone(dtype, kind)
    with threads(2):
        assert_as_alone(dtype, kind, rows)
        assert_as_alone(dtype, kind, [0])


@pytest.mark.parametrize("invariant", [True, False])
def test_the_default_has_other_bits(invariant):
    """The control: by default a row alone and in a batch differ, in what the tests above compare.

    A library may multiply one row as it does many; there the control has nothing to show, and says so. What is
    promised, invariant=True, is asserted on every machine.
    """
    differ = 0
    for dtype, kind in CASES:
        case = case_of(dtype, kind)
        logps, _ = case.score(list(range(ROWS)), invariant=invariant)
        singles = [case.score([i], invariant=invariant)[0][0] for i in range(ROWS)]
        differ += sum(not torch.equal(a, b) for a, b in zip(logps, singles, strict=True))
    if invariant:
        assert differ == 0
    elif not differ:
        pytest.skip("this machine multiplies one row as it does many")


@pytest.mark.parametrize(("vocab", "rows"), [(1009, 128), (49_152, 8), (150_000, 2), (900_000, 2)])
def test_row_operations_have_one_shape(vocab, rows):
    """And no row is alone: torch sums a single one of more than 32768 numbers by parts, one for each thread."""
    tile = torch.empty(256, vocab)
    assert list(row_blocks(tile, 128)) == [slice(i, i + rows) for i in range(0, 256, rows)]


OUTPUTS = ("entropy", "kl", "reverse_kl", "log_sum_sq_probs", "mean_logit", "top1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_statistic_has_the_same_bits(dtype):
    case = case_of(dtype, "plain")
    hidden, targets, _ = case.packed(list(range(2, 30)))
    ref = oracle.normal(*hidden.shape, seed=77, dtype=hidden.dtype)

    def stats(at: slice, **options) -> dict[str, torch.Tensor]:
        found = xf.token_stats(
            hidden[at], case.weight, targets[at], outputs=OUTPUTS, ref_hidden=ref[at], invariant=True, **options
        )
        return {name: getattr(found, name) for name in ("logp", "lse", *OUTPUTS)}

    want = stats(slice(None))
    for at in (slice(0, 1), slice(5, 7), slice(3, 100)):
        for name, x in stats(at, chunk_tokens=128).items():
            assert torch.equal(x, want[name][at]), name


@pytest.mark.parametrize("learn", ["hidden", "hidden weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_hidden_state_has_the_same_bits(dtype, learn):
    case = case_of(dtype, "plain")
    hidden, targets, _ = case.packed([1, 2, 3])

    def gradient(at: slice, **options) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = hidden[at].clone().requires_grad_()
        weight = case.weight.clone().requires_grad_("weight" in learn)
        logp = xf.token_logps(leaf, weight, targets[at], invariant=True, **options)
        (logp * 3).sum().backward()
        assert leaf.grad is not None
        return leaf.grad, logp.detach()

    want, logps = gradient(slice(None))
    assert torch.equal(logps, xf.token_logps(hidden, case.weight, targets, invariant=True))
    for at in (slice(4, 5), slice(20, 23), slice(100, None)):
        found, logp = gradient(at, chunk_tokens=128)
        assert torch.equal(found, want[at])
        assert torch.equal(logp, logps[at])


def test_a_compiled_call_has_the_same_bits():
    case = case_of("float32", "plain")
    hidden, targets, offsets = case.packed(list(range(8)))

    def call(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return xf.sequence_logps(hidden, weight, targets, cu_seqlens=offsets, invariant=True)[0]

    compiled = torch.compile(call, backend="aot_eager")
    assert torch.equal(compiled(hidden, case.weight), alone("float32", "plain")[1][:8])


# --- ranks ------------------------------------------------------------------------------------------------------------


def run_ranks(rank: int) -> dict:
    """Scores every other row, then this rank's chunk of every row, and tries a vocabulary that is cut."""
    case = Case("float32", "plain")
    found: dict = {"rows": case.score(list(range(rank, ROWS, 2)))}
    shard = xf.RowShard()
    hidden, targets = case.padded([1, 2, 3, 4])
    options = {"row_shard": shard, "invariant": True}
    found["sums"] = xf.sequence_logps(shard.chunk(hidden, 1), case.weight, shard.chunk(targets), **options)[0]
    objective = xf.Objective("simpo", beta=2.0, gamma=0.5, reduction="none", invariant=True)
    found["pairs"] = objective(shard.chunk(hidden, 1), case.weight, shard.chunk(targets), row_shard=shard).loss
    own = VOCAB // 2 if rank == 0 else VOCAB - VOCAB // 2
    cut = xf.VocabShard.agree(own)
    try:
        xf.token_logps(hidden[0], case.weight[cut.start :][:own], targets[0], vocab_shard=cut, invariant=True)
    except ValueError as error:
        found["refused"] = str(error)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return found_by(tmp_path_factory, 2, run_ranks)


def test_ranks_have_the_bits_of_one_process(ranks):
    logps, sums = alone("float32", "plain")
    for rank, found in enumerate(ranks):
        for i, x in zip(range(rank, ROWS, 2), found["rows"][0], strict=True):
            assert torch.equal(x, logps[i])
        assert torch.equal(found["rows"][1], sums[rank::2])


def test_rows_over_ranks_have_the_bits_of_whole_rows(ranks):
    case = case_of("float32", "plain")
    objective = xf.Objective("simpo", beta=2.0, gamma=0.5, reduction="none", invariant=True)
    for found in ranks:
        assert torch.equal(found["sums"], alone("float32", "plain")[1][[1, 2, 3, 4]])
        assert torch.equal(found["pairs"], objective(*_at(case, [1, 2, 3, 4])).loss)


def test_a_cut_vocabulary_is_refused(ranks):
    assert all("leave out vocab_shard, or invariant" in found["refused"] for found in ranks)


def _at(case: Case, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, targets = case.padded(rows)
    return hidden, case.weight, targets


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_the_loss_of_a_pair_does_not_depend_on_the_other_pairs(name):
    case = case_of("float32", "plain")
    objective = xf.Objective(name, reduction="none", invariant=True)
    ref = oracle.normal(ROWS, seed=5, dtype=torch.float32)

    def losses(pairs: list[tuple[int, int]]) -> torch.Tensor:
        rows = [w for w, _ in pairs] + [x for _, x in pairs]
        hidden, targets, offsets = case.packed(rows)
        given: Any = {} if name == "simpo" else {"ref_logps": ref[rows]}
        return objective(hidden, case.weight, targets, cu_seqlens=offsets, **given).loss

    pairs = [(i, i + 20) for i in range(2, 20)]
    want = losses(pairs)
    assert (want != 0).sum() > 12  # the rest are pairs without a scored token on one side
    for some in ([0], [7, 3], [17, 4, 9, 2, 11]):
        assert torch.equal(losses([pairs[i] for i in some]), want[some])


def test_the_gradient_of_a_pair_at_a_trainable_head():
    """Gradients that are made while a pair's tile is live: ∂L/∂hidden of its rows, whatever the other pairs."""
    case = case_of("float32", "plain")
    objective = xf.Objective("simpo", reduction="sum", invariant=True)

    def gradients(pairs: list[tuple[int, int]]) -> list[torch.Tensor]:
        rows = [w for w, _ in pairs] + [x for _, x in pairs]
        hidden, targets, offsets = case.packed(rows)
        hidden.requires_grad_()
        weight = case.weight.clone().requires_grad_()
        assert objective.plan(hidden, weight, targets, cu_seqlens=offsets).passes == 3
        objective(hidden, weight, targets, cu_seqlens=offsets).loss.backward()
        assert hidden.grad is not None
        return list(hidden.grad.split(offsets.diff().tolist()))

    pairs = [(i, i + 20) for i in range(2, 20)]
    want = gradients(pairs)
    w, x = gradients([pairs[5]])
    assert w.abs().max() > 0
    assert torch.equal(w, want[5])
    assert torch.equal(x, want[5 + len(pairs)])


def test_the_first_update_has_a_ratio_of_exactly_one():
    """Log-probs of a rollout that are recomputed in other micro-batches: exp(logp − old_logp) is 1 in every bit."""
    case = case_of("bfloat16", "plain")
    rows = list(range(2, 18))
    parts = [case.score(rows[i : i + 4], packed=False)[0] for i in range(0, 16, 4)]
    old = pad_sequence([x for part in parts for x in part], batch_first=True)
    hidden, targets = case.padded(rows)
    advantage = torch.linspace(-1, 1, 16)
    objective = xf.Objective("grpo", reduction="none", beta=0.0, invariant=True)
    losses = objective(hidden, case.weight, targets, old_logp=old, advantage=advantage).loss
    scored = targets != IGNORE
    assert torch.equal(losses[scored], -advantage[:, None].expand_as(losses)[scored])


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), CASES)
@pytest.mark.parametrize("rows", [[0], list(range(20)), [1, 2, 3]], ids=["one token", "many", "two products"])
def test_values_and_gradients_are_those_of_float64(dtype, kind, rows):
    case = case_of(dtype, kind)
    hidden, targets, _ = case.packed(rows)
    targets = targets.where(targets != IGNORE, IGNORE if len(rows) > 1 else 3)
    names = ["hidden", "weight", *(n for n in ("bias", "adapter") if n in case.options)]
    given = [hidden, case.weight, *(case.options[n] for n in names[2:])]
    found = [x.clone().requires_grad_() for x in given]
    plain = [x.double().clone().requires_grad_() for x in given]
    u = oracle.normal(*targets.shape, seed=9)

    options = {n: x for n, x in case.options.items() if n in EVERYTHING}
    leaves = dict(zip(names, found, strict=True))
    logp = xf.token_logps(leaves.pop("hidden"), leaves.pop("weight"), targets, **leaves, **options, invariant=True)
    (logp * u.to(logp.dtype)).sum().backward()

    exact = dict(zip(names, plain, strict=True))
    weight = torch.cat([exact["weight"], exact["adapter"]], 1) if "adapter" in exact else exact["weight"]
    z = exact["hidden"] @ weight.T
    if "bias" in exact:
        z = 5 * torch.tanh(0.5 * (z + exact["bias"]) / 5) / 0.7
    want = z.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0] * (targets != IGNORE)
    (want * u).sum().backward()

    tight = {"float32": 1e-5, "bfloat16": 1e-5, "float64": 1e-12}[dtype]
    if not (dtype == "bfloat16" and kind == "adapter"):  # whose adapter is rounded to bfloat16 first
        assert (logp - want).abs().max() <= tight * (1 + want.abs().max())
    loose = {"float32": 1e-5, "bfloat16": 1e-2, "float64": 1e-12}[dtype]
    for name, a, b in zip(names, found, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() <= loose * b.grad.norm(), name


def test_sums_are_exact_in_any_order():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator) * 10 ** torch.randint(-6, 7, (500,), generator=generator)
    rows = torch.randint(0, 7, (500,), generator=generator)
    want = torch.tensor([math.fsum(x[rows == r].tolist()) for r in range(7)])  # rounded once
    assert torch.equal(sum_rows(x, rows, 7, exact=True), want)
    order = torch.randperm(500, generator=generator)
    assert torch.equal(sum_rows(x[order], rows[order], 7, exact=True), want)
    assert not torch.equal(sum_rows(x, rows, 7), want)  # the control: float32 adds up otherwise


def test_sums_of_what_no_integer_holds():
    big = torch.finfo(torch.float32).min
    x = torch.tensor([-math.inf, 1.0, math.nan, 2.0, big, 3.0, 0.5, -0.25])
    found = sum_rows(x, torch.tensor([0, 0, 1, 1, 2, 2, 4, 4]), 5, exact=True)
    assert found[0] == -math.inf
    assert found[1].isnan()
    assert found[2:].tolist() == [big, 0.0, 0.25]


def test_the_gradient_of_exact_sums():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    sums = sum_rows(x, torch.tensor([1, 0, 1]), 2, exact=True)
    assert sums.tolist() == [2.0, 4.0]
    (sums * torch.tensor([10.0, 7.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [7.0, 10.0, 7.0]


# --- the plan, and what is refused ------------------------------------------------------------------------------------


def test_the_plan_says_what_it_costs():
    hidden, weight = torch.zeros(300, WIDTH), torch.zeros(VOCAB, WIDTH)
    plan = head_plan(hidden, weight, invariant=True, chunk_tokens=1)
    assert plan.tiling.block == plan.tile_tokens == 128
    assert plan.tile_bytes == 128 * VOCAB * 4
    assert "every product is of 128 tokens, the last of them filled up with zeros" in str(plan)
    assert head_plan(hidden, weight, invariant=True, chunk_tokens=300).tile_tokens == 256
    assert head_plan(hidden, weight, chunk_tokens=300).tiling.block == 0
    plan = xf.Objective("simpo", invariant=True).plan(torch.zeros(2, 5, WIDTH), weight, torch.ones(2, 5).long())
    assert plan.tiling.block == 128
    assert plan.tile_bytes == 128 * VOCAB * 4  # of ten tokens


@pytest.mark.parametrize("backend", ["dense", "triton", "cuda"])
def test_another_backend_is_refused(backend):
    hidden, weight, targets = torch.zeros(3, WIDTH), torch.zeros(VOCAB, WIDTH), torch.zeros(3).long()
    with pytest.raises(ValueError, match=f"takes the torch backend, got '{backend}'"):
        xf.token_logps(hidden, weight, targets, backend=backend, invariant=True)
    with pytest.raises(ValueError, match=f"takes the torch backend, got '{backend}'"):
        xf.Objective("dpo", backend=backend, invariant=True)


def test_a_backend_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="no backend named 'torhc'"):
        xf.token_logps(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long(), backend="torhc", invariant=True)


def test_the_variable_of_the_backend_is_not_read(monkeypatch):
    monkeypatch.setenv("XPO_FAST_BACKEND", "dense")
    plan = head_plan(torch.zeros(3, 4), torch.zeros(5, 4), invariant=True)
    assert plan.backend == "torch"
    objective = xf.Objective("simpo", invariant=True)
    assert objective.plan(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.ones(2, 3).long()).backend == "torch"


def test_what_an_objective_refuses():
    with pytest.raises(ValueError, match="invariant=True does not go with cringe"):
        xf.Objective("cringe", invariant=True)
    wrong: Any = 1
    with pytest.raises(ValueError, match="expected invariant to be bool, got 1"):
        xf.Objective("dpo", invariant=wrong)


def test_the_trainers_refuse_it_by_name():
    from xpo_fast.trainer.config import MethodConfig

    config: Any = SimpleNamespace(tile_mib=None, method_args={"invariant": True}, method="simpo", backend="auto")
    with pytest.raises(ValueError, match="invariant cannot be in method_args"):
        MethodConfig.objective(config)


def test_products_that_depend_on_the_place_are_refused(monkeypatch):
    """A library that multiplies the last row of a product otherwise, as one might at the edge of its tiles."""
    multiply = Gemms._logits

    def otherwise(self, h, weight, block, out):
        multiply(self, h, weight, block, out)
        out[-1] *= 1 + 1e-6

    monkeypatch.setattr(Gemms, "_logits", otherwise)
    monkeypatch.setattr(invariance, "_checked", set())
    call = partial(xf.token_logps, torch.ones(3, 7), oracle.normal(50, 7, seed=0).float(), torch.zeros(3).long())
    with pytest.raises(RuntimeError, match=r"of 128 equal rows.* not all results are equal"):
        call(invariant=True)
    call()
