"""`xpo-fast train`: train a model on preferences, and say what it has learned on rows held out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import write_json
from ..wording import did_you_mean
from . import checks, config_file, dry_run, options, training
from .options import OBJECTIVE_OPTIONS, UsageError

if TYPE_CHECKING:
    from .. import Objective
    from ..data import Kind
    from ..trainer import XPOConfig, XPOTrainer


# fmt: off
def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="train a model on pairs, lists, single rows or by supervised fine-tuning", formatter_class=options.Help, allow_abbrev=False,
        description="Train a causal LM on preferences, or by supervised fine-tuning (--method sft), and say what it has learned on rows held out. "
        "On several devices: torchrun --nproc-per-node N -m xpo_fast.cli train …",
    )
    parser.set_defaults(run=run)
    options.add_config(parser)
    options.add_lengths(options.add_data(
        parser,
        data=".jsonl, .json, .parquet or .csv file, or a data set for datasets.load_dataset: rows of prompt, chosen, "
        "rejected, or of prompt, completion, label; text or messages; with what the method needs beside: score_chosen and "
        "score_rejected, prob, reward, or prompt, completions, scores for lists; for sft messages, text, or prompt and "
        "completion; also ShareGPT and Alpaca",
    ))

    add = parser.add_argument_group("method").add_argument
    add("--method", default="dpo", metavar="NAME",
        help="a name that `xpo-fast methods` lists, or a sum of them: 'dpo + 0.5*sft'")
    options.add_settings(add, f"beta=0.05, or an option of the objective ({', '.join(OBJECTIVE_OPTIONS)})")
    add("--reference", choices=("auto", "adapter", "cached", "copy", "none"), default="auto",
        help="the reference policy: the model with its adapter off, log-probs cached on disk, or a frozen copy; auto: "
        "none if the method has none, adapter with --lora, else cached")
    add("--ref-cache", metavar="DIR",
        help="where cached reference log-probs are kept (default: $XPO_FAST_CACHE or ~/.cache/xpo_fast)")

    options.add_model(parser)
    options.add_optimisation(
        parser, lr="5e-5 with --lora, 1e-6 with --full; ten times as much for sft", batch="pairs or rows at a time on every device",
        seed="of order, held-out rows, adapter and dropout",
    )
    options.add_head(parser)
    options.add_output(parser, folder="xpo-fast-out", files="train_log.jsonl and results.json")
# fmt: on


def run(args: argparse.Namespace) -> int:
    objective = _objective(args.method, dict(args.set))
    checks.check_training(args, training.training_arguments(args, lr=_learning_rate(args), evaluates=False))
    output, checkpoint = Path(args.output_dir), None if args.dry_run else training.checkpoint(args)
    training.quiet(args)
    # Data first: a mistake in it should not wait for a model to load.
    train_rows, eval_rows = _rows(args, objective)
    if args.dry_run:
        dry_run.preferences(args, objective, _config(args, eval_rows), train_rows, eval_rows)
        return 0
    made_with = training.check_resume(args, checkpoint, train_rows, lr=_learning_rate(args))
    trainer = _trainer(args, train_rows, eval_rows)
    trainer.given |= made_with
    say = training.say(trainer)
    _print_header(trainer, args, say)
    results = training.begun(args)
    if eval_rows is not None:
        results["before"] = trainer.held_out()
        if trainer.objective.needs_reference:  # policy = reference still, and rewards are rounding errors
            results["before"] = {k: v for k, v in results["before"].items() if "_rewards/" not in k}
    results["train"] = training.fit(
        trainer,
        checkpoint,
        lambda: config_file.write(args, output, "train", resumed=checkpoint is not None),
    )
    if eval_rows is not None:
        results["after"] = trainer.held_out()
        _print_held_out(results["before"], results["after"], len(eval_rows), trainer.kind, say)
    if trainer.is_world_process_zero():
        write_json(output / "results.json", results)
    say(
        f"\nsaved in {output}: the {'model' if args.full else 'adapter'}, train_log.jsonl, results.json\n"
        f"use it: from xpo_fast.models import load_model; model, tokenizer = load_model({str(output)!r})"
    )
    return 0


def _objective(method: str, settings: dict[str, Any]) -> Objective:
    """The objective; ValueError for a setting that it does not know or take, before anything is loaded."""
    from .. import Objective

    objective = Objective(method)
    defaults = {k: v for term in objective.terms for k, v in term.method.defaults.items()}
    refused = sorted(set(settings) - set(defaults) - set(OBJECTIVE_OPTIONS))
    if refused:
        raise UsageError(
            f"--set {refused[0]}: {method} has no hyperparameter {', '.join(refused)}; it has "
            f"{', '.join(defaults) or 'none'}; and the objective has {', '.join(OBJECTIVE_OPTIONS)}"
            f"{did_you_mean(refused[0], [*defaults, *OBJECTIVE_OPTIONS])}"
        )
    for name, value in settings.items():
        options.check_like(f"--set {name}", defaults.get(name), value)
    try:
        objective = Objective(method, **settings)
        objective.rehearse()
    except TypeError as error:  # of a value whose default, None, does not tell what it should be
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise UsageError(f"--set {given}: {method} cannot compute with it ({error}); give numbers") from error
    return objective


def _rows(args: argparse.Namespace, objective: Objective) -> tuple[Any, Any]:
    """Rows to train on, and rows held out or None, with every column that the objective asks for."""
    from .. import data

    how = options.reading(args)
    rows, held = data.load(args.data, kind=objective.data_kind, **how), None
    if args.eval_data:
        held = data.load(args.eval_data, kind=objective.data_kind, **how)
    else:
        rows, held = training.hold_out(args, rows)
    for one in (rows, held):
        if one is not None:
            data.check_columns(one, objective.data_kind, objective.rehearse)
    return rows, held


def _learning_rate(args: argparse.Namespace) -> float:
    return (1e-6 if args.full else 5e-5) * (10 if args.method == "sft" else 1)


def _config(args: argparse.Namespace, eval_rows: Any) -> XPOConfig:
    from ..trainer import XPOConfig

    return XPOConfig(
        method=args.method,
        method_args=dict(args.set),
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        reference=args.reference,
        ref_cache_dir=args.ref_cache,
        backend=args.backend,
        tile_mib=args.tile_mib,
        dataset_num_proc=args.num_proc,
        **training.training_arguments(args, lr=_learning_rate(args), evaluates=eval_rows is not None),
    )


def _trainer(args: argparse.Namespace, train_rows: Any, eval_rows: Any) -> XPOTrainer:
    from ..trainer import XPOTrainer

    model, tokenizer = training.load(args)
    return XPOTrainer(
        model,
        _config(args, eval_rows),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=None if args.full else training.lora(args),
        callbacks=[training.json_log(args)],
    )


def _print_held_out(
    before: dict[str, float], after: dict[str, float], rows: int, kind: Kind, say: Callable[[str], None]
) -> None:
    lines = {
        "loss": ("eval_loss", ".4f"),
        "chosen has the higher reward": ("eval_rewards/accuracies", ".1%"),
        "reward margin": ("eval_rewards/margins", ".4f"),
        "chosen is likelier per token": ("eval_likelier_per_token", ".1%"),
        "reward of desirable rows": ("eval_rewards/chosen", ".4f"),
        "reward of undesirable rows": ("eval_rewards/rejected", ".4f"),
    }
    if "label" not in kind.numbers:
        lines = {label: line for label, line in lines.items() if "desirable" not in label}
    title = f"held out: {rows} {kind.unit}"
    say(f"\n{title:<32}{'before':>10}{'after':>10}")
    for label, (name, form) in lines.items():
        if name in after:
            start = format(before[name], form) if name in before else "-"
            say(f"{label:<32}{start:>10}{after[name]:>10{form}}")


def _print_header(trainer: XPOTrainer, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    import torch

    parameters = list(trainer.model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    base = total if args.full else total - trained
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    how = "full fine-tuning" if args.full else f"LoRA of rank {args.lora_rank}"
    if trainer.accelerator.mixed_precision != "no":
        how += f", {trainer.accelerator.mixed_precision} mixed precision"
    what = trainer.kind.unit
    held = f"{len(trainer.eval_dataset)} held out" if trainer.eval_dataset is not None else "none held out"
    step = args.batch_size * args.grad_accum * trainer.accelerator.num_processes
    for name, text in {
        "xpo-fast": f"{__version__}, torch {torch.__version__}, {trainer.args.device}",
        "model": f"{args.model}: {base / 1e6:.1f}M weights in {dtype}; {how}, {trained / 1e6:.2f}M trained",
        "data": f"{options.came_of(args, trainer.train_dataset)}: {len(trainer.train_dataset)} {what} to train on, {held}",
        "method": f"{trainer.objective}, lr {trainer.args.learning_rate:g}, {step} {what} a step",
        "reference": f"{trainer.reference}: {trainer.reference_reason}",
        "head": str(trainer.plan()),
    }.items():
        say(f"{name:<10} {text}")
