"""The columns of a teacher's likeliest tokens, brought to the positions of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TOPK = ("topk_ids", "topk_logp")  # of each token of the completion, at most K numbers


def pad_topk(rows: Sequence[Mapping[str, Any]], width: int) -> dict[str, Tensor]:
    """Returns topk_ids (R, width, K) int64 and topk_logp float32 at the positions that predict the tokens.

    K: the most numbers of a token in these rows. What is not there is id 0 with the log-prob −∞.
    """
    most = max((len(one) for row in rows for one in row[TOPK[0]]), default=1) or 1
    ids = torch.zeros((len(rows), width, most), dtype=torch.int64)
    logp = torch.full((len(rows), width, most), -math.inf)
    for r, row in enumerate(rows):
        first = len(row["prompt_ids"]) - 1
        for t, (own, theirs) in enumerate(zip(*(row[name] for name in TOPK), strict=True), start=first):
            ids[r, t, : len(own)] = torch.tensor(own, dtype=torch.int64)
            logp[r, t, : len(theirs)] = torch.tensor(theirs)
    return dict(zip(TOPK, (ids, logp), strict=True))
