"""liger_kernel.chunked_loss 0.8.5 on this engine: the same names, signatures and return values. Replace the import:

    from xpo_fast.integrations.liger import LigerFusedLinearDPOLoss

Liger need not be installed. Every `liger_fused_linear_…` is a plain function with the arguments of Liger's
`LigerFusedLinear…Function.apply`, by position or by name; those classes are here for their `apply`.

Cost, in F = 2·N·V·D FLOP with N the scored tokens alone: 1F without gradient, 2F with a frozen head, 3F with a trainable
one (4F for a pair or a sequence that is longer than a tile), and 1F for a reference or teacher; the means of logits cost no
product. Memory is that of one tile, whatever the length. So `compiled` and `chunk_size` are accepted and change nothing:
there is no chunk of pairs, and nothing to compile.

What differs from Liger where Liger is wrong, in numbers:

- `label_smoothing` acts on DPO's `loss_type="sigmoid"`, too: −(1−ε) log σ(h) − ε log σ(−h).
- A pair with an empty half and a KTO row without a token are left out and not counted; their log-probs are 0, not NaN.
- `chosen_logits_mean`, `rejected_logits_mean` and KTO's sums of logits are over scored tokens: padding does not count.
- KTO's `kl` of shape (B,) belongs row by row, as its documentation has it, and is not counted B times.
- ORPO is finite where a probability rounds to 1: the log-odds stop at a mean log-prob of −1e-10.
- GRPO's `luspo`: a row counts by its own tokens, Σ_t loss/B; padding is not in the mean. VESPO's weight leaves out the
  `vllm_is_ratio` of padding.
- log-probs, divergences and gradients of 16-bit operands are made from float32 logits, and dW is summed in float32 over
  tiles; float64 operands give float64 results.

And in behaviour: nothing at an ignored position is read, so it may be NaN; without gradient no gradient is made, and none
for what wants none; what is returned beside the loss is detached (gradients into it were dropped without a word); an odd
number of rows, shapes that do not fit, a missing reference and (on the CPU) ids outside the vocabulary raise ValueError,
and so do options that are assertions there, and a `label_smoothing` that is not below ½ where it acts.
`loss_type="ipo"` is an addition.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..device import to_device, to_host
from ..head import head_plan, token_logps
from ..head.distillation import distillation_loss
from ..head.rows import Group
from ..head.sharded import whole
from ..head.spec import Scaling, accumulation_dtype, cast_for_autocast, check_operands, check_targets
from ..head.units import UnitLoss, pack
from ..methods import METHODS
from ..methods.math import check, check_choice, check_rows, k3, log_odds, past_overflow, unchecked
from ..reduce import sum_over_ranks

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
    "LigerFusedLinearSimPOFunction",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cosine",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]

Pick = Callable[[Tensor], Tensor]  # of (R,) or (R, T) what belongs to the rows under evaluation
Losses = tuple[Tensor, dict[str, Tensor]]
Returned = tuple[Tensor, tuple[Tensor, ...]]
Distillation = Tensor | tuple[Tensor, Tensor, Tensor]


# --- the head, under a loss that is a sum over units --------------------------------------------------------------------


def _loss_and_logps(
    hidden: Tensor,  # (R, T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T)
    ignore_index: int,
    loss_of: Callable[[Tensor, Pick], Tensor],
    *,
    unit_rows: int = 1,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The loss (), differentiable, and the tokens' log-probs (R, T), detached, 0 where ignored.

    loss_of(logp (r, T), pick) → the part of the loss (), already divided by what it is a mean over, that some rows have;
    pick gives it the same rows of what it has besides. A unit is the rows k, k + U, …, `unit_rows` of them, U = R/unit_rows;
    with 0 each token is one, and loss_of sees tokens as rows (n, 1).
    """
    flat, flat_targets = hidden.flatten(0, 1), targets.flatten().long()
    shape, width = targets.shape, targets.shape[1]

    def total(logp: Tensor) -> Tensor:
        return loss_of(logp.view(shape), lambda x: x)

    trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and trainable) or torch.compiler.is_compiling():
        logp = token_logps(
            flat, weight, flat_targets, bias=bias, temperature=temperature, ignore_index=ignore_index
        )
        return total(logp), logp.detach().view(shape)

    count = shape[0] // max(unit_rows, 1)
    home = to_host(flat_targets)
    check_targets(home, ignore_index, weight.shape[0])
    positions = (home != ignore_index).nonzero().squeeze(1)
    lengths: list[int] = []
    if unit_rows:
        unit = (positions // width) % count
        lengths = torch.bincount(unit, minlength=count).tolist()
        positions = positions[unit.argsort(stable=True)]
    positions = to_device(positions, hidden.device)
    plan = head_plan(flat, weight, bias=bias, unit_tokens=max(lengths, default=0))
    if unit_rows:
        groups = pack(positions, lengths, plan.tile_tokens)
    else:
        starts = range(0, positions.shape[0], plan.tile_tokens)
        groups = [Group(positions[a : a + plan.tile_tokens], (), a) for a in starts]

    def coefficients(logp: Tensor, group: Group) -> Tensor:
        """∂loss/∂logp (n,) at the positions of a group."""
        with torch.enable_grad(), unchecked():
            leaf = logp.detach().requires_grad_()
            if not unit_rows:
                rows = group.positions // width
                part = loss_of(
                    leaf[:, None],
                    lambda x: x[rows] if x.dim() == 1 else x.reshape(-1)[group.positions][:, None],
                )
            else:
                units = torch.arange(group.units[0], group.units[-1] + 1, device=logp.device)
                rows = torch.cat([units + k * count for k in range(unit_rows)])
                grid = leaf.new_zeros(home.shape).index_put((group.positions,), leaf)
                part = loss_of(grid.view(shape)[rows], lambda x: x[rows])
            (u,) = torch.autograd.grad(part, leaf)
        return u

    loss, logp = UnitLoss.apply(
        flat,
        weight,
        bias,
        to_device(flat_targets, hidden.device),
        Scaling(float(temperature)),
        ignore_index,
        groups,
        plan,
        coefficients,
        total,
    )
    return loss, logp.detach().view(shape)


def _reference_logps(
    ref_input: Tensor | None,  # (R, T, Dr)
    ref_weight: Tensor | None,  # (V, Dr)
    ref_bias: Tensor | None,  # (V,)
    policy: tuple[Tensor, Tensor | None],  # its head, the reference's where that comes without
    targets: Tensor,  # (R, T)
    ignore_index: int,
    temperature: float = 1.0,
) -> Tensor:
    """The tokens' log-probs under the reference (R, T), detached, 0 where ignored."""
    if ref_input is None:
        raise ValueError("use_ref_model=True needs ref_input=, the reference's hidden states")
    if ref_weight is None:
        ref_weight, ref_bias = policy[0], policy[1] if ref_bias is None else ref_bias
    if ref_weight.shape[0] != policy[0].shape[0]:
        raise ValueError(
            f"the reference must have the policy's vocabulary of {policy[0].shape[0]}, got {ref_weight.shape[0]}"
        )
    with torch.no_grad():
        try:
            return token_logps(
                ref_input,
                ref_weight,
                targets,
                bias=ref_bias,
                temperature=temperature,
                ignore_index=ignore_index,
            )
        except ValueError as error:
            raise ValueError(f"of the reference: {error}") from None


def _logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor) -> Tensor:
    """The sum of the logits over the vocabulary and the scored (R, T) tokens of each row: (R,), detached.

    Σ_t Σ_v (h_t·W_v + b_v) = (Σ_t h_t)·(Σ_v W_v) + n Σ_v b_v, so it takes no product with the head.
    """
    with torch.no_grad():
        dtype = accumulation_dtype(weight.dtype)
        rows = [torch.where(at[:, None], h, 0).sum(dim=0, dtype=dtype) for h, at in zip(hidden, scored)]
        # In blocks: a narrow sum with a wide result would widen all of the weight first.
        columns = torch.stack([block.sum(dim=0, dtype=dtype) for block in weight.split(4096)]).sum(dim=0)
        sums = torch.stack(rows) @ columns if rows else columns.new_zeros(0)
        return sums if bias is None else sums + scored.sum(dim=1) * bias.sum(dtype=dtype)


