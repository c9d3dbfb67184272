"""Losses by which a policy learns what its reference says under a context that the policy does not read."""

from __future__ import annotations

from torch import Tensor

from .math import Losses
from .registry import register
from .survey import NO_REWARD


@register(
    paper="A General Language Assistant as a Laboratory for Alignment (arXiv 2112.00861), context distillation",
    equation="kl_w = Σ_t KL(ref(·|C, x, y_<t) ‖ π(·|x, y_<t)), over tokens",
    attributes={**NO_REWARD, "feedback": "-", "feedback-form": "-"},
    denominator="tokens",
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
    metrics = {"logps/chosen": logp_w, "logps/teacher": ref_logp_w, "kl": kl_w}
    return kl_w, {name: x.detach() for name, x in metrics.items()}
