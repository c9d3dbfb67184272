"""The order of work on two streams, without a device: every access to memory is held against the waits between streams.

A detector of races keeps a vector clock a stream (Lamport; Mattern 1989). Two accesses to one storage, one of which
writes, must be ordered by events; so must an access and the freeing of what the other stream allocated, which its
allocator may hand out again at once.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
from xpo_fast import native
from xpo_fast.head import chunked
from xpo_fast.head.plan import Tiling
from xpo_fast.head.row_operations import OutOfPlaceRowOperations, RowOperations
from xpo_fast.head.spec import Scaling
from xpo_fast.head.units import pack

MAIN, OTHER = "the caller's stream", "the other stream"


class Detector(TorchDispatchMode):
    """What has been found out of order."""

    def __init__(self):
        super().__init__()
        self.current = MAIN
        self.clocks = {MAIN: {MAIN: 0, OTHER: 0}, OTHER: {MAIN: 0, OTHER: 0}}
        self.storages = {}  # address of a storage → (weak reference, stream that allocated it, accesses)
        self.races = []
        self.seen = {MAIN: 0, OTHER: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.note_freed()
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        self.clocks[self.current][self.current] += 1
        self.seen[self.current] += 1
        written = set()
        for argument, x in zip(func._schema.arguments, [*args, *[None] * len(func._schema.arguments)]):
            x = kwargs.get(argument.name, x)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(x):
                if isinstance(tensor, torch.Tensor):
                    self.access(tensor, writes, func)
                    written.add(tensor.untyped_storage()._cdata)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in written:
                self.access(tensor, True, func)
        return out

    def access(self, tensor, writes, func):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = StorageWeakRef(storage), self.current, []
        *_, accesses = self.storages[storage._cdata]
        now = self.clocks[self.current]
        for stream, time, wrote in accesses:
            if (writes or wrote) and time > now[stream]:
                self.races.append(f"{func} on {self.current} of {tuple(tensor.shape)}, used on {stream}")
        accesses.append((self.current, now[self.current], writes))

    def launched(self, name, reads, writes):
        """As `native.watch`: no operator stands for a launch by ctypes."""
        self.note_freed()
        self.clocks[self.current][self.current] += 1
        self.seen[self.current] += 1
        for tensors, writing in ((reads, False), (writes, True)):
            for tensor in tensors:
                self.access(tensor, writing, name)

    def note_freed(self):
        for key, (storage, stream, accesses) in list(self.storages.items()):
            if storage.expired():
                del self.storages[key]
                if any(time > self.clocks[stream][user] for user, time, _ in accesses):
                    self.races.append(f"memory of {stream} was freed while the other used it")

    # --- what streams.Lanes does

    ahead = 2

    def mark(self):
        return dict(self.clocks[self.current])

    def wait(self, event):
        if event is not None:
            mine = self.clocks[self.current]
            mine.update({stream: max(time, event[stream]) for stream, time in mine.items()})

    def join(self):
        assert self.current == MAIN
        self.wait(dict(self.clocks[OTHER]))

    @contextmanager
    def other(self):
        before, self.current = self.current, OTHER
        yield
        self.current = before


VOCAB, WIDTH = 37, 5
LENGTHS = [9, 4, 30, 1, 7, 12, 0, 6]


def operands():
    hidden, weight, bias = (oracle.normal(*s, seed=2) for s in ((80, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
    targets = oracle.tokens((80,), VOCAB, 0.0)
    targets[sum(LENGTHS) :] = oracle.IGNORE
    return hidden, weight, bias, targets


def forward(tiling, operations, save_grad=True):
    hidden, weight, bias, targets = operands()
    ref = oracle.normal(80, WIDTH, seed=3), weight, bias
    arguments = hidden, weight, bias, targets, ref, Scaling(), oracle.IGNORE
    return chunked.forward(*arguments, ("entropy", "kl"), tiling, save_grad, operations=operations)


def without_gradient(tiling, operations):
    return forward(tiling, operations, save_grad=False)


def backward(tiling, operations):
    hidden, weight, bias, targets = operands()
    upstream = {name: oracle.normal(80, seed=4) for name in ("logp", "entropy")}
    values = {"entropy": oracle.normal(80, seed=5)}
    arguments = hidden, weight, bias, targets, None, Scaling(), oracle.IGNORE
    return chunked.backward(*arguments, tiling, upstream, values, (True, True, True), operations=operations)


def unit_gradients(tiling, operations):
    """Units that fit a tile, some of them together, and one of 30 tokens, which may not."""
    hidden, weight, bias, targets = operands()
    groups = pack(torch.arange(sum(LENGTHS)), LENGTHS, tiling.tile)
    scale = torch.linspace(0.5, 1.5, 80, dtype=torch.float64)

    def coefficients(logp, group):
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            loss = torch.nn.functional.softplus(-(leaf * scale[group.positions]).sum())
            return torch.autograd.grad(loss, leaf)[0]

    arguments = hidden, weight, bias, targets, Scaling(), oracle.IGNORE, groups
    logp, grads = chunked.unit_gradients(
        *arguments, tiling, coefficients, (True, True, True), operations=operations
    )
    return logp, *grads


CALLS = [forward, without_gradient, backward, unit_gradients]
TILINGS = [Tiling(16, 4, 2), Tiling(16, 16, 2), Tiling(7, 3, 2), Tiling(64, 5, 2)]


def run(call, tiling, monkeypatch, operations=OutOfPlaceRowOperations):
    detector = Detector()
    monkeypatch.setattr(native, "watch", detector.launched)
    monkeypatch.setattr(chunked, "Lanes", lambda device, two: detector if two else pytest.fail("one stream"))
    with detector:
        found = call(tiling, operations)
        detector.note_freed()
    return found, detector


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_no_race_and_the_same_results(call, tiling, monkeypatch):
    want = call(Tiling(tiling.tile, tiling.tile), RowOperations)
    found, detector = run(call, tiling, monkeypatch)
    assert not detector.races
    assert min(detector.seen.values()) > 10
    for x, y in zip(found, want, strict=True):
        assert_close(x, y, rtol=1e-9, atol=1e-12)


# With a gradient the caller's stream waits for the last rows in any case.
@pytest.mark.parametrize(("call", "lost"), [*((call, "wait") for call in CALLS), (without_gradient, "join")])
def test_the_detector_finds_a_lost_wait(call, lost, monkeypatch):
    monkeypatch.setattr(Detector, lost, lambda *_: None)
    _, detector = run(call, Tiling(16, 4, 2), monkeypatch)
    assert detector.races


@pytest.mark.parametrize("lost", ["made", "done", "multiplied"])
def test_the_detector_finds_a_lost_event(lost, monkeypatch):
    recorded_in = {"made": "steps", "done": "rows", "multiplied": "gradient"}[lost]
    kept = Detector.mark

    def mark(self):
        return None if sys._getframe(1).f_code.co_name == recorded_in else kept(self)

    monkeypatch.setattr(Detector, "mark", mark)
    _, detector = run(unit_gradients, Tiling(16, 8, 2), monkeypatch)
    assert detector.races