def _operands(
    hidden: Tensor,  # (R, T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R, T)
    bias: Tensor | None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias that fit together, gathered, and cast as autocast says."""
    weight, bias = whole(weight=weight, bias=bias)
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    if targets.dim() != 2:
        raise ValueError(f"expected padded rows, targets (B, T), got {tuple(targets.shape)}")
    check_operands(hidden, weight, targets, bias)
    return hidden, weight, bias


# --- pairs ----------------------------------------------------------------------------------------------------------------


def _of_method(name: str, **hyperparameters: Any) -> Callable[..., Losses]:
    """A method that takes what it wants of the inputs."""
    method = METHODS[name]

    def call(**inputs: Tensor) -> Losses:
        return method(**{n: x for n, x in inputs.items() if n in method.inputs}, **hyperparameters)

    return call


def _odds_ratio(beta: float) -> Callable[..., Losses]:
    """ORPO's −β log σ(log odds_w − log odds_l) of mean log-probs, without its likelihood term."""

    def call(*, logp_w: Tensor, logp_l: Tensor, **_: Tensor) -> Losses:
        log_ratio = log_odds(logp_w) - log_odds(logp_l)
        ratio = logsigmoid(log_ratio)
        return -beta * ratio, {
            "rewards/chosen": beta * logp_w,
            "rewards/rejected": beta * logp_l,
            "log_odds_ratio": ratio,
            "log_odds_chosen": log_ratio,
        }

    return call


def _paired(
    hidden: Tensor,  # (2P, T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (2P, T)
    bias: Tensor | None,  # (V,)
    method: Callable[..., Losses],
    ignore_index: int,
    *,
    average_log_prob: bool,
    compute_nll_loss: bool,
    alpha: float = 1.0,
    nll_target: Tensor | None = None,  # (2P, T), of which the chosen half is read
    use_ref_model: bool = False,
    ref: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),  # as _reference_logps
    means: tuple[str, ...] = (),
) -> Returned:
    """The method's mean over pairs + α·(mean NLL of the chosen tokens), and Liger's seven outputs beside it.

    means: metrics of the method whose means over the pairs that count are returned, too.
    """
    hidden, weight, bias = _operands(hidden, weight, targets, bias)
    if targets.shape[0] % 2:
        raise ValueError(
            f"expected the chosen rows and then as many rejected ones, an even number, got {targets.shape[0]} rows"
        )
    pairs, policy = targets.shape[0] // 2, (weight, bias)
    targets = to_device(targets, hidden.device)
    scored = targets != ignore_index
    lengths = scored.sum(dim=1)
    some = lengths.clamp(min=1)
    valid = (lengths.view(2, pairs) > 0).all(dim=0).repeat(2)
    counted = valid[:pairs].sum().clamp(min=1)
    ref_logp = lengths.new_zeros(lengths.shape, dtype=accumulation_dtype(weight.dtype))
    if use_ref_model:
        ref_logp = _reference_logps(*ref, policy, targets, ignore_index).sum(dim=1)

    nll_tokens, same, rows, all_targets = scored[:pairs].sum(), None, hidden, targets
    if nll_target is not None and compute_nll_loss:
        if nll_target.shape != targets.shape:
            raise ValueError(
                f"nll_target must be shaped as target, {tuple(targets.shape)}, got {tuple(nll_target.shape)}"
            )
        # Where it asks for other tokens than the chosen half has, that position is scored once more, as a third row.
        wanted = to_device(nll_target, hidden.device)[:pairs]
        nll_tokens, same = (wanted != ignore_index).sum(), wanted == targets[:pairs]
        rows = torch.cat([hidden, hidden[:pairs]])
        all_targets = torch.cat([targets, wanted.masked_fill(same, ignore_index)])
        some, ref_logp, valid = (torch.cat([x, x[:pairs]]) for x in (some, ref_logp, valid))
        same = same.repeat(3, 1)

    sides = 2 if same is None else 3

    def split(x: Tensor) -> tuple[Tensor, ...]:
        """Chosen, rejected, and where there are third rows those."""
        return x.unflatten(0, (sides, x.shape[0] // sides)).unbind()

    def scores(logp: Tensor, pick: Pick) -> dict[str, Tensor]:
        """The method's inputs; log-probs are sums, or means and then of length 1."""
        sums, reference, length = logp.sum(dim=1), pick(ref_logp), pick(some)
        if average_log_prob:
            sums, reference, length = sums / length, reference / length, torch.ones_like(length)
        given = {"logp": sums, "ref_logp": reference, "len": length}
        return {
            prefix + side: half for prefix, x in given.items() for side, half in zip(("_w", "_l"), split(x))
        }

    def nll(logp: Tensor, pick: Pick) -> Tensor:
        chosen, *_, last = split(logp)
        if same is not None:
            chosen = torch.where(split(pick(same))[0], chosen, last)
        return -chosen.sum() / nll_tokens.clamp(min=1)

    def loss_of(logp: Tensor, pick: Pick) -> Tensor:
        losses, _ = method(**scores(logp, pick))
        loss = torch.where(split(pick(valid))[0], losses, 0.0).sum() / counted
        return loss + alpha * nll(logp, pick) if compute_nll_loss else loss

    loss, logp = _loss_and_logps(rows, weight, bias, all_targets, ignore_index, loss_of, unit_rows=sides)
    with unchecked():
        given = scores(logp, lambda x: x)
        _, metrics = method(**given)
    sums = _logit_sums(hidden, weight, bias, scored).view(2, pairs).sum(dim=1)
    logit_means = sums / (lengths.view(2, pairs).sum(dim=1).clamp(min=1) * weight.shape[0])
    return loss, (
        given["logp_w"],
        given["logp_l"],
        *logit_means.unbind(),
        nll(logp, lambda x: x) if compute_nll_loss else torch.zeros_like(loss),
        metrics["rewards/chosen"],
        metrics["rewards/rejected"],
        *(torch.where(valid[:pairs], metrics[name], 0.0).sum() / counted for name in means),
    )


_DPO: dict[
    str, Callable[..., Callable[..., Losses]]
] = {  # loss_type → a method of beta, label_smoothing, discopop_tau
    "sigmoid": lambda beta, smoothing, _: _of_method("dpo", beta=beta, label_smoothing=smoothing),
    "hinge": lambda beta, *_: _of_method("rso", beta=beta, loss="hinge"),
    "ipo": lambda beta, *_: _of_method("ipo", beta=beta),
    "exo_pair": lambda beta, smoothing, _: _of_method("exo", beta=beta, label_smoothing=smoothing),
    "nca_pair": lambda beta, *_: _of_method("nca", beta=beta),
    "robust": lambda beta, smoothing, _: _of_method("robust_dpo", beta=beta, label_smoothing=smoothing),
    "bco_pair": lambda beta, *_: _of_method("bco_pair", beta=beta),
    "sppo_hard": lambda beta, *_: _of_method("sppo", beta=beta, variant="hard"),
    "apo_zero": lambda beta, *_: _of_method("apo_zero", beta=beta),
    "apo_down": lambda beta, *_: _of_method("apo_down", beta=beta),
    "discopop": lambda beta, _, tau: _of_method("discopop", beta=beta, tau=tau),
}


def _check_dpo(loss_type: str, label_smoothing: float) -> None:
    check_choice("loss_type", loss_type, _DPO)
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
) -> Returned:
    """DPO (arXiv 2305.18290) and its variants: mean over pairs of `loss_type` + α·NLL if `compute_nll_loss`.

    loss_type: sigmoid (`METHODS["dpo"]`), hinge (`rso`), ipo, exo_pair (`exo`), nca_pair (`nca`), robust (`robust_dpo`),
    bco_pair, sppo_hard (`sppo`), apo_zero, apo_down or discopop. use_ref_model: else the reference's log-probs are 0.
    average_log_prob: log-probs are means over a completion's tokens. NLL: the mean over all chosen tokens.

    Returns loss (), (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean (), rejected_logits_mean (), nll_loss (),
    chosen_rewards (P,), rejected_rewards (P,)). ValueError for what does not fit, see the module.
    """
    _check_dpo(loss_type, label_smoothing)
    return _paired(
        _input,
        weight,
        target,
        bias,
        _DPO[loss_type](beta, label_smoothing, discopop_tau),
        ignore_index,
        average_log_prob=average_log_prob,
        compute_nll_loss=compute_nll_loss,
        alpha=alpha,
        use_ref_model=use_ref_model,
        ref=(ref_input, ref_weight, ref_bias),
    )


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
) -> Returned:
    """CPO (arXiv 2401.08417): −log σ(β(log π_w − log π_l)), smoothed, + α·NLL. Returns as `liger_fused_linear_dpo`."""
    return _paired(
        _input,
        weight,
        target,
        bias,
        _of_method("cpo", beta=beta, alpha=0.0, label_smoothing=label_smoothing),
        ignore_index,
        average_log_prob=average_log_prob,
        compute_nll_loss=compute_nll_loss,
        alpha=alpha,
    )


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
) -> Returned:
    """SimPO (arXiv 2405.14734): −log σ(β(p̄_w − p̄_l) − γ), smoothed, p̄ mean log-probs, + α·NLL if `compute_nll_loss`.

    Returns as `liger_fused_linear_dpo`.
    """
    return _paired(
        _input,
        weight,
        target,
        bias,
        _of_method("simpo", beta=beta, gamma=gamma, label_smoothing=label_smoothing),
        ignore_index,
        average_log_prob=True,
        compute_nll_loss=compute_nll_loss,
        alpha=alpha,
    )


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
) -> Returned:
    """ORPO (arXiv 2403.07691): −β log σ(log odds ratio) of mean log-probs + NLL.

    nll_target: what NLL is of in place of the chosen half of target, for instance the prompt's tokens, too; each position
    where it is another token costs one more scored token.
    Returns as `liger_fused_linear_dpo`, with log_odds_ratio () and log_odds_chosen () at the end.
    """
    return _paired(
        _input,
        weight,
        target,
        bias,
        _odds_ratio(beta),
        ignore_index,
        average_log_prob=True,
        compute_nll_loss=compute_nll_loss,
        nll_target=nll_target,
        means=("log_odds_ratio", "log_odds_chosen"),
    )


