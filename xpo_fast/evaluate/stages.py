"""The work of an evaluation in blocks, each a file of JSON lines: log-probs, samples, judgements, log-ratios.

    OUTPUT/evaluation.json             what is measured; a resumed evaluation must have the same
    OUTPUT/blocks/NAME-00000.jsonl     a block of rows with what was computed for them

A block whose file exists is not computed again, and every draw has a seed of its own, so that an evaluation that was
stopped and resumed writes the same files as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import prompt_of
from ..files import finite, write_json
from ..layouts import Inputs
from ..models import install_fused_loss
from ..recipes.run_folder import in_blocks
from ..recipes.setup import columns
from ..resume import as_json
from ..rewards.encoding import check_features, in_batches
from ..rewards.judges import Judge, group_scores, group_wins
from ..rewards.layout import ScorerLayout, off_of
from ..rollout import GenerateRollout, Samples, Sampling, sample_logps
from ..seeds import seed_of_repr
from ..trainer.reference import row_logps
from .frontier import kl_estimates
from .games import Games, decided
from .policies import Policy

Row = Mapping[str, Any]
Line = dict[str, Any]
ABOUT = "evaluation.json"


def identify(output: Path, about: Mapping[str, Any]) -> None:
    """Writes what is measured into the folder. Raises ValueError, naming what differs, if it holds something else."""
    path, now = output / ABOUT, as_json(about)
    if not path.is_file():
        write_json(path, now, ensure_ascii=False)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(finite(now)))
    if other := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        raise ValueError(
            f"{output} holds an evaluation with other settings ({', '.join(other)}): go on with the same ones, or name "
            "another folder"
        )


@dataclass(frozen=True)
class Stages:
    """How work is done. folder: of the blocks. block: rows per file. say: called with each line of progress."""

    folder: Path
    block: int = 32
    batch_size: int = 8
    layout: str = "auto"
    seed: int = 42
    say: Callable[[str], Any] = print

    def logps(self, name: str, policy: Policy, tokenizer: Any, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Returns a policy's log-probs of encoded pairs, chosen before rejected, and their scored tokens: (P, 2) each.

        rows: as `data.encode` makes them of pairs. The log-probs are read off hidden states, in eval mode and without
        gradient, in the rows' layout; no tensor of (tokens × vocabulary) is made.
        """
        layout: list[ScorerLayout] = []

        def work(b: int, part: Sequence[Row]) -> list[Line]:
            halves = [half_of(row, side) for side in ("chosen", "rejected") for row in part]
            with policy.reading() as model:
                install_fused_loss(model)
                if not layout:
                    layout.append(ScorerLayout(self.layout, model, lambda *given: off_of(model, *given)))
                read = layout[0].settle(halves, tokenizer)

                def run(batch: Mapping[str, Any]) -> Tensor:
                    return row_logps(model, *Inputs.of(batch))

                found = in_batches(halves, model, tokenizer, self.batch_size, run, layout=read).view(2, -1, 2)
            return [
                {"logps": found[:, i, 0].tolist(), "tokens": found[:, i, 1].long().tolist()} for i in range(len(part))
            ]

        lines = in_blocks(self, self.folder, name, rows, work, "pairs")
        return np.array([line["logps"] for line in lines]), np.array([line["tokens"] for line in lines], np.float64)

    def alphas(self, judge: Judge, rows: Sequence[Row]) -> np.ndarray:
        """Returns P(chosen beats rejected) by a judge, (P,), NaN where it has no verdict. rows: of `data.load`."""

        def work(b: int, part: Sequence[Row]) -> list[Line]:
            prompts = [prompt_of(row) for row in part]
            chosen, rejected = ([row[side] for row in part] for side in ("chosen", "rejected"))
            found = judge.compare(prompts, chosen, rejected, **_beside(part))
            return [{"alpha": x} for x in finite(found.tolist())]

        lines = in_blocks(self, self.folder, "alpha", rows, work, "pairs")
        return np.array([_number(line["alpha"]) for line in lines])

    def samples(
        self, name: str, policy: Policy, rows: Sequence[Row], n: int, sampling: Sampling, *, scored: bool = False
    ) -> list[Line]:
        """Returns a line for each prompt with n completions of the policy. scored: with the log-prob of each token."""

        def work(b: int, part: Sequence[Row]) -> list[Line]:
            tokenizer = policy.tokenizer
            with policy.reading() as model:
                rollout = GenerateRollout(
                    model, tokenizer, batch_size=self.batch_size, chat_template_kwargs=policy.chat_template_kwargs
                )
                seed = seed_of_repr(self.seed, "evaluate", b)
                samples = rollout.generate([prompt_of(row) for row in part], n, sampling=sampling, seed=seed)
                logps = sample_logps(model, samples, batch_size=self.batch_size) if scored else None
            fields = {"completions": samples.completions, "ids": samples.completion_ids, "finish": samples.finish}
            if logps is not None:
                fields["logps"] = [x[:k].tolist() for x, k in zip(logps, samples.lengths.tolist(), strict=True)]
            return [
                {
                    "where": str(row["where"]),
                    "prompt_ids": samples.prompt_ids[i * n],
                    **{key: x[i * n : (i + 1) * n] for key, x in fields.items()},
                }
                for i, row in enumerate(part)
            ]

        return in_blocks(self, self.folder, f"samples-{name}", rows, work)

    def log_ratios(self, name: str, reference: Policy, lines: Sequence[Line]) -> list[Line]:
        """Returns k1 and k3 (`frontier.kl_estimates`) and the tokens of each completion of `samples(scored=True)`."""

        def work(b: int, part: Sequence[Line]) -> list[Line]:
            ids = [x for line in part for x in line["ids"]]
            given = [line["prompt_ids"] for line in part for _ in line["ids"]]
            samples = Samples([""] * len(ids), given, ids, [""] * len(ids), ["stop"] * len(ids))
            with reference.reading() as model:
                theirs = sample_logps(model, samples, batch_size=self.batch_size)
            own = torch.zeros_like(theirs)
            for r, logps in enumerate(x for line in part for x in line["logps"]):
                own[r, : len(logps)] = torch.tensor(logps)
            k1, k3 = (x.tolist() for x in kl_estimates(own, theirs))
            found = iter(zip(k1, k3, map(len, ids), strict=True))
            return [
                dict(zip(("k1", "k3", "tokens"), zip(*(next(found) for _ in line["ids"]), strict=True), strict=True))
                for line in part
            ]

        return in_blocks(self, self.folder, f"log-ratios-{name}", lines, work)

    def rewards(
        self, name: str, judge: Judge, rows: Sequence[Row], lines: Sequence[Line], start: Sequence[Line]
    ) -> np.ndarray:
        """Returns the reward of each completion, (prompts, n), NaN where there is none.

        It is the judge's score; of a judge that only compares P(the completion beats that of `start`).
        """

        def work(b: int, part: Sequence[tuple[Row, Line, Line]]) -> list[Line]:
            rows, lines, first = zip(*part, strict=True)
            prompts, groups = [prompt_of(row) for row in rows], [line["completions"] for line in lines]
            if judge.scores:
                tables = group_scores(judge, prompts, groups, _beside(rows), [line["ids"] for line in lines])
                return [{"rewards": finite(table.tolist())} for table in tables]
            against = [y for line in first for y in line["completions"]]
            n = len(groups[0])
            asked = [p for p in prompts for _ in range(n)]
            beside = {key: [x for x in column for _ in range(n)] for key, column in _beside(rows).items()}
            wins = judge.compare(asked, [y for group in groups for y in group], against, **beside).view(-1, n)
            return [{"rewards": finite(row.tolist())} for row in wins]

        items = list(zip(rows, lines, start, strict=True))
        found = in_blocks(self, self.folder, f"rewards-{name}", items, work)
        return np.array([[_number(x) for x in line["rewards"]] for line in found], dtype=np.float64)

    def games(
        self, judge: Judge, rows: Sequence[Row], named: Mapping[str, Sequence[Line]], *, soft: bool = False
    ) -> tuple[Games, dict[str, float]]:
        """Returns the games between policies' samples by a judge, and the judge's sums of places (`Judge.places`).

        named: the lines of `samples` by policy; copy k of one meets copy k of every other. soft: a game's score is the
        judge's probability, not 1, ½ or 0 by the side of ½ on which that is.
        """
        names = tuple(named)
        n = len(named[names[0]][0]["completions"])

        def work(b: int, part: Sequence[tuple[Row, int]]) -> list[Line]:
            prompts, copies = [prompt_of(row) for row, _ in part], [i for _, i in part]
            judge.places()
            groups, ids = (
                [[named[name][i // n][key][i % n] for name in names] for i in copies] for key in ("completions", "ids")
            )
            tables = group_wins(judge, prompts, groups, _beside([row for row, _ in part]), ids)
            lines: list[Line] = [{"wins": finite(table.tolist())} for table in tables]
            if places := judge.places():
                lines[0]["places"] = places
            return lines

        items = [(row, g * n + k) for g, row in enumerate(rows) for k in range(n)]
        lines = in_blocks(self, self.folder, "games", items, work, "rounds")
        pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
        scores = np.array([[_number(line["wins"][i][j]) for i, j in pairs] for line in lines], dtype=np.float64)
        first, second = (np.tile([pair[side] for pair in pairs], len(lines)) for side in (0, 1))
        prompts = np.repeat(np.arange(len(lines)) // n, len(pairs))
        flat = scores.ravel()
        games = Games(names, first, second, flat if soft else decided(flat), prompts)
        sums: dict[str, float] = {}
        for line in lines:
            for key, x in line.get("places", {}).items():
                sums[key] = sums.get(key, 0.0) + x
        return games, sums


def half_of(row: Row, side: str) -> dict[str, Any]:
    """Returns one completion of an encoded pair as an encoded row of its own, of the kind "chosen"."""
    found = {"prompt_ids": row["prompt_ids"], "chosen_ids": row[f"{side}_ids"], "where": row["where"]}
    return found | ({"chosen_mask": row[f"{side}_mask"]} if f"{side}_mask" in row else {})


def prompt_numbers(rows: Sequence[Row]) -> np.ndarray:
    """Returns a number for each row (N,) int, shared by the rows of a prompt."""
    numbers: dict[str, int] = {}
    keys = (json.dumps(prompt_of(row), sort_keys=True, default=str) for row in rows)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def check_pairs(policy: Policy, tokenizer: Any, rows: Sequence[Row]) -> None:
    """Raises ValueError, naming the row, for a pair that the policy cannot read: its ids, or its length."""
    with policy.reading() as model:
        check_features(model, tokenizer, [half_of(row, side) for row in rows for side in ("chosen", "rejected")])


def _beside(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return columns([dict(row) for row in rows])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
