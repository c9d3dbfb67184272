"""The segment kernels, run on the host by csrc/emulate.h, against the pure functions of methods/ and their gradients.

What asks for no more than float32 runs on a GPU as well, where there is one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys

import pytest
import torch

from host_compile import CSRC, DEVICES, compiled
from xpo_fast import native
from xpo_fast.head.rows import sum_rows
from xpo_fast.methods import METHODS
from xpo_fast.objective import segments
from xpo_fast.reduce import count_metrics, mean_metrics

LANES = 64  # threads of a block in csrc/host.cpp
DEVICE = "cpu"  # what `kernel` runs on

# By method, hyperparameters: each one of a method is set in one of its cases, every choice of a name is made.
PAIRS = [
    ("dpo", {}),
    ("dpo", {"beta": 0.7, "label_smoothing": 0.2}),
    ("dno", {"beta": 0.3, "label_smoothing": 0.1}),
    ("token_dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    ("robust_dpo", {"beta": 0.4, "label_smoothing": 0.3}),
    ("rso", {"beta": 0.2, "loss": "hinge"}),
    ("rso", {"beta": 0.2, "loss": "sigmoid"}),
    *(
        ("gpo", {"beta": 0.3, "f": f})
        for f in ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage")
    ),
    ("slic", {}),
    ("slic", {"delta": 20.0, "lam": 0.3}),
    ("ipo", {"beta": 0.2, "variant": "mean"}),
    ("ipo", {"beta": 0.05, "variant": "sum"}),
    ("dpo_norm", {"beta": 3.0}),
    ("rdpo", {"beta": 0.2, "alpha": 0.03, "variant": "derived"}),
    ("rdpo", {"beta": 0.2, "alpha": 0.03, "variant": "survey"}),
    ("simpo", {}),
    ("simpo", {"beta": 3.0, "gamma": 0.5, "label_smoothing": 0.1}),
    ("simpo", {"beta": 3.0, "gamma_beta_ratio": 0.3}),
    ("cpo", {"nll": "sum"}),
    ("cpo", {"beta": 0.2, "alpha": 0.5, "nll": "mean", "label_smoothing": 0.1}),
]
ROWS = [
    ("kto", {}),
    ("kto", {"beta": 0.3, "lambda_d": 1.5, "lambda_u": 0.5}),
    ("apo_zero_unpaired", {"beta": 0.3, "lambda_d": 1.5, "lambda_u": 0.5}),
    ("bco", {"beta": 0.2}),
]
TOKENS = [
    ("reinforce", {}),
    ("ppo", {"eps": 0.1}),
    ("ppo", {"dual_clip": 3.0}),
    ("ppo_penalty", {"beta": 0.3}),
    ("grpo", {}),
    ("grpo", {"eps": 0.3, "beta": 0.2}),
    ("grpo", {"eps": 1.5}),  # no bound below
    ("dr_grpo", {"eps": 0.3, "beta": 0.2}),
    ("bnpo", {"eps": 0.3, "beta": 0.2}),
    ("dapo", {"eps_low": 0.1, "eps_high": 0.3, "beta": 0.2}),
    ("gspo", {}),
    ("gspo", {"eps_low": 0.05, "eps_high": 0.1, "beta": 0.2}),
    ("luspo", {"eps_low": 0.05, "eps_high": 0.1, "beta": 0.2}),
    ("cispo", {"cap": 1.5}),
    ("cispo", {"eps": 0.2, "beta": 0.2}),
    ("sapo", {"tau_pos": 1.3, "tau_neg": 0.7, "beta": 0.2}),
]
# Rows without a token, of one, of fewer tokens than threads, of as many, of one more, of several a thread.
LENGTHS = [1, 5, 64, 130, 0, 3, 0, 17, 7, 1, 65, 2, 4, 0, 0, 200]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("host") / "host.so"
    return ctypes.CDLL(str(compiled(CSRC / "host.cpp", path, "-fvisibility=hidden")))


@pytest.fixture
def host(library, monkeypatch):
    """`evaluate` by the emulated kernels; memory begins as NaN."""
    monkeypatch.setattr(segments.native, "library", lambda: library)
    monkeypatch.setattr(segments, "DEVICES", {"cpu"})
    monkeypatch.setattr(segments, "DTYPES", {torch.float32: "", torch.float64: "_double"})
    torch.use_deterministic_algorithms(True)
    yield library
    torch.use_deterministic_algorithms(False)
    library.xpo_emulate(ctypes.c_int64(232448), 8, 64, 0)


@pytest.fixture(params=DEVICES)
def machine(request, monkeypatch):
    """Where `kernel` runs: emulated, or on a GPU."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", request.param)
    if request.param == "cpu":
        request.getfixturevalue("host")
    return request.param


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def rows_of(offsets):
    return torch.arange(offsets.shape[0] - 1).repeat_interleave(offsets.diff())


