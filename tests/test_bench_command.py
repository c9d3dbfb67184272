"""The command `xpo-fast bench`: correctness before times, what is missing or wrong, files, comparison, and figures."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from test_trainer import make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.bench import comparison, contenders, head, memory, plots, problem, results, suites, tables, work
from xpo_fast.bench.measure import environment

pytest.importorskip("pytest_benchmark", reason="an optional extra: pip install xpo_fast[bench]")

ROOT = Path(__file__).resolve().parent.parent
FLOOR = work.FLOOR


@pytest.fixture(autouse=True)
def threads():
    """The command may set the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*words) -> int:
    return cli.main(["bench", *map(str, words)])


def by_contender(path) -> dict[tuple[str, str], dict]:
    return {(r["key"], r["contender"]): r for r in results.records_of(json.loads(Path(path).read_text()))}


# --- losses -----------------------------------------------------------------------------------------------------------


def test_every_loss_is_right_before_it_is_timed(tmp_path, capsys):
    """Ours, torch's and the peers' results agree with float64 in each case, and each has its times and statistics."""
    path, text = tmp_path / "new.json", tmp_path / "new.md"
    peers = [word for name in ("materialised", "TRL", "Liger", "torch lin") for word in ("--contenders", name)]
    assert bench("losses", "--quick", "--dtype", "fp32", *peers, "--json", path, "--markdown", text) == 0
    found = by_contender(path)
    shape = head.QUICK_SHAPE
    for case in problem.CASES:
        of = {c: r for (key, c), r in found.items() if key == f"losses/{case}, fp32, {shape}"}
        assert {FLOOR, "materialised", "xpo_fast, dense", "xpo_fast, triton", "xpo_fast, cuda"} < of.keys(), case
        assert ("Liger" in of) == (case.split("-")[0] in ("dpo", "simpo", "kto", "grpo"))
        for name, r in of.items():
            if name in ("xpo_fast, triton", "xpo_fast, cuda"):
                assert "pass backend=" in r["missing"]
            elif "missing" not in r:
                assert len(r["samples_ms"]) in (1, 2) and r["over_floor"] > 0 and "failed" not in r, (case, name, r)
                if r["ours"] or ("gemms" in r and not name.startswith(("floor", "the same"))):
                    assert r["wrong"] == [] and 0 < r["errors"]["hidden_grad"] < 1e-4, (case, name, r)
    assert text.read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
    assert (
        "Not measured:" in text.read_text() and "xpo_fast, triton: the triton backend runs on GPUs" in text.read_text()
    )

    # pytest-benchmark reads the file.
    read = importlib.import_module("pytest_benchmark.cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest-benchmark", "compare", str(path), "--columns", "median,iqr"])
        read.main()
    shown = capsys.readouterr().out
    assert "dpo-prompts" in shown and "Liger fused" in shown


def test_what_is_wrong_has_no_time(tmp_path, monkeypatch, capsys):
    """A peer's wrong loss is said and costs nothing; an error of ours is exit code 1."""
    right, ours = contenders.materialised_logps, contenders.token_logps
    monkeypatch.setattr(contenders, "materialised_logps", lambda *a: right(*a) * 1.01)
    case = ("losses", "--quick", "--dtype", "fp32", "--cases", "frozen", "--contenders", "materialised")
    path = tmp_path / "new.json"
    assert bench(*case, "--json", path) == 0
    record = by_contender(path)[f"losses/frozen, fp32, {head.QUICK_SHAPE}", "materialised"]
    assert "samples_ms" not in record and "logps" in record["wrong"]
    assert "materialised: WRONG, so not timed: errors against float64: hidden_grad" in capsys.readouterr().out
    monkeypatch.setattr(contenders, "token_logps", lambda *a, **k: ours(*a, **k) * 1.0001)
    assert bench(*case) == 1
    assert "xpo-fast: wrong: losses/frozen" in capsys.readouterr().err

    def fails(*a, **k):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(contenders, "token_logps", fails)
    assert bench(*case) == 1
    assert "xpo_fast token_logps: FAILED: RuntimeError: no such kernel\n" in capsys.readouterr().out


def test_missing_peers_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_logprob", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    words = [w for name in ("TRL", "Liger", "CCE", "torch lin") for w in ("--contenders", name)]
    assert bench("losses", "--quick", "--dtype", "fp32", "--cases", "dpo-frozen", "--cases", "frozen", *words) == 0
    shown = capsys.readouterr().out.partition("Not measured:")[2]
    for name, how in (
        ("TRL", "trl==1.16.0"), ("Liger", "liger-kernel==0.8.5"), ("CCE", "cut-cross-entropy"),
        ("torch linear_cross_entropy, chunked", "torch==2.13.0"),
    ):  # fmt: skip
        assert re.search(rf"- {re.escape(name)}: .*pip install {re.escape(how)}", shown), name


