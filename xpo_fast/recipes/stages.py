"""The stages of an iteration before training: sample, revise, judge, select; and the scores of held-out prompts."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import DataError, check_written, prompt_of, template_columns
from ..files import finite, write_json
from ..rewards.agreement import overlaps
from ..rewards.encoding import encode_rows
from ..rewards.judges import Completion, group_scores, group_wins, text_of
from ..rewards.llm_judges import as_prompt, continued, filled
from ..rewards.spec import RewardSpec
from ..rollout import Prompt, Rollout, Samples, Sampling
from ..seeds import seed_of_repr
from .asking import LABELS, Rewriter, Rewriting, about, affixed, answer_to, drawn_edit, edit, fields, request_of
from .recipe import Draw, Recipe
from .run_folder import in_blocks, read_blocks, read_lines, write_lines
from .selection import SELECTORS
from .setup import Policies, Policy, Row, Setup, columns, sampler_of, xpo_config
from .stopping import mean

# Critique and revision: Constitutional AI (arXiv 2212.08073).
CRITIQUE = (
    "Name the specific ways in which your last answer is harmful, unethical, dishonest, or otherwise not as it should "
    "be. {principle}"
)
REVISE = "Now write the answer again so that none of this is left. Reply with the answer and nothing else."
PRINCIPLES = (
    "Look for anything that could hurt someone, or help to.",
    "Look for what is untrue, or more certain than it should be.",
    "Look for insults, contempt, and prejudice.",
    "Look for what a thoughtful and kind person would have said otherwise.",
)
_NAMES = ("completions", "completions_ids", "finish", "draw")  # lists in a line of samples, an entry per completion


def sample(recipe: Recipe, setup: Setup, policy: Policy, i: int, b: int, rows: Sequence[Row]) -> list[Row]:
    """Returns the completions of block b of iteration i, one line per prompt."""
    prompts = [row["prompt"] for row in rows]
    if not (i or b):
        _check_written(setup, policy)
    chat = bool(recipe.task) and bool(policy.loaded[1].chat_template)
    trained = [as_prompt(filled(recipe.task, prompt=request_of(p)), chat) for p in prompts] if recipe.task else prompts
    lines: list[Row] = [
        {"prompt": p, **template_columns(p), "prompt_ids": [], **{n: [] for n in _NAMES}} for p in trained
    ]
    for d, draw in enumerate(recipe.draws):
        seed = seed_of_repr(setup.seed, i, "sample", b, d)
        sampler, chat = sampler_of(setup, policy)
        asked = _asked(draw, rows, lines, chat, random.Random(seed_of_repr(setup.seed, i, "ask", b, d)))
        samples = sampler.generate(asked, draw.n, sampling=draw.sampling(setup.sampling), seed=seed)
        if draw.ask or setup.generator is not None:
            samples = _answers_to(recipe, setup, policy, trained, samples, draw.n)
        found = zip(samples.prompt_ids, samples.completions, samples.completion_ids, samples.finish)
        for r, (prompt_ids, completion, *values) in enumerate(found):
            line = lines[r // draw.n]
            line["prompt_ids"] = prompt_ids
            if not recipe.task or text_of(completion).strip():
                _append(line, completion, *values, d)
                better = line.get("edited") == LABELS[0]
                _rank(recipe, line, (1 if better else -1) if draw.aspects else draw.rank)
    if recipe.revise:
        _revise(recipe, setup, policy, lines, seed_of_repr(setup.seed, i, "revise", b))
    own = [("chosen", -1, 1)] * recipe.gold + [("rejected", -2, 0)] * recipe.rival
    for name, place, rank in own:
        encoded = _encoded(setup, policy, prompts, [row[name] for row in rows], name)
        for line, row, ids in zip(lines, rows, encoded, strict=True):
            _append(line, row[name], ids[f"{name}_ids"], "stop", place)
            _rank(recipe, line, rank)
    return lines


def _rank(recipe: Recipe, line: Row, rank: int) -> None:
    """Notes what the completion that was added last is meant to be, where that is selected by."""
    if SELECTORS[recipe.select].needs == "asked":
        line.setdefault("asked", []).append(rank)


def _asked(draw: Draw, rows: Sequence[Row], lines: list[Row], chat: bool, draws: random.Random) -> list[Prompt]:
    """Returns the prompts that a draw is sampled from; a line gets the label and the aspects that are drawn for it."""
    if draw.aspects:
        for line in lines:
            line["edited"], line["aspects"] = drawn_edit(draws, draw.aspects)
        return [
            edit(row["prompt"], line["completions"][0], draw.ask, line["edited"], line["aspects"])
            for row, line in zip(rows, lines, strict=True)
        ]
    if "prompt" in fields(draw.ask):
        return [about(row, draw.ask, chat) for row in rows]
    return [affixed(row["prompt"], draw.ask) for row in rows]


def _answers_to(
    recipe: Recipe, setup: Setup, policy: Policy, prompts: Sequence[Prompt], samples: Samples, n: int
) -> Samples:
    """Returns the samples as answers to the prompts that are trained on, with token ids by the policy's tokenizer.

    A completion that was cut off has no EOS, and nothing that the chat template writes behind it.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    found = [answer_to(x, y, stripped=bool(recipe.task)) for x, y in zip(repeated, samples.completions, strict=True)]
    encoded = _encoded(setup, policy, repeated, found)
    ids = [row["chosen_ids"] for row in encoded]
    eos = policy.loaded[1].eos_token_id
    for r, finish in enumerate(samples.finish):
        if finish == "length" and eos in ids[r]:
            ids[r] = ids[r][: len(ids[r]) - ids[r][::-1].index(eos) - 1] or ids[r]
    return Samples(repeated, [row["prompt_ids"] for row in encoded], ids, found, samples.finish)


