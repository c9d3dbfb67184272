"""The setup of a run: its data, judge and settings, the models it loads, and its outcome."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import DataError
from ..models import load_model
from ..rewards.judges import Judge
from ..rewards.llm_judges import SelfRewardJudge
from ..rewards.trainer import RewardConfig
from ..rl import RLConfig
from ..rollout import GenerateRollout, Rollout, Sampling
from ..trainer import XPOConfig
from .recipe import Recipe
from .stopping import StoppingRule

Row = dict[str, Any]


@dataclass
class Setup:
    """Everything a recipe is run with.

    model: a name or folder for `load`. rows: as `data.load_prompts` returns them.
    judge: None for recipes without a judge, and for those in which the policy judges itself.
    held_out: rows for the stopping rule. Their answers are judged by held_out_judge; by default the judge, or, if the
        policy judges itself, the model at the start of the run.
    sampling: for every draw; temperature and top_p are the recipe's own.
    training: arguments of XPOConfig, RewardConfig and RLConfig; each takes those it has.
    peft_config: trains an adapter, which is merged into the model after each iteration.
    rollout: (model, tokenizer) → Rollout; default GenerateRollout.
    generator: samples the data in the policy's place, another model or a server; its texts are tokenized again for the
        policy. Held-out prompts, and the rows of a search of prompts, are answered by the policy all the same.
    block: prompts per file.
    overwrite: deletes the output folder, which must be an earlier run's, once this run can begin.
    begin: called at that point, before anything else is written.
    keep_models: keeps the models of all iterations, not only the best and the last. notes: further settings that a
        resumed run must have in common.
    say: called with each line of progress.
    """

    model: str
    rows: Sequence[Row]
    output: Path
    judge: Judge | None = None
    held_out: Sequence[Row] = ()
    held_out_judge: Judge | None = None
    stopping: StoppingRule = field(default_factory=StoppingRule)
    sampling: Sampling = field(default_factory=Sampling)
    training: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Any = None
    rollout: Callable[[Any, Any], Rollout] | None = None
    generator: Rollout | None = None
    load: Callable[[str], tuple[Any, Any]] = load_model
    block: int = 64
    seed: int = 42
    overwrite: bool = False
    begin: Callable[[], Any] = lambda: None
    keep_models: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], Any] = print

    def __post_init__(self) -> None:
        self.output = Path(self.output)


@dataclass
class Outcome:
    """Result of a run. model: the best policy. history: mean held-out scores, at the start and after each iteration.

    reward_model: the folder of the one that the recipe made. prompt: the instruction that it found.
    """

    model: str
    best: int
    reason: str
    history: list[float]
    reward_model: str | None = None
    prompt: str | None = None


def check(recipe: Recipe, setup: Setup) -> None:
    """Raises ValueError, or DataError for the rows, if the setup lacks what the recipe needs."""
    lacking = [name for name in recipe.columns if any(row.get(name) is None for row in setup.rows)]
    if lacking:
        raise DataError(f"recipe {recipe.name} needs {' and '.join(lacking)} in every row of the data, beside prompt")
    if len(recipe.train) > 1 and setup.peft_config is None:
        raise ValueError(f"recipe {recipe.name} trains adapters side by side: give a peft_config")
    if recipe.select == "split" and len(setup.rows) < recipe.iterations:
        raise ValueError(
            f"recipe {recipe.name} takes a part of the data an iteration: {len(setup.rows)} rows are too few for "
            f"{recipe.iterations} iterations"
        )
    alone = recipe.online and sum(draw.n for draw in recipe.draws) == 1 and not recipe.draws_rivals
    if alone and setup.judge is not None and not setup.judge.scores:
        raise ValueError(
            f"recipe {recipe.name} draws one completion a prompt, and the judge only compares, which says nothing of a "
            "lone one: draws.n of 2 or more, or a judge that scores"
        )
    if recipe.searches and setup.judge is not None and not setup.judge.scores:
        raise ValueError(
            f"recipe {recipe.name} needs the score of single answers, and the judge only compares: give reward "
            "functions or a reward model"
        )
    judged = recipe.judge == "self" or setup.held_out_judge or setup.judge
    if setup.held_out and not recipe.makes_reward_model and not judged:
        raise ValueError("the held-out prompts are answered for a judge, and none is given: give one, or hold out none")
    if setup.stopping.z and len(setup.held_out) == 1:
        raise ValueError("a standard error, which z is about, needs 2 held-out prompts or more, got 1")


def arguments(kind: type, folder: Path, settings: Mapping[str, Any]) -> Any:
    """Returns a configuration of this kind: XPOConfig, RewardConfig or RLConfig.

    Settings that only the other kinds have are left out. Raises ValueError for one that none of them has.
    """
    usual = {"disable_tqdm": True, "logging_first_step": True, "report_to": "none"}
    usual |= {"save_steps": 100, "save_total_limit": 1}
    takes, *others = ({f.name for f in dataclasses.fields(k)} for k in (kind, XPOConfig, RewardConfig, RLConfig))
    unknown = sorted(set(settings) - takes.union(*others) | {"output_dir"} & set(settings))
    if unknown:
        raise ValueError(f"the trainers have no argument {', '.join(unknown)}, or the loop decides it")
    return kind(output_dir=str(folder), **{k: v for k, v in {**usual, **settings}.items() if k in takes})


def xpo_config(setup: Setup) -> XPOConfig:
    """Returns the run's XPOConfig: its device, and how data are encoded."""
    return arguments(XPOConfig, setup.output, setup.training)


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Returns the data's columns other than the prompt, for judges that check against a reference answer."""
    given = {name for row in rows for name, value in row.items() if value is not None}
    names = sorted(given - {"prompt", "where", "prompts", "completions"})
    return {name: [row.get(name) for row in rows] for name in names}


class Policy:
    """A model by name, loaded on first use."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.setup, self.name = setup, name

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model on the run's device, and its tokenizer with a pad token."""
        self.setup.say(f"loading {self.name}")
        model, tokenizer = self.setup.load(self.name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model.to(xpo_config(self.setup).device), tokenizer

    @cached_property
    def rollout(self) -> Rollout:
        """The sampler of the model's completions."""
        kwargs = xpo_config(self.setup).chat_template_kwargs
        return (self.setup.rollout or functools.partial(GenerateRollout, chat_template_kwargs=kwargs))(*self.loaded)

    def self_judge(self, seed: int) -> Judge:
        """Returns the model as the judge of completions."""
        return SelfRewardJudge(self.rollout, seed=seed, chat=bool(self.loaded[1].chat_template))


def sampler_of(setup: Setup, policy: Policy) -> tuple[Rollout, bool]:
    """Returns what samples the data, the generator or the policy, and whether it is asked in conversations."""
    if setup.generator is None:
        return policy.rollout, bool(policy.loaded[1].chat_template)
    tokenizer = getattr(setup.generator, "tokenizer", None) or policy.loaded[1]
    return setup.generator, bool(tokenizer.chat_template)


class Policies:
    """The models of a run: the one last asked for, and the start of the run, which judges held-out answers."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.start = Policy(setup, setup.model)
        self._current = Policy(setup, setup.model)

    def get(self, name: str) -> Policy:
        """Returns the policy of that name, which replaces the one in memory."""
        if self._current.name != name:
            self._current = Policy(self.setup, name)
        return self._current

    def take(self, name: str) -> tuple[Any, Any]:
        """Returns the model to train and its tokenizer. Training changes it, so the next `get` loads the name anew."""
        taken = self.get(name).loaded
        self._current = Policy(self.setup, name)
        return taken
