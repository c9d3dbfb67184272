"""What the head owes torch.compile and torch.library: it compiles without a graph break and its operators are sound."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._triton import has_triton

import oracle
import xpo_fast as xf
from xpo_fast.head import choice, verdict
from xpo_fast.head.operands import Operands, Reference
from xpo_fast.head.spec import Scaling

VOCAB, WIDTH = 23, 8


class TinyModel(torch.nn.Module):
    """Embedding, one layer, a head with a bias; returns a loss of log-probs and further statistics."""

    def __init__(self, outputs: tuple[str, ...], trainable: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.body = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB).requires_grad_(trainable)
        self.outputs = outputs
        with torch.no_grad():
            for seed, x in enumerate(self.parameters()):
                x.copy_(oracle.normal(*x.shape, seed=seed, std=0.5))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embed(ids)))
        if not self.outputs:
            logp = xf.token_logps(hidden, self.head.weight, targets, bias=self.head.bias, softcap=3.0, temperature=0.8)
            return (logp * logp.detach()).sum()
        found = xf.token_stats(
            hidden,
            self.head.weight,
            targets,
            bias=self.head.bias,
            outputs=self.outputs,
            ref_hidden=hidden.detach() * 0.5,
            chunk_tokens=3,
        )
        return (found.logp * found.lse).sum() + sum(getattr(found, n).square().sum() for n in self.outputs)


@pytest.mark.parametrize("outputs", [(), ("entropy", "kl", "log_sum_sq_probs")], ids=["logps", "stats"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_compiled_equals_eager(outputs, trainable):
    """One graph, without a break, for lengths that change, among them one where nothing is scored."""
    torch._dynamo.reset()
    model = TinyModel(outputs, trainable)
    compiled_at = []

    def backend(graph, inputs):
        compiled_at.append(length)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length, ignored in ((5, 0.3), (7, 0.0), (9, 1.0)):
        ids, targets = (oracle.tokens((2, length), VOCAB, x, seed=length) for x in (0.0, ignored))
        results = []
        for call in (model, compiled):
            model.zero_grad()
            loss = call(ids, targets)
            loss.backward()
            results.append((loss.detach(), [x.grad for x in model.parameters() if x.requires_grad]))
        assert_close(*results)
    assert set(compiled_at) == {5}


@pytest.mark.parametrize(
    ("name", "trainable"), [("simpo", True), ("lipo", False), ("grpo", True), ("gspo", False), ("dpo", True)]
)
def test_compiled_objective(name, trainable):
    """The objective compiles too, by log-probs and their gradient, for every layout."""
    torch._dynamo.reset()
    hidden = oracle.normal(4, 3, WIDTH, seed=1).requires_grad_()
    weight = oracle.normal(VOCAB, WIDTH, seed=2).requires_grad_(trainable)
    targets = oracle.tokens((4, 3), VOCAB, 0.2)
    objective = xf.Objective(name, **({"ld_alpha": 0.5} if name == "dpo" else {}))
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    given = {}
    if objective.needs_reference:
        given["ref_hidden"] = hidden.detach() * 0.5
    if name == "lipo":
        given["scores"] = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    if objective.layout == "policy":
        given["advantage"] = torch.tensor([1.0, -1.0, 0.5, 2.0])

    def loss(hidden, weight, targets):
        return objective(hidden, weight, targets, **given).loss

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found = call(hidden, weight, targets)
        results.append((found.detach(), torch.autograd.grad(found, wanted)))
    assert_close(*results)


@pytest.fixture(scope="module")
def device_guard(tmp_path_factory):
    """Registers a device guard, which a torch without CUDA needs for CUDA tensors even if they have no values."""
    if torch.cuda.is_available():
        return
    folder, home = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);\n"
    )
    words = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", source, "-o", library]
    done = subprocess.run([*words, f"-L{home / 'lib'}", "-lc10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ctypes.CDLL(str(library))


@pytest.fixture
def gpu(monkeypatch, device_guard, tmp_path):
    """What torch.compile asks of a GPU, answered where there is none; nothing that is not to be traced is replaced."""
    monkeypatch.setattr(verdict, "_known", {})
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path))
    choice._log_once.cache_clear()
    if torch.cuda.is_available():
        return
    torch._dynamo.reset()
    has_triton()  # remembered: without a GPU there is no code to generate
    answers = {
        "is_available": True,
        "current_device": 0,
        "get_device_name": "GPU",
        "get_device_capability": (8, 0),
        "get_device_properties": SimpleNamespace(total_memory=80 * 10**9),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def traced(call, *, on_host=False):
    """The backends that a call's graph names, of operands on a GPU that have no values; one graph, else an error."""
    torch._dynamo.reset_code_caches()  # a constant of the trace before has no guard
    found = []

    def record(graph, inputs):
        found.extend(a for node in graph.graph.nodes for a in node.args if a in ("torch", "triton"))
        return graph.forward

    with FakeTensorMode():
        hidden = torch.empty(4, 3, WIDTH, device="cuda:0", requires_grad=True)
        weight = torch.empty(VOCAB, WIDTH, device="cuda:0")
        targets = torch.empty(4, 3, dtype=torch.long, device="cpu" if on_host else "cuda:0")
        out = torch.compile(call, fullgraph=True, backend=record)(hidden, weight, targets)
    assert out.device == hidden.device
    return found


