"""What a model can be given: token ids that have an embedding, and rows that its positions hold."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .lm_head import causal_lm


def embeddings(model: Any) -> int:
    """Returns the number of token embeddings of the model, which may exceed the number of its tokenizer's tokens."""
    try:
        weight = model.get_input_embeddings().weight
    except NotImplementedError:  # Canine hashes its ids: any will do
        return sys.maxsize
    return getattr(weight, "ds_shape", weight.shape)[0]


def check_ids(model: Any, tokenizer: Any, ids: Iterable[int | None], where: str) -> None:
    """Raises ValueError, naming `where`, for a token id that the model has no embedding for."""
    count = embeddings(model)
    outside = next((i for i in ids if i is not None and not 0 <= i < count), None)
    if outside is not None:
        token = tokenizer.convert_ids_to_tokens(outside) if outside >= 0 else None
        raise ValueError(
            f"{where}: token id {outside} ({token!r}), and the model has {count} embeddings, for ids 0 to {count - 1}; "
            f"the tokenizer has {len(tokenizer)} tokens: use the tokenizer of this model, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and save the model"
        )


def padding_id(model: Any, tokenizer: Any) -> int:
    """Returns the id to pad batches with: the pad token's, else EOS, else 0, the first that has an embedding.

    Padding is masked and never scored, so any id will do that the model can look up.
    """
    count = embeddings(model)
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in found if i is not None and 0 <= i < count), 0)


def positions(model: Any) -> int | None:
    """Returns the number of positions that the model's config states; None for no limit."""
    config = getattr(causal_lm(model), "config", None)
    found = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return found if isinstance(found, int) and found > 0 else None


def table_of_positions(model: Any) -> int | None:
    """Returns the length of the longest row that the model can look up positions for; None where it computes them.

    A model with a table of positions (GPT-2, OPT, BERT; GPT-J's and CTRL's are computed once) fails on a longer row.
    Rotary positions and ALiBi have no such end: there `positions` is only what the model was trained for.
    """
    stated = positions(model)
    if stated is None:
        return None
    found = []
    for name, module in causal_lm(model).named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe"):
            # RoBERTa counts positions from behind its padding index, OPT from an offset.
            padding = module.padding_idx
            skipped = getattr(module, "offset", 0) if padding is None else padding + 1
            found.append((module.num_embeddings, module.num_embeddings - skipped))
        found += [(len(x), len(x)) for n, x in module.named_buffers(recurse=False) if "pos" in n and x.dim() == 2]
    # Other tables, such as an image encoder's, are of other sizes.
    return min((usable for size, usable in found if stated <= size <= stated + 8), default=None)


def check_lengths(model: Any, lengths: Sequence[int], where: Callable[[int], str], remedy: str) -> None:
    """Raises ValueError, naming the row, for one of more tokens than the model has positions in a table.

    lengths: tokens of each row. where: names row i. remedy: what to do. Rows longer than the number of positions that
    the model was trained for, but that it can compute, are warned of.
    """
    table = table_of_positions(model)
    limit = positions(model) if table is None else table
    over = [i for i, n in enumerate(lengths) if limit is not None and n > limit]
    if not over:
        return
    worst = max(over, key=lengths.__getitem__)
    said = f"{where(worst)}: {lengths[worst]} tokens, and the model has {limit} positions"
    more = f" (the longest of {len(over)} such rows)" if len(over) > 1 else ""
    if table is not None:
        raise ValueError(f"{said}{more}: {remedy}")
    warnings.warn(f"{said}{more}; beyond those it was not trained: {remedy}", stacklevel=3)
