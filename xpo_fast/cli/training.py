"""The steps of a training run that commands share: its checkpoint, rows held out, model, arguments, log, and its end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finite, saving, write_atomically
from ..resume import (
    OF_THE_OPTIMIZER,
    check_made_with,
    is_checkpoint,
    last_checkpoint,
    model_identity,
    rows_identity,
)
from .checks import read_template
from .options import HELD_OUT_AT_MOST, SMOLLM2, UsageError, count

if TYPE_CHECKING:
    import datasets
    from transformers import Trainer


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or the SIGTERM that a cluster sends before it kills: the exit status, and what was said of it already."""

    def __init__(self, number: int, *, told: bool = False) -> None:
        super().__init__(number)
        self.status, self.told = 128 + number, told


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt, and so is SIGTERM, with an exit status of its own."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    with _handling(stop, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _handling(handler: Any, *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in previous.items():
            signal.signal(number, own)


# What a resumed run must have alike, and what it is compared as; the rest may change.
_ALIKE = (
    "method", "reference", "max_grad_norm", "seed", "dtype", "load_in_4bit", "load_in_8bit", "max_length", "max_prompt_length",
    "eval_split", "objectives", "objective_weights", "value_head_lr",
)  # fmt: skip


def made_with(args: argparse.Namespace, rows: Any, *, lr: float) -> dict[str, Any]:
    """What `resume` compares, by the names of the options. rows: to train on; lr: where --lr is not given."""
    from transformers import TrainingArguments

    asked = training_arguments(args, lr=lr, evaluates=False)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    trained = "every weight" if args.full else "the value head" if getattr(args, "head_only", False) else "an adapter"
    found = {f"--{name.replace('_', '-')}": getattr(args, name) for name in _ALIKE if name in args}
    if trained == "an adapter":
        found |= {f"--{name.replace('_', '-')}": vars(lora(args))[field] for name, field in _LORA.items()}
    return {
        "the command": args.run.__module__.rpartition(".")[2],
        "what is trained": trained,
        **found,
        **{name: asked.get(name, defaults[name]) for name in OF_THE_OPTIMIZER},
        "--set": dict(args.set),
        "--model": model_identity(args.model),
        "--data": {"name": ", ".join(args.data), "hash": rows_identity(rows)},
    }


def check_resume(args: argparse.Namespace, checkpoint: str | None, rows: Any, *, lr: float) -> dict[str, Any]:
    """Refuse a checkpoint of another run, before the model is loaded; returns what this one is made with."""
    made = made_with(args, rows, lr=lr)
    if checkpoint is not None:
        check_made_with(checkpoint, made)
    return made


def kept(args: argparse.Namespace, began: float) -> str:
    """What a run that is stopped leaves, in a phrase; began: when, in seconds as files have them."""
    if getattr(args, "output_dir", None) is None or "resume" not in args:
        return "nothing was written"
    output = Path(args.output_dir)
    if (output / "run.json").is_file():  # of a recipe
        return f"what is finished in {output} is kept, and the same command with --resume goes on from it"
    said = []
    if (state := output / "trainer_state.json").is_file() and state.stat().st_mtime >= began:
        said.append(f"the trained model is in {output}")
    if (last := last_checkpoint(output)) is not None:
        said.append(f"the last whole checkpoint is {last}, and the same command with --resume goes on from it")
    return "; ".join(said) or f"no checkpoint had been written into {output}"


