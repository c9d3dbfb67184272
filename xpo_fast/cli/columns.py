"""Writes two texts that grow: in two columns on a terminal, one after the other elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

_BETWEEN = " │ "
_LEAST = 60  # columns of a terminal for two texts side by side
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


def display_width(text: str) -> int:
    """Returns how many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def printable(text: str) -> str:
    """Returns the text without control characters other than line breaks, which could command the terminal."""
    return "".join(c for c in text.replace("\t", "    ") if c == "\n" or not unicodedata.category(c).startswith("C"))


def wrapped(text: str, width: int) -> list[str]:
    """Returns the lines of a text at most `width` columns wide, broken at spaces where there are some."""
    found = []
    for line in text.split("\n"):
        current = ""
        for word in _words(line, width):
            if current and display_width(current + word.rstrip()) > width:
                found.append(current.rstrip())
                current = word.lstrip()
            else:
                current += word
        found.append(current.rstrip())
    return found


def _words(line: str, width: int) -> Iterator[str]:
    """Yields the words of a line with the spaces behind them; a word wider than a line in pieces."""
    word = ""
    for i, c in enumerate(line):
        word += c
        ends = c == " " and i + 1 < len(line) and line[i + 1] != " "
        if ends or display_width(word) >= width:
            yield word
            word = ""
    if word:
        yield word


class Columns:
    """Two texts with titles, drawn again whenever one of them grows; used as a context manager around their growth.

    Where the output is no terminal, or a narrow one, each text is written as it comes, below its title.
    """

    def __init__(self, titles: tuple[str, str]) -> None:
        self.titles, self.texts = titles, ["", ""]
        size = shutil.get_terminal_size((0, 0))
        self._width, self._height = size.columns, size.lines
        self._drawn = 0  # rows on the screen
        self._begun: list[bool] = [False, False]
        self.beside = sys.stdout.isatty() and self._width >= _LEAST and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Columns:
        if self.beside:
            self._draw()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.beside:
            self._draw(whole=True)
        elif any(self._begun):
            print(flush=True)

    def add(self, side: int, text: str) -> None:
        """Appends to the text of side 0 or 1."""
        text = printable(text)
        self.texts[side] += text
        if self.beside:
            self._draw()
            return
        if not self._begun[side]:
            self._begun[side] = True
            print(f"{chr(10) * any(self._begun[:side])}{self.titles[side]}:", flush=True)
        print(text, end="", flush=True)

    def rows(self) -> list[str]:
        """Returns the rows of both columns."""
        half = (self._width - len(_BETWEEN)) // 2
        sides = [wrapped(text, half) for text in self.texts]
        count = max(map(len, sides))
        left, right = ([*lines, *[""] * (count - len(lines))] for lines in sides)
        rows = [f"{a}{' ' * (half - display_width(a))}{_BETWEEN}{b}" for a, b in zip(left, right)]
        a, b = self.titles
        return [f"{_BOLD}{a:<{half}}{_PLAIN}{_BETWEEN}{_BOLD}{b}{_PLAIN}", *rows]

    def _draw(self, *, whole: bool = False) -> None:
        """Draws over what was drawn. While texts grow, no more than fits on the screen: its end; at last all of it."""
        rows = self.rows()
        shown = rows if whole else rows[-max(self._height - 2, 2) :]
        up = f"\x1b[{self._drawn}A\r" if self._drawn else ""
        print(f"{up}\x1b[J" + "".join(f"{row}\n" for row in shown), end="", flush=True)
        self._drawn = len(shown)
