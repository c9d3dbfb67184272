"""Writes the tables of figures in README.md and docs/ from the committed results of bench/results/.

    python bench/figures.py            # rewrites what stands between the markers
    python bench/figures.py --check    # exit status 1 if a page differs from the results

A table stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`, where NAME is one of BLOCKS. It comes
from the results alone: to change a figure, commit another result file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import scale
from xpo_fast.bench.measure import ratio
from xpo_fast.bench.results import records_of
from xpo_fast.bench.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (
    "README.md",
    "docs/layouts.md",
    "docs/bench.md",
    "docs/compatibility.md",
    "docs/fit.md",
    "docs/7b.md",
    "docs/scale.md",
)
BLOCK = re.compile(r"(?<=<!-- figures: )([\w-]+)( -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)
FLOOR, FLOOR_NEW = "floor: the products alone", "the same, gradients into new memory"

# A row of the table of the head: its label, the file of its shape, and the case.
HEAD = (
    ("log-probs, frozen head", "head-cpu-d576", "frozen"),
    ("DPO, trainable head", "head-cpu-d576-dpo", "dpo"),
    ("DPO, half of each row is prompt", "head-cpu-d576-dpo", "dpo-prompts"),
    ("DPO, added to an existing gradient", "head-cpu-d576-fp32", "dpo-accumulated"),
    ("log-probs, frozen head", "head-cpu-d4096", "frozen"),
    ("DPO, trainable head", "head-cpu-d4096", "dpo"),
    ("DPO, half of each row is prompt", "head-cpu-d4096", "dpo-prompts"),
    ("DPO, added to an existing gradient", "head-cpu-d4096-accumulated", "dpo-accumulated"),
)
STEPS = {
    "dpo": "a DPO step, its reference cached",
    "dpo, like lengths": "a DPO step, rows of like length",
    "lists of 4": "a step on lists of four",
    "sft": "an SFT step",
    "sft, equal lengths": "an SFT step, rows of equal length",
    "log-probs": "log-probs without gradient",
    "grpo update": "an update of GRPO, groups of eight",
}
STEP_CONTENDERS = {
    "packed": "packed",
    "shared": "shared",
    "TRL": "TRL 1.16",
    "TRL, activations kept": "TRL 1.16, activations kept",
}
TRL = {
    "SFT nll": "SFT",
    "DPO sigmoid": "DPO",
    "KTO kto": "KTO",
    "GRPO dapo": "GRPO (DAPO)",
    "RLOO": "RLOO",
    "CPO simpo": "CPO (SimPO)",
    "ORPO": "ORPO",
    "TPO": "TPO",
    "OnlineDPO": "OnlineDPO",
}
PRECISION_SETTINGS = {
    "the CPU's own": "AVX-512 with bfloat16",
    "without bfloat16 instructions": "AVX-512 without",
    "AVX2": "AVX2",
}
PRECISION_PARTS = (
    "x Wᵀ, 1024 × 576 × 1536",
    "dy W, 1024 × 1536 × 576",
    "the head, forward and backward, 256 tokens",
    "SmolLM2-135M forward, 128 tokens",
    "the same with LoRA, forward and backward",
    "16 tokens sampled, 4 at a time",
)
SLOW = 10.0  # a ratio above it is bold


def read(name: str) -> dict[str, Any]:
    """Returns a committed result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; an empty cell is one space wide."""
    first, *rest = (re.sub(r" {2,}", " ", f"| {' | '.join(cells)} |") for cells in [header, *rows])
    return "\n".join([first, "|" + "---|" * len(header), *rest]) + "\n"


# --- the blocks -------------------------------------------------------------------------------------------------------


def head() -> str:
    """Returns the times of the losses over their products."""
    rows = []
    for label, name, case in HEAD:
        found = {r["contender"]: r for r in read(name)["timing"] if r["case"] == case and r["dtype"] == "fp32"}
        floor, shape = found[FLOOR]["samples_ms"], found[FLOOR]["shape"]
        over = {n: f"{ratio(r['samples_ms'], floor):.2f}" for n, r in found.items() if "samples_ms" in r}
        ours = next(r["contender"] for r in found.values() if r["ours"])
        alone = "1.00" + (f" ({over[FLOOR_NEW]})" if FLOOR_NEW in over else "")
        peers = (over.get(n, "–") for n in ("materialised", "TRL", "Liger"))
        size = f"{shape['scored']} × {shape['width']} × {shape['vocab']}, fp32"
        rows.append([f"{size}: {label}", alone, f"**{over[ours]}**", *peers])
    header = ["forward + backward", "GEMMs alone", "xpo_fast", "materialised", "TRL 1.16", "Liger 0.8.5"]
    return table(header, rows)


def _steps() -> dict[str, dict[str, Any]]:
    """Returns by case: `speed`, times as fast as padded, `tokens` and `difference`."""
    content = read("steps-cpu")
    if "cases" in content:
        return {r["case"]: {**r, "speed": r["padded/…, sum"]} for r in content["cases"] if "median_ms" in r}
    found: dict[str, dict[str, Any]] = {}
    for r in records_of(content):
        of = found.setdefault(r["key"].partition("/")[2], {"speed": {}, "tokens": {}, "difference": 0.0})
        if "as_fast_as_padded" in r:
            of["speed"][r["contender"]] = r["as_fast_as_padded"]
        if "tokens" in r:
            of["tokens"][r["contender"]] = r["tokens"]
        of["difference"] = max([of["difference"], *(e for e in r.get("errors", {}).values() if e)])
    return found


def steps() -> str:
    """Returns how many times as fast as padded rows whole steps are."""
    found = _steps()
    rows = []
    for case, label in STEPS.items():
        if case not in found:
            continue
        speed = found[case]["speed"]
        cells = [f"{speed[n]:.2f}" if n in speed else "" for n in STEP_CONTENDERS]
        cells[1] = f"**{cells[1]}**"
        rows.append([label, *cells])
    return table(["times as fast as padded rows", *STEP_CONTENDERS.values()], rows)


def steps_about() -> str:
    """Returns the positions of the batches, and by how much the layouts differ."""
    dpo, logps = (_steps()[case] for case in ("dpo", "log-probs"))
    padded, packed, shared = (f"{dpo['tokens'][n]:,}" for n in ("padded", "packed", "shared"))
    text = (
        f"The batches have {padded} padded positions, {packed} packed and {shared} shared tokens. Losses and gradients "
        f"differ from those of padded rows by at most {dpo['difference']:.1e}, relatively, log-probs by "
        f"{logps['difference']:.0e}."
    )
    return textwrap.fill(text.replace("e-0", "e-"), 120) + "\n"


def trl() -> str:
    """Returns times and peaks under TRL's trainers."""
    rows = []
    for r in read("trl-cpu")["time"]:
        name = next(label for case, label in TRL.items() if r["case"].startswith(case))
        loss = ["", ""]
        if r.get("loss_ms_theirs") is not None:
            loss = [f"{r['loss_ms_theirs']:.0f}", f"**{r['loss_ms_ours']:.0f}**"]
        whole = [f"{r[f'{what}_{who}']:.0f}" for what in ("step_ms", "peak_mib") for who in ("theirs", "ours")]
        rows.append([name, *loss, whole[0], f"**{whole[1]}**", whole[2], f"**{whole[3]}**"])
    header = ["trainer, loss", "loss, ms: TRL", "here", "step, ms: TRL", "here", "peak, MiB: TRL", "here"]
    return table(header, rows)


