"""Defines the problems of the head's benchmarks: random batches, losses of their log-probs, exact results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8  # per batch: 4 pairs, or 2 lists
LIST_SIZE = 4
BETA = 0.01  # log-probs of the rows of a pair differ by some hundreds: at this β no pair saturates
SIMPO: dict[str, Any] = {"beta": 2.0, "gamma": 1.0}
IGNORE = -100
LOGIT_STD = 3.0
LEANS = (-10.0, 30.0)  # range of what is added to the logit of a hidden state's target
FLOAT64_BLOCK = 8192  # vocabulary entries per block of the float64 results

CPU = torch.device("cpu")

Results = dict[str, Tensor]  # loss (), logps (R, T), hidden_grad (R, T, D), weight_grad (V, D)


class Shape(NamedTuple):
    """The sizes of a head's problem, written N×D×V."""

    scored: int  # N
    width: int  # D
    vocab: int  # V

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Returns the shape that a text such as 1024x576x49152 names. Raises ValueError for others."""
        try:
            shape = cls(*map(int, text.replace("×", "x").split("x")))
        except (TypeError, ValueError):
            raise ValueError(
                f"expected NxDxV (scored tokens, width, vocabulary) such as 1024x576x49152, got {text!r}"
            ) from None
        if min(shape) < 1 or shape.scored % ROWS:
            raise ValueError(f"expected N, D and V of at least 1 and N a multiple of {ROWS} (rows), got {text!r}")
        return shape

    def __str__(self) -> str:
        return "×".join(map(str, self))

    @property
    def gemm_flop(self) -> int:
        """Returns the FLOP of one product of the head."""
        return 2 * self.scored * self.width * self.vocab


class Case(NamedTuple):
    """A loss and what it is computed on."""

    loss: str  # a name of LOSSES
    train_head: bool
    prompt_share: float = 0.0  # of every row, that is an unscored prompt
    accumulated: bool = False  # whether the gradient is added to an earlier one of the head
    list_size: int = LIST_SIZE  # K, for "lists"

    @property
    def floor_gemms(self) -> int:
        """Returns the least number of products of 2·N·V·D FLOP each."""
        return 3 if self.train_head else 2

    def loss_of(self, logps: Tensor, mask: Tensor) -> Tensor:
        """Returns the loss of log-probs (R, T), 0 outside the mask (R, T)."""
        return list_loss(logps, mask, self.list_size) if self.loss == "lists" else LOSSES[self.loss](logps, mask)

    def columns(self, rows: int) -> dict[str, Any]:
        """Returns the method's other inputs, by their names in `Objective`; the reference's log-probs are 0."""
        found: dict[str, Any] = {"ref_logps": torch.zeros(rows)} if self.loss in ("dpo", "kto", "lists") else {}
        if self.loss == "kto":
            found |= {"desirable": desirable(rows), "kl": torch.zeros(())}
        if self.loss == "grpo":
            found["advantage"] = advantages(rows)
        if self.loss == "lists":
            found["scores"] = torch.arange(self.list_size, 0, -1.0).expand(rows // self.list_size, -1)
        return found


CASES = {
    "frozen": Case("token", train_head=False),
    "trainable": Case("token", train_head=True),
    "dpo-frozen": Case("dpo", train_head=False),
    "dpo": Case("dpo", train_head=True),
    "dpo-prompts": Case("dpo", train_head=True, prompt_share=0.5),
    "dpo-accumulated": Case("dpo", train_head=True, accumulated=True),
    "simpo": Case("simpo", train_head=True),
    "kto": Case("kto", train_head=True),
    "grpo": Case("grpo", train_head=False),
    "lists": Case("lists", train_head=True),
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


def make_batch(weight: Tensor, rows: int, length: int, prompt: int, seed: int) -> Batch:
    """Returns rows of random hidden states on the weight's device, each shifted along its target's row of the head.

    The log-probs are between about −30 and 0, as a model's are, from very unlikely to certain tokens.
    prompt: the number of positions at the beginning of each row that are not scored.
    """
    device, (vocab, width) = weight.device, weight.shape
    generator = torch.Generator(device).manual_seed(1 + seed)
    targets = torch.randint(vocab, (rows, length), generator=generator, device=device)
    lean = torch.empty(rows, length, 1, device=device).uniform_(*LEANS, generator=generator)
    direction = weight[targets].float()  # (R, T, D)
    hidden = torch.randn(rows, length, width, generator=generator, device=device)
    hidden += lean * direction / direction.square().sum(-1, keepdim=True)
    targets[:, :prompt] = IGNORE
    return Batch(hidden.to(weight.dtype), weight, targets)


# --- the losses of log-probs (R, T) that are 0 where nothing is scored ------------------------------------------------


def desirable(rows: int) -> Tensor:
    """Returns which rows of "kto" are desirable: the first half."""
    return torch.arange(rows) < rows // 2


def advantages(rows: int) -> Tensor:
    """Returns the advantages of the rows of "grpo", whose mean, the loss, is not 0."""
    return torch.linspace(-1.0, 2.0, rows)


def token_loss(logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns −Σ log-probs."""
    return -logps.sum()


def dpo_loss(logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the DPO loss of chosen rows followed by rejected ones, with reference log-probs of zero."""
    chosen, rejected = logps.sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def simpo_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Returns the SimPO loss of chosen rows followed by rejected ones."""
    chosen, rejected = (logps.sum(-1) / mask.sum(-1)).chunk(2)
    return -F.logsigmoid(SIMPO["beta"] * (chosen - rejected) - SIMPO["gamma"]).mean()


def kto_loss(logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the KTO loss with reference log-probs and a reference point of zero."""
    gain = BETA * logps.sum(-1)
    return torch.sigmoid(torch.where(desirable(len(logps)), -gain, gain)).mean()


def grpo_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Returns the GRPO loss of samples of the policy itself: every ratio is 1, and has a gradient."""
    surrogate = (logps - logps.detach()).exp() * advantages(len(logps)).to(logps.dtype).unsqueeze(-1)
    return -((surrogate * mask).sum(-1) / mask.sum(-1)).mean()


def list_loss(logps: Tensor, mask: Tensor | None = None, size: int = LIST_SIZE) -> Tensor:
    """Returns the Plackett–Luce loss of lists of rows from the best to the worst, with reference log-probs of zero."""
    s = BETA * logps.sum(-1).view(-1, size)
    return (s.flip(-1).logcumsumexp(-1).flip(-1) - s).sum(-1).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "token": token_loss,
    "dpo": dpo_loss,
    "simpo": simpo_loss,
    "kto": kto_loss,
    "grpo": grpo_loss,
    "lists": list_loss,
}
# Each loss but "token", which is no method, in `Objective`.
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": BETA}),
    "simpo": ("simpo", SIMPO),
    "kto": ("kto", {"beta": BETA}),
    "grpo": ("grpo", {}),
    "lists": ("plackett_luce", {"beta": BETA}),
}


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
    loss = case.loss_of(batch.spread(logps), batch.mask)
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
