"""Log-probs and statistics of the next token, straight from hidden states and the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import TokenStats
from . import dense
from .autograd import token_stats as _token_stats_op
from .gather import gather_logps
from .gemms import release_tiles
from .plan import Plan, Tiling, check_backend, choice, fit
from .row_operations import copies
from .rows import packed_rows, shift_labels, sum_rows
from .sharded import refuse_sharded, whole
from .spec import (
    DIFFERENTIABLE,
    OUTPUTS,
    Scaling,
    accumulation_dtype,
    cast_for_autocast,
    check_operands,
    static_shapes,
    to_device,
)
from .vocab_parallel import VocabShard

__all__ = [
    "Plan",
    "VocabShard",
    "gather_logps",
    "head_plan",
    "release_tiles",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_stats",
]


def token_stats(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (…) integer, aligned: targets[i] is the token that hidden[i] predicts; may be on the host
    *,
    outputs: Sequence[str] = (),
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    ref_hidden: Tensor | None = None,  # (…, Dr)
    ref_weight: Tensor | None = None,  # (V, Dr); if not given the policy's; needed with adapter
    ref_bias: Tensor | None = None,  # (V,); the policy's bias if neither it nor ref_weight is given
    adapter: Tensor | None = None,  # (V, r)
    weight_grad: Tensor | None = None,  # (V, D) float32
    vocab_shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
    tile_bytes: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Statistics of softmax(z), z = softcap(logit_scale · (hidden Wᵀ + bias)) / temperature, without the logits.

    In torch, for every position whose target is not `ignore_index`:

        z = logit_scale * (hidden.float() @ weight.float().T + bias)
        z = softcap * tanh(z / softcap) if softcap else z
        logprobs = (z / temperature).log_softmax(-1)
        logp = logprobs.gather(-1, targets[..., None])[..., 0]

    softcap(x) = c·tanh(x/c). `outputs` names further statistics: see TokenStats; "kl" and "reverse_kl" need
    `ref_hidden`, which goes through the same scaling. logp, lse, entropy, kl and reverse_kl are differentiable in
    hidden, weight and bias, the first two at 2F with a frozen head; asking for one of the others, with gradient,
    costs a recomputation (3F frozen, 4F trainable). There is no second derivative.

    adapter: the B of LoRA. hidden is then [h, x] (…, D + r), x = s·dropout(h) Aᵀ (…, r), which autograd made, and the
    products are h Wᵀ + x Bᵀ: r/D more of each pass, and no matrix (V, D) is made of them. adapter may be wider than
    weight (float32 beside bfloat16). With a frozen weight and a trainable adapter: 3F, and no dW. `Head` has all of it.
    ref_hidden then needs ref_weight, and ref_bias: weight and bias may be the adapter's in part, as DoRA's and those of
    lora_bias are.

    weight_grad: a buffer such as Megatron's `main_grad`, or weight.grad if it is float32 (float64 for float64 operands):
    the backward adds dW to it and autograd gives weight none, which saves memory for dW and a pass over it.

    With targets on the host nothing waits for a device; with targets on it, a call waits once. While a CUDA graph is
    captured all positions are multiplied, ignored ones as zeros.

    A weight or bias that is a DTensor (FSDP2) is gathered once, and its gradient is the mean over the ranks of its mesh, as
    FSDP2 makes it; of one that ZeRO-3 has in parts, gathered once too, it is reduced by ZeRO-3: see `whole`.
    vocab_shard: weight, bias, ref_weight, ref_bias and weight_grad have the rows that this rank of a group holds, and the
    statistics are of the whole vocabulary: see `VocabShard.agree`. Every rank must make the same calls, with the same
    hidden states, targets and options; their number of passes is as above. By the torch backend.

    Nothing at an ignored position is read: its hidden state may be NaN. A NaN hidden state at a scored position
    makes its own statistics NaN. Under autocast, hidden, weight and bias are cast as `F.linear` casts them.

    chunk_tokens: tokens a tile, if you want to say; else as many as are useful within tile_bytes: 7% of a GPU's
    memory, or 256 MiB on CPU, where the tile is kept for the next call: `release_tiles()` gives it back.
    Returns TokenStats shaped like targets. Raises ValueError for shapes, dtypes or devices that do not fit, an unknown
    output or backend, and (on CPU) a target outside the vocabulary.
    """
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = cast_for_autocast(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias
    )
    refuse_sharded(hidden=hidden, targets=targets, ref_hidden=ref_hidden, weight_grad=weight_grad)
    check_reference_head(adapter, ref_hidden, ref_weight)
    weight, bias, ref_weight, ref_bias, adapter = whole(
        weight_grad=weight_grad,
        weight=weight,
        bias=bias,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        adapter=adapter,
    )
    if vocab_shard is not None:
        weight, bias, ref_weight, ref_bias, weight_grad, adapter = vocab_shard.tokens(
            weight=weight,
            bias=bias,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            weight_grad=weight_grad,
            adapter=adapter,
        )
        hidden = vocab_shard.replicated(hidden)
    check_operands(hidden, weight, targets, bias, adapter)
    scaling = Scaling(float(temperature), softcap, float(logit_scale))
    outputs = tuple(dict.fromkeys(outputs))
    if ref_hidden is not None and ref_weight is None:
        ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
    _check_outputs(outputs, ref_hidden, ref_weight, ref_bias, weight, targets)

    flat = hidden.reshape(-1, hidden.shape[-1])
    flat_targets = targets.reshape(-1).long()
    ref = None
    if ref_hidden is not None and ref_weight is not None and {"kl", "reverse_kl"} & set(outputs):
        ref = (
            ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
            ref_weight.detach(),
            _detached(ref_bias),
        )
    plan = head_plan(
        hidden,
        weight,
        bias=bias,
        outputs=outputs,
        adapter=adapter,
        softcap=softcap,
        weight_grad=weight_grad,
        vocab_shard=vocab_shard,
        chunk_tokens=chunk_tokens,
        tile_bytes=tile_bytes,
        backend=backend,
    )
    if plan.backend == "dense":
        if static_shapes(flat_targets):
            raise ValueError("the dense backend cannot be captured as a CUDA graph: pass backend='torch'")
        flat_targets = to_device(flat_targets, hidden.device)
        found = dense.token_stats(flat, weight, bias, flat_targets, ref, scaling, ignore_index, outputs, adapter)
    else:
        found = _tiled(
            flat,
            weight,
            bias,
            flat_targets,
            ref,
            scaling,
            ignore_index,
            outputs,
            weight_grad,
            plan.tiling,
            plan.backend,
            adapter,
        )
    return TokenStats(**{name: x.view(targets.shape) for name, x in found.items()})


