"""`xpo-fast distill`: trains a model by what other models say of each token, on data or on its own completions."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, dry_run, loading, options, resuming, train, training
from .parser import UsageError, option

if TYPE_CHECKING:
    from ..trainer import DistillationConfig

# Metrics of the rows held out that are printed: label, name, format.
_SHOWN = {
    "loss": ("eval_loss", ".4f"),
    "KL(teacher ‖ student), completion": ("eval_kl", ".4f"),
    "KL(student ‖ teacher), completion": ("eval_reverse_kl", ".4f"),
    "JSD of a completion": ("eval_jsd", ".4f"),
    "log-prob of a completion": ("eval_logps/chosen", ".2f"),
    "the same under the teacher": ("eval_logps/teacher", ".2f"),
}
_READ_BY_CACHE = {
    "config", "data", "split", "columns", "data_config", "seed", "max_length", "max_prompt_length", "num_proc", "score",
    "chat_template_kwargs", "teacher", "teacher_dtype", "trust_remote_code", "cache_teacher", "cache_tokens", "model",
    "batch_size", "cpu",
}  # fmt: skip


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast distill`."""
    parser = commands.add_parser(
        "distill",
        help="train a model by what a teacher, another model, says of each token",
        description="Distillation: train a student towards the distribution of one or more teachers over the next "
        "token, on the completions of a data set or (--on-policy) on the student's own, and report the divergence on "
        "rows held out. On several devices: torchrun --nproc-per-node N -m xpo_fast.cli distill …",
    )
    parser.set_defaults(run=run, parser=parser)
    options.add_config(parser)
    group = options.add_data(
        parser,
        data=".jsonl, .json, .parquet or .csv file, or a data set for datasets.load_dataset: rows of prompt and "
        "completion, messages, text, or pairs, whose chosen completions are taken",
    )
    options.add_lengths(group)
    options.add_score(group)

    group = parser.add_argument_group("teachers")
    add = options.adder(group)
    about = "a folder, or a name on the Hugging Face hub, of a model with the student's tokenizer; several are weighted"
    how = {"action": "extend", "nargs": "+", "required": True}
    add("--teacher MODEL[:WEIGHT]", f"{about} by WEIGHT, 1 if not given", **how)
    add("--teacher-dtype", "dtype of the teachers' weights, which are frozen", "auto", choices=options.DTYPES)

    about = "train nothing: write the data's token ids with the teacher's likeliest tokens into the new folder DIR"
    add("--cache-teacher DIR", f"{about}, for xpo-fast train --method topk_kl --data DIR, which needs no teacher")
    add("--cache-tokens K", "likeliest tokens that --cache-teacher keeps of each position (default: 16)", type=int)

    group = parser.add_argument_group("method")
    add = options.adder(group)
    about = "gkd (generalised JSD, --set beta=0.5), forward_kl, reverse_kl, sampled_kl (with --on-policy), or a sum"
    add("--method NAME", f"{about}: 'gkd + 0.5*sft'", "gkd")
    options.add_settings(group, f"beta=0.1, or an option of the objective ({', '.join(options.OBJECTIVE_OPTIONS)})")

    group = parser.add_argument_group("the student's own completions")
    add = options.adder(group)
    about = "share of the steps, drawn by --seed, on completions that the student samples for the prompts of --data"
    add("--on-policy SHARE", f"{about}; 1 if no SHARE is given (default: 0)", type=float, nargs="?", const=1.0)
    add("--max-new-tokens TOKENS", "longest sampled completion (default: 256)", type=int)
    add("--temperature T", "sampling temperature (default: 1)", type=float)
    add("--top-p P", "nucleus sampling: smallest set of tokens with probability P (default: 1)", type=float)
    add("--top-k K", "sample from the K most likely tokens (default: all)", type=int)
    add("--stop TEXT", "a text that ends a completion; may be repeated", [])

    options.add_model(parser)
    options.add_optimisation(
        parser,
        lr="5e-4 with --lora, 1e-5 with --full",
        batch="rows per batch and device",
        seed="seed of order, held-out rows, adapter, dropout and samples",
    )
    options.add_head(parser)
    options.add_output(parser, folder="xpo-fast-distill", files="train_log.jsonl and results.json")


