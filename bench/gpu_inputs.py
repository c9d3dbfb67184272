"""Makes the inputs of gpu.py on the device, and their exact results in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_contenders import TASKS
from xpo_fast.bench.problem import Batch, Case, Results, float64_truth, make_batch

ROW_TOKENS = 1024  # per row at most: a pair of rows fits a tile


def make_rows(weight: Tensor, scored: int, seed: int) -> Batch:
    """Returns the `make_batch` of a number of positions, all of them scored, in an even number of equal rows."""
    rows = max(2, scored // (2 * ROW_TOKENS) * 2)
    assert scored % rows == 0, f"{scored} positions do not make {rows} equal rows"
    return make_batch(weight, rows, scored // rows, prompt=0, seed=seed)


def make_logits(batch: Batch) -> Batch:
    """Returns the batch with its logits in place of its hidden states."""
    return Batch(batch.hidden @ batch.weight.T, batch.weight, batch.targets)


def find_truths(batch: Batch, names: Sequence[str]) -> dict[str, Results]:
    """Returns the float64 results by loss, with a trainable head, of the losses of the named tasks and of "token"."""
    losses = {TASKS[name].loss for name in names} | {"token"}
    with torch.device(batch.hidden.device):
        return {loss: float64_truth(batch, Case(loss, train_head=True)) for loss in losses if loss}


def find_gather_truth(batch: Batch) -> Results:
    """Returns the results for logits (R, T, V), computed in float64 a few rows at a time; the gradient is float32."""
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
