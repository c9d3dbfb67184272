"""`xpo-fast rl`: train a model by rewards for its own completions."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from . import checks, config_file, dry_run, options, training
from .options import UsageError

if TYPE_CHECKING:
    import torch

    from ..rewards.model import RewardEnsemble
    from ..rl import RLConfig, RLTrainer

# Options that are fields of RLConfig by the same name: (placeholder, type, help). Not read off RLConfig: the parser is built
# for every command, and importing that takes seconds.
_METHOD_FIELDS: dict[str, tuple[str, type, str]] = {
    "advantage": (
        "NAME",
        str,
        "how rewards become advantages: auto (the method's own), gae, group, group_mean, leave_one_out, batch, "
        "batch_mean, reward",
    ),
    "gamma": ("X", float, "discount of gae (default: 1)"),
    "lam": ("X", float, "λ of gae (default: 0.95)"),
    "vf_coef": ("X", float, "what the critic's loss is multiplied by (default: 0.1)"),
    "value_clip": ("X", float, "a value's clipping range (default: 0.2)"),
    "reference": ("NAME", str, "the reference policy: auto, adapter, copy, none (default: auto)"),
    "ref_mixin": (
        "X",
        float,
        "share of the policy that goes into the reference after every rollout (default: 0)",
    ),
    "kl_coef": (
        "X",
        float,
        "weight of the divergence from the reference in the reward (default: 0.05 for ppo, else 0); in the loss it is "
        "--set beta=…",
    ),
    "kl_target": ("NATS", float, "steer kl_coef, or beta, towards this many nats per completion"),
    "kl_horizon": (
        "N",
        int,
        "a rollout of n completions changes it by a factor within 1 ± 0.2·n/N (default: 10000)",
    ),
    "off_policy": (
        "NAME",
        str,
        "truncated importance weights against the sampler's log-probs: auto, none, token, sequence",
    ),
    "off_policy_cap": ("X", float, "where they are truncated (default: 2)"),
}
_ROLLOUT_FIELDS: dict[str, tuple[str, type, str]] = {
    "num_generations": ("K", int, "completions of a prompt (default: 8)"),
    "prompts_per_rollout": ("N", int, "prompts of a rollout (default: what one step trains on)"),
    "epochs_per_rollout": ("N", int, "passes over a rollout (default: 1)"),
    "max_new_tokens": ("TOKENS", int, "longest completion (default: 256)"),
    "temperature": ("T", float, "of sampling (default: 1)"),
    "top_p": ("P", float, "nucleus sampling: smallest set of tokens with probability P (default: 1)"),
    "top_k": ("K", int, "sample from the K most likely tokens (default: all)"),
    "generation_batch_size": ("N", int, "completions sampled at a time (default: 64)"),
    "max_draws": (
        "N",
        int,
        "dynamic sampling: redraw prompts whose rewards are all equal, at most N times (default: 10 for dapo, else 1 = off)",
    ),
    "overlong": (
        "NAME",
        str,
        "truncated completions: keep, mask, penalty (default: penalty for dapo, else keep)",
    ),
    "overlong_buffer": (
        "TOKENS",
        int,
        "last tokens over which the penalty rises to 1 (default: a fifth of --max-new-tokens)",
    ),
    "missing_eos_penalty": ("X", float, "taken off the reward of a truncated completion (default: 0)"),
    "eval_generations": ("N", int, "completions of a held-out prompt (default: 1)"),
}
FIELDS = (*_METHOD_FIELDS, *_ROLLOUT_FIELDS)

ENSEMBLE_FILE = "reward_ensemble.json"
ENSEMBLE_SAMPLES = 64


# fmt: off
def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "rl", help="train a model by rewards for its own completions", formatter_class=options.Help, allow_abbrev=False,
        description="Online RL: sample completions, score them by functions, reward models or a judge, and take steps of a "
        "policy method on them. On several devices: torchrun --nproc-per-node N -m xpo_fast.cli rl …",
    )
    parser.set_defaults(run=run)
    options.add_config(parser)
    data = options.add_data(
        parser, data="rows with a prompt, text or messages, and the columns that the reward functions take",
        unit="prompts", drawn=", drawn by --seed (default: none)", held_out=0.0,
    )
    data.add_argument("--ptx-data", metavar="FILE", help="rows with a text, which ppo_ptx mixes in")

    add = parser.add_argument_group("rewards", "one or more, summed; WEIGHT is 1 if not given").add_argument
    add("--reward", metavar="FILE.py:FUNCTION[=WEIGHT]", action="append", default=[],
        help="a function f(prompts, completions, completion_ids, **columns) that returns a number or None for each; also "
        "package.module:function; may be repeated")
    add("--reward-model", metavar="FOLDER[=WEIGHT]", action="append", default=[],
        help="a model of `xpo-fast reward`, or a sequence classifier of transformers; may be repeated")
    add("--ensemble", metavar="HOW[=WEIGHT]",
        help="make one reward of all --reward-model: their mean, the worst of them, or uncertainty (the mean less "
        f"--ensemble-coef times their variance), each brought to mean 0 and deviation 1 on {ENSEMBLE_SAMPLES} completions by the "
        f"model as it begins; these moments are kept in {ENSEMBLE_FILE}, and --resume takes them from there")
    add("--ensemble-coef", metavar="X", type=float, default=1.0, help="of uncertainty: mean − X·variance")
    add("--judge", metavar="MODEL[=WEIGHT]", help="a language model that is asked for a grade, see --judge-by")
    add("--judge-by", choices=("grade", "compare"), default="grade",
        help="what it is asked: the grade of a completion, or which of two is better, all of a prompt against one another")
    add("--reward-timeout", metavar="SECONDS", type=float, help="longest call of a reward function (default: no limit)")

    add = parser.add_argument_group("method").add_argument
    add("--method", default="grpo", metavar="NAME",
        help="ppo, grpo, dr_grpo, bnpo, dapo, gspo, luspo, cispo, sapo, vespo, rloo, reinforce, ppo_penalty, ppo_ptx, "
        "nash_md, or a sum of them. With it comes what its authors add to the loss, unless it is asked otherwise: ppo's "
        "critic and divergence, dapo's dynamic sampling and overlong penalty")
    options.add_settings(add, "beta=0.04")
    _add_fields(add, _METHOD_FIELDS)
    add("--value-head-lr", metavar="X", type=float, help="learning rate of the critic's value head (default: --lr)")
    add("--no-whiten", action="store_true", help="leave gae's advantages as they are")

    add = parser.add_argument_group("rollouts").add_argument
    _add_fields(add, _ROLLOUT_FIELDS)
    add("--continuous-batching", action="store_true",
        help="sample by transformers' continuous batching on CUDA: faster, and --seed does not settle the completions")
    add("--stop", metavar="TEXT", action="append", default=[], help="a text that ends a completion; may be repeated")
    add("--server", metavar="URL", help="sample by a server of OpenAI's /v1/completions in place of the model itself; it is "
        "told of the policy by --server-lora")
    add("--server-lora", metavar="DIR", help="where adapters are put for the server to load (vLLM's runtime LoRA updating)")

    add("--server-model", metavar="NAME", help="what it serves the base model by (default: the only one that it serves)")
    add("--api-key", metavar="KEY", help="sent to it as a bearer token")

    options.add_model(parser)
    options.add_optimisation(
        parser, lr="2e-5 with --lora, 1e-6 with --full", batch="completions at a time on every device", epochs="the prompts",
        seed="of prompts, samples, order, adapter and dropout", scheduler="constant", warmup=0.0, rows=False,
    )
    options.add_head(parser)
    options.add_output(
        parser, folder="xpo-fast-rl", files="samples.jsonl, train_log.jsonl and results.json", logging=1, saving=50
    ).add_argument(
        "--show-samples", metavar="N", type=int, default=3,
        help="print N completions of the last rollout with every log, from the highest reward to the lowest; all of "
        "them are in samples.jsonl, for datasets.load_dataset('json', data_files=…) or pandas.read_json(…, lines=True)")
# fmt: on


def _add_fields(add: Any, fields: dict[str, tuple[str, type, str]]) -> None:
    for name, (metavar, kind, about) in fields.items():
        add(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, help=about)


def run(args: argparse.Namespace) -> int:
    functions, weights = _reward_functions(args)
    checks.check_training(args, training.training_arguments(args, lr=_learning_rate(args), evaluates=False))
    if args.server_lora and not args.server:
        raise UsageError("--server-lora is for --server")
    if args.server and (args.full or not args.server_lora):
        raise UsageError(
            "--server needs --lora and --server-lora DIR: else nobody tells it of the policy's new weights"
        )
    training.quiet(args)

    from ..rewards import Rewards
    from ..rewards.model import RewardEnsemble
    from ..rl import RLTrainer, last_checkpoint
    from ..rollout import ServerRollout

    output, checkpoint = (
        Path(args.output_dir),
        None if args.dry_run else training.checkpoint(args, last_checkpoint),
    )
    config = _config(args)
    train, held_out = _prompts(args)
    if args.dry_run:
        dry_run.prompts(args, config, [*args.reward, *args.reward_model, *filter(None, [args.judge])], train, held_out)
        return 0
    made_with = training.check_resume(args, checkpoint, train, lr=_learning_rate(args))
    model, tokenizer = training.load(args)
    functions += _models_that_reward(args, config.device)
    ensemble = next((f for f in functions if isinstance(f, RewardEnsemble)), None)
    moments, members = output / ENSEMBLE_FILE, [name for name, _ in map(_weighted, args.reward_model)]
    if ensemble is not None and checkpoint is not None:
        ensemble.load_moments(moments, members)
    trainer = RLTrainer(
        model,
        Rewards(functions, weights, timeout_s=args.reward_timeout),
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if args.full else training.lora(args),
        ptx_dataset=args.ptx_data,
        rollout=ServerRollout(
            args.server,
            tokenizer,
            model=args.server_model,
            api_key=args.api_key,
            push="lora",
            folder=args.server_lora,
        )
        if args.server
        else None,
        callbacks=[training.json_log(args)],
    )
    trainer.given |= made_with
    say = training.say(trainer)
    _print_header(trainer, args, say)
    if ensemble is not None and ensemble.moments is None:
        _standardise(ensemble, trainer)
        if trainer.is_world_process_zero():
            ensemble.save_moments(moments, members)
    results = training.begun(args)
    if held_out:
        results["before"] = trainer.evaluate()
    results["train"] = training.fit(
        trainer,
        checkpoint,
        lambda: config_file.write(args, output, "rl", resumed=checkpoint is not None),
    )
    if held_out:
        results["after"] = trainer.evaluate()
        say(f"\n{f'held out: {len(held_out)} prompts':<32}{'before':>10}{'after':>10}")
        for label, name in (("reward", "reward"), ("tokens", "completions/mean_length"),
                            ("share truncated", "completions/clipped_ratio")):  # fmt: skip
            before, after = (results[when][f"eval_{name}"] for when in ("before", "after"))
            say(f"{label:<32}{before:>10.3f}{after:>10.3f}")
    if trainer.is_world_process_zero():
        write_json(output / "results.json", results)
    say(
        f"\nsaved in {output}: the {'model' if args.full else 'adapter'}, samples.jsonl, train_log.jsonl, results.json\n"
        f"use it: from xpo_fast.models import load_model; model, tokenizer = load_model({str(output)!r})"
    )
    return 0


def _weighted(text: str) -> tuple[str, float]:
    """NAME[=WEIGHT]."""
    name, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UsageError(f"expected NAME=WEIGHT with a number, got {text!r}") from None


def _reward_functions(args: argparse.Namespace) -> tuple[list[Any], list[float]]:
    """Those of --reward, and the weights of all rewards. Found before anything is loaded."""
    from ..rewards import load_reward

    if not (args.reward or args.reward_model or args.judge):
        raise UsageError(
            "nothing rewards a completion: give --reward FILE.py:FUNCTION, --reward-model FOLDER or --judge MODEL"
        )
    models = args.reward_model
    if args.ensemble:
        how, _ = _weighted(args.ensemble)
        if how not in options.ENSEMBLES:
            raise UsageError(f"--ensemble: expected {', '.join(options.ENSEMBLES)}, got {how!r}")
        if len(models) < 2:
            raise UsageError(f"--ensemble takes two or more --reward-model, got {len(models)}")
        if any("=" in name for name in models):
            raise UsageError("the members of an ensemble weigh alike: give the weight of all, --ensemble HOW=WEIGHT")
        models = [args.ensemble]
    named = [*args.reward, *models, *([args.judge] if args.judge else [])]
    weights = [weight for _, weight in map(_weighted, named)]
    return [load_reward(name) for name, _ in map(_weighted, args.reward)], weights


def _models_that_reward(args: argparse.Namespace, device: torch.device) -> list[Any]:
    """The reward models and the judge, on the device that is trained on."""
    found: list[Any] = []
    for name, _ in map(_weighted, args.reward_model):
        from ..rewards.model import RewardModel

        found.append(RewardModel.load(name, device=device))
        found[-1].model.to(device)
    if args.ensemble:
        from ..rewards.model import RewardEnsemble

        found = [RewardEnsemble(found, _weighted(args.ensemble)[0], args.ensemble_coef)]
    if args.judge:
        from ..models import load_model
        from ..rewards.llm_judges import LLMJudge, TokenChoice, win_rate

        model: Any
        model, tokenizer = load_model(_weighted(args.judge)[0], device=device)
        judge = LLMJudge(TokenChoice(model.to(device), tokenizer))
        found.append(judge if args.judge_by == "grade" else win_rate(judge))
    return found


def _standardise(ensemble: RewardEnsemble, trainer: RLTrainer) -> None:
    """Bring the members to one scale on completions by the policy as it begins, on all processes to that of the first."""
    from accelerate.utils import broadcast_object_list

    prompts = [row["prompt"] for row in trainer.prompts[:ENSEMBLE_SAMPLES]]
    trainer.rollout.update(trainer.accelerator.unwrap_model(trainer.model))
    samples = trainer.rollout.generate(
        prompts, -(-ENSEMBLE_SAMPLES // len(prompts)), sampling=trainer.sampling, seed=trainer.args.seed
    )
    ensemble.standardise(samples.prompts, samples.completions)
    if trainer.accelerator.num_processes > 1:
        (ensemble.moments,) = broadcast_object_list([ensemble.moments])


def _learning_rate(args: argparse.Namespace) -> float:
    return 1e-6 if args.full else 2e-5


def _config(args: argparse.Namespace) -> RLConfig:
    from ..rl import RLConfig

    return RLConfig(
        method=args.method,
        method_args=dict(args.set),
        whiten_advantages=not args.no_whiten,
        stop=tuple(args.stop),
        continuous_batching=args.continuous_batching,
        backend=args.backend,
        tile_mib=args.tile_mib,
        show_samples=args.show_samples,
        value_head_learning_rate=args.value_head_lr,
        **{name: value for name in FIELDS if (value := getattr(args, name)) is not None},
        **training.training_arguments(args, lr=_learning_rate(args), evaluates=bool(args.eval_data or args.eval_split)),
    )


def _prompts(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Prompts to train on, and prompts held out or None."""
    from ..data import load_prompts

    how = options.reading(args)
    rows = load_prompts(args.data, alike=True, **how)
    if args.eval_data:
        return rows, load_prompts(args.eval_data, alike=True, **how)
    count = options.count(args.eval_split, len(rows))
    if count == 0:
        return rows, None
    if count >= len(rows):
        raise UsageError(f"--eval-split {args.eval_split:g} of {len(rows)} prompts leaves none to train on")
    held = set(random.Random(args.seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _sampled(config: RLConfig) -> dict[str, str]:
    """Lines about what is done to a rollout, where something is."""
    lines = []
    if config.draws > 1:
        lines.append(f"prompts whose rewards are all equal are replaced, in {config.draws} draws at most (--max-draws)")
    if config.overlong_handling == "penalty":
        lines.append(f"the last {config.penalised_tokens} of {config.max_new_tokens} tokens cost up to 1 (--overlong)")
    elif config.overlong_handling == "mask":
        lines.append("truncated completions are not trained on (--overlong)")
    return {"sampling": "; ".join(lines)} if lines else {}


def _print_header(trainer: RLTrainer, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    config = trainer.args
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    how = "full fine-tuning" if args.full else f"LoRA of rank {args.lora_rank}"
    if config.bf16 or config.fp16:
        how += f", {args.dtype} mixed precision"
    rollout = (
        f"{config.prompts} prompts × {config.num_generations} completions, {config.steps_per_rollout} "
        f"{'step' if config.steps_per_rollout == 1 else 'steps'} on each; at most {config.max_new_tokens} tokens at "
        f"temperature {config.temperature:g}"
    )
    held = trainer.eval_dataset
    for name, text in {
        "model": f"{args.model}: {how}, {trained / 1e6:.2f}M trained",
        "data": f"{options.came_of(args, trainer.prompts)}: {len(trainer.prompts)} prompts to train on, {len(held) if held else 'none'} held out",
        "rewards": ", ".join(f"{w:g}*{n}" for n, w in zip(trainer.rewards.names, trainer.rewards.weights, strict=True)),
        "method": f"{trainer.objective}, advantages: {config.estimator}, lr {config.learning_rate:g}",
        "rollout": rollout,
        "reference": f"{trainer.reference}, kl_coef {config.reward_kl:g}",
        **_sampled(config),
        "steps": f"{config.max_steps}",
    }.items():
        say(f"{name:<10} {text}")
