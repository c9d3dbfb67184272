"""Rows with several ratings per completion, which `regression` learns from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import data
from ..data import KINDS, DataError
from ..data.rows import check_names, shape_row


def load_ratings(
    source: Any,
    objectives: Sequence[str],
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    seed: int = 42,
) -> tuple[Any, list[list[float]]]:
    """Returns rows of prompt and completion as `data.load` does, and the ratings (N, K) of each row, NaN where null.

    objectives: the K names of the ratings. The other arguments are those of `data.load`. Raises DataError for a row
    that lacks an objective, has a value that is neither a finite number nor null, or has only nulls.
    """

    def shape(row: Any, where: str) -> list[dict[str, Any]]:
        ratings = _ratings(row, objectives, where) if isinstance(row, dict) else []
        # A row of this kind must have a number, hence the reward; the ratings are kept beside the rows.
        read = {**row, "label": None, "reward": 0.0, "value": None} if isinstance(row, dict) else row
        return [{**shaped, "ratings": ratings} for shaped in shape_row(read, KINDS["unpaired"], where)]

    check_names(columns or (), also=objectives)
    rows = data.load_rows(
        source,
        shape,
        split=split,
        columns=columns,
        config=config,
        seed=seed,
        expected=f"prompt, completion and {', '.join(objectives)}",
    )
    return rows.remove_columns("ratings"), list(rows["ratings"])


def _ratings(row: Mapping[Any, Any], objectives: Sequence[str], where: str) -> list[float]:
    missing = [name for name in objectives if name not in row]
    if missing:
        raise DataError(
            f"{where}: {', '.join(missing)} missing; expected prompt, completion and the numbers "
            f"{', '.join(objectives)}; got {', '.join(map(str, row))}"
        )
    found = [_rating(row[name], name, where) for name in objectives]
    if all(map(math.isnan, found)):
        raise DataError(f"{where}: {', '.join(objectives)} are null; rate the completion, or drop the row")
    return found


def _rating(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}: {name} must be a finite number or null; got {value!r}")
    return float(value)
