"""`xpo-fast train`: trains a model on preferences, and reports what it has learned on rows held out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import __version__
from . import checks, dry_run, fit_question, loading, options, resuming, settings, training
from .options import OBJECTIVE_OPTIONS
from .parser import UsageError

if TYPE_CHECKING:
    from .. import Objective
    from ..trainer import XPOConfig, XPOTrainer

# Metrics of the rows held out that are printed: label, name, format.
_SHOWN = {
    "loss": ("eval_loss", ".4f"),
    "chosen has the higher reward": ("eval_rewards/accuracies", ".1%"),
    "reward margin": ("eval_rewards/margins", ".4f"),
    "chosen is likelier per token": ("eval_likelier_per_token", ".1%"),
    "reward of desirable rows": ("eval_rewards/chosen", ".4f"),
    "reward of undesirable rows": ("eval_rewards/rejected", ".4f"),
}


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast train`."""
    parser = commands.add_parser(
        "train",
        help="train a model on pairs, lists, single rows or by supervised fine-tuning",
        description="Train a causal LM on preferences, or by supervised fine-tuning (--method sft), and report what "
        "it has learned on rows held out. On several devices: torchrun --nproc-per-node N -m xpo_fast.cli train …",
    )
    parser.set_defaults(run=run)
    options.add_config(parser)
    add_options(parser)


def add_options(parser: Any) -> None:
    """Adds the options of preference training but --config, which `xpo-fast check` takes, too."""
    group = options.add_data(
        parser,
        data=".jsonl, .json, .parquet or .csv file, or a data set for datasets.load_dataset: rows of prompt, chosen, "
        "rejected, or of prompt, completion, label; text or messages; with the columns that the method needs: "
        "score_chosen and score_rejected, prob, reward, or prompt, completions, scores for lists; for sft messages, "
        "text, or prompt and completion; also ShareGPT and Alpaca",
    )
    options.add_lengths(group)
    options.add_score(group)

    group = parser.add_argument_group("method")
    add = options.adder(group)
    add("--method NAME", "a name that `xpo-fast methods` lists, or a sum of them: 'dpo + 0.5*sft'", "dpo")
    options.add_settings(group, f"beta=0.05, or an option of the objective ({', '.join(OBJECTIVE_OPTIONS)})")
    add(
        "--reference",
        "the reference policy: the model with its adapter off, log-probs cached on disk, or a frozen copy; auto: "
        "none if the method has none, adapter with --lora, else cached",
        "auto",
        choices=("auto", "adapter", "cached", "copy", "none"),
    )
    add(
        "--context FILE|TEXT",
        "what the reference of context_distillation reads before every prompt: the system turn, or text in front",
    )
    add("--ref-cache DIR", "folder of cached reference log-probs (default: $XPO_FAST_CACHE or ~/.cache/xpo_fast)")

    options.add_model(parser)
    options.add_optimisation(
        parser,
        lr="5e-5 with --lora, 1e-6 with --full; ten times as much for sft and context_distillation",
        batch="pairs or rows per batch and device",
        seed="seed of order, held-out rows, adapter and dropout",
    )
    options.add_head(parser)
    options.add_output(parser, folder="xpo-fast-out", files="train_log.jsonl and results.json")


def run(args: argparse.Namespace) -> int:
    """Trains, or with --dry-run only reports."""
    objective = checked_objective(args.method, dict(args.set))
    checks.check_training(args, training.training_arguments(args, lr=learning_rate(args), evaluates=False))
    _check_context(objective, loading.read_context(args.context))
    checkpoint = None if args.dry_run else resuming.checkpoint(args)
    if objective.reads_topk and (args.dry_run or args.fit):
        name = "--dry-run" if args.dry_run else "--fit"
        raise UsageError(f"{name}: of rows of text, topk_kl has token ids: leave it out")
    training.quiet(args)
    # Data first: a mistake in it is reported before a model is loaded.
    train_rows, eval_rows = read_rows(args, objective)
    if args.dry_run:
        dry_run.preferences(args, objective, config_of(args, eval_rows), train_rows, eval_rows)
        return 0
    if args.fit:
        encoding = config_of(args, eval_rows).encoding()
        fit_question.refuse(args, "train", fit_question.measured(args, train_rows, objective.data_kind, encoding))
    made_with = resuming.made_with(args, checkpoint, train_rows, dict(args.set), lr=learning_rate(args))
    trainer = trainer_of(args, train_rows, eval_rows, callbacks=[training.json_log(args)])
    trainer.given |= made_with
    say = training.printer(trainer)
    print_header(trainer, args, say)
    training.preflight(trainer)
    results = training.report_header(args)
    if eval_rows is not None:
        results["before"] = trainer.held_out()
        if trainer.objective.needs_reference:  # policy = reference, so rewards are rounding errors
            results["before"] = {k: v for k, v in results["before"].items() if "_rewards/" not in k}
    training.fit(trainer, args, "train", checkpoint, results)
    if eval_rows is not None:
        results["after"] = trainer.held_out()
        labelled = "label" in trainer.kind.numbers
        shown = {label: line for label, line in _SHOWN.items() if labelled or "desirable" not in label}
        training.print_held_out(say, f"held out: {len(eval_rows)} {trainer.kind.unit}", results, shown)
    training.finish(trainer, results, f"the {'model' if args.full else 'adapter'}, train_log.jsonl")
    return 0


