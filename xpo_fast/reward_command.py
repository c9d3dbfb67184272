"""`xpo-fast reward`: train a reward model. `xpo-fast eval-reward`: measure reward models and policies on pairs."""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .doctor import versions
from .models import SMOLLM2

if TYPE_CHECKING:
    from .reward_report import PairScores

_METHODS = (
    "bradley_terry",
    "k_wise",
    "regression",
    "gated",
    "preference_model",
    "discriminator",
    "grm",
    "haf",
    "odin",
)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


# fmt: off
def add_parser(commands: Any) -> None:
    from . import cli

    reward = commands.add_parser(
        "reward", help="train a reward model", formatter_class=cli._Help, allow_abbrev=False,
        description="Train a causal LM with a value head to score completions, and measure it on rows held out.",
    )
    reward.set_defaults(run=run_reward, tile_mib=None)

    group = reward.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="FILE", required=True,
        help="rows of prompt, chosen, rejected (with margin or prob beside, if there is one); for k_wise of prompt, "
        "completions, scores; for discriminator of prompt, completion, label; for regression of prompt, completion and the "
        "numbers named by --objectives")
    add("--split", default="train", help="split of a data set that has several")
    held = group.add_mutually_exclusive_group().add_argument
    held("--eval-data", metavar="FILE", help="rows to evaluate on, in the form of --data")
    held("--eval-split", metavar="SHARE", type=cli._share,
         help="rows of --data to hold out: a count, or a share below 1; rows of one prompt together; 0 for none "
         "(default: a tenth, at most 200)")
    add("--max-length", metavar="TOKENS", type=int, default=1024, help="longest prompt and completion; longer rows are cut")
    add("--max-prompt-length", metavar="TOKENS", type=int, help="longest prompt; longer ones lose their beginning")
    add("--chat-template", metavar="FILE", help="Jinja template to use in place of the tokenizer's own")
    add("--num-proc", metavar="N", type=int, help="processes that tokenize (default: one)")

    add = reward.add_argument_group("method").add_argument
    add("--method", choices=_METHODS, default="bradley_terry", help="what trains it")
    add("--set", metavar="NAME=VALUE", action="append", default=[], type=cli._setting,
        help="a hyperparameter of the method, for example --set center=0.01; may be repeated")
    add("--objectives", metavar="NAMES", type=_names,
        help="comma-separated: the rewards of regression, which are columns of the data, or of gated (default: reward)")
    add("--objective-weights", metavar="NUMBERS", type=_numbers,
        help="comma-separated: of the objectives in the reward of regression (default: their mean)")
    add("--reference", choices=("auto", "adapter", "copy", "none"), default="auto",
        help="of haf and grm's dpo: the model with its adapter off, or a frozen copy; none: grm without one")
    _add_length_options(add)

    group = reward.add_argument_group("model")
    add = group.add_argument
    add("--model", default=SMOLLM2,
        help=f"{SMOLLM2}, a folder, or a name on the Hugging Face hub; a reward model's folder to go on from: gated on one "
        "of regression learns the gate alone")
    add("--dtype", choices=_DTYPES, default="auto",
        help="of the frozen weights with --lora; with --full, weights stay float32 and the two halves mean mixed precision")
    add("--attn", metavar="NAME", help="attention implementation (default: transformers decides)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model of the hub")
    how = group.add_mutually_exclusive_group().add_argument
    how("--lora", action="store_true", help="train a LoRA adapter and the value head (default)")
    how("--full", action="store_true", help="train every weight")
    how("--head-only", action="store_true", help="train the value head alone")
    add("--lora-rank", metavar="R", type=int, default=16, help="rank of the adapter")
    add("--lora-alpha", metavar="A", type=float, help="scale of the adapter (default: twice the rank)")
    add("--lora-dropout", metavar="P", type=float, default=0.0, help="dropout of the adapter")
    add("--lora-targets", metavar="NAMES", default="all-linear", help="comma-separated modules that get an adapter")

    add = reward.add_argument_group("optimisation").add_argument
    add("--lr", metavar="RATE", type=float,
        help="learning rate (default: 1e-4 with --lora, 1e-5 with --full, 1e-3 with --head-only)")
    add("--epochs", metavar="N", type=float, default=1.0, help="passes over the data")
    add("--max-steps", metavar="N", type=int, default=-1, help="stop after so many steps; -1: --epochs")
    add("--batch-size", metavar="N", type=int, default=8, help="pairs, lists or rows at a time on every device")
    add("--eval-batch-size", metavar="N", type=int, help="the same without gradient (default: --batch-size)")
    add("--grad-accum", metavar="N", type=int, default=1, help="batches that make one step")
    add("--scheduler", metavar="NAME", default="linear", help="linear, cosine, constant, … as in transformers")
    add("--warmup-ratio", metavar="SHARE", type=float, default=0.1, help="share of the steps that warm up")
    add("--weight-decay", metavar="X", type=float, default=0.0, help="AdamW's weight decay")
    add("--max-grad-norm", metavar="X", type=float, default=1.0, help="gradients are clipped to this norm; 0: they are not")
    add("--seed", metavar="N", type=int, default=42, help="of order, held-out rows, adapter, value head and dropout")
    add("--group-by-length", action="store_true", help="batches of rows of like length: less padding")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--backend", default="auto", help="what computes the token log-probs of grm and haf")

    add = reward.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", default="xpo-fast-reward",
        help="for the model, checkpoints, train_log.jsonl, results.json and report.png")
    add("--resume", nargs="?", const="last", metavar="CHECKPOINT",
        help="go on from the last checkpoint in --output-dir, or from the one named")
    add("--overwrite", action="store_true", help="start anew although --output-dir has checkpoints; they are deleted")
    add("--logging-steps", metavar="N", type=int, default=10, help="log every so many steps")
    add("--eval-steps", metavar="N", type=int, help="evaluate every so many steps (default: before and after)")
    add("--save-steps", metavar="N", type=int, default=500, help="write a checkpoint every so many steps")
    add("--save-total-limit", metavar="N", type=int, default=2, help="checkpoints to keep")
    add("--report-to", metavar="NAME", default="none", help="tensorboard, wandb, … as in transformers")
    add("--cpu", action="store_true", help="train on the CPU although there is an accelerator")
    add("--debug", action="store_true", help="show the traceback of an error")
    _add_eval(commands, cli)


