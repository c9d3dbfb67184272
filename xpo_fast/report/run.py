"""Reads the folder of a run, finished or not, as `xpo-fast train`, `reward`, `rl` and `recipe` or a trainer wrote it.

Files that are missing, broken or half-written are no error: the run says in `notes` what could not be read.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..resume import last_checkpoint
from ..wording import did_you_mean
from .metrics import HELD_OUT
from .samples import Pair, Sample, Samples, text_of
from .series import Metrics, Series, number

COMMANDS = ("train", "reward", "rl", "distill", "recipe")
ANSWERS = "answers.jsonl"  # of `xpo-fast chat --save`
_STATE = "trainer_state.json"
_FILES = ("results.json", "train_log.jsonl", "config.yaml", "run.json", _STATE)


@dataclass
class Run:
    """A run as its files describe it.

    command: the one that made it; "trainer" for a run without the command line. options: as config.yaml has them.
    state: global_step and max_steps, where a trainer's state tells. parts: the iterations of a recipe.
    """

    folder: Path
    command: str = "trainer"
    options: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    samples: Samples = field(default_factory=Samples)
    answers: list[Pair] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)  # run.json
    outcome: dict[str, Any] = field(default_factory=dict)  # result.json
    parts: list[Part] = field(default_factory=list)
    again: str = ""  # command line that repeats the run
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name, with its parent's if it is a common one."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}" if path.name in ("out", "output", "run") else path.name

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        if self.command == "recipe":
            return bool(self.outcome)
        steps = number(self.state.get("max_steps"))
        done = number(self.state.get("global_step")) >= steps if steps > 0 else False
        return done and (self.command == "trainer" or "train" in self.results)

    @property
    def method(self) -> str:
        """The method that was trained by, or the recipe's name; "" if nothing tells."""
        named = dict(self.recipe.get("recipe") or {}).get("name") if self.recipe else None
        return str(named or self.options.get("method") or "")


@dataclass
class Part:
    """An iteration of a recipe: where its steps end among those of all, and its summary.

    scores: the held-out scores after it, one per prompt.
    """

    name: str
    end: float
    summary: dict[str, Any]
    scores: list[float]


def read_run(folder: str | Path) -> Run:
    """Returns the run in a folder.

    Raises ValueError if there is no such folder, or if it has none of the files of a run.
    """
    path = Path(folder)
    if not path.is_dir():
        names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ValueError(f"no run in {str(folder)!r}: no such folder{did_you_mean(path.name, names)}")
    roots = sorted(p.parent for p in path.glob("[1-9]-*/run.json"))
    checkpoint = last_checkpoint(path)
    if not (roots or checkpoint or any((path / name).is_file() for name in _FILES)):
        raise ValueError(
            f"no run in {str(folder)!r}: expected the --output-dir of xpo-fast train, reward, rl or recipe, or the "
            f"output_dir of a trainer; none of {', '.join(_FILES)} and no checkpoint is there"
        )
    run = Run(path)
    run.results = _object(path / "results.json", run.notes)
    _read_config(run)
    run.options = run.options or dict(run.results.get("options") or {})
    named = run.results.get("command") or run.command
    if (path / "run.json").is_file() or roots:
        run.command = "recipe"
        _read_recipe(run, roots or [path])
        return run
    state = _object(path / _STATE, run.notes)
    if checkpoint is not None:
        last = _object(Path(checkpoint) / _STATE, run.notes)
        state = last if number(last.get("global_step")) > number(state.get("global_step")) or not state else state
    run.state = {name: state.get(name) for name in ("global_step", "max_steps", "best_metric")}
    if (path / "train_log.jsonl").is_file():
        run.metrics.read(_lines(path / "train_log.jsonl", run.notes))
    else:
        run.metrics.read(x for x in state.get("log_history") or [] if isinstance(x, dict))
    if (path / "samples.jsonl").is_file():
        run.samples.read(_lines(path / "samples.jsonl", run.notes))
    _read_answers(run)
    run.command = named if named in COMMANDS else _guessed(run)
    return run


def _guessed(run: Run) -> str:
    """Returns the command of a run whose files do not name it; "trainer" if its options are of none."""
    kinds = {"rl": ("num_generations", "num-generations"), "reward": ("objectives", "head_only", "head-only")}
    for command, names in kinds.items():
        if any(name in run.options for name in names):
            return command
    return "train" if "score" in run.options else "trainer"