def draw(seed, lengths, scale=1.0):
    """Log-probs (n,), and near them what an older or another policy might have."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -scale * torch.rand(n, generator=g, dtype=torch.float64)
    old, ref = (logp + 0.3 * scale * torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    return g, logp, old, ref


def pair_inputs(method, seed, scale=1.0):
    """logp (n,) and the method's other inputs by unit, all float64."""
    g, logp, _, ref = draw(seed, LENGTHS, scale)
    offsets = offsets_of(LENGTHS)
    ref = sum_rows(ref, rows_of(offsets), len(LENGTHS))
    units = len(LENGTHS) // 2
    inputs = {"ref_logp_w": ref[:units], "ref_logp_l": ref[units:]}
    inputs = {n: x for n, x in inputs.items() if n in METHODS[method].inputs}
    return logp, offsets, inputs, torch.rand(units, generator=g, dtype=torch.float64)


def row_inputs(method, seed, scale=1.0):
    g, logp, _, ref = draw(seed, LENGTHS, scale)
    offsets = offsets_of(LENGTHS)
    inputs = {"ref_logp": sum_rows(ref, rows_of(offsets), len(LENGTHS))}
    inputs["desirable"] = torch.rand(len(LENGTHS), generator=g) > 0.4
    inputs |= {n: torch.tensor(0.3, dtype=torch.float64) for n in ("kl", "delta")}
    inputs = {n: x for n, x in inputs.items() if n in METHODS[method].inputs}
    return logp, offsets, inputs, torch.rand(len(LENGTHS), generator=g, dtype=torch.float64)


def token_inputs(method, options, seed, scale=1.0, *, by_token=False, on_policy=False):
    """As the above; a token in six is outside the mask, and NaN there."""
    g, logp, old, ref = draw(seed, LENGTHS, scale)
    offsets = offsets_of(LENGTHS)
    n = logp.shape[0]
    mask = torch.rand(n, generator=g) > 1 / 6
    mask[0] = False  # all there is in its row
    advantage = torch.randn(n if by_token else len(LENGTHS), generator=g, dtype=torch.float64)
    advantage[3] = 0.0
    inputs = {"mask": mask, "advantage": advantage, "old_logp": None if on_policy else old, "ref_token_logp": ref}
    takes = METHODS[method]
    inputs = {k: x for k, x in inputs.items() if takes.wants(k, options) and x is not None}
    for name in ("old_logp", "ref_token_logp"):
        if name in inputs:
            inputs[name] = torch.where(mask, inputs[name], torch.nan)
    logp = torch.where(mask, logp, torch.nan)
    return logp, offsets, inputs, torch.rand(len(LENGTHS), generator=g, dtype=torch.float64)