def run(args: argparse.Namespace) -> int:
    """Trains, or with --dry-run only reports."""
    objective = train.checked_objective(args.method, dict(args.set), taught=True)
    lr = _learning_rate(args)
    checks.check_training(args, training.training_arguments(args, lr=lr, evaluates=False))
    teachers = [weighted(text) for text in args.teacher]
    if args.fit:
        raise UsageError("--fit: the memory of a teacher is not predicted: leave --fit out")
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "stop")}
    sampling = {name: x for name, x in sampling.items() if x not in (None, [])}
    if sampling and not args.on_policy:
        raise UsageError(f"--{next(iter(sampling)).replace('_', '-')} is for --on-policy, which samples: leave it out")
    if args.cache_teacher:
        return _cache(args, objective, teachers)
    if args.cache_tokens is not None:
        raise UsageError("--cache-tokens is for --cache-teacher: leave it out")
    checkpoint = None if args.dry_run else resuming.checkpoint(args)
    training.quiet(args)
    train_rows, eval_rows = train.read_rows(args, objective)
    config = _config(args, eval_rows, sampling)
    if args.dry_run:
        dry_run.preferences(args, objective, config, train_rows, eval_rows, teachers=teachers)
        return 0
    made_with = resuming.made_with(args, checkpoint, train_rows, dict(args.set), lr=lr)
    models, tokenizers = _load_teachers(args, teachers)
    model, tokenizer = loading.load(args)

    from ..trainer import DistillationTrainer

    trainer = DistillationTrainer(
        model,
        models,
        config,
        teacher_processing_class=tokenizers,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=None if args.full else loading.lora(args),
        callbacks=[training.json_log(args)],
    )
    trainer.given |= made_with
    say = training.printer(trainer)
    train.print_header(trainer, args, say)
    if args.on_policy:
        say(f"{'on-policy':<10} {args.on_policy:g} of the steps, {config.sampling()}")
    training.preflight(trainer)
    results = training.report_header(args)
    if eval_rows is not None:
        results["before"] = trainer.held_out()
    training.fit(trainer, args, "distill", checkpoint, results)
    if eval_rows is not None:
        results["after"] = trainer.held_out()
        training.print_held_out(say, f"held out: {len(eval_rows)} {trainer.kind.unit}", results, _SHOWN)
    training.finish(trainer, results, f"the {'model' if args.full else 'adapter'}, train_log.jsonl")
    return 0


def _cache(args: argparse.Namespace, objective: Any, teachers: list[tuple[str, float]]) -> int:
    """Writes the rows of --data as token ids with the teacher's likeliest tokens."""
    given = (x for x in args.parser.documented() if getattr(args, x.dest, x.default) != x.default)
    if unread := [option(x) for x in given if x.dest not in _READ_BY_CACHE]:
        raise UsageError(f"--cache-teacher trains nothing and does not read {', '.join(unread)}: leave it out")
    if len(teachers) > 1:
        raise UsageError(f"--cache-teacher keeps the tokens of one teacher, got {len(teachers)}: make a folder of each")
    folder = Path(args.cache_teacher)
    if folder.exists():
        raise UsageError(f"--cache-teacher {folder} exists: name a new folder")
    from .. import data
    from ..files import appearing
    from ..models import load_model
    from ..trainer import DistillationConfig, teacher_topk
    from ..trainer.teachers import check_heads, check_tokenizers

    training.quiet(args)
    rows = data.load(args.data, kind=objective.data_kind, **options.reading(args))
    config = DistillationConfig(**train.arguments_of(args, None, lr=_learning_rate(args)))
    ((teacher, _),), (theirs,) = _load_teachers(args, teachers)
    student, tokenizer = load_model(args.model, device_map="meta")
    check_tokenizers(teacher, theirs, student, tokenizer)
    vocab, _ = check_heads(teacher, student)
    encoded = data.encode(rows, tokenizer, kind=objective.data_kind, **config.encoding())
    k = 16 if args.cache_tokens is None else args.cache_tokens
    found = teacher_topk(teacher, encoded, k, vocab=vocab, batch_size=args.batch_size, progress=True)
    with appearing(folder) as part:
        found.save_to_disk(part)
    print(f"{len(rows):,} rows with the teacher's {k} likeliest tokens in {folder}, read by")
    print(f"xpo-fast train --method topk_kl --model {args.model} --data {folder}")
    return 0


def weighted(text: str) -> tuple[str, float]:
    """Parses MODEL[:WEIGHT]; a colon in the name of a folder, or before a slash, belongs to the name."""
    name, sign, weight = text.rpartition(":")
    if not sign or "/" in weight or "\\" in weight or Path(text).exists():
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not (name and 0 < number < math.inf):
        raise UsageError(
            f"--teacher {text}: expected MODEL:WEIGHT with a weight > 0, such as {name or 'MODEL'}:2, got {weight!r} "
            "behind the colon; there is no folder of that name"
        )
    return name, number


def _learning_rate(args: argparse.Namespace) -> float:
    return 1e-5 if args.full else 5e-4


def _config(args: argparse.Namespace, eval_rows: Any, sampling: dict[str, Any]) -> DistillationConfig:
    from ..trainer import DistillationConfig

    how = train.arguments_of(args, eval_rows, lr=_learning_rate(args))
    config = DistillationConfig(**how, on_policy=args.on_policy or 0.0, **sampling)
    return config


def _load_teachers(args: argparse.Namespace, teachers: list[tuple[str, float]]) -> tuple[list[Any], list[Any]]:
    """Returns the teachers with their weights, and their tokenizers."""
    from ..models import load_model

    found, tokenizers = [], []
    for name, weight in teachers:
        further = {"trust_remote_code": True} if args.trust_remote_code else {}
        model, tokenizer = load_model(name, dtype=args.teacher_dtype, device=loading.device_of(args), **further)
        found.append((model, weight))
        tokenizers.append(tokenizer)
    return found, tokenizers
