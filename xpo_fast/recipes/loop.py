"""The loop that runs a recipe: generate, judge, select, train, update the reference; its files: run_folder.py."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

from ..files import appearing, write_json
from ..rewards.judges import RewardJudge
from ..rewards.model import RewardModel
from ..seeds import seed_of_repr
from .recipe import Recipe
from .run_folder import identify, in_blocks, remove_models, runs_in, write_lines
from .search import begin, outcome_of, search
from .selection import SELECTORS, UNJUDGED
from .setup import Outcome, Policies, Row, Setup, check, xpo_config
from .stages import held_out_scores, judge, sample, select
from .stopping import mean, paired
from .table import get_recipe
from .training import Iteration, train

_MOST_PARTS = 9  # their folders are numbered by one digit


def run(recipe: Recipe, setup: Setup) -> Outcome:
    """Runs a recipe and those that follow it (`then`), or continues the run in the output folder.

    Raises ValueError if the folder has a run with other settings or of another recipe, a judge is missing, the data
    lack a column, or there is more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("recipes run in one process: start them without torchrun or accelerate launch")
    parts = parts_of(recipe)
    if setup.generator is not None and not any(part.samples for part in parts):
        raise ValueError(f"recipe {recipe.name} samples nothing before it trains, which a generator would do: drop it")
    judged = setup.judge is not None
    for part in parts:
        if part.judge not in ("none", "self") and not judged:
            raise ValueError(f"recipe {part.name} needs a judge ({part.judge}), and none is given")
        judged |= part.makes_reward_model
    root, seed = setup.output, setup.seed
    outputs = [root] if len(parts) == 1 else [root / f"{k}-{part.name}" for k, part in enumerate(parts, 1)]
    if not setup.overwrite and (others := [str(path) for path in runs_in(root) if path not in outputs]):
        raise ValueError(f"{', '.join(others)} holds a run of another recipe than {recipe.name}: name another folder")
    if setup.overwrite and not runs_in(root) and root.exists() and any(root.iterdir()):
        raise ValueError(f"overwrite deletes a run of a recipe, and {root} holds something else: name another folder")
    outcome = None
    for k, (part, output) in enumerate(zip(parts, outputs, strict=True)):
        turn = k * recipe.rounds // len(parts)
        setup = dataclasses.replace(setup, output=output, seed=seed_of_repr(seed, "round", turn) if turn else seed)
        loop = Loop(part, setup)
        if k == 0:
            if setup.overwrite:
                # A model that cannot be loaded fails before anything is deleted.
                _ = loop.policies.get(setup.model).loaded
                shutil.rmtree(root, ignore_errors=True)
            setup.begin()
        outcome = loop.run()
        setup = dataclasses.replace(setup, model=outcome.model)
        if outcome.reward_model is not None and k + 1 < len(parts):
            model = RewardModel.load(outcome.reward_model)
            model.model.to(xpo_config(setup).device)  # type: ignore[arg-type]
            setup = dataclasses.replace(setup, judge=RewardJudge(model))
    assert outcome is not None
    return outcome


def parts_of(recipe: Recipe) -> list[Recipe]:
    """Returns the recipe and those that follow it, as often as it has rounds.

    Raises ValueError for more than nine, and for recipes that follow one another in a circle.
    """
    parts = [recipe]
    while (following := parts[-1].then) is not None and len(parts) <= _MOST_PARTS:
        parts.append(get_recipe(following))
    if len(parts) * recipe.rounds > _MOST_PARTS:
        raise ValueError(
            f"recipe {recipe.name} would have {len(parts)} parts or more in {recipe.rounds} rounds, and a run has "
            f"{_MOST_PARTS} at most"
        )
    return parts * recipe.rounds


