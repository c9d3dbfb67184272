"""Samples of a run: a few of them to look at, the rewards and lengths of all, and the differences of two texts."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data import words
from .series import number

PROMPTS = 64  # whose first and last completions are kept
_SHOWN, _PROMPT = 2000, 600  # characters of a completion and of a prompt
_MOST_WORDS = 1500  # of a text that is compared: difflib takes the square of them
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass
class Sample:
    """A completion with its score, NaN if there is none, and where it is from."""

    text: str
    where: str
    score: float = math.nan
    tokens: float = math.nan


@dataclass
class Pair:
    """Two completions of one prompt, or, if they are of two prompts, other_prompt is the second's."""

    prompt: str
    before: Sample
    after: Sample
    other_prompt: str | None = None


@dataclass
class Samples:
    """What a file of an online run's samples says: first and last completions, and each rollout's numbers."""

    first: dict[str, Sample] = field(default_factory=dict)  # by prompt
    last: dict[str, Sample] = field(default_factory=dict)
    of_last: list[tuple[str, Sample]] = field(default_factory=list)  # the last rollout, whole
    rewards: dict[int, list[float]] = field(default_factory=dict)  # by rollout
    tokens: dict[int, list[float]] = field(default_factory=dict)
    truncated: dict[int, int] = field(default_factory=dict)
    count: int = 0

    def read(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds the lines of samples.jsonl. Of each group the first completion is kept: none is picked out."""
        groups: set[Any] = set()  # of the rollout being read
        current = None
        for line in lines:
            rollout = int(x) if math.isfinite(x := number(line.get("rollout"))) else 0
            if current is not None and rollout < current:  # the run went on from an earlier checkpoint
                for numbers in (self.rewards, self.tokens, self.truncated):
                    for later in [r for r in numbers if r >= rollout]:
                        del numbers[later]
            if rollout != current:
                current, groups, self.of_last = rollout, set(), []
            reward, tokens = number(line.get("reward")), number(line.get("tokens"))
            self.rewards.setdefault(rollout, []).append(reward)
            self.tokens.setdefault(rollout, []).append(tokens)
            self.truncated[rollout] = self.truncated.get(rollout, 0) + bool(line.get("truncated"))
            prompt = text_of(line.get("prompt"))
            sample = Sample(text_of(line.get("completion")), f"rollout {rollout}", reward, tokens)
            self.of_last.append((prompt, sample))
            group = str(line.get("group"))
            if group in groups:
                continue
            groups.add(group)
            if prompt in self.first or len(self.first) < PROMPTS:
                self.first.setdefault(prompt, sample)
                self.last[prompt] = sample
        self.count = sum(map(len, self.rewards.values()))

    def pairs(self, most: int) -> tuple[list[Pair], str]:
        """Returns completions of the same prompts, early and late, or of two prompts; and a line that says which."""
        again = [p for p in self.first if self.last[p].where != self.first[p].where]
        if again:
            pairs = [Pair(p, self.first[p], self.last[p]) for p in again[:most]]
            return pairs, "The first completion of a prompt's group in the first rollout that drew it and in the last."
        firsts = list(self.first.items())
        ends = [[x for x in firsts if x[1].where == end[1].where] for end in (*firsts[:1], *firsts[-1:])]
        if not ends or ends[0] == ends[1]:
            return [], ""
        pairs = [Pair(p, a, b, other_prompt=q) for (p, a), (q, b) in zip(*ends)][:most]
        return (pairs, "No prompt was drawn twice: an early rollout is on the left, a late one on the right.")

    def extremes(self, most: int = 3) -> list[tuple[str, Sample]]:
        """Returns the samples of the last rollout with the highest and the lowest rewards, the highest first."""
        ranked = sorted((x for x in self.of_last if math.isfinite(x[1].score)), key=lambda x: -x[1].score)
        return ranked if len(ranked) <= 2 * most else ranked[:most] + ranked[-most:]


def text_of(value: Any) -> str:
    """Returns a prompt or a completion, text or messages, as text; a conversation of several turns names the roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) for m in value):
        parts = [(str(m.get("role", "")), words(m)) for m in value]
        if len(parts) == 1:
            return str(parts[0][1])
        return "\n".join(f"{role}: {text}" for role, text in parts)
    return "" if value is None else str(value)


def differences(before: str, after: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Returns both texts in parts, each with whether the other text lacks it; nothing is marked of very long texts."""
    a, b = ([w.group() for w in _WORD.finditer(text)] for text in (before, after))
    if max(len(a), len(b)) > _MOST_WORDS:
        return [(False, before)], [(False, after)]
    left: list[tuple[bool, str]] = []
    right: list[tuple[bool, str]] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for parts, words_of in ((left, a[i:j]), (right, b[k:m])):
            apart, joined = kind != "equal", "".join(words_of)
            if parts and parts[-1][0] == apart:
                parts[-1] = apart, parts[-1][1] + joined
            elif joined:
                parts.append((apart, joined))
    return left, right


def shortened(text: str, *, prompt: bool = False) -> str:
    """Returns the text as it is shown: of a long completion the beginning, of a long prompt the end."""
    most = _PROMPT if prompt else _SHOWN
    if len(text) <= most:
        return text
    left = f"{len(text) - most:,} more characters"
    return f"… ({left}) {text[-most:]}" if prompt else f"{text[:most]} … ({left})"