def _check_context(objective: Objective, context: str | None) -> None:
    """Raises ValueError for a context that the objective does not read, and for one that lacks what it reads."""
    from ..trainer.context import check_context

    check_context(objective, context)


def checked_objective(method: str, given: dict[str, Any], *, taught: bool = False) -> Objective:
    """Returns the objective; raises ValueError for an unknown name or wrong value of --set.

    taught: whether there is a teacher; the error for a method that needs one, or has no use for it, says so.
    """
    from .. import Objective
    from ..trainer.context import check_teacher

    objective = Objective(method)
    check_teacher(objective, taught=taught)
    defaults = {k: v for term in objective.terms for k, v in term.method.defaults.items()}
    settings.check_names(method, given, defaults, "the objective", OBJECTIVE_OPTIONS)
    for name, value in given.items():
        settings.check_like(f"--set {name}", defaults.get(name), value)
    try:
        objective = Objective(method, **given)
        objective.rehearse()
    except TypeError as error:  # of a value whose default is None, which does not tell its type
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(f"--set {shown}: {method} cannot compute with it ({error}); give numbers") from error
    return objective


def read_rows(args: argparse.Namespace, objective: Objective) -> tuple[Any, Any]:
    """Returns rows to train on, and rows held out or None, with every column that the objective needs."""
    from .. import data

    how = options.reading(args)

    def read(source: list[str]) -> Any:
        return _topk_rows(source) if objective.reads_topk else data.load(source, kind=objective.data_kind, **how)

    rows, held = read(args.data), None
    if args.eval_data:
        held = read(args.eval_data)
    else:
        rows, held = loading.hold_out(args, rows)
    for one in (rows, held):
        if one is not None:
            data.check_columns(one, objective.data_kind, objective.rehearse)
    return rows, held


def _topk_rows(source: list[str]) -> Any:
    """Returns the token ids and a teacher's likeliest tokens that `distill --cache-teacher` has written."""
    from ..trainer.topk import read_topk

    folders = [source] if isinstance(source, str) else source
    if len(folders) != 1:
        raise UsageError(f"topk_kl reads one folder of distill --cache-teacher DIR, got {len(folders)}")
    return read_topk(folders[0])


def learning_rate(args: argparse.Namespace) -> float:
    """Returns the default of --lr."""
    return (1e-6 if args.full else 5e-5) * (10 if args.method in ("sft", "context_distillation") else 1)


def config_of(args: argparse.Namespace, eval_rows: Any) -> XPOConfig:
    """Returns the arguments of the trainer."""
    from ..trainer import XPOConfig

    return XPOConfig(
        reference=args.reference,
        ref_cache_dir=args.ref_cache,
        context=loading.read_context(args.context),
        **arguments_of(args, eval_rows, lr=learning_rate(args)),
    )


def arguments_of(args: argparse.Namespace, eval_rows: Any, *, lr: float) -> dict[str, Any]:
    """Returns the arguments of `XPOConfig` but those about the reference. lr: the default of --lr."""
    return dict(
        method=args.method,
        method_args=dict(args.set),
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        score=args.score,
        backend=args.backend,
        tile_mib=args.tile_mib,
        tokens_per_batch=args.tokens_per_batch,
        dataset_num_proc=args.num_proc,
        preflight=args.preflight,
        on_no_signal=args.on_no_signal,
        layout=args.layout,
        chat_template_kwargs=options.kwargs_of(args),
        **options.levers(args),
        **training.training_arguments(args, lr=lr, evaluates=eval_rows is not None),
    )


def trainer_of(args: argparse.Namespace, rows: Any, held_out: Any, **further: Any) -> XPOTrainer:
    """Loads the model and returns its trainer; further: arguments of `XPOTrainer`."""
    model, tokenizer = loading.load(args)

    from ..trainer import XPOTrainer

    return XPOTrainer(
        model,
        config_of(args, held_out),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if args.full else loading.lora(args),
        **further,
    )


def print_header(trainer: XPOTrainer, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Prints what a run trains, on what, and how."""
    import torch

    from ..precision import name_of

    base, trained = training.weights(trainer.model, full=args.full)
    dtype = name_of(next(trainer.model.parameters()).dtype)
    how = "full fine-tuning" if args.full else f"LoRA of rank {args.lora_rank}"
    if trainer.accelerator.mixed_precision != "no":
        how += f", {trainer.accelerator.mixed_precision} mixed precision"
    what = trainer.kind.unit
    held = f"{len(trainer.eval_dataset)} held out" if trainer.eval_dataset is not None else "none held out"
    step = args.batch_size * args.grad_accum * trainer.replicas
    for name, text in {
        "xpo-fast": f"{__version__}, torch {torch.__version__}, {trainer.args.device}",
        "model": f"{args.model}: {base} weights in {dtype}; {how}, {trained} trained",
        "data": f"{options.sources(args, trainer.train_dataset)}: {len(trainer.train_dataset)} {what} to train on, "
        f"{held}",
        "method": f"{trainer.objective}, lr {trainer.args.learning_rate:g}, {step} {what} a step",
        "reference": f"{trainer.reference}: {trainer.reference_reason}",
        "head": str(trainer.plan()),
    }.items():
        say(f"{name:<10} {text}")
