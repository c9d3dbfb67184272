"""Every kernel compiles for every target without a spill: some variants here, all by `make kernels`.

And the gates can fail: each of them has a kernel here that does not pass.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

pytest.importorskip("triton", reason="Triton is for Linux alone")

from triton.runtime import JITFunction
from xpo_fast.kernels import gates

REPRESENTATIVE = [
    pytest.param(variant, target, id=f"{module}: {variant.kernel.__name__}, {variant.name}, {target}")
    for module in gates.modules()
    for variant in gates.variants(module)
    for target in variant.targets
    if variant.representative
]


@pytest.mark.parametrize(("variant", "target"), REPRESENTATIVE)
def test_compiles_without_a_spill(variant, target):
    found = gates.compile_variant(variant, target)
    assert not found.problems
    assert 0 < found.registers <= (512 if target.startswith("gfx") else 255)


@pytest.mark.parametrize("module", gates.modules())
def test_no_kernel_is_left_out(module):
    """What a file launches is among its variants; a name with an underscore is a part of other kernels."""
    kernels = [x for name, x in vars(gates._module(module)).items() if not name.startswith("_")]
    kernels = {x.__name__ for x in kernels if isinstance(x, JITFunction)}
    variants = gates.variants(module)
    assert kernels and {variant.kernel.__name__ for variant in variants} == kernels
    assert any(variant.representative for variant in variants)
    names = [(variant.kernel.__name__, variant.name) for variant in variants]
    assert len(set(names)) == len(names)


def variant(**changes):
    first = next(v for v in gates.variants("gather") if v.representative)
    return dataclasses.replace(first, **changes)


@pytest.mark.parametrize(("target", "block"), [("sm_90", 8192), ("gfx942", 16384)])
def test_a_spill_fails(target, block):
    """256 logits a thread do not fit its registers."""
    problems = gates.compile_variant(variant(constexprs={"BLOCK": block}, num_warps=1), target).problems
    assert any("spills" in p for p in problems) and any("bytes of stack" in p for p in problems)


def test_a_lost_asynchronous_copy_fails():
    assert gates.compile_variant(variant(async_copies=True), "sm_90").problems == ("no asynchronous copy",)
    assert not gates.compile_variant(variant(async_copies=True), "gfx942").problems


def test_an_error_of_the_compiler_fails():
    """A block must be a power of two."""
    (problem,) = gates.compile_variant(variant(constexprs={"BLOCK": 1000}), "sm_90").problems
    assert "power of 2" in problem


@pytest.mark.parametrize("changes", [{"constexprs": {}}, {"signature": {"logits": "*bf16", "x": "i32"}}])
def test_arguments_that_do_not_fit(changes):
    with pytest.raises(ValueError, match="gather_forward takes"):
        _ = variant(**changes).source


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels.json"
    arguments = ["--modules", "gather", "--targets", "sm_90", "--representative", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["gates", *arguments])
    assert gates.main() == 0
    assert "2 compiled with Triton" in capsys.readouterr().out
    compiled = json.loads(path.read_text())["compiled"]
    assert {r["kernel"] for r in compiled} == {"gather_forward", "gather_backward"}
    assert all(r["registers"] and not r["problems"] and r["target"] == "sm_90" for r in compiled)
