"""Log-probs and statistics of the next token, straight from hidden states and the LM head."""

from .statistics import (
    Plan,
    VocabShard,
    check_reference_head,
    gather_logps,
    head_plan,
    release_tiles,
    sequence_logps,
    shift_labels,
    token_logps,
    token_stats,
)

__all__ = [
    "Plan",
    "VocabShard",
    "check_reference_head",
    "gather_logps",
    "head_plan",
    "release_tiles",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_stats",
]
