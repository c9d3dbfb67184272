"""`xpo-fast reward`: train a reward model. `xpo-fast eval-reward`: measure reward models and policies on pairs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically, write_json
from . import checks, config_file, dry_run, options, training
from .options import SMOLLM2, UsageError

if TYPE_CHECKING:
    from ..rewards.report import PairScores
    from ..rewards.trainer import RewardConfig

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


# fmt: off
def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "reward", help="train a reward model", formatter_class=options.Help, allow_abbrev=False,
        description="Train a causal LM with a value head to score completions, and measure it on rows held out.",
    )
    parser.set_defaults(run=run_reward)
    options.add_config(parser)
    options.add_lengths(options.add_data(
        parser,
        data="rows of prompt, chosen, rejected (with margin or prob beside, if there is one); for k_wise of prompt, "
        "completions, scores; for discriminator of prompt, completion, label; for regression of prompt, completion and the "
        "numbers named by --objectives",
    ))

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=_METHODS, default="bradley_terry", help="what trains it")
    options.add_settings(add, "center=0.01")
    add("--objectives", metavar="NAMES", type=_names,
        help="comma-separated: the rewards of regression, which are columns of the data, or of gated (default: reward)")
    add("--objective-weights", metavar="NUMBERS", type=_numbers,
        help="comma-separated: of the objectives in the reward of regression (default: their mean)")
    add("--reference", choices=("auto", "adapter", "copy", "none"), default="auto",
        help="of haf and grm's dpo: the model with its adapter off, or a frozen copy; none: grm without one")
    _add_length_rule(add)

    how = options.add_model(
        parser,
        model=f"{SMOLLM2}, a folder, or a name on the Hugging Face hub; a reward model's folder to go on from: gated on one "
        "of regression learns the gate alone",
        lora="train a LoRA adapter and the value head (default)",
    )
    how.add_argument("--head-only", action="store_true", help="train the value head alone")
    options.add_optimisation(
        parser, lr="1e-4 with --lora, 1e-5 with --full, 1e-3 with --head-only",
        batch="pairs, lists or rows at a time on every device",
        seed="of order, held-out rows, adapter, value head and dropout",
    )
    add("--value-head-lr", metavar="X", type=float, default=1e-3,
        help="learning rate of the value head, with --lora and --full")
    options.add_backend(
        parser.add_argument_group("head").add_argument, "what computes the token log-probs of grm and haf"
    )
    options.add_output(parser, folder="xpo-fast-reward", files="train_log.jsonl, results.json and report.png")
    _add_eval(commands)


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval-reward", help="measure reward models and policies on pairs", formatter_class=options.Help, allow_abbrev=False,
        description="Accuracy, calibration, dependence on length and distributions of scores, as figures and plots, of every "
        "--model (explicit rewards) and every --policy (implicit rewards) on the same pairs.",
    )
    parser.set_defaults(run=run_eval)
    options.add_config(parser, dry_run=False)
    add = parser.add_argument
    options.add_source(add, "rows of prompt, chosen, rejected; or of prompt, completions, scores, whose pairs are taken")
    add("--max-pairs", metavar="N", type=int, help="measure on N pairs, drawn by --seed (default: all)")
    add("--seed", metavar="N", type=int, default=42, help="of the pairs drawn")
    add("--model", metavar="FOLDER", action="append", default=[],
        help="a reward model, or a sequence classifier of transformers; may be repeated")
    add("--ensemble", choices=options.ENSEMBLES, help="measure all --model together, too, each brought "
        "to mean 0 and standard deviation 1 on these completions")
    add("--ensemble-coef", metavar="X", type=float, default=1.0, help="of uncertainty: mean − X·variance")
    add("--policy", metavar="FOLDER", action="append", default=[],
        help="a causal LM or an adapter, measured by β(log π − log ref); may be repeated")
    add("--reference", metavar="NAME",
        help="of every --policy; none: β log π (default: an adapter's base model)")
    add("--beta", type=float, default=0.1, help="of the implicit reward")
    add("--per-token", action="store_true", help="divide log-probs by the tokens of the completion")
    _add_length_rule(add)
    add("--max-length", metavar="TOKENS", type=int,
        help="longest prompt and completion (default: the reward model's, 1024 for a policy)")
    add("--batch-size", metavar="N", type=int, default=16, help="rows at a time")
    add("--dtype", choices=options.DTYPES, default="auto",
        help=f"of the weights; auto: {options.AUTO_DTYPE.rstrip(',')}")
    add("--output-dir", metavar="DIR", default="xpo-fast-eval", help="for report.json, scores.jsonl and the plots")
    options.add_device(add, "run")


def _add_length_rule(add: Any) -> None:
    add("--length-alpha", metavar="A", type=float, help="divide rewards by A + the tokens of the completion")
    add("--length-target", metavar="TOKENS", type=float, default=0.0, help="what costs nothing with --length-penalty")
    add("--length-penalty", metavar="X", type=float, default=0.0,
        help="take X·|tokens − target| from rewards")
# fmt: on


def _length_rule(args: argparse.Namespace) -> dict[str, float | None]:
    return {
        "length_alpha": args.length_alpha,
        "length_target": args.length_target,
        "length_lam": args.length_penalty,
    }


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
    checks.check_training(args, training.training_arguments(args, lr=_learning_rate(args), evaluates=False))
    output, checkpoint = Path(args.output_dir), None if args.dry_run else training.checkpoint(args)
    training.quiet(args)

    from ..models.value_head import load_value_head
    from ..rewards.model import SPEC_FILE, load_spec
    from ..rewards.trainer import RewardTrainer, checked_settings

    if args.method == "gated" and not args.objectives and (Path(args.model) / SPEC_FILE).is_file():
        args.objectives = list(load_spec(args.model).objectives)
    config = _config(args)
    checked_settings(config)
    # Data first: a mistake in it should not wait for a model to load.
    train_rows, eval_rows = _rows(args, config.spec())
    if args.dry_run:
        dry_run.rewards(args, config, train_rows, eval_rows)
        return 0
    made_with = training.check_resume(args, checkpoint, train_rows, lr=_learning_rate(args))
    model, tokenizer = training.load(args)
    goes_on = (Path(args.model) / SPEC_FILE).is_file()  # a value head alone may be that of a critic
    if goes_on:
        load_value_head(model, args.model)
    gate_alone = args.method == "gated" and goes_on
    if args.head_only:
        model.requires_grad_(False)
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=None if args.full or args.head_only or gate_alone else training.lora(args),
        callbacks=[training.json_log(args)],
    )
    trainer.given |= made_with
    say = training.say(trainer)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(f"model      {args.model}, {trained / 1e6:.2f}M weights trained\ndata       {options.came_of(args, train_rows)}: {len(train_rows)} rows "
        f"to train on, {0 if eval_rows is None else len(eval_rows)} held out\nmethod     {args.method}, lr "
        f"{config.learning_rate:g}")  # fmt: skip
    results = training.begun(args)
    if eval_rows is not None:
        results["before"] = _held_out(trainer, eval_rows, None)
    results["train"] = training.fit(
        trainer,
        checkpoint,
        lambda: config_file.write(args, output, "reward", resumed=checkpoint is not None),
    )
    if eval_rows is not None:
        results["after"] = _held_out(trainer, eval_rows, output / "report.png")
        say(f"\nheld out: {len(eval_rows)} rows\n{'':<24}{'before':>10}{'after':>10}")
        for name, value in results["after"].items():
            if isinstance(value, float):
                say(f"{name:<24}{results['before'].get(name, math.nan):>10.4f}{value:>10.4f}")
    if trainer.is_world_process_zero():
        write_json(output / "results.json", results)
    say(f"\nsaved in {output}: the reward model, train_log.jsonl, results.json"
        f"\nuse it: from xpo_fast.rewards.model import RewardModel; reward = RewardModel.load({str(output)!r})")  # fmt: skip
    return 0


def _learning_rate(args: argparse.Namespace) -> float:
    return 1e-5 if args.full else 1e-3 if args.head_only else 1e-4


def _config(args: argparse.Namespace) -> RewardConfig:
    from ..rewards.trainer import RewardConfig

    return RewardConfig(
        method=args.method,
        method_args=dict(args.set),
        objectives=args.objectives,
        objective_weights=args.objective_weights,
        reference=args.reference,
        value_head_learning_rate=None if args.head_only else args.value_head_lr,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        backend=args.backend,
        dataset_num_proc=args.num_proc,
        **_length_rule(args),
        **training.training_arguments(args, lr=_learning_rate(args), evaluates=args.eval_split != 0),
    )


def _rows(args: argparse.Namespace, spec: Any) -> tuple[Any, Any]:
    """Rows to train on, and rows held out or None, in the form that `RewardTrainer` reads."""
    from .. import data
    from ..rewards.trainer import load_ratings

    how = options.reading(args)

    def read(source: Any) -> Any:
        if spec.form != "objectives":
            return data.load(source, kind=spec.kind, **how)
        rows, ratings = load_ratings(source, spec.objectives, **how)
        for k, name in enumerate(spec.objectives):
            column = [None if math.isnan(row[k]) else row[k] for row in ratings]
            rows = data.with_column(rows.remove_columns([n for n in [name] if n in rows.column_names]), name, column)
        return rows

    rows = read(args.data)
    return (rows, read(args.eval_data)) if args.eval_data else training.hold_out(args, rows)


def _held_out(trainer: Any, rows: Any, picture: Path | None) -> dict[str, Any]:
    """What `evaluate` says, and of pairs the figures of reward_report.py."""
    from ..rewards.report import plot, score_pairs, summary

    metrics = trainer.evaluate()
    found = {
        k.removeprefix("eval_"): v
        for k, v in metrics.items()
        if k.startswith("eval_") and not k.endswith(("_runtime", "_second", "_time"))
    }
    if len(trainer.kind.completions) == 2:
        scores = score_pairs(trainer.spec.method, trainer.reward_model(), list(rows))
        found |= summary(scores)
        if picture is not None and trainer.is_world_process_zero() and _can_plot():
            plot(scores, picture)
    return found


# --- eval-reward --------------------------------------------------------------------------------------------------


def run_eval(args: argparse.Namespace) -> int:
    if not args.model and not args.policy:
        raise UsageError("nothing to measure: give --model (a reward model) or --policy (a causal LM), or both")
    if args.ensemble and len(args.model) < 2:
        raise UsageError(f"--ensemble takes two or more --model, got {len(args.model)}")
    checks.check(args)
    training.quiet(args)

    from ..rewards.report import compare, plot, plot_comparison, summary

    pairs = _pairs(args)
    output = Path(args.output_dir)
    scored = list(_scored(args, pairs))
    config_file.write(args, output, "eval-reward")
    against = [compare(a, b) for i, a in enumerate(scored) for b in scored[i + 1 :]]
    report = {
        **training.begun(args),
        "scorers": [summary(scores) for scores in scored],
        "comparisons": against,
    }
    write_json(output / "report.json", report)
    _write_scores(output / "scores.jsonl", pairs, scored)
    if _can_plot():
        for scores in scored:
            plot(scores, output / f"{_file_name(scores.name)}.png")
        first = scored[0]
        for other in scored[1:]:
            plot_comparison(first, other, output / f"{_file_name(first.name)}-{_file_name(other.name)}.png")
    else:
        print("no plots: pip install 'xpo-fast[train]' for matplotlib")
    _print_report(report, output)
    return 0


def _pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of prompt, chosen, rejected, where."""
    from .. import data

    how = options.reading(args)
    first_rows = data.read(args.data, args.split, columns=how["columns"], config=how["config"])
    _, first = next(iter(first_rows), ("", None))
    lists = isinstance(first, dict) and "completions" in first
    rows: list[Any] = list(data.load(args.data, kind="list" if lists else "pair", **how))
    if lists:
        given, rows = rows, []
        for row in given:
            ranked = list(zip(row["completions"], row["scores"], strict=True))
            rows += [
                {"prompt": row["prompt"], "chosen": a, "rejected": b, "where": row["where"]}
                for a, score in ranked
                for b, other in ranked
                if score > other
            ]
        if not rows:
            names = ", ".join(args.data)
            raise data.DataError(f"{names}: no list has two different scores: there is no pair to measure on")
    if args.max_pairs is not None and args.max_pairs < len(rows):
        rows = [rows[i] for i in sorted(random.Random(args.seed).sample(range(len(rows)), args.max_pairs))]
    return rows


