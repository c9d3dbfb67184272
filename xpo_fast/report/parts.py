"""The parts of the page of one run, from its files; a part for which the run has no data says so in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import charts
from .blocks import Figure, Numbered, Part, Table, Tile, change, duration, share, text
from .metrics import CURVES, LENGTHS, REWARDS, SHARES, SPEED, Charted
from .run import Run
from .samples import Pair, Sample, differences, shortened
from .series import EVAL, number

MOST_OTHERS = 40  # charts of further metrics
_TIMINGS = ("_runtime", "_second", "_time")
_SHORT = {
    "outcome": "Outcome",
    "curves": "Training",
    "rewards": "Rewards",
    "components": "Components",
    "lengths": "Lengths",
    "scorer": "Calibration",
    "iterations": "Iterations",
    "samples": "Samples",
    "preflight": "Preflight",
    "speed": "Throughput and memory",
    "others": "Other metrics",
    "configuration": "Configuration",
    "again": "Reproduce",
}
_LEVELS = ("fault", "doubt", "note", "ok")


def parts_of(run: Run, samples: int) -> list[Part]:
    """Returns the parts of a run's page. samples: pairs of completions to show at most."""
    charted = Charted(run.metrics, [part.end for part in run.parts[:-1]])
    numbered = Numbered()

    def figures(found: Any) -> list[Figure]:
        return [f for chart in found if (f := numbered.figure(chart)) is not None]

    made = [
        _outcome(run),
        Part("curves", "Training", "The run logged no loss.", figures=figures(charted.charts(CURVES))),
        Part(
            "rewards",
            "Rewards and KL",
            "The method has no rewards, or the run logged none.",
            figures=figures([*charted.charts(REWARDS), *charted.divergences()]),
        ),
        _components(run, figures(charted.components())),
        _lengths(run, numbered, figures(charted.charts(LENGTHS))),
        *([_scorer(run, numbered)] if run.command == "reward" else []),
        *([_iterations(run)] if run.command == "recipe" else []),
        _samples(run, samples),
        _preflight(run),
        _speed(run, figures(charted.charts(SPEED))),
    ]
    left = charted.others()
    others = Part("others", "All other metrics", "There are no others.", more=figures(left[:MOST_OTHERS]))
    if len(left) > MOST_OTHERS:
        others.lines.append(
            f"{len(left) - MOST_OTHERS} more are in the run's log: {', '.join(c.title for c in left[MOST_OTHERS:])}."
        )
    made += [others, _configuration(run), _again(run)]
    for part in made:
        part.short = _SHORT[part.id]
    return made


def tiles_of(run: Run) -> list[Tile]:
    """Returns the figures that a run is summed up by, those that it has."""
    found = []
    named = {"reward": "Reward", "rewards/accuracies": "Chosen preferred", "accuracy": "Accuracy", "loss": "Loss"}
    named |= {"rewards/margins": "Reward margin", "completions/mean_length": "Tokens of an answer"}
    figures = outcome(run)
    for name, label in named.items():
        if name in figures and len(found) < 3:
            before, after = figures[name]
            written = share if name.endswith(SHARES) else text
            about = f"held out, {written(before)} before" if math.isfinite(before) else "held out"
            found.append(Tile(label, written(after), about))
    history = [x for x in (number(v) for v in run.outcome.get("history") or []) if math.isfinite(x)]
    if history:
        found.append(Tile("Held-out score", text(history[-1]), f"{text(history[0])} at the start"))
    steps = number(run.state.get("global_step"))
    steps = steps if math.isfinite(steps) else run.metrics.last_step
    planned = number(run.state.get("max_steps"))
    found.append(Tile("Steps", text(steps), f"of {text(planned)}" if planned > 0 else ""))
    speed = dict(run.results.get("throughput") or {})
    if speed.get("tokens"):
        about = f"{text(number(speed['tokens']))} tokens in {duration(number(speed.get('seconds')))}"
        found.append(Tile("Tokens per second", text(round(number(speed.get("tokens_per_second")))), about))
    peak = number(dict(run.results.get("memory") or {}).get("peak_bytes"))
    if math.isfinite(peak):
        found.append(Tile("Peak memory", _size(peak), str(run.results["memory"].get("what", ""))))
    return found


def outcome(run: Run) -> dict[str, tuple[float, float]]:
    """Returns the figures on held-out rows before and after training; the first and the last evaluation without."""
    before, after = (_figures(run.results.get(name)) for name in ("before", "after"))
    if after:
        return {name: (before.get(name, math.nan), x) for name, x in after.items()}
    evaluated = run.metrics.evaluation.items()
    found = {name: s.values for name, s in evaluated if s.values and _compared(name)}
    return {name: (values[0] if len(values) > 1 else math.nan, values[-1]) for name, values in found.items()}


