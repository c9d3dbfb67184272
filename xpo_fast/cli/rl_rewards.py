"""Makes the rewards of `xpo-fast rl`: functions, reward models, ensembles of them, and a judge."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from . import options
from .parser import UsageError

if TYPE_CHECKING:
    import torch

    from ..rewards.ensemble import RewardEnsemble
    from ..rl import RLTrainer

ENSEMBLE_FILE = "reward_ensemble.json"
ENSEMBLE_SAMPLES = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the rewards."""
    group = parser.add_argument_group("rewards", "one or more, summed; WEIGHT is 1 if not given")
    add = options.adder(group)
    add(
        "--reward FILE.py:FUNCTION[=WEIGHT]",
        "a function f(prompts, completions, completion_ids, **columns) that returns a number or None per completion; "
        "also package.module:function; may be repeated",
        [],
    )
    about = (
        "a folder of `xpo-fast reward` or `xpo-fast router`, or a sequence classifier of transformers; may be repeated"
    )
    add("--reward-model FOLDER[=WEIGHT]", about, [])
    about = (
        "cut what a reward model reads to this length, and warn (default: the length in its folder's "
        "reward_model.json, as a rule none)"
    )
    add("--reward-max-length TOKENS", about, type=int)
    add(
        "--ensemble HOW[=WEIGHT]",
        "combine all --reward-model into one reward: their mean, the worst of them, or uncertainty (the mean minus "
        f"--ensemble-coef times their variance), each standardised on {ENSEMBLE_SAMPLES} completions by the model at "
        f"the start; {ENSEMBLE_FILE} keeps these moments, and --resume reads them from there",
    )
    add("--ensemble-coef X", "coefficient of uncertainty: mean − X·variance", 1.0)
    add("--judge MODEL[=WEIGHT]", "a language model that grades completions, see --judge-by")
    about = "ask the judge for a grade per completion, or to compare all completions of a prompt with one another"
    add("--judge-by", about, "grade", choices=("grade", "compare"))
    add("--reward-timeout SECONDS", "longest call of a reward function (default: no limit)", type=float)


def weighted(text: str) -> tuple[str, float]:
    """Parses NAME[=WEIGHT]."""
    name, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UsageError(f"expected NAME=WEIGHT with a number, got {text!r}") from None


def reward_functions(args: argparse.Namespace) -> tuple[list[Any], list[float]]:
    """Returns the functions of --reward, and the weights of all rewards; loads no model."""
    from ..rewards import load_reward

    if not (args.reward or args.reward_model or args.judge):
        raise UsageError(
            "nothing rewards a completion: give --reward FILE.py:FUNCTION, --reward-model FOLDER or --judge MODEL"
        )
    models = args.reward_model
    if args.ensemble:
        how, _ = weighted(args.ensemble)
        if how not in options.ENSEMBLES:
            raise UsageError(f"--ensemble: expected {', '.join(options.ENSEMBLES)}, got {how!r}")
        if len(models) < 2:
            raise UsageError(f"--ensemble takes two or more --reward-model, got {len(models)}")
        if any("=" in name for name in models):
            raise UsageError("the members of an ensemble weigh alike: give the weight of all, --ensemble HOW=WEIGHT")
        models = [args.ensemble]
    named = [*args.reward, *models, *([args.judge] if args.judge else [])]
    weights = [weight for _, weight in map(weighted, named)]
    return [load_reward(name) for name, _ in map(weighted, args.reward)], weights


def reward_models(args: argparse.Namespace, device: torch.device) -> list[Any]:
    """Returns the reward models, or their ensemble, and the judge, on the device of training."""
    found: list[Any] = []
    for name, _ in map(weighted, args.reward_model):
        from ..rewards.router import load_scorer

        found.append(load_scorer(name, device=device))
        found[-1].model.to(device)
        if args.reward_max_length is not None:
            found[-1].spec = dataclasses.replace(found[-1].spec, max_length=args.reward_max_length)
    if args.ensemble:
        from ..rewards.ensemble import RewardEnsemble

        found = [RewardEnsemble(found, weighted(args.ensemble)[0], args.ensemble_coef)]
    if args.judge:
        from ..models import load_model
        from ..rewards.judges import win_rate
        from ..rewards.llm_judges import LLMJudge, TokenChoice

        model: Any
        model, tokenizer = load_model(weighted(args.judge)[0], device=device)
        judge = LLMJudge(TokenChoice(model.to(device), tokenizer))
        found.append(judge if args.judge_by == "grade" else win_rate(judge))
    return found


def standardise(ensemble: RewardEnsemble, trainer: RLTrainer) -> None:
    """Standardises the members on completions of the policy at the start; all ranks use the moments of rank 0."""
    from accelerate.utils import broadcast_object_list

    prompts = [row["prompt"] for row in trainer.prompts[:ENSEMBLE_SAMPLES]]
    trainer.rollout.update(trainer.accelerator.unwrap_model(trainer.model))
    samples = trainer.rollout.generate(
        prompts, -(-ENSEMBLE_SAMPLES // len(prompts)), sampling=trainer.sampling, seed=trainer.args.seed
    )
    ensemble.standardise(samples.prompts, samples.completions)
    if trainer.accelerator.num_processes > 1:
        (ensemble.moments,) = broadcast_object_list([ensemble.moments])
