"""Finds the checkpoint that a run resumes from, and refuses the one of another run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..resume import OF_THE_OPTIMIZER, check_made_with, is_checkpoint, last_checkpoint, model_identity, rows_identity
from . import config_file
from .loading import LORA, lora
from .options import kwargs_of
from .parser import UsageError
from .training import training_arguments

AUTO = "auto"  # --resume auto: from the last checkpoint, or from the start where there is none

# Options that a resumed run must not change; the others may change, or are compared by another name.
_FIXED = (
    *("method", "reference", "max_grad_norm", "seed", "dtype", "quantize"),
    *("max_length", "max_prompt_length", "score", "eval_split", "objectives", "objective_weights", "value_head_lr"),
)


def made_with(
    args: argparse.Namespace, checkpoint: str | None, rows: Any, method_args: dict[str, Any], *, lr: float
) -> dict[str, Any]:
    """Returns what the checkpoints of a run are compared by: names of options, and their values.

    Raises ValueError for a checkpoint of another run, before a model is loaded.
    rows: to train on. method_args: hyperparameters of --set. lr: the default of --lr.
    """
    from transformers import TrainingArguments

    asked = training_arguments(args, lr=lr, evaluates=False)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    trained = "every weight" if args.full else "the value head" if getattr(args, "head_only", False) else "an adapter"
    found = {f"--{name.replace('_', '-')}": getattr(args, name) for name in _FIXED if name in args}
    if trained == "an adapter":
        found |= {f"--{name.replace('_', '-')}": vars(lora(args))[field] for name, field in LORA.items()}
    made = {
        "the command": args.run.__module__.rpartition(".")[2],
        "what is trained": trained,
        **found,
        **{name: asked.get(name, defaults[name]) for name in OF_THE_OPTIMIZER},
        "--chat-template-kwargs": kwargs_of(args),
        "--set": method_args,
        "--model": model_identity(args.model),
        "--data": {"name": ", ".join(args.data), "hash": rows_identity(rows)},
    }
    if checkpoint is not None:
        check_made_with(checkpoint, made)
    return made


def kept(args: argparse.Namespace, began: float) -> str:
    """Returns a phrase about what a stopped run leaves. began: its start, in seconds as files have them."""
    if getattr(args, "output_dir", None) is None or "resume" not in args:
        return "nothing was written"
    output = Path(args.output_dir)
    if any((output / name).is_file() for name in ("run.json", "evaluation.json")):  # of a recipe, of evaluate
        return f"what is finished in {output} is kept, and the same command with --resume goes on from it"
    said = []
    if (state := output / "trainer_state.json").is_file() and state.stat().st_mtime >= began:
        said.append(f"the trained model is in {output}")
    if (last := last_checkpoint(output)) is not None:
        said.append(f"the last whole checkpoint is {last}, and the same command with --resume goes on from it")
    return "; ".join(said) or f"no checkpoint had been written into {output}"


def checkpoint(args: argparse.Namespace, last: Callable[[Path], str | None] | None = None) -> str | None:
    """Returns the checkpoint to resume from, or None.

    Raises UsageError if checkpoints of another run would be mixed with those of this one. Changes nothing:
    `training.fit` deletes what --overwrite names when training begins.
    last: finds the last whole checkpoint in a folder, if that takes more than transformers' own files.
    """
    output, resume = Path(args.output_dir), args.resume
    if resume in ("last", AUTO):
        found = (last or last_checkpoint)(output)
        if found is None and resume == "last":
            raise UsageError(f"--resume: no checkpoint in {output}; start without --resume, or name the checkpoint")
        return found
    if resume is not None:
        if not is_checkpoint(resume):
            raise UsageError(f"--resume {resume}: no checkpoint there, expected a folder with trainer_state.json")
        return resume
    if not args.overwrite and any(p.name.removeprefix("checkpoint-").isdigit() for p in output.glob("checkpoint-*")):
        raise UsageError(
            f"{output} has checkpoints of an earlier run: --resume goes on with it, --overwrite starts anew, "
            "--output-dir names another place"
        )
    return None


def check_blocks(args: argparse.Namespace, output: Path, there: bool, what: str, held: str) -> None:
    """Raises UsageError for a folder whose blocks would be mixed with other things, and for --resume of nothing.

    there: the folder has blocks of such a command. what, held: a word for them, and the words for the folder's content.
    """
    one = f"a{'n' * (what[0] in 'aeiou')} {what}"
    if args.resume and args.overwrite:
        raise UsageError(f"--resume goes on with {one} and --overwrite deletes it: choose one")
    if args.resume and not there:
        raise UsageError(f"--resume: no {what} in {output}")
    if there and not (args.resume or args.overwrite):
        raise UsageError(
            f"{output} has an earlier {what}: --resume goes on with it, --overwrite starts anew, --output-dir names "
            "another place"
        )
    if not there and output.is_dir() and any(path.name != config_file.FILE for path in output.iterdir()):
        raise UsageError(f"{output} is not empty and holds no {held}: name another --output-dir")