def _figures(metrics: Any) -> dict[str, float]:
    """Returns the numbers among metrics, by names without their prefix."""
    given = metrics.items() if isinstance(metrics, Mapping) else ()
    named = {str(k).removeprefix(EVAL): v for k, v in given if not str(k).endswith(_TIMINGS)}
    return {k: number(v) for k, v in named.items() if _compared(k) and (v is None or _is_number(v))}


def _compared(name: str) -> bool:
    """Returns whether a metric is a figure of what was learned: no time, and no spread of another."""
    return name != "epoch" and not name.startswith("time/") and not name.endswith(("_std", "/std"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _outcome(run: Run) -> Part:
    figures = outcome(run)
    rows = [[name, text(a), text(b), change(a, b)] for name, (a, b) in figures.items()]
    measured = "after" in run.results
    intro = (
        "Measured on rows that were held out, before the first step and after the last one."
        if measured
        else ("The run has no final evaluation: these are the first and the last one of its log.")
    )
    missing = "No rows were held out, or the run ended before they were measured."
    table = Table(["metric", "before" if measured else "first", "after" if measured else "last", "change"], rows)
    if run.command == "recipe" and not rows:
        missing = "No prompts were held out (--held-out)."
    return Part("outcome", "Before and after", missing, intro if rows else "", tables=[table] if rows else [])


def _components(run: Run, figures: list[Figure]) -> Part:
    missing = "Rewards have components in online runs (xpo-fast rl, recipes that sample while they train)."
    if run.command in ("rl",) and not figures:
        missing = "The run logged no reward."
    intro = "What each reward function gave in training, and, as diamonds, on the held-out prompts."
    if figures and not any(name.startswith("rewards/") for name in run.metrics.evaluation):
        intro = "What each reward function gave in training. No prompts were held out to compare with (--eval-split)."
    return Part("components", "Each reward against its held-out check", missing, intro * bool(figures), figures)


def _lengths(run: Run, numbered: Numbered, figures: list[Figure]) -> Part:
    part = Part("lengths", "Lengths and scores, before and after", figures=figures)
    part.missing = "This command samples no completions while it trains, so there are no lengths and scores of them."
    rollouts = sorted(run.samples.tokens)
    if not rollouts:
        return part
    quarter = max(1, len(rollouts) // 4)
    ends = {"first": rollouts[:quarter], "last": rollouts[-quarter:]}
    if len(rollouts) == 1:
        ends = {"only": rollouts}
    names = {k: f"{k} rollout" if len(v) == 1 else f"{k} {len(v)} rollouts" for k, v in ends.items()}
    rows = []
    for title, numbers in (
        ("Reward of a completion", run.samples.rewards),
        ("Tokens of a completion", run.samples.tokens),
    ):
        values = {names[k]: [x for r in v for x in numbers[r]] for k, v in ends.items()}
        finite = {name: [x for x in found if math.isfinite(x)] for name, found in values.items()}
        for name, found in finite.items():
            middle = sorted(found)
            cells = [title, name, text(float(len(found)))]
            cells += [
                text(f)
                for f in (
                    _mean(found),
                    middle[len(middle) // 2] if middle else math.nan,
                    min(found, default=math.nan),
                    max(found, default=math.nan),
                )
            ]
            rows.append(cells)
        if any(finite.values()):
            head = ["", "completions", "mean", "median", "lowest", "highest"]
            table = Table(head, [row[1:] for row in rows if row[0] == title])
            draw = _histogram(finite, "reward" if numbers is run.samples.rewards else "tokens")
            part.figures.append(numbered.other(title, draw, list(finite), "Shares of the completions.", table))
    cut = {
        k: sum(run.samples.truncated.get(r, 0) for r in v) / max(sum(len(run.samples.tokens[r]) for r in v), 1)
        for k, v in ends.items()
    }
    part.lines.append("Cut off at the longest length: " + ", ".join(f"{share(x)} ({names[k]})" for k, x in cut.items()))
    return part


def _histogram(values: dict[str, list[float]], across: str) -> Any:
    return lambda number: charts.histogram(values, across, number)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _scorer(run: Run, numbered: Numbered) -> Part:
    """Returns the part about a reward model's calibration, and its accuracy by difference of length."""
    part = Part("scorer", "The reward model on held-out pairs")
    part.missing = "It was measured on no held-out pairs, or the run ended before."
    after = run.results.get("after")
    after = after if isinstance(after, Mapping) else {}
    if isinstance(interval := after.get("accuracy_95"), list) and len(interval) == 2:
        low, high = map(number, interval)
        part.lines.append(
            f"Accuracy {share(number(after.get('accuracy')))}, 95% interval {share(low)} to {share(high)}"
        )
    rows = [r for r in after.get("calibration") or [] if isinstance(r, Mapping)]
    if rows:
        points = []
        for r in rows:
            p, n = number(r.get("accuracy")), max(number(r.get("pairs")), 1)
            points.append((number(r.get("confidence")), p, 1.96 * math.sqrt(max(p * (1 - p), 0) / n)))
        table = Table(
            ["confidence", "right", "pairs"],
            [[text(x), text(y), text(number(r.get("pairs")))] for (x, y, _), r in zip(points, rows)],
        )
        caption = "How often the higher score is right, by the confidence σ(|margin|); dashed: perfectly calibrated."
        draw = lambda number: charts.dots(points, "confidence", number, diagonal=True)  # noqa: E731
        part.figures.append(numbered.other("Calibration", draw, ["share that is right, ±1.96 SE"], caption, table))
    gaps = [r for r in after.get("by_length_gap") or [] if isinstance(r, Mapping)]
    if gaps:
        bars = [
            (
                (number(r.get("from")) + number(r.get("to"))) / 2,
                number(r.get("accuracy")),
                1.96 * number(r.get("standard_error")),
            )
            for r in gaps
        ]
        cells = [[text(number(r.get(k))) for k in ("from", "to", "accuracy", "pairs")] for r in gaps]
        rows = [[f"{low} to {high}", *rest] for low, high, *rest in cells]
        table = Table(["tokens more in the chosen", "accuracy", "pairs"], rows)
        caption = "Accuracy by how much longer the chosen completion is: a model of length alone falls to the left."
        draw = lambda number: charts.dots(bars, "tokens of chosen − rejected", number)  # noqa: E731
        part.figures.append(numbered.other("Accuracy by length", draw, ["accuracy, ±1.96 SE"], caption, table))
    return part


def _iterations(run: Run) -> Part:
    names = list(dict.fromkeys(name for part in run.parts for name in part.summary))
    rows = [[part.name, *(text(number(part.summary.get(name))) for name in names)] for part in run.parts]
    found = Part("iterations", "Iterations", "No iteration has been finished.")
    if rows and names:
        found.tables.append(Table(["", *(n.replace("_", " ") for n in names)], rows))
    elif rows:
        found.lines.append(f"{len(rows)} iteration{'s' * (len(rows) > 1)}, which sampled while they trained.")
    if run.outcome.get("reason"):
        found.lines.append(f"The loop ended because: {run.outcome['reason']}.")
    return found


def _samples(run: Run, most: int) -> Part:
    part = Part("samples", "Samples, before and after")
    shown = run.folder.as_posix()
    part.missing = (
        f"This run has kept no samples. `xpo-fast chat {shown} --prompt … --save` asks the policy before and after "
        "training, and this page shows the answers when it is made again."
    )
    if run.command == "reward":
        part.missing = "A reward model writes no answers."
    pairs, said = run.samples.pairs(most)
    if run.answers:
        pairs, said = run.answers[:most], "The answers of the policy before training and after it, to the same prompts."
    part.pairs = [shown_pair(pair) for pair in pairs]
    extremes = run.samples.extremes()
    if extremes:
        rows = [
            [text(s.score), text(s.tokens), shortened(p, prompt=True), shortened(s.text)[:600]] for p, s in extremes
        ]
        head = ["reward", "tokens", "prompt", "completion"]
        part.tables.append(Table(head, rows, "Highest and lowest rewards of the last rollout", numbers=False))
    if part.pairs:
        total = f" {text(float(run.samples.count))} samples were logged." if run.samples.count else ""
        marked = " What the other side lacks is marked." if pairs[0].other_prompt is None else ""
        part.intro = said + total + marked
    return part


def shown_pair(pair: Pair) -> dict[str, Any]:
    """Returns a pair as the template writes it: texts in parts, marked where they differ, unless the prompts do."""
    texts = [shortened(s.text) for s in (pair.before, pair.after)]
    sides = differences(*texts) if pair.other_prompt is None else tuple([(False, t)] for t in texts)
    about = [_about(s) for s in (pair.before, pair.after)]
    prompts = [shortened(p, prompt=True) for p in (pair.prompt, pair.other_prompt or "")]
    same = pair.other_prompt is None and pair.before.text == pair.after.text
    return {"prompts": prompts, "sides": list(zip(about, sides)), "same": same}


def _about(sample: Sample) -> str:
    score = f"score {text(sample.score)}" if math.isfinite(sample.score) else ""
    tokens = f"{text(sample.tokens)} tokens" if math.isfinite(sample.tokens) else ""
    return " · ".join(x for x in (sample.where, score, tokens) if x)


def _preflight(run: Run) -> Part:
    part = Part("preflight", "What the check before training found")
    part.missing = "The run has no record of a check: it was switched off, or this is a run of a recipe or a trainer."
    found = run.results.get("preflight")
    if not isinstance(found, Mapping):
        return part
    listed = [f for f in found.get("findings") or [] if isinstance(f, Mapping)]
    listed.sort(key=lambda f: _LEVELS.index(f["level"]) if f.get("level") in _LEVELS else len(_LEVELS))
    part.findings = [{k: str(f.get(k, "")) for k in ("level", "check", "text")} for f in listed]
    counts = {level: sum(f["level"] == level for f in part.findings) for level in _LEVELS}
    said = [f"{n} {level}{'s' * (n > 1 and level != 'ok')}" for level, n in counts.items() if n]
    part.intro = f"{found.get('title', '')}: {', '.join(said)}." if said else ""
    row = found.get("row")
    part.row = {k: str(row.get(k, "")) for k in ("where", "text")} if isinstance(row, Mapping) else None
    return part


def _speed(run: Run, figures: list[Figure]) -> Part:
    part = Part("speed", "Throughput and memory", "The run logged no throughput.", figures=figures)
    totals = run.results.get("throughput")
    if isinstance(totals, Mapping) and number(totals.get("tokens")) > 0:
        computed, padded = (number(totals.get(f"positions_{k}")) for k in ("computed", "padded"))
        rows = [
            ["tokens trained on", text(number(totals.get("tokens")))],
            ["seconds of training steps", text(number(totals.get("seconds")))],
            ["tokens per second", text(round(number(totals.get("tokens_per_second"))))],
            ["positions computed", text(computed)],
            ["positions of padded batches", text(padded)],
            ["saved by the layout", share(1 - computed / padded) if padded > 0 else "–"],
        ]
        part.tables.append(Table(["throughput", ""], rows))
    held = run.results.get("memory")
    peak = number(held.get("peak_bytes")) if isinstance(held, Mapping) else math.nan
    if not isinstance(held, Mapping) or not math.isfinite(peak) or peak <= 0:
        part.lines.append("The run has no record of its memory: it did not end, or was not started by a command.")
        return part
    owners = {str(k): number(v) for k, v in dict(held.get("owners") or {}).items() if number(v) > 0}
    rest = max(peak - sum(owners.values()), 0)
    owners["everything else: activations, tile, batches, libraries"] = rest
    part.shares = [(name, _size(x), x / max(peak, sum(owners.values()))) for name, x in owners.items()]
    part.tables.append(
        Table(
            [f"memory ({held.get('what', 'peak')})", ""],
            [["peak", _size(peak)], *([n, _size(x)] for n, x in owners.items())],
        )
    )
    return part


def _size(count: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    at = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
    return f"{count / 1024**at:.3g} {units[at]}" if count else "0 B"


def options_of(run: Run) -> dict[str, str]:
    """Returns the settings of a run, as text, those without a value left out."""
    given = dict(run.options)
    if not given and run.recipe:
        given = {
            **dict(run.recipe.get("training") or {}),
            "model": run.recipe.get("model"),
            "seed": run.recipe.get("seed"),
        }
    empty = (None, [], {}, "")
    return {str(k).replace("_", "-"): _plain(v) for k, v in sorted(given.items()) if v not in empty}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_plain(v)}" for k, v in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _configuration(run: Run) -> Part:
    missing = "The run has no config.yaml: it was started by a trainer, not by a command."
    return Part("configuration", "Configuration", missing, options=list(options_of(run).items()))


def _again(run: Run) -> Part:
    part = Part("again", "How to reproduce it", "Neither the command line nor versions were recorded.")
    if run.again:
        part.code.append(run.again)
        part.lines.append("Paths in it are as seen from the folder in which the run was started.")
    versions = run.results.get("versions")
    rows = [[str(k), str(v)] for k, v in versions.items()] if isinstance(versions, Mapping) else []
    if commit := run.results.get("commit"):
        rows.append(["commit of xpo-fast", str(commit)])
    if rows:
        part.tables.append(Table(["version", ""], rows, numbers=False))
    else:
        part.lines.append("The versions were not recorded.")
    return part
