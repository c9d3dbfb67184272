"""A recipe as a value: what each stage of an iteration does, and how the stages fit together.

    generate ──▶ judge ──▶ select ──▶ train ──▶ reference
     draws       scores     pairs     method     update

A recipe is changed by name: `override(RECIPES["rso"], {"select.beta": 0.2, "draws.n": 16})`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..data import KINDS
from ..methods import METHODS
from ..objective import Objective
from .asking import Search, fields
from .selection import SELECTORS, UNJUDGED

if TYPE_CHECKING:
    from ..rollout import Sampling

REFERENCES = {
    "none": "the method has none",
    "fixed": "the model at the start of the run",
    "previous": "the model at the start of the iteration",
    "two": "fixed for the policy's completions, previous for the data's rejected completion",
}
JUDGES = {
    "none": "no judge",
    "self": "the policy itself, 0 to 5 points in words",
    "reward": "the given judge; the paper has a reward model or functions",
    "preference": "the given judge; the paper has one that compares",
    "llm": "the given judge; the paper has a language model",
}
FROM_DATA = ("dataset", "split")  # selections of the data's own pairs: all, or one part per iteration
PROMPTS = "prompts"  # of instructions, by their scores; nothing is trained


@dataclass(frozen=True)
class Draw:
    """n completions per prompt. The first draw of several is the policy's, the others are its enhancers'.

    ask: an instruction that these completions are sampled under and that nothing is trained on, see asking.py. rank:
    what the instruction makes of them: select="as-asked" prefers a higher rank. aspects: names of what the first draw's
    answer is made better or worse in; the label, which is then the rank, and some of the names are drawn by the seed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    ask: str = ""
    rank: int = 0
    aspects: tuple[str, ...] = ()

    def sampling(self, base: Sampling) -> Sampling:
        """Returns the settings to sample with: the base, with this draw's temperature and top_p."""
        return dataclasses.replace(base, temperature=self.temperature, top_p=self.top_p)

    def __str__(self) -> str:
        at = "" if self.temperature == 1 else f" at T={self.temperature:g}"
        return f"{self.n}{at}{' edited' if self.aspects else ' asked' if self.ask else ''}"


@dataclass(frozen=True)
class Train:
    """A method of METHODS, its arguments, and the weight λ of a penalty λ‖θ‖₁ on the trained weights."""

    method: str
    args: Mapping[str, Any] = field(default_factory=dict)
    l1: float = 0.0

    def __str__(self) -> str:
        return f"{self.method} + l1" if self.l1 else self.method


