"""Search for an instruction by its score (OPRO, arXiv 2309.03409): the iteration of a recipe that trains nothing.

history ── the ask of the draw ──▶ n new instructions ── each before every row ──▶ answers ── judge ──▶ mean score

output/start/scored-00000.jsonl             answers under the instruction to begin with, with scores
output/iteration-000/proposed-00000.jsonl   the proposals, and the texts they were read from
                     scored-00000.jsonl     a block of answers under the new ones
                     selected.jsonl         the history: all instructions so far with their scores, the best last
                     summary.json
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import finite, write_json
from ..rewards.judges import group_scores, text_of
from ..rewards.llm_judges import as_prompt, filled
from ..seeds import seed_of_repr
from .asking import Search, affixed
from .recipe import Recipe
from .run_folder import in_blocks, read_lines, write_lines
from .setup import Policies, Row, Setup, columns, sampler_of
from .stopping import mean

LONGEST = 500  # characters of an instruction, as in the paper
_ANSWERS = ("answer", "chosen")  # columns that an example shows as its output


def begin(recipe: Recipe, setup: Setup, policies: Policies, folder: Path) -> list[Row]:
    """Returns the history before the first iteration: the instruction to begin with, scored."""
    path = folder / "selected.jsonl"
    if not path.is_file():
        start = Search(**recipe.select_args).start
        write_lines(path, _ranked(_scored(setup, policies, folder, [start], 0, 0)))
    return read_lines(path)


def search(recipe: Recipe, setup: Setup, policies: Policies, i: int, history: Sequence[Row], folder: Path) -> list[Row]:
    """Returns the history after iteration i: the rows given and the new instructions, the best last."""
    path = folder / "selected.jsonl"
    if path.is_file():
        return read_lines(path)
    proposed = in_blocks(
        setup, folder, "proposed", [history], lambda b, part: _proposed(recipe, setup, policies, i, part[0])
    )
    fresh = [line["instruction"] for line in proposed if line["new"]]
    scored = _scored(setup, policies, folder, fresh, i + 1, len(history))
    rows = _ranked([*history, *scored])
    best = rows[-1]
    known = [row["score"] for row in scored if row["score"] is not None]
    summary = {
        "proposed": len(proposed),
        "new": len(fresh),
        "mean_score": finite(mean(known)),
        "best_score": best["score"],
    }
    write_json(folder / "summary.json", summary, ensure_ascii=False)
    setup.say(
        f"iteration {i + 1}: {len(fresh)} new of {len(proposed)} instructions; the best so far, with "
        f"{math.nan if best['score'] is None else best['score']:.4g}, is {best['instruction']!r}"
    )
    write_lines(path, rows)
    return rows


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows by their scores, those without one first, of equal ones the earliest last."""
    return sorted(rows, key=lambda row: (-math.inf if row["score"] is None else row["score"], -row["number"]))


def _proposed(recipe: Recipe, setup: Setup, policies: Policies, i: int, history: Sequence[Row]) -> list[Row]:
    """Returns what the optimiser proposes after it has read the best of the history."""
    draw, how = recipe.draws[0], Search(**recipe.select_args)
    sampler, chat = sampler_of(setup, policies.start)
    shown = [row for row in history if row["score"] is not None][-how.keep :]
    draws = random.Random(seed_of_repr(setup.seed, i, "examples"))
    examples = draws.sample(list(setup.rows), min(how.examples, len(setup.rows)))
    question = filled(
        draw.ask,
        history="\n\n".join(f"instruction: {row['instruction']}\nscore: {row['score']:.4g}" for row in shown),
        examples="\n\n".join(map(_example, examples)),
    )
    seed = seed_of_repr(setup.seed, i, "propose")
    sampling = draw.sampling(setup.sampling)
    replies = sampler.generate([as_prompt(question, chat)], draw.n, sampling=sampling, seed=seed).completions
    seen, rows = {row["instruction"] for row in history}, []
    for reply in map(text_of, replies):
        instruction = instruction_in(reply)
        rows.append({"instruction": instruction, "reply": reply, "new": bool(instruction) and instruction not in seen})
        seen.add(instruction)
    return rows


def _example(row: Row) -> str:
    """Returns a row as the optimiser reads it: the prompt with <INS>, and its answer if it has one."""
    answer = next((row[name] for name in _ANSWERS if row.get(name) is not None), None)
    shown = f"input: {text_of(affixed(row['prompt'], '<INS>'))}"
    told = text_of(answer) if isinstance(answer, (str, list)) else answer
    return shown if answer is None else f"{shown}\noutput: {str(told).strip()}"


def instruction_in(reply: str) -> str:
    """Returns what a reply proposes: its first text in square brackets, else its first line; "" if there is none.

    An instruction of more than 500 characters is none.
    """
    found = re.search(r"\[([^\[\]]+)\]", reply)
    text = found[1] if found else next((line for line in reply.splitlines() if line.strip()), "")
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else ""


def _scored(
    setup: Setup, policies: Policies, folder: Path, instructions: Sequence[str], i: int, known: int
) -> list[Row]:
    """Returns each instruction with the mean score of the policy's most likely answers to all rows under it.

    i: 0 for the one to begin with, 1 for the first iteration. known: how many were found before, for their numbers.
    """
    judge, rollout = setup.judge, policies.start.rollout if instructions else None
    assert judge is not None
    sampling = dataclasses.replace(setup.sampling, temperature=0.0)
    items = [(k, row) for k in range(len(instructions)) for row in setup.rows]

    def work(b: int, part: Sequence[tuple[int, Row]]) -> list[Row]:
        assert rollout is not None
        prompts = [row["prompt"] for _, row in part]
        asked = [affixed(row["prompt"], instructions[k]) for k, row in part]
        samples = rollout.generate(asked, 1, sampling=sampling, seed=seed_of_repr(setup.seed, i, "score", b))
        groups, ids = [[c] for c in samples.completions], [[x] for x in samples.completion_ids]
        scores = finite([float(s) for s in group_scores(judge, prompts, groups, columns([r for _, r in part]), ids)])
        found = zip(part, samples.completions, scores, strict=True)
        return [{"instruction": k, "prompt": row["prompt"], "completion": c, "score": s} for (k, row), c, s in found]

    lines = in_blocks(setup, folder, "scored", items, work)
    of: list[list[float]] = [[] for _ in instructions]
    for line in lines:
        if line["score"] is not None:
            of[line["instruction"]].append(line["score"])
    return [
        {"instruction": text, "score": finite(mean(x)), "answered": len(x), "iteration": i, "number": known + k}
        for k, (text, x) in enumerate(zip(instructions, of, strict=True))
    ]


def outcome_of(output: Path, best: int) -> tuple[str, list[Any]]:
    """Returns the best instruction after `best` iterations, and the history then."""
    folder = output / (f"iteration-{best - 1:03d}" if best else "start")
    rows = read_lines(folder / "selected.jsonl")
    return rows[-1]["instruction"], rows
