"""`xpo-fast rl`: trains a model by rewards for its own completions."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, dry_run, fit_question, loading, options, resuming, rl_rewards, settings, training
from .parser import HelpAll, Setting, UsageError
from .typed import hyperparameters

if TYPE_CHECKING:
    from ..rl import RLConfig, RLTrainer

# Options that are fields of RLConfig by the same name; settings.RL has those that few runs set. Not read off RLConfig:
# the parser is built for every command, and importing that takes seconds.
METHOD_FIELDS = {
    "advantage": Setting(
        "NAME",
        str,
        "estimator of advantages from rewards: auto (the method's own), gae, group, group_mean, leave_one_out, batch, "
        "batch_mean, reward",
    ),
    "gamma": Setting("X", float, "discount of gae (default: 1)"),
    "lam": Setting("X", float, "λ of gae (default: 0.95)"),
    "reference": Setting("NAME", str, "the reference policy: auto, adapter, copy, none (default: auto)"),
    "kl_coef": Setting(
        "X",
        float,
        "weight of the KL penalty subtracted from the reward (default: the method's own, such as 0.05 for ppo, else "
        "0); in the loss it is --set beta=…",
    ),
}
ROLLOUT_FIELDS = {
    "num_generations": Setting("K", int, "completions per prompt (default: 8)"),
    "prompts_per_rollout": Setting("N", int, "prompts per rollout (default: those of one step)"),
    "epochs_per_rollout": Setting("N", int, "passes over each rollout (default: 1)"),
    "max_new_tokens": Setting("TOKENS", int, "longest completion (default: 256)"),
    "temperature": Setting("T", float, "sampling temperature (default: 1)"),
    "top_p": Setting("P", float, "nucleus sampling: smallest set of tokens with probability P (default: 1)"),
    "top_k": Setting("K", int, "sample from the K most likely tokens (default: all)"),
    "max_draws": Setting(
        "N",
        int,
        "redraw prompts whose rewards are all equal, at most N times (default: the method's own, such as 10 for "
        "dapo, else 1 = off)",
    ),
    "overlong": Setting(
        "NAME",
        str,
        "truncated completions: keep, mask, penalty (default: the method's own, such as penalty for dapo, else keep)",
    ),
}
FIELDS = (*METHOD_FIELDS, *ROLLOUT_FIELDS)

# Options that --help leaves to --help-all.
_RARE = (
    "split columns data_config chat_template chat_template_kwargs ptx_data ensemble ensemble_coef judge_by "
    "reward_timeout reward_max_length gamma lam no_whiten value_head_lr continuous_batching stop server_model api_key "
    "server_folder server_weights server_sleeps vllm vllm_memory on_no_signal "
    "attn trust_remote_code lora_alpha lora_dropout lora_targets optim scheduler warmup_ratio "
    "warmup_steps weight_decay max_grad_norm train backend tile_mib save_total_limit report_to push_to_hub hub_private "
    "debug"
)

_PUSHES = ("server_lora", "server_weights", "server_folder")  # how a server gets the policy


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast rl`."""
    parser = commands.add_parser(
        "rl",
        help="train a model by rewards for its own completions",
        description="Online RL: sample completions, score them by functions, reward models or a judge, and take "
        "steps of a policy method on them. On several devices: torchrun --nproc-per-node N -m xpo_fast.cli rl …",
    )
    parser.set_defaults(run=run)
    parser.rare, parser.settings = _RARE.split(), settings.RL
    about = "show this help with every option, and the settings of --set"
    parser.add_argument("--help-all", nargs=0, action=HelpAll, dest="help", default=argparse.SUPPRESS, help=about)
    options.add_config(parser)
    data = options.add_data(
        parser,
        data="rows with a prompt, text or messages, and the columns that the reward functions take",
        unit="prompts",
        drawn=", drawn by --seed (default: none)",
        held_out=0.0,
    )
    options.add_option(data, "--ptx-data FILE", "rows with a text, which ppo_ptx mixes in")
    rl_rewards.add_options(parser)

    group = parser.add_argument_group("method")
    add = options.adder(group)
    add(
        "--method NAME",
        "a method of `xpo-fast methods --where data=policy`, or a sum of them. A method brings what its authors add "
        "to the loss, unless options say otherwise: ppo its critic and KL penalty, dapo dynamic sampling and the "
        "overlong penalty",
        "grpo",
    )
    options.add_settings(group, "beta=0.04", ", or a setting that --help-all lists")
    _add_fields(group, METHOD_FIELDS)
    add("--value-head-lr X", "learning rate of the critic's value head (default: --lr)", type=float)
    add("--no-whiten", "do not whiten gae's advantages", False)

    group = parser.add_argument_group("rollouts")
    add = options.adder(group)
    _add_fields(group, ROLLOUT_FIELDS)
    about = "sample by transformers' continuous batching on CUDA: faster, and --seed does not determine the completions"
    add("--continuous-batching", about, False)
    add("--stop TEXT", "a text that ends a completion; may be repeated", [])
    add(
        "--server URL",
        "sample from a server of OpenAI's /v1/completions instead of the model itself; --server-lora sends it the "
        "policy",
    )
    add("--server-lora DIR", "folder of the adapters that the server loads (vLLM's runtime LoRA updating)")
    add("--server-folder DIR", "the server is `transformers serve`: folder of the whole policies that it loads")
    about = "the server is vLLM with VLLM_SERVER_DEV_MODE=1: folder of the whole policies that it loads in place"
    add("--server-weights DIR", about)
    add("--server-sleeps", "vLLM's server sleeps while the model is trained, as it must on the same device", False)
    add("--server-model NAME", "the server's name of the base model (default: the only one that it serves)")
    add("--api-key KEY", "bearer token for the server")
    add("--vllm", "sample by a vLLM engine on this device, which sleeps while the model is trained", False)
    add("--vllm-memory SHARE", "share of the device's memory that it may take (default: 0.3)", type=float)

    options.add_model(parser)
    options.add_optimisation(
        parser,
        lr="2e-5 with --lora, 1e-6 with --full",
        batch="completions per batch and device",
        epochs="the prompts",
        seed="seed of prompts, samples, order, adapter and dropout",
        scheduler="constant",
        warmup=0.0,
        rows=False,
    )
    options.add_head(parser)
    files = "samples.jsonl, train_log.jsonl and results.json"
    options.add_output(parser, folder="xpo-fast-rl", files=files, logging=1, saving=50)


