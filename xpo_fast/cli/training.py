"""Trains: arguments of the trainer from the options, and the run from its first step to the saved model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finite, saving, write_atomically, write_json
from . import config_file
from .parser import UsageError
from .signals import Stopped, stop_after_step

if TYPE_CHECKING:
    from transformers import Trainer

RESULTS = "results.json"


def quiet(args: argparse.Namespace) -> None:
    """Prints this package's warnings as lines on stderr, and silences most of other packages' logs."""
    import datasets
    from transformers import logging as transformers_logging

    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("xpo_fast.layout").setLevel(logging.INFO)  # which layout is taken, and why
    transformers_logging.set_verbosity_error()
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of packages about one another


def training_arguments(args: argparse.Namespace, *, lr: float, evaluates: bool) -> dict[str, Any]:
    """Returns keyword arguments of TrainingArguments. lr: the default of --lr. evaluates: there are rows held out."""
    import torch
    from transformers import TrainingArguments

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    found = {
        "output_dir": args.output_dir,
        "learning_rate": args.lr or lr,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": getattr(args, "eval_batch_size", None) or args.batch_size,
        "gradient_accumulation_steps": args.grad_accum,
        "lr_scheduler_type": args.scheduler,
        # transformers reads warmup_steps below 1 as a share of the steps.
        "warmup_steps": args.warmup_ratio if args.warmup_steps is None else args.warmup_steps,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
        checkpointing: args.gradient_checkpointing,
        # transformers refuses bf16 where there is no accelerator, unless it is told that none is meant.
        "use_cpu": args.cpu or not torch.accelerator.is_available(),
        "bf16": args.full and args.dtype == "bfloat16",
        "fp16": args.full and args.dtype == "float16",
        "logging_steps": args.logging_steps,
        "logging_first_step": True,
        "disable_tqdm": not sys.stderr.isatty(),  # a progress bar for a terminal alone
        "eval_strategy": "steps" if args.eval_steps and evaluates else "no",
        "eval_steps": args.eval_steps,
        "save_steps": args.save_steps,
        "save_total_limit": args.save_total_limit,
        "report_to": args.report_to,
        "push_to_hub": bool(args.push_to_hub),
        "hub_model_id": args.push_to_hub if isinstance(args.push_to_hub, str) else None,
        "hub_private_repo": args.hub_private or None,
        **({"optim": args.optim} if args.optim else {}),
        **dict(args.train),
    }
    if "group_by_length" in args:
        found["train_sampling_strategy"] = "group_by_length" if args.group_by_length else "random"
    return found


def weights(model: Any, *, full: bool) -> tuple[str, str]:
    """Returns the number of weights, those of an adapter left out, and of those that are trained, in millions."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{(total if full else total - trained) / 1e6:.1f}M", f"{trained / 1e6:.2f}M"


def print_held_out(
    say: Callable[[str], None], title: str, results: dict[str, Any], lines: dict[str, tuple[str, str]]
) -> None:
    """Prints metrics before and after training. lines: a metric's label, its name and format."""
    say(f"\n{title:<32}{'before':>10}{'after':>10}")
    for label, (name, form) in lines.items():
        if name in results["after"]:
            before = format(results["before"][name], form) if name in results["before"] else "-"
            say(f"{label:<32}{before:>10}{results['after'][name]:>10{form}}")


def finish(
    trainer: Trainer,
    results: dict[str, Any],
    files: str,
    use: str = "models import load_model; model, tokenizer = load_model",
) -> None:
    """Writes results.json, and prints what was saved and how it is used. files: what there is besides results.json."""
    output = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        write_json(output / RESULTS, results)
    printer(trainer)(f"\nsaved in {output}: {files}, results.json\nuse it: from xpo_fast.{use}({str(output)!r})")


def printer(trainer: Trainer) -> Callable[[str], None]:
    """Returns print on the main process, and a function that does nothing on the others."""
    return print if trainer.is_world_process_zero() else lambda line: None


