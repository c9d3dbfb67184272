"""What the head benchmarks compute: random batches, two losses of their log-probs, the truth in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8  # rows of a batch: 4 pairs
BETA = 0.01  # the rows of a pair differ by some hundreds in log-prob: no pair saturates
IGNORE = -100
LOGIT_STD = 3.0
LEANS = (-10.0, 30.0)  # what a hidden state's lean towards its target adds to the target's logit
FLOAT64_BLOCK = 8192  # vocabulary entries that the truth takes at a time

Results = dict[str, Tensor]  # loss (), logps (R, T), hidden_grad (R, T, D), weight_grad (V, D)


class Case(NamedTuple):
    loss: str  # "token" or "dpo"
    train_head: bool
    prompts: bool = False  # whether the first half of every row is prompt, which is not scored
    accumulated: bool = False  # whether the head has a gradient already, to which this one is added

    @property
    def floor_gemms(self) -> int:
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
    hidden: Tensor  # (R, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (R, T), -100 where not scored

    @property
    def mask(self) -> Tensor:
        return self.targets != IGNORE

    def scored(self) -> tuple[Tensor, Tensor]:
        """hidden (N, D) and targets (N,) of the scored positions; views where that is every position."""
        mask = self.mask
        if bool(mask.all()):
            return self.hidden.flatten(0, 1), self.targets.flatten()
        return self.hidden[mask], self.targets[mask]

    def spread(self, logps: Tensor) -> Tensor:
        """(N,) of the scored positions → (R, T), zero elsewhere."""
        return logps.new_zeros(self.targets.shape).masked_scatter(self.mask, logps)


def make_weight(vocab: int, width: int, dtype: torch.dtype) -> Tensor:
    """(V, D) head that gives logits of standard deviation 3 on hidden states of unit variance."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(vocab, width, generator=generator).mul_(LOGIT_STD / width**0.5).to(dtype)


def make_batch(weight: Tensor, rows: int, length: int, prompts: bool, seed: int) -> Batch:
    """Rows of `length` random hidden states, each leaning towards or away from its target's row of the head.

    Log-probs from about −30 to 0: hopeless tokens and confident ones, as a model has them.
    """
    generator = torch.Generator().manual_seed(1 + seed)
    vocab, width = weight.shape
    targets = torch.randint(vocab, (rows, length), generator=generator)
    lean = torch.empty(rows, length, 1).uniform_(*LEANS, generator=generator)
    direction = weight[targets].float()  # (R, T, D)
    hidden = torch.randn(rows, length, width, generator=generator)
    hidden += lean * direction / direction.square().sum(-1, keepdim=True)
    if prompts:
        targets[:, : length // 2] = IGNORE
    return Batch(hidden.to(weight.dtype), weight, targets)


def token_loss(logps: Tensor) -> Tensor:
    """−Σ log-probs."""
    return -logps.sum()


def dpo_loss(logps: Tensor) -> Tensor:
    """DPO of (R, T) log-probs, chosen rows first; the reference's are zero, which costs nobody anything."""
    chosen, rejected = logps.sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


LOSSES = {"token": token_loss, "dpo": dpo_loss}


def float64_truth(batch: Batch, case: Case) -> Results:
    """The results in float64 on the same operands, a block of the vocabulary at a time.

    The head's gradient, gigabytes, is kept in float32: that rounding is far below every tolerance.
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
    """Yield a block of the vocabulary, its logits (N, v), and where in them the targets are that it holds."""
    for start in range(0, len(weight), FLOAT64_BLOCK):
        block = slice(start, min(start + FLOAT64_BLOCK, len(weight)))
        token = ((targets >= block.start) & (targets < block.stop)).nonzero().squeeze(1)
        yield block, hidden @ weight[block].double().T, (token, targets[token] - start)
