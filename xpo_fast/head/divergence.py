"""The generalised Jensen–Shannon divergence of two heads' logits, and its gradient, while both tiles are live."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Tensors of the size of a step's logits that `jsd` makes beside the two that it is given: p, q and m.
COPIES = 3


def expectation(p: Tensor, x: Tensor) -> Tensor:
    """Returns Σ p·x of each row, (r,), overwriting x; 0·∞ = 0 for tokens that a bias of −∞ rules out."""
    return x.masked_fill_(p == 0, 0).mul_(p).sum(dim=1)


def normalised(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns softmax (r, V) in memory of its own, and log Σ e^z (r, 1).

    torch's own adds up a row one by one, which is off by 2e-5 at a vocabulary of 128k.
    """
    largest = z.amax(dim=1, keepdim=True)
    p = (z - largest).exp_()
    total = p.sum(dim=1, keepdim=True)
    return p.div_(total), total.log().add_(largest)


def jsd(
    z: Tensor,  # (r, V) final logits, overwritten
    t: Tensor,  # (r, Vt) the teacher's, overwritten
    beta: float,
    temperature: float,
    own: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Returns the divergence of each row (r,), and its gradient in z as (r, Vt) and a factor.

    β KL(q‖m) + (1−β) KL(p‖m), m = β q + (1−β) p, p = softmax(z/τ), q = softmax(t/τ); β = 0: KL(q‖p), β = 1: KL(p‖q).
    Vt > V: z is padded with zeros. own: `normalised(z)`, if it was computed before; it is not overwritten.

    With d = log p − log m: ∂JSD/∂z = (1−β) p (d − Σ p d) / τ, because the terms in log m cancel.
    """
    more = t.shape[1] - z.shape[1]
    if temperature != 1:
        own, z, t = None, z.div_(temperature), t.div_(temperature)
    if more:
        own, z = None, F.pad(z, (0, more))
    p, lse = normalised(z) if own is None else own
    q, t_lse = normalised(t)
    log_p, log_q = z.sub_(lse), t.sub_(t_lse)
    if beta == 0:
        return expectation(q, log_q.sub_(log_p)), torch.sub(p, q, out=log_p), 1 / temperature
    if beta == 1:
        del q
        d = log_p.sub_(log_q).masked_fill_(p == 0, 0)
        mean = (p * d).sum(dim=1)
        return mean, d.sub_(mean.unsqueeze(1)).mul_(p), 1 / temperature
    # Finite where a bias of −∞ excludes a token, so that 0 times it is 0. In logarithms, because m may underflow.
    for x in (log_p, log_q):
        x.clamp_(min=torch.finfo(x.dtype).min / 4)
    log_m = log_q + (math.log(beta) - math.log1p(-beta))
    torch.logaddexp(log_p, log_m, out=log_m).add_(math.log1p(-beta))
    soft = log_q.sub_(log_m).mul_(q).sum(dim=1).mul_(beta)
    d = log_p.sub_(log_m)
    mean = torch.mul(p, d, out=log_m).sum(dim=1)
    return soft.add_(mean, alpha=1 - beta), d.sub_(mean.unsqueeze(1)).mul_(p), (1 - beta) / temperature
