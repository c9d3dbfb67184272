"""Lays a record of storages out in memory as an allocator would: what a device must have for it.

On CUDA that is a model of torch's caching allocator: best fit, blocks that are split and merged with free neighbours,
and segments of 2 MiB for blocks up to 1 MiB, of 20 MiB for blocks up to 10 MiB, else of their own size, which are kept
when they are free until there is no room. On the CPU it is the system's own malloc, called in a process of its own
(`heap`).
"""

from __future__ import annotations

import bisect
import subprocess
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20
_HEAP = Path(__file__).with_name("heap.py")


class _Block:
    """A part of a segment, between its neighbours in it."""

    __slots__ = ("after", "before", "free", "number", "size")

    def __init__(self, size: int, number: int) -> None:
        self.size, self.number, self.free = size, number, False
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Pool:
    """Blocks that are free, by size. least: the smallest rest that is split off."""

    def __init__(self, least: int) -> None:
        self.least = least
        self._free: list[tuple[int, int, _Block]] = []
        self._count = 0

    def block(self, size: int) -> _Block:
        """Returns a new block, which is in use."""
        self._count += 1
        return _Block(size, self._count)

    def take(self, size: int, most: int | None = None) -> _Block | None:
        """Returns the smallest free block of at least `size` bytes, and below `most` if it is given; else None."""
        at = bisect.bisect_left(self._free, (size, 0))
        if at == len(self._free) or (most is not None and self._free[at][0] >= most):
            return None
        block = self._free.pop(at)[2]
        block.free = False
        return self.split(block, size)

    def split(self, block: _Block, size: int) -> _Block:
        """Cuts the rest of a block in use off, and frees it, if it is large enough; returns the block."""
        if block.size - size >= self.least:
            rest = self.block(block.size - size)
            rest.before, rest.after, block.after = block, block.after, rest
            if rest.after is not None:
                rest.after.before = rest
            block.size = size
            self._put(rest)
        return block

    def give(self, block: _Block) -> _Block:
        """Frees a block; returns it, merged with its free neighbours."""
        for other in (block.before, block.after):
            if other is not None and other.free:
                self.drop(other)
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if first.after is not None:
                    first.after.before = first
                block = first
        self._put(block)
        return block

    def _put(self, block: _Block) -> None:
        block.free = True
        bisect.insort(self._free, (block.size, block.number, block))

    def drop(self, block: _Block) -> None:
        """Takes a block out of those that are free."""
        at = bisect.bisect_left(self._free, (block.size, block.number))
        self._free.pop(at)
        block.free = False

    def whole(self) -> list[_Block]:
        """Returns the free blocks that are segments of their own."""
        return [block for *_, block in self._free if block.before is None and block.after is None]


class Cuda:
    """torch's caching allocator on CUDA. limit: bytes that it may take from the device; None: any number."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.taken, self.over = limit, 0, False
        self._small, self._large = _Pool(512), _Pool(_MIB + 1)

    def malloc(self, size: int) -> tuple[_Pool, _Block]:
        """Returns a block of at least `size` bytes; sets `over` where the device has no room for it."""
        size = -(-size // 512) * 512
        pool = self._small if size <= _MIB else self._large
        block = pool.take(size)
        if block is None:
            segment = (
                2 * _MIB
                if pool is self._small
                else 20 * _MIB
                if size < 10 * _MIB
                else -(-size // (2 * _MIB)) * 2 * _MIB
            )
            if self.limit is not None and self.taken + segment > self.limit:
                self._release()
                self.over |= self.taken + segment > self.limit
            self.taken += segment
            block = pool.split(pool.block(segment), size)
        return pool, block

    def free(self, held: tuple[_Pool, _Block]) -> None:
        """Frees a block of `malloc`, and keeps its memory."""
        pool, block = held
        pool.give(block)

    def _release(self) -> None:
        for pool in (self._small, self._large):
            for block in pool.whole():
                pool.drop(block)
                self.taken -= block.size


@dataclass(frozen=True)
class Peak:
    """The largest memory of a phase: what is taken from the device, and the most that is alive, with its event."""

    taken: int
    alive: int
    at: int


def peaks(
    events: Sequence[tuple[int, int]], starts: Sequence[int], device: str, limit: int | None = None
) -> tuple[list[Peak], bool]:
    """Returns the peak of each phase, and whether all of it had room.

    events: of a `Trace`. starts: where in them each phase begins; every phase has an event. limit: bytes for the
    allocator.
    """
    taken, room = _on_cuda(events, starts, limit) if device == "cuda" else (_on_cpu(events, starts), True)
    found: list[Peak] = []
    ends = [*starts[1:], len(events)]
    sizes: dict[int, int] = {}
    alive = 0
    for start, end, most in zip(starts, ends, taken, strict=True):
        best, at = -1, start
        for k in range(start, end):
            number, size = events[k]
            alive += size or -sizes[number]
            sizes[number] = size
            if alive > best:
                best, at = alive, k
        found.append(Peak(max(most, best), best, at))
    if device == "cpu" and limit is not None:
        room = max(peak.taken for peak in found) <= limit
    return found, room


def _on_cuda(events: Sequence[tuple[int, int]], starts: Sequence[int], limit: int | None) -> tuple[list[int], bool]:
    """Returns the most that is taken in each phase, and whether there was room."""
    allocator, held, found, begin = Cuda(limit), {}, [0] * len(starts), set(starts)
    phase = -1
    for at, (number, size) in enumerate(events):
        phase += at in begin
        if size:
            held[number] = allocator.malloc(size)
        else:
            allocator.free(held.pop(number))
        found[phase] = max(found[phase], allocator.taken)
    return found, not allocator.over


def _on_cpu(events: Sequence[tuple[int, int]], starts: Sequence[int]) -> list[int]:
    """Returns the most that malloc takes in each phase, from a process that calls it for each of the events.

    Where malloc cannot be asked (it is not glibc's) what is alive stands for it: zeros, which `peaks` raises to that.
    """
    numbers = array("q", [len(events), *(x for event in events for x in event), *starts])
    done = subprocess.run([sys.executable, "-I", str(_HEAP)], input=numbers.tobytes(), capture_output=True)
    if done.returncode:
        return [0] * len(starts)
    return array("q", done.stdout).tolist()
