"""Where transformers can report a run to, and whether it can here: known before a run loads anything."""

from __future__ import annotations

from collections.abc import Sequence

from .wording import did_you_mean

# What transformers' function that looks for a reporter is called, and what pip calls the package, where not as the reporter.
_AVAILABLE = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
_PACKAGES = {
    "azure_ml": "azureml-sdk",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
}


def check_reporters(names: str | Sequence[str] | None) -> None:
    """Raise ValueError for a reporter that transformers does not know, or that is not installed."""
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
