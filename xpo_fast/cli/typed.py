"""Holds a command line as it was typed: the method and options that aliases and configuration files depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..wording import did_you_mean
from .options import OBJECTIVE_OPTIONS
from .parser import Given, Parser, UsageError, split


@dataclass(frozen=True)
class Typed:
    """A command, its parser, and all of its options as they were typed."""

    command: str
    parser: Parser
    options: Mapping[str, Given]  # by name, with dashes

    @property
    def method(self) -> str:
        """The method of --method or --loss_type, by its name in this project, or the default."""
        if "loss-type" in self.options and "method" not in self.options:
            return as_method(self.options["loss-type"], self)[0].partition("=")[2]
        given = self.options.get("method")
        return given.values[0] if given and given.values else self.parser.get_default("method") or ""


def around(command: str, parser: Parser, words: Iterable[str]) -> Typed:
    """Returns the command line as the aliases see it, with the last one of an option that came twice."""
    found: dict[str, Given] = {}
    for given in split(list(words)):
        if isinstance(given, Given):
            name = given.name.replace("_", "-")
            if parser.negated(given.name) is not None:
                name, given = name[3:], Given(name[3:], "false", [])
            found[name] = given
    return Typed(command, parser, found)


def hyperparameters(method: str, command: str) -> tuple[str, ...]:
    """Returns the names that the method takes as --set; none if there is no such method."""
    from ..methods import METHODS

    names = [part.partition("*")[2] or part for part in method.replace(" ", "").split("+")]
    own = [name for part in names if part in METHODS for name in METHODS[part].defaults]
    return (*dict.fromkeys(own), *(OBJECTIVE_OPTIONS if command in ("train", "check") else ()))


POLICY_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def loss_types() -> dict[str, str]:
    """Returns the method of each loss type of TRL's trainers on preferences, as docs/conversions.md has them."""
    from ..integrations.liger.pairs import DPO_METHODS

    same = ("aot", "aot_unpaired", "sft", "kto", "apo_zero_unpaired", "simpo")  # DPO's, KTO's, CPO's and SFT's
    return {**DPO_METHODS, **{name: name for name in same}, "sigmoid_norm": "dpo_norm", "nll": "sft"}


def as_method(given: Given, typed: Typed) -> list[str]:
    """Returns the words for --loss_type; raises UsageError for an unknown one, or other options against it."""
    if "method" in typed.options:
        raise UsageError(f"--{given.name} and --method both say what the loss is: leave one out")
    names = given.values
    known: dict[str, str] = dict(zip(POLICY_LOSS_TYPES, POLICY_LOSS_TYPES))
    if typed.command != "rl":
        from ..methods import METHODS

        known = {name: name for name in METHODS} | loss_types()
    for name in names:
        if name not in known:
            raise UsageError(f"--{given.name}: no loss type named {name!r}{did_you_mean(name, known)}")
    level = typed.options.get("importance-sampling-level")
    if level is not None and names:
        by_sequence = level.values[:1] == ["sequence"]
        if by_sequence and names[0] not in ("grpo", "luspo"):
            raise UsageError(f"--{level.name} sequence goes with --loss_type grpo or luspo, got {names[0]}")
        if not by_sequence and names[0] == "luspo":
            raise UsageError(f"--{level.name} token: luspo has the ratio of a sequence")
        known = {**known, "grpo": "gspo"} if by_sequence else known
    return [f"--method={' + '.join(known[name] for name in names)}", *["--set=variant=hard"] * ("sppo_hard" in names)]