def pure(method, options, logp, offsets, inputs, weights, denominator, scale=1.0):
    """What `evaluate` gives, by the pure function, autograd and reduce.py."""
    leaf = logp.detach().clone().requires_grad_()
    rows, count = rows_of(offsets), offsets.shape[0] - 1
    takes, lengths, inputs = METHODS[method], offsets.diff(), dict(inputs)
    if takes.layout == "policy":
        width = max(1, int(lengths.max())) if count else 1
        at = (rows, torch.arange(logp.shape[0]) - offsets[rows])

        def grid(x):
            return torch.zeros((count, width), dtype=x.dtype).index_put(at, x)

        mask = inputs.pop("mask", torch.ones_like(logp, dtype=torch.bool))
        sums = sum_rows(torch.where(mask, leaf, 0.0), rows, count)
        inputs = {n: x if n == "advantage" and x.shape == (count,) else grid(x) for n, x in inputs.items()}
        inputs |= {"token_logp": grid(leaf), "mask": grid(mask)}
        valid = torch.ones(count, dtype=torch.bool)
    else:
        sums = sum_rows(leaf, rows, count)
        units = count // 2 if takes.layout == "pairwise" else count
        sides = ("_w", "_l") if takes.layout == "pairwise" else ("",)
        valid = (lengths.view(len(sides), units) > 0).all(dim=0)
        for side, logps, lens in zip(sides, sums.split(units), lengths.split(units), strict=True):
            inputs |= {"logp" + side: logps, "len" + side: lens}
        inputs = {n: x for n, x in inputs.items() if n in takes.inputs}
        # What stands in units left out does not matter.
        inputs = {n: torch.where(valid, x, x.new_ones(())) if x.dim() else x for n, x in inputs.items()}
    losses, metrics = takes(**inputs, **options)
    if losses.dim() == 1:
        losses = torch.where(valid, losses, 0.0)
    weighed = losses * (weights[:, None] if losses.dim() == 2 else weights).to(losses.dtype)
    loss = scale * weighed.sum() / denominator
    (u,) = torch.autograd.grad(loss, leaf)
    if losses.dim() == 2:
        losses = losses[at]
    return {
        "loss": loss.detach(),
        "u": u,
        "sums": sums.detach(),
        "losses": losses.detach(),
        "metrics": mean_metrics(metrics, valid),
        "counts": count_metrics(metrics, valid),
        "unit_metrics": {n: torch.where(valid, x, torch.nan) for n, x in metrics.items() if takes.layout != "policy"},
    }


def kernel(method, options, logp, offsets, inputs, weights, denominator, scale=1.0, dtype=torch.float64, **others):
    def there(x):
        x = x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    inputs = {"weights": weights, "denominator": denominator, **inputs, **others}
    moved = {n: there(x) for n, x in inputs.items()}
    return segments.evaluate(method, options, there(logp), there(offsets), scale=scale, **moved)


def narrowed(call):
    """The call's float arguments in float32."""
    logp, offsets, inputs, weights = call
    narrow = {n: x.float() if x.is_floating_point() else x for n, x in inputs.items()}
    return logp.float(), offsets, narrow, weights.float()


def flattened(found):
    """Name → tensor of an Evaluation or a dict like it."""
    if not isinstance(found, dict):
        fields = ("loss", "u", "sums", "losses", "metrics", "counts", "unit_metrics")
        found = {n: getattr(found, n) for n in fields}
    single = {n: found[n].detach() for n in ("loss", "u", "sums", "losses")}
    nested = {f"{n}/{k}": x for n in ("metrics", "counts") for k, x in found[n].items()}
    units = {f"unit_metrics/{k}": x for k, x in found["unit_metrics"].items()}
    return {n: x.cpu() for n, x in (single | nested | units).items()}


