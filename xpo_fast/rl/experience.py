"""Makes an Experience of scored completions, which it measures and gives advantages, and cuts it into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import data
from ..data import pad_rows
from ..head import token_logps, token_stats
from ..layouts import LEAST_SAVED, LaysOut, side_by_side
from ..methods.advantages import advantages, gae, whiten
from ..methods.math import k1
from ..models import Head
from ..models.value_head import ValueHead
from ..objective import Objective
from ..rollout import score_tokens
from ..seeds import permutation
from ..trainer.budget import Size, cut
from ..types import IGNORE_INDEX
from .collect import Completion
from .config import RLConfig
from .mismatch import importance_weights, mismatch
from .reference import MovingReference

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Measure:
    """Measurement of completions by a run's models, in eval mode, without gradient, shared among the processes."""

    policy: Any
    critic: ValueHead | None
    reference: MovingReference | None
    accelerator: Accelerator
    args: RLConfig
    tile_bytes: int | None  # budget of the head's tile
    pad: int
    layout: str = "padded"  # in which the models read rows

    def __call__(self, rows: list[Completion], which: Tensor, *, by_policy: bool) -> dict[str, Tensor]:
        """Measures the rows `which` (R,) bool: (R, C) float32 on the CPU each, 0 for other rows and after a row's end.

        ref_token_logp if there is a reference; with by_policy also old_logp, entropy, and old_value if there is a
        critic. C is the longest completion of all rows. Every process must call it.
        """
        from accelerate.utils import gather_object

        mine = self._share(rows, which.nonzero()[:, 0].tolist())
        pairs = [(rows[i].prompt_ids, rows[i].ids) for i in mine]
        size: Any = {"batch_size": self.args.per_device_eval_batch_size, "pad": self.pad, "layout": self.layout}
        found: dict[str, Tensor] = {}
        with self.accelerator.autocast():
            if by_policy:
                names = ["old_logp", "entropy", *(("old_value",) if self.critic is not None else ())]
                found |= score_tokens(self.policy, pairs, names, self._by_policy, **size)
            if self.reference is not None:
                with self.reference.scoring() as model:
                    found |= score_tokens(model, pairs, ["ref_token_logp"], self._by_reference, **size)
        width = max(1, *(len(row.ids) for row in rows))
        measured = {name: torch.zeros(len(rows), width) for name in found}
        for at, values in gather_object([(mine, found)]):
            for name, x in values.items():
                measured[name][at, : x.shape[1]] = x
        return measured

    def _share(self, rows: list[Completion], numbers: list[int]) -> list[int]:
        """Returns those of the numbers of rows that this process measures."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if self.layout != "shared":
            return sorted(numbers, key=lambda i: len(rows[i].prompt_ids) + len(rows[i].ids))[rank::ranks]
        # Whole batches, so that a prompt's completions meet.
        order = [numbers[k] for k in side_by_side([(rows[i].prompt_ids, rows[i].ids) for i in numbers])]
        size = self.args.per_device_eval_batch_size
        return [i for start in range(rank * size, len(order), ranks * size) for i in order[start : start + size]]

    @property
    def _options(self) -> dict[str, Any]:
        return {"temperature": self.args.temperature, "tile_bytes": self.tile_bytes, "backend": self.args.backend}

    def _by_policy(self, hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
        stats = token_stats(hidden, head, targets, outputs=("entropy",), **self._options)
        assert stats.entropy is not None
        values = {} if self.critic is None else {"old_value": self.critic(hidden)[..., 0]}
        return {"old_logp": stats.logp, "entropy": stats.entropy, **values}

    def _by_reference(self, hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
        return {"ref_token_logp": token_logps(hidden, head, targets, **self._options)}


@dataclass
class Experience:
    """R completions with all that steps on them need, on the CPU; C is the length of the longest completion."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    counted: Tensor  # (R,) bool, whether the loss's mean divides by the row
    kept: Tensor  # (R,) bool, whether the row's gradient may differ from 0; only rows that are counted
    columns: dict[str, Tensor]  # (R,) or (R, C): advantage, old_logp, ref_token_logp, old_value, returns, …

    def row(self, i: int) -> tuple[list[int], list[int]]:
        """Returns the prompt ids and the completion ids of row i."""
        return self.prompt_ids[i], self.completion_ids[i]

    @property
    def lengths(self) -> Tensor:
        """(R,) int64, number of tokens of each completion."""
        return torch.tensor([len(ids) for ids in self.completion_ids])

    def targets(self, rows: Tensor) -> Tensor:
        """Returns (n, C), −100 after the end of a completion and 0 before, for `Objective.count_items`."""
        lengths = self.lengths
        at = torch.arange(int(lengths.max()))
        return torch.where(at < lengths[rows][:, None], 0, IGNORE_INDEX)


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
    names: Sequence[str] = (),
) -> tuple[Experience, dict[str, float]]:
    """Measures the completions of rollout `number`, groups side by side; returns them with advantages, and metrics.

    kl_coef: weight of the divergence from the reference that is subtracted from the rewards.
    correction: for which ratio of policy to sampler advantages are weighed, see `correction_level`; "none" if a
        completion comes without the sampler's log-probs.
    spare: leave rows whose advantage is 0 out of forward and backward, see `spares_rows`. names: of the reward
        functions, for errors.

    Without a critic and a divergence in the reward the advantages follow from the rewards alone. They are computed
    first then, and rows that are spared are not even measured. Raises ValueError for advantages that are not finite,
    and for a correction that args ask for and the sampler makes impossible.
    """
    reward = torch.tensor([row.reward for row in rows])  # (R,)
    lengths = torch.tensor([len(row.ids) for row in rows])
    mask = torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]  # (R, C)
    valued = ~reward.isnan()
    counted = valued & (lengths > 0)
    if args.overlong_handling == "mask":
        counted &= ~torch.tensor([row.truncated for row in rows])
    reported = not any(row.logps is None for row in rows)
    correction = correction if reported else "none"
    if args.off_policy in ("token", "sequence") and correction == "none":
        raise ValueError(f"off_policy={args.off_policy!r} needs a sampler that gives its own log-probs")
    measured_first = measure.critic is not None or kl_coef > 0
    by_policy = measured_first or args.steps_per_rollout > 1 or correction != "none"
    by_policy |= measure.reference is not None and args.kl_target is not None

    def rewarded(reward: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the advantages of these rewards, and the rows that are kept."""
        found = advantages(reward, valued, args.estimator, args.num_generations)
        return found, counted & (found != 0) if spare else counted

    advantage, kept = (None, counted) if measured_first else rewarded(reward)
    measured = measure(rows, valued & (lengths > 0) if measured_first else kept, by_policy=by_policy)
    metrics: dict[str, float] = {}
    kl = None
    if by_policy and measure.reference is not None:
        kl = torch.where(mask, k1(measured["old_logp"], measured["ref_token_logp"]), 0.0)  # (R, C)
        per_row = kl.sum(dim=1)[kept]
        metrics["objective/kl"] = float(per_row.mean()) if len(per_row) else math.nan
    columns: dict[str, Tensor] = {}
    if measure.critic is not None:
        gained = torch.zeros(mask.shape) if kl is None else -kl_coef * kl  # (R, C)
        gained[torch.arange(len(rows)), (lengths - 1).clamp(min=0)] += torch.where(valued, reward, 0.0)
        advantage, returns, about = _by_critic(gained, measured["old_value"], mask & counted[:, None], args)
        columns |= {"old_value": measured["old_value"], "returns": returns}
        metrics |= about
    elif advantage is None:
        assert kl is not None
        advantage, kept = rewarded(reward - kl_coef * kl.sum(dim=1))
    if reported and "old_logp" in measured:
        tokens, log_ratio = mask & kept[:, None], _log_ratio(rows, measured["old_logp"])
        metrics |= mismatch(log_ratio, tokens)
        if correction != "none":
            advantage, about = _corrected(advantage, log_ratio, tokens, correction, args)
            metrics |= about
    if not advantage.isfinite().all():
        raise ValueError(f"advantages of rollout {number} are not finite: {_blame(rows, measured, mask, names)}")
    if "entropy" in measured:
        metrics["entropy"] = float(measured["entropy"][mask & kept[:, None]].mean())
    metrics["groups/dropped"] = 1 - float(kept.view(-1, args.num_generations).any(dim=1).float().mean())
    columns |= {"advantage": advantage, "prob_w": reward}
    columns |= {name: measured[name] for name in ("old_logp", "ref_token_logp") if name in measured}
    reads = {name for m in objective.methods for name in m.columns}
    reads |= {"old_value", "returns"} if measure.critic is not None else set()
    reads |= {"ref_token_logp"} if any(t.reads_reference for t in objective.terms) else set()
    if args.steps_per_rollout == 1:  # the policy is the one that sampled
        reads -= {"old_logp"}
    columns = {name: x.contiguous() for name, x in columns.items() if name in reads}
    return Experience([row.prompt_ids for row in rows], [row.ids for row in rows], counted, kept, columns), metrics


def _blame(rows: list[Completion], measured: dict[str, Tensor], mask: Tensor, names: Sequence[str]) -> str:
    """Returns whose numbers make advantages infinite or NaN: a model's, by row, or else the reward functions'."""
    whose = {"old_logp": "the policy", "ref_token_logp": "the reference", "old_value": "the critic"}
    for name, model in whose.items():
        broken = (~measured[name].isfinite() & mask).any(dim=1) if name in measured else mask.new_zeros(0)
        if broken.any():
            row = rows[int(broken.nonzero()[0])]
            what = "values" if name == "old_value" else "log-probs"
            return f"{model} has {what} that are not, the first for {row.completion!r:.80} of {row.prompt!r:.80}"
    scores = torch.tensor([row.scores for row in rows]).nan_to_num(0.0).abs()  # (R, F)
    row, function = divmod(int(scores.argmax()), scores.shape[1])
    known = [row.reward for row in rows if not math.isnan(row.reward)]
    name = f"reward function {names[function]!r}" if names else "a reward function"
    return (
        f"rewards from {min(known):g} to {max(known):g}; {name} gave {rows[row].scores[function]:g} for "
        f"{rows[row].completion!r:.80} of {rows[row].prompt!r:.80}: give rewards of a smaller scale"
    )


def _by_critic(
    reward: Tensor,  # (R, C) of each token
    value: Tensor,  # (R, C)
    tokens: Tensor,  # (R, C) bool, those of rows that are counted
    args: RLConfig,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Returns advantages and returns of every token by gae, (R, C) each, and metrics of the values."""
    advantage, returns = gae(reward, value, tokens, args.gamma, args.lam)
    explained = 1 - (returns - value)[tokens].var(correction=0) / returns[tokens].var(correction=0)
    metrics = {"value/mean": float(value[tokens].mean()), "value/explained": float(explained)}
    if args.whiten_advantages:
        advantage = torch.where(tokens, whiten(advantage, tokens), 0.0)
    return advantage, returns, metrics


def _log_ratio(rows: list[Completion], old_logp: Tensor) -> Tensor:
    """Returns log π − log μ of every token, (R, C): the policy's log-prob minus the one that the sampler reported."""
    sampler = torch.zeros_like(old_logp)
    for i, row in enumerate(rows):
        sampler[i, : len(row.ids)] = torch.tensor(row.logps, dtype=torch.float32)
    return old_logp - sampler


def _corrected(
    advantage: Tensor,  # (R,) or (R, C)
    log_ratio: Tensor,  # (R, C)
    tokens: Tensor,  # (R, C) bool, those of rows that are kept
    level: str,
    args: RLConfig,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the advantages times the importance weights, policy over sampler; and the metrics of the weights.

    level: "token", a weight per token, or "sequence", one per completion.
    """
    lower, upper = args.off_policy_floor, args.off_policy_cap
    weight = importance_weights(log_ratio, tokens, level=level, mode=args.off_policy_mode, lower=lower, upper=upper)
    free = importance_weights(log_ratio, tokens, level=level)
    of = tokens if level == "token" else tokens.any(dim=1)
    outside = (free < lower) | (free > upper)
    metrics = {"off_policy/weight": float(weight[of].mean()), "off_policy/outside": float(outside[of].float().mean())}
    if weight.dim() > advantage.dim():
        advantage = advantage[:, None]
    elif weight.dim() < advantage.dim():
        weight = weight[:, None]
    return advantage * weight, metrics


def correction_level(args: RLConfig, objective: Objective, *, own_sampler: bool, as_drawn: bool = False) -> str:
    """Returns at which level advantages are weighed by policy over sampler: none, token or sequence.

    own_sampler: the policy itself samples, whose log-probs need no correction. as_drawn: the sampler's log-probs are
    those at the temperature; those that servers report by default are not.
    """
    if args.off_policy != "auto":
        return args.off_policy
    if (
        own_sampler
        or (args.temperature != 1 and not as_drawn)
        or not any("advantage" in m.columns for m in objective.methods)
    ):
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


def cuts_freely(objective: Objective) -> bool:
    """Returns whether a step's losses and gradients are the same however its rows are cut into micro-batches."""
    return not any(
        m.denominator == "local_tokens" or m.unit == "batch" or "ptx_logp" in m.columns for m in objective.methods
    )


@dataclass
class Batches:
    """Maker of a step's micro-batches."""

    args: RLConfig
    objective: Objective
    accelerator: Accelerator
    pad: int
    texts: list[list[int]]  # token ids of pretraining texts; none for a method that mixes in none
    layout: str = "padded"  # in which the policy reads rows
    router: float = 0.0  # the coefficient of the router's loss, which counts the last token, too, that predicts nothing

    @property
    def other_losses(self) -> bool:
        """Whether rows have a loss beside that of the objective: of texts, or of a router."""
        return bool(self.texts) or self.router > 0

    def first(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[dict[str, Tensor]]:
        """Returns the micro-batches of the first step on rows (prompt ids, completion ids), padded, without texts.

        They are cut as for the layout "shared". With several processes they are those of all.
        """
        step = permutation(len(rows), self.args.seed, "order", 1, 0).chunk(self.args.minibatches)[0]
        if cuts_freely(self.objective):
            step = step[side_by_side([rows[i] for i in step.tolist()])]
        micro = step.split(self.args.per_device_train_batch_size)
        return [pad_rows([rows[i] for i in of.tolist()], self.pad) for of in micro]

    def step(self, experience: Experience, step: int, *, spare: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Returns this process's micro-batches of a step of the run, and the denominators of their losses, () each.

        spare: rows with gradient 0 are left out of the batches; the denominators count them. Beside the denominators
        stands "batches", the number of micro-batches of all processes.
        """
        args, ranks = self.args, self.accelerator.num_processes
        rollout, at = divmod(step, args.steps_per_rollout)
        epoch, part = divmod(at, args.minibatches)
        order = permutation(len(experience.kept), args.seed, "order", rollout + 1, epoch)
        rows = order.chunk(args.minibatches)[part]
        kept = rows[experience.kept[rows]]
        if self.layout == "shared" and cuts_freely(self.objective):
            kept = kept[side_by_side([experience.row(i) for i in kept.tolist()])]
        elif spare:  # then it does not matter which rows share a batch: those of similar length do, for less padding
            sizes = [sum(map(len, experience.row(i))) for i in kept.tolist()]
            kept = kept[torch.tensor(sizes, dtype=torch.int64).argsort(stable=True)]
        size, micro = args.per_device_train_batch_size, self.cut(experience, kept)
        spared = rows[experience.counted[rows] & ~experience.kept[rows]]
        counts = [self.objective.count_items(experience.targets(of)) for of in (*micro, spared) if len(of)]
        none = self.objective.count_items(torch.full((1, 1), IGNORE_INDEX))
        items = {
            "policy": torch.stack([none, *counts]).sum(dim=0).clamp(min=1),
            "tokens": experience.lengths[rows[experience.counted[rows]]].sum().clamp(min=1),
        }
        per_step = args.gradient_accumulation_steps * ranks
        if args.tokens_per_batch is not None:
            per_step = max(-(-len(micro) // ranks), 1) * ranks
        items["batches"] = torch.tensor(per_step)
        mine = range(self.accelerator.process_index, per_step, ranks)
        batches = [
            self.batch(experience, micro[k] if k < len(micro) else None, (step * per_step + k) * size) for k in mine
        ]
        return batches, {name: x.to(args.device) for name, x in items.items()}

    def cut(self, experience: Experience, kept: Tensor) -> list[Tensor]:
        """Returns the rows (n,) of a step in micro-batches, each of as many rows, or by the budget of tokens."""
        budget = self.args.tokens_per_batch
        if budget is None:
            return list(kept.split(self.args.per_device_train_batch_size)) if len(kept) else []
        rows = [experience.row(i) for i in kept.tolist()]
        if self.layout != "shared":
            lengths = [len(prompt) + len(ids) - 1 for prompt, ids in rows]
            sizes = [[Size(1, n, n if self.layout == "packed" else None)] for n in lengths]
            return [kept[torch.tensor(part)] for part in cut(sizes, budget)]
        ends, total = [], 0  # as they stand: those of a prompt side by side
        for k, (prompt, ids) in enumerate(rows):
            takes = len(prompt) + len(ids) - 1
            shares = k > 0 and rows[k - 1][0] == prompt and len(prompt) >= LEAST_SAVED
            total += len(ids) - 1 if shares else takes
            if k > 0 and total > budget:
                ends.append(k)
                total = takes
        return list(kept.tensor_split(ends)) if rows else []

    def batch(self, experience: Experience, rows: Tensor | None, first_text: int) -> dict[str, Any]:
        """Returns rows (n,) as a batch in the layout, with pretraining texts from number `first_text` on.

        rows None: a single token without a target, from which nothing is learned; other processes wait for this one.
        """
        chosen = torch.zeros(1, dtype=torch.int64) if rows is None else rows
        pairs = [experience.row(i) for i in chosen.tolist()]
        texts = []
        if rows is None:
            pairs = [(pairs[0][0][:1], pairs[0][1][:1] or pairs[0][0][:1])]
        elif self.texts:
            size = self.args.per_device_train_batch_size
            texts = [self.texts[(first_text + k) % len(self.texts)] for k in range(size)]
        collate = LaysOut(lambda of: pad_rows(of, self.pad, last=self.router > 0), self.layout)
        batch = collate([*pairs, *((ids[:1], ids[1:]) for ids in texts)])
        targets = batch["targets"]
        batch["targets"] = targets[: len(pairs)]
        if self.texts:
            batch["ptx_targets"] = targets[len(pairs) :]
        if rows is None:
            batch["targets"] = torch.full_like(batch["targets"], IGNORE_INDEX)
        for name, x in experience.columns.items():
            x = x[chosen]
            if x.dim() == 2:
                placed = torch.zeros(batch["targets"].shape, dtype=x.dtype)
                for k, (prompt, ids) in enumerate(pairs):
                    placed[k, len(prompt) - 1 : len(prompt) - 1 + len(ids)] = x[k, : len(ids)]
                x = placed
            batch[name] = x
        return batch


def pretraining_texts(dataset: Any, objective: Objective, tokenizer: Any, longest: int) -> list[list[int]]:
    """Returns the token ids of the texts that ppo_ptx mixes in, cut at `longest` tokens; none for other methods.

    dataset: strings, or rows with `text`, as `data.read` takes them. Texts of fewer than two tokens are left out.
    Raises ValueError where the method mixes in text and there is none, or the other way round.
    """
    wanted = any("ptx_logp" in m.columns for m in objective.methods)
    if wanted != (dataset is not None):
        raise ValueError(
            f"{objective} mixes in pretraining text: pass ptx_dataset=, strings or rows with a text"
            if wanted
            else f"ptx_dataset= is for ppo_ptx, {objective} mixes in no text"
        )
    if not wanted:
        return []
    rows = dataset if isinstance(dataset, list) else [row for _, row in data.read(dataset, "train")]
    texts = [row if isinstance(row, str) else row.get("text") for row in rows]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("ptx_dataset: expected strings, or rows with a text, and at least one")
    ids = [ids[:longest] for ids in tokenizer(texts, verbose=False)["input_ids"] if len(ids) > 1]
    if not ids:
        raise ValueError("ptx_dataset: no text has two tokens or more")
    return ids
