"""`xpo-fast recipe`: runs a recipe, or shows the table of recipes."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, config_file, loading, options, resuming, training
from .options import SMOLLM2
from .parser import UsageError
from .settings import setting

if TYPE_CHECKING:
    from ..recipes import Recipe
    from ..rewards.judges import Judge

GENERATOR_SPECS = (
    "llm:MODEL (a language model), server:URL (one behind a server, with --generator-tokenizer); only what it writes "
    "is used: the policy's tokenizer reads it"
)
JUDGE_SPECS = (
    "reward:FOLDER (a reward model, a router, or a sequence classifier), goal:FOLDER (a reward model by "
    "goal_conditioned, whose Q-value of an answer counts), llm:MODEL (a language model, asked in both orders), "
    "llm (that of --model as it is), server:URL (an LLM behind it, with --judge-tokenizer), function:FILE.py:NAME (a "
    "reward function; may be repeated, the sum counts)"
)


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast recipe`."""
    parser = commands.add_parser(
        "recipe",
        help="generate, judge, select, train, again: RSO, self-rewarding, RLAIF, SPPO, …",
        description="Run a recipe for iterative alignment. Every iteration's samples, judgements and selected pairs "
        "are kept in --output-dir, and a run that was stopped goes on with --resume.",
    )
    parser.set_defaults(run=run)
    options.add_config(parser, dry_run=False)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe that --list shows")
    options.add_option(parser, "--list", "show the recipes as a table; with NAME, that one in full", False)
    options.add_option(parser, "--markdown", "show all recipes in full, in Markdown", False)

    group = parser.add_argument_group("data")
    add = options.adder(group)
    about = "rows with a prompt, text or messages; chosen and rejected, or other columns that recipe and judge need"
    options.add_source(group, f"{about}; may be repeated", required=False, action="append")
    options.add_template_kwargs(group)
    add(
        "--held-out SHARE",
        "prompts of --data for the stopping rule: a count, or a share below 1; the last ones. 0: no stopping rule, "
        "every iteration is run",
        0.0,
        type=options.share,
    )
    add("--held-out-data FILE", "prompts for the stopping rule, from a file of their own")
    add("--max-length TOKENS", "longest prompt and completion of the data's own rows", 1024)

    group = parser.add_argument_group("recipe")
    add = options.adder(group)
    add("--judge SPEC", JUDGE_SPECS, [])
    about = "judge of the held-out prompts (default: --judge; where the policy judges itself, the model at the start)"
    add("--held-out-judge SPEC", about, [])
    add("--judge-tokenizer NAME", "folder or name of the tokenizer of the model behind server:")
    about = "what samples the data in the place of --model, as the critic of bpo or the optimiser of opro:"
    add("--generator SPEC", f"{about} {GENERATOR_SPECS}")
    add("--generator-tokenizer NAME", "folder or name of the tokenizer of the generator behind server:")
    about = (
        "change the recipe: iterations, draws.n, draws.temperature, draws.ask, select.beta, method.beta, reference, …"
    )
    add("--set NAME=VALUE", f"{about}; may be repeated", [], type=setting)
    add("--patience N", "stop after N iterations without a better held-out score", 1)
    add("--min-gain X", "a better score is higher by more than X", 0.0)
    add("--z Z", "and by Z standard errors of the paired difference", 0.0)
    add("--generation-batch-size N", "completions sampled at a time", 64)
    add("--max-new-tokens N", "longest completion", 256)
    add("--stop TEXT", "a text that ends a completion; may be repeated", [])

    group = parser.add_argument_group("model and optimisation")
    add = options.adder(group)
    add("--model", f"{SMOLLM2}, a folder, or a name on the Hugging Face hub", SMOLLM2)
    about = (
        "dtype of the weights; each iteration's adapter is merged into them, and 16 bits would round much of it away"
    )
    add("--dtype", about, "float32", choices=options.DTYPES)
    add("--trust-remote-code", "run code that comes with a model of the hub", False)
    add("--full", "train every weight, not an adapter", False)
    options.add_lora(group)
    options.add_steps(
        group,
        lr="5e-5 with an adapter, 1e-6 with --full",
        epochs="an iteration's data",
        max_steps="stop an iteration",
        batch="pairs or rows per batch",
    )
    about = "any other argument of the trainer (XPOConfig, RLConfig), for example --train warmup_steps=10"
    add("--train NAME=VALUE", about, [], type=setting)
    add("--seed N", "seed of samples, selection, adapter and order", 42)

    group = parser.add_argument_group("output")
    add = options.adder(group)
    add("--output-dir DIR", "folder for everything (default: xpo-fast-NAME)")
    add("--resume", "go on with the run in --output-dir", False)
    add("--overwrite", "start anew although --output-dir has a run; it is deleted", False)
    add("--keep-models", "keep every iteration's model, not only the best and the last", False)
    add("--save-steps N", "write a checkpoint every N steps", 100)
    options.add_device(group, "run")