def assert_same(ours, truth, rtol):
    ours, truth = flattened(ours), flattened(truth)
    assert set(ours) == set(truth)
    for name, x in ours.items():
        torch.testing.assert_close(
            x, truth[name], rtol=rtol, atol=rtol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_three_way(ours, theirs, truth):
    """Errors of float32 kernels are at most twice those of the pure function, plus 1e-6 of the largest number."""
    ours, theirs, truth = flattened(ours), flattened(theirs), flattened(truth)
    for name, x in ours.items():
        exact, known = truth[name], ~truth[name].isnan()
        assert torch.equal(~x.isnan(), known), name
        size = exact[known].abs().max() if known.any() else 0.0
        errors = [(y[known].double() - exact[known]).abs().max() if known.any() else 0.0 for y in (x, theirs[name])]
        assert errors[0] <= 2 * errors[1] + 1e-6 * size, (name, errors, size)


CALLS = [
    *(pytest.param(m, o, lambda m=m, o=o, **k: pair_inputs(m, 1, **k), id=f"{m}{o}") for m, o in PAIRS),
    *(pytest.param(m, o, lambda m=m, o=o, **k: row_inputs(m, 2, **k), id=f"{m}{o}") for m, o in ROWS),
    *(
        pytest.param(
            m,
            o,
            lambda m=m, o=o, t=t, p=p, **k: token_inputs(m, o, 3, by_token=t, on_policy=p, **k),
            id=f"{m}{o}{'-by_token' * t}{'-on_policy' * p}",
        )
        for m, o in TOKENS
        for t, p in ((False, False), (True, False), (False, True))
        if "old_logp" in METHODS[m].inputs or not p
    ),
]
every = pytest.mark.parametrize(("method", "options", "make"), CALLS)


@every
def test_kernels_are_the_pure_functions(host, method, options, make):
    arguments = *make(), 3.0, 0.7
    assert_same(kernel(method, options, *arguments), pure(method, options, *arguments), 1e-12)


@every
def test_far_out(host, method, options, make):
    """Margins of thousands and ratios past the overflow, where a loss or its slope computed otherwise is ∞ or NaN."""
    arguments = *make(scale=300.0), 3.0, 0.7
    ours = kernel(method, options, *arguments)
    assert ours.u.isfinite().all()
    assert_same(ours, pure(method, options, *arguments), 1e-12)


@every
def test_float32(machine, method, options, make):
    call = make()
    single = narrowed(call)

    def widened(x):
        return x.double() if x.is_floating_point() else x

    wide = tuple({n: widened(x) for n, x in p.items()} if isinstance(p, dict) else widened(p) for p in single)
    ours = kernel(method, options, *single, 3.0, 0.7, dtype=torch.float32)
    assert_three_way(ours, pure(method, options, *single, 3.0, 0.7), pure(method, options, *wide, 3.0, 0.7))


def test_every_hyperparameter_is_tried():
    tried: dict[str, set[str]] = {}
    for method, options in (*PAIRS, *ROWS, *TOKENS):
        tried.setdefault(method, set()).update(options)
    supported = {m for m in METHODS if m == "cispo" or segments.supports(m, {}) is None}
    assert supported == set(tried)
    for method, names in tried.items():
        assert names == set(METHODS[method].defaults) - {"entropy_coef"}, method


# --- the order of sums ------------------------------------------------------------------------------------------------


def test_a_segment_has_one_sum(host):
    """To the bit: by itself, amid others, in whatever order threads run; and next to the exact one."""
    _, logp, *_ = draw(4, LENGTHS)
    offsets, logp = offsets_of(LENGTHS), logp.float()
    alone = host.xpo_segment_sum
    alone.restype, alone.argtypes = (ctypes.c_float, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int])
    ends = list(itertools.pairwise(offsets.tolist()))
    expected = torch.tensor([alone(logp.data_ptr(), begin, end, LANES) for begin, end in ends])
    exact = torch.tensor([math.fsum(logp[begin:end].tolist()) for begin, end in ends], dtype=torch.float64)
    assert ((expected - exact).abs() <= 2e-7 * exact.abs()).all()
    sums = segments.evaluate("simpo", {}, logp, offsets).sums
    assert torch.equal(sums, expected)
    for i, (begin, end) in enumerate(ends):
        pair = torch.tensor([0, end - begin, end - begin])
        assert torch.equal(segments.evaluate("simpo", {}, logp[begin:end], pair).sums[0], expected[i])


@every
def test_no_order_of_threads_matters(machine, method, options, make):
    """The same bits in either order, and on a GPU in whatever order there is."""
    arguments = *make(), 3.0
    first = flattened(kernel(method, options, *arguments, dtype=torch.float32))
    if machine == "cpu":
        native.library().xpo_emulate(ctypes.c_int64(232448), 8, 64, 1)
    second = flattened(kernel(method, options, *arguments, dtype=torch.float32))
    for name, x in first.items():
        assert torch.equal(x.nan_to_num(7.0), second[name].nan_to_num(7.0)), name