def _add_fields(group: Any, fields: dict[str, Setting]) -> None:
    for name, field in fields.items():
        options.add_option(group, f"--{name.replace('_', '-')} {field.metavar}", field.about, type=field.type)


def run(args: argparse.Namespace) -> int:
    """Trains, or with --dry-run only reports."""
    functions, weights = rl_rewards.reward_functions(args)
    checks.check_training(args, training.training_arguments(args, lr=_learning_rate(args), evaluates=False))
    _check_sampler(args)
    method_args, fields = settings.divided(args.set, settings.RL)
    if known := hyperparameters(args.method, "rl"):
        further = (*settings.RL, *options.OBJECTIVE_OPTIONS)
        settings.check_names(args.method, method_args, known, "xpo-fast rl", further)
    training.quiet(args)

    from ..rewards import Rewards
    from ..rewards.ensemble import RewardEnsemble
    from ..rl import RLTrainer, last_checkpoint

    checkpoint = None if args.dry_run else resuming.checkpoint(args, last_checkpoint)
    config = _config(args, method_args, fields)
    train, held_out = read_prompts(args)
    if args.dry_run:
        dry_run.prompts(args, config, [*args.reward, *args.reward_model, *filter(None, [args.judge])], train, held_out)
        return 0
    if args.fit:
        units = fit_question.measured_prompts(args, train, config.max_new_tokens)
        fields = {"settings": method_args, **fit_question.rl_fields(args)}
        fit_question.refuse(args, "rl", units, **fields)
    made_with = resuming.made_with(args, checkpoint, train, method_args, lr=_learning_rate(args))
    model, tokenizer = loading.load(args)
    functions += rl_rewards.reward_models(args, config.device)
    ensemble = next((f for f in functions if isinstance(f, RewardEnsemble)), None)
    moments = Path(args.output_dir) / rl_rewards.ENSEMBLE_FILE
    members = [name for name, _ in map(rl_rewards.weighted, args.reward_model)]
    if ensemble is not None and checkpoint is not None:
        ensemble.load_moments(moments, members)
    trainer = RLTrainer(
        model,
        Rewards(functions, weights, timeout_s=args.reward_timeout),
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if args.full else loading.lora(args),
        ptx_dataset=args.ptx_data,
        rollout=_rollout(args, tokenizer, config),
        callbacks=[training.json_log(args)],
    )
    trainer.given |= made_with
    say = training.printer(trainer)
    _print_header(trainer, args, say)
    training.preflight(trainer)
    if ensemble is not None and ensemble.moments is None:
        rl_rewards.standardise(ensemble, trainer)
        if trainer.is_world_process_zero():
            ensemble.save_moments(moments, members)
    results = training.report_header(args)
    if held_out:
        results["before"] = trainer.evaluate()
    training.fit(trainer, args, "rl", checkpoint, results)
    if held_out:
        results["after"] = trainer.evaluate()
        names = {
            "reward": "reward",
            "tokens": "completions/mean_length",
            "share truncated": "completions/clipped_ratio",
        }
        shown = {label: (f"eval_{name}", ".3f") for label, name in names.items()}
        training.print_held_out(say, f"held out: {len(held_out)} prompts", results, shown)
    training.finish(trainer, results, f"the {'model' if args.full else 'adapter'}, samples.jsonl, train_log.jsonl")
    return 0