def checkpoint(args: argparse.Namespace, last: Callable[[Path], str | None] | None = None) -> str | None:
    """The checkpoint to go on from; UsageError where checkpoints of another run would be mixed with this one's.

    Nothing is changed: what --overwrite deletes goes when training begins, see `fit`.

    last: finds the last whole checkpoint in a folder, where that takes more than transformers' own files.
    """
    output, resume = Path(args.output_dir), args.resume
    steps = {int(m[1]): p for p in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    if resume == "last":
        found = (last or last_checkpoint)(output)
        if found is None:
            raise UsageError(f"--resume: no checkpoint in {output}; start without --resume, or name the checkpoint")
        return found
    if resume is not None:
        if not is_checkpoint(resume):
            raise UsageError(f"--resume {resume}: no checkpoint there, expected a folder with trainer_state.json")
        return resume
    if steps and not args.overwrite:
        raise UsageError(
            f"{output} has checkpoints of an earlier run: --resume goes on with it, --overwrite starts anew, "
            "--output-dir names another place"
        )
    return None


def hold_out(args: argparse.Namespace, rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on, and the rows of --eval-split or None: those of one prompt together."""
    import numpy as np

    wanted = min(len(rows) // 10, HELD_OUT_AT_MOST) if args.eval_split is None else count(args.eval_split, len(rows))
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
    import datasets
    from transformers import logging as transformers_logging

    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of packages about one another


def load(args: argparse.Namespace, **further: Any) -> tuple[Any, Any]:
    """The model and the tokenizer; the weights in float32 where all are trained. further: for `load_model`."""
    from ..models import load_model

    if args.attn:
        further["attn_implementation"] = args.attn
    if args.trust_remote_code:
        further["trust_remote_code"] = True
    bits = (args.load_in_4bit or args.load_in_8bit) and "device_map" not in further
    if bits:
        further |= quantised(args)
    dtype = "float32" if args.full else args.dtype
    model, tokenizer = load_model(args.model, dtype=dtype, device=device_of(args), **further)
    if bits:
        _evaluate_as_trained(model)
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    return model, tokenizer


def device_of(args: argparse.Namespace) -> str | None:
    """Return "cpu" for --cpu; None leaves the choice of a device to where it is needed."""
    return "cpu" if args.cpu else None


def quantised(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for --load-in-4bit and --load-in-8bit."""
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    from .. import precision
    from ..models import smollm2_path

    path = str(smollm2_path()) if args.model.lower() == SMOLLM2 else args.model
    saved: Any = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code).get_text_config().dtype
    compute = precision.resolve(
        args.dtype, saved or torch.float32, torch.device(device_of(args) or precision.default_device())
    )
    found: dict[str, Any] = {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
        if args.load_in_4bit
        else BitsAndBytesConfig(load_in_8bit=True)
    }
    return found | ({"device_map": "cpu"} if args.cpu else {})  # else that of the process


def _evaluate_as_trained(model: Any) -> None:
    """Have bitsandbytes compute on the CPU in evaluation as it does in training.

    It would repack 4-bit weights at the first evaluation, after which no gradient passes through them, and round activations
    to 8 bits in evaluation alone: a reference policy, which is evaluated, would be another model than the policy.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt) and module.weight.device.type == "cpu":
            module.train()
            module.train = lambda mode=True, module=module: module


# The options of an adapter, and the fields of peft's LoraConfig.
_LORA = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_targets": "target_modules",
}


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
        # A share of the steps below 1 is what transformers takes warmup_steps for, too.
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
        "disable_tqdm": not sys.stderr.isatty(),  # a progress bar with the time left, for who looks on
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


def json_log(args: argparse.Namespace) -> Any:
    """A callback that appends every log to train_log.jsonl, one JSON object a line.

    The file of an earlier run stays until training begins. A resumed run takes out the lines of steps behind its checkpoint,
    which it does again, and leaves out what it measures before them.
    """
    from transformers import TrainerCallback

    path = Path(args.output_dir) / "train_log.jsonl"
    waiting: list[str] | None = []  # lines until training begins

    class JsonLog(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal waiting
            if not state.is_world_process_zero:
                return
            begun, waiting = waiting or [], None
            if not state.global_step:
                with saving(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, "".join(begun).encode())
                return
            if not path.is_file():
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


def say(trainer: Trainer) -> Callable[[str], None]:
    """print, on the main process alone."""
    return print if trainer.is_world_process_zero() else lambda line: None


def begun(args: argparse.Namespace) -> dict[str, Any]:
    """What results.json and report.json begin with: the options and the versions."""
    from .doctor import versions

    return {
        "options": {k: v for k, v in vars(args).items() if k not in ("run", "api_key")},
        "versions": versions(),
    }


def fit(trainer: Trainer, checkpoint: str | None, begin: Callable[[], Any]) -> dict[str, float]:
    """Train and save; returns what the trainer measured. Raises Stopped where Ctrl-C has ended it, with a checkpoint.

    begin: called on the main process once all is checked, before the first step; then what --overwrite deletes has gone.
    """
    from transformers import TrainerCallback

    output = Path(str(trainer.args.output_dir))

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            if not state.global_step:
                for path in output.glob("checkpoint-*"):  # only with --overwrite, see `checkpoint`
                    shutil.rmtree(path)
            begin()

    trainer.add_callback(Begin())
    with _alone(output), stop_after_step(trainer) as stopped:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if stopped:
            say(trainer)(
                f"\nstopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved. Go on with "
                "the same command and --resume"
            )
            raise Stopped(stopped[0], told=True)
        trainer.save_model()
        with saving(output):
            trainer.save_state()
    return metrics


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """UsageError where another process trains into the folder; the lock is the system's, and goes with the process."""
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


@contextlib.contextmanager
def stop_after_step(trainer: Trainer) -> Iterator[Sequence[int]]:
    """Ctrl-C and SIGTERM end training after the step under way, with a checkpoint; a second one ends it at once.

    So does the first before the first step and after the last one. Yields a list with the signal's number once that has
    happened. Several processes of one run end at once, because they would not stop after the same step.
    """
    from transformers import TrainerCallback

    stopped: list[int] = []
    stepping = False

    class Stop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal stepping
            stepping = True

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal stepping
            stepping = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stopped:
                control.should_save = control.should_training_stop = True

    def interrupt(number: int, frame: Any) -> None:
        if stopped or not stepping:
            raise Stopped(number)
        stopped.append(number)
        print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

    if trainer.args.world_size > 1:
        yield stopped
        return
    trainer.add_callback(Stop())
    with _handling(interrupt, signal.SIGINT, signal.SIGTERM):
        yield stopped