def _scored(args: argparse.Namespace, pairs: list[dict[str, Any]]) -> Any:
    """The scores of every scorer; one at a time in memory, but for an ensemble."""
    from ..rewards.model import RewardEnsemble, RewardModel
    from ..rewards.report import score_pairs

    given: dict[str, Any] = {name: value for name, value in _length_rule(args).items() if value}
    if args.max_length is not None:
        given["max_length"] = args.max_length
    members = []
    names = _distinct([*args.model, *args.policy])
    for folder, name in zip(args.model, names, strict=False):
        model = RewardModel.load(folder, dtype=args.dtype, device=training.device_of(args), batch_size=args.batch_size)
        model.spec = dataclasses.replace(model.spec, **given)
        model.model.to(_device(args))
        yield score_pairs(name, model, pairs)
        members += [model] if args.ensemble else []
    if args.ensemble:
        ensemble = RewardEnsemble(members, args.ensemble, args.ensemble_coef)
        answers = [row[name] for name in ("chosen", "rejected") for row in pairs]
        ensemble.standardise([row["prompt"] for row in pairs] * 2, answers)
        yield score_pairs(f"ensemble ({args.ensemble})", ensemble, pairs)
    for folder, name in zip(args.policy, names[len(args.model) :], strict=True):
        yield score_pairs(name, _implicit(args, folder), pairs)


