"""The row kernel of csrc/ and the `cuda` backend against float64: its own source, run on the host by csrc/emulate.h.

Threads take turns in either order there, in blocks of 64, and a plan says how a row is read: kept by one block or by a
cluster, or read twice. The same checks run on a GPU where there is one.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch.testing import assert_close

import oracle
import test_compile
import test_head
import test_streams
import test_triton
import xpo_fast as xf
from host_compile import CSRC, DEVICES, compiled
from xpo_fast import native
from xpo_fast.head import cuda
from xpo_fast.head.plan import fit_tiles
from xpo_fast.head.tiling import Tiling

AUTO = 1 << 20  # bytes of shared memory: more than the rows here need
SYSTEM, BESIDE = 1024, 1024 + 512  # bytes of a block: the system's, and with them all that is not columns


def emulated(source, folder):
    return compiled(source, folder / "library.so", "-DXPO_EMULATE")


def library_of(text, folder):
    """Of some C++."""
    (folder / "source.cpp").write_text(text)
    return ctypes.CDLL(str(emulated(folder / "source.cpp", folder)))


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    return emulated(CSRC / "rows.cu", tmp_path_factory.mktemp("csrc"))


class Machine:
    """A device, and how it reads rows: in so many blocks each, 0 to read them twice, None as it would by itself."""

    def __init__(self, device: str) -> None:
        self.device, self.ranks = device, None

    def becomes(self, shared: int = AUTO, clusters: int = 8, threads: int = 64, reversed: bool = False) -> None:
        """Only an emulated one can."""
        self.ranks = None
        if self.device == "cpu":
            native.library().xpo_emulate(ctypes.c_int64(shared), clusters, threads, reversed)

    def keeping(self, ranks: int, **options) -> None:
        if self.device == "cuda" and ranks > 1 and torch.cuda.get_device_capability()[0] < 9:
            pytest.skip("clusters are of compute capability 9.0 and up")
        self.becomes(**options)
        self.ranks = ranks

    def run(self, products, targets, **given) -> None:
        plan = None if self.ranks is None else plan_of(products.shape[1], self.ranks)
        cuda.run(products, targets, plan=plan, **given)


def rounded_up(x, to):
    return x + -x % to


def plan_of(vocab, ranks):
    part = rounded_up(-(-vocab // max(ranks, 1)), 8)
    threads = min(64, rounded_up(part // 4, 32))
    return cuda.RowPlan(max(ranks, 1), part, ranks > 0, threads, 4 * part if ranks else 0)


@pytest.fixture(params=DEVICES)
def machine(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(native, "PATH", request.getfixturevalue("host_library"))
    found = Machine(request.param)

    def kernel_of(tensors):
        tensors = {k: x for k, x in test_triton.on_device(tensors).items() if not k.startswith("ref")}
        return found, tensors.pop("products"), tensors

    monkeypatch.setattr(test_triton, "DEVICE", request.param)
    monkeypatch.setattr(test_triton, "kernel_of", kernel_of)
    found.becomes()
    return found


# --- how rows are read -----------------------------------------------------------------------------------------------


def row_plan(library, vocab, shared, clusters, grad=True, threads=512):
    found = cuda.RowPlan()
    code = library.xpo_plan_rows(
        ctypes.c_int64(vocab), ctypes.c_int64(shared), clusters, threads, int(grad), ctypes.byref(found)
    )
    return code, found


H200, A100 = (232448, 8), (166912, 1)  # bytes that a block can have, blocks of a cluster


@pytest.mark.parametrize(
    ("device", "vocab", "ranks", "kept"),
    [
        (H200, 1, 1, 1),
        (H200, 19072, 1, 1),  # the longest of which three blocks fit a multiprocessor
        (H200, 19073, 2, 1),
        (H200, 32000, 2, 1),
        (H200, 49152, 4, 1),
        (H200, 128256, 8, 1),
        (H200, 151936, 8, 1),  # three blocks, just
        (H200, 8 * 19072 + 1, 8, 1),  # two
        (H200, 201088, 8, 1),
        (H200, 8 * 28800, 8, 1),  # the longest that is read once
        (H200, 8 * 28800 + 1, 1, 0),
        (H200, 262144, 1, 0),
        (A100, 13608, 1, 1),
        (A100, 20608, 1, 1),  # two blocks
        (A100, 20609, 1, 0),
        (A100, 151936, 1, 0),
    ],
)
def test_how_a_row_is_read(host_library, device, vocab, ranks, kept):
    library = ctypes.CDLL(str(host_library))
    code, found = row_plan(library, vocab, *device)
    assert (code, found.ranks, found.kept) == (0, ranks, kept)
    assert found.shared_bytes == (4 * found.part if kept else 0)
    code, found = row_plan(library, vocab, *device, grad=False)
    assert (code, found.ranks, found.kept, found.shared_bytes) == (0, 1, 0, 0)  # once, whatever its length


def test_every_plan_holds_the_row(host_library):
    library = ctypes.CDLL(str(host_library))
    for vocab in (*range(1, 70), 999, 1000, 4097, 50257, 65536, 201088, 1 << 30):
        for shared in (1024, 2048, 2112, 4096, 49152, 101376, 166912, 232448):
            for clusters, threads in ((1, 1024), (2, 512), (4, 64), (8, 100), (16, 512)):
                code, found = row_plan(library, vocab, shared, clusters, threads=threads)
                assert code == 0 and 1 <= found.ranks <= min(8, clusters) and found.part % 8 == 0
                assert found.ranks * found.part >= vocab and (found.part - 8) * found.ranks < vocab
                assert not found.kept or 2 * (found.shared_bytes + BESIDE) <= shared + SYSTEM
                assert found.threads % 32 == 0 and 32 <= found.threads <= min(threads, 512)
                assert found.kept or found.ranks == 1


def test_no_plan(host_library):
    library = ctypes.CDLL(str(host_library))
    assert row_plan(library, 0, *H200)[0] == -2 and row_plan(library, (1 << 30) + 1, *H200)[0] == -2
    assert row_plan(library, 5, 232448, 0)[0] == -2 and row_plan(library, 5, *H200, threads=31)[0] == -2
    assert library.xpo_plan_rows(ctypes.c_int64(5), ctypes.c_int64(5), 1, 64, 1, None) == -1


# --- the arithmetic --------------------------------------------------------------------------------------------------

ONLINE = """
#include "online.cuh"
using namespace xpo;
// z cut at `cuts`, four logits at a time, merged from the left or as a tree. How many merges differ in the other order.
extern "C" int online(const float* z, const int* cuts, int parts, int tree, float* out) {
    Sums sums[64];
    for (int p = 0; p < parts; ++p)
        for (int i = cuts[p]; i < cuts[p + 1]; i += 4) {
            float x[4];
            for (int k = 0; k < 4; ++k) x[k] = i + k < cuts[p + 1] ? z[i + k] : -INFINITY;
            add<true>(sums[p], x, cuts[p + 1] - i);
        }
    int differ = 0;
    const auto join = [&](int p, int q) {
        const Sums one = merged<true>(sums[p], sums[q]), other = merged<true>(sums[q], sums[p]);
        differ += __builtin_memcmp(&one, &other, sizeof one) != 0;
        sums[p] = one;
    };
    if (tree) {
        for (int step = 1; step < parts; step *= 2)
            for (int p = 0; p + step < parts; p += 2 * step) join(p, p + step);
    } else {
        for (int p = 1; p < parts; ++p) join(0, p);
    }
    const Row row(sums[0]);
    out[0] = row.lse(), out[1] = row.entropy(sums[0]), out[2] = row.log_sum_sq_probs(sums[0]), out[3] = sums[0].plain;
    out[4] = row.largest;
    return differ;
}
"""


def test_sums_of_parts(tmp_path):
    """However a row is cut and its parts are merged; parts without a logit, and with nothing but −∞, among them."""
    library = library_of(ONLINE, tmp_path)
    g = torch.Generator().manual_seed(0)
    for trial in range(200):
        size = int(torch.randint(1, 400, (), generator=g))
        parts = int(torch.randint(1, 33, (), generator=g))
        z = oracle.normal(size, seed=trial, std=(0.1, 3.0, 30.0, 1000.0)[trial % 4], dtype=torch.float32)
        inner = torch.randint(0, size + 1, (parts - 1,), generator=g).sort().values.tolist()
        cuts = torch.tensor([0, *inner, size], dtype=torch.int32)
        if trial % 3 == 0 and parts > 2:
            z[cuts[1] : cuts[2]] = -torch.inf
        if not z.isfinite().any():
            z[0] = 1.0
        out = torch.full((5,), float("nan"))
        arguments = (ctypes.c_void_p(x.data_ptr()) for x in (z, cuts))
        assert library.online(*arguments, parts, trial % 2, ctypes.c_void_p(out.data_ptr())) == 0
        wide = z.double()
        log_p = wide.log_softmax(0)
        p = log_p.exp()
        want = [wide.logsumexp(0), -oracle.expectation(p, log_p), p.square().sum().log(), wide.amax()]
        assert_close(out[[0, 1, 2, 4]].double(), torch.stack(want), atol=2e-5, rtol=2e-6)
        off = (out[3].double() - wide.sum()).abs()
        assert off <= size * 2**-24 * wide.abs().sum() or out[3] == wide.sum() == -torch.inf


def test_sums_of_nothing_and_of_nan(tmp_path):
    library = library_of(ONLINE, tmp_path)

    def lse(*z):
        out = torch.full((5,), 7.0)
        x, cuts = torch.tensor(z), torch.tensor([0, len(z) // 2, len(z)], dtype=torch.int32)
        library.online(*(ctypes.c_void_p(t.data_ptr()) for t in (x, cuts)), 2, 1, ctypes.c_void_p(out.data_ptr()))
        return float(out[0])

    inf, nan = torch.inf, torch.nan
    assert lse(-inf, -inf, -inf) == -inf
    assert lse(0.0, -inf) == lse(-inf, 0.0) == 0.0
    for row in ((nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, inf), (nan, -inf), (-inf, inf)):
        assert lse(*row) != lse(*row)


# --- the kernel ------------------------------------------------------------------------------------------------------

SHAPES = {  # (n, V), and blocks of a row, 0 to read it twice
    "one token": (1, 1, 1),
    "two-word vocabulary": (2, 2, 1),
    "less than a vector": (3, 7, 0),
    "a whole number of vectors": (2, 256, 2),
    "one more": (2, 257, 2),
    "parts of one vector, and none": (2, 17, 8),
    "a last part of one column": (2, 25, 4),
    "ragged": (3, 1003, 1),
    "ragged, in a cluster": (3, 1003, 4),
    "ragged, twice": (3, 1003, 0),
    "more copies than are under way at once": (2, 2309, 1),
    "none": (0, 5, 1),
}
HEADS = test_head.HEADS
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check(machine, shape, head="everything", dtype=torch.float32, products_offset=0, stride=None, grad_stride=None):
    """All statistics, and dz of a random upstream, in memory that is poisoned, to the last element and no further."""
    n, vocab, _ = SHAPES[shape]
    tensors, targets, options = test_triton.tile((n, vocab), head)
    bias = tensors.get("bias")
    stride, grad_stride = stride or vocab, grad_stride or vocab

    def rows_of(stride, dtype, offset=0):
        memory = torch.full((n * stride + offset + 1,), float("nan"), dtype=dtype, device=machine.device)
        return memory, memory.as_strided((n, vocab), (stride, 1), offset)

    _, products = rows_of(stride, torch.float32, products_offset)
    products.copy_(tensors["products"])
    whole, grad = rows_of(grad_stride, dtype)
    out = {name: torch.full((n,), float("nan"), device=machine.device) for name in cuda.STATISTICS}
    u = {name: oracle.normal(n, seed=9 + k) for k, name in enumerate(cuda.DIFFERENTIABLE)}
    machine.run(
        products,
        targets.to(machine.device),
        bias=None if bias is None else bias.to(machine.device),
        **options,
        out=out,
        upstream={name: x.float().to(machine.device) for name, x in u.items()},
        grad=grad,
    )
    want, leaf = test_triton.oracle_of(tensors, targets, options)
    for name, x in out.items():
        assert_close(x.cpu().double(), want[name].double(), atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    sum((want[name] * u[name]).sum() for name in u).backward()
    assert n == 0 or oracle.error(grad.cpu(), leaf.grad) < TOLERANCE[dtype]
    written = torch.zeros(whole.shape, dtype=torch.bool)
    written.as_strided((n, vocab), (grad_stride, 1)).fill_(True)
    assert torch.equal(whole.cpu().isnan(), ~written)
    assert torch.equal(products.cpu(), tensors["products"])
    return *out.values(), grad


@pytest.mark.parametrize("reversed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(machine, shape, reversed):
    machine.keeping(SHAPES[shape][2], reversed=reversed)
    check(machine, shape)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", ["ragged, in a cluster", "ragged, twice"])
def test_heads(machine, shape, head):
    machine.keeping(SHAPES[shape][2])
    check(machine, shape, head)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", ["a whole number of vectors", "ragged, in a cluster", "ragged, twice"])
@pytest.mark.parametrize(
    "memory",
    [
        {"stride": 1008, "grad_stride": 1024},  # every row aligned
        {"stride": 1008, "grad_stride": 1012},  # to 16 bytes with float32 alone
        {"stride": 1009, "grad_stride": 1011},  # no row but the first
        {"stride": 1008, "grad_stride": 1024, "products_offset": 1},  # none
    ],
    ids=["aligned", "half", "odd", "shifted"],
)
def test_memory(machine, shape, dtype, memory):
    """Wide accesses where rows are aligned, single ones elsewhere: the same results, nothing beside them."""
    machine.keeping(SHAPES[shape][2])
    check(machine, shape, dtype=dtype, **memory)


# Static and dynamic shared memory beyond 48 KiB together, though the dynamic memory alone is not; a cluster of two, of
# eight; twice.
@pytest.mark.parametrize(("vocab", "n"), [(12288, 2), (32000, 3), (128256, 2), (500003, 1)])
def test_real_vocabularies(machine, vocab, n):
    """As an H200 reads them, in whole blocks."""
    machine.becomes(*H200, threads=512)
    n = 300 if machine.device == "cuda" else n
    z = oracle.normal(n, vocab, seed=1, std=3.0, dtype=torch.float32).to(machine.device)
    targets = oracle.tokens((n,), vocab, 0.0).to(machine.device)
    found = []
    for _ in range(2):
        out = {name: test_triton.poisoned(n) for name in cuda.STATISTICS}
        grad = test_triton.poisoned(n, vocab, dtype=torch.bfloat16)
        machine.run(z, targets, out=out, grad=grad)
        found.append((*out.values(), grad))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    log_p = z.double().log_softmax(1)
    p, at = log_p.exp(), targets[:, None]
    want = {
        "logp": log_p.gather(1, at)[:, 0],
        "lse": z.double().logsumexp(1),
        "entropy": -(p * log_p).sum(1),
        "log_sum_sq_probs": p.square().sum(1).log(),
        "mean_logit": z.double().mean(1),
    }
    for name, x in want.items():
        assert_close(out[name].double(), x, atol=2e-5, rtol=1e-5)
    assert oracle.error(grad, p.neg().scatter_add(1, at, torch.ones_like(p))) < 2**-8


@pytest.mark.parametrize("places", [8, 4, 2, 1])
def test_a_device_without_a_place_for_a_cluster(host_library, monkeypatch, places):
    """The largest cluster that there is a place for, if one that small keeps the row; else the row is read twice."""
    monkeypatch.setattr(native, "PATH", host_library)
    machine = Machine("cpu")
    for shape, (_, vocab, ranks) in SHAPES.items():
        if ranks > 1:
            part = rounded_up(-(-vocab // ranks), 8)
            machine.becomes(2 * (4 * part + BESIDE) - SYSTEM)  # just enough for two blocks
            native.library().xpo_emulate_hosted(places)
            check(machine, shape)


def test_order_does_not_matter(machine):
    """The same bits in either order of the threads, and again."""
    for shape in ("ragged, in a cluster", "ragged, twice"):
        found = []
        for reversed in (False, True, True):
            machine.keeping(SHAPES[shape][2], reversed=reversed)
            found.append(check(machine, shape, dtype=torch.bfloat16))
        for others in found[1:]:
            for x, y in zip(found[0], others, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("wanted", [(), *((name,) for name in cuda.STATISTICS), cuda.STATISTICS], ids=str)
@pytest.mark.parametrize("with_grad", [False, True])
def test_what_is_wanted_alone(machine, wanted, with_grad):
    """Nothing else is written, and without an upstream gradient dz is that of Σ logp."""
    tensors, targets, options = test_triton.tile((3, 300))
    _, products, others = test_triton.kernel_of(tensors)
    machine.keeping(2)
    out = {name: test_triton.poisoned(3) for name in wanted}
    grad = test_triton.poisoned(3, 300) if with_grad else None
    machine.run(products, targets.to(machine.device), out=out, grad=grad, **others, **options)
    want, leaf = test_triton.oracle_of(tensors, targets, options)
    for name in wanted:
        assert_close(out[name].cpu().double(), want[name].double(), atol=2e-5, rtol=1e-5)
    if grad is not None:
        want["logp"].sum().backward()
        assert oracle.error(grad.cpu(), leaf.grad) < 1e-5


@pytest.mark.parametrize("name", cuda.DIFFERENTIABLE)
def test_one_upstream_gradient(machine, name):
    tensors, targets, options = test_triton.tile((3, 300))
    _, products, others = test_triton.kernel_of(tensors)
    u = oracle.normal(3, seed=9)
    grad = test_triton.poisoned(3, 300)
    upstream = {name: u.float().to(machine.device)}
    machine.run(products, targets.to(machine.device), upstream=upstream, grad=grad, **others, **options)
    want, leaf = test_triton.oracle_of(tensors, targets, options)
    (want[name] * u).sum().backward()
    assert oracle.error(grad.cpu(), leaf.grad) < 1e-5


@pytest.mark.parametrize("ranks", [0, 1, 2])
@pytest.mark.parametrize(
    "check",
    [
        test_triton.check_confident_tokens,
        test_triton.check_logits_out_of_the_ordinary,
        test_triton.check_softcap_is_precise,
    ],
)
def test_as_the_triton_kernel(machine, check, ranks):
    machine.keeping(ranks)
    check()


def test_nothing_finite_and_targets_outside(machine):
    """A row of −∞ has lse −∞ and logp NaN; a target outside the vocabulary is NaN, and nothing is read there."""
    products = torch.tensor([[-torch.inf] * 40, [0.0] * 40, [0.0] * 40, [0.0] * 40], device=machine.device)
    targets = torch.tensor([3, -100, 40, 2**40 + 3], device=machine.device)
    out = {name: test_triton.poisoned(4) for name in ("logp", "lse", "top1")}
    grad = test_triton.poisoned(4, 40)
    machine.run(products, targets, out=out, grad=grad)
    assert out["logp"].isnan().all() and out["lse"][0] == -torch.inf
    assert out["top1"].tolist() == [1, 0, 0, 0]  # no token is likelier than one of −∞ among others
    assert_close(out["lse"][1:].cpu(), torch.full((3,), 40.0).log())
    assert_close(grad[1:].cpu(), torch.full((3, 40), -1 / 40))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab": 0}, "a size is negative"),
        ({"n": -1}, "a size is negative"),
        ({"n": 2**40}, "a size is negative or beyond"),
        ({"vocab": 2**31}, "a size is negative or beyond"),
        ({"stride": -1}, "a size is negative"),
        ({"grad_type": 3}, "no such dtype"),
        ({"targets": None}, "a pointer is missing"),
        ({"products": None}, "a pointer is missing"),
    ],
    ids=str,
)
def test_calls_that_make_no_sense(machine, change, reason):
    x = torch.zeros(2, 4, device=machine.device)
    good = {"products": x.data_ptr(), "targets": x.data_ptr(), "n": 1, "vocab": 4, "stride": 4, "grad_type": 0}
    rows = cuda._Rows(**{**good, "gain": 1.0, **change})
    with pytest.raises(RuntimeError, match=f"xpo_rows: {reason}"):
        native.call("xpo_rows", ctypes.byref(rows), device=x.device)


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": 3, "part": 8},
        {"ranks": 16, "part": 8},
        {"ranks": 0},
        {"part": 0, "shared_bytes": 0},
        {"part": 12, "shared_bytes": 48},
        {"part": 16, "shared_bytes": 64},  # of 17 columns
        {"kept": 0},
        {"kept": 0, "shared_bytes": 0, "ranks": 2, "part": 24},
        {"shared_bytes": 92},
        {"threads": 0},
        {"threads": 48},
        {"threads": 1024},
    ],
    ids=str,
)
def test_plans_that_make_no_sense(machine, change):
    z, targets, out = torch.zeros(2, 17), torch.zeros(2, dtype=torch.long), torch.zeros(2)
    z, targets, out = (x.to(machine.device) for x in (z, targets, out))
    good = {"ranks": 1, "part": 24, "kept": 1, "threads": 32, "shared_bytes": 96}
    cuda.run(z, targets, out={"logp": out}, grad=torch.empty_like(z), plan=cuda.RowPlan(**good))
    assert_close(out.cpu(), torch.full((2,), -math.log(17.0)))
    with pytest.raises(RuntimeError, match="xpo_rows_planned: a plan that does not hold the row"):
        cuda.run(z, targets, out={"logp": out}, grad=z, plan=cuda.RowPlan(**good | change))


def test_a_launch_asks_nothing_twice(host_library, monkeypatch):
    """Whatever sizes a kernel is launched with, it is let have all the memory there is, once for each device."""
    monkeypatch.setattr(native, "PATH", host_library)
    machine, asked = Machine("cpu"), []

    def launch(vocab):
        z, targets = torch.zeros(1, vocab), torch.zeros(1, dtype=torch.long)
        before = native.library().xpo_emulate_asked()
        cuda.run(z, targets, grad=z)
        asked.append(native.library().xpo_emulate_asked() - before)

    for _ in range(2):
        machine.becomes(H200[0])  # another one
        for vocab in (1000, 12288, 19072, 1000, 40000, 40000, 50000):
            launch(vocab)
    # Three attributes of the device, the kernel's static memory, two attributes set; a cluster of each size.
    assert asked == [6, 0, 0, 0, 1, 0, 1] * 2


# --- the backend -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cuda"])
def backend(request, host_library, monkeypatch):
    """On operands of the CPU, emulated, in small steps."""
    monkeypatch.setattr(native, "PATH", host_library)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("xpo_fast.head.backends._no_gpu", lambda device: None)
    monkeypatch.setattr("xpo_fast.head.plan._step_tokens", lambda *_: 3)
    Machine("cpu").becomes()
    return request.param


@pytest.mark.parametrize("learn", ["frozen", "trainable", "bias only"])
@pytest.mark.parametrize("shape", [s for s in test_head.SHAPES if s != "row blocks"])
def test_logps(backend, shape, learn):
    test_head.test_logps(shape, "everything", learn, backend)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_statistics(backend, head, learn):
    """Those of a reference, and the gradient of entropy, by what else there is."""
    test_head.test_stats("primes", head, "own head", learn, backend)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
def test_gradient_of_detached_statistics(backend, learn):
    """One pass writes entropy's row and dz of logp with it where the head is frozen."""
    operands, targets, chunk = test_head.problem("primes", True, learn=learn)
    hidden, weight, bias = operands
    names = ("log_sum_sq_probs", "mean_logit", "top1")
    found = xf.token_stats(hidden, weight, targets, bias=bias, outputs=names, chunk_tokens=chunk, backend=backend)
    want, wide = test_head.expected(operands, targets, {})
    for name in ("logp", "lse", *names):
        assert_close(getattr(found, name).double(), want[name].double(), atol=2e-5, rtol=1e-5)
    found.logp.sum().backward()
    want["logp"].sum().backward()
    test_head.check_gradients(operands, wide, 1e-5)


