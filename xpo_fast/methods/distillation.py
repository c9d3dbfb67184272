"""Losses by which a policy learns what another model says: a teacher, or its reference under a context.

The teacher stands where the reference stands: its hidden states are `ref_hidden`, its head `ref_weight` (and
`ref_bias`), of any width; `kl_w`, `reverse_kl_w` and `jsd_w` come from tiles of both heads side by side.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .math import Losses, check, log1mexp, past_overflow
from .registry import register
from .survey import NO_REWARD

_ATTRIBUTES = {**NO_REWARD, "feedback": "-", "feedback-form": "-"}
_register = partial(register, denominator="tokens")
_teaches = partial(_register, attributes={**_ATTRIBUTES, "feedback-source": "AI"}, reads_teacher=True)


def _by_row(divergence: Tensor, name: str, logp: Tensor, ref_logp: Tensor) -> Losses:
    """Returns a divergence as the loss, and the metrics of completions."""
    metrics = {"logps/chosen": logp, "logps/teacher": ref_logp, name: divergence}
    return divergence, {name: x.detach() for name, x in metrics.items()}


@_register(
    paper="A General Language Assistant as a Laboratory for Alignment (arXiv 2112.00861), context distillation",
    equation="kl_w = Σ_t KL(ref(·|C, x, y_<t) ‖ π(·|x, y_<t)), over tokens",
    attributes=_ATTRIBUTES,
    reads_context=True,
)
def context_distillation(
    *,
    logp_w: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,)
    kl_w: Tensor,  # (P,)
) -> Losses:
    """Context distillation: trains a policy to answer without a context C as its reference answers under it.

    L = Σ_t KL(ref(·|C, x, y_<t) ‖ π(·|x, y_<t)) over the completion's positions; the mean divides by the completions'
    tokens. The reference is the model itself before training, which reads C in front of the prompt x: its hidden
    states are those of the row C, x, y at the places of y. The least value, 0, is reached where π says without C what
    ref says under it. Of the log-probs only metrics are made. The paper's prompt has 4,600 words, and it keeps the 50
    most likely tokens of each position; here all of the vocabulary is compared, in tiles of both heads.
    """
    return _by_row(kl_w, "kl", logp_w, ref_logp_w)


@_teaches(
    paper="Distilling the Knowledge in a Neural Network (arXiv 1503.02531), by token",
    equation="kl_w = Σ_t KL(teacher(·|x, y_<t) ‖ π(·|x, y_<t)), over tokens",
)
def forward_kl(
    *,
    logp_w: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,) under the teacher
    kl_w: Tensor,  # (P,)
) -> Losses:
    """Forward KL, the usual distillation: L = Σ_t KL(teacher ‖ π) over the completion's positions, all of V compared.

    The mean divides by the completions' tokens. The policy is drawn to cover all that the teacher says. The gradient in
    a logit is π − teacher. With a temperature it is `gkd` with beta=0.
    """
    return _by_row(kl_w, "kl", logp_w, ref_logp_w)


@_teaches(
    paper="MiniLLM: Knowledge Distillation of Large Language Models (arXiv 2306.08543), by token",
    equation="reverse_kl_w = Σ_t KL(π(·|x, y_<t) ‖ teacher(·|x, y_<t)), over tokens",
)
def reverse_kl(
    *,
    logp_w: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,) under the teacher
    reverse_kl_w: Tensor,  # (P,)
) -> Losses:
    """Reverse KL: L = Σ_t KL(π ‖ teacher) over the completion's positions, all of V compared.

    The mean divides by the completions' tokens. The policy is kept from what the teacher finds unlikely, and may leave
    out what it finds likely. MiniLLM has the policy sample the completions; its gradient goes through the samples, too,
    this one does not. With a temperature it is `gkd` with beta=1.
    """
    return _by_row(reverse_kl_w, "reverse_kl", logp_w, ref_logp_w)


@_teaches(
    paper="On-Policy Distillation of Language Models, GKD (arXiv 2306.13649)",
    equation="jsd_w = Σ_t β KL(q ‖ m) + (1−β) KL(p ‖ m), m = β q + (1−β) p, over tokens",
)
def gkd(
    *,
    logp_w: Tensor,  # (P,)
    ref_logp_w: Tensor,  # (P,) under the teacher
    jsd_w: Tensor,  # (P,) at this beta and temperature
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Losses:
    """Generalised knowledge distillation: L = Σ_t JSD(β) of teacher and policy over the completion's positions.

    JSD(β) = β KL(q ‖ m) + (1−β) KL(p ‖ m), m = β q + (1−β) p, with p of the policy and q of the teacher, softmax of the
    logits divided by `temperature`. beta=0 is KL(q ‖ p), forward, and beta=1 is KL(p ‖ q), reverse, as in TRL; between
    them JSD / β tends to the forward KL and JSD / (1−β) to the reverse one. The mean divides by the completions'
    tokens; the loss is not multiplied by the temperature's square.
    """
    check(0 <= beta <= 1, "beta in [0, 1]", beta)
    check(temperature > 0, "temperature > 0", temperature)
    return _by_row(jsd_w, "jsd", logp_w, ref_logp_w)


@_register(
    paper="Distilling the Knowledge in a Neural Network (arXiv 1503.02531), of the k likeliest tokens and the rest",
    equation="topk_kl_w = Σ_t Σ_i q_i (log q_i − log p_i) over k ids and the rest, over tokens",
    attributes={**_ATTRIBUTES, "feedback-source": "AI"},
)
def topk_kl(
    *,
    logp_w: Tensor,  # (P,)
    topk_kl_w: Tensor,  # (P,)
) -> Losses:
    """Forward KL of a teacher's k likeliest tokens: L = Σ_t KL(q ‖ p) over k + 1 outcomes, the k ids and any other.

    The teacher's ids and log-probs are columns of a call of `Objective`, `topk_ids` and `topk_logp` (…, k), and of the
    same names in a data set of token ids: what a server returns, or what was written down before
    (`trainer.teacher_topk`). See `topk_divergence`.
    """
    metrics = {"logps/chosen": logp_w, "topk_kl": topk_kl_w}
    return topk_kl_w, {name: x.detach() for name, x in metrics.items()}


def topk_divergence(
    logp: Tensor,  # (…, k) of the policy at the teacher's k ids
    teacher_logp: Tensor,  # (…, k), −∞ for an id that is not there
) -> Tensor:
    """Computes KL(q ‖ p) of k ids and of all other tokens together, (…), differentiable in logp.

    Σ_i q_i (log q_i − log p_i) + q_r (log q_r − log p_r), with q_r = 1 − Σ q_i and p_r = 1 − Σ p_i. The rest is one
    outcome and not left out by dividing by Σ q_i: so the policy learns how much the teacher leaves to other tokens, the
    value is no more than the KL of the whole vocabulary (which it is for k = V), and it is 0 only where all of these
    probabilities agree. Rounding may leave nothing for the rest; it then counts 0 of the teacher.
    """
    there = teacher_logp > -torch.inf
    log_q, log_p = (torch.where(there, x, 0.0) for x in (teacher_logp, logp))
    q = torch.where(there, log_q.exp(), 0.0)
    found = (q * (log_q - log_p)).sum(dim=-1)
    tiny = torch.finfo(logp.dtype).eps
    rest = (1 - q.sum(dim=-1)).clamp(min=0)
    taken = torch.where(there, log_p, -torch.inf).logsumexp(dim=-1).clamp(max=-tiny)
    log_rest = torch.where(there.any(dim=-1), log1mexp(taken), 0.0)
    return found + torch.where(rest > tiny, rest * (rest.clamp(min=tiny).log() - log_rest), 0.0)


@_teaches(
    paper="On-Policy Distillation, Lu et al. 2025 (Thinking Machines); its loss: MiniLLM (arXiv 2306.08543)",
    equation="−r·A, A = log teacher(y_t) − log π_old(y_t)",
    unit="token",
)
def sampled_kl(
    *,
    token_logp: Tensor,  # (B, T)
    ref_token_logp: Tensor,  # (B, T) under the teacher
    mask: Tensor,  # (B, T)
    old_logp: Tensor | None = None,  # (B, T)
) -> Losses:
    """Reverse KL by sampled tokens: L = −r·A by token, A = log teacher(y_t) − log π_old(y_t), of the policy's samples.

    r = exp(token_logp − old_logp), 1 with a gradient where `old_logp`, the log-probs at sampling, is not given. The
    teacher gives one number a token, its log-prob of it: it need not have a head here, nor be here at all. With r = 1
    the loss is log π − log teacher, an unbiased estimate of KL(π ‖ teacher) of each position, and its gradient one of
    that KL's; effects on later positions are left out. Values outside the mask do not matter.
    """
    mask = mask.bool()
    logp, teacher = (torch.where(mask, x, 0.0) for x in (token_logp, ref_token_logp))
    old = logp.detach() if old_logp is None else torch.where(mask, old_logp, 0.0)
    ratio = past_overflow(torch.exp, logp - old)
    metrics = {"logps": logp, "logps/teacher": teacher, "ratio": ratio, "kl": old - teacher}
    shown = {name: torch.where(mask, x.detach(), torch.nan) for name, x in metrics.items()}
    return ratio * (old - teacher).detach(), shown
