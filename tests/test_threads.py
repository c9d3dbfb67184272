"""The kernels' own source under ThreadSanitizer, with a thread of the host per CUDA thread.

It finds races that no order of taking turns shows. csrc/emulate_threads.h orders what CUDA orders and nothing else, so
a race that is found is one on a GPU. Each mutant lacks an order that the kernels need; the emulation by turns
(test_cuda_rows.py, test_segments.py) runs most of them without a fault. They are compiled together, once for each state
of the sources, and selected when they run.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from host_compile import CSRC, threaded

BUILD = Path(__file__).parents[1] / "build" / "tests"

ROWS = """
#include "rows.cu"
#include <cstdio>
#include <thread>
// Kept by a cluster of 8, of 4 in place, by one block in place, read twice in place; in blocks of two warps.
int main() {
    struct { int ranks, type; bool statistics; } cases[] = {{8, 1, true}, {4, 0, false}, {1, 0, false}, {0, 0, false}};
    for (const auto& c : cases) {
        constexpr int n = 2, vocab = 267, stride = 272;
        std::vector<float> z(n * stride), out(5 * n);
        std::vector<int64_t> y{3, vocab - 1};
        std::vector<uint16_t> narrow(n * stride);
        for (size_t i = 0; i < z.size(); ++i) z[i] = float(i * 37 % 101) / 10;
        XpoRows r{};
        r.products = z.data(), r.targets = y.data(), r.logp = &out[0], r.lse = &out[n];
        if (c.statistics) r.entropy = &out[2 * n], r.log_sum_sq_probs = &out[3 * n], r.mean_logit = &out[4 * n];
        r.grad = c.type ? static_cast<void*>(narrow.data()) : z.data();
        r.n = n, r.vocab = vocab, r.stride = r.grad_stride = stride, r.gain = 1, r.grad_type = c.type;
        const int ranks = c.ranks ? c.ranks : 1, part = ((vocab + ranks - 1) / ranks + 7) / 8 * 8;
        const XpoRowPlan plan{ranks, part, c.ranks > 0, 64, c.ranks ? 4 * part : 0};
        const int code = xpo_rows_planned(&r, &plan, nullptr);
        std::printf("%d %.3f\\n", code, out[n]);
    }
    // Launches of several threads of the host: all of them opt in.
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([] { xpo::opt_in(reinterpret_cast<const void*>(&xpo_plan_rows), 0); });
    for (auto& t : callers) t.join();
}
"""

SEGMENTS = """
#include "segments.cu"
#include <cstdio>
using namespace xpo;
// Pairs, rows, and tokens with ratios of their own and of their row; twice, as a ticket serves several launches.
int main() {
    const std::vector<int> lengths{1, 40, 0, 64, 65, 3};
    const int rows = int(lengths.size());
    std::vector<int64_t> offsets{0};
    for (int length : lengths) offsets.push_back(offsets.back() + length);
    const auto n = size_t(offsets.back());
    std::vector<float> logp(n), old(n), each(rows, 0.5f), u(n), sums(rows), values(8 * rows), means(7), losses(n);
    std::vector<uint8_t> flags(rows, 1);
    std::vector<int64_t> counts(7);
    std::vector<uint32_t> scratch(1 + 5 * rows);
    for (size_t i = 0; i < n; ++i) logp[i] = -float(i % 17) / 7, old[i] = logp[i] + 0.01f * float(i % 5);
    float loss = -1;
    const auto call = [&](int units) {
        return SegmentCall<float>{int64_t(n), 0, units, logp.data(), offsets.data(), nullptr, nullptr, 1.0, u.data(),
                                  sums.data(), values.data(), &loss, means.data(), counts.data(), scratch.data()};
    };
    for (int i = 0; i < 2; ++i) {
        SegmentPairs<float> p{};
        p.call = call(rows / 2), p.pair_step = 1, p.side_step = rows / 2;
        p.scale = p.reward_scale = 0.3, p.positive = 1;
        int code = launch_pairs<float, 3, 64>(&p, nullptr);
        std::printf("%d %.3f\\n", code, loss);
        SegmentRows<float> r{};
        r.call = call(rows), r.ref = each.data(), r.desirable = flags.data(), r.beta = r.lambda_d = r.lambda_u = 1;
        code = launch_rows<float, 3, 64>(&r, nullptr);
        std::printf("%d %.3f\\n", code, loss);
        for (int sequence = 0; sequence < 2; ++sequence) {
            SegmentTokens<float> t{};
            t.call = call(rows), t.advantage = each.data(), t.old = t.ref = old.data();
            t.row_counts = scratch.data() + 1;
            t.token_losses = sequence ? nullptr : losses.data(), t.sequence = sequence;
            t.log_low = -0.2, t.log_high = 0.2, t.log_cap = INFINITY, t.beta = 0.1;
            code = launch_tokens<float, 3, 64>(&t, nullptr);
            std::printf("%d %.3f\\n", code, loss);
        }
    }
}
"""

# name → (file, text that it has once, the mutant's replacement: a statement, or an expression that tests its NUMBER)
MUTANTS = {
    "rows": {
        "a block exits before others have read its memory": ("rows.cu", "if (a.ranks > 1) cluster_wait();", ""),
        "sums are not published": (
            "rows.cu",
            "            cluster_arrive();\n        } else",
            "cluster_arrive_relaxed();",
        ),
        "reads are not over when a block says so": (
            "rows.cu",
            "cluster_arrive();  // tells the other",
            "cluster_arrive_relaxed();",
        ),
        "sums are read before they are there": ("rows.cu", "        cluster_wait();\n        s = merged", ""),
        "warps' sums are read before they are there": ("rows.cu", "__syncthreads();", ""),
        "two threads opt in at once": ("launch.h", "guard(lock);", "guard(lost == NUMBER ? *new std::mutex : lock);"),
    },
    "segments": {
        "no fence before the ticket": ("segments.cu", "__threadfence();  // orders this block", ""),
        "no fence after the ticket": ("segments.cu", "__threadfence();  // orders the reads", ""),
        "a plain ticket": (
            "segments.cu",
            "scratch.last = atomicAdd(call.ticket, 1u) == gridDim.x - 1;",
            "scratch.last = (*call.ticket)++ == gridDim.x - 1;",
        ),
        "the last block is not known to all its threads": (
            "segments.cu",
            "__syncthreads();\n    if (!scratch.last)",
            "",
        ),
        "sums are overwritten while they are read": ("segments.cu", "__syncthreads();  // the previous contents", ""),
        "a step of the tree before the one below": ("segments.cu", "__syncthreads();\n        tree_step", ""),
        "the sum is read before it is there": ("segments.cu", "    __syncthreads();\n#pragma unroll", ""),
    },
}
EVERY = [pytest.param(kernel, name, id=name) for kernel, mutants in MUTANTS.items() for name in mutants]
MAIN = """
int main(int, char** arguments) {
    lost = std::atoi(arguments[1]);
"""


def mutated(kernel: str, folder: Path) -> Path:
    """csrc/ with every mutant of a kernel, of which `lost` is in force, and its program."""
    shutil.copytree(CSRC, folder)
    for number, (file, text, instead) in enumerate(MUTANTS[kernel].values(), start=1):
        source = (folder / file).read_text()
        assert source.count(text) == 1, f"{file} has this {source.count(text)} times, expected once: {text}"
        statement, _, rest = text.partition(";")
        choice = f"if (lost == {number}) {{ {instead} }} else {{ {statement}; }}{rest}"
        if "NUMBER" in instead:
            choice = instead.replace("NUMBER", str(number))
        (folder / file).write_text(source.replace(text, choice))
    main = folder / "main.cpp"
    program = {"rows": ROWS, "segments": SEGMENTS}[kernel].replace("int main() {", MAIN)
    main.write_text("inline int lost = 0;\n" + program)
    return main


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """One program a kernel, in build/, where the next run and the test process beside this one find it."""
    texts = (Path(__file__), Path(threaded.__code__.co_filename), *sorted(CSRC.iterdir()))
    state = hashlib.sha256(b"".join(p.read_bytes() for p in texts)).hexdigest()[:16]
    BUILD.mkdir(parents=True, exist_ok=True)
    found = {kernel: BUILD / f"threads-{kernel}-{state}" for kernel in MUTANTS}
    with (BUILD / "threads.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(p.exists() for p in found.values()):
            for old in BUILD.glob("threads-*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda kernel: make(kernel, found[kernel]), MUTANTS))
    return found


def make(kernel: str, program: Path) -> None:
    folder = program.with_suffix(".source")
    beside = program.with_suffix(".new")
    threaded(mutated(kernel, folder), beside)
    beside.rename(program)
    shutil.rmtree(folder)


def run(program: Path, lost: int) -> subprocess.CompletedProcess[str]:
    # Addresses at random places are not always where the sanitizer can have them.
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    options = "halt_on_error=1 exitcode=66 symbolize=0"
    return subprocess.run(
        [*fixed, str(program), str(lost)],
        env={**os.environ, "TSAN_OPTIONS": options},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("kernel", MUTANTS)
def test_no_race(programs, kernel):
    done = run(programs[kernel], 0)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # The same rows however they are read; the same segments twice.
    assert lines == (lines[:1] * 4 if kernel == "rows" else lines[:4] * 2)
    assert all(line.startswith("0 ") and math.isfinite(float(line[2:])) for line in lines)


@pytest.mark.parametrize(("kernel", "name"), EVERY)
def test_a_lost_order_is_found(programs, kernel, name):
    done = run(programs[kernel], list(MUTANTS[kernel]).index(name) + 1)
    assert done.returncode == 66 and "WARNING: ThreadSanitizer: data race" in done.stderr, done
