"""Preference and RL losses straight from hidden states and the LM head, never holding tokens × vocabulary."""

from pathlib import Path as _Path

from . import interrupts as _interrupts  # noqa: F401  # before torch
from .head import VocabShard, gather_logps, sequence_logps, shift_labels, token_logps, token_stats
from .methods import METHODS
from .objective import Objective
from .types import Head, LossOutput, TokenStats
from .version import __version__

__all__ = [
    "METHODS",
    "Head",
    "LossOutput",
    "Objective",
    "TokenStats",
    "VocabShard",
    "__version__",
    "gather_logps",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_stats",
]

# Of a checkout that is on PYTHONPATH and not installed: `xpo_fast.kernels` lies beside the package, not in it.
if (_Path(__file__).parents[1] / "kernels" / "rows.py").is_file():
    __path__.append(str(_Path(__file__).parents[1]))