@dataclass(frozen=True)
class Recipe:
    """A way to make data with a policy and to train the policy on them. Raises ValueError if its parts do not fit.

    about, paper: a line of description and the source.
    train: one method, or several that are trained side by side from the same model, each as an adapter, and merged;
        none for select="prompts".
    draws: completions per prompt; empty if the data's own completions are used.
    gold: adds the data's own answer (`chosen`) to the candidates; for select="as-asked" it ranks 1. rival: adds the
        data's rejected answer, which ranks 0.
    revise: rounds of critique and revision of each sample.
    judge: a key of JUDGES.
    select: a key of SELECTORS; or "dataset" (the data's pairs), "split" (a part of them per iteration), "online" (RL
        methods, which train on samples as they are drawn), "prompts" (instructions by their scores, see search.py).
        select_args: arguments of the selector, or of `Search`.
    reference: a key of REFERENCES.
    merge: for several methods, the arguments of PEFT's `add_weighted_adapter`.
    mix: the reference's share in the mixture from which rivals are drawn (`nash_md`).
    task: a question that holds {prompt} and is trained on in the prompt's place: the result rewrites prompts (`bpo`).
    then: the recipe that continues with the model, or the reward model, that this one makes. rounds: how often the two
        and those that follow take turns, with a new seed each.
    """

    name: str
    about: str
    paper: str
    train: tuple[Train, ...]
    draws: tuple[Draw, ...] = ()
    gold: bool = False
    rival: bool = False
    revise: int = 0
    judge: str = "reward"
    select: str = "best-worst"
    select_args: Mapping[str, Any] = field(default_factory=dict)
    reference: str = "previous"
    iterations: int = 3
    merge: Mapping[str, Any] = field(default_factory=dict)
    mix: float = 0.0
    task: str = ""
    then: str | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        def check(holds: bool, expected: str, got: Any) -> None:
            if not holds:
                raise ValueError(f"recipe {self.name}: expected {expected}, got {got!r}")

        if self.searches:
            check(not self.train and self.then is None, "no method and nothing after a search of prompts", self.train)
        else:
            check(bool(self.train), "a method to train", self.train)
        for train in self.train:
            check(train.method in METHODS, f"a method of {', '.join(sorted(METHODS))}", train.method)
            check(_within(train.l1, 0, math.inf), "l1 >= 0", train.l1)
        selections = (*SELECTORS, *FROM_DATA, "online", PROMPTS)
        check(self.select in selections, f"select to be one of {', '.join(selections)}", self.select)
        check(self.judge in JUDGES, f"judge to be one of {', '.join(JUDGES)}", self.judge)
        check(self.reference in REFERENCES, f"reference to be one of {', '.join(REFERENCES)}", self.reference)
        check(_is_int(self.iterations, 1), "at least one iteration", self.iterations)
        check(_within(self.mix, 0, 1), "mix in [0, 1]", self.mix)
        check(_is_int(self.revise, 0), "revise >= 0 rounds", self.revise)
        for name in ("gold", "rival"):
            check(type(getattr(self, name)) is bool, f"{name} to be true or false", getattr(self, name))
        turns = _is_int(self.rounds, 1) and (self.rounds == 1 or self.then is not None)
        check(turns, "rounds >= 1, and 1 unless another recipe follows", self.rounds)
        for draw in self.draws:
            check(_is_int(draw.n, 1), "draws of n >= 1", draw.n)
            check(_within(draw.temperature, 0, math.inf), "temperature >= 0", draw.temperature)
            check(_within(draw.top_p, 0, 1) and draw.top_p > 0, "top_p in (0, 1]", draw.top_p)
        self._check_asks(check)
        online, drawn = self.select == "online", self.select not in FROM_DATA
        check(online == self.online, 'select="online" with methods of RL, and only there', self.select)
        check(bool(self.draws) == drawn, "draws, or a selection from the data", self.select)
        fresh = self.iterations == 1 or not online or self.reference == "previous"
        check(fresh, 'reference="previous" for several iterations of RL', self.reference)
        once = self.iterations == 1 or not self.makes_reward_model
        check(once, "one iteration of a reward model", self.iterations)
        self._rehearse()
        if self.select in SELECTORS:
            selector = SELECTORS[self.select]
            judged = selector.needs in UNJUDGED or self.judge != "none"
            check(judged, f"a judge for {self.select}", self.judge)
            for train in self.train:
                kind = self.kind(train)
                # The chosen half of a pair is read where that is all that the method learns from.
                fits = selector.kind == kind or (selector.kind == "pair" and KINDS[kind].half == 0)
                check(fits, f"a selection of {kind} data, which {train.method} learns from", self.select)

    def _check_asks(self, check: Callable[[bool, str, Any], None]) -> None:
        """Raises ValueError for instructions of draws, ranks or a task that do not fit the rest."""
        for d, draw in enumerate(self.draws):
            check(isinstance(draw.ask, str), "ask to be text", draw.ask)
            try:
                found = fields(draw.ask)
            except ValueError as error:
                raise ValueError(f"recipe {self.name}: expected {error}, in ask={draw.ask!r:.80}") from None
            check(not (draw.ask and self.online), "no ask in draws of RL, which trains on what it samples", draw.ask)
            names = isinstance(draw.aspects, tuple) and all(isinstance(x, str) and x.strip() for x in draw.aspects)
            check(names and len({*draw.aspects}) == len(draw.aspects), "aspects that are different names", draw.aspects)
            edits, searched = {"label", "aspects"}, {"history", "examples"}
            if draw.aspects:
                check(d > 0, "aspects in a later draw than the first, whose answer it edits", draw.aspects)
                check(edits <= found, "{label} and {aspects} in the ask of a draw with aspects", draw.ask)
                alone = all(other.n == 1 for other in self.draws)
                check(alone, "draws of one completion where one edits another", [other.n for other in self.draws])
            check(bool(draw.aspects) or not found & edits, "aspects, which {label} and {aspects} stand for", draw.ask)
            check("prompt" in found or not found & {"chosen", "rejected"}, "{prompt} beside the answers", draw.ask)
            check(self.searches or not found & searched, "no {history} but in a search of prompts", draw.ask)
            check(not self.searches or "history" in found, "{history} in the ask of a search of prompts", draw.ask)
        if self.searches:
            check(len(self.draws) == 1, "one draw for a search of prompts", len(self.draws))
            check(self.judge not in ("none", "self"), "a given judge for a search of prompts", self.judge)
            given = (self.gold, self.rival, self.revise, self.task)
            check(not any(given), "neither gold, rival, revise nor task in a search of prompts", given)
        if self.select == "as-asked":
            ranks = [*(draw.rank for draw in self.draws), *[1] * self.gold, *[0] * self.rival]
            differ = len({*ranks}) > 1 or any(draw.aspects for draw in self.draws)
            check(differ, "draws of different ranks for as-asked", ranks)
        if self.select == "agreed":
            check(self.gold == self.rival, "both of gold and rival, or neither, for agreed", (self.gold, self.rival))
        if self.task:
            check(
                isinstance(self.task, str) and re.findall(r"\{(\w+)\}", self.task) == ["prompt"],
                "a task that holds {prompt} once",
                self.task,
            )
            fits = self.select == "only" and not (self.gold or self.rival or self.revise) and self.then is None
            check(fits, 'select="only" without gold, rival, revise or then for a task', self.select)

    def _rehearse(self) -> None:
        """Raises ValueError for an argument that the selector or a method would refuse only after all sampling."""
        toy = {"nothing": torch.tensor(2), "scores": torch.tensor([1.0, 0.0]), "asked": torch.tensor([1.0, 0.0])}
        toy["wins"], toy["alike"] = torch.tensor([[0.5, 0.9], [0.1, 0.5]]), torch.eye(2)
        what, given = f"select={self.select}", self.select_args
        try:
            if self.select in SELECTORS:
                selector = SELECTORS[self.select]
                selector(toy[selector.needs], torch.Generator().manual_seed(0), given)
            elif self.searches:
                Search(**given)
            for train in self.train:
                what, given = train.method, train.args
                if given and METHODS[what].layout != "reward":
                    Objective(what, **given).rehearse()
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe {self.name}: {what} with {dict(given)}: {error}") from error

    @property
    def online(self) -> bool:
        """Whether the method samples while it trains, as RL does."""
        return bool(self.train) and METHODS[self.train[0].method].layout == "policy"

    @property
    def draws_rivals(self) -> bool:
        """Whether each completion is judged against a rival from the mixture of policy and reference (Nash-MD)."""
        return self.online and "prob_w" in METHODS[self.train[0].method].required

    @property
    def makes_reward_model(self) -> bool:
        """Whether the result is a reward model, not a policy."""
        return bool(self.train) and METHODS[self.train[0].method].layout == "reward"

    @property
    def searches(self) -> bool:
        """Whether the result is an instruction, found by its score, and no weight changes."""
        return self.select == PROMPTS

    @property
    def samples(self) -> bool:
        """Whether completions are sampled before training, by the policy or a generator in its place."""
        return bool(self.draws) and not self.online

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the data must have beside prompt."""
        if self.select in FROM_DATA:
            return ("chosen", "rejected")
        asked = set().union(*(fields(draw.ask) for draw in self.draws))
        reads = {"chosen": self.gold or "chosen" in asked}
        reads["rejected"] = self.rival or self.select == "against-rejected" or "rejected" in asked
        return tuple(name for name, is_read in reads.items() if is_read)

    def kind(self, train: Train) -> str:
        """Returns the kind of data that `train` learns from, as `data.load` names it."""
        return "pair" if self.makes_reward_model else Objective(train.method).data_kind

    def cells(self) -> tuple[str, ...]:
        """Returns the recipe's row of the table: generate, judge, select, method, reference."""
        own = [word for word, is_added in (("gold", self.gold), ("rejected", self.rival)) if is_added]
        draws = " + ".join([*map(str, self.draws), *own])
        draws += f", {self.revise} revisions" if self.revise else ""
        method = (" ∥ ".join(map(str, self.train)) or "–") + (f" → {self.then}" if self.then else "")
        method += f", {self.rounds} rounds" if self.rounds > 1 else ""
        return draws or "–", self.judge.replace("none", "–"), self.select, method, self.reference.replace("none", "–")


