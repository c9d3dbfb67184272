"""Every kernel compiles for every target without a spill: some variants here, all by `make kernels`.

And the gates can fail: each of them has a kernel here that does not pass.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest

pytest.importorskip("triton", reason="Triton is for Linux alone")

import triton
import triton.language as tl
from triton.runtime import JITFunction
from xpo_fast.kernels import assembly, gates

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
    kernels = [x for name, x in vars(gates.module(module)).items() if not name.startswith("_")]
    kernels = {x.__name__ for x in kernels if isinstance(x, JITFunction)}
    variants = gates.variants(module)
    assert kernels and {variant.kernel.__name__ for variant in variants} == kernels
    assert any(variant.representative for variant in variants)
    names = [(variant.kernel.__name__, variant.name) for variant in variants]
    assert len(set(names)) == len(names)


def variant(**changes):
    first = next(v for v in gates.variants("gather") if v.representative)
    return dataclasses.replace(first, **changes)


@triton.jit
def held(x, out, BLOCK: tl.constexpr):
    """out = x Σ x: all of x is there until it has been added up."""
    lane = tl.arange(0, BLOCK)
    row = tl.load(x + lane)
    tl.store(out + lane, row * tl.sum(row, axis=0))


@pytest.mark.parametrize(("target", "block"), [("sm_90", 16384), ("gfx942", 32768)])
def test_a_spill_fails(target, block):
    """512 elements a thread do not fit its registers."""
    row = gates.Variant(held, "a row", {"x": "*fp32", "out": "*fp32"}, {"BLOCK": block}, ("x", "out"), num_warps=1)
    problems = gates.compile_variant(row, target).problems
    assert any("spills" in p for p in problems) and any("bytes of stack" in p for p in problems)


def test_a_lost_asynchronous_copy_fails():
    assert gates.compile_variant(variant(async_copies=True), "sm_90").problems == ("no asynchronous copy",)
    assert not gates.compile_variant(variant(async_copies=True), "gfx942").problems


def test_an_error_of_the_compiler_fails():
    """A block must be a power of two."""
    options = {"ALIGNED": True, "BLOCK": 1000}
    (problem,) = gates.compile_variant(variant(constexprs=options), "sm_90").problems
    assert "power of 2" in problem


@triton.jit
def twice(x, out, total, stride, vocab, FULL_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2 x, and x added up, in two loops; FULL_BLOCKS: without a mask where a block is full."""
    row = x + tl.program_id(0).to(tl.int64) * stride
    to = out + tl.program_id(0).to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    full = vocab // BLOCK * BLOCK if FULL_BLOCKS else 0
    found = tl.zeros((BLOCK,), tl.float32)
    for TAIL in tl.static_range(2):
        for start in range(full if TAIL else 0, vocab if TAIL else full, BLOCK):
            found += tl.load(row + start + lane, mask=start + lane < vocab if TAIL else None)
    tl.store(total + tl.program_id(0), tl.sum(found, axis=0))
    for TAIL in tl.static_range(2):
        for start in range(full if TAIL else 0, vocab if TAIL else full, BLOCK):
            mask = start + lane < vocab if TAIL else None
            tl.store(to + start + lane, 2 * tl.load(row + start + lane, mask=mask), mask=mask)


def of_twice(**changes):
    options = {
        "signature": {"x": "*fp32", "out": "*fp32", "total": "*fp32", "stride": "i32", "vocab": "i32"},
        "constexprs": {"FULL_BLOCKS": True, "BLOCK": 1024},
        "divisible": ("x", "out", "stride"),
        "wide_loops": 2,
        **changes,
    }
    return gates.Variant(twice, "any V", **options)


MASKED = {"FULL_BLOCKS": False, "BLOCK": 1024}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_elements_one_by_one_fail(target):
    """A mask that ends anywhere; a block that is copied to where nothing is aligned; and what passes."""
    assert not gates.compile_variant(of_twice(), target).problems
    (problem,) = gates.compile_variant(of_twice(constexprs=MASKED), target).problems
    assert problem == "0 loops with wide loads and stores alone, expected 2"
    (problem,) = gates.compile_variant(of_twice(divisible=("x", "stride")), target).problems
    assert problem == "1 loops with wide loads and stores alone, expected 2"
    divisible = ("x", "out", "stride", "vocab")
    assert not gates.compile_variant(of_twice(constexprs=MASKED, divisible=divisible), target).problems


def test_too_many_instructions_fail():
    found = gates.compile_variant(of_twice(), "sm_90")
    assert 1 < found.instructions < 20  # a load, a product, a store of 4, a sum, and a thread has 8 at a time
    ceiling = found.instructions - 0.1
    (problem,) = gates.compile_variant(of_twice(instructions=ceiling), "sm_90").problems
    assert "instructions a logit, expected at most" in problem
    without = of_twice(constexprs={"FULL_BLOCKS": True, "BLOCK": 32}, num_warps=1, instructions=100.0)
    assert "no loop over a row" in str(gates.compile_variant(dataclasses.replace(without, kernel=once), "sm_90"))


