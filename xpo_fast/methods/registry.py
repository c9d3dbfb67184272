"""METHODS: every method by name. Its signature says what it takes; its card says where it comes from."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ..wording import did_you_mean
from .advantages import ADVANTAGES
from .inputs import INPUTS, LAYOUTS
from .math import check_choice
from .survey import attributes as survey_attributes

UNITS = ("token", "row", "pair", "list", "batch")
# What `reduction="mean"` divides by, over a whole optimizer step.
DENOMINATORS: Mapping[str, str] = {
    "units": "the number of {unit}s",
    "tokens": "the number of tokens that the method reads",
    "row_means": "the number of rows, each the mean of its tokens",
    "fixed_length": "the number of rows times a fixed number of tokens",
    "local_tokens": "the number of micro-batches, each the mean of its tokens",
}


# state(remembered, inputs, valid units (U,), **hyperparameters) → remembered: scalars by name, among them the method's
# inputs of that name.
StateUpdate = Callable[..., "dict[str, Tensor]"]


@dataclass(frozen=True)
class RLDefaults:
    """What online RL with a policy method does unless told otherwise: what its authors add to its loss."""

    advantage: str = "group"  # one of advantages.ADVANTAGES
    kl_coef: float = 0.0  # weight of the KL penalty in the reward
    max_draws: int = 1  # dynamic sampling: draws of prompts per rollout, 1 = off
    overlong: str = "keep"  # truncated completions: keep, mask or penalty
    settings: Mapping[str, Any] = field(default_factory=dict)  # hyperparameters with another default than elsewhere
    unless: tuple[str, ...] = ()  # hyperparameters that replace `settings` where the user gives one of them
    reuse: Mapping[str, Any] = field(default_factory=dict)  # hyperparameters where a rollout is used for several steps
    adapts_beta: bool = False  # whether kl_target is about the sampling policy and moves `beta` by the metric "kl"


@dataclass(frozen=True)
class Card:
    """Where a method comes from, the survey's attributes of it, and its defaults in online RL."""

    paper: str  # title and arXiv number
    equation: str  # as computed here, plain text
    survey: str | None  # equation numbers of the survey
    attributes: Mapping[str, str]  # by the codes of survey.ATTRIBUTES, in Table 1's words
    rl: RLDefaults


class Method:
    """A registered method: call it with keyword tensors and hyperparameters → (losses, metrics)."""

    def __init__(
        self,
        fn: Callable,
        card: Card,
        unit: str,
        denominator: str,
        uses: Mapping[str, str],
        axes: Mapping[str, tuple[str, ...]],
        state: StateUpdate | None,
        token_reward: bool,
        trains_head: bool,
        reads_context: bool,
        reads_teacher: bool,
    ) -> None:
        self.fn, self.name, self.card, self.unit, self.denominator = fn, fn.__name__, card, unit, denominator
        self.uses, self.state, self.token_reward, self.trains_head = dict(uses), state, token_reward, trains_head
        self.reads_context, self.reads_teacher = reads_context, reads_teacher
        self.__doc__ = fn.__doc__
        self._parameters = dict(inspect.signature(fn).parameters)
        hints = typing.get_type_hints(fn)
        # The names of the tensors it takes, optional ones included; those that it cannot do without.
        self.inputs = tuple(n for n in self._parameters if hints[n] is Tensor or Tensor in typing.get_args(hints[n]))
        self.required = tuple(n for n in self.inputs if self._parameters[n].default is inspect.Parameter.empty)
        # Hyperparameters and their defaults.
        self.defaults = {n: p.default for n, p in self._parameters.items() if n not in self.inputs}
        # The hyperparameters that are one of several words (or numbers), with all that they may be.
        self.choices = {n: typing.get_args(hints[n]) for n in self.defaults if typing.get_origin(hints[n]) is Literal}
        # How rows are laid out, of LAYOUTS: "pairwise" (chosen rows, then rejected rows), "listwise" (the K rows of a
        # prompt side by side), "unpaired" and "policy" (one row per unit; by row or by token), "reward" (no rows:
        # outputs of a value head).
        self.layout = next((n for n, layout in LAYOUTS.items() if set(layout.told_by) & set(self.inputs)), "reward")
        layout = LAYOUTS[self.layout]
        # The suffixes of the rows of a pair that it reads: `sft` reads the chosen half only.
        self.sides = tuple(s for s in layout.sides if "logp" + s in self.inputs or s == "")
        # The inputs that a caller of the objective provides by name.
        self.columns = tuple(n for n in self.inputs if n not in layout.made)
        self._axes = {**axes, "mask": ("UK",) if self.layout in ("listwise", "reward") else ("UT",)}

    def wants(self, name: str, hyperparameters: Mapping[str, Any]) -> bool:
        """Returns whether input `name` matters with these hyperparameters: an optional one may be behind a switch."""
        switch = self.uses.get(name)
        return name in self.inputs and (switch is None or bool({**self.defaults, **hyperparameters}[switch]))

    def reads_reference(self, hyperparameters: Mapping[str, Any]) -> bool:
        """Returns whether the method compares with a reference policy that must be given."""
        return any(
            n.startswith("ref_") and (n in self.required or (n in self.uses and self.wants(n, hyperparameters)))
            for n in self.inputs
        )

    @property
    def needs_reference(self) -> bool:
        """Returns `reads_reference` with the default hyperparameters."""
        return self.reads_reference({})

    @property
    def draws_rivals(self) -> bool:
        """Returns whether the head samples rival tokens for the method, as for `cringe`."""
        return "pos_score" in self.inputs

    def check_hyperparameters(self, given: Mapping[str, Any]) -> None:
        """Raises ValueError for a hyperparameter that the method does not have, and for a word that is no choice."""
        unknown = sorted(set(given) - set(self.defaults))
        if unknown:
            raise ValueError(
                f"{self.name} has no hyperparameter {', '.join(unknown)}; it has {', '.join(self.defaults) or 'none'}"
                f"{did_you_mean(unknown[0], self.defaults)}"
            )
        for name, words in self.choices.items():
            if name in given:
                check_choice(name, given[name], words)

    def __call__(self, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        kwargs = {n: v for n, v in kwargs.items() if not (v is None and n in self.inputs)}
        missing = [n for n in self.required if n not in kwargs]
        unknown = sorted(set(kwargs) - set(self._parameters))
        if missing or unknown:
            wrong = [
                f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names
            ]
            raise ValueError(
                f"{self.name}: {'; '.join(wrong)}. It takes the tensors {', '.join(self.inputs)} and the "
                f"hyperparameters {', '.join(self.defaults) or 'none'}"
            )
        tensors = {n: v for n, v in kwargs.items() if n in self.inputs}
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{self.name}: {name} must be a tensor, got {type(value).__name__}")
        self.check_hyperparameters({n: v for n, v in kwargs.items() if n in self.defaults})
        self._check_shapes({n: tuple(v.shape) for n, v in tensors.items() if v.dim() > 0})
        return self.fn(**kwargs)

    def axes(self, name: str) -> tuple[str, ...]:
        """Returns the axes that input `name` may have in this method, alternatives in a row."""
        return self._axes.get(name, INPUTS[name].axes)

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
                    f"per list, T tokens per row; got {dict(shapes)}"
                )
        if not shapes:
            raise ValueError(f"{self.name}: expected tensors with one entry per unit, got scalars")

    def __repr__(self) -> str:
        return f"Method({self.name!r}, inputs={self.inputs}, defaults={self.defaults})"


