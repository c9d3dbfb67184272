"""xpo_fast.integrations.liger against Liger 0.8.5, with its own results where it is right and without its faults.

Liger runs uncompiled: its numbers are the same, and compiling on a CPU needs a C++ compiler.
"""

import copy
import functools
import importlib.metadata
import inspect
import math
import pickle
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from peers import peer
from xpo_fast.head.operands import Operands
from xpo_fast.integrations import liger as ours
from xpo_fast.integrations.liger import grpo
from xpo_fast.integrations.liger.units import logit_sums

IGNORE = -100
LOSSES = ["DPO", "CPO", "SimPO", "ORPO", "KTO", "GRPO", "JSD", "CosineSimilarity"]
PAIRED = ["DPO", "CPO", "SimPO", "ORPO"]
FUNCTIONS = {name: name.lower() for name in LOSSES} | {"CosineSimilarity": "cosine"}
# pairs (or rows), tokens, vocabulary, width: nothing a multiple of anything; one row of one token.
SHAPES = [(3, 7, 37, 5), (2, 5, 130, 12), (1, 1, 11, 3)]


@functools.cache
def liger():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever Liger and what it imports have to say on import
        return peer("liger_kernel.chunked_loss", "liger-kernel", "0.8.")


def of_liger(name, **options):
    return getattr(liger(), f"LigerFusedLinear{name}Loss")(compiled=False, **options)


def of_ours(name, **options):
    return getattr(ours, f"LigerFusedLinear{name}Loss")(compiled=False, **options)


class Case:
    """Operands of a call of rows × tokens, with leaves that want a gradient by name."""

    def __init__(self, rows, tokens, vocab, width, *, ignored=0.0, dtype=torch.float32, seed=0):
        def normal(*shape, k, std=1.0):
            return oracle.normal(*shape, seed=seed * 100 + k, std=std, dtype=dtype)

        self.hidden, self.weight = normal(rows, tokens, width, k=1), normal(vocab, width, k=2)
        self.bias = normal(vocab, k=3)
        self.ref_hidden = self.hidden + normal(rows, tokens, width, k=4, std=0.3)
        self.ref_weight = self.weight + normal(vocab, width, k=5, std=0.1)
        self.ref_bias = normal(vocab, k=6)
        self.target = oracle.tokens((rows, tokens), vocab, ignored, seed=seed)
        self.target[:, 0] = self.target[:, 0].clamp(min=0)  # no row is empty
        g = torch.Generator().manual_seed(seed + 7)
        self.labels = torch.arange(rows) % 3 != 1
        self.advantages = torch.randn(rows, generator=g)
        self.logps = xf.token_logps(self.hidden, self.weight, self.target, bias=self.bias).detach()
        self.old = self.logps + 0.4 * torch.randn(rows, tokens, generator=g)
        self.ref_logps = self.logps + 0.4 * torch.randn(rows, tokens, generator=g)
        self.ratio = torch.rand(rows, tokens, generator=g) + 0.5

    @property
    def ref(self):
        return {"ref_input": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}

    @property
    def scored(self):
        return self.target != IGNORE

    def operands(self, name, bias=True):
        """The operands of class `name` as its forward calls them."""
        common = {"lin_weight": self.weight, "_input": self.hidden, "bias": self.bias if bias else None}
        if name == "GRPO":
            ids = {"selected_token_ids": self.target.clamp(min=0), "attention_mask": self.scored.long()}
            return {**common, **ids, "advantages": self.advantages}
        if name in ("JSD", "CosineSimilarity"):
            flat = {"student_input": self.hidden, "teacher_input": self.ref_hidden, "true_labels": self.target}
            heads = {"student_weight": self.weight, "teacher_weight": self.ref_weight}
            biases = {"student_bias": self.bias, "teacher_bias": self.ref_bias} if bias else {}
            return {k: x.flatten(0, 1) for k, x in flat.items()} | heads | biases
        kto = {"preference_labels": self.labels} if name == "KTO" else {}
        return {**common, "target": self.target, **kto}


LEAVES = ("_input", "lin_weight", "bias", "student_input", "student_weight", "student_bias")


def run(module, operands, wanted=LEAVES, scale=1.0):
    """The loss, what comes beside it, and scale · its gradients by name."""
    leaves = {
        k: x.detach().clone().requires_grad_()
        for k, x in operands.items()
        if k in wanted and isinstance(x, torch.Tensor)
    }
    out = module(**{**operands, **leaves})
    loss, *aux = out if isinstance(out, tuple) else (out,)
    aux = [x for part in aux for x in (part if isinstance(part, tuple) else (part,))]
    (loss * scale).backward()
    return loss.detach(), [x.detach() for x in aux], {k: x.grad for k, x in leaves.items()}