def test_more_units_than_blocks(machine):
    """Each block takes several, and the last of all to finish sums them."""
    units = 70_001 if machine == "cuda" else 12  # 65 535 blocks there, five here
    logp = -torch.rand(2 * units * 3, generator=torch.Generator().manual_seed(0))
    offsets = torch.arange(0, 2 * units * 3 + 1, 3)
    ref = logp.new_full((units,), -1.5)
    call = "dpo", {}, logp, offsets, {"ref_logp_w": ref, "ref_logp_l": ref}, torch.ones(units), float(units)
    assert_same(kernel(*call, dtype=torch.float32), pure(*call), 2e-6)


# --- parts of a batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "simpo", "ipo", "cpo"])
@pytest.mark.parametrize("cuts", [(0, 8), (0, 3, 8), (0, 1, 2, 5, 8)])
def test_pairs_by_groups(machine, method, cuts):
    """Whole pairs, each pair's rows side by side, give the u of all at once."""
    logp, offsets, inputs, weights = pair_inputs(method, 5)
    whole = kernel(method, {}, logp, offsets, inputs, weights, 3.0, dtype=torch.float32).u.split(LENGTHS)
    units = len(LENGTHS) // 2
    order = torch.arange(len(LENGTHS)).view(2, units).T.flatten().tolist()
    sorted_offsets = offsets_of([LENGTHS[row] for row in order])
    by_unit = torch.cat([logp.split(LENGTHS)[row] for row in order])
    found = []
    for first, last in itertools.pairwise(cuts):
        start, end = int(sorted_offsets[2 * first]), int(sorted_offsets[2 * last])
        part = {n: x[first:last] for n, x in inputs.items()}
        of_group = sorted_offsets[2 * first : 2 * last + 1]
        group = kernel(
            method,
            {},
            by_unit[start:end],
            of_group,
            part,
            weights[first:last],
            3.0,
            start=start,
            interleaved=True,
            dtype=torch.float32,
        )
        found.append(group.u)
    assert torch.equal(torch.cat(found), torch.cat([whole[row] for row in order]))


@pytest.mark.parametrize(("method", "options"), [("grpo", {"beta": 0.2}), ("ppo", {}), ("sapo", {})])
@pytest.mark.parametrize("size", [1, 7, 64, 499])
def test_tokens_by_groups(machine, method, options, size):
    """Tokens, with rows cut anywhere, and their inputs where the batch has them, in another order."""
    logp, offsets, inputs, weights = token_inputs(method, options, 6, by_token=True)
    narrow = {"dtype": torch.float32}
    whole = kernel(method, options, logp, offsets, inputs, weights, 3.0, **narrow)
    places = torch.randperm(logp.shape[0], generator=torch.Generator().manual_seed(0))
    spread = {n: torch.empty_like(x).index_put((places,), x) for n, x in inputs.items()}
    parts = list(zip(logp.split(size), places.split(size), range(0, logp.shape[0], size)))
    if size == 1:  # one in twenty: each is a launch
        parts = parts[::20]
    for part, positions, start in parts:
        where = {"start": start, "positions": positions}
        group = kernel(method, options, part, offsets, spread, weights, 3.0, **where, **narrow)
        assert torch.equal(group.u, whole.u[start : start + size])
        assert torch.equal(group.losses, whole.losses[start : start + size])