def precision() -> str:
    """Returns bfloat16 against float32 by the CPU's instructions."""
    settings = read("precision-cpu")["settings"]
    of = [settings[name] for name in PRECISION_SETTINGS]
    names = list(of[0]["times"])
    rows = []
    for label, name in zip(PRECISION_PARTS, names, strict=True):
        cells = []
        for found in (s["times"][name] for s in of):
            by = f"{found['ratio']:.2f}"
            ms = f"{found['float32_ms']:.{1 if found['float32_ms'] < 100 else 0}f}"
            cells.append(f"{ms}, {f'**{by}**' if found['ratio'] > SLOW else by}")
        rows.append([label, *cells])
    rows.append(["`auto`", *(s["auto"] for s in of)])
    return table(["", *PRECISION_SETTINGS.values()], rows)


def bench() -> str:
    """Returns every table of a run of `xpo-fast bench`."""
    path = RESULTS / "bench-cpu.json"
    if not path.is_file():
        return "No run is committed. `xpo-fast bench --json bench/results/bench-cpu.json` makes one.\n"
    content = json.loads(path.read_text(encoding="utf-8"))
    records: dict[str, list[dict[str, Any]]] = {}
    for record in records_of(content):
        records.setdefault(record["key"], []).append(record)
    return markdown(content["environment"], records)


