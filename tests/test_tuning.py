"""What a kernel is launched with: defaults, the file of what was measured, and the command that measures.

A timer that needs no GPU stands in for device events, and a launcher of torch's for kernels. The real ones are given to
the tuner where interpreter.py says.
"""

from __future__ import annotations

import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from interpreter import DEVICE, INTERPRETED, needs_gpu, run_checks

pytest.importorskip("triton", reason="Triton is for Linux alone")

from xpo_fast.kernels import gates, launch, timing

from xpo_fast import cli
from xpo_fast.cli import tune
from xpo_fast.head.row_operations import RowOperations
from xpo_fast.head.triton import LOGPS, TritonRowOperations, prefers_fused

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KEY = (torch.bfloat16, 1024)
SLOW, FAST, WRONG, BROKEN, PARTIAL = (launch.config(w, 3, BLOCK=64 * w) for w in (1, 2, 4, 8, 16))
EFFECTS = {SLOW: 3.0, FAST: 1.0, WRONG: 0.5, BROKEN: 0.1, PARTIAL: 0.2}  # ms

KERNELS = (
    "gather_forward",
    "gather_backward",
    "row_pass",
    "row_pass_statistics",
    "row_pass_divergences",
    "one_read_gradient",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A file of its own, and a kernel that is not one."""
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_tunables", dict(launch._tunables))
    launch.forget()
    yield launch.TUNING.path
    launch.forget()


@pytest.fixture(autouse=True)
def kernel():
    found = SimpleNamespace(cache_key="0123456789abcdef" * 4)
    candidates = dict.fromkeys(launch.TARGETS, (SLOW, WRONG, FAST, BROKEN, PARTIAL))
    launch.declare("doubled", launch.Tunable((found,), candidates, problems))
    return found


def problems(workload):
    def run(x):
        choice = launch.lookup("doubled", workload.device, key)
        if choice == BROKEN:
            raise RuntimeError("out of resource: shared memory\nsecond line")
        out = torch.empty_like(x)
        rows = len(x) - (choice == PARTIAL)
        out[:rows] = 2 * x[:rows] + (choice == WRONG) * 2.0**-7
        return (out,)

    key = workload.dtype, launch.bucket(workload.vocab)
    yield launch.Problem(key, lambda seed: (torch.full((5, 3), seed + 1.0, dtype=workload.dtype),), run)


def problem(dtype=torch.float32):
    return next(iter(problems(launch.Workload(1000, dtype, 5, 3, CPU))))


def timer(calls, inputs, repeats):
    """What each choice is said to take, and an outlier that a mean would follow."""
    assert len(inputs) == timing.INPUT_SETS and not torch.equal(*(x for (x,) in inputs[:2]))
    for call in calls.values():
        (out,) = call(inputs[1])
        assert torch.equal(out, 2 * inputs[1][0])
    return {c: [EFFECTS[c]] * (repeats - 1) + [100 / EFFECTS[c]] for c in calls}


@pytest.fixture
def gpu(monkeypatch):
    """A device by name and compute capability."""

    def become(name="NVIDIA H200", capability=(9, 0), hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        launch.forget()

    become()
    return become


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((7, 5), "sm_80"),  # before them all
        ((8, 9), "sm_80"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_100"),
    ],
)
def test_target_of_a_capability(gpu, capability, target):
    gpu(capability=capability)
    assert launch.target(GPU) == target


@pytest.mark.parametrize("capability", [(9, 4), (9, 5), (11, 0)])
def test_target_of_amd(gpu, capability):
    """ROCm gives its devices capabilities that look like NVIDIA's."""
    gpu(capability=capability, hip="6.4")
    assert launch.target(GPU) == "gfx942"


def test_target_of_the_interpreter():
    assert launch.target(CPU) in launch.TARGETS


@pytest.mark.parametrize("target", launch.TARGETS)
def test_defaults(target, monkeypatch):
    """Each kernel's first candidate for the device's target, if nothing was measured."""
    monkeypatch.setattr(launch, "target", lambda device: target)
    each = {t: (launch.config(n, 2, BLOCK=64), FAST) for n, t in enumerate(launch.TARGETS, 1)}
    launch.declare("own", launch.Tunable((), each, problems))
    assert launch.lookup("own", CPU, KEY) == each[target][0]
    for name in tune.load():
        assert launch.lookup(name, CPU, KEY) == launch.tunable(name).candidates[target][0]


def test_what_is_declared():
    """For every target, without a candidate twice."""
    for name in tune.load():
        for target, candidates in launch.tunable(name).candidates.items():
            assert candidates and len(set(candidates)) == len(candidates), (name, target)
    with pytest.raises(AssertionError, match="doubled"):
        launch.declare("doubled", launch.tunable("doubled"))
    with pytest.raises(AssertionError, match="partial"):
        launch.declare("partial", launch.Tunable((), {"sm_80": (SLOW,)}, problems))


def test_config():
    made = launch.config(8, 3, BLOCK=4096, SPLIT=2)
    assert made.options == {"BLOCK": 4096, "SPLIT": 2, "num_warps": 8, "num_stages": 3}
    assert str(made) == "BLOCK 4096, SPLIT 2, 8 warps, 3 stages"
    assert hash(made) == hash(launch.config(8, 3, BLOCK=4096, SPLIT=2))


def test_buckets():
    assert [launch.bucket(n) for n in (1, 2, 3, 32000, 32768, 32769)] == [1, 2, 4, 32768, 32768, 65536]


# The file.


def store(choice=FAST, name="doubled", device=GPU, key=KEY):
    launch.save({launch.entry(name, device, key): launch.encoded(choice)})
    return launch.TUNING.path


def test_round_trip(gpu):
    assert launch.lookup("doubled", GPU, KEY) == SLOW
    path = store()
    assert launch.lookup("doubled", GPU, KEY) == FAST
    assert launch.lookup("doubled", GPU, (torch.float16, 1024)) == SLOW  # another problem
    assert path == launch.TUNING.path and path.parent.name == "cache"
    store(PARTIAL)
    store(FAST, key=(torch.float16, 1024))
    assert launch.lookup("doubled", GPU, KEY) == PARTIAL
    assert launch.lookup("doubled", GPU, (torch.float16, 1024)) == FAST
    assert {p.name for p in path.parent.iterdir()} == {"tuning.json", "tuning.lock"}


def test_read_once(gpu):
    """The file of a process that runs is not looked at again."""
    path = store()
    assert launch.lookup("doubled", GPU, KEY) == FAST
    path.write_text("{")
    assert launch.lookup("doubled", GPU, KEY) == FAST
    assert launch.lookup("doubled", GPU, (torch.float16, 1024)) == SLOW


@pytest.mark.parametrize("change", ["device", "Triton", "source"])
def test_measured_elsewhere(gpu, kernel, monkeypatch, change):
    """On another device, with another Triton, of another kernel: not used, and not lost."""
    path = store()
    if change == "device":
        gpu(name="NVIDIA A100-SXM4-80GB")
    elif change == "Triton":
        monkeypatch.setattr(launch.triton, "__version__", "0.0")
    else:
        kernel.cache_key = "f" * 64
    launch.forget()
    assert launch.lookup("doubled", GPU, KEY) == SLOW
    store(PARTIAL)
    assert launch.lookup("doubled", GPU, KEY) == PARTIAL
    assert len(json.loads(path.read_text())["entries"]) == 2


@pytest.mark.parametrize("value", [None, 7, {"BLOCK": 99}, {**FAST.options, "num_warps": 5}])
def test_not_a_candidate(gpu, value):
    """Whatever the file says, only a candidate is launched."""
    launch.save({launch.entry("doubled", GPU, KEY): value})
    assert launch.lookup("doubled", GPU, KEY) == SLOW


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"version": 1}', b'{"version": 1, "entries": []}']
)
def test_corrupt(gpu, cache, content):
    """One warning, that says what to do; defaults; and the next save makes it whole, and keeps what was there."""
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match=r"tuning\.json cannot be used .* delete it, or tune again") as caught:
        assert launch.lookup("doubled", GPU, KEY) == SLOW
    assert len(caught) == 1
    assert launch.lookup("doubled", GPU, (torch.float16, 1024)) == SLOW
    store()
    assert launch.lookup("doubled", GPU, KEY) == FAST
    assert cache.with_suffix(".json.old").read_bytes() == content


