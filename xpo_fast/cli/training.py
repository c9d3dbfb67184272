"""The steps of a training run that commands share: its checkpoint, rows held out, model, arguments, log, and its end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import random
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..doctor import versions
from ..files import finite, write_atomically
from .options import HELD_OUT_AT_MOST, UsageError, count

if TYPE_CHECKING:
    import datasets
    from transformers import Trainer


def checkpoint(args: argparse.Namespace, last: Callable[[Path], str | None] | None = None) -> str | None:
    """The checkpoint to go on from; UsageError where checkpoints of another run would be mixed with this one's.

    last: finds the last whole checkpoint in a folder, where that takes more than transformers' own files.
    """
    output, resume = Path(args.output_dir), args.resume
    steps = {
        int(m[1]): p for p in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    }
    if resume == "last":
        # A folder without its state was left by a run that died while it was writing.
        whole = {step: str(path) for step, path in steps.items() if (path / "trainer_state.json").is_file()}
        found = last(output) if last is not None else whole.get(max(whole, default=-1))
        if found is None:
            raise UsageError(
                f"--resume: no checkpoint in {output}; start without --resume, or name the checkpoint"
            )
        return found
    if resume is not None:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise UsageError(
                f"--resume {resume}: no checkpoint there, expected a folder with trainer_state.json"
            )
        return resume
    if steps and not args.overwrite:
        raise UsageError(
            f"{output} has checkpoints of an earlier run: --resume goes on with it, --overwrite starts anew, "
            "--output-dir names another place"
        )
    if args.overwrite:
        for path in steps.values():
            shutil.rmtree(path)
    (output / "train_log.jsonl").unlink(missing_ok=True)  # of a run that wrote no checkpoint, too
    return None


def hold_out(
    args: argparse.Namespace, rows: datasets.Dataset
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on, and the rows of --eval-split or None: those of one prompt together."""
    wanted = (
        min(len(rows) // 10, HELD_OUT_AT_MOST)
        if args.eval_split is None
        else count(args.eval_split, len(rows))
    )
    if wanted == 0:
        return rows, None
    from ..data import prompt_keys

    # Numbers for prompts, and arrays of rows: a file may have more of them than lists would fit into memory.
    _, firsts, group = np.unique(prompt_keys(rows), return_index=True, return_inverse=True)
    order: Any = np.argsort(firsts)  # as they come in the data
    sizes = np.bincount(group)
    random.Random(args.seed).shuffle(order)
    left, chosen = wanted, np.zeros(len(order), dtype=bool)
    for prompt in order:  # a prompt seen in training says little about what was learned
        if sizes[prompt] <= left:
            chosen[prompt] = True
            left -= int(sizes[prompt])
        if not left:
            break
    is_held = chosen[group]
    held, kept = np.flatnonzero(is_held), np.flatnonzero(~is_held)
    if not len(kept) or not len(held):
        if args.eval_split is None:
            return rows, None
        raise UsageError(
            f"--eval-split {args.eval_split:g} of {len(rows)} rows with {len(order)} different prompts leaves {len(kept)} "
            f"rows to train on and {len(held)} to evaluate; rows of one prompt stay together"
        )
    return rows.select(kept), rows.select(held)


def quiet(args: argparse.Namespace) -> None:
    """This package's warnings as lines on stderr, and little of what other packages say."""
    from transformers import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of packages about one another


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the tokenizer; the weights in float32 where all are trained."""
    from ..models import load_model

    further: dict[str, Any] = {"attn_implementation": args.attn} if args.attn else {}
    if args.trust_remote_code:
        further["trust_remote_code"] = True
    model, tokenizer = load_model(args.model, dtype="float32" if args.full else args.dtype, **further)
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    return model, tokenizer


def lora(args: argparse.Namespace) -> Any:
    from peft import LoraConfig

    targets = args.lora_targets if args.lora_targets == "all-linear" else args.lora_targets.split(",")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
    )


def training_arguments(args: argparse.Namespace, *, lr: float, evaluates: bool) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments. lr: where --lr is not given; evaluates: there are rows held out."""
    from transformers import TrainingArguments

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    )
    found = {
        "output_dir": args.output_dir,
        "learning_rate": args.lr or lr,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": getattr(args, "eval_batch_size", None) or args.batch_size,
        "gradient_accumulation_steps": args.grad_accum,
        "lr_scheduler_type": args.scheduler,
        # A share of the steps below 1 is what transformers takes warmup_steps for, too.
        "warmup_steps": args.warmup_ratio,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
        checkpointing: args.gradient_checkpointing,
        "use_cpu": args.cpu,
        "bf16": args.full and args.dtype == "bfloat16",
        "fp16": args.full and args.dtype == "float16",
        "logging_steps": args.logging_steps,
        "logging_first_step": True,
        "eval_strategy": "steps" if args.eval_steps and evaluates else "no",
        "eval_steps": args.eval_steps,
        "save_steps": args.save_steps,
        "save_total_limit": args.save_total_limit,
        "report_to": args.report_to,
    }
    if "group_by_length" in args:
        found["train_sampling_strategy"] = "group_by_length" if args.group_by_length else "random"
    return found


def json_log(args: argparse.Namespace) -> Any:
    """A callback that appends every log to train_log.jsonl, one JSON object a line.

    A resumed run takes out the lines of steps behind its checkpoint, which it does again, and what it measured before them.
    """
    from transformers import TrainerCallback

    path = Path(args.output_dir) / "train_log.jsonl"

    class JsonLog(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not (state.is_world_process_zero and state.global_step and path.is_file()):
                return
            kept, last = [], 0
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    step = json.loads(line)["step"]
                except ValueError:  # was being written when the run died
                    continue
                if last <= step <= state.global_step:
                    kept.append(line)
                    last = step
            write_atomically(path, "".join(kept).encode())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and logs:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finite({"step": state.global_step, **logs})) + "\n")

    return JsonLog()


def say(trainer: Trainer) -> Callable[[str], None]:
    """print, on the main process alone."""
    return print if trainer.is_world_process_zero() else lambda line: None


def begun(args: argparse.Namespace) -> dict[str, Any]:
    """What results.json and report.json begin with: the options and the versions."""
    return {
        "options": {k: v for k, v in vars(args).items() if k not in ("run", "api_key")},
        "versions": versions(),
    }


def fit(trainer: Trainer, checkpoint: str | None) -> dict[str, float] | None:
    """Train and save; what the trainer measured, or None where Ctrl-C has ended it, with a checkpoint."""
    with stop_after_step(trainer) as stopped:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if stopped:
        say(trainer)(
            f"\nstopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved. Go on with "
            "the same command and --resume"
        )
        return None
    trainer.save_model()
    trainer.save_state()
    return metrics


@contextlib.contextmanager
def stop_after_step(trainer: Trainer) -> Iterator[Sequence[int]]:
    """Ctrl-C ends training after the step under way, with a checkpoint; a second one ends it at once.

    Yields a list that is not empty once that has happened. Processes of one run are not asked, because they would not
    stop after the same step.
    """
    from transformers import TrainerCallback

    stopped: list[int] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stopped:
                control.should_save = control.should_training_stop = True

    def interrupt(number: int, frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

    if trainer.args.world_size > 1:
        yield stopped
        return
    trainer.add_callback(Stop())
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, previous)
