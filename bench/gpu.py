"""The head on one GPU, in one run: correctness, then times and memory, ours and the peers side by side.

    python bench/gpu.py --json bench/results/gpu.json
    python bench/gpu.py --quick                          # tiny shapes, on the CPU where there is no GPU

bf16. Four cases: `frozen`, the log-probs of every token with a frozen head, forward and backward; `trainable`, DPO with
a trainable head (peers that have cross-entropy alone run that: the same products); `logps`, log-probs without gradient;
`gather`, log-probs of logits that exist, forward and backward, at the smallest N.

Correctness first: every contender against float64 on fresh random data, in memory that held NaN; a wrong one gets no
time. Times are of device events, the median over repeats that call everybody in turn on rotating inputs, with work
queued ahead so that the host's launches are hidden. The floor is the GEMMs alone, by the platform's BLAS on real
operands; of `gather`, reading the logits twice and writing once. Memory is the peak above the inputs and the gradients.

One process: what ends it (an illegal access stays with a process) ends it for everybody, so the result file is written
after each contender and each case, and says what was being done. gpu_stages.py runs this and the other stages.

Exit status 1: one of ours is wrong, fails, or (on a GPU) is missing; 3: the device is lost to this process.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import secrets
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contenders import Missing
from head import TOLERANCES, Shape, _errors
from measure import MIB, environment, ratio, size_mib, table, time_interleaved
from problem import BETA, IGNORE, LEANS, LOGIT_STD, LOSSES, Batch, Case, Results, float64_truth
from report import DEVICE_LOST, Report
from xpo_fast.head.choice import choose_backend

HEADS = [(4096, 128256), (3584, 151936), (2048, 151936), (2304, 262144), (4096, 32000)]  # (D, V)
SHAPES = [Shape(n, d, v) for n in (8192, 2048, 32768) for d, v in HEADS]  # until the time is used up
QUICK_SHAPES = [Shape(64, 48, 1009), Shape(128, 48, 777)]
ROW_TOKENS = 1024  # a pair of rows fits a tile
BATCHES = 3
FLOOR_TOKENS = 8192  # of a GEMM of the floor: more make it no faster, and need not fit
REPEATS = (3, 20)
SAMPLE_S = 0.4  # a contender and case
AHEAD_MS = 10.0  # an objective's call is some 200 kernels and copies beside its products: 2.5 to 4 ms of a host
FIRST_CALLS_S = 60.0  # after this long in them, compiling, a contender takes no further part
PACKAGES = ("cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")
GATHER_TOKENS = 2048  # more logits say nothing new
PEER_TOLERANCES = {"logps": 0.2, "loss": 0.02, "hidden_grad": 0.1, "weight_grad": 0.1}  # wrong, not imprecise


class Task(NamedTuple):
    train_head: bool
    loss: str | None  # "token" or "dpo"; None: no gradient
    gemms: int  # of 2·N·V·D FLOP, the floor's; 0: the batch's hidden states are logits (R, T, V)


TASKS = {
    "frozen": Task(False, "token", 2),
    "trainable": Task(True, "dpo", 3),
    "logps": Task(False, None, 1),
    "gather": Task(False, "token", 0),
}


class Contender(NamedTuple):
    call: Callable[[Batch], Results]
    loss: str | None  # what it computes, if not the task's
    ours: bool = False


class DeviceLost(Exception):
    """An error of a kernel stays with the process: nothing more can be measured in it."""


class Aim(NamedTuple):
    """The baseline's time over ours should be at least `speedup`, with AIM_TOKENS or more."""

    task: str
    baseline: str
    speedup: float
    width: range = range(1, 2**20)


AIM_TOKENS = 8192
AIMS = (
    *(Aim(task, "floor", 0.93, range(4096, 2**20)) for task in ("frozen", "trainable")),
    *(Aim(task, "floor", 0.85, range(2048, 4096)) for task in ("frozen", "trainable")),
    *(Aim(task, "TRL", 1.40) for task in ("frozen", "trainable")),
    *(Aim(task, "Liger fused", 1.0) for task in ("frozen", "trainable", "logps")),
    Aim("trainable", "QuACK CE", 1.0),
)
LOGPS_AIM_TFLOPS = 700  # log-probs alone
# Largest absolute error of a log-prob. A product of bf16 operands is summed by the tensor cores, which cut off where they add to
# float32 (Fasi et al. 2021): truncation.py makes that 1.2e-4 of it at a width of 4096, which no kernel after them can take back.
LOGP_AIM = 2e-4
ACCURACY_AIM = 100  # times as accurate as ACCURACY_PEER, whose logits pass through float16
ACCURACY_PEER = "Liger fused"
# Peak memory above inputs and gradients, with a vocabulary of MEMORY_VOCAB or a little more. A trainable head's takes what the
# plan allows it, a share of the card: said, not aimed at.
MEMORY_VOCAB = range(150_000, 160_000)
MEMORY_CASES = ("frozen", "logps")
MEMORY_AIM_MB, MEMORY_GROWTH_AIM_MB = 2600, 300  # in all; more for four times the tokens


