"""The plan of a pass over the head: backend, tiles and number of passes, decided before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import check_backend, get_backend
from .choice import choice
from .operands import Operands
from .row_operations import copies
from .spec import accumulation_dtype, compares, differentiable, has_mixed_gemms, jsd_of
from .tiling import INVARIANT_TOKENS, STEP_BYTES, Tiling, buffer_rows, lanes_of, scratch_bytes, whole_blocks

# Tokens of a tile beyond which the GEMMs get no faster. A float32 dW, read and written once per tile, gains from more.
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Plan:
    """How a head pass will run. `passes` counts GEMMs of F = 2·N·V·D FLOP each, N the scored tokens."""

    backend: str
    tokens: int | None  # scored tokens; None if not counted
    tiling: Tiling
    vocab: int
    dtype: torch.dtype  # of logits
    dz_dtype: torch.dtype | None  # of ∂L/∂(product); None if it is not computed, or overwrites the logits
    logits: int  # tensors of a step's logits in memory at once, copies and the reference's included
    passes: float
    why: str
    accumulator_bytes: int = 0  # of a float32 dW beyond the gradient's own bytes, if it is summed over several tiles
    reason: str = ""  # why `auto` chose the backend; `why` contains it

    @property
    def keeps_logits(self) -> bool:
        """Returns whether the backend materialises all logits, without tiles."""
        return get_backend(self.backend).rows is None

    @property
    def tile_tokens(self) -> int:
        """Returns the tokens per tile."""
        return self.tiling.tile

    @property
    def tile_bytes(self) -> int:
        """Returns the bytes of a tile of ∂L/∂(product) and of the logits beside it."""
        sizes = (n if self.tokens is None else buffer_rows(self.tokens, n) for n in self.tiling[:2])
        tile, step = map(self.tiling.padded, sizes)
        dz = 0 if self.dz_dtype is None else tile * self.dz_dtype.itemsize
        return self.vocab * (dz + self.logits * step * self.dtype.itemsize)

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f", {self.tokens} scored tokens"
        name = str(self.dtype).removeprefix("torch.")
        memory = f"{self.tile_tokens} tokens x {self.vocab} {name} logits"
        if self.tiling.step != self.tiling.tile or self.dz_dtype is not None:
            memory = f"{self.tile_tokens} tokens x {self.vocab}, {self.tiling.step} of them as {name} logits at once"
        if self.tiling.lanes > 1:
            memory += " on each of two streams"
        more = ""
        if self.accumulator_bytes:
            more = f"; {self.accumulator_bytes / 2**20:.1f} MiB beside the gradient of the head, summed in float32"
        return (
            f"{self.backend} backend, {self.passes:g}F: {self.why}{tokens}; tiles of at most {memory} "
            f"({self.tile_bytes / 2**20:.1f} MiB){more}"
        )


class PlanOptions(NamedTuple):
    """The caller's settings of how a call runs; `plan_of` decides the rest."""

    backend: str = "auto"
    tile_bytes: int | None = None  # budget of scratch memory
    chunk_tokens: int | None = None  # tokens per tile
    invariant: bool = False  # whether a row's bits must not depend on the others


DEFAULTS = PlanOptions()


def plan_of(
    operands: Operands, outputs: Sequence[str] = (), options: PlanOptions = DEFAULTS, unit_tokens: int = 0
) -> Plan:
    """Returns the plan of computing the statistics of admitted operands in the current gradient mode.

    unit_tokens: the scored tokens of the longest unit, if a tile should hold whole units.
    """
    hidden, weight, shard = operands.hidden, operands.weight, operands.shard
    backend, tile_bytes, chunk_tokens, invariant = options
    if invariant:
        backend = invariant_backend(backend, sharded=shard is not None)
    chosen, reason = choice(backend, hidden.device, weight.dtype, sharded=shard is not None)
    if get_backend(chosen).kernels and any(map(jsd_of, outputs)):
        if backend != "auto":
            raise ValueError(f"jsd has no kernel of the {chosen} backend: pass backend='torch', or leave it out")
        chosen, reason = "torch", "jsd has no kernel"
    check_backend(chosen, hidden.device)
    vocab, keeps_logits = weight.shape[0], get_backend(chosen).rows is None
    if shard is not None:
        if chosen != "torch":
            raise ValueError(
                f"a vocabulary that is cut over ranks takes the torch backend, got {chosen!r}: leave it out"
            )
        vocab = shard.largest
        tile_bytes = shard.tile_bytes(hidden.device) if tile_bytes is None else tile_bytes
    if operands.weight_grad is not None:
        _check_weight_grad(operands.weight_grad, weight)
        if keeps_logits:
            raise ValueError(f"the {chosen} backend has no use for weight_grad: pass backend='torch'")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"expected chunk_tokens of at least 1, got {chunk_tokens}")
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or operands.trainable)
    has_ref = compares(outputs)
    more = differentiable(outputs)
    more += ["selected_logp"] * (operands.selected is not None)
    if not wants_grad:
        passes, why = 1, "no gradient is wanted"
    elif keeps_logits:
        passes, why = 3 if operands.trainable else 2, "every logit is kept"
    elif operands.trainable:
        passes = 2 + int(hidden.requires_grad) + int(weight.requires_grad)
        why = "the head is trainable, so the backward makes each tile again"
    elif more:
        passes, why = 3, f"the gradient of {', '.join(more)} makes each tile again"
    else:
        passes, why = 2, "the head is frozen, so the gradient is made while the tile is live"
    if has_ref:
        passes += 1 if passes == 1 or keeps_logits else 2
        why += "; the reference's tile beside it"
    if operands.selected is not None and not keeps_logits:
        why += "; the selected ids are read by torch from the products of each step"
    if shard is not None:
        why += shard.why
    if reason:
        why += f"; {reason}"
    block = 0
    if invariant:
        block = INVARIANT_TOKENS["cpu" if hidden.device.type == "cpu" else "cuda"]
        why += f"; invariant=True: every product is of {block} tokens, the last of them filled up with zeros"
    dtype = accumulation_dtype(weight.dtype)
    learns = torch.is_grad_enabled() and weight.requires_grad and operands.weight_grad is None
    exchanged = 0 if shard is None else 2 + 2 * has_ref
    tiling, dz_dtype, logits = fit_tiles(
        chosen,
        vocab,
        weight.dtype,
        weight.device,
        tile_bytes,
        chunk_tokens=chunk_tokens,
        heads=1 + has_ref,
        dz=wants_grad,
        copies=copies(outputs, operands.scaling.softcap is not None) + exchanged,
        learns=learns,
        unit_tokens=unit_tokens,
    )
    tiling = tiling.in_blocks(block) if block else tiling
    several = hidden.shape[:-1].numel() > tiling.tile
    accumulator = vocab * weight.shape[1] * (dtype.itemsize - weight.itemsize) if learns and several else 0
    return Plan(chosen, None, tiling, vocab, dtype, dz_dtype, logits, passes, why, accumulator, reason)


