"""Recipes: iterative alignment as data, one loop and a table of choices (recipe_loop.py runs them).

    generate ──▶ judge ──▶ select ──▶ train ──▶ reference
     draws       scores     pairs     method     update

A recipe is a value: `RECIPES["rso"]`, changed by `override(recipe, {"select.beta": 0.2, "draws.n": 16})`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import KINDS
from ..methods import METHODS
from ..objective import Objective
from ..wording import did_you_mean
from .selection import SELECTORS

REFERENCES = {
    "none": "the method has none",
    "fixed": "the model at the start of the run",
    "previous": "the model at the start of the iteration",
    "two": "fixed for what the policy wrote, previous for the data's rejected completion",
}
JUDGES = {
    "none": "no judge",
    "self": "the policy itself, 0 to 5 points in words",
    "reward": "a judge that is given, a reward model or functions in the paper",
    "preference": "a judge that is given, one that compares in the paper",
    "llm": "a judge that is given, a language model in the paper",
}
FROM_DATA = ("dataset", "split")  # selections that take the data's own pairs: all, or one part an iteration


@dataclass(frozen=True)
class Draw:
    """n completions of each prompt; a recipe with several draws has a policy and its enhancers."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0

    def __str__(self) -> str:
        at = "" if self.temperature == 1 else f" at T={self.temperature:g}"
        return f"{self.n}{at}"


@dataclass(frozen=True)
class Train:
    """A method of METHODS, its arguments, and λ of a penalty λ‖θ‖₁ on the trained weights."""

    method: str
    args: Mapping[str, Any] = field(default_factory=dict)
    l1: float = 0.0

    def __str__(self) -> str:
        return f"{self.method} + l1" if self.l1 else self.method


