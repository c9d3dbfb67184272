"""DPO, CPO, SimPO and ORPO: a chosen and a rejected completion of a prompt, R = 2P rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...device import to_device
from ...head.spec import accumulation_dtype
from ...methods import METHODS
from ...methods.math import check, check_choice, log_odds
from .classes import Loss, function
from .units import Found, Pick, Reference, logit_sums, operands, reference_logps, unit_loss

Losses = tuple[Tensor, dict[str, Tensor]]


def _paired(
    hidden: Tensor,  # (2P, T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (2P, T)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    method: Callable[..., Losses],
    *,
    average_log_prob: bool,
    alpha: float | None,
    nll_target: Tensor | None = None,  # (2P, T), of which the chosen half is read
    reference: Reference | None = None,
    means: tuple[str, ...] = (),
) -> Found:
    """The method's mean over pairs + α·(mean NLL of the chosen tokens) unless α is None, and Liger's seven outputs beside it.

    means: metrics of the method whose means over the pairs that count are returned, too.
    """
    hidden, weight, bias = operands(hidden, weight, targets, bias)
    if targets.shape[0] % 2:
        raise ValueError(
            f"expected the chosen rows and then as many rejected ones, an even number, got {targets.shape[0]} rows"
        )
    pairs = targets.shape[0] // 2
    targets = to_device(targets, hidden.device)
    scored = targets != ignore_index
    lengths = scored.sum(dim=1)
    some = lengths.clamp(min=1)
    valid = (lengths.view(2, pairs) > 0).all(dim=0).repeat(2)
    counted = valid[:pairs].sum().clamp(min=1)
    ref_logp = lengths.new_zeros(lengths.shape, dtype=accumulation_dtype(weight.dtype))
    if reference is not None:
        ref_logp = reference_logps(reference, (weight, bias), targets, ignore_index).sum(dim=1)

    nll_tokens, sides, rows, all_targets, same = scored[:pairs].sum(), 2, hidden, targets, None
    if nll_target is not None and alpha is not None:
        if nll_target.shape != targets.shape:
            raise ValueError(
                f"nll_target must be shaped as target, {tuple(targets.shape)}, got {tuple(nll_target.shape)}"
            )
        # Where it asks for other tokens than the chosen half has, that position is scored once more, as a third row.
        wanted = to_device(nll_target, hidden.device)[:pairs]
        nll_tokens, sides, same = (wanted != ignore_index).sum(), 3, wanted == targets[:pairs]
        rows = torch.cat([hidden, hidden[:pairs]])
        all_targets = torch.cat([targets, wanted.masked_fill(same, ignore_index)])
        some, ref_logp, valid = (torch.cat([x, x[:pairs]]) for x in (some, ref_logp, valid))
        same = same.repeat(3, 1)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        """Chosen, rejected, and where there are third rows those."""
        return x.unflatten(0, (sides, x.shape[0] // sides)).unbind()

    def evaluate(logp: Tensor, pick: Pick) -> Found:
        sums, reference, length = logp.sum(dim=1), pick(ref_logp), pick(some)
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

    loss, (logp_w, logp_l, *beside) = unit_loss(
        rows, weight, bias, all_targets, ignore_index, evaluate, unit_rows=sides
    )
    sums = logit_sums(hidden, weight, bias, scored).view(2, pairs).sum(dim=1)
    logit_means = sums / (lengths.view(2, pairs).sum(dim=1).clamp(min=1) * weight.shape[0])
    return loss, (logp_w, logp_l, *logit_means.unbind(), *beside)


def _of(name: str, **hyperparameters: Any) -> Callable[..., Losses]:
    """A method of METHODS that takes what it wants of the inputs."""
    method = METHODS[name]

    def call(**inputs: Tensor) -> Losses:
        return method(**{n: x for n, x in inputs.items() if n in method.inputs}, **hyperparameters)

    return call


# --- DPO --------------------------------------------------------------------------------------------------------------------

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
    """DPO (arXiv 2305.18290) and its variants: mean over pairs of `loss_type` + α·NLL if `compute_nll_loss`.

    loss_type: sigmoid (`METHODS["dpo"]`), hinge (`rso`), ipo, exo_pair (`exo`), nca_pair (`nca`), robust (`robust_dpo`),
    bco_pair, sppo_hard (`sppo`), apo_zero, apo_down or discopop. use_ref_model: else the reference's log-probs are 0.
    average_log_prob: log-probs are means over a completion's tokens. NLL: the mean over all chosen tokens.

    Returns loss (), (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean (), rejected_logits_mean (), nll_loss (),
    chosen_rewards (P,), rejected_rewards (P,)). ValueError for what does not fit, see the package.
    """
    _check_dpo(loss_type, label_smoothing)
    name = DPO_METHODS[loss_type]
    given = {"beta": beta, "label_smoothing": label_smoothing, "tau": discopop_tau}
    taken = {n: x for n, x in given.items() if n in METHODS[name].defaults}
    method = _of(name, **taken, **({"variant": "hard"} if name == "sppo" else {}))
    return _paired(
        _input, weight, target, bias, ignore_index, method,
        average_log_prob=average_log_prob, alpha=alpha if compute_nll_loss else None,
        reference=(ref_input, ref_weight, ref_bias) if use_ref_model else None,
    )  # fmt: skip


class LigerFusedLinearDPOLoss(
    Loss,
    of=liger_fused_linear_dpo,
    options="ignore_index beta alpha compute_nll_loss compiled use_ref_model average_log_prob chunk_size loss_type "
    "label_smoothing discopop_tau",
    operands="lin_weight _input target bias ref_input ref_weight ref_bias",
    check=_check_dpo,
):
    """`liger_fused_linear_dpo`; the weight comes first."""


# --- without a reference ----------------------------------------------------------------------------------------------------


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
    """CPO (arXiv 2401.08417): −log σ(β(log π_w − log π_l)), smoothed, + α·NLL. Returns as `liger_fused_linear_dpo`."""
    return _paired(
        _input, weight, target, bias, ignore_index,
        _of("cpo", beta=beta, alpha=0.0, label_smoothing=label_smoothing),
        average_log_prob=average_log_prob, alpha=alpha if compute_nll_loss else None,
    )  # fmt: skip


class LigerFusedLinearCPOLoss(
    Loss,
    of=liger_fused_linear_cpo,
    options="ignore_index beta alpha label_smoothing compute_nll_loss compiled average_log_prob chunk_size",
    operands="lin_weight _input target bias",
):
    """`liger_fused_linear_cpo`; the weight comes first."""


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
    """SimPO (arXiv 2405.14734): −log σ(β(p̄_w − p̄_l) − γ), smoothed, p̄ mean log-probs, + α·NLL if `compute_nll_loss`.

    Returns as `liger_fused_linear_dpo`.
    """
    return _paired(
        _input, weight, target, bias, ignore_index,
        _of("simpo", beta=beta, gamma=gamma, label_smoothing=label_smoothing),
        average_log_prob=True, alpha=alpha if compute_nll_loss else None,
    )  # fmt: skip


class LigerFusedLinearSimPOLoss(
    Loss,
    of=liger_fused_linear_simpo,
    options="ignore_index beta alpha label_smoothing compute_nll_loss compiled gamma chunk_size",
    operands="lin_weight _input target bias",
    compute_nll_loss=True,
):
    """`liger_fused_linear_simpo`; the weight comes first, and compute_nll_loss is True unless said."""


def _odds_ratio(beta: float) -> Callable[..., Losses]:
    """ORPO's −β log σ(log odds_w − log odds_l) of mean log-probs, without its likelihood term."""
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
    """ORPO (arXiv 2403.07691): −β log σ(log odds ratio) of mean log-probs + NLL.

    nll_target: what NLL is of in place of the chosen half of target, for instance the prompt's tokens, too; each position
    where it is another token costs one more scored token.
    Returns as `liger_fused_linear_dpo`, with log_odds_ratio () and log_odds_chosen () at the end.
    """
    return _paired(
        _input, weight, target, bias, ignore_index, _odds_ratio(beta),
        average_log_prob=True, alpha=1.0 if compute_nll_loss else None, nll_target=nll_target,
        means=("log_odds_ratio", "log_odds_chosen"),
    )  # fmt: skip


class LigerFusedLinearORPOLoss(
    Loss,
    of=liger_fused_linear_orpo,
    options="ignore_index beta compute_nll_loss compiled chunk_size",
    operands="lin_weight _input target bias nll_target",
):
    """`liger_fused_linear_orpo`; the weight comes first."""


LigerFusedLinearDPOFunction = function("LigerFusedLinearDPOFunction", liger_fused_linear_dpo)
LigerFusedLinearCPOFunction = function("LigerFusedLinearCPOFunction", liger_fused_linear_cpo)
LigerFusedLinearSimPOFunction = function("LigerFusedLinearSimPOFunction", liger_fused_linear_simpo)
LigerFusedLinearORPOFunction = function("LigerFusedLinearORPOFunction", liger_fused_linear_orpo)
