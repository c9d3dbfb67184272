"""METHODS: every method by name. A method's signature says what it needs; the card says where it comes from."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import Tensor

ATTRIBUTES = ("RM1", "RM2", "RM3", "RM4", "F1", "F2", "F3", "RL1", "RL2", "RL3", "RL4", "O1", "O2")

# The inputs that the objective makes itself from hidden states, targets and a reference. All others are columns.
SIDES = {"pairwise": ("_w", "_l"), "unpaired": ("",)}
DERIVED = {
    "pairwise": ("logp_w", "logp_l", "ref_logp_w", "ref_logp_l", "len_w", "len_l"),
    "unpaired": ("logp", "ref_logp", "length"),
}


@dataclass(frozen=True)
class Card:
    """Where a method comes from, and the survey's 13 attributes of it (Table 1's words, "-" where it has none)."""

    paper: str  # title and arXiv number
    equation: str  # as computed here, plain text
    survey: str | None  # equation numbers of the survey
    attributes: Mapping[str, str]


class Method:
    """A registered method: call it with keyword tensors and hyperparameters → (losses, metrics)."""

    def __init__(self, fn: Callable, name: str, card: Card, unit: str, denominator: str) -> None:
        self.fn, self.name, self.card, self.unit, self.denominator = fn, name, card, unit, denominator
        self.__doc__ = fn.__doc__

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.fn).parameters)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors it takes, optional ones included."""
        hints = typing.get_type_hints(self.fn)
        return tuple(n for n in self._parameters if hints[n] is Tensor or Tensor in typing.get_args(hints[n]))

    @cached_property
    def required(self) -> tuple[str, ...]:
        return tuple(n for n in self.inputs if self._parameters[n].default is inspect.Parameter.empty)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters and their defaults."""
        return {n: p.default for n, p in self._parameters.items() if n not in self.inputs}

    @cached_property
    def layout(self) -> str:
        """How rows are laid out: "pairwise" (chosen rows, then rejected rows) or "unpaired" (one row a unit)."""
        return "unpaired" if "logp" in self.inputs else "pairwise"

    @property
    def needs_reference(self) -> bool:
        return any(n.startswith("ref_") for n in self.required)

    @cached_property
    def sides(self) -> tuple[str, ...]:
        """The suffixes of the rows of a unit that the method reads: `sft` reads the chosen half only."""
        return tuple(s for s in SIDES[self.layout] if "logp" + s in self.inputs)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The inputs that a caller of the objective provides by name."""
        return tuple(n for n in self.inputs if n not in DERIVED[self.layout])

    def check_hyperparameters(self, names: Mapping[str, Any]) -> None:
        unknown = sorted(set(names) - set(self.defaults))
        if unknown:
            raise ValueError(
                f"{self.name} has no hyperparameter {', '.join(unknown)}; it has {', '.join(self.defaults) or 'none'}"
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
        shapes = {n: tuple(v.shape) for n, v in tensors.items() if v.dim() > 0}
        if len(set(shapes.values())) > 1 or not shapes:
            raise ValueError(
                f"{self.name}: expected tensors of one shape, one entry a unit, got {shapes or 'scalars'}"
            )
        return self.fn(**kwargs)

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
) -> Callable[[Callable], Callable]:
    """Put a pure function into METHODS under its own name.

    attributes: the survey's words in the order of ATTRIBUTES without RL1, which the signature tells.
    unit: what one loss is about: "row", "pair", or "batch" if losses of a batch depend on one another.
    denominator: what `reduction="mean"` divides by: "units", or "tokens" of the rows that the method reads.
    """

    def decorate(fn: Callable) -> Callable:
        name = fn.__name__
        if name in _METHODS:
            raise ValueError(
                f"a method named {name!r} is registered already, by {_METHODS[name].fn.__module__}"
            )
        words = attributes.split()
        reference = "Reference" if any("ref_" in n for n in inspect.signature(fn).parameters) else "Free"
        words.insert(ATTRIBUTES.index("RL1"), reference)
        assert len(words) == len(ATTRIBUTES), f"{name}: {len(words)} attributes"
        card = Card(paper, equation, survey, dict(zip(ATTRIBUTES, words, strict=True)))
        _METHODS[name] = Method(fn, name, card, unit, denominator)
        return fn

    return decorate


def get_method(name: str) -> Method:
    if name not in _METHODS:
        raise ValueError(f"no method named {name!r}; there are {', '.join(sorted(_METHODS))}")
    return _METHODS[name]
