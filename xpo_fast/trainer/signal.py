"""Tells whether a run learns: a watcher of the numbers of its first steps, which names why nothing is learned.

`Watcher` sees numbers alone, so that it is tested on series of them; watching.py gives it those of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .findings import Finding

ON_NO_SIGNAL = ("ignore", "warn", "stop")
STEPS = 5  # looked at, after which a cause is named; of a shorter run all, if there are LEAST
LEAST = 3
MOST_CUT = 0.95  # share of completions that are cut, from which on it is a cause where nothing tells the cut ones apart
LEAST_MOVED = 0.1  # share of the weights with a gradient that another number must be in after the steps
_NOTHING = 1e-5  # of a log-ratio: rounding of log-probs, far under what a step does to them
_RELATIVE = 1e-5  # of a margin, against the rewards that it is between

Numbers = Mapping[str, float]
Cause = Callable[[Sequence[Numbers], "About"], "str | None"]


class NoSignalError(ValueError):
    """A run was stopped because it learned nothing; its message is the line that names the cause.

    folder: that of the checkpoint that was written; None: none was.
    """

    def __init__(self, said: str, folder: str | None = None) -> None:
        super().__init__(said)
        self.folder = folder


@dataclass(frozen=True)
class About:
    """What a line on a run says beside numbers."""

    online: bool = False  # it samples completions and scores them
    rewards: str = ""  # the names of the reward functions
    max_new_tokens: int | None = None
    temperature: float | None = None
    masks_cut: bool = False  # completions that are cut are not trained on
    dtype: str = "torch.float32"  # of the weights that are trained
    beta: float = 0.1  # by which implicit rewards are log-ratios


@dataclass
class Watcher:
    """A watcher of a run's first steps.

    peak: the learning rate asked for, below half of which, while it rises, a run still warms up. last: the number of
    the run's last step.

    Two windows of `STEPS` steps are looked at: the first steps, for what no learning rate would mend (completions cut
    in their masses, constant rewards, groups that score alike, gradients that are exactly 0), and the first after the
    warm-up, for a policy that does not move. One cause of a window is named, the first in the order of `FIRST` and
    `STEADY`, for the others follow from it; and nothing is said of later steps, but that the learning rate has become
    0: a run that has learned its task scores alike, too.
    """

    peak: float = 0.0
    last: int = 1 << 62
    about: About = About()
    first: list[dict[str, Any]] = field(default_factory=list)
    steady: list[dict[str, Any]] = field(default_factory=list)
    seen: int = 0  # steps
    before: float = math.inf  # the learning rate of the step before
    still: int = 0  # steps in a row whose learning rate was 0
    said: list[str] = field(default_factory=list)  # causes that have been named
    closed: list[str] = field(default_factory=list)  # windows that have been judged

    def looks(self, rate: float) -> bool:
        """Returns whether of the next step, of this learning rate, more is looked at than that."""
        return "first" not in self.closed or (self.warm(rate) and "steady" not in self.closed)

    def warm(self, rate: float) -> bool:
        """Returns whether a step of this learning rate is behind the warm-up; a rate that is not known (NaN) is."""
        behind = rate >= self.peak / 2 or rate <= self.before < math.inf
        return bool(self.steady) or "steady" in self.closed or math.isnan(rate) or (rate > 0 and behind)

    def ends(self, rate: float) -> bool:
        """Returns whether the next step, of this learning rate, is the last one of the steady window."""
        count = len(self.steady) + 1
        return self.warm(rate) and "steady" not in self.closed and (count == STEPS or self.seen + 1 >= self.last)

    def step(self, numbers: Mapping[str, Any]) -> Finding | None:
        """Takes the numbers of the next step; returns the cause if one is found, each once.

        numbers: loss, grad_norm, learning_rate (NaN or missing: not known); rewards/chosen, rewards/rejected and
        rewards/margins of pairs; in a step that began with a rollout those of `rl.collect.told_apart`; and moved, the
        share of weights with a gradient that have changed since the steady window began, in its last step. They may be
        tensors () on a device, which are read, all at once, when a window ends.
        """
        rate = numbers.get("learning_rate", math.nan)
        warm, self.seen = self.warm(rate), self.seen + 1
        self.still, self.before = (self.still + 1 if rate == 0 else 0), rate
        found = None
        for name, taken in (("first", self.first), ("steady", self.steady)):
            if name in self.closed or (name == "steady" and not warm):
                continue
            taken.append(dict(numbers))
            if len(taken) == STEPS or self.seen >= self.last:
                self.closed.append(name)
                if len(taken) >= LEAST and not self.said:
                    found = self._judge(FIRST if name == "first" else STEADY, read(taken))
                taken.clear()
        if found is None and self.still == STEPS and not self.said:
            found = self._name("learning rate", _NO_RATE.format(STEPS))
        return found

    def _judge(self, causes: Mapping[str, Cause], taken: Sequence[Numbers]) -> Finding | None:
        for name, cause in causes.items():
            if (text := cause(taken, self.about)) is not None:
                return self._name(name, text)
        return None

    def _name(self, cause: str, text: str) -> Finding:
        self.said.append(cause)
        return Finding(cause, "fault", text)

    def state_dict(self) -> dict[str, Any]:
        """Returns, as JSON values, what a resumed run must know of the steps before it."""
        self.first, self.steady = read(self.first), read(self.steady)
        kept = asdict(self)
        return {name: kept[name] for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`."""
        for name in _STATE:
            setattr(self, name, state[name])


