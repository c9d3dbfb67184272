"""The parser of a command: options with dashes or underscores, by the names of other libraries, in short errors.

What is typed becomes the options that the parser declares (`spelled`), and then argparse reads it. So a configuration file, a
name of TRL's and an option as it is documented go the same way, and are checked by the same types.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from ..wording import did_you_mean

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_CHOICE = re.compile(r"invalid choice: '?(?P<given>.*?)'? \(choose from (?P<names>.*)\)$", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a line or two, with the nearest names."""

    def error(self, message: str) -> NoReturn:
        """Print the message, with the nearest names where a choice is unknown, and where to read on; exit with code 2."""
        choice = _CHOICE.search(message)
        if choice:
            message += did_you_mean(choice["given"], re.findall(r"[^\s',]+", choice["names"]))
        print(f"{self.prog}: error: {message}\nsee {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def named(self, name: str) -> argparse.Action | None:
        """Return the action of `--name`, typed with dashes or underscores, or None."""
        return self._option_string_actions.get(f"--{name.lstrip('-').replace('_', '-')}")

    def negated(self, name: str) -> argparse.Action | None:
        """Return the action that `--no-…` turns off, or None; an option that may stand without a value is a switch, too."""
        if self.named(name) is not None or not re.match(r"no[-_]", name):
            return None
        action = self.named(name[3:])
        return action if action is not None and action.nargs in (0, "?") else None

    def documented(self) -> list[argparse.Action]:
        """Return the actions that have an option, --help left out."""
        return [a for a in self._actions if a.option_strings and a.dest != "help"]

    def exclusive(self, action: argparse.Action) -> list[argparse.Action]:
        """Return the actions that may not stand beside `action`."""
        groups = [g._group_actions for g in self._mutually_exclusive_groups]
        return [a for group in groups if action in group for a in group if a is not action]


class Given:
    """One option as it was typed: its name without dashes, what was written behind `=`, and the words that follow it."""

    def __init__(self, name: str, value: str | None, words: list[str]) -> None:
        self.name, self.value, self.words = name, value, words

    @property
    def values(self) -> list[str]:
        """The value behind `=`, or the words that follow the option."""
        return self.words if self.value is None else [self.value]

    @property
    def typed(self) -> list[str]:
        """The words that it was typed as."""
        return [f"--{self.name}" + ("" if self.value is None else f"={self.value}"), *self.words]

    def switch(self) -> bool | None:
        """Return True or False for an option that is written as a switch, None where its value is another one."""
        if not self.values:
            return True
        word = self.values[0].lower()
        return True if word in TRUE else False if word in FALSE else None


def split(words: Sequence[str]) -> Iterator[Given | str]:
    """Yield the options of a command line with what follows each, and the words before the first option."""
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
    """Return the words as the parser declares its options, and the destinations of the switches that are turned off.

    Of a switch that is turned on and off the last wins. translate: the words for an option that the parser does not have;
    what it leaves as it is, argparse refuses.
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
            if _own(action, given, found):
                off.add(action.dest)
            else:
                off.discard(action.dest)
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
    """Append an option that the parser has; returns whether it is a switch that is turned off."""
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
            found += [f"{option}={given.value}", *words]  # argparse says what is wrong with it
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
    """Return what is said of words that nothing takes.

    names: what the command also takes beside its options. others: the parsers of other commands.
    """
    said = f"unrecognized arguments: {' '.join(words)}"
    first = next((w for w in words if w.startswith("-")), "").partition("=")[0]
    having = [other.prog for other in others if first and other.named(first) is not None]
    if having:
        return f"{said}; {' and '.join(having)} {'have' if having[1:] else 'has'} it, {parser.prog} has not"
    options = [a.option_strings[-1] for a in parser.documented()] + [f"--{name}" for name in names]
    return said + (did_you_mean(first, options) if first else "")


def option(action: argparse.Action) -> Any:
    """Return the option as it is documented, or the placeholder of a positional argument."""
    return action.option_strings[-1] if action.option_strings else action.metavar
