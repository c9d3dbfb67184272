"""Every launcher through Triton's own JIT, for a GPU that is not there: bound, specialised, compiled, and launched at a
driver that only keeps what it was given.

A new launcher needs a line in LAUNCHES.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux alone")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from xpo_fast.kernels import gates, gather, launch, logps, one_read, rows

from xpo_fast.head.gemms import aligned_rows

WIDTH = 128  # D
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


class Driver:
    """As much of a driver for an H100 or H200 as the JIT asks for."""

    def __init__(self):
        self.launches = []  # (ASTSource, grid, arguments)
        self.utils = self

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name, kernel, shared, device):
        assert kernel[:4] == b"\x7fELF"
        return object(), 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module):
        pass

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches.append((source, (x, y, z), arguments))

        return launch


@pytest.fixture
def gpu(monkeypatch):
    found = Driver()
    monkeypatch.setattr(driver, "_active", found)
    for module in gates.modules():
        for kernel in vars(gates.module(module)).values():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(launch, "target", lambda device: "sm_90")
    monkeypatch.setattr(launch, "_entries", dict)  # what was measured on this machine
    monkeypatch.setattr(logps, "_shared_limit", lambda device: 227 * 1024)
    monkeypatch.setattr(logps, "_processors", lambda device: 132)
    launch._chosen.cache_clear()
    yield found
    launch._chosen.cache_clear()


class Shape(NamedTuple):
    n: int = 6
    vocab: int = 4099
    shift: int = 0  # of what has an element a row, from where memory is aligned
    rows: Callable[..., torch.Tensor] = aligned_rows  # (n, V) memory for logits

    def tile(self, dtype=torch.float32):
        return self.rows(self.n, self.vocab, dtype, torch.device("cpu"))

    def vector(self, dtype=torch.float32):
        return torch.zeros(self.n + self.shift, dtype=dtype)[self.shift :]

    def vectors(self, names):
        return {name: self.vector() for name in names}

    def targets(self):
        return self.vector(torch.int64)

    def operands(self, dtype=torch.bfloat16):
        return torch.zeros(self.n, WIDTH, dtype=dtype), torch.zeros(self.vocab, WIDTH, dtype=dtype)


def apart(n, width, dtype, device):
    """Logits as a model gives them: one row after the other, aligned or not."""
    return torch.empty(n, width, dtype=dtype, device=device)


def head(out=(), upstream=(), grad=None, ref=False, **scaling):
    """A call of the kernel of rows.py as the head makes it."""

    def launch(s):
        bias = torch.zeros(s.vocab) if scaling else None
        reference = {"ref_products": s.tile(), "ref_bias": bias} if ref else {}
        own = None if grad is None else s.tile(grad)
        options = {**reference, **scaling, "out": s.vectors(out), "upstream": s.vectors(upstream), "grad": own}
        rows.run(s.tile(), s.targets(), bias=bias, values=s.vectors(("entropy", "reverse_kl")), **options)

    return launch


def once(out, grad=None, **scaling):
    """A call of the kernel of one_read.py as the head makes it."""

    def launch(s):
        dz = {} if grad is None else {"grad": s.tile(grad), "factor": s.vector()}
        bias = torch.zeros(s.vocab) if scaling else None
        one_read.run(s.tile(), s.targets(), bias=bias, out=s.vectors(out), **dz, **scaling)

    return launch


def fused(dtype=torch.bfloat16, names=("logp", "lse")):
    return lambda s: logps.run(*s.operands(dtype), s.targets(), out=s.vectors(names))


def gathered(dtype):
    return lambda s: gather.forward(s.tile(dtype), s.targets(), 0.7, -100)


def gather_gradient(dtype, in_place):
    def launch(s):
        logits, normaliser = s.tile(dtype), torch.zeros(2, s.n)
        out = logits if in_place else s.tile(dtype)
        gather.write_gradient(logits, s.targets(), normaliser, s.vector(), 0.7, -100, out)

    return launch


class Launch(NamedTuple):
    kernels: tuple[str, ...]  # in their order
    launch: Callable[[Shape], object]
    aligned: tuple[str, ...]  # of the first kernel, at an odd vocabulary: multiples of 16, or True
    compiled: bool = False  # here, not only specialised
    most: int = 2  # variants over VOCABULARIES in the head's memory: a multiple of 16 or not


TILE = ("products", "stride")
DZ = ("grad", "grad_stride")
REF = ("ref_products", "ref_stride")
EVERYTHING = {"softcap": 30.0, "temperature": 0.7, "logit_scale": 0.5}
LAUNCHES = {
    "log-probs": Launch(("one_read",), once(("logp", "lse")), TILE, most=1),
    "log-probs and dz": Launch(
        ("one_read",), once(("logp", "lse"), torch.bfloat16), (*TILE, *DZ), compiled=True, most=1
    ),
    "log-probs, statistics and dz": Launch(
        ("one_read",), once(one_read.STATISTICS, torch.float32, **EVERYTHING), (*TILE, *DZ, "bias"), most=1
    ),
    "log-probs and dz in float16": Launch(
        ("row_pass",), head(("logp", "lse"), ("logp",), torch.float16), (*TILE, *DZ), most=1
    ),
    "statistics": Launch(("row_pass",), head(rows.STATISTICS, ref=True, **EVERYTHING), (*TILE, *REF, "bias"), most=1),
    "gradient": Launch(
        ("row_pass",), head((), rows.DIFFERENTIABLE, torch.float16, ref=True), (*TILE, *REF, *DZ), compiled=True, most=1
    ),
    "gradient in float32": Launch(("row_pass",), head((), ("logp", "lse"), torch.float32), (*TILE, *DZ), most=1),
    "fused log-probs": Launch(
        ("logps_pass", "logps_join"), fused(),
        ("hidden", "weight", "hidden_stride", "weight_stride", "width"), compiled=True, most=1,
    ),
    "fused entropy in float32": Launch(
        ("logps_pass", "logps_join"), fused(torch.float32, logps.STATISTICS), ("hidden", "weight", "width"), most=1
    ),
    "gather": Launch(("gather_forward",), gathered(torch.bfloat16), ("logits", "stride", "ALIGNED"), compiled=True),
    "gather's gradient": Launch(
        ("gather_backward",), gather_gradient(torch.bfloat16, False), ("logits", "stride", *DZ, "ALIGNED"),
        compiled=True,
    ),
    "gather's gradient in place": Launch(
        ("gather_backward",), gather_gradient(torch.float16, True), ("logits", "stride", *DZ, "ALIGNED")
    ),
}  # fmt: skip
VOCABULARIES = (4096, 4099, 4112, 4100, 4104, 32000, 50257, 128256, 151936, 151937)

launchers = pytest.mark.parametrize("name", LAUNCHES)


@pytest.fixture
def specialised(gpu, monkeypatch):
    """What would be compiled, without compiling it: (kernel, its key) → names of arguments taken as aligned or True."""
    found = {}

    def hook(*, fn, compile, **_):
        arguments = fn.jit_function.arg_names
        (attributes,) = compile["configs"]
        found[fn.jit_function.__name__, str(compile["key"])] = {
            arguments[position] for (position,), given in attributes.items() if ["tt.divisibility", 16] in given
        } | {arguments[position] for (position,), value in compile["constants"].items() if value is True}
        return True  # not to be compiled, nor launched

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    return found


@pytest.mark.parametrize("name", [name for name, entry in LAUNCHES.items() if entry.compiled])
def test_compiled_and_launched(name, gpu):
    """What is launched is what was compiled: as many arguments, each of its type. A second call compiles nothing."""
    entry, shape = LAUNCHES[name], Shape()
    entry.launch(shape)
    assert tuple(source.fn.__name__ for source, *_ in gpu.launches) == entry.kernels
    for source, grid, arguments in gpu.launches:
        assert grid[0] >= 1 and grid[1:] == (1, 1)
        for kind, value in zip(source.signature.values(), arguments, strict=True):
            if isinstance(value, torch.Tensor):
                assert kind == TYPES[value.dtype]
            elif kind == "fp32":
                assert isinstance(value, float)
            elif kind == "i32":
                assert isinstance(value, int) and abs(value) < 2**31
            else:
                assert kind == "constexpr"
    entry.launch(shape._replace(n=shape.n + 3, shift=1))
    assert len(gpu.launches) == 2 * len(entry.kernels)
    compiled = [source for source, *_ in gpu.launches]
    assert compiled[: len(entry.kernels)] == compiled[len(entry.kernels) :]


@launchers
def test_specialised_for_aligned_rows(name, specialised):
    """At an odd vocabulary, too: a row's first element is aligned, and that is what loads are wide by."""
    entry = LAUNCHES[name]
    entry.launch(Shape())
    kernels = tuple(kernel for kernel, _ in specialised)
    assert kernels == entry.kernels
    (aligned, *_) = specialised.values()
    assert {*entry.aligned} <= aligned and "vocab" not in aligned


