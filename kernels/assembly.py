"""Reads compiled code: the innermost loops over global memory, how wide their accesses are, and their instructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Assembly:
    """How an assembly language is written, as patterns that match a line."""

    label: str  # one group: the label
    branch: str  # one group: the label branched to
    access: str  # of global memory; two groups: load or store, and the suffix that tells the size
    bytes: Callable[[str], int]  # of an access, from its suffix
    instruction: str


def _ptx_bytes(suffix: str) -> int:
    vector = re.search(r"\.v(\d)", suffix)
    return (int(vector[1]) if vector else 1) * int(re.findall(r"\d+", suffix)[-1]) // 8


def _sass_bytes(suffix: str) -> int:
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
    return int(bits[1]) // 8 if bits else 4


def _amd_bytes(suffix: str) -> int:
    dwords = re.match(r"dword(?:x(\d))?", suffix)
    return 4 * int(dwords[1] or 1) if dwords else 2 if "short" in suffix else 1


PTX = Assembly(
    label=r"^(\$\w+):",
    branch=r"\bbra(?:\.uni)?\s+(\$\w+);",
    access=r"\b(ld|st)\.global([.:\w]+)",
    bytes=_ptx_bytes,
    instruction=r"^\s[^.].*;",
)
SASS = Assembly(
    label=r"^(\.L\w+):",
    branch=r"\bBRA\b.*`\((\.L\w+)\)",
    access=r"\b(LD|ST)G(\.[.\w]+)",
    bytes=_sass_bytes,
    instruction=r"^\s+/\*[0-9a-f]+\*/.*;",
)
AMD = Assembly(
    label=r"^(\.L\w+):",
    branch=r"\bs_c?branch\w*\s+(\.L\w+)",
    access=r"\b(?:global|buffer|flat)_(load|store)_(\w+)",
    bytes=_amd_bytes,
    instruction=r"^\s+[a-z]",
)


@dataclass(frozen=True)
class Loop:
    """An innermost loop that accesses global memory: what one thread does in one round of it."""

    instructions: int
    loads: int  # bytes
    stores: int  # bytes
    wide: bool  # whether every access moves 8 bytes or more

    def rounds_of(self, other: Loop) -> int:
        """Returns how many rounds of `other` one round of this loop is, unrolled; 0 if it is not that loop."""
        times = (self.loads + self.stores) // (other.loads + other.stores)
        return times if (times * other.loads, times * other.stores) == (self.loads, self.stores) else 0


def loops(assembly: Assembly, text: str) -> list[Loop]:
    """Returns the innermost loops that access global memory: from a label to the last branch back to it."""
    lines = text.splitlines()
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for n, line in enumerate(lines):
        if label := re.search(assembly.label, line):
            labels[label[1]] = n
        branch = re.search(assembly.branch, line)
        if branch and branch[1] in labels:
            ends[labels[branch[1]]] = n
    found = []
    for start, end in ends.items():
        if any(start < other < end for other in ends):
            continue
        body = lines[start : end + 1]
        moved = {"l": 0, "s": 0}
        widths = []
        for kind, suffix in (access for line in body for access in re.findall(assembly.access, line)):
            widths.append(assembly.bytes(suffix))
            moved[kind[0].lower()] += widths[-1]
        if widths:
            count = sum(bool(re.search(assembly.instruction, line)) for line in body)
            found.append(Loop(count, moved["l"], moved["s"], min(widths) >= 8))
    return found


def instructions_per_logit(ptx: str, sass: str, columns: float) -> float:
    """Returns the instructions per logit of the most expensive loop over a row; 0 if no loop of SASS is one of PTX.

    Loops whose accesses are all wide are preferred to the others. The assembler unrolls loops; how often follows from
    the bytes that a round moves. columns: logits per thread in one round of the loop, as the kernel has it.
    """
    before = loops(PTX, ptx)
    after = loops(SASS, sass)
    most = 0.0
    for loop in [loop for loop in after if loop.wide] or after:
        rounds = min((times for other in before if (times := loop.rounds_of(other))), default=0)
        if rounds:
            most = max(most, loop.instructions / (rounds * columns))
    return round(most, 2)