def test_sweeps_vary_one_size():
    """T, V, D, the scored share, P and K, as they reach the problem."""
    found = {w.name: w.run.args[0] for w in head.sweep_works(work.Settings())}
    base = found["T = 32"]
    assert {p.shape for n, p in found.items() if n.startswith("T")} == {
        base.shape._replace(scored=8 * t) for t in (16, 32, 64)
    }
    assert [found[f"V = {v}"].shape.vocab for v in (4096, 32768)] == [4096, 32768]
    assert [found[f"D = {d}"].shape.width for d in (256, 1024)] == [256, 1024]
    assert [found[f"scored share = {s}"].shape.scored for s in ("0.25", "0.5", "1")] == [128, 256, 512]
    assert [found[f"P = {p}"].rows for p in (1, 4, 8)] == [2, 8, 16]
    assert [found[f"K = {k}"].case.list_size for k in (2, 4, 8)] == [2, 4, 8]
    made = found["scored share = 0.25"]
    small = head.Problem(made.name, made.case, 8, 4, 11, rows=2)
    assert small.batches()[0].mask.sum(1).tolist() == [2, 2]


def test_memory_is_of_a_fresh_process(monkeypatch):
    """The materialised logits are seen, and ours stays within its bound; a failing process is said."""
    made = {w.name.rpartition(", ")[2]: w for w in memory.works(work.Settings(quick=True, contenders=("mat",)))}
    layout = memory.QUICK
    logits_mib = layout.rows * layout.length * layout.vocab * 4 / 2**20
    materialised = memory.measure(layout, "dpo", "materialised", "fp32")
    (ours,) = made["xpo_fast Objective"].run()
    assert materialised["mib"] >= 2 * logits_mib and "bound_mib" not in materialised
    assert ours["within_bound"] and ours["mib"] < ours["bound_mib"] == 256 * 1.1
    (missing,) = made["cuda"].run()
    assert "needs an NVIDIA GPU" in missing["missing"] and "mib" not in missing
    monkeypatch.setattr(sys, "executable", "false")
    (bad,) = made["materialised"].run()
    assert bad["failed"] == "it ended with 1" and "mib" not in bad


# --- files ------------------------------------------------------------------------------------------------------------


def fake(monkeypatch, over=1.5, ours=True, **more):
    """Replaces the measurements of the losses by one record, and returns the names of the cases that were run."""
    run = []

    def measure(problem, settings, wanted):
        run.append(problem.name)
        if problem.name == getattr(measure, "stops", None):
            raise KeyboardInterrupt
        times = {"samples_ms": [2.0 * over, 2.0 * over], "median_ms": 2.0 * over, "over_floor": over}
        one = {"contender": "xpo_fast Objective" if ours else "TRL", "ours": ours, **times, **more}
        floor = {"contender": FLOOR, "ours": False, "samples_ms": [2.0, 2.0], "median_ms": 2.0, "over_floor": 1.0}
        params = {"case": problem.name, "dtype": "fp32", **problem.shape._asdict()}
        return [r | {"params": params} for r in (floor, one)]

    monkeypatch.setattr(head, "run", measure)
    return run, measure


def test_resume(tmp_path, monkeypatch, capsys):
    """What was finished before Ctrl-C is kept, and the rest is measured; another run's file is refused."""
    path = tmp_path / "new.json"
    run, measure = fake(monkeypatch)
    words = ("losses", "--quick", "--dtype", "fp32", "--cases", "dp", "--json", path)
    measure.stops = "dpo"
    assert bench(*words) == 130
    error = capsys.readouterr().err
    assert f"stopped; {path} has the 1 finished cases, and the same command with --resume goes on" in error
    assert "[2/4] losses: dpo, fp32" in error and "left" in error
    measure.stops = None
    assert bench(*words) == 2 and "--resume keeps its finished cases, --overwrite" in capsys.readouterr().err
    del run[:]
    assert bench(*words, "--resume") == 0
    assert run == ["dpo", "dpo-prompts", "dpo-accumulated"]
    assert "1 of 4 cases were finished before" in capsys.readouterr().err
    content = json.loads(path.read_text())
    assert len(content["finished"]) == 4 and len(content["benchmarks"]) == 8
    assert bench(*words, "--resume") == 0 and len(run) == 3

    assert bench(*words, "--resume", "--max-length", "100") == 2
    assert "is of a run with other --max_length" in capsys.readouterr().err
    content["environment"]["threads"] = 64
    path.write_text(json.dumps(content))
    assert bench(*words, "--resume") == 2 and "with other threads" in capsys.readouterr().err
    path.write_text("{}")
    assert bench(*words, "--resume") == 2 and "is not a result file" in capsys.readouterr().err
    assert bench(*words, "--overwrite") == 0 and len(json.loads(path.read_text())["finished"]) == 4


