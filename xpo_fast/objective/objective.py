"""Objective: hidden states and a head in, the loss and metrics of a method out. It composes the arrows, owns no loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import on_host, to_device
from ..head import VocabShard, check_reference_head, head_plan, token_logps, token_stats
from ..head.plan import Plan, named_backend
from ..head.rows import Group, sum_rows
from ..head.sharded import refuse_sharded, unpartitioned, whole
from ..head.spec import Scaling, accumulation_dtype, cast_for_autocast, check_operands
from ..head.units import UnitLoss
from ..methods import Method
from ..methods.math import unchecked
from ..methods.vocabulary import wpo_weights
from ..reduce import REDUCTIONS, count_metrics, mean_metrics, reduce_losses
from ..types import LossOutput
from .batch import PAIRS, Batch, Known
from .launches import Launches
from .rivals import Rivals
from .terms import Term, parse_terms

_OF_NO_MATTER_TO_THE_PLAN = {
    "temperature", "softcap", "logit_scale", "ref_weight", "ref_bias", "denominator", "grad_scale",
}  # fmt: skip


class Objective:
    """A method, or a weighted sum of methods, through the head.

        objective = Objective("simpo", beta=2.0, gamma=1.0)
        out = objective(hidden, weight, targets)
        out.loss.backward()

    method: a name of METHODS; a sum of them, "dpo + 0.5*sft"; or a list of names, of which each may come with
        hyperparameters of its own, [("dpo", {"beta": 0.2}), "sft"], and with `weights`. All of one layout.
    reduction: "mean" over what the method's mean is over (units; tokens, rows or a fixed length: Method.denominator),
        "sum" or "none".
    pairs: with a pairwise method and lists of K scored completions: "all" pairs of a list, whose mean is its loss, or
        the "extremes", its best against its worst.
    ld_alpha: in [0, 1], multiplies the log-probs, policy's and reference's, of a pair's tokens beyond the length of its
        shorter completion (LD-DPO, arXiv 2409.06411).
    wpo: multiplies each loss by w_w·w_l, w the exponential of the mean over tokens of log p − log Σp², detached (WPO,
        arXiv 2406.11827); clamp: by at most 1, as its authors do.
    fixed_length: the tokens of a row that `dr_grpo` divides by, the longest completion that may be sampled. Give it: if not
        given it is the width of the batch, which changes with the rows that are in it.
    top_k, seed: of the rival tokens that `cringe` draws.
    tile_bytes: the budget of the tile of logits; if not given, 256 MiB on the CPU and 7% of a GPU's memory.
    Further keyword arguments are hyperparameters; among several methods, of all that have them.

    What `beta_dpo` and `bco` remember of earlier batches is in `state`, see `state_dict`; it changes in calls with
    gradient, by the rows of all ranks. KTO's reference point is read from there where `kl` is not given: who estimates it
    puts it there.

    Raises ValueError for an unknown method, hyperparameter, reduction or backend.
    """

    def __init__(
        self,
        method: str | Sequence[str | tuple[str, Mapping[str, Any]]],
        *,
        weights: Sequence[float] | None = None,
        reduction: str = "mean",
        pairs: str | None = None,
        ld_alpha: float | None = None,
        wpo: bool = False,
        clamp: bool = True,
        fixed_length: int | None = None,
        top_k: int = 5,
        seed: int | None = None,
        backend: str = "auto",
        tile_bytes: int | None = None,
        **hyperparameters: Any,
    ) -> None:
        self.terms = parse_terms(method, weights, hyperparameters)
        self.methods = [term.method for term in self.terms]
        if reduction not in REDUCTIONS:
            raise ValueError(f"no reduction named {reduction!r}; there are {', '.join(REDUCTIONS)}")
        named_backend(backend)
        self.reduction, self.backend, self.tile_bytes = reduction, backend, tile_bytes
        self.pairs, self.ld_alpha, self.wpo, self.clamp = pairs, ld_alpha, wpo, clamp
        self.fixed_length = fixed_length
        self._rivals = Rivals(top_k, seed, tile_bytes)
        self.state: dict[str, Tensor] = {}
        self._check_modifiers()

    @property
    def method(self) -> Method:
        """The first method."""
        return self.methods[0]

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """The first method's."""
        return self.terms[0].hyperparameters

    @property
    def layout(self) -> str:
        """How the rows of a call are laid out, see `Method.layout`."""
        return "listwise" if self.pairs else self.method.layout

    @property
    def needs_reference(self) -> bool:
        return any(term.method.reads_reference(term.hyperparameters) for term in self.terms)

    @property
    def needs_reference_tokens(self) -> bool:
        """Whether the reference must be known token by token, not as a sum over each row."""
        by_token = self.layout == "policy" or self.ld_alpha is not None or self.needs_reference_hidden
        return self.needs_reference and by_token

    @property
    def needs_reference_hidden(self) -> bool:
        """Whether the reference's hidden states are needed: for divergences over the vocabulary."""
        return "kl" in self._outputs()

    @property
    def has_rejected(self) -> bool:
        """Whether a rejected completion follows those of each list (`nn`)."""
        return any("logp_l" in m.inputs for m in self.methods if m.layout == "listwise")

    @property
    def _draws_rivals(self) -> bool:
        return any("pos_score" in m.inputs for m in self.methods)

    @property
    def data_kind(self) -> str:
        """The data that it learns from, by `data.load`'s names; ValueError if that must be made while training."""
        if self.layout in ("policy", "reward"):
            raise ValueError(
                f"{self.method.name} learns from completions sampled and scored while it trains, not from a data set: "
                "call xpo_fast.Objective in such a loop"
            )
        if self.layout != "pairwise":
            return {"listwise": "list"}.get(self.layout, self.layout)
        sides = {side for m in self.methods for side in m.sides}
        return "chosen" if sides == {"_w"} else "rejected" if sides == {"_l"} else "pair"

    def rehearse(self, columns: Mapping[str, Tensor | None] | None = None) -> None:
        """Try the methods on made-up log-probs: ValueError for a hyperparameter or a number out of range.

        columns: the columns that there will be, with the numbers of some units or None; made up, too, if not given.
            ValueError for a method that cannot do without another.
        """
        given = {name: x for name, x in (columns or {}).items() if x is not None and x.dim()}
        sizes = {"U": 1, "K": 2, "T": 1, "I": 1}
        for x in given.values():
            sizes |= dict(zip("UK", x.shape, strict=False))
        for term in self.terms:
            method = term.method
            known = self._supplied() | ({"score_w", "score_l"} if self.pairs else set()) | set(columns or {})
            inputs = {
                name: given[name] if name in given and not self.pairs else made_up(name, method.axes(name)[0], sizes)
                for name in method.inputs
                if method.wants(name, term.hyperparameters)
                and (columns is None or name in known or name not in method.columns)
            }
            method(**inputs, **term.hyperparameters)

    def _check_modifiers(self) -> None:
        names = ", ".join(m.name for m in self.methods)
        layouts = {m.layout for m in self.methods}
        if len(layouts) > 1:
            raise ValueError(f"methods of different layouts do not go together: {names} ({', '.join(layouts)})")
        if layouts == {"reward"} or any("returns" in m.inputs for m in self.methods):
            raise ValueError(
                f"{names} reads no token of a policy: call METHODS[{self.method.name!r}] on the outputs of the value head"
            )
        for name, value, kind in (
            ("wpo", self.wpo, bool),
            ("clamp", self.clamp, bool),
        ):
            if type(value) is not kind:
                raise ValueError(f"expected {name} to be {kind.__name__}, got {value!r}")
        if self.fixed_length is not None and not (type(self.fixed_length) is int and self.fixed_length >= 1):
            raise ValueError(f"expected fixed_length of at least one token, got {self.fixed_length!r}")
        if self.fixed_length is not None and all(m.denominator != "fixed_length" for m in self.methods):
            raise ValueError(f"fixed_length= is for dr_grpo, {names} divides by something else")
        if self.pairs is not None and self.pairs not in PAIRS:
            raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {self.pairs!r}")
        for option, given in (("pairs", self.pairs), ("ld_alpha", self.ld_alpha), ("wpo", self.wpo or None)):
            if given is not None and layouts != {"pairwise"}:
                raise ValueError(f"{option}= is for pairwise methods, {names} is {self.method.layout}")
            if given is not None and any("pos_score" in m.inputs for m in self.methods) and option != "wpo":
                raise ValueError(f"{option}= does not go with {names}, which looks at single tokens")
        if self.pairs:
            of_pairs = {n for m in self.methods for n in m.required if n in m.columns and m.axes(n) != ("",)}
            if of_pairs - {"score_w", "score_l"} or any(m.denominator == "tokens" for m in self.methods):
                raise ValueError(
                    f"pairs= is for methods that need of a pair nothing but its scores and are a mean over pairs, not {names}"
                )
        if self.ld_alpha is not None:
            if self.pairs:
                raise ValueError("ld_alpha= is for pairs that come as pairs, not with pairs=")
            if not isinstance(self.ld_alpha, (int, float)) or not 0 <= self.ld_alpha <= 1:
                raise ValueError(f"expected ld_alpha in [0, 1], got {self.ld_alpha!r}")
            if not any(term.compares_pairs for term in self.terms):
                raise ValueError(f"ld_alpha= is for methods that compare a pair with a reference, not {names}")
        stateful = [m.name for m in self.methods if m.state]
        if len(set(stateful)) < len(stateful):
            raise ValueError(f"{stateful[0]} twice would share what it remembers: make two objectives")
        if self.reduction == "none" and len({m.unit == "token" for m in self.methods}) > 1:
            raise ValueError(f'reduction="none" needs losses of one shape, and {names} are of tokens and of rows')

    def __str__(self) -> str:
        options = {
            "pairs": self.pairs, "ld_alpha": self.ld_alpha, "wpo": self.wpo or None, "fixed_length": self.fixed_length,
        }  # fmt: skip
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return " + ".join(map(str, self.terms)) + given

    def __repr__(self) -> str:
        return f"Objective({self}, reduction={self.reduction!r})"

    # --- the call -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        hidden: Tensor,  # (R, T, D), or (N, D) packed
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (R, T), or (N,) packed; aligned
        *,
        cu_seqlens: Tensor | None = None,  # (R + 1,) offsets of packed rows
        bias: Tensor | None = None,  # (V,)
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        ref_hidden: Tensor | None = None,  # shaped as hidden, width Dr
        ref_weight: Tensor | None = None,  # (V, Dr); if not given the policy's; needed with adapter
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (R,) log-probs of the rows under the reference, summed; or one a token
        list_size: int | None = None,
        denominator: float | Tensor | None = None,
        weight_grad: Tensor | None = None,  # (V, D) float32
        grad_scale: float = 1.0,
        adapter: Tensor | None = None,  # (V, r)
        vocab_shard: VocabShard | None = None,
        **columns: Tensor,
    ) -> LossOutput:
        """The loss, differentiable in hidden, weight and bias, and detached metrics.

        Rows: pairwise methods take R = 2P rows, the P chosen ones and then the P rejected; listwise ones the K rows of
        a prompt side by side (`list_size`, or the width of `scores`), an empty row where a list is shorter, for `nn`
        the rejected completion as the last of each; unpaired and policy methods a row a unit.
        The reference is `ref_hidden` (with `ref_weight`, or the policy's head), or `ref_logps`, a number a row, or
        shaped as targets where a method looks at tokens; a method without a reference reads neither.
        denominator: what the sum of losses is divided by, the items (`count_items`) of a whole optimizer step over
        micro-batches and ranks; those of this call if not given. columns: the method's other inputs by name, with one
        entry a unit, a scalar, or shaped as targets for inputs of tokens.

        weight_grad: as in `token_stats`. Where the gradients are made in this call (3F), dW is added in it, too, times
        grad_scale: what the loss will be multiplied by before the backward, which is checked there.

        adapter: as in `token_stats`, hidden then (…, D + r); ref_hidden then needs ref_weight, and ref_bias.
        A DTensor's weight, or ZeRO-3's, is gathered once a call, policy and reference together, and vocab_shard is as in `token_stats`; the
        loss is then the same on every rank of the shard's group, if `beta_dpo` draws the same there: seed them alike. `cringe`
        reads single logits and takes none.

        The host waits for a device once, at the start, to learn which positions are scored; not at all where targets
        and cu_seqlens are on the CPU, and columns and the reference's log-probs may be with them. Captured into a CUDA
        graph, a call takes targets on the device (cu_seqlens on the CPU: row lengths are the graph's), scores every
        position, and gives the same; methods that look at the batch as a whole refuse.

        A unit with a row that has no scored token (a list or a row of a policy method: with none at all) is left out:
        zero loss, not counted. With none left the loss is 0, with a graph. What it costs: see `plan`.

        Raises ValueError for operands, rows or columns that do not fit, a missing reference or column, an unknown
        column, and (on the CPU) a target outside the vocabulary or a column's number out of range: on a device both trip an
        assertion of the device's.
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
        check_operands(hidden, weight, targets, bias, adapter)
        ref_tokens = columns.pop("ref_token_logp", None)
        if ref_hidden is not None and ref_hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"of the reference: ref_hidden must be {tuple(targets.shape)} by its width, got {tuple(ref_hidden.shape)}"
            )
        batch = self._batch(targets, cu_seqlens, ignore_index, list_size, columns, hidden.device)
        known = Known(batch.check_columns(columns, self._supplied()))
        scaling: dict[str, Any] = {
            "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale,
        }  # fmt: skip
        options = {
            **scaling, "ignore_index": ignore_index, "tile_bytes": self.tile_bytes, "backend": self.backend,
            "vocab_shard": vocab_shard,
        }  # fmt: skip
        if vocab_shard is not None and self._draws_rivals:
            raise ValueError(
                f"{batch.name} reads single logits, which no rank has all of: gather the head, and leave out vocab_shard"
            )
        if adapter is not None and self._draws_rivals:
            raise ValueError(f"{batch.name} reads single logits, of a weight alone: merge the adapter first")
        if weight_grad is not None and self._draws_rivals:
            raise ValueError(f"{batch.name}: single logits have gradients of their own: leave out weight_grad")
        flat = hidden.reshape(-1, hidden.shape[-1])
        known.rows["len"] = (batch.lengths, 1.0)
        self._add_reference(
            known, batch, weight, bias, (ref_hidden, ref_weight, ref_bias), (ref_logps, ref_tokens), options
        )
        if self._draws_rivals:
            self._rivals.add(known, batch, flat, weight, bias, Scaling(**scaling))
        if denominator is None:
            denominator = self._items(batch)
        elif isinstance(denominator, Tensor) and denominator.dim() and denominator.shape != (len(self.terms),):
            raise ValueError(
                f"denominator must be () or ({len(self.terms)},), one entry a method, got {tuple(denominator.shape)}"
            )
        if isinstance(denominator, Tensor):
            denominator = to_device(denominator, batch.device)

        def evaluate(logp: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
            return [self._evaluate(term, batch, known, logp) for term in self.terms]

        def reduced(found: Sequence[tuple[Tensor, Any]], positions: Tensor | None, units: Tensor | None) -> Tensor:
            return self._reduce(batch, [losses for losses, _ in found], denominator, positions, units)

        by_token = all(m.unit == "token" for m in self.methods)
        sharded = vocab_shard is not None
        live = self._evaluates_live(flat, weight, bias, adapter, sharded)
        launches: Launches | None = None

        def judged(logp: Tensor) -> LossOutput:
            """Loss and metrics from the log-probs (N,) of all positions."""
            if launches is not None:
                return launches.whole(logp)
            found = evaluate(logp)
            each = self._reduce_each(batch, [losses.detach() for losses, _ in found], denominator)
            return LossOutput(reduced(found, None, None), *self._metrics(batch, found), tuple(each))

        def coefficients(logp: Tensor, group: Group) -> Tensor:
            """∂loss/∂logp (n,) at the positions of a group."""
            if launches is not None:
                return launches.coefficients(logp, group)
            at, units = group.positions, group.units
            # Units between these have nothing to score: they are left out as any other that does not count.
            some = None if by_token else torch.arange(units[0], units[-1] + 1, device=logp.device)
            with torch.enable_grad(), unchecked():
                leaf = logp.detach().requires_grad_()
                found = [self._evaluate(term, batch, known, leaf, at, some) for term in self.terms]
                (u,) = torch.autograd.grad(reduced(found, at, some), leaf)
            return u

        if live:
            # Once and whole where it can be read, so that a row that is refused is named by its place.
            if known.columns and on_host(flat):
                with torch.no_grad():
                    evaluate(flat.new_zeros(batch.scored.shape, dtype=torch.float32))
            launches = self._launches(batch, known, denominator, weight, sharded)
            vocab = weight.shape[0]
            if vocab_shard is not None:
                vocab, flat = vocab_shard.vocab, vocab_shard.replicated(flat)
                weight, bias, weight_grad, adapter = vocab_shard.tokens(
                    weight=weight, bias=bias, weight_grad=weight_grad, adapter=adapter
                )
            plan = self._head_plan(flat, weight, bias, batch, weight_grad, adapter, vocab_shard, softcap)
            outputs: list[LossOutput] = []

            def total(logp: Tensor) -> Tensor:
                outputs.append(judged(logp))
                return outputs[0].loss

            loss, logp = UnitLoss.apply(
                flat,
                weight,
                bias,
                batch.device_targets,
                Scaling(**scaling),
                batch.ignore_index,
                batch.groups(plan.tile_tokens, vocab, by_token=by_token),
                plan,
                coefficients,
                total,
                weight_grad,
                grad_scale,
                adapter,
            )
            out = dataclasses.replace(outputs[0], loss=loss)
            if known.learns:  # logp carries no gradient here
                found = evaluate(logp)
                out.loss = loss + reduced([(x - x.detach(), None) for x, _ in found], None, None)
        else:
            ref = (ref_hidden, ref_weight, ref_bias) if self.needs_reference_hidden else (None, None, None)
            options |= {"weight_grad": weight_grad, "adapter": adapter}
            logp = self._statistics(known, batch, flat, weight, bias, self._outputs(), ref, options)
            self._update_state(batch, known, logp)
            launches = self._launches(batch, known, denominator, weight, sharded)
            out = judged(logp)
        for term in self.terms:
            if term.method.token_reward and "ref_token_logp" in known.tokens:
                reward = term.hyperparameters["beta"] * (logp.detach() - known.tokens["ref_token_logp"])
                out.token_reward = torch.where(batch.scored, reward, 0.0).view(targets.shape)
        return out

    def _launches(
        self, batch: Batch, known: Known, denominator: float | Tensor, weight: Tensor, sharded: bool
    ) -> Launches | None:
        """The segment kernels for this call; None where the pure functions are called for, as with a modifier."""
        modified = self.pairs or self.wpo or self.ld_alpha is not None
        if modified or named_backend(self.backend, batch.device, sharded=sharded) != "cuda":
            return None
        denominators = [self._of_term(denominator, k) for k in range(len(self.terms))]
        dtype = accumulation_dtype(weight.dtype)
        options = self.reduction, self.fixed_length, dtype
        return Launches.of(self.terms, batch, known, self.state, denominators, *options)

    @staticmethod
    def _of_term(denominator: float | Tensor, k: int) -> float | Tensor:
        return denominator[k] if isinstance(denominator, Tensor) and denominator.dim() else denominator

    def _supplied(self) -> set[str]:
        """Columns that need not be given: what is remembered, and `nn`'s second reference if there is but one."""
        remembered = {n for m in self.methods if m.state for n in m.columns if m.axes(n) == ("",)}
        return {"ref_pos_logp_l", *self.state, *remembered}

    # --- what is known before the policy's log-probs ------------------------------------------------------------------

    def _batch(
        self,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        ignore_index: int,
        list_size: int | None,
        columns: Mapping[str, Any],
        device: torch.device | None,
    ) -> Batch:
        scores = columns.get("scores")
        if list_size is None and isinstance(scores, Tensor) and scores.dim() == 2:
            list_size = scores.shape[1] + self.has_rejected
        options: dict[str, Any] = {"device": device, "pairs": self.pairs, "list_size": list_size}
        batch = Batch(self.methods, targets, cu_seqlens, ignore_index, **options)
        if self.pairs and isinstance(scores, Tensor):
            batch.choose_pairs(scores)
        return batch

    def _add_reference(
        self,
        known: Known,
        batch: Batch,
        weight: Tensor,
        bias: Tensor | None,
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        given: tuple[Tensor | None, Tensor | None],  # log-probs of rows or tokens, of tokens
        options: dict[str, Any],
    ) -> None:
        """The rows' log-probs under the reference, and the tokens' where they are known."""
        ref_hidden, ref_weight, ref_bias = reference
        ref_logps, ref_tokens = given
        reads = [term for term in self.terms if term.reads_reference]
        if not reads:
            return
        names = ", ".join(term.method.name for term in reads)
        by_token = self.layout == "policy" or self.ld_alpha is not None
        if sum(x is not None for x in (ref_hidden, ref_logps, ref_tokens)) > 1:
            raise ValueError("the reference came twice: pass one of ref_hidden=, ref_logps= and ref_token_logp=")
        if ref_logps is None and ref_hidden is None and ref_tokens is None:
            if self.needs_reference:
                what = (
                    "shaped as targets, the log-prob of each token" if by_token else "the summed log-prob of each row"
                )
                raise ValueError(
                    f"{names} compares with a reference: pass ref_hidden= (and ref_weight= unless it has the policy's "
                    f"head) or ref_logps=, {what}"
                )
            return
        if ref_hidden is None and self.needs_reference_hidden:
            raise ValueError(f"{names} compares whole distributions with the reference's: pass ref_hidden=")
        tokens: Tensor | None = None
        rows, whole = torch.Size((batch.count,)), torch.Size(batch.shape)
        if ref_tokens is not None:
            tokens = batch.check_rows("ref_token_logp", ref_tokens, [whole]).reshape(-1)
        elif ref_logps is not None:
            ref_logps = batch.check_rows("ref_logps", ref_logps, [rows, whole])
            if ref_logps.shape == whole and (whole != rows or by_token):
                tokens = ref_logps.reshape(-1)
        else:
            assert ref_hidden is not None
            if ref_weight is None:
                ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
            with torch.no_grad():
                try:
                    flat = ref_hidden.reshape(-1, ref_hidden.shape[-1])
                    tokens = token_logps(flat, ref_weight, batch.targets, bias=ref_bias, **options)
                except ValueError as error:
                    raise ValueError(f"of the reference: {error}") from None
        if tokens is not None:
            known.tokens["ref_token_logp"] = tokens = torch.where(batch.scored, tokens, 0.0)
            known.rows["ref_logp"] = (sum_rows(tokens, batch.rows, batch.count), -1.0)
            if self.ld_alpha is not None:
                known.discounted_ref = self._row_sums(batch, tokens, None, discounted=True)
        elif by_token:
            raise ValueError(
                f"{names} looks at the reference's single tokens: pass ref_hidden=, or ref_logps= shaped as targets, "
                f"{tuple(batch.shape)}; got ({batch.count},), one a row"
            )
        else:
            assert ref_logps is not None
            known.rows["ref_logp"] = (ref_logps, -1.0)

    def _statistics(
        self,
        known: Known,
        batch: Batch,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        outputs: tuple[str, ...],
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        options: dict[str, Any],
    ) -> Tensor:
        """The policy's log-probs (N,); further statistics go to `known`."""
        if not outputs:
            return token_logps(hidden, weight, batch.targets, bias=bias, **options)
        ref_hidden, ref_weight, ref_bias = reference
        if ref_hidden is not None:
            ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
        stats = token_stats(
            hidden,
            weight,
            batch.targets,
            bias=bias,
            outputs=outputs,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            **options,
        )
        if stats.kl is not None:
            known.rows["kl"] = (sum_rows(stats.kl, batch.rows, batch.count), 0.0)
        if stats.entropy is not None:
            known.tokens["entropy"] = stats.entropy
        if stats.log_sum_sq_probs is not None:
            logp = sum_rows(stats.logp.detach(), batch.rows, batch.count)
            squares = sum_rows(stats.log_sum_sq_probs, batch.rows, batch.count)
            known.row_weight = wpo_weights(logp, squares, batch.lengths, clamp=False)
        return stats.logp

    # --- losses -------------------------------------------------------------------------------------------------------

    def _inputs(
        self,
        term: Term,
        batch: Batch,
        known: Known,
        logp: Tensor,
        positions: Tensor | None,
        units: Tensor | None,
    ) -> dict[str, Tensor]:
        """The method's inputs for some units: logp (n,) at the positions (n,), or at all of them."""
        method = term.method
        wanted = {n for n in method.inputs if method.wants(n, term.hyperparameters)}
        remembered = {n: to_device(x, batch.device) for n, x in self.state.items() if n in wanted}
        columns = {**remembered, **known.columns}
        if method.layout == "policy":
            single = positions is not None and units is None  # a token a unit

            def grid(x: Tensor) -> Tensor:
                x = x if positions is None else x[positions]
                return x[:, None] if single else batch.grid(x, positions, units)

            inputs = {"token_logp": logp[:, None] if single else batch.grid(logp, positions, units)}
            inputs["mask"] = grid(batch.scored)
            inputs |= {n: grid(x) for n, x in known.tokens.items() if n in wanted}
            for name, x in columns.items():
                if name in wanted and batch.per_token(name, x):
                    inputs[name] = grid(x.reshape(-1))
                elif name in wanted:
                    at = units if not single else batch.rows[positions]
                    # "II", whatever belongs to no unit, is passed on whole.
                    whole = x.dim() == 0 or at is None or "II" in method.axes(name)
                    inputs[name] = x if whole else x[at]
            return {n: x for n, x in inputs.items() if n in wanted}
        discounted = self.ld_alpha is not None and term.compares_pairs
        inputs = batch.inputs("logp", self._row_sums(batch, logp, positions, discounted=discounted), units, -1.0)
        for prefix, (values, absent) in known.rows.items():
            if prefix == "ref_logp" and discounted:
                assert known.discounted_ref is not None
                values = known.discounted_ref
            inputs |= batch.inputs(prefix, values.to(logp.dtype), units, absent)
        if "pos_score" in wanted:
            half = torch.arange(batch.units, device=batch.device)
            some = (half if units is None else units) + batch.units
            inputs |= {n: batch.rejected_grid(x, some) for n, x in known.tokens.items()}
        if batch.layout == "listwise":
            inputs["mask"] = batch.list_mask(units)
        for name, x in columns.items():
            if name in wanted or name == "scores":
                inputs |= batch.column(name, x, units)
        return {n: x for n, x in inputs.items() if n in wanted}

    def _row_sums(self, batch: Batch, logp: Tensor, positions: Tensor | None = None, *, discounted: bool) -> Tensor:
        """Log-probs (n,) of the positions, or of all, summed over rows (R,); those that `ld_alpha` discounts, if so."""
        if discounted:
            assert self.ld_alpha is not None
            beyond = batch.beyond_shorter if positions is None else batch.beyond_shorter[positions]
            logp = torch.where(beyond, self.ld_alpha * logp, logp)
        return sum_rows(logp, batch.rows if positions is None else batch.rows[positions], batch.count)

    def _evaluate(
        self,
        term: Term,
        batch: Batch,
        known: Known,
        logp: Tensor,
        positions: Tensor | None = None,
        units: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics of one method; 0 and whatever for units left out."""
        inputs = self._inputs(term, batch, known, logp, positions, units)
        if term.method.unit == "batch":
            losses, metrics = _of_counted(term, inputs, batch)
        else:
            losses, metrics = term.method(**inputs, **term.hyperparameters)
        if known.row_weight is not None:
            w_w, w_l = batch.inputs("weight", known.row_weight, units, 1.0).values()
            w = w_w * w_l
            losses = losses * (w.clamp(max=1) if self.clamp else w).to(losses.dtype)
        if self.pairs:
            losses, metrics = batch.mean_of_pairs(losses, metrics, units)
        if losses.dim() == 2:  # tokens, 0 outside the mask
            return losses, metrics
        valid = batch.valid if units is None else batch.valid[units]
        return torch.where(valid, losses, 0.0), metrics

    def _reduce(
        self,
        batch: Batch,
        found: Sequence[Tensor],
        denominator: float | Tensor,
        positions: Tensor | None,
        units: Tensor | None,
    ) -> Tensor:
        """The methods' losses as one scalar, or summed unit by unit with reduction="none"."""
        each = self._reduce_each(batch, found, denominator, positions, units)
        total: Any = sum(term.weight * x for term, x in zip(self.terms, each, strict=True))
        return total

    def _reduce_each(
        self,
        batch: Batch,
        found: Sequence[Tensor],
        denominator: float | Tensor,
        positions: Tensor | None = None,
        units: Tensor | None = None,
    ) -> list[Tensor]:
        each = []
        for k, (term, losses) in enumerate(zip(self.terms, found, strict=True)):
            if self.reduction == "mean":
                weights = batch.weights(term.method, self.fixed_length, losses.dtype)
                if weights is not None:
                    if positions is not None:
                        weights = weights[batch.rows[positions] if units is None else units]
                    losses = losses * (weights[:, None] if losses.dim() == 2 else weights)
            each.append(reduce_losses(losses, self.reduction, self._of_term(denominator, k)))
        return each

    def _metrics(
        self, batch: Batch, found: Sequence[tuple[Tensor, dict[str, Tensor]]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        metrics: dict[str, Tensor] = {}
        for _, own in found:
            metrics = {**own, **metrics}
        return mean_metrics(metrics, batch.valid), count_metrics(metrics, batch.valid)

    # --- state --------------------------------------------------------------------------------------------------------

    def _update_state(self, batch: Batch, known: Known, logp: Tensor) -> None:
        """Take the batch into what is remembered; without gradient, only for this call where there is nothing yet."""
        for term in self.terms:
            own = {n for n in term.method.columns if term.method.axes(n) == ("",)}
            if term.method.state is None or own <= set(known.columns):
                continue
            learns = torch.is_grad_enabled()
            if learns or not own <= set(self.state):
                with torch.no_grad():
                    inputs = self._inputs(term, batch, known, logp.detach(), None, None)
                    before = {n: to_device(x, batch.device) for n, x in self.state.items()}
                    remembered = term.method.state(before, inputs, batch.counted, **term.hyperparameters)
                if learns:
                    self.state.update(remembered)
                else:
                    known.columns.update({n: remembered[n] for n in own})

    def state_dict(self) -> dict[str, Tensor]:
        """What the methods remember of earlier batches, the same on every rank, and where `seed` has got to."""
        state = {name: x.detach().clone() for name, x in self.state.items()}
        return state if self._rivals.state is None else {**state, "draws": self._rivals.state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: x.detach().clone() for name, x in state.items() if name != "draws"}
        self._rivals.state = state.get("draws")

    # --- counting and planning ----------------------------------------------------------------------------------------

    def _items(self, batch: Batch) -> Tensor:
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
        """What `denominator` counts in a batch, see Method.denominator: int64, () or one entry a method, with the targets."""
        return self._items(self._batch(targets, cu_seqlens, ignore_index, list_size, {}, None))

    def plan(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ignore_index: int = -100,
        list_size: int | None = None,
        weight_grad: Tensor | None = None,
        adapter: Tensor | None = None,
        vocab_shard: VocabShard | None = None,
        **others: Any,
    ) -> Plan:
        """How a call with these arguments will run: backend, tile and passes. Print it."""
        columns = {n for m in self.methods for n in m.columns} | ({"scores"} if self.pairs else set())
        unknown = sorted(set(others) - _OF_NO_MATTER_TO_THE_PLAN - columns - {"ref_token_logp"})
        if unknown:
            raise ValueError(f"{', '.join(m.name for m in self.methods)}: unknown {', '.join(unknown)}")
        check_reference_head(adapter, ref_hidden, others.get("ref_weight"))
        weight, bias, adapter = unpartitioned(weight, bias, adapter)
        hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
        check_operands(hidden, weight, targets, bias, adapter)
        batch = self._batch(targets, cu_seqlens, ignore_index, list_size, others, hidden.device)
        vocab = weight.shape[0]
        if vocab_shard is not None:
            vocab = vocab_shard.vocab
            weight, bias, weight_grad, adapter = vocab_shard.tokens(
                weight=weight, bias=bias, weight_grad=weight_grad, adapter=adapter
            )
        softcap = others.get("softcap")
        plan = self._head_plan(hidden, weight, bias, batch, weight_grad, adapter, vocab_shard, softcap)
        passes, why = plan.passes, plan.why
        tokens = int((batch.targets != ignore_index).sum())
        if self._evaluates_live(hidden, weight, bias, adapter, vocab_shard is not None):
            by_token = all(m.unit == "token" for m in self.methods)
            groups = batch.groups(plan.tile_tokens, vocab, by_token=by_token)
            sizes = [len(group.positions) for group in groups]
            again = sum(max(n - plan.tile_tokens, 0) for n in sizes)
            passes = passes - 1 + (again / tokens if tokens else 0)
            why = f"the loss of whole {self.method.unit}s is evaluated while their tile is live"
            why += "" if vocab_shard is None else vocab_shard.why
            why += f"; {plan.reason}" if plan.reason else ""
            if again:
                why += f"; units longer than a tile make {again} tokens' logits again"
        if ref_hidden is not None and any(term.reads_reference for term in self.terms):
            passes, why = passes + 1, why + "; 1F of it for the reference"
        if self._draws_rivals:
            rejected = int((batch.rejected_targets != ignore_index).sum())
            passes += rejected / tokens if tokens else 0
            why += f"; {rejected} rejected tokens' logits once more, for their likeliest rivals"
        return dataclasses.replace(plan, tokens=tokens, passes=passes, why=why)

    def _outputs(self) -> tuple[str, ...]:
        """The statistics that the methods need beside the log-prob."""
        wants = {n for t in self.terms for n in t.method.inputs if t.method.wants(n, t.hyperparameters)}
        needed = {
            "kl": {"kl_w", "kl_l"} & wants,
            "entropy": {"entropy"} & wants,
            "log_sum_sq_probs": self.wpo,
        }
        return tuple(name for name, needs in needed.items() if needs)

    def _head_plan(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: Batch,
        weight_grad: Tensor | None = None,
        adapter: Tensor | None = None,
        vocab_shard: VocabShard | None = None,
        softcap: float | None = None,
    ) -> Plan:
        live = self._evaluates_live(hidden, weight, bias, adapter, vocab_shard is not None)
        return head_plan(
            hidden,
            weight,
            bias=bias,
            outputs=() if live else self._outputs(),
            adapter=adapter,
            softcap=softcap,
            weight_grad=weight_grad,
            vocab_shard=vocab_shard,
            tile_bytes=self.tile_bytes,
            backend=self.backend,
            unit_tokens=batch.longest_unit if live else 0,
        )

    def _evaluates_live(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: Tensor | None, sharded: bool
    ) -> bool:
        """Whether the gradient is made at 3F, unit by unit, in the forward."""
        return (
            torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in (weight, bias, adapter))
            and self.reduction != "none"
            and all(m.unit != "batch" for m in self.methods)
            and not self._outputs()
            and named_backend(self.backend, hidden.device, sharded=sharded) != "dense"
            and not torch.compiler.is_compiling()
        )


def made_up(name: str, axes: str, sizes: Mapping[str, int]) -> Tensor:
    """Harmless values of an input."""
    shape = [sizes[axis] for axis in axes]
    if name in ("desirable", "mask", "ptx_mask"):
        return torch.ones(shape, dtype=torch.bool)
    if name in ("scores", "ranks"):
        return torch.arange(sizes["K"], 0.0, -1.0).expand(shape) / (sizes["K"] if name == "scores" else 1)
    return torch.full(shape, {"score_w": 1.0, "score_l": 0.0, "prob_w": 0.5, "kl": 0.0}.get(name, 1.0))


def _of_counted(term: Term, inputs: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A method whose losses depend on one another, on the units (U,) that count; 0 and NaN for the others."""
    at, shape = batch.counted_at, batch.counted.shape
    inputs = {n: x[at] if x.dim() else x for n, x in inputs.items()}
    losses, metrics = term.method(**inputs, **term.hyperparameters)

    def spread(x: Tensor, absent: float) -> Tensor:
        return x.new_full(shape, absent).index_put((at,), x)

    return spread(losses, 0.0), {name: spread(x, torch.nan) for name, x in metrics.items()}
