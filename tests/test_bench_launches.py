"""What bench/launches.py counts: few launches, whatever the tokens; few bytes a logit; the memory that the plan says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from xpo_fast.head import head_plan, row_operations

pytest.importorskip("triton", reason="Triton is for Linux alone")

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("launches")


def shape(launches, scored=8192, width=4096, vocab=128256):
    return launches.Shape(scored, width, vocab)


@pytest.mark.parametrize(
    ("backend", "most", "row_bytes"), [("torch", 120, 30), ("triton", 40, 6), ("cuda", 50, 6)]
)
def test_frozen(launches, backend, most, row_bytes):
    """Per step and tile, not per token: four times the tokens have at most four times the launches, and no more a step."""
    found = launches.measure("frozen", shape(launches), backend)
    assert found["launches"] <= most
    assert found["row_bytes_a_logit"] == row_bytes
    # The products written in float32; dz read in bfloat16.
    assert found["gemm_bytes_a_logit"] == 6
    longer = launches.measure("frozen", shape(launches, scored=32768), backend)
    assert longer["launches"] <= 4 * found["launches"]
    assert longer["row_bytes_a_logit"] == row_bytes


def test_blocks_of_a_cache_would_be_counted(launches, monkeypatch):
    """As a device would have it if its rows were worked on in blocks of a core's cache: launches that grow with tokens."""

    def of_a_cache(tile):
        rows = max(1, row_operations.BLOCK_BYTES // (tile.shape[1] * tile.dtype.itemsize))
        yield from (slice(a, min(a + rows, len(tile))) for a in range(0, len(tile), rows))

    monkeypatch.setattr(row_operations, "row_blocks", of_a_cache)
    assert launches.measure("frozen", shape(launches, scored=2048), "torch")["launches"] > 5000


@pytest.mark.parametrize(
    "case", ["gather_logps", "vocabulary over 8 ranks", "distillation", "frozen, softcap", "trainable"]
)
def test_launches_grow_with_steps(launches, case):
    few, many = (launches.measure(case, shape(launches, scored=n), "torch") for n in (8192, 32768))
    assert many["launches"] <= 4.2 * few["launches"] < 4.2 * 850
    assert many["peak_mb"] < few["peak_mb"] + 6 * (32768 - 8192) * 4096 * 4 / 1e6 or case == "gather_logps"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("frozen", {}),
        ("frozen, softcap", {"softcap": 30.0}),
        ("entropy with its gradient", {"outputs": ("entropy",)}),
    ],
)
def test_memory_is_the_plans(launches, case, options, backend, monkeypatch):
    """All but what is as long as the hidden states is in the plan."""
    n, width, vocab = shape(launches)
    found = launches.measure(case, shape(launches), backend)
    monkeypatch.setattr("xpo_fast.head.check_backend", lambda *_: None)
    budget = int(0.07 * launches.CARD_BYTES)
    hidden = torch.empty(n, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device="meta")
    plan = head_plan(hidden, weight, backend=backend, tile_bytes=budget, **options)
    assert found["peak_mb"] * 1e6 <= plan.tile_bytes + 16 * n * width
    assert plan.tile_bytes <= budget
    assert found["peak_mb"] * 1e6 >= 0.7 * plan.tile_bytes
