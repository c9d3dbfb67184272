"""Measures the peak memory of the head's losses beyond inputs, outputs and gradients, in one process per configuration.

Half of every row is prompt. `python -m xpo_fast.bench.memory` measures one configuration and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ..head.gemms import release_tiles
from .contenders import Missing, make_contenders
from .measure import MIB, peak_allocated_mib, peak_resident_mib, size_mib
from .problem import CASES, Batch, make_batch, make_weight
from .work import DTYPES, Record, Settings, Work, chosen

DEFAULT_TILE_MIB = 256
ALLOWANCE = 1.10  # of the tile: room for indices, token statistics, one tile's hidden states and gradients
PROCESS_S = 6.0  # of one configuration, for estimates


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
    "scored tokens": [Layout(4, 512, 2**15), Layout(64, 512, 2**15)],
    "T": [Layout(128, 128, 2**15), Layout(2, 8192, 2**15)],
    "V": [Layout(8, 512, 2**15), Layout(8, 512, 2**18)],
    "tile": [Layout(8, 1024, 2**13, width=2048, tile_mib=64), Layout(2, 1024, 2**16, width=1024, tile_mib=64)],
}
SIDE_BY_SIDE = Layout(4, 2048, 2**15)
QUICK = Layout(4, 64, 1009)
ALONE = ("dpo",)  # cases of which ours is measured in every layout, unless `cases` of the settings say which
COMPARED = ("dpo", "frozen")  # cases of which all contenders are measured in one layout


def works(settings: Settings) -> Iterator[Work]:
    """Yields the configurations of the suite `memory`: ours in every layout, then every contender in one."""
    dtypes = settings.dtypes or ("fp32",)
    layouts = {"quick": [QUICK]} if settings.quick else LAYOUTS
    for dtype in dtypes:
        for group, of in layouts.items():
            for layout in of:
                for case in chosen(CASES, settings) if settings.cases else ALONE:
                    ours = next(iter(make_contenders(CASES[case])))
                    yield _work(group, layout, case, ours, dtype)
        for case in chosen(COMPARED, settings):
            known: set[str] = set() if case == COMPARED[0] else set(make_contenders(CASES[COMPARED[0]]))
            for contender in make_contenders(CASES[case]):
                if settings.wants(contender) and contender not in known:
                    yield _work("side by side", QUICK if settings.quick else SIDE_BY_SIDE, case, contender, dtype)


def _work(group: str, layout: Layout, case: str, contender: str, dtype: str) -> Work:
    sizes = f"{layout.rows}×{layout.length}×{layout.width}×{layout.vocab}"
    tile = "" if layout.tile_mib == DEFAULT_TILE_MIB else f", tile {layout.tile_mib} MiB"
    name = f"{group}: {case}, {dtype}, {sizes}{tile}, {contender}"
    return Work("memory", name, PROCESS_S, functools.partial(_in_fresh_process, group, layout, case, contender, dtype))


def _in_fresh_process(group: str, layout: Layout, case: str, contender: str, dtype: str) -> list[Record]:
    params = {"case": case, "dtype": dtype, "group": group, **asdict(layout), "scored": layout.scored}
    record: Record = {"contender": contender, "ours": contender.startswith("xpo_fast"), "params": params}
    try:
        make_contenders(CASES[case])[contender]()
    except Missing as error:
        return [record | {"missing": str(error)}]
    arguments = ["--case", case, "--contender", contender, "--dtype", dtype]
    for name, value in asdict(layout).items():
        arguments += [f"--{name}", str(value)]
    done = subprocess.run([sys.executable, "-m", "xpo_fast.bench.memory", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return [record | {"failed": last}]
    return [record | json.loads(done.stdout.splitlines()[-1])]


def measure(layout: Layout, case: str, contender: str, dtype: str) -> Record:
    """Returns the peaks of one configuration in this process. Raises `Missing` where the contender cannot run."""
    tile_bytes = None if layout.tile_mib == DEFAULT_TILE_MIB else layout.tile_mib * MIB
    made = make_contenders(CASES[case]._replace(prompt_share=0.5), tile_bytes)[contender]()
    compiled = "compile" in contender  # for one size: another would be compiled while memory is measured
    warm = layout if compiled else Layout(2, 8, 64, 16)
    made.call(_batch(warm, dtype))  # loads code and starts threads before anything is measured
    batch = _batch(layout, dtype)
    release_tiles()
    resident_mib, results = peak_resident_mib(lambda: made.call(batch))
    results_mib = size_mib(results.values())
    del results
    release_tiles()  # or the second measurement would reuse the first one's tile
    allocated_mib, _ = peak_allocated_mib(lambda: made.call(batch))
    found: Record = {
        "inputs_mib": size_mib([batch.hidden, batch.weight, batch.targets]),
        "results_mib": results_mib,
        "mib": allocated_mib - results_mib,
        # Too low after a warm-up of the same size, whose memory the process has kept.
        "resident_mib": None if resident_mib is None or compiled else resident_mib - results_mib,
    }
    if made.ours and not contender.endswith(", dense"):  # which keeps all logits
        bound_mib = layout.tile_mib * ALLOWANCE
        found |= {"bound_mib": bound_mib, "within_bound": found["mib"] <= bound_mib}
    return found


def _batch(layout: Layout, dtype: str) -> Batch:
    weight = make_weight(layout.vocab, layout.width, DTYPES[dtype])
    return make_batch(weight, layout.rows, layout.length, layout.length // 2, seed=0)


def main() -> None:
    """Measures one configuration and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--dtype", required=True, choices=DTYPES)
    for name in ("rows", "length", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--width", type=int, default=Layout.width)
    parser.add_argument("--tile_mib", type=int, default=Layout.tile_mib)
    args = parser.parse_args()
    layout = Layout(args.rows, args.length, args.vocab, args.width, args.tile_mib)
    print(json.dumps(measure(layout, args.case, args.contender, args.dtype)))


if __name__ == "__main__":
    main()
