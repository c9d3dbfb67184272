"""The GEMM that keeps log-probs and no logit, against float64; interpreter.py says where it runs."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import interpreter
import oracle
from interpreter import DEVICE, INTERPRETED, needs_gpu, needs_triton, run_checks

pytestmark = interpreter.numpy_warnings
poison = interpreter.poison

BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 16, "PARTS": 2, "num_warps": 4, "num_stages": 2}
STATISTICS = ("logp", "lse", "entropy")
# n, V, D
SHAPES = {
    "one token": (1, 7, 3),
    "blocks": (32, 64, 32),
    "blocks and one": (17, 65, 17),
    "ragged": (37, 100, 40),
    "one block of words": (3, 20, 16),
}
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "everything": {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
}


@needs_triton
def test_in_the_interpreter():
    run_checks(__file__, interpreted=True)


@needs_gpu
def test_on_a_gpu():
    run_checks(__file__, interpreted=False)


@needs_triton
@pytest.mark.parametrize(
    ("row_blocks", "vocab_blocks", "group", "processors", "expected"),
    [
        (16, 501, 16, 132, 8),  # 128 programs in one wave
        (64, 501, 16, 132, 8),  # four waves of one group each, where two shares would read all rows at once
        (64, 501, 64, 132, 2),
        (1, 501, 1, 132, 126),  # four blocks each: 132 shares would be no faster
        (1, 3, 1, 132, 3),
        (1000, 501, 16, 1, 1),
        (3, 5, 3, 2, 5),  # 15 blocks by two processors: eight one after the other, not ten
    ],
)
def test_number_of_splits(row_blocks, vocab_blocks, group, processors, expected):
    from xpo_fast.kernels.logps import split_count

    assert split_count(row_blocks, vocab_blocks, group, processors) == expected


@needs_triton
def test_operands_that_are_taken():
    from xpo_fast.kernels.logps import supports

    hidden, weight = torch.zeros(3, 32), torch.zeros(5, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert supports(hidden.to(dtype), weight.to(dtype))
    assert supports(hidden[:, :7], weight[:, :7])
    assert not supports(hidden.double(), weight.double())
    assert not supports(hidden.bfloat16(), weight)
    assert not supports(torch.zeros(32, 3).T, weight)
    assert not supports(hidden, torch.zeros(32, 5).T)
    assert not supports(hidden, torch.zeros(1, 32).as_strided((1, 32), (2**23, 1)))


@needs_triton
def test_choice_of_configuration(monkeypatch):
    """Large blocks are for 16-bit rows that can be copied asynchronously, on a GPU with memory for them."""
    from xpo_fast.kernels import launch, logps

    memory = torch.zeros(2, 4096, dtype=torch.bfloat16)
    hidden, weight = memory[0, :96].view(3, 32), memory[1, :160].view(5, 32)
    others = (
        (hidden.float(), weight.float()),
        (hidden[:, :24], weight[:, :24]),  # D
        (hidden, memory[1, :200].view(5, 40)[:, :32]),  # a stride
        (memory[0, 1:97].view(3, 32), weight),  # an address
    )
    for entropy in (False, True):
        large = logps.choose_config(hidden, weight, entropy)
        assert large == logps.choose_config(hidden.half(), weight.half(), entropy) != logps.SMALL
        assert all(logps.choose_config(*operands, entropy) == logps.SMALL for operands in others)
    with monkeypatch.context() as little:
        little.setattr(logps, "_shared_limit", lambda _: 48 * 1024)
        assert logps.choose_config(hidden, weight, False) == logps.SMALL
    with launch.override("logps_pass", launch.config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_D=16, PARTS=1)):
        assert logps.choose_config(hidden, weight, False).num_warps == 4


def problem(shape, dtype=torch.float32, *, std=1.0, bias=False):
    """hidden, weight, targets and the bias, whose logits have a standard deviation of about 3."""
    n, vocab, width = SHAPES.get(shape, shape)
    hidden = oracle.normal(n, width, seed=1, std=std, dtype=dtype).to(DEVICE)
    weight = oracle.normal(vocab, width, seed=2, std=3 / width**0.5, dtype=dtype).to(DEVICE)
    targets = oracle.tokens((n,), vocab, ignored=0.0).to(DEVICE)
    b = oracle.normal(vocab, seed=3, dtype=torch.float32).to(DEVICE) if bias else None
    return hidden, weight, targets, b


def found(hidden, weight, targets, *, wanted=STATISTICS, launch=BLOCKS, **options):
    from xpo_fast.kernels import logps

    out = {name: hidden.new_full(targets.shape, float("nan"), dtype=torch.float32) for name in wanted}
    logps.run(hidden, weight, targets, out=out, options=launch, **options)
    return out


def expected(hidden, weight, targets, bias=None, **options):
    options["bias"] = None if bias is None else bias.cpu().double()
    return oracle.stats(hidden.cpu().double(), weight.cpu().double(), targets.cpu(), **options)


def compare(got, want):
    want = {name: want[name] for name in got}
    assert_close({name: x.cpu().double() for name, x in got.items()}, want, atol=2e-5, rtol=0, equal_nan=True)


# A head acts on each logit alone, whatever the blocks: every shape with everything, every head over ragged blocks.
@pytest.mark.parametrize(
    ("shape", "head"), [(s, "everything") for s in SHAPES] + [("ragged", h) for h in HEADS if h != "everything"]
)
def check_values(shape, head):
    options = dict(HEADS[head])
    hidden, weight, targets, bias = problem(shape, bias=options.pop("bias", False))
    got = found(hidden, weight, targets, bias=bias, processors=6, **options)
    compare(got, expected(hidden, weight, targets, bias, **options))


@pytest.mark.parametrize("wanted", [("logp",), ("lse",), ("logp", "lse"), ("entropy",)])
def check_what_is_not_wanted(wanted):
    hidden, weight, targets, _ = problem("ragged")
    got = found(hidden, weight, targets, wanted=wanted, processors=6)
    assert set(got) == set(wanted)
    compare(got, expected(hidden, weight, targets))


# The interpreter multiplies the bits of bfloat16.
@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def check_narrow_operands(dtype):
    hidden, weight, targets, bias = problem("ragged", dtype, bias=True)
    got = found(hidden, weight, targets, bias=bias, softcap=20.0, processors=6)
    compare(got, expected(hidden, weight, targets, bias, softcap=20.0))


# A GPU has what one target's configuration needs; the interpreter has it for all.
TARGETS = ["own"] if DEVICE == "cuda" else ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.parametrize("target", [*TARGETS, None])
def check_default_configurations(target):
    """Each one's blocks, a row and a word beyond the first, and the small one's."""
    from xpo_fast.kernels import launch, logps

    if target == "own":
        target = launch.target(torch.device(DEVICE))
    candidates = launch.tunable("logps_pass").candidates
    config = candidates[target][0] if target else logps.SMALL
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    hidden, weight, targets, bias = problem((257, 257, 80), dtype, bias=True)
    got = found(hidden, weight, targets, launch=config.options, bias=bias, softcap=9.0)
    compare(got, expected(hidden, weight, targets, bias, softcap=9.0))


@pytest.mark.parametrize("group", [1, 2, 5])
def check_order_of_programs(monkeypatch, group):
    """Five blocks of rows in groups, the last of which is smaller, or one: every row and share has its program."""
    from xpo_fast.kernels import logps

    hidden, weight, targets, _ = problem((70, 100, 16))
    monkeypatch.setattr(logps, "CACHED_BYTES", group * BLOCKS["BLOCK_M"] * 16 * 4)
    compare(found(hidden, weight, targets, splits=3), expected(hidden, weight, targets))


def check_splits():
    """Whatever the shares, more than there are blocks among them, the same to 1e-6; and each time the same bits."""
    hidden, weight, targets, bias = problem((17, 100, 17), bias=True)  # four blocks of words
    want = expected(hidden, weight, targets, bias)
    first = found(hidden, weight, targets, bias=bias, splits=1)
    compare(first, want)
    for splits in (2, 3, 4, 5, 9):
        got = found(hidden, weight, targets, bias=bias, splits=splits)
        compare(got, want)
        for name in STATISTICS:
            assert_close(got[name], first[name], atol=1e-6, rtol=1e-6)
        if splits in (3, 9):
            again = found(hidden, weight, targets, bias=bias, splits=splits)
            assert all(torch.equal(got[name], again[name]) for name in STATISTICS)


def check_no_row():
    hidden, weight, targets, _ = problem((0, 7, 3))
    assert all(x.shape == (0,) for x in found(hidden, weight, targets).values())


def check_strided_rows():
    """Rows of wider memory, NaN between them; results in rows of one tensor."""
    from xpo_fast.kernels import logps

    hidden, weight, targets, _ = problem("ragged")
    wide = [torch.full((x.shape[0], 48), float("nan"), device=DEVICE) for x in (hidden, weight)]
    for x, to in zip((hidden, weight), wide):
        to[:, :40] = x
    rows = torch.full((2, 37), float("nan"), device=DEVICE)
    out = dict(zip(("lse", "logp"), rows))
    logps.run(wide[0][:, :40], wide[1][:, :40], targets, out=out, splits=2, options=BLOCKS)
    compare(out, expected(hidden, weight, targets))


@pytest.mark.parametrize(("n", "vocab"), [(300, 20), (20, 300)])
def check_offsets_beyond_int32(n, vocab):
    """Rows of h, or of W, that lie beyond 2³¹ elements; memory that is not touched costs nothing on a CPU."""
    width, stride, most = 5, 2**23 - 16, max(n, vocab)
    torch.use_deterministic_algorithms(False)  # or all of it would be written
    hidden, weight, targets, _ = problem((n, vocab, width), torch.float16)
    memory = torch.empty(most * stride + 16, dtype=torch.float16, device=DEVICE)
    assert (most - 1) * stride > 2**31
    far = [memory.as_strided((len(x), width), (stride, 1), at) for x, at in ((hidden, 0), (weight, 8))]
    for x, to in zip((hidden, weight), far):
        to.copy_(x)
    compare(found(*far, targets, splits=3), expected(hidden, weight, targets))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("splits", [1, 3])
def check_a_bad_row_stays_alone(value, splits):
    hidden, weight, targets, _ = problem("ragged")
    want = expected(hidden, weight, targets)
    hidden[5, 3] = value
    got = found(hidden, weight, targets, splits=splits)
    others = torch.arange(37) != 5
    for x in got.values():
        assert x[5].isnan()
    compare({k: x.cpu()[others] for k, x in got.items()}, {k: x[others] for k, x in want.items()})


@pytest.mark.parametrize("splits", [1, 2, 4, 6])
def check_tokens_ruled_out(splits):
    """A bias of −∞ over a block and a half; one of the targets is among them."""
    hidden, weight, targets, _ = problem("ragged")
    bias = torch.zeros(100, device=DEVICE)
    bias[:50] = -float("inf")
    targets[3] = 20
    want = expected(hidden, weight, targets, bias)
    assert want["logp"][3] == -float("inf") and want["entropy"].isfinite().all()
    compare(found(hidden, weight, targets, bias=bias, splits=splits), want)


@pytest.mark.parametrize("splits", [1, 2, 6])
def check_nothing_but_infinity(splits):
    hidden, weight, targets, _ = problem("ragged")
    bias = torch.full((100,), -float("inf"), device=DEVICE)
    got = found(hidden, weight, targets, bias=bias, splits=splits)
    assert got["logp"].isnan().all() and got["entropy"].isnan().all()
    assert (got["lse"] == -float("inf")).all()


def check_certain_and_extreme():
    """Logits of 1e4: exact differences, and no log-prob above 0."""
    hidden = torch.tensor([[1.0], [-1.0], [0.0]], device=DEVICE)
    weight = torch.linspace(-1e4, 1e4, 41, device=DEVICE)[:, None]
    targets = torch.tensor([40, 40, 0], device=DEVICE)
    got = found(hidden, weight, targets, splits=2)
    assert got["logp"][:2].tolist() == [0.0, -2e4] and got["lse"][:2].tolist() == [1e4, 1e4]
    compare(got, expected(hidden, weight, targets))

    hidden, weight, targets, _ = problem("ragged", std=20.0)
    targets = (hidden @ weight.T).argmax(1)
    got = found(hidden, weight, targets, wanted=("logp",), splits=3)["logp"]
    assert (got <= 0).all() and (got == 0).any()


@pytest.mark.parametrize("target", [-100, -1, 100, 127, 2**32 + 3])
def check_target_outside_the_vocabulary(target):
    """No log-prob, nowhere near it a read; the rest as usual."""
    hidden, weight, targets, _ = problem("ragged")
    want = expected(hidden, weight, targets)
    want["logp"][7] = float("nan")
    targets[7] = target
    compare(found(hidden, weight, targets, splits=2), want)
