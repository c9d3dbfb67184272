"""TRL 1.16 on this engine: `install()` for the trainers on its fused head, subclasses for what that does not reach."""

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
