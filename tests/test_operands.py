"""A Head where a weight is, the order in which operands are admitted, and a backend that takes one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from xpo_fast.head import backends, operands
from xpo_fast.head.backends import Backend
from xpo_fast.head.operands import Operands, Reference
from xpo_fast.head.row_operations import OutOfPlaceRowOperations
from xpo_fast.head.spec import Scaling
from xpo_fast.integrations.liger import liger_fused_linear_dpo, liger_fused_linear_grpo
from xpo_fast.integrations.liger.distillation import distillation_loss

ROWS, WIDTH, VOCAB, RANK = (4, 6), 8, 21, 3


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return oracle.normal(*shape, seed=seed, dtype=torch.float32)


HIDDEN, TARGETS = drawn(*ROWS, WIDTH, seed=1), oracle.tokens(ROWS, VOCAB, 0.2)
A = drawn(RANK, WIDTH, seed=5)
PLAIN = xf.Head(drawn(VOCAB, WIDTH, seed=2), drawn(VOCAB, seed=3), softcap=3.0, logit_scale=1.5)
LORA = dataclasses.replace(PLAIN, adapter=drawn(VOCAB, RANK, seed=4), project=lambda h: 0.5 * h @ A.T)


def flat(head: xf.Head) -> dict:
    """The keyword arguments that say what a Head says."""
    return {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale, "adapter": head.adapter}


@pytest.mark.parametrize("hidden", ["plain", "with the adapter's inputs"])
@pytest.mark.parametrize("head", [PLAIN, LORA], ids=["plain", "LoRA"])
@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_a_head_goes_where_a_weight_goes(head, hidden, backend):
    inputs = head.inputs(HIDDEN)
    given = HIDDEN if hidden == "plain" else inputs
    options = {"temperature": 0.7, "backend": backend}
    want = xf.token_stats(inputs, head.weight, TARGETS, outputs=("entropy",), **flat(head), **options)
    found = xf.token_stats(given, head, TARGETS, outputs=("entropy",), **options)
    assert torch.equal(found.logp, want.logp) and torch.equal(found.entropy, want.entropy)
    assert torch.equal(xf.token_logps(given, head, TARGETS, **options), want.logp)
    sums, _ = xf.sequence_logps(given, head, TARGETS, **options)
    assert_close(sums, want.logp.sum(dim=1))
    objective = xf.Objective("simpo", backend=backend)
    assert objective(given, head, TARGETS).loss == objective(inputs, head.weight, TARGETS, **flat(head)).loss
    plans = [objective.plan(given, head, TARGETS), objective.plan(inputs, head.weight, TARGETS, **flat(head))]
    assert plans[0] == plans[1]


def test_its_parameters_learn():
    weight, adapter = (x.clone().requires_grad_() for x in (LORA.weight, LORA.adapter))
    hidden, a = HIDDEN.clone().requires_grad_(), A.clone().requires_grad_()
    head = dataclasses.replace(LORA, weight=weight, adapter=adapter, project=lambda h: 0.5 * h @ a.T)
    found = torch.autograd.grad(xf.Objective("simpo")(hidden, head, TARGETS).loss, (hidden, weight, adapter, a))
    dense = xf.Objective("simpo", backend="dense")
    want = torch.autograd.grad(dense(hidden, head, TARGETS).loss, (hidden, weight, adapter, a))
    for x, y in zip(found, want, strict=True):
        assert y.abs().sum() > 0
        assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_reference_may_be_a_head():
    ref = dataclasses.replace(PLAIN, weight=PLAIN.weight * 0.9)
    options = {"ref_hidden": HIDDEN * 0.8}
    dpo = xf.Objective("dpo")
    found = dpo(HIDDEN, PLAIN, TARGETS, ref_weight=ref, **options)
    want = dpo(HIDDEN, PLAIN, TARGETS, ref_weight=ref.weight, ref_bias=ref.bias, **options)
    assert found.loss == want.loss != dpo(HIDDEN, PLAIN, TARGETS, **options).loss


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (PLAIN, {"bias": PLAIN.bias}, "bias came beside a Head"),
        (PLAIN, {"softcap": 3.0, "logit_scale": 1.5}, "softcap and logit_scale came beside a Head"),
        (LORA, {"adapter": LORA.adapter}, "adapter came beside a Head"),
        (PLAIN, {"ref_weight": PLAIN, "ref_bias": PLAIN.bias}, "ref_bias came beside a Head"),
        (PLAIN, {"ref_weight": LORA}, "the reference's Head has an adapter"),
        (PLAIN, {"ref_weight": dataclasses.replace(PLAIN, softcap=None)}, "one call has one scaling"),
        (LORA, {}, "pass ref_weight="),
    ],
)
def test_what_a_head_has_is_said_once(head, options, message):
    with pytest.raises(ValueError, match=message):
        xf.token_stats(HIDDEN, head, TARGETS, outputs=("kl",), ref_hidden=HIDDEN, **options)


@pytest.mark.parametrize("name", ["weight", "ref_weight"])
def test_a_layer_is_no_head(name):
    arguments = {"weight": PLAIN.weight, "ref_weight": PLAIN.weight, name: torch.nn.Linear(WIDTH, VOCAB)}
    with pytest.raises(ValueError, match=rf"{name} must be a tensor \(V, D\) or a Head, got Linear"):
        xf.token_stats(HIDDEN, targets=TARGETS, outputs=("kl",), ref_hidden=HIDDEN, **arguments)


LABELS = TARGETS.clamp(min=0)
CALLS = {
    "token_logps": lambda w: xf.token_logps(HIDDEN, w, TARGETS),
    "Objective": lambda w: xf.Objective("simpo")(HIDDEN, w, TARGETS),
    "DPO of Liger": lambda w: liger_fused_linear_dpo(HIDDEN, w, TARGETS, use_ref_model=False),
    "GRPO of Liger": lambda w: liger_fused_linear_grpo(
        HIDDEN, w, LABELS, torch.ones(ROWS), torch.ones(4), use_ref_model=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_gathered_is_cast_before(call, monkeypatch):
    """A weight that is kept in parts is sent over the wire in the dtype of autocast, by every public edge."""
    seen = []

    def spy(**parts):
        seen.append(parts["weight"].dtype)
        return gathered(**parts)

    gathered = operands.gathered
    monkeypatch.setattr(operands, "gathered", spy)
    with torch.autocast("cpu", torch.bfloat16):
        CALLS[call](PLAIN.weight)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("same", [True, False])
def test_a_weight_of_both_is_cast_once(same):
    """So that one that is kept in parts is gathered once, as it is without autocast."""
    theirs = PLAIN.weight if same else PLAIN.weight.clone()
    given = Operands(HIDDEN, PLAIN.weight, TARGETS, PLAIN.bias, ref=Reference(HIDDEN, theirs))
    with torch.autocast("cpu", torch.bfloat16):
        found = given.admit()
    assert found.ref is not None and found.weight.dtype == found.ref.weight.dtype == torch.bfloat16
    assert (found.weight is found.ref.weight) == same


class Sharded(torch.Tensor):
    """Looks like a DTensor."""

    full_tensor = None


TEACHER = {"teacher_hidden": HIDDEN, "teacher_weight": PLAIN.weight}
REFUSED = {
    "ref_hidden": lambda x: xf.token_stats(HIDDEN, PLAIN.weight, TARGETS, ref_hidden=x),
    "teacher_hidden": lambda x: distillation_loss(HIDDEN, PLAIN.weight, TARGETS, **TEACHER | {"teacher_hidden": x}),
    "_input": lambda x: liger_fused_linear_dpo(x, PLAIN.weight, TARGETS, use_ref_model=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_the_callers_name(name):
    with pytest.raises(ValueError, match=f"expected {name} to be a plain tensor"):
        REFUSED[name](HIDDEN.as_subclass(Sharded))


def test_an_operator_gets_all_of_it():
    ref = Reference(HIDDEN, PLAIN.weight, PLAIN.bias)
    scaling = Scaling(0.5, 2.0, 3.0)
    given = Operands(HIDDEN, PLAIN.weight, TARGETS, PLAIN.bias, ref=ref, scaling=scaling, ignore_index=-1)
    for each in (given, dataclasses.replace(given, ref=None, scaling=Scaling())):
        found = Operands.unpacked(*each.packed())
        assert all(getattr(found, f.name) is getattr(each, f.name) for f in dataclasses.fields(Operands)[:5])
        assert (found.ref, found.scaling, found.ignore_index) == (each.ref, each.scaling, -1)


def test_a_backend_is_one_line(monkeypatch):
    monkeypatch.setitem(backends._BACKENDS, "mine", Backend("mine", OutOfPlaceRowOperations))
    hidden, weight = HIDDEN.clone().requires_grad_(), PLAIN.weight.clone().requires_grad_()
    outs = [xf.Objective("simpo", backend=name)(hidden, weight, TARGETS) for name in ("mine", "dense")]
    grads = [torch.autograd.grad(out.loss, (hidden, weight)) for out in outs]
    assert "mine backend" in str(xf.Objective("simpo", backend="mine").plan(hidden, weight, TARGETS))
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    monkeypatch.setitem(backends._BACKENDS, "mine", Backend("mine", OutOfPlaceRowOperations, lambda device: "not here"))
    with pytest.raises(ValueError, match="not here"):
        xf.token_logps(HIDDEN, weight, TARGETS, backend="mine")
