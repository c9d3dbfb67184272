"""Reads the values of --set: hyperparameters of the method, and the settings that a command takes beside them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..wording import did_you_mean
from .parser import Setting, UsageError

# Fields of RLConfig that few runs set. Not read off RLConfig: the parser is built for every command, and importing that
# takes seconds; a test holds them together.
RL = {
    "vf_coef": Setting("X", float, "weight of the critic's loss (default: 0.1)"),
    "value_clip": Setting("X", float, "clipping range of a value around its old value (default: 0.2)"),
    "ref_mixin": Setting("X", float, "share of the policy mixed into the reference after every rollout (default: 0)"),
    "kl_target": Setting(
        "NATS",
        float,
        "adapt kl_coef, or the method's beta, towards this KL per completion (ppo_penalty: per token, to the sampler)",
    ),
    "kl_horizon": Setting(
        "N", int, "a rollout of n completions changes kl_coef by a factor within 1 ± 0.2·n/N (default: 10000)"
    ),
    "off_policy": Setting(
        "NAME",
        str,
        "importance weights, policy over sampler: none, token, sequence, or auto (default: by the method's ratio if "
        "another program samples and returns log-probs, at temperature 1 or with the temperature in them)",
    ),
    "off_policy_mode": Setting(
        "NAME", str, "weights outside their limits: truncate, to the limit, or mask, to 0 (default: truncate)"
    ),
    "off_policy_cap": Setting("X", float, "upper limit of these weights (default: 2)"),
    "off_policy_floor": Setting("X", float, "lower limit of these weights (default: 0)"),
    "generation_batch_size": Setting("N", int, "completions sampled at a time (default: 64)"),
    "overlong_buffer": Setting(
        "TOKENS", int, "last tokens over which the overlong penalty rises to 1 (default: a fifth of --max-new-tokens)"
    ),
    "missing_eos_penalty": Setting("X", float, "subtract X from the reward of a truncated completion (default: 0)"),
    "eval_generations": Setting("N", int, "completions per held-out prompt (default: 1)"),
    "show_samples": Setting(
        "N",
        int,
        "print N completions of the last rollout with every log, from the highest reward to the lowest (default: 3 "
        "completions); samples.jsonl has all of them, for datasets.load_dataset('json', data_files=…)",
    ),
}


def divided(given: Iterable[tuple[str, Any]], settings: Mapping[str, Setting]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the pairs of --set into hyperparameters of the method and checked settings."""
    values = dict(given)
    own = {name: values.pop(name) for name in [*values] if name in settings}
    for name, value in own.items():
        kind = settings[name].type
        if kind is not float and type(value) is not kind:
            what = "a whole number" if kind is int else "a name"
            raise UsageError(f"--set {name}: expected {what}, got {value!r}")
        check_like(f"--set {name}", kind(), value)
    return values, own


def check_names(method: str, given: Iterable[str], own: Iterable[str], whose: str, further: Iterable[str]) -> None:
    """Raises UsageError for names that are neither hyperparameters of the method (own) nor in `further`.

    whose: what has `further`, for the message.
    """
    refused, own, further = sorted({*given} - {*own} - {*further}), [*own], [*further]
    if refused:
        raise UsageError(
            f"--set {refused[0]}: {method} has no hyperparameter {', '.join(refused)}; "
            f"it has {', '.join(own) or 'none'}; and {whose} has {', '.join(further)}"
            f"{did_you_mean(refused[0], [*own, *further])}"
        )


def check_like(option: str, default: Any, value: Any) -> None:
    """Raises UsageError for a value that is not a switch, or not a finite number, if the default is one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"{option}: expected true or false, got {value!r}")
    elif isinstance(default, (int, float)) and not (number and math.isfinite(value)):
        raise UsageError(f"{option}: expected a number, got {value!r}")


def setting(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE; the value is read as JSON if it is JSON, else it is text."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), {"True": True, "False": False, "None": None}.get(value, value)