@dataclass(frozen=True)
class Recipe:
    """One way to make data with a policy and to train the policy on them.

    draws: who completes each prompt; none where the data's own completions are used.
    gold: the data's own answer (`chosen`) is one of the candidates.
    revise: rounds of critique and revision that each sample goes through.
    judge: a key of JUDGES. select: of SELECTORS, or "dataset" (the data's pairs), "split" (a part an iteration), "online"
        (samples are trained on as they are made: the RL methods).
    train: one method; several are trained side by side from the same model, each as an adapter, and merged.
    merge: arguments of PEFT's `add_weighted_adapter`, for several.
    reference: a key of REFERENCES.
    mix: the reference's share in the mixture that rivals are drawn from (`nash_md`).
    then: the recipe that goes on with the model, or with the reward model, that this one made.
    """

    name: str
    about: str
    paper: str
    train: tuple[Train, ...]
    draws: tuple[Draw, ...] = ()
    gold: bool = False
    revise: int = 0
    judge: str = "reward"
    select: str = "best-worst"
    select_args: Mapping[str, Any] = field(default_factory=dict)
    reference: str = "previous"
    iterations: int = 3
    merge: Mapping[str, Any] = field(default_factory=dict)
    mix: float = 0.0
    then: str | None = None

    def __post_init__(self) -> None:
        def check(holds: bool, expected: str, got: Any) -> None:
            if not holds:
                raise ValueError(f"recipe {self.name}: expected {expected}, got {got!r}")

        check(bool(self.train), "a method to train", self.train)
        for train in self.train:
            check(train.method in METHODS, f"a method of {', '.join(sorted(METHODS))}", train.method)
            check(_within(train.l1, 0, math.inf), "l1 >= 0", train.l1)
        selections = (*SELECTORS, *FROM_DATA, "online")
        check(self.select in selections, f"select to be one of {', '.join(selections)}", self.select)
        check(self.judge in JUDGES, f"judge to be one of {', '.join(JUDGES)}", self.judge)
        check(self.reference in REFERENCES, f"reference to be one of {', '.join(REFERENCES)}", self.reference)
        check(_whole(self.iterations, 1), "at least one iteration", self.iterations)
        check(_within(self.mix, 0, 1), "mix in [0, 1]", self.mix)
        check(_whole(self.revise, 0), "revise >= 0 rounds", self.revise)
        check(type(self.gold) is bool, "gold to be true or false", self.gold)
        for draw in self.draws:
            check(_whole(draw.n, 1), "draws of n >= 1", draw.n)
            check(_within(draw.temperature, 0, math.inf), "temperature >= 0", draw.temperature)
            check(_within(draw.top_p, 0, 1) and draw.top_p > 0, "top_p in (0, 1]", draw.top_p)
        online, drawn = self.select == "online", self.select not in FROM_DATA
        check(online == self.online, 'select="online" with methods of RL, and only there', self.select)
        check(bool(self.draws) == drawn, "draws, or a selection from the data", self.select)
        fresh = self.iterations == 1 or not online or self.reference == "previous"
        check(fresh, 'reference="previous" for several iterations of RL', self.reference)
        check(
            self.iterations == 1 or not self.makes_reward_model,
            "one iteration of a reward model",
            self.iterations,
        )
        self._rehearse()
        if self.select in SELECTORS:
            selector = SELECTORS[self.select]
            check(selector.needs == "nothing" or self.judge != "none", f"a judge for {self.select}", self.judge)
            for train in self.train:
                kind = self.kind(train)
                # The chosen half of a pair is read where that is all that the method learns from.
                fits = selector.kind == kind or (selector.kind == "pair" and KINDS[kind].half == 0)
                check(fits, f"a selection of {kind} data, which {train.method} learns from", self.select)

    def _rehearse(self) -> None:
        """ValueError for an argument that the selector or a method would refuse after everything has been sampled."""
        toy = {"nothing": torch.tensor(2), "scores": torch.tensor([1.0, 0.0])}
        toy["wins"] = torch.tensor([[0.5, 0.9], [0.1, 0.5]])
        what, given = f"select={self.select}", self.select_args
        try:
            if self.select in SELECTORS:
                selector = SELECTORS[self.select]
                selector(toy[selector.needs], torch.Generator().manual_seed(0), given)
            for train in self.train:
                what, given = train.method, train.args
                if given and METHODS[what].layout != "reward":
                    Objective(what, **given).rehearse()
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe {self.name}: {what} with {dict(given)}: {error}") from error

    @property
    def online(self) -> bool:
        """Whether the method samples while it trains."""
        return METHODS[self.train[0].method].layout == "policy"

    @property
    def makes_reward_model(self) -> bool:
        return METHODS[self.train[0].method].layout == "reward"

    @property
    def columns(self) -> tuple[str, ...]:
        """What the data must have beside a prompt."""
        if self.select in FROM_DATA:
            return ("chosen", "rejected")
        return ("chosen",) * self.gold + ("rejected",) * (self.select == "against-rejected")

    def kind(self, train: Train) -> str:
        """The data that `train` learns from, as `data.load` names it."""
        return "pair" if self.makes_reward_model else Objective(train.method).data_kind

    def cells(self) -> tuple[str, ...]:
        """generate, judge, select, method, reference: its row of the table."""
        draws = " + ".join(map(str, self.draws)) + (" + gold" if self.gold else "")
        draws += f", {self.revise} revisions" if self.revise else ""
        method = " ∥ ".join(map(str, self.train)) + (f" → {self.then}" if self.then else "")
        return (
            draws or "–",
            self.judge.replace("none", "–"),
            self.select,
            method,
            self.reference.replace("none", "–"),
        )


@dataclass(frozen=True)
class StoppingRule:
    """When to end: the survey (4.6) names the missing stopping point of iterative training as an open problem.

    After every iteration the policy answers the same held-out prompts and a judge scores them. An iteration is better
    than the best so far if the mean of the paired differences is above min_gain + z standard errors of that mean. After
    `patience` iterations that are not, the loop ends, and the best model is the result.
    """

    patience: int = 1
    min_gain: float = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        if not (self.patience >= 1 and self.z >= 0 and math.isfinite(self.z) and math.isfinite(self.min_gain)):
            raise ValueError(f"expected patience >= 1, z >= 0, and a finite min_gain, got {self}")

    def best(self, history: Sequence[Sequence[float]]) -> int:
        """The index of the best so far. history: the scores of the same prompts, of the start and of each iteration."""
        best = 0
        for i in range(1, len(history)):
            gain, error = paired(history[i], history[best])
            if gain > self.min_gain + (self.z * error if self.z else 0.0):
                best = i
        return best

    def stops(self, history: Sequence[Sequence[float]]) -> bool:
        return len(history) - 1 - self.best(history) >= self.patience


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a − b and the standard error of that mean, over the entries that both have (not NaN)."""
    differences = [x - y for x, y in zip(a, b, strict=True) if not math.isnan(x - y)]
    count = len(differences)
    mean = sum(differences) / count if count else math.nan
    if count < 2:
        return mean, math.inf if count else math.nan
    return mean, math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count)


def runs_in(output: Path) -> list[Path]:
    """The folders of the runs in an output folder: itself, or those of a recipe's parts."""
    return [path.parent for path in (*output.glob("run.json"), *sorted(output.glob("[1-9]-*/run.json")))]