def run(args: argparse.Namespace) -> int:
    """Runs the recipe, or shows it with --list."""
    from ..recipes import StoppingRule, card, get_recipe, markdown, override, runs_in, table

    if args.markdown:
        if args.name or args.list:
            raise UsageError("--markdown shows all recipes: leave out --list and NAME")
        print(markdown(), end="")
        return 0
    if args.list:
        print(card(args.name) if args.name else table())
        return 0
    if args.name is None:
        raise UsageError("which recipe? `xpo-fast recipe --list` shows them")
    recipe = override(get_recipe(args.name), dict(args.set))
    if args.data is None:
        raise UsageError("--data is needed: rows with a prompt")
    if recipe.judge == "self" and args.judge:
        raise UsageError(f"recipe {recipe.name} has the policy judge itself; --set judge=reward takes --judge")
    holds_out = args.held_out or args.held_out_data
    unasked = (not _asks(recipe) and args.judge) or args.held_out_judge
    if unasked and not holds_out:
        raise UsageError(
            f"recipe {recipe.name} would ask {', '.join(unasked)} nothing: it is for held-out prompts, and --held-out "
            "keeps none"
        )
    _check_used(args, recipe)
    checks.check(args)
    output = Path(args.output_dir or f"xpo-fast-{recipe.name}")
    args.output_dir = str(output)
    resuming.check_blocks(args, output, bool(runs_in(output)), "run", "run of a recipe")
    training.quiet(args)

    from transformers import logging as transformers_logging

    from ..models import load_model
    from ..recipes.loop import run as run_recipe
    from ..recipes.setup import Setup
    from ..rollout import GenerateRollout, Sampling

    transformers_logging.disable_progress_bar()
    say = functools.partial(print, flush=True)
    rows, held_out = _rows(args)
    further: dict[str, Any] = {"trust_remote_code": True} if args.trust_remote_code else {}
    lr = args.lr or (1e-6 if args.full else 5e-5)
    own = {
        "learning_rate": lr,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.grad_accum,
        "max_length": args.max_length,
        "save_steps": args.save_steps,
        "generation_batch_size": args.generation_batch_size,
        "use_cpu": args.cpu,
    }
    kwargs = options.kwargs_of(args)
    own |= {"chat_template_kwargs": kwargs} if kwargs else {}
    if twice := sorted(set(own) & set(dict(args.train))):
        raise UsageError(f"--train {twice[0]}: there is an option for it, see `xpo-fast recipe --help`")
    outcome = run_recipe(
        recipe,
        Setup(
            model=args.model,
            rows=rows,
            output=output,
            judge=judge_of(args, args.judge),
            held_out=held_out,
            held_out_judge=judge_of(args, args.held_out_judge),
            stopping=StoppingRule(args.patience, args.min_gain, args.z),
            sampling=Sampling(max_new_tokens=args.max_new_tokens, stop=tuple(args.stop)),
            training=dict(args.train) | own,
            peft_config=None if args.full else loading.lora(args),
            rollout=functools.partial(
                GenerateRollout, batch_size=args.generation_batch_size, chat_template_kwargs=kwargs
            ),
            generator=_generator(args, kwargs),
            load=lambda name: load_model(name, dtype=args.dtype, device=loading.device_of(args), **further),
            seed=args.seed,
            overwrite=args.overwrite and bool(runs_in(output)),
            begin=lambda: config_file.write(args, output, "recipe", resumed=args.resume),
            keep_models=args.keep_models,
            notes={"judge": args.judge, "held_out_judge": args.held_out_judge, "dtype": args.dtype}
            | ({"generator": args.generator} if args.generator else {}),
            say=say,
        ),
    )
    for i, score in enumerate(outcome.history):
        say(f"held-out score {'at the start' if i == 0 else f'after iteration {i}'}: {score:.4f}")
    return 0


