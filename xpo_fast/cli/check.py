"""`xpo-fast check`: checks a run of `xpo-fast train`, `reward` or `rl` without training."""

from __future__ import annotations

import argparse
import tempfile
from typing import TYPE_CHECKING, Any

from . import checks, loading, options, reward, rl, rl_rewards, settings, train, training
from .parser import UsageError

if TYPE_CHECKING:
    from ..trainer import UnitTrainer


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast check`."""
    parser = commands.add_parser(
        "check",
        help="check a run without training: rows, mask, template, reference, loss",
        description="Check a run before it is started, as `xpo-fast train`, `reward` and `rl` do before their first "
        "step, and print what is found; nothing is trained or written. It takes the options of train, so that the verb "
        "of a command can be replaced; for a reward model's method its objectives; and for a method of RL the rewards, "
        "which are asked for one rollout. Exit code 1 if there is a fault.",
    )
    parser.set_defaults(run=run, dry_run=False)
    options.add_config(parser, dry_run=False)
    about = "accepted from the configuration of a run; this command looks at everything whatever it says"
    options.add_option(parser, "--preflight", about, "warn", choices=options.PREFLIGHT)
    train.add_options(parser)
    group = parser.add_argument_group("reward models")
    reward.add_objectives(group)
    reward.add_samples(group)
    options.add_length_rule(group)
    rl_rewards.add_options(parser)
    group = parser.add_argument_group("rollouts")
    for name, field in rl.ROLLOUT_FIELDS.items():
        options.add_option(group, f"--{name.replace('_', '-')} {field.metavar}", field.about, type=field.type)


def run(args: argparse.Namespace) -> int:
    """Checks; returns 1 if there is a fault."""
    from ..methods import METHODS
    from ..rewards.spec import USES

    names = [part.rpartition("*")[2].strip() for part in args.method.split("+")]
    online = any(METHODS[name].layout == "policy" for name in names if name in METHODS)
    command = "rl" if online else "reward" if args.method in USES else "train"
    _refuse_unread(args, command)
    with tempfile.TemporaryDirectory(prefix="xpo_fast-check-") as folder:
        args.output_dir, args.report_to, args.push_to_hub = folder, "none", None
        checks.check_training(args, training.training_arguments(args, lr=train.learning_rate(args), evaluates=False))
        training.quiet(args)
        trainer, how = _online(args) if online else (_RUNS[command](args), {})
        report = trainer.preflight(**how)
    assert report is not None  # there are rows
    training.printer(trainer)(report.screen())
    return 1 if report.faults else 0


def _refuse_unread(args: argparse.Namespace, command: str) -> None:
    """Raises UsageError for options of commands that the method does not belong to."""
    added = {
        "train": (options.add_score,),
        "reward": (reward.add_objectives, reward.add_samples, options.add_length_rule),
        "rl": (rl_rewards.add_options,),
    }
    own: dict[str, list[str]] = {"train": ["ref_cache", "context"], "reward": [], "rl": []}
    for name, adders in added.items():
        parser = argparse.ArgumentParser(add_help=False)
        for add in adders:
            add(parser)
        own[name] += vars(parser.parse_args([]))
    own["rl"] += rl.ROLLOUT_FIELDS
    unread = [option for name, listed in own.items() if name != command for option in listed]
    unread += ["reference", "max_length", "max_prompt_length", "num_proc"] * (command == "rl")
    given = [f"--{name.replace('_', '-')}" for name in unread if getattr(args, name) != args.parser.get_default(name)]
    if given:
        raise UsageError(
            f"{', '.join(given)}: not read by xpo-fast {command}, which trains by {args.method}: leave it out"
        )


def _preferences(args: argparse.Namespace) -> UnitTrainer:
    objective = train.checked_objective(args.method, dict(args.set))
    return train.trainer_of(args, *train.read_rows(args, objective))


def _reward_model(args: argparse.Namespace) -> UnitTrainer:
    from ..rewards.spec import check_samples
    from ..rewards.trainer import RewardTrainer, checked_settings

    args.head_only, args.value_head_lr = False, None  # which change no figure of the check
    config = reward.config_of(args)
    checked_settings(config)
    check_samples(args.method, args.samples is not None)
    rows, held_out = reward.read_rows(args, config.spec())
    model, tokenizer = loading.load(args)
    return RewardTrainer(
        model,
        config,
        train_dataset=rows,
        eval_dataset=held_out,
        samples=args.samples,
        processing_class=tokenizer,
        peft_config=None if args.full else loading.lora(args),
    )


_RUNS = {"train": _preferences, "reward": _reward_model}


def _online(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Returns the trainer, and the arguments of its check."""
    functions, weights = rl_rewards.reward_functions(args)
    method_args, fields = settings.divided(args.set, settings.RL)

    from ..rewards import Rewards
    from ..rewards.ensemble import RewardEnsemble
    from ..rl import RLConfig, RLTrainer

    fields |= {name: value for name in rl.ROLLOUT_FIELDS if (value := getattr(args, name)) is not None}
    config = RLConfig(
        method=args.method,
        method_args=method_args,
        backend=args.backend,
        tile_mib=args.tile_mib,
        layout=args.layout,
        chat_template_kwargs=options.kwargs_of(args),
        **fields,
        **options.levers(args),
        **training.training_arguments(args, lr=train.learning_rate(args), evaluates=False),
    )
    if args.eval_split is None:
        args.eval_split = 0.0
    prompts, held_out = rl.read_prompts(args)
    model, tokenizer = loading.load(args)
    functions += rl_rewards.reward_models(args, config.device)
    trainer = RLTrainer(
        model,
        Rewards(functions, weights, timeout_s=args.reward_timeout),
        config,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if args.full else loading.lora(args),
    )
    ensemble = next((f for f in functions if isinstance(f, RewardEnsemble)), None)
    if ensemble is not None:
        rl_rewards.standardise(ensemble, trainer)
    return trainer, {"sample": True}
