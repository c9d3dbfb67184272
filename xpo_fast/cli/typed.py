"""Holds a command line as it was typed: the method and options that aliases and configuration files depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import loss_types
from .options import OBJECTIVE_OPTIONS
from .parser import Given, Parser, split


@dataclass(frozen=True)
class Typed:
    """A command, its parser, and all of its options as they were typed."""

    command: str
    parser: Parser
    options: Mapping[str, Given]  # by name, with dashes

    def has(self, name: str) -> bool:
        """Returns whether the option was typed; its name has dashes."""
        return name in self.options

    @property
    def method(self) -> str:
        """The method of --method or --loss_type, by its name in this project, or the default."""
        if self.has("loss-type") and not self.has("method"):
            return loss_types.as_method(self.options["loss-type"], self.command, self.options)[0].partition("=")[2]
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
    return (*dict.fromkeys(own), *(OBJECTIVE_OPTIONS if command == "train" else ()))