@triton.jit
def once(x, out, total, stride, vocab, FULL_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Without a loop."""
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(x + lane))


# kernels/one_read.py writes a row in a loop, then its entry at the target again: another thread's store, which must
# come after.

# By backend: outputs of the compiler, how they are written, and what makes all threads of a program wait until what
# each of them has stored in global memory is there for the others. PTX's bar.sync does; on AMD s_barrier with LLVM's
# fence before it, unless that is marked as of local memory alone.
LLVM = assembly.Assembly(
    label=r"^([\w.]+):",
    branch=r"\blabel %([\w.]+)",
    access=r"^\s.*?\b(load|store)\b.*(addrspace\([18]\))",
    bytes=len,
    instruction=r"^\s",
)
BARRIERS = {
    "cuda": (("ptx", assembly.PTX, r"\bbar(?:rier)?\.sync\b"),),
    "hip": (
        ("amdgcn", assembly.AMD, r"\bs_barrier\b"),
        ("llir", LLVM, r'\bfence syncscope\("workgroup"\) release\b(?!.*!mmra).*\n.*@llvm\.amdgcn\.s\.barrier'),
    ),
}


def last_store_is_ordered(text, assembly, barrier):
    """Whether between all stores of loops and the last one of the kernel is a barrier that no branch goes around."""
    lines = text.splitlines()
    labels = {found[1]: n for n, line in enumerate(lines) if (found := re.search(assembly.label, line))}
    jumps = [
        (n, labels[to]) for n, line in enumerate(lines) for to in re.findall(assembly.branch, line) if to in labels
    ]
    stores = [n for n, line in enumerate(lines) if (x := re.search(assembly.access, line)) and x[1].startswith("st")]
    looped = [n for n in stores if any(to < n < at for at, to in jumps)]
    assert looped and stores[-1] > looped[-1], "the last store is one of a loop"
    between = [text.count("\n", 0, found.start()) for found in re.finditer(barrier, text)]
    return any(looped[-1] < n < stores[-1] and not any(at < n < to for at, to in jumps) for n in between)


def unordered(variant, target):
    """The outputs of the compiler without such a barrier."""
    compiled = gates.compiled(variant, target)
    return [
        kind
        for kind, assembly, barrier in BARRIERS[gates.TARGETS[target].backend]
        if not last_store_is_ordered(compiled.asm[kind], assembly, barrier)
    ]


@pytest.mark.parametrize(("variant", "target"), [p for p in REPRESENTATIVE if p.id.startswith("one_read:")])
def test_the_entry_at_the_target_is_stored_last(variant, target):
    assert "grad" in variant.signature
    assert not unordered(variant, target)


@triton.jit
def stored_twice(out, n, at, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """0, and 1 in one place."""
    for start in range(0, n, BLOCK):
        tl.store(out + start + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))
    if BARRIER == "always":
        tl.debug_barrier()
    if BARRIER == "sometimes":  # noqa: SIM102
        if at > 7:
            tl.debug_barrier()
    tl.store(out + at, 1.0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_stores_in_any_order_are_found(target):
    def of(barrier):
        signature = {"out": "*fp32", "n": "i32", "at": "i32"}
        return gates.Variant(stored_twice, barrier, signature, {"BARRIER": barrier, "BLOCK": 1024}, ("out",))

    everything = [kind for kind, *_ in BARRIERS[gates.TARGETS[target].backend]]
    assert unordered(of("never"), target) == unordered(of("sometimes"), target) == everything
    assert not unordered(of("always"), target)


def test_a_fence_of_local_memory_is_not_enough():
    """As a reduction has it."""
    text = """
2:
  store <4 x float> %1, ptr addrspace(1) %2, align 4
  br i1 %3, label %2, label %4
4:
  fence syncscope("workgroup") release, !dbg !9
  tail call void @llvm.amdgcn.s.barrier(), !dbg !9
  store i16 %5, ptr addrspace(1) %6, align 2
"""
    *_, (_, assembly, barrier) = BARRIERS["hip"]
    assert last_store_is_ordered(text, assembly, barrier)
    local = text.replace("release, !dbg !9", "release, !dbg !9, !mmra !7")
    assert not last_store_is_ordered(local, assembly, barrier)


PTX = """
$L__BB0_1:
	@%p5 ld.global.v4.b32 { %r14, %r15, %r16, %r17 }, [ %rd23 + 0 ];
	// a remark
	add.f32 %f1, %f1, %f2;
	@%p5 st.global.v2.b32 [ %rd25 + 0 ], { %r23, %r24 };
	@%p23 bra 	$L__BB0_1;
$L__BB0_2:
	ld.global.b16 %rs1, [ %rd1 ];
	@%p24 bra 	$L__BB0_2;
"""
# The first loop twice a round, 7 instructions; the second, as it is.
SASS = """
.L_x_1:
        /*0010*/              @!P1 LDG.E.128 R8, desc[UR14][R16.64] ;
        /*0020*/                   FADD R1, R2, R3 ;
        /*0030*/              @!P1 STG.E.64 desc[UR14][R8.64], R4 ;
        /*0040*/              @!P1 LDG.E.128 R8, desc[UR14][R16.64] ;
        /*0050*/                   FADD R1, R2, R3 ;
        /*0060*/              @!P1 STG.E.64 desc[UR14][R8.64], R4 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDG.E.U16 R8, desc[UR14][R16.64] ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_instructions_of_a_loop_that_is_unrolled():
    first, second = assembly.loops(assembly.SASS, SASS)
    assert first == assembly.Loop(instructions=7, loads=32, stores=16, wide=True)
    assert second == assembly.Loop(instructions=2, loads=2, stores=0, wide=False)
    assert assembly.loops(assembly.PTX, PTX)[0] == assembly.Loop(4, 16, 8, True)
    # 2 rounds of 4 columns in the wide loop; where there is none, all of them count.
    assert assembly.instructions_per_logit(PTX, SASS, 4) == 0.88
    assert assembly.instructions_per_logit(PTX, SASS.replace("E.64", "E"), 4) == 0.5


@pytest.mark.parametrize("module", gates.modules())
def test_wide_loops_are_asked_for_at_any_vocabulary(module):
    """A vocabulary that is a multiple of 16 hides a mask that is not constant over 16 bytes."""
    wide = [v for v in gates.variants(module) if v.wide_loops]
    assert {v.kernel for v in wide} == {v.kernel for v in wide if "vocab" not in v.divisible}


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
