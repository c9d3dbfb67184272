"""DPO, CPO, SimPO and ORPO: a chosen and a rejected completion of a prompt, R = 2P rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...device import to_device
from ...head.operands import Operands
from ...head.spec import accumulation_dtype
from ...methods import METHODS
from ...methods.math import check, check_choice, log_odds
from .classes import Loss, function
from .units import Found, Pick, ReferenceInputs, logit_sums, padded_rows, reference_logps, unit_loss

Losses = tuple[Tensor, dict[str, Tensor]]


def _paired(
    operands: Operands,  # those of `padded_rows`, (2P, T)
    method: Callable[..., Losses],
    *,
    average_log_prob: bool,
    alpha: float | None,
    nll_target: Tensor | None = None,  # (2P, T), of which the chosen half is read
    reference: ReferenceInputs | None = None,
    means: tuple[str, ...] = (),
) -> Found:
    """Returns the method's mean over pairs + α·(mean NLL of the chosen tokens) unless α is None, and Liger's outputs.

    means: metrics of the method whose means over the pairs that count are returned after Liger's seven outputs.
    """
    hidden, targets, ignore_index = operands.hidden, operands.targets, operands.ignore_index
    if targets.shape[0] % 2:
        raise ValueError(
            f"expected the chosen rows and then as many rejected ones, an even number, got {targets.shape[0]} rows"
        )
    pairs = targets.shape[0] // 2
    scored = targets != ignore_index
    lengths = scored.sum(dim=1)
    divisor = lengths.clamp(min=1)
    valid = (lengths.view(2, pairs) > 0).all(dim=0).repeat(2)
    counted = valid[:pairs].sum().clamp(min=1)
    ref_logp = lengths.new_zeros(lengths.shape, dtype=accumulation_dtype(operands.weight.dtype))
    if reference is not None:
        ref_logp = reference_logps(reference, operands).sum(dim=1)

    nll_tokens, sides, rows, same = scored[:pairs].sum(), 2, operands, None
    if nll_target is not None and alpha is not None:
        if nll_target.shape != targets.shape:
            raise ValueError(
                f"nll_target must be shaped as target, {tuple(targets.shape)}, got {tuple(nll_target.shape)}"
            )
        # A position where it has another token than the chosen half is scored once more, as one of a third row.
        wanted = to_device(nll_target, hidden.device)[:pairs]
        nll_tokens, sides, same = (wanted != ignore_index).sum(), 3, wanted == targets[:pairs]
        more = wanted.masked_fill(same, ignore_index)
        rows = replace(operands, hidden=torch.cat([hidden, hidden[:pairs]]), targets=torch.cat([targets, more]))
        divisor, ref_logp, valid = (torch.cat([x, x[:pairs]]) for x in (divisor, ref_logp, valid))
        same = same.repeat(3, 1)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        """Returns the chosen, the rejected and, if there are any, the third rows."""
        return x.unflatten(0, (sides, x.shape[0] // sides)).unbind()

    def evaluate(logp: Tensor, pick: Pick) -> Found:
        sums, reference, length = logp.sum(dim=1), pick(ref_logp), pick(divisor)
        if average_log_prob:
            sums, reference, length = sums / length, reference / length, torch.ones_like(length)
        given = {"logp": sums, "ref_logp": reference, "len": length}
        inputs = {name + side: x for name, both in given.items() for side, x in zip(("_w", "_l"), split(both))}
        losses, metrics = method(**inputs)

        def mean(x: Tensor) -> Tensor:
            return torch.where(split(pick(valid))[0], x, 0.0).sum() / counted

        loss = mean(losses)
        nll = torch.zeros_like(loss)
        if alpha is not None:
            chosen, *_, last = split(logp)
            if same is not None:
                chosen = torch.where(split(pick(same))[0], chosen, last)
            nll = -chosen.sum() / nll_tokens.clamp(min=1)
            loss = loss + alpha * nll
        rewards = metrics["rewards/chosen"], metrics["rewards/rejected"]
        return loss, (inputs["logp_w"], inputs["logp_l"], nll, *rewards, *(mean(metrics[n]) for n in means))

    loss, (logp_w, logp_l, *beside) = unit_loss(rows, evaluate, unit_rows=sides)
    sums = logit_sums(operands, scored).view(2, pairs).sum(dim=1)
    logit_means = sums / (lengths.view(2, pairs).sum(dim=1).clamp(min=1) * operands.vocab)
    return loss, (logp_w, logp_l, *logit_means.unbind(), *beside)


def _method(name: str, **hyperparameters: Any) -> Callable[..., Losses]:
    """Returns a method of METHODS that ignores the inputs that it does not take."""
    method = METHODS[name]

    def call(**inputs: Tensor) -> Losses:
        return method(**{n: x for n, x in inputs.items() if n in method.inputs}, **hyperparameters)

    return call


DPO_METHODS = {  # loss_type → the name of its method
    "sigmoid": "dpo",
    "hinge": "rso",
    "ipo": "ipo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "robust": "robust_dpo",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}


def _check_dpo(loss_type: str, label_smoothing: float) -> None:
    check_choice("loss_type", loss_type, DPO_METHODS)
    if loss_type == "exo_pair":
        expected = "label_smoothing in (0, 0.5) with loss_type='exo_pair', whose paper recommends 1e-3"
        check(0 < label_smoothing < 0.5, expected, label_smoothing)
    elif loss_type in ("sigmoid", "robust"):
        check(0 <= label_smoothing < 0.5, "label_smoothing in [0, 0.5)", label_smoothing)


def liger_fused_linear_dpo(
    _input: Tensor,  # (2P, T, D) chosen rows, then rejected ones
    weight: Tensor,  # (V, D)
    target: Tensor,  # (2P, T) aligned
    bias: Tensor | None = None,  # (V,)
    ref_input: Tensor | None = None,  # (2P, T, Dr)
    ref_weight: Tensor | None = None,  # (V, Dr); the policy's head if not given
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> Found:
    """Computes DPO (arXiv 2305.18290) or a variant: mean over pairs of `loss_type` + α·NLL if `compute_nll_loss`.

    loss_type: sigmoid (`METHODS["dpo"]`), hinge (`rso`), ipo, exo_pair (`exo`), nca_pair (`nca`), robust
    (`robust_dpo`), bco_pair, sppo_hard (`sppo`), apo_zero, apo_down or discopop.
    use_ref_model: if False, the reference's log-probs are 0.
    average_log_prob: log-probs are means over a completion's tokens. NLL: the mean over all chosen tokens.

    Returns loss (), (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean (), rejected_logits_mean (),
    nll_loss (), chosen_rewards (P,), rejected_rewards (P,)).
    Raises ValueError for arguments that do not fit, see the package.
    """
    _check_dpo(loss_type, label_smoothing)
    name = DPO_METHODS[loss_type]
    given = {"beta": beta, "label_smoothing": label_smoothing, "tau": discopop_tau}
    taken = {n: x for n, x in given.items() if n in METHODS[name].defaults}
    method = _method(name, **taken, **({"variant": "hard"} if name == "sppo" else {}))
    return _paired(
        padded_rows(_input, weight, target, bias, ignore_index),
        method,
        average_log_prob=average_log_prob,
        alpha=alpha if compute_nll_loss else None,
        reference=(ref_input, ref_weight, ref_bias) if use_ref_model else None,
    )


class LigerFusedLinearDPOLoss(
    Loss,
    of=liger_fused_linear_dpo,
    options="ignore_index beta alpha compute_nll_loss compiled use_ref_model average_log_prob chunk_size loss_type "
    "label_smoothing discopop_tau",
    operands="lin_weight _input target bias ref_input ref_weight ref_bias",
    check=_check_dpo,
):
    """Module of `liger_fused_linear_dpo`; the weight comes first."""


def liger_fused_linear_cpo(
    _input: Tensor,  # (2P, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (2P, T)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = True,
    compiled: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> Found:
    """Computes CPO (arXiv 2401.08417): −log σ(β(log π_w − log π_l)), smoothed, + α·NLL if `compute_nll_loss`.

    Returns what `liger_fused_linear_dpo` does.
    """
    operands = padded_rows(_input, weight, target, bias, ignore_index)
    method = _method("cpo", beta=beta, alpha=0.0, label_smoothing=label_smoothing)
    return _paired(operands, method, average_log_prob=average_log_prob, alpha=alpha if compute_nll_loss else None)


class LigerFusedLinearCPOLoss(
    Loss,
    of=liger_fused_linear_cpo,
    options="ignore_index beta alpha label_smoothing compute_nll_loss compiled average_log_prob chunk_size",
    operands="lin_weight _input target bias",
):
    """Module of `liger_fused_linear_cpo`; the weight comes first."""


def liger_fused_linear_simpo(
    _input: Tensor,  # (2P, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (2P, T)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    gamma: float = 0.5,
    chunk_size: int = 1,
) -> Found:
    """Computes SimPO (arXiv 2405.14734): −log σ(β(p̄_w − p̄_l) − γ), smoothed, + α·NLL if `compute_nll_loss`.

    p̄ are means of log-probs over a completion's tokens. Returns what `liger_fused_linear_dpo` does.
    """
    operands = padded_rows(_input, weight, target, bias, ignore_index)
    method = _method("simpo", beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    return _paired(operands, method, average_log_prob=True, alpha=alpha if compute_nll_loss else None)


class LigerFusedLinearSimPOLoss(
    Loss,
    of=liger_fused_linear_simpo,
    options="ignore_index beta alpha label_smoothing compute_nll_loss compiled gamma chunk_size",
    operands="lin_weight _input target bias",
    compute_nll_loss=True,
):
    """Module of `liger_fused_linear_simpo`; the weight comes first, and compute_nll_loss is True by default."""


def _odds_ratio(beta: float) -> Callable[..., Losses]:
    """Returns ORPO's −β log σ(log odds_w − log odds_l) of mean log-probs, without its likelihood term, as a method."""
    check(beta >= 0, "beta >= 0", beta)

    def call(*, logp_w: Tensor, logp_l: Tensor, **_: Tensor) -> Losses:
        log_ratio = log_odds(logp_w) - log_odds(logp_l)
        ratio = logsigmoid(log_ratio)
        metrics = {"log_odds_ratio": ratio, "log_odds_chosen": log_ratio}
        return -beta * ratio, metrics | {"rewards/chosen": beta * logp_w, "rewards/rejected": beta * logp_l}

    return call