# --- rows with a thumb up or down -------------------------------------------------------------------------------------------


def liger_fused_linear_kto(
    _input: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (B, T)
    preference_labels: Tensor | None,  # (B,) bool
    bias: Tensor | None = None,  # (V,)
    ref_input: Tensor | None = None,  # (B, T, Dr)
    ref_weight: Tensor | None = None,  # (V, Dr); the policy's head if not given
    ref_bias: Tensor | None = None,  # (V,)
    kl: Tensor | None = None,  # () or (1,), or (B,) one a row, in nats; 0 if not given
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> Returned:
    """KTO (arXiv 2402.01306), `METHODS["kto"]`: mean over rows of 1 − σ(±β(log π − log ref − kl)), + where labelled True.

    Returns loss (), (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
    rejected_rewards_sum), () each, over the rows labelled True and over the others.
    """
    _input, weight, bias = _operands(_input, weight, target, bias)
    target = to_device(target, _input.device)
    scored = target != ignore_index
    lengths = scored.sum(dim=1)
    rows = tuple(lengths.shape)
    if preference_labels is None or preference_labels.shape != rows or preference_labels.dtype != torch.bool:
        got = None if preference_labels is None else (preference_labels.dtype, tuple(preference_labels.shape))
        raise ValueError(f"preference_labels must be a bool tensor {rows}, True where chosen, got {got}")
    chosen = to_device(preference_labels, _input.device)
    length = lengths.clamp(min=1) if average_log_prob else torch.ones_like(lengths)
    ref_logp = lengths.new_zeros(rows, dtype=accumulation_dtype(weight.dtype))
    if use_ref_model:
        tokens = _reference_logps(ref_input, ref_weight, ref_bias, (weight, bias), target, ignore_index)
        ref_logp = tokens.sum(dim=1) / length
    shifted = ref_logp
    if kl is not None:
        if tuple(kl.shape) not in ((), (1,), rows):
            raise ValueError(f"kl must be one number, or one a row {rows}, got {tuple(kl.shape)}")
        # log π − log ref − kl, for each row's own kl
        shifted = ref_logp + to_device(kl.detach(), _input.device).to(ref_logp.dtype)
    counted = (lengths > 0).sum().clamp(min=1)
    zero = ref_logp.new_zeros(())

    def loss_of(logp: Tensor, pick: Pick) -> Tensor:
        score = logp.sum(dim=1) / pick(length)
        losses, _ = METHODS["kto"](
            logp=score, ref_logp=pick(shifted), desirable=pick(chosen), kl=zero, beta=beta
        )
        return torch.where(pick(lengths) > 0, losses, 0.0).sum() / counted

    loss, logp = _loss_and_logps(_input, weight, bias, target, ignore_index, loss_of)
    score = logp.sum(dim=1) / length
    sums = (score, _logit_sums(_input, weight, bias, scored), beta * (score - ref_logp))
    return loss, tuple(torch.where(side, x, 0.0).sum() for x in sums for side in (chosen, ~chosen))


# --- sampled completions with advantages ------------------------------------------------------------------------------------

_GRPO = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
_BY_TOKEN_ALONE = ("cispo", "sapo", "vespo")


def _check_grpo(
    loss_type: str,
    level: str,
    max_completion_length: int | None,
    delta: float | None,
    temperatures: tuple[float, float],
) -> None:
    check_choice("loss_type", loss_type, _GRPO)
    check_choice("importance_sampling_level", level, ("token", "sequence"))
    if level == "sequence" and loss_type in _BY_TOKEN_ALONE:
        raise ValueError(
            f"loss_type={loss_type!r} has no importance_sampling_level='sequence': pass 'token' instead"
        )
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' divides by max_completion_length: pass it")
    check(delta is None or delta > 0, "delta > 0", delta)
    for name, x in zip(("sapo_temperature_pos", "sapo_temperature_neg"), temperatures, strict=True):
        check(x > 0, f"{name} > 0", x)


def _tokens_of_all_ranks(mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
    """What DAPO's loss divides by: a step's tokens over the ranks' number, at least 1."""
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if num_items_in_batch is None:
        items = sum_over_ranks(mask.sum().float())
    else:
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float32).to(mask.device)
    return (items / ranks).clamp(min=1)


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
) -> Returned:
    """GRPO (arXiv 2402.03300) and its family. With r = exp(log π − log π_old), or of a row its geometric mean
    (importance_sampling_level="sequence", GSPO), on-policy where there is no old_per_token_logps, each token's loss is

        −min(min(r, δ)·A, clip(r, 1 − epsilon_low, 1 + epsilon_high)·A)·s + β·k3

    s = vllm_is_ratio; k3 against the reference, times r with `use_bias_correction_kl` (DeepSeek-V3.2); for cispo (its cap is
    epsilon_high), sapo and vespo (s goes into its sequence's ratio) it is that of `METHODS`. The sum over tokens is a mean
    over: each row's tokens, then B rows (grpo, sapo); the batch's tokens (bnpo); those of all ranks, or num_items_in_batch
    (dapo, cispo, vespo); B·max_completion_length (dr_grpo); B rows (luspo).

    Returns loss (), (k3's mean over tokens () unless β is 0, share of clipped tokens ()).
    """
    _check_grpo(
        loss_type,
        importance_sampling_level,
        max_completion_length,
        delta,
        (sapo_temperature_pos, sapo_temperature_neg),
    )
    _input, weight, bias = _operands(_input, weight.to(_input.dtype), selected_token_ids, bias)
    device, shape = _input.device, tuple(selected_token_ids.shape)
    batch, by_row = shape[0], importance_sampling_level == "sequence"

    def data(name: str, x: Tensor | None, *shapes: tuple[int, ...]) -> Tensor | None:
        if x is None:
            return None
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
        return to_device(x.detach(), device)

    given_mask = data("attention_mask", attention_mask, shape)
    assert given_mask is not None
    mask = given_mask != 0
    check_rows(
        (~mask | (given_mask == 1)).all(dim=1),
        "an attention_mask of 0 and 1",
        "weigh the advantages instead",
        sum=given_mask.sum(dim=1),
    )
    advantage = data("advantages", advantages, (batch,))
    assert advantage is not None
    old, ref = (
        data(name, x, shape)
        for name, x in (
            ("old_per_token_logps", old_per_token_logps),
            ("ref_per_token_logps", ref_per_token_logps),
        )
    )
    dtype = accumulation_dtype(weight.dtype)
    old, ref = (None if x is None else x.to(dtype) for x in (old, ref))
    advantage = advantage.to(dtype)
    lengths = mask.sum(dim=1)
    ratio = data("vllm_is_ratio", vllm_is_ratio, (batch,), (batch, 1), shape)
    per_row = ratio is not None and ratio.numel() == batch and ratio.shape != shape
    if ratio is not None:
        ratio = ratio.to(dtype).reshape(batch, -1).expand(shape)
    targets = torch.where(mask, to_device(selected_token_ids, device), -100)
    if use_ref_model:
        if ref is None and ref_input is None:
            raise ValueError("use_ref_model=True needs ref_per_token_logps= or ref_input=")
        if ref is not None and ref_input is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.",
                stacklevel=2,
            )
        if ref is None and beta:
            ref = _reference_logps(
                ref_input, ref_weight, ref_bias, (weight, bias), targets, -100, temperature
            )
    else:
        ref = None

    tokens = lengths.sum().clamp(min=1)
    each = torch.ones(batch, dtype=dtype, device=device)  # what a row's tokens' losses are multiplied by
    if loss_type in ("grpo", "sapo"):
        each = each / (lengths.clamp(min=1) * batch)
    elif loss_type == "bnpo":
        each = each / tokens
    elif loss_type == "dr_grpo":
        each = each / (batch * (max_completion_length or 0))
    elif loss_type == "luspo":
        each = each / batch
    else:
        each = each / _tokens_of_all_ranks(mask, num_items_in_batch)

    def evaluate(logp: Tensor, pick: Pick) -> tuple[Tensor, Tensor | None, Tensor]:
        """Losses, k3 or None, and which are clipped: (r, t) each, 0 outside the mask."""
        inside, a = pick(mask), pick(advantage)

        def tokens_of(x: Tensor | None, absent: Tensor) -> Tensor:
            return absent if x is None else torch.where(inside, pick(x), 0.0)

        old_logp = tokens_of(old, logp.detach())
        log_r = torch.where(inside, logp - old_logp, 0.0)
        if by_row:
            log_r = (log_r.sum(dim=1) / pick(lengths).clamp(min=1))[:, None].expand_as(inside)
        r, given = past_overflow(torch.exp, log_r), {"token_logp": logp, "advantage": a, "mask": inside}
        negative, positive = (a < 0)[:, None], (a > 0)[:, None]
        clipped = torch.zeros_like(inside)
        if loss_type == "cispo":
            losses, _ = METHODS["cispo"](**given, old_logp=old_logp, cap=epsilon_high)
            clipped = positive & (r > epsilon_high)
        elif loss_type == "sapo":
            temperatures = {"tau_pos": sapo_temperature_pos, "tau_neg": sapo_temperature_neg}
            losses, _ = METHODS["sapo"](**given, old_logp=old_logp, **temperatures)
        elif loss_type == "vespo":
            if ratio is not None:
                # log w = Σ log r + Σ log s: a row's one s in equal parts
                log_s = pick(ratio).log().clamp(min=math.log(1e-8), max=20)
                old_logp = old_logp - (log_s / pick(lengths).clamp(min=1)[:, None] if per_row else log_s)
            gamma = {"k_pos": vespo_k_pos, "lambda_pos": vespo_lambda_pos}
            gamma |= {"k_neg": vespo_k_neg, "lambda_neg": vespo_lambda_neg}
            losses, _ = METHODS["vespo"](**given, old_logp=old_logp, **gamma)
        else:
            low, high = 1 - epsilon_low, 1 + epsilon_high
            free = r if delta is None else r.clamp(max=delta)
            losses = -torch.minimum(free * a[:, None], r.clamp(min=low, max=high) * a[:, None])
            clipped = (negative & (r < low)) | (positive & (r > high))
        if ratio is not None and loss_type != "vespo":
            losses = losses * tokens_of(ratio, losses)
        kl = None
        if beta:
            kl = k3(logp, tokens_of(ref, logp.detach()))
            kl = kl * r if use_bias_correction_kl else kl
            losses = losses + beta * kl
        return torch.where(inside, losses, 0.0), kl, clipped & inside

    def loss_of(logp: Tensor, pick: Pick) -> Tensor:
        return (evaluate(logp, pick)[0] * pick(each)[:, None]).sum()

    loss, logp = _loss_and_logps(
        _input,
        weight,
        bias,
        targets,
        -100,
        loss_of,
        unit_rows=int(by_row or loss_type == "vespo"),
        temperature=temperature,
    )
    with torch.no_grad():
        _, kl, clipped = evaluate(logp, lambda x: x)
        share = clipped.sum() / tokens
        return loss, (share,) if kl is None else (torch.where(mask, kl, 0.0).sum() / tokens, share)


