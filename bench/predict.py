"""What the head should take on an H200, by arithmetic: a prediction, to be held against bench/gpu.py where there is one.

    python bench/predict.py --json bench/results/gpu-predicted.json

Nothing here was measured by this project on a GPU. From the measured rate of GEMMs on random operands, 788 TFLOP/s, and
a rate of copies of 4.0 TB/s (83% of the card's 4.8 TB/s), and of the plan that the head makes for the shape:

    floor      (2 frozen, 3 trainable, 1 log-probs alone) · F / GEMM rate, F = 2·N·V·D FLOP
    rows       a logit: read twice and dz written, 4 + 4 + 2 bytes; log-probs alone 4. `hidden`: all but the last step's are
               hidden behind the next product. `exposed`: none are, as on one stream
    dW         with one tile bf16, which the backward scales (4·V·D bytes); with more a float32 accumulator, written by the
               first (4), read and written by each further one (8), which the backward scales into bf16 (6). Taken as
               never hidden
    predicted  floor / (floor + rows + dW): the fraction of the floor's speed, from `exposed` to `hidden`

What a GEMM of these shapes loses to the rate above, both lose: it is not in the fraction. Memory above inputs and
gradients: the plan's, and what the accumulator takes beyond the gradient.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from gpu import SHAPES
from head import Shape
from measure import table, write_json

GEMM_FLOPS, COPY_BYTES = 788e12, 4.0e12  # a second
PASSES = {"frozen": 2, "trainable": 3, "logps": 1}


def predict(shape: Shape, case: str) -> dict[str, Any]:
    from xpo_fast.head.chunked import cut
    from xpo_fast.head.plan import fit

    n, d, v = shape.scored, shape.width, shape.vocab
    head_bytes = v * d
    accumulator_bytes = 2 * head_bytes if case == "trainable" else 0
    tiling, dz_dtype, logits = fit(
        "triton",
        v,
        torch.bfloat16,
        torch.device("cuda"),
        None,
        dz=case != "logps",
        dw_bytes=accumulator_bytes,
        tokens=n,
    )
    tiles = len(list(cut(0, n, tiling.tile, 128)))
    floor_s = PASSES[case] * shape.gemm_flop / GEMM_FLOPS
    row_bytes = v * (4 if case == "logps" else 10)
    exposed_s = n * row_bytes / COPY_BYTES
    hidden_s = min(tiling.step, n) * row_bytes / COPY_BYTES
    dw_s = 0.0
    if case == "trainable":
        passes_bytes = 4 if tiles == 1 else 4 + 8 * (tiles - 1) + 6
        dw_s = head_bytes * passes_bytes / COPY_BYTES
        accumulator_bytes = accumulator_bytes if tiles > 1 else 0
    held = v * (logits * min(tiling.step, n) * 4 + (min(tiling.tile, n) * 2 if dz_dtype else 0))
    return {
        "shape": shape._asdict(),
        "case": case,
        "tiling": tiling._asdict(),
        "tiles": tiles,
        "floor_ms": floor_s * 1e3,
        "dw_ms": dw_s * 1e3,
        "rows_ms": {"exposed": exposed_s * 1e3, "hidden": hidden_s * 1e3},
        "of_floor": {
            name: floor_s / (floor_s + s + dw_s) for name, s in (("exposed", exposed_s), ("hidden", hidden_s))
        },
        "peak_mb": (held + accumulator_bytes) / 1e6,
    }


def main() -> int:
    first, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=first, epilog=details, formatter_class=style)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = [predict(shape, case) for case in PASSES for shape in sorted(SHAPES)]
    header = [
        "predicted: case, N×D×V",
        "tile",
        "step",
        "floor ms",
        "dW ms",
        "rows ms",
        "of the floor",
        "peak MB",
    ]
    rows = [
        [
            f"{r['case']} {Shape(**r['shape'])}",
            str(r["tiling"]["tile"]),
            str(r["tiling"]["step"]),
            f"{r['floor_ms']:.2f}",
            f"{r['dw_ms']:.2f}",
            f"{r['rows_ms']['hidden']:.2f}–{r['rows_ms']['exposed']:.2f}",
            f"{r['of_floor']['exposed']:.2f}–{r['of_floor']['hidden']:.2f}",
            f"{r['peak_mb']:.0f}",
        ]
        for r in found
    ]
    print(table(header, rows))
    if args.json:
        constants = {"gemm_flops": GEMM_FLOPS, "copy_bytes_s": COPY_BYTES}
        what = "predictions by arithmetic, not measurements"
        write_json(args.json, {"what": what, "constants": constants, "predicted": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