def liger_fused_linear_orpo(
    _input: Tensor,  # (2P, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (2P, T)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,  # (2P, T)
    compiled: bool = True,
    chunk_size: int = 1,
) -> Found:
    """Computes ORPO (arXiv 2403.07691): −β log σ(log odds ratio) of mean log-probs + NLL if `compute_nll_loss`.

    nll_target: the targets of the NLL, in place of the chosen half of target: with the prompt's tokens, for instance.
    Each position where it has another token costs one more scored token.
    Returns what `liger_fused_linear_dpo` does, with log_odds_ratio () and log_odds_chosen () at the end.
    """
    return _paired(
        padded_rows(_input, weight, target, bias, ignore_index),
        _odds_ratio(beta),
        average_log_prob=True,
        alpha=1.0 if compute_nll_loss else None,
        nll_target=nll_target,
        means=("log_odds_ratio", "log_odds_chosen"),
    )


class LigerFusedLinearORPOLoss(
    Loss,
    of=liger_fused_linear_orpo,
    options="ignore_index beta compute_nll_loss compiled chunk_size",
    operands="lin_weight _input target bias nll_target",
):
    """Module of `liger_fused_linear_orpo`; the weight comes first."""


LigerFusedLinearDPOFunction = function("LigerFusedLinearDPOFunction", liger_fused_linear_dpo)
LigerFusedLinearCPOFunction = function("LigerFusedLinearCPOFunction", liger_fused_linear_cpo)
LigerFusedLinearSimPOFunction = function("LigerFusedLinearSimPOFunction", liger_fused_linear_simpo)
LigerFusedLinearORPOFunction = function("LigerFusedLinearORPOFunction", liger_fused_linear_orpo)
