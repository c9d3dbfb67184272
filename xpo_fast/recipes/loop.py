"""The loop of recipes.py: generate, judge, select, train, update the reference; everything in files.

    output/run.json                       what the run was started with; a resumed one must be the same
    output/start/held_out-00000.jsonl     the held-out prompts answered and judged, before training
    output/iteration-000/samples-00000.jsonl    a block of prompts with their completions
                         judged-00000.jsonl     the scores or win probabilities of that block
                         selected.jsonl         what is trained on
                         summary.json           counts and means of the three, and what is seen of the judge's biases
                         train/                 checkpoints, while it trains
                         train_log.json         what the trainer logged
                         model/                 the policy after the iteration, a whole model
                         held_out-00000.jsonl
    output/model/, output/result.json     the best model, and why the loop ended

Each file or folder appears whole or not at all, and what is there is not made again: a run that was killed goes on with the
block, or the checkpoint, that it was at. Every draw has a seed of its own by what it is for, so what comes out is the same.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

try:
    import datasets
    from transformers import PrinterCallback, TrainerCallback
except ImportError as error:
    raise ImportError(f"recipes need more packages: pip install 'xpo-fast[train]' ({error})") from error

from .. import data
from ..data import KINDS, DataError
from ..files import appearing, finite, write_atomically, write_json
from ..models import load_model, remove_fused_loss
from ..resume import last_checkpoint
from ..rewards.llm_judges import (
    FunctionJudge,
    Judge,
    RewardJudge,
    SelfRewardJudge,
    group_scores,
    group_wins,
    revised,
    text_of,
    win_rate,
)
from ..rl.sample_log import SAMPLES_FILE
from ..rollout import Rollout, Sampling
from ..seeds import seed_of_repr
from ..trainer import XPOConfig, XPOTrainer
from .recipe import Recipe, StoppingRule, Train, get_recipe, paired, runs_in
from .selection import SELECTORS

Row = dict[str, Any]


@dataclass
class Setup:
    """What a recipe is run on and with.

    model: a name or folder for `load`. rows: of `data.load_prompts`. judge: none for recipes without one, and for those that
        have the policy judge itself. held_out: rows that the stopping rule is held against, judged by held_out_judge
        (the judge, if not given; where the policy judges itself, the model at the start of the run).
    sampling: its temperature and top_p are the recipe's own.
    training: arguments of XPOConfig, RewardConfig and RLConfig, each takes what it has. peft_config: train an adapter, which
        is merged into the model after each iteration.
    rollout: (model, tokenizer) → Rollout, GenerateRollout if not given. block: prompts a file.
    overwrite: delete the output folder, which must be that of a run before this one, once this one can begin.
    begin: called then, before anything else is written.
    keep_models: of every iteration; else of the best and the last. notes: what else a resumed run must have alike.
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
    load: Callable[[str], tuple[Any, Any]] = load_model
    block: int = 64
    seed: int = 42
    overwrite: bool = False
    begin: Callable[[], Any] = lambda: None
    keep_models: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], Any] = print


@dataclass
class Outcome:
    """model: where the best policy is. history: mean held-out scores, of the start and of each iteration."""

    model: str
    best: int
    reason: str
    history: list[float]
    reward_model: str | None = None