def test_float64_takes_the_row_operations_of_torch(backend, monkeypatch):
    monkeypatch.setattr(native, "call", lambda *_, **__: pytest.fail("no kernel is for float64"))
    test_head.test_gradcheck((), "trainable", backend)


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("name", ["dpo", "token_dpo", "grpo"])
def test_objective_by_the_kernel(backend, name, learn, monkeypatch):
    """By log-ratios, by a divergence (a reference), by tokens; units at 3F with a trainable head."""
    calls = []
    run = native.call
    monkeypatch.setattr(native, "call", lambda *a, **k: (calls.append(a[0]), run(*a, **k)))
    test_triton.compare_with_dense(name, learn, backend)
    assert calls


@pytest.mark.parametrize("lost", [False, True])
def test_the_streams_of_launches(backend, lost, monkeypatch):
    """Rows run on the other stream, in order with the caller's products; a missing wait around them is found."""
    operands, seen = test_streams.operands(), []
    narrow = [x.float() if x.is_floating_point() else x for x in operands]
    monkeypatch.setattr(test_streams, "operands", lambda: narrow)
    launched = test_streams.Detector.launched

    def note(detector, name, *tensors):
        seen.append((name, detector.current))
        launched(detector, name, *tensors)

    monkeypatch.setattr(test_streams.Detector, "launched", note)
    if lost:
        monkeypatch.setattr(test_streams.Detector, "wait", lambda *_: None)
    _, detector = test_streams.run(
        test_streams.unit_gradients, test_streams.TILINGS[0], monkeypatch, cuda.row_operations
    )
    assert seen and set(seen) == {("xpo_rows", test_streams.OTHER)}
    assert bool(detector.races) == any("xpo_rows" in race for race in detector.races) == lost


