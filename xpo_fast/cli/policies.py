"""Finds, in the folder of a run, the policy that it trained and the one that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..resume import is_checkpoint, last_checkpoint, model_identity
from ..wording import did_you_mean
from .parser import UsageError

# Files by which folders are known; written out, and held to those of models and rewards by a test, for importing these
# takes seconds.
ADAPTER, MODEL, SPEC_FILE = "adapter_config.json", "config.json", "reward_model.json"


@dataclass(frozen=True)
class Trained:
    """What a run trained.

    folder: of the model or the adapter. before: the model that it began with; "" if nothing tells. notes: what is
    particular about the folder. options: of the run, by the names of config.yaml with underscores.
    """

    folder: Path
    before: str
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, whose base model is the policy before."""
        return (self.folder / ADAPTER).is_file()

    @property
    def is_reward_model(self) -> bool:
        """Whether the folder holds a reward model."""
        return (self.folder / SPEC_FILE).is_file()


def find(run: str) -> Trained:
    """Returns what a run trained: the model it saved, or, if it has saved none yet, its last whole checkpoint.

    Raises UsageError if there is no such folder, or neither a model nor a checkpoint in it.
    """
    path = Path(run)
    if not path.is_dir():
        names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UsageError(f"no run in {run!r}: no such folder{did_you_mean(path.name, names)}")
    roots = [p.parent for p in (*path.glob("run.json"), *sorted(path.glob("[1-9]-*/run.json")))]
    if roots:
        return _of_recipe(path, roots)
    options = _options(path)
    before = str(options.get("model") or "")
    if any((path / name).is_file() for name in (ADAPTER, MODEL)):
        return Trained(path, before, options=options)
    checkpoint = last_checkpoint(path)
    if checkpoint is None:
        raise UsageError(
            f"{run} has neither a model nor a whole checkpoint: name the --output-dir of a run that has saved one"
        )
    return Trained(Path(checkpoint), before, (f"the run has not finished: this is {checkpoint}",), options)


def _of_recipe(path: Path, roots: list[Path]) -> Trained:
    """Returns the result of a recipe, or its last finished iteration."""
    before = str(_json(roots[0] / "run.json").get("model") or "")
    made = [p for root in roots for p in sorted(root.glob("iteration-*/model"))]
    made += [p for root in roots[-1:] for name in ("reward_model", "model") if (p := root / name).is_dir()]
    result = roots[-1] / "result.json"
    prompt = _json(result).get("prompt") if result.is_file() else None
    if prompt is not None:
        raise UsageError(f"{path} is a search for an instruction, which trained no model; it found {prompt!r}")
    if not made:
        raise UsageError(f"{path} is a recipe's run in which no iteration has been finished, or none was better")
    done = made[-1].parent == roots[-1]
    notes = () if done else (f"the recipe has not finished, or no iteration was better: this is {made[-1]}",)
    return Trained(made[-1], before, notes, _options(path))


def _options(path: Path) -> dict[str, Any]:
    """Returns the options of the run's config.yaml, by names with underscores; none without the file."""
    file = path / "config.yaml"
    if not file.is_file():
        return {}
    try:
        import yaml

        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except ImportError as error:
        raise ImportError("config.yaml needs pyyaml: pip install 'xpo-fast[train]'") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not valid YAML: mend it, or move it away") from error
    return {str(k).replace("-", "_"): v for k, v in found.items()} if isinstance(found, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is broken ({error})") from error
    return found if isinstance(found, dict) else {}


def checkpoints(run: str) -> list[tuple[str, Path]]:
    """Returns the policies that a run has kept, in order, by name: its checkpoints or iterations, and its model.

    The model it saved is left out where it is one of these. Raises UsageError as `find` does, and for a run
    that has kept none but a reward model.
    """
    last = find(run)
    if last.is_reward_model:
        raise UsageError(f"{last.folder} holds a reward model, which is no policy: name another run")
    path = Path(run)
    steps = {p.name.removeprefix("checkpoint-"): p for p in path.glob("checkpoint-*") if is_checkpoint(p)}
    found = [(f"step {k}", steps[k]) for k in sorted(filter(str.isdigit, steps), key=int)]
    for root in (path, *sorted(path.glob("[1-9]-*"))):
        of = "" if root == path else f"{root.name} "
        for folder in sorted(root.glob("iteration-*/model")):
            found.append((f"{of}iteration {int(folder.parent.name.removeprefix('iteration-')) + 1}", folder))
    if last.folder not in [folder for _, folder in found]:
        weights = _weights(last.folder)
        found += [] if any(_weights(p) == weights for _, p in found) else [("the model", last.folder)]
    return found


def _weights(folder: Path) -> Any:
    return model_identity(str(folder))["hash"]
