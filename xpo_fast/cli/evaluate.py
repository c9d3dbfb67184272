"""`xpo-fast evaluate`: ranking accuracy on pairs, win rates and Elo, reward against KL over a run's checkpoints."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, finite, write_atomically, write_json
from . import checks, config_file, loading, options, policies, recipe, resuming, training
from .eval_reward import can_plot
from .parser import UsageError

if TYPE_CHECKING:
    from ..evaluate.policies import Policy, Source
    from ..evaluate.stages import Stages

# The options that a measure takes beside those of all three; any other that is given is refused.
_SAMPLES = ("num_generations", "max_new_tokens", "stop")
MEASURES = {
    "ranking": ("reference", "beta", "label_smoothing", "judge", "judge_tokenizer", "max_length", "layout"),
    "wins": (*_SAMPLES, "judge", "judge_tokenizer", "temperature", "top_p", "top_k", "soft", "prior", "interval"),
    "frontier": (*_SAMPLES, "reference", "judge", "judge_tokenizer"),
}
INTERVALS = ("wald", "bootstrap")
_START = "start"


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure policies: ranking accuracy on pairs, win rates and Elo, reward against KL",
        description="Measure policies. ranking: on pairs, how often a run's policy and its reference find the chosen "
        "completion likelier, how often the objective's optimum would, and which pairs training flipped (arXiv "
        "2405.19534). wins: win rates between policies by a judge, and their Elo with intervals. frontier: reward "
        "against KL from the reference over a run's checkpoints, as a table and a plot. Work is kept in blocks, and an "
        "evaluation that was stopped goes on with --resume.",
    )
    parser.set_defaults(run=run)
    options.add_config(parser, dry_run=False)
    parser.add_argument("measure", metavar="MEASURE", choices=tuple(MEASURES), help=", ".join(MEASURES))
    about = (
        "ranking, frontier: --output-dir of a run (frontier measures the checkpoints it has kept); wins: two or more "
        "runs, folders of models, or names"
    )
    parser.add_argument("policies", nargs="+", metavar="POLICY", help=about)

    group = parser.add_argument_group("data")
    options.add_source(group, "pairs for ranking, rows with a prompt for wins and frontier", action="append")
    add = options.adder(group)
    add("--max-rows N", "measure on N rows, drawn by --seed (default: all)", type=int)
    options.add_template_kwargs(group)

    group = parser.add_argument_group("measure")
    add = options.adder(group)
    add("--reference MODEL", "ranking, frontier: the reference, where the run does not tell, or another one")
    about = "ranking: β of the optimum and of the implicit reward; may be repeated (default: the run's, else 0.1)"
    add("--beta B", about, [], type=float)
    about = "ranking: P(chosen beats rejected) is 1 − E in rows without prob; 0: labels are certain"
    add("--label-smoothing E", about, 0.0)
    about = f"{recipe.JUDGE_SPECS}; in ranking, whose P(chosen beats rejected) takes the place of the rows'"
    add("--judge SPEC", about.replace("llm (that of --model as it is), ", ""), [])
    add("--judge-tokenizer NAME", "folder or name of the tokenizer of the model behind server:")
    add("--num-generations N", "wins, frontier: completions per prompt", 1)
    add("--max-new-tokens N", "wins, frontier: longest completion", 256)
    add("--stop TEXT", "wins, frontier: a text that ends a completion; may be repeated", [])
    add("--temperature X", "wins: 0 is the most likely token each time", 1.0)
    add("--top-p P", "wins: draw from the most likely tokens with this share of the probability", 1.0)
    add("--top-k K", "wins: draw from the K most likely tokens (default: all)", type=int)
    add("--soft", "wins: the judge's probability is the score of a game, not 1, ½ or 0", False)
    about = "wins: games that every two policies are taken to have drawn beside these; makes every Elo finite"
    add("--prior GAMES", about, 0.0)
    about = "wins: of the Elo, by the standard error over prompts, or by redrawing the prompts"
    add("--interval", about, "wald", choices=INTERVALS)

    group = parser.add_argument_group("model")
    add = options.adder(group)
    add("--dtype", f"dtype of the weights; auto: {options.AUTO_DTYPE.rstrip(',')}", "auto", choices=options.DTYPES)
    add("--trust-remote-code", "run code that comes with a model of the hub", False)
    about = "ranking: cut prompt and completion to this length, and warn (default: nothing is cut)"
    add("--max-length TOKENS", about, type=int)
    add("--layout", "ranking: how rows are read, see `xpo-fast train --layout`", "auto", choices=options.LAYOUTS)
    add("--batch-size N", "rows per batch, completions sampled at a time", 16)
    add("--block N", "rows per file of kept work", 32)
    add("--seed N", "seed of the drawn rows, completions and intervals", 42)

    group = parser.add_argument_group("output")
    add = options.adder(group)
    add("--output-dir DIR", "folder for report.json, report.md, pairs.jsonl, frontier.png (default: xpo-fast-MEASURE)")
    add("--resume", "go on with the evaluation in --output-dir", False)
    add("--overwrite", "start anew although --output-dir has an evaluation; it is deleted", False)
    options.add_device(parser, "run")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables and writes the report."""
    _check(args)
    output = Path(args.output_dir or f"xpo-fast-{args.measure}")
    args.output_dir = str(output)
    check_writable(output, "--output-dir")
    there = (output / "evaluation.json").is_file()
    resuming.check_blocks(args, output, there, "evaluation", "evaluation")
    training.quiet(args)

    from transformers import logging as transformers_logging

    from ..evaluate.stages import Stages

    transformers_logging.disable_progress_bar()
    stages = Stages(
        output / "blocks",
        block=args.block,
        batch_size=args.batch_size,
        layout=args.layout,
        seed=args.seed,
        say=lambda line: print(line, flush=True),
    )
    report, text = {"ranking": _ranking, "wins": _wins, "frontier": _frontier}[args.measure](args, output, stages)
    write_json(output / "report.json", {**training.report_header(args), **report}, ensure_ascii=False)
    write_atomically(output / "report.md", text.encode())
    print(f"\n{text}\nin {output}: {', '.join(sorted(p.name for p in output.iterdir() if p.is_file()))}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together, and for numbers out of range."""
    taken = MEASURES[args.measure]
    for name in sorted({x for names in MEASURES.values() for x in names} - set(taken)):
        if getattr(args, name) != args.parser.get_default(name):
            of = " and ".join(measure for measure, names in MEASURES.items() if name in names)
            raise UsageError(f"--{name.replace('_', '-')} is for {of}: {args.measure} has no use for it")
    if args.measure == "wins" and len(args.policies) < 2:
        raise UsageError(f"wins compares policies: name two or more, got {args.policies[0]}")
    if args.measure != "wins" and len(args.policies) > 1:
        raise UsageError(f"{args.measure} measures one run, got {', '.join(args.policies)}")
    if args.measure != "ranking" and not args.judge:
        raise UsageError(f"{args.measure} needs --judge: {recipe.JUDGE_SPECS}")
    if "llm" in args.judge:
        raise UsageError("--judge llm: name the model that judges, as llm:MODEL")
    for name, least in (("max_rows", 1), ("block", 1), ("num_generations", 1), ("max_length", 2), ("prior", 0)):
        if (value := getattr(args, name)) is not None and not least <= value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value:g}")
    for beta in args.beta:
        if not 0 < beta < float("inf"):
            raise UsageError(f"--beta must be positive, got {beta:g}")
    if not 0 <= args.label_smoothing <= 1:
        raise UsageError(f"--label-smoothing must be in [0, 1], got {args.label_smoothing:g}")
    if args.judge and args.label_smoothing:
        raise UsageError("--label-smoothing is for labels of the rows, in whose place --judge puts its own: choose one")
    if args.judge_tokenizer and not any(spec.startswith("server:") for spec in args.judge):
        raise UsageError("--judge-tokenizer is for --judge server:URL")
    checks.check(args)


