"""The configuration of a reward model's training, and its hyperparameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..methods import get_method
from ..methods.math import check_choice
from ..methods.reward import odin
from ..trainer import XPOConfig
from ..trainer.config import argument
from .spec import READS_SAMPLES, READS_VIEWS, USES, RewardSpec

# Arguments that a few methods alone read: these methods, and what the value must be.
_OWN: dict[str, tuple[set[str], str, Callable[[float], bool]]] = {
    "view_dropout": (READS_VIEWS, "above 0 and below 1: without dropout the two views are one", lambda x: 0 < x < 1),
    "sample_prompts": (READS_SAMPLES, "at least 1", lambda x: x >= 1),
    "inner_lr": ({"meta"}, "positive", lambda x: 0 < x < math.inf),
}


@dataclass
class RewardConfig(XPOConfig):
    """`XPOConfig` for a reward model: `method` is a key of `spec.USES`. The length rule applies to scoring only."""

    splits_rows: ClassVar[bool] = False

    method: str = argument("bradley_terry", "The method that trains the reward model: " + ", ".join(USES))
    objectives: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the rewards of regression, columns of numbers in the data, and of gated. "
            "None: the column reward alone."
        },
    )
    objective_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the objectives in the reward of regression. None: their mean."}
    )
    length_alpha: float | None = argument(None, "Divides the reward by this number + the tokens of the completion.")
    length_target: float = argument(0.0, "Length in tokens that costs nothing, with length_lam.")
    length_lam: float = argument(0.0, "Reward subtracted per token more or fewer than length_target.")
    learning_rate: float = argument(1e-5, "The initial learning rate of AdamW.")
    value_head_learning_rate: float | None = argument(
        None, "Learning rate of the value head, whose weights begin near 0. None: learning_rate."
    )

    whiten: bool = argument(
        False,
        "After training, measure mean and standard deviation of the rewards, of rows held out or else of training "
        "rows, and save them: (reward - mean)/std is the reward from then on.",
    )
    view_dropout: float | None = argument(
        None, "Dropout of the hidden states that makes the two views of contrastive and rlp. None: 0.1."
    )
    sample_prompts: int | None = argument(
        None, "Prompts whose samples are read beside each batch by rlp and meta. None: per_device_train_batch_size."
    )
    inner_lr: float | None = argument(None, "Rate of meta's inner step on the policy's samples. None: 1e-3.")

    def spec(self) -> RewardSpec:
        """Returns the spec of the reward model. Raises ValueError if the arguments contradict each other."""
        check_choice("method", self.method, tuple(USES))
        if self.tile_mib is not None:
            raise ValueError("tile_mib has no effect on a reward model: leave it out")
        if self.score != "assistant":
            raise ValueError("score has no effect on a reward model, which reads all of a completion: leave it out")
        if self.context is not None:
            raise ValueError("context is for context_distillation, no reward model reads one: leave it out")
        if self.objectives and USES[self.method][1] not in ("objectives", "gated"):
            raise ValueError(f"objectives are for regression and gated; {self.method} has one reward")
        if self.objective_weights is not None and USES[self.method][1] != "objectives":
            raise ValueError(f"objective_weights weigh the rewards of regression; {self.method} has none to weigh")
        if self.length_target and not self.length_lam:
            raise ValueError(f"length_target={self.length_target:g} is where length_lam is 0: set length_lam, too")
        if self.ref_cache_dir is not None:
            raise ValueError("ref_cache_dir has no effect: a reward model's reference is computed live, leave it out")
        if self.whiten and USES[self.method][1] == "preference":
            raise ValueError(f"whiten: {self.method} compares two completions and has no reward to whiten")
        self._check_own()
        # max_length is about training's memory: a model is read at the last token, wherever that is.
        names = ("method", "max_prompt_length", "chat_template_kwargs", "length_alpha", "length_target", "length_lam")
        objectives = tuple(self.objectives or ("reward",))
        weights = None if self.objective_weights is None else tuple(self.objective_weights)
        return RewardSpec(objectives=objectives, weights=weights, **{name: getattr(self, name) for name in names})

    def _check_own(self) -> None:
        """Raises ValueError for arguments of a few methods that are out of range, or given to another method."""
        for name, (methods, expected, holds) in _OWN.items():
            value = getattr(self, name)
            if value is not None and self.method not in methods:
                raise ValueError(f"{name} is for {' and '.join(sorted(methods))}; {self.method} has no use for it")
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        if self.method == "contrastive" and self.per_device_train_batch_size < 2:
            raise ValueError("contrastive sets the pairs of a batch apart: expected 2 or more per batch, got 1")


def checked_settings(args: RewardConfig) -> dict[str, Any]:
    """Returns the hyperparameters in args.method_args. Raises ValueError for an unknown name or no number."""
    given: Any = args.method_args or {}
    settings: dict[str, Any] = dict(given)
    of = odin if args.method == "odin" else get_method(args.method).fn
    parameters = inspect.signature(of).parameters
    for name, value in settings.items():
        default = parameters[name].default if name in parameters else None
        numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
        if numeric and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{args.method}: expected a number for {name}, got {value!r}")
    if args.method == "odin":
        known = [n for n, p in parameters.items() if p.default is not p.empty]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"odin has no hyperparameter {', '.join(unknown)}; it has {', '.join(known)}")
    else:
        get_method(args.method).check_hyperparameters(settings)
    return settings
