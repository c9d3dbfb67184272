"""Asks malloc of the system what it takes for a record of storages; runs alone, since it measures its own process.

Reads 64-bit numbers from stdin: the number of events, of each its storage and bytes (0: freed), and where each phase
begins. Writes the most bytes that malloc takes in each phase. Nothing is written into the memory, so that none of it
becomes resident. Beside each storage there are two objects of torch that refer to it.
"""

import ctypes
import sys
from array import array

OBJECTS = (48, 64)  # bytes of what goes and comes with a storage; chosen on five runs (docs/fit.md)
LEAST = 512  # storages below are no tensors, but nodes of autograd's graph


class Mallinfo(ctypes.Structure):
    """The result of mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def main() -> None:
    """Replays the events of stdin."""
    numbers = array("q", sys.stdin.buffer.read())
    count = numbers[0]
    starts = set(numbers[1 + 2 * count :])
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo  # AttributeError where malloc is another's
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    place = ctypes.c_void_p()

    def taken() -> int:
        info = libc.mallinfo2()
        return info.arena + info.hblkhd

    held, found, before = {}, [], taken()
    for k in range(count):
        number, size = numbers[1 + 2 * k], numbers[2 + 2 * k]
        if k in starts:
            found.append(0)
        if size >= LEAST:
            if libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(size)):
                sys.exit(f"malloc has no {size} bytes")
            held[number] = (place.value, *map(libc.malloc, OBJECTS))
        elif size:
            held[number] = (libc.malloc(size),)
        else:
            for block in held.pop(number):
                libc.free(block)
        found[-1] = max(found[-1], taken() - before)
    sys.stdout.buffer.write(array("q", found).tobytes())


if __name__ == "__main__":
    main()