def compatibility() -> str:
    """Returns which versions were tried, and what came of it."""
    rows = []
    for run in read("compatibility")["runs"]:
        versions = [run["versions"].get(n, "") for n in ("torch", "transformers", "peft", "trl", "liger-kernel")]
        rows.append([*versions, run["python"], run["outcome"], run.get("why", "")])
    return table(["torch", "transformers", "peft", "TRL", "Liger", "Python", "outcome", ""], rows)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def fit() -> str:
    """Returns what was predicted of runs on the CPU, and what they took."""
    rows = []
    for run in read("fit-cpu")["runs"]:
        predicted, measured = (_gib(run[name]) for name in ("predicted", "measured"))
        rows.append([run["case"], predicted, measured, f"{run['off']:+.1%}", run["phase"]])
    return table(["SmolLM2-135M, float32, CPU", "predicted, GiB", "measured, GiB", "off", "largest in"], rows)


def scale_memory() -> str:
    """Returns what a rank of a run in parts held, and what was said of it before."""
    names = {"ddp": "DDP", "fsdp": "FSDP2", "zero3": "ZeRO-3"}
    rows = []
    for run in read("scale-cpu")["runs"]:
        sizes = [f"{run[name]:.0f}" for name in ("state_mib", "predicted_mib", "peak_mib")]
        layout = f"{names[run['layout']]}, {run['ranks']} ranks" if run["ranks"] > 1 else "one process"
        rows.append([layout, *sizes, f"{run['off']:+.1%}"])
    return table(["MiB per rank", "weights and states", "fit predicts", "measured", "off"], rows)


def fit_published() -> str:
    """Returns what was predicted of runs whose peaks others have published, by owner."""
    owners = ("weights", "optimizer", "gradients", "activations", "head")
    rows = []
    for run in read("fit-7b")["published"]:
        off = f"{run['alive'] / 2**30 / run['published'] - 1:+.1%}"
        parts = (_gib(run["columns"][name]) for name in owners)
        rows.append([run["name"], f"{run['published']:.1f}", _gib(run["alive"]), off, *parts])
    return table(["Llama 3.1 8B", "published, GiB", "predicted", "off", *owners], rows)


def seven() -> str:
    """Returns the recipes of a 7B or 8B model on one GPU."""
    owners = ("weights", "optimizer", "activations", "head", "allocator", "runtime")
    rows = []
    for run in read("fit-7b")["recipes"]:
        parts = (_gib(run["columns"][name]) for name in owners)
        peak = f"**{_gib(run['peak'])}** of {run['memory'] // 2**30}{'' if run['fits'] else ', does not fit'}"
        rows.append([f"{run['name']}: {run['shape']}", peak, *parts, f"{run['minutes']:.0f} ({run['card']})"])
    return table(["GiB", "peak", *owners, "minutes per 1,000 pairs"], rows)


def seven_commands() -> str:
    """Returns the commands of these recipes."""
    lines = []
    for run in read("fit-7b")["recipes"]:
        lines += [f"# {run['name']}", f"xpo-fast train --model MODEL --data pairs.jsonl --method dpo {run['options']}"]
    return "```\n" + "\n".join(lines) + "\n```\n"


BLOCKS = {
    "head": head,
    "steps": steps,
    "steps-about": steps_about,
    "trl": trl,
    "precision": precision,
    "bench": bench,
    "compatibility": compatibility,
    "fit": fit,
    "fit-published": fit_published,
    "seven": seven,
    "seven-commands": seven_commands,
    "scale": lambda: scale.steps() + "\n",
    "scale-memory": scale_memory,
    "scale-head": lambda: scale.head() + "\n",
}


def current(text: str) -> str:
    """Returns a page's text with every block as the results have it. Raises ValueError for an unknown block."""

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise ValueError(f"no block of figures named {name!r}: there are {', '.join(BLOCKS)}")
        return f"{name}{found[2]}{BLOCKS[name]()}"

    return BLOCK.sub(block, text)


def main() -> int:
    """Rewrites the pages, or checks them, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is not current")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        new = current(text)
        if new != text:
            stale.append(page)
            if not check:
                path.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page}: {'not current: run python bench/figures.py' if check else 'rewritten'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
