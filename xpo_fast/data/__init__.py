"""From preference data to batches: `load` reads rows, `encode` makes token ids, `Collator` pads them.

    a file ── load ──▶ prompt, chosen, rejected ── encode ──▶ token ids ── Collator ──▶ tensors (R, T)

A data set is of one kind, a key of `KINDS`, by what a method learns from:

    pair        prompt, chosen, rejected
    unpaired    prompt, completion            label or reward (or both)
    list        prompt, completions           scores or rejected (or both)
    rejected    prompt, rejected
    chosen      prompt, chosen

On the right is what rows must have beside the text (a list's `rejected` is one more completion, for the methods that
compare it with all the others). They may carry the numbers of their `Kind`, in every row of a data set or in none.

Every row keeps its place in the column `where` (``"pairs.jsonl:17"``), so that an error can name it.
"""

from ..types import IGNORE_INDEX
from .collate import Collator, pad_rows
from .context import add_context, under_context
from .encode import (
    decode_after,
    encode,
    encode_rows,
    leading_ids,
    render,
    split_ids,
    tokenize,
    tokenize_after,
    with_column,
)
from .kinds import KINDS, DataError, Kind
from .load import Place, load, load_prompts, load_rows, origins, prompt_keys
from .rows import check_columns
from .sources import read, require
from .template import (
    KWARGS,
    TOOLS,
    Conversation,
    as_conversation,
    check_written,
    place_of,
    prompt_of,
    read_kwargs,
    template_columns,
    words,
    write,
)
from .turns import check_score

__all__ = [
    "IGNORE_INDEX",
    "KINDS",
    "KWARGS",
    "TOOLS",
    "Collator",
    "Conversation",
    "DataError",
    "Kind",
    "Place",
    "add_context",
    "as_conversation",
    "check_columns",
    "check_score",
    "check_written",
    "decode_after",
    "encode",
    "encode_rows",
    "leading_ids",
    "load",
    "load_prompts",
    "load_rows",
    "origins",
    "pad_rows",
    "place_of",
    "prompt_keys",
    "prompt_of",
    "read",
    "read_kwargs",
    "render",
    "require",
    "split_ids",
    "template_columns",
    "tokenize",
    "tokenize_after",
    "under_context",
    "with_column",
    "words",
    "write",
]