def token_logps(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (…) integer, aligned
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    adapter: Tensor | None = None,  # (V, r)
    weight_grad: Tensor | None = None,  # (V, D) float32
    vocab_shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
    tile_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log p(target), float32, shaped like targets, 0 where ignored: `token_stats(...).logp`.

    1F without gradient, 2F with a frozen head, 4F with a trainable one (the objective: 3F), F = 2·N·V·D FLOP.
    """
    return token_stats(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        adapter=adapter,
        weight_grad=weight_grad,
        vocab_shard=vocab_shard,
        chunk_tokens=chunk_tokens,
        tile_bytes=tile_bytes,
        backend=backend,
    ).logp


def sequence_logps(
    hidden: Tensor,  # (B, T, D), or (N, D) packed
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (B, T), or (N,) packed
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) offsets of the packed rows, from 0 to N
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The log-prob of every row, summed over its scored tokens in nats, and their number: ((B,) float32, (B,) int64).

    `options` are those of `token_logps`.
    """
    logp = token_logps(hidden, weight, targets, ignore_index=ignore_index, **options)
    rows, count = packed_rows(targets, cu_seqlens, hidden.device)
    scored = to_device((targets != ignore_index).reshape(-1), hidden.device)
    return sum_rows(logp.reshape(-1), rows, count), sum_rows(scored.long(), rows, count)


def head_plan(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    outputs: Sequence[str] = (),
    adapter: Tensor | None = None,
    softcap: float | None = None,
    weight_grad: Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
    tile_bytes: int | None = None,
    backend: str = "auto",
    unit_tokens: int = 0,
) -> Plan:
    """How `token_stats` will run on these operands, gradient mode included.

    weight: without the rows of padding, where there is a vocab_shard; the tiles are then the same on all of its ranks.
    unit_tokens: the scored tokens of the longest unit, where a tile should hold whole units.
    """
    chosen, reason = choice(backend, hidden.device, weight.dtype, sharded=vocab_shard is not None)
    check_backend(chosen, hidden.device)
    vocab, name = weight.shape[0], chosen
    if vocab_shard is not None:
        vocab, name = vocab_shard.largest, vocab_shard.operator_name(chosen)
        tile_bytes = vocab_shard.tile_bytes(hidden.device) if tile_bytes is None else tile_bytes
    if weight_grad is not None:
        _check_weight_grad(weight_grad, weight, chosen)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"expected chunk_tokens of at least 1, got {chunk_tokens}")
    trainable = any(x is not None and x.requires_grad for x in (weight, bias, adapter))
    has_ref = bool({"kl", "reverse_kl"} & set(outputs))
    more = sorted(set(outputs) & set(DIFFERENTIABLE))
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trainable):
        passes, why = 1, "no gradient is wanted"
    elif chosen == "dense":
        passes, why = 3 if trainable else 2, "every logit is kept"
    elif trainable:
        passes = 2 + int(hidden.requires_grad) + int(weight.requires_grad)
        why = "the head is trainable, so the backward makes each tile again"
    elif more:
        passes, why = 3, f"the gradient of {', '.join(more)} makes each tile again"
    else:
        passes, why = 2, "the head is frozen, so the gradient is made while the tile is live"
    if has_ref:
        passes += 1 if passes == 1 or chosen == "dense" else 2
        why += "; the reference's tile beside it"
    if vocab_shard is not None:
        why += vocab_shard.why
    if reason:
        why += f"; {reason}"
    dtype = accumulation_dtype(weight.dtype)
    learns = torch.is_grad_enabled() and weight.requires_grad and weight_grad is None
    tiling, dz_dtype, logits = fit(
        chosen,
        vocab,
        weight.dtype,
        weight.device,
        tile_bytes,
        chunk_tokens=chunk_tokens,
        heads=1 + has_ref,
        dz=torch.is_grad_enabled() and (hidden.requires_grad or trainable),
        copies=copies(outputs, softcap is not None) + (0 if vocab_shard is None else 2 + 2 * has_ref),
        learns=learns,
        unit_tokens=unit_tokens,
    )
    several = hidden.shape[:-1].numel() > tiling.tile
    accumulator = vocab * weight.shape[1] * (dtype.itemsize - weight.itemsize) if learns and several else 0
    return Plan(name, None, tiling, vocab, dtype, dz_dtype, logits, passes, why, accumulator, reason)