# Contenders. Every one is given all positions scored, (R, T); None: it has no such task.


def _finish(
    batch: Batch, task: Task, forward: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
) -> Results:
    """Run a forward that returns (loss, logps), of which it may have one, and the backward; name what came."""
    if task.loss is None:
        with torch.no_grad():
            _, logps = forward(batch.hidden, batch.weight)
        assert logps is not None
        return {"logps": logps}
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.weight.detach().requires_grad_(task.train_head)
    loss, logps = forward(hidden, weight)
    if loss is None:
        assert logps is not None
        loss = LOSSES[task.loss](logps)
    leaves = {"hidden_grad": hidden, "weight_grad": weight} if task.train_head else {"hidden_grad": hidden}
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found["loss"] = loss.detach()
    return found if logps is None else {**found, "logps": logps.detach()}


def make_ours(task: Task, device: torch.device, backend: str, labels_on_host: bool = True) -> Contender:
    """With labels where a data loader has them, so that nothing has to wait for the device to tell which are scored."""
    from xpo_fast import Objective, gather_logps, token_logps
    from xpo_fast.head.backends import check_backend

    try:
        check_backend(backend, device)
    except ValueError as error:
        raise Missing(str(error)) from error
    objective = Objective("dpo", beta=BETA, backend=backend)
    labels: dict[int, Tensor] = {}

    def call(batch: Batch) -> Results:
        targets = batch.targets
        if labels_on_host and task.gemms:
            targets = labels.get(id(batch))
            if targets is None:
                targets = labels[id(batch)] = batch.targets.cpu()

        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            if not task.gemms:
                return None, gather_logps(hidden, targets, backend=backend)
            if task.loss != "dpo":
                return None, token_logps(hidden, weight, targets, backend=backend)
            ref_logps = hidden.new_zeros(len(targets), dtype=torch.float32)
            return objective(hidden, weight, targets, ref_logps=ref_logps).loss, None

        return _finish(batch, task, forward)

    return Contender(call, task.loss, ours=True)


def make_materialised(task: Task, device: torch.device) -> Contender:
    """What one writes without a library: logits in bf16, then a float32 log-softmax."""

    def call(batch: Batch) -> Results:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            logits = torch.nn.functional.linear(hidden, weight) if task.gemms else hidden
            logprobs = logits.float().log_softmax(-1)
            return None, logprobs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)

        return _finish(batch, task, forward)

    return Contender(call, task.loss)


def make_trl(task: Task, device: torch.device) -> Contender | None:
    """TRL's function with the tile width that TRL gives it and no optional output."""
    if not task.gemms:
        return None
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise Missing(f"TRL 1.16 does not import ({error}): pip install trl==1.16.0") from error

    def call(batch: Batch) -> Results:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            logps, *_ = ChunkedLogProbFunction.apply(
                hidden.flatten(0, 1), weight, None, batch.targets.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE,
                None, 1.0, (),
            )  # fmt: skip
            return None, logps.view(batch.targets.shape)

        return _finish(batch, task, forward)

    return Contender(call, task.loss)


def make_liger_dpo(task: Task, device: torch.device) -> Contender | None:
    """Liger's class without a reference model, compiled as by default where there is a GPU."""
    if task.loss != "dpo":
        return None
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise Missing(f"Liger 0.8.5 does not import ({error}): pip install liger-kernel==0.8.5") from error
    compiled = device.type != "cpu"  # on a CPU it would need a C++ compiler
    objective = LigerFusedLinearDPOLoss(IGNORE, beta=BETA, compiled=compiled, use_ref_model=False)

    def call(batch: Batch) -> Results:
        return _finish(batch, task, lambda h, w: (objective(w, h, batch.targets)[0], None))

    return Contender(call, "dpo")


def make_liger_ce(task: Task, device: torch.device) -> Contender | None:
    if task.loss is None or not task.gemms:
        return None
    if device.type == "cpu":
        raise Missing("Liger's cross-entropy needs a GPU")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Missing(f"Liger 0.8.5 does not import ({error}): pip install liger-kernel==0.8.5") from error
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def call(batch: Batch) -> Results:
        return _finish(batch, task, lambda h, w: (loss(w, h.flatten(0, 1), batch.targets.flatten()), None))

    return Contender(call, "token")


