"""Contenders that compute the head's losses, forward and backward: the floor, ours, materialised, peers.

Peers' packages are imported where they are used, so that a missing one affects only its own contender.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..head import token_logps
from ..head.backends import BACKENDS, check_backend
from ..objective import Objective
from .problem import BETA, CPU, IGNORE, OBJECTIVES, SIMPO, Batch, Case, Results, advantages, desirable, token_loss

LIGER = "liger-kernel==0.8.5"
LIGER_FUSED = "Liger fused scaled cross-entropy"
# On Hopper Liger's fused function has kernels of its own, which need these.
LIGER_PACKAGES = f"{LIGER} 'nvidia-cutlass-dsl[cu13]>=4.6' apache-tvm-ffi"


class Missing(Exception):
    """Raised if a contender cannot run here; the message says why, and what to install if that helps."""


@contextmanager
def needed(package: str, install: str) -> Iterator[None]:
    """Raises `Missing` for imports that fail in a `with` block. install: arguments for `pip install`."""
    try:
        yield
    except ImportError as error:
        raise Missing(f"{package} is not installed, or does not import ({error}): pip install {install}") from error


class Contender(NamedTuple):
    """A way to compute a case's results."""

    call: Callable[[Batch], Results]
    gemms: int  # number of its products of 2·N·V·D FLOP, where N counts scored positions
    ours: bool = False


Makers = dict[str, Callable[[], Contender]]


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


def make_contenders(case: Case, tile_bytes: int | None = None) -> Makers:
    """Returns a maker of each contender of a case by name, ours first; a maker raises `Missing` where it cannot run.

    tile_bytes: the budget of our tile; None: the default.
    """
    # Products of a contender that also computes the prompts.
    everywhere = round(case.floor_gemms / (1 - case.prompt_share))
    ours = _our_tokens if case.loss == "token" else _our_objective
    name = "xpo_fast token_logps" if case.loss == "token" else "xpo_fast Objective"
    makers: Makers = {name: partial(ours, case, tile_bytes, "auto")}
    # `auto` is torch's on a CPU.
    makers |= {f"xpo_fast, {b}": partial(ours, case, tile_bytes, b) for b in BACKENDS if b != "torch"}
    makers |= {
        "materialised": lambda: _materialised(case, everywhere),
        "torch.compile": lambda: _compiled(case, everywhere),
        "TRL": lambda: _trl(case),
    }
    if case.loss in _LIGER_LOSSES:
        makers["Liger"] = lambda: _liger(case, everywhere)
    makers[LIGER_FUSED] = lambda: _liger_fused(case)
    if case.loss == "token":
        makers |= {
            "torch linear_cross_entropy": lambda: _torch_fused(case, everywhere, chunked=False),
            "torch linear_cross_entropy, chunked": lambda: _torch_fused(case, everywhere, chunked=True),
        }
    makers["CCE"] = _cce_kernels
    makers["CCE, torch.compile"] = lambda: _cce_compiled(case)
    return makers


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


# --- ours -------------------------------------------------------------------------------------------------------------


def _check_backend(backend: str) -> None:
    if backend != "auto":
        try:
            check_backend(backend, CPU)
        except ValueError as error:
            raise Missing(str(error)) from error


def _our_tokens(case: Case, tile_bytes: int | None, backend: str) -> Contender:
    _check_backend(backend)
    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        logps = token_logps(hidden, weight, batch.targets, tile_bytes=tile_bytes, backend=backend)
        return _results(token_loss(logps), hidden, weight, logps)

    gemms = 4 if case.train_head and backend != "dense" else case.floor_gemms
    return Contender(call, gemms, ours=True)


def _our_objective(case: Case, tile_bytes: int | None, backend: str) -> Contender:
    _check_backend(backend)
    method, hyperparameters = OBJECTIVES[case.loss]
    objective = Objective(method, tile_bytes=tile_bytes, backend=backend, **hyperparameters)
    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        wide = weight.grad if weight.dtype == torch.float32 and backend != "dense" else None
        out = objective(hidden, weight, batch.targets, weight_grad=wide, **case.columns(len(batch.targets)))
        return _results(out.loss, hidden, weight)

    return Contender(call, case.floor_gemms, ours=True)


# --- the code that one writes without a library -----------------------------------------------------------------------


def materialised_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the log-probs of targets (…) from a float32 log-softmax of logits (…, V)."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _row_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns log-probs (R, T), 0 where nothing is scored."""
    logps = materialised_logps(F.linear(hidden, weight), targets.clamp(min=0))
    return torch.where(targets != IGNORE, logps, 0.0)