class Loop:
    """One recipe on a setup. Raises ValueError if the setup lacks what the recipe needs."""

    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        check(recipe, setup)
        self.recipe, self.setup, self.policies = recipe, setup, Policies(setup)

    def run(self) -> Outcome:
        """Runs all iterations, or those that are missing; returns the best model."""
        recipe, setup, rule = self.recipe, self.setup, self.setup.stopping
        identify(recipe, setup)
        result = setup.output / "result.json"
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
            return Outcome(**found | {"history": [math.nan if x is None else x for x in found["history"]]})
        models, reason = [setup.model], f"all {recipe.iterations} iterations are done"
        rows = begin(recipe, setup, self.policies, setup.output / "start") if recipe.searches else []
        history = [self._held_out(setup.output / "start", setup.model, rows)]
        if history[0] and all(map(math.isnan, history[0])):
            raise ValueError(
                f"the judge scored none of the answers to the {len(history[0])} held-out prompts, so no iteration can "
                f"be better: see {setup.output / 'start'}"
            )
        for i in range(recipe.iterations):
            folder = setup.output / f"iteration-{i:03d}"
            if recipe.searches:
                rows = search(recipe, setup, self.policies, i, rows, folder)
            else:
                rows = self.rows(folder, i, models[-1])
            if not rows:
                why = "no completion was judged better than another" if recipe.judge != "none" else "none was selected"
                reason = f"iteration {i + 1} found nothing to train on: {why}"
                if i == 0:
                    raise ValueError(f"recipe {recipe.name}: {reason}. See {folder / 'summary.json'}")
                break
            models.append(train(Iteration(recipe, setup, self.policies, i, folder, rows, models)))
            history.append(self._held_out(folder, models[-1], rows))
            best = rule.best(history) if history[0] else i + 1
            self._report(i, history, best)
            if not setup.keep_models:
                remove_models(setup.output, best=best, last=i + 1)
            if history[0] and rule.stops(history):
                reason = f"no better on the held-out prompts for {rule.patience} iterations"
                break
        best = rule.best(history) if history[0] else len(models) - 1
        return self._finish(models, best, reason, history)

    def rows(self, folder: Path, i: int, model: str) -> list[Row]:
        """Returns the rows that iteration i trains on; for methods that sample while they train, the prompts."""
        recipe, setup, rows = self.recipe, self.setup, list(self.setup.rows)
        if recipe.select == "split":
            cuts = [round(len(rows) * k / recipe.iterations) for k in (i, i + 1)]
            rows = rows[slice(*cuts)]
        if not recipe.draws or recipe.online:
            return rows
        policy = self.policies.get(model)
        samples = in_blocks(setup, folder, "samples", rows, lambda b, part: sample(recipe, setup, policy, i, b, part))
        judged: list[Row] = [{}] * len(rows)
        if SELECTORS[recipe.select].needs not in UNJUDGED:
            pairs = list(zip(rows, samples, strict=True))
            judged = in_blocks(setup, folder, "judged", pairs, lambda b, part: judge(recipe, setup, policy, i, b, part))
        return select(recipe, setup, policy, i, samples, judged, folder)

    def _held_out(self, folder: Path, model: str, rows: list[Row]) -> list[float]:
        """Returns the held-out scores of a model; where prompts are searched, under the best instruction so far."""
        instruction = rows[-1]["instruction"] if self.recipe.searches else ""
        return held_out_scores(self.recipe, self.setup, self.policies, folder, model, instruction)

    def _report(self, i: int, history: list[list[float]], best: int) -> None:
        if history[0]:
            gain, error = paired(history[-1], history[0])
            unjudged = sum(map(math.isnan, history[-1]))
            self.setup.say(
                f"iteration {i + 1}: held-out score {mean(history[-1]):.4f}, {gain:+.4f} ± {error:.4f} since the start"
                f"{f', {unjudged} of {len(history[-1])} answers unjudged' if unjudged else ''}; the best so far is "
                f"{f'that of iteration {best}' if best else 'the start'}"
            )

    def _finish(self, models: list[str], best: int, reason: str, history: list[list[float]]) -> Outcome:
        """Copies the best model to its place, and writes and returns the outcome."""
        makes_reward_model = self.recipe.makes_reward_model
        final = self.setup.output / ("reward_model" if makes_reward_model else "model")
        prompt = None
        if self.recipe.searches:
            prompt, found = outcome_of(self.setup.output, best)
            write_lines(self.setup.output / "prompts.jsonl", found)
        elif best and not final.is_dir():
            with appearing(final, sole_writer=True) as part:
                shutil.copytree(models[best], part)
        model = models[0] if makes_reward_model or prompt is not None or not best else str(final)
        means = [mean(scores) for scores in history] if history[0] else []
        outcome = Outcome(model, best, reason, means, str(final) if makes_reward_model else None, prompt)
        write_json(self.setup.output / "result.json", dataclasses.asdict(outcome), ensure_ascii=False)
        told = outcome.model if prompt is None else f"the instruction {prompt!r}"
        self.setup.say(f"{self.recipe.name}: {reason}; the result is {outcome.reward_model or told}")
        return outcome
