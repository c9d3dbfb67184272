"""METHODS: every method by name. A method's signature says what it needs; the card says where it comes from."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..wording import did_you_mean

ATTRIBUTES = ("RM1", "RM2", "RM3", "RM4", "F1", "F2", "F3", "RL1", "RL2", "RL3", "RL4", "O1", "O2")

# Every input that a method may take, with its axes: U units (pairs, rows, lists), K completions of a list, T tokens of
# a row, I a size of its own, "" a scalar. Alternatives are told apart by their number of axes.
AXES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("logp_w", "logp_l", "ref_logp_w", "ref_logp_l", "len_w", "len_l", "logp_sft"), ("U",)),
    **dict.fromkeys(("score_w", "score_l", "prob_w", "kl_w", "kl_l", "ref_pos_logp_l"), ("U",)),
    **dict.fromkeys(("pos_score", "neg_score"), ("UT",)),
    **dict.fromkeys(("logp", "ref_logp", "length", "desirable", "reward"), ("U",)),
    **dict.fromkeys(("kl", "delta", "m0", "s"), ("",)),
    **dict.fromkeys(("logps", "ref_logps", "lens", "scores"), ("UK",)),
    **dict.fromkeys(("token_logp", "old_logp", "ref_token_logp", "entropy", "old_value", "returns"), ("UT",)),
    **dict.fromkeys(("advantage", "value"), ("U", "UT")),
    **dict.fromkeys(("ptx_logp", "ptx_mask"), ("II",)),
    "mask": ("UT", "UK"),
    **dict.fromkeys(("reward_w", "reward_l", "margin", "logit"), ("U",)),
    **dict.fromkeys(("rewards", "ranks", "targets", "rewards_w", "rewards_l", "gate", "gate_w", "gate_l"), ("UK",)),
}

# What a method's rows are, by the input that tells; and the inputs that the objective makes itself from hidden states,
# targets and a reference. All others are columns.
LAYOUTS = {
    "policy": ("token_logp", "returns"),
    "listwise": ("logps",),
    "unpaired": ("logp",),
    "pairwise": ("logp_w", "logp_l"),
}
SIDES = {"pairwise": ("_w", "_l")}
DERIVED = {
    "pairwise": (
        *("logp_w", "logp_l", "ref_logp_w", "ref_logp_l", "len_w", "len_l"),
        *("kl_w", "kl_l", "pos_score", "neg_score", "mask"),
    ),
    "unpaired": ("logp", "ref_logp", "length"),
    "listwise": ("logps", "ref_logps", "lens", "mask", "logp_l"),
    "policy": ("token_logp", "ref_token_logp", "mask", "entropy"),
    "reward": (),
}
UNITS = ("token", "row", "pair", "list", "batch")
# What `reduction="mean"` divides by, over a whole optimizer step: units; the tokens that the method reads; rows, each
# the mean of its tokens; rows times a fixed number of tokens; micro-batches, each the mean of its own tokens.
DENOMINATORS = ("units", "tokens", "row_means", "fixed_length", "local_tokens")


# state(remembered, inputs, valid units (U,), **hyperparameters) → remembered: scalars by name, among them the method's
# inputs of that name.
StateUpdate = Callable[..., "dict[str, Tensor]"]


@dataclass(frozen=True)
class Card:
    """Where a method comes from, and the survey's 13 attributes of it (Table 1's words, "-" where it has none)."""

    paper: str  # title and arXiv number
    equation: str  # as computed here, plain text
    survey: str | None  # equation numbers of the survey
    attributes: Mapping[str, str]


class Method:
    """A registered method: call it with keyword tensors and hyperparameters → (losses, metrics)."""

    def __init__(
        self,
        fn: Callable,
        name: str,
        card: Card,
        unit: str,
        denominator: str,
        uses: Mapping[str, str],
        state: StateUpdate | None,
        token_reward: bool,
    ) -> None:
        self.fn, self.name, self.card, self.unit, self.denominator = fn, name, card, unit, denominator
        self.uses, self.state, self.token_reward = dict(uses), state, token_reward
        self.__doc__ = fn.__doc__
        self._parameters = dict(inspect.signature(fn).parameters)
        hints = typing.get_type_hints(fn)
        # The names of the tensors it takes, optional ones included; those that it cannot do without.
        self.inputs = tuple(n for n in self._parameters if hints[n] is Tensor or Tensor in typing.get_args(hints[n]))
        self.required = tuple(n for n in self.inputs if self._parameters[n].default is inspect.Parameter.empty)
        # Hyperparameters and their defaults.
        self.defaults = {n: p.default for n, p in self._parameters.items() if n not in self.inputs}
        # How rows are laid out: "pairwise" (chosen rows, then rejected rows), "listwise" (the K rows of a prompt side by
        # side), "unpaired" and "policy" (a row a unit; by row or by token), "reward" (no rows: outputs of a value head).
        self.layout = next((name for name, tell in LAYOUTS.items() if set(tell) & set(self.inputs)), "reward")
        # The suffixes of the rows of a pair that it reads: `sft` reads the chosen half only.
        self.sides = tuple(s for s in SIDES.get(self.layout, ("",)) if "logp" + s in self.inputs or s == "")
        # The inputs that a caller of the objective provides by name.
        self.columns = tuple(n for n in self.inputs if n not in DERIVED[self.layout])

    def wants(self, name: str, hyperparameters: Mapping[str, Any]) -> bool:
        """Whether input `name` matters with these hyperparameters: an optional one may be behind a switch."""
        switch = self.uses.get(name)
        return name in self.inputs and (switch is None or bool({**self.defaults, **hyperparameters}[switch]))

    def reads_reference(self, hyperparameters: Mapping[str, Any]) -> bool:
        """Whether the method compares with a reference policy that must be given."""
        return any(
            n.startswith("ref_") and (n in self.required or (n in self.uses and self.wants(n, hyperparameters)))
            for n in self.inputs
        )

    @property
    def needs_reference(self) -> bool:
        """`reads_reference` with the default hyperparameters."""
        return self.reads_reference({})

    def check_hyperparameters(self, names: Mapping[str, Any]) -> None:
        unknown = sorted(set(names) - set(self.defaults))
        if unknown:
            raise ValueError(
                f"{self.name} has no hyperparameter {', '.join(unknown)}; it has {', '.join(self.defaults) or 'none'}"
                f"{did_you_mean(unknown[0], self.defaults)}"
            )

    def __call__(self, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        kwargs = {n: v for n, v in kwargs.items() if not (v is None and n in self.inputs)}
        missing = [n for n in self.required if n not in kwargs]
        unknown = sorted(set(kwargs) - set(self._parameters))
        if missing or unknown:
            raise ValueError(
                f"{self.name}: "
                + "; ".join(
                    ([f"missing {', '.join(missing)}"] if missing else [])
                    + ([f"unknown {', '.join(unknown)}"] if unknown else [])
                )
                + f". It takes the tensors {', '.join(self.inputs)} and the hyperparameters "
                + (", ".join(self.defaults) or "none")
            )
        tensors = {n: v for n, v in kwargs.items() if n in self.inputs}
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{self.name}: {name} must be a tensor, got {type(value).__name__}")
        self._check_shapes({n: tuple(v.shape) for n, v in tensors.items() if v.dim() > 0})
        return self.fn(**kwargs)

    def axes(self, name: str) -> tuple[str, ...]:
        """The axes that input `name` may have here: `mask` has those of the inputs beside it."""
        if name == "mask":
            return ("UK",) if self.layout in ("listwise", "reward") else ("UT",)
        return AXES[name]

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            axes = next((a for a in self.axes(name) if len(a) == len(shape)), None)
            agreed = axes is not None and all(
                a == "I" or sizes.setdefault(a, n) == n for a, n in zip(axes, shape, strict=True)
            )
            if not agreed:
                expected = " or ".join(f"({', '.join(a)})" for a in self.axes(name))
                raise ValueError(
                    f"{self.name}: expected tensors of shapes that fit, {name} {expected} with U units, K completions "
                    f"a list, T tokens a row; got {dict(shapes)}"
                )
        if not shapes:
            raise ValueError(f"{self.name}: expected tensors with one entry a unit, got scalars")

    def __repr__(self) -> str:
        return f"Method({self.name!r}, inputs={self.inputs}, defaults={self.defaults})"


_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)


def register(
    *,
    paper: str,
    equation: str,
    survey: str | None = None,
    attributes: str,
    unit: str = "pair",
    denominator: str = "units",
    uses: Mapping[str, str] = MappingProxyType({}),
    state: StateUpdate | None = None,
    token_reward: bool = False,
) -> Callable[[Callable], Callable]:
    """Put a pure function into METHODS under its own name.

    attributes: the survey's words in the order of ATTRIBUTES without RL1, which the signature tells.
    unit: what one loss is about, one of UNITS; "batch" if the losses of a batch depend on one another.
    denominator: what `reduction="mean"` divides by, one of DENOMINATORS.
    uses: optional inputs that matter only while a hyperparameter is neither 0 nor None: {"entropy": "entropy_coef"}.
    state: how what is remembered of earlier batches changes with a batch, for inputs that the objective keeps.
    token_reward: whether the objective returns β(log π − log ref) of every token, too.
    """

    def decorate(fn: Callable) -> Callable:
        name = fn.__name__
        if name in _METHODS:
            raise ValueError(f"a method named {name!r} is registered already, by {_METHODS[name].fn.__module__}")
        parameters = inspect.signature(fn).parameters
        unheard = [n for n, p in parameters.items() if "Tensor" in str(p.annotation) and n not in AXES]
        assert not unheard, f"{name}: {', '.join(unheard)} not in AXES: say there what it is"
        assert unit in UNITS and denominator in DENOMINATORS, f"{name}: {unit}, {denominator}"
        words = attributes.split()
        reference = "Reference" if any(n.startswith("ref_") for n in parameters) else "Free"
        words.insert(ATTRIBUTES.index("RL1"), reference)
        assert len(words) == len(ATTRIBUTES), f"{name}: {len(words)} attributes"
        card = Card(paper, equation, survey, dict(zip(ATTRIBUTES, words, strict=True)))
        _METHODS[name] = Method(fn, name, card, unit, denominator, uses, state, token_reward)
        return fn

    return decorate


def get_method(name: str) -> Method:
    if name not in _METHODS:
        near = did_you_mean(name, sorted(_METHODS))
        raise ValueError(
            f"no method named {name!r}{near}{' There' if near else '; there'} are {', '.join(sorted(_METHODS))}"
        )
    return _METHODS[name]