def report_header(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the first entries of results.json and report.json: command, options, versions, commit."""
    from .doctor import versions

    given = {k: v for k, v in vars(args).items() if k not in ("run", "api_key")}
    run = getattr(args, "run", None)  # None: the options were not read from a command line
    command = None if run is None else run.__module__.rpartition(".")[2].replace("_", "-")
    return {"command": command, "options": given, "versions": versions(), "commit": _commit()}


def _commit() -> str | None:
    """Returns the commit of this package, "-dirty" at its end if files differ from it; None if it is installed."""
    file = Path(__file__)

    def git(*words: str) -> str:
        given = ["git", "-C", str(file.parent), *words]
        return subprocess.run(given, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an installed package may lie in somebody's own repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def preflight(trainer: Any) -> None:
    """Prints the check of the run that --preflight asks for; raises ValueError for a fault if it is to stop."""
    if trainer.args.preflight == "off" or trainer.preflight() is None:
        return
    printer(trainer)(f"\n{trainer.report.screen()}\n")
    if trainer.args.preflight == "stop":
        trainer.report.raise_for_faults()


def fit(trainer: Any, args: argparse.Namespace, command: str, checkpoint: str | None, results: dict[str, Any]) -> None:
    """Trains and saves; adds the trainer's metrics and record to the results. Raises Stopped after Ctrl-C, and
    NoSignalError for a run that learns nothing and is to stop then, with a checkpoint saved.

    Nothing in the output folder is deleted or written before everything is checked and training begins. Then
    results.json is written for the first time, unless the run is resumed and has one, so that a run that dies leaves
    what was known before it.
    """
    from transformers import TrainerCallback

    from ..trainer import NoSignalError

    output = Path(str(trainer.args.output_dir))

    class Begin(TrainerCallback):
        def on_train_begin(self, config: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            if not state.global_step:
                for path in output.glob("checkpoint-*"):  # with --overwrite, or of no use, see `resuming.checkpoint`
                    shutil.rmtree(path)
            config_file.write(args, output, command, resumed=checkpoint is not None)
            if checkpoint is None or not (output / RESULTS).is_file():
                write_json(output / RESULTS, results)

    results |= trainer.record()
    trainer.add_callback(Begin())
    with _alone(output), stop_after_step(trainer) as stopped:
        try:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except NoSignalError:
            if trainer.state.global_step and trainer.is_world_process_zero():
                write_json(output / RESULTS, results | trainer.record())
            raise
        results |= {"train": metrics, **trainer.record()}
        if stopped:
            if trainer.is_world_process_zero():
                write_json(output / RESULTS, results)
            printer(trainer)(
                f"\nstopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved. "
                "Go on with the same command and --resume"
            )
            raise Stopped(stopped[0], told=True)
        trainer.save_model()
        with saving(output):
            trainer.save_state()
        if trainer.is_world_process_zero():  # an evaluation follows, which may be stopped
            write_json(output / RESULTS, results)


def json_log(args: argparse.Namespace) -> Any:
    """Returns a callback that appends every log to train_log.jsonl in --output-dir.

    The file of an earlier run stays until training begins. A resumed run removes the lines of steps after its
    checkpoint, which it trains again, and does not write what it measures before them.
    """
    from transformers import TrainerCallback

    path = Path(args.output_dir) / "train_log.jsonl"
    waiting: list[str] | None = []  # lines until training begins

    class JsonLog(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal waiting
            if not state.is_world_process_zero:
                return
            kept, waiting = waiting or [], None
            if state.global_step:
                if not path.is_file():
                    return
                kept, last = [], 0
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                    with contextlib.suppress(ValueError):  # was being written when the run died
                        if last <= json.loads(line)["step"] <= state.global_step:
                            kept.append(line)
                            last = json.loads(line)["step"]
            write_atomically(path, "".join(kept).encode())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not (state.is_world_process_zero and logs):
                return
            line = json.dumps(finite({"step": state.global_step, **logs})) + "\n"
            if waiting is not None:
                waiting.append(line)
                return
            with saving(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)

    return JsonLog()


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raises UsageError if another process trains into the folder; the lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    if int(os.environ.get("RANK", "0")):
        yield
        return
    with saving(output):
        output.mkdir(parents=True, exist_ok=True)
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another run is writing into {output}: wait for its end, or name another --output-dir"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(folder)