def assert_same(name, case, options, extra=(), skip=(), bias=True, scale=1.0, wanted=LEAVES, **tolerance):
    """Loss, everything beside it but the entries `skip`, and every gradient are Liger's; so are shapes and dtypes."""
    operands = {**case.operands(name, bias), **dict(extra)}
    expected = run(of_liger(name, **options), operands, wanted, scale)
    found = run(of_ours(name, **options), operands, wanted, scale)
    assert_close(found[0], expected[0], **tolerance)
    assert len(found[1]) == len(expected[1])
    for k, (x, y) in enumerate(zip(found[1], expected[1], strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if k not in skip:
            assert_close(x, y, **tolerance, msg=lambda m, k=k: f"output {k}: {m}")
    assert found[2].keys() == expected[2].keys()
    for leaf, grad in found[2].items():
        assert (grad.dtype, grad.shape) == (expected[2][leaf].dtype, expected[2][leaf].shape)
        assert_close(grad, expected[2][leaf], **tolerance, msg=lambda m, leaf=leaf: f"gradient of {leaf}: {m}")


FP32 = {"rtol": 1e-4, "atol": 2e-5}
LOGIT_MEANS = (2, 3)  # the outputs of paired losses, and of KTO, that count padding

# --- the surface -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["__init__", "forward"])
@pytest.mark.parametrize("name", LOSSES)
def test_signatures_of_classes(name, part):
    theirs, mine = (
        inspect.signature(getattr(getattr(m, f"LigerFusedLinear{name}Loss"), part)).parameters.values()
        for m in (liger(), ours)
    )
    assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("name", LOSSES)
def test_signatures_of_functions(name):
    theirs = getattr(sys.modules[liger().__name__ + "." + MODULES[name]], f"LigerFusedLinear{name}Function")
    found = inspect.signature(getattr(ours, "liger_fused_linear_" + FUNCTIONS[name])).parameters
    expected = list(inspect.signature(theirs.forward).parameters.values())[1:]  # but for ctx
    assert list(found) == [p.name for p in expected]
    for p in expected:
        if p.default is not p.empty:
            assert found[p.name].default == p.default, p.name
    assert getattr(ours, f"LigerFusedLinear{name}Function").apply is getattr(
        ours, "liger_fused_linear_" + FUNCTIONS[name]
    )


MODULES = {name: f"{name.lower()}_loss" for name in LOSSES} | {"CosineSimilarity": "cosine_similarity_loss"}


def test_everything_that_liger_exports_is_here():
    import liger_kernel.chunked_loss.functional as functional

    names = [n for m in (liger(), functional) for n in vars(m) if n.startswith(("LigerFused", "liger_fused"))]
    assert len(names) >= 16
    assert {n for n in names if not hasattr(ours, n)} == set()
    assert set(names) <= set(ours.__all__)


@pytest.mark.parametrize("name", LOSSES)
def test_constructor_arguments_are_attributes_that_act(name):
    case, module = Case(4, 5, 23, 6), of_ours(name, beta=0.3)
    theirs = of_liger(name, beta=0.3)
    names = list(inspect.signature(type(theirs)).parameters)
    assert {k: getattr(module, k) for k in names} == {k: getattr(theirs, k) for k in names}
    extra = case.ref if getattr(module, "use_ref_model", False) else {}
    operands = {**case.operands(name), **extra}
    if name == "GRPO":
        operands["old_per_token_logps"] = case.old
    module.beta = 0.7
    assert_close(run(module, operands)[0], run(of_ours(name, beta=0.7), operands)[0])
    assert run(of_ours(name, beta=0.3), operands)[0] != run(module, operands)[0]


def test_works_without_liger(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "liger_kernel" or n.startswith(ours.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError):
        importlib.import_module("liger_kernel.chunked_loss")
    again = importlib.import_module(ours.__name__)
    assert again is not ours
    again.LigerFusedLinearORPOLoss()(torch.randn(7, 3), torch.randn(2, 4, 3), torch.randint(0, 7, (2, 4)))


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_and_chunk_size_change_nothing(name):
    case = Case(4, 5, 23, 6, ignored=0.3)
    operands = case.operands(name)
    options = {"use_ref_model": False} if name in ("DPO", "KTO", "GRPO") else {}
    make = getattr(ours, f"LigerFusedLinear{name}Loss")
    one, other = (run(make(**o, **options), operands) for o in ({"compiled": True}, {"chunk_size": 7}))
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(x, other[2][k]) for k, x in one[2].items())


# --- parity ------------------------------------------------------------------------------------------------

DPO_TYPES = [
    ("sigmoid", {}),
    ("hinge", {}),
    ("exo_pair", {"label_smoothing": 0.01}),
    ("nca_pair", {}),
    ("robust", {"label_smoothing": 0.2}),
    ("robust", {}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {"discopop_tau": 0.2}),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("loss_type", "options"), DPO_TYPES)
def test_dpo(loss_type, options, shape):
    case = Case(2 * shape[0], *shape[1:])
    options = {"loss_type": loss_type, "beta": 0.3, **options}
    assert_same("DPO", case, options, case.ref, scale=3.0, **FP32)


@pytest.mark.parametrize("use_ref_model", [True, False])
@pytest.mark.parametrize("compute_nll_loss", [True, False])
@pytest.mark.parametrize("average_log_prob", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dpo_options(use_ref_model, compute_nll_loss, average_log_prob, bias):
    case = Case(6, 7, 37, 5, ignored=0.4)
    options = {"compute_nll_loss": compute_nll_loss, "average_log_prob": average_log_prob, "alpha": 0.7}
    ref = case.ref if bias else {**case.ref, "ref_bias": None}
    options |= {"use_ref_model": use_ref_model, "beta": 0.5, "chunk_size": 2}
    assert_same("DPO", case, options, ref, skip=LOGIT_MEANS, bias=bias, **FP32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CPO", {}),
        ("CPO", {"alpha": 0.3, "label_smoothing": 0.2, "beta": 0.5}),
        ("CPO", {"average_log_prob": True, "compute_nll_loss": False}),
        ("SimPO", {}),
        ("SimPO", {"alpha": 0.3, "label_smoothing": 0.2, "beta": 2.0, "gamma": 1.5}),
        ("SimPO", {"compute_nll_loss": False, "beta": 2.0}),
        ("ORPO", {}),
        ("ORPO", {"beta": 0.7, "compute_nll_loss": False}),
    ],
)
def test_pairs_without_reference(name, options, shape):
    case = Case(2 * shape[0], *shape[1:], seed=1)
    assert_same(name, case, options, scale=-2.0, **FP32)
    case = Case(2 * shape[0], *shape[1:], ignored=0.4, seed=2)
    assert_same(name, case, options, skip=LOGIT_MEANS, bias=False, **FP32)


def test_orpo_with_a_target_of_its_own_for_the_likelihood():
    case = Case(6, 7, 37, 5, ignored=0.4)
    nll_target = oracle.tokens((6, 7), 37, 0.2, seed=9)  # other tokens, more of them, and fewer
    nll_target[1] = case.target[1]
    for beta in (0.1, 0.0):
        assert_same("ORPO", case, {"beta": beta}, {"nll_target": nll_target}, skip=LOGIT_MEANS, **FP32)
    frozen = ("_input",)
    assert_same("ORPO", case, {}, {"nll_target": nll_target}, skip=LOGIT_MEANS, wanted=frozen, **FP32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("average_log_prob", [True, False])
@pytest.mark.parametrize("use_ref_model", [True, False])
@pytest.mark.parametrize("kl", [None, 0.7])
def test_kto(shape, average_log_prob, use_ref_model, kl):
    options = {"use_ref_model": use_ref_model, "average_log_prob": average_log_prob, "beta": 0.4}
    extra = {"kl": None if kl is None else torch.tensor(kl)}
    for ignored in (0.0, 0.4):
        case = Case(*shape, ignored=ignored)
        skip = LOGIT_MEANS if ignored else ()
        assert_same("KTO", case, options, {**case.ref, **extra}, skip=skip, scale=0.5, **FP32)


GRPO_OPTIONS = {
    "defaults": {},
    "no KL": {"beta": 0.0},
    "asymmetric": {"epsilon_low": 0.1, "epsilon_high": 0.3},
    "delta": {"delta": 1.1, "temperature": 0.7},
    "corrected KL": {"use_bias_correction_kl": True, "beta": 0.2},
}
GRPO_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo"]


def grpo_case(ignored=0.4, shape=(5, 7, 37, 5), **options):
    case = Case(*shape, ignored=ignored, **options)
    extra = {"old_per_token_logps": case.old, "ref_per_token_logps": case.ref_logps}
    return case, extra


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("options", GRPO_OPTIONS.values(), ids=GRPO_OPTIONS)
@pytest.mark.parametrize("loss_type", GRPO_TYPES)
def test_grpo_clipped(loss_type, options, level):
    case, extra = grpo_case()
    options = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 9, **options}
    assert_same("GRPO", case, options, extra, scale=3.0, **FP32)


@pytest.mark.parametrize("loss_type", [*GRPO_TYPES, "cispo", "sapo", "vespo"])
def test_grpo_row_without_a_token(loss_type):
    case, extra = grpo_case()
    case.target[1] = IGNORE
    assert_same("GRPO", case, {"loss_type": loss_type, "max_completion_length": 9}, extra, **FP32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", [*GRPO_TYPES, "cispo", "sapo", "vespo"])
def test_grpo_shapes_and_ways_to_the_reference(loss_type, shape):
    case, extra = grpo_case(shape=shape)
    options = {"loss_type": loss_type, "max_completion_length": 9, "epsilon_high": 0.28}
    assert_same("GRPO", case, options, {**extra, "vllm_is_ratio": None}, **FP32)
    old = {"old_per_token_logps": case.old}
    assert_same("GRPO", case, options, {**old, **case.ref}, **FP32)
    assert_same("GRPO", case, options, {**case.ref}, bias=False, wanted=("_input",), **FP32)  # on-policy
    assert_same("GRPO", case, {**options, "use_ref_model": False}, old, **FP32)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo", "dapo"])
@pytest.mark.parametrize("ratio", ["tokens", "rows", "column", None])
def test_grpo_sampling_ratio(loss_type, ratio):
    # Liger takes the ratio of padding into VESPO's weight, of which it is none: here it is 1 there.
    case, extra = grpo_case()
    ratios = {
        "tokens": case.ratio.masked_fill(~case.scored, 1.0),
        "rows": case.ratio[:, 0],
        "column": case.ratio[:, :1],
    }
    options = {"loss_type": loss_type, "epsilon_high": 1.2, "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3}
    options |= {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.0}
    assert_same("GRPO", case, options, {**extra, "vllm_is_ratio": ratios.get(ratio)}, **FP32)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("options", GRPO_OPTIONS.values(), ids=GRPO_OPTIONS)
def test_grpo_luspo_without_padding(options, level):
    case, extra = grpo_case(ignored=0.0)
    assert_same("GRPO", case, {"loss_type": "luspo", "importance_sampling_level": level, **options}, extra, **FP32)


@pytest.mark.parametrize("items", [40, 40.0, torch.tensor(40), 0.3])
def test_grpo_items_of_a_step(items):
    case, extra = grpo_case()
    for loss_type in ("dapo", "cispo", "vespo", "grpo"):
        assert_same("GRPO", case, {"loss_type": loss_type}, {**extra, "num_items_in_batch": items}, **FP32)


@pytest.mark.parametrize("items", [None, 40])
def test_grpo_on_two_ranks(items, monkeypatch):
    """As if another rank had the same rows: tokens of all ranks, over the ranks' number."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **_: x.mul_(3))  # the other has twice as many
    case, extra = grpo_case()
    extra |= {"num_items_in_batch": items}
    one = run(of_ours("GRPO"), {**case.operands("GRPO"), **extra})[0]
    assert_same("GRPO", case, {}, extra, **FP32)
    monkeypatch.undo()
    assert_close(one, run(of_ours("GRPO"), {**case.operands("GRPO"), **extra})[0] * (2 / 3 if items is None else 2))


@pytest.mark.parametrize("name", ["JSD", "CosineSimilarity"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0},
        {"beta": 1.0, "temperature": 2.0},
        {"beta": 0.1, "temperature": 0.7, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
        {"weight_soft_loss": 0.0, "return_soft_hard_loss": True},
        {"weight_hard_loss": 0.0, "return_soft_hard_loss": True, "temperature": 3.0},
    ],
    ids=str,
)
def test_distillation(name, shape, options):
    case = Case(*shape, ignored=0.3)
    assert_same(name, case, options, scale=3.0, **FP32)
    assert_same(name, case, options, bias=False, **FP32)


@pytest.mark.parametrize("name", ["JSD", "CosineSimilarity"])
def test_distillation_from_a_wider_teacher_with_more_vocabulary(name):
    case = Case(3, 7, 37, 5, ignored=0.3)
    wider = {
        "teacher_input": oracle.normal(21, 9, seed=1, dtype=torch.float32),
        "teacher_weight": oracle.normal(41, 9, seed=2, dtype=torch.float32),
        "teacher_bias": None,
    }
    assert_same(name, case, {"temperature": 1.5, "return_soft_hard_loss": True}, wider, **FP32)


@pytest.mark.parametrize("name", LOSSES)
def test_bf16(name):
    """Both round differently: Liger makes bf16 logits. 3% of a loss, 5% of the norm of a gradient."""
    case = Case(6, 7, 130, 32, ignored=0.3, dtype=torch.bfloat16)
    extra = case.ref if name in ("DPO", "KTO", "GRPO") else {}
    options = {"use_ref_model": True} if extra else {}
    operands = {**case.operands(name), **extra}
    expected, found = (run(make(name, **options), operands) for make in (of_liger, of_ours))
    assert_close(found[0].float(), expected[0].float(), rtol=0.03, atol=0.01)
    for x, y in zip(found[1], expected[1], strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
    for leaf, grad in found[2].items():
        assert grad.dtype == expected[2][leaf].dtype == torch.bfloat16
        assert oracle.error(grad, expected[2][leaf]) < 0.05, leaf


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wanted", [("_input", "student_input"), ("lin_weight", "student_weight"), LEAVES])
def test_gradients_are_of_what_wants_them(name, wanted):
    case = Case(4, 7, 37, 5, ignored=0.3)
    options = {"use_ref_model": False} if name in ("DPO", "KTO", "GRPO") else {}
    operands = case.operands(name)
    skip = LOGIT_MEANS if name not in ("GRPO", "JSD", "CosineSimilarity") else ()
    if name in ("GRPO", "JSD", "CosineSimilarity") and wanted[0] == "lin_weight":
        everything = run(of_ours(name, **options), operands)[2]  # Liger cannot leave out the input
        found = run(of_ours(name, **options), operands, wanted)[2]
        assert len(found) == 1
        assert all(torch.equal(x, everything[k]) for k, x in found.items())
    else:
        assert_same(name, case, options, skip=skip, wanted=wanted, **FP32)


def test_labels_of_ones_own_to_ignore():
    case = Case(4, 7, 37, 5, ignored=0.3)
    case.target[case.target == IGNORE] = 5
    assert_same("CPO", case, {"ignore_index": 5}, skip=LOGIT_MEANS, **FP32)
    assert_same("JSD", case, {"ignore_index": 5}, **FP32)


def test_positional_calls_of_functions():
    import liger_kernel.chunked_loss.functional as functional

    case = Case(4, 5, 23, 6)
    args = (case.hidden, case.weight, case.target, case.bias)
    ref = tuple(case.ref.values())
    of_grpo = (0.1, 0.2, 0.3, "grpo", None, "token", 1.0, 1.05, 0.9, False)
    student, teacher = (case.hidden[0], case.weight), (case.ref_hidden[0], case.ref_weight)
    calls = {
        "dpo": (*args, *ref, IGNORE, 0.2, True, False, True, False, 1, "hinge", 0.0, 0.05, 0.5),
        "cpo": (*args, IGNORE, 0.2, 0.5, 0.1, True, False, True, 2),
        "simpo": (*args, IGNORE, 0.2, 0.5, 0.1, True, False, 0.7, 2),
        "orpo": (*args, IGNORE, 0.2, True, None, False, 2),
        "kto": (*args[:3], case.labels, case.bias, *ref, torch.tensor(0.3), IGNORE, 0.2, False, True, False, 1),
        "grpo": (*args[:3], case.scored, case.advantages, case.bias, case.ref_logps, case.old, *[None] * 3, *of_grpo),
        "jsd": (*student, *teacher, case.target[0], case.bias, None, 0.3, 0.6, 0.4, IGNORE, 1.5, False, 3, True),
    }
    calls["cosine"] = calls["jsd"]
    for name, given in calls.items():
        theirs, mine = (getattr(m, "liger_fused_linear_" + name)(*given) for m in (functional, ours))
        torch.utils._pytree.tree_map(lambda x, y: assert_close(x, y, **FP32), mine, theirs)


# --- Liger's documented calls, only the import changed ------------------------------------------------------


def as_documented(text, monkeypatch, replaced):
    """Liger's own text, with nothing but the import replaced, if it is. Liger's classes are not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert "liger_kernel.chunked_loss" in text
    return text.replace("liger_kernel.chunked_loss", ours.__name__) if replaced else text


@pytest.mark.parametrize("replaced", [False, True])
def test_readme_example(replaced, monkeypatch):
    """Every example of Liger's README that has a chunked loss."""
    liger()
    readme = (
        importlib.metadata.metadata("liger-kernel")["Description"]
        or importlib.metadata.metadata("liger-kernel").get_payload()
    )
    examples = [x for x in re.findall(r"```python\n(.*?)```", readme, re.S) if "chunked_loss" in x]
    assert len(examples) == 1
    case = Case(4, 9, 101, 16, ignored=0.3)
    case.hidden.requires_grad_()
    lm_head = torch.nn.Linear(16, 101, bias=False)
    lm_head.weight.data = case.weight
    names = {"lm_head": lm_head, "x": case.hidden, "target": case.target}
    exec(as_documented(examples[0], monkeypatch, replaced), names)
    assert type(names["orpo_loss"]).__module__.startswith("xpo_fast" if replaced else "liger_kernel")
    loss, aux = names["y"]
    loss.backward()
    expected = run(of_liger("ORPO"), {"lin_weight": case.weight, "_input": case.hidden, "target": case.target})
    assert_close(loss.detach(), expected[0], **FP32)
    assert_close(aux[0], expected[1][0], **FP32)
    assert_close(lm_head.weight.grad, expected[2]["lin_weight"], **FP32)
    assert_close(case.hidden.grad, expected[2]["_input"], **FP32)


class TrainerOfTRL:
    """What LigerORPOTrainer inherits, as far as its loss needs it."""

    is_encoder_decoder, aux_loss_enabled, aux_loss_coef = False, True, 0.5
    label_pad_token_id, padding_value, beta = IGNORE, 0, 0.2
    accelerator = SimpleNamespace(device="cpu")

    @staticmethod
    def concatenated_inputs(batch, **_):
        return batch


class ModelOfTrainer:
    def __init__(self, case):
        self.hidden = case.hidden.clone().requires_grad_()
        self.lm_head = torch.nn.Linear(*case.weight.T.shape)
        self.lm_head.weight.data, self.lm_head.bias.data = case.weight.clone(), case.bias.clone()

    def model(self, *_, **__):
        return SimpleNamespace(last_hidden_state=self.hidden, aux_loss=torch.tensor(0.25))


def test_orpo_trainer_of_liger(monkeypatch):
    """The source of liger_kernel.transformers.trainer.LigerORPOTrainer, to which chunked_loss/README.md points."""
    path = Path(liger().__file__).parents[1] / "transformers/trainer/orpo_trainer.py"
    for name, content in {
        "trl": {},
        "trl.trainer": {"ORPOTrainer": TrainerOfTRL},  # TRL 1.16 has it elsewhere
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.fsdp": {"_FSDPForwardRedirection": lambda: lambda _, f, *args: f(*args)},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    case = Case(6, 8, 37, 5)
    completions = case.target.clone()
    completions[:, :3] = IGNORE  # the prompt
    mask = torch.ones_like(case.target)
    mask[4:, 6:] = 0
    completions[mask == 0] = IGNORE
    batch = {
        "concatenated_input_ids": case.target,
        "concatenated_attention_mask": mask,
        "concatenated_labels": completions,
    }
    found = []
    for replaced in (False, True):
        names = {"__name__": "orpo_trainer"}
        exec(as_documented(path.read_text(), monkeypatch, replaced), names)
        assert names["LigerFusedLinearORPOLoss"].__module__.startswith("xpo_fast" if replaced else "liger_kernel")
        model = ModelOfTrainer(case)
        loss, metrics = names["LigerORPOTrainer"]().get_batch_loss_metrics(model, batch)
        loss.backward()
        kept = {k: x for k, x in metrics.items() if not k.startswith("logits/")}  # the means over padding, too
        assert len(metrics) - len(kept) == 2 and all(math.isfinite(x) for x in metrics.values())
        grads = model.hidden.grad, model.lm_head.weight.grad, model.lm_head.bias.grad
        found.append((loss.detach(), kept, grads))
    assert_close(found[1], found[0], **FP32)


def test_calls_of_trainers():
    """Keyword calls as TRL's DPO, KTO, GRPO and GKD trainers made them while they had use_liger_loss."""
    case = Case(4, 6, 37, 5, ignored=0.3)
    head = {"lin_weight": case.weight.requires_grad_(), "bias": case.bias}
    for m in (liger(), ours):
        dpo = m.LigerFusedLinearDPOLoss(
            ignore_index=-100, beta=0.1, use_ref_model=True, average_log_prob=False, compiled=False
        )
        loss, (chosen, *_, chosen_rewards, rejected_rewards) = dpo(
            case.weight, case.hidden, case.target, bias=case.bias, **case.ref
        )
        kto = m.LigerFusedLinearKTOLoss(ignore_index=-100, beta=0.1, use_ref_model=True, compiled=False)
        k_loss, (_, _, _, _, chosen_sum, _) = kto(
            _input=case.hidden, target=case.target, preference_labels=case.labels, kl=torch.zeros(1), **head, **case.ref
        )
        grpo = m.LigerFusedLinearGRPOLoss(
            beta=0.1,
            epsilon_low=0.2,
            epsilon_high=0.2,
            temperature=1.0,
            use_ref_model=True,
            loss_type="bnpo",
            max_completion_length=6,
            compiled=False,
        )
        g_loss, metrics = grpo(
            _input=case.hidden,
            selected_token_ids=case.target.clamp(min=0),
            attention_mask=case.scored.long(),
            advantages=case.advantages,
            old_per_token_logps=case.old,
            ref_per_token_logps=case.ref_logps,
            **head,
        )
        jsd = m.LigerFusedLinearJSDLoss(beta=0.5, ignore_index=-100, temperature=0.9, compiled=False)
        j_loss = jsd(**case.operands("JSD")) / 2
        j_loss /= 3
        found = [loss, chosen.sum(), (chosen_rewards - rejected_rewards).mean(), k_loss, chosen_sum]
        numbers = torch.stack([*found, g_loss, metrics[0], metrics[-1], j_loss]).detach()
        if m is liger():
            expected = numbers
    assert_close(numbers, expected, **FP32)


# --- without Liger's faults ---------------------------------------------------------------------------------


def without_reference(name):
    return {"use_ref_model": False} if name in ("DPO", "KTO", "GRPO") else {}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("learn", "passes"), [("no_grad", 1), ("nothing", 1), ("frozen", 2), ("trainable", 3)])
def test_no_gradient_is_made_that_nobody_wants(name, learn, passes, tmp_path):
    """Liger multiplies gradients under no_grad, too. Ours: F = 2·N·V·D, N the scored tokens."""
    case = Case(4, 30, 501, 8, ignored=0.3)
    operands = case.operands(name)
    leaves = {"no_grad": LEAVES, "nothing": (), "frozen": ("_input", "student_input"), "trainable": LEAVES}[learn]
    operands |= {k: operands[k].clone().requires_grad_() for k in leaves if k in operands}

    def call(make=of_ours):
        with torch.set_grad_enabled(learn != "no_grad"):
            out = make(name, **without_reference(name))(**operands)
            loss = out[0] if isinstance(out, tuple) else out
            if loss.requires_grad:
                loss.backward()

    meter = oracle.Meter(call, tmp_path)
    teacher = 1 if name in ("JSD", "CosineSimilarity") else 0
    tokens = int(case.scored.sum())
    assert meter.passes(tokens, 501, 8) == pytest.approx(passes + teacher, rel=0.02)
    if learn == "no_grad":
        theirs = oracle.Meter(lambda: call(of_liger), tmp_path).passes(4 * 30, 501, 8)
        assert theirs >= 3 + teacher  # of all positions


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_scale_acts_once(name):
    case = Case(4, 5, 23, 6, ignored=0.3)
    operands = case.operands(name)
    module = of_ours(name, **without_reference(name))
    once, scaled = (run(module, operands, scale=s)[2] for s in (1.0, 1024.0))
    for leaf, grad in once.items():
        assert_close(scaled[leaf], 1024 * grad)


@pytest.mark.parametrize("name", LOSSES)
def test_what_comes_beside_the_loss_is_detached(name):
    case = Case(4, 5, 23, 6)
    operands = {k: x.clone().requires_grad_() if k in LEAVES else x for k, x in case.operands(name).items()}
    options = {"return_soft_hard_loss": True} if name in ("JSD", "CosineSimilarity") else without_reference(name)
    loss, *aux = of_ours(name, **options)(**operands)
    aux = aux[0] if isinstance(aux[0], tuple) else aux
    assert loss.requires_grad
    assert not any(x.requires_grad for x in aux)


@pytest.mark.parametrize("name", PAIRED)
def test_an_ignored_chosen_half(name):
    case = Case(4, 5, 23, 6)
    case.target[:2] = IGNORE
    options = {"compute_nll_loss": True, **without_reference(name)}
    assert run(of_liger(name, **options), case.operands(name))[0].isnan()
    loss, aux, grads = run(of_ours(name, **options), case.operands(name))
    assert loss == 0
    assert all(x.isfinite().all() for x in (*aux, *grads.values()))
    assert all((x == 0).all() for x in grads.values())


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_with_an_empty_half_does_not_count(name):
    case = Case(6, 5, 23, 6, ignored=0.3)
    case.target[4] = IGNORE  # the rejected half of the second pair
    options = {"compute_nll_loss": False, **without_reference(name)}
    loss, aux, grads = run(of_ours(name, **options), case.operands(name))
    kept = [0, 2, 3, 5]
    case.hidden, case.target = case.hidden[kept], case.target[kept]
    expected, fewer, their_grads = run(of_liger(name, **options), case.operands(name))
    assert_close(loss, expected, **FP32)
    assert_close(grads["lin_weight"], their_grads["lin_weight"], **FP32)
    assert_close(aux[0][[0, 2]], fewer[0], **FP32)
    assert aux[1][1] == 0
    if name == "ORPO":
        assert_close(aux[7:], fewer[7:], **FP32)


def test_kto_row_without_a_token_does_not_count():
    case = Case(4, 5, 23, 6)
    case.target[2] = IGNORE
    found = run(of_ours("KTO", average_log_prob=True), case.operands("KTO"))
    kept = [0, 1, 3]
    case.hidden, case.target, case.labels = case.hidden[kept], case.target[kept], case.labels[kept]
    expected = run(of_liger("KTO", average_log_prob=True), case.operands("KTO"))
    assert_close(found[0], expected[0], **FP32)
    assert_close(found[1], expected[1], **FP32)
    assert_close(found[2]["lin_weight"], expected[2]["lin_weight"], **FP32)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_at_masked_positions(name):
    case, options = Case(4, 5, 23, 6, ignored=0.4), without_reference(name)
    clean = run(of_ours(name, **options), case.operands(name))
    for x in (case.hidden, case.ref_hidden):
        x[~case.scored] = torch.nan
    theirs = run(of_liger(name, **options), case.operands(name))[2]
    assert any(x.isnan().any() for k, x in theirs.items() if "weight" in k)
    found = run(of_ours(name, **options), case.operands(name))
    assert torch.equal(found[0], clean[0])
    for x, y in zip((*found[1], *found[2].values()), (*clean[1], *clean[2].values()), strict=True):
        assert torch.equal(x, y)


def test_nan_log_probs_at_masked_positions():
    case, extra = grpo_case()
    for loss_type in grpo.LOSS_TYPES:
        options = {"loss_type": loss_type, "max_completion_length": 9, "use_bias_correction_kl": True}
        given = {**extra, "vllm_is_ratio": case.ratio}
        clean = run(of_ours("GRPO", **options), {**case.operands("GRPO"), **given})
        poisoned = {k: x.masked_fill(~case.scored, torch.nan) for k, x in given.items()}
        found = run(of_ours("GRPO", **options), {**case.operands("GRPO"), **poisoned})
        assert torch.equal(found[0], clean[0]), loss_type
        assert all(torch.equal(x, clean[2][k]) for k, x in found[2].items()), loss_type


@pytest.mark.parametrize("name", PAIRED)
def test_odd_batch(name):
    """Liger says nothing of a batch of one chosen and two rejected rows."""
    case = Case(3, 4, 23, 6)
    assert run(of_liger(name, **without_reference(name)), case.operands(name))[0].isfinite()
    case = Case(5, 4, 23, 6)
    with pytest.raises(ValueError, match="even number, got 5 rows"):
        of_ours(name, **without_reference(name))(**case.operands(name))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("token", [23, -1])
def test_ids_outside_the_vocabulary(name, learns, token):
    case = Case(4, 5, 23, 6)
    operands = case.operands(name)
    key = {"GRPO": "selected_token_ids", "JSD": "true_labels", "CosineSimilarity": "true_labels"}.get(name, "target")
    operands[key] = operands[key].clone()
    operands[key].view(-1)[3] = token
    with pytest.raises(ValueError, match=f"target {token} at position 3 is outside the vocabulary of 23"):
        run(of_ours(name, **without_reference(name)), operands, LEAVES if learns else ("_input", "student_input"))
    if name == "GRPO":  # Liger takes any; here, where nothing is scored any will do
        assert run(of_liger("GRPO", use_ref_model=False), operands)[0].isfinite()
        operands["attention_mask"] = operands["attention_mask"].clone()
        operands["attention_mask"].view(-1)[3] = 0
        assert run(of_ours("GRPO", use_ref_model=False), operands)[0].isfinite()


def test_orpo_at_saturated_probability():
    """One token has all the probability there is: log(1 − p) is −∞."""
    weight = torch.zeros(9, 4)
    weight[0] = 100.0
    hidden, target = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    target[1, 0] = 5
    operands = {"lin_weight": weight, "_input": hidden, "target": target}
    assert run(of_liger("ORPO"), operands)[2]["_input"].isnan().any()
    loss, aux, grads = run(of_ours("ORPO"), operands)
    assert all(x.isfinite().all() for x in (loss, *aux, *grads.values()))


@pytest.mark.parametrize("name", [*PAIRED, "KTO"])
def test_logit_means_do_not_count_padding(name):
    case = Case(4, 5, 23, 6, ignored=0.4, dtype=torch.float64)
    found = run(of_ours(name, **without_reference(name)), case.operands(name))[1][2:4]
    logits = case.hidden @ case.weight.T + case.bias
    chosen = case.labels if name == "KTO" else torch.arange(4) < 2
    picked = [logits[side[:, None] & case.scored] for side in (chosen, ~chosen)]
    assert_close(torch.stack(found), torch.stack([x.sum() if name == "KTO" else x.mean() for x in picked]))
    theirs = run(of_liger(name, **without_reference(name)), case.operands(name))[1][2:4]
    assert not torch.isclose(torch.stack(found), torch.stack(theirs).double(), rtol=1e-3).any()


def test_logit_means_take_no_product(tmp_path):
    case = Case(8, 20, 501, 8, ignored=0.4)
    operands = Operands(case.hidden, case.weight, case.target, case.bias)
    meter = oracle.Meter(lambda: logit_sums(operands, case.scored), tmp_path)
    assert meter.products == []
    assert meter.largest_bytes < 20 * 501 * 4


def test_weight_gradient_does_not_drift_with_chunks():
    """bf16: Liger adds a rounded dW chunk by chunk, 0.4% off with 2 chunks and 1.1% with 256; ours is rounded once."""
    case = Case(512, 2, 97, 16, dtype=torch.bfloat16)
    exact = Case(512, 2, 97, 16, dtype=torch.bfloat16)
    exact.hidden, exact.weight = exact.hidden.double(), exact.weight.double()
    truth = run(of_ours("CPO"), exact.operands("CPO", bias=False))[2]["lin_weight"]

    def error(module):
        return oracle.error(run(module, case.operands("CPO", bias=False))[2]["lin_weight"], truth)

    theirs = error(of_liger("CPO", chunk_size=1))
    mine = {chunk: error(of_ours("CPO", chunk_size=chunk)) for chunk in (1, 128)}
    assert theirs > 0.005
    assert mine[1] == mine[128] < 0.003
    assert error_in_tiles(case, truth) < 0.003


def error_in_tiles(case, truth):
    """With tiles of two pairs: 128 of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xpo_fast.head.plan._ENOUGH_TOKENS", {"cpu": 8, "cuda": 8})
        return oracle.error(run(of_ours("CPO"), case.operands("CPO", bias=False))[2]["lin_weight"], truth)


def test_kl_one_a_row():
    """Liger adds every row's loss to every kl; its documentation has one a row."""
    case = Case(4, 5, 23, 6)
    kl = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = run(of_ours("KTO", beta=0.4), {**case.operands("KTO"), "kl": kl})
    logps = case.logps.sum(1)
    sign = torch.where(case.labels, 1.0, -1.0)
    assert_close(found[0], (1 - torch.sigmoid(0.4 * (logps - kl) * sign)).mean())
    theirs = run(of_liger("KTO", beta=0.4), {**case.operands("KTO"), "kl": kl})[0]
    assert theirs > 2 * found[0]
    same = run(of_ours("KTO", beta=0.4), {**case.operands("KTO"), "kl": torch.full((4,), 0.7)})
    for shape in ((), (1,)):
        one = run(of_ours("KTO", beta=0.4), {**case.operands("KTO"), "kl": torch.full(shape, 0.7)})
        assert_close(one[0], same[0])
        assert_close(one[2], same[2])
    with pytest.raises(ValueError, match=r"kl must be one number, or one a row \(4,\), got \(3,\)"):
        of_ours("KTO")(**case.operands("KTO"), kl=torch.zeros(3))


def test_label_smoothing_of_sigmoid():
    case = Case(4, 5, 23, 6)
    options = {"beta": 0.3, "label_smoothing": 0.2}
    loss, aux, _ = run(of_ours("DPO", **options), {**case.operands("DPO"), **case.ref})
    h = aux[5] - aux[6]
    assert_close(loss, (-0.8 * F.logsigmoid(h) - 0.2 * F.logsigmoid(-h)).mean())
    assert not math.isclose(
        loss, run(of_liger("DPO", **options), {**case.operands("DPO"), **case.ref})[0], rel_tol=1e-3
    )


def test_luspo_does_not_depend_on_padding():
    """A row counts by its own tokens: wider padding changes nothing, and it is METHODS["luspo"]."""
    case, extra = grpo_case()
    for level in ("token", "sequence"):
        options = {"loss_type": "luspo", "importance_sampling_level": level, "epsilon_high": 0.3}
        operands = {**case.operands("GRPO"), **extra}
        found = run(of_ours("GRPO", **options), operands)
        padded = {
            k: torch.cat([x, x[:, :2]], dim=1) if isinstance(x, torch.Tensor) and x.shape[:2] == (5, 7) else x
            for k, x in operands.items()
        }
        padded["attention_mask"][:, 7:] = 0
        wider = run(of_ours("GRPO", **options), padded)
        assert_close(wider[0], found[0])
        assert_close(wider[2]["lin_weight"], found[2]["lin_weight"])
        narrow, wide = (run(of_liger("GRPO", **options), x)[0] for x in (operands, padded))
        assert not torch.isclose(wide, narrow, rtol=0.1)  # theirs
    given = {"token_logp": case.logps, "mask": case.scored, "advantage": case.advantages}
    given |= {"old_logp": case.old, "ref_token_logp": case.ref_logps}
    losses, _ = xf.METHODS["luspo"](**given, eps_low=0.2, eps_high=0.3, beta=0.04)
    assert_close(found[0], losses.mean(), **FP32)


# --- what it does beside ------------------------------------------------------------------------------------


def test_ipo_is_an_addition():
    case = Case(4, 5, 23, 6, ignored=0.3)
    objective = xf.Objective("ipo", beta=0.3)
    ref = {"ref_hidden": case.ref_hidden, "ref_weight": case.ref_weight, "ref_bias": case.ref_bias}
    out = objective(case.hidden, case.weight, case.target, bias=case.bias, **ref)
    for average in (True, False):
        module = of_ours("DPO", loss_type="ipo", beta=0.3, average_log_prob=average)
        loss, aux, _ = run(module, {**case.operands("DPO"), **case.ref})
        assert_close(loss, out.loss)
        if average:
            assert_close((aux[5] - aux[6]).mean(), out.metrics["rewards/margins"])


@pytest.mark.parametrize(
    ("name", "options", "method", "hyper"),
    [
        (
            "DPO",
            {"beta": 0.3, "label_smoothing": 0.1, "use_ref_model": True},
            "dpo",
            {"beta": 0.3, "label_smoothing": 0.1},
        ),
        ("SimPO", {"beta": 2.0, "gamma": 1.0, "compute_nll_loss": False}, "simpo", {"beta": 2.0, "gamma": 1.0}),
        ("CPO", {"compute_nll_loss": False}, "cpo", {"alpha": 0.0}),
        ("DPO", {"loss_type": "discopop", "use_ref_model": True}, "discopop", {}),
    ],
)
def test_the_objective_is_the_same(name, options, method, hyper):
    case = Case(6, 7, 37, 5, ignored=0.4)
    extra = case.ref if options.get("use_ref_model") else {}
    loss, aux, grads = run(of_ours(name, **options), {**case.operands(name), **extra})
    weight = case.weight.clone().requires_grad_()
    ref = {"ref_hidden": case.ref_hidden, "ref_weight": case.ref_weight, "ref_bias": case.ref_bias} if extra else {}
    out = xf.Objective(method, **hyper)(case.hidden, weight, case.target, bias=case.bias, **ref)
    out.loss.backward()
    assert_close(loss, out.loss.detach())
    assert_close(grads["lin_weight"], weight.grad)
    assert_close(aux[5].mean(), out.metrics["rewards/chosen"])


@pytest.mark.parametrize("name", LOSSES)
def test_units_longer_than_a_tile(name, monkeypatch):
    case = Case(6, 9, 37, 5, ignored=0.3)
    whole = run(of_ours(name, **without_reference(name)), case.operands(name))
    monkeypatch.setattr("xpo_fast.head.tiling.DEFAULT_TILE_BYTES", {"cpu": 3 * 37 * 4, "cuda": 3 * 37 * 4})
    tiled = run(of_ours(name, **without_reference(name)), case.operands(name))
    assert_close(tiled[0], whole[0])
    assert_close(tiled[2], whole[2])


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_that_of_a_tile(name, tmp_path, monkeypatch):
    """No tensor of all tokens by the vocabulary, whatever the chunk."""
    monkeypatch.setattr("xpo_fast.head.plan._ENOUGH_TOKENS", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr("xpo_fast.head.gemms._used_tiles", [])
    case = Case(32, 8, 2003, 4)
    operands = {k: x.requires_grad_() if k in LEAVES else x for k, x in case.operands(name).items()}

    def call():
        out = of_ours(name, chunk_size=16, **without_reference(name))(**operands)
        (out[0] if isinstance(out, tuple) else out).backward()

    assert oracle.Meter(call, tmp_path).largest_bytes <= 16 * 2003 * 4


@pytest.mark.parametrize("name", LOSSES)
def test_float64_gradients(name):
    case = Case(4, 3, 7, 3, ignored=0.3, dtype=torch.float64)
    operands = case.operands(name)
    keys = [k for k in operands if k in LEAVES]
    module = of_ours(name, **without_reference(name))
    if name == "GRPO":
        operands["old_per_token_logps"] = case.old

    def loss(*leaves):
        out = module(**{**operands, **dict(zip(keys, leaves, strict=True))})
        return out[0] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(loss, [operands[k].requires_grad_() for k in keys])


class GatheredParameters:
    """DeepSpeed's, of parameters that keep what they are when whole as `all`."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        for x in self.parameters:
            x.data = x.all

    def __exit__(self, *_):
        for x in self.parameters:
            x.data = x.data.new_empty(0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_that_zero3_has_in_parts(name, monkeypatch):
    """Gathered for the call, of another dtype than the hidden states for GRPO; its gradient is the parameter's."""
    zero = SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    case = Case(4, 5, 23, 6, ignored=0.3, dtype=torch.float32)
    operands, options = case.operands(name, bias=False), without_reference(name)
    key = "student_weight" if "student_weight" in operands else "lin_weight"
    if name == "GRPO":
        operands["_input"] = operands["_input"].bfloat16()
    expected = run(of_ours(name, **options), operands)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_shape, parameter.all = operands[key].shape, operands[key]
    parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    wanted = [k for k in LEAVES if k != key]
    loss, _, grads = run(of_ours(name, **options), {**operands, key: parameter}, wanted)
    assert_close(loss, expected[0])
    assert_close({**grads, key: parameter.grad}, expected[2])
    assert parameter.shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast(name):
    case = Case(4, 5, 130, 32, ignored=0.3)
    operands = case.operands(name)
    module = of_ours(name, **without_reference(name))
    full = run(module, operands)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(module, operands)
    assert_close(found[0].float(), full[0], rtol=0.03, atol=0.02)
    assert all(x.dtype == torch.float32 for x in found[2].values())
    assert any(not torch.equal(x, full[2][k]) for k, x in found[2].items())


def test_grpo_casts_the_weight_as_liger_does():
    case, extra = grpo_case()
    case.hidden = case.hidden.bfloat16()
    operands = {**case.operands("GRPO", bias=False), **extra}
    found, expected = (run(make("GRPO"), operands) for make in (of_ours, of_liger))
    assert_close(found[0], expected[0], rtol=0.02, atol=1e-3)
    assert found[2]["lin_weight"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", ["DPO", "JSD"])
def test_compiles_around_it(name):
    """One graph, but for distillation, whose tiles are not traced. torch hides the warning from all but tests."""
    torch._dynamo.reset()
    case = Case(4, 5, 23, 6, ignored=0.3)
    operands = case.operands(name)
    module = of_ours(name, **without_reference(name))
    expected = run(module, operands)
    found = run(torch.compile(module, backend="eager", fullgraph=name != "JSD"), operands)
    assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_backwards(name):
    """In-place arithmetic on the loss, as trainers do; a graph kept; a second derivative; a copy of the module."""
    case = Case(4, 5, 23, 6, ignored=0.3)
    module = pickle.loads(pickle.dumps(copy.deepcopy(of_ours(name, beta=0.3, **without_reference(name)))))
    assert module.beta == 0.3
    _, _, expected = run(module, case.operands(name))
    leaves = {k: x.requires_grad_() for k, x in case.operands(name).items() if k in LEAVES}
    out = module(**{**case.operands(name), **leaves})
    loss = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves.values(), create_graph=True, retain_graph=True)
    loss /= 4
    loss += 1.0
    for share in (1, 2):
        loss.backward(retain_graph=share == 1)
        assert_close({k: x.grad for k, x in leaves.items()}, {k: share / 4 * x for k, x in expected.items()})
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_keeps_small_gradients(name):
    """float16, multiplied by a loss scale only in the backward: as from float32 operands of the same values."""
    case = Case(64, 5, 23, 6, ignored=0.3)
    operands = case.operands(name)
    floats = {k: x.half().float() for k, x in operands.items() if x is not None and x.is_floating_point()}
    narrow = {k: x.half() for k, x in floats.items() if k != "advantages"}
    module = of_ours(name, **without_reference(name))
    expected, found = (run(module, {**operands, **x}, scale=2.0**-12) for x in (floats, narrow))
    assert found[0].dtype == torch.float32
    assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    expected, found = (run(module, {**operands, **x}, scale=512.0)[2] for x in (floats, narrow))
    for leaf, grad in found.items():
        assert grad.dtype == torch.float16
        assert oracle.error(grad, expected[leaf]) < 2e-3, leaf


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit(name):
    case, options = Case(4, 5, 23, 6), without_reference(name)
    operands = case.operands(name)
    weight = "student_weight" if "student_weight" in operands else "lin_weight"
    hidden = "student_input" if "student_input" in operands else "_input"
    target = next(k for k in ("target", "selected_token_ids", "true_labels") if k in operands)
    bias = "student_bias" if "student_bias" in operands else "bias"
    for key, wrong, message in (
        (hidden, operands[hidden][..., :-1], "weight must be"),
        (target, operands[target][..., :-1], "one token a hidden state"),
        (target, operands[target].float(), "integer token ids"),
        (bias, operands[bias][:-1], "bias must be a float tensor"),
        (weight, operands[weight].double(), None if name == "GRPO" else "cast one of them"),
    ):
        given = {**operands, key: wrong}
        if message is None:
            of_ours(name, **options)(**given)
            continue
        with pytest.raises(ValueError, match=message):
            of_ours(name, **options)(**given)
    with pytest.raises(TypeError, match=f"LigerFusedLinear{name}Loss: missing a required argument"):
        of_ours(name)(**{k: x for k, x in operands.items() if k != target})
    with pytest.raises(TypeError, match=f"LigerFusedLinear{name}Loss: got an unexpected keyword"):
        of_ours(name, alhpa=1.0)
    with pytest.raises(ValueError, match="beta"):
        run(of_ours(name, beta=-0.1, **options), operands)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_at_a_scored_position(name):
    """It is seen: neither refused nor dropped."""
    case = Case(4, 5, 23, 6)
    case.hidden[1, 2] = torch.nan
    loss, _, grads = run(of_ours(name, **without_reference(name)), case.operands(name))
    assert loss.isnan() and all(x.isnan().any() for x in grads.values())


def test_no_scored_token_at_all():
    for name in LOSSES:
        case = Case(4, 5, 23, 6)
        case.target[:] = IGNORE
        loss, aux, grads = run(of_ours(name, **without_reference(name)), case.operands(name))
        assert loss == 0, name
        assert all(x.isfinite().all() for x in aux), name
        assert all((x == 0).all() for x in grads.values()), name


def grpo_error(**options):
    case, extra = grpo_case()
    of_ours("GRPO", **{k: x for k, x in options.items() if not isinstance(x, torch.Tensor)})(
        **{**case.operands("GRPO"), **extra, **{k: x for k, x in options.items() if isinstance(x, torch.Tensor)}}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type to be one of grpo, bnpo"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level to be one of token, sequence"),
        ({"importance_sampling_level": "sequence", "loss_type": "sapo"}, "pass 'token' instead"),
        ({"loss_type": "dr_grpo"}, "divides by max_completion_length"),
        ({"delta": 0.0}, "delta > 0"),
        ({"beta": -0.1}, "beta >= 0"),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, "divides by max_completion_length"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos > 0"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg > 0"),
        ({"advantages": torch.zeros(4)}, r"advantages must be \(5,\), got \(4,\)"),
        ({"vllm_is_ratio": torch.ones(5, 3)}, r"vllm_is_ratio must be \(5,\) or \(5, 1\) or \(5, 7\)"),
        ({"old_per_token_logps": torch.ones(5, 3)}, r"old_per_token_logps must be \(5, 7\)"),
        ({"attention_mask": torch.full((5, 7), 0.5)}, "attention_mask of 0 and 1"),
    ],
)
def test_grpo_errors(options, message):
    with pytest.raises(ValueError, match=message):
        grpo_error(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": loss_type, name: 0.0}
        for name, acts in {"delta": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), "sapo_temperature_pos": ("sapo",),
                           "sapo_temperature_neg": ("sapo",)}.items()
        for loss_type in grpo.LOSS_TYPES
        if loss_type not in acts
    ],
    ids=lambda options: "-".join(map(str, options)) + "-" + options["loss_type"],
)  # fmt: skip
def test_grpo_options_are_checked_where_they_act(options):
    """As by Liger's function; its module refuses them whatever the loss is, and so does ours."""
    case, extra = grpo_case()
    operands = {**case.operands("GRPO"), **extra}
    operands["weight"] = operands.pop("lin_weight")
    usual = {"loss_type": options["loss_type"], "max_completion_length": 9}
    found, want = (grpo.liger_fused_linear_grpo(**operands, **x)[0] for x in (usual | options, usual))
    assert torch.equal(found, want)
    with pytest.raises(ValueError, match="> 0"):
        of_ours("GRPO", **usual, **{k: x for k, x in options.items() if k not in usual})


