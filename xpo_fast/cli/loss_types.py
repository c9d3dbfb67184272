"""Translates TRL's loss_type into --method."""

from __future__ import annotations

from collections.abc import Mapping

from ..wording import did_you_mean
from .parser import Given, UsageError

# Loss types of TRL beyond those of its DPOTrainer that integrations/liger/pairs.py names: DPO's, KTO's, CPO's and
# SFT's.
_FURTHER_LOSS_TYPES = {
    **{name: name for name in ("aot", "aot_unpaired", "sft", "kto", "apo_zero_unpaired", "simpo")},
    **{"sigmoid_norm": "dpo_norm", "nll": "sft"},
}
POLICY_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def loss_types() -> dict[str, str]:
    """Returns the method of each loss type of TRL's trainers on preferences, as docs/conversions.md has them."""
    from ..integrations.liger.pairs import DPO_METHODS

    return {**DPO_METHODS, **_FURTHER_LOSS_TYPES}


def as_method(given: Given, command: str, options: Mapping[str, Given]) -> list[str]:
    """Returns the words for --loss_type; raises UsageError for an unknown one, or other options against it."""
    if "method" in options:
        raise UsageError(f"--{given.name} and --method both say what the loss is: leave one out")
    names = given.values
    if command == "rl":
        known = {name: name for name in POLICY_LOSS_TYPES}
    else:
        from ..methods import METHODS

        known = {name: name for name in METHODS} | loss_types()
    for name in names:
        if name not in known:
            raise UsageError(f"--{given.name}: no loss type named {name!r}{did_you_mean(name, known)}")
    level = options.get("importance-sampling-level")
    if level is not None and names:
        by_sequence = level.values[:1] == ["sequence"]
        if by_sequence and names[0] not in ("grpo", "luspo"):
            raise UsageError(f"--{level.name} sequence goes with --loss_type grpo or luspo, got {names[0]}")
        if not by_sequence and names[0] == "luspo":
            raise UsageError(f"--{level.name} token: luspo has the ratio of a sequence")
        known = {**known, "grpo": "gspo"} if by_sequence else known
    found = [f"--method={' + '.join(known[name] for name in names)}"]
    if "sppo_hard" in names:
        found.append("--set=variant=hard")
    return found