def _read_config(run: Run) -> None:
    """Adds the options of config.yaml, and the command in its comment, which repeats the run."""
    path = run.folder / "config.yaml"
    if not path.is_file():
        return
    try:
        import yaml

        text = path.read_text(encoding="utf-8")
        read = yaml.safe_load(text)
    except (OSError, ValueError, ImportError) as error:
        run.notes.append(f"config.yaml cannot be read ({type(error).__name__})")
        return
    except Exception as error:  # yaml's own, which is not known where yaml is missing
        run.notes.append(f"config.yaml is broken ({type(error).__name__})")
        return
    run.options = {str(k).replace("-", "_"): v for k, v in read.items()} if isinstance(read, dict) else {}
    if found := re.search(r"^# (xpo-fast (\S+) .*)$", text, re.MULTILINE):
        run.again, run.command = found[1], found[2]


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Returns the object of a JSON file; {} if there is none."""
    found: Any = {}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            notes.append(f"{path.name} cannot be read: it is broken, or was being written")
    return found if isinstance(found, dict) else {}


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines; notes how many lines are none."""
    broken = 0
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict):
                yield line
            elif text.strip():
                broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} {'lines are' if broken > 1 else 'line is'} broken and left out")


def _read_answers(run: Run) -> None:
    """Adds the answers that `xpo-fast chat --save` has kept."""
    for line in _lines(run.folder / ANSWERS, run.notes):
        before, after = (Sample(text_of(line.get(name)), name) for name in ("before", "after"))
        run.answers.append(Pair(text_of(line.get("prompt")), before, after))


def _read_recipe(run: Run, roots: list[Path]) -> None:
    """Adds the iterations of a recipe's parts: logs one behind the other, summaries, and held-out answers."""
    offset, first, last = 0.0, {}, {}
    scores = Series(low=[], high=[])
    for root in roots:
        about = _object(root / "run.json", run.notes)
        run.recipe = run.recipe or about
        outcome = _object(root / "result.json", run.notes)
        run.outcome = outcome if root == roots[-1] else {}
        told = "" if len(roots) == 1 else f"{root.name}, "
        start = _held_out(root / "start", run.notes)
        first = first or start
        if start:
            _add_scores(scores, offset, [score for _, score in start.values()])
        for folder in sorted(root.glob("iteration-*")):
            log = _array(folder / "train_log.json", run.notes)
            logs = log if log and isinstance(log[0], list) else [log]  # adapters that are trained side by side
            for entries in logs:
                run.metrics.read((x for x in entries if isinstance(x, dict)), offset)
                offset = run.metrics.last_step
            if (folder / "samples.jsonl").is_file():
                run.samples.read(_numbered(folder, len(run.parts), run.notes))
            held = _held_out(folder, run.notes)
            last = held or last
            values = [score for _, score in held.values()]
            if values:
                _add_scores(scores, offset, values)
            number_of = int(folder.name.rpartition("-")[2]) + 1
            summary = _object(folder / "summary.json", run.notes)
            run.parts.append(Part(f"{told}iteration {number_of}", offset, summary, values))
    if scores.values:
        run.metrics.evaluation[HELD_OUT] = scores
    for prompt in first if last else ():
        if prompt in last:
            before, after = (
                Sample(text, where, score)
                for where, (text, score) in (("start", first[prompt]), ("last iteration", last[prompt]))
            )
            run.answers.append(Pair(prompt, before, after))


def _numbered(folder: Path, iteration: int, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields an iteration's samples with rollouts that are counted over all iterations."""
    for line in _lines(folder / "samples.jsonl", notes):
        rollout = number(line.get("rollout"))
        yield {**line, "rollout": 100_000 * iteration + (int(rollout) if math.isfinite(rollout) else 0)}


def _held_out(folder: Path, notes: list[str]) -> dict[str, tuple[str, float]]:
    """Returns the answer to each held-out prompt with its score, NaN without one."""
    found = {}
    for path in sorted(folder.glob("held_out-*.jsonl")):
        for line in _lines(path, notes):
            found[text_of(line.get("prompt"))] = text_of(line.get("completion")), number(line.get("score"))
    return found


def _add_scores(series: Series, step: float, values: list[float]) -> None:
    """Adds the mean of held-out scores with its 95% interval by the normal distribution."""
    known = [x for x in values if math.isfinite(x)]
    mean = sum(known) / len(known) if known else math.nan
    variance = sum((x - mean) ** 2 for x in known) / (len(known) - 1) if len(known) > 1 else math.nan
    half = 1.96 * math.sqrt(variance / len(known)) if len(known) > 1 else math.nan
    assert series.low is not None and series.high is not None
    series.add(step, mean)
    series.low.append(mean - half)
    series.high.append(mean + half)


def _array(path: Path, notes: list[str]) -> list[Any]:
    found: Any = []
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            notes.append(f"{path.parent.name}/{path.name} cannot be read")
    return found if isinstance(found, list) else []