def test_compiled(backend):
    """In one graph: the operator holds the launches."""
    operands, targets, _ = test_head.problem("primes", True, learn="frozen")
    hidden, weight, bias = operands

    def call(hidden):
        return xf.token_logps(hidden, weight, targets, bias=bias, backend=backend)

    call_compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(call_compiled(hidden), call(hidden), atol=0, rtol=0)
    arguments = test_compile.head_arguments(trainable=True, outputs="entropy,kl,top1", save_grad=False)
    arguments = [backend if isinstance(x, str) and x == "torch" else x for x in arguments]
    torch.library.opcheck(torch.ops.xpo_fast.token_stats.default, arguments)


def test_tiles_are_those_of_triton():
    """Both write dz into memory of its own and have the products of two steps."""
    arguments = (50257, torch.bfloat16, torch.device("cpu"), 1 << 28)
    assert fit_tiles("cuda", *arguments) == fit_tiles("triton", *arguments) != fit_tiles("torch", *arguments)
    assert isinstance(fit_tiles("cuda", *arguments)[0], Tiling)


# --- the emulation ---------------------------------------------------------------------------------------------------

FAULTY = """
#include "device.cuh"
namespace {
__global__ void neighbour(float* out, bool barrier) {  // each thread reads what the next one has written
    XPO_SHARED(float, x, 64);
    x[threadIdx.x] = float(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = x[(threadIdx.x + 1) % 64];
}
__global__ void of_cluster(float* out, bool barrier) {
    XPO_SHARED(float, x, 1);
    const int rank = blockIdx.x;
    if (threadIdx.x == 0) *x = float(rank);
    if (barrier) cluster_arrive(), cluster_wait();
    if (threadIdx.x == 0) out[rank] = *xpo::of_rank(x, (rank + 1) % 2);
    cluster_arrive(), cluster_wait();
}
__global__ void copies(float* out, bool wait) {
    XPO_DYNAMIC_SHARED(float, x);
    xpo::copy_16(x + 4 * threadIdx.x, out + 4 * threadIdx.x, 12);
    xpo::close_copies();
    xpo::close_copies();
    if (wait) xpo::wait_for_copies<1>(); else xpo::wait_for_copies<2>();
    for (int k = 0; k < 4; ++k) out[4 * threadIdx.x + k] = x[4 * threadIdx.x + k];
}
__global__ void lonely(float* out, bool all) {
    if (all || threadIdx.x == 0) __syncthreads();
    out[threadIdx.x] = 1;
}
__global__ void beyond(float* out, bool) {
    XPO_DYNAMIC_SHARED(float, x);
    x[64] = *out;
}
__global__ void halves(float* out, bool whole) {
    const float x = __shfl_xor_sync(whole ? ~0u : threadIdx.x < 16 ? 0xffffu : 0xffff0000u, 1.0f, 1);
    out[threadIdx.x] = x;
}
__global__ void greedy(float* out, bool) { XPO_DYNAMIC_SHARED(float, x); out[threadIdx.x] = x[0] = 1; }
__global__ void wide(float* out, bool aligned) { *reinterpret_cast<float4*>(out + (aligned ? 4 : 3)) = {1, 2, 3, 4}; }
}
extern "C" int faulty(int which, float* out, int right, int reversed) {
    xpo_emulate(4096, 2, 64, reversed);
    switch (which) {
        case 0: return xpo::launch(neighbour, {1, 64}, nullptr, out, right);
        case 1: return xpo::launch(of_cluster, {2, 32, 0, 2}, nullptr, out, right);
        case 2: return xpo::launch(copies, {1, 32, 512}, nullptr, out, right);
        case 3: return xpo::launch(lonely, {1, 64}, nullptr, out, right);
        case 4: return xpo::launch(wide, {1, 32}, nullptr, out, right);
        case 5: return xpo::launch(halves, {1, 32}, nullptr, out, right);
        case 6: {  // 48 KiB beside static memory, which only `launch` asks for
            xpo_emulate(101376, 1, 64, reversed);
            if (right) return xpo::launch(greedy, {1, 32, 48 * 1024}, nullptr, out, right);
            const cudaLaunchConfig_t config{1, 32, 48 * 1024, nullptr, nullptr, 0};
            return cudaLaunchKernelEx(&config, greedy, out, bool(right));
        }
        default: return xpo::launch(beyond, {1, 64, right ? 260 : 256}, nullptr, out, right);
    }
}
extern "C" void rounded(const float* x, uint32_t* bf16, uint32_t* half, int n) {
    for (int i = 0; i < n; ++i) bf16[i] = xpo::pair<__nv_bfloat16>(x[i], x[i]), half[i] = xpo::pair<__half>(x[i], x[i]);
}
"""