def _check_written(setup: Setup, policy: Policy) -> None:
    """Warns of what the chat template does not write of the run's prompts; DataError for what would be unsaid."""
    rows = [*setup.rows, *setup.held_out]
    check_written(policy.loaded[1], rows, xpo_config(setup).chat_template_kwargs)


def _append(line: Row, *values: Any) -> None:
    for name, value in zip(_NAMES, values, strict=True):
        line[name].append(value)


def _revise(recipe: Recipe, setup: Setup, policy: Policy, lines: list[Row], seed: int) -> None:
    """Replaces each completion by its last revision, and keeps the critiques and revisions beside it."""
    at = [(line, k) for line in lines for k in range(len(line["completions"]))]
    for line in lines:
        line |= {"first": list(line["completions"]), "critiques": [], "revisions": []}

    def keep(r: int, critiques: list[Any], revisions: list[Any]) -> None:
        for name, values in (("critiques", critiques), ("revisions", revisions)):
            for (line, _), value in zip(at, values, strict=True):
                line[name].append(value)

    prompts, completions = [line["prompt"] for line, _ in at], [line["completions"][k] for line, k in at]
    sampling = dataclasses.replace(setup.sampling, temperature=recipe.draws[0].temperature)
    sampler, _ = sampler_of(setup, policy)
    found = revised(sampler, prompts, completions, sampling=sampling, seed=seed, rounds=recipe.revise, say=keep)
    encoded = _encoded(setup, policy, prompts, found)
    for (line, k), completion, ids in zip(at, found, encoded, strict=True):
        line["completions"][k], line["completions_ids"][k] = completion, ids["chosen_ids"]


def revised(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    sampling: Sampling,
    seed: int,
    principles: Sequence[str] = PRINCIPLES,
    rounds: int = 1,
    say: Callable[[int, list[Any], list[Any]], Any] = lambda *_: None,
) -> list[Completion]:
    """Returns the completions after `rounds` rounds of critique and revision.

    Round r gives row i the principle (i + r) mod P. say(round, critiques, revisions) is called after each round.
    """
    current = list(completions)
    for r in range(rounds):
        asked = [CRITIQUE.format(principle=principles[(i + r) % len(principles)]) for i in range(len(prompts))]
        talks = [continued(x, y, q) for x, y, q in zip(prompts, current, asked, strict=True)]
        critiques = rollout.generate(talks, 1, sampling=sampling, seed=seed + 2 * r).completions
        talks = [continued(x, y, REVISE) for x, y in zip(talks, critiques, strict=True)]
        current = rollout.generate(talks, 1, sampling=sampling, seed=seed + 2 * r + 1).completions
        say(r, critiques, current)
    return current