def _started(args: argparse.Namespace, output: Path, rows: Any, models: dict[str, Any]) -> None:
    """Writes what is measured, or compares it with what the folder holds."""
    from ..evaluate.stages import identify
    from ..resume import model_identity, rows_identity

    if args.overwrite:
        shutil.rmtree(output / "blocks", ignore_errors=True)
        for name in ("evaluation.json", "report.json", "report.md", "pairs.jsonl", "frontier.png"):
            (output / name).unlink(missing_ok=True)
    names = (*MEASURES[args.measure], "dtype", "batch_size", "block", "seed", "chat_template_kwargs")
    about = {"measure": args.measure, **{f"--{name.replace('_', '-')}": getattr(args, name) for name in names}}
    about |= {f"model {name}": model_identity(str(where)) for name, where in models.items()}
    identify(output, {**about, "--data": rows_identity(rows)})
    config_file.write(args, output, "evaluate", resumed=args.resume)


def _trained(name: str) -> policies.Trained:
    """Returns what a run trained, and prints what is particular about it."""
    trained = policies.find(name)
    if trained.is_reward_model:
        raise UsageError(f"{trained.folder} holds a reward model, which is no policy: name another run")
    for note in trained.notes:
        print(f"xpo-fast: {note}", file=sys.stderr)
    return trained


