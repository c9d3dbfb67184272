"""Makes the contenders of gpu.py: ours, the materialised loss, the peers, and the floor of bare products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from xpo_fast.bench.contenders import Missing, cce, liger_dpo, liger_fused, materialised_logps, needed, trl_logps
from xpo_fast.bench.problem import BETA, LOSSES, Batch, Results

FLOOR_TOKENS = 8192  # per GEMM of the floor: more would be no faster, and might not fit


class Task(NamedTuple):
    """A case: what its contenders compute."""

    train_head: bool
    loss: str | None  # "token" or "dpo"; None: no gradient
    gemms: int  # number of the floor's products of 2·N·V·D FLOP; 0: the batch has logits (R, T, V) for hidden states


TASKS = {
    "frozen": Task(False, "token", 2),
    "trainable": Task(True, "dpo", 3),
    "logps": Task(False, None, 1),
    "gather": Task(False, "token", 0),
}


class Contender(NamedTuple):
    """A call to be measured."""

    call: Callable[[Batch], Results]
    loss: str | None  # the loss that it computes, which may differ from the task's
    ours: bool = False


# A maker returns None if its contender has no such task. Every position of a batch is scored.


def _finish(
    batch: Batch, task: Task, forward: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
) -> Results:
    """Runs a forward that returns loss, logps or both, and the backward; returns the results by name."""
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
    """Returns ours. labels_on_host: as from a data loader, so that no call waits to learn which tokens are scored."""
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
    """Returns the code one writes without a library: logits in bf16, then a float32 log-softmax."""

    def call(batch: Batch) -> Results:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            logits = torch.nn.functional.linear(hidden, weight) if task.gemms else hidden
            return None, materialised_logps(logits, batch.targets)

        return _finish(batch, task, forward)

    return Contender(call, task.loss)


def make_trl(task: Task, device: torch.device) -> Contender | None:
    """Returns TRL's log-probs."""
    if not task.gemms:
        return None
    function = trl_logps()

    def call(batch: Batch) -> Results:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            return None, function(hidden.flatten(0, 1), weight, batch.targets.flatten()).view(batch.targets.shape)

        return _finish(batch, task, forward)

    return Contender(call, task.loss)


def make_liger_dpo(task: Task, device: torch.device) -> Contender | None:
    """Returns Liger's DPO, compiled on a GPU."""
    if task.loss != "dpo":
        return None
    objective = liger_dpo(compiled=device.type != "cpu")

    def call(batch: Batch) -> Results:
        return _finish(batch, task, lambda h, w: (objective(w, h, batch.targets)[0], None))

    return Contender(call, "dpo")


def make_liger_ce(task: Task, device: torch.device) -> Contender | None:
    """Returns Liger's cross-entropy."""
    if task.loss is None or not task.gemms:
        return None
    if device.type == "cpu":
        raise Missing("Liger's cross-entropy needs a GPU")
    with needed("Liger 0.8.5", "liger-kernel==0.8.5"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def call(batch: Batch) -> Results:
        return _finish(batch, task, lambda h, w: (loss(w, h.flatten(0, 1), batch.targets.flatten()), None))

    return Contender(call, "token")


def make_liger_fused(task: Task, device: torch.device) -> Contender | None:
    """Returns Liger's log-probs, by its own kernels on Hopper; torch computes the loss of these."""
    if not task.gemms:
        return None
    function = liger_fused(device)

    def call(batch: Batch) -> Results:
        def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
            return None, function(hidden.flatten(0, 1), weight, batch.targets.flatten()).view(batch.targets.shape)

        return _finish(batch, task, forward)

    return Contender(call, task.loss)


def make_cce(task: Task, device: torch.device) -> Contender | None:
    """Returns Cut Cross-Entropy's log-probs."""
    if not task.gemms:
        return None
    if device.type == "cpu":
        raise Missing("Cut Cross-Entropy needs a GPU")
    linear_cross_entropy = cce()

    def call(batch: Batch) -> Results:
        return _finish(batch, task, lambda h, w: (None, -linear_cross_entropy(h, w, batch.targets, reduction="none")))

    return Contender(call, task.loss)


def make_quack(task: Task, device: torch.device) -> Contender | None:
    """Returns QuACK's cross-entropy, which always computes the head's gradient."""
    if not task.train_head:
        return None
    if device.type == "cpu":
        raise Missing("QuACK's chunked cross-entropy needs a GPU")
    with needed("QuACK", "quack-kernels"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

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
    """Returns the bare GEMMs or memory traffic, with buffers made beforehand. Its call returns no results."""
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
