"""The folder of a run: its identity, blocks of JSON lines that are not computed twice, and the models to keep.

    output/run.json                       the run's settings; a resumed run must have the same
    output/start/held_out-00000.jsonl     answers to the held-out prompts, with scores, before training
    output/iteration-000/samples-00000.jsonl    a block of prompts with their completions
                         judged-00000.jsonl     the scores or win probabilities of that block
                         selected.jsonl         the rows that are trained on
                         summary.json           counts and means of these three, and figures on the judge's biases
                         train/                 checkpoints, during training
                         train_log.json         the trainer's log
                         model/                 the policy after the iteration, a whole model
                         held_out-00000.jsonl
    output/model/, output/result.json     the best model, and why the loop ended

Each file or folder appears whole or not at all, and an existing one is not made again: a run that was killed continues
with the block, or the checkpoint, at which it stopped. Every draw has a seed of its own derived from its purpose, so a
resumed run gives the same result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..files import write_atomically, write_json
from ..resume import as_json

if TYPE_CHECKING:
    from .recipe import Recipe
    from .setup import Row, Setup


def runs_in(output: Path) -> list[Path]:
    """Returns the folders of the runs in an output folder: itself, or those of a recipe's parts."""
    return [path.parent for path in (*output.glob("run.json"), *sorted(output.glob("[1-9]-*/run.json")))]


def identify(recipe: Recipe, setup: Setup) -> None:
    """Writes the run's settings to run.json. Raises ValueError if the folder has a run with others, and names them."""
    about = {"recipe": dataclasses.asdict(recipe), "model": setup.model}
    about |= {name: _digest(getattr(setup, name)) for name in ("rows", "held_out")}
    about |= {name: type(getattr(setup, name)).__name__ for name in ("judge", "held_out_judge", "generator")}
    about |= {name: dataclasses.asdict(getattr(setup, name)) for name in ("stopping", "sampling")}
    about |= {"training": dict(setup.training), "notes": dict(setup.notes)}
    about["adapter"] = None if setup.peft_config is None else setup.peft_config.to_dict()
    about = as_json(about | {"block": setup.block, "seed": setup.seed})
    path = setup.output / "run.json"
    if not path.is_file():
        write_json(path, about, ensure_ascii=False)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in about if before.get(name) != about[name]]
    if other:
        raise ValueError(
            f"{setup.output} holds a run with other settings ({', '.join(other)}): go on with the same ones, or name "
            "another folder"
        )


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()[:16]


class Blocks(Protocol):
    """What `in_blocks` reads of a setup. block: items per file. say: called with each line of progress."""

    @property
    def block(self) -> int: ...

    @property
    def say(self) -> Callable[[str], Any]: ...


def in_blocks(
    setup: Blocks,
    folder: Path,
    name: str,
    items: Sequence[Any],
    work: Callable[[int, Sequence[Any]], list[Row]],
    unit: str = "prompts",
) -> list[Row]:
    """Returns the lines work(b, items of block b) of all blocks; a block whose file exists is read from it.

    unit: the word for items, in lines of progress.
    """
    lines, started, fresh = [], time.monotonic(), 0
    for b, start in enumerate(range(0, len(items), setup.block)):
        path = folder / f"{name}-{b:05d}.jsonl"
        if not path.is_file():
            part = items[start : start + setup.block]
            write_lines(path, work(b, part))
            fresh += len(part)
            pace = (time.monotonic() - started) / fresh
            done = start + len(part)
            left = f", {pace * (len(items) - done):.0f} s left" if done < len(items) else ""
            setup.say(f"{folder.name}: {name.replace('_', '-')} {done} of {len(items)} {unit}, {pace:.2g} s each{left}")
        lines += read_lines(path)
    return lines


def read_blocks(folder: Path, name: str) -> list[Row]:
    """Returns the lines of all blocks of that name in the folder."""
    return [line for path in sorted(folder.glob(f"{name}-*.jsonl")) for line in read_lines(path)]


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as JSON lines; the file appears whole."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_lines(path: Path) -> list[Row]:
    """Returns the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def remove_models(output: Path, *, best: int, last: int) -> None:
    """Removes the models of the iterations before the last one, except the best.

    best, last: 1 for the first iteration. A resumed run repeats its early iterations and may have models of later ones,
    which stay.
    """
    for number in range(1, last):
        if number != best:
            shutil.rmtree(output / f"iteration-{number - 1:03d}" / "model", ignore_errors=True)