def test_compare(tmp_path, monkeypatch, capsys):
    """More than 15% over the floor's time of its own run is worse; of ours it is exit code 1, of a peer it is shown."""
    path, words = tmp_path / "old.json", ("losses", "--quick", "--dtype", "fp32", "--cases", "frozen")
    fake(monkeypatch, over=1.5)
    assert bench(*words, "--json", path) == 0
    fake(monkeypatch, over=1.5 * 1.149)
    assert bench(*words, "--compare", path) == 0
    assert "1 figures compared" in capsys.readouterr().out
    fake(monkeypatch, over=1.5 * 1.151)
    assert bench(*words, "--compare", path) == 1
    said = capsys.readouterr()
    assert f"| losses/frozen, fp32, {head.QUICK_SHAPE}: xpo_fast Objective |" in said.out and "1.15" in said.out
    assert f"worse than in {path}: losses/frozen" in said.err
    fake(monkeypatch, over=1.5, wrong=["loss"], errors={"loss": 1.0})  # a time may not have stayed beside an error
    assert bench(*words, "--compare", path) == 1

    fake(monkeypatch, over=1.0, ours=False)
    assert bench(*words, "--json", path, "--overwrite") == 0
    fake(monkeypatch, over=2.0, ours=False)
    assert bench(*words, "--compare", path) == 0 and "1 worse by more than 15%" in capsys.readouterr().out
    fake(monkeypatch)
    other = ("losses", "--quick", "--dtype", "fp32", "--cases", "kto")
    assert bench(*other, "--compare", path) == 2 and "has no case of this run" in capsys.readouterr().err
    assert bench(*words, "--compare", tmp_path / "none.json") == 2 and "does not exist" in capsys.readouterr().err


def test_compare_sees_memory_and_what_is_lost():
    """A contender of ours that had a figure and has none now is worse, too; so is a higher peak."""
    about = environment()

    def content(**record):
        found = results.Results(None, {})
        found.environment = about
        case = work.Work("memory", "one", 1.0, list)
        found.add(case, [{"contender": "xpo_fast Objective", "ours": True, "params": {}, **record}], 1.0)
        return found.content()

    (change,) = comparison.changes(content(mib=100.0), content(mib=116.0))
    assert change.worse and change.quantity == "peak MiB" and "1.16" in comparison.comparison_table([change])
    assert comparison.lost(content(mib=100.0), content(failed="it broke")) == [
        "memory/one: xpo_fast Objective had a figure, and has none now"
    ]
    assert comparison.differences(content(), content() | {"environment": about | {"threads": 99}})


def test_options_that_cannot_be_honoured(tmp_path, monkeypatch, capsys):
    for words, said in (
        (("nothing",), "no suite named 'nothing'; there are losses, sweep"),
        (("loses",), "did you mean losses"),
        (("losses", "--cases", "xyz"), "no case of losses is, or begins with, xyz"),
        (("losses", "--shapes", "12x4"), "--shapes: expected NxDxV"),
        (("losses", "--shapes", "12x4x5"), "N a multiple of 8"),
        (("losses", "--repeats", "0"), "--repeats must be at least 1, got 0"),
        (("losses", "--resume"), "--resume needs the file: give --json FILE"),
        (("losses", "--json", tmp_path / "x", "--resume", "--overwrite"), "give one of them"),
        (("losses", "--json", tmp_path / "x" / "y.json", "--resume"), "does not exist"),
        (("losses", "--json", "/proc/x.json"), "--json"),
        (("losses", "--json", tmp_path, "--overwrite"), "is a folder: name a file"),
    ):
        assert bench(*words) == 2, words
        assert said in capsys.readouterr().err, words
    find = importlib.util.find_spec
    for name, more in (("pytest_benchmark", ()), ("matplotlib", ("--plot", tmp_path / "plots"))):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a, name=name: None if n == name else find(n, *a))
        assert bench("losses", "--quick", *more) == 2
        assert "pip install 'xpo-fast[bench]'" in capsys.readouterr().err


def test_list(capsys):
    assert bench("--list") == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^\* {name} +\d+ cases, ", shown, re.MULTILINE) for name in suites.DEFAULT)
    assert re.search("^  precision +by name only", shown, re.MULTILINE)
    minutes = int(re.search(r"runs without SUITE: about (\d+) min", shown)[1])
    assert minutes < 15
    assert bench("sweep", "--list") == 0
    assert capsys.readouterr().out.count("sweep ") == 18


