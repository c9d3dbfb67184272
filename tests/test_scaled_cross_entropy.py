"""Liger's fused scaled cross-entropy and the frameworks' log-prob functions, on this engine.

Against Liger 0.8.5's own function where both are right (float32, 1e-5), and against all logits in float64.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from peers import peer
from ranks import found_by
from xpo_fast.integrations import liger as ours
from xpo_fast.integrations import logps

IGNORE = -100
OURS = ours.LigerFusedLinearScaledCrossEntropyFunction
TP = ours.LigerFusedLinearScaledCrossEntropyTPFunction
FP32 = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def liger():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever Liger and what it imports have to say on import
        return peer("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel", "0.8.")


def theirs() -> Any:
    return liger().LigerFusedLinearScaledCrossEntropyFunction


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    upstream: tuple[torch.Tensor, ...]  # of nll, entropy, selected log-probs


IDS = torch.tensor([3, 0, 3, 130])


def case(n=37, vocab=131, width=11, *, dtype=torch.float32, ignored=0.3) -> Case:
    hidden = oracle.normal(n, width, seed=1, dtype=dtype)
    weight = oracle.normal(vocab, width, seed=2, std=0.7, dtype=dtype)
    upstream = tuple(oracle.normal(*shape, seed=k, dtype=torch.float32) for k, shape in enumerate([(n,), (n,), (n, 4)]))
    return Case(hidden, weight, oracle.tokens((n,), vocab, ignored), upstream)


def run(function: Any, of: Case, *arguments, learn="hidden weight", into=(0, 1, 2), dtype=None, first=None, **options):
    """The results as a tuple, and the gradients of the leaves that `learn` names from those results in `into`."""
    leaves = {
        name: x.detach().to(dtype or x.dtype).requires_grad_(name in learn)
        for name, x in (("hidden", of.hidden), ("weight", of.weight if first is None else first))
    }
    out = function(leaves["hidden"], leaves["weight"], of.target, *arguments, **options)
    out = out if isinstance(out, tuple) else (out,)
    kinds = [0] + [1] * bool(options.get("return_entropy")) + [2] * (options.get("selected_token_ids") is not None)
    assert len(out) == len(kinds)
    loss = sum((x * of.upstream[k].to(x.dtype)).sum() for x, k in zip(out, kinds, strict=True) if k in into)
    wanted = [x for x in leaves.values() if x.requires_grad]
    grads = torch.autograd.grad(loss, wanted) if wanted else ()
    return [x.detach() for x in out], dict(zip((n for n, x in leaves.items() if x.requires_grad), grads, strict=True))


# --- the surface -------------------------------------------------------------------------------------------


def shown(function: Any, *left_out: str) -> list[tuple]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters if p.name not in left_out]


def test_signatures():
    added = "selected_token_ids"  # to the tensor-parallel form
    assert shown(OURS.apply) == shown(theirs().apply)
    assert OURS.apply is ours.liger_fused_linear_scaled_cross_entropy
    assert shown(TP.apply, added) == shown(liger().LigerFusedLinearScaledCrossEntropyTPFunction.apply)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = peer("liger_kernel.transformers.functional", "liger-kernel", "0.8.")
    assert shown(ours.liger_fused_linear_scaled_cross_entropy_tp, added) == shown(
        functional.liger_fused_linear_scaled_cross_entropy_tp
    )


def test_everything_of_this_kind_that_liger_exports_is_here():
    names = [name for name in liger().__all__ if "ScaledCrossEntropy" in name]
    assert len(names) == 2 and set(names) <= set(ours.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_of_the_results(dtype):
    of = case(dtype=dtype)
    operands = of.hidden, of.weight, of.target
    for options in ({}, {"return_entropy": True}, {"selected_token_ids": IDS}):
        found, expected = OURS.apply(*operands, **options), theirs().apply(*operands, **options)
        assert isinstance(found, tuple) == isinstance(expected, tuple)
        for x, y in zip(
            found if isinstance(found, tuple) else [found],
            expected if isinstance(expected, tuple) else [expected],
            strict=True,
        ):
            assert x.shape == y.shape and x.dtype == torch.float32  # of bf16 operands, Liger's entropy is bf16
    target = of.target.clamp(min=0)
    by_position = OURS.apply(of.hidden, of.weight, target, 0.7, 5, 2, True, IDS)
    assert len(by_position) == 3 and not by_position[0][target == 5].any()


# --- parity ------------------------------------------------------------------------------------------------

OPTIONS = {
    "defaults": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3},
    "entropy": {"return_entropy": True},
    "ids": {"selected_token_ids": IDS, "temperature": 1.3},
    "all": {"temperature": 0.6, "return_entropy": True, "selected_token_ids": IDS},
    "no ids": {"selected_token_ids": IDS[:0], "return_entropy": True},
}


@pytest.mark.parametrize("learn", ["hidden weight", "hidden", "weight", ""])
@pytest.mark.parametrize("name", OPTIONS)
def test_parity(name, learn):
    options, of = OPTIONS[name], case()
    if name == "no ids":
        of = of._replace(upstream=(*of.upstream[:2], torch.zeros(37, 0)))
    found, expected = run(OURS.apply, of, learn=learn, **options), run(theirs().apply, of, learn=learn, **options)
    assert_close(found, expected, **FP32)


@pytest.mark.parametrize("into", [(0,), (1,), (2,), (0, 2)])
def test_parity_of_a_loss_of_some_results(into):
    of = case()
    assert_close(
        run(OURS.apply, of, into=into, **OPTIONS["all"]), run(theirs().apply, of, into=into, **OPTIONS["all"]), **FP32
    )


@pytest.mark.parametrize(
    ("shape", "ignored"), [((1, 2, 1), 0.0), ((6, 131, 4), 1.0), ((600, 131, 5), 0.4), ((530, 257, 16), 0.0)]
)
def test_parity_of_shapes(shape, ignored):
    """One token; none to score; more than one of Liger's chunks of 512."""
    of = case(*shape, ignored=ignored)
    options = {"return_entropy": True}
    assert_close(run(OURS.apply, of, **options), run(theirs().apply, of, **options), **FP32)