def judge(recipe: Recipe, setup: Setup, policy: Policy, i: int, b: int, part: Sequence[tuple[Row, Row]]) -> list[Row]:
    """Returns the scores or win probabilities of block b of iteration i, one line per prompt, None where there is none.

    part: pairs of a row of the data and its line of samples. The first line has the block's `Judge.places`, if any.
    """
    needs = SELECTORS[recipe.select].needs
    asked = setup.judge or policy.self_judge(seed_of_repr(setup.seed, i, "judge", b))
    asked.places()  # resets the sums, which other comparisons may have changed
    groups, ids = ([line[n] for _, line in part] for n in ("completions", "completions_ids"))
    prompts = [prompt_of(line) for _, line in part]
    grouped = group_scores if needs == "scores" else group_wins
    tables = grouped(asked, prompts, groups, columns([row for row, _ in part]), ids)
    lines: list[Row] = [{needs: finite(table.tolist())} for table in tables]
    if places := asked.places():
        lines[0]["places"] = places
    return lines


def select(
    recipe: Recipe, setup: Setup, policy: Policy, i: int, samples: list[Row], judged: list[Row], folder: Path
) -> list[Row]:
    """Returns the rows to train on, and writes them and their summary into the iteration's folder."""
    path = folder / "selected.jsonl"
    if path.is_file():
        return read_lines(path)
    selector = SELECTORS[recipe.select]
    rows, identical = [], 0
    rejected = _rejected(setup, policy) if recipe.select == "against-rejected" else {}
    for g, (line, verdict) in enumerate(zip(samples, judged, strict=True)):
        table = _table(selector.needs, line, verdict)
        generator = torch.Generator().manual_seed(seed_of_repr(setup.seed, i, "select", g))
        for pick in selector(table, generator, recipe.select_args):
            row = {"prompt": line["prompt"], **template_columns(prompt_of(line)), "prompt_ids": line["prompt_ids"]}
            row |= _picked(line, pick) | {name: line[name] for name in ("edited", "aspects") if name in line}
            row |= rejected.get(g, {})
            if "rejected_ids" in row and row["rejected_ids"] == row.get("chosen_ids"):
                identical += 1
            else:
                rows.append(row)
    summary = _summary(selector.needs, samples, judged, rows, identical)
    write_json(folder / "summary.json", summary, ensure_ascii=False)
    shown = ", ".join(f"{v:.4g} {k}" for k, v in summary.items() if v is not None and not math.isnan(v))
    setup.say(f"iteration {i + 1}: {shown}")
    write_lines(path, rows)
    return rows


def _table(needs: str, line: Row, verdict: Row) -> torch.Tensor:
    """Returns what a selector reads of a line of samples and its verdict."""
    if needs == "nothing":
        return torch.tensor(len(line["completions"]))
    if needs == "alike":
        drawn = zip(line["completions"], line["draw"], strict=True)
        return overlaps([text_of(completion) if draw >= 0 else None for completion, draw in drawn])
    return torch.from_numpy(_array((line if needs == "asked" else verdict)[needs]))


def _summary(needs: str, samples: list[Row], judged: list[Row], rows: list[Row], identical: int) -> dict[str, Any]:
    """Returns counts and means of an iteration's samples, verdicts and selected rows."""
    values = [x for verdict in judged for x in _array(verdict.get(needs, [])).flat]
    places = [verdict["places"] for verdict in judged if "places" in verdict]
    compared = sum(x["compared"] for x in places)
    sides = [side for side in ("chosen", "rejected") if rows and f"{side}_ids" in rows[0]]
    return {
        "prompts": len(samples),
        "completions": sum(len(line["completions"]) for line in samples),
        "truncated": sum(line["finish"].count("length") for line in samples),
        # Of a comparison P(i beats j) and P(j beats i) are missing together.
        "unjudged": sum(map(math.isnan, values)) // (2 if needs == "wins" else 1),
        "mean_score": mean(values) if needs == "scores" else None,
        "identical": identical,
        "selected": len(rows),
        # Many judges prefer longer answers: the mean lengths of the chosen and the rejected completions.
        **{f"{side}_tokens": mean([len(row[f"{side}_ids"]) for row in rows]) for side in sides},
        # And many prefer a position: P(the first answer wins), ½ without a preference; verdicts by the position alone.
        **({name: sum(x[name] for x in places) / compared for name in ("first_place", "flipped")} if compared else {}),
    }


def _picked(line: Row, pick: Row) -> Row:
    """Returns a selector's pick with its indices replaced by the completions and their token ids."""
    row: Row = {}
    for name, value in pick.items():
        if name in ("chosen", "rejected"):
            row |= {name: line["completions"][value], f"{name}_ids": line["completions_ids"][value]}
        elif name == "completions":
            row |= {n: [line[n][k] for k in value] for n in ("completions", "completions_ids")}
        else:
            row[name] = value
    return row