def _add_eval(commands: Any, cli: Any) -> None:
    evaluate = commands.add_parser(
        "eval-reward", help="measure reward models and policies on pairs", formatter_class=cli._Help, allow_abbrev=False,
        description="Accuracy, calibration, dependence on length and distributions of scores, as figures and plots, of every "
        "--model (explicit rewards) and every --policy (implicit rewards) on the same pairs.",
    )
    evaluate.set_defaults(run=run_eval)
    add = evaluate.add_argument
    add("--data", metavar="FILE", required=True,
        help="rows of prompt, chosen, rejected; or of prompt, completions, scores, whose pairs are taken")
    add("--split", default="train", help="split of a data set that has several")
    add("--max-pairs", metavar="N", type=int, help="measure on so many pairs, drawn by --seed (default: all)")
    add("--seed", metavar="N", type=int, default=42, help="of the pairs drawn")
    add("--model", metavar="FOLDER", action="append", default=[],
        help="a reward model, or a sequence classifier of transformers; may be repeated")
    add("--ensemble", choices=("mean", "worst", "uncertainty"), help="measure all --model together, too")
    add("--ensemble-coef", metavar="X", type=float, default=1.0, help="of uncertainty: mean − X·variance")
    add("--policy", metavar="FOLDER", action="append", default=[],
        help="a causal LM or an adapter, measured by β(log π − log ref); may be repeated")
    add("--reference", metavar="NAME",
        help="of every --policy; none: β log π (default: an adapter's base model)")
    add("--beta", type=float, default=0.1, help="of the implicit reward")
    add("--per-token", action="store_true", help="divide log-probs by the tokens of the completion")
    _add_length_options(add)
    add("--max-length", metavar="TOKENS", type=int,
        help="longest prompt and completion (default: the reward model's, 1024 for a policy)")
    add("--batch-size", metavar="N", type=int, default=16, help="rows at a time")
    add("--dtype", choices=_DTYPES, default="auto", help="of the weights")
    add("--output-dir", metavar="DIR", default="xpo-fast-eval", help="for report.json, scores.jsonl and the plots")
    add("--cpu", action="store_true", help="run on the CPU although there is an accelerator")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_length_options(add: Any) -> None:
    add("--length-alpha", metavar="A", type=float, help="divide rewards by A + the tokens of the completion")
    add("--length-target", metavar="TOKENS", type=float, default=0.0, help="what costs nothing with --length-penalty")
    add("--length-penalty", metavar="X", type=float, default=0.0,
        help="take X·|tokens − target| from rewards")
