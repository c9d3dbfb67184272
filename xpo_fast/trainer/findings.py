"""What a check of a run has found: findings as values, and the screen that shows them with one scored row."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("xpo_fast")

LEVELS = ("ok", "note", "doubt", "fault")
PREFLIGHT = ("off", "warn", "stop")
OPEN, CLOSE = "⟦", "⟧"  # around what is scored, where there are no colours
_GREY, _BOLD, _RED, _YELLOW, _PLAIN = "\x1b[90m", "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
_COLOURS = {"fault": _RED, "doubt": _YELLOW}
_WIDTH, _SHOWN = 110, (200, 400)  # columns of the screen; characters of a row's prompt and of its scored text


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    check: its name, such as "mask". level: "ok"; "note", which explains; "doubt", a figure worth a look; "fault",
    which is certainly not what was meant.
    """

    check: str
    level: str
    text: str

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level

    def __str__(self) -> str:
        return f"{self.check}: {self.text}"


@dataclass
class Row:
    """A scored row, to be looked at."""

    where: str  # "pairs.jsonl:17, chosen"
    tokens: Sequence[tuple[int, bool]]  # ids, and whether each is scored
    tokenizer: Any

    def text(self, *, colours: bool) -> str:
        """Returns the row on one line; a long prompt or answer keeps its ends."""
        return marked(self.tokens, self.tokenizer, colours=colours, clip=_clipped)


@dataclass
class Report:
    """The findings of a check before training, which prints as one screen."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    row: Row | None = None
    seconds: float = 0.0

    def add(self, check: str, level: str, text: str) -> None:
        """Adds a finding."""
        self.findings.append(Finding(check, level, text))

    def of(self, *levels: str) -> list[Finding]:
        """Returns the findings of these levels."""
        return [f for f in self.findings if f.level in levels]

    @property
    def faults(self) -> list[Finding]:
        """The findings that are certainly not what was meant."""
        return self.of("fault")

    @property
    def doubts(self) -> list[Finding]:
        """The findings that are worth a look."""
        return self.of("doubt")

    def log(self) -> None:
        """Logs each fault and doubt as a warning."""
        for finding in self.of("fault", "doubt"):
            logger.warning("preflight, %s: %s", finding.level, finding)

    def raise_for_faults(self) -> None:
        """Raises ValueError, which names each fault, if there are any."""
        if self.faults:
            raise ValueError(
                f"the check before training found {len(self.faults)} fault{'s' * (len(self.faults) > 1)}: "
                f"{'; '.join(map(str, self.faults))}. Mend the cause, or train all the same with preflight='warn'"
            )

    def __str__(self) -> str:
        return self.screen(colours=False)

    def screen(self, *, colours: bool | None = None) -> str:
        """Returns the report as text. colours: None for colours on a terminal that has not declined them (NO_COLOR)."""
        colours = on_terminal() if colours is None else colours
        took = f"{self.seconds:.1f} s"
        lines = [f"{'preflight':<10} {self.title:<{_WIDTH - 12 - len(took)}} {took}"]
        for finding in self.findings:
            lines += _paragraph(finding, colours)
        if self.row is not None:
            name = f"{_BOLD}row{_PLAIN}  " if colours else "row  "
            lines.append(f"{name} {self.row.where}: {self.row.text(colours=colours)}")
        return "\n".join(lines)


def _paragraph(finding: Finding, colours: bool) -> list[str]:
    wrapped = textwrap.wrap(str(finding), _WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    head = f"{finding.level:<5}"
    if colours and finding.level in _COLOURS:
        head = f"{_COLOURS[finding.level]}{head}{_PLAIN}"
    return [f"{head} {wrapped[0]}", *(f"      {line}" for line in wrapped[1:])]


def on_terminal() -> bool:
    """Returns whether stdout shows colours: a terminal, unless NO_COLOR is set (no-color.org)."""
    with contextlib.suppress(ValueError):  # of a closed stdout
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return False


def marked(
    tokens: Sequence[tuple[int, bool]],
    tokenizer: Any,
    *,
    colours: bool = False,
    clip: Callable[[str, bool], str] = lambda text, scored: text,
) -> str:
    """Returns a row as text, with what is scored marked: bold beside a grey prompt, or between ⟦ and ⟧.

    clip: shortens a part, given whether it is scored.
    """
    text = ""
    for part, scored in _parts(tokens):
        words = clip(tokenizer.decode(part), scored)
        before, after = ((_BOLD if scored else _GREY), _PLAIN) if colours else (OPEN, CLOSE) if scored else ("", "")
        text += f"{before}{words}{after}"
    return text


def _parts(tokens: Iterable[tuple[int, bool]]) -> list[tuple[list[int], bool]]:
    """Returns the runs of tokens that are scored alike."""
    parts: list[tuple[list[int], bool]] = []
    for token, scored in tokens:
        if not parts or parts[-1][1] != scored:
            parts.append(([], scored))
        parts[-1][0].append(token)
    return parts


def _clipped(text: str, scored: bool) -> str:
    text, most = text.replace("\n", "↵"), _SHOWN[scored]
    if len(text) <= most:
        return text
    start = most // 2 if scored else 0  # of a prompt the end, which the answer follows
    return f"{text[:start]} … {text[len(text) - (most - start) :]}"
