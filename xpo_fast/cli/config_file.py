"""Reads options from the file of --config, and writes the options of a run as such a file."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_atomically
from ..wording import did_you_mean
from . import aliases
from .options import NOT_OF_A_RUN
from .parser import FALSE, TRUE, Given, Parser, UsageError, spelled
from .typed import Typed, around, hyperparameters

FILE = "config.yaml"
# Options whose value is a list with commas between, which a file may write as a list.
_WITH_COMMAS = ("lora_targets", "objectives", "objective_weights")
_SETTINGS = ("set", "train")  # options NAME=VALUE that are taken from file and command line both
_MAPPINGS = (*_SETTINGS, "columns", "chat_template_kwargs")  # options that a file may write as a mapping


def words(path: str, command: str, parser: Parser, typed: list[str]) -> list[str]:
    """Returns the options of a YAML or JSON file as words of a command line.

    typed: the words of the command line, which win: an option of the file is left out if it was typed, or excludes one
    that was; --set and --train are merged, name by name. Every value is checked by the type of its option. Raises
    UsageError with the file and the line.
    """
    alone = around(command, parser, typed)
    entries = [
        (where, one)
        for where, given in _read(Path(path))
        if not aliases.overridden(given.name, alone)
        for one in _repeated(parser, given, where)
    ]
    from_file = [word for _, given in entries for word in given.typed]
    both = around(command, parser, [*from_file, *typed])
    taken, off = spelled(parser, typed, lambda given: aliases.translate(given, both))
    kept_out = set(off)
    for word in taken:
        action = parser.named(word.partition("=")[0]) if word.startswith("--") else None
        if action is not None and action.dest not in _SETTINGS:
            kept_out |= {action.dest, *(other.dest for other in parser.exclusive(action))}
    found: list[str] = []
    for where, given in entries:
        if aliases.overridden("method", alone):
            _check_setting(given, both, where)
        if parser.named(given.name) is None and not _known(given, both):
            options = [a.option_strings[-1].lstrip("-") for a in parser.documented()]
            near = did_you_mean(given.name, [*options, *aliases.names(both)])
            raise UsageError(f"{where}: xpo-fast {command} has no option {given.name}{near}")
        try:
            own, _ = spelled(parser, given.typed, lambda other: aliases.translate(other, both))
            parsed = _checked(parser, own)
        except (UsageError, argparse.ArgumentError) as error:
            raise UsageError(f"{where}: {error}") from error
        found += [word for word, dest in parsed if dest not in kept_out]
    return found


def write(args: argparse.Namespace, output: Path, command: str, *, resumed: bool = False) -> None:
    """Writes the options of a run into its folder, as --config takes them, except those without a value.

    A resumed run keeps the file that it began with.
    """
    if resumed and (output / FILE).is_file():
        return
    parser, options = args.parser, {}
    for action in parser.documented():
        value = getattr(args, action.dest, None)
        if action.dest in NOT_OF_A_RUN or value is None or value == []:
            continue
        if action.dest == "lora" and not value:  # an adapter is the default: false would mean none
            continue
        beside = [other for other in parser.exclusive(action) if getattr(args, other.dest) != other.default]
        if beside and value == action.default:
            continue  # a default that another option replaces
        name = action.option_strings[-1].lstrip("-")
        if action.dest in _MAPPINGS:
            pairs = [pair for one in value for pair in (one.items() if isinstance(one, dict) else [one])]
            value = {key: _plain(x) for key, x in pairs}
        elif action.dest in _WITH_COMMAS and isinstance(value, list):
            value = ",".join(map(str, value))
        options[name] = value
    folder = str(output)
    positional = [str(args.name)] if command == "recipe" else []
    positional = [args.measure, *args.policies] if command == "evaluate" else positional
    again = ["xpo-fast", command, *positional, "--config", f"{folder}/{FILE}", "--output-dir", f"{folder}-2"]
    comment = f"# Written by xpo-fast {__version__}. The run again, in another folder:\n# {shlex.join(again)}\n"
    text = comment + _yaml().safe_dump(options, sort_keys=False, allow_unicode=True)
    write_atomically(output / FILE, text.encode())


def _plain(value: Any) -> Any:
    """Returns a value of --set as the file has it: text that looks like JSON is quoted, so it is read back as text."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
        return json.dumps(value)
    return value


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--config needs pyyaml: pip install 'xpo-fast[train]'") from error
    return yaml


def _read(path: Path) -> Iterator[tuple[str, Given]]:
    """Yields (where, option) for every entry; lists and mappings become the options of a command line."""
    yaml = _yaml()
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror}); expected a YAML or JSON file") from error
    if path.suffix.lower() == ".json":
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
        text = text.replace("\t", " ")  # JSON is YAML except for tabs, which are only between its values
    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    if document is None:
        return
    if not isinstance(document, yaml.MappingNode):
        raise UsageError(f"{path}: expected options, one NAME: VALUE per line, got a {document.id}")
    seen: set[str] = set()
    for key, node in document.value:
        where, name = f"{path}:{key.start_mark.line + 1}", str(key.value).lstrip("-")
        folded = name.replace("_", "-")
        if folded in seen:
            raise UsageError(f"{where}: {name} came twice; write a list for an option that may be repeated")
        seen.add(folded)
        if folded == "config":
            raise UsageError(f"{where}: a configuration cannot name another one; write its options here")
        yield from ((where, given) for given in _given(name, node, where))


