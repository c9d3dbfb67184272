"""`xpo-fast eval-reward`: measures reward models and policies on pairs."""

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
from . import checks, config_file, loading, options, training
from .parser import UsageError

if TYPE_CHECKING:
    from ..rewards.drift import Drift
    from ..rewards.report import PairScores


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast eval-reward`."""
    parser = commands.add_parser(
        "eval-reward",
        help="measure reward models and policies on pairs",
        description="Accuracy, calibration, dependence on length and distributions of scores, as figures and plots, "
        "of every --model (explicit rewards) and every --policy (implicit rewards) on the same pairs.",
    )
    parser.set_defaults(run=run)
    options.add_config(parser, dry_run=False)
    about = "rows of prompt, chosen, rejected; or of prompt, completions, scores, whose pairs are taken"
    options.add_source(parser, about)
    add = options.adder(parser)
    add("--max-pairs N", "measure on N pairs, drawn by --seed (default: all)", type=int)
    add("--seed N", "seed of the drawn pairs", 42)
    add("--model FOLDER", "a reward model, a router, or a sequence classifier of transformers; may be repeated", [])
    about = "measure all --model together, too, each standardised to mean 0 and deviation 1 on these completions"
    add("--ensemble", about, choices=options.ENSEMBLES)
    add("--ensemble-coef X", "coefficient of uncertainty: mean − X·variance", 1.0)
    add("--policy FOLDER", "a causal LM or an adapter, measured by β(log π − log ref); may be repeated", [])
    add("--reference NAME", "reference of every --policy; none: β log π (default: an adapter's base model)")
    add("--beta", "β of the implicit reward", 0.1)
    add("--per-token", "divide log-probs by the tokens of the completion", False)
    about = "a variable of the chat template for every --policy (a --model has its own), as enable_thinking=false"
    add("--chat-template-kwargs NAME=VALUE", f"{about}; may be repeated", [], type=options.template_kwargs)
    options.add_length_rule(parser)
    about = "cut prompt and completion to this length, and warn (default: the reward model's, as a rule none)"
    add("--max-length TOKENS", about, type=int)
    add("--batch-size N", "rows per batch", 16)
    add("--dtype", f"dtype of the weights; auto: {options.AUTO_DTYPE.rstrip(',')}", "auto", choices=options.DTYPES)
    _add_voting(parser)
    about = "what a policy has sampled, as rows of prompt, completions: how far it lies from the pairs for each --model"
    add("--samples FILE", about)
    add("--output-dir DIR", "folder for report.json, scores.jsonl and the plots", "xpo-fast-eval")
    options.add_device(parser, "run")


def _add_voting(parser: argparse.ArgumentParser) -> None:
    """Adds what is made of the pairs' labels by the votes of several models."""
    add = options.adder(parser.add_argument_group("votes on the labels"))
    add("--vote", "write voted.jsonl: the pairs, their labels changed by the mean margin of two or more --model", False)
    add("--vote-flip SHARE", "flip the labels of this share, the lowest of the negative mean margins (0.1)", type=float)
    add("--vote-drop SHARE", "leave this share out, those of least absolute mean margin (0)", type=float)
    about = "soft: the models' mean probability as prob; margin: their mean margin as margin; hard: neither (default)"
    add("--vote-labels", about, choices=("hard", "soft", "margin"))


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes the report."""
    if not args.model and not args.policy:
        raise UsageError("nothing to measure: give --model (a reward model) or --policy (a causal LM), or both")
    if args.ensemble and len(args.model) < 2:
        raise UsageError(f"--ensemble takes two or more --model, got {len(args.model)}")
    if args.chat_template_kwargs and not args.policy:
        raise UsageError("--chat-template-kwargs are for --policy: a --model has those that it was trained with")
    _check_voting(args)
    if args.samples and not args.model:
        raise UsageError("--samples are measured by reward models: give --model, or leave --samples out")
    checks.check(args)
    training.quiet(args)

    from ..rewards.report import compare, plot, plot_comparison, summary

    pairs = _pairs(args)
    output = Path(args.output_dir)
    drift = _drift(args, pairs)
    scored = list(_scored(args, pairs, drift))
    config_file.write(args, output, "eval-reward")
    against = [compare(a, b) for i, a in enumerate(scored) for b in scored[i + 1 :]]
    report = {**training.report_header(args), "scorers": [summary(scores) for scores in scored], "comparisons": against}
    if drift is not None:
        report["drift"] = {"models": drift.models, "disagreement": drift.disagreement()}
    if args.vote:
        report["vote"] = _vote(args, pairs, scored[: len(args.model)], output)
    write_json(output / "report.json", report)
    _write_scores(output / "scores.jsonl", pairs, scored)
    if can_plot():
        for scores in scored:
            plot(scores, output / f"{_file_name(scores.name)}.png")
        first = scored[0]
        for other in scored[1:]:
            plot_comparison(first, other, output / f"{_file_name(first.name)}-{_file_name(other.name)}.png")
    else:
        print("no plots: pip install 'xpo-fast[train]' for matplotlib")
    _print_report(report, output)
    return 0


def _check_voting(args: argparse.Namespace) -> None:
    """Raises UsageError for votes without voters, and options of a vote that is not taken."""
    given = {f"--vote-{name}": getattr(args, f"vote_{name}") for name in ("flip", "drop", "labels")}
    unread = [name for name, value in given.items() if value is not None]
    if unread and not args.vote:
        raise UsageError(f"{unread[0]} is for --vote: give --vote, too, or leave it out")
    if args.vote and len(args.model) < 2:
        raise UsageError(f"--vote takes two or more --model, trained from different seeds; got {len(args.model)}")
    shares = [given[f"--vote-{name}"] or 0 for name in ("flip", "drop")]
    if min(shares) < 0 or sum(shares) > 1:
        got = f"{shares[0]:g} and {shares[1]:g}"
        raise UsageError(f"--vote-flip and --vote-drop must be shares from 0, at most 1 together; got {got}")


def _vote(args: argparse.Namespace, pairs: list[Any], scored: list[PairScores], output: Path) -> dict[str, Any]:
    """Writes the pairs with the labels of the vote; prints and returns its figures."""
    import numpy as np

    from ..rewards.voting import adapted, vote

    margins = np.stack([scores.scale * scores.margin for scores in scored], axis=1)
    votes = vote(margins, flip=0.1 if args.vote_flip is None else args.vote_flip, drop=args.vote_drop or 0.0)
    rows = adapted(pairs, votes, args.vote_labels or "hard")
    write_atomically(output / "voted.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    found = votes.summary()
    print(
        f"vote of {len(scored)} models on {found['pairs']} pairs: {found['flipped']} flipped, {found['dropped']} left "
        f"out, mean margin below 0 in {found['strength_below_0']:.1%}; {output / 'voted.jsonl'}"
    )
    return found


def _pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns rows of prompt, chosen, rejected, where."""
    from .. import data

    how = options.reading(args)
    first_rows = data.read(args.data, args.split, columns=how["columns"], config=how["config"])
    _, first = next(iter(first_rows), ("", None))
    lists = isinstance(first, dict) and "completions" in first
    rows: list[Any] = list(data.load(args.data, kind="list" if lists else "pair", **how))
    if lists:
        rows = [
            {"prompt": data.prompt_of(row), "chosen": a, "rejected": b, "where": row["where"]}
            for row in rows
            for a, score in zip(row["completions"], row["scores"], strict=True)
            for b, other in zip(row["completions"], row["scores"], strict=True)
            if score > other
        ]
        if not rows:
            names = ", ".join(args.data)
            raise data.DataError(f"{names}: no list has two different scores: there is no pair to measure on")
    if args.max_pairs is not None and args.max_pairs < len(rows):
        rows = [rows[i] for i in sorted(random.Random(args.seed).sample(range(len(rows)), args.max_pairs))]
    return rows


def _drift(args: argparse.Namespace, pairs: list[dict[str, Any]]) -> Drift | None:
    """Returns what measures the distance of --samples from the pairs; None without them."""
    if args.samples is None:
        return None
    from ..rewards.drift import Drift
    from ..rewards.samples import load_samples

    return Drift(pairs, list(load_samples(args.samples)[0]))


def _scored(args: argparse.Namespace, pairs: list[dict[str, Any]], drift: Drift | None) -> Any:
    """Yields the scores of every scorer; one at a time is in memory, except for an ensemble."""
    from ..data import prompt_of
    from ..rewards.ensemble import RewardEnsemble
    from ..rewards.report import score_pairs
    from ..rewards.router import load_scorer

    given: dict[str, Any] = {name: value for name, value in options.length_rule(args).items() if value}
    if args.max_length is not None:
        given["max_length"] = args.max_length
    members = []
    names = _distinct([*args.model, *args.policy])
    for folder, name in zip(args.model, names, strict=False):
        model = load_scorer(folder, dtype=args.dtype, device=loading.device_of(args), batch_size=args.batch_size)
        model.spec = dataclasses.replace(model.spec, **given)
        model.model.to(loading.accelerator_of(args))
        yield score_pairs(name, model, pairs)
        if drift is not None:
            drift.add(name, model)
        members += [model] if args.ensemble else []
    if args.ensemble:
        ensemble = RewardEnsemble(members, args.ensemble, args.ensemble_coef)
        answers = [row[name] for name in ("chosen", "rejected") for row in pairs]
        ensemble.standardise([prompt_of(row) for row in pairs] * 2, answers)
        yield score_pairs(f"ensemble ({args.ensemble})", ensemble, pairs)
    for folder, name in zip(args.policy, names[len(args.model) :], strict=True):
        yield score_pairs(name, _implicit(args, folder), pairs)


def _implicit(args: argparse.Namespace, folder: str) -> Any:
    from ..models import base_of
    from ..rewards.model import ImplicitReward

    name = args.reference
    if name is None:
        adapter = Path(folder) / "adapter_config.json"
        if not adapter.is_file():
            raise UsageError(
                f"--policy {folder} is no adapter, whose base model would be the reference: give --reference NAME, or "
                "--reference none"
            )
        name = base_of(folder)
    policy, tokenizer = loading.placed(args, folder, args.dtype)
    return ImplicitReward(
        policy,
        None if name == "none" else loading.placed(args, name, args.dtype)[0],
        tokenizer,
        beta=args.beta,
        per_token=args.per_token,
        max_length=args.max_length,
        chat_template_kwargs=options.kwargs_of(args),
        batch_size=args.batch_size,
    )


def _distinct(folders: list[str]) -> list[str]:
    """Returns the last part of each path, with a number where two are equal."""
    names = [Path(folder).name or folder for folder in folders]
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def can_plot() -> bool:
    """Returns whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _write_scores(path: Path, pairs: list[dict[str, Any]], scored: list[PairScores]) -> None:
    """Writes a line per pair: its place in the data, its lengths, and the two scores of each scorer."""
    lines = (
        {
            "where": row["where"],
            "tokens": [int(scored[0].chosen_tokens[i]), int(scored[0].rejected_tokens[i])],
            **{scores.name: [float(scores.chosen[i]), float(scores.rejected[i])] for scores in scored},
        }
        for i, row in enumerate(pairs)
    )
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _print_report(report: dict[str, Any], output: Path) -> None:
    print(f"{'scorer':<28}{'accuracy':>10}{'±SE':>8}{'mean':>9}{'std':>9}{'log-loss':>10}{'calib.':>8}{'~length':>9}")
    for row in report["scorers"]:
        correlation = row["length_correlation"]
        print(
            f"{row['name']:<28}{row['accuracy']:>10.3f}{row['standard_error']:>8.3f}{row['score_mean']:>9.3f}"
            f"{row['score_std']:>9.3f}{row.get('log_loss', math.nan):>10.3f}"
            f"{row.get('calibration_error', math.nan):>8.3f}{math.nan if correlation is None else correlation:>9.2f}"
        )
    longer, pairs = report["scorers"][0]["longer_wins"], report["scorers"][0]["pairs"]
    print(f"{'the longer completion':<28}{longer:>10.3f}   of {pairs} pairs")
    for row in report["comparisons"]:
        print(
            f"{row['first']} − {row['second']}: {row['accuracy_difference']:+.3f} ± {row['standard_error']:.3f}, the "
            f"same choice in {row['same_choice']:.1%}"
        )
    for row in report.get("drift", {}).get("models", ()):
        said = f"{row['name']} on {row['samples']} samples: rewards {row['reward_shift']:+.2f} deviations off, "
        said += f"distance {row['distance_samples']:.2f} ({row['distance']:.2f} of held-out pairs)"
        print(f"{said}, told apart with AUC {row['auc']:.2f}")
    if found := report.get("drift", {}).get("disagreement"):
        print(f"the models disagree by {found['samples']:.2f} deviations on samples, {found['pairs']:.2f} on the pairs")
    print(f"\nin {output}: report.json, scores.jsonl, plots")