def test_another_ignore_index():
    of = case(ignored=0.0)
    target = of.target.masked_fill(of.target % 3 == 0, 7)
    of = of._replace(target=target)
    options = {"ignore_index": 7, "return_entropy": True}
    found = run(OURS.apply, of, **options)
    assert_close(found, run(theirs().apply, of, **options), **FP32)
    assert not found[0][0][target == 7].any() and not found[1]["hidden"][target == 7].any()


# --- 16 bit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(200, 1000, 64), (1100, 501, 32)])
def test_closer_to_float64_than_liger_by_ten_times_on_bf16_operands(shape):
    """Results by 10× and more. Gradients are rounded to bf16 in the end by both: ours are no worse than that alone."""
    of = case(*shape, dtype=torch.bfloat16)
    vocab = shape[1]
    options = {"return_entropy": True, "selected_token_ids": torch.tensor([1, 5, 5, vocab - 1])}
    exact = run(OURS.apply, of, dtype=torch.float64, **options)
    mine, other = run(OURS.apply, of, **options), run(theirs().apply, of, **options)
    scored = of.target != IGNORE
    _, every = oracle.logprobs(of.hidden.double(), of.weight.double())
    assert_close(exact[0][0][scored], -every[scored].gather(1, of.target[scored, None])[:, 0])
    assert_close(exact[0][1][scored], -(every.exp() * every).sum(1)[scored])
    for x, y, z in zip(mine[0], other[0], exact[0], strict=True):
        assert 10 * oracle.error(x, z) < oracle.error(y, z)
    for name, z in exact[1].items():
        rounded = oracle.error(z.bfloat16(), z)
        assert oracle.error(mine[1][name], z) < 1.02 * rounded
        assert oracle.error(other[1][name], z) > 2 * oracle.error(mine[1][name], z)


def test_float64():
    of = case(dtype=torch.float64)
    found, _ = run(OURS.apply, of, **OPTIONS["all"])
    assert [x.dtype for x in found] == [torch.float64] * 3


# --- what is refused, as Liger does it ---------------------------------------------------------------------


def changed(**new) -> dict:
    of = case()
    return {"_input": of.hidden, "weight": of.weight, "target": of.target, **new}


