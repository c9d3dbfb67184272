from __future__ import annotations

from itertools import combinations, product

import pytest

from pairs import covering, in_pairs


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (5, 3, 2, 2), (2, 2, 2), (2, 2, 2, 2, 2), (30, 9, 2), (3, 3, 3, 3)])
def test_every_two_values_stand_together(sizes):
    values = [[f"{k}{i}" for i in range(size)] for k, size in enumerate(sizes)]
    rows = covering(values)
    assert all(x in of for row in rows for x, of in zip(row, values, strict=True))
    for a, b in combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(values[a], values[b]))
    assert len({tuple(row) for row in rows}) == len(rows) <= len(list(product(*values)))


def test_hardly_more_rows_than_the_two_longest_have_pairs():
    assert len(covering([list("abcde"), list("uvw"), [0, 1], [0, 1]])) <= 16
    assert len(covering([list(range(100)), list(range(9)), [0, 1]])) == 900


def test_values_that_act_together_are_one_parameter():
    mark = in_pairs(("learn, tile", [("a", 1), ("b", 2)]), ("packed", [False, True]))
    names, rows = mark.args
    assert names == ["learn", "tile", "packed"] and len(rows) == 4 and ["b", 2, True] in rows