# fmt: on


def _names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"expected names with commas between, got {text!r}")
    return found


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}") from error


# --- reward -------------------------------------------------------------------------------------------------------


def run_reward(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from . import cli

    cli._check_numbers(args)
    output = Path(args.output_dir)
    checkpoint = cli._checkpoint(output, args.resume, args.overwrite)

    from transformers import logging as transformers_logging

    from .models import load_model
    from .reward_model import SPEC_FILE, load_spec
    from .reward_trainer import RewardTrainer, checked_settings
    from .value_head import VALUE_HEAD_FILE, load_value_head

    transformers_logging.set_verbosity_error()
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of packages about one another
    if args.method == "gated" and not args.objectives and (Path(args.model) / SPEC_FILE).is_file():
        args.objectives = list(load_spec(args.model).objectives)
    config = _config(args)
    spec = config.spec()
    checked_settings(config)
    # Data first: a mistake in it should not wait for a model to load.
    train_rows, eval_rows = _data(args, spec)
    options = {"attn_implementation": args.attn} if args.attn else {}
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    model, tokenizer = load_model(args.model, dtype="float32" if args.full else args.dtype, **options)
    goes_on = (Path(args.model) / VALUE_HEAD_FILE).is_file()
    if goes_on:
        load_value_head(model, args.model)
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    gate_alone = args.method == "gated" and goes_on
    if args.head_only:
        model.requires_grad_(False)
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=None if args.full or args.head_only or gate_alone else cli._lora(args),
        callbacks=[cli._json_log(output / "train_log.jsonl")],
    )
    say = print if trainer.is_world_process_zero() else cli._say_nothing
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(f"model      {args.model}, {trained / 1e6:.2f}M weights trained\ndata       {args.data}: {len(train_rows)} rows "
        f"to train on, {0 if eval_rows is None else len(eval_rows)} held out\nmethod     {args.method}, lr "
        f"{config.learning_rate:g}")  # fmt: skip
    results: dict[str, Any] = {"options": cli._options(args), "versions": versions()}
    if eval_rows is not None:
        results["before"] = _held_out(trainer, eval_rows, None)
    with cli._stop_after_step(trainer) as stopped:  # type: ignore[arg-type]
        results["train"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if stopped:
        say(f"\nstopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved. Go on with "
            "the same command and --resume")  # fmt: skip
        return 130
    trainer.save_model()
    trainer.save_state()
    if eval_rows is not None:
        results["after"] = _held_out(trainer, eval_rows, output / "report.png")
        say(f"\nheld out: {len(eval_rows)} rows\n{'':<24}{'before':>10}{'after':>10}")
        for name, value in results["after"].items():
            if isinstance(value, float):
                say(f"{name:<24}{results['before'].get(name, math.nan):>10.4f}{value:>10.4f}")
    if trainer.is_world_process_zero():
        _write_json(output / "results.json", results)
    say(f"\nsaved in {output}: the reward model, train_log.jsonl, results.json"
        f"\nuse it: reward = xpo_fast.reward_model.RewardModel.load({str(output)!r})")  # fmt: skip
    return 0


def _config(args: argparse.Namespace) -> Any:
    import dataclasses

    from transformers import TrainingArguments

    from .reward_trainer import RewardConfig

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    )
    mixed = args.dtype if args.full else None
    options: dict[str, Any] = {
        checkpointing: args.gradient_checkpointing,
        "use_cpu": args.cpu,
        "bf16": mixed == "bfloat16",
        "fp16": mixed == "float16",
        "train_sampling_strategy": "group_by_length" if args.group_by_length else "random",
        "eval_strategy": "steps" if args.eval_steps and args.eval_split != 0 else "no",
        "eval_steps": args.eval_steps,
        "warmup_steps": args.warmup_ratio,  # a share of the steps
    }
    return RewardConfig(
        output_dir=args.output_dir,
        method=args.method,
        method_args=dict(args.set),
        objectives=args.objectives,
        objective_weights=args.objective_weights,
        reference=args.reference,
        length_alpha=args.length_alpha,
        length_target=args.length_target,
        length_lam=args.length_penalty,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        backend=args.backend,
        dataset_num_proc=args.num_proc,
        learning_rate=args.lr or (1e-5 if args.full else 1e-3 if args.head_only else 1e-4),
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


def _data(args: argparse.Namespace, spec: Any) -> tuple[Any, Any]:
    """Rows to train on, and rows held out or None, in the form that `RewardTrainer` reads."""
    from . import cli, data
    from .reward_trainer import load_ratings

    def read(source: str) -> Any:
        if spec.form != "objectives":
            return data.load(source, kind=spec.kind, split=args.split)
        rows, ratings = load_ratings(source, spec.objectives, split=args.split)
        for k, name in enumerate(spec.objectives):
            column = [None if math.isnan(row[k]) else row[k] for row in ratings]
            rows = data.with_column(
                rows.remove_columns([n for n in [name] if n in rows.column_names]), name, column
            )
        return rows

    rows = read(args.data)
    if args.eval_data:
        return rows, read(args.eval_data)
    return cli._rows(args, rows, spec.kind)


def _held_out(trainer: Any, rows: Any, picture: Path | None) -> dict[str, Any]:
    """What `evaluate` says, and of pairs the figures of reward_report.py."""
    from .reward_report import plot, score_pairs, summary

    metrics = trainer.evaluate()
    found = {
        k.removeprefix("eval_"): v
        for k, v in metrics.items()
        if k.startswith("eval_") and not k.endswith(("_runtime", "_second", "_time"))
    }
    if trainer.kind == "pair":
        scores = score_pairs(trainer.spec.method, trainer.reward_model(), list(rows))
        found |= summary(scores)
        if picture is not None and trainer.is_world_process_zero() and _can_plot():
            plot(scores, picture)
    return found


# --- eval-reward --------------------------------------------------------------------------------------------------


def run_eval(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from . import cli

    if not args.model and not args.policy:
        raise cli.UsageError(
            "nothing to measure: give --model (a reward model) or --policy (a causal LM), or both"
        )
    if args.ensemble and len(args.model) < 2:
        raise cli.UsageError(f"--ensemble takes two or more --model, got {len(args.model)}")
    if args.batch_size < 1 or (args.max_pairs is not None and args.max_pairs < 1):
        raise cli.UsageError("--batch-size and --max-pairs must be at least 1")

    from transformers import logging as transformers_logging

    from .reward_report import compare, plot, plot_comparison, summary

    transformers_logging.set_verbosity_error()
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)
    pairs = _pairs(args)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    scored = list(_scored(args, pairs))
    against = [compare(a, b) for i, a in enumerate(scored) for b in scored[i + 1 :]]
    report = {
        "options": cli._options(args),
        "versions": versions(),
        "scorers": [summary(scores) for scores in scored],
        "comparisons": against,
    }
    _write_json(output / "report.json", report)
    _write_scores(output / "scores.jsonl", pairs, scored)
    if _can_plot():
        for scores in scored:
            plot(scores, output / f"{_file_name(scores.name)}.png")
        first = scored[0]
        for other in scored[1:]:
            plot_comparison(first, other, output / f"{_file_name(first.name)}-{_file_name(other.name)}.png")
    else:
        print("no plots: pip install 'xpo-fast[bench]' for matplotlib")
    _print_report(report, output)
    return 0


def _pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of prompt, chosen, rejected, where."""
    import random

    from . import data

    _, first = next(iter(data._read(args.data, args.split)), ("", None))
    if isinstance(first, dict) and "completions" in first:
        rows = []
        for row in data.load(args.data, kind="list", split=args.split):
            ranked: Any = list(zip(row["completions"], row["scores"], strict=True))  # type: ignore[index]
            rows += [
                {"prompt": row["prompt"], "chosen": a, "rejected": b, "where": row["where"]}  # type: ignore[index]
                for a, score in ranked
                for b, other in ranked
                if score > other
            ]
        if not rows:
            raise data.DataError(
                f"{args.data}: no list has two different scores: there is no pair to measure on"
            )
    else:
        rows = list(data.load(args.data, kind="pair", split=args.split))
    if args.max_pairs is not None and args.max_pairs < len(rows):
        rows = [rows[i] for i in sorted(random.Random(args.seed).sample(range(len(rows)), args.max_pairs))]
    return rows  # type: ignore[return-value]


def _scored(args: argparse.Namespace, pairs: list[dict[str, Any]]) -> Any:
    """The scores of every scorer; one at a time in memory, but for an ensemble."""
    import dataclasses

    from .reward_model import RewardEnsemble, RewardModel
    from .reward_report import score_pairs

    rule = {
        "length_alpha": args.length_alpha,
        "length_target": args.length_target,
        "length_lam": args.length_penalty,
    }
    given = {name: value for name, value in rule.items() if value}
    if args.max_length is not None:
        given["max_length"] = args.max_length
    members = []
    names = _distinct([*args.model, *args.policy])
    for folder, name in zip(args.model, names, strict=False):
        model = RewardModel.load(folder, dtype=args.dtype, batch_size=args.batch_size)
        model.spec = dataclasses.replace(model.spec, **given)
        model.model.to(_device(args))
        yield score_pairs(name, model, pairs)
        members += [model] if args.ensemble else []
    if args.ensemble:
        ensemble = RewardEnsemble(members, args.ensemble, args.ensemble_coef)
        yield score_pairs(f"ensemble ({args.ensemble})", ensemble, pairs)
    for folder, name in zip(args.policy, names[len(args.model) :], strict=True):
        yield score_pairs(name, _implicit(args, folder), pairs)


def _implicit(args: argparse.Namespace, folder: str) -> Any:
    from . import cli
    from .models import load_model
    from .reward_model import ImplicitReward

    name = args.reference
    if name is None:
        adapter = Path(folder) / "adapter_config.json"
        if not adapter.is_file():
            raise cli.UsageError(
                f"--policy {folder} is no adapter, whose base model would be the reference: give --reference NAME, or "
                "--reference none"
            )
        name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    policy, tokenizer = load_model(folder, dtype=args.dtype)
    reference = None if name == "none" else load_model(name, dtype=args.dtype)[0].to(_device(args))  # type: ignore[arg-type]
    return ImplicitReward(
        policy.to(_device(args)),  # type: ignore[arg-type]
        reference,
        tokenizer,
        beta=args.beta,
        per_token=args.per_token,
        max_length=args.max_length or 1024,
        batch_size=args.batch_size,
    )


def _device(args: argparse.Namespace) -> str:
    import torch

    accelerator = None if args.cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else str(accelerator)


def _distinct(folders: list[str]) -> list[str]:
    """The last part of each path, with a number where two are alike."""
    names = [Path(folder).name or folder for folder in folders]
    return [
        f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def _can_plot() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def _write_json(path: Path, value: Any) -> None:
    from . import cli
    from .reference import _write_atomically

    _write_atomically(path, (json.dumps(cli._finite(value), indent=1) + "\n").encode())


def _write_scores(path: Path, pairs: list[dict[str, Any]], scored: list[PairScores]) -> None:
    """A line a pair: where it stands, its lengths, and each scorer's two scores."""
    from .reference import _write_atomically

    lines = []
    for i, row in enumerate(pairs):
        first = scored[0]
        line = {
            "where": row["where"],
            "tokens": [int(first.chosen_tokens[i]), int(first.rejected_tokens[i])],
            **{scores.name: [float(scores.chosen[i]), float(scores.rejected[i])] for scores in scored},
        }
        lines.append(json.dumps(line) + "\n")
    _write_atomically(path, "".join(lines).encode())


def _print_report(report: dict[str, Any], output: Path) -> None:
    head = f"{'scorer':<28}{'accuracy':>10}{'±SE':>8}{'mean':>9}{'std':>9}{'log-loss':>10}{'calib.':>8}{'~length':>9}"
    print(head)
    for row in report["scorers"]:
        correlation = row["length_correlation"]
        print(
            f"{row['name']:<28}{row['accuracy']:>10.3f}{row['standard_error']:>8.3f}{row['score_mean']:>9.3f}"
            f"{row['score_std']:>9.3f}{row['log_loss']:>10.3f}{row['calibration_error']:>8.3f}"
            f"{math.nan if correlation is None else correlation:>9.2f}"
        )
    longer, pairs = report["scorers"][0]["longer_wins"], report["scorers"][0]["pairs"]
    print(f"{'the longer completion':<28}{longer:>10.3f}   of {pairs} pairs")
    for row in report["comparisons"]:
        print(
            f"{row['first']} − {row['second']}: {row['accuracy_difference']:+.3f} ± {row['standard_error']:.3f}, the same "
            f"choice in {row['same_choice']:.1%}"
        )
    print(f"\nin {output}: report.json, scores.jsonl, plots")
