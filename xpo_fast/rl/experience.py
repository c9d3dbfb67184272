"""Makes an Experience of scored completions: their log-probs, values and advantages, as the steps on them need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.advantages import advantages, gae, whiten
from ..methods.math import k1
from ..objective import Objective
from ..types import IGNORE_INDEX
from .collect import Completion
from .config import RLConfig
from .measure import Measure


@dataclass
class Experience:
    """R completions with all that steps on them need, on the CPU; C is the length of the longest completion."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    counted: Tensor  # (R,) bool, whether the loss's mean divides by the row
    kept: Tensor  # (R,) bool, whether the row's gradient may differ from 0; only rows that are counted
    columns: dict[str, Tensor]  # (R,) or (R, C): advantage, old_logp, ref_token_logp, old_value, returns, …

    @property
    def lengths(self) -> Tensor:
        """(R,) int64, number of tokens of each completion."""
        return torch.tensor([len(ids) for ids in self.completion_ids])

    def targets(self, rows: Tensor) -> Tensor:
        """Returns (n, C), −100 after the end of a completion and 0 before, for `Objective.count_items`."""
        lengths = self.lengths
        at = torch.arange(int(lengths.max()))
        return torch.where(at < lengths[rows][:, None], 0, IGNORE_INDEX)


@dataclass
class _Table:
    """Completions of a rollout as tensors, (R,) each, and (R, C) by token."""

    reward: Tensor  # float32, NaN where there is none
    valued: Tensor  # bool, whether there is a reward
    counted: Tensor  # bool, whether the loss's mean divides by the row
    lengths: Tensor  # int64
    mask: Tensor  # (R, C) bool

    @classmethod
    def of(cls, rows: list[Completion], args: RLConfig) -> _Table:
        reward = torch.tensor([row.reward for row in rows])
        lengths = torch.tensor([len(row.ids) for row in rows])
        mask = torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]
        valued = ~reward.isnan()
        counted = valued & (lengths > 0)
        if args.overlong_handling == "mask":
            counted &= ~torch.tensor([row.truncated for row in rows])
        return cls(reward, valued, counted, lengths, mask)