# --- distillation -----------------------------------------------------------------------------------------------------------


def _distilled(
    divergence: str,
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    true_labels: Tensor,
    return_parts: bool,
    **options: Any,
) -> Distillation:
    found = distillation_loss(
        student[0],
        student[1],
        true_labels,
        teacher_hidden=teacher[0],
        teacher_weight=teacher[1],
        bias=student[2],
        teacher_bias=teacher[2],
        divergence=divergence,
        parts=return_parts,
        **options,
    )
    return (found.loss, found.soft, found.hard) if return_parts else found.loss


def liger_fused_linear_jsd(
    student_input: Tensor,  # (N, D)
    student_weight: Tensor,  # (V, D)
    teacher_input: Tensor,  # (N, Dt)
    teacher_weight: Tensor,  # (Vt, Dt), Vt ≥ V
    true_labels: Tensor,  # (N,)
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Distillation:
    """Generalised Jensen–Shannon distillation (GKD, arXiv 2306.13649): `head.distillation.distillation_loss`.

    Returns the loss (), or with `return_soft_hard_loss` (loss, soft loss, hard loss), () each.
    """
    return _distilled(
        "jsd",
        (student_input, student_weight, student_bias),
        (teacher_input, teacher_weight, teacher_bias),
        true_labels,
        return_soft_hard_loss,
        hard_weight=weight_hard_loss,
        soft_weight=weight_soft_loss,
        beta=beta,
        ignore_index=ignore_index,
        temperature=temperature,
    )


def liger_fused_linear_cosine(
    student_input: Tensor,  # (N, D)
    student_weight: Tensor,  # (V, D)
    teacher_input: Tensor,  # (N, Dt)
    teacher_weight: Tensor,  # (Vt, Dt), Vt ≥ V
    true_labels: Tensor,  # (N,)
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Distillation:
    """Distillation by the logits' cosine, β(1 − cos); a temperature does not change it. Returns as `liger_fused_linear_jsd`."""
    return _distilled(
        "cosine",
        (student_input, student_weight, student_bias),
        (teacher_input, teacher_weight, teacher_bias),
        true_labels,
        return_soft_hard_loss,
        hard_weight=weight_hard_loss,
        soft_weight=weight_soft_loss,
        beta=beta,
        ignore_index=ignore_index,
        temperature=temperature,
    )


# --- Liger's classes --------------------------------------------------------------------------------------------------------


class LigerFusedLinearDPOFunction:
    apply = staticmethod(liger_fused_linear_dpo)


class LigerFusedLinearCPOFunction:
    apply = staticmethod(liger_fused_linear_cpo)


class LigerFusedLinearSimPOFunction:
    apply = staticmethod(liger_fused_linear_simpo)


class LigerFusedLinearORPOFunction:
    apply = staticmethod(liger_fused_linear_orpo)


class LigerFusedLinearKTOFunction:
    apply = staticmethod(liger_fused_linear_kto)


class LigerFusedLinearGRPOFunction:
    apply = staticmethod(liger_fused_linear_grpo)


class LigerFusedLinearJSDFunction:
    apply = staticmethod(liger_fused_linear_jsd)


class LigerFusedLinearCosineSimilarityFunction:
    apply = staticmethod(liger_fused_linear_cosine)


class _Loss(torch.nn.Module):
    """Keeps the options of a constructor as attributes of their names, as Liger's classes do."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self._names = [name for name in options if name not in ("self", "__class__")]
        for name in self._names:
            setattr(self, name, options[name])

    @property
    def _options(self) -> dict[str, Any]:
        """The options as they are now."""
        return {name: getattr(self, name) for name in self._names}


class LigerFusedLinearDPOLoss(_Loss):
    """`liger_fused_linear_dpo`; the weight comes first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(locals())
        _check_dpo(loss_type, label_smoothing)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Returned:
        return liger_fused_linear_dpo(
            _input, lin_weight, target, bias, ref_input, ref_weight, ref_bias, **self._options
        )


class LigerFusedLinearCPOLoss(_Loss):
    """`liger_fused_linear_cpo`; the weight comes first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        return liger_fused_linear_cpo(_input, lin_weight, target, bias, **self._options)


class LigerFusedLinearSimPOLoss(_Loss):
    """`liger_fused_linear_simpo`; the weight comes first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        return liger_fused_linear_simpo(_input, lin_weight, target, bias, **self._options)


class LigerFusedLinearORPOLoss(_Loss):
    """`liger_fused_linear_orpo`; the weight comes first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Returned:
        return liger_fused_linear_orpo(
            _input, lin_weight, target, bias, nll_target=nll_target, **self._options
        )


class LigerFusedLinearKTOLoss(_Loss):
    """`liger_fused_linear_kto`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Returned:
        return liger_fused_linear_kto(
            _input,
            lin_weight,
            target,
            preference_labels,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            kl,
            **self._options,
        )


class LigerFusedLinearGRPOLoss(_Loss):
    """`liger_fused_linear_grpo`."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__(locals())
        _check_grpo(
            loss_type,
            importance_sampling_level,
            max_completion_length,
            delta,
            (sapo_temperature_pos, sapo_temperature_neg),
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Returned:
        return liger_fused_linear_grpo(
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **self._options,
        )


class _DistillationLoss(_Loss):
    _distil: Callable[..., Distillation]

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__(locals())
        check(temperature > 0, "temperature > 0", temperature)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Distillation:
        heads = (student_input, student_weight, teacher_input, teacher_weight)
        return self._distil(*heads, true_labels, student_bias, teacher_bias, **self._options)


class LigerFusedLinearJSDLoss(_DistillationLoss):
    """`liger_fused_linear_jsd`."""

    _distil = staticmethod(liger_fused_linear_jsd)


class LigerFusedLinearCosineSimilarityLoss(_DistillationLoss):
    """`liger_fused_linear_cosine`."""

    _distil = staticmethod(liger_fused_linear_cosine)
