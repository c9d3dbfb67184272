"""Liger's fused scaled cross-entropy (liger_kernel.ops): an actor's log-probs and entropy, whole or tensor-parallel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...head.operands import Operands
from ...head.spec import Scaling
from ...head.statistics import statistics
from ...head.vocab_parallel import VocabShard, agreed_shard
from .classes import function

Outputs = Tensor | tuple[Tensor, ...]


def liger_fused_linear_scaled_cross_entropy(
    _input: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (M,) int64
    temperature: float = 1.0,
    ignore_index: int = -100,
    m_tiles_per_cluster: int = 1,
    return_entropy: bool = False,
    selected_token_ids: Tensor | None = None,  # (K,) int64
) -> Outputs:
    """Computes the negative log-likelihood of each token under softmax(z), z = _input Wᵀ / temperature.

        nll = lse(z) − z[target], entropy = −Σ p log p, selected = z[selected_token_ids] − lse(z)

    m_tiles_per_cluster shapes a kernel of Liger's; it is checked and changes nothing. Costs 1F without gradient; 2F
    with a frozen head, 3F if the entropy or selected ids are asked for; 4F with a trainable head, F = 2·M·V·H FLOP.

    Returns nll (M,); (nll, entropy (M,)) with return_entropy; each of them followed by the log-probs (M, K) with
    selected_token_ids. All are float32 (float64 for float64 operands), 0 where target is ignore_index, and
    differentiable, once. Raises TypeError for dtypes and types, ValueError for shapes, values, and (on the CPU) ids
    outside the vocabulary.
    """
    _check_positive("m_tiles_per_cluster", m_tiles_per_cluster)
    _check_operands(_input, weight, target, temperature, ignore_index, return_entropy)
    if selected_token_ids is not None:
        _check_ids(selected_token_ids)
    return _outputs(_input, weight, target, temperature, ignore_index, return_entropy, selected_token_ids)


def liger_fused_linear_scaled_cross_entropy_tp(
    input: Tensor,  # (M, H), the same on all ranks
    weight: Tensor,  # (V_local, H), this rank's rows
    target: Tensor,  # (M,) int64, ids of the whole vocabulary
    tp_group: Any,  # torch.distributed.ProcessGroup; None for all ranks
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
    selected_token_ids: Tensor | None = None,  # (K,) int64, ids of the whole vocabulary
) -> Outputs:
    """Computes `liger_fused_linear_scaled_cross_entropy` of a vocabulary whose rows are cut over the ranks of a group.

    Shards are in the order of ranks. The gradient of input is summed over the ranks, that of weight is of this rank's
    rows. tiles_per_reduce (1, 2 or 4) shapes a kernel of Liger's; it is checked and changes nothing. selected_token_ids
    is an addition to Liger's arguments. The ranks exchange their shards' sizes in the first call with a group and a
    number of rows, see `VocabShard.agree`, and a few numbers per token and tile in every call.

    Raises as the other function does, and RuntimeError without a process group.
    """
    _check_positive("tiles_per_reduce", tiles_per_reduce, (1, 2, 4))
    _check_operands(input, weight, target, temperature, ignore_index, return_entropy)
    if selected_token_ids is not None:
        _check_ids(selected_token_ids)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("tp_group: torch.distributed is not initialised: call init_process_group() first")
    shard = agreed_shard(weight.shape[0], dist.group.WORLD if tp_group is None else tp_group)
    return _outputs(input, weight, target, temperature, ignore_index, return_entropy, selected_token_ids, shard)


def _apply_tp(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: Any,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
    selected_token_ids: Tensor | None = None,
) -> Outputs:
    """Computes `liger_fused_linear_scaled_cross_entropy_tp`, whose first argument Liger's class names differently."""
    options = tp_group, temperature, ignore_index, tiles_per_reduce, return_entropy, selected_token_ids
    return liger_fused_linear_scaled_cross_entropy_tp(_input, weight, target, *options)


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
    ids: Tensor | None,
    shard: VocabShard | None = None,
) -> Outputs:
    scaling = Scaling(float(temperature))
    operands = Operands(
        hidden, weight, target, shard=shard, scaling=scaling, ignore_index=ignore_index, selected=ids
    ).admit()
    found = statistics(operands, ("entropy",) if return_entropy else ())
    outputs = [-found.logp, found.entropy, found.selected_logp]
    returned = tuple(x for x in outputs if x is not None)
    return returned[0] if len(returned) == 1 else returned


def _check_positive(name: str, value: Any, values: Sequence[int] = ()) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1 or (values and value not in values):
        raise ValueError(f"{name} must be {' or '.join(map(str, values)) or 'at least 1'}, got {value}")


def _check_operands(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: Any, ignore_index: Any, return_entropy: Any
) -> None:
    """Raises what Liger's function raises for arguments that do not fit; `Operands.admit` checks the other shapes."""
    if not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {ignore_index!r}: without ignored positions leave it out")
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool, got {return_entropy!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a real number, got {temperature!r}")
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    if hidden.dim() != 2 or target.dim() != 1:
        raise ValueError(
            f"expected input (M, H) and target (M,), got {tuple(hidden.shape)} and {tuple(target.shape)}: flatten the "
            "positions, or call xpo_fast.token_stats, which takes any shape"
        )
    if hidden.shape[1] == 0 or 0 in getattr(weight, "ds_shape", weight.shape):
        raise ValueError(f"input {tuple(hidden.shape)} and weight {tuple(weight.shape)} must not be empty")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise TypeError(f"input and weight must be of one float dtype, got {hidden.dtype} and {weight.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor) or (ids.dim() == 1 and ids.dtype != torch.int64):
        raise TypeError(f"selected_token_ids must be an int64 tensor, got {getattr(ids, 'dtype', ids)!r}")
    if ids.dim() != 1:
        raise ValueError(
            f"selected_token_ids must be (K,), got {tuple(ids.shape)}: for ids per position, call "
            "xpo_fast.token_stats(selected_ids=)"
        )


LigerFusedLinearScaledCrossEntropyFunction = function(
    "LigerFusedLinearScaledCrossEntropyFunction", liger_fused_linear_scaled_cross_entropy
)
LigerFusedLinearScaledCrossEntropyTPFunction = function("LigerFusedLinearScaledCrossEntropyTPFunction", _apply_tp)
