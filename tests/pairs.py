"""Parameters that do not act on one another: every two of their values together once, not every combination."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def in_pairs(*parameters: tuple[str, Iterable[Any]]) -> pytest.MarkDecorator:
    """Parametrises a test so that every value of a parameter stands beside every value of every other one.

    A fault of one value, or of two together, is seen as by the full product; one that takes three values is not. What
    acts together in threes is one parameter, "learn, tile", whose values are tuples.
    """
    names = [name for name, _ in parameters]
    values = [list(of) for _, of in parameters]
    rows = covering(values)
    split = ["," in name for name in names]
    flat = [[x for v, many in zip(row, split, strict=True) for x in (v if many else (v,))] for row in rows]
    return pytest.mark.parametrize(
        ", ".join(names).replace(" ", "").split(","), flat, ids=lambda x: getattr(x, "__name__", str(x))
    )


def covering(values: list[list[Any]]) -> list[list[Any]]:
    """Rows, one value of each list in its place, in which any two values of two lists stand together."""
    order = sorted(range(len(values)), key=lambda k: -len(values[k]))
    places = [range(len(values[k])) for k in order]
    pairs = combinations(range(len(places)), 2)
    missing = {(a, i, b, j) for a, b in pairs for i, j in product(places[a], places[b])}

    def extended(row: list[int]) -> list[int]:
        for at in range(len(row), len(places)):
            gains = [sum((a, i, at, j) in missing for a, i in enumerate(row)) for j in places[at]]
            # Where nothing is missing, the values take turns.
            turn = sum(row) % len(places[at])
            row = [*row, max(places[at], key=lambda j: (gains[j], -((j - turn) % len(places[at]))))]
        missing.difference_update((a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2))
        return row

    rows = [extended(list(begun)) for begun in product(*places[:2])]
    while missing:
        a, i, b, j = min(missing)
        row = [0] * len(places)
        row[a], row[b] = i, j
        for at in {*range(len(row))} - {a, b}:
            row[at] = max(
                places[at],
                key=lambda k: ((a, i, at, k) in missing) + ((at, k, a, i) in missing)
                + ((b, j, at, k) in missing) + ((at, k, b, j) in missing),
            )  # fmt: skip
        missing.difference_update((a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2))
        rows.append(row)
    return [[values[k][row[order.index(k)]] for k in range(len(values))] for row in rows]
