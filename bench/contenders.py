"""Contenders that compute the head's losses, forward and backward: the floor, ours, materialised, peers.

Peers' packages are imported where they are used, so that a missing one affects only its own contender.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from problem import BETA, IGNORE, LOSSES, Batch, Case, Results, token_loss
from xpo_fast import Objective, token_logps


class Missing(Exception):
    """Raised if a contender's package is not installed; the message says what to install."""


@contextmanager
def needed(package: str, install: str) -> Iterator[None]:
    """Raises `Missing` for imports that fail in a `with` block. install: arguments for `pip install`."""
    try:
        yield
    except ImportError as error:
        raise Missing(f"{package} does not import ({error}): pip install {install}") from error


class Contender(NamedTuple):
    """A way to compute a case's results."""

    call: Callable[[Batch], Results]
    gemms: int  # number of its products of 2·N·V·D FLOP, where N counts scored positions
    ours: bool = False


def make_floor(batch: Batch, case: Case, *, new_gradients: bool = False) -> Contender:
    """Returns the bare products of real operands, written into buffers made beforehand. Its call returns no results.

    new_gradients: write the gradients into new memory, as a training step does. The operating system maps new memory
    page by page at the first write, which takes time.
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
    """Returns a maker of each contender of a case by name, ours first; a maker raises `Missing` without its package.

    tile_bytes: the budget of our tile; None: the default.
    """
    everywhere = case.floor_gemms * (2 if case.prompts else 1)  # products of a contender that also computes the prompts
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
    """Makes the operands leaves of a new graph per call; in an accumulating case the head keeps its gradient."""

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
    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        logps = token_logps(hidden, weight, batch.targets, tile_bytes=tile_bytes)
        return _results(token_loss(logps), hidden, weight, logps)

    return Contender(call, gemms=4 if case.train_head else 2, ours=True)


def _our_objective(case: Case, tile_bytes: int | None) -> Contender:
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
    """Returns the code one writes without a library."""
    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        logps = materialised_logps(F.linear(hidden, weight), batch.targets.clamp(min=0))
        logps = torch.where(batch.mask, logps, 0.0)
        return _results(LOSSES[case.loss](logps), hidden, weight, logps)

    return Contender(call, gemms)


def materialised_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the log-probs of targets (…) from a float32 log-softmax of logits (…, V)."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def trl_logps() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns TRL's function of hidden (N, D), weight, targets (N,), with TRL's tile width and no optional output."""
    with needed("TRL 1.16", "trl==1.16.0"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )
        return found

    return logps


def _trl(case: Case) -> Contender:
    """Returns TRL on the scored positions only; TRL's trainers also give it the prompts where Triton does not run."""
    function, leaves = trl_logps(), Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        scored, targets = Batch(hidden, weight, batch.targets).scored()
        logps = batch.spread(function(scored, weight, targets))
        return _results(LOSSES[case.loss](logps), hidden, weight, logps)

    return Contender(call, gemms=4 if case.train_head else 3)


def liger_dpo(compiled: bool) -> Any:
    """Returns Liger's DPO without a reference model. compiled: its default, which on a CPU needs a C++ compiler."""
    with needed("Liger 0.8.5", "liger-kernel==0.8.5"):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    return LigerFusedLinearDPOLoss(IGNORE, beta=BETA, compiled=compiled, use_ref_model=False)


def _liger(case: Case, gemms: int) -> Contender:
    objective, leaves = liger_dpo(compiled=False), Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        loss, _ = objective(weight, hidden, batch.targets)
        return _results(loss, hidden, weight)

    return Contender(call, gemms)


def _torch_fused(case: Case, gemms: int, chunked: bool) -> Contender:
    """Returns torch's function, which gives no log-probs. chunked: in chunks, else it materialises the logits."""
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
