"""GRPO and its family: one row per sampled completion, with its advantage."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ...device import to_device
from ...head.sharded import unpartitioned
from ...head.spec import Scaling, accumulation_dtype
from ...methods import METHODS
from ...methods.math import check, check_choice, check_rows, k3, past_overflow
from ...reduce import sum_over_ranks
from .classes import Loss, function
from .units import Found, Pick, padded_rows, reference_logps, unit_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
_IGNORE = -100


def _check(
    loss_type: str,
    importance_sampling_level: str,
    max_completion_length: int | None,
    delta: float | None,
    beta: float,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
) -> None:
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    if importance_sampling_level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(f"loss_type={loss_type!r} has no importance_sampling_level='sequence': pass 'token' instead")
    if loss_type == "dr_grpo" and (max_completion_length or 0) < 1:
        raise ValueError(f"loss_type='dr_grpo' divides by max_completion_length: pass it, got {max_completion_length}")
    check(beta >= 0, "beta >= 0", beta)
    # Where they act, as in Liger's function; its module checks these three whatever the loss is.
    if loss_type not in ("cispo", "sapo", "vespo"):
        check(delta is None or delta > 0, "delta > 0", delta)
    if loss_type == "sapo":
        check(sapo_temperature_pos > 0, "sapo_temperature_pos > 0", sapo_temperature_pos)
        check(sapo_temperature_neg > 0, "sapo_temperature_neg > 0", sapo_temperature_neg)


def _check_module(
    loss_type: str,
    importance_sampling_level: str,
    max_completion_length: int | None,
    delta: float | None,
    beta: float,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
) -> None:
    check(delta is None or delta > 0, "delta > 0", delta)
    temperatures = sapo_temperature_pos, sapo_temperature_neg
    for name, temperature in zip(("sapo_temperature_pos", "sapo_temperature_neg"), temperatures, strict=True):
        check(temperature > 0, f"{name} > 0", temperature)
    _check(loss_type, importance_sampling_level, max_completion_length, delta, beta, *temperatures)


def _data(
    name: str, x: Tensor | None, dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]
) -> Tensor | None:
    """Returns an argument beside the operands, detached, in a dtype and on a device; ValueError for another shape."""
    if x is None:
        return None
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    return to_device(x.detach(), device).to(dtype)


def _divisor(
    loss_type: str, mask: Tensor, max_completion_length: int | None, items: float | Tensor | None
) -> float | Tensor:
    """Returns the divisor of each row's token losses in the sum over tokens: (B,) or ()."""
    batch, lengths = mask.shape[0], mask.sum(dim=1)
    if loss_type in ("grpo", "sapo"):
        return lengths.clamp(min=1) * batch
    if loss_type == "bnpo":
        return lengths.sum().clamp(min=1)
    if loss_type == "luspo":
        return batch
    if loss_type == "dr_grpo":
        assert max_completion_length is not None
        return batch * max_completion_length
    # The tokens of a step on all ranks, divided by the number of ranks.
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if items is None:
        step = sum_over_ranks(lengths.sum().float())
    else:
        step = torch.as_tensor(items, dtype=torch.float32).to(mask.device)
    return (step / ranks).clamp(min=1)


