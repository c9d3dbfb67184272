"""Operands for gpu.py, as problem.py describes them but made on the device, and their exact results in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_contenders import TASKS
from head import Shape
from problem import LEANS, LOGIT_STD, Batch, Case, Results, float64_truth

ROW_TOKENS = 1024  # a pair of rows fits a tile


def make_weight(shape: Shape, device: torch.device, seed: int) -> Tensor:
    """Returns a head (V, D) that gives logits of standard deviation 3 on hidden states of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape.vocab, shape.width, dtype=torch.bfloat16, device=device)
    return weight.normal_(std=LOGIT_STD / shape.width**0.5, generator=generator)


def make_batch(weight: Tensor, scored: int, seed: int) -> Batch:
    """Returns rows of random hidden states, each leaning towards or away from its target's row of the head."""
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
    """Returns the batch with its logits in place of its hidden states."""
    return Batch(batch.hidden @ batch.weight.T, batch.weight, batch.targets)


def find_truths(batch: Batch, names: Sequence[str]) -> dict[str, Results]:
    """Returns the float64 results of each loss with a trainable head, which every task is compared with."""
    losses = {TASKS[name].loss for name in names} | {"token"}
    with torch.device(batch.hidden.device):
        return {loss: float64_truth(batch, Case(loss, train_head=True)) for loss in losses if loss}


def find_gather_truth(batch: Batch) -> Results:
    """Returns the float64 results for logits (R, T, V), a few rows at a time; the gradient is float32."""
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
