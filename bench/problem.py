"""Defines the problems of the head benchmarks: random batches, two losses of their log-probs, exact results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8  # per batch: 4 pairs
BETA = 0.01  # log-probs of the rows of a pair differ by some hundreds: at this β no pair saturates
IGNORE = -100
LOGIT_STD = 3.0
LEANS = (-10.0, 30.0)  # range of what is added to the logit of a hidden state's target
FLOAT64_BLOCK = 8192  # vocabulary entries per block of the float64 results

CPU = torch.device("cpu")

Results = dict[str, Tensor]  # loss (), logps (R, T), hidden_grad (R, T, D), weight_grad (V, D)


class Case(NamedTuple):
    """A loss and what it is computed on."""

    loss: str  # "token" or "dpo"
    train_head: bool
    prompts: bool = False  # whether the first half of every row is an unscored prompt
    accumulated: bool = False  # whether the gradient is added to an earlier one of the head

    @property
    def floor_gemms(self) -> int:
        """Returns the least number of products of 2·N·V·D FLOP each."""
        return 3 if self.train_head else 2


CASES = {
    "frozen": Case("token", train_head=False),
    "trainable": Case("token", train_head=True),
    "dpo-frozen": Case("dpo", train_head=False),
    "dpo": Case("dpo", train_head=True),
    "dpo-prompts": Case("dpo", train_head=True, prompts=True),
    "dpo-accumulated": Case("dpo", train_head=True, accumulated=True),
}


@dataclass(frozen=True)
class Batch:
    """Rows of hidden states, the head, and the aligned targets."""

    hidden: Tensor  # (R, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (R, T), -100 where not scored

    @property
    def mask(self) -> Tensor:
        """Returns whether each position is scored, (R, T) bool."""
        return self.targets != IGNORE

    def scored(self) -> tuple[Tensor, Tensor]:
        """Returns hidden (N, D) and targets (N,) of the scored positions: views if every position is scored."""
        mask = self.mask
        if bool(mask.all()):
            return self.hidden.flatten(0, 1), self.targets.flatten()
        return self.hidden[mask], self.targets[mask]

    def spread(self, logps: Tensor) -> Tensor:
        """Returns log-probs (N,) of the scored positions as (R, T), with zeros elsewhere."""
        return logps.new_zeros(self.targets.shape).masked_scatter(self.mask, logps)


def make_weight(vocab: int, width: int, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0) -> Tensor:
    """Returns a head (V, D) that gives logits of standard deviation 3 on hidden states of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator, device=device)
    return weight.mul_(LOGIT_STD / width**0.5).to(dtype)


def make_batch(weight: Tensor, rows: int, length: int, prompts: bool, seed: int) -> Batch:
    """Returns rows of random hidden states on the weight's device, each shifted along its target's row of the head.

    The log-probs are between about −30 and 0, as a model's are, from very unlikely to certain tokens.
    """
    device, (vocab, width) = weight.device, weight.shape
    generator = torch.Generator(device).manual_seed(1 + seed)
    targets = torch.randint(vocab, (rows, length), generator=generator, device=device)
    lean = torch.empty(rows, length, 1, device=device).uniform_(*LEANS, generator=generator)
    direction = weight[targets].float()  # (R, T, D)
    hidden = torch.randn(rows, length, width, generator=generator, device=device)
    hidden += lean * direction / direction.square().sum(-1, keepdim=True)
    if prompts:
        targets[:, : length // 2] = IGNORE
    return Batch(hidden.to(weight.dtype), weight, targets)


def token_loss(logps: Tensor) -> Tensor:
    """Returns −Σ log-probs."""
    return -logps.sum()


def dpo_loss(logps: Tensor) -> Tensor:
    """Returns the DPO loss of log-probs (R, T), chosen rows first, with reference log-probs of zero."""
    chosen, rejected = logps.sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


LOSSES = {"token": token_loss, "dpo": dpo_loss}


def float64_truth(batch: Batch, case: Case) -> Results:
    """Returns the results in float64 on the same operands, computed one block of the vocabulary at a time.

    The head's gradient, of gigabytes, is rounded to float32: that error is far below every tolerance.
    """
    hidden, targets = batch.scored()
    hidden = hidden.double()
    lse = torch.full(targets.shape, float("-inf"), dtype=torch.float64)
    target_logit = torch.zeros_like(lse)
    for _, z, at in _float64_blocks(hidden, batch.weight, targets):
        lse = torch.logaddexp(lse, z.logsumexp(-1))
        target_logit[at[0]] = z[at]
    logps = (target_logit - lse).requires_grad_()
    loss = LOSSES[case.loss](batch.spread(logps))
    (upstream,) = torch.autograd.grad(loss, logps)

    scored_grad = torch.zeros_like(hidden)
    weight_grad = torch.empty(batch.weight.shape) if case.train_head else None
    for block, z, at in _float64_blocks(hidden, batch.weight, targets):
        dz = z.sub_(lse.unsqueeze(1)).exp_().mul_(-upstream.unsqueeze(1))
        dz[at] += upstream[at[0]]
        scored_grad += dz @ batch.weight[block].double()
        if weight_grad is not None:
            weight_grad[block] = (dz.T @ hidden).float()
    hidden_grad = torch.zeros(batch.hidden.shape, dtype=torch.float64)
    hidden_grad[batch.mask] = scored_grad
    found = {"loss": loss.detach(), "logps": batch.spread(logps.detach()), "hidden_grad": hidden_grad}
    return found if weight_grad is None else {**found, "weight_grad": weight_grad}


def _float64_blocks(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:
    """Yields blocks of the vocabulary, their logits (N, v), and the indices in these of the targets of the block."""
    for start in range(0, len(weight), FLOAT64_BLOCK):
        block = slice(start, min(start + FLOAT64_BLOCK, len(weight)))
        token = ((targets >= block.start) & (targets < block.stop)).nonzero().squeeze(1)
        yield block, hidden @ weight[block].double().T, (token, targets[token] - start)
