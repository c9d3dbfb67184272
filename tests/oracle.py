"""What the head and the objective are held against: the textbook computation in float64, every logit at once.

It shares no line with the package. Beside it, the meter: what PyTorch's own profiler says a call multiplied and
allocated, operators inside custom operators included.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

IGNORE = -100


def logprobs(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Final logits and their log-softmax, both (n, V)."""
    z = hidden @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    return z, z.log_softmax(-1)


def expectation(p: Tensor, x: Tensor) -> Tensor:
    """Σ p·x over the vocabulary, with 0·∞ = 0 for tokens of probability zero: (n,)."""
    return (p * x.masked_fill(p == 0, 0.0)).sum(-1)


def stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options,  # bias, temperature, softcap, logit_scale
) -> dict[str, Tensor]:
    """Every statistic by name, shaped like targets, 0 where the target is IGNORE."""
    scored = targets != IGNORE
    z, logp = logprobs(hidden[scored], weight, **options)
    p, y = logp.exp(), targets[scored][:, None]
    found = {
        "logp": logp.gather(1, y)[:, 0],
        "lse": z.logsumexp(1),
        "entropy": -expectation(p, logp),
        "log_sum_sq_probs": p.square().sum(1).log(),
        "mean_logit": z.mean(1),
        "top1": (z.gather(1, y)[:, 0] == z.amax(1)),
    }
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, options.get("bias")
        _, ref = logprobs(ref_hidden[scored], ref_weight, **{**options, "bias": ref_bias})
        ref = ref.detach()
        found["kl"] = expectation(ref.exp(), ref - logp)
        found["reverse_kl"] = expectation(p, logp - ref)
        middle = (p + ref.exp()).div(2).log()
        found["jsd"] = (expectation(p, logp - middle) + expectation(ref.exp(), ref - middle)) / 2
    blank = {name: torch.zeros(targets.shape, dtype=x.dtype) for name, x in found.items()}
    return {name: blank[name].masked_scatter(scored, x) for name, x in found.items()}


def row_sums(x: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of x over each row's scored positions, and their number: (R,) each."""
    scored = targets != IGNORE
    if cu_seqlens is None:
        return (x * scored).sum(1), scored.sum(1)
    ends = cu_seqlens.tolist()
    rows = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return torch.stack([(x * scored)[r].sum() for r in rows]), torch.stack([scored[r].sum() for r in rows])


def leaves(*tensors: Tensor | None, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """Fresh copies with a gradient, of the same values, in a wider dtype."""
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def tokens(shape: tuple[int, ...], vocab: int, ignored: float = 0.3, seed: int = 0) -> Tensor:
    """Random targets, a share of them ignored."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, shape, generator=g)
    return targets.masked_fill(torch.rand(shape, generator=g) < ignored, IGNORE)


def normal(*shape: int, seed: int, std: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Meter:
    """What a call did to multiply matrices and to hold memory."""

    def __init__(self, call: Callable[[], object], folder: Path) -> None:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as prof:
            kept = call()
        path = folder / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        del kept
        memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
        changes = [size for _, size in memory]  # frees are negative; operands made before are not in it
        self.peak_bytes = max(itertools.accumulate(changes))
        self.largest_bytes = max(changes)
        self.products = [  # (rows, inner, columns) of every matrix product
            (*e["args"]["Input Dims"][at], e["args"]["Input Dims"][at + 1][1])
            for e in events
            for name, at in (("aten::mm", 0), ("aten::addmm", 1))
            if e["name"] == name
        ]

    def passes(self, tokens: int, vocab: int, width: int) -> float:
        """The products' work in units of F = 2·N·V·D."""
        return sum(a * b * c for a, b, c in self.products) / (tokens * vocab * width)