def _given(name: str, node: Any, where: str) -> Iterator[Given]:
    dest = name.replace("-", "_")
    if node.tag.endswith(":null"):
        return  # as if the entry were not there
    if dest in _MAPPINGS:
        if node.id == "mapping":
            yield from (Given(name, f"{key.value}={_setting(value)}", []) for key, value in node.value)
        else:
            values = node.value if node.id == "sequence" else [node]
            yield from (Given(name, _text(value, where), []) for value in values)
    elif node.id == "mapping":
        if dest not in aliases.TRAINER_ARGUMENTS:
            raise UsageError(f"{where}: {name} takes one value, got a mapping")
        yield Given(name, _setting(node), [])
    elif node.id == "scalar":
        yield Given(name, _text(node, where), [])
    elif dest in _WITH_COMMAS:
        yield Given(name, ",".join(_text(value, where) for value in node.value), [])
    else:
        yield Given(name, None, [_text(value, where) for value in node.value])


def _text(node: Any, where: str) -> str:
    """Returns a value as it is written: 1e-4 is no number in YAML, and 1.10 may be text."""
    if node.id != "scalar":
        raise UsageError(f"{where}: expected a value, got a {node.id}")
    return node.value.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON's pairs of escapes


def _setting(node: Any) -> str:
    """Returns the VALUE of NAME=VALUE: text as it is written, everything else as JSON."""
    value = _value(node)
    return node.value if isinstance(value, str) else json.dumps(value)


def _value(node: Any) -> Any:
    """Returns a nested value, with plain numbers as JSON reads them: 1e-1 is text in YAML 1.1, and 0.1 here."""
    if node.id == "mapping":
        return {str(key.value): _value(value) for key, value in node.value}
    if node.id == "sequence":
        return [_value(value) for value in node.value]
    if node.style is None:
        try:
            return json.loads(node.value)
        except ValueError:
            if node.tag.endswith((":float", ":bool", ":null")):  # .inf, .5, yes, ~
                return _yaml().SafeLoader("").construct_document(node)
    return node.value


def _repeated(parser: Parser, given: Given, where: str) -> list[Given]:
    """Returns the option, once per value if values begin with dashes; UsageError if it may not be repeated."""
    dashed = next((word for word in given.words if word.startswith("--")), None)
    if dashed is None:
        return [given]
    if not isinstance(parser.named(given.name), argparse._AppendAction):
        raise UsageError(f"{where}: {given.name}: no value of its list begins with --, got {dashed!r}")
    return [Given(given.name, word, []) for word in given.words]


def _check_setting(given: Given, typed: Typed, where: str) -> None:
    """Raises UsageError for a hyperparameter of the file that the method of the command line does not have."""
    from ..methods import METHODS

    method = typed.method
    if not hyperparameters(method, "rl"):
        return  # the method is unknown, which is an error later
    name = (given.value or "").partition("=")[0].strip() if given.name == "set" else given.name.replace("-", "_")
    known = (*hyperparameters(method, typed.command), *typed.parser.settings)
    elsewhere = {key for entry in METHODS.values() for key in entry.defaults}
    declared = given.name != "set" and (typed.parser.named(given.name) is not None or name in aliases.ALIASES)
    if not declared and name in elsewhere and name not in known:
        raise UsageError(
            f"{where}: {name} is no hyperparameter of {method}, the method of the command line; it has "
            f"{', '.join(known)}: take the line out, or keep the method of the file"
        )


def _known(given: Given, typed: Typed) -> bool:
    try:
        return aliases.translate(given, typed) != given.typed
    except UsageError:
        return True


def _checked(parser: Parser, found: list[str]) -> list[tuple[str, str]]:
    """Returns (word, destination) for each, checked by type and choices; a list becomes the option repeated."""
    words: list[tuple[str, str]] = []
    action: argparse.Action | None = None
    for word in found:
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            action = parser.named(name)
            if action is None:
                raise UsageError(f"it stands for {name}, which {parser.prog} does not have")
            if action.nargs == 0:
                if sign:
                    raise argparse.ArgumentError(action, f"expected {TRUE[0]} or {FALSE[0]}, got {value!r}")
                words.append((word, action.dest))
            elif sign or action.nargs == "?":
                words.append((_of_type(parser, action, value) if sign else word, action.dest))
        else:
            if action is None:
                raise UsageError(f"one value is taken there, got another, {word!r}")
            repeated = any(dest == action.dest for _, dest in words)
            if action.nargs in ("+", "*"):
                _of_type(parser, action, word)
                words += [*[(action.option_strings[-1], action.dest)] * (not repeated), (word, action.dest)]
                continue
            if action.nargs == 0 or (repeated and not isinstance(action, argparse._AppendAction)):
                raise argparse.ArgumentError(action, f"takes one value, got another, {word!r}")
            words.append((_of_type(parser, action, word), action.dest))
    return words


def _of_type(parser: Parser, action: argparse.Action, value: str) -> str:
    parser._check_value(action, parser._get_value(action, value))
    return f"{action.option_strings[-1]}={value}"