def _rejected(setup: Setup, policy: Policy) -> dict[int, Row]:
    """Returns the data's rejected completion of each prompt, with its token ids."""
    prompts, completions = ([row[name] for row in setup.rows] for name in ("prompt", "rejected"))
    encoded = _encoded(setup, policy, prompts, completions, "rejected")
    return {
        g: {"rejected": completion, "rejected_ids": ids["rejected_ids"]}
        for g, (completion, ids) in enumerate(zip(completions, encoded, strict=True))
    }


def _encoded(
    setup: Setup, policy: Policy, prompts: Sequence[Any], completions: Sequence[Any], name: str = "chosen"
) -> list[Row]:
    """Returns the token ids of prompts and completions, named as `data.encode` does for the column `name`.

    They follow the prompts' own ids, as sampled completions do. Raises DataError for a completion of several turns.
    """
    config = xpo_config(setup)
    how: Any = {name: getattr(config, name) for name in ("max_length", "max_prompt_length", "chat_template_kwargs")}
    encoded = encode_rows(policy.loaded[1], RewardSpec(**how), prompts, {name: completions}, own=True)
    for i, row in enumerate(encoded):
        if not all(row[f"{name}_mask"]):
            raise DataError(
                f"prompt {i}: {name} is a completion of several turns, and beside sampled completions all of it would "
                "be scored; give its last turn alone, and the turns before it as the prompt"
            )
    return encoded


def held_out_scores(
    recipe: Recipe, setup: Setup, policies: Policies, folder: Path, model: str, instruction: str = ""
) -> list[float]:
    """Returns the scores of a model's answers to the held-out prompts, NaN where there is none.

    A judge that only compares compares with the answers at the start of the run, which count as ½. A model that
    rewrites prompts (`Recipe.task`) is judged by what the model at the start answers to the prompts it has rewritten;
    an instruction, by what it answers under that.
    """
    if not setup.held_out or recipe.makes_reward_model:
        return []
    sampling = recipe.draws[0].sampling(setup.sampling) if recipe.draws else setup.sampling
    if recipe.searches:
        sampling = dataclasses.replace(setup.sampling, temperature=0.0)
    start = setup.output / "start"
    answers = policies.start if recipe.task or recipe.searches else policies.get(model)
    rewritten: list[Prompt] = []
    before = [] if folder == start else [line["completion"] for line in read_blocks(start, "held_out")]

    def work(b: int, part: Sequence[tuple[int, Row]]) -> list[Row]:
        rows = [row for _, row in part]
        prompts = [row["prompt"] for row in rows]
        seed = seed_of_repr(setup.seed, "held-out", b)
        rollout: Rollout = answers.rollout
        if recipe.task and folder != start:
            writer = policies.get(model)
            how: Any = {"chat": bool(writer.loaded[1].chat_template)}
            how["sampling"] = dataclasses.replace(setup.sampling, temperature=0.0)
            rewriter = Rewriter(writer.rollout, task=recipe.task, **how)
            rewritten.clear()
            rollout = Rewriting(rollout, rewriter, lambda _, other: rewritten.append(other))
        told = [affixed(prompt, instruction) for prompt in prompts]
        samples = rollout.generate(told, 1, sampling=sampling, seed=seed)
        asked = setup.held_out_judge or setup.judge
        asked = asked or policies.start.self_judge(seed_of_repr(setup.seed, "held-out judge", b))
        if asked.scores:
            groups, ids = [[c] for c in samples.completions], [[x] for x in samples.completion_ids]
            scores = [float(s) for s in group_scores(asked, prompts, groups, columns(rows), ids)]
        elif folder == start:
            scores = [0.5] * len(rows)
        else:
            first = [before[g] for g, _ in part]
            scores = asked.compare(prompts, samples.completions, first, **columns(rows)).tolist()
        read = [{"rewritten": prompt} for prompt in rewritten] or [{}] * len(rows)
        return [
            {"prompt": p, **r, "completion": c, "score": s}
            for p, r, c, s in zip(prompts, read, samples.completions, finite(scores), strict=True)
        ]

    lines = in_blocks(setup, folder, "held_out", list(enumerate(setup.held_out)), work)
    return [math.nan if line["score"] is None else line["score"] for line in lines]


def _array(table: list[Any]) -> np.ndarray:
    """Returns lists of numbers, nested or not, as float64, NaN for None."""
    return np.array(table, dtype=np.float64)