def test_lengths_and_padding(host):
    """Rows with positions that are not scored, whose log-prob is 0: the lengths then have to be given."""
    logp, offsets, inputs, weights = pair_inputs("ipo", 7)
    compact = kernel("ipo", {}, logp, offsets, inputs, weights, 3.0)
    width, units = max(LENGTHS) + 2, len(LENGTHS) // 2
    scored = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    padded = torch.zeros(scored.shape, dtype=logp.dtype).masked_scatter(scored, logp)
    starts = torch.arange(0, padded.numel() + 1, width)
    len_w, len_l = torch.tensor(LENGTHS).split(units)
    lengths = {"len_w": len_w, "len_l": len_l}
    wide = kernel("ipo", {}, padded.flatten(), starts, inputs | lengths, weights, 3.0)
    torch.testing.assert_close(wide.u.view(scored.shape)[scored], compact.u, rtol=1e-12, atol=0)
    torch.testing.assert_close(wide.loss, compact.loss, rtol=1e-12, atol=0)


def test_offsets_beyond_the_log_probs(machine):
    """Nothing is read or written outside of logp, whatever the offsets say; what they leave out has u = 0, no loss."""
    logp, offsets = torch.arange(1.0, 9.0, device=DEVICE), torch.tensor([-3, 2, 100, 5, 7], device=DEVICE)
    out = segments.evaluate("simpo", {}, logp, offsets)
    assert out.sums.tolist() == [3.0, 33.0, 0.0, 13.0]
    out = segments.evaluate("simpo", {}, logp, offsets, start=4)
    assert out.sums.tolist() == [0.0, 36.0, 0.0, 5.0]

    some, ones = torch.tensor([2, 4, 4, 5], device=DEVICE), torch.ones(3, device=DEVICE)
    for method, inputs in (
        ("simpo", {}),
        ("apo_zero_unpaired", {"ref_logp": ones, "desirable": ones.bool()}),
        ("grpo", {"advantage": ones}),
        ("gspo", {"advantage": ones}),
    ):
        out = segments.evaluate(method, {}, logp, some[: 3 if method == "simpo" else 4], **inputs)
        left_out = [0, 1, 5, 6, 7] + [4] * (method == "simpo")
        assert (out.u[left_out] == 0).all() and out.u.isfinite().all()
        assert method == "simpo" or (out.u[[2, 3, 4]] != 0).all()
        assert method != "grpo" or ((out.losses[left_out] == 0).all() and (out.losses[[2, 3, 4]] == -1).all())


# --- where autograd and arithmetic could differ -----------------------------------------------------------------------


def test_at_the_kinks(host):
    """A hinge met exactly has no slope, a ratio exactly on its bound has one."""
    one = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    offsets, ref = torch.tensor([0, 1, 2]), torch.zeros(1, dtype=torch.float64)
    inputs = {"ref_logp_w": ref, "ref_logp_l": ref}
    for f in ("hinge", "truncated_quadratic"):
        call = ("gpo", {"beta": 1.0, "f": f}, one, offsets, inputs, torch.ones(1, dtype=torch.float64), 1.0)
        assert_same(kernel(*call), pure(*call), 0.0)
        assert (kernel(*call).u == 0).all()
    high, low = math.log1p(0.2), math.log1p(-0.2)
    for log_ratio, advantage in ((high, 1.0), (low, -1.0), (high, -1.0), (low, 1.0), (math.log(3.0), -1.0)):
        logp = torch.tensor([log_ratio], dtype=torch.float64)
        inputs = {"advantage": torch.tensor([advantage], dtype=torch.float64), "old_logp": torch.zeros_like(logp)}
        call = ("ppo", {"dual_clip": 3.0}, logp, torch.tensor([0, 1]), inputs, torch.ones_like(logp), 1.0)
        assert_same(kernel(*call), pure(*call), 1e-15)
        assert (kernel(*call).u != 0).all()


