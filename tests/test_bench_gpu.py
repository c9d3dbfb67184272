"""The benchmarks for a GPU run without one: tiny shapes, tables and result files.

And the parts that need no GPU: how stages end, whether the poison reaches all memory, the precision of a tensor core.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import gpu
import gpu_device
import gpu_report
import gpu_stages
import truncation
from gpu_stages import CALLS, LIMITS_S, Stage
from report import DEVICE_LOST, Report

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_quick(tmp_path):
    """Ours and the materialised loss on a CPU: correct, timed by wall clock and marked so."""
    path = tmp_path / "results.json"
    done = run("--quick", "--shapes", "64x48x1009", "--only", "torch", "triton", "plain", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wall, CPU" in done.stdout

    results = json.loads(path.read_text())
    about = results["environment"]
    assert about["device"] == "cpu" and about["clock"] == "wall, CPU"
    assert {"commit", "seed", "versions", "date"} <= about.keys() and "torch" in about["versions"]
    timed = {(r["case"], r["contender"]) for r in results["timing"] if r.get("median_ms", 0) > 0}
    cases = ("frozen", "trainable", "logps", "gather")
    assert timed >= {(case, who) for case in cases for who in ("floor", "torch", "plain")}
    ours = [r for r in results["timing"] if r["contender"] == "torch"]
    assert all(r["checked"] and not r["outside_tolerance"] and r["errors"] for r in ours)
    assert {name for r in ours for name in r["errors"]} == {
        *("logps", "logps_rms", "loss", "hidden_grad", "weight_grad")
    }


def test_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2 and "no GPU" in capsys.readouterr().err


def tiny(monkeypatch, path, *names):
    """gpu.main on the CPU: its exit status and the result file."""
    arguments = ["--quick", "--shapes", "16x16x33", "--cases", "frozen", "--json", path, "--only", *names]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    status = gpu.main()
    return status, json.loads(path.read_text())


def test_peers_that_fail(tmp_path, monkeypatch):
    """One that does not import with what is here, and one that is asked for its results: ours have theirs."""

    def import_fails(task, device):
        raise TypeError("no key for a Logger")

    def call_fails(batch):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(gpu.CONTENDERS, "QuACK CE", import_fails)
    monkeypatch.setitem(gpu.CONTENDERS, "TRL", lambda task, device: gpu.Contender(call_fails, "token"))
    status, found = tiny(monkeypatch, tmp_path / "r.json", "QuACK CE", "TRL", "torch")
    assert status == 0 and found["ended"] and not found["problems"]
    assert found["missing"] == {"QuACK CE": "QuACK CE: TypeError: no key for a Logger"}
    records = {r["contender"]: r for r in found["timing"]}
    assert "illegal" in records["TRL"]["failed"] and records["torch"]["median_ms"] > 0


def test_a_lost_device_ends_the_process_and_names_who_lost_it(tmp_path, monkeypatch):
    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    class Device:
        type = "cuda"

    def call_fails(batch):
        raise RuntimeError("an illegal memory access")

    def run_case(bench, *arguments):
        bench.device = Device()
        try:
            inner(bench, *arguments)
        finally:
            bench.device = gpu.torch.device("cpu")

    inner = gpu.Bench.run_case
    monkeypatch.setattr(gpu.Bench, "run_case", run_case)
    monkeypatch.setattr(gpu, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu, "lost", lambda device: True)
    monkeypatch.setattr(gpu.os, "_exit", end)
    monkeypatch.setitem(gpu.CONTENDERS, "TRL", lambda task, device: gpu.Contender(call_fails, "token"))
    with pytest.raises(Ended, match=str(DEVICE_LOST)):
        tiny(monkeypatch, tmp_path / "r.json", "TRL", "torch")
    found = json.loads((tmp_path / "r.json").read_text())
    assert not found["ended"] and found["contender"] == "TRL" and "is lost" in found["problems"][0]


@pytest.mark.parametrize("wrong", [False, True])
def test_layouts(wrong, tmp_path, monkeypatch):
    """A smaller model than --quick has: every layout compared and timed, and the exit status says which is wrong."""
    pytest.importorskip("transformers")
    import gpu_layouts

    monkeypatch.setattr(gpu_layouts, "HEADS", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    monkeypatch.setattr(gpu_layouts, "SIZES", (gpu_layouts.Size("small", 16, 1, 97, 2, 60, 9),))
    if wrong:
        prove = gpu_layouts.prove
        refuse = {"allowed_gradient": -1.0}
        monkeypatch.setattr(gpu_layouts, "prove", lambda *x, **how: dataclasses.replace(prove(*x, **how), **refuse))
    monkeypatch.setattr(sys, "argv", ["gpu_layouts.py", "--quick", "--json", str(tmp_path / "r.json")])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu_layouts.main() == wrong
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["ended"] and len(found["problems"]) == 2 * wrong
    padded, packed, shared = found["layouts"]
    assert [x["layout"] for x in found["layouts"]] == ["padded", "packed", "shared"]
    assert padded["positions"] > packed["positions"] > shared["positions"]
    assert all(x["median_ms"] > 0 and x["right"] == (not wrong or x is padded) for x in found["layouts"])
    assert shared["attention"] == "sdpa per segment (on cpu)" and shared["gradient"] < 1e-5


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("wrong", [False, True])
def test_offload(wrong, tmp_path, monkeypatch):
    """A smaller model than --quick has: gradients through the host, and steps in the backward; it sees wrong copies."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import gpu_layouts
    import gpu_offload
    from xpo_fast.trainer import offload

    monkeypatch.setattr(gpu_layouts, "HEADS", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    monkeypatch.setattr(gpu_offload, "SIZES", (gpu_layouts.Size("small", 16, 1, 97, 2, 60, 9),))
    monkeypatch.setattr(offload, "LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(offload, "WINDOW_BYTES", 1 << 12)
    if wrong:
        monkeypatch.setattr(gpu_offload.HostCopies, "come_back", lambda self, there: (there.roll(4), None))
    monkeypatch.setattr(sys, "argv", ["gpu_offload.py", "--quick", "--json", str(tmp_path / "r.json")])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu_offload.main() == wrong
    found = json.loads((tmp_path / "r.json").read_text())
    moved, stepped = found["offload"][:-1], found["offload"][-1]
    assert found["ended"] and len(moved) == 8 and len(found["problems"]) == 8 * wrong
    assert all(x["right"] == (not wrong) and x["repeat"] == 0 and x["time"] > 0 for x in moved)
    assert stepped["lever"] == "in backward" and stepped["right"] and stepped["difference"] == 0


# --- stages -----------------------------------------------------------------------------------------------------------


def stub(name, body, limit_s=20, **more):
    """A stage whose program is `body`; it has its result file as `path`, and what was given beside it as `more`."""
    head = (
        "import json, os, signal, sys, time\nfrom pathlib import Path\npath = Path(sys.argv[1]); more = sys.argv[2:]\n"
    )
    whole = 'def whole(**content): path.write_text(json.dumps({"ended": True, **content}))\n'
    part = 'def part(**content): path.write_text(json.dumps({"ended": False, **content}))\n'
    program = head + whole + part + textwrap.dedent(body)
    return Stage(name, limit_s, "", ("-c", program, "{out}"), **more)


def call(tmp_path, *stages, **more):
    found = gpu_stages.run_call(stages, tmp_path, dict(os.environ), dry=False, **more)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert [e["stage"] for e in summary["stages"]] == [e.stage for e in found]
    return found, summary


def test_however_a_stage_ends_the_others_have_their_results(tmp_path, monkeypatch):
    """One that crashes, one that hangs and cannot be asked to end, one that fails, one that dies in its result file."""
    child = tmp_path / "child"
    monkeypatch.setattr(gpu_stages, "GRACE_S", 0.5)
    found, summary = call(
        tmp_path,
        stub("crash", "part(doing='a kernel', seen=1); os.kill(os.getpid(), signal.SIGSEGV)"),
        stub(
            "hang",
            f"""
            import subprocess
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            part(doing="waiting", seen=2)
            started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            Path({str(child)!r}).write_text(str(started.pid))
            time.sleep(60)
            """,
            limit_s=2,
        ),
        stub("broken", "path.write_text('{\"ended\": tr'); print('said this'); sys.exit(5)"),
        stub("silent", ""),
        stub("lost", "part(doing='the third', seen=3); sys.exit(3)"),
        stub("good", "whole(seen=4)"),
    )
    ends = {e.stage: (e.how, e.well, e.results, e.doing) for e in found}
    assert ends == {
        "crash": ("killed by SIGSEGV", False, "partial", "a kernel"),
        "hang": ("out of time (2 s)", False, "partial", "waiting"),
        "broken": ("failed (exit status 5)", False, "broken", ""),
        "silent": ("ended without all results", False, "none", ""),
        "lost": ("lost its device (exit status 3)", False, "partial", "the third"),
        "good": ("ended well", True, "whole", ""),
    }
    seen = {name: content["seen"] for name, content in summary["results"].items()}
    assert seen == {"crash": 1, "hang": 2, "lost": 3, "good": 4}
    assert "said this" in (tmp_path / "log.txt").read_text()
    assert next(e.seconds for e in found if e.stage == "hang") < 10
    until = time.monotonic() + 10
    while Path(f"/proc/{child.read_text()}").exists():  # what it had started has ended, too
        status = Path(f"/proc/{child.read_text()}/stat").read_text()
        if status.rpartition(")")[2].split()[0] == "Z" or time.monotonic() > until:
            break
        time.sleep(0.05)
    assert time.monotonic() < until


def test_run_again_without_the_peer_that_ended_it(tmp_path):
    """Once for each peer, not without one of ours, and what was found before is kept."""
    dies = """
    if "Liger fused" not in more:
        part(doing="Liger fused in frozen", contender="Liger fused", seen=1)
        sys.exit(3)
    if "TRL" not in more:
        part(doing="TRL in frozen", contender="TRL", seen=2)
        os.abort()
    part(doing="triton in logps", contender="triton", seen=more)
    sys.exit(3)
    """
    found, summary = call(tmp_path, stub("head", dies, peers=True), stub("next", "whole()"))
    assert [(e.stage, e.contender) for e in found] == [
        ("head", "Liger fused"),
        ("head", "TRL"),
        ("head", "triton"),
        ("next", ""),
    ]
    results = summary["results"]
    assert results["head, ended at Liger fused"]["seen"] == 1
    assert results["head, ended at TRL"]["seen"] == 2
    assert results["head"]["seen"] == ["--without", "Liger fused", "TRL"]


def test_nothing_after_a_gate_that_failed(tmp_path):
    found, _ = call(tmp_path, stub("smoke", "whole(); sys.exit(1)", gate=True), stub("next", "whole()"))
    assert [e.stage for e in found] == ["smoke", "smoke"] and "nothing more" in found[-1].how
    assert not (tmp_path / "next.json").exists()


def test_a_call_ends_in_time(tmp_path):
    """A stage has what is left of the call's time, if that is less than its own; then none."""
    slow = "part(doing='sleeping'); time.sleep(30)"
    found, _ = call(tmp_path, stub("slow", slow), stub("late", "whole()"), limit_s=1.2)
    assert [e.how for e in found] == ["out of time (1 s)", "not run: no time is left"]


def test_a_tool_that_is_missing(tmp_path):
    found, _ = call(tmp_path, stub("memcheck", "whole()", under=("no-such-tool", "--tool")))
    assert found[0].how == "not run: no no-such-tool here" and not found[0].well


@pytest.mark.parametrize("name", CALLS)
def test_limits(name):
    """Of the stages, and ten seconds to unpack what was carried; the first call takes six minutes at most."""
    assert sum(stage.limit_s for stage in CALLS[name]) + 10 <= LIMITS_S[name]
    assert LIMITS_S["first"] <= 360
    assert all(stage.decides and "{out}" in stage.command for stage in CALLS[name])


def test_plan(capsys, tmp_path):
    assert gpu_stages.main(["plan", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(stage.name in said and stage.decides in said for stages in CALLS.values() for stage in stages)
    assert "not there yet" in said and f"--archive {tmp_path / 'site.tar.xz'}" in said


def test_report_is_whole_at_every_step(tmp_path):
    report = Report(tmp_path / "r.json", found=[])
    report.begin("a kernel", "TRL")
    assert gpu_stages.read_results(tmp_path / "r.json")[0] == "partial"
    content = json.loads((tmp_path / "r.json").read_text())
    assert (content["doing"], content["contender"]) == ("a kernel", "TRL")
    report.end()
    assert gpu_stages.read_results(tmp_path / "r.json")[0] == "whole"
    assert os.listdir(tmp_path) == ["r.json"]


def test_dry_run(tmp_path):
    """The real stage of one section, by the command for a GPU, with its environment and an archive of packages."""
    site = tmp_path / "site"
    (site / "inner").mkdir(parents=True)
    (site / "inner" / "quack.py").touch()  # one of the peers that it looks for, where a *.pth file says
    (site / "some.pth").write_text("import sys; sys.path.insert(0, " + repr(str(site / "inner")) + ")\n")
    with tarfile.open(tmp_path / "site.tar.xz", "w:xz") as archive:
        archive.add(site, ".")
    command = [sys.executable, SCRIPT.parent / "gpu_stages.py", "first", "--dry", "--only", "smoke"]
    done = subprocess.run(
        [*command, "--archive", tmp_path / "site.tar.xz", "--out", tmp_path],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke: ended well" in done.stdout
    smoke = json.loads((tmp_path / "results.json").read_text())["results"]["smoke"]
    assert smoke["ended"] and any(record.get("right") for record in smoke["smoke"])
    assert "quack" in next(record["value"] for record in smoke["smoke"] if record["what"] == "peers")


# --- poison -----------------------------------------------------------------------------------------------------------


class Allocator:
    """A model of torch's caching allocator on one stream: best fit, splitting, no joining across segments.

    A block is [segment, offset, size, free]; `filled` has the bytes that somebody has filled, (from, to) by segment.
    """

    ROUND, SMALL = 512, 2**20

    def __init__(self):
        self.blocks, self.segments, self.filled = [], [], {}

    def allocate(self, size):
        size = -(-size // self.ROUND) * self.ROUND
        small = size <= self.SMALL
        fits = [b for b in self.blocks if b[3] and b[2] >= size and self.segments[b[0]] == small]
        block = min(fits, key=lambda b: b[2], default=None)
        if block is None:
            whole = 2**21 if small else 20 * 2**20 if size < 10 * 2**20 else -(-size // 2**21) * 2**21
            block = [len(self.segments), 0, whole, True]
            self.segments.append(small)
            self.blocks.append(block)
            self.filled[block[0]] = []
        rest = block[2] - size
        if rest >= self.ROUND if small else rest > self.SMALL:
            self.blocks.append([block[0], block[1] + size, rest, True])
            block[2] = size
        block[3] = False
        return block

    def fill(self, size):
        block = self.allocate(size)
        self.filled[block[0]].append((block[1], block[1] + size // 4 * 4))
        return block

    def free(self, block):
        block[3] = True
        joined = None
        for b in sorted((b for b in self.blocks if b[0] == block[0]), key=lambda b: b[1]):
            if joined is not None and joined[3] and b[3]:
                joined[2] += b[2]
                self.blocks.remove(b)
            else:
                joined = b

    def empty_cache(self):
        self.blocks = [b for b in self.blocks if not all(x[3] for x in self.blocks if x[0] == b[0])]

    def snapshot(self):
        return [
            {
                "segment_type": "small" if small else "large",
                "blocks": [
                    {"size": b[2], "state": "inactive" if b[3] else "active_allocated"}
                    for b in self.blocks
                    if b[0] == segment
                ],
            }
            for segment, small in enumerate(self.segments)
            if any(b[0] == segment for b in self.blocks)
        ]

    def poisoned(self, block):
        """Whether every byte of a block was filled."""
        at, end = block[1], block[1] + block[2]
        for start, stop in sorted(self.filled[block[0]]):
            if start <= at < stop:
                at = stop
        return at >= end


CARD = 140 * 2**30
# dz of a tile, two steps of float32 logits, dW in float32, gradients, and what goes with them: at D 4096 and V 128256.
WANTED = (8192 * 128256 * 2, 768 * 128256 * 4, 768 * 128256 * 4, 128256 * 4096 * 4, 8192 * 4096 * 4, 8192 * 4096 * 2)
WANTED += (10 * 2**20, 3 * 2**20, *[8192 * 8] * 100, 512)


def warm():
    """An allocator in which a call has left the blocks of its results, between free ones of all sizes."""
    model = Allocator()
    held = [model.allocate(size) for size in (3 * 2**30, *WANTED, 600 * 2**20, 2**19, 2**18)]
    for block in held[::2]:
        model.free(block)
    return model


def test_poison_reaches_what_is_allocated_next():
    model = warm()
    model.empty_cache()
    held = [model.fill(size) for size in gpu_device.poison_sizes(CARD, model.snapshot())]
    for block in held:
        model.free(block)
    assert all(model.poisoned(model.allocate(size)) for size in WANTED)


def test_many_smaller_blocks_would_not():
    """What the sizes are for: what the device gives for 256 MiB and again 256 MiB is never one block of 512."""
    model = Allocator()
    held = [model.fill(size) for size in [2**20] * 64 + [2**28] * 32]
    for block in held:
        model.free(block)
    reached = [model.poisoned(model.allocate(size)) for size in WANTED]
    assert not reached[0] and not reached[3]


@pytest.mark.parametrize("free", [0, 2**20, 2**31, CARD])
def test_poison_leaves_half_of_what_is_free(free):
    large = [size for size in gpu_device.poison_sizes(free, []) if size > gpu_device.SMALL]
    assert sum(large) <= free // 2
    assert free < 2**31 or large


# --- precision --------------------------------------------------------------------------------------------------------


def test_what_a_tensor_core_leaves_of_a_log_prob():
    """Twice the width, twice the error; far above that of rounding, far below float16's. The aim has room."""
    found = {width: truncation.logp_errors(width, 1024, 32) for width in (2048, 4096)}
    largest = {width: {k: np.abs(e).max() for k, e in errors.items()} for width, errors in found.items()}
    assert 2e-5 < largest[2048]["cut off"] < 8e-5 < largest[4096]["cut off"] < gpu_report.LOGP_AIM
    for errors in largest.values():
        assert errors["rounded"] < errors["cut off"] / 5
        assert errors["cut off, then float16"] > 10 * errors["cut off"]
        assert errors["cut off, then bfloat16"] > 4 * errors["cut off, then float16"]


def test_predictions_are_current(monkeypatch, capsys):
    """docs/gpu.md has what bench/predict.py prints, and what bench/launches.py does of one shape."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    launches, predict = map(importlib.import_module, ("launches", "predict"))
    text = (SCRIPT.parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    monkeypatch.setattr(launches, "SHAPES", [launches.Shape(8192, 4096, 128256)])
    monkeypatch.setattr(sys, "argv", ["a script"])

    assert predict.main() == 0
    assert text.endswith("\n\n" + capsys.readouterr().out)
    assert launches.main() == 0
    assert "\n\n" + capsys.readouterr().out + "\n" in text
