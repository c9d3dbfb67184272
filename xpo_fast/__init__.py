"""Preference and RL losses straight from hidden states and the LM head, never holding tokens × vocabulary."""

from .head import gather_logps, sequence_logps, shift_labels, token_logps, token_stats
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
    "__version__",
    "gather_logps",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_stats",
]