@launchers
def test_neither_rows_nor_where_vectors_begin_are_a_reason_to_compile(name, specialised):
    entry = LAUNCHES[name]
    for n, shift in ((6, 0), (1, 0), (16, 0), (33, 0), (6, 1), (7, 3)):
        entry.launch(Shape(n=n, shift=shift))
    assert tuple(kernel for kernel, _ in specialised) == entry.kernels


@launchers
def test_how_many_are_compiled(name, specialised):
    """Of each kernel, over vocabularies in the head's memory."""
    entry = LAUNCHES[name]
    for vocab in VOCABULARIES:
        entry.launch(Shape(n=2, vocab=vocab))
    assert len(specialised) == entry.most * len(entry.kernels)


@pytest.mark.parametrize("name", ["gather", "gather's gradient", "gather's gradient in place"])
def test_logits_of_a_model(name, specialised):
    """Rows one after the other: aligned where V is a multiple of 16, else nowhere but in the first."""
    entry = LAUNCHES[name]
    for vocab in VOCABULARIES:
        entry.launch(Shape(n=2, vocab=vocab, rows=apart))
    assert len(specialised) == 2
    assert {"stride" in aligned for aligned in specialised.values()} == {True, False}
    assert all(("ALIGNED" in aligned) == ("stride" in aligned) for aligned in specialised.values())
    for ignore_index in (0, 1, 16, -1):
        gather.forward(apart(2, 4096, torch.bfloat16, "cpu"), torch.zeros(2).long(), 1.0, ignore_index)
    assert len(specialised) == 2 + (name != "gather")


def test_no_kernel_is_left_out():
    """Each that is launched is in the table; a name with an underscore is a part of other kernels."""
    kernels = {
        x.__name__
        for module in gates.modules()
        for name, x in vars(gates.module(module)).items()
        if isinstance(x, JITFunction) and not name.startswith("_")
    }
    assert {kernel for entry in LAUNCHES.values() for kernel in entry.kernels} == kernels
    assert {kernel for entry in LAUNCHES.values() if entry.compiled for kernel in entry.kernels} == kernels