def make_experience(
    rows: list[Completion],
    args: RLConfig,
    objective: Objective,
    measure: Measure,
    *,
    kl_coef: float,
    correction: str,
    spare: bool,
    number: int,
) -> tuple[Experience, dict[str, float]]:
    """Measures the completions of rollout `number`, groups side by side; returns them with advantages, and metrics.

    kl_coef: weight of the divergence from the reference that is subtracted from the rewards.
    correction: for which ratio of policy to sampler advantages are weighed, see `correction_level`; "none" if a
        completion comes without the sampler's log-probs.
    spare: leave rows whose advantage is 0 out of forward and backward, see `spares_rows`.

    Without a critic and a divergence in the reward the advantages follow from the rewards alone. They are computed
    first then, and rows that are spared are not even measured. Raises ValueError for advantages that are not finite,
    and for a correction that args ask for and the sampler makes impossible.
    """
    table = _Table.of(rows, args)
    if not all(row.logps is not None for row in rows):
        correction = "none"
    if args.off_policy in ("token", "sequence") and correction == "none":
        raise ValueError(f"off_policy={args.off_policy!r} needs a sampler that gives its own log-probs")
    measured_first = measure.critic is not None or kl_coef > 0
    by_policy = measured_first or args.steps_per_rollout > 1 or correction != "none"
    by_policy |= measure.reference is not None and args.kl_target is not None

    def rewarded(reward: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the advantages of these rewards, and the rows that are kept."""
        found = advantages(reward, table.valued, args.estimator, args.num_generations)
        return found, table.counted & (found != 0) if spare else table.counted

    advantage, kept = (None, table.counted) if measured_first else rewarded(table.reward)
    measured = measure(rows, table.valued & (table.lengths > 0) if measured_first else kept, by_policy=by_policy)
    metrics: dict[str, float] = {}
    kl = None
    if by_policy and measure.reference is not None:
        kl = torch.where(table.mask, k1(measured["old_logp"], measured["ref_token_logp"]), 0.0)  # (R, C)
        per_row = kl.sum(dim=1)[kept]
        metrics["objective/kl"] = float(per_row.mean()) if len(per_row) else math.nan
    columns: dict[str, Tensor] = {}
    if measure.critic is not None:
        gained = torch.zeros_like(table.mask, dtype=torch.float32) if kl is None else -kl_coef * kl
        advantage, returns, about = _by_critic(table, gained, measured["old_value"], args)
        columns |= {"old_value": measured["old_value"], "returns": returns}
        metrics |= about
    elif advantage is None:
        assert kl is not None
        advantage, kept = rewarded(table.reward - kl_coef * kl.sum(dim=1))
    if correction != "none":
        advantage, metrics["off_policy/weight"] = _corrected(
            advantage, rows, table.mask, kept, measured["old_logp"], correction, args.off_policy_cap
        )
    if not advantage.isfinite().all():
        known = table.reward[table.valued]
        raise ValueError(
            f"advantages of rollout {number} are not finite: rewards from {known.min():g} to {known.max():g}"
            f"{f', divergence {kl.sum(dim=1).max():g}' if kl is not None else ''}; give rewards of a smaller scale"
        )
    if "entropy" in measured:
        metrics["entropy"] = float(measured["entropy"][table.mask & kept[:, None]].mean())
    metrics["groups/dropped"] = 1 - float(kept.view(-1, args.num_generations).any(dim=1).float().mean())
    columns |= {"advantage": advantage, "prob_w": table.reward}
    columns |= {name: measured[name] for name in ("old_logp", "ref_token_logp") if name in measured}
    reads = {name for m in objective.methods for name in m.columns}
    reads |= {"old_value", "returns"} if measure.critic is not None else set()
    reads |= {"ref_token_logp"} if any(t.reads_reference for t in objective.terms) else set()
    if args.steps_per_rollout == 1:  # the policy is the one that sampled
        reads -= {"old_logp"}
    experience = Experience(
        [row.prompt_ids for row in rows],
        [row.ids for row in rows],
        table.counted,
        kept,
        {name: x.contiguous() for name, x in columns.items() if name in reads},
    )
    return experience, metrics


def _by_critic(
    table: _Table,
    gained: Tensor,  # (R, C) reward of each token beside the completion's own
    value: Tensor,  # (R, C)
    args: RLConfig,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Returns advantages and returns of every token by gae, (R, C) each, and metrics of the values."""
    tokens = table.mask & table.counted[:, None]
    gained[torch.arange(len(gained)), (table.lengths - 1).clamp(min=0)] += torch.where(table.valued, table.reward, 0.0)
    advantage, returns = gae(gained, value, tokens, args.gamma, args.lam)
    explained = 1 - _variance(returns - value, tokens) / _variance(returns, tokens)
    metrics = {"value/mean": float(value[tokens].mean()), "value/explained": float(explained)}
    if args.whiten_advantages:
        advantage = torch.where(tokens, whiten(advantage, tokens), 0.0)
    return advantage, returns, metrics


def _corrected(
    advantage: Tensor,  # (R,) or (R, C)
    rows: list[Completion],
    mask: Tensor,  # (R, C) bool
    kept: Tensor,  # (R,) bool
    old_logp: Tensor,  # (R, C)
    level: str,
    cap: float,
) -> tuple[Tensor, float]:
    """Returns the advantages times the importance weight, policy over sampler, truncated at cap; and the mean weight.

    level: "token", a weight per token, or "sequence", one per completion.
    """
    sampler = torch.zeros_like(old_logp)
    for i, row in enumerate(rows):
        sampler[i, : len(row.ids)] = torch.tensor(row.logps, dtype=torch.float32)
    tokens = mask & kept[:, None]
    log_w = torch.where(tokens, old_logp - sampler, 0.0)
    log_w = log_w if level == "token" else log_w.sum(dim=1)
    weight = log_w.exp().clamp(max=cap)
    mean = float(weight[tokens if level == "token" else kept].mean())
    if weight.dim() > advantage.dim():
        advantage = advantage[:, None]
    elif weight.dim() < advantage.dim():
        weight = weight[:, None]
    return advantage * weight, mean


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].var(correction=0)


def correction_level(args: RLConfig, objective: Objective, *, own_sampler: bool) -> str:
    """Returns at which level advantages are weighed by policy over sampler: none, token or sequence.

    own_sampler: the policy itself samples, whose log-probs need no correction.
    """
    if args.off_policy != "auto":
        return args.off_policy
    # The log-probs that servers report by default are those before the temperature.
    if own_sampler or args.temperature != 1 or not any("advantage" in m.columns for m in objective.methods):
        return "none"
    return "sequence" if any(m.unit == "row" for m in objective.methods) else "token"


def spares_rows(objective: Objective, *, other_losses: bool) -> bool:
    """Returns whether a row with advantage 0 has gradient 0, and leaving it out changes no other row's loss.

    other_losses: a critic or a pretraining text has a loss of its own in every step.
    """
    terms: Any = objective.terms
    return (
        not other_losses
        and all("advantage" in t.method.columns and t.method.denominator != "local_tokens" for t in terms)
        and not any(t.hyperparameters.get(x) for t in terms for x in ("beta", "entropy_coef"))
    )