def test_the_emulation_finds_faults(tmp_path):
    """It finds each of these faults.

    They are a missing barrier between threads or blocks, a copy without a wait, a barrier that not all threads reach,
    an unaligned access of 16 bytes, a shuffle of half a warp, 48 KiB beside static memory without opting in, and a
    write out of bounds.
    """
    library = library_of(FAULTY.replace("cluster_", "xpo::cluster_"), tmp_path)

    def launch(which, right, reversed=False):
        out = torch.ones(128)
        return library.faulty(which, ctypes.c_void_p(out.data_ptr()), right, reversed), out

    right = {0: (torch.arange(64) + 1.0) % 64, 1: torch.tensor([1.0, 0.0]), 2: torch.tensor([1.0, 1.0, 1.0, 0.0] * 32)}
    for which, want in right.items():
        for reversed in (False, True):
            code, found = launch(which, True, reversed)
            assert code == 0 and torch.equal(found[: len(want)], want)
            code, found = launch(which, False, reversed)
            assert code == 0 and not torch.equal(found[: len(want)], want)
    for which, error in ((3, 999), (4, 716), (5, 999), (6, 1), (7, 999)):
        assert launch(which, True)[0] == 0 and launch(which, False)[0] == error


def test_the_emulation_rounds_as_torch(tmp_path):
    library = library_of(FAULTY.replace("cluster_", "xpo::cluster_"), tmp_path)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 2**-14, 2**-24, 2**-25, 3e38]
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 1.5 * 2**-24, 2.5 * 2**-24, 2047.5])
    x = torch.cat([torch.tensor(special), ties, -ties, torch.logspace(-9, 6, 999), oracle.normal(999, seed=1).float()])
    bf16, half = (torch.zeros(len(x), dtype=torch.int32) for _ in range(2))
    library.rounded(*(ctypes.c_void_p(t.data_ptr()) for t in (x, bf16, half)), len(x))
    for found, dtype in ((bf16, torch.bfloat16), (half, torch.float16)):
        assert torch.equal(found & 0xFFFF, found >> 16 & 0xFFFF)
        assert_close(found.to(torch.int16).view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
