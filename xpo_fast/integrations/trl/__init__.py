"""TRL 1.16 on this engine: `install()` for the trainers on its fused head, subclasses for what that does not reach."""

import importlib
from typing import Any

from .install import (
    IGNORE,
    NOT_FUSED,
    VERSION,
    HeadFunction,
    Installed,
    check_version,
    install,
    installed,
    logger,
    take_losses,
    uninstall,
    without_virtual,
)

__all__ = [
    "IGNORE",
    "NOT_FUSED",
    "VERSION",
    "HeadFunction",
    "Installed",
    "check_version",
    "install",
    "installed",
    "logger",
    "take_losses",
    "uninstall",
    "without_virtual",
]

_ELSEWHERE = {
    "dpo": ("DPOConfig", "DPOTrainer", "DPO_LOSS_TYPES"),
    "experimental": ("CPOTrainer", "ORPOTrainer", "TPOTrainer", "OnlineDPOTrainer"),
}


def __getattr__(name: str) -> Any:
    # Not before they are wanted: TRL warns when its experimental part is imported.
    for module, names in _ELSEWHERE.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
