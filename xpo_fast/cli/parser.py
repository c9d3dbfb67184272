"""Parses the words of a command: options with dashes or underscores, by the names of other libraries, with short
errors.

The words are rewritten as the options that the parser declares (`spelled`), which argparse then reads. So a
configuration file, a name of TRL's and an option as it is documented take the same way, and are checked by the same
types.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from ..wording import did_you_mean

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_CHOICE = re.compile(r"invalid choice: '?(?P<given>.*?)'? \(choose from (?P<names>.*)\)$", re.DOTALL)


class UsageError(ValueError):
    """Options that do not go together; printed as one line."""


@dataclass(frozen=True)
class Setting:
    """A value of --set: the placeholder of its value, the value's type, and its help."""

    metavar: str
    type: type
    about: str


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, if there is one that is not said."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if has_default(action) else action.help


def has_default(action: argparse.Action) -> bool:
    """Returns whether an option has a default that its help does not mention."""
    value = action.default
    return value is not None and value is not False and value != [] and "(default" not in (action.help or "")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one or two lines, with the nearest names.

    rare: destinations of the options that --help leaves to --help-all.
    settings: what --set takes beside the hyperparameters of the method, by name; --help-all lists it, too.
    """

    rare: Collection[str] = ()
    settings: Mapping[str, Setting] = MappingProxyType({})

    def __init__(self, **how: Any) -> None:
        super().__init__(formatter_class=Help, allow_abbrev=False, **how)

    def format_help(self) -> str:
        """Returns the help without the rare options."""
        shown = [action for action in self._actions if action.dest not in self.rare]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, shown, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([action for action in group._group_actions if action in shown])
            formatter.end_section()
        return formatter.format_help()

    def format_help_all(self) -> str:
        """Returns the help with every option, and the settings after them."""
        formatter = self._get_formatter()
        formatter.start_section("settings, each as --set NAME=VALUE")
        for name, s in self.settings.items():
            formatter.add_argument(argparse.Action([], name, help=s.about, metavar=f"{name}={s.metavar}"))
        formatter.end_section()
        return f"{super().format_help()}\n{formatter.format_help()}"

    def error(self, message: str) -> NoReturn:
        """Prints the message, with the nearest names of an unknown choice, and where to read on; exits with code 2."""
        if choice := _CHOICE.search(message):
            message += did_you_mean(choice["given"], re.findall(r"[^\s',]+", choice["names"]))
        print(f"{self.prog}: error: {message}\nsee {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def named(self, name: str) -> argparse.Action | None:
        """Returns the action of `--name`, typed with dashes or underscores, or None."""
        return self._option_string_actions.get(f"--{name.lstrip('-').replace('_', '-')}")

    def negated(self, name: str) -> argparse.Action | None:
        """Returns the action that `--no-…` turns off, or None; an option with an optional value is a switch, too."""
        if self.named(name) is not None or not re.match(r"no[-_]", name):
            return None
        action = self.named(name[3:])
        return action if action is not None and action.nargs in (0, "?") else None

    def documented(self) -> list[argparse.Action]:
        """Returns the actions that have an option, except --help and --help-all."""
        return [a for a in self._actions if a.option_strings and a.dest != "help"]

    def exclusive(self, action: argparse.Action) -> list[argparse.Action]:
        """Returns the actions that exclude `action`."""
        groups = [g._group_actions for g in self._mutually_exclusive_groups]
        return [a for group in groups if action in group for a in group if a is not action]


class HelpAll(argparse.Action):
    """--help-all: prints every option and setting, and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        print(parser.format_help_all(), end="")
        raise SystemExit(0)


class Options(argparse.Namespace):
    """The options of one run. parser: declares them; it is no option, so `vars` does not list it."""

    __slots__ = ("parser",)

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