def _tiled(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref: tuple[Tensor, Tensor, Tensor | None] | None,
    scaling: Scaling,
    ignore_index: int,
    outputs: tuple[str, ...],
    weight_grad: Tensor | None,
    tiling: Tiling,
    backend: str,
    adapter: Tensor | None,
) -> dict[str, Tensor]:
    trainable = any(x is not None and x.requires_grad for x in (weight, bias, adapter))
    save_grad = (
        torch.is_grad_enabled() and hidden.requires_grad and not trainable and not set(outputs) & set(DIFFERENTIABLE)
    )
    logp, lse, extra, _ = _token_stats_op(
        hidden,
        weight,
        bias,
        targets,
        *(ref or (None, None, None)),
        weight_grad,
        scaling.temperature,
        scaling.softcap or 0.0,
        scaling.logit_scale,
        ignore_index,
        *tiling,
        backend,
        ",".join(outputs),
        save_grad,
        adapter,
    )
    found = {"logp": logp, "lse": lse}
    for name, x in zip(outputs, extra.unbind(0), strict=True):
        found[name] = x if name in DIFFERENTIABLE else x.detach()
        if name == "top1":
            found[name] = found[name] > 0
    return found


def _check_outputs(
    outputs: tuple[str, ...],
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    weight: Tensor,
    targets: Tensor,
) -> None:
    unknown = [n for n in outputs if n not in OUTPUTS]
    if unknown:
        raise ValueError(
            f"no statistic named {', '.join(unknown)}; there are {', '.join(OUTPUTS)}, beside logp and lse"
        )
    divergences = [n for n in outputs if n in ("kl", "reverse_kl")]
    if divergences and (ref_hidden is None or ref_weight is None):
        raise ValueError(f"{' and '.join(divergences)} need the reference's hidden states: pass ref_hidden=")
    if ref_hidden is not None and ref_weight is not None:
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"the reference must have the policy's vocabulary of {weight.shape[0]}, got {ref_weight.shape[0]}"
            )
        try:
            check_operands(ref_hidden, ref_weight, targets, ref_bias)
        except ValueError as error:
            raise ValueError(f"of the reference: {error}") from None


def check_reference_head(adapter: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None) -> None:
    """ValueError for a reference that would take the head of a policy whose weight and bias may be its adapter's in part."""
    if adapter is not None and ref_hidden is not None and ref_weight is None:
        raise ValueError(
            "with an adapter the policy's weight and bias need not be the reference's (DoRA scales the rows of the one, "
            "lora_bias adds to the other): pass ref_weight=, and ref_bias= if it has one, with ref_hidden="
        )


def _check_weight_grad(weight_grad: Tensor, weight: Tensor, backend: str) -> None:
    dtype = accumulation_dtype(weight.dtype)
    if weight_grad.shape != weight.shape or weight_grad.dtype != dtype or weight_grad.device != weight.device:
        raise ValueError(
            f"weight_grad must be {dtype} {tuple(weight.shape)} on {weight.device}, got {weight_grad.dtype} "
            f"{tuple(weight_grad.shape)} on {weight_grad.device}"
        )
    if weight_grad.requires_grad or not weight_grad.is_contiguous():
        raise ValueError("weight_grad must be contiguous and require no gradient: pass a buffer, or weight.grad")
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("weight_grad was given, and weight requires no gradient: leave it out for a frozen head")
    if backend == "dense":
        raise ValueError("the dense backend has no use for weight_grad: pass backend='torch'")


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
