"""Nothing that a call does on a device is waited for: its host reads nothing there, and copies nothing there by a call
that blocks. The meta device stands in for a GPU: it has no values, so whatever wants to read one raises."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
import xpo_fast as xf
from pairs import in_pairs
from test_objective import (
    LENGTHS,
    THROUGH_HEAD,
    VOCAB,
    T,
    given_to,
    gradients_match,
    hyper_of,
    lay_out,
    list_size,
    of_tokens,
    operands,
    targets_of,
)  # fmt: skip
from xpo_fast.head import autograd
from xpo_fast.head.spec import scored_positions
from xpo_fast.methods.math import check_rows
from xpo_fast.methods.unpaired import kto_kl
from xpo_fast.objective.batch import Batch

META = torch.device("meta")
METHODS = [*THROUGH_HEAD, "cringe"]
# What cannot be captured into a CUDA graph, and why it says that it cannot.
UNCAPTURED = {
    "aot": "its losses depend on one another",
    "aot_unpaired": "its losses depend on one another",
    "beta_dpo": "what it remembers",
    "bco": "what it remembers",
}
# Tokens of a tile on the meta device, whose operations are slow: a unit is longer and a row shorter still.
FEW_TILES = 8
CAPTURED = [n for n in METHODS if n not in UNCAPTURED]
OPERATORS = {op._opoverload: op._init_fn for op in (autograd.token_stats, autograd.token_stats_backward)}

layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
learns = pytest.mark.parametrize("learn", ["frozen", "trainable"])
ways = pytest.mark.parametrize(
    ("learn", "packed"), [("frozen", False), ("trainable", True)], ids=["frozen-padded", "trainable-packed"]
)


class NoWaits(TorchFunctionMode):
    """A `with` block in which waiting for the device raises.

    Reading a value, or making a shape of it, raises on the meta device anyway. Here is what CUDA does by waiting and
    the meta device in silence: a blocking copy from the host, an index on the host, a tensor made of Python's numbers.
    """

    class Below(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func in OPERATORS:  # not the shapes that it says it has: what it does
                with self:
                    return OPERATORS[func](*args, **kwargs)
            out = func(*args, **kwargs)
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            # A number on the host may go with tensors of a device as any of Python's may.
            indexing = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
            mixed = {x.device.type for x in tensors if x.dim() or indexing} == {"cpu", "meta"}
            assert not mixed or kwargs.get("non_blocking"), f"{func} waits for the device"
            return out

    def __enter__(self):
        self._below = NoWaits.Below()
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._below.__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # A list becomes a tensor below anything that could be looked at here.
        by_list = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and any(
            isinstance(x, list) for x in (args[1] if isinstance(args[1], tuple) else args[1:2])
        )
        assert not by_list or args[0].device.type == "cpu", f"{func} copies a list to the device and waits for it"
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        assert not made or out.device.type == "cpu", f"{func} copies to the device and waits for it"
        return out


def there(x):
    """x on the device, to learn as it did."""
    return x.detach().to(META).requires_grad_(x.requires_grad)


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr("xpo_fast.device.capturing", lambda: True)


@pytest.fixture
def static(monkeypatch):
    """Shapes that depend on no value, as in a capture, but on the CPU, where results can be looked at."""
    holders = [m for n, m in sys.modules.items() if n.startswith("xpo_fast") and hasattr(m, "static_shapes")]
    assert len(holders) > 1
    for module in holders:
        # Targets are int64, offsets of packed rows int32.
        monkeypatch.setattr(module, "static_shapes", lambda x: x.dtype == torch.int64)


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "bool index": lambda x: x[x > 0],
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: torch.arange(3, device=META).repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "blocking copy": lambda x: torch.zeros(3).to(META),
    "index on the host": lambda x: x[torch.tensor([0])],
    "index of numbers": lambda x: x[[0, 1]],
    "put by an index of numbers": lambda x: x[None].__setitem__((0, [0, 1]), 1.0),
    "put by an index on the host": lambda x: x.index_put((torch.tensor(0),), x[0]),
    "tensor of numbers": lambda x: torch.tensor([1, 2], device=META),
    "tensor of a number": lambda x: x.new_tensor(1.0),
}
NO_WAITS = {
    "computing": lambda x: torch.where(x > 0, x, 0.0).sum() * 2,
    "a number on the host": lambda x: x * torch.tensor(2.0),
    "copy": lambda x: torch.zeros(3).to(META, non_blocking=True),
    "index": lambda x: x[torch.arange(2, device=META)],
    "assertion": lambda x: torch._assert_async((x > 0).all(), "message"),
}


@pytest.mark.parametrize("what", [*WAITS, *NO_WAITS])
def test_what_is_seen(what):
    x = torch.zeros(3, device=META)
    if what in NO_WAITS:
        with NoWaits():
            NO_WAITS[what](x)
    else:
        with pytest.raises((AssertionError, RuntimeError)), NoWaits():  # NotImplementedError is one
            WAITS[what](x)


def arguments(name, learn, packed):
    """On the CPU: hidden, weight, bias; what else a call is given."""
    method, xs, targets = xf.METHODS[name], operands(learn), targets_of()
    if name == "cringe":
        columns, ref = {}, {}
    else:
        columns, ref = given_to(method, len(LENGTHS))
    h, y, cu = lay_out(xs[0], targets, packed)
    columns, ref = (of_tokens(method, targets, packed, x) for x in (columns, ref))
    return [h.detach().requires_grad_(xs[0].requires_grad), *xs[1:]], y, cu, columns, ref


def objective_of(name, tokens=4, **options):
    """With tiles of so many tokens."""
    method = xf.METHODS[name]
    fixed = {"fixed_length": T} if method.denominator == "fixed_length" else {}
    return xf.Objective(name, tile_bytes=tokens * VOCAB * 8, backend="torch", **fixed, **options, **hyper_of(method))


def step(objective, xs, targets, **given):
    out = objective(xs[0], xs[1], targets, bias=xs[2], **given)
    out.loss.sum().backward()
    assert all(x.grad is None or x.grad.device == x.device for x in xs)
    return out


@pytest.mark.parametrize("name", METHODS)
@ways
def test_targets_on_the_host(name, learn, packed):
    """And with them all that a collator makes: it goes to the device by copies that nothing waits for."""
    xs, y, cu, columns, ref = arguments(name, learn, packed)
    xs, ref = [there(x) for x in xs], {n: there(x) for n, x in ref.items()}
    objective = objective_of(name, FEW_TILES)
    with NoWaits():
        for _ in range(1 + (xf.METHODS[name].state is not None)):  # with what is remembered of the one before
            out = step(objective, xs, y, list_size=list_size(xf.METHODS[name]), **cu, **columns, **ref)
    assert {x.device for x in (out.loss, *out.metrics.values(), *out.counts.values(), *out.losses)} == {META}


MODIFIED = {
    "sum": ("dpo + 0.5*sft", {}),
    "all pairs": ("odpo", {"pairs": "all"}),
    "extremes": ("simpo", {"pairs": "extremes"}),
    "pairs of a batch": ("aot", {"pairs": "all"}),
    "ld_alpha": ("dpo", {"ld_alpha": 0.5}),
    "wpo": ("simpo", {"wpo": True}),
    "none": ("dpo", {"reduction": "none"}),
    "row sums": ("dpo", {}),
}


def modified(kind, place):
    """The objective, and what its calls are given, all but hidden and head put by `place`."""
    method, options = MODIFIED[kind]
    targets = targets_of()
    given = {}
    if "pairs" in options:
        given["scores"] = torch.tensor([[3.0, 1.0, 3.0, 9.0, 2.0], [0.0, 1.0, 5.0, 1.0, 1.0]])
    if "dpo" in method or method == "aot":
        by_row = kind == "row sums"
        given["ref_logps"] = -oracle.normal(*((len(LENGTHS),) if by_row else targets.shape), seed=4).abs()
    given = {n: place(x) for n, x in given.items()}
    objective = xf.Objective(method, tile_bytes=16 * VOCAB * 8, backend="torch", **options)
    return objective, place(targets), given


@pytest.mark.parametrize("kind", MODIFIED)
@learns
def test_modifiers(kind, learn):
    objective, targets, given = modified(kind, lambda x: x)
    given["denominator"] = objective.count_items(targets, list_size=5 if "scores" in given else None)
    xs = [there(x) for x in operands(learn)]
    with NoWaits():
        step(objective, xs, targets, **given)


@learns
@layouts
def test_targets_on_the_device_are_waited_for_once(learn, packed, monkeypatch):
    """At the start of the call; offsets of packed rows, too, unless they are on the host."""
    xs, y, cu, columns, _ = arguments("reinforce", learn, packed)
    waits = []

    def to_host(x):
        waits.append(x)
        return y if x is on_device else x.cpu()

    monkeypatch.setattr("xpo_fast.objective.batch.to_host", to_host)
    xs, on_device, columns = [there(x) for x in xs], there(y), {n: there(x) for n, x in columns.items()}
    with NoWaits():
        step(objective_of("reinforce"), xs, on_device, **cu, **columns)
    assert [x for x in waits if x.device == META] == [on_device]


@pytest.mark.parametrize("name", CAPTURED)
@ways
def test_captured(name, learn, packed, capturing):
    """All on the device but the offsets of packed rows, which are as the graph is; nothing is copied from the host."""
    xs, y, cu, columns, ref = arguments(name, learn, packed)
    xs, y = [there(x) for x in xs], there(y)
    given = {n: there(x) for n, x in {**columns, **ref}.items()}
    with NoWaits(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", no_copies(torch.Tensor.to))
        step(objective_of(name, FEW_TILES), xs, y, list_size=list_size(xf.METHODS[name]), **cu, **given)


def no_copies(to):
    def moved(x, *args, **kwargs):
        out = to(x, *args, **kwargs)
        assert out.device == x.device or not x.dim()
        return out

    return moved


@pytest.mark.parametrize("kind", [k for k in MODIFIED if k != "pairs of a batch"])
@learns
def test_captured_modifiers(kind, learn, capturing):
    objective, targets, given = modified(kind, there)
    xs = [there(x) for x in operands(learn)]
    with NoWaits():
        step(objective, xs, targets, **given)


@pytest.mark.parametrize("name", UNCAPTURED)
def test_what_cannot_be_captured(name, capturing):
    xs, y, _, columns, ref = arguments(name, "frozen", False)
    given = {n: there(x) for n, x in {**columns, **ref}.items()}
    match = f"{name} cannot be captured into a CUDA graph: {UNCAPTURED[name]}.*without one"
    with pytest.raises(ValueError, match=match):
        step(objective_of(name), [there(x) for x in xs], there(y), **given)
    y = there(y)
    with NoWaits():  # counting can
        objective_of(name).count_items(y)


def test_captured_with_something_on_the_host(capturing):
    """A graph would copy it anew from memory that may be another's by then."""
    xs = [there(x) for x in operands("frozen")]
    with pytest.raises(ValueError, match=r"captured, and a tensor \(\) .*on the CPU"):
        step(objective_of("simpo"), xs, there(targets_of()), denominator=torch.tensor(3))
    with pytest.raises(ValueError, match=r"captured, and a tensor \(70,\) .*on the CPU.*move targets"):
        step(objective_of("simpo"), xs, targets_of())
    objective = objective_of("kto")
    objective.load_state_dict({"kl": torch.tensor(0.5)})
    with pytest.raises(ValueError, match=r"a tensor \(\) of the call is on the CPU.*remembers"):
        step(
            objective, xs, there(targets_of()), ref_logps=torch.zeros(10, device=META),
            desirable=torch.ones(10, device=META).bool(),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"seed= cannot be captured"):
        step(objective_of("cringe", seed=1), xs, there(targets_of()))