def _from_logps(case: Case, gemms: int, logps_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    """Returns the loss by torch of what `logps_of` makes of all rows: hidden (R, T, D), weight, targets (R, T)."""
    leaves = Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        logps = logps_of(hidden, weight, batch.targets)
        return _results(case.loss_of(logps, batch.mask), hidden, weight, logps)

    return Contender(call, gemms)


def _materialised(case: Case, gemms: int) -> Contender:
    return _from_logps(case, gemms, _row_logps)


def _compiled(case: Case, gemms: int) -> Contender:
    """Returns the materialised log-probs through torch.compile, which compiles at the first call, not while timed."""
    return _from_logps(case, gemms, _for_many_shapes(torch.compile(_row_logps, dynamic=False)))


def _for_many_shapes(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a compiled function that is compiled anew for each shape: by default torch gives up after eight."""

    def call(*operands: Any, **options: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(*operands, **options)

    return call


# --- peers ------------------------------------------------------------------------------------------------------------


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
    function = trl_logps()

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        batch = Batch(hidden, weight, targets)
        scored, of_scored = batch.scored()
        return batch.spread(function(scored, weight, of_scored))

    return _from_logps(case, 4 if case.train_head else 3, logps)


def liger_dpo(compiled: bool) -> Any:
    """Returns Liger's DPO without a reference model. compiled: its default, which on a CPU needs a C++ compiler."""
    with needed("Liger 0.8.5", LIGER):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    return LigerFusedLinearDPOLoss(IGNORE, beta=BETA, compiled=compiled, use_ref_model=False)


def _liger_dpo() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = liger_dpo(compiled=False)
    return lambda hidden, weight, targets: function(weight, hidden, targets)[0]


def _liger_simpo() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    with needed("Liger 0.8.5", LIGER):
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss
    function = LigerFusedLinearSimPOLoss(IGNORE, compute_nll_loss=False, compiled=False, **SIMPO)
    return lambda hidden, weight, targets: function(weight, hidden, targets)[0]


def _liger_kto() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    with needed("Liger 0.8.5", LIGER):
        from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss
    function = LigerFusedLinearKTOLoss(IGNORE, beta=BETA, compiled=False, use_ref_model=False)
    return lambda hidden, weight, targets: function(
        hidden, weight, targets, preference_labels=desirable(len(targets)), kl=torch.zeros(())
    )[0]


def _liger_grpo() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    with needed("Liger 0.8.5", LIGER):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
    return lambda hidden, weight, targets: function(
        hidden, weight, targets.clamp(min=0), (targets != IGNORE).to(hidden.dtype), advantages(len(targets))
    )[0]


_LIGER_LOSSES = {"dpo": _liger_dpo, "simpo": _liger_simpo, "kto": _liger_kto, "grpo": _liger_grpo}


def _liger(case: Case, gemms: int) -> Contender:
    """Returns Liger's chunked loss, not compiled."""
    function, leaves = _LIGER_LOSSES[case.loss](), Leaves(case)

    def call(batch: Batch) -> Results:
        hidden, weight = leaves(batch)
        return _results(function(hidden, weight, batch.targets), hidden, weight)

    return Contender(call, gemms)


def liger_fused(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns Liger's log-probs of hidden (N, D), weight, targets (N,): by its own kernels on Hopper, else by torch."""
    # Switches off a check of the targets that would wait for the device; the targets here are in range.
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    with needed("Liger 0.8.5's fused scaled cross-entropy", LIGER_PACKAGES if device.type == "cuda" else LIGER):
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import _resolve_implementation

        _resolve_implementation(device)  # imports the kernels' compiler
    return lambda hidden, weight, targets: -function.apply(hidden, weight, targets)


def _liger_fused(case: Case) -> Contender:
    function = liger_fused(CPU)

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return function(hidden.flatten(0, 1), weight, targets.flatten()).view(targets.shape)

    return _from_logps(case, round(4 / (1 - case.prompt_share)), logps)  # always with the gradient of the head


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


def cce() -> Callable[..., Tensor]:
    """Returns the function of Cut Cross-Entropy."""
    with needed("Cut Cross-Entropy", "cut-cross-entropy"):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]
    return linear_cross_entropy


def _cce_kernels() -> Contender:
    cce()
    raise Missing("Cut Cross-Entropy's kernels need a GPU; on a CPU it has only its code for torch.compile")


def _cce_compiled(case: Case) -> Contender:
    """Returns what Cut Cross-Entropy has for a CPU: cross-entropy of materialised logits, for torch.compile."""
    function = _for_many_shapes(partial(cce(), reduction="none", impl="torch_compile"))
    return _from_logps(case, case.floor_gemms, lambda hidden, weight, targets: -function(hidden, weight, targets))