ON_GPU = {
    "token_logps": lambda h, w, y: xf.token_logps(h, w, y),
    "token_stats": lambda h, w, y: xf.token_stats(h, w, y, outputs=("entropy",)).entropy,
    "simpo": lambda h, w, y: xf.Objective("simpo")(h, w, y).loss,
    "float64": lambda h, w, y: xf.token_logps(h.double(), w.double(), y),
}


@pytest.mark.parametrize(
    ("name", "on_host"), [*((name, False) for name in ON_GPU), ("token_logps", True), ("simpo", True)]
)
def test_on_a_gpu(name, on_host, gpu, monkeypatch):
    """One graph; it asks neither what is captured nor how much memory is free, reads no file and begins no check."""
    for forbidden in ("_read", "_determine", "check_in_child"):
        monkeypatch.setattr(verdict, forbidden, None)
    verdict._known[0, torch.float32] = verdict.Verdict(True)
    assert traced(ON_GPU[name], on_host=on_host) == ["torch" if name == "float64" else "triton"]


def test_what_is_written_down_on_a_gpu(gpu, caplog):
    """By another process; else one line of the log says what to do."""
    device = torch.device("cuda", 0)
    for _ in range(2):
        assert traced(ON_GPU["token_logps"]) == ["torch"]
    (said,) = (r for r in caplog.records if r.name == "xpo_fast")
    assert said.getMessage().endswith("call once before compiling or capturing")
    verdict._write(verdict.entry(device, torch.float32), verdict.Verdict(True))
    assert traced(ON_GPU["token_logps"]) == ["triton"]


@pytest.mark.parametrize("known", [None, verdict.Verdict(False, "off by a mile"), "XPO_FAST_BACKEND"])
def test_torch_on_a_gpu(known, gpu, monkeypatch):
    """Unless triton is known to be right: the check is not run here."""
    monkeypatch.setattr(verdict, "_determine", None)
    if known is not None:
        verdict._known[0, torch.float32] = verdict.Verdict(True) if isinstance(known, str) else known
    if isinstance(known, str):
        monkeypatch.setenv(known, "torch")
    assert traced(ON_GPU["token_logps"]) == ["torch"]


@pytest.mark.parametrize("passed", [False, True])
def test_gather_on_a_gpu(passed, gpu):
    verdict._known[0, torch.float32] = verdict.Verdict(passed)

    def loss(hidden, weight, targets):
        return xf.gather_logps(hidden, targets, temperature=0.7).sum()

    traced(loss)
    traced(loss)