def invariant_backend(backend: str, *, sharded: bool = False) -> str:
    """Returns the backend of invariant=True, torch. Raises ValueError for another one, and for a cut vocabulary."""
    if backend not in ("auto", "torch"):
        get_backend(backend)
        raise ValueError(f"invariant=True takes the torch backend, got {backend!r}: leave it out")
    if sharded:
        raise ValueError(
            "invariant=True needs the whole vocabulary on every rank, since the sums of its parts have other bits: "
            "leave out vocab_shard, or invariant"
        )
    return "torch"


def _check_weight_grad(weight_grad: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless dW of the weight can be added to the buffer."""
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


def fit_tiles(
    backend: str,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    tile_bytes: int | None,
    *,
    chunk_tokens: int | None = None,
    heads: int = 1,
    copies: int = 0,
    dz: bool = True,
    learns: bool = False,
    unit_tokens: int = 0,
) -> tuple[Tiling, torch.dtype | None, int]:
    """Returns the tiling, the dtype of dz's separate buffer (None without one), and `Plan.logits`.

    A tile has as many tokens as make the GEMMs faster, or as the longest unit has, but no more than the budget holds.
    heads: 2 with a reference, else 1. copies: tensors of the size of a step's logits that torch's row operations need
    beside them. dz: whether a gradient is wanted. learns: whether dW is. Raises ValueError for a budget that is not
    positive.
    """
    if tile_bytes is not None and tile_bytes <= 0:
        raise ValueError(f"expected a tile of at least one byte, got tile_bytes={tile_bytes}")
    on_device = device.type != "cpu"
    kernels = get_backend(backend).kernels and dtype != torch.float64
    enough = _ENOUGH_TOKENS["cuda" if on_device else "cpu"] * (2 if learns and on_device else 1)
    enough = max(enough, unit_tokens)
    budget = scratch_bytes(device) if tile_bytes is None else tile_bytes
    accumulated = accumulation_dtype(dtype)
    held = heads + (copies if on_device and not kernels else 0)  # tensors of a step's logits
    logit_bytes = vocab * accumulated.itemsize * held
    if not kernels and (dtype == accumulated or not has_mixed_gemms(device)):
        tile = chunk_tokens or max(1, min(budget // logit_bytes, enough))
        return Tiling(tile, tile), None, held
    # torch's row operations launch many kernels per step, so there are few, large steps.
    step_bytes = min(budget // 4, STEP_BYTES * held) if kernels else min(budget // 2, 2 * STEP_BYTES * held)
    lanes = lanes_of(device) if kernels else 1
    step = _step_tokens(step_bytes // lanes, logit_bytes)
    tile = enough  # without dz, the number of hidden states that are gathered at once
    if dz:
        rest = budget - lanes * step * logit_bytes
        tile = min(max(step, whole_blocks(rest // (vocab * dtype.itemsize))), enough)
    tile = chunk_tokens or tile
    return Tiling(tile, min(step, tile), lanes), dtype if dz else None, lanes * held


def _step_tokens(step_bytes: int, logit_bytes: int) -> int:
    """Returns the tokens of a step from its bytes and those of one token's logits."""
    return whole_blocks(max(1, step_bytes // logit_bytes))
