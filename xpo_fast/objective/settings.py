"""The settings of an objective: its methods, modifiers and reduction, checked together before any call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..head.choice import named_backend
from ..head.plan import PlanOptions, invariant_backend
from ..head.spec import Jsd, compares
from ..methods import Method
from ..reduce import REDUCTIONS
from .batch import HARMLESS, PAIRS
from .rivals import Rivals
from .terms import parse_terms

_TOP_K = 5


class Settings:
    """The settings of `Objective`, which documents them."""

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
        top_k: int = _TOP_K,
        seed: int | None = None,
        backend: str = "auto",
        tile_bytes: int | None = None,
        invariant: bool = False,
        **hyperparameters: Any,
    ) -> None:
        self.terms = parse_terms(method, weights, hyperparameters)
        self.methods = [term.method for term in self.terms]
        if reduction not in REDUCTIONS:
            raise ValueError(f"no reduction named {reduction!r}; there are {', '.join(REDUCTIONS)}")
        named_backend(backend)
        if type(invariant) is not bool:
            raise ValueError(f"expected invariant to be bool, got {invariant!r}")
        self.invariant = invariant
        backend = invariant_backend(backend) if invariant else backend
        self.reduction, self.backend, self.tile_bytes = reduction, backend, tile_bytes
        self.pairs, self.ld_alpha, self.wpo, self.clamp = pairs, ld_alpha, wpo, clamp
        self.fixed_length = fixed_length
        self.rivals = Rivals(top_k, seed, self.plan_options)
        self.state: dict[str, Tensor] = {}  # the methods' statistics of earlier calls
        self._check_modifiers()

    @property
    def method(self) -> Method:
        """Returns the first method."""
        return self.methods[0]

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """Returns the first method's hyperparameters."""
        return self.terms[0].hyperparameters

    @property
    def plan_options(self) -> PlanOptions:
        """Returns backend, tile_bytes and invariant as they are now, which `plan_of` is given."""
        return PlanOptions(self.backend, self.tile_bytes, invariant=self.invariant)

    @property
    def layout(self) -> str:
        """Returns the layout of a call's rows, see `Method.layout`; "listwise" with `pairs`."""
        return "listwise" if self.pairs else self.method.layout

    @property
    def by_token(self) -> bool:
        """Returns whether all methods have one loss per token."""
        return all(m.unit == "token" for m in self.methods)

    @property
    def needs_reference(self) -> bool:
        """Returns whether a method needs a reference."""
        return any(term.method.reads_reference(term.hyperparameters) for term in self.terms)

    @property
    def reads_reference(self) -> bool:
        """Returns whether a method reads a reference if there is one; it need not require it."""
        return any(term.reads_reference for term in self.terms)

    @property
    def needs_reference_tokens(self) -> bool:
        """Returns whether the reference's log-prob of each token is needed, not only its sum over each row."""
        by_token = self.layout == "policy" or self.ld_alpha is not None or self.needs_reference_hidden
        return self.needs_reference and by_token

    @property
    def needs_reference_hidden(self) -> bool:
        """Returns whether the reference's hidden states are needed, for divergences over the vocabulary."""
        return compares(self.outputs())

    @property
    def reads_context(self) -> bool:
        """Returns whether the reference reads a context that the policy does not read (`context_distillation`)."""
        return any(m.reads_context for m in self.methods)

    @property
    def reads_teacher(self) -> bool:
        """Returns whether the reference is a teacher, another model, of which the policy learns (`gkd`)."""
        return any(m.reads_teacher for m in self.methods)

    @property
    def reads_topk(self) -> bool:
        """Returns whether a teacher's likeliest tokens at each position are compared (`topk_kl`)."""
        return any("topk_kl_w" in m.inputs for m in self.methods)

    @property
    def has_rejected(self) -> bool:
        """Returns whether a rejected completion follows those of each list (`nn`)."""
        return any("logp_l" in m.inputs for m in self.methods if m.layout == "listwise")

    @property
    def draws_rivals(self) -> bool:
        """Returns whether a method reads the logits of rival tokens (`cringe`)."""
        return any(m.draws_rivals for m in self.methods)

    @property
    def data_kind(self) -> str:
        """Returns the kind of data set to train on, one of `data.KINDS`.

        Raises ValueError for methods that learn from completions sampled during training.
        """
        if self.layout == "policy" and self.reads_teacher:
            return "chosen"
        if self.layout in ("policy", "reward"):
            raise ValueError(
                f"{self.method.name} learns from completions sampled and scored while it trains, not from a data set: "
                "call xpo_fast.Objective in such a loop"
            )
        if self.reads_topk and {side for m in self.methods for side in m.sides} != {"_w"}:
            raise ValueError(
                "topk_kl reads a teacher's likeliest tokens of one completion, and pairs have two: train it alone or "
                "in a sum with sft"
            )
        if self.layout != "pairwise":
            return {"listwise": "list"}.get(self.layout, self.layout)
        sides = {side for m in self.methods for side in m.sides}
        return "chosen" if sides == {"_w"} else "rejected" if sides == {"_l"} else "pair"

    def rehearse(self, columns: Mapping[str, Tensor | None] | None = None) -> None:
        """Evaluates the methods on placeholder log-probs, to find what they refuse before any call.

        columns: the columns that calls will have, with the numbers of some units, or None for placeholders. `rejected`
            among them says that there are completions of this name. By default placeholders stand for all columns.

        Raises ValueError for a hyperparameter or a number out of range, and for a column that `columns` lacks.
        """
        given = {name: x for name, x in (columns or {}).items() if x is not None and x.dim()}
        sizes = {"U": 1, "K": 2, "T": 1, "I": 1}
        for x in given.values():
            sizes |= dict(zip("UK", x.shape, strict=False))
        for term in self.terms:
            method = term.method
            known = self.supplied() | ({"score_w", "score_l"} if self.pairs else set()) | set(columns or {})
            inputs = {
                name: given[name]
                if name in given and not self.pairs
                else placeholder(name, method.axes(name)[0], sizes)
                for name in method.inputs
                if method.wants(name, term.hyperparameters)
                and (columns is None or name in known or name not in method.columns)
            }
            method(**inputs, **term.hyperparameters)
        if columns is not None and self.pairs and "scores" not in columns:
            raise ValueError("missing scores")
        if columns is not None and self.has_rejected and "rejected" not in columns:
            raise ValueError(f"{self.method.name}: missing rejected, the completion to move away from")

    def _check_modifiers(self) -> None:
        """Raises ValueError for a modifier that is out of range or does not go with the methods."""
        names = ", ".join(m.name for m in self.methods)
        layouts = {m.layout for m in self.methods}
        if len(layouts) > 1:
            raise ValueError(f"methods of different layouts do not go together: {names} ({', '.join(layouts)})")
        if layouts == {"reward"} or any("returns" in m.inputs for m in self.methods):
            raise ValueError(
                f"{names} reads no token of a policy: call METHODS[{self.method.name!r}] on the outputs of the value "
                "head"
            )
        under = [term.method.name for term in self.terms if term.reads_reference and not term.method.reads_context]
        if self.reads_context and under:
            raise ValueError(
                f"the reference of {names} would have to read a context and not to: train with "
                f"{' and '.join(under)} in a run of its own"
            )
        beside = [t.method.name for t in self.terms if t.reads_reference and not t.method.reads_teacher]
        if self.reads_teacher and beside:
            raise ValueError(
                f"the reference of {names} would have to be a teacher and not to be: train with "
                f"{' and '.join(beside)} in a run of its own"
            )
        if sum(x.startswith("jsd") for x in self.outputs()) > 1:
            raise ValueError(f"one objective has one gkd, with one beta and temperature, got {self}")
        for name, value in (("wpo", self.wpo), ("clamp", self.clamp)):
            if type(value) is not bool:
                raise ValueError(f"expected {name} to be bool, got {value!r}")
        if self.fixed_length is not None and not (type(self.fixed_length) is int and self.fixed_length >= 1):
            raise ValueError(f"expected fixed_length of at least one token, got {self.fixed_length!r}")
        if self.fixed_length is not None and all(m.denominator != "fixed_length" for m in self.methods):
            raise ValueError(f"fixed_length= is for dr_grpo, {names} divides by something else")
        if not self.clamp and not self.wpo:
            raise ValueError("clamp=False is about the weights of wpo=True: set that, too, or leave it out")
        drawn = {"top_k": self.rivals.top_k != _TOP_K, "seed": self.rivals.seed is not None}
        if any(drawn.values()) and not self.draws_rivals:
            idle = " and ".join(f"{name}=" for name, given in drawn.items() if given)
            raise ValueError(f"{idle} is for the rival tokens of cringe, {names} draws none: leave it out")
        if self.invariant and self.draws_rivals:
            raise ValueError(f"invariant=True does not go with {names}, which draws rivals for the batch: leave it out")
        if self.pairs is not None and self.pairs not in PAIRS:
            raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {self.pairs!r}")
        for option, given in (("pairs", self.pairs), ("ld_alpha", self.ld_alpha), ("wpo", self.wpo or None)):
            if given is not None and layouts != {"pairwise"}:
                raise ValueError(f"{option}= is for pairwise methods, {names} is {self.method.layout}")
            if given is not None and self.draws_rivals and option != "wpo":
                raise ValueError(f"{option}= does not go with {names}, which looks at single tokens")
        if self.pairs:
            of_pairs = {n for m in self.methods for n in m.required if n in m.columns and m.axes(n) != ("",)}
            if of_pairs - {"score_w", "score_l"} or any(m.denominator == "tokens" for m in self.methods):
                raise ValueError(
                    "pairs= is for methods that need nothing but its scores beside a pair and whose loss is a mean "
                    f"over pairs, not {names}"
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
        options = {name: getattr(self, name) for name in ("pairs", "ld_alpha", "wpo", "fixed_length", "invariant")}
        given = "".join(f", {name}={x!r}" for name, x in options.items() if x is not None and x is not False)
        return " + ".join(map(str, self.terms)) + given

    def __repr__(self) -> str:
        return f"Objective({self}, reduction={self.reduction!r})"

    def outputs(self) -> tuple[str, ...]:
        """Returns the names of the statistics that the methods need beside the log-prob, see `TokenStats`."""
        wants = {n for t in self.terms for n in t.method.inputs if t.method.wants(n, t.hyperparameters)}
        needed = {
            "kl": {"kl_w", "kl_l"} & wants,
            "reverse_kl": {"reverse_kl_w"} & wants,
            "entropy": {"entropy"} & wants,
            "log_sum_sq_probs": self.wpo,
        }
        of_jsd = [t.hyperparameters for t in self.terms if "jsd_w" in t.method.inputs]
        divergences = dict.fromkeys(Jsd(h["beta"], h["temperature"]).output() for h in of_jsd)
        return (*(name for name, needs in needed.items() if needs), *divergences)

    def supplied(self) -> set[str]:
        """Returns the columns that need not be given: those of the state, and `nn`'s second reference."""
        remembered = {n for m in self.methods if m.state for n in m.columns if m.axes(n) == ("",)}
        return {"ref_pos_logp_l", *self.state, *remembered}


def placeholder(name: str, axes: str, sizes: Mapping[str, int]) -> Tensor:
    """Returns placeholder values of an input that every method accepts."""
    shape = [sizes[axis] for axis in axes]
    if name in ("desirable", "mask", "ptx_mask"):
        return torch.ones(shape, dtype=torch.bool)
    if name in ("scores", "ranks"):
        return torch.arange(sizes["K"], 0.0, -1.0).expand(shape) / (sizes["K"] if name == "scores" else 1)
    return torch.full(shape, {**HARMLESS, "kl": 0.0}.get(name, 1.0))