def make_liger_fused(task: Task, device: torch.device) -> Contender | None:
    """Liger's log-probs a token, its own kernels on a Hopper; what the caller's loss makes of them is torch's."""
    if not task.gemms:
        return None
    # Its check of the targets waits for the device: who knows the targets to be in range switches it off.
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import _resolve_implementation

        _resolve_implementation(device)  # imports the kernels' compiler
    except ImportError as error:
        raise Missing(
            f"Liger 0.8.5's fused scaled cross-entropy does not import ({error}): "
            "pip install liger-kernel==0.8.5 'nvidia-cutlass-dsl[cu13]>=4.6' apache-tvm-ffi"
        ) from error

    def call(batch: Batch) -> Results:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            nll = function.apply(hidden.flatten(0, 1), weight, batch.targets.flatten())
            return None, -nll.view(batch.targets.shape)

        return _finish(batch, task, forward)

    return Contender(call, task.loss)


def make_cce(task: Task, device: torch.device) -> Contender | None:
    if not task.gemms:
        return None
    if device.type == "cpu":
        raise Missing("Cut Cross-Entropy needs a GPU")
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Missing(f"Cut Cross-Entropy does not import ({error}): pip install cut-cross-entropy") from error

    def call(batch: Batch) -> Results:
        return _finish(batch, task, lambda h, w: (None, -linear_cross_entropy(h, w, batch.targets, reduction="none")))

    return Contender(call, task.loss)


def make_quack(task: Task, device: torch.device) -> Contender | None:
    if not task.train_head:
        return None
    if device.type == "cpu":
        raise Missing("QuACK's chunked cross-entropy needs a GPU")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Missing(f"QuACK does not import ({error}): pip install quack-kernels") from error

    def call(batch: Batch) -> Results:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            flat, targets = hidden.flatten(0, 1), batch.targets.flatten()
            return chunked_linear_cross_entropy(flat, weight, targets, reduction="sum"), None

        return _finish(batch, task, forward)

    return Contender(call, "token")


OURS = ("triton", "cuda", "torch")
CONTENDERS: dict[str, Callable[[Task, torch.device], Contender | None]] = {
    **{backend: partial(make_ours, backend=backend) for backend in OURS},
    "plain": make_materialised,
    "TRL": make_trl,
    "Liger": make_liger_dpo,
    "Liger CE": make_liger_ce,
    "Liger fused": make_liger_fused,
    "CCE": make_cce,
    "QuACK CE": make_quack,
}


def make_floor(batch: Batch, task: Task) -> Contender:
    """The bare products, or the bare traffic, into buffers made beforehand. Its call returns nothing."""
    if not task.gemms:
        gradient = torch.empty_like(batch.hidden)

        def cross_memory(batch: Batch) -> Results:
            gradient.copy_(batch.hidden)
            half = len(gradient) // 2
            gradient[:half].copy_(batch.hidden[:half])
            return {}

        return Contender(cross_memory, None)
    hidden, weight = batch.hidden.flatten(0, 1), batch.weight
    rows = min(FLOOR_TOKENS, len(hidden))
    logits = hidden[:rows] @ weight.T
    dz = torch.softmax(logits, dim=-1) if task.gemms > 1 else logits
    hidden_grad = torch.empty_like(hidden)
    weight_grad = torch.empty_like(weight) if task.train_head else None

    def call(batch: Batch) -> Results:
        for start in range(0, len(hidden_grad), rows):
            h = batch.hidden.flatten(0, 1)[start : start + rows]
            n = len(h)
            torch.mm(h, weight.T, out=logits[:n])
            if task.gemms > 1:
                torch.mm(dz[:n], weight, out=hidden_grad[start : start + n])
            if weight_grad is not None:
                beta = 0 if start == 0 else 1
                torch.addmm(weight_grad, dz[:n].T, h, beta=beta, out=weight_grad)
        return {}

    return Contender(call, None)


# Inputs, as of problem.py, made on the device.