def run(recipe: Recipe, setup: Setup) -> Outcome:
    """Run a recipe, and those that follow it (`then`), or go on where the output folder says that it was.

    ValueError where the folder holds a run with other settings or of another recipe, a judge is missing, the data lack what
    is needed, or there is more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("recipes run in one process: start them without torchrun or accelerate launch")
    parts = [recipe]
    while (following := parts[-1].then) is not None:
        parts.append(get_recipe(following))
    judged = setup.judge is not None
    for part in parts:
        if part.judge not in ("none", "self") and not judged:
            raise ValueError(f"recipe {part.name} needs a judge ({part.judge}), and none is given")
        judged |= part.makes_reward_model
    names = [""] if len(parts) == 1 else [f"{k + 1}-{part.name}" for k, part in enumerate(parts)]
    outputs = [Path(setup.output) / name for name in names]
    if not setup.overwrite and (others := [str(path) for path in runs_in(Path(setup.output)) if path not in outputs]):
        raise ValueError(f"{', '.join(others)} holds a run of another recipe than {recipe.name}: name another folder")
    output = Path(setup.output)
    if setup.overwrite and not runs_in(output) and output.exists() and any(output.iterdir()):
        raise ValueError(f"overwrite deletes a run of a recipe, and {output} holds something else: name another folder")
    outcome = None
    for k, (part, output) in enumerate(zip(parts, outputs, strict=True)):
        loop = _Loop(part, dataclasses.replace(setup, output=output))
        if setup.overwrite and k == 0:
            _ = loop.policy.loaded  # a model that cannot be loaded is found out before anything goes
            shutil.rmtree(setup.output, ignore_errors=True)
        if k == 0:
            setup.begin()
        outcome = loop.run()
        setup = dataclasses.replace(setup, model=outcome.model)
        if outcome.reward_model is not None and k + 1 < len(parts):
            from ..rewards.model import RewardModel

            model = RewardModel.load(outcome.reward_model)
            model.model.to(_arguments(XPOConfig, setup.output, setup.training).device)  # type: ignore[arg-type]
            setup = dataclasses.replace(setup, judge=RewardJudge(model))
    assert outcome is not None
    return outcome


class _Policy:
    """A model by name, loaded when it is first needed."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.setup, self.name = setup, name

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        self.setup.say(f"loading {self.name}")
        model, tokenizer = self.setup.load(self.name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = _arguments(XPOConfig, self.setup.output, self.setup.training).device
        return model.to(device), tokenizer

    @cached_property
    def rollout(self) -> Rollout:
        model, tokenizer = self.loaded
        make = self.setup.rollout
        if make is None:
            from ..rollout import GenerateRollout

            made: Rollout = GenerateRollout(model, tokenizer)
        else:
            made = make(model, tokenizer)
        return made

    def itself(self, seed: int) -> Judge:
        chat = bool(self.loaded[1].chat_template)
        return SelfRewardJudge(self.rollout, seed=seed, chat=chat)


class _Loop:
    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        self.recipe, self.setup, self.output = recipe, setup, Path(setup.output)
        lacking = [name for name in recipe.columns if any(row.get(name) is None for row in setup.rows)]
        if lacking:
            raise DataError(
                f"recipe {recipe.name} needs {' and '.join(lacking)} in every row of the data, beside prompt"
            )
        if len(recipe.train) > 1 and setup.peft_config is None:
            raise ValueError(f"recipe {recipe.name} trains adapters side by side: give a peft_config")
        if recipe.select == "split" and len(setup.rows) < recipe.iterations:
            raise ValueError(
                f"recipe {recipe.name} takes a part of the data an iteration: {len(setup.rows)} rows are too few for "
                f"{recipe.iterations} iterations"
            )
        drawn, trained = sum(draw.n for draw in recipe.draws), [train.method for train in recipe.train]
        alone = recipe.online and drawn == 1 and trained != ["nash_md"]
        if alone and setup.judge is not None and not setup.judge.scores:
            raise ValueError(
                f"recipe {recipe.name} draws one completion a prompt, and the judge only compares, which says nothing of a "
                "lone one: draws.n of 2 or more, or a judge that scores"
            )
        self.held_out = [] if recipe.makes_reward_model else setup.held_out
        if self.held_out and recipe.judge != "self" and not (setup.held_out_judge or setup.judge):
            raise ValueError(
                "the held-out prompts are answered for a judge, and none is given: give one, or hold out none"
            )
        if setup.stopping.z and len(setup.held_out) == 1:
            raise ValueError("a standard error, which z is about, needs 2 held-out prompts or more, got 1")
        self.policy = _Policy(setup, setup.model)
        self.start = _Policy(setup, setup.model)  # a judge that does not change

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        recipe, setup, rule = self.recipe, self.setup, self.setup.stopping
        self._identify()
        result = self.output / "result.json"
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
            return Outcome(**found | {"history": [math.nan if x is None else x for x in found["history"]]})
        models, reason = [setup.model], f"all {recipe.iterations} iterations are done"
        history = [self._held_out(self.output / "start", models[0])]
        if history[0] and all(map(math.isnan, history[0])):
            raise ValueError(
                f"the judge scored none of the answers to the {len(history[0])} held-out prompts, so no iteration can be "
                f"better: see {self.output / 'start'}"
            )
        for i in range(recipe.iterations):
            folder = self.output / f"iteration-{i:03d}"
            rows = self._rows(folder, i, models[-1])
            if not rows:
                reason = f"iteration {i + 1} found nothing to train on: no completion was judged better than another"
                if i == 0:
                    raise ValueError(f"recipe {recipe.name}: {reason}. See {folder / 'summary.json'}")
                break
            models.append(self._train(folder, i, rows, models))
            history.append(self._held_out(folder, models[-1]))
            best = rule.best(history) if history[0] else i + 1
            self._report(i, history, best)
            self._forget(best, i + 1)
            if history[0] and rule.stops(history):
                reason = f"no better on the held-out prompts for {rule.patience} iterations"
                break
        best = rule.best(history) if history[0] else len(models) - 1
        return self._finish(models, best, reason, history)

    def _rows(self, folder: Path, i: int, model: str) -> list[Row]:
        """What iteration i trains on; for methods that sample as they train, the prompts."""
        recipe, rows = self.recipe, list(self.setup.rows)
        if recipe.select == "split":
            cuts = [round(len(rows) * k / recipe.iterations) for k in (i, i + 1)]
            rows = rows[slice(*cuts)]
        if not recipe.draws or recipe.online:
            return rows
        policy = self._policy(model)
        samples = self._blocks(folder, "samples", rows, lambda b, part: self._sample(policy, i, b, part))
        pairs = list(zip(rows, samples, strict=True))
        needs = SELECTORS[recipe.select].needs
        judged: list[Row] = [{}] * len(rows)
        if needs != "nothing":
            judged = self._blocks(folder, "judged", pairs, lambda b, part: self._judge(policy, needs, i, b, part))
        return self._select(folder, i, samples, judged)

    def _report(self, i: int, history: list[list[float]], best: int) -> None:
        if history[0]:
            gain, error = paired(history[-1], history[0])
            unjudged = sum(map(math.isnan, history[-1]))
            self.setup.say(
                f"iteration {i + 1}: held-out score {_mean(history[-1]):.4f}, {gain:+.4f} ± {error:.4f} since the start"
                f"{f', {unjudged} of {len(history[-1])} answers unjudged' if unjudged else ''}; the best so far is "
                f"{f'that of iteration {best}' if best else 'the start'}"
            )

    def _finish(self, models: list[str], best: int, reason: str, history: list[list[float]]) -> Outcome:
        made = self.recipe.makes_reward_model
        name = "reward_model" if made else "model"
        final = self.output / name
        if best and not final.is_dir():
            with appearing(final, sole_writer=True) as part:
                shutil.copytree(models[best], part)
        outcome = Outcome(
            model=models[0] if made or not best else str(final),
            best=best,
            reason=reason,
            history=[_mean(scores) for scores in history] if history[0] else [],
            reward_model=str(final) if made else None,
        )
        self._write(self.output / "result.json", dataclasses.asdict(outcome))
        self.setup.say(f"{self.recipe.name}: {reason}; the result is {outcome.reward_model or outcome.model}")
        return outcome

    # --- stages ---------------------------------------------------------------------------------------------------

    def _sample(self, policy: _Policy, i: int, b: int, part: Sequence[Row]) -> list[Row]:
        """The completions of a block of prompts, a line a prompt."""
        recipe, setup = self.recipe, self.setup
        prompts = [row["prompt"] for row in part]
        names = ("completions", "completions_ids", "finish", "draw")
        lines: list[Row] = [{"prompt": p, "prompt_ids": [], **{n: [] for n in names}} for p in prompts]
        for d, draw in enumerate(recipe.draws):
            sampling = dataclasses.replace(setup.sampling, temperature=draw.temperature, top_p=draw.top_p)
            seed = seed_of_repr(setup.seed, i, "sample", b, d)
            samples = policy.rollout.generate(prompts, draw.n, sampling=sampling, seed=seed)
            found = zip(samples.prompt_ids, samples.completions, samples.completion_ids, samples.finish)
            for r, (prompt_ids, *values) in enumerate(found):
                lines[r // draw.n]["prompt_ids"] = prompt_ids
                for name, value in zip(names, (*values, d)):
                    lines[r // draw.n][name].append(value)
        if recipe.revise:
            self._revise(policy, lines, seed_of_repr(setup.seed, i, "revise", b))
        if recipe.gold:
            gold = self._encoded(policy, [{"prompt": r["prompt"], "chosen": r["chosen"]} for r in part])
            for line, row, ids in zip(lines, part, gold, strict=True):
                for name, value in zip(names, (row["chosen"], ids["chosen_ids"], "stop", -1)):
                    line[name].append(value)
        return lines

    def _revise(self, policy: _Policy, lines: list[Row], seed: int) -> None:
        """Each completion becomes its last revision; critiques and revisions are kept beside it."""
        at = [(line, k) for line in lines for k in range(len(line["completions"]))]
        for line in lines:
            line |= {"first": list(line["completions"]), "critiques": [], "revisions": []}

        def keep(r: int, critiques: list[Any], revisions: list[Any]) -> None:
            for name, values in (("critiques", critiques), ("revisions", revisions)):
                for (line, _), value in zip(at, values, strict=True):
                    line[name].append(value)

        found = revised(
            policy.rollout, [line["prompt"] for line, _ in at], [line["completions"][k] for line, k in at],
            sampling=dataclasses.replace(self.setup.sampling, temperature=self.recipe.draws[0].temperature),
            seed=seed, rounds=self.recipe.revise, say=keep,
        )  # fmt: skip
        ids = self._encoded(policy, [{"prompt": line["prompt"], "chosen": y} for (line, _), y in zip(at, found)])
        for (line, k), completion, row in zip(at, found, ids, strict=True):
            line["completions"][k], line["completions_ids"][k] = completion, row["chosen_ids"]

    def _judge(self, policy: _Policy, needs: str, i: int, b: int, part: Sequence[tuple[Row, Row]]) -> list[Row]:
        judge = self.setup.judge or policy.itself(seed_of_repr(self.setup.seed, i, "judge", b))
        lines = [line for _, line in part]
        judge.places()  # what it has been asked elsewhere
        asked = (
            judge,
            [line["prompt"] for line in lines],
            [line["completions"] for line in lines],
            _columns([row for row, _ in part]),
            [line["completions_ids"] for line in lines],
        )
        tables = group_scores(*asked) if needs == "scores" else group_wins(*asked)
        said: list[Row] = [{needs: finite(table.tolist())} for table in tables]
        if places := judge.places():
            said[0]["places"] = places  # of the block
        return said

    def _select(self, folder: Path, i: int, samples: list[Row], judged: list[Row]) -> list[Row]:
        path = folder / "selected.jsonl"
        if path.is_file():
            return _read_lines(path)
        recipe, needs = self.recipe, SELECTORS[self.recipe.select].needs
        rows, same = [], 0
        rejected = self._rejected_ids() if recipe.select == "against-rejected" else {}
        for g, (line, said) in enumerate(zip(samples, judged, strict=True)):
            count = torch.tensor(len(line["completions"]))
            table = count if needs == "nothing" else _tensor(said[needs])
            generator = torch.Generator().manual_seed(seed_of_repr(self.setup.seed, i, "select", g))
            for pick in SELECTORS[recipe.select](table, generator, recipe.select_args):
                row = {"prompt": line["prompt"], "prompt_ids": line["prompt_ids"], **_picked(line, pick)}
                if g in rejected:
                    row |= rejected[g]
                if "rejected_ids" in row and row["rejected_ids"] == row.get("chosen_ids"):
                    same += 1
                else:
                    rows.append(row)
        values = [x for said in judged for x in _flat(said.get(needs, []))]
        places = [said["places"] for said in judged if "places" in said]
        compared = sum(x["compared"] for x in places)
        sides = [f"{side}_ids" for side in ("chosen", "rejected") if rows and f"{side}_ids" in rows[0]]
        summary = {
            "prompts": len(samples),
            "completions": sum(len(line["completions"]) for line in samples),
            "truncated": sum(line["finish"].count("length") for line in samples),
            # Of a comparison P(i beats j) and P(j beats i) are missing together.
            "unjudged": sum(x is None for x in values) // (2 if needs == "wins" else 1),
            "mean_score": _mean([x for x in values if x is not None]) if needs == "scores" else None,
            "identical": same,
            "selected": len(rows),
            # Longer answers are preferred by many judges: the mean lengths of what is chosen, and rejected.
            **{name.replace("ids", "tokens"): _mean([len(row[name]) for row in rows]) for name in sides},
            # And so is a place: P(the first answer wins), ½ without a preference; the verdicts that go by the place alone.
            **({"first_place": sum(x["first_place"] for x in places) / compared} if compared else {}),
            **({"flipped": sum(x["flipped"] for x in places) / compared} if compared else {}),
        }
        self._write(folder / "summary.json", summary)
        told = ", ".join(f"{v:.4g} {k}" for k, v in summary.items() if v is not None and not math.isnan(v))
        self.setup.say(f"iteration {i + 1}: {told}")
        _write_lines(path, rows)
        return rows

    def _rejected_ids(self) -> dict[int, Row]:
        """The data's rejected completion of each prompt."""
        rows = [{"prompt": row["prompt"], "rejected": row["rejected"]} for row in self.setup.rows]
        encoded = self._encoded(self.policy, rows, "rejected")
        return {
            g: {"rejected": row["rejected"], "rejected_ids": ids["rejected_ids"]}
            for g, (row, ids) in enumerate(zip(rows, encoded, strict=True))
        }

    def _encoded(self, policy: _Policy, rows: Sequence[Row], kind: str = "chosen") -> list[Row]:
        """Token ids of rows of prompt and one completion."""
        if not rows:
            return []
        tokenizer = policy.loaded[1]
        columns = {name: [row[name] for row in rows] for name in ("prompt", kind)}
        columns["where"] = [f"row {g}" for g in range(len(rows))]
        config = _arguments(XPOConfig, self.output, self.setup.training)
        encoded = data.encode_rows(
            columns, tokenizer, kind, data.leading_ids(tokenizer, rows[0]["prompt"]), config.max_length,
            config.max_prompt_length,
        )  # fmt: skip
        return [dict(zip(encoded, values)) for values in zip(*encoded.values())]

    def _held_out(self, folder: Path, model: str) -> list[float]:
        """The scores of a model's answers to the held-out prompts; against the start's answers if the judge compares."""
        setup = self.setup
        if not self.held_out:
            return []
        policy = self._policy(model)
        first = self.recipe.draws[0] if self.recipe.draws else None
        sampling = setup.sampling if first is None else dataclasses.replace(
            setup.sampling, temperature=first.temperature, top_p=first.top_p
        )  # fmt: skip

        def work(b: int, part: Sequence[tuple[int, Row]]) -> list[Row]:
            rows = [row for _, row in part]
            prompts = [row["prompt"] for row in rows]
            seed = seed_of_repr(setup.seed, "held-out", b)
            samples = policy.rollout.generate(prompts, 1, sampling=sampling, seed=seed)
            judge = setup.held_out_judge or setup.judge
            judge = judge or self.start.itself(seed_of_repr(setup.seed, "held-out judge", b))
            groups = [[c] for c in samples.completions]
            if judge.scores:
                ids = [[x] for x in samples.completion_ids]
                scores = [float(s) for s in group_scores(judge, prompts, groups, _columns(rows), ids)]
            elif folder.name == "start":
                scores = [0.5] * len(rows)
            else:
                begun = [start[g]["completion"] for g, _ in part]
                scores = judge.compare(prompts, samples.completions, begun, **_columns(rows)).tolist()
            return [
                {"prompt": p, "completion": c, "score": s}
                for p, c, s in zip(prompts, samples.completions, finite(scores), strict=True)
            ]

        start = [] if folder.name == "start" else self._read_blocks(self.output / "start", "held_out")
        lines = self._blocks(folder, "held_out", list(enumerate(self.held_out)), work)
        return [math.nan if line["score"] is None else line["score"] for line in lines]

    # --- training -------------------------------------------------------------------------------------------------

    def _train(self, folder: Path, i: int, rows: list[Row], models: list[str]) -> str:
        """Train on the rows; the folder of the model that comes out."""
        final, log = folder / "model", folder / "train_log.json"
        if not log.is_file():  # written last; the model itself may be forgotten since
            logs: list[Any] = []
            if self.recipe.online:
                save = self._train_online(folder, i, rows, models, logs)
            elif self.recipe.makes_reward_model:
                save = self._train_reward(folder, i, rows, models, logs)
            elif len(self.recipe.train) > 1:
                save = self._train_side_by_side(folder, i, rows, models, logs)
            else:
                save = self._merged(self._offline(folder / "train", i, 0, rows, models, logs))
            with appearing(final, sole_writer=True) as part:
                save(part)
            self._write(log, logs)
        shutil.rmtree(folder / "train", ignore_errors=True)
        return str(final)

    def _offline(self, folder: Path, i: int, k: int, rows: list[Row], models: list[str], logs: list[Any]) -> Any:
        """The trained trainer of method k."""
        train = self.recipe.train[k]
        model, tokenizer = self._take(models[-1])
        dataset = self._dataset(rows, train, tokenizer)
        dataset = self._with_reference(dataset, train, models)
        known = KINDS[self.recipe.kind(train)].reference[0] in dataset.column_names
        further = {"reference": "cached"} if known else {}  # and not the adapter switched off
        trainer = XPOTrainer(
            model,
            self._config(XPOConfig, folder, train, seed_of_repr(self.setup.seed, i, "train", k), **further),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=copy.deepcopy(self.setup.peft_config),
            callbacks=[_L1(train.l1)] if train.l1 else None,
        )
        self._fit(trainer, i, train, logs, last_checkpoint(folder))
        return trainer

    def _fit(self, trainer: Any, i: int, train: Train, logs: list[Any], checkpoint: str | None) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Say(self.setup.say, f"iteration {i + 1}, {train}"))
        trainer.train(resume_from_checkpoint=checkpoint)
        logs += finite(trainer.state.log_history)

    def _config(self, kind: Any, folder: Path, train: Train, seed: int, **further: Any) -> Any:
        settings = {**self.setup.training, **further}
        settings.setdefault("ref_cache_dir", str(self.output / "reference"))
        settings |= {"method": train.method, "method_args": dict(train.args), "seed": seed}
        return _arguments(kind, folder, settings)

    def _dataset(self, rows: list[Row], train: Train, tokenizer: Any) -> datasets.Dataset:
        kind = self.recipe.kind(train)
        if "prompt_ids" in rows[0]:
            # The ids that were sampled: a completion that was cut off has no EOS, and nothing is tokenized twice.
            kept = [n for n in rows[0] if n.endswith("_ids") or n in KINDS[kind].numbers]
            return datasets.Dataset.from_list([{name: row[name] for name in kept} for row in rows])
        config = _arguments(XPOConfig, self.output, self.setup.training)
        sizes = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
        return data.encode(data.load(rows, kind=kind), tokenizer, kind=kind, **sizes)

    def _with_reference(self, dataset: datasets.Dataset, train: Train, models: list[str]) -> Any:
        """The data with the log-probs of a reference that is not the model which training begins with."""
        if self.recipe.reference not in ("fixed", "two") or len(models) == 1:
            return dataset
        fixed = self._referenced(dataset, train, models[0])
        if self.recipe.reference == "fixed":
            return fixed
        previous = self._referenced(dataset, train, models[-1])
        both = [[*own[:-1], last[-1]] for own, last in zip(fixed["ref_logp"], previous["ref_logp"])]
        return data.with_column(fixed.remove_columns(["ref_logp"]), "ref_logp", both)

    def _referenced(self, dataset: datasets.Dataset, train: Train, name: str) -> datasets.Dataset:
        model, tokenizer = _Policy(self.setup, name).loaded
        config = self._config(XPOConfig, self.output / "reference", train, self.setup.seed, reference="cached")
        trainer = XPOTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
        trainer.prepare()
        return trainer.train_dataset

    def _merged(self, trainer: Any) -> Callable[[Path], Any]:
        """What writes the trained model as a whole model."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        return _writer(model, trainer.processing_class)

    def _train_side_by_side(
        self, folder: Path, i: int, rows: list[Row], models: list[str], logs: list[Any]
    ) -> Callable[[Path], Any]:
        """Each method's adapter on the same base, then one adapter of them all, merged into the base."""
        from peft import PeftModel

        adapters = {
            f"{k}-{train.method}": folder / f"adapter-{k}-{train.method}" for k, train in enumerate(self.recipe.train)
        }
        for k, path in enumerate(adapters.values()):
            if not path.is_dir():
                trainer = self._offline(folder / "train" / str(k), i, k, rows, models, logs)
                # The log first: where the adapter is, there is nothing left to do.
                self._write(folder / f"{path.name}.json", trainer.state.log_history)
                with appearing(path, sole_writer=True) as part:
                    trainer.model.save_pretrained(part)
        logs[:] = [json.loads((folder / f"{p.name}.json").read_text(encoding="utf-8")) for p in adapters.values()]
        base, tokenizer = self._take(models[-1])
        merge = {"weights": [1.0] * len(adapters), **self.recipe.merge}
        (first, path), *others = adapters.items()
        model: Any = PeftModel.from_pretrained(base, str(path), adapter_name=first)
        for name, path in others:
            model.load_adapter(str(path), adapter_name=name)
        model.add_weighted_adapter(list(adapters), adapter_name="merged", **merge)
        return _writer(model.merge_and_unload(adapter_names=["merged"]), tokenizer)

    def _train_reward(
        self, folder: Path, i: int, rows: list[Row], models: list[str], logs: list[Any]
    ) -> Callable[[Path], Any]:
        from ..rewards.trainer import RewardConfig, RewardTrainer

        train = self.recipe.train[0]
        model, tokenizer = self._take(models[-1])
        known = ("prompt", "chosen", "rejected")
        # The judge's probabilities are soft labels for the methods that take them.
        kept = (*known, "prob") if train.method in ("bradley_terry", "preference_model") else known
        pairs = [
            {name: row[name] for name in kept if name in row}
            for row in rows
            if all(text_of(row[n]).strip() for n in known)
        ]
        if len(pairs) < len(rows):
            self.setup.say(f"iteration {i + 1}: {len(rows) - len(pairs)} pairs with an empty completion are left out")
        config = self._config(RewardConfig, folder / "train", train, seed_of_repr(self.setup.seed, i, "train", 0))
        trainer = RewardTrainer(
            model,
            config,
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=copy.deepcopy(self.setup.peft_config),
        )
        self._fit(trainer, i, train, logs, last_checkpoint(folder / "train"))
        return trainer.reward_model().save

    def _train_online(
        self, folder: Path, i: int, rows: list[Row], models: list[str], logs: list[Any]
    ) -> Callable[[Path], Any]:
        from ..rl import STATE_FILE, RLTrainer
        from ..rl.config import RLConfig
        from .mixture import AgainstMixture, MixtureRollout

        train, draw, judge = self.recipe.train[0], self.recipe.draws[0], self.setup.judge
        assert judge is not None
        sampling = dataclasses.replace(self.setup.sampling, temperature=draw.temperature, top_p=draw.top_p)
        model, tokenizer = self._take(models[-1])
        seed = seed_of_repr(self.setup.seed, i, "train", 0)
        config = self._config(
            RLConfig, folder / "train", train, seed,
            **{"num_generations": draw.n, **dataclasses.asdict(sampling)},
        )  # fmt: skip
        against = AgainstMixture(judge, sampling, seed)
        rewards: Any = judge if judge.scores else win_rate(judge)
        if train.method == "nash_md":
            rewards = against
        elif isinstance(judge, FunctionJudge):
            rewards = judge.rewards
        columns = _columns(rows)
        trainer = RLTrainer(
            model,
            rewards,
            config,
            train_dataset=[
                {"prompt": row["prompt"], **{name: column[k] for name, column in columns.items()}}
                for k, row in enumerate(rows)
            ],
            processing_class=tokenizer,
            peft_config=copy.deepcopy(self.setup.peft_config),
        )
        live: Any = trainer._live
        if train.method == "nash_md":
            against.rollout = MixtureRollout(trainer.model, tokenizer, reference=live.copy, share=self.recipe.mix)
        self._fit(trainer, i, train, logs, last_checkpoint(config.output_dir, STATE_FILE))
        samples = folder / "train" / SAMPLES_FILE
        if samples.is_file():
            write_atomically(folder / SAMPLES_FILE, samples.read_bytes())
        return self._merged(trainer)

    # --- models and files -----------------------------------------------------------------------------------------

    def _policy(self, name: str) -> _Policy:
        if self.policy.name != name:
            self.policy = _Policy(self.setup, name)
        return self.policy

    def _take(self, name: str) -> tuple[Any, Any]:
        """The model to train. It changes, so the next who asks for that name loads it anew."""
        taken = self._policy(name).loaded
        self.policy = _Policy(self.setup, name)
        return taken

    def _forget(self, best: int, last: int) -> None:
        """Remove the models before the last one, but for the best: nothing will ask for them. Number i + 1 is that of
        iteration i. A resumed run passes here again and may have later ones."""
        for number in range(1, last):
            if number != best and not self.setup.keep_models:
                shutil.rmtree(self.output / f"iteration-{number - 1:03d}" / "model", ignore_errors=True)

    def _identify(self) -> None:
        """Write down what this run is, or ValueError if the folder holds another."""
        setup = self.setup
        about = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": setup.model,
            "rows": _digest(setup.rows),
            "held_out": _digest(setup.held_out),
            "judge": type(setup.judge).__name__,
            "held_out_judge": type(setup.held_out_judge).__name__,
            "stopping": dataclasses.asdict(setup.stopping),
            "sampling": dataclasses.asdict(setup.sampling),
            "training": dict(setup.training),
            "notes": dict(setup.notes),
            "adapter": None if setup.peft_config is None else setup.peft_config.to_dict(),
            "block": setup.block,
            "seed": setup.seed,
        }
        # A set, as of an adapter's target modules, has another order in every process.
        about = json.loads(json.dumps(about, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))
        path = self.output / "run.json"
        if not path.is_file():
            self._write(path, about)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in about if before.get(name) != about[name]]
        if other:
            raise ValueError(
                f"{self.output} holds a run with other settings ({', '.join(other)}): go on with the same ones, or name "
                "another folder"
            )

    def _blocks(
        self, folder: Path, name: str, items: Sequence[Any], work: Callable[[int, Sequence[Any]], list[Row]]
    ) -> list[Row]:
        """What work(b, items of block b) gives for every block, from its file where it is there."""
        size, lines = self.setup.block, []
        started, fresh = time.monotonic(), 0
        for b, start in enumerate(range(0, len(items), size)):
            path = folder / f"{name}-{b:05d}.jsonl"
            if not path.is_file():
                part = items[start : start + size]
                _write_lines(path, work(b, part))
                fresh += len(part)
                each = (time.monotonic() - started) / fresh
                done = start + len(part)
                left = f", {each * (len(items) - done):.0f} s left" if done < len(items) else ""
                self.setup.say(
                    f"{folder.name}: {name.replace('_', '-')} {done} of {len(items)} prompts, {each:.2g} s each{left}"
                )
            lines += _read_lines(path)
        return lines

    def _read_blocks(self, folder: Path, name: str) -> list[Row]:
        return [line for path in sorted(folder.glob(f"{name}-*.jsonl")) for line in _read_lines(path)]

    def _write(self, path: Path, value: Any) -> None:
        write_json(path, value, ensure_ascii=False)