def _placed(args: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """A model on the device, and its tokenizer."""
    from ..models import load_model

    model, tokenizer = load_model(name, dtype=args.dtype, device=training.device_of(args))
    place: Any = model.to
    return place(_device(args)), tokenizer


def _implicit(args: argparse.Namespace, folder: str) -> Any:
    from ..rewards.model import ImplicitReward

    name = args.reference
    if name is None:
        adapter = Path(folder) / "adapter_config.json"
        if not adapter.is_file():
            raise UsageError(
                f"--policy {folder} is no adapter, whose base model would be the reference: give --reference NAME, or "
                "--reference none"
            )
        name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    policy, tokenizer = _placed(args, folder)
    return ImplicitReward(
        policy,
        None if name == "none" else _placed(args, name)[0],
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
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _write_scores(path: Path, pairs: list[dict[str, Any]], scored: list[PairScores]) -> None:
    """A line a pair: where it stands, its lengths, and each scorer's two scores."""
    lines = []
    for i, row in enumerate(pairs):
        first = scored[0]
        line = {
            "where": row["where"],
            "tokens": [int(first.chosen_tokens[i]), int(first.rejected_tokens[i])],
            **{scores.name: [float(scores.chosen[i]), float(scores.rejected[i])] for scores in scored},
        }
        lines.append(json.dumps(line) + "\n")
    write_atomically(path, "".join(lines).encode())


def _print_report(report: dict[str, Any], output: Path) -> None:
    head = f"{'scorer':<28}{'accuracy':>10}{'±SE':>8}{'mean':>9}{'std':>9}{'log-loss':>10}{'calib.':>8}{'~length':>9}"
    print(head)
    for row in report["scorers"]:
        correlation = row["length_correlation"]
        print(
            f"{row['name']:<28}{row['accuracy']:>10.3f}{row['standard_error']:>8.3f}{row['score_mean']:>9.3f}"
            f"{row['score_std']:>9.3f}{row.get('log_loss', math.nan):>10.3f}{row.get('calibration_error', math.nan):>8.3f}"
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
