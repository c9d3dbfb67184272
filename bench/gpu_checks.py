"""Runs all checks of the kernels on this machine's GPU and records each outcome: the stage `checks` of gpu_stages.py.

    python bench/gpu_checks.py --json checks.json --jobs 8
    python bench/gpu_checks.py --quick --select gather      # interpreted on the CPU if there is no GPU

The checks are the functions check_* of the kernels' tests, those tests of csrc/ that run on a device, and the functions
below, which need more than one launch: the kernels of objectives, graphs replayed on new data, concurrent threads.

An illegal access affects only the process that made it: a worker that has lost its device ends at once, its check
counts as failed, and another worker runs the rest. Exit status 1: a check failed, or none passed.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

HERE = Path(__file__).resolve()
TESTS = HERE.parent.parent / "tests"
PARAMETER = "XPO_FAST_CHECKS_WITH"  # value of a parameter that selects checks, such as a device
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OBJECTIVES = ("dpo", "simpo", "ipo", "cpo", "kto", "grpo", "gspo", "cispo", "dapo")
HYPER: dict[str, dict[str, Any]] = {"cispo": {"eps": 0.2}}


# --- checks of more than one launch -----------------------------------------------------------------------------------


@pytest.fixture
def backend():
    """Returns the cuda backend, or the torch backend in its place on a CPU."""
    from xpo_fast.head.backends import check_backend

    try:
        check_backend("cuda", torch.device(DEVICE))
    except ValueError as error:
        if CUDA:
            pytest.skip(str(error))
        return "torch"
    return "cuda"


@pytest.mark.parametrize("learn", ["frozen", "trainable"])
@pytest.mark.parametrize("name", OBJECTIVES)
def check_objective_kernels(name, learn, backend):
    """Loss, gradients and metrics equal those of the dense backend, in float32, on rows of different lengths."""
    import xpo_fast as xf

    rows, length, width, vocab = 12, 96, 64, 4099
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, width, generator=generator).to(DEVICE)
    weight = (torch.randn(vocab, width, generator=generator) / 4).to(DEVICE)
    targets = torch.randint(vocab, (rows, length), generator=generator)
    targets[:, :7], targets[3, 40:], targets[5] = -100, -100, -100
    found = []
    for which in ("dense", backend):
        leaves = {"hidden": hidden.clone().requires_grad_()}
        leaves["weight"] = weight.clone().requires_grad_(learn == "trainable")
        objective = xf.Objective(name, backend=which, tile_bytes=300 * vocab * 8, **HYPER.get(name, {}))
        more: dict[str, Any] = {}
        if name == "kto":
            more = {"desirable": torch.arange(rows, device=DEVICE) % 2 == 0}
            more["kl"] = torch.tensor(0.3, device=DEVICE)
        if objective.layout == "policy":
            more["advantage"] = torch.linspace(-1, 1, rows, device=DEVICE)
            more["old_logp"] = torch.full((rows, length), -8.0, device=DEVICE)
        elif objective.needs_reference:
            more["ref_logps"] = torch.linspace(-400, -300, rows, device=DEVICE)
        out = objective(leaves["hidden"], leaves["weight"], targets, **more)
        out.loss.backward()
        gradients = {k: x.grad for k, x in leaves.items() if x.requires_grad}
        found.append({"loss": out.loss.detach(), **gradients, **out.metrics})
    for key, want in found[0].items():
        # A metric that is not defined for this call is NaN in both.
        size = want.double().nan_to_num(0).abs().max().item()
        assert_close(found[1][key], want, rtol=2e-4, atol=2e-5 * (size + 1e-9), equal_nan=True, msg=key)


@pytest.mark.skipif(not CUDA, reason="captures a graph, and there is no GPU")
@pytest.mark.parametrize("which", ["triton", "cuda", "torch"])
def check_graph_on_new_data(which):
    """A replay on data that the captured call has not seen gives the results of a call."""
    import xpo_fast as xf

    def problem(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        hidden = torch.randn(512, 256, device=DEVICE, generator=generator).bfloat16()
        return [hidden, torch.randint(32003, (512,), device=DEVICE, generator=generator)]

    hidden, targets = problem(0)
    weight = torch.randn(32003, 256, device=DEVICE).mul_(0.2).bfloat16()
    hidden.requires_grad_()

    def call() -> list[torch.Tensor]:
        logp = xf.token_logps(hidden, weight, targets, backend=which)
        return [logp.detach(), *torch.autograd.grad(logp.sum(), hidden)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for seed in (5, 6, 5):
        with torch.no_grad():
            for x, new in zip((hidden, targets), problem(seed), strict=True):
                x.copy_(new)
            for x in found:
                x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, call(), strict=True))


@pytest.mark.parametrize("which", ["triton", "cuda", "torch"])
def check_threads(which):
    """Concurrent calls, each in a thread and on a stream of its own, give the bits of a single call."""
    import xpo_fast as xf
    from xpo_fast.head.backends import check_backend

    if which == "triton" and not CUDA:
        pytest.skip("Triton's interpreter is one for all threads")
    try:
        check_backend(which, torch.device(DEVICE))
    except ValueError as error:
        pytest.skip(str(error))
    vocabs = (128256, 151936, 128256, 227000) if CUDA else (1009, 2048, 1009, 777)
    repeats = 100 if CUDA else 2
    problems = {}
    for vocab in vocabs:
        generator = torch.Generator().manual_seed(vocab)
        weight = torch.randn(vocab, 64, generator=generator).mul_(0.3).to(DEVICE, torch.bfloat16)
        hidden = torch.randn(8, 64, generator=generator).to(DEVICE, torch.bfloat16)
        problems[vocab] = hidden, weight, torch.randint(vocab, (8,), generator=generator)

    def call(vocab: int) -> list[torch.Tensor]:
        hidden, weight, targets = problems[vocab]
        hidden = hidden.detach().requires_grad_()
        logp = xf.token_logps(hidden, weight, targets, backend=which)
        return [logp.detach(), *torch.autograd.grad(logp.sum(), hidden)]

    want = {vocab: call(vocab) for vocab in vocabs}
    if CUDA:
        torch.cuda.synchronize()
    wrong: list[str] = []

    def work(vocab: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream() if CUDA else None):
                for _ in range(repeats):
                    if not all(torch.equal(a, b) for a, b in zip(call(vocab), want[vocab], strict=True)):
                        wrong.append(f"V {vocab}: other bits")
        except Exception as error:  # the thread would swallow it
            wrong.append(f"V {vocab}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(vocab,)) for vocab in vocabs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


# --- running them -----------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps only the tests that have the parameter, if one is set: the others run elsewhere."""
    wanted = os.environ.get(PARAMETER)
    if wanted:
        left = [x for x in items if wanted in getattr(getattr(x, "callspec", None), "params", {}).values()]
        config.hook.pytest_deselected(items=[x for x in items if x not in left])
        items[:] = left


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Ends a worker that has lost its device, since all its later checks would fail; other workers continue."""
    if "PYTEST_XDIST_WORKER" in os.environ and CUDA and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid} has lost the device: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)


class Recorder:
    """Records the outcome of every check, and writes failures to the file at once."""

    def __init__(self, report: Any) -> None:
        self.report, self.found, self.problems = report, report.content["checks"], report.content["problems"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records the outcome of a check, or of its setup or teardown if that did not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        record = {"check": report.nodeid, "outcome": outcome, "seconds": report.duration}
        if not report.passed:
            record["why"] = report.longreprtext[-3000:]
        self.found.append(record)
        if report.failed:
            self.problems.append(f"{report.nodeid}: {outcome}")
        if not report.passed or len(self.found) % 20 == 0:
            self.report.save()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Records a file that could not be collected."""
        if report.failed:
            self.problems.append(f"{report.nodeid}: not collected: {report.longreprtext[-1000:]}")
            self.report.save()


