"""Preference and RL losses straight from hidden states and the LM head, never holding tokens × vocabulary."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .version import __version__

if _TYPE_CHECKING:
    from .head import RowShard, VocabShard, gather_logps, sequence_logps, shift_labels, token_logps, token_stats
    from .methods import METHODS
    from .models import Head
    from .objective import Objective
    from .types import LossOutput, TokenStats

__all__ = [
    "METHODS",
    "Head",
    "LossOutput",
    "Objective",
    "RowShard",
    "TokenStats",
    "VocabShard",
    "__version__",
    "gather_logps",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_stats",
]

# Imported when first asked for: the command line parses, completes and shows its help without waiting for torch.
_HOMES = {
    **dict.fromkeys(("RowShard", "VocabShard"), "head"),
    **dict.fromkeys(("gather_logps", "sequence_logps", "shift_labels", "token_logps", "token_stats"), "head"),
    "METHODS": "methods",
    "Objective": "objective",
    **dict.fromkeys(("LossOutput", "TokenStats"), "types"),
    "Head": "models",
}


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Of a checkout that is on PYTHONPATH and not installed: `xpo_fast.kernels` lies beside the package, not in it.
if (_Path(__file__).parents[1] / "kernels" / "rows.py").is_file():
    __path__.append(str(_Path(__file__).parents[1]))