def _source(args: argparse.Namespace, name: str) -> Source:
    from ..evaluate.policies import Source
    from ..models import load_model

    further: dict[str, Any] = {"trust_remote_code": True} if args.trust_remote_code else {}

    def load() -> tuple[Any, Any]:
        model, tokenizer = load_model(name, dtype=args.dtype, device=loading.device_of(args), merge=False, **further)
        move: Any = model.to
        return move(loading.accelerator_of(args)), tokenizer

    return Source(load)


def _policy(args: argparse.Namespace, trained: policies.Trained, name: str, **how: Any) -> Policy:
    from ..evaluate.policies import Policy

    kwargs = options.kwargs_of(args) or trained.options.get("chat_template_kwargs") or None
    source = how.pop("source", None) or _source(args, str(trained.folder))
    return Policy(name, source, chat_template_kwargs=kwargs, **how)


def _with_reference(args: argparse.Namespace, trained: policies.Trained) -> tuple[Policy, Policy, str]:
    """Returns a run's policy, its reference, and the reference's name: by default what the run began with."""
    policy = _policy(args, trained, "policy")
    if args.reference is None and trained.is_adapter:
        off = _policy(args, trained, "reference", source=policy.source, adapter_off=True)
        return policy, off, f"{trained.folder} without its adapter"
    name = args.reference or trained.before
    if not name:
        raise UsageError(f"{args.policies[0]} does not tell which model it began with: name it, --reference MODEL")
    return policy, _policy(args, trained, "reference", source=_there(_source(args, name), name)), name


def _there(source: Source, name: str) -> Source:
    """Returns the source; one that is no folder has been loaded once, so that a wrong name is told at the start."""
    if not Path(name).is_dir():
        source.get()
        source.close()
    return source


def _drawn(args: argparse.Namespace, rows: Any) -> list[dict[str, Any]]:
    if args.max_rows is None or args.max_rows >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(args.seed).sample(range(len(rows)), args.max_rows))]


def _judge(args: argparse.Namespace) -> Any:
    return recipe.judge_of(args, args.judge)


def _ranking(args: argparse.Namespace, output: Path, stages: Stages) -> tuple[dict[str, Any], str]:
    import numpy as np

    from .. import data
    from ..evaluate.ranking import PairLogps, pair_lines, ranking
    from ..evaluate.stages import check_pairs, prompt_numbers
    from ..evaluate.tables import of_ranking
    from ..recipes.run_folder import write_lines

    trained = _trained(args.policies[0])
    policy, reference, name = _with_reference(args, trained)
    judge = _judge(args)
    loaded = data.load(args.data, kind="pair", **options.reading(args))
    if args.max_rows is not None and args.max_rows < len(loaded):
        loaded = loaded.select(sorted(random.Random(args.seed).sample(range(len(loaded)), args.max_rows)))
    rows: list[Any] = list(loaded)
    tokenizer = policy.tokenizer
    how: Any = {"max_length": args.max_length or sys.maxsize, "chat_template_kwargs": policy.chat_template_kwargs}
    encoded: list[Any] = list(data.encode(loaded, tokenizer, kind="pair", **how))
    check_pairs(policy, tokenizer, encoded)
    _started(args, output, rows, {"policy": trained.folder, "reference": name})
    betas = args.beta or [_beta_of(trained)]
    logps, tokens = stages.logps("policy", policy, tokenizer, encoded)
    if reference.source is not policy.source:
        policy.source.close()
    theirs, _ = stages.logps("reference", reference, tokenizer, encoded)
    reference.source.close()
    if judge is not None:
        alpha = stages.alphas(judge, rows)
    else:
        certain = 1 - args.label_smoothing
        alpha = np.array([certain if row.get("prob") is None else row["prob"] for row in rows], dtype=np.float64)
    pairs = PairLogps(logps, theirs, tokens, alpha, prompt_numbers(rows))
    figures = ranking(pairs, betas)
    lines = [{"where": row["where"], **line} for row, line in zip(rows, pair_lines(pairs, betas), strict=True)]
    write_lines(output / "pairs.jsonl", [finite(line) for line in lines])
    return {"reference": name, "ranking": figures}, of_ranking(figures)


