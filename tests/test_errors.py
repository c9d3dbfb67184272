"""What is refused at the public edge: each time a ValueError that says what was expected, what came and what to do."""

from __future__ import annotations

import pytest
import torch

import xpo_fast as xf

VOCAB, WIDTH = 29, 6

GOOD = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(5, 4),
    "targets": torch.tensor([0, 4, -100]),
    "bias": torch.zeros(5),
    "ref_hidden": torch.zeros(3, 4),
}
ERRORS = [
    ({"hidden": torch.zeros(3, 4, dtype=torch.long)}, "hidden must be a float"),
    ({"hidden": torch.zeros(3, 6)}, r"D = 6.*got \(5, 4\)"),
    ({"weight": torch.zeros(4)}, r"weight must be \(V, D\)"),
    ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "float32 and weight .*bfloat16.*autocast"),
    ({"weight": torch.zeros(5, 4, device="meta")}, "hidden is on cpu and weight on meta"),
    ({"bias": torch.zeros(4)}, r"bias must be .*\(5,\).*\(4,\)"),
    ({"bias": torch.zeros(5, device="meta")}, "bias on meta"),
    ({"targets": torch.zeros(4, dtype=torch.long)}, r"expected \(3,\), got \(4,\)"),
    ({"targets": torch.zeros(3)}, "targets must be integer.*float32"),
    ({"targets": torch.zeros(3, dtype=torch.bool)}, "targets must be integer.*bool"),
    ({"targets": torch.zeros(3, dtype=torch.long, device="meta")}, "targets on meta"),
    ({"targets": torch.tensor([0, 5, 1])}, "target 5 at position 1 .*vocabulary of 5"),
    ({"targets": torch.tensor([0, -1, 1])}, "target -1 .*ignore_index=-100"),
    ({"ignore_index": 0}, "target -100 at position 2"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"temperature": float("nan")}, "temperature must be positive"),
    ({"softcap": -1.0}, "softcap must be positive"),
    ({"logit_scale": 0.0}, "logit_scale must be"),
    ({"chunk_tokens": 0}, "chunk_tokens of at least 1, got 0"),
    ({"tile_bytes": 0}, "tile_bytes=0"),
    ({"backend": "cutlass"}, "no backend named 'cutlass'; there are .*dense, torch"),
    ({"outputs": ("entropi",)}, "no statistic named entropi; there are entropy"),
    ({"outputs": ("kl",), "ref_hidden": None}, "kl need.* ref_hidden="),
    ({"outputs": ("kl",), "ref_hidden": torch.zeros(2, 4)}, "of the reference: .*targets"),
    ({"outputs": ("kl",), "ref_hidden": torch.zeros(3, 6)}, "of the reference: weight"),
    ({"outputs": ("kl",), "ref_weight": torch.zeros(6, 4)}, "vocabulary of 5, got 6"),
    ({"outputs": ("kl",), "hidden": torch.zeros(3, 6), "adapter": torch.zeros(5, 2)}, "adapter.*pass ref_weight="),
]


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(change, message, backend):
    xf.token_stats(**GOOD, backend=backend)
    with pytest.raises(ValueError, match=message):
        xf.token_stats(**{**GOOD, "backend": backend, **change})


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (None, r"padded rows \(B, T\), got targets \(3,\).*cu_seqlens="),
        (torch.tensor([0, 2]), r"from 0 to the number of positions, 3, got \[0, 2\]"),
        (torch.tensor([1, 3]), "from 0"),
        (torch.tensor([0, 3, 2, 3]), "must rise"),
        (torch.tensor([0.0, 3.0]), "integer tensor"),
    ],
)
def test_packed_rows_errors(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        xf.sequence_logps(GOOD["hidden"], GOOD["weight"], GOOD["targets"], cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"packed targets \(N,\)"):
        xf.sequence_logps(torch.zeros(1, 3, 4), GOOD["weight"], GOOD["targets"][None], cu_seqlens=torch.tensor([0, 3]))


def call(method="dpo", *, objective=None, **change):
    """A call that is right but for what `change` says."""
    arguments = {
        "hidden": torch.randn(4, 3, WIDTH),
        "weight": torch.randn(VOCAB, WIDTH),
        "targets": torch.ones(4, 3, dtype=torch.long),
        "ref_logps": torch.zeros(4),
        **({"desirable": torch.tensor([True] * 4), "kl": torch.tensor(0.0)} if method == "kto" else {}),
        **change,
    }
    return xf.Objective(method, **(objective or {}))(**{k: v for k, v in arguments.items() if v is not None})


CALL_ERRORS = [
    ({"hidden": torch.randn(3, 3, WIDTH), "targets": torch.ones(3, 3).long()}, "even number of rows, got 3"),
    ({"hidden": torch.ones(4, 3, WIDTH).long()}, "hidden must be a float"),
    ({"weight": torch.randn(VOCAB, WIDTH + 1)}, r"weight must be \(V, D\) with D = 6"),
    ({"weight": torch.randn(VOCAB, WIDTH).bfloat16()}, "torch.autocast"),
    ({"weight": torch.randn(VOCAB, WIDTH, device="meta")}, "weight on meta"),
    ({"bias": torch.randn(VOCAB + 1)}, r"bias must be .*\(29,\)"),
    ({"targets": torch.ones(4, 2).long()}, r"expected \(4, 3\), got \(4, 2\)"),
    ({"targets": torch.full((4, 3), VOCAB)}, "target 29 at position 0 .*vocabulary of 29"),
    ({"targets": torch.full((4, 3), -1)}, "target -1 at position 0"),
    ({"ref_logps": None}, "pass ref_hidden=.* or ref_logps="),
    ({"ref_hidden": torch.randn(4, 3, WIDTH)}, "reference came twice"),
    ({"ref_logps": torch.zeros(2)}, r"ref_logps must be \(4,\).*got \(2,\)"),
    ({"ref_logps": torch.zeros(4, device="meta")}, "meta"),
    ({"ref_logps": None, "ref_hidden": torch.randn(2, 3, WIDTH)}, "of the reference: "),
    (
        {
            "ref_logps": None,
            "ref_hidden": torch.randn(4, 3, WIDTH),
            "hidden": torch.randn(4, 3, WIDTH + 2),
            "adapter": torch.randn(VOCAB, 2),
        },
        "adapter.*pass ref_weight=",
    ),
    ({"scores": torch.zeros(2)}, "dpo: unknown scores.*takes the columns: none"),
    ({"desirable": torch.zeros(4)}, "unknown desirable"),
    ({"method": "kto", "desirable": None}, "kto: missing desirable.*desirable, kl"),
    ({"method": "kto", "desirable": torch.ones(2).bool()}, r"desirable must be a tensor \(4,\)"),
    ({"method": "kto", "desirable": [True] * 4}, "desirable must be a tensor .*list"),
    ({"method": "kto", "desirable": torch.ones(4)}, "desirable must be a bool"),
    # One number a row would count the reference point B times, as Liger does.
    ({"method": "kto", "kl": torch.zeros(4)}, r"kl must be one number \(\)"),
    ({"method": "kto", "kl": torch.zeros((), device="meta")}, "kl is on meta"),
    ({"cu_seqlens": torch.tensor([0, 12])}, r"packed targets \(N,\), got \(4, 3\)"),
    ({"hidden": torch.randn(12, WIDTH), "targets": torch.ones(12).long()}, "for packed rows pass cu_seqlens="),
]
SETUP_ERRORS = [
    (("dpoo",), {}, "no method named 'dpoo'; did you mean odpo, dpo.*There are .*dpo, "),
    (("dpo",), {"gamma": 1.0}, "dpo has no hyperparameter gamma; it has beta, label_smoothing"),
    (("dpo",), {"backend": "cutlass"}, "no backend named 'cutlass'"),
    (("dpo",), {"reduction": "avg"}, "no reduction named 'avg'; there are mean, sum, none"),
]


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize(("change", "message"), CALL_ERRORS, ids=[m for _, m in CALL_ERRORS])
def test_call_errors(change, message, learn):
    if "weight" not in change and learn == "trainable":
        change = {**change, "weight": torch.randn(VOCAB, WIDTH, requires_grad=True)}
    with pytest.raises(ValueError, match=message):
        call(**change)


@pytest.mark.parametrize(("args", "kwargs", "message"), SETUP_ERRORS, ids=[m for *_, m in SETUP_ERRORS])
def test_setup_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        xf.Objective(*args, **kwargs)


@pytest.mark.parametrize(("change", "message"), [({"beta": -1.0}, "beta > 0"), ({"tile_bytes": 0}, "tile_bytes=0")])
def test_out_of_range_options(change, message):
    with pytest.raises(ValueError, match=message):
        call(objective=change)


def test_plan_refuses_what_the_call_would():
    hidden, weight, targets = torch.randn(4, 3, WIDTH), torch.randn(VOCAB, WIDTH), torch.ones(4, 3).long()
    with pytest.raises(ValueError, match="dpo: unknown softcaps"):
        xf.Objective("dpo").plan(hidden, weight, targets, softcaps=3.0)
    adapted = {"adapter": torch.randn(VOCAB, 2), "ref_hidden": hidden}
    wide = torch.randn(4, 3, WIDTH + 2)
    with pytest.raises(ValueError, match=r"adapter.*pass ref_weight="):
        xf.Objective("dpo").plan(wide, weight, targets, **adapted)
    assert xf.Objective("dpo").plan(wide, weight, targets, **adapted, ref_weight=weight).passes