@dataclass(frozen=True)
class Given:
    """One option as it was typed: its name without dashes, the text after `=` or None, and the words that follow it."""

    name: str
    value: str | None
    words: list[str]

    @property
    def values(self) -> list[str]:
        """The value after `=`, or the words that follow the option."""
        return self.words if self.value is None else [self.value]

    @property
    def first(self) -> str:
        """The first of `values`; "true" for an option without a value."""
        return self.values[0] if self.values else "true"

    @property
    def typed(self) -> list[str]:
        """The words of the command line that make this option."""
        return [f"--{self.name}" + ("" if self.value is None else f"={self.value}"), *self.words]

    def switch(self) -> bool | None:
        """Returns True or False for an option written as a switch, None for another value."""
        word = self.first.lower()
        return True if word in TRUE else False if word in FALSE else None


def split(words: Sequence[str]) -> Iterator[Given | str]:
    """Yields the words before the first option, then each option with the words that follow it."""
    found: Given | None = None
    for i, word in enumerate(words):
        if word == "--":
            if found is not None:
                yield found
            yield from words[i:]
            return
        if word.startswith("--"):
            if found is not None:
                yield found
            name, sign, value = word[2:].partition("=")
            found = Given(name, value if sign else None, [])
        elif found is not None:
            found.words.append(word)
        else:
            yield word
    if found is not None:
        yield found


def spelled(
    parser: Parser, words: Sequence[str], translate: Callable[[Given], list[str]]
) -> tuple[list[str], set[str]]:
    """Returns the words as the parser declares its options, and the destinations of the switches that are turned off.

    The last one wins if a switch is turned on and off. translate: returns the words for an option that the parser does
    not have; argparse refuses those that it returns unchanged.
    """
    found: list[str] = []
    off: set[str] = set()
    for given in split(words):
        if isinstance(given, str):
            found.append(given)
            continue
        action = parser.named(given.name)
        negated = parser.negated(given.name)
        if action is not None:
            off.discard(action.dest)
            if _own(action, given, found):
                off.add(action.dest)
        elif negated is not None and given.value is None:
            off.add(negated.dest)
            found += given.words
        else:
            words_here = translate(given)
            if words_here != given.typed:
                words_here, turned_off = spelled(parser, words_here, lambda other: other.typed)
                on = (parser.named(word.partition("=")[0]) for word in words_here if word.startswith("--"))
                off = off - {action.dest for action in on if action is not None} | turned_off
            found += words_here
    return found, off


def _own(action: argparse.Action, given: Given, found: list[str]) -> bool:
    """Appends an option that the parser has to `found`; returns whether it is a switch that is turned off."""
    option, words = action.option_strings[-1], given.words
    if action.nargs == 0:
        if given.value is None and words and words[0].lower() in (*TRUE, *FALSE):
            given, words = Given(given.name, words[0], []), words[1:]
        if given.value is None or given.switch() is True:
            found += [option, *words]
        elif given.switch() is False:
            found += words
            return True
        else:
            found += [f"{option}={given.value}", *words]  # argparse says what is wrong
        return False
    if action.nargs == "?" and given.switch() is not None and given.values:  # as a configuration writes them
        found += [*([option] if given.switch() else []), *given.values[1:]]
        return not given.switch()
    if given.value is not None:
        found += [f"{option}={given.value}", *words]
    elif words and (action.nargs == "?" or _NEGATIVE.match(words[0])):
        found += [f"{option}={words[0]}", *words[1:]]
    else:
        found += [option, *words]
    return False


def unknown(parser: Parser, words: Sequence[str], names: Sequence[str], others: Iterable[Parser] = ()) -> str:
    """Returns the error message for words that nothing takes.

    names: what the command takes besides its options. others: the parsers of other commands.
    """
    said = f"unrecognized arguments: {' '.join(words)}"
    first = next((w for w in words if w.startswith("-")), "").partition("=")[0]
    having = [other.prog for other in others if first and other.named(first) is not None]
    if having:
        *some, last = having
        who = f"{', '.join(some)} and {last} have" if some else f"{last} has"
        return f"{said}; {who} it, {parser.prog} has not"
    options = [a.option_strings[-1] for a in parser.documented()] + [f"--{name}" for name in names]
    return said + (did_you_mean(first, options) if first else "")


def option(action: argparse.Action) -> Any:
    """Returns the option as it is documented, or the placeholder of a positional argument."""
    return action.option_strings[-1] if action.option_strings else action.metavar
