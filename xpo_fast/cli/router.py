"""`xpo-fast router`: trains a router between reward models of several domains."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from ..files import write_json
from ..wording import did_you_mean
from . import checks, config_file, loading, options, training
from .parser import UsageError


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast router`."""
    parser = commands.add_parser(
        "router",
        help="train a router between reward models of several domains",
        description="Put the adapters of several reward models on their one base model, and train a router that picks "
        "one of them for each prompt. The folder is used where that of a reward model is: rl, recipe, eval-reward.",
    )
    parser.set_defaults(run=run)
    options.add_config(parser, dry_run=False)
    options.add_source(parser, "rows with a prompt and the name of its expert in the column domain")
    add = options.adder(parser)
    about = "a reward model with an adapter (xpo-fast reward --lora), under the name of its domain; two or more"
    add("--expert NAME=FOLDER", about, [], required=True)
    about = "the reward of the likeliest expert alone, or all rewards weighed by the router's probabilities"
    add("--route", about, "pick", choices=("pick", "mix"))
    add("--eval-split SHARE", "rows to hold out: a count, or a share below 1", 0.2, type=options.share)
    add("--l2 X", "weight of half the squared norm of the router's weights, on standardised states", 1e-3)
    add("--seed N", "seed of the rows held out", 42)
    add("--batch-size N", "prompts per batch", 16)
    add("--dtype", f"dtype of the weights; auto: {options.AUTO_DTYPE.rstrip(',')}", "auto", choices=options.DTYPES)
    add("--output-dir DIR", "folder for the router, its experts and results.json", "xpo-fast-router")
    options.add_device(parser, "run")


def run(args: argparse.Namespace) -> int:
    """Trains the router, measures it on rows held out, and writes both."""
    folders = experts(args.expert)
    if not args.l2 > 0:
        raise UsageError(f"--l2 must be positive, got {args.l2:g}")
    checks.check(args)
    training.quiet(args)

    from ..data import DataError, load_prompts, prompt_of
    from ..rewards.router import RoutedReward

    rows = load_prompts(args.data, **options.reading(args))
    for row in rows:
        if row.get("domain") not in folders:
            near = did_you_mean(str(row.get("domain")), list(folders))
            raise DataError(
                f"{row['where']}: the domain is {row.get('domain')!r}; expected the name of an expert, "
                f"{', '.join(folders)}{near}"
            )
    random.Random(args.seed).shuffle(rows)
    count = options.count(args.eval_split, len(rows))
    held, rows = rows[:count], rows[count:]
    if not rows:
        raise UsageError(f"--eval-split {args.eval_split:g} leaves no rows to train on")
    scorer = RoutedReward.of(
        folders, how=args.route, dtype=args.dtype, device=loading.device_of(args), batch_size=args.batch_size
    )
    scorer.model.to(loading.accelerator_of(args))
    output = Path(args.output_dir)
    config_file.write(args, output, "router")
    scorer.train_router([prompt_of(row) for row in rows], [row["domain"] for row in rows], l2=args.l2)
    results = {**training.report_header(args), "rows": len(rows), "held_out": len(held)}
    for name, some in (("accuracy", rows), ("held_out_accuracy", held)):
        if some:
            picked = scorer.route([prompt_of(row) for row in some])
            right = [a == row["domain"] for a, row in zip(picked, some, strict=True)]
            results[name] = sum(right) / len(right)
            if some is held:
                results["by_domain"] = {
                    domain: sum(mine) / len(mine)
                    for domain in folders
                    if (mine := [r for r, row in zip(right, some, strict=True) if row["domain"] == domain])
                }
    scorer.save(output)
    write_json(output / "results.json", results)
    print(f"experts    {', '.join(f'{name} ({folder})' for name, folder in folders.items())}")
    print(f"data       {len(rows)} prompts to train on, {len(held)} held out")
    print(f"accuracy   {results['accuracy']:.1%} of the prompts trained on go to their expert")
    if held:
        each = ", ".join(f"{name} {share:.1%}" for name, share in results["by_domain"].items())
        print(f"held out   {results['held_out_accuracy']:.1%} ({each})")
    print(f"\nsaved in {output}: router.json, router.safetensors, a folder for each expert, results.json")
    return 0


def experts(given: list[str]) -> dict[str, str]:
    """Returns the folders of --expert by name. Raises UsageError for no name, one twice, or one that is no folder's."""
    found: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not (sign and name and folder) or name != Path(name).name or name in (".", ".."):
            raise UsageError(f"--expert {text}: expected NAME=FOLDER, the name of a domain and its reward model")
        if name in found:
            raise UsageError(f"--expert {text}: there is an expert named {name!r} already")
        found[name] = folder
    if len(found) < 2:
        raise UsageError(f"--expert: a router picks among two or more, got {', '.join(found)}")
    return found
