"""The terms of an objective: methods with their hyperparameters and weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..methods import Method, get_method

_TERM = re.compile(r"\s*(?:([0-9.eE+-]*[0-9.])\s*\*)?\s*([A-Za-z_]\w*)\s*")


@dataclass(frozen=True)
class Term:
    """One method of an objective, with its hyperparameters and the weight of its loss."""

    method: Method
    hyperparameters: Mapping[str, Any]
    weight: float = 1.0

    @property
    def compares_pairs(self) -> bool:
        """Returns whether the method compares both sides of a pair with a reference."""
        return {"logp_w", "logp_l", "ref_logp_w", "ref_logp_l"} <= set(self.method.inputs)

    @property
    def reads_reference(self) -> bool:
        """Returns whether the method reads a reference if there is one; it need not require it."""
        return any(n.startswith("ref_") and self.method.wants(n, self.hyperparameters) for n in self.method.inputs)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters.items())
        scale = "" if self.weight == 1 else f"{self.weight:g}*"
        return f"{scale}{self.method.name}({options})"


def parse_terms(
    method: str | Sequence[str | tuple[str, Mapping[str, Any]]],
    weights: Sequence[float] | None,
    shared: Mapping[str, Any],
) -> list[Term]:
    """Parses an objective's first argument into terms.

    weights: one per method, or None. shared: hyperparameters for every method that has them; those of an entry have
    priority. Raises ValueError for an unknown method or hyperparameter, and for weights that do not fit.
    """
    parsed: list[tuple[str, Mapping[str, Any], float]] = []
    if isinstance(method, str):
        for part in method.split(" + ") if " + " in method else [method]:
            match = _TERM.fullmatch(part)
            if match is None:
                raise ValueError(f"expected a method or a sum of them as 'dpo + 0.5*sft', got {method!r}")
            if match[1] and weights is not None:
                raise ValueError(f"the weights came twice, in {method!r} and as weights={weights!r}")
            parsed.append((match[2], {}, float(match[1] or 1)))
    else:
        for entry in method if isinstance(method, (list, tuple)) else [None]:
            name, own = (entry, {}) if isinstance(entry, str) else entry if isinstance(entry, tuple) else (None, None)
            if not isinstance(name, str) or not isinstance(own, Mapping):
                raise ValueError(
                    f"expected a list of names, of which each may come as (name, hyperparameters), got {method!r}; "
                    "weights go into weights="
                )
            parsed.append((name, own, 1.0))
    if not parsed:
        raise ValueError("expected at least one method, got an empty list")
    if weights is not None:
        if not isinstance(weights, (list, tuple)) or len(weights) != len(parsed):
            raise ValueError(f"expected a weight for each of {len(parsed)} methods, got {weights!r}")
        parsed = [(name, own, float(w)) for (name, own, _), w in zip(parsed, weights, strict=True)]
    if not all(math.isfinite(scale) for *_, scale in parsed):
        raise ValueError(f"expected finite weights, got {[scale for *_, scale in parsed]}")
    terms = []
    for name, own, scale in parsed:
        found = get_method(name)
        own = {**{k: v for k, v in shared.items() if k in found.defaults}, **own}
        found.check_hyperparameters(own)
        terms.append(Term(found, {**found.defaults, **own}, scale))
    unknown = {k: v for k, v in shared.items() if not any(k in t.method.defaults for t in terms)}
    if unknown:
        if len(terms) == 1:
            terms[0].method.check_hyperparameters(unknown)
        names = ", ".join(t.method.name for t in terms)
        raise ValueError(f"none of {names} has a hyperparameter {', '.join(unknown)}")
    return terms
