"""The curves of examples/verifiable_reward.py: each method and its control with shuffled rewards, a seed or several.

    python bench/verifiable_reward.py --json bench/results/verifiable-reward.json --plot docs/verifiable_reward.png

SmolLM2-135M in bfloat16, about 7 minutes a run of GRPO or RLOO on one core. Runs that the file has are not made again, and
--add takes those that the example itself has written. Said of each: the reward of 64 sums held out, before and after, how
far of the way to the most that can be had, 1, that is, the divergence from the reference and the length at the end.
Exit status 1 if a method comes less than 0.3 of the way, or its control more than 0.1.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from measure import environment, table, write_json
from xpo_fast.files import finite

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "verifiable_reward.py"
METHODS = ("grpo", "ppo", "rloo")
WAY, CONTROL = 0.3, 0.1


def share(run: dict[str, Any]) -> float:
    """Of the way from the reward before to 1."""
    return (run["after"] - run["before"]) / (1 - run["before"])


def curve(run: dict[str, Any], *names: str) -> dict[int, float]:
    """Of the first of these that is logged, by the step: PPO's second step on a rollout says nothing of the rollout."""
    name = next(name for name in names if name in run["log"][0])
    return {row["step"]: row[name] for row in run["log"] if name in row and "reward" in row}


def last(values: dict[int, float]) -> float:
    """The mean over the last five rollouts."""
    found = list(values.values())[-5:]
    return sum(found) / len(found)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for run in runs:
        look: Any = {"color": f"C{METHODS.index(run['method'])}", "ls": ":" if run["shuffled"] else "-", "lw": 1.2}
        first = run["seed"] == min(r["seed"] for r in runs)
        label = run["method"] + (", shuffled" if run["shuffled"] else "") if first else None
        shown = (("reward",), ("objective/kl", "kl"), ("completions/mean_length",))
        for axes, names in zip(panels, shown, strict=True):
            values = curve(run, *names)
            axes.plot([*values], [*values.values()], label=label, **look)
    for axes, title in zip(
        panels, ("reward of the samples", "KL (PPO, RLOO: a completion; GRPO: a token)", "tokens"), strict=True
    ):
        axes.set(title=title, xlabel="step")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="results of the example")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)

    found = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {"runs": []}

    def key(run: dict[str, Any]) -> tuple[str, bool, int]:
        return run["method"], run["shuffled"], run["seed"]

    runs = {key(run): run for run in [*found["runs"], *(json.loads(f.read_text()) for f in args.add)]}
    for seed in args.seeds:
        for method in args.methods:
            for control in (False, True):
                if (method, control, seed) not in runs:
                    runs[method, control, seed] = _run(method, control, seed, args.steps)
                if args.json:
                    write_json(args.json, {"environment": environment(), "runs": finite([*runs.values()])})
    if args.plot:
        plot(list(runs.values()), args.plot)
    rows = [
        [
            run["method"] + (", shuffled" if run["shuffled"] else ""), str(run["seed"]), str(len(run["log"])),
            f"{run['before']:.3f}", f"{run['after']:.3f}", f"{share(run):+.2f}", f"{last(curve(run, 'objective/kl', 'kl')):.3f}",
            f"{last(curve(run, 'completions/mean_length')):.1f}",
        ]
        for run in runs.values()
    ]  # fmt: skip
    print(table(["rewards of", "seed", "steps", "before", "after", "of the way", "KL", "tokens"], rows))
    return int(any(share(run) > CONTROL if run["shuffled"] else share(run) < WAY for run in runs.values()))


def _run(method: str, control: bool, seed: int, steps: int) -> dict[str, Any]:
    example: Any = runpy.run_path(str(EXAMPLE))
    began = time.perf_counter()
    print(f"{method}{', shuffled' if control else ''}, seed {seed} …", file=sys.stderr, flush=True)
    model = example["load_model"](example["SMOLLM2"], dtype="bfloat16")
    run = example["main"](*model, method, control=control, steps=steps, seed=seed)
    return {**run, "wall_s": time.perf_counter() - began}


if __name__ == "__main__":
    sys.exit(main())
