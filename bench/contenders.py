"""Every way of computing the head's losses, forward and backward: floor, ours, materialised, peers.

Packages are imported where they are used, so that a missing one stops its own contender only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from problem import BETA, IGNORE, LOSSES, Batch, Case, Results, token_loss


class Missing(Exception):
    """A contender that this installation does not have; the message says what to install."""


class Contender(NamedTuple):
    """A way to compute a case's results."""

    call: Callable[[Batch], Results]  # returns the results that it computes
    gemms: int  # number of its products of 2·N·V·D FLOP, N the scored positions
    ours: bool = False


def make_floor(batch: Batch, case: Case, *, new_gradients: bool = False) -> Contender:
    """Returns the bare products, on real operands, into buffers allocated beforehand. Its call returns no results.

    new_gradients: writes the gradients into new memory, as a training step does. The operating system maps it page by
    page at the first write, which takes time.
    """
    hidden, _ = batch.scored()
    weight = batch.weight
    logits = hidden @ weight.T
    dz = torch.softmax(logits, dim=-1)
    hidden_grad = torch.empty_like(hidden)
    weight_grad = torch.zeros_like(weight) if case.train_head else None

    def call(batch: Batch) -> Results:
        hidden = batch.hidden.flatten(0, 1)[: len(dz)]  # as many positions as are scored, without a copy
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(dz, weight, out=None if new_gradients else hidden_grad)
        if weight_grad is not None and case.accumulated:
            torch.addmm(weight_grad, dz.T, hidden, out=weight_grad)
        elif weight_grad is not None:
            torch.mm(dz.T, hidden, out=None if new_gradients else weight_grad)
        return {}

    return Contender(call, case.floor_gemms)


def make_contenders(case: Case, tile_bytes: int | None = None) -> dict[str, Callable[[], Contender]]:
    """Returns a maker of every contender of a case by name, ours first; it raises `Missing` without the package.

    tile_bytes: the budget of our tile, if not the default.
    """
    everywhere = case.floor_gemms * (2 if case.prompts else 1)  # products of a contender that computes prompts, too
    if case.loss == "token":
        return {
            "xpo_fast token_logps": lambda: _our_tokens(case, tile_bytes),
            "materialised": lambda: _materialised(case, everywhere),
            "TRL": lambda: _trl(case),
            "torch linear_cross_entropy": lambda: _torch_fused(case, everywhere, chunked=False),
            "torch linear_cross_entropy, chunked": lambda: _torch_fused(case, everywhere, chunked=True),
        }
    return {
        "xpo_fast Objective": lambda: _our_objective(case, tile_bytes),
        "materialised": lambda: _materialised(case, everywhere),
        "TRL": lambda: _trl(case),
        "Liger": lambda: _liger(case, everywhere),
    }


class Leaves:
    """Maker of the operands as leaves of a new graph per call, with the head's gradient so far where it accumulates."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.weight_grad: Tensor | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = batch.hidden.detach().requires_grad_()
        weight = batch.weight.detach().requires_grad_(self.case.train_head)
        if self.case.accumulated:
            if self.weight_grad is None:
                self.weight_grad = torch.zeros_like(weight)
            weight.grad = self.weight_grad
        return hidden, weight


def _results(loss: Tensor, hidden: Tensor, weight: Tensor, logps: Tensor | None = None) -> Results:
    """Runs the backward and returns the results by name."""
    leaves = {"hidden_grad": hidden, "weight_grad": weight}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if weight.grad is None:
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    else:
        loss.backward()
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    found["loss"] = loss.detach()
    if logps is not None:
        found["logps"] = logps.detach()
    return found


def _our_tokens(case: Case, tile_bytes: int | None) -> Contender:
    try:
        from xpo_fast import token_logps
    except ImportError as error:
        raise Missing(f"xpo_fast does not import ({error}): pip install -e .") from error

    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        logps = token_logps(hidden, weight, batch.targets, tile_bytes=tile_bytes)
        return _results(token_loss(logps), hidden, weight, logps)

    return Contender(call, gemms=4 if case.train_head else 2, ours=True)


def _our_objective(case: Case, tile_bytes: int | None) -> Contender:
    try:
        from xpo_fast import Objective
    except ImportError as error:
        raise Missing(f"xpo_fast does not import ({error}): pip install -e .") from error
    objective = Objective("dpo", beta=BETA, tile_bytes=tile_bytes)

    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        ref_logps = torch.zeros(len(batch.targets))
        wide = weight.grad if weight.dtype == torch.float32 else None
        out = objective(hidden, weight, batch.targets, ref_logps=ref_logps, weight_grad=wide)
        return _results(out.loss, hidden, weight)

    return Contender(call, case.floor_gemms, ours=True)


def _materialised(case: Case, gemms: int) -> Contender:
    """Returns the code without a library: logits in the operands' dtype, then a float32 log-softmax."""
    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        logprobs = F.linear(hidden, weight).float().log_softmax(-1)
        logps = logprobs.gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        logps = torch.where(batch.mask, logps, 0.0)
        return _results(LOSSES[case.loss](logps), hidden, weight, logps)

    return Contender(call, gemms)


def _trl(case: Case) -> Contender:
    """Returns TRL's function with the tile width that TRL uses and no optional output.

    It is given the scored positions alone; TRL's trainers give it the prompts, too, where Triton does not run.
    """
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise Missing(f"TRL 1.16 does not import ({error}): pip install trl==1.16.0") from error

    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        scored, targets = Batch(hidden, weight, batch.targets).scored()
        found, *_ = ChunkedLogProbFunction.apply(
            scored, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )
        logps = batch.spread(found)
        return _results(LOSSES[case.loss](logps), hidden, weight, logps)

    return Contender(call, gemms=4 if case.train_head else 3)


def _liger(case: Case, gemms: int) -> Contender:
    """Returns Liger's class without a reference model, and not compiled, which on a CPU takes a C++ compiler."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise Missing(f"Liger 0.8.5 does not import ({error}): pip install liger-kernel==0.8.5") from error
    objective = LigerFusedLinearDPOLoss(IGNORE, beta=BETA, compiled=False, use_ref_model=False)

    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        loss, _ = objective(weight, hidden, batch.targets)
        return _results(loss, hidden, weight)

    return Contender(call, gemms)


def _torch_fused(case: Case, gemms: int, chunked: bool) -> Contender:
    """Returns torch's function, which computes the sum and no log-probs, and materialises unless given options."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing(f"torch {torch.__version__} has no linear_cross_entropy: pip install torch==2.13.0")

    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        flat, targets = hidden.flatten(0, 1), batch.targets.flatten()
        loss = F.linear_cross_entropy(flat, weight, targets, reduction="sum", options=options)
        return _results(loss, hidden, weight)

    return Contender(call, gemms)