def _check_sampler(args: argparse.Namespace) -> None:
    """Raises UsageError for options of samplers that do not go together."""
    for name in (*_PUSHES, "server_model", "api_key"):
        if getattr(args, name) and not args.server:
            raise UsageError(f"--{name.replace('_', '-')} is for --server")
    if args.server_sleeps and not args.server_weights:
        raise UsageError("--server-sleeps is for --server-weights")
    if args.vllm_memory is not None and not args.vllm:
        raise UsageError("--vllm-memory is for --vllm")
    if args.vllm and (args.server or args.continuous_batching):
        raise UsageError("--vllm samples on this device: leave out --server and --continuous-batching")
    named = [name for name in _PUSHES if getattr(args, name)]
    if len(named) > 1:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise UsageError(f"{words} say each how the server gets the policy: name one")
    if args.server and (not named or (args.full and args.server_lora)):
        raise UsageError(
            "--server needs what sends it the policy's new weights: --lora and --server-lora DIR, or --server-weights "
            "DIR for vLLM, or --server-folder DIR for `transformers serve`"
        )


def _rollout(args: argparse.Namespace, tokenizer: Any, config: RLConfig) -> Any:
    """Returns the sampler that the options name; None for the model itself."""
    from ..rollout import ServerRollout, TransformersRollout, VLLMRollout, VLLMServerRollout

    how: dict[str, Any] = {"chat_template_kwargs": config.chat_template_kwargs}
    if args.vllm:
        return VLLMRollout(args.model, tokenizer, memory=0.3 if args.vllm_memory is None else args.vllm_memory, **how)
    how |= {"model": args.server_model, "api_key": args.api_key}
    if args.server_weights:
        where = args.server_weights
        return VLLMServerRollout(args.server, tokenizer, folder=where, sleeps=args.server_sleeps, **how)
    if args.server_folder:
        return TransformersRollout(args.server, tokenizer, folder=args.server_folder, **how)
    if args.server:
        return ServerRollout(args.server, tokenizer, push="lora", folder=args.server_lora, **how)
    return None


def _learning_rate(args: argparse.Namespace) -> float:
    return 1e-6 if args.full else 2e-5


def _config(args: argparse.Namespace, method_args: dict[str, Any], fields: dict[str, Any]) -> RLConfig:
    from ..rl import RLConfig

    return RLConfig(
        method=args.method,
        method_args=method_args,
        whiten_advantages=not args.no_whiten,
        stop=tuple(args.stop),
        chat_template_kwargs=options.kwargs_of(args),
        continuous_batching=args.continuous_batching,
        backend=args.backend,
        tile_mib=args.tile_mib,
        tokens_per_batch=args.tokens_per_batch,
        preflight=args.preflight,
        on_no_signal=args.on_no_signal,
        layout=args.layout,
        value_head_learning_rate=args.value_head_lr,
        **{name: value for name in FIELDS if (value := getattr(args, name)) is not None},
        **{"show_samples": 3} | fields,
        **options.levers(args),
        **training.training_arguments(args, lr=_learning_rate(args), evaluates=bool(args.eval_data or args.eval_split)),
    )


def read_prompts(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Returns prompts to train on, and prompts held out or None."""
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


def _sampling(config: RLConfig) -> dict[str, str]:
    """Returns the header's line about redrawn prompts and truncated completions, if there are any."""
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
        "model": f"{args.model}: {how}, {training.weights(trainer.model, full=True)[1]} trained",
        "data": f"{options.sources(args, trainer.prompts)}: {len(trainer.prompts)} prompts to train on, "
        f"{len(held) if held else 'none'} held out",
        "rewards": ", ".join(f"{w:g}*{n}" for n, w in zip(trainer.rewards.names, trainer.rewards.weights, strict=True)),
        "method": f"{trainer.objective}, advantages: {config.estimator}, lr {config.learning_rate:g}",
        "rollout": rollout,
        "reference": f"{trainer.reference}, kl_coef {config.reward_kl:g}",
        **_sampling(config),
        "steps": f"{config.max_steps}",
    }.items():
        say(f"{name:<10} {text}")
