"""The check that stands before `auto` on a GPU, and the record of its verdicts. No GPU is needed: row operations of
torch that work in memory of their own stand in for the kernels, and small commands for the check's process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import xpo_fast as xf
from interpreter import needs_triton
from xpo_fast import cli
from xpo_fast import device as devices
from xpo_fast.cli import doctor
from xpo_fast.head import VocabShard, check, check_process, chunked, dense, gather, verdict
from xpo_fast.head import choice as choices
from xpo_fast.head.backends import BACKENDS
from xpo_fast.head.check import Contender, Verdict
from xpo_fast.head.choice import choice, choose_backend, named_backend
from xpo_fast.head.row_operations import OutOfPlaceRowOperations
from xpo_fast.head.tiling import Tiling
from xpo_fast.store import locked

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
F32, BF16 = torch.float32, torch.bfloat16
TRITON_VERSION = verdict.triton_version
GOOD, BAD = Verdict(True), Verdict(False, "off by a mile")


class Gather:
    forward = staticmethod(lambda z, y, temperature, ignore: gather._forward(z, y, temperature, ignore, False))

    @staticmethod
    def write_gradient(z, y, normaliser, u, temperature, ignore, out):
        gather._write_gradient(z, y, u, temperature, ignore, None, out)


def stand_in(**replaced) -> Contender:
    """One that is right, but for functions that get its results and return others, or None for having changed them."""

    def function(name, make):
        change = replaced.get(name, lambda found: None)

        def call(*args, **kwargs):
            found = make(*args, **kwargs)
            changed = change(found)
            return found if changed is None else changed

        return call

    names = ("forward", "backward", "unit_gradients")
    loops = {n: partial(getattr(chunked, n), operations=OutOfPlaceRowOperations) for n in names}
    head = SimpleNamespace(**{n: function(n, f) for n, f in loops.items()})
    forward = function("gather", Gather.forward)
    gathers = SimpleNamespace(forward=forward, write_gradient=Gather.write_gradient)
    return Contender(head, gathers)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing known, and a folder of its own."""
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XPO_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(verdict, "_known", {})
    choices._log_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch):
    """Two GPUs by what torch says of them; whatever wants to compute there fails."""
    uuids = ("4f1c-0", "4f1c-1")

    def properties(device):
        index = getattr(device, "index", device)
        return SimpleNamespace(name="GPU", major=9, minor=0, total_memory=80 * 2**30, uuid=uuids[index])

    answers = {
        "is_available": True, "device_count": 2, "current_device": 0, "get_device_name": "NVIDIA H200",
        "get_device_capability": (9, 0), "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(devices, "_HAS_TRITON", True)
    monkeypatch.setattr(verdict, "triton_version", lambda: "3.6.0")
    # It would be asked about the GPU.
    monkeypatch.setattr("xpo_fast.native.why_not", lambda *_: "none is looked for")


@pytest.fixture
def children(monkeypatch):
    """The commands that were run, and what they answer."""
    found = SimpleNamespace(words=[], answer=GOOD)

    def in_child(words):
        found.words.append(words)
        return found.answer(words) if callable(found.answer) else found.answer

    monkeypatch.setattr(check_process, "in_child", in_child)
    return found


# --- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", verdict.TRITON_DTYPES, ids=str)
def test_what_is_right_passes(dtype):
    assert check.check(CPU, dtype, stand_in()) == GOOD


def test_all_that_is_to_be_gone_through(monkeypatch):
    """Several tiles and steps, both lanes, a group longer than a tile, dW in one and several, two kinds of rows."""
    two, tiles = [], []
    lanes, gradients = chunked.Lanes, chunked.Gradients

    def watched(device, two_lanes, **kwargs):
        two.append(two_lanes)
        return lanes(device, two_lanes, **kwargs)

    def made(passes, spans, *args):
        tiles.append((sum(span.with_dz for span in spans), len(spans)))
        return gradients(passes, spans, *args)

    monkeypatch.setattr(chunked, "Lanes", lambda device, two: watched(device, two))
    monkeypatch.setattr(chunked, "Gradients", made)
    assert check.check(CPU, BF16, stand_in()).ok
    assert all(two) and len(two) == 24
    # By backward, by that of divergences, by units in two groups, by units in one; each twice.
    assert tiles == [(3, 3), (3, 3), (3, 4), (1, 1)] * 2 + [(3, 3), (3, 4), (1, 1)] * 2
    assert {v % 16 for v in check.VOCABULARIES} == {0, 7}
    for vocab in check.VOCABULARIES:
        p = check.Problem(vocab, F32, CPU)
        bias = None if p.bias is None else p.bias.double()
        z = dense.logits(p.hidden[p.at].double(), p.weight.double(), bias, p.scaling)
        first = torch.maximum(z[:, : vocab // 2048 * 1024 + 1024].amax(dim=1), z.gather(1, p.y[:, None])[:, 0])
        assert ((z.amax(dim=1) - first).topk(3).values > torch.tensor([89, 41, 21])).all()
        assert (p.scaling.softcap is None) == (p.ref is None) == (p.bias is None) == (vocab % 2 == 0)
    assert all(t.step * 2 < min(t.tile, check.SCORED) for t in check.TILINGS)


def test_what_the_caller_set_stays_and_changes_nothing():
    """Autocast, inference mode, a mode that makes fakes of tensors, torch's generator, its default dtype, its flags."""
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(), torch.autocast("cpu"), FakeTensorMode():
            assert check.check(CPU, F32, stand_in()) == GOOD
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64 and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_default_dtype(F32)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), before)


def replaced(found, at, x):
    return (*found[:at], x, *found[at + 1 :])


def in_place(x, factor):
    """None: the result is what it was, with other values."""
    x.mul_(factor)


def not_written(x):
    """x with its last element as the allocator gave it."""
    out = torch.empty_like(x)
    out.view(-1)[:-1] = x.reshape(-1)[:-1]
    return out


def changing():
    calls = iter(range(1000))
    return lambda found: replaced(found, 0, found[0] * (1 + next(calls) * 1e-6))


WRONG = {
    "log-probs": (
        "forward", lambda found: replaced(found, 0, found[0] + 1e-3), r"logp, V 1031: 0.001 \(allowed 0.0005\)",
    ),
    "gradient": (
        "forward", lambda found: replaced(found, 3, found[3] * 1.02), r"∂ dlogp, V 1031: 0.02 \(allowed 0.0078\)",
    ),
    "one row": ("forward", lambda found: in_place(found[3][7:8], 1.5), r"∂ dlogp, V 1031"),
    "statistics": ("forward", lambda found: in_place(found[2], 1.01), r"entropy, V 1031: .*mean_logit"),
    "dW": ("backward", lambda found: replaced(found, 1, found[1] * 0.98), r"∂ backward: weight, V 1031: 0.02"),
    "db": ("backward", lambda found: None if found[2] is None else replaced(found, 2, found[2] * 1.02), r"bias"),
    "of units": (
        "unit_gradients", lambda found: (found[0], replaced(found[1], 1, found[1][1] * 1.02)),
        r"units by 16: weight, V 1031: 0.02 .*units by 64: weight, V 1031.* and 1 more",
    ),
    "not written": ("forward", lambda found: replaced(found, 0, not_written(found[0])), r"logp, V 1031: not finite"),
    "gradient not written": (
        "unit_gradients", lambda found: (found[0], replaced(found[1], 1, not_written(found[1][1]))),
        r"units by 16: weight, V 1031: not finite",
    ),
    "runs": ("forward", changing(), r"elements that change from run to run of logp, V 1031: 40 \(allowed 0\)"),
    "gather": ("gather", lambda found: replaced(found, 0, found[0] * 1.001), r"gather: logp, V 1031"),
    "divergences": (
        "forward", lambda found: in_place(found[2][:1], 1.001) if len(found[2]) == 2 else None, r"kl, V 1031",
    ),
    "gradient of divergences": (
        "backward", lambda found: replaced(found, 0, found[0] * 0.98), r"∂ divergences: hidden, V 1031: 0.02",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_fails(what):
    where, change, said = WRONG[what]
    found = check.check(CPU, F32, stand_in(**{where: change}))
    assert not found.ok and found.lasting
    with pytest.raises(ValueError, match=f"^off by .*{said}"):
        raise ValueError(found.reason)


@pytest.mark.parametrize(("factor", "ok"), [(1e-6, True), (0.02, False)])
def test_a_gemm_may_change_from_run_to_run(factor, ok):
    """By what rounding explains: its library is free to split a sum. The second run has to be right, too."""
    calls = iter(range(1000))
    # Of each problem's calls, two of the backward in a run of the first, and one of the second.
    found = check.check(
        CPU, F32, stand_in(backward=lambda found: replaced(found, 1, found[1] * (1 + factor * (next(calls) in (2, 3)))))
    )  # fmt: skip
    assert found.ok == ok and ("∂ backward: weight, V 1031: 0.02" in found.reason) == (not ok)


def raising(error):
    def change(found):
        raise error

    return change


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (RuntimeError("Python.h: No such file\nand more"), False),
        (OSError("no C compiler"), False),
        (OSError(28, "No space left on device"), False),
        (torch.OutOfMemoryError("no memory"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (RuntimeError("CUDA error: misaligned address"), True),
    ],
)
def test_an_exception_is_a_failure(error, lasting):
    """A fault of the kernels is one for good; of other reasons the next run may know nothing."""
    found = check.check(CPU, F32, stand_in(unit_gradients=raising(error)))
    assert (found.ok, found.lasting) == (False, lasting)
    assert str(error).split("\n")[0] in found.reason and "\n" not in found.reason


# --- in a process of its own -----------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, subprocess, sys, time\n{code}"]


SAYS = "print('verdict: ' + {!r}, flush=True)".format
YES, NO = (SAYS(json.dumps({"ok": ok, "reason": reason, "lasting": True})) for ok, reason in ((True, ""), (False, "x")))
ENDS = {
    "green": (f"print('noise'); {YES}", True, "", True),
    "wrong": (NO, False, "x", True),
    "wrong, and a crash": (f"{NO}; os.abort()", False, "x", True),
    "a crash at the end": (f"{YES}; os.abort()", False, "its process was ended by SIGABRT", True),
    "a signal": (
        "print('illegal access', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
        False,
        "its process was ended by SIGSEGV: illegal access",
        True,
    ),
    "ended by others": ("os.kill(os.getpid(), signal.SIGKILL)", False, "its process was ended by SIGKILL", False),
    "a status": ("sys.exit('no such module')", False, "its process ended with status 1: no such module", False),
    "nothing said": ("pass", False, "its process ended with status 0", False),
    "half a line": (
        "print('verdict: {\"ok\": tr', flush=True); sys.exit(3)",
        False,
        "its process ended with status 3",
        False,
    ),
    "another answer": ("print('verdict: [1]', flush=True)", False, "its process ended with status 0", False),
    "half a line, and a fault": (
        "print('verdict: {', flush=True); os.kill(os.getpid(), signal.SIGBUS)",
        False,
        "its process was ended by SIGBUS",
        True,
    ),
}
if hasattr(signal, "SIGRTMIN"):
    ENDS["no name"] = ("os.kill(os.getpid(), 40)", False, "its process was ended by signal 40", False)


@pytest.mark.parametrize("how", ENDS)
def test_how_the_process_ends(how):
    code, ok, reason, lasting = ENDS[how]
    assert check_process.in_child(python(code), 60) == Verdict(ok, reason, lasting)


def test_a_process_that_hangs(tmp_path):
    """Neither it nor what it started outlives its time."""
    pid = tmp_path / "pid"
    code = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    began = time.monotonic()
    assert check_process.in_child(python(code), 1.5) == Verdict(False, "it did not end within 1.5 s", lasting=False)
    assert time.monotonic() - began < 30
    for _ in range(100):
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            break
        # Nobody may be there to ask how it ended.
        state = Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the process started still runs")


def test_a_process_that_cannot_be_started():
    found = check_process.in_child(["/no/such/python"])
    assert not found.ok and not found.lasting and "could not be started" in found.reason


def test_the_process_imports_what_this_one_does():
    code = f"import xpo_fast; assert xpo_fast.__file__ == {xf.__file__!r}; {YES}"
    assert check_process.in_child(python(code), 60) == GOOD


def test_the_process_imports_nothing_else(tmp_path, monkeypatch):
    """Not what lies in the folder that it is started in, by whatever name."""
    for name in ("dataclasses.py", "xpo_fast/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    words = check_process.command(CPU, F32)
    words[words.index("cpu")] = "nowhere"
    found = check_process.in_child(words, 120)
    assert found.reason.startswith("its process cannot use the device: ") and "nowhere" in found.reason


def test_a_process_that_nobody_waits_for(monkeypatch):
    """It ends by itself, where there is an alarm."""
    if not hasattr(signal, "alarm"):
        pytest.skip("there are no alarms here")
    code = "from xpo_fast.head import check_process as p; p.CHILD_S = -9; p._device = lambda *_: time.sleep(600)"
    words = python(f"{code}; p.main(['--device', 'cpu', '--dtype', 'float32'])")
    found = check_process.in_child(words, 120)
    assert found == Verdict(False, "its process was ended by SIGALRM", lasting=False)


PLACES = {
    "a path that is no text": lambda patch, folder: patch.setattr(sys, "path", [Path("/nowhere"), *sys.path, None]),
    "a folder that is gone": lambda patch, folder: (
        folder.mkdir(), patch.chdir(folder), folder.rmdir(), patch.setattr(sys, "path", ["", *sys.path]),
    ),
    "no temporary folder": lambda patch, folder: patch.setattr(tempfile, "tempdir", str(folder)),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody can remove the current folder")
@pytest.mark.parametrize("what", PLACES)
def test_where_a_process_can_be_started(what, tmp_path, monkeypatch):
    PLACES[what](monkeypatch, tmp_path / "gone")
    assert check_process.in_child(python(YES), 60) == GOOD


def test_without_process_groups(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(os, "killpg", raising=False)
    began = time.monotonic()
    assert "did not end" in check_process.in_child(python("time.sleep(600)"), 0.5).reason
    assert time.monotonic() - began < 30


def test_without_locks(gpu, children, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert verdict.verdict(GPU, BF16) == GOOD
    verdict.forget()
    assert verdict.recorded(GPU, BF16) == GOOD


def test_command(gpu, capsys, monkeypatch):
    """It names the device by number and UUID; the process looks for the latter."""
    assert check_process.command(torch.device("cuda", 1), BF16)[-6:] == [
        "--device", "cuda:1", "--dtype", "bfloat16", "--uuid", "4f1c-1",
    ]  # fmt: skip
    assert check_process._device("cuda:0", "4f1c-1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="no device has the UUID 5; there are 4f1c-0, 4f1c-1"):
        check_process._device("cuda:0", "5")
    assert check_process._device("cuda:1", None) == torch.device("cuda", 1)

    def said(*words):
        assert check_process.main([*words, "--dtype", "float32"]) == 0
        return Verdict(**json.loads(capsys.readouterr().out.removeprefix("verdict: ")))

    found = said("--device", "cuda:0", "--uuid", "5")
    assert not found.ok and not found.lasting and found.reason.startswith("its process cannot use the device")
    monkeypatch.setattr(check_process, "triton_kernels", stand_in)
    assert said("--device", "cpu") == GOOD
    monkeypatch.setattr(check_process, "triton_kernels", lambda: stand_in(forward=raising(OSError("no ptxas"))))
    assert said("--device", "cpu") == Verdict(False, "no ptxas", lasting=False)

    def missing():
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(check_process, "triton_kernels", missing)
    assert said("--device", "cpu") == Verdict(False, "libtriton.so: undefined symbol", lasting=False)


@needs_triton
def test_triton_passes_in_the_interpreter(monkeypatch):
    """The kernels themselves pass on fewer rows of the larger problem, and fail if they never read a row again."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    smaller = (
        "import torch\n"
        "from triton.language import constexpr\n"
        "from xpo_fast.head import check\n"
        "from xpo_fast.head.tiling import Tiling\n"
        "check.VOCABULARIES, check.SCORED = check.VOCABULARIES[:1], 5\n"
        "check.TILINGS = Tiling(4, 2, lanes=2), Tiling(16, 2, lanes=2)\n"
        "on, kernels = (torch.device('cpu'), torch.float32), check.triton_kernels()\n"
        "found = check.check(*on, kernels)\n"
        "assert found.ok, found\n"
    )
    never = (
        "from xpo_fast.kernels import one_read\n"
        "one_read._GAP = one_read._GAP_OF_STATISTICS = constexpr(1e9)\n"
        "measured = check._measured(*on, kernels._replace(gather=None))\n"
        "wrong = {what for what, off, allowed in measured if not off <= allowed}\n"
        "assert wrong >= {'logp, V 1031', 'log_sum_sq_probs, V 1031', '∂ units by 4: weight, V 1031'}, wrong\n"
    )
    assert check_process.in_child(python(f"{smaller}{never}{YES}")) == GOOD


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_found_out_once(gpu, children, caplog):
    """By device and dtype; another process reads what was written."""
    with caplog.at_level("WARNING", logger="xpo_fast"):
        assert verdict.recorded(GPU, BF16) is None
        for _ in range(3):
            assert verdict.verdict(GPU, BF16) == GOOD
        assert len(children.words) == 1
        assert "up to a minute, once" in caplog.text and "NVIDIA H200 (sm_90)" in caplog.text
        assert verdict.verdict(torch.device("cuda"), BF16) == GOOD
        assert verdict.verdict(torch.device("cuda", 1), BF16) == GOOD  # of the same name
        assert len(children.words) == 1
        verdict.forget()
        assert verdict.recorded(GPU, BF16) == GOOD
        assert verdict.verdict(GPU, BF16) == GOOD and len(children.words) == 1
        assert verdict.verdict(GPU, F32) == GOOD and len(children.words) == 2
    assert caplog.text.count("up to a minute, once") == 2


def test_threads(gpu, children):
    """One finds out, the others wait; one warning."""
    children.answer = lambda words: time.sleep(0.3) or BAD
    gate = threading.Barrier(8)

    def ask(_):
        gate.wait()
        return verdict.verdict(GPU, BF16)

    with warnings.catch_warnings(record=True) as seen, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        assert set(pool.map(ask, range(8))) == {BAD}
    assert len(children.words) == len(seen) == 1


def test_one_warning(gpu, children):
    children.answer = BAD
    with pytest.warns(UserWarning) as seen:
        assert verdict.verdict(GPU, BF16) == BAD
        assert verdict.verdict(GPU, BF16) == BAD
    (said,) = (str(w.message) for w in seen)
    for part in (
        "off by a mile", "NVIDIA H200 (sm_90)", "driver ", f"torch {torch.__version__}", "Triton 3.6.0",
        "torch backend",
        "xpo-fast doctor --check", "XPO_FAST_BACKEND=triton", "bfloat16",
    ):  # fmt: skip
        assert part in said
    verdict.forget()  # another process is told too, and does not try again
    with pytest.warns(UserWarning, match="off by a mile"):
        assert verdict.verdict(GPU, BF16) == BAD
    assert len(children.words) == 1


def test_a_warning_that_is_an_error_is_raised_once(gpu, children):
    children.answer = BAD
    with pytest.raises(UserWarning, match="off by a mile"):
        verdict.verdict(GPU, BF16)
    assert verdict.verdict(GPU, BF16) == BAD and len(children.words) == 1


FULL = Verdict(False, "out of memory", lasting=False)
unchecked = pytest.mark.filterwarnings("ignore:triton could not be checked")


@unchecked
def test_what_may_be_gone_next_time_holds_for_minutes(gpu, children, monkeypatch):
    """The ranks of a run do not try one after another; a later run does."""
    children.answer = FULL
    assert verdict.verdict(GPU, BF16) == FULL and verdict.verdict(GPU, BF16) == FULL
    verdict.forget()
    assert verdict.recorded(GPU, BF16) == FULL and verdict.verdict(GPU, BF16) == FULL
    assert len(children.words) == 1
    verdict.forget()
    children.answer = GOOD
    now = time.time()
    for then in (now + verdict.ADOPTED_S + 1, now - 60):  # and if the clock was set back
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda then=then: then)
            assert verdict.recorded(GPU, BF16) is None
    monkeypatch.setattr(time, "time", lambda: now + verdict.ADOPTED_S + 1)
    assert verdict.verdict(GPU, BF16) == GOOD
    verdict._write(verdict.entry(GPU, BF16), FULL)  # changes nothing about what lasts
    verdict.forget()
    assert verdict.recorded(GPU, BF16) == GOOD


def test_what_could_not_be_checked_has_not_failed(gpu, children):
    children.answer = FULL
    with pytest.warns(UserWarning, match=r"^triton could not be checked \(out of memory\).* 5 minutes later"):
        assert choice("auto", GPU, BF16).why == "auto is torch: triton could not be checked (out of memory)"
    children.answer = BAD
    with pytest.warns(UserWarning, match=r"^triton failed its check \(off by a mile\)") as seen:
        assert choice("auto", GPU, F32).why == "auto is torch: triton failed its check (off by a mile)"
    assert "minutes" not in str(seen[0].message)


def raises(error):
    def function(*_, **__):
        raise error

    return function


WAYS_OUT = "XPO_FAST_BACKEND=triton.*xpo-fast doctor --check"
NEVER = {
    "no device to ask": (
        lambda patch: patch.setattr(torch.cuda, "get_device_properties", raises(RuntimeError("gone"))), "gone",
    ),
    "no entry": (
        lambda patch: patch.setattr(verdict, "_sources", raises(PermissionError(13, "not yours"))), "not yours",
    ),
    "no process": (
        lambda patch: patch.setattr(subprocess, "Popen", raises(ValueError("embedded null byte"))), "embedded null",
    ),
    "no Python": (lambda patch: patch.setattr(sys, "executable", None), WAYS_OUT),
    "frozen": (lambda patch: patch.setattr(sys, "frozen", True, raising=False), WAYS_OUT),
    "in a check": (lambda patch: patch.setenv("XPO_FAST_CHECKING", "1"), "this process is a check itself"),
}  # fmt: skip


@unchecked
@pytest.mark.parametrize("what", NEVER)
def test_to_choose_never_raises(what, gpu, monkeypatch):
    change, said = NEVER[what]
    change(monkeypatch)
    if what != "no process":
        monkeypatch.setattr(subprocess, "Popen", None)
    found = verdict.verdict(GPU, BF16)
    assert not found.ok and not found.lasting and re.search(said, found.reason)
    assert choice("auto", GPU, BF16).backend == "torch"
    assert [f.ok for *_, f in verdict.repeat([GPU])] == [False] * 3
    assert not verdict.STORE.path.exists()  # another process may fare better


def test_a_user_without_a_home(gpu, children, monkeypatch, caplog):
    monkeypatch.delenv("XPO_FAST_CACHE")
    monkeypatch.setattr(Path, "home", raises(RuntimeError("Could not determine home directory.")))
    with caplog.at_level("INFO", logger="xpo_fast"):
        assert verdict.recorded(GPU, BF16) is None
        assert verdict.verdict(GPU, BF16) == verdict.verdict(GPU, BF16) == GOOD
    assert "is not kept: no folder to keep it in, set XPO_FAST_CACHE" in caplog.text and len(children.words) == 1


def test_the_process_of_the_check_starts_no_other():
    assert check_process.in_child(python(f"assert os.environ['XPO_FAST_CHECKING'] == '1'; {YES}"), 60) == GOOD


@unchecked
def test_no_triton_to_import(gpu, children, monkeypatch, capsys, quick_doctor):
    """The process of the check says so; who passes that on does not import it again to say which it is."""
    monkeypatch.setattr(verdict, "triton_version", TRITON_VERSION)
    monkeypatch.setitem(sys.modules, "triton", None)
    children.answer = Verdict(False, "libtriton.so: undefined symbol", lasting=False)
    with pytest.warns(UserWarning, match=r"could not be checked \(libtriton.so: undefined symbol\).* Triton [\d?]"):
        assert not verdict.verdict(GPU, BF16).ok
    assert cli.main(["doctor", "--check"]) == 1
    assert "triton could not be checked (libtriton.so: undefined symbol)" in capsys.readouterr().out
    monkeypatch.setattr(verdict, "SEEN", {("sm_90", verdict._minor(TRITON_VERSION()))})
    assert not verdict.verdict(GPU, torch.float16).ok  # nor does it raise here


def test_the_version_of_triton(monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    assert TRITON_VERSION() == sys.modules["triton"].__version__
    monkeypatch.setattr(importlib.metadata, "version", raises(importlib.metadata.PackageNotFoundError()))
    assert TRITON_VERSION() == "?"


def test_what_was_seen_to_pass_needs_no_process(gpu, children, monkeypatch):
    monkeypatch.setattr(verdict, "SEEN", {("sm_90", "3.6")})
    monkeypatch.setattr(verdict, "triton_kernels", stand_in)
    passes = check.check
    monkeypatch.setattr(verdict, "check", lambda device, dtype, contender: passes(CPU, dtype, contender))
    assert verdict.verdict(GPU, F32) == GOOD and not children.words
    verdict.forget()
    assert verdict.recorded(GPU, F32) == GOOD
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert verdict.verdict(torch.device("cuda", 1), F32) == GOOD and len(children.words) == 1


def test_nothing_has_been_seen_on_a_gpu():
    """A combination is added with the results of the run that saw it."""
    assert not verdict.SEEN


CHANGES = {
    "device": lambda patch: patch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L4"),
    "capability": lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9)),
    "driver": lambda patch: patch.setattr(verdict, "_driver", lambda: "999.1"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "3.0"),
    "triton": lambda patch: patch.setattr(verdict, "triton_version", lambda: "3.6.1"),
    "cuda": lambda patch: patch.setattr(torch.version, "cuda", "14.0"),
    "source": lambda patch: patch.setattr(verdict, "_sources", lambda: "0123"),
    "tuning": lambda patch: verdict.TUNING.add({"NVIDIA H200 | Triton 3.6.0 | one_read": {"BLOCK": 512}}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_verdict_depends_on(what, gpu, children, monkeypatch):
    verdict.verdict(GPU, BF16)
    verdict.forget()
    assert verdict.recorded(GPU, BF16) == GOOD
    CHANGES[what](monkeypatch)
    assert verdict.recorded(GPU, BF16) is None


def test_what_was_tuned_for_another_device(gpu):
    before = verdict.entry(GPU, BF16)
    verdict.TUNING.add({"NVIDIA L4 | Triton 3.6.0 | one_read": {"BLOCK": 512}})
    assert verdict.entry(GPU, BF16) == before


@needs_triton
def test_the_file_of_tuning():
    from xpo_fast.kernels import launch, one_read  # noqa: F401, declares what is asked for

    assert launch.TUNING == verdict.TUNING
    assert launch.entry("one_read_gradient", CPU, ()).startswith("cpu | ")


SOURCES = (
    "kernels/one_read.py", "kernels/rows.py", "kernels/launch.py", "head/chunked.py", "head/dense.py", "head/gemms.py",
    "head/row_operations.py", "head/rows.py", "head/spec.py", "head/streams.py", "head/triton.py", "head/check.py",
)  # fmt: skip


def test_sources(tmp_path, monkeypatch):
    """A change to a kernel, to a loop around it or to the check is another verdict."""
    (places,) = set(verdict.importlib.util.find_spec("xpo_fast.kernels").submodule_search_locations)
    shutil.copytree(places, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(verdict.__file__).parent, tmp_path / "head", ignore=shutil.ignore_patterns("__pycache__"))
    before = verdict._sources()
    assert before == verdict._sources() and len(before) == 16
    spec = SimpleNamespace(submodule_search_locations=[tmp_path / "kernels"])
    monkeypatch.setattr(verdict.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(verdict, "__file__", str(tmp_path / "head" / "verdict.py"))
    found = [verdict._sources.__wrapped__()]
    for name in SOURCES:
        path = tmp_path / name
        path.write_text(path.read_text() + "\n")
        found.append(verdict._sources.__wrapped__())
    assert found[0] == before and len({*found}) == len(found)


CONTENTS = {
    "empty": b"", "binary": b"\xff\x00", "cut off": b'{"version": 2, "ent', "list": b"[]",
    "another layout": b'{"version": 0, "entries": {}}', "no entries": b'{"version": 2, "entries": 3}',
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_file_that_is_none(content, gpu, children, cache):
    cache.mkdir()
    verdict.STORE.path.write_bytes(content)
    assert verdict.verdict(GPU, BF16) == GOOD
    verdict.forget()
    assert verdict.recorded(GPU, BF16) == GOOD


@pytest.mark.parametrize("value", [None, True, {}, {"ok": "yes"}, {"reason": "x"}])
def test_an_entry_that_is_none(value, gpu, children, cache):
    cache.mkdir()
    entries = {verdict.entry(GPU, BF16): value}
    verdict.STORE.path.write_text(json.dumps({"version": verdict.STORE.version, "entries": entries}))
    assert verdict.recorded(GPU, BF16) is None
    assert verdict.verdict(GPU, BF16) == GOOD and len(children.words) == 1


def test_a_folder_that_cannot_be_written(gpu, children, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level("INFO", logger="xpo_fast"):
        assert verdict.verdict(GPU, BF16) == GOOD
    assert "is not kept" in caplog.text
    assert verdict.verdict(GPU, BF16) == GOOD and len(children.words) == 1


def test_writers_at_once(cache):
    """Locks belong to open files, so threads that open their own meet as processes do. No reader sees half a file."""
    names = [f"entry {k}" for k in range(60)]
    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(verdict._write, name, BAD) for name in names]
        while not all(w.done() for w in writing):
            if verdict.STORE.path.exists():
                json.loads(verdict.STORE.path.read_bytes())
    assert {verdict._read(name) for name in names} == {BAD}


def holder(cache, then):
    """A process that has the lock of who checks, and what it does with it."""
    cache.mkdir(exist_ok=True)
    lock = cache / "verdicts.check.lock"
    code = f"import fcntl; lock = open({str(lock)!r}, 'a'); fcntl.flock(lock, fcntl.LOCK_EX)"
    words = python(f"{code}; print('held', flush=True); {then}")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_process_waits_for_the_one_that_finds_out(gpu, children, cache):
    """Eight ranks of a node run one check."""
    verdict._write(verdict.entry(GPU, BF16), GOOD)
    written = cache / "written"
    verdict.STORE.path.replace(written)
    other = holder(cache, f"time.sleep(0.5); os.replace({str(written)!r}, {str(verdict.STORE.path)!r})")
    assert verdict.verdict(GPU, BF16) == GOOD and not children.words
    other.communicate()


def test_a_holder_that_dies(gpu, children, cache):
    other = holder(cache, "time.sleep(600)")
    threading.Timer(0.5, lambda: os.kill(other.pid, signal.SIGKILL)).start()
    began = time.monotonic()
    assert verdict.verdict(GPU, BF16) == GOOD and len(children.words) == 1
    assert 0.3 < time.monotonic() - began < 30
    other.communicate()


def test_a_holder_that_hangs(gpu, children, cache, monkeypatch):
    monkeypatch.setattr(verdict, "CHILD_S", 0.2)
    other = holder(cache, "time.sleep(600)")
    try:
        assert verdict.verdict(GPU, BF16) == GOOD and len(children.words) == 1
    finally:
        other.kill()
        other.communicate()


def test_a_lock_does_not_stay_with_what_was_forked(cache):
    """A worker that was forked meanwhile has the file open, too."""
    gone, stay = os.pipe()
    with locked("verdicts.check", 1):
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-c", "import os; os.read(0, 1)"], dict(os.environ),
            file_actions=[(os.POSIX_SPAWN_DUP2, gone, 0)],
        )  # fmt: skip
    try:
        began = time.monotonic()
        with locked("verdicts.check", 20):
            assert time.monotonic() - began < 5
    finally:
        os.close(stay)
        os.close(gone)
        os.waitpid(pid, 0)


# --- what auto is ----------------------------------------------------------------------------------------------------


def test_auto_is_triton_where_it_passed(gpu, children):
    assert choice("auto", GPU, BF16) == ("triton", "auto is triton, which passed its check on NVIDIA H200")
    assert choose_backend("auto", GPU, BF16) == "triton"
    children.answer = BAD
    with pytest.warns(UserWarning, match="triton failed its check .* its kernels for float16"):
        assert choice("auto", GPU, torch.float16) == (
            "torch", "auto is torch: triton failed its check (off by a mile)",
        )  # fmt: skip


NOT = {
    "the CPU": (CPU, BF16, {}, ""),
    "no device at all": (torch.device("meta"), BF16, {}, ""),
    "float64": (GPU, torch.float64, {}, "triton has no kernels for float64"),
    "no triton": (GPU, BF16, {(devices, "_HAS_TRITON"): False}, "the package triton is not installed"),
    "no GPU": (GPU, BF16, {(torch.cuda, "is_available"): lambda: False}, "torch sees no GPU"),
    "an old GPU": (
        GPU, BF16, {(torch.cuda, "get_device_capability"): lambda *_: (7, 5)},
        "compute capability 8.0, and this GPU has 7.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT)
def test_auto_is_torch_where_triton_cannot_be(what, gpu, children, monkeypatch):
    device, dtype, patches, why = NOT[what]
    for (place, name), value in patches.items():
        monkeypatch.setattr(place, name, value)
    found = choice("auto", device, dtype)
    assert found.backend == "torch" and why in found.why and bool(why) == bool(found.why)
    assert not children.words


def test_auto_is_torch_for_what_is_cut_and_what_is_interpreted(gpu, children, monkeypatch):
    assert choice("auto", GPU, BF16, sharded=True).why.startswith("auto is torch: a vocabulary that is cut")
    monkeypatch.setenv("XPO_FAST_BACKEND", "triton")
    assert choose_backend("auto", GPU, BF16, sharded=True) == "torch"
    monkeypatch.delenv("XPO_FAST_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in choice("auto", GPU, BF16).why
    assert not children.words


def test_rocm(gpu, children, monkeypatch):
    """Whose devices have capabilities that say nothing."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert choose_backend("auto", GPU, BF16) == "triton"
    assert "ROCm 6.4" in verdict.entry(GPU, BF16)


@pytest.mark.parametrize("name", BACKENDS)
def test_override(name, gpu, children, monkeypatch):
    """Without a check, in either direction; on the CPU as far as it can be; it never changes what was named."""
    monkeypatch.setenv("XPO_FAST_BACKEND", name)
    assert choice("auto", GPU, BF16) == (name, f"XPO_FAST_BACKEND is {name}")
    assert choose_backend("auto", CPU, F32) == (name if name in ("torch", "dense") else "torch")
    for other in BACKENDS:
        assert choice(other, GPU, BF16) == (other, "")
    assert named_backend("auto") == name
    assert not children.words


def test_an_override_that_is_none(gpu, monkeypatch):
    monkeypatch.setenv("XPO_FAST_BACKEND", "tritn")
    match = "XPO_FAST_BACKEND names no backend: 'tritn'; there are auto, dense, torch, triton, cuda"
    for call in (
        lambda: choose_backend("auto", GPU, BF16),
        lambda: xf.token_logps(torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, -100])),
        lambda: xf.gather_logps(torch.zeros(3, 4), torch.tensor([0, 3, -100])),
        lambda: xf.Objective("simpo"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert choose_backend("torch", GPU, BF16) == "torch"
    with pytest.raises(ValueError, match="no backend named 'tritn'"):
        choose_backend("tritn", GPU, BF16)


def test_what_is_named_is_never_checked(gpu, children):
    for name in BACKENDS:
        assert choice(name, GPU, BF16) == (name, "")
    assert not children.words


def test_while_a_graph_is_captured(gpu, children, monkeypatch, caplog):
    """What is known or written down holds; nothing is found out. That nothing is known is said once."""
    monkeypatch.setattr("xpo_fast.device.capturing", lambda: True)
    for dtype in (BF16, F32):
        found = choice("auto", GPU, dtype)
        assert found.backend == "torch" and "has not been checked here yet" in found.why
    assert caplog.text.count("call once before compiling or capturing") == 1
    verdict._write(verdict.entry(GPU, BF16), GOOD)
    verdict._known[0, F32] = GOOD
    assert choose_backend("auto", GPU, BF16) == choose_backend("auto", GPU, F32) == "triton"
    assert not children.words and len(caplog.records) == 1


def test_without_running(gpu, children):
    assert "xpo-fast doctor --check" in choice("auto", GPU, BF16, run=False).why
    verdict.verdict(GPU, BF16)
    verdict.forget()
    assert choice("auto", GPU, BF16, run=False).backend == "triton"
    assert len(children.words) == 1


def test_gather(gpu, children):
    """By the dtype of the logits; what the kernels do not take is torch's, and needs no check."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    with FakeTensorMode():
        logits = torch.empty(3, 5, dtype=BF16, device="cuda:0")
        assert gather._choose_backend("auto", logits) == "triton" and len(children.words) == 1
        assert gather._choose_backend("auto", torch.empty(5, 3, dtype=BF16, device="cuda:0").T) == "torch"
        assert gather._choose_backend("auto", logits.double()) == "torch"
    assert len(children.words) == 1


@pytest.mark.parametrize("name", ["dense", "cuda"])
def test_gather_has_two(name, gpu, monkeypatch):
    monkeypatch.setenv("XPO_FAST_BACKEND", name)
    with FakeTensorMode():
        assert gather._choose_backend("auto", torch.empty(3, 5, device="cuda:0")) == "torch"


def test_the_variable_leaves_a_cut_vocabulary_alone(gpu, children, monkeypatch):
    """Its loss is evaluated by live tiles, and by no kernel, as without the variable."""
    objective = xf.Objective("simpo")
    weight = torch.zeros(5, 4, requires_grad=True)
    shard = VocabShard(None, 5, 0, 5, 5, True)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(VocabShard, "why", "; cut")
    monkeypatch.setattr("xpo_fast.objective.objective.Launches", None)
    evaluation, operands = SimpleNamespace(batch=SimpleNamespace(device=GPU)), SimpleNamespace(shard=shard)
    for name in ("dense", "cuda"):
        monkeypatch.setenv("XPO_FAST_BACKEND", name)
        targets = torch.zeros(2, 3, dtype=torch.long)
        found = objective.plan(torch.zeros(2, 3, 4), weight, targets, vocab_shard=shard)
        assert found.backend == "torch" and found.why.startswith("the loss of whole pairs")
        assert objective._launches(evaluation, operands) is None  # pyright: ignore[reportArgumentType]


def test_the_plan_says_why(gpu, children, monkeypatch):
    monkeypatch.setattr(xf.head.plan, "fit_tiles", lambda *_, **__: (Tiling(1, 1), None, 1))
    why = "; auto is triton, which passed its check on NVIDIA H200"
    with FakeTensorMode():
        hidden, weight = (torch.empty(*s, 4, dtype=BF16, device="cuda:0") for s in ((2, 3), (5,)))
        found = xf.head.head_plan(hidden, weight)
        assert found.backend == "triton" and found.why.endswith(why) and why in str(found)
        assert xf.head.head_plan(hidden, weight, backend="triton").why == found.why.removesuffix(why)
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4, requires_grad=True)
    targets = torch.zeros(2, 3, dtype=torch.long)
    assert "auto" not in xf.head.head_plan(hidden, weight).why
    monkeypatch.setenv("XPO_FAST_BACKEND", "torch")
    found = xf.Objective("simpo").plan(hidden, weight, targets)
    assert "whole pairs" in found.why and "; XPO_FAST_BACKEND is torch" in found.why


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "_dtypes", list)
    monkeypatch.setattr(doctor, "_try_backend", lambda name, device: "works")


def test_doctor_without_a_gpu(capsys, quick_doctor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor", "--check"]) == 0
    said = capsys.readouterr().out
    assert "torch sees no GPU: there is nothing to check" in said and "auto on cpu      torch" in said


def test_doctor_runs_nothing(gpu, children, capsys, quick_doctor):
    assert cli.main(["doctor"]) == 0
    assert "auto on cuda:0 bfloat16 torch: auto is torch: triton has not been checked here yet" in (
        capsys.readouterr().out
    )
    assert not children.words
    verdict.verdict(GPU, BF16)
    verdict.forget()
    assert cli.main(["doctor"]) == 0
    assert "auto on cuda:1 bfloat16 triton: auto is triton, which passed" in capsys.readouterr().out
    assert len(children.words) == 1


def test_doctor_checks(gpu, children, capsys, quick_doctor):
    """Anew, every GPU and dtype; what fails is kept, though another GPU of that name passes."""
    assert cli.main(["doctor", "--check"]) == 0
    assert capsys.readouterr().out.count("triton passed its check") == 6 and len(children.words) == 6
    children.answer = lambda words: BAD if {"cuda:0", "bfloat16"} <= {*words} else GOOD
    assert cli.main(["doctor", "--check"]) == 1
    said = capsys.readouterr().out
    assert (
        said.count("triton passed its check") == 5
        and "cuda:0 bfloat16  triton failed its check (off by a mile)" in said
    )
    assert "on NVIDIA H200 (sm_90)" in said.partition("\nproblems")[2]
    verdict.forget()
    assert verdict.recorded(torch.device("cuda", 1), BF16) == BAD and verdict.recorded(GPU, F32) == GOOD
    children.answer = GOOD
    assert cli.main(["doctor", "--check"]) == 0
    verdict.forget()
    assert verdict.recorded(GPU, BF16) == GOOD


def test_doctor_on_a_gpu_that_others_use(gpu, children, capsys, quick_doctor):
    """It keeps no pass of another GPU of that name from being written, and unwrites none."""
    for busy in ("cuda:0", "cuda:1"):
        children.answer = lambda words, busy=busy: FULL if busy in words else GOOD
        assert cli.main(["doctor", "--check"]) == 1
        assert f"{busy} bfloat16  triton could not be checked (out of memory)" in capsys.readouterr().out
        verdict.forget()
        assert verdict.recorded(GPU, BF16) == GOOD
    verdict.STORE.path.unlink()
    assert cli.main(["doctor", "--check"]) == 1
    verdict.forget()
    assert verdict.recorded(GPU, BF16) == GOOD


def test_doctor_checks_what_can_be(gpu, children, capsys, quick_doctor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert cli.main(["doctor", "--check"]) == 0
    assert "not checked: triton's products need compute capability 8.0" in capsys.readouterr().out
    assert not children.words