def get_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        near = did_you_mean(name, RECIPES)
        raise ValueError(f"no recipe named {name!r}{near}{' There' if near else '; there'} are {', '.join(RECIPES)}")
    return RECIPES[name]


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other values.

    The names are its fields (iterations, judge, select, reference, gold, revise, mix, then), and behind a dot what belongs to one:
    draws.n, draws.temperature, draws.top_p of all draws, or draws[1].n of one; method.beta, …, l1, of all methods that
    have it; select.beta, …; merge.density, …. ValueError for a name that there is not.
    """
    plain = {name: settings[name] for name in _PLAIN if name in settings}
    if plain.get("select", recipe.select) != recipe.select:
        plain["select_args"] = {}  # those of the other selector
    recipe = dataclasses.replace(recipe, **plain)
    for name, value in settings.items():
        if name not in _PLAIN:
            recipe = _set(recipe, name, value)
    return recipe


_PLAIN = ("iterations", "judge", "select", "reference", "gold", "revise", "mix", "then")


def _set(recipe: Recipe, name: str, value: Any) -> Recipe:
    head, _, rest = name.partition(".")
    owner, _, index = head.partition("[")
    change: dict[str, Any] = {}
    if owner == "draws" and rest in ("n", "temperature", "top_p") and recipe.draws:
        which = index.rstrip("]")
        at = range(len(recipe.draws)) if not index else [int(which) if which.isdecimal() else len(recipe.draws)]
        if any(i >= len(recipe.draws) for i in at):
            raise ValueError(
                f"recipe {recipe.name}: {name}: it has {len(recipe.draws)} draws, draws[0] the first of them"
            )
        draws = [dataclasses.replace(d, **{rest: value}) if i in at else d for i, d in enumerate(recipe.draws)]
        change = {"draws": tuple(draws)}
    elif head == "select" and rest:
        change = {"select_args": {**recipe.select_args, rest: value}}
    elif head == "merge" and rest:
        change = {"merge": {**recipe.merge, rest: value}}
    elif head == "method" and rest:
        takes = [rest in METHODS[t.method].defaults for t in recipe.train]
        train = [
            dataclasses.replace(t, args={**t.args, rest: value}) if takes_it else t
            for t, takes_it in zip(recipe.train, takes)
        ]
        change = {"train": tuple(train)} if any(takes) else {}
    elif name == "l1":
        change = {"train": tuple(dataclasses.replace(t, l1=value) if t.l1 else t for t in recipe.train)}
    if not change:
        methods = sorted({f"method.{k}" for t in recipe.train for k in METHODS[t.method].defaults})
        raise ValueError(
            f"recipe {recipe.name} has no {name!r}; it has {', '.join(_PLAIN)}, draws.n, draws.temperature, draws.top_p, "
            f"select.…, {', '.join(methods)}"
        )
    return dataclasses.replace(recipe, **change)


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high


_TABLE = [
    Recipe(
        "raft", "reward-ranked fine-tuning on the best of K samples", "arXiv 2304.06767",
        (Train("sft"),), (Draw(8),), select="best", reference="none",
    ),
    Recipe(
        "rso", "statistical rejection sampling, then the hinge loss", "arXiv 2309.06657, survey 3.3.2, S4",
        (Train("rso"),), (Draw(64),), select="rejection", select_args={"n": 8, "beta": 0.5}, reference="fixed",
        iterations=1,
    ),
    Recipe(
        "slic", "SLiC-HF on samples that a ranker has ordered", "arXiv 2305.10425, survey 3.3.1",
        (Train("slic"),), (Draw(8),), reference="none", iterations=1,
    ),
    Recipe(
        "iterative-dpo", "DPO on best and worst of n, the best-of-n enhancer of online RLHF",
        "arXiv 2312.11456, survey 3.1.4", (Train("dpo"),), (Draw(8),),
    ),
    Recipe(
        "online-rlhf", "DPO on a sample and one of an enhancer of higher temperature",
        "arXiv 2312.11456, survey 3.1.4", (Train("dpo"),), (Draw(1, 0.7), Draw(1, 1.2)), select="pair", judge="preference",
    ),
    Recipe(
        "self-rewarding", "the model judges its own samples, 0 to 5 points", "arXiv 2401.10020, survey 3.5.1",
        (Train("dpo"),), (Draw(4, 0.7, 0.9),), judge="self",
    ),
    Recipe(
        "rlaif", "an LLM's preferences train a reward model, PPO follows it", "arXiv 2309.00267, survey 3.2.2",
        (Train("bradley_terry"),), (Draw(2),), select="pair", reference="none", iterations=1, then="ppo", judge="llm",
    ),
    Recipe(
        "rlaif-direct", "PPO on an LLM's grades, without a reward model", "arXiv 2309.00267, survey 3.2.2",
        (Train("ppo"),), (Draw(1),), select="online", reference="fixed", iterations=1, judge="llm",
    ),
    Recipe(
        "constitutional", "SFT on revised answers, then RLAIF", "arXiv 2212.08073, survey 3.2.1",
        (Train("sft"),), (Draw(1),), revise=4, judge="none", select="only", reference="none", iterations=1,
        then="rlaif",
    ),
    Recipe(
        "sppo", "each sample's log-ratio regresses to its win rate", "arXiv 2405.00675, survey 3.11.2, S60–61",
        (Train("sppo"),), (Draw(5),), select="all-pairs", judge="preference",
    ),
    Recipe(
        "dno", "pairs of large margin among samples and the gold answer", "arXiv 2404.03715, survey 3.11.3, S62",
        (Train("dno"),), (Draw(5),), gold=True, select="large-margin", judge="preference",
    ),
    Recipe(
        "nash-md", "against the mixture of policy and reference", "arXiv 2312.00886, survey 3.11.1, S55–59",
        (Train("nash_md"),), (Draw(1),), select="online", reference="fixed", iterations=1, judge="preference",
        mix=0.125,
    ),
    Recipe(
        "cringe", "iterative pairwise CRINGE on best and worst of four", "arXiv 2312.16682, survey 3.5.2",
        (Train("cringe"),), (Draw(4),), reference="none", iterations=2,
    ),
    Recipe(
        "nn", "negating negatives: own samples against the data's rejected answer", "arXiv 2403.03419, survey 3.10.1",
        (Train("nn"),), (Draw(4),), judge="none", select="against-rejected", reference="two", iterations=2,
    ),
    Recipe(
        "sdpo", "DPO on the data in steps, each step's model the next one's reference",
        "arXiv 2403.19270, survey 3.3.7", (Train("dpo"),), judge="none", select="split", iterations=2,
    ),
    Recipe(
        "paft", "SFT + l1 and DPO side by side as two adapters, merged", "arXiv 2406.17923, survey 3.7.2, S43",
        (Train("sft", l1=1e-5), Train("dpo")), judge="none", select="dataset", iterations=1,
        merge={"combination_type": "ties", "density": 0.5},
    ),
    *(
        Recipe(
            name, about, paper, (Train(name),), (Draw(n),), select="online", reference="fixed", iterations=1,
        )
        for name, about, paper, n in (
            ("ppo", "proximal policy optimisation with a value head", "arXiv 1707.06347, survey 3.1.1, S2", 1),
            ("grpo", "group-relative advantages, no value head", "arXiv 2402.03300", 8),
            ("rloo", "REINFORCE with the leave-one-out baseline", "arXiv 2402.14740, survey 3.8.1, S48", 4),
        )
    ),
]  # fmt: skip
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _TABLE}


def table(recipes: Sequence[Recipe] = _TABLE) -> str:
    """The recipes as a table of text."""
    head = ("recipe", "generate", "judge", "select", "method", "reference", "iterations")
    lines = [head, *((r.name, *r.cells(), str(r.iterations)) for r in recipes)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