WRONG = {
    "m_tiles_per_cluster of no int": changed(m_tiles_per_cluster=1.0),
    "m_tiles_per_cluster of bool": changed(m_tiles_per_cluster=True),
    "m_tiles_per_cluster of 0": changed(m_tiles_per_cluster=0),
    "return_entropy of no bool": changed(return_entropy=1),
    "temperature of bool": changed(temperature=True),
    "temperature of a tensor": changed(temperature=torch.tensor(1.0)),
    "temperature of 0": changed(temperature=0.0),
    "temperature of nan": changed(temperature=float("nan")),
    "input of three axes": changed(_input=torch.zeros(1, 37, 11)),
    "target of two axes": changed(target=case().target[None]),
    "weight of one axis": changed(weight=torch.zeros(11)),
    "another number of tokens": changed(target=case().target[:-1]),
    "another width": changed(weight=torch.zeros(131, 12)),
    "no width": changed(_input=torch.zeros(37, 0), weight=torch.zeros(131, 0)),
    "no vocabulary": changed(weight=torch.zeros(0, 11), target=torch.full((37,), IGNORE)),
    "two dtypes": changed(weight=case().weight.bfloat16()),
    "integers": changed(_input=case().hidden.long(), weight=case().weight.long()),
    "target of int32": changed(target=case().target.int()),
    "target too large": changed(target=torch.full((37,), 131)),
    "target negative": changed(target=torch.full((37,), -1)),
    "no ignore_index": changed(ignore_index=None),
    "ids of a list": changed(selected_token_ids=[1, 2]),
    "ids of int32": changed(selected_token_ids=IDS.int()),
    "ids of two axes": changed(selected_token_ids=IDS[None]),
    "ids too large": changed(selected_token_ids=IDS + 1),
    "ids negative": changed(selected_token_ids=IDS - 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_of_ligers_types(name):
    with pytest.raises((TypeError, ValueError)) as expected:
        theirs().apply(**WRONG[name])
    with pytest.raises(expected.type):
        OURS.apply(**WRONG[name])


def test_what_is_taken_beyond_liger():
    nothing = OURS.apply(
        torch.zeros(0, 11), torch.zeros(131, 11), torch.zeros(0, dtype=torch.long), return_entropy=True
    )
    assert [x.shape for x in nothing] == [(0,), (0,)]
    of = case()
    of.hidden[of.target == IGNORE] = torch.nan
    assert all(x.isfinite().all() for x in run(OURS.apply, of, return_entropy=True)[1].values())


TP_WRONG = {
    "tiles_per_reduce of 3": ({"tiles_per_reduce": 3}, ValueError, "1 or 2 or 4, got 3"),
    "tiles_per_reduce of no int": ({"tiles_per_reduce": 2.0}, TypeError, "tiles_per_reduce must be an int"),
    "temperature": ({"temperature": -1}, ValueError, "finite and above 0, got -1"),
    "return_entropy": ({"return_entropy": None}, TypeError, "return_entropy must be a bool"),
    "no group": ({}, RuntimeError, "init_process_group"),
}


@pytest.mark.parametrize("name", TP_WRONG)
def test_errors_of_the_tensor_parallel_form(name):
    options, kind, message = TP_WRONG[name]
    with pytest.raises(kind, match=message):
        TP.apply(**changed(), tp_group=None, **options)


# --- the frameworks' functions -----------------------------------------------------------------------------

B, S, D, VOCAB = 3, 6, 11, 132  # a vocabulary that two ranks share equally


def rows_problem(dtype=torch.float64):
    hidden, weight = oracle.normal(B, S, D, seed=1, dtype=dtype), oracle.normal(VOCAB, D, seed=2, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), oracle.tokens((B, S), VOCAB, 0.0)


def every(hidden, weight, temperature=1.0):
    return ((hidden @ weight.T) / temperature).log_softmax(-1)


def check_same(found, expected, leaves):
    """Two differentiable results, and their gradients in the leaves."""
    assert found.shape == expected.shape
    assert_close(found, expected)
    u = oracle.normal(*found.shape, seed=9)
    grads = [torch.autograd.grad((x * u).sum(), leaves, retain_graph=True) for x in (found, expected)]
    assert_close(*grads)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhf(temperature):
    """labels are the sequences, rolled by one; a position that predicts nothing may be −100."""
    hidden, weight, tokens = rows_problem()
    labels = tokens.roll(-1, 1)
    expected = every(hidden, weight, temperature).gather(-1, labels[..., None])[..., 0]
    check_same(logps.openrlhf_log_probs(hidden, labels, temperature, head=weight), expected, [hidden, weight])
    assert_close(logps.openrlhf_log_probs(hidden, labels, temperature, head=xf.Head(weight)), expected)
    cut = labels.masked_fill(labels == labels[0, 0], IGNORE)
    assert not logps.openrlhf_log_probs(hidden, cut, head=weight)[cut == IGNORE].any()


@pytest.mark.parametrize("chunk_size", [-1, 4])
def test_slime(chunk_size):
    hidden, weight, tokens = rows_problem()
    h, y = hidden.flatten(0, 1), tokens.flatten()
    logp = every(h, weight, 0.7)
    found = logps.slime_log_probs_and_entropy(h, y, None, True, chunk_size, weight=weight, temperature=0.7)
    check_same(found[0], logp.gather(1, y[:, None]), [hidden, weight])
    check_same(found[1], -(logp.exp() * logp).sum(1), [hidden, weight])
    assert found[0].shape == (B * S, 1)  # its caller squeezes
    alone = logps.slime_log_probs_and_entropy(h, y, weight=weight)
    assert alone[1] is None
    detached = logps.slime_log_probs_and_entropy(h, y, None, True, with_entropy_grad=False, weight=weight)[1]
    assert not detached.requires_grad
    nothing = logps.slime_log_probs_and_entropy(h[:0], y[:0], None, True, weight=weight)
    assert nothing[0].shape == (0, 1) and nothing[1].shape == (0,)
    by_position = logps.slime_log_probs_and_entropy(h, y, None, True, chunk_size, None, False, weight=weight)
    assert not by_position[1].requires_grad
    with pytest.raises(ValueError, match="log_prob_keep_mask leaves tokens out of the softmax"):
        logps.slime_log_probs_and_entropy(h, y, None, True, chunk_size, logp > -5, weight=weight)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_nemo_rl(chunk_size):
    """The target is not shifted, and (B, S − 1) comes back."""
    hidden, weight, target = rows_problem()
    expected = every(hidden, weight).gather(-1, target.roll(-1, 1)[..., None])[:, :-1, 0]
    arguments = target, 0, VOCAB, None, False, None, chunk_size
    check_same(logps.nemo_rl_logprobs(hidden, *arguments, weight=weight), expected, [hidden, weight])
    uncut = SimpleNamespace(top_k=-1, top_p=1.0, temperature=0.5)  # the temperature is in the logits already
    assert_close(logps.nemo_rl_logprobs(hidden, *arguments, uncut, weight=weight), expected)
    assert logps.nemo_rl_logprobs(hidden[:0], target[:0], *arguments[1:], weight=weight).shape == (0, S - 1)
    sequence_first = hidden.transpose(0, 1)
    found = logps.nemo_rl_hidden_states_to_logprobs(sequence_first, weight, None, *arguments)
    check_same(found, expected, [hidden, weight])
    assert not logps.nemo_rl_logprobs(hidden, target, 0, VOCAB, inference_only=True, weight=weight).requires_grad


def test_nemo_rl_refusals():
    hidden, weight, target = rows_problem()
    with pytest.raises(ValueError, match="132 rows, and the indices 0:66 name 66"):
        logps.nemo_rl_logprobs(hidden, target, 0, 66, weight=weight)
    with pytest.raises(ValueError, match=r"rows 66:198 are a part of a vocabulary, and tp_group has no other rank"):
        logps.nemo_rl_logprobs(hidden, target, 66, 66 + VOCAB, weight=weight)
    for cut in ({"top_k": 20, "top_p": 1.0}, {"top_k": -1, "top_p": 0.9}):
        with pytest.raises(ValueError, match="the softmax is over the whole vocabulary here"):
            logps.nemo_rl_logprobs(hidden, target, 0, VOCAB, sampling_params=SimpleNamespace(**cut), weight=weight)
    with pytest.raises(ValueError, match="runtime_gather_output=True"):
        logps.nemo_rl_hidden_states_to_logprobs(hidden, weight, True, target, 0, VOCAB)


# --- over two ranks ----------------------------------------------------------------------------------------


def run_ranks(rank: int) -> dict:
    found: dict = {}
    half = VOCAB // 2
    of = case(vocab=VOCAB)
    own = of.weight[rank * half : (rank + 1) * half]
    group = dist.group.WORLD
    for name, options in OPTIONS.items():
        upstream = (*of.upstream[:2], torch.zeros(37, 0)) if name == "no ids" else of.upstream
        apply = functools.partial(TP.apply, tp_group=None if name == "all" else group)
        found["liger", name] = run(apply, of._replace(upstream=upstream), first=own, **options)
        if "selected_token_ids" not in options:
            fallback = lambda h, w, t, temperature=1.0, return_entropy=False: liger()._apply_tp_fallback(  # noqa: E731
                h, w, t, temperature, IGNORE, return_entropy, group
            )
            found["fallback", name] = run(fallback, of, first=own, **options)
    uneven = of.weight[:100] if rank == 0 else of.weight[100:]
    found["uneven"] = run(functools.partial(TP.apply, tp_group=group), of, first=uneven)

    hidden, weight, target = rows_problem()
    mine = weight.detach()[rank * half : (rank + 1) * half].requires_grad_()
    u = oracle.normal(B, S, seed=9)
    out, entropy = logps.slime_log_probs_and_entropy(
        hidden.flatten(0, 1), target.flatten(), group, True, weight=mine, temperature=0.7
    )
    assert entropy is not None
    loss = (out * u.flatten()[:, None]).sum() + entropy.sum()
    found["slime"] = [out.detach(), entropy.detach(), *torch.autograd.grad(loss, [hidden, mine])]
    at = rank * half, (rank + 1) * half, group
    out = logps.nemo_rl_logprobs(hidden, target, *at, weight=mine)
    found["nemo"] = [out.detach(), *torch.autograd.grad((out * u[:, 1:]).sum(), [hidden, mine])]
    part = hidden.detach().transpose(0, 1)[rank * 3 : rank * 3 + 3].contiguous().requires_grad_()
    out = logps.nemo_rl_hidden_states_to_logprobs(part, mine, None, target, *at, chunk_size=2)
    found["nemo, hidden"] = [out.detach(), *torch.autograd.grad((out * u[:, 1:]).sum(), [part, mine])]
    with pytest.raises(ValueError, match="cp_group has 2 ranks"):
        logps.nemo_rl_logprobs(hidden, target, *at, cp_group=group, weight=mine)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    liger()  # skips without it
    return found_by(tmp_path_factory, 2, run_ranks)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_tensor_parallel_form_is_the_whole(ranks, name):
    of, options = case(vocab=VOCAB), OPTIONS[name]
    of = of._replace(upstream=(*of.upstream[:2], torch.zeros(37, 0))) if name == "no ids" else of
    outputs, grads = run(theirs().apply, of, **options)
    own = [found["liger", name] for found in ranks]
    for found in own:
        assert_close(found[0], outputs, **FP32)
        assert_close(found[1]["hidden"], grads["hidden"], **FP32)
    assert_close(torch.cat([found[1]["weight"] for found in own]), grads["weight"], **FP32)


@pytest.mark.parametrize("name", [name for name, x in OPTIONS.items() if "selected_token_ids" not in x])
def test_the_tensor_parallel_form_is_ligers(ranks, name):
    for found in ranks:
        assert_close(found["liger", name], found["fallback", name], **FP32)


def test_shards_of_any_sizes(ranks):
    of = case(vocab=VOCAB)
    outputs, grads = run(theirs().apply, of)
    for found in ranks:
        assert_close(found["uneven"][0], outputs, **FP32)
    assert_close(torch.cat([found["uneven"][1]["weight"] for found in ranks]), grads["weight"], **FP32)


def test_frameworks_with_a_cut_vocabulary(ranks):
    hidden, weight, target = rows_problem()
    u, y = oracle.normal(B, S, seed=9), target.flatten()
    logp = every(hidden.flatten(0, 1), weight, 0.7)
    out, entropy = logp.gather(1, y[:, None]), -(logp.exp() * logp).sum(1)
    d_hidden, d_weight = torch.autograd.grad((out * u.flatten()[:, None]).sum() + entropy.sum(), [hidden, weight])
    for found in ranks:
        assert_close(found["slime"][:3], [out.detach(), entropy.detach(), d_hidden])
    assert_close(torch.cat([found["slime"][3] for found in ranks]), d_weight)

    out = every(hidden, weight).gather(-1, target.roll(-1, 1)[..., None])[:, :-1, 0]
    d_hidden, d_weight = torch.autograd.grad((out * u[:, 1:]).sum(), [hidden, weight])
    for found in ranks:
        assert_close(found["nemo"][:2], [out.detach(), d_hidden])
        assert_close(found["nemo, hidden"][0], out.detach())
    for name in ("nemo", "nemo, hidden"):
        assert_close(torch.cat([found[name][2] for found in ranks]), d_weight)
    parts = [found["nemo, hidden"][1] for found in ranks]
    assert_close(torch.cat(parts), d_hidden.transpose(0, 1))
