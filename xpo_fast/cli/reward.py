"""`xpo-fast reward`: trains a reward model."""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, dry_run, fit_question, loading, options, resuming, training
from .eval_reward import can_plot
from .options import SMOLLM2
from .parser import UsageError

if TYPE_CHECKING:
    from ..rewards.trainer import RewardConfig

_METHODS = (
    *("bradley_terry", "k_wise", "regression", "gated", "preference_model"),
    *("discriminator", "grm", "haf", "odin", "contrastive", "meta", "rlp", "goal_conditioned"),
)


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast reward`."""
    parser = commands.add_parser(
        "reward",
        help="train a reward model",
        description="Train a causal LM with a value head to score completions, and measure it on rows held out.",
    )
    parser.set_defaults(run=run)
    options.add_config(parser)
    group = options.add_data(
        parser,
        data="rows of prompt, chosen, rejected (with margin or prob if there is one); for k_wise of prompt, "
        "completions, scores; for discriminator of prompt, completion, label; for regression of prompt, completion "
        "and the numbers named by --objectives",
    )
    options.add_lengths(group)

    group = parser.add_argument_group("method")
    add = options.adder(group)
    add("--method", "the loss of the reward model", "bradley_terry", choices=_METHODS)
    options.add_settings(group, "center=0.01")
    add_objectives(group)
    add(
        "--reference",
        "the reference policy of haf and of grm's dpo: the model with its adapter off, or a frozen copy; none: grm "
        "without one",
        "auto",
        choices=("auto", "adapter", "copy", "none"),
    )
    options.add_length_rule(group)
    add("--whiten", "save mean and deviation of the rewards: (reward - mean)/deviation is the reward", False)
    further = parser.add_argument_group("samples, views, pre-training")
    add_samples(further)
    _add_stages(further)

    trained = options.add_model(
        parser,
        model=f"{SMOLLM2}, a folder, or a name on the Hugging Face hub; a reward model's folder to continue from: "
        "gated on one of regression learns the gate alone",
        lora="train a LoRA adapter and the value head (default)",
    )
    options.add_option(trained, "--head-only", "train the value head alone", False)
    options.add_optimisation(
        parser,
        lr="1e-4 with --lora, 1e-5 with --full, 1e-3 with --head-only",
        batch="pairs, lists or rows per batch and device",
        seed="seed of order, held-out rows, adapter, value head and dropout",
    )
    add("--value-head-lr X", "learning rate of the value head, with --lora and --full", 1e-3)
    options.add_head(parser, "backend for the token log-probs of grm and haf", tiles=False)
    options.add_output(parser, folder="xpo-fast-reward", files="train_log.jsonl, results.json and report.png")


def add_objectives(group: Any) -> None:
    """Adds the rewards of a model that has several."""
    add = options.adder(group)
    add(
        "--objectives NAMES",
        "comma-separated: the rewards of regression, which are columns of the data, or of gated (default: reward)",
        type=_names,
    )
    about = "comma-separated: weights of the objectives in the reward of regression (default: their mean)"
    add("--objective-weights NUMBERS", about, type=_numbers)


def add_samples(group: Any) -> None:
    """Adds what a few methods read beside the pairs: samples of the policy, and views of hidden states."""
    add = options.adder(group)
    about = "what the policy has sampled, for meta and rlp: rows of prompt, completions; or of prompt, completion"
    add("--samples FILE", about)
    add("--sample-prompts N", "prompts whose samples are read beside each batch (default: --batch-size)", type=int)
    add("--inner-lr RATE", "rate of meta's inner step on the samples (default: 1e-3)", type=float)
    add("--view-dropout P", "dropout of the hidden states that contrastive and rlp see twice (0.1)", type=float)


def _add_stages(group: Any) -> None:
    """Adds the pairs made of samples, and the stage in front of the ranking."""
    add = options.adder(group)
    about = "with rlp: also train on a pair of each prompt of which this share of the samples or more agree"
    add("--confident-pairs SHARE", f"{about} against one that says something else", type=float)
    about = "rows of prompt, completion, label; or pairs: train a discriminator on them first, in DIR/discriminator, "
    add("--pretrain-data FILE", about + "and go on from its weights and value head (preference-model pre-training)")


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


def run(args: argparse.Namespace) -> int:
    """Trains a reward model, or with --dry-run only reports."""
    checks.check_training(args, training.training_arguments(args, lr=_learning_rate(args), evaluates=False))
    check_stages(args)
    if args.pretrain_data and not args.dry_run:
        args = pretrained(args)
    checkpoint = None if args.dry_run else resuming.checkpoint(args)
    training.quiet(args)

    from ..models.value_head import VALUE_HEAD_FILE, load_value_head
    from ..rewards.spec import SPEC_FILE, load_spec
    from ..rewards.trainer import RewardTrainer, checked_settings

    if args.method == "gated" and not args.objectives and (Path(args.model) / SPEC_FILE).is_file():
        args.objectives = list(load_spec(args.model).objectives)
    config = config_of(args)
    checked_settings(config)
    # Data first: a mistake in it is reported before a model is loaded.
    train_rows, eval_rows = read_rows(args, config.spec())
    if args.confident_pairs is not None:
        train_rows = with_confident(args, train_rows)
    if args.dry_run:
        dry_run.rewards(args, config, train_rows, eval_rows)
        return 0
    if args.fit:
        units = fit_question.measured(args, train_rows, config.spec().kind, config.encoding())
        fit_question.refuse(args, "reward", units, objectives=tuple(args.objectives or ("reward",)))
    made_with = resuming.made_with(args, checkpoint, train_rows, dict(args.set), lr=_learning_rate(args))
    model, tokenizer = loading.load(args)
    continues = (Path(args.model) / SPEC_FILE).is_file()  # a value head alone may be that of a critic
    if continues:
        load_value_head(model, args.model)
    elif (Path(args.model) / VALUE_HEAD_FILE).is_file():
        print(
            f"{args.model}: its {VALUE_HEAD_FILE} is a critic's, without {SPEC_FILE}; the value head here is a new one"
        )
    gate_alone = args.method == "gated" and continues
    if args.head_only:
        model.requires_grad_(False)
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        samples=args.samples,
        processing_class=tokenizer,
        peft_config=None if args.full or args.head_only or gate_alone else loading.lora(args),
        callbacks=[training.json_log(args)],
    )
    trainer.given |= made_with
    say = training.printer(trainer)
    held = 0 if eval_rows is None else len(eval_rows)
    say(
        f"model      {args.model}, {training.weights(trainer.model, full=True)[1]} weights trained\n"
        f"data       {options.sources(args, train_rows)}: {len(train_rows)} rows to train on, {held} held out\n"
        f"method     {args.method}, lr {config.learning_rate:g}"
        + (f"\nvalue head of {load_spec(args.model).method} in {args.model}" if continues else "")
    )
    training.preflight(trainer)
    results = training.report_header(args)
    if eval_rows is not None:
        results["before"] = _held_out(trainer, eval_rows, None)
    training.fit(trainer, args, "reward", checkpoint, results)
    if eval_rows is not None:
        results["after"] = _held_out(trainer, eval_rows, Path(args.output_dir) / "report.png")
        say(f"\nheld out: {len(eval_rows)} rows\n{'':<24}{'before':>10}{'after':>10}")
        for name, value in results["after"].items():
            if isinstance(value, float):
                say(f"{name:<24}{results['before'].get(name, math.nan):>10.4f}{value:>10.4f}")
    if args.whiten:
        say(f"whitened: (reward − {trainer.spec.mean:.4f}) / {trainer.spec.std:.4f}")
    use = "rewards.model import RewardModel; reward = RewardModel.load"
    training.finish(trainer, results, "the reward model, train_log.jsonl", use)
    return 0


def check_stages(args: argparse.Namespace) -> None:
    """Raises UsageError for samples, pairs made of them, and a stage in front that do not go with the method."""
    from ..rewards.spec import USES, check_samples

    check_samples(args.method, args.samples is not None)
    if args.confident_pairs is not None and args.method != "rlp":
        raise UsageError(f"--confident-pairs is for rlp, not for {args.method}: leave it out")
    if args.pretrain_data and args.quantize:
        raise UsageError("--pretrain-data: a second adapter would go on 16-bit weights: leave --quantize out")
    if args.pretrain_data and (args.method == "discriminator" or USES[args.method][1] != "reward"):
        raise UsageError(
            f"--pretrain-data trains a head of one reward, from which methods of one reward go on; {args.method} "
            + ("is what it trains: give the rows as --data" if args.method == "discriminator" else "has another head")
        )


def with_confident(args: argparse.Namespace, rows: Any) -> Any:
    """Returns the pairs, and those that the policy's samples agree on."""
    from .. import data
    from ..rewards.agreement import confident_pairs
    from ..rewards.samples import load_samples

    found = confident_pairs(*load_samples(args.samples), least=args.confident_pairs)
    if unlike := sorted({"prob", "margin", "score_chosen"} & {*rows.column_names}):
        raise data.DataError(f"--confident-pairs has no {unlike[0]}, which the pairs have: leave one of them out")
    if not found:
        raise data.DataError(
            f"{args.samples}: no prompt has a majority of {args.confident_pairs:g} or more of its samples, and others "
            "that say something else: lower --confident-pairs, sample more, or leave it out"
        )
    print(f"pairs      {len(found)} that the policy's samples agree on beside {len(rows)}")
    for row in found:
        row.pop("confidence")
    kept = [{k: v for k, v in row.items() if k != "where" and v is not None} for row in rows]
    return data.load([*kept, *found], kind="pair")


def pretrained(args: argparse.Namespace) -> argparse.Namespace:
    """Trains the discriminator of --pretrain-data, unless that has been done; returns the options that go on from it.

    A General Language Assistant (arXiv 2112.00861): preference-model pre-training by binary discrimination. With
    --resume the stage goes on from its own checkpoint, and one that has ended is not trained again.
    """
    folder = Path(args.output_dir) / "discriminator"
    read_rows(args, config_of(args).spec())  # a mistake in them is not to be found after the first stage
    of_ranking = {"whiten": False, "objectives": None, "samples": None, "sample_prompts": None, "inner_lr": None}
    of_ranking["confident_pairs"] = None
    plain = {"view_dropout": None, "set": [], "reference": "auto", "pretrain_data": None, "eval_data": None}
    plain |= {"length_alpha": None, "length_target": 0.0, "length_penalty": 0.0, "push_to_hub": None}
    own = {"method": "discriminator", "data": [args.pretrain_data], "output_dir": str(folder)}
    first, second = copy.copy(args), copy.copy(args)
    vars(first).update(of_ranking | plain | own)
    vars(second).update(model=str(folder), pretrain_data=None)
    if args.resume is not None and (folder / "reward_model.json").is_file():  # saved when it has ended
        was = json.loads((folder / training.RESULTS).read_text(encoding="utf-8"))["options"]
        for name in ("data", "model"):
            if was[name] != getattr(first, name):
                raise UsageError(f"{folder} was trained with {name} {was[name]}: go on with the same, or begin anew")
    else:
        first.resume = args.resume and resuming.AUTO
        run(first)
        print()
    if args.resume == "last":
        second.resume = resuming.AUTO  # it may not have begun
    return second


def _learning_rate(args: argparse.Namespace) -> float:
    return 1e-5 if args.full else 1e-3 if args.head_only else 1e-4


def config_of(args: argparse.Namespace) -> RewardConfig:
    """Returns the configuration of the run."""
    from ..rewards.trainer import RewardConfig

    return RewardConfig(
        method=args.method,
        method_args=dict(args.set),
        objectives=args.objectives,
        objective_weights=args.objective_weights,
        whiten=getattr(args, "whiten", False),  # `xpo-fast check` has no such option
        **{name: getattr(args, name) for name in ("view_dropout", "sample_prompts", "inner_lr")},
        reference=args.reference,
        value_head_learning_rate=None if args.head_only else args.value_head_lr,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        backend=args.backend,
        dataset_num_proc=args.num_proc,
        preflight=args.preflight,
        on_no_signal=args.on_no_signal,
        layout=args.layout,
        tokens_per_batch=args.tokens_per_batch,
        chat_template_kwargs=options.kwargs_of(args),
        **options.length_rule(args),
        **options.levers(args),
        **training.training_arguments(args, lr=_learning_rate(args), evaluates=args.eval_split != 0),
    )


def read_rows(args: argparse.Namespace, spec: Any) -> tuple[Any, Any]:
    """Returns rows to train on, and rows held out or None, in the form that `RewardTrainer` reads."""
    from .. import data
    from ..rewards.encoding import load_ratings

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
    return (rows, read(args.eval_data)) if args.eval_data else loading.hold_out(args, rows)


def _held_out(trainer: Any, rows: Any, picture: Path | None) -> dict[str, Any]:
    """Returns the metrics of `evaluate`, and for pairs the figures of rewards/report.py."""
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
        if picture is not None and trainer.is_world_process_zero() and can_plot():
            plot(scores, picture)
    return found
