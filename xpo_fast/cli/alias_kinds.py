"""Translates an option of TRL or transformers into the options of a command: one function per kind of alias."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from . import loss_types
from .parser import FALSE, TRUE, Given, UsageError
from .settings import setting
from .typed import Typed, hyperparameters


@dataclass(frozen=True)
class Alias:
    """An option of another library.

    becomes: its equivalent here, for docs/commands.md. words: returns that equivalent, or raises UsageError.
    """

    becomes: str
    words: Callable[[Given, Typed], list[str]]


def renamed(option: str) -> Alias:
    """Returns the alias of an option with another name."""

    def words(given: Given, typed: Typed) -> list[str]:
        if typed.parser.named(option) is None:
            raise UsageError(f"--{given.name} is --{option} of other commands; xpo-fast {typed.command} has none")
        return Given(option, given.value, given.words).typed

    return Alias(f"`--{option}`", words)


def with_commas(option: str) -> Alias:
    """Returns the alias of an option whose values are joined by commas."""

    def words(given: Given, typed: Typed) -> list[str]:
        return [f"--{option}={','.join(given.values)}"]

    return Alias(f"`--{option}`, with commas between", words)


def choices(what: str, **words_by_value: list[str] | str) -> Alias:
    """Returns the alias of a switch (true, false) or choice: the words for each value, or why it is refused."""

    def words(given: Given, typed: Typed) -> list[str]:
        value = (given.values[0] if given.values else "true").lower()
        value = "true" if value in TRUE else "false" if value in FALSE and "no" not in words_by_value else value
        found = words_by_value.get(value, f"it is not known here; expected {', '.join(words_by_value)}")
        if isinstance(found, str):
            raise UsageError(f"--{given.name} {value}: {found}")
        return [*found, *given.values[1:]]

    return Alias(what, words)


def hyperparameter(*names: str) -> Alias:
    """Returns the alias of the first of these hyperparameters that the method has."""

    def words(given: Given, typed: Typed) -> list[str]:
        known = hyperparameters(typed.method, typed.command)
        found = next((name for name in names if name in known), None)
        if found is None:
            raise UsageError(
                f"--{given.name}: {typed.method} has no hyperparameter {' or '.join(names)}; it has "
                f"{', '.join(known) or 'none'}"
            )
        return set_words(given, found)

    return Alias(" or ".join(f"`--set {name}=…`" for name in names), words)


def as_setting(name: str) -> Alias:
    """Returns the alias of a setting of --set."""
    return Alias(f"`--set {name}=…`", lambda given, typed: set_words(given, name))


def set_words(given: Given, name: str) -> list[str]:
    """Returns --set of a name to the value, or the values as a list, of an option."""
    value = given.values[0] if len(given.values) == 1 else json.dumps([setting(f"x={v}")[1] for v in given.values])
    if not given.values:
        value = "true"
    return [f"--set={name}={value}"]


# Arguments of the trainer that take text: 12 is a name there.
_TEXT = ("run_name", "project", "optim_args", "log_level")


def trainer_argument(given: Given, name: str) -> list[str]:
    """Returns --train of a name to the value of an option."""
    value = given.values[0] if given.values else "true"
    if name in _TEXT and not isinstance(setting(f"x={value}")[1], str):
        value = json.dumps(value)
    return [f"--train={name}={value}", *given.values[1:]]


def mixed_precision(dtype: str) -> Alias:
    """Returns the alias of --bf16 and --fp16."""

    def words(given: Given, typed: Typed) -> list[str]:
        if typed.options.get(given.name.replace("_", "-"), given).switch() is False:  # the last of them
            return []
        full, peft = typed.options.get("full"), typed.options.get("use-peft")
        every_weight = (full is not None and full.switch()) or (peft is not None and peft.switch() is False)
        if not every_weight or typed.command == "recipe":
            raise UsageError(
                f"--{given.name} is mixed precision, which goes with --full; with an adapter, --dtype {dtype} keeps "
                "the frozen weights in it, and the adapter stays float32"
            )
        for name in ("dtype", "torch-dtype", "bf16", "fp16"):
            other = typed.options.get(name)
            if other is None or name == given.name.replace("_", "-") or other.values[:1] == [dtype]:
                continue
            if name not in ("bf16", "fp16") or other.switch() is not False:
                raise UsageError(
                    f"--{given.name} is --dtype {dtype}, and {' '.join(other.typed)} asks for another: leave one of "
                    "them out"
                )
        return [f"--dtype={dtype}"]

    return Alias(f"`--dtype {dtype}`, with `--full`", words)


def loss_type(given: Given, typed: Typed) -> list[str]:
    """Translates --loss_type."""
    return loss_types.as_method(given, typed.command, typed.options)


def level(given: Given, typed: Typed) -> list[str]:
    """Translates --importance_sampling_level, which the method implies here."""
    if typed.has("loss-type"):
        return []  # read together with it
    wanted = ("gspo", "luspo") if given.values[:1] == ["sequence"] else loss_types.POLICY_LOSS_TYPES
    if typed.method not in wanted or (
        (typed.method == "luspo") != (given.values[:1] == ["sequence"]) and typed.method != "gspo"
    ):
        raise UsageError(f"--{given.name}: the method says it here; sequence is --method gspo or luspo")
    return []


def epsilon(given: Given, typed: Typed) -> list[str]:
    """Translates --epsilon, which is one bound or both."""
    known = hyperparameters(typed.method, typed.command)
    if typed.method == "cispo":
        raise UsageError(f"--{given.name}: cispo is capped by --epsilon_high alone, here --set cap=…")
    if "eps_low" in known:
        # TRL's epsilon is both bounds unless epsilon_high is given.
        both = [] if typed.has("epsilon-high") else set_words(given, "eps_high")
        return [*set_words(given, "eps_low"), *both]
    return hyperparameter("eps").words(given, typed)


def eval_strategy(given: Given, typed: Typed) -> list[str]:
    """Translates --eval_strategy."""
    value = given.values[0].lower() if given.values else ""
    if value in FALSE:
        return ["--eval-split=0"]
    if value == "steps" and typed.has("eval-steps"):
        return []
    raise UsageError(
        f"--{given.name} {value}: rows held out are evaluated before and after training, and every N steps by "
        "--eval-steps N; --eval-split 0 holds out none"
    )


def reward_funcs(given: Given, typed: Typed) -> list[str]:
    """Translates --reward_funcs of package.module.function into --reward."""
    found = []
    for name in given.values:
        module, _, function = name.rpartition(".")
        if ":" not in name and (not module or "/" in name):
            raise UsageError(
                f"--{given.name} {name}: expected package.module.function. A function of TRL's is "
                f"--reward trl.rewards:{name}, a model --reward-model {name}"
            )
        found.append(f"--reward={name}" if ":" in name else f"--reward={module}:{function}")
    return found


def hub_model_id(given: Given, typed: Typed) -> list[str]:
    """Translates --hub_model_id, the NAME of --push-to-hub."""
    push = typed.options.get("push-to-hub")
    if push is None:
        raise UsageError(f"--{given.name} is where --push-to-hub pushes: give that, too, or --push-to-hub NAME alone")
    return [] if push.switch() is False else [f"--push-to-hub={value}" for value in given.values]


def resume(given: Given, typed: Typed) -> list[str]:
    """Translates --resume_from_checkpoint."""
    if given.switch() is False:
        return []
    return ["--resume"] if given.switch() else [f"--resume={given.values[0]}", *given.values[1:]]


def use_weighting(given: Given, typed: Typed) -> list[str]:
    """Translates --use_weighting: WPO's weights, not clamped."""
    return [] if given.switch() is False else ["--set=wpo=true", "--set=clamp=false"]
