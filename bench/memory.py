"""Measures the peak memory of the head's losses beyond inputs, outputs and gradients, in one process per configuration.

Half of every row is prompt. `bench/head.py --memory` measures all configurations; this script measures one of them and
prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from contenders import Missing, make_contenders
from measure import MIB, peak_allocated_mib, peak_resident_mib, size_mib, table
from problem import CASES, Batch, make_batch, make_weight
from xpo_fast.head.gemms import release_tiles

DEFAULT_TILE_MIB = 256
ALLOWANCE = 1.10  # of the tile: room for indices, token statistics, one tile's hidden states and gradients


@dataclass(frozen=True)
class Layout:
    """A configuration: the sizes of a batch, and our tile."""

    rows: int
    length: int  # T
    vocab: int  # V
    width: int = 64  # D
    tile_mib: int = DEFAULT_TILE_MIB

    @property
    def scored(self) -> int:
        """Returns N, the number of scored positions."""
        return self.rows * (self.length - self.length // 2)


# One quantity varies within a group. The tile of the last group is so small that a copy of the hidden states (64 MiB in
# fp32, first layout) or of the head (256 MiB, second layout) would exceed the bound.
LAYOUTS = {
    "scored tokens": [Layout(4, 512, 2**15), Layout(16, 512, 2**15), Layout(64, 512, 2**15)],
    "T": [Layout(128, 128, 2**15), Layout(16, 1024, 2**15), Layout(2, 8192, 2**15)],
    "V": [Layout(8, 512, 2**15), Layout(8, 512, 2**17), Layout(8, 512, 2**18)],
    "tile": [Layout(8, 1024, 2**13, width=2048, tile_mib=64), Layout(2, 1024, 2**16, width=1024, tile_mib=64)],
}
SIDE_BY_SIDE = Layout(4, 2048, 2**15)
QUICK = Layout(4, 64, 1009)


def sweep(dtype: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields one record per configuration: ours on every layout, then every contender on one.

    quick: only ours, on one tiny layout.
    """
    for group, layouts in ({"quick": [QUICK]} if quick else LAYOUTS).items():
        for layout in layouts:
            for case in ("frozen", "trainable", "dpo-frozen", "dpo"):
                ours = next(iter(make_contenders(CASES[case])))
                yield {"group": group, **_in_fresh_process(layout, case, ours, dtype)}
    for case in () if quick else ("frozen", "dpo"):
        for contender in make_contenders(CASES[case]):
            yield {"group": "side by side", **_in_fresh_process(SIDE_BY_SIDE, case, contender, dtype)}


def _in_fresh_process(layout: Layout, case: str, contender: str, dtype: str) -> dict[str, Any]:
    arguments = ["--case", case, "--contender", contender, "--dtype", dtype]
    for name, value in asdict(layout).items():
        arguments += [f"--{name}", str(value)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{contender}, {case}, {layout} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(layout: Layout, case: str, contender: str, dtype: str) -> dict[str, Any]:
    """Returns the peaks of one configuration in this process, or {"missing": why} without the contender's package."""
    about = {"case": case, "contender": contender, "dtype": dtype, **asdict(layout), "scored": layout.scored}
    tile_bytes = None if layout.tile_mib == DEFAULT_TILE_MIB else layout.tile_mib * MIB
    try:
        made = make_contenders(CASES[case]._replace(prompts=True), tile_bytes)[contender]()
    except Missing as error:
        return {**about, "missing": str(error)}
    made.call(_batch(Layout(2, 8, 64, 16), dtype))  # loads code and starts threads before anything is measured
    batch = _batch(layout, dtype)
    release_tiles()
    resident_mib, results = peak_resident_mib(lambda: made.call(batch))
    results_mib = size_mib(results.values())
    del results
    release_tiles()  # or the second measurement would reuse the first one's tile
    allocated_mib, _ = peak_allocated_mib(lambda: made.call(batch))
    found = {
        **about,
        "inputs_mib": size_mib([batch.hidden, batch.weight, batch.targets]),
        "results_mib": results_mib,
        "allocated_mib": allocated_mib - results_mib,
        "resident_mib": None if resident_mib is None else resident_mib - results_mib,
    }
    if made.ours:
        bound_mib = layout.tile_mib * ALLOWANCE
        found |= {"bound_mib": bound_mib, "within_bound": found["allocated_mib"] <= bound_mib}
    return found


def _batch(layout: Layout, dtype: str) -> Batch:
    weight = make_weight(layout.vocab, layout.width, getattr(torch, dtype))
    return make_batch(weight, layout.rows, layout.length, prompts=True, seed=0)


def memory_table(records: list[dict[str, Any]]) -> str:
    """Returns the records as a Markdown table, in MiB."""
    sizes = ["N", "rows × T", "V", "D"]
    rows = []
    for r in records:
        if "missing" in r:
            continue
        size = [str(r["scored"]), f"{r['rows']} × {r['length']}", str(r["vocab"]), str(r["width"])]
        mib = [f"{r['inputs_mib']:.0f}", f"{r['results_mib']:.0f}"]
        mib += ["" if r["resident_mib"] is None else f"{r['resident_mib']:.1f}", f"{r['allocated_mib']:.1f}"]
        verdict = {True: "within", False: "OVER"}
        bound = [f"{r['bound_mib']:.1f}", verdict[r["within_bound"]]] if "bound_mib" in r else ["", ""]
        rows.append([f"{r['case']}, {r['dtype']}", r["contender"], *size, *mib, *bound])
    return table(["", "", *sizes, "inputs", "results", "resident", "allocated", "bound", ""], rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--dtype", required=True, choices=("float32", "bfloat16"))
    for name in ("rows", "length", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--width", type=int, default=Layout.width)
    parser.add_argument("--tile_mib", type=int, default=Layout.tile_mib)
    args = parser.parse_args()
    layout = Layout(args.rows, args.length, args.vocab, args.width, args.tile_mib)
    print(json.dumps(measure(layout, args.case, args.contender, args.dtype)))


if __name__ == "__main__":
    main()
