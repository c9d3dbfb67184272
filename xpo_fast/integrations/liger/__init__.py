"""liger_kernel.chunked_loss 0.8.5 on this engine: the same names, signatures and return values. Replace the import:

    from xpo_fast.integrations.liger import LigerFusedLinearDPOLoss

And of liger_kernel.ops the fused scaled cross-entropy, which verl's actor imports:

    from xpo_fast.integrations.liger import LigerFusedLinearScaledCrossEntropyFunction

Liger need not be installed. Every `liger_fused_linear_…` is a plain function with the arguments of Liger's
`LigerFusedLinear…Function.apply`, by position or by name; those classes are here for their `apply`.

Cost, in F = 2·N·V·D FLOP with N the scored tokens alone: 1F without gradient, 2F with a frozen head, 3F with a
trainable one (4F for a pair or a sequence that is longer than a tile), and 1F for a reference or teacher; the means of
logits need no product with the head. Memory is that of one tile, whatever the length. So `compiled` and `chunk_size`
are accepted and change nothing: pairs are not chunked, and nothing is compiled.

Differences in values, where Liger is wrong:

- `label_smoothing` acts on DPO's `loss_type="sigmoid"`, too: −(1−ε) log σ(h) − ε log σ(−h).
- A pair with an empty half and a KTO row without a token are left out and not counted; their log-probs are 0, not NaN.
- `chosen_logits_mean`, `rejected_logits_mean` and KTO's sums of logits are over scored tokens: padding does not count.
- KTO's `kl` of shape (B,) is one value per row, as its documentation says, and is not counted B times.
- ORPO is finite where a probability rounds to 1: the log-odds stop at a mean log-prob of −1e-10.
- GRPO's `luspo`: a row counts by its own tokens, Σ_t loss/B; padding is not in the mean. VESPO's weight leaves out the
  `vllm_is_ratio` of padding.
- The fused scaled cross-entropy's entropy is float32 where Liger's is of the operands' dtype: 16 bits round it more
  than an entropy bonus moves it in a step.
- Log-probs, divergences and gradients of 16-bit operands are computed from float32 logits, and dW is summed in float32
  over tiles; float64 operands give float64 results.

Differences in behaviour: nothing at an ignored position is read, so it may be NaN. No gradient is computed without
gradient mode, nor for a tensor that requires none. The results beside the loss are detached (Liger silently drops
gradients into them). ValueError is raised for an odd number of rows, shapes that do not fit, a missing reference, (on
the CPU) ids outside the vocabulary, for options where Liger has assertions, for a `beta` out of a method's range, and
for a `label_smoothing` that is not below ½ where it acts. `loss_type="ipo"` is an addition. The fused scaled
cross-entropy takes a batch without tokens, targets and ids on the host, and its tensor-parallel form shards of any
sizes, tensors on the CPU and `selected_token_ids`; where Liger raises the rest, it raises the same types of errors.
"""

from .distillation import (
    LigerFusedLinearCosineSimilarityFunction,
    LigerFusedLinearCosineSimilarityLoss,
    LigerFusedLinearJSDFunction,
    LigerFusedLinearJSDLoss,
    liger_fused_linear_cosine,
    liger_fused_linear_jsd,
)
from .grpo import LigerFusedLinearGRPOFunction, LigerFusedLinearGRPOLoss, liger_fused_linear_grpo
from .kto import LigerFusedLinearKTOFunction, LigerFusedLinearKTOLoss, liger_fused_linear_kto
from .pairs import (
    LigerFusedLinearCPOFunction,
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOFunction,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOFunction,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOFunction,
    LigerFusedLinearSimPOLoss,
    liger_fused_linear_cpo,
    liger_fused_linear_dpo,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)
from .scaled_cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
    liger_fused_linear_scaled_cross_entropy,
    liger_fused_linear_scaled_cross_entropy_tp,
)

__all__ = [
    "LigerFusedLinearCPOFunction",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCosineSimilarityFunction",
    "LigerFusedLinearCosineSimilarityLoss",
    "LigerFusedLinearDPOFunction",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDFunction",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOFunction",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOFunction",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "LigerFusedLinearSimPOFunction",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cosine",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_scaled_cross_entropy",
    "liger_fused_linear_scaled_cross_entropy_tp",
    "liger_fused_linear_simpo",
]
