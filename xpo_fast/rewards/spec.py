"""The spec of a reward model: its method, the value head's outputs, and how they combine to a reward."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..files import write_json
from ..methods import METHODS
from ..methods.reward import length_normalised, length_penalty
from ..models.value_head import ValueHead

SPEC_FILE = "reward_model.json"

# A method trains a reward model if it takes one of these sets of inputs. They determine the kind of data it learns from
# (`data.KINDS`), and what the value head's outputs are: one reward; one per objective; those and the gate's logits; the
# logit of P(one completion beats another).
_FORMS = (
    ({"reward_w", "reward_l"}, "pair", "reward"),
    ({"rewards", "ranks"}, "list", "reward"),
    ({"logit", "desirable"}, "unpaired", "reward"),
    ({"rewards", "targets"}, "unpaired", "objectives"),
    ({"rewards_w", "gate_w"}, "pair", "gated"),
    ({"logit", "prob_w"}, "pair", "preference"),
)
# The kind of data and the form of the outputs by method; ODIN has an output for quality and one for length.
USES = {
    name: (kind, form) for name, m in METHODS.items() for inputs, kind, form in _FORMS if inputs <= set(m.inputs)
} | {"odin": ("pair", "odin")}
# Two views of hidden states, for a loss that learns without labels.
_VIEWS = ("view", "other_view", "sample_view", "other_sample_view")
READS_VIEWS = {name for name in USES if name in METHODS and {*_VIEWS} & {*METHODS[name].inputs}}
# The methods that also read completions that the policy has sampled.
READS_SAMPLES = {"meta", *(name for name in READS_VIEWS if "sample_view" in METHODS[name].inputs)}
# The methods that learn from the probability of a label: as an input, or by the loss of the pair in both orders.
SOFT_LABELS = {
    name
    for name, m in METHODS.items()
    if name in USES and ("prob_w" in m.inputs or {*m.required} - {*_VIEWS} == {"reward_w", "reward_l"})
}


def check_samples(method: str, given: bool) -> None:
    """Raises ValueError for samples of the policy that a method lacks or does not read."""
    if method in READS_SAMPLES and not given:
        raise ValueError(f"{method} reads what the policy samples: give samples (--samples)")
    if given and method not in READS_SAMPLES:
        names = " and ".join(sorted(READS_SAMPLES))
        raise ValueError(f"samples are for {names}, not for {method}: leave them out (--samples)")


@dataclass(frozen=True)
class RewardSpec:
    """Description of a reward model, saved beside its weights.

    max_length, max_prompt_length: lengths in tokens that what is scored is cut to, as `data.encode` cuts; None cuts
    nothing. Folders of earlier versions hold the max_length of training's rows there, 1024 by default.
    """

    method: str = "bradley_terry"  # one of USES
    objectives: tuple[str, ...] = ("reward",)  # the K rewards of "regression" and "gated"
    weights: tuple[float, ...] | None = None  # of the objectives in the reward; None: their mean
    max_length: int | None = None
    max_prompt_length: int | None = None
    length_alpha: float | None = None  # reward / (α + tokens), `length_normalised`
    length_target: float = 0.0  # reward − λ·|tokens − target|, `length_penalty`
    length_lam: float = 0.0
    chat_template_kwargs: dict[str, Any] | None = None  # that it was trained with; those of a prompt come first
    # Whitening: (reward − mean)/std in front of the length rule, as Llama 2 does (arXiv 2307.09288); None: none.
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.method not in USES:
            raise ValueError(f"no reward model is trained by {self.method!r}; expected one of {', '.join(USES)}")
        least = 2 if self.form == "gated" else 1
        if len(self.objectives) < least:
            raise ValueError(
                f"{self.method} has objectives, {least} or more; got {', '.join(self.objectives) or 'none'}: name them"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"expected max_length of at least 2, or None for no cut, got {self.max_length!r}")
        if self.weights is not None and len(self.weights) != len(self.objectives):
            raise ValueError(
                f"expected a weight for each of {len(self.objectives)} objectives, got {len(self.weights)}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"expected mean and std, or neither; got mean={self.mean!r}, std={self.std!r}")
        if self.std is not None and self.mean is not None:
            if not (0 < self.std < math.inf and math.isfinite(self.mean)):
                raise ValueError(f"expected a finite mean and std > 0, got mean={self.mean!r}, std={self.std!r}")
            if self.form == "preference":
                raise ValueError("a preference model has no reward to whiten: leave mean and std out")

    @property
    def kind(self) -> str:
        """The kind of data to train on, a key of `data.KINDS`."""
        return USES[self.method][0]

    @property
    def form(self) -> str:
        """What the outputs are: "reward", "objectives", "gated", "odin" or "preference"."""
        return USES[self.method][1]

    @property
    def outputs(self) -> int:
        """The number of outputs of the value head."""
        count = len(self.objectives)
        return {"objectives": count, "gated": 2 * count, "odin": 2}.get(self.form, 1)

    @property
    def reads_logps(self) -> bool:
        """Whether training also reads the log-probs of the completions, as GRM and HAF do."""
        return self.method in METHODS and "logp_w" in METHODS[self.method].inputs

    @property
    def reads_states(self) -> bool:
        """Whether training also reads the hidden states along the completions, as goal_conditioned does."""
        return self.method in METHODS and "near_w" in METHODS[self.method].inputs

    @property
    def is_logit(self) -> bool:
        """Whether σ(scale·difference) is a probability that the method fits: not for ratings or a length rule."""
        return self.form != "objectives" and self.length_alpha is None and not self.length_lam

    @property
    def scale(self) -> float:
        """The factor on differences of rewards that gives logits: the standard deviation that whitening took out."""
        return 1.0 if self.std is None else self.std

    def read(
        self,
        head: ValueHead,
        hidden: Tensor,  # (R, T, D)
        attention_mask: Tensor,  # (R, T), padding on the right
        targets: Tensor,  # (R, T) aligned; the first that is not −100 is the completion's first token
    ) -> Tensor:
        """Returns the outputs (R, K) at the last token; the gate, which sees the prompt alone, at the prompt's last."""
        found, *gate = map(head, self.states(hidden, attention_mask, targets).unbind(dim=1))
        if gate:
            count = len(self.objectives)
            found = torch.cat([found[:, :count], gate[0][:, count:]], dim=1)
        return found

    def states(self, hidden: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
        """Returns the hidden states that `read` reads, (R, 1, D), or (R, 2, D) with a gate; arguments as there."""
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows[:, None], self._read_at(attention_mask, targets)]

    def wanted(self, attention_mask: Tensor, targets: Tensor, *, logps: bool = False) -> Tensor:
        """Returns the positions (R, T) bool that `read` reads; with logps those with a target, too."""
        at = self._read_at(attention_mask, targets).clamp(min=0)  # a row without tokens has no last one
        read = torch.zeros_like(targets, dtype=torch.bool).scatter(1, at, True)
        return read | (targets != data.IGNORE_INDEX) if logps else read

    def _read_at(self, attention_mask: Tensor, targets: Tensor) -> Tensor:
        """Returns the columns that are read, (R, 1), or (R, 2) with a gate."""
        last = attention_mask.sum(dim=1) - 1
        gate = [(targets != data.IGNORE_INDEX).int().argmax(dim=1)] if self.form == "gated" else []
        return torch.stack([last, *gate], dim=1)

    def combine(
        self,
        outputs: Tensor,  # (R, K)
        lengths: Tensor,  # (R,) tokens of the completions
    ) -> Tensor:
        """Returns the rewards (R,), whitened and with the length rule.

        Raises ValueError for a preference model, which has none.
        """
        reward = self.mix(outputs)
        if self.mean is not None and self.std is not None:
            reward = (reward - self.mean) / self.std
        if self.length_alpha is not None:
            reward = length_normalised(reward, lengths, self.length_alpha)
        if self.length_lam:
            reward = reward - length_penalty(lengths, self.length_target, self.length_lam)
        return reward

    def mix(self, outputs: Tensor) -> Tensor:
        """Returns the model's own rewards (R,) of outputs (R, K), before whitening and length rule, which see them."""
        if self.form == "preference":
            raise ValueError("a preference model compares two completions and has no reward of one: use compare()")
        if self.form == "gated":
            rewards, gate = outputs.chunk(2, dim=1)
            return (gate.softmax(dim=1) * rewards).sum(dim=1)
        if self.form == "objectives":
            weights = self.weights or [1 / len(self.objectives)] * len(self.objectives)
            return outputs @ outputs.new_tensor(weights)
        return outputs[:, 0]


def save_spec(spec: RewardSpec, folder: str | Path) -> None:
    """Writes the spec into the folder, as `SPEC_FILE`."""
    write_json(Path(folder) / SPEC_FILE, fields_of(spec))


def fields_of(spec: RewardSpec) -> dict[str, Any]:
    """Returns the spec's fields, without those of whitening where there is none: as earlier versions wrote them."""
    found = dataclasses.asdict(spec)
    return found if spec.std is not None else {k: v for k, v in found.items() if k not in ("mean", "std")}


def load_spec(folder: str | Path) -> RewardSpec:
    """Returns the spec in a folder. Raises ValueError if the file has fields that this version does not know."""
    path = Path(folder) / SPEC_FILE
    found = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(set(found) - {field.name for field in dataclasses.fields(RewardSpec)})
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; it was written by another version of xpo_fast")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return RewardSpec(**values)