@pytest.mark.parametrize(
    "asked",
    [
        lambda: torch.cuda.is_available() and torch.cuda.is_current_stream_capturing(),
        lambda: torch.cuda.memory_reserved(0) < 0,
        lambda: torch.cuda.mem_get_info(0)[0] < 0,
    ],
    ids=["is_current_stream_capturing", "memory_reserved", "mem_get_info"],
)
def test_what_may_not_be_asked_on_a_gpu(asked, gpu, monkeypatch):
    """The tests above see it where the question is put back into the traced path."""
    plain = xf.head.plan.check_backend
    monkeypatch.setattr(xf.head.plan, "check_backend", lambda *arguments: asked() or plain(*arguments))
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchRuntimeError, AssertionError)):
        traced(ON_GPU["token_logps"])
    monkeypatch.setattr(xf.head.plan, "check_backend", plain)
    monkeypatch.setattr("xpo_fast.device.capturing", asked)
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchRuntimeError, AssertionError)):
        traced(ON_GPU["simpo"])


def test_compiled_gather():
    torch._dynamo.reset()
    logits, targets = oracle.normal(2, 3, VOCAB, seed=1).requires_grad_(), oracle.tokens((2, 3), VOCAB)

    def loss(logits, targets):
        return xf.gather_logps(logits * 2, targets, temperature=0.7).square().sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found = call(logits, targets)
        results.append((found.detach(), *torch.autograd.grad(found, logits)))
    assert_close(*results)


def head_arguments(*, trainable: bool, outputs: str, save_grad: bool, dtype=torch.float32):
    """Of the operator token_stats; the reference's only where a divergence is among the outputs."""
    hidden = oracle.normal(5, WIDTH, seed=1, dtype=dtype).requires_grad_()
    weight = oracle.normal(VOCAB, WIDTH, seed=2, dtype=dtype).requires_grad_(trainable)
    bias = oracle.normal(VOCAB, seed=3, dtype=dtype).requires_grad_(trainable)
    scaling = Scaling(temperature=0.8, softcap=3.0, logit_scale=1.5)
    ref = Reference(hidden.detach() * 0.5, weight.detach()) if "kl" in outputs else None
    targets = oracle.tokens((5,), VOCAB)
    given = Operands(hidden, weight, targets, bias, ref=ref, scaling=scaling, ignore_index=oracle.IGNORE)
    return (*given.packed(), [2, 2, 1], "torch", outputs, save_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("trainable", "outputs", "save_grad"),
    [
        (False, "", True),  # the gradient made in the forward
        (True, "", False),
        (True, "entropy,kl,reverse_kl,top1", False),
    ],
)
def test_head_operator(trainable, outputs, save_grad, dtype):
    """opcheck: schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes."""
    arguments = head_arguments(trainable=trainable, outputs=outputs, save_grad=save_grad, dtype=dtype)
    torch.library.opcheck(torch.ops.xpo_fast.token_stats.default, arguments)


def test_head_backward_operator():
    *arguments, _, _ = head_arguments(trainable=True, outputs="kl", save_grad=False)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    upstream = [oracle.normal(5, seed=k, dtype=torch.float32) for k in range(2)]
    arguments += [upstream, "logp,kl", upstream[:1], "kl"]
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(torch.ops.xpo_fast.token_stats_backward.default, (*arguments, [*needs, False]))
    into = torch.zeros(VOCAB, WIDTH)
    arguments = (*arguments[:8], into, *arguments[9:], [True, True, True, False])
    torch.library.opcheck(torch.ops.xpo_fast.token_stats_backward.default, arguments)


def test_gather_operators():
    logits = oracle.normal(5, VOCAB, seed=1, dtype=torch.bfloat16)
    targets, u = oracle.tokens((5,), VOCAB), oracle.normal(5, seed=2, dtype=torch.float32)
    arguments = (logits.clone().requires_grad_(), targets, 0.8, oracle.IGNORE, False)
    torch.library.opcheck(torch.ops.xpo_fast.gather_logps.default, arguments)
    torch.library.opcheck(torch.ops.xpo_fast.gather_logps_backward.default, (logits, targets, u, 0.8, oracle.IGNORE))
