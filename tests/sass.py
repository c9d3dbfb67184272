"""What the compiled kernels are made of: the instructions of a library, its loops, and how few it takes around one."""

from __future__ import annotations

import heapq
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

EXPONENTIAL = "MUFU.EX2"
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b")


class Instruction(NamedTuple):
    address: int
    guard: str | None  # a predicate, without which it is not executed
    name: str
    operands: str


class Loop(NamedTuple):
    """Instructions by their place in a kernel: the first, and the last that goes back to it."""

    first: int
    last: int


class Kernel:
    def __init__(self, instructions: list[Instruction]) -> None:
        self.instructions = instructions
        self.places = {x.address: place for place, x in enumerate(instructions)}
        self.after = [self._after(place) for place in range(len(instructions))]

    def _after(self, place: int) -> list[int]:
        x = self.instructions[place]
        following = [place + 1] * (place + 1 < len(self.instructions))
        if x.name.startswith("BRA"):
            *condition, address = x.operands.split(", ")
            target = self.places[int(address.strip("`()"), 16)]
            return [target, *(following if x.guard or condition else [])]
        return [] if x.name.startswith(("EXIT", "RET")) and x.guard is None else following

    def loops(self) -> list[Loop]:
        """By where they begin."""
        back = [(to, place) for place, after in enumerate(self.after) for to in after if to < place]
        return [Loop(first, max(p for to, p in back if to == first)) for first in sorted({to for to, _ in back})]

    def around(self, loop: Loop, exponentials: int) -> int | None:
        """The fewest instructions once around a loop on a way with so many exponentials; None if there is none."""
        counts = [x.name == EXPONENTIAL for x in self.instructions]
        start = loop.first, min(exponentials, int(counts[loop.first]))
        fewest, heap = {start: 1}, [(1, *start)]
        while heap:
            length, place, found = heapq.heappop(heap)
            if length > fewest[place, found]:
                continue
            for to in self.after[place]:
                if to == loop.first and found == exponentials:
                    return length
                if not loop.first < to <= loop.last:
                    continue
                there = to, min(exponentials, found + counts[to])
                if length + 1 < fewest.get(there, length + 2):
                    fewest[there] = length + 1
                    heapq.heappush(heap, (length + 1, *there))
        return None

    def per_logit(self, loop: Loop, exponentials: int, logits: int) -> float:
        """The fewest instructions per logit, of which so many take so many exponentials; ∞ where the loop has none.

        A compiler may have made several rounds one.
        """
        rounds = {n: self.around(loop, n * exponentials) for n in (1, 2, 4)}
        return min((length / (n * logits) for n, length in rounds.items() if length), default=float("inf"))


def parse(dump: str) -> dict[tuple[str, str], Kernel]:
    """(target, kernel) → its instructions, of what `cuobjdump -sass` prints."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    target, here = "", []
    line_of_code = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\d+) )?([\w.]+)\s*(.*?)\s*;")
    for line in dump.splitlines():
        if line.lstrip().startswith(("code for ", "Function : ")):
            name = line.split()[-1]
            if "code for" in line:
                target = name
            else:
                here = found.setdefault((target, name), [])
        elif match := line_of_code.match(line):
            here.append(Instruction(int(match[1], 16), *match.groups()[1:]))
    return {names: Kernel(code) for names, code in found.items()}


@cache
def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm: the compiler's, or Triton's."""
    spec = find_spec("triton")
    places = [Path(path).parent for path in (shutil.which("nvdisasm"),) if path]
    places += [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec and spec.origin else []
    return next((p for p in places if (p / "cuobjdump").exists() and (p / "nvdisasm").exists()), None)


def dump(library: Path) -> str:
    folder = tools()
    assert folder is not None
    command = [str(folder / "cuobjdump"), "-sass", str(library)]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=True).stdout