def files_with_checks() -> list[str]:
    """Returns the test files that have checks, and this file."""
    return [
        *(str(path) for path in sorted(TESTS.glob("test_*.py")) if "run_checks(__file__" in path.read_text()),
        str(HERE),
    ]


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes to FILE during the run")
    parser.add_argument(
        "--jobs", type=int, default=0, help="number of worker processes (needs pytest-xdist); 0: only this one"
    )
    parser.add_argument("--select", metavar="EXPRESSION", help="select checks, as pytest's -k does")
    parser.add_argument("--quick", action="store_true", help="run in the interpreter, without a GPU")
    args = parser.parse_args()
    if not CUDA:
        if not args.quick:
            print("no GPU: --quick runs the checks in Triton's interpreter", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"
    from report import Report

    report = Report(args.json, checks=[])
    recorder = Recorder(report)
    # Warnings from untested versions of packages are not errors of the kernels.
    common = ["-q", "-W", "default", "-p", "no:cacheprovider", "-p", "gpu_checks", "--tb=short"]
    common += [*(["-n", str(args.jobs)] if args.jobs else []), *(["-k", args.select] if args.select else [])]
    report.begin("the checks of the kernels")
    pytest.main([*common, "-o", "python_functions=check_*", *files_with_checks()], plugins=[recorder])
    report.begin("the tests of csrc on a device")
    os.environ[PARAMETER] = DEVICE
    pytest.main([*common, str(TESTS / "test_cuda_rows.py")], plugins=[recorder])
    report.end()
    count = {outcome: sum(r["outcome"] == outcome for r in recorder.found) for outcome in ("passed", "skipped")}
    print(f"{count['passed']} passed, {len(recorder.problems)} failed, {count['skipped']} skipped")
    for problem in recorder.problems:
        print(problem)
    return 1 if recorder.problems or not count["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
