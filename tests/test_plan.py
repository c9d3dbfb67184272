"""Tiles and steps on a device: what a card's memory gives, for the longest pair that a README may promise."""

from __future__ import annotations

import pytest
import torch

import xpo_fast as xf
from xpo_fast.head import head_plan, row_operations, tiling
from xpo_fast.head.gemms import Gemms
from xpo_fast.head.plan import fit_tiles
from xpo_fast.head.spec import Scaling
from xpo_fast.head.tiling import Tiling, buffer_rows, lanes_of, scratch_bytes

META, GPU = torch.device("meta"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def card(monkeypatch):
    """A card by its memory, in bytes, and compute capability."""

    def has(total, capability=(9, 0)):
        monkeypatch.setattr(tiling, "_total_bytes", lambda _: total)
        monkeypatch.setattr(tiling, "_capability", lambda _: capability)

    return has


@pytest.mark.parametrize(("gb", "budget"), [(24, 1.68e9), (80, 5.6e9), (141, 9.87e9)])
def test_the_budget_follows_the_card(card, gb, budget):
    card(gb * 10**9)
    assert scratch_bytes(GPU) == pytest.approx(budget, rel=1e-6)
    tiling, dz_dtype, logits = fit_tiles("triton", 151936, BF16, GPU, None)
    held = 151936 * (tiling.tile * 2 + tiling.step * logits * 4)
    assert held <= budget and dz_dtype == BF16


def test_without_a_card_to_ask():
    assert scratch_bytes(META) == 2500 * 10**6
    assert scratch_bytes(torch.device("cpu")) == 256 * 2**20


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("width", [2048, 3584, 5120, 8192])
def test_a_pair_of_two_rows_of_8k_is_one_tile_of_an_80_gb_card(card, width, backend):
    """16384 tokens, a vocabulary of 152k, trainable: 3F up to a tenth; dW's accumulator is not taken from the tile."""
    card(85 * 10**9)  # what a card of 80 GiB says that it has
    tiling, *_ = fit_tiles(backend, 151936, BF16, GPU, None, learns=True, unit_tokens=16384)
    again = max(16384 - tiling.tile, 0)
    assert 3 + again / 16384 <= (3.1 if backend == "torch" else 3.0)


def test_no_cliff_beyond_a_single_tile(card):
    """A token more than one tile holds costs a tile more, not smaller ones."""
    card(85 * 10**9)
    hidden = torch.empty(8193, 8192, dtype=BF16, device="meta", requires_grad=True)
    weight = torch.empty(128256, 8192, dtype=BF16, device="meta", requires_grad=True)
    one, two = (head_plan(h, weight, tile_bytes=scratch_bytes(GPU)) for h in (hidden[:8192], hidden))
    assert one.tiling == two.tiling == Tiling(8192, two.tiling.step)
    assert one.accumulator_bytes == 0 and two.accumulator_bytes == 2 * 128256 * 8192


@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 151936, 262144])
def test_steps_by_bytes(card, vocab):
    """About half a GiB of products, in whole blocks of rows: few launches where the vocabulary is small."""
    card(85 * 10**9)
    tiling, *_ = fit_tiles("triton", vocab, BF16, GPU, None)
    assert 0.7 * 2**29 < min(tiling.step, 4096) * vocab * 4 <= 2**29 or tiling.step == 4096
    assert tiling.step % 128 == 0


def test_lanes(card):
    """One where a GEMM keeps all processors to its end, two before; they share what one would have."""
    card(85 * 10**9, (9, 0))
    assert lanes_of(GPU) == lanes_of(META) == 1
    one = fit_tiles("triton", 128256, BF16, GPU, None)
    card(85 * 10**9, (8, 0))
    two = fit_tiles("triton", 128256, BF16, GPU, None)
    assert (one[0].lanes, one[2]) == (1, 1) and (two[0].lanes, two[2]) == (2, 2)
    assert one[0].step == 2 * two[0].step
    assert fit_tiles("torch", 128256, BF16, GPU, None)[0].lanes == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_needs_no_cast_is_in_place(card, dtype):
    card(85 * 10**9)
    tiling, dz_dtype, logits = fit_tiles("torch", 50257, dtype, GPU, 10**9)
    assert (
        dz_dtype is None and logits == 1 and tiling == Tiling(min(4096, 10**9 // (50257 * dtype.itemsize)), tiling.step)
    )
    assert tiling.tile == tiling.step


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_device_without_mixed_gemms_is_in_place(dtype):
    """If the weight is widened, dz has the dtype of the products and replaces them, so a tile is one step."""
    tiling, dz_dtype, logits = fit_tiles("torch", 152000, dtype, torch.device("mps"), None)
    assert tiling.tile == tiling.step and dz_dtype is None and logits == 1


@pytest.mark.parametrize("rows", [1, 2, 10, 300, 511, 512, 513, 1100, 4095, 4096, 5000])
def test_memory_is_asked_for_in_few_sizes(rows):
    got = buffer_rows(rows, 4096)
    assert min(rows, 4096) <= got <= min(max(2 * rows - 1, 1), 4096, rows + 512 if rows > 512 else 4096)
    assert len({buffer_rows(n, 4096) for n in range(1, 5000)}) == 10 + 7  # powers of two up to an eighth, and eighths


def test_a_flat_row_in_float16(monkeypatch):
    """Σ e^(z − largest) of a large vocabulary is beyond float16, and so would be the target's entry."""

    def not_normalised(z):  # as off the CPU
        largest = z.amax(dim=1)
        z.sub_(largest.unsqueeze(1)).exp_()
        total = z.sum(dim=1)
        return largest, total.log(), total

    monkeypatch.setattr(row_operations, "softmax_", not_normalised)
    vocab = 70000
    weight = torch.empty(vocab, 1, dtype=torch.float16, device="meta")
    operations = row_operations.RowOperations(Gemms(weight, None, Scaling()))
    assert operations.own_memory
    z = torch.linspace(-0.01, 0.01, vocab).repeat(2, 1)
    y, found, factor = torch.tensor([3, 69999]), torch.empty(2, 2), torch.empty(2)
    want = torch.nn.functional.one_hot(y, vocab) - z.double().softmax(1)
    dz = torch.empty(2, vocab, dtype=torch.float16)
    operations.statistics(z, None, y, (), found, dz, factor)
    got = dz.double() * factor[:, None].double()
    assert (got - want).norm() < 2**-10 * want.norm()


def test_memory_that_is_not_there_is_named(monkeypatch):
    def nothing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("xpo_fast.head.chunked.logits_memory", nothing)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        xf.token_logps(torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, 2]), chunk_tokens=2)
    assert "a tile of 2 tokens x 5" in caught.value.__notes__[0] and "tile_bytes=" in caught.value.__notes__[0]


def test_an_option_that_there_is_not():
    """A misspelt budget is an error, not the default."""
    hidden, weight = torch.ones(4, 6), torch.ones(29, 6)
    assert head_plan(hidden, weight, chunk_tokens=3, temperature=2.0).tile_tokens == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunk_token'"):
        head_plan(hidden, weight, chunk_token=3)


def test_an_objectives_settings_may_change():
    """The plan, and the call, go by what `backend` and `tile_bytes` are when it is made."""
    objective = xf.Objective("simpo")
    hidden, weight, targets = torch.ones(2, 4, 6), torch.ones(29, 6), torch.ones(2, 4, dtype=torch.long)
    objective.tile_bytes = 29 * 4 * 3
    assert objective.plan(hidden, weight, targets).tile_tokens == 3
    objective.backend = "dense"
    assert objective.plan(hidden, weight, targets).backend == "dense"
