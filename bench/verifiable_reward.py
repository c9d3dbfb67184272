"""Runs examples/verifiable_reward.py with each method and with a control, whose rewards are shuffled, for some seeds.

    python bench/verifiable_reward.py --json bench/results/verifiable-reward.json --plot docs/verifiable_reward.png

The model is SmolLM2-135M in bfloat16; a run of GRPO or RLOO takes about 7 minutes on one core. Runs that the file has
are not repeated, and --add takes files that the example itself has written. Reported per run: the reward of 64 held-out
sums before and after, the gain as a share of the possible gain (the largest reward is 1), and the divergence from the
reference and the length at the end. Exit status 1: the share of a method is below 0.3, or that of a control above 0.1.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from xpo_fast.bench.measure import environment, read_json, table
from xpo_fast.files import write_json

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "verifiable_reward.py"
METHODS = ("grpo", "ppo", "rloo")
LEAST_SHARE, MOST_CONTROL = 0.3, 0.1


def share(run: dict[str, Any]) -> float:
    """Returns the gain in reward as a share of the possible gain, to 1."""
    return (run["after"] - run["before"]) / (1 - run["before"])


def curve(run: dict[str, Any], *names: str) -> dict[int, float]:
    """Returns the values by step of the first of `names` that is logged, at the steps that log their rollout."""
    name = next(name for name in names if name in run["log"][0])
    return {row["step"]: row[name] for row in run["log"] if name in row and "reward" in row}


def last(values: dict[int, float]) -> float:
    """Returns the mean over the last five rollouts."""
    found = list(values.values())[-5:]
    return sum(found) / len(found)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws the reward, the divergence and the length by step."""
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
        panels, ("reward of the samples", "KL (PPO, RLOO: per completion; GRPO: per token)", "tokens"), strict=True
    ):
        axes.set(title=title, xlabel="step")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="results of the example")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)

    def key(run: dict[str, Any]) -> tuple[str, bool, int]:
        return run["method"], run["shuffled"], run["seed"]

    runs = {key(run): run for run in [*read_json(args.json).get("runs", []), *map(read_json, args.add)]}
    for seed in args.seeds:
        for method in args.methods:
            for control in (False, True):
                if (method, control, seed) not in runs:
                    runs[method, control, seed] = _run(method, control, seed, args.steps)
                if args.json:
                    write_json(args.json, {"environment": environment(), "runs": [*runs.values()]})
    if args.plot:
        plot(list(runs.values()), args.plot)
    rows = [
        [
            run["method"] + (", shuffled" if run["shuffled"] else ""),
            str(run["seed"]),
            str(len(run["log"])),
            f"{run['before']:.3f}",
            f"{run['after']:.3f}",
            f"{share(run):+.2f}",
            f"{last(curve(run, 'objective/kl', 'kl')):.3f}",
            f"{last(curve(run, 'completions/mean_length')):.1f}",
        ]
        for run in runs.values()
    ]
    print(table(["rewards of", "seed", "steps", "before", "after", "of the way", "KL", "tokens"], rows))
    return int(any(share(run) > MOST_CONTROL if run["shuffled"] else share(run) < LEAST_SHARE for run in runs.values()))


def _run(method: str, control: bool, seed: int, steps: int) -> dict[str, Any]:
    example: Any = runpy.run_path(str(EXAMPLE))
    began = time.perf_counter()
    print(f"{method}{', shuffled' if control else ''}, seed {seed} …", file=sys.stderr, flush=True)
    model = example["load_model"](example["SMOLLM2"], dtype="bfloat16")
    run = example["main"](*model, method, control=control, steps=steps, seed=seed)
    return {**run, "wall_s": time.perf_counter() - began}


if __name__ == "__main__":
    sys.exit(main())