def test_another_layout(gpu, cache):
    """Of another version of this package: not read, without a warning, and kept aside."""
    cache.parent.mkdir()
    content = {"version": launch.TUNING.version + 1, "entries": {launch.entry("doubled", GPU, KEY): FAST.options}}
    cache.write_text(json.dumps(content))
    assert launch.lookup("doubled", GPU, KEY) == SLOW
    store()
    assert json.loads(cache.with_suffix(".json.old").read_text()) == content
    assert launch.lookup("doubled", GPU, KEY) == FAST


def test_concurrent_writers(gpu, cache):
    """The lock is of an open file: threads that open it meet as processes do."""

    def write(writer):
        for n in range(10):
            launch.save({f"{writer} {n}": n})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    entries = json.loads(cache.read_text())["entries"]
    assert entries == {f"{writer} {n}": n for writer in range(8) for n in range(10)}


def test_without_locks(gpu, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    store()
    assert launch.lookup("doubled", GPU, KEY) == FAST and not hasattr(launch, "fcntl")


def test_a_writer_that_dies(gpu, cache, monkeypatch):
    """What is there stays whole until what replaces it is."""
    store()
    before = cache.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("xpo_fast.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        store(PARTIAL)
    assert cache.read_bytes() == before
    store(PARTIAL)
    assert launch.lookup("doubled", GPU, KEY) == PARTIAL


def test_the_interpreter_ignores_the_file(gpu, monkeypatch):
    """Its kernels have no source hash."""
    store()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.lookup("doubled", GPU, KEY) == SLOW


# Measuring.


def test_override_nests_and_restores():
    with launch.override("doubled", FAST):
        assert launch.lookup("doubled", CPU, KEY) == FAST
        with pytest.raises(KeyError), launch.override("doubled", PARTIAL):
            assert launch.lookup("doubled", CPU, KEY) == PARTIAL
            raise KeyError
        assert launch.lookup("doubled", CPU, KEY) == FAST
    assert launch.lookup("doubled", CPU, KEY) == SLOW
    with pytest.raises(AssertionError, match="undeclared"), launch.override("undeclared", FAST):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tune(dtype):
    """The median decides; what is wrong, writes not all, or does not launch gets no time, however fast."""
    before = torch.are_deterministic_algorithms_enabled()
    trials = timing.time_candidates("doubled", problem(dtype), CPU, timer=timer, repeats=5)
    times_ms = {t.choice: t.time_ms for t in trials}
    if dtype == torch.bfloat16:  # in which that is a rounding of 2
        assert times_ms.pop(WRONG) == 0.5
        times_ms[WRONG] = None
    assert times_ms == {SLOW: 3.0, WRONG: None, FAST: 1.0, BROKEN: None, PARTIAL: None}
    assert trials[0].choice == SLOW
    refused = {t.choice: t.refused for t in trials}
    assert refused[BROKEN] == "out of resource: shared memory second line"
    assert "differs from the default, inf times" in refused[PARTIAL]
    assert dtype == torch.bfloat16 or "differs from the default" in refused[WRONG]
    assert torch.are_deterministic_algorithms_enabled() == before
    assert launch.lookup("doubled", CPU, KEY) == SLOW


def test_a_default_that_fails():
    """Nothing to compare with."""

    def run(x):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        timing.time_candidates("doubled", launch.Problem(KEY, problem().inputs, run), CPU, timer=timer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_difference(dtype):
    want = torch.tensor([[1.0, -100.0, 1e-3, float("-inf"), 0.0]], dtype=dtype)
    assert timing.difference([want], [want.clone()]) == 0
    rounded = want.clone()
    rounded[0, 0] += torch.finfo(dtype).eps
    assert timing.difference([rounded[:, :3]], [want[:, :3]]) <= 1
    for at, value in ((0, 1.02), (2, 2e-3), (2, float("nan")), (3, -1e4), (1, float("-inf"))):
        wrong = want.clone()
        wrong[0, at] = value
        columns = slice(None) if at == 3 else slice(3)
        assert not timing.difference([wrong[:, columns]], [want[:, columns]]) <= 1, (at, value)
    assert timing.difference([want, want], [want]) == timing.difference([want[:, :2]], [want]) == float("inf")
    assert timing.difference([want[:0]], [want[:0]]) == 0


@pytest.fixture
def tunes_on_cpu(monkeypatch):
    monkeypatch.setattr(tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(timing, "time_with_events", timer)


def test_command(tunes_on_cpu, cache, capsys):
    """A problem a bucket and dtype, a line a candidate, and from then on the fastest."""
    arguments = ["--kernels", "doubled", "--vocab", "1000", "900", "3000", "--dtype", "float32", "float16"]
    assert cli.main(["tune", *arguments]) == 0
    out = capsys.readouterr().out
    assert "[1/4] doubled: torch.float32, 1024" in out and "[4/4]" in out
    assert "BLOCK 64, 1 warps, 3 stages        3.0000 ms   1.00x default" in out
    assert "BLOCK 128, 2 warps, 3 stages       1.0000 ms   3.00x fastest" in out
    assert "BLOCK 512, 8 warps, 3 stages    refused: out of resource" in out
    assert f"4 tuned, 0 failed; {cache}" in out
    assert launch.lookup("doubled", CPU, (torch.float16, 4096)) == FAST
    assert launch.lookup("doubled", CPU, (torch.bfloat16, 1024)) == SLOW


def test_command_goes_on(tunes_on_cpu, monkeypatch, capsys):
    """A problem that fails is told of; the others are tuned."""

    def fails_at_1024(calls, inputs, repeats):
        if fails_at_1024.first:
            fails_at_1024.first = False
            raise torch.OutOfMemoryError("no memory")
        return timer(calls, inputs, repeats)

    fails_at_1024.first = True
    monkeypatch.setattr(timing, "time_with_events", fails_at_1024)
    assert cli.main(["tune", "--kernels", "doubled", "--vocab", "1000", "3000", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "not tuned, no memory" in out and "1 tuned, 1 failed" in out
    assert launch.lookup("doubled", CPU, (torch.float32, 1024)) == SLOW
    assert launch.lookup("doubled", CPU, (torch.float32, 4096)) == FAST


def test_command_without_a_gpu(monkeypatch, cache, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert "no GPU to tune for" in capsys.readouterr().err
    assert not cache.exists()


def test_lookup_does_not_tune(gpu):
    """No run of anything, no file, no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in tune.load():
            launch.lookup(name, GPU, KEY)
    assert not launch.TUNING.path.parent.exists()


def test_kernels_in_the_interpreter():
    run_checks(__file__, interpreted=True)


@needs_gpu
def test_kernels_on_a_gpu():
    run_checks(__file__, interpreted=False)


@pytest.mark.parametrize("name", KERNELS)
def check_problems(name, monkeypatch):
    """Every candidate agrees with the default, and a launch looks for what the tuner measures."""
    looked_for = set()
    lookup = launch.lookup
    monkeypatch.setattr(launch, "lookup", lambda *call: (looked_for.add(call), lookup(*call))[1])
    tunable = launch.tunable(name)
    device = torch.device("cuda", torch.cuda.current_device()) if DEVICE == "cuda" else CPU
    if INTERPRETED:
        monkeypatch.setattr(timing, "time_with_events", lambda calls, inputs, repeats: {c: [1.0] for c in calls})
    for problem in tunable.problems(launch.Workload(300, torch.bfloat16, 3, 8, device)):
        trials = timing.time_candidates(name, problem, device, timer=timing.time_with_events, repeats=3)
        assert [t.choice for t in trials] == list(tunable.candidates[launch.target(device)])
        assert not [t for t in trials if t.refused]
        assert (name, device, problem.key) in looked_for
        assert {key for n, _, key in looked_for if n == name} == {problem.key}
        looked_for.clear()


# Two ways to log-probs without gradient.


def test_fused_only_if_measured(gpu):
    problem = GPU, torch.bfloat16, 128256, 4096, 5000
    assert prefers_fused(*problem) is False
    store(True, LOGPS, key=(torch.bfloat16, 131072, 4096, 8192))
    assert prefers_fused(*problem) is True
    assert prefers_fused(GPU, torch.bfloat16, 128256, 4096, 3000) is False
    assert prefers_fused(GPU, torch.float16, 128256, 4096, 5000) is False
    store(True, LOGPS, key=(torch.bfloat16, 131072, 4096, 16384))
    assert prefers_fused(GPU, torch.bfloat16, 128256, 4096, 10**6) is True
    with launch.override(LOGPS, False):
        assert prefers_fused(*problem) is False


def test_two_ways(monkeypatch):
    """Each is timed as itself, whichever is preferred, and the winner is remembered; here both in torch."""
    from xpo_fast.kernels import logps

    calls = []

    def fused(hidden, weight, targets, *, out, **scaling):
        calls.append("fused")
        out["logp"].copy_((hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0])

    def by_tiles(operations, *arguments):
        calls.append("triton")
        RowOperations.statistics(operations, *arguments)

    monkeypatch.setattr(logps, "run", fused, raising=False)
    monkeypatch.setattr(TritonRowOperations, "statistics", by_tiles)

    def timer(calls, inputs, repeats):
        for call in calls.values():
            call(inputs[0])
        return {c: [1.0 if c else 2.0] for c in calls}

    tune.load()
    workload = launch.Workload(300, torch.float32, 7, 16, CPU)
    (problem,) = launch.tunable(LOGPS).problems(workload)
    trials = timing.time_candidates(LOGPS, problem, CPU, timer=timer)
    assert calls == ["triton", "fused"] * 2
    assert [(t.choice, t.time_ms) for t in trials] == [(False, 2.0), (True, 1.0)]
    monkeypatch.setattr(tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(timing, "time_with_events", timer)
    arguments = ["--kernels", LOGPS, "--vocab", "300", "--width", "16", "--tokens", "7", "20"]
    assert cli.main(["tune", *arguments, "--dtype", "float32"]) == 0
    for tokens, preferred in ((5, True), (8, True), (9, False), (17, True)):
        assert prefers_fused(CPU, torch.float32, 290, 16, tokens) == preferred


# Candidates.


def heaviest():
    """The candidates with the most and the fewest numbers per thread, of each tunable kernel that is compiled."""
    for module in gates.modules():
        declared = [v for v in gates.module(module).variants() if v.representative and v.tunable]
        for variant in declared:
            for target in ("sm_80", "sm_90", "gfx942"):
                blocks = {
                    made.constexprs.get("BLOCK", 0) / made.num_warps: made
                    for made in variant.configured(candidates=True)
                    if target in made.targets
                }
                for a_warp in {min(blocks), max(blocks)}:
                    yield pytest.param(
                        blocks[a_warp], target, id=f"{variant.kernel.__name__}, {blocks[a_warp].name}, {target}"
                    )


@pytest.mark.parametrize(("variant", "target"), list(heaviest()))
def test_a_candidate_compiles_without_a_spill(variant, target):
    assert not gates.compile_variant(variant, target).problems


def test_gates_compile_the_defaults():
    """And with `candidates` everything, each target its own."""
    each = {t: (launch.config(n // 2 + 1, 2, BLOCK=64), FAST) for n, t in enumerate(launch.TARGETS)}
    variant = next(v for v in gates.module("gather").variants() if v.tunable)
    variant = replace(variant, name="some", constexprs={}, tunable=launch.Tunable((), each, problems))
    assert [(v.name, v.targets, v.num_warps, v.num_stages, v.constexprs) for v in variant.configured()] == [
        ("some, BLOCK 64, 1 warps, 2 stages", ("sm_80", "sm_90"), 1, 2, {"BLOCK": 64}),
        ("some, BLOCK 64, 2 warps, 2 stages", ("sm_100", "gfx942"), 2, 2, {"BLOCK": 64}),
    ]
    made = list(variant.configured(candidates=True))
    assert len(made) == 3
    assert {v.targets for v in made if v.num_warps == FAST.num_warps and v.num_stages == 3} == {tuple(launch.TARGETS)}
