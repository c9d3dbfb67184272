"""Which metrics of a run make which chart: of training, with those of evaluations as points on the same axes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .charts import Chart, Line
from .series import Metrics, curve

# Charts by part: title, metrics in the order of their colours, whether they are shares.
Plan = tuple[str, tuple[str, ...], bool]
HELD_OUT = "held-out score"  # of a recipe
CURVES: tuple[Plan, ...] = (
    ("Loss", ("loss",), False),
    ("Norm of the gradient", ("grad_norm",), False),
    ("Learning rate", ("learning_rate",), False),
)
REWARDS: tuple[Plan, ...] = (
    ("Score on the held-out prompts", (HELD_OUT,), False),
    ("Reward", ("reward",), False),
    ("Implicit rewards", ("rewards/chosen", "rewards/rejected"), False),
    ("Reward margin", ("rewards/margins",), False),
    ("Chosen has the higher reward", ("rewards/accuracies",), True),
    ("Accuracy", ("accuracy",), True),
    ("Log-probs of the completions", ("logps/chosen", "logps/rejected"), False),
)
LENGTHS: tuple[Plan, ...] = (
    ("Tokens of a completion", ("completions/mean_length",), False),
    ("Completions that were cut off", ("completions/clipped_ratio",), True),
)
SPEED: tuple[Plan, ...] = (
    ("Tokens per second", ("tokens_per_second",), False),
    ("Positions saved by the layout", ("tokens_saved",), True),
    ("Seconds of a rollout and of an update", ("time/rollout_s", "time/update_s"), False),
    ("Seconds of sampling and of rewards", ("time/generate_s", "time/reward_s"), False),
)
_COMPONENT = re.compile(r"rewards/(.+)/mean$")
_KL = re.compile(r"(^|[/_])(reverse_)?kl($|[/_])")
SHARES = ("accuracies", "accuracy", "clipped_ratio", "unrewarded", "frac_reward_zero_std")


@dataclass
class Charted:
    """Makes the charts of a run's metrics, and knows which are left."""

    metrics: Metrics
    marks: Sequence[float] = ()
    used: set[str] = field(default_factory=set)

    def charts(self, plans: Iterable[Plan]) -> list[Chart]:
        """Returns the charts of the plans for which the run has values."""
        return [chart for plan in plans if (chart := self.chart(*plan)) is not None]

    def chart(self, title: str, names: Sequence[str], share: bool = False) -> Chart | None:
        """Returns the chart of these metrics; None if the run has none of them."""
        lines, notes = [], []
        for k, name in enumerate(names):
            self.used |= {name, spread_of(name)}
            shown = name.rpartition("/")[2] if len(names) > 1 else name
            sides = ((self.metrics.training, "", False), (self.metrics.evaluation, ", held out", True))
            for series, told, points in sides:
                if name not in series:
                    continue
                found = series[name]
                of = curve(found, series.get(spread_of(name)))
                lines.append(Line(shown + told * (name != HELD_OUT), of, k, points=points))
                if found.missing:
                    count, all_of = found.missing, len(found.values)
                    notes.append(f"{shown}{told}: {count} of {all_of} logs have no finite value.")
        return Chart(title, lines, self.marks, notes, share=share) if lines else None

    @property
    def names(self) -> list[str]:
        """All metrics, in the order of the log."""
        return [*dict.fromkeys([*self.metrics.training, *self.metrics.evaluation])]

    def components(self) -> list[Chart]:
        """Returns a chart for each component of the reward."""
        found = [(name, m[1]) for name in self.names if (m := _COMPONENT.match(name))]
        return self.charts((title, (name,), False) for name, title in found)

    def divergences(self) -> list[Chart]:
        """Returns a chart for each KL divergence, and for its coefficient."""
        named = [n for n in self.names if _KL.search(n) and n not in self.used and n != "kl_coef"]
        coefficient = self.metrics.training.get("kl_coef")
        shown = [*named, *(["kl_coef"] if coefficient is not None and any(coefficient.finite) else [])]
        self.used.add("kl_coef")
        titles = {"kl_coef": "Coefficient of the KL divergence"}
        return self.charts((titles.get(n, f"KL divergence: {n}"), (n,), False) for n in shown)

    def others(self) -> list[Chart]:
        """Returns a chart for each metric that has none yet."""
        left = [name for name in self.names if name not in self.used]
        return self.charts((name, (name,), name.endswith(SHARES)) for name in left)


def spread_of(name: str) -> str:
    """Returns the name of a metric's standard deviation."""
    return f"{name.removesuffix('/mean')}/std" if name.endswith("/mean") else f"{name}_std"