def _arguments(kind: Any, folder: Path, settings: Mapping[str, Any]) -> Any:
    """A configuration of this kind; what only the others have is left out. ValueError for what none has."""
    from ..rewards.trainer import RewardConfig
    from ..rl.trainer import RLConfig

    usual = {
        "disable_tqdm": True,
        "report_to": "none",
        "save_steps": 100,
        "save_total_limit": 1,
        "logging_first_step": True,
    }
    takes, *others = ({f.name for f in dataclasses.fields(k)} for k in (kind, XPOConfig, RewardConfig, RLConfig))
    unknown = sorted(set(settings) - takes.union(*others) | {"output_dir"} & set(settings))
    if unknown:
        raise ValueError(f"the trainers have no argument {', '.join(unknown)}, or the loop decides it")
    return kind(output_dir=str(folder), **{k: v for k, v in {**usual, **settings}.items() if k in takes})


class _L1(TrainerCallback):
    """Adds the gradient of λ‖θ‖₁, λ·sign(θ), to every trained weight's before the step; it is not clipped."""

    def __init__(self, lam: float) -> None:
        self.lam = lam

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.add_(p.detach().sign(), alpha=self.lam)


class _Say(TrainerCallback):
    """Tells what the trainer logs, a line each."""

    def __init__(self, say: Callable[[str], Any], what: str) -> None:
        self.say, self.what = say, what

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.say(f"{self.what}: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.4f}")


