"""The objective: composes head, batch, methods and reduction into a loss with metrics; it defines no loss itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..device import on_host, to_device
from ..head import RowShard, VocabShard
from ..head.backends import get_backend
from ..head.choice import named_backend
from ..head.operands import HeadLike, Operands, reference, take_operands
from ..head.plan import Plan, plan_of
from ..head.spec import OF_REFERENCE, Scaling, accumulation_dtype
from ..head.statistics import statistics
from ..head.units import unit_loss
from ..methods.distillation import topk_divergence
from ..methods.vocabulary import wpo_weights
from ..types import LossOutput, TokenStats
from .batch import Batch
from .columns import check_columns
from .evaluation import Evaluation
from .known import Known
from .launches import Launches
from .reference import add_reference
from .settings import Settings
from .split_rows import RowInputs, meet, plan_of_chunk

_IGNORED_BY_PLAN = {"denominator", "grad_scale", "ref_logps", "ref_token_logp", "topk_logp"}


class Objective(Settings):
    """A method, or a weighted sum of methods, applied through the head.

        objective = Objective("simpo", beta=2.0, gamma=1.0)
        out = objective(hidden, weight, targets)
        out.loss.backward()

    method: a name of METHODS; a sum of them, "dpo + 0.5*sft"; or a list of names, each of which may be paired with
        hyperparameters of its own, [("dpo", {"beta": 0.2}), "sft"], with `weights`. All must have one layout.
    weights: one factor per method, unless the sum names them.
    reduction: "mean" over the items of the method (units; tokens, rows or a fixed length: Method.denominator), "sum" or
        "none".
    pairs: for a pairwise method on lists of K scored completions: "all" pairs of a list, whose mean is its loss, or
        "extremes", its best against its worst.
    ld_alpha: in [0, 1], multiplies the log-probs, the policy's and the reference's, of a pair's tokens beyond the
        length of its shorter completion (LD-DPO, arXiv 2409.06411).
    wpo: multiplies each loss by w_w·w_l, w the exponential of the mean over tokens of log p − log Σp², detached (WPO,
        arXiv 2406.11827). clamp: whether the factor is at most 1, as in its authors' code.
    fixed_length: the number of tokens per row that `dr_grpo` divides by, the length of the longest completion that may
        be sampled. Pass it: the default, the width of the batch, changes with the rows in it.
    top_k, seed: `cringe` draws its rival tokens from the top_k most likely ones, by a generator with this seed.
    tile_bytes: the budget of the tile of logits; by default 256 MiB on the CPU and 7% of a GPU's memory.
    invariant: log-probs, and their sums over rows, have the same bits whatever else is in the batch: see `token_stats`.
        So has the loss of a unit that reads such sums alone, as those of pairs do (reduction="none"), but no mean over
        the batch. Methods that average over the tokens of a row themselves add up as many as the longest row has.
    Further keyword arguments are hyperparameters, passed to every method that has them.

    `state` holds the statistics of earlier batches that `beta_dpo` and `bco` keep, see `state_dict`. It is updated in
    calls with gradient, from the rows of all ranks. KTO's reference point is read from it where `kl` is not passed; the
    caller that estimates the point writes it there.

    Raises ValueError for an unknown method, hyperparameter, reduction or backend.
    """

    def __call__(
        self,
        hidden: Tensor,  # (R, T, D), or (N, D) packed
        weight: Tensor | HeadLike,  # (V, D), or a Head
        targets: Tensor,  # (R, T), or (N,) packed; aligned
        *,
        cu_seqlens: Tensor | None = None,  # (R + 1,) offsets of packed rows
        bias: Tensor | None = None,  # (V,)
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        ref_hidden: Tensor | None = None,  # shaped as hidden, width Dr
        ref_weight: Tensor | HeadLike | None = None,  # (V, Dr), or a Head; by default the policy's; needed with adapter
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (R,) summed log-probs of the rows under the reference; or shaped as targets
        topk_ids: Tensor | None = None,  # targets' shape and K: a teacher's likeliest tokens, for topk_kl
        topk_logp: Tensor | None = None,  # the same shape: the teacher's log-probs of these, −∞ for absent ones
        list_size: int | None = None,
        denominator: float | Tensor | None = None,
        weight_grad: Tensor | None = None,  # (V, D) float32
        grad_scale: float = 1.0,
        adapter: Tensor | None = None,  # (V, r)
        vocab_shard: VocabShard | None = None,
        row_shard: RowShard | None = None,
        **columns: Tensor,
    ) -> LossOutput:
        """Computes the loss, differentiable in hidden, weight and bias, and detached metrics.

        Rows: pairwise methods take R = 2P rows, the P chosen ones and then the P rejected ones. Listwise methods take
        the K rows of a prompt side by side (K is `list_size`, or the width of `scores`), with empty rows where a list
        is shorter; for `nn` the last row of a list is the rejected completion. A unit of other methods is one row.
        The reference is `ref_hidden` (with `ref_weight`, or the policy's head), or `ref_logps`, one number per row, or
        shaped as targets for methods that compare tokens. Methods without a reference ignore both.
        denominator: divides the sum of losses: the items (`count_items`) of a whole optimizer step over micro-batches
        and ranks; by default the items of this call. columns: the method's other inputs by name, with one entry per
        unit, one number, or shaped as targets for inputs by token.

        weight_grad: as in `token_stats`. If the gradients are computed in this call (3F), dW · grad_scale is added to
        it in this call. grad_scale: the number that will multiply the loss before the backward, which checks it.

        adapter: as in `token_stats`; hidden is then (…, D + r), and ref_hidden needs ref_weight, and ref_bias.
        A weight that is a DTensor, or in parts by ZeRO-3, is gathered once per call, for policy and reference together.
        vocab_shard: as in `token_stats`. The loss is then the same on every rank of the shard's group; for `beta_dpo`
        only if the ranks have the same random seed, since it draws. `cringe` reads single logits, and refuses it.

        row_shard: each rank of its group has a consecutive chunk, of any width w, of every row (sequence and context
        parallelism): hidden (R, w, D) and targets (R, w); or packed (n, D) and (n,), with cu_seqlens of whole rows.
        ref_hidden and inputs by token are chunks, too; all other inputs are of whole rows and the same on every rank.
        Targets at the seams are the next rank's tokens: shift labels before they are cut, or by
        `shift_labels(labels, row_shard=...)`. Loss, metrics and state are those of whole rows, equal on every rank, for
        `beta_dpo` only if the ranks have the same random seed. The gradient of hidden is that of this rank's chunk;
        those of weight, bias and adapter (and what is added to weight_grad) are this rank's parts, to be summed over
        the group: where an engine averages them over the ranks (DDP, FSDP2, DeepSpeed), multiply the loss by
        row_shard.world. The head costs 4F, since no rank has a whole unit while a tile is live. `cringe`, columns that
        learn, torch.compile and CUDA graphs raise ValueError; vocab_shard must be over ranks with the same chunk.

        The host waits for a device once, at the start, to read which positions are scored; not at all if targets and
        cu_seqlens are on the CPU, where columns and the reference's log-probs may then be, too. A call that is captured
        into a CUDA graph takes targets on the device and cu_seqlens on the CPU (row lengths are fixed in the graph),
        scores every position, and returns the same. Methods with a state, or whose losses depend on the whole batch,
        raise ValueError.

        A unit does not count if one of its rows has no scored token (a list, or a row of a policy method: if it has
        none at all). Its loss is 0, and it is not among the items. If no unit counts the loss is 0, with a graph. For
        the cost of a call see `plan`.

        Raises ValueError for operands, rows or columns that do not fit, a missing reference or column, an unknown
        column, and (on the CPU) a target outside the vocabulary or a column's number out of range; on a device these
        two trip a device-side assertion.
        """
        operands = Operands(
            hidden,
            weight,
            targets,
            bias,
            adapter,
            reference(ref_hidden, ref_weight, ref_bias) if self.reads_reference else None,
            weight_grad,
            vocab_shard,
            Scaling(float(temperature), softcap, float(logit_scale)),
            ignore_index,
            self._checked_topk(topk_ids, topk_logp, targets, row_shard),
        )
        ref_tokens = columns.pop("ref_token_logp", None)
        shape, split, stats, ref_logp = targets.shape, None, None, None
        if row_shard is None:
            operands = operands.admit()
        else:
            given = RowInputs(targets, cu_seqlens, columns, ref_logps, ref_tokens, denominator)
            operands, given, split = meet(row_shard, self, operands, given, (list_size,))
            targets, columns, ref_logps, ref_tokens = given.targets, given.columns, given.ref_logps, given.ref_tokens
        batch = self._batch(targets, cu_seqlens, ignore_index, list_size, columns, operands.hidden.device)
        known = Known(check_columns(batch, columns, self.supplied()))
        known.rows["len"] = (batch.lengths, 1.0)
        operands = dataclasses.replace(
            operands.flat(), targets=batch.targets if split is None else split.own(batch.targets)
        )
        if self.draws_rivals:
            _refuse_for_rivals(batch.name, operands)
        if split is not None:
            stats, ref_logp = split.statistics(operands, batch, self, reference=operands.ref is not None)
        add_reference(known, batch, self, operands, ref_logps, ref_tokens, ref_logp)
        if self.draws_rivals:
            self.rivals.add(known, batch, operands)
        evaluation = Evaluation(self, batch, known, self.state, self._denominator(denominator, batch))
        if split is None and self._evaluates_live(operands):
            out, logp = self._live(evaluation, operands, grad_scale)
        else:
            stats = statistics(operands, self.outputs(), self.plan_options) if stats is None else stats
            logp = self._add_statistics(known, batch, stats, topk_logp)
            with contextlib.nullcontext() if split is None else split.counted_once():
                self._update_state(evaluation, logp)
                out = (self._launches(evaluation, operands) or evaluation).output(logp)
        for term in self.terms:
            if term.method.token_reward and "ref_token_logp" in known.tokens:
                reward = term.hyperparameters["beta"] * (logp.detach() - known.tokens["ref_token_logp"])
                reward = torch.where(batch.scored, reward, 0.0)
                out.token_reward = (reward if split is None else split.own(reward)).view(shape)
        return out

    def _live(self, evaluation: Evaluation, operands: Operands, grad_scale: float) -> tuple[LossOutput, Tensor]:
        """Returns the output, and the log-probs (N,); gradients are computed while each unit's tile is live: 3F."""
        batch, known = evaluation.batch, evaluation.known
        if known.columns and on_host(operands.hidden):
            evaluation.check()
        evaluate = self._launches(evaluation, operands) or evaluation
        plan = self._head_plan(operands, batch)
        operands = dataclasses.replace(operands, targets=batch.device_targets, ref=None)
        groups = batch.groups(plan.tile_tokens, operands.vocab, by_token=self.by_token)
        outputs: list[LossOutput] = []

        def total(logp: Tensor) -> Tensor:
            outputs.append(evaluate.output(logp))
            return outputs[0].loss

        loss, logp = unit_loss(operands, groups, plan, evaluate.coefficients, total, grad_scale)
        if known.learns:
            loss = loss + evaluation.own_gradient(logp)
        return dataclasses.replace(outputs[0], loss=loss), logp

    def _checked_topk(
        self, ids: Tensor | None, logp: Tensor | None, targets: Tensor, row_shard: RowShard | None
    ) -> Tensor | None:
        """Returns the ids of a teacher's likeliest tokens. Raises ValueError where they are missing or do not fit."""
        given = [name for name, x in (("topk_ids", ids), ("topk_logp", logp)) if x is not None]
        if not self.reads_topk:
            if given:
                raise ValueError(f"{given[0]}= is for topk_kl, {self} reads none: leave it out")
            return None
        if ids is None or logp is None:
            raise ValueError("topk_kl compares a teacher's likeliest tokens: pass topk_ids= and topk_logp=")
        if ids.shape[:-1] != targets.shape or logp.shape != ids.shape:
            raise ValueError(
                f"topk_ids and topk_logp must be {(*targets.shape, 'K')}, got {tuple(ids.shape)} and "
                f"{tuple(logp.shape)}"
            )
        if row_shard is not None:
            raise ValueError("topk_kl does not know rows that are cut over ranks: leave out row_shard=")
        return ids

    def _add_statistics(self, known: Known, batch: Batch, stats: TokenStats, topk_logp: Tensor | None = None) -> Tensor:
        """Returns the policy's log-probs (N,), and adds the other statistics that the methods need to `known`."""
        if stats.selected_logp is not None and topk_logp is not None:
            own = stats.selected_logp.view(batch.rows.shape[0], -1)
            theirs = to_device(topk_logp.detach(), own.device).to(own.dtype).view(own.shape)
            # The mask comes before the arithmetic: outside it there may be NaN, and 0·NaN would make the gradient NaN.
            own, theirs = (torch.where(batch.scored.unsqueeze(1), x, 0.0) for x in (own, theirs))
            found = torch.where(batch.scored, topk_divergence(own, theirs), 0.0)
            known.rows["topk_kl"] = (batch.row_sums(found), 0.0)
        for name in OF_REFERENCE:
            if (found := getattr(stats, name)) is not None:
                known.rows[name] = (batch.row_sums(found), 0.0)
        if stats.entropy is not None:
            known.tokens["entropy"] = stats.entropy
        if stats.log_sum_sq_probs is not None:
            logp = batch.row_sums(stats.logp.detach())
            squares = batch.row_sums(stats.log_sum_sq_probs)
            known.row_weight = wpo_weights(logp, squares, batch.lengths, clamp=False)
        return stats.logp

    def _launches(self, evaluation: Evaluation, operands: Operands) -> Launches | None:
        """Returns the segment kernels of this call, or None if it needs the pure functions, as modifiers do."""
        batch = evaluation.batch
        backend = named_backend(self.backend, batch.device, sharded=operands.shard is not None)
        modified = self.pairs or self.wpo or self.ld_alpha is not None
        if modified or backend == "auto" or not get_backend(backend).loss_kernels:
            return None
        denominators = [evaluation.denominator_of(k) for k in range(len(self.terms))]
        options = self.reduction, self.fixed_length, accumulation_dtype(operands.weight.dtype)
        return Launches.of(self.terms, batch, evaluation.known, self.state, denominators, *options)

    def _batch(
        self,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        ignore_index: int,
        list_size: int | None,
        columns: Mapping[str, Any],
        device: torch.device | None,
    ) -> Batch:
        """Returns the layout of a call; without a device, for counts only."""
        scores = columns.get("scores")
        if list_size is None and isinstance(scores, Tensor) and scores.dim() == 2:
            list_size = scores.shape[1] + self.has_rejected
        options: dict[str, Any] = {"device": device, "pairs": self.pairs, "list_size": list_size}
        options["exact_sums"] = self.invariant
        batch = Batch(self.methods, targets, cu_seqlens, ignore_index, **options)
        if self.pairs and isinstance(scores, Tensor):
            batch.choose_pairs(scores)
        return batch

    def _denominator(self, given: float | Tensor | None, batch: Batch) -> float | Tensor:
        """Returns the caller's denominator on the call's device, or the items of the batch if there is none."""
        if given is None:
            given = self._items(batch)
        elif isinstance(given, Tensor) and given.dim() and given.shape != (len(self.terms),):
            raise ValueError(
                f"denominator must be () or ({len(self.terms)},), one entry per method, got {tuple(given.shape)}"
            )
        return to_device(given, batch.device) if isinstance(given, Tensor) else given

    def _update_state(self, evaluation: Evaluation, logp: Tensor) -> None:
        """Updates the methods' state by the batch; without gradient, estimates a missing state for this call only."""
        batch, known = evaluation.batch, evaluation.known
        for term in self.terms:
            own = {n for n in term.method.columns if term.method.axes(n) == ("",)}
            if term.method.state is None or own <= set(known.columns):
                continue
            learns = torch.is_grad_enabled()
            if learns or not own <= set(self.state):
                with torch.no_grad():
                    inputs = evaluation.inputs(term, logp.detach())
                    before = {n: to_device(x, batch.device) for n, x in self.state.items()}
                    remembered = term.method.state(before, inputs, batch.counted, **term.hyperparameters)
                if learns:
                    self.state.update(remembered)
                else:
                    known.columns.update({n: remembered[n] for n in own})

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the methods' statistics of earlier batches, equal on all ranks, and the state of the generator."""
        state = {name: x.detach().clone() for name, x in self.state.items()}
        return state if self.rivals.state is None else {**state, "draws": self.rivals.state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a `state_dict`."""
        self.state = {name: x.detach().clone() for name, x in state.items() if name != "draws"}
        self.rivals.state = state.get("draws")

    def _items(self, batch: Batch) -> Tensor:
        """Returns the items of a batch, see `count_items`."""
        items = [batch.items(m) for m in self.methods]
        return items[0] if len(items) == 1 else torch.stack(items)

    def count_items(
        self,
        targets: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        ignore_index: int = -100,
        list_size: int | None = None,
    ) -> Tensor:
        """Counts the items of a batch that `denominator` sums up, see Method.denominator.

        Returns int64 on the targets' device: (), or one entry per method of a sum.
        """
        return self._items(self._batch(targets, cu_seqlens, ignore_index, list_size, {}, None))

    def plan(self, hidden: Tensor, weight: Tensor | HeadLike, targets: Tensor, **call: Any) -> Plan:
        """Returns how a call with these arguments will run: backend, tile and passes, which print(plan) describes."""
        selected = call.pop("topk_ids", None)
        operands = dataclasses.replace(take_operands(hidden, weight, targets, call), selected=selected)
        if not self.reads_reference:
            operands = dataclasses.replace(operands, ref=None)
        operands = operands.admit(gather=False)
        cu_seqlens, list_size, row_shard = (call.pop(name, None) for name in ("cu_seqlens", "list_size", "row_shard"))
        columns = {n for m in self.methods for n in m.columns} | ({"scores"} if self.pairs else set())
        unknown = sorted(set(call) - _IGNORED_BY_PLAN - columns)
        if unknown:
            raise ValueError(f"{', '.join(m.name for m in self.methods)}: unknown {', '.join(unknown)}")
        if row_shard is not None:
            return plan_of_chunk(self, operands, targets, row_shard)
        ignore_index = operands.ignore_index
        batch = self._batch(targets, cu_seqlens, ignore_index, list_size, call, operands.hidden.device)
        plan = self._head_plan(operands, batch)
        passes, why = plan.passes, plan.why
        tokens = int((batch.targets != ignore_index).sum())
        if self._evaluates_live(operands):
            groups = batch.groups(plan.tile_tokens, operands.vocab, by_token=self.by_token)
            sizes = [len(group.positions) for group in groups]
            again = sum(max(n - plan.tile_tokens, 0) for n in sizes)
            passes = passes - 1 + (again / tokens if tokens else 0)
            why = f"the loss of whole {self.method.unit}s is evaluated while their tile is live"
            why += "" if operands.shard is None else operands.shard.why
            why += f"; {plan.reason}" if plan.reason else ""
            if again:
                why += f"; units longer than a tile make {again} tokens' logits again"
        if operands.ref is not None:
            passes, why = passes + 1, why + "; 1F of it for the reference"
        if self.draws_rivals:
            rejected = int((batch.rejected_targets != ignore_index).sum())
            passes += rejected / tokens if tokens else 0
            why += f"; {rejected} rejected tokens' logits once more, for their likeliest rivals"
        return dataclasses.replace(plan, tokens=tokens, passes=passes, why=why)

    def _head_plan(self, operands: Operands, batch: Batch) -> Plan:
        """Returns the plan of the policy's pass over the head."""
        live = self._evaluates_live(operands)
        outputs = () if live else self.outputs()
        return plan_of(operands, outputs, self.plan_options, batch.longest_unit if live else 0)

    def _evaluates_live(self, operands: Operands) -> bool:
        """Returns whether the gradients are computed in the forward, unit by unit, at 3F."""
        backend = named_backend(self.backend, operands.hidden.device, sharded=operands.shard is not None)
        return (
            torch.is_grad_enabled()
            and operands.trainable
            and self.reduction != "none"
            and all(m.unit != "batch" for m in self.methods)
            and not (self.outputs() or self.reads_topk)
            and (backend == "auto" or get_backend(backend).rows is not None)
            and not torch.compiler.is_compiling()
        )


def _refuse_for_rivals(name: str, operands: Operands) -> None:
    """Raises ValueError for operands whose single logits cannot be computed."""
    if operands.shard is not None:
        raise ValueError(
            f"{name} reads single logits, which no rank has all of: gather the head, and leave out vocab_shard"
        )
    if operands.adapter is not None:
        raise ValueError(f"{name} reads single logits, of a weight alone: merge the adapter first")
    if operands.weight_grad is not None:
        raise ValueError(f"{name}: single logits have gradients of their own: leave out weight_grad")
