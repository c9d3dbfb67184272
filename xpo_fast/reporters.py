"""Checks, before a run loads anything, that transformers can report to the services that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from .wording import did_you_mean

# Reporters for which the name in transformers' is_…_available, or the package's name on PyPI, differs from their own.
_AVAILABLE = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
_PACKAGES = {
    "azure_ml": "azureml-sdk",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
}


def check_reporters(names: str | Sequence[str] | None) -> None:
    """Raises ValueError for a reporter that transformers does not know, or whose package is not installed."""
    from transformers.integrations import integration_utils as integrations

    known = list(integrations.INTEGRATION_TO_CALLBACK)
    for name in [names] if isinstance(names, str) else names or []:
        if name in ("none", "all"):
            continue
        if name not in known:
            near = did_you_mean(name, [*known, "none"])
            raise ValueError(f"no reporter named {name!r}{near or ';'} There are none, all, {', '.join(sorted(known))}")
        available = getattr(integrations, f"is_{_AVAILABLE.get(name, name)}_available", None)
        if available is not None and not available():
            raise ValueError(
                f"the reporter {name} is not installed: pip install {_PACKAGES.get(name, name)}, or report to none"
            )
