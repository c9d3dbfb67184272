"""The order of work on two streams, without a device: every access to memory is held against the waits between streams.

A detector of races keeps a vector clock a stream (Lamport; Mattern 1989). Two accesses to one storage, one of which
writes, must be ordered by events; so must an access and the freeing of what the other stream allocated, which its
allocator may hand out again at once. It watches the loops of chunked.py, and objectives with their backward.
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
import test_objective
import xpo_fast as xf
from xpo_fast import native
from xpo_fast.head import autograd, chunked, units
from xpo_fast.head.operands import Operands, Reference
from xpo_fast.head.row_operations import OutOfPlaceRowOperations, RowOperations
from xpo_fast.head.streams import Lanes
from xpo_fast.head.tiling import Tiling
from xpo_fast.head.units import pack

OPERATORS = {op._opoverload: op._init_fn for op in (autograd.token_stats, autograd.token_stats_backward)}
MAIN, OTHER = "the caller's stream", "the other stream"


class Detector(TorchDispatchMode):
    """What has been found out of order."""

    def __init__(self):
        super().__init__()
        self.current = MAIN
        self.clocks = {MAIN: {MAIN: 0, OTHER: 0}, OTHER: {MAIN: 0, OTHER: 0}}
        # Address of a storage → (weak reference, stream that allocated it, (stream, whether it wrote) → last time)
        self.storages = {}
        self.races = []
        self.seen = {MAIN: 0, OTHER: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in OPERATORS:  # what it does, one by one
            with self:
                return OPERATORS[func](*args, **kwargs)
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
            self.storages[storage._cdata] = StorageWeakRef(storage), self.current, {}
        *_, accesses = self.storages[storage._cdata]
        now = self.clocks[self.current]
        for (stream, wrote), time in accesses.items():
            if (writes or wrote) and time > now[stream]:
                self.races.append(f"{func} on {self.current} of {tuple(tensor.shape)}, used on {stream}")
        accesses[self.current, writes] = now[self.current]  # after all before it on this stream

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
                if any(time > self.clocks[stream][user] for (user, _), time in accesses.items()):
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
    ref = Reference(oracle.normal(80, WIDTH, seed=3), weight, bias)
    given = Operands(hidden, weight, targets, bias, ref=ref, ignore_index=oracle.IGNORE)
    return chunked.forward(given, ("entropy", "kl"), tiling, save_grad, operations=operations)


def without_gradient(tiling, operations):
    return forward(tiling, operations, save_grad=False)


def backward(tiling, operations):
    hidden, weight, bias, targets = operands()
    upstream = {name: oracle.normal(80, seed=4) for name in ("logp", "entropy")}
    values = {"entropy": oracle.normal(80, seed=5)}
    given = Operands(hidden, weight, targets, bias, ignore_index=oracle.IGNORE)
    return chunked.backward(given, tiling, upstream, values, (True, True, True, False), operations=operations)


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

    given = Operands(hidden, weight, targets, bias, ignore_index=oracle.IGNORE)
    needs = (True, True, True, False)
    logp, grads = chunked.unit_gradients(given, groups, tiling, coefficients, needs, operations=operations)
    return logp, *grads


def two_lanes(tile, step):
    """A tiling whose steps go over both streams."""
    return Tiling(tile, step, lanes=2)


CALLS = [forward, without_gradient, backward, unit_gradients]
TILINGS = [two_lanes(*sizes) for sizes in ((16, 4), (16, 16), (7, 3), (64, 5))]


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
    _, detector = run(call, two_lanes(16, 4), monkeypatch)
    assert detector.races


def lose_event(lost, monkeypatch):
    recorded_in = {"made": "steps", "done": "rows", "multiplied": "gradient"}[lost]
    kept = Detector.mark

    def mark(self):
        return None if sys._getframe(1).f_code.co_name == recorded_in else kept(self)

    monkeypatch.setattr(Detector, "mark", mark)


@pytest.mark.parametrize("lost", ["made", "done", "multiplied"])
def test_the_detector_finds_a_lost_event(lost, monkeypatch):
    lose_event(lost, monkeypatch)
    _, detector = run(unit_gradients, two_lanes(16, 8), monkeypatch)
    assert detector.races


# --- programs of a few lines, so that each thing to be found is looked for


def reads_what_is_not_waited_for(gpu):
    x = torch.zeros(3)
    with gpu.other():
        x.sum()


def writes_what_is_being_read(gpu):
    x = torch.zeros(3)
    made = gpu.mark()
    with gpu.other():
        gpu.wait(made)
        x.sum()
    x.zero_()


def frees_what_is_being_read(gpu):
    """Its allocator gives it to the next product of its own stream."""
    x = torch.zeros(3)
    made = gpu.mark()
    with gpu.other():
        gpu.wait(made)
        x.sum()
    del x


def frees_the_others_memory(gpu):
    with gpu.other():
        x = torch.zeros(3)
        made = gpu.mark()
    gpu.wait(made)
    x.sum()
    del x


def waits_for_an_event_before_the_work(gpu):
    x = torch.zeros(3)
    early = gpu.mark()
    x.add_(1)
    with gpu.other():
        gpu.wait(early)
        x.sum()


def writes_through_a_view(gpu):
    x = torch.zeros(3, 2)
    made = gpu.mark()
    with gpu.other():
        gpu.wait(made)
        x[1:].mul_(2)
    x.T.sum()


def waits(gpu):
    x = torch.zeros(3)
    made = gpu.mark()
    with gpu.other():
        gpu.wait(made)
        y = x + 1
        done = gpu.mark()
    x.sum()
    gpu.wait(done)
    x.add_(y)
    ended = gpu.mark()
    with gpu.other():
        gpu.wait(ended)
        del y
        torch.zeros(3)
    gpu.join()
    del x


RACES = {
    reads_what_is_not_waited_for: "sum",
    writes_what_is_being_read: "zero_",
    frees_what_is_being_read: "was freed",
    frees_the_others_memory: "was freed",
    waits_for_an_event_before_the_work: "sum",
    writes_through_a_view: "sum",
    waits: None,
}


@pytest.mark.parametrize("program", RACES)
def test_what_the_detector_finds(program):
    with Detector() as detector:
        program(detector)
        detector.note_freed()
    found = RACES[program]
    assert bool(detector.races) == (found is not None)
    assert found is None or found in detector.races[0]


# --- objectives, forward and backward

OBJECTIVES = ["dpo", "simpo", "orpo", "dpo + 0.5*sft", "kto", "grpo", "ppo"]


@pytest.fixture
def two_streams(monkeypatch):
    """Objectives on the CPU as on a device: dz in memory of its own, several tiles a call, several steps a tile."""
    detector = Detector()
    monkeypatch.setattr(chunked, "Lanes", lambda device, two: detector if two else Lanes(device, two=False))
    for module in (units, autograd):
        monkeypatch.setattr(module, "row_operations", lambda *_: OutOfPlaceRowOperations)
    fit_tiles = sys.modules["xpo_fast.head.plan"].fit_tiles

    def small(*arguments, **options):
        _, *rest = fit_tiles(*arguments, **options)
        return two_lanes(12, 4), *rest

    monkeypatch.setattr("xpo_fast.head.plan.fit_tiles", small)
    return detector


def call_objective(name, learn):
    """Loss and gradients; columns and reference as the methods want them."""
    objective = xf.Objective(name)
    method = xf.METHODS[name.partition(" ")[0]]
    hidden, weight, bias = test_objective.operands(learn)
    columns, ref = test_objective.given_to(method, hidden.shape[0])
    loss = objective(hidden, weight, test_objective.targets_of(), bias=bias, **columns, **ref).loss
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, learn, two_streams, monkeypatch):
    with two_streams as detector:
        found = call_objective(name, learn)
        detector.note_freed()
    assert not detector.races
    assert min(detector.seen.values()) > 100
    monkeypatch.undo()
    for x, y in zip(found, call_objective(name, learn), strict=True):
        assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("lost", ["wait", "made", "done", "multiplied"])
def test_the_detector_finds_what_objectives_lose(lost, learn, two_streams, monkeypatch):
    if lost == "wait":
        monkeypatch.setattr(Detector, "wait", lambda *_: None)
    else:
        lose_event(lost, monkeypatch)
    with two_streams as detector:
        call_objective("dpo", learn)
    assert detector.races


def test_the_detector_finds_memory_that_is_freed_before_the_end(two_streams, monkeypatch):
    """Log-probs alone: the join is all that keeps the buffers from the next call's products."""
    monkeypatch.setattr(Detector, "join", lambda self: None)
    hidden, weight, bias = test_objective.operands("frozen")
    with two_streams as detector, torch.no_grad():
        xf.token_logps(hidden, weight, test_objective.targets_of(), bias=bias)
        detector.note_freed()
    assert any("was freed" in race for race in detector.races)