def _asks(recipe: Recipe) -> bool:
    """Returns whether a part of the recipe asks the judge of the command line, not a reward model made before it."""
    from ..recipes.loop import parts_of

    parts = parts_of(recipe)
    made = next((k + 1 for k, part in enumerate(parts) if part.makes_reward_model), len(parts))
    return any(part.judge not in ("none", "self") for part in parts[:made])


def _check_used(args: argparse.Namespace, recipe: Recipe) -> None:
    """Raises UsageError for options that this recipe would not use."""
    from ..recipes.loop import parts_of

    if args.generator and not any(part.samples for part in parts_of(recipe)):
        raise UsageError(f"--generator: recipe {recipe.name} samples nothing before it trains: leave it out")
    served = (args.generator or "").startswith("server:")
    if bool(args.generator_tokenizer) != served:
        lacks = "server: needs --generator-tokenizer, that of the model behind it"
        raise UsageError(lacks if served else "--generator-tokenizer goes with --generator server:URL")
    kind, _, rest = (args.generator or "llm:-").partition(":")
    if kind not in ("llm", "server") or not rest:
        raise UsageError(f"--generator {args.generator}: expected {GENERATOR_SPECS}")
    if recipe.searches:
        given = {"--lr": args.lr, "--full": args.full, "--train": args.train, "--keep-models": args.keep_models}
        for option in (name for name, value in given.items() if value):
            raise UsageError(f"{option}: recipe {recipe.name} trains no weights: leave it out")


def _generator(args: argparse.Namespace, kwargs: dict[str, Any] | None) -> Any:
    """Returns the sampler that --generator names; None without one."""
    from ..rollout import GenerateRollout, ServerRollout

    if not args.generator:
        return None
    kind, _, rest = args.generator.partition(":")
    if kind == "server":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.generator_tokenizer)
        return ServerRollout(rest, tokenizer, chat_template_kwargs=kwargs)
    model, tokenizer = loading.placed(args, rest, "auto")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return GenerateRollout(model, tokenizer, batch_size=args.generation_batch_size, chat_template_kwargs=kwargs)


def _rows(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Returns rows to train on, and rows for the stopping rule."""
    from ..data import load_prompts

    how = options.reading(args)
    rows = load_prompts(args.data, **how)
    if args.held_out_data:
        return rows, load_prompts(args.held_out_data, **how)
    count = options.count(args.held_out, len(rows))
    if count >= len(rows):
        raise UsageError(f"--held-out {args.held_out:g} of {len(rows)} rows leaves none to train on")
    return rows[: len(rows) - count], rows[len(rows) - count :]


def judge_of(args: argparse.Namespace, specs: list[str]) -> Judge | None:
    """Returns the judge that the specs name, see JUDGE_SPECS; None without a spec."""
    from ..rewards.judges import FunctionJudge, RewardJudge
    from ..rewards.llm_judges import LLMJudge, SampledChoice, TokenChoice

    if not specs:
        return None
    kind, _, rest = specs[0].partition(":")
    if kind == "function":
        from ..rewards import load_reward

        if others := [spec for spec in specs if not spec.startswith("function:")]:
            raise UsageError(f"functions do not go together with another judge, {others[0]}")
        return FunctionJudge([load_reward(spec.partition(":")[2]) for spec in specs])
    if len(specs) > 1:
        raise UsageError(f"one judge, or several functions; got {', '.join(specs)}")
    if kind == "reward" and rest:
        from ..rewards.router import load_scorer

        model = load_scorer(rest, device=loading.device_of(args))
        model.model.to(loading.accelerator_of(args))
        return RewardJudge(model)
    if kind == "goal" and rest:
        from ..rewards.goals import GoalJudge

        judge = GoalJudge.load(rest, device=loading.device_of(args))
        judge.model.model.to(loading.accelerator_of(args))
        return judge
    if kind == "llm":
        return LLMJudge(TokenChoice(*loading.placed(args, rest or args.model, "auto" if rest else args.dtype)))
    if kind == "server" and rest:
        from transformers import AutoTokenizer

        from ..rollout import ServerRollout

        if not args.judge_tokenizer:
            raise UsageError("server: needs --judge-tokenizer, that of the model behind it")
        tokenizer = AutoTokenizer.from_pretrained(args.judge_tokenizer)
        return LLMJudge(SampledChoice(ServerRollout(rest, tokenizer), chat=bool(tokenizer.chat_template)))
    raise UsageError(f"--judge {specs[0]}: expected {JUDGE_SPECS}")