_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)


def register(
    *,
    paper: str,
    equation: str,
    survey: str | None = None,
    attributes: Mapping[str, str] = MappingProxyType({}),
    unit: str = "pair",
    denominator: str = "units",
    uses: Mapping[str, str] = MappingProxyType({}),
    axes: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    state: StateUpdate | None = None,
    token_reward: bool = False,
    trains_head: bool = False,
    reads_context: bool = False,
    reads_teacher: bool = False,
    rl: RLDefaults = RLDefaults(),
) -> Callable[[Callable], Callable]:
    """Puts a pure function into METHODS under its own name.

    paper, equation, survey: see Card.
    attributes: the survey's words, by the names of survey.ATTRIBUTES, where they are not the first of each; `reference`
        follows from the signature.
    unit: what one loss is about, one of UNITS; "batch" if the losses of a batch depend on one another.
    denominator: what `reduction="mean"` divides by, one of DENOMINATORS.
    uses: optional inputs that matter only while a hyperparameter is neither 0 nor None: {"entropy": "entropy_coef"}.
    axes: the axes of an input where they are fewer than INPUTS allows: {"advantage": ("U",)}.
    state: how what is remembered of earlier batches changes with a batch, for inputs that the objective keeps.
    token_reward: whether the objective also returns β(log π − log ref) of every token.
    trains_head: of a reward model's method: whether its log-probs train the LM head, too.
    reads_context: whether the reference reads a context in front of the prompt that the policy does not read.
    reads_teacher: whether the reference is a teacher, another model, of which the policy learns.
    rl: defaults of online RL with a policy method.
    """

    def decorate(fn: Callable) -> Callable:
        name = fn.__name__
        if name in _METHODS:
            raise ValueError(f"a method named {name!r} is registered already, by {_METHODS[name].fn.__module__}")
        parameters = inspect.signature(fn).parameters
        unheard = [n for n, p in parameters.items() if "Tensor" in str(p.annotation) and n not in INPUTS]
        assert not unheard, f"{name}: {', '.join(unheard)} not in INPUTS: say there what it is"
        assert unit in UNITS and denominator in DENOMINATORS, f"{name}: {unit}, {denominator}"
        assert rl.advantage in ADVANTAGES, f"{name}: {rl.advantage}"
        words = survey_attributes(attributes, reference=any(n.startswith("ref_") for n in parameters))
        card = Card(paper, equation, survey, words, rl)
        flags = token_reward, trains_head, reads_context, reads_teacher
        _METHODS[name] = Method(fn, card, unit, denominator, uses, axes, state, *flags)
        return fn

    return decorate


def get_method(name: str) -> Method:
    """Returns the method of this name. Raises ValueError, with names like it, where there is none."""
    if name not in _METHODS:
        near = did_you_mean(name, sorted(_METHODS))
        raise ValueError(
            f"no method named {name!r}{near}{' There' if near else '; there'} are {', '.join(sorted(_METHODS))}"
        )
    return _METHODS[name]


def of_valid(method: Method, given: Mapping[str, Any], valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Calls a method; one whose units see one another with the valid units alone, and 0 for the others."""
    if method.unit != "batch":
        return method(**given)
    own = {k: x[valid] if isinstance(x, Tensor) and "U" in method.axes(k)[0] else x for k, x in given.items()}
    losses, metrics = method(**own)

    def everywhere(x: Tensor) -> Tensor:
        return torch.zeros(valid.shape, dtype=x.dtype, device=x.device).masked_scatter(valid, x)

    return everywhere(losses), {name: everywhere(x) for name, x in metrics.items()}