def read(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns the numbers of steps, with those that are tensors () on one device read at once."""
    waiting = [x for numbers in steps for x in numbers.values() if isinstance(x, Tensor)]
    values = iter(torch.stack(waiting).tolist() if waiting else [])
    return [{n: next(values) if isinstance(x, Tensor) else x for n, x in numbers.items()} for numbers in steps]


_STATE = ("first", "steady", "seen", "before", "still", "said", "closed")
_NO_RATE = (
    "the learning rate has been 0 in each of {} steps in a row: nothing can move. Set learning_rate, or give the "
    "scheduler as many steps as the run has"
)


# --- the first steps --------------------------------------------------------------------------------------------------


def _rollouts(steps: Sequence[Numbers]) -> list[Numbers]:
    """Returns the steps that began with a rollout."""
    return [x for x in steps if "completions" in x]


def _all_of(steps: Sequence[Numbers], name: str, holds: Callable[[float], bool]) -> bool:
    """Returns whether there are steps with this number, and it holds of each."""
    values = [x[name] for x in steps if name in x]
    return bool(values) and all(map(holds, values))


def _constant(rollouts: Sequence[Numbers]) -> bool:
    return bool(rollouts) and min(x["reward/least"] for x in rollouts) == max(x["reward/most"] for x in rollouts)


def _alike(rollouts: Sequence[Numbers]) -> bool:
    return _all_of(rollouts, "groups/alike", lambda share: share == 1)


def _counts(rollouts: Sequence[Numbers]) -> tuple[int, int]:
    """Returns how many completions and prompts there are."""
    return round(sum(x["completions"] for x in rollouts)), round(sum(x["groups"] for x in rollouts))


def cut(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that completions are cut in their masses, and nothing tells the cut ones apart (trl#5697)."""
    rollouts = _rollouts(steps)
    if not rollouts:
        return None
    count, _ = _counts(rollouts)
    share = sum(x["cut"] * x["completions"] for x in rollouts) / count
    if share < MOST_CUT:
        return None
    one = _all_of(rollouts, "cut/spread", lambda spread: spread == 0)
    if not (one or about.masks_cut or _constant(rollouts) or _alike(rollouts)):
        return None
    why = "and are not trained on (overlong)" if about.masks_cut and not one else "and score alike"
    return (
        f"{share:.0%} of {count} completions are cut at max_new_tokens={about.max_new_tokens}, {why}: raise "
        "max_new_tokens, ask for shorter answers, or reward what is there of one that is cut; if the answers are "
        "short and go on after their end, the model or its template never writes an EOS"
    )


def constant(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that every completion has one and the same reward."""
    rollouts = _rollouts(steps)
    if not _constant(rollouts):
        return None
    count, _ = _counts(rollouts)
    named = f" ({about.rewards})" if about.rewards else ""
    return (
        f"each of {count} completions has the reward {rollouts[0]['reward/least']:g}: they are not told apart{named}. "
        "Look at samples.jsonl: does the reward find the answer in them? Give part of it for a part, easier prompts, "
        "or a model that sometimes succeeds"
    )


def alike(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that the completions of each prompt score alike, so that every advantage within a group is 0."""
    rollouts = _rollouts(steps)
    if not _alike(rollouts):
        return None
    _, groups = _counts(rollouts)
    said = f"the completions of each of {groups} prompts have equal rewards among them, so each advantage is 0: "
    if _all_of(rollouts, "groups/same", lambda share: share == 1):
        return (
            f"{said}they are the same text, sampled at temperature={about.temperature:g}. Raise temperature, top_k or "
            "top_p, and let a server sample by another seed for each"
        )
    return (
        f"{said}the reward depends on the prompt alone. Give part of it for a part of the answer, take prompts that "
        "are neither always nor never solved, raise num_generations, or set max_draws, which draws others"
    )


def _same_pair(x: Numbers) -> bool:
    """Returns whether chosen and rejected score alike, and not because the policy is its reference."""
    logps = [x.get(name, math.nan) for name in ("logps/chosen", "logps/rejected")]
    return x.get("rewards/margins") == 0 and (x.get("rewards/chosen") != 0 or logps[0] == logps[1])


def no_gradient(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that the gradient is exactly 0 in each step."""
    if not _all_of(steps, "grad_norm", lambda norm: norm == 0):
        return None
    said = f"the gradient is exactly 0 in each of the first {len(steps)} steps: "
    if about.online:
        return (
            f"{said}no completion is trained on, although rewards differ. Look at overlong, off_policy_mode=mask, "
            "and at which weights are trained"
        )
    if all(map(_same_pair, steps)):
        return (
            f"{said}chosen and rejected score alike in each pair. Are they the same text, or the same after the cut at "
            "max_length?"
        )
    return (
        f"{said}the loss does not depend on the weights that are trained, or each unit is where the loss is flat (a "
        "hinge, a clip, a mask). Train other weights (lora-targets, requires_grad), or change the method's margin"
    )


# --- the first steps after the warm-up --------------------------------------------------------------------------------

_IMPLICIT = ("rewards/chosen", "rewards/rejected")


def _has_gradient(steps: Sequence[Numbers]) -> bool:
    """Returns whether there is a gradient in each step, as far as is known."""
    return all(x.get("grad_norm", math.nan) != 0 for x in steps)


def tied(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that chosen and rejected score alike in each pair, though their rewards are not 0."""
    later = steps[1:]
    if about.online or not all({*_IMPLICIT, "rewards/margins"} <= {*x} for x in later):
        return None
    sizes = [max(abs(x[name]) for name in _IMPLICIT) for x in later]
    margins = [abs(x["rewards/margins"]) for x in later]
    if not all(m <= _RELATIVE * s and s > _NOTHING * about.beta for m, s in zip(margins, sizes, strict=True)):
        return None
    return (
        f"chosen and rejected have the same reward in each pair of {len(steps)} steps: are they the same text, or the "
        "same after the cut at max_length? Raise max_length, or mend the columns"
    )


def at_reference(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that policy and reference are the same after steps, as they are at the first one alone (trl#1962)."""
    later = steps[1:]
    names = [n for n in _IMPLICIT if all(n in x for x in later)]
    if about.online or not names or not _has_gradient(steps):
        return None
    # NaN: of a side that no row is on, as KTO's where all are desirable.
    sizes = [[abs(x[n]) for n in names if not math.isnan(x[n])] for x in later]
    if not all(own and max(own) <= _NOTHING * about.beta for own in sizes):
        return None
    loss = f", the loss is {later[-1]['loss']:.4f}" if "loss" in later[-1] else ""
    return (
        f"the policy is still its reference after {len(steps) - 1} steps with a gradient{loss}: each reward is 0. "
        "Either the learning rate is too small for a step to be seen, or the reference is the model in training "
        "itself: make it another (reference=copy or cached, made before the first step)"
    )


def unmoved(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that hardly a weight has changed, though there is a gradient."""
    moved = steps[-1].get("moved", math.nan)
    if not moved < LEAST_MOVED or not _has_gradient(steps):
        return None
    rate = steps[-1].get("learning_rate", math.nan)
    said = f"{moved:.0%} of the weights that have a gradient have changed in {len(steps)} steps"
    at = "" if math.isnan(rate) else f" at learning rate {rate:g}"
    if about.dtype != "torch.float32":
        return (
            f"{said}{at}: updates of less than half a step of {about.dtype} round to nothing. Load the model in "
            "float32 and set bf16=True (mixed precision), train a LoRA adapter, or raise learning_rate"
        )
    return (
        f"{said}{at}: the optimizer holds other weights than are trained, or none of them. Leave optimizers= out, or "
        "make it after the adapter is on the model; else raise learning_rate"
    )


def same_loss(steps: Sequence[Numbers], about: About) -> str | None:
    """Says that the loss is one number, though there is a gradient."""
    losses = {x.get("loss", math.nan) for x in steps}
    if about.online or len(losses) > 1 or any(map(math.isnan, losses)) or not _has_gradient(steps):
        return None
    if len({x.get("rewards/margins") for x in steps}) > 1:  # which the loss rounds off, at a tiny β
        return None
    return (
        f"the loss is exactly {losses.pop():.6g} in each of {len(steps)} steps, although there is a gradient: what is "
        "trained does not reach the loss. Look at which weights are trained, and at the units of the data"
    )


FIRST: Mapping[str, Cause] = {"completions": cut, "rewards": constant, "groups": alike, "gradient": no_gradient}
STEADY: Mapping[str, Cause] = {"pairs": tied, "weights": unmoved, "reference": at_reference, "loss": same_loss}
