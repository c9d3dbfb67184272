"""Log-probs and statistics of the next token, straight from hidden states and the LM head."""

from .gather import gather_logps
from .gemms import release_tiles
from .plan import Plan
from .row_parallel import RowShard
from .rows import shift_labels
from .spec import Jsd
from .statistics import head_plan, sequence_logps, token_logps, token_stats
from .vocab_parallel import VocabShard

__all__ = [
    "Jsd",
    "Plan",
    "RowShard",
    "VocabShard",
    "gather_logps",
    "head_plan",
    "release_tiles",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_stats",
]