def _picked(line: Row, pick: Row) -> Row:
    """A selector's pick with its indices replaced by the completions and their token ids."""
    row: Row = {}
    for name, value in pick.items():
        if name in ("chosen", "rejected"):
            row |= {name: line["completions"][value], f"{name}_ids": line["completions_ids"][value]}
        elif name == "completions":
            row |= {n: [line[n][k] for k in value] for n in ("completions", "completions_ids")}
        else:
            row[name] = value
    return row


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The data's columns beside the prompt, for judges that check against an answer."""
    given = {name for row in rows for name, value in row.items() if value is not None}
    names = sorted(given - {"prompt", "where", "prompts", "completions"})
    return {name: [row.get(name) for row in rows] for name in names}


def _writer(model: Any, tokenizer: Any) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        remove_fused_loss(model)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return write


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _tensor(table: list[Any]) -> torch.Tensor:
    def number(x: Any) -> Any:
        return [number(y) for y in x] if isinstance(x, list) else math.nan if x is None else x

    return torch.tensor(number(table), dtype=torch.float64)


def _flat(table: list[Any]) -> list[Any]:
    return [y for x in table for y in (_flat(x) if isinstance(x, list) else [x])]


def _mean(values: Sequence[float]) -> float:
    known = [x for x in values if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan
