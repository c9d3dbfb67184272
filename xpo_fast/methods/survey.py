"""The 13 attributes by which the survey (arXiv 2407.16216, Table 1) describes a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Attribute(NamedTuple):
    """A column of Table 1."""

    name: str
    about: str
    words: tuple[str, ...]  # the first is what `register` takes unless told otherwise; "-" where the table has none


ATTRIBUTES: Mapping[str, Attribute] = {
    "RM1": Attribute("reward", "reward model", ("Implicit", "Explicit")),
    "RM2": Attribute("reward-form", "form of the reward", ("Point", "Preference")),
    "RM3": Attribute("reward-level", "level of the reward", ("Response", "Token")),
    "RM4": Attribute("reward-sign", "sign of the reward", ("Positive", "Negative")),
    "F1": Attribute("feedback", "feedback", ("Preference", "Binary")),
    "F2": Attribute("feedback-source", "source of the feedback", ("Human", "AI")),
    "F3": Attribute("feedback-form", "completions compared", ("Pair", "List")),
    "RL1": Attribute("reference", "reference model", ("Reference", "Free")),
    "RL2": Attribute("length", "length of completions", ("Uncontrol", "Control")),
    "RL3": Attribute("divergence", "divergence from the reference", ("KL", "Multiple")),
    "RL4": Attribute("policy", "samples of the policy", ("Off", "On", "Hybrid")),
    "O1": Attribute("optimization", "optimization", ("Offline", "Online", "Hybrid")),
    "O2": Attribute("sft", "fine-tuning and alignment", ("Separate", "Merge")),
}
NO_REWARD = dict.fromkeys(("reward", "reward-form", "reward-level", "reward-sign"), "-")


def attributes(words: Mapping[str, str], *, reference: bool) -> dict[str, str]:
    """Returns Table 1's word for every attribute: those of `words`, by name, and else the first of each."""
    words = {**words, "reference": "Reference" if reference else "Free"}
    unknown = sorted(set(words) - {a.name for a in ATTRIBUTES.values()})
    assert not unknown, f"no attribute {', '.join(unknown)}"
    found = {code: words.get(a.name, a.words[0]) for code, a in ATTRIBUTES.items()}
    for code, word in found.items():
        assert word in (*ATTRIBUTES[code].words, "-"), f"{ATTRIBUTES[code].name}: {word}"
    return found