_FIELDS = ("iterations", "judge", "select", "reference", "gold", "rival", "revise", "mix", "task", "then", "rounds")


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with other values. Raises ValueError for an unknown name, or a value that does not fit.

    The names are its fields (iterations, judge, select, reference, gold, rival, revise, mix, task, then, rounds) and:
    draws.n, draws.temperature, draws.top_p for all draws; draws.ask (a text, or a list of one for each draw that has
    one), draws.aspects; method.beta, … for the methods that have it; select.beta, …; merge.density, …; and l1 for the
    methods with such a penalty.
    """
    changes = {name: value for name, value in settings.items() if name in _FIELDS}
    if changes.get("select", recipe.select) != recipe.select:
        changes["select_args"] = {}  # the old ones are another selector's
    recipe = dataclasses.replace(recipe, **changes)
    for name, value in settings.items():
        if name not in _FIELDS:
            recipe = dataclasses.replace(recipe, **_change(recipe, name, value))
    return recipe


def _change(recipe: Recipe, name: str, value: Any) -> dict[str, Any]:
    """Returns the field that a setting with a dot, or l1, changes, with its new value."""
    owner, _, key = name.partition(".")
    if owner == "draws" and key in ("ask", "aspects") and any(getattr(draw, key) for draw in recipe.draws):
        return {"draws": _asking(recipe, key, value)}
    if owner == "draws" and key in ("n", "temperature", "top_p") and recipe.draws:
        return {"draws": tuple(dataclasses.replace(draw, **{key: value}) for draw in recipe.draws)}
    if owner == "select" and key:
        return {"select_args": {**recipe.select_args, key: value}}
    if owner == "merge" and key and recipe.merge:
        return {"merge": {**recipe.merge, key: value}}
    has_key = [key in METHODS[train.method].defaults for train in recipe.train]
    if owner == "method" and any(has_key):
        changed = [dataclasses.replace(t, args={**t.args, key: value}) for t in recipe.train]
        return {"train": tuple(new if has else old for new, old, has in zip(changed, recipe.train, has_key))}
    if name == "l1" and any(train.l1 for train in recipe.train):
        return {"train": tuple(dataclasses.replace(t, l1=value) if t.l1 else t for t in recipe.train)}
    draws = ("draws.n", "draws.temperature", "draws.top_p") if recipe.draws else ()
    draws += tuple(f"draws.{key}" for key in ("ask", "aspects") if any(getattr(draw, key) for draw in recipe.draws))
    hyperparameters = sorted({f"method.{key}" for t in recipe.train for key in METHODS[t.method].defaults})
    raise ValueError(
        f"recipe {recipe.name} has no {name!r}; it has {', '.join((*_FIELDS, *draws, 'select.…', *hyperparameters))}"
    )


def _asking(recipe: Recipe, key: str, value: Any) -> tuple[Draw, ...]:
    """Returns the draws with other instructions, or other aspects for the draw that has them."""
    if key == "aspects":
        given = tuple(value) if isinstance(value, (list, tuple)) else value
        if not (isinstance(given, tuple) and given):
            raise ValueError(f"recipe {recipe.name}: expected draws.aspects to be a list of names, got {value!r}")
        return tuple(dataclasses.replace(draw, aspects=given) if draw.aspects else draw for draw in recipe.draws)
    asked = sum(bool(draw.ask) for draw in recipe.draws)
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, (list, tuple)) and len(texts) == asked and all(isinstance(x, str) and x for x in texts)):
        raise ValueError(
            f"recipe {recipe.name}: expected draws.ask to be {'a text' if asked == 1 else f'a list of {asked} texts'}, "
            f"one for each draw that has an instruction, got {value!r}"
        )
    left = iter(texts)
    return tuple(dataclasses.replace(draw, ask=next(left)) if draw.ask else draw for draw in recipe.draws)


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