def test_plots(tmp_path):
    """A file per suite that has figures, from records with gaps in them."""
    run, missing = {"samples_ms": [1.0], "median_ms": 1.0, "over_floor": 1.2}, {"missing": "not installed"}
    errors = {"errors": {"logps": 1e-6, "loss": None}}
    one = {"contender": "xpo_fast Objective", "ours": True, "params": {"dtype": "fp32"}}
    peer = {"contender": "TRL", "ours": False, "params": {"dtype": "fp32"}}
    point = {"params": {"sweep": "T", "value": 16}}
    records = {
        "losses/dpo": [one | run | errors, peer | missing],
        "losses/kto": [peer | {"failed": "it broke"}],
        "sweep/T = 16": [one | run | point, peer | run | point],
        "memory/a": [one | {"mib": 3.0, "params": {"group": "side by side", "case": "dpo", "dtype": "fp32"}}],
        "steps/dpo": [one | run],
        "precision/AVX2": [peer | run],
    }
    drawn = plots.draw(records, tmp_path / "plots")
    assert [p.name for p in drawn] == ["losses.png", "errors.png", "sweep.png", "memory.png", "steps.png"]
    assert all(p.stat().st_size > 5000 for p in drawn)
    assert plots.draw({"losses/dpo": [peer | missing]}, tmp_path / "none") == []
    assert "TRL: not installed" in tables.markdown(environment(), {"losses/dpo": [peer | missing]})


# --- whole steps ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model and pairs."""
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    rows = [row | {"prompt": "w1 w2 w3 w4 w5 w6 " * 2 + row["prompt"]} for row in make_rows(12)]
    (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return home


def test_steps(home, tmp_path, monkeypatch, capsys):
    """Layouts are compared with padded rows before they are timed; the floor is the model's products."""
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))
    steps = importlib.import_module("xpo_fast.bench.steps")
    path = tmp_path / "new.json"
    words = ("steps", "--model", home / "model", "--data", home / "pairs.jsonl", "--batch-size", 2, "--repeats", 2)
    assert bench(*words, "--cases", "dpo", "--contenders", "none", "--json", path) == 0
    found = {c: r for (key, c), r in by_contender(path).items() if key == "steps/dpo"}
    assert found.keys() == {FLOOR, "padded", "packed", "shared"}
    assert found["padded"]["tokens"] > found["packed"]["tokens"] > found["shared"]["tokens"]
    assert found["padded"]["as_fast_as_padded"] == 1 and found["shared"]["wrong"] == []
    assert all(len(r["samples_ms"]) == 2 for r in found.values())
    assert "times as fast as padded" in capsys.readouterr().out

    monkeypatch.setattr(steps, "difference", lambda *a: 1e-3)
    assert bench(*words, "--cases", "dpo", "--contenders", "none") == 1
    assert "packed: WRONG" in capsys.readouterr().out
    assert bench(*words, "--cases", "dpo", "--max-length", "2") == 1
    assert "failed: steps/dpo: ValueError: expected 2 pairs of at most 2 tokens" in capsys.readouterr().err


def test_the_floor_of_steps_multiplies_what_the_model_does():
    """Padded positions through every linear layer, forward and backward, and scored ones through the head."""
    parts = importlib.import_module("xpo_fast.bench.step_parts")
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    targets = torch.full((2, 5), -100)
    targets[:, 3:] = 1
    rows = [object()]
    step = parts.floor_of(model, [rows], [{"input_ids": ids, "targets": targets}])
    with FlopCounterMode(display=False) as counted:
        step(rows)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    size = 10 * sum(m.weight.numel() for m in layers) + 4 * model.lm_head.weight.numel()
    assert counted.get_total_flops() == 2 * 2 * size


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_results(monkeypatch):
    """Every table of figures is what bench/figures.py makes of bench/results/, and none stands outside its markers."""
    figures = importlib.import_module("figures")
    for page in figures.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert figures.current(text) == text, f"{page} is not current: python bench/figures.py"
    for page in ("README.md", "docs/layouts.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "<!-- figures: steps -->" in text
        rest = figures.BLOCK.sub("", text)
        assert not re.search(r"^\|.*\d\.\d\d", rest, re.MULTILINE), f"{page}: a figure outside the markers"
    with pytest.raises(ValueError, match="no block of figures named 'heads'"):
        figures.current("<!-- figures: heads -->\n<!-- end of figures -->")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    # Another result is another page; a file of the command itself is read as well as one of earlier scripts.
    new = [
        {"key": "steps/dpo", "contender": n, "as_fast_as_padded": x, "tokens": 9, "errors": {"": 1e-7}}
        for n, x in (("packed", 1.5), ("shared", 3.21))
    ]
    monkeypatch.setattr(figures, "read", lambda name: {"benchmarks": [], "untimed": new})
    assert figures.steps().endswith("| a DPO step, its reference cached | 1.50 | **3.21** | | |\n")
    monkeypatch.undo()
    monkeypatch.setitem(figures.BLOCKS, "steps", lambda: "| other |\n")
    assert "| other |\n<!-- end of figures -->" in figures.current(text) != text
