"""Predicts the head's times and memory on an H200 by arithmetic, for comparison with the results of bench/gpu.py.

    python bench/predict.py --json bench/results/gpu-predicted.json

Nothing here was measured on a GPU by this project. The constants below are known figures of the card, each with its
source. If there are two values, they are the better and the worse end, which give the two ends of a prediction. The
parts of a call run one after the other, as on one stream:

    floor      (2 frozen, 3 trainable, 1 log-probs alone) · F at the rate of large GEMMs, F = 2·N·V·D FLOP
    GEMMs      the products, in the steps of the plan: whole waves of 128×256 tiles over the processors, filling and
               draining them, a float32 epilogue per wave, and the lower clock that memory traffic causes at the power
               limit; at least the time to read the head once per step, which otherwise overlaps. The products of a
               unit longer than a tile are computed twice. The GEMMs of the gradient run at the floor's rate, plus
               filling and draining
    rows       the bytes per logit that bench/launches.py counts, none of them hidden; for csrc/ a time per logit. No
               row is read again because its largest logit is far above its first ones
    rest       dW: with one tile, bf16, which the backward scales (4·V·D bytes); with several, a float32 accumulator,
               written by the first (4), read and written by each further one (8), and scaled into bf16 (6). Rows of h
               and dH are gathered, scaled and cast; u = ∂L/∂logp is computed. None of it overlaps
    of floor   the floor divided by the sum of these times, or by the host's time to launch them if that is longer
    peak       the plan's: the tile of dz, the logits of a step, and the accumulator's size beyond the gradient's

The trainable case is DPO on pairs of 2048 tokens, packed as the objective packs them. `one pair` is a single pair of
16384 tokens on a card of 80 GB with the rates of the H200; all other calls are on a card of 141 GB. Except for that
pair, the shapes are among those of bench/gpu.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import launches
from xpo_fast.bench.measure import table
from xpo_fast.bench.problem import Shape
from xpo_fast.files import write_json

Range = tuple[float, float]  # the better and the worse end

GEMM_FLOPS = 788e12  # per second: GEMMs of 8192 rows on random operands, as others have measured on an H200
PROCESSORS = 132
TILE_ROWS, TILE_COLUMNS = 128, 256  # of cuBLAS on this card: an assumption
# Estimates without measurement. Starting a GEMM and draining the card: 1.5% of a product of 0.51 ms, 2.5% of 0.26 ms.
FILL_S = 7e-6
# Time to write a float32 tile of 128 KiB not hidden by the next one's main loop: 2 to 5% of 36 µs, 4 to 10% of 18 µs.
EPILOGUE_S: Range = (0.7e-6, 1.8e-6)
# Share of the clock lost per TB/s that a GEMM moves: 2 to 4% at 2.4 TB/s.
CLOCK: Range = (0.008, 0.016)
HBM_BYTES: Range = (4.8e12, 4.0e12)  # per second: the data sheet's figure, and 83% of it, the rate of some copies
COPY_BYTES: Range = (4.3e12, 4.0e12)  # per second: the rate that others have reached with a copy, and the same 83%
# Per second, of a kernel that reads rows: the rate of a copy, and the rate of one 16-byte load in flight per thread.
ROW_BYTES: Range = (4.0e12, 3.3e12)
# Seconds per logit of csrc/rows.cu, which at V 128k and 152k is limited by its instructions: with a gradient, without
# one, and with one for rows so long (LONG_ROW) that only one block fits a processor. There is no figure for V 32k.
CUDA_S: dict[str, Range] = {"gradient": (2.2e-12, 3.2e-12), "none": (1.1e-12, 1.3e-12), "long": (3.7e-12, 5.4e-12)}
LONG_ROW = 229_377
LAUNCH_S: Range = (6.5e-6, 17e-6)  # of the host, per operator of torch: the about 230 of an objective take 4 ms
U_S = 0.2e-3  # for the loss of a group of units: small kernels only
# Bytes per element of h and dH (n, D): 4 to gather rows of h; 12 to zero dH, cast it from float32 and put it in place;
# 4 to scale dH in the backward; with a trainable head, 4 to scale h by u.
HIDDEN_BYTES = {"logps": 4, "frozen": 4 + 12 + 4, "trainable": 4 + 12 + 4 + 4}

PASSES = {"frozen": 2, "trainable": 3, "logps": 1}
COUNTED = {"frozen": "frozen", "trainable": "trainable", "logps": "log-probs"}  # in bench/launches.py
CARD_BYTES, SMALL_CARD_BYTES = 141 * 10**9, 80 * 10**9


class Call(NamedTuple):
    """A call whose time and memory are predicted."""

    case: str
    shape: Shape
    pair_tokens: int = 2048  # of the trainable case
    card_bytes: int = CARD_BYTES
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        text = f"{self.case} {self.shape}"
        text += ", fp16" if self.dtype == torch.float16 else ""
        return text + (", one pair" if self.case == "trainable" and self.pair_tokens == self.shape.scored else "")


SHAPES = [Shape(8192, d, v) for d, v in ((4096, 128256), (2048, 151936), (4096, 32000))]
MORE = [
    Call("trainable", Shape(8192, 2304, 262144)),
    Call("trainable", Shape(32768, 4096, 128256)),
    Call("trainable", Shape(16384, 3584, 151936), 16384, SMALL_CARD_BYTES),
]
HALF = Call("frozen", SHAPES[0], dtype=torch.float16)  # its rows are read twice


def step_gemm_s(rows: int, shape: Shape, end: int) -> float:
    """Returns the seconds of the float32 products of a step of `rows` tokens. end: 0 the better, 1 the worse."""
    tiles = -(-rows // TILE_ROWS) * -(-shape.vocab // TILE_COLUMNS)
    loop_s = 2 * TILE_ROWS * TILE_COLUMNS * shape.width * PROCESSORS / GEMM_FLOPS
    busy_s = -(-tiles // PROCESSORS) * (loop_s + EPILOGUE_S[end]) + FILL_S
    head_bytes = 2 * shape.vocab * shape.width
    busy_s *= 1 + CLOCK[end] * (head_bytes + 4 * rows * shape.vocab) / busy_s / 1e12
    return max(busy_s, head_bytes / HBM_BYTES[end])


def rows_s(call: Call, backend: str, tokens: int, again: int, bytes_a_logit: float, end: int) -> float:
    """Returns the seconds of the row kernels. tokens: rows with the call's gradient; again: further ones without."""
    vocab = call.shape.vocab
    if backend != "cuda":
        return tokens * vocab * bytes_a_logit / ROW_BYTES[end]  # `again` is in the bytes
    kind = "none" if call.case == "logps" else "long" if vocab >= LONG_ROW else "gradient"
    return vocab * (tokens * CUDA_S[kind][end] + again * CUDA_S["none"][end])


