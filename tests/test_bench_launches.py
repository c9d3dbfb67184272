"""The counts of bench/launches.py: few launches for any number of tokens, few bytes per logit, the plan's memory."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from xpo_fast import token_stats
from xpo_fast.head import gather, gemms, head_plan, row_operations, vocab_parallel
from xpo_fast.head.plan import fit_tiles
from xpo_fast.integrations.liger import distillation

pytest.importorskip("triton", reason="Triton is for Linux alone")

from xpo_fast.kernels import launch

from xpo_fast.head.triton import LOGPS

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("launches")


def shape(launches, scored=8192, width=4096, vocab=128256):
    return launches.Shape(scored, width, vocab)


@pytest.mark.parametrize(("backend", "most", "row_bytes"), [("torch", 120, 30), ("triton", 40, 6), ("cuda", 50, 6)])
def test_frozen(launches, backend, most, row_bytes):
    """Per step and tile, not per token: four times the tokens launch at most four times as much, no more per step."""
    found = launches.measure("frozen", shape(launches), backend)
    assert found["launches"] <= most
    assert found["row_bytes_a_logit"] == row_bytes
    # The products written in float32; dz read in bfloat16.
    assert found["gemm_bytes_a_logit"] == 6
    longer = launches.measure("frozen", shape(launches, scored=32768), backend)
    assert longer["launches"] <= 4 * found["launches"]
    assert longer["row_bytes_a_logit"] == row_bytes


# Launches and MB, of 8192 tokens and of 32768: some 5% above what they are.
MOST = {
    "frozen": ((99, 2450), (351, 2660)),
    "frozen, softcap": ((193, 3600), (729, 3820)),
    "entropy with its gradient": ((395, 3550), (1530, 3770)),
    "trainable": ((292, 4770), (758, 6080)),
    "gather_logps": ((256, 5820), (1012, 19060)),
    "vocabulary over 8 ranks": ((128, 1108), (462, 1320)),
    "distillation": ((378, 6210), (1452, 7520)),
}


def too_much(launches, case):
    """Where a case has more launches or memory than it may, by tokens."""
    found = {n: launches.measure(case, shape(launches, scored=n), "torch") for n in (8192, 32768)}
    return {
        n: (x["launches"], x["peak_mb"])
        for (n, x), (most, megabytes) in zip(found.items(), MOST[case], strict=True)
        if x["launches"] > most or x["peak_mb"] > megabytes
    }


@pytest.mark.parametrize("case", MOST)
def test_launches_and_memory(launches, case):
    assert not too_much(launches, case)


@pytest.mark.parametrize("case", MOST)
def test_blocks_of_a_cache_are_too_many(launches, case, monkeypatch):
    """As on a device, if rows were worked on in blocks, here of 128 or 256 MiB: 2 MiB would take minutes to count."""
    size = (64 if case == "vocabulary over 8 ranks" else 128) * gemms.BLOCK_BYTES

    def of_a_cache(tile, block=0):
        rows = max(1, size // (tile.shape[1] * tile.dtype.itemsize))
        yield from (slice(a, min(a + rows, len(tile))) for a in range(0, len(tile), rows))

    for module in (row_operations, distillation, vocab_parallel):
        monkeypatch.setattr(module, "row_blocks", of_a_cache)
    monkeypatch.setattr(gather, "scratch_bytes", lambda device: size)
    assert set(too_much(launches, case)) == {8192, 32768}


def test_cuda_leaves_the_rest_to_triton(launches):
    """As on a GPU: what its kernel does not compute, Triton's does, and nothing of torch as wide as the vocabulary."""
    cuda, triton = (
        launches.measure("entropy with its gradient", shape(launches), backend) for backend in ("cuda", "triton")
    )
    assert cuda["kernels"]["row_pass"] == triton["kernels"]["row_pass"]
    assert cuda["row_bytes_a_logit"] == triton["row_bytes_a_logit"] and cuda["peak_mb"] == triton["peak_mb"]


def test_the_verdict_on_log_probs_holds_for_what_they_run(launches):
    """By tiles: the kernel whose source the measurement is bound to."""
    (by_tiles, _) = launch.tunable(LOGPS).kernels
    assert launches.measure("log-probs", shape(launches), "triton")["kernels"][by_tiles.__name__]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("case", "options"),
    [("frozen", {}), ("frozen, softcap", {"softcap": 30.0}), ("entropy with its gradient", {"outputs": ("entropy",)})],
)
def test_memory_is_the_plans(launches, case, options, backend):
    """All but what is as long as the hidden states is in the plan."""
    n, width, _ = shape(launches)
    found, plan = launches.measure(case, shape(launches), backend), planned(launches, n, backend, options)
    assert found["peak_mb"] * 1e6 <= plan.tile_bytes + 16 * n * width
    assert plan.tile_bytes <= SHARE * launches.CARD_BYTES
    assert found["peak_mb"] * 1e6 >= 0.7 * plan.tile_bytes


SHARE = 0.07


def planned(launches, n, backend, options):
    """With the memory of the card that is counted for."""
    _, width, vocab = shape(launches)
    hidden = torch.empty(n, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device="meta")
    with mock.patch("xpo_fast.head.plan.check_backend"):
        budget = int(SHARE * launches.CARD_BYTES)
        plan = head_plan(hidden, weight, backend=backend, tile_bytes=budget, **options)
    return dataclasses.replace(plan, tokens=n)


def divergences(hidden, weight, targets, backend):
    found = token_stats(
        hidden, weight, targets, backend=backend, outputs=("kl", "reverse_kl"), ref_hidden=hidden.detach()
    )
    (found.kl.sum() + found.reverse_kl.sum()).backward()


def test_memory_of_divergences_is_the_plans(launches, monkeypatch):
    monkeypatch.setitem(launches.CASES, "divergences", launches.Case(divergences))
    n, width, _ = shape(launches)
    plan = planned(launches, n, "torch", {"outputs": ("kl", "reverse_kl")})
    found = launches.measure("divergences", shape(launches), "torch")["peak_mb"] * 1e6
    assert 0.7 * plan.tile_bytes <= found <= plan.tile_bytes + 16 * n * width


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("n", [10, 300])
def test_memory_of_a_small_call_is_the_plans(launches, n, backend):
    """A plan that knows the tokens does not promise less than a call of so few takes."""
    found = launches.measure("frozen", shape(launches, scored=n), backend)["peak_mb"] * 1e6
    assert found <= planned(launches, n, backend, {}).tile_bytes + 16 * n * 4096 + 2**20


@pytest.mark.parametrize(
    ("options", "copies"),
    [({}, 3), ({"beta": 0.0}, 3), ({"beta": 1.0}, 3), ({"temperature": 2.0}, 4), ({"divergence": "cosine"}, 3)],
    ids=str,
)
def test_memory_of_distillation(launches, options, copies, monkeypatch):
    """Tensors as large as a step's logits are no more than the step was sized by, and a step's are gone at the next."""
    case = launches.Case(partial(launches._distillation, **options), learns=True)
    monkeypatch.setitem(launches.CASES, "distillation", case)
    n, width, vocab = shape(launches)
    found = launches.measure("distillation", shape(launches), "torch")["peak_mb"] * 1e6
    budget, device = int(SHARE * launches.CARD_BYTES), torch.device("meta")
    tiling, *_ = fit_tiles("torch", vocab, torch.bfloat16, device, budget, heads=2, copies=copies, dz=True, learns=True)
    assert found <= vocab * (2 * tiling.tile + 4 * (2 + copies) * tiling.step) + 2 * vocab * width + 8 * n * width
