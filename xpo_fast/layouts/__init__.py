"""Layouts of a batch: padded rows, rows packed side by side, and rows whose common beginnings stand once."""

from .attention import laid_out
from .check import Proof, Reads, prove
from .choice import Chosen, check_layout, choose, must_stay_padded
from .inputs import ROWS_SPLIT, Inputs, LaysOut, Wanted, beside, with_target
from .model import attention_of, install_layouts, remove_layouts
from .rows import CHOICES, LAYOUTS, LEAST_SAVED, Layout, lay_out, side_by_side
from .split import current_shard, own_chunk, split_over
from .support import unsupported

__all__ = [
    "CHOICES",
    "LAYOUTS",
    "LEAST_SAVED",
    "ROWS_SPLIT",
    "Chosen",
    "Inputs",
    "Layout",
    "LaysOut",
    "Proof",
    "Reads",
    "Wanted",
    "attention_of",
    "beside",
    "check_layout",
    "choose",
    "current_shard",
    "install_layouts",
    "laid_out",
    "lay_out",
    "must_stay_padded",
    "own_chunk",
    "prove",
    "remove_layouts",
    "side_by_side",
    "split_over",
    "unsupported",
    "with_target",
]