def tiles_of(call: Call, tiling: Any) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns the number of groups of units, the tiles with a gradient, and the tiles computed before for the loss."""
    from xpo_fast.head.chunked import cut
    from xpo_fast.head.units import pack

    n = call.shape.scored
    if call.case != "trainable":
        return 1, list(cut(0, n, tiling.tile, 128)), []
    groups = pack(torch.empty(n, device="meta"), [call.pair_tokens] * (n // call.pair_tokens), tiling.tile)
    made, again = [], []
    for group in groups:  # as in unit_gradients, all but the last tile of a longer group are computed twice
        stop = group.start + len(group.positions)
        full = max(group.start, stop - tiling.tile)
        before = list(cut(group.start, full, tiling.tile, 128))
        made += [*before, (full, stop)]
        again += before
    return len(groups), made, again


def predict(call: Call, backend: str) -> dict[str, Any]:
    """Returns the prediction for a call, with the plan and the counts that it is based on."""
    from xpo_fast.head.chunked import cut
    from xpo_fast.head.plan import Plan, fit_tiles
    from xpo_fast.head.tiling import SHARE_OF_CARD

    case, shape = call.case, call.shape
    n, d, v = shape.scored, shape.width, shape.vocab
    learns = case == "trainable"
    # The meta device is not asked for memory or processors, and has one lane, like sm_90.
    tiling, dz_dtype, logits = fit_tiles(
        backend,
        v,
        call.dtype,
        torch.device("meta"),
        int(SHARE_OF_CARD * call.card_bytes),
        dz=case != "logps",
        learns=learns,
        unit_tokens=call.pair_tokens if learns else 0,
    )
    groups, made, again = tiles_of(call, tiling)
    made_again = sum(b - a for a, b in again)
    steps = [b - a for span in (*made, *again) for a, b in cut(*span, tiling.step, 128)]

    with (
        mock.patch.object(launches, "CARD_BYTES", call.card_bytes),
        mock.patch.object(launches, "ROW_TOKENS", call.pair_tokens // 2),
    ):
        counted = launches.measure(COUNTED[case], shape, backend)
    # The range of float16 is too small for one read: rows are read twice and dz is written.
    bytes_a_logit = 10 if call.dtype == torch.float16 else counted["row_bytes_a_logit"]

    floor_s = PASSES[case] * shape.gemm_flop / GEMM_FLOPS
    gradient_s = (PASSES[case] - 1) * (shape.gemm_flop / GEMM_FLOPS + len(made) * FILL_S)
    dw_bytes = 0
    if learns:
        dw_bytes = v * d * (4 if len(made) == 1 else 4 + 8 * (len(made) - 1) + 6)
    ends = []
    for end in (0, 1):
        gemms_s = sum(step_gemm_s(rows, shape, end) for rows in steps) + gradient_s
        in_rows_s = rows_s(call, backend, n, made_again, bytes_a_logit, end)
        rest_s = (dw_bytes + n * d * HIDDEN_BYTES[case]) / COPY_BYTES[end] + (groups * U_S if learns else 0)
        host_s = counted["launches"] * LAUNCH_S[end]
        all_s = max(gemms_s + in_rows_s + rest_s, host_s)
        ends.append(
            {
                "gemms_ms": gemms_s * 1e3,
                "rows_ms": in_rows_s * 1e3,
                "rest_ms": rest_s * 1e3,
                "host_ms": host_s * 1e3,
                "of_floor": floor_s / all_s,
            }
        )
    passes = PASSES[case] + made_again / n
    accumulator_bytes = 2 * v * d if learns and n > tiling.tile else 0
    plan = Plan(backend, n, tiling, v, torch.float32, dz_dtype, logits, passes, "", accumulator_bytes)
    return {
        "call": str(call),
        "case": case,
        "shape": shape._asdict(),
        "dtype": str(call.dtype).removeprefix("torch."),
        "card_gb": call.card_bytes / 1e9,
        "backend": backend,
        "tiling": tiling._asdict(),
        "tiles": len(made),
        "passes": passes,
        "row_bytes_a_logit": bytes_a_logit,
        "launches": counted["launches"],
        "floor_ms": floor_s * 1e3,
        "better": ends[0],
        "worse": ends[1],
        "peak_mb": (plan.tile_bytes + accumulator_bytes) / 1e6,
    }


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    calls = sorted(
        [*(Call(case, shape) for case in PASSES for shape in SHAPES), *MORE],
        key=lambda call: list(PASSES).index(call.case),
    )
    found = [predict(call, backend) for call in calls for backend in ("triton", "cuda", "torch")]
    found.append(predict(HALF, "triton"))
    header = [
        *("predicted: case, N×D×V", "backend", "tile", "step", "lanes", "passes", "floor ms"),
        *("GEMMs ms", "rows ms", "rest ms", "of the floor", "peak MB"),
    ]

    def both(r: dict[str, Any], name: str, digits: int = 1) -> str:
        low, high = sorted((r["better"][name], r["worse"][name]))
        texts = f"{low:.{digits}f}", f"{high:.{digits}f}"
        return texts[0] if texts[0] == texts[1] else "–".join(texts)

    rows = [
        [
            r["call"],
            r["backend"],
            *(str(r["tiling"][name]) for name in ("tile", "step", "lanes")),
            f"{r['passes']:.2g}F",
            f"{r['floor_ms']:.1f}",
            *(both(r, name) for name in ("gemms_ms", "rows_ms", "rest_ms")),
            both(r, "of_floor", 2),
            f"{r['peak_mb']:.0f}",
        ]
        for r in found
    ]
    print(table(header, rows))
    if args.json:
        names = (
            *("GEMM_FLOPS", "PROCESSORS", "TILE_ROWS", "TILE_COLUMNS", "FILL_S", "EPILOGUE_S", "CLOCK", "HBM_BYTES"),
            *("COPY_BYTES", "ROW_BYTES", "CUDA_S", "LONG_ROW", "LAUNCH_S", "U_S", "HIDDEN_BYTES"),
        )
        constants = {name.lower(): globals()[name] for name in names}
        what = "predictions by arithmetic, not measurements"
        write_json(args.json, {"what": what, "constants": constants, "predicted": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