def test_grpo_reference():
    case, extra = grpo_case()
    with pytest.raises(ValueError, match="needs ref_per_token_logps= or ref_input="):
        of_ours("GRPO")(**case.operands("GRPO"))
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        both = of_ours("GRPO")(**case.operands("GRPO"), **extra, **case.ref)
    assert torch.equal(both[0], of_ours("GRPO")(**case.operands("GRPO"), **extra)[0])


def test_paired_errors():
    case = Case(4, 5, 23, 6)
    for options, message in (
        ({"loss_type": "dpop"}, "loss_type to be one of sigmoid"),
        ({"loss_type": "exo_pair"}, r"label_smoothing in \(0, 0.5\)"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            of_ours("DPO", **options)
    with pytest.raises(ValueError, match="use_ref_model=True needs ref_input="):
        of_ours("DPO")(**case.operands("DPO"))
    with pytest.raises(ValueError, match="of the reference: targets must have one token a hidden state"):
        of_ours("DPO")(**case.operands("DPO"), ref_input=case.ref_hidden[:2])
    with pytest.raises(ValueError, match="the policy's vocabulary of 23, got 22"):
        of_ours("DPO")(**case.operands("DPO"), ref_input=case.ref_hidden, ref_weight=case.ref_weight[:22])
    with pytest.raises(ValueError, match="nll_target must be shaped as target"):
        of_ours("ORPO")(**case.operands("ORPO"), nll_target=case.target[:2])
    with pytest.raises(ValueError, match="expected padded rows"):
        ours.liger_fused_linear_cpo(case.hidden.flatten(0, 1), case.weight, case.target.flatten())
    with pytest.raises(ValueError, match="preference_labels must be a bool tensor"):
        of_ours("KTO")(**{**case.operands("KTO"), "preference_labels": case.labels.long()})
    with pytest.raises(ValueError, match="preference_labels must be a bool tensor"):
        of_ours("KTO")(**{**case.operands("KTO"), "preference_labels": None})
    for name in ("JSD", "CosineSimilarity"):
        with pytest.raises(ValueError, match="temperature > 0"):
            of_ours(name, temperature=0)


def test_reference_with_the_policys_head():
    case = Case(4, 5, 23, 6)
    ref = {"ref_input": case.ref_hidden}
    own = {**ref, "ref_weight": case.weight, "ref_bias": case.bias}
    one, other = (run(of_ours("DPO"), {**case.operands("DPO"), **r}) for r in (ref, own))
    assert torch.equal(one[0], other[0])