def test_past_the_overflow_of_float32(machine):
    """Integers, so that both have the same margins and ratios, to 1500 nats on either side.

    Slopes below the resolution of 1 differ: autograd has σ′ as σ(1 − σ), where 1 − σ rounds to 0.
    """
    steps = torch.arange(-1500.0, 1501.0, 50.0)
    count = steps.shape[0]
    logp = torch.cat([steps - 2000, torch.full((count,), -2000.0)])
    ref = torch.full((count,), -2000.0)
    single, ones, eps = torch.arange(2 * count + 1), torch.ones(count), torch.finfo(torch.float32).eps
    for method, options in (("gpo", {"beta": 1.0, "f": f}) for f in ("logistic", "exponential", "savage")):
        call = (method, options, logp, single, {"ref_logp_w": ref, "ref_logp_l": ref}, ones, 1.0)
        ours, theirs = kernel(*call, dtype=torch.float32), pure(*call)
        torch.testing.assert_close(ours.u.cpu(), theirs["u"], rtol=2e-6, atol=eps)
        torch.testing.assert_close(ours.losses.cpu(), theirs["losses"], rtol=2e-6, atol=eps)
    for method, options in (("ppo", {}), ("ppo_penalty", {}), ("grpo", {"beta": 0.5}), ("sapo", {})):
        for advantage in (1.0, -1.0):
            inputs = {"advantage": torch.full((count,), advantage), "old_logp": ref}
            inputs |= {"ref_token_logp": ref} if method == "grpo" else {}
            call = (method, options, logp[:count], torch.arange(count + 1), inputs, ones, 1.0)
            ours, theirs = kernel(*call, dtype=torch.float32), pure(*call)
            torch.testing.assert_close(ours.u.cpu(), theirs["u"], rtol=2e-6, atol=eps)
            torch.testing.assert_close(ours.losses.cpu(), theirs["losses"], rtol=2e-6, atol=eps)


# --- the edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 0, 0, 0]])
def test_nothing_to_score(host, dtype, lengths):
    offsets, none = offsets_of(lengths), torch.zeros(0, dtype=dtype)
    rows = torch.zeros(len(lengths), dtype=dtype)
    units = len(lengths) // 2
    for method, inputs in (
        ("dpo", {"ref_logp_w": rows[:units], "ref_logp_l": rows[:units]}),
        ("apo_zero_unpaired", {"ref_logp": rows, "desirable": rows.bool()}),
        ("grpo", {"advantage": rows}),
        ("gspo", {"advantage": rows, "old_logp": none}),
    ):
        out = segments.evaluate(method, {}, none, offsets, **inputs)
        assert out.loss == 0 and out.u.shape == (0,) and (out.losses == 0).all() and (out.sums == 0).all()
        assert all(x.isnan() for x in out.metrics.values()) and not any(out.counts.values())


def test_denominators(host):
    logp, offsets, inputs, weights = pair_inputs("dpo", 8)
    whole = kernel("dpo", {}, logp, offsets, inputs, weights, None)
    for denominator in (4.0, torch.tensor(4.0, dtype=torch.float64), torch.tensor(4)):
        part = kernel("dpo", {}, logp, offsets, inputs, weights, denominator, 2.0)
        torch.testing.assert_close(part.loss, whole.loss / 2)
        torch.testing.assert_close(part.u, whole.u / 2)
    for nothing in (0.0, torch.tensor(0.0, dtype=torch.float64)):
        assert torch.equal(kernel("dpo", {}, logp, offsets, inputs, weights, nothing).u, whole.u)


