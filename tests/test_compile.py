"""What the head owes torch.compile and torch.library: it compiles without a graph break and its operators are sound."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import oracle
import xpo_fast as xf

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
            logp = xf.token_logps(
                hidden, self.head.weight, targets, bias=self.head.bias, softcap=3.0, temperature=0.8
            )
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


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", ["simpo", "lipo", "grpo", "gspo", "dpo"])
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
    ref = (hidden.detach() * 0.5, weight.detach(), None) if "kl" in outputs else (None, None, None)
    scalars = (0.8, 3.0, 1.5, oracle.IGNORE, 2, 2, 1, "torch", outputs, save_grad)
    return (hidden, weight, bias, oracle.tokens((5,), VOCAB), *ref, None, *scalars)


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
    hidden, weight, bias, targets, *ref, _, t, c, s, ignore, tile, step, lanes, backend, _, _ = (
        head_arguments(trainable=True, outputs="kl", save_grad=False)
    )
    detached = [x.detach() for x in (hidden, weight, bias)]
    upstream = [oracle.normal(5, seed=k, dtype=torch.float32) for k in range(2)]
    arguments = (
        *detached,
        targets,
        *ref,
        None,
        t,
        c,
        s,
        ignore,
        tile,
        step,
        lanes,
        backend,
        upstream,
        "logp,kl",
        upstream[:1],
        "kl",
    )
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(torch.ops.xpo_fast.token_stats_backward.default, (*arguments, *needs))
    into = torch.zeros(VOCAB, WIDTH)
    arguments = (*arguments[:7], into, *arguments[8:], True, True, True)
    torch.library.opcheck(torch.ops.xpo_fast.token_stats_backward.default, arguments)


def test_gather_operators():
    logits = oracle.normal(5, VOCAB, seed=1, dtype=torch.bfloat16)
    targets, u = oracle.tokens((5,), VOCAB), oracle.normal(5, seed=2, dtype=torch.float32)
    arguments = (logits.clone().requires_grad_(), targets, 0.8, oracle.IGNORE, False)
    torch.library.opcheck(torch.ops.xpo_fast.gather_logps.default, arguments)
    torch.library.opcheck(
        torch.ops.xpo_fast.gather_logps_backward.default, (logits, targets, u, 0.8, oracle.IGNORE)
    )