@pytest.mark.parametrize(("name", "learn"), [("reinforce", "frozen"), ("simpo", "trainable")])
def test_captured_packed_rows_of_unknown_lengths(name, learn, capturing):
    xs, y, cu, columns, _ = arguments(name, learn, True)
    given = {n: there(x) for n, x in {**columns, **cu}.items()}
    with pytest.raises(ValueError, match=rf"{name} needs the lengths of packed rows.*cu_seqlens= on the CPU"):
        step(objective_of(name), [there(x) for x in xs], there(y), **given)


@in_pairs(
    ("name", [n for n in CAPTURED if n != "cringe"]),  # which draws: test_captured_draws
    ("packed", [False, True]),
    ("learn", ["frozen", "trainable"]),
)
def test_captured_is_the_same(name, learn, packed, static):
    """Loss, metrics and gradients, whatever there may be at ignored positions; tiles of one token and of several."""
    xs, y, cu, columns, ref = arguments(name, learn, packed)
    if not packed:
        with torch.no_grad():
            xs[0][y == oracle.IGNORE] = float("nan")
    size = list_size(xf.METHODS[name])
    out = step(objective_of(name), xs, y, list_size=size, **cu, **columns, **ref)
    wide = oracle.leaves(*xs)
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for n, m in sys.modules.items() if n.startswith("xpo_fast")]:
            if hasattr(module, "static_shapes"):
                patch.setattr(module, "static_shapes", lambda x: False)
        expected = step(objective_of(name), wide, y, list_size=size, **cu, **columns, **ref)
    assert_close(out.loss, expected.loss, rtol=1e-9, atol=0)
    assert_close(out.metrics, expected.metrics, equal_nan=True)
    assert_close(out.counts, expected.counts)
    gradients_match(xs, wide)


@learns
@layouts
def test_captured_draws(learn, packed, request):
    """With one rival to draw from, `cringe` is the same whether every position or the scored ones are gone through."""
    xs, y, cu, *_ = arguments("cringe", learn, packed)
    if not packed:
        with torch.no_grad():
            xs[0][y == oracle.IGNORE] = float("nan")
    wide = oracle.leaves(*xs)
    expected = step(objective_of("cringe", top_k=1), wide, y, **cu)
    request.getfixturevalue("static")
    out = step(objective_of("cringe", top_k=1), xs, y, **cu)
    assert_close(out.loss, expected.loss, rtol=1e-9, atol=0)
    gradients_match(xs, wide)


def test_positions(static):
    targets = torch.tensor([3, oracle.IGNORE, 4])
    assert scored_positions(targets, oracle.IGNORE, 5).tolist() == [0, 1, 2]
    assert scored_positions(targets.int(), oracle.IGNORE, 5).tolist() == [0, 2]


def test_data_is_checked_on_the_device(monkeypatch):
    """By its own assertion, which the host does not wait for; it says what the host's error does but for the row."""
    seen = []
    monkeypatch.setattr(torch, "_assert_async", lambda ok, message: seen.append((ok.device, ok.shape, message)))
    xs, y, _, columns, ref = arguments("odpo", "frozen", False)
    xs, ref = [there(x) for x in xs], {n: there(x) for n, x in ref.items()}
    with NoWaits():
        step(objective_of("odpo"), xs, y, **columns, **ref)
    message = "expected score_w > score_l; drop the pair or swap it"
    assert (META, (), message) in seen
    monkeypatch.undo()
    bad = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"expected x, got y = 3 in row 1; mend it"):
        check_rows(bad, "x", "mend it", y=torch.tensor([2.0, 3.0]))
    monkeypatch.setattr("xpo_fast.methods.math.on_host", lambda x: False)
    with pytest.raises(RuntimeError, match=r"^expected x; mend it"):
        check_rows(bad, "x", "mend it", y=torch.tensor([2.0, 3.0]))
    check_rows(~bad | bad, "x", "mend it")
    monkeypatch.setattr("xpo_fast.head.spec.on_host", lambda x: False)
    with pytest.raises(RuntimeError, match="a target is outside the vocabulary of 5 tokens"):
        scored_positions(torch.tensor([3, 5]), oracle.IGNORE, 5)


def test_a_column_is_where_the_call_computes_or_with_targets_on_the_host():
    xs, y, _, columns, ref = arguments("odpo", "frozen", False)
    xs, ref = [there(x) for x in xs], {n: there(x) for n, x in ref.items()}
    message = r"odpo: score_w is on cpu and hidden on meta: move one of them"
    columns["score_l"] = there(columns["score_l"])  # the one may be here, the other there
    step(objective_of("odpo"), xs, y, **columns, **ref)
    with pytest.raises(ValueError, match=message), pytest.MonkeyPatch.context() as patch:
        patch.setattr("xpo_fast.objective.batch.to_host", lambda x: y)
        step(objective_of("odpo"), xs, there(y), **columns, **ref)
    with pytest.raises(ValueError, match="hidden is on cpu and targets on meta"):
        step(objective_of("simpo"), operands("frozen"), there(y))


@layouts
@pytest.mark.parametrize("name", ["simpo", "lipo", "dr_grpo", "bnpo", "kto", "bco", "aot"])
def test_counting_waits_for_nothing(name, packed):
    """Wherever the targets are, and it is the same."""
    _, y, cu = lay_out(operands()[0], targets_of(), packed)
    objective, size = objective_of(name), list_size(xf.METHODS[name])
    on_device = {n: there(x) for n, x in cu.items()}
    y_there = there(y)
    with NoWaits():
        count = objective.count_items(y_there, list_size=size, **on_device)
    assert (count.device, count.shape, count.dtype) == (META, (), torch.int64)
    assert objective.count_items(y, list_size=size, **cu).device.type == "cpu"


def test_reference_point_waits_for_nothing():
    """One rank knows how many rows it has."""
    logp = torch.zeros(3, device=META)
    with NoWaits():
        assert kto_kl(logp, logp).device == META
    with pytest.raises(ValueError, match="at least two rows over all ranks, got 1"):
        kto_kl(logp[:1], logp[:1])


@layouts
def test_layout(packed):
    """On the host what is read, on the device what is computed with; the positions sorted by unit there."""
    _, y, cu = lay_out(operands()[0], targets_of(), packed)
    batch = Batch([xf.METHODS["cringe"]], y, cu.get("cu_seqlens"), oracle.IGNORE, device=META)
    (positions, units, _), *_ = batch.groups(1000, VOCAB, by_token=False)
    found = (batch.rows, batch.lengths, batch.index, batch.valid, batch.scored, batch.offsets, positions)
    assert {x.device for x in found} == {META} and batch.targets.device.type == "cpu"
    # Pairs 2 and 3 have an empty half.
    assert list(units) == [0, 1, 4] and positions.shape == (sum(LENGTHS[k] for k in (0, 1, 4, 5, 6, 9)),)
    assert batch.width == T and batch.row_sizes == (LENGTHS if packed else [T] * 10)
