"""Log-prob functions of RL frameworks on this engine: their arguments and results, with hidden states for logits.

Each takes the place of a function that is given the logits (…, V) of an LM head, or of a rank's rows of it. It is given
what the head is given, hidden states (…, D), and the head's weight; the other arguments are the framework's. So no
logits are computed beyond a tile, and results are float32, from float32 logits of 16-bit operands. None of the
frameworks is imported.

    OpenRLHF  log_probs_from_logits            openrlhf_log_probs
    slime     calculate_log_probs_and_entropy  slime_log_probs_and_entropy
    NeMo-RL   from_parallel_logits_to_logprobs nemo_rl_logprobs
    NeMo-RL   from_parallel_hidden_states_to_logprobs, its own fusion, by name: hidden states cut along the sequence
    verl      needs none: it calls Liger's LigerFusedLinearScaledCrossEntropyFunction, which integrations.liger has

Where the logits are there already, `xpo_fast.gather_logps` reads log-probs from them without a float32 copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..head.operands import HeadLike
from ..head.statistics import token_logps, token_stats
from ..head.vocab_parallel import VocabShard, agreed_shard


def openrlhf_log_probs(
    hidden: Tensor,  # (B, T, D), or packed (1, N, D)
    labels: Tensor,  # (B, T), the token that each position predicts
    temperature: float = 1.0,
    *,
    head: Tensor | HeadLike,  # (V, D), or a Head
) -> Tensor:
    """Computes log softmax(hidden Wᵀ / temperature) at the labels, as OpenRLHF's `log_probs_from_logits`.

    Returns (B, T), 0 where a label is −100. Raises as `token_logps`.
    """
    return token_logps(hidden, head, labels, temperature=temperature)


def slime_log_probs_and_entropy(
    hidden: Tensor,  # (R, D), the positions that predict the tokens
    tokens: Tensor,  # (R,)
    tp_group: Any = None,  # torch.distributed.ProcessGroup
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
    *,
    weight: Tensor,  # (V/TP, D), this rank's rows
    temperature: float = 1.0,
    sum_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Computes log-probs and entropy of a response's tokens, as slime's `calculate_log_probs_and_entropy`.

    slime divides logits by rollout_temperature before that call; here it is `temperature`. chunk_size: tokens of a
    tile, if above 0. Without with_entropy_grad the entropy is detached. log_prob_keep_mask, the tokens (R, V/TP) that a
    rollout's top_p has left, must be None.
    sum_hidden_grad: as in `VocabShard.agree`: False under sequence parallelism, whose reduce-scatter sums the gradient.

    Returns log-probs (R, 1), and the entropy (R,) or None. Raises ValueError for a log_prob_keep_mask, and as
    `token_stats`.
    """
    if log_prob_keep_mask is not None:
        raise ValueError(
            "log_prob_keep_mask leaves tokens out of the softmax, which is over the whole vocabulary here: sample with "
            "top_p=1, or leave the replay to slime's own function"
        )
    shard = _shard(weight.shape[0], tp_group, sum_hidden_grad=sum_hidden_grad)
    options = {"temperature": temperature, "vocab_shard": shard, "chunk_tokens": chunk_size if chunk_size > 0 else None}
    found = token_stats(hidden, weight, tokens, outputs=("entropy",) if with_entropy else (), **options)
    entropy = found.entropy
    if entropy is not None and not with_entropy_grad:
        entropy = entropy.detach()
    return found.logp.unsqueeze(-1), entropy