def test_autograd(host):
    logp, offsets, inputs, weights = pair_inputs("dpo", 9)
    leaf = logp.clone().requires_grad_()
    out = kernel("dpo", {}, leaf, offsets, inputs, weights, 3.0)
    (3 * out.loss).backward()
    assert torch.equal(leaf.grad, 3 * out.u)
    assert not any(x.requires_grad for x in (out.u, out.sums, out.losses, *out.metrics.values()))


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("dpo", lambda: pair_inputs("dpo", 1)),
        ("kto", lambda: row_inputs("kto", 1)),
        ("ppo", lambda: token_inputs("ppo", {}, 1)),
        ("gspo", lambda: token_inputs("gspo", {}, 1)),
    ],
)
def test_the_operator(host, monkeypatch, method, make):
    """Schema, fake and autograd, as torch.library sees them."""
    seen = []
    op = segments._segments
    monkeypatch.setattr(segments, "_segments", lambda *a: (seen.append(a), op(*a))[1])
    logp, offsets, inputs, weights = make()
    if "mask" in inputs:  # NaN is not equal to NaN
        del inputs["mask"]
        logp = logp.nan_to_num(-1.0)
        inputs = {n: x.nan_to_num(-1.0) for n, x in inputs.items()}
    kernel(method, {}, logp.requires_grad_(), offsets, inputs, weights, 3.0)
    (arguments,) = seen
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_structs_are_those_of_the_header(library):
    for verb, struct in segments.STRUCTS.items():
        size = getattr(library, f"xpo_sizeof_{verb}")
        size.restype = ctypes.c_int64
        assert ctypes.sizeof(struct) == size()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_supports_says_why_not():
    assert segments.supports("dpo", {"beta": 0.2}) is None
    taken = {m for m, _ in (*PAIRS, *ROWS, *TOKENS)}
    for name in METHODS:
        if name not in taken:
            assert "has no kernel" in (segments.supports(name, {}) or ""), name
    assert "gradient of its own" in (segments.supports("grpo", {"entropy_coef": 0.1}) or "")
    assert "takes no logp_sft" in (segments.supports("slic", {}, ["logp_sft"]) or "")
    for method, options in (
        ("dpo", {"beta": -1.0}),
        ("dpo", {"label_smoothing": 0.5}),
        ("dpo", {"bet": 1.0}),
        ("gpo", {"f": "none"}),
        ("grpo", {"eps": 0.0}),
        ("cispo", {}),
        ("nothing", {}),
    ):
        with pytest.raises(ValueError):
            segments.supports(method, options)


def test_inputs_that_do_not_fit(host):
    logp, offsets, inputs, _ = pair_inputs("dpo", 1)
    good = {"logp": logp, "offsets": offsets, **inputs}
    for change, message in (
        ({"logp": logp.half()}, "float32 log-probs"),
        ({"logp": logp[None]}, "float32 log-probs"),
        ({"offsets": offsets[:-1]}, "pairs of rows"),
        ({"offsets": offsets.float()}, "offsets must be"),
        ({"ref_logp_w": None}, "missing ref_logp_w"),
        ({"ref_logp": logp}, "unknown ref_logp"),
        ({"ref_logp_w": logp}, "ref_logp_w must be"),
        ({"ref_logp_w": inputs["ref_logp_w"].long()}, "ref_logp_w must be"),
        ({"positions": offsets}, "no inputs by token"),
        ({"weights": logp}, "weights must be"),
        ({"denominator": logp}, "denominator must be"),
    ):
        with pytest.raises(ValueError, match=message):
            segments.evaluate("dpo", {}, **(good | change))
    for method in ("nca", "beta_dpo"):
        with pytest.raises(ValueError, match="has no kernel"):
            segments.evaluate(method, {}, logp, offsets)
    with pytest.raises(ValueError, match="missing ref_token_logp"):
        segments.evaluate("grpo", {"beta": 0.1}, logp, offsets, advantage=torch.zeros(16, dtype=torch.float64))
    with pytest.raises(ValueError, match="desirable must be"):
        _, _, of_rows, _ = row_inputs("kto", 1)
        segments.evaluate("kto", {}, logp, offsets, **(of_rows | {"desirable": of_rows["desirable"].long()}))


def test_without_a_device():
    with pytest.raises(ValueError, match="on a CUDA device"):
        segments.evaluate("simpo", {}, torch.zeros(4), torch.tensor([0, 2, 4]))


def test_a_launch_that_fails_names_the_call(host):
    for change, code in (({}, -1), ({"tokens": -1}, -2), ({"units": 1 << 31}, -2)):
        call = segments.SegmentPairs(segments.SegmentCall(**change))
        assert host.xpo_segment_pairs(ctypes.byref(call), None) == code
    assert host.xpo_segment_rows(None, None) == host.xpo_segment_tokens(None, None) == -1
    host.xpo_error.restype = ctypes.c_char_p
    with pytest.raises(RuntimeError, match="xpo_segment_pairs: "):
        segments.native.call("xpo_segment_pairs", None, device=torch.device("cpu"))
