"""Log-probs and statistics of the next token, straight from hidden states and the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..types import TokenStats
from . import dense
from .autograd import token_stats as token_stats_operator
from .operands import HeadLike, Operands, reference, take_operands
from .plan import DEFAULTS, Plan, PlanOptions, plan_of
from .row_parallel import RowShard
from .rows import packed_rows, sum_rows
from .spec import OUTPUTS, Jsd, Scaling, compares, differentiable, jsd_of, static_shapes, statistic, to_device
from .vocab_parallel import VocabShard


def token_stats(
    hidden: Tensor,  # (…, D)
    weight: Tensor | HeadLike,  # (V, D), or a Head
    targets: Tensor,  # (…) integer, aligned: targets[i] is the token that hidden[i] predicts; may be on the host
    *,
    outputs: Sequence[str] = (),
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    ref_hidden: Tensor | None = None,  # (…, Dr)
    ref_weight: Tensor | HeadLike | None = None,  # (V, Dr), or a Head; if not given the policy's; needed with adapter
    ref_bias: Tensor | None = None,  # (V,); the policy's bias if neither it nor ref_weight is given
    jsd: Jsd | None = None,
    adapter: Tensor | None = None,  # (V, r)
    weight_grad: Tensor | None = None,  # (V, D) float32
    vocab_shard: VocabShard | None = None,
    selected_ids: Tensor | None = None,  # (K,), or (…, K), integer; may be on the host
    chunk_tokens: int | None = None,
    tile_bytes: int | None = None,
    backend: str = "auto",
    invariant: bool = False,
) -> TokenStats:
    """Computes statistics of softmax(z), z = softcap(logit_scale · (hidden Wᵀ + bias)) / temperature, without logits.

    In torch, for every position whose target is not `ignore_index`:

        z = logit_scale * (hidden.float() @ weight.float().T + bias)
        z = softcap * tanh(z / softcap) if softcap else z
        logprobs = (z / temperature).log_softmax(-1)
        logp = logprobs.gather(-1, targets[..., None])[..., 0]

    softcap(x) = c·tanh(x/c). `outputs` names further statistics, see TokenStats; "kl", "reverse_kl" and
    "jsd" need `ref_hidden`, to which the same scaling applies. logp, lse, entropy and these three are differentiable in
    hidden, weight and bias, once. With a frozen head logp and lse cost 2F; one of the others, with gradient, costs a
    recomputation (3F frozen, 4F trainable).

    jsd: the settings of the output "jsd", by default Jsd(beta=0.5, temperature=1.0). With p and q the softmax of z and
    of the reference's logits, each divided by its temperature, and m = β q + (1−β) p, it is β KL(q‖m) + (1−β) KL(p‖m)
    (GKD, arXiv 2306.13649); with β = 0 KL(q‖p), with β = 1 KL(p‖q). It is computed by torch.

    adapter: the B of LoRA. hidden is then [h, x] (…, D + r), x = s·dropout(h) Aᵀ (…, r), computed by the caller under
    autograd, and the products are h Wᵀ + x Bᵀ: each pass costs r/D more, and no merged matrix (V, D) is computed.
    adapter may have a wider dtype than weight (float32 beside bfloat16). With a frozen weight and a trainable adapter:
    3F, and no dW. A `Head` contains all of it. ref_hidden then needs ref_weight (and ref_bias), since weight and bias
    may contain parts of the adapter, as with DoRA and lora_bias.

    weight_grad: a buffer such as Megatron's `main_grad`, or weight.grad if it is float32 (float64 for float64
    operands). The backward adds dW to it, and autograd gives weight no gradient: this saves memory for dW and a pass
    over it.

    With targets on the host, the host does not wait for a device; with targets on the device, a call waits once. While
    a CUDA graph is captured, all positions are multiplied, ignored ones as zeros.

    A weight or bias that is a DTensor (FSDP2) is gathered once, and its gradient is the mean over the ranks of its
    mesh, as in FSDP2. A parameter that ZeRO-3 keeps in parts is gathered once, too, and ZeRO-3 reduces its gradient:
    see `head.sharded.gathered`.
    vocab_shard: weight, bias, ref_weight, ref_bias and weight_grad are the rows that this rank of a group holds, and
    the statistics are those of the whole vocabulary: see `VocabShard.agree`. Every rank must make the same calls, with
    the same hidden states, targets and options. The number of passes is as above; the backend is torch.

    Nothing at an ignored position is read: its hidden state may be NaN. A NaN hidden state at a scored position makes
    only its own statistics NaN. Under autocast, hidden, weight and bias are cast as `F.linear` casts them.

    selected_ids: `TokenStats.selected_logp` (…, K) has the log-probs of these K ids at every position, or of K ids per
    position, read from the same tiles: a teacher's top k, the answers of a multiple choice. An id may come twice.
    ∂L/∂z gets Σ_k u_k (e_id − p), u = ∂L/∂selected_logp; with gradient they cost a recomputation, as the entropy does,
    also where they are not used in the loss. On every backend torch reads them, and log-probs without gradient, which
    a kernel can compute without a tile, then take tiles too. With a vocab_shard ids are of the whole vocabulary, and
    ranks exchange K numbers per token once a call.

    chunk_tokens: tokens per tile; by default as many as are useful within tile_bytes. tile_bytes: by default 7% of a
    GPU's memory, or 256 MiB on CPU, where the tile is kept for the next call; `release_tiles()` frees it.

    invariant: a position's statistics, and its row of ∂L/∂hidden for the same upstream gradient, have the same bits
    whatever else is in the call: the other rows, their number and order, padding or packing, the tile, and the rank. By
    default they differ in the last places, since libraries multiply one row and many in different orders (Thinking
    Machines, "Defeating Nondeterminism in LLM Inference", 2025). Here every product is of one shape, 128 tokens on a
    CPU and 256 on a GPU, the last filled up with zeros; a tile is no smaller, and the backend is torch. The first call
    of a shape checks that a product treats all its rows alike. The promise holds among processes on equal machines with
    the same build of torch; that a CPU's number of threads makes no difference is measured, not promised. It says
    nothing of dW, a sum over the rows, nor of what computed the hidden states. It has not run on a GPU.

    Returns TokenStats shaped like targets. Raises ValueError for shapes, dtypes or devices that do not fit, an unknown
    output or backend, (on CPU) a target or selected id outside the vocabulary, and invariant=True with another backend
    than torch or with a vocab_shard; RuntimeError if the products of this machine do depend on the place of a row.
    """
    operands = Operands(
        hidden,
        weight,
        targets,
        bias,
        adapter,
        reference(ref_hidden, ref_weight, ref_bias),
        weight_grad,
        vocab_shard,
        Scaling(float(temperature), softcap, float(logit_scale)),
        ignore_index,
        selected_ids,
    )
    if jsd is not None and "jsd" not in outputs:
        raise ValueError('jsd= is about the output "jsd", which is not asked for: add it to outputs=, or leave jsd out')
    outputs = [(jsd or Jsd()).output() if name == "jsd" else name for name in outputs]
    return statistics(operands.admit(), outputs, PlanOptions(backend, tile_bytes, chunk_tokens, invariant))


def statistics(operands: Operands, outputs: Sequence[str] = (), options: PlanOptions = DEFAULTS) -> TokenStats:
    """Computes `token_stats` of admitted operands."""
    outputs = tuple(dict.fromkeys(outputs))
    _check_outputs(outputs, operands)
    if not compares(outputs):
        operands = replace(operands, ref=None)
    plan = plan_of(operands, outputs, options)
    found = (_dense if plan.keeps_logits else _tiled)(operands.flat(), outputs, plan)
    shape = operands.targets.shape
    return TokenStats(**{statistic(name): x.view((*shape, *x.shape[1:])) for name, x in found.items()})


def token_logps(
    hidden: Tensor,  # (…, D)
    weight: Tensor | HeadLike,  # (V, D), or a Head
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
    invariant: bool = False,
) -> Tensor:
    """Computes log p(target), float32, shaped like targets, 0 where ignored: `token_stats(...).logp`.

    Costs 1F without gradient, 2F with a frozen head, 4F with a trainable one (`Objective`: 3F), F = 2·N·V·D FLOP.
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
        invariant=invariant,
    ).logp


def sequence_logps(
    hidden: Tensor,  # (B, T, D), or (N, D) packed
    weight: Tensor | HeadLike,  # (V, D), or a Head
    targets: Tensor,  # (B, T), or (N,) packed
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,) offsets of the packed rows, from 0 to N
    ignore_index: int = -100,
    row_shard: RowShard | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Computes the log-prob of every row in nats, summed over its scored tokens, and counts those tokens.

    Returns ((B,) float32, (B,) int64). options: those of `token_logps`. row_shard: hidden and targets are this rank's
    chunk of every row, and cu_seqlens is of whole ones, as in `Objective`; the sums are of whole rows, on every rank,
    and a gradient is that of this rank's chunk, where all ranks compute the same from the sums. With invariant=True the
    sums are the same bits in any order, too.
    """
    exact = bool(options.get("invariant", False))
    logp = token_logps(hidden, weight, targets, ignore_index=ignore_index, **options)
    scored = to_device(targets != ignore_index, hidden.device)
    if row_shard is not None:
        parts = row_shard.parts(targets.shape[-1], hidden.device)
        logp, kept = parts.whole(torch.stack([logp, scored.to(logp.dtype)])).unbind(0)
        targets = scored = kept > 0
    rows, count = packed_rows(targets, cu_seqlens, hidden.device)
    scored = scored.reshape(-1)
    return sum_rows(logp.reshape(-1), rows, count, exact=exact), sum_rows(scored.long(), rows, count)


def head_plan(
    hidden: Tensor, weight: Tensor, *, outputs: Sequence[str] = (), unit_tokens: int = 0, **options: Any
) -> Plan:
    """Returns the plan of `token_stats` on these operands in the current gradient mode.

    weight: with a vocab_shard, without the rows of padding; the tiles are then the same on all ranks of its group.
    unit_tokens: the scored tokens of the longest unit, if a tile should hold whole units. options: see `token_stats`.
    Raises TypeError for an option that `token_stats` does not have.
    """
    plan_options = PlanOptions(**{name: options.pop(name) for name in PlanOptions._fields if name in options})
    positions = hidden.new_empty(hidden.shape[:-1], dtype=torch.long)
    selected = options.pop("selected_ids", None)
    operands = replace(take_operands(hidden, weight, positions, options), selected=selected)
    if options:
        raise TypeError(f"head_plan() got an unexpected keyword argument {next(iter(options))!r}")
    return plan_of(operands, outputs, plan_options, unit_tokens)


def _dense(operands: Operands, outputs: tuple[str, ...], plan: Plan) -> dict[str, Tensor]:
    """Returns the statistics by name, from materialised logits."""
    if static_shapes(operands.targets):
        raise ValueError("the dense backend cannot be captured as a CUDA graph: pass backend='torch'")
    return dense.token_stats(operands, outputs)


def _tiled(operands: Operands, outputs: tuple[str, ...], plan: Plan) -> dict[str, Tensor]:
    """Returns the statistics by name, tile by tile."""
    selected = operands.selected
    saves_grad = (
        torch.is_grad_enabled()
        and operands.hidden.requires_grad
        and not operands.trainable
        and selected is None
        and not differentiable(outputs)
    )
    logp, lse, extra, _ = token_stats_operator(
        *operands.packed(), list(plan.tiling), plan.backend, ",".join(outputs), saves_grad, selected
    )
    found = {"logp": logp, "lse": lse}
    if selected is not None:
        found["selected_logp"] = extra[len(outputs) :].T.contiguous()
    for name, x in zip(outputs, extra[: len(outputs)].unbind(0), strict=True):
        found[name] = x if differentiable([name]) else x.detach()
        if name == "top1":
            found[name] = found[name] > 0
    return found


def _check_outputs(outputs: tuple[str, ...], operands: Operands) -> None:
    """Raises ValueError for an unknown statistic, and for one that needs a reference if there is none."""
    unknown = [n for n in outputs if statistic(n) not in OUTPUTS]
    if unknown:
        raise ValueError(
            f"no statistic named {', '.join(unknown)}; there are {', '.join(OUTPUTS)}, beside logp and lse"
        )
    divergences = [statistic(n) for n in outputs if compares([n])]
    if len(set(divergences)) < len(divergences):
        raise ValueError(f"one call computes one jsd, got {', '.join(n for n in outputs if jsd_of(n))}: call twice")
    if "jsd" in divergences and operands.shard is not None:
        raise ValueError("jsd is not computed over a vocabulary that is cut over ranks: gather the head")
    if divergences and operands.ref is None:
        raise ValueError(f"{' and '.join(divergences)} need the reference's hidden states: pass ref_hidden=")