def liger_fused_linear_grpo(
    _input: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D), cast to the dtype of _input
    selected_token_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T) 1 at the completions' tokens, 0 elsewhere
    advantages: Tensor,  # (B,)
    bias: Tensor | None = None,  # (V,)
    ref_per_token_logps: Tensor | None = None,  # (B, T)
    old_per_token_logps: Tensor | None = None,  # (B, T)
    ref_input: Tensor | None = None,  # (B, T, Dr)
    ref_weight: Tensor | None = None,  # (V, Dr); the policy's head if not given
    ref_bias: Tensor | None = None,  # (V,)
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,  # (B,), (B, 1) or (B, T)
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: float | Tensor | None = None,
) -> Found:
    """Computes GRPO (arXiv 2402.03300) or one of its family.

    With r = exp(log π − log π_old), on-policy (r = 1 in value) without old_per_token_logps, or the geometric mean of r
    over a row (importance_sampling_level="sequence", GSPO), the loss of each token is

        −min(min(r, δ)·A, clip(r, 1 − epsilon_low, 1 + epsilon_high)·A)·s + β·k3

    s = vllm_is_ratio. k3 against the reference is multiplied by r with `use_bias_correction_kl` (DeepSeek-V3.2). For
    cispo (epsilon_high is its cap), sapo and vespo (s is part of its sequence ratio) the first term is that of
    `METHODS`.
    The losses are averaged over each row's tokens, then over the B rows (grpo, sapo); over the batch's tokens (bnpo);
    over the tokens of all ranks, or num_items_in_batch (dapo, cispo, vespo); divided by B·max_completion_length
    (dr_grpo); or summed over a row and averaged over the B rows (luspo).

    Returns loss (), (mean k3 over tokens () unless β is 0, share of clipped tokens ()).
    """
    level, by_row = importance_sampling_level, importance_sampling_level == "sequence"
    _check(loss_type, level, max_completion_length, delta, beta, sapo_temperature_pos, sapo_temperature_neg)
    weight = unpartitioned(weight)[0].to(_input.dtype)
    operands = padded_rows(_input, weight, selected_token_ids, bias, _IGNORE)
    operands = replace(operands, scaling=Scaling(float(temperature)))
    shape = batch, _ = tuple(selected_token_ids.shape)
    place = accumulation_dtype(operands.weight.dtype), operands.hidden.device
    given = _data("attention_mask", attention_mask, *place, shape)
    advantage = _data("advantages", advantages, *place, (batch,))
    assert given is not None and advantage is not None
    old = _data("old_per_token_logps", old_per_token_logps, *place, shape)
    ref = _data("ref_per_token_logps", ref_per_token_logps, *place, shape) if use_ref_model else None
    ratio = _data("vllm_is_ratio", vllm_is_ratio, *place, (batch,), (batch, 1), shape)
    per_row = ratio is not None and ratio.numel() == batch and ratio.shape != shape
    ratio = None if ratio is None else (ratio if ratio.dim() == 2 else ratio[:, None]).expand(shape)
    mask = given != 0
    binary = (~mask | (given == 1)).all(dim=1)
    check_rows(binary, "an attention_mask of 0 and 1", "weigh the advantages instead", sum=given.sum(dim=1))
    lengths, tokens = mask.sum(dim=1), mask.sum().clamp(min=1)
    operands = replace(operands, targets=torch.where(mask, operands.targets, _IGNORE))
    if use_ref_model and ref is None:
        if ref_input is None:
            raise ValueError("use_ref_model=True needs ref_per_token_logps= or ref_input=")
        if beta:
            ref = reference_logps((ref_input, ref_weight, ref_bias), operands)
    elif use_ref_model and ref_input is not None:
        message = "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps."
        warnings.warn(message, stacklevel=2)
    share = torch.ones_like(advantage) / _divisor(loss_type, mask, max_completion_length, num_items_in_batch)

    def evaluate(logp: Tensor, pick: Pick) -> Found:
        """Returns the loss, k3 (r, t) unless β is 0, and which tokens are clipped (r, t); both 0 outside the mask."""
        inside, a = pick(mask), pick(advantage)

        def tokens_of(x: Tensor | None, absent: Tensor) -> Tensor:
            return absent if x is None else torch.where(inside, pick(x), 0.0)

        old_logp = tokens_of(old, logp.detach())
        log_r = torch.where(inside, logp - old_logp, 0.0)
        if by_row:
            log_r = (log_r.sum(dim=1) / pick(lengths).clamp(min=1))[:, None].expand_as(inside)
        r, policy = past_overflow(torch.exp, log_r), {"token_logp": logp, "advantage": a, "mask": inside}
        clipped = torch.zeros_like(inside)
        if loss_type == "cispo":
            losses, _ = METHODS["cispo"](**policy, old_logp=old_logp, cap=epsilon_high)
            clipped = (a > 0)[:, None] & (r > epsilon_high)
        elif loss_type == "sapo":
            temperatures = {"tau_pos": sapo_temperature_pos, "tau_neg": sapo_temperature_neg}
            losses, _ = METHODS["sapo"](**policy, old_logp=old_logp, **temperatures)
        elif loss_type == "vespo":
            if ratio is not None:
                # log w = Σ log r + Σ log s: one s per row is spread evenly over its tokens
                log_s = pick(ratio).log().clamp(min=math.log(1e-8), max=20)
                old_logp = old_logp - (log_s / pick(lengths).clamp(min=1)[:, None] if per_row else log_s)
            gamma = {"k_pos": vespo_k_pos, "lambda_pos": vespo_lambda_pos}
            gamma |= {"k_neg": vespo_k_neg, "lambda_neg": vespo_lambda_neg}
            losses, _ = METHODS["vespo"](**policy, old_logp=old_logp, **gamma)
        else:
            low, high = 1 - epsilon_low, 1 + epsilon_high
            free = r if delta is None else r.clamp(max=delta)
            losses = -torch.minimum(free * a[:, None], r.clamp(min=low, max=high) * a[:, None])
            clipped = ((a < 0)[:, None] & (r < low)) | ((a > 0)[:, None] & (r > high))
        if ratio is not None and loss_type != "vespo":
            losses = losses * tokens_of(ratio, losses)
        beside: tuple[Tensor, ...] = (clipped & inside,)
        if beta:
            kl = k3(logp, tokens_of(ref, logp.detach()))
            kl = kl * r if use_bias_correction_kl else kl
            losses, beside = losses + beta * kl, (torch.where(inside, kl, 0.0), *beside)
        return (torch.where(inside, losses, 0.0) * pick(share)[:, None]).sum(), beside

    loss, beside = unit_loss(operands, evaluate, unit_rows=int(by_row or loss_type == "vespo"))
    return loss, tuple(x.sum() / tokens for x in beside)


class LigerFusedLinearGRPOLoss(
    Loss,
    of=liger_fused_linear_grpo,
    options="beta compiled use_ref_model chunk_size epsilon_low epsilon_high loss_type max_completion_length "
    "importance_sampling_level sapo_temperature_pos sapo_temperature_neg temperature delta use_bias_correction_kl "
    "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
    operands="_input lin_weight selected_token_ids attention_mask advantages bias ref_per_token_logps "
    "old_per_token_logps ref_input ref_weight ref_bias vllm_is_ratio num_items_in_batch",
    check=_check_module,
):
    """Module of `liger_fused_linear_grpo`."""


LigerFusedLinearGRPOFunction = function("LigerFusedLinearGRPOFunction", liger_fused_linear_grpo)
