"""A teacher's likeliest tokens as columns of a data set: made where the teacher is, read by `topk_kl` where it is not.

The columns have the names of the arguments of `Objective`: `topk_ids` and `topk_logp`, a list of at most K numbers for
each token of the completion. They belong to token ids and not to text, so the data set is one of token ids.
"""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import DataError, with_column
from ..data.collate import pad_rows
from ..data.topk import TOPK
from ..head.chunked import final_logits
from ..head.operands import Operands
from ..head.plan import fit_tiles
from ..head.sharded import unpartitioned
from ..head.spec import Scaling, scored_positions
from ..layouts import Inputs
from ..models import Head, install_fused_loss
from ..models.modes import evaluating
from ..types import IGNORE_INDEX
from .teachers import vocabulary

_NAMES = " and ".join(TOPK)
_OVER = 1e-3  # by which rounded probabilities may add up to more than 1


def teacher_topk(
    teacher: nn.Module,
    dataset: datasets.Dataset,
    k: int = 16,
    *,
    vocab: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> datasets.Dataset:
    """Computes a teacher's k likeliest tokens at every token of the completions, for `topk_kl`.

    teacher: a causal LM; its logits are made in tiles, and none are kept. dataset: token ids, from `data.encode(…,
    kind="chosen")` by the student's tokenizer, which must be the teacher's. vocab: the student's rows of the head, if
    the teacher's has more: the log-probs are then over these alone. batch_size: rows of a forward, of similar length.
    progress: show a bar.

    Returns the data set with the columns `topk_ids` and `topk_logp`, (tokens of the completion, k) in each row, the
    likeliest token first; tokens that are not scored have empty lists. `save_to_disk` keeps it, and
    `datasets.load_from_disk` reads it, for `XPOTrainer` with method="topk_kl".

    Raises ValueError for a data set without token ids or with the columns already, and for k outside 1 … V.
    """
    names = set(dataset.column_names)
    if not {"prompt_ids", "chosen_ids"} <= names:
        raise ValueError(
            'expected token ids, the columns prompt_ids and chosen_ids of data.encode(…, kind="chosen"), got '
            f"{', '.join(sorted(names))}"
        )
    if names & set(TOPK):
        raise ValueError(f"the data set has {_NAMES} already: remove these columns to have them made anew")
    rows = vocabulary(teacher)
    vocab = rows if vocab is None else vocab
    if not 1 <= vocab <= rows:
        raise ValueError(f"expected vocab from 1 to {rows}, the rows of the teacher's head, got {vocab!r}")
    if not (isinstance(k, int) and 1 <= k <= vocab):
        raise ValueError(f"expected k from 1 to {vocab}, the tokens of the vocabulary, got {k!r}")
    install_fused_loss(teacher)
    rows_of: Any = dataset
    lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows_of]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    found: list[Any] = [None] * len(dataset)
    with tqdm(total=len(order), unit="row", desc="the teacher's tokens", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            for i, one in zip(at, _of_batch(teacher, [dataset[i] for i in at], k, vocab), strict=True):
                found[i] = one
            bar.update(len(at))
    for name, values in zip(TOPK, zip(*found, strict=True), strict=True):
        dataset = with_column(dataset, name, list(values))
    return dataset


def _of_batch(teacher: nn.Module, rows: list[dict[str, Any]], k: int, vocab: int) -> list[tuple[list, list]]:
    """Returns the columns of some rows."""
    device = next(teacher.parameters()).device
    pairs = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    batch = pad_rows(pairs, 0, [row.get("chosen_mask") for row in rows], last=True)
    inputs = Inputs.of({name: x.to(device) for name, x in batch.items()})

    def likeliest(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        return dict(zip(TOPK, _likeliest(hidden, head, inputs.targets, k, vocab), strict=True))

    with evaluating(teacher):
        found = inputs.run(teacher, likeliest)
    ids, logp = (found[name].cpu() for name in TOPK)
    made = []
    for r, (prompt, completion) in enumerate(pairs):
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(completion))
        scored = (batch["targets"][r, at] != IGNORE_INDEX).tolist()
        parts = [x[r, at].tolist() for x in (ids, logp)]
        own, theirs = ([one if s else [] for one, s in zip(part, scored, strict=True)] for part in parts)
        made.append((own, theirs))
    return made


def _likeliest(hidden: Tensor, head: Head, targets: Tensor, k: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Returns ids (R, T, k) int64 and log-probs (R, T, k) float32 of the likeliest of the first `vocab` tokens."""
    weight, bias = (None if x is None else unpartitioned(x)[0].detach() for x in (head.weight, head.bias))
    assert weight is not None
    if head.adapter is not None:  # hidden has its inputs beside the hidden states
        weight = torch.cat([weight, head.adapter.detach().to(weight)], dim=1)
    scaling = Scaling(1.0, head.softcap, float(head.logit_scale))
    flat, weight = targets.flatten(), weight[:vocab]
    bias = None if bias is None else bias[:vocab]
    operands = Operands(hidden.flatten(0, 1), weight, flat, bias, scaling=scaling).admit()
    index = scored_positions(torch.where(flat == IGNORE_INDEX, flat, 0), IGNORE_INDEX, vocab, hidden.device)
    tiling, *_ = fit_tiles("torch", vocab, weight.dtype, weight.device, None, dz=False)
    ids = torch.zeros((flat.shape[0], k), dtype=torch.int64, device=hidden.device)
    logp = torch.full((flat.shape[0], k), -torch.inf, device=hidden.device)
    for part, z in final_logits(operands, index, tiling.step):
        values, ids[part] = z.topk(k, dim=1)
        logp[part] = (values - z.logsumexp(dim=1, keepdim=True)).float()
    return ids.view(*targets.shape, k), logp.view(*targets.shape, k)


def read_topk(folder: str) -> datasets.Dataset:
    """Reads the folder that `save_to_disk` of a data set of `teacher_topk` has written; DataError for another one."""
    try:
        found = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: topk_kl reads a folder that xpo-fast distill --cache-teacher DIR has written ({error})"
        ) from None
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"{folder}: expected one data set, got {', '.join(map(str, found))}: name the folder of one")
    check_names(found)
    return found


def check_names(dataset: Any) -> None:
    """Raises DataError for a data set without token ids and the columns of a teacher."""
    names = set(getattr(dataset, "column_names", None) or ())
    if not {"prompt_ids", "chosen_ids", *TOPK} <= names:
        raise DataError(
            f"topk_kl reads a teacher's likeliest tokens: expected token ids with the columns {_NAMES}, as "
            "xpo_fast.trainer.teacher_topk and xpo-fast distill --cache-teacher make them, got "
            f"{', '.join(sorted(names)) or type(dataset).__name__}; or have the teacher there and train by gkd"
        )


def check_topk(dataset: Any, vocab: int, max_length: int) -> None:
    """Raises DataError, which names the row, for columns of a teacher that are missing, broken or of longer rows.

    vocab: the rows of the student's head. A row longer than max_length is refused: what would be cut is what the
    teacher has read.
    """
    check_names(dataset)
    for i, row in enumerate(dataset):
        fault = _fault(row, vocab, max_length)
        if fault:
            raise DataError(f"{row.get('where') or f'row {i}'}: {fault}")


def _fault(row: dict[str, Any], vocab: int, max_length: int) -> str | None:
    ids, logp = (row[name] for name in TOPK)
    count, length = len(row["chosen_ids"]), len(row["prompt_ids"]) + len(row["chosen_ids"])
    if length > max_length:
        return (
            f"{length} tokens, more than max_length={max_length}: the teacher has read them all; raise max_length, or "
            "encode to this length and have the teacher's columns made anew"
        )
    if not len(ids) == len(logp) == count:
        return f"expected {_NAMES} of each of the {count} tokens of the completion, got {len(ids)} and {len(logp)}"
    scored = row.get("chosen_mask") or [True] * count
    for t, (own, theirs, reads) in enumerate(zip(ids, logp, scored, strict=True)):
        place = f"token {t} of the completion"
        if len(own) != len(theirs):
            return f"{place} has {len(own)} numbers in {TOPK[0]} and {len(theirs)} in {TOPK[1]}"
        if reads and not own:
            return f"{place} is scored and has nothing in {_NAMES}"
        if bad := [x for x in own if not 0 <= x < vocab]:
            return f"{place} has the id {bad[0]}, which the student's vocabulary of {vocab} does not hold"
        if len(set(own)) < len(own):
            return f"{place} has an id twice in {TOPK[0]}"
        numbers = torch.tensor(theirs, dtype=torch.float64)
        if bool((numbers.isnan() | (numbers > _OVER)).any()) or numbers.exp().sum() > 1 + _OVER:
            return f"{place} has {theirs} in {TOPK[1]}, which are no log-probs: expected numbers of at most 0 in nats"
    return None