def make_weight(shape: Shape, device: torch.device, seed: int) -> Tensor:
    """(V, D) head that gives logits of standard deviation 3 on hidden states of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape.vocab, shape.width, dtype=torch.bfloat16, device=device)
    return weight.normal_(std=LOGIT_STD / shape.width**0.5, generator=generator)


def make_batch(weight: Tensor, scored: int, seed: int) -> Batch:
    """Rows of random hidden states, each leaning towards or away from its target's row of the head."""
    device, (vocab, width) = weight.device, weight.shape
    generator = torch.Generator(device).manual_seed(seed)
    rows = max(2, scored // (2 * ROW_TOKENS) * 2)
    assert scored % rows == 0, f"{scored} positions do not make {rows} equal rows"
    targets = torch.randint(vocab, (rows, scored // rows), generator=generator, device=device)
    lean = torch.empty(*targets.shape, 1, device=device).uniform_(*LEANS, generator=generator)
    hidden = torch.randn(*targets.shape, width, generator=generator, device=device)
    direction = weight[targets].float()  # (R, T, D)
    hidden += lean * direction / direction.square().sum(-1, keepdim=True)
    return Batch(hidden.to(weight.dtype), weight, targets)


def make_logits(batch: Batch) -> Batch:
    """The batch with its logits in place of its hidden states."""
    return Batch(batch.hidden @ batch.weight.T, batch.weight, batch.targets)


# Measuring.


SMALL = 2**20  # bytes: what the allocator takes from a pool of its own, at most
LARGE = 2**32  # more than any one buffer here


def poison_sizes(free: int, segments: Sequence[dict[str, Any]]) -> list[int]:
    """Bytes of the blocks to fill, so that whatever the allocator hands out next, of `free` bytes, was filled.

    It hands out the smallest free block that is large enough, splits larger ones, and never joins blocks of two segments. So
    blocks of LARGE, not many smaller ones, stand for what it has yet to ask the device for; and what it has to spare, in
    segments (torch.cuda.memory_snapshot's) of which a part is in use, is taken block by block.
    """
    spare = []
    for segment in segments:
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        if segment["segment_type"] == "small":
            sizes = [min(SMALL, size - at) for size in sizes for at in range(0, size, SMALL)]
        spare += sizes
    large = min(LARGE, free // 2)
    return sorted([*spare, *[large] * min(4, free // 2 // large if large else 0)], reverse=True) + [SMALL] * 64


def poison(device: torch.device) -> None:
    """What the allocator hands out next, on any stream that it has served, holds NaN."""
    if device.type == "cpu":
        return
    torch.cuda.synchronize(device)
    streams = {0} | {segment["stream"] for segment in torch.cuda.memory_snapshot()}
    torch.cuda.empty_cache()
    for stream in streams:
        segments = [
            segment
            for segment in torch.cuda.memory_snapshot()
            if segment["stream"] == stream and segment.get("segment_pool_id", (0, 0)) == (0, 0)
        ]
        free, _ = torch.cuda.mem_get_info(device)
        served = torch.cuda.ExternalStream(stream, device) if stream else torch.cuda.default_stream(device)
        with torch.cuda.stream(served):
            sizes = poison_sizes(free // len(streams), segments)
            held = [torch.full((size // 4,), float("nan"), device=device) for size in sizes]
            del held
    torch.cuda.synchronize(device)


def lost(device: torch.device) -> bool:
    """Whether an error of a kernel has left this process without its device."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def peak_mib(call: Callable[[], Results], device: torch.device) -> float | None:
    """Peak above what is allocated before and the gradients; None on CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = call()
    torch.cuda.synchronize(device)
    gradients_mib = size_mib(x for name, x in found.items() if name.endswith("_grad"))
    return (torch.cuda.max_memory_allocated(device) - before) / MIB - gradients_mib


def waits_for_device(call: Callable[[], Results], device: torch.device) -> str | None:
    """Where the host waits for the device, as far as torch can tell; None: nowhere."""
    if device.type == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{Path(at.filename).name}:{at.lineno}: {at.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def capture_problem(call: Callable[[], Results], device: torch.device) -> str | None:
    """Why a call cannot be captured as a CUDA graph whose replay gives what the call gave; None: it can."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        want = call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = call()
    except Exception as error:
        torch.cuda.synchronize(device)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for x in found.values():
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize(device)
    different = [name for name, x in found.items() if not torch.equal(x, want[name])]
    return f"a replay gives another {', '.join(different)}" if different else None


def float64_flops(device: torch.device) -> float:
    """FLOP/s of a float64 GEMM."""
    n = 256 if device.type == "cpu" else 4096
    a = torch.randn(n, n, dtype=torch.float64, device=device)
    torch.mm(a, a)
    synchronize(device)
    start = time.perf_counter()
    torch.mm(a, a)
    synchronize(device)
    return 2 * n**3 / (time.perf_counter() - start)


def find_truths(batch: Batch, names: Sequence[str]) -> dict[str, Results]:
    """The results in float64 of each loss, head trained: what every task is held against."""
    losses = {TASKS[name].loss for name in names} | {"token"}
    with torch.device(batch.hidden.device):
        return {loss: float64_truth(batch, Case(loss, train_head=True)) for loss in losses if loss}


def find_gather_truth(batch: Batch) -> Results:
    """The same of logits (R, T, V), a few rows at a time; the gradient in float32, for memory's sake."""
    logits, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
    logps = torch.empty(targets.shape, dtype=torch.float64, device=logits.device)
    gradient = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    for block in torch.arange(len(logits), device=logits.device).split(64):
        logprobs = logits[block].double().log_softmax(-1)
        y = targets[block].unsqueeze(1)
        logps[block] = logprobs.gather(1, y).squeeze(1)
        gradient[block] = logprobs.exp().scatter_add_(1, y, -torch.ones_like(y, dtype=torch.float64)).float()
    shape = batch.targets.shape
    return {"logps": logps.view(shape), "loss": -logps.sum(), "hidden_grad": gradient.view_as(batch.hidden)}


class Bench:
    """One run: what is to be measured, what was found, and what went wrong."""

    def __init__(self, args: argparse.Namespace, device: torch.device, facts: dict[str, Any]) -> None:
        self.args, self.device, self.facts = args, device, facts
        self.start = time.monotonic()
        self.records: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.skipped: list[str] = []
        self.problems: list[str] = []
        self.first_calls_s: dict[str, float] = {}
        self.shapes_s: dict[Shape, float] = {}  # without the first calls
        self.report = Report(args.json, environment=facts)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    def save(self) -> None:
        found = {"timing": self.records, "aims": self.aims(), "memory_aims": self.memory_aims()}
        outcome = {"missing": self.missing, "skipped": self.skipped, "problems": self.problems}
        self.report.save(**found, **outcome)

    def begin(self, doing: str, contender: str = "") -> None:
        self.report.begin(doing, contender)
        self.save()

    def run(self) -> None:
        """Measure shape after shape, as far as the time goes."""
        self.begin("measuring the rate of float64")
        float64_rate = float64_flops(self.device)
        for shape in self.args.shapes:
            # No shape takes longer than in proportion to one that was measured.
            bounds_s = [s * max(1.0, shape.gemm_flop / known.gemm_flop) for known, s in self.shapes_s.items()]
            if self.elapsed_s + min(bounds_s, default=0.0) > self.args.budget_s:
                self.skipped.append(f"{shape}, after {self.elapsed_s:.0f} of {self.args.budget_s:.0f} s")
                continue
            before_s = self.elapsed_s - sum(self.first_calls_s.values())
            # Two passes over the vocabulary, the second with two more products; two losses.
            truth_s = 8 * shape.gemm_flop / float64_rate
            self.run_shape(shape, check=truth_s < self.args.check_s)
            self.shapes_s[shape] = self.elapsed_s - sum(self.first_calls_s.values()) - before_s
            print(f"{shape}: done after {self.elapsed_s:.0f} s", file=sys.stderr, flush=True)
        self.report.end()

    def run_shape(self, shape: Shape, check: bool) -> None:
        self.begin(f"making the inputs and the truth of {shape}")
        weight = make_weight(shape, self.device, self.args.seed)
        batches = [make_batch(weight, shape.scored, self.args.seed + 1 + k) for k in range(BATCHES)]
        with_gemms = [name for name in self.args.cases if TASKS[name].gemms]
        truths = find_truths(batches[0], with_gemms) if check and with_gemms else None
        for name in with_gemms:
            self.run_case(shape, name, batches, truths)
        del weight, truths
        if "gather" in self.args.cases and shape.scored <= GATHER_TOKENS:
            batches = [make_logits(batch) for batch in batches]
            truths = {"token": find_gather_truth(batches[0])} if check else None
            self.run_case(shape, "gather", batches, truths)
        del batches
        gc.collect()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def run_case(self, shape: Shape, name: str, batches: list[Batch], truths: dict[str, Results] | None) -> None:
        task = TASKS[name]
        where = f"{name}, {shape}"
        floor = make_floor(batches[0], task)
        floor.call(batches[0])
        calls, records = {"floor": floor.call}, {"floor": self.record(shape, name, "floor", gemms=task.gemms)}
        self.records.append(records["floor"])
        for contender in self.args.only:
            if self.first_calls_s.get(contender, 0.0) > FIRST_CALLS_S:
                self.skipped.append(f"{contender} in {where}: its first calls take too long")
                continue
            self.begin(f"{contender} in {where}", contender)
            try:
                made = CONTENDERS[contender](task, self.device)
            except Missing as error:
                self.missing.setdefault(contender, str(error))
                if contender in OURS and self.device.type != "cpu":
                    self.problems.append(f"missing: {error}")
                continue
            except Exception as error:
                # A peer may not go with the versions that are here, and say so as it likes.
                if contender in OURS:
                    raise
                self.missing.setdefault(contender, f"{contender}: {type(error).__name__}: {error}"[:300])
                continue
            if made is None:
                continue
            record = self.record(shape, name, contender, ours=made.ours, checked=truths is not None)
            records[contender] = record
            self.records.append(record)
            try:
                self.check(made, contender, record, batches[0], truths)
                record["peak_mib"] = peak_mib(partial(made.call, batches[0]), self.device)
                if made.ours:
                    record["waits"] = waits_for_device(partial(made.call, batches[0]), self.device)
                    self.check_capture(contender, record, task, batches[0], where)
            except Exception as error:  # a peer may fail as it likes
                failed = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{error}"
                record["failed"] = f"{type(error).__name__}: {failed}"[:500]
                if made.ours:
                    self.problems.append(f"failed: {contender}, {where}: {record['failed']}")
            else:
                if not record["outside_tolerance"]:
                    calls[contender] = made.call
                elif made.ours:
                    self.problems.append(f"wrong: {contender}, {where}: {record['outside_tolerance']}")
            if self.device.type != "cpu" and "failed" in record:
                if lost(self.device):
                    raise DeviceLost(f"{contender}, {where}: {record['failed']}")
                gc.collect()
                torch.cuda.empty_cache()
        self.begin(f"timing {where}")
        self.time(calls, records, batches)
        for contender, record in records.items():
            if contender in calls:
                record["of_floor"] = ratio(records["floor"]["samples_ms"], record["samples_ms"])

    def record(self, shape: Shape, case: str, contender: str, **more: Any) -> dict[str, Any]:
        where = {"shape": shape._asdict(), "case": case, "contender": contender}
        return {**where, "flop": TASKS[case].gemms * shape.gemm_flop, **more}

    def check(
        self,
        made: Contender,
        contender: str,
        record: dict[str, Any],
        batch: Batch,
        truths: dict[str, Results] | None,
    ) -> None:
        """The first call, which compiles and takes streams; of a second one, in poisoned memory, the errors."""
        synchronize(self.device)
        start = time.perf_counter()
        found = made.call(batch)
        synchronize(self.device)
        taken_s = time.perf_counter() - start
        record["first_call_s"] = taken_s
        self.first_calls_s[contender] = self.first_calls_s.get(contender, 0.0) + taken_s
        record["outside_tolerance"] = []
        if truths is not None:
            del found
            poison(self.device)
            found = made.call(batch)
            truth = truths[made.loss or "token"]
            tolerances = TOLERANCES["bf16"] if made.ours else PEER_TOLERANCES
            errors = _errors(found, truth)
            record["outside_tolerance"] = [n for n, e in errors.items() if e is None or e > tolerances[n]]
            if errors.get("logps") is not None:
                excess = found["logps"].double() - truth["logps"]
                errors["logps_rms"] = excess.square().mean().sqrt().item()
            record["errors"] = errors

    def check_capture(self, backend: str, record: dict[str, Any], task: Task, batch: Batch, where: str) -> None:
        """Once a case, at the fewest tokens; with labels on the device, as a graph must have them."""
        if self.device.type == "cpu" or batch.targets.numel() > min(shape.scored for shape in self.args.shapes):
            return
        made = make_ours(task, self.device, backend, labels_on_host=False)
        record["not_captured"] = capture_problem(partial(made.call, batch), self.device)
        if record["not_captured"]:
            self.problems.append(f"not captured: {backend}, {where}: {record['not_captured']}")

    def time(self, calls: dict[str, Callable[[Batch], Results]], records: dict[str, Any], batches: list[Batch]) -> None:
        start = time.perf_counter()
        for call in calls.values():
            call(batches[-1])
        synchronize(self.device)
        round_s = time.perf_counter() - start
        fewest, most = (2, 2) if self.args.quick else REPEATS
        repeats = round(min(max(SAMPLE_S * len(calls) / round_s, fewest), most))
        if self.device.type == "cpu":
            measure = time_interleaved
        else:
            from xpo_fast.kernels.tuning import sample_with_events  # pyright: ignore[reportMissingImports]

            measure = partial(sample_with_events, ahead_ms=AHEAD_MS)
        gc.collect()
        gc.freeze()  # or every collection would go over all modules
        gc.disable()
        try:
            for contender, samples_ms in measure(calls, batches, repeats).items():
                records[contender] |= {"samples_ms": samples_ms, "median_ms": statistics.median(samples_ms)}
        finally:
            gc.enable()
            gc.unfreeze()

    def aims(self) -> list[dict[str, Any]]:
        """Each aim with what each of our backends came to, where it comes nearest to missing it; met if one of them meets it."""
        found = []
        for aim in AIMS:
            ours: dict[str, dict[str, Any]] = {}
            for r in self._timed(aim.task):
                of = next((x for x in self._timed(aim.task, aim.baseline) if x["shape"] == r["shape"]), None)
                if r["shape"]["width"] in aim.width and of is not None:
                    speedup = ratio(of["samples_ms"], r["samples_ms"])
                    nearest(ours, r, speedup)
            widths = [aim.width.start, aim.width.stop - 1]
            what = f"{aim.task}: {aim.baseline}'s time over ours"
            found += judged(what, aim.speedup, ours, case=aim.task, baseline=aim.baseline, widths=widths)
        ours = {}
        for r in self._timed("logps"):
            nearest(ours, r, r["flop"] / r["median_ms"] / 1e9)
        found += judged("logps: TFLOP/s", LOGPS_AIM_TFLOPS, ours, case="logps")
        return found + self._accuracy_aims()

    def _timed(self, case: str, contender: str | None = None) -> list[dict[str, Any]]:
        """Records of a case with times and AIM_TOKENS or more; of our backends, or of one contender."""
        return [
            r
            for r in self.records
            if "samples_ms" in r
            and r["case"] == case
            and r["shape"]["scored"] >= min(AIM_TOKENS, max(s.scored for s in self.args.shapes))
            and (r["contender"] in OURS if contender is None else r["contender"] == contender)
        ]

    def _accuracy_aims(self) -> list[dict[str, Any]]:
        bounds, times = {}, {}
        for r in self.records:
            error = r.get("errors", {}).get("logps")
            if r["contender"] not in OURS or r["case"] == "gather" or not error:
                continue
            nearest(bounds, r, LOGP_AIM / error)
            for peer in self.records:
                if (peer["case"], peer["contender"]) != (r["case"], ACCURACY_PEER):
                    continue
                if peer["shape"] == r["shape"] and peer.get("errors", {}).get("logps"):
                    nearest(times, r, peer["errors"]["logps_rms"] / r["errors"]["logps_rms"])
        return [
            *judged(f"{LOGP_AIM:.0e} over the largest error of a log-prob", 1.0, bounds),
            *judged(f"RMS error of a log-prob, {ACCURACY_PEER}'s over ours", ACCURACY_AIM, times),
        ]

    def memory_aims(self) -> list[str]:
        """The peaks of our backends held to their aims, a line each; growth between shapes that fill a tile."""
        peaks_mb = {
            (r["contender"], r["case"], Shape(**r["shape"])): r["peak_mib"] * MIB / 1e6
            for r in self.records
            if r["contender"] in OURS and TASKS[r["case"]].gemms and r.get("peak_mib") is not None
        }
        card_mb = self.facts.get("device_memory_mib", 0) * MIB / 1e6
        lines = []
        for (ours, case, shape), peak_mb in peaks_mb.items():
            if shape.vocab not in MEMORY_VOCAB:
                continue
            where = f"{ours}, {case} {shape}"
            if case not in MEMORY_CASES:
                lines.append(f"{where} takes {peak_mb:.0f} MB, {peak_mb / card_mb:.1%} of the card")
                continue
            bounds = [(f"{where} takes", peak_mb, MEMORY_AIM_MB)]
            smaller = ours, case, shape._replace(scored=shape.scored // 4)
            if smaller in peaks_mb and smaller[2].scored >= FLOOR_TOKENS:
                growth_mb = peak_mb - peaks_mb[smaller]
                bounds.append((f"{where} takes more than {smaller[2]} by", growth_mb, MEMORY_GROWTH_AIM_MB))
            for what, found_mb, aim_mb in bounds:
                verdict = "met" if found_mb < aim_mb else "MISSED"
                lines.append(f"{verdict}: {what} {found_mb:.0f} MB (aim: {aim_mb})")
        return lines


def nearest(ours: dict[str, dict[str, Any]], record: dict[str, Any], value: float) -> None:
    """Keep the least value of a backend, and where it was."""
    known = ours.get(record["contender"])
    if known is None or value < known["value"]:
        ours[record["contender"]] = {"value": value, "at": f"{record['case']} {Shape(**record['shape'])}"}


def judged(what: str, aim: float, ours: dict[str, dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """An aim and what our backends came to; none where nothing was measured."""
    if not ours:
        return []
    best = max(ours, key=lambda backend: ours[backend]["value"])
    return [{"what": what, "aim": aim, "met": ours[best]["value"] >= aim, "best": best, "ours": ours, **more}]


def aim_line(aim: dict[str, Any], auto: str) -> str:
    """Met or missed by the best of our backends; every backend's value, and which is `auto`'s."""
    values = ", ".join(
        f"{backend}{' (auto)' if backend == auto else ''} {found['value']:.2f} at {found['at']}"
        for backend, found in aim["ours"].items()
    )
    return f"{'met' if aim['met'] else 'MISSED'}: {aim['what']} {aim['aim']:g} or more: {values}"


def summary(records: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str], names: list[str]) -> str:
    """A line a case and shape, a column a contender."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for r in records:
        key = r["case"], str(Shape(**r["shape"]))
        lines.setdefault(key, {})[r["contender"]] = cell(r)
    present = [n for n in names if any(n in cells for cells in lines.values())]
    return table(
        ["case, N×D×V", *present],
        [[f"{case} {shape}", *(cells.get(n, "") for n in present)] for (case, shape), cells in lines.items()],
    )


def time_cell(r: dict[str, Any]) -> str:
    if "failed" in r:
        return "OOM" if "out of memory" in r["failed"] else "failed"
    if "median_ms" not in r:
        return "wrong"
    share = "" if r["contender"] == "floor" else f" {r['of_floor']:.2f}"
    return f"{r['median_ms']:.2f}{share}" + ("" if r.get("checked", True) else "?")


def memory_cell(r: dict[str, Any]) -> str:
    return "" if r.get("peak_mib") is None else f"{r['peak_mib']:.0f}"


ERRORS = {
    "logps": "log-prob, largest",
    "logps_rms": "log-prob, RMS",
    "hidden_grad": "hidden's gradient",
    "weight_grad": "head's gradient",
}


def accuracy(records: list[dict[str, Any]]) -> str:
    """A line a width and contender: the largest of each error over its cases and shapes."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for r in records:
        errors = found.setdefault((r["shape"]["width"], r["contender"]), {}) if r.get("errors") else {}
        for name, error in r.get("errors", {}).items():
            if error is not None and r["case"] != "gather":
                errors[name] = max(error, errors.get(name, 0.0))
    lines = [
        [f"D {width}, {contender}", *(f"{errors[n]:.1e}" if n in errors else "" for n in ERRORS)]
        for (width, contender), errors in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return table(["against float64", *ERRORS.values()], lines)


def about(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    found = environment()
    found["commit"] = found["commit"] or args.commit
    for package in PACKAGES:
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["device_memory_mib"] = properties.total_memory // MIB
        found["processors"] = properties.multi_processor_count
        found["versions"]["hip" if torch.version.hip else "cuda"] = torch.version.hip or torch.version.cuda
    found["auto"] = choose_backend("auto", device, torch.bfloat16)
    return {**found, "seed": args.seed, "clock": "wall, CPU" if device.type == "cpu" else "device events"}


def parse_arguments() -> argparse.Namespace:
    first, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=first, epilog=details, formatter_class=style)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="NxDxV")
    parser.add_argument("--cases", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    parser.add_argument("--without", nargs="+", choices=CONTENDERS, default=[], help="of these contenders")
    parser.add_argument("--budget-s", type=float, default=510.0, help="start no shape that would end later")
    parser.add_argument("--check-s", type=float, default=15.0, help="check no shape whose truth takes longer")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the data, if not fresh")
    parser.add_argument("--commit", help="to name in the results where there is no git")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two repeats: does everything run?")
    args = parser.parse_args()
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    args.only = [name for name in args.only if name not in args.without]
    return args


def main() -> int:
    args = parse_arguments()
    if not torch.cuda.is_available() and not args.quick:
        print("no GPU: bench/head.py measures on a CPU; --quick tries this script on one", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = about(device, args)
    bench = Bench(args, device, facts)
    lost_by = False
    try:
        bench.run()
    except DeviceLost as error:
        lost_by = True
        bench.problems.append(f"the device is lost to this process: {error}")
    except Exception as error:  # what was measured before is worth having
        bench.problems.append(f"ended early: {type(error).__name__}: {error}")
    bench.save()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['device']}, commit {facts['commit']}, {versions}, seed {args.seed}, {bench.elapsed_s:.0f} s")
    memory = summary(bench.records, memory_cell, list(CONTENDERS))
    print(f"\npeak MiB above inputs and gradients\n\n{memory}")
    times = summary(bench.records, time_cell, ["floor", *CONTENDERS])
    print(f"\nms ({facts['clock']}), and the floor's share of it\n\n{times}\n")
    for why in bench.missing.values():
        print(f"missing: {why}")
    print(f"largest errors, of the gradients relative to their norm\n\n{accuracy(bench.records)}\n")
    for aim in bench.aims():
        print(aim_line(aim, facts["auto"]))
    for line in bench.memory_aims():
        print(line)
    for wait in sorted({r["waits"] for r in bench.records if r.get("waits")}):
        print(f"ours waits for the device at {wait}")
    for line in (*(f"skipped: {s}" for s in bench.skipped), *dict.fromkeys(bench.problems)):
        print(line)
    if lost_by:
        sys.stdout.flush()
        os._exit(DEVICE_LOST)  # what would free the device's memory fails
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