def _beta_of(trained: policies.Trained) -> float:
    given = trained.options.get("set")
    beta = given.get("beta") if isinstance(given, dict) else None
    return float(beta) if isinstance(beta, (int, float)) and beta > 0 else 0.1


def _sampling(args: argparse.Namespace, **how: Any) -> Any:
    from ..rollout import Sampling

    return Sampling(max_new_tokens=args.max_new_tokens, stop=tuple(args.stop), **how)


def _prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    from ..data import load_prompts

    return _drawn(args, load_prompts(args.data, **options.reading(args)))


def _wins(args: argparse.Namespace, output: Path, stages: Stages) -> tuple[dict[str, Any], str]:
    from ..evaluate.games import NotFinite, elo, win_rates
    from ..evaluate.tables import of_games

    sampling = _sampling(args, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    names = distinct(args.policies)
    found = [_trained(x) if Path(x).is_dir() else policies.Trained(Path(x), "") for x in args.policies]
    both = list(zip(names, found, strict=True))
    measured = [_policy(args, trained, name) for name, trained in both]
    for policy, given in zip(measured, args.policies, strict=True):
        _there(policy.source, given)
    judge, rows = _judge(args), _prompts(args)
    where = {name: trained.folder for name, trained in both}
    _started(args, output, rows, where)
    lines = {}
    for k, policy in enumerate(measured):
        lines[policy.name] = stages.samples(f"{k + 1}", policy, rows, args.num_generations, sampling)
        policy.source.close()
    games, places = stages.games(judge, rows, lines, soft=args.soft)
    rates, strengths, missing = win_rates(games), None, None
    try:
        strengths = elo(games, prior=args.prior, interval=args.interval, seed=args.seed)
    except NotFinite as error:
        missing = f"{error}; --prior 1 takes every two policies to have drawn a game"
    report: dict[str, Any] = {"policies": {name: str(folder) for name, folder in where.items()}}
    report |= {"win_rates": rates, "elo": strengths, "no_elo": missing}
    if places.get("compared"):
        report["places"] = {key: places[key] / places["compared"] for key in ("first_place", "flipped")}
    return report, of_games(rates, strengths, missing)


def _frontier(args: argparse.Namespace, output: Path, stages: Stages) -> tuple[dict[str, Any], str]:
    import numpy as np

    from ..evaluate.frontier import as_rows, point
    from ..evaluate.tables import of_frontier, plot_frontier

    sampling = _sampling(args)
    kept = policies.checkpoints(args.policies[0])
    trained = _trained(args.policies[0])
    _, reference, name = _with_reference(args, trained)
    judge, rows = _judge(args), _prompts(args)
    where = dict(kept)
    _started(args, output, rows, {"reference": name, **where})
    measured: list[tuple[str, Callable[[], Policy]]] = [(_START, lambda: reference)]
    for label, folder in kept:
        one = policies.Trained(folder, trained.before, options=trained.options)
        measured.append((label, lambda one=one, label=label: _policy(args, one, label)))
    lines = []
    for label, make in measured:
        policy = make()
        lines.append(stages.samples(_file(label), policy, rows, args.num_generations, sampling, scored=True))
        policy.source.close()
    ratios = [stages.log_ratios(_file(label), reference, found) for (label, _), found in zip(measured, lines)]
    reference.source.close()
    points = []
    for (label, _), found, ratio in zip(measured, lines, ratios, strict=True):
        reward = stages.rewards(_file(label), judge, rows, found, lines[0]).ravel()
        k1, k3, tokens = (np.array([x for line in ratio for x in line[key]], float) for key in ("k1", "k3", "tokens"))
        prompts = np.repeat(np.arange(len(rows)), args.num_generations)
        points.append(point(label, k1, k3, reward, tokens, prompts))
    what = "reward" if judge.scores else "win rate against the start"
    if not can_plot():
        print("no plot: pip install 'xpo-fast[train]' for matplotlib")
    elif any(p.reward is not None for p in points):
        plot_frontier(points, what, output / "frontier.png")
    return {"reference": name, "reward": what, "points": as_rows(points)}, of_frontier(points, what)


def _file(label: str) -> str:
    return label.replace(" ", "-")


def distinct(names: list[str]) -> list[str]:
    """Returns the last part of each path, with a number where two are equal."""
    short = [Path(name).name or name for name in names]
    return [f"{name} {short[: i + 1].count(name)}" if short.count(name) > 1 else name for i, name in enumerate(short)]