def nemo_rl_logprobs(
    hidden: Tensor,  # (B, S, D)
    target: Tensor,  # (B, S) the rows' own tokens, not shifted
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any = None,  # torch.distributed.ProcessGroup
    inference_only: bool = False,
    cp_group: Any = None,  # torch.distributed.ProcessGroup
    chunk_size: int | None = None,
    sampling_params: Any = None,  # NeMo-RL's TrainingSamplingParams
    *,
    weight: Tensor,  # (V/TP, D), this rank's rows
    temperature: float = 1.0,
    sum_hidden_grad: bool = True,
) -> Tensor:
    """Computes the log-prob of each row's next tokens, as NeMo-RL's `from_parallel_logits_to_logprobs`.

    The token at t + 1 is scored by the hidden state at t. weight has the rows vocab_start_index … vocab_end_index − 1
    of the vocabulary. inference_only: without gradient. chunk_size: positions of a tile, of all B rows. cp_group may
    have one rank: rows that are cut over ranks go to `token_logps` with targets of `shift_labels(row_shard=)`.
    sum_hidden_grad: as in `VocabShard.agree`. sampling_params may be given without top_k and top_p; its temperature is
    not read, since NeMo-RL divides the logits by it before the call: here it is `temperature`.

    Returns (B, S − 1). Raises ValueError for indices that do not fit the weight or the group, for a cp_group of several
    ranks, for sampling_params with top_k or top_p, and as `token_logps`.
    """
    if vocab_end_index - vocab_start_index != weight.shape[0]:
        raise ValueError(
            f"weight has {weight.shape[0]} rows, and the indices {vocab_start_index}:{vocab_end_index} name "
            f"{vocab_end_index - vocab_start_index}: pass this rank's rows of the head"
        )
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        raise ValueError(
            f"cp_group has {dist.get_world_size(cp_group)} ranks: for rows that are cut over them, call token_logps "
            "with targets of shift_labels(labels, row_shard=RowShard(cp_group))"
        )
    top_k, top_p = getattr(sampling_params, "top_k", None), getattr(sampling_params, "top_p", None)
    if (top_k is not None and top_k > 0) or top_p not in (None, 1):
        raise ValueError(
            f"sampling_params has top_k={top_k} and top_p={top_p}, and the softmax is over the whole vocabulary here: "
            "sample without them, or leave these log-probs to NeMo-RL's own function"
        )
    shard = _shard(weight.shape[0], tp_group, vocab_start_index, sum_hidden_grad=sum_hidden_grad)
    if shard is None and vocab_start_index:
        raise ValueError(
            f"the rows {vocab_start_index}:{vocab_end_index} are a part of a vocabulary, and tp_group has no other "
            "rank for the rest: pass the group, or the whole weight from vocab_start_index=0"
        )
    chunk = None if chunk_size is None else chunk_size * max(target.shape[0], 1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        options = {"temperature": temperature, "vocab_shard": shard, "chunk_tokens": chunk}
        return token_logps(hidden[:, :-1], weight, target[:, 1:], **options)


def nemo_rl_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,  # (S/TP, B, D), this rank's part of the sequence
    output_weight_layer: Tensor,  # (V/TP, D), this rank's rows
    runtime_gather_output: bool | None,
    target: Tensor,  # (B, S) the rows' own tokens, not shifted
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any = None,  # torch.distributed.ProcessGroup
    inference_only: bool = False,
    cp_group: Any = None,  # torch.distributed.ProcessGroup
    chunk_size: int | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Computes what NeMo-RL's `from_parallel_hidden_states_to_logprobs` does, by name and position: `nemo_rl_logprobs`.

    Hidden states are gathered over tp_group along the sequence, and their gradient is summed over its ranks and cut
    again. runtime_gather_output must not be True: logits, which it asks for, are not computed.

    Returns (B, S − 1) on every rank. Raises as `nemo_rl_logprobs`.
    """
    if runtime_gather_output:
        raise ValueError("runtime_gather_output=True asks for whole logits, which are not computed: pass None")
    hidden: Any = tensor_parallel_hidden_states
    if tp_group is not None and dist.get_world_size(tp_group) > 1:
        hidden = _Gathered.apply(hidden, tp_group)
    return nemo_rl_logprobs(
        hidden.transpose(0, 1),
        target,
        vocab_start_index,
        vocab_end_index,
        tp_group,
        inference_only,
        cp_group,
        chunk_size,
        weight=output_weight_layer,
        temperature=temperature,
        sum_hidden_grad=False,
    )


def _shard(rows: int, group: Any, start: int | None = None, *, sum_hidden_grad: bool = True) -> VocabShard | None:
    """Returns this rank's shard of the vocabulary; None for a group of one rank."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    return agreed_shard(rows, group, start, sum_hidden_grad)


class _Gathered(torch.autograd.Function):
    """The parts (S/G, …) of all ranks as one (S, …); a part's gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = x.new_empty((dist.get_world_size(group), *x.shape))
        dist.all_gather(list(found.unbind(0)), x.contiguous(), group=group)
        return found.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None
