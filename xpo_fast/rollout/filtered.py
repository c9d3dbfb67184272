"""FilteredRollout: completions sampled block by block from several candidates, of which the best begun ones go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import data
from ..seeds import seed_of_repr
from .generate import GenerateRollout
from .sampling import Generated, Prompt, Request, Samples, Sampling

Score = Callable[[Sequence[Prompt], Sequence[Any]], Tensor]


class FilteredRollout:
    """Sampler that goes on only with what has begun well: search by blocks, as with a Q-value (arXiv 2407.13887).

        `block` tokens of each candidate ──▶ scores of what is begun ──▶ keep the best ──▶ again, until all end

    rollout: a `GenerateRollout`, which goes on from token ids.
    score: (prompts, begun completions) → (R,) numbers, higher for better, not NaN; `GoalJudge.score` gives Q-values,
        and a judge's `score` rewards.
    candidates: of each completion, sampled at a time; those that have ended stay among them as they are.
    keep: how many go on, the best ones, of equal scores the earlier ones. least: a score that they must have; where no
        candidate has it, the best one goes on alone.
    block: tokens between two scores.

    The best of those that are left in the end is the completion. With a block of the longest completion's length it is
    the best of `candidates` completions by the rollout with the same seed. What is drawn follows from the seed and the
    place of the completion alone, as in the rollout; so does the completion, if its scores do. `Samples.logps` is None:
    the tokens are the policy's, the choice between them is not.

    Raises ValueError for a sampler that cannot go on from token ids, such as one of a server, and at temperature 0,
    where all candidates are one.
    """

    def __init__(
        self,
        rollout: GenerateRollout,
        score: Score,
        *,
        candidates: int = 4,
        keep: int = 1,
        least: float = -math.inf,
        block: int = 16,
    ) -> None:
        if not isinstance(rollout, GenerateRollout):
            raise ValueError(
                f"expected a GenerateRollout, which goes on from the token ids of what is begun, got a "
                f"{type(rollout).__name__}: filter its finished answers instead, or load the model here"
            )
        for name, value in {"candidates": candidates, "keep": keep, "block": block}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value!r}")
        if keep > candidates:
            raise ValueError(f"expected to keep at most the {candidates} candidates, got keep={keep}")
        if math.isnan(least):
            raise ValueError("expected a number for least, got nan")
        self.rollout, self.score, self.candidates, self.keep = rollout, score, candidates, keep
        self.least, self.block = least, block

    @property
    def tokenizer(self) -> Any:
        """The rollout's tokenizer."""
        return self.rollout.tokenizer

    def update(self, model: Any) -> None:
        """Tells the rollout that the policy's weights have changed."""
        self.rollout.update(model)

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Samples n completions of each prompt, those of a prompt side by side, each the best of its candidates."""
        if sampling.temperature == 0 and self.candidates > 1:
            raise ValueError(
                f"expected a temperature above 0, at which {self.candidates} candidates differ, got 0: raise it, or "
                "sample one candidate"
            )
        asked = self.rollout.requests(prompts, n, sampling=sampling, seed=seed)
        begun = [[Generated([], "length")] for _ in asked]
        turn = 0
        while at := [r for r, request in enumerate(asked) if any(_open(request, one) for one in begun[r])]:
            part = [asked[r] for r in at]
            found = self._longer(part, [begun[r] for r in at], sampling, seed, turn)
            for r, group in zip(at, self._filtered(part, found, sampling), strict=True):
                begun[r] = group
            turn += 1
        return self.rollout.samples(asked, [group[0] for group in begun], sampling)

    def _longer(
        self, asked: list[Request], begun: list[list[Generated]], sampling: Sampling, seed: int, turn: int
    ) -> list[list[Generated]]:
        """Returns the candidates of each request: what has ended, and what is begun with a block more."""
        found: list[list[Generated]] = []
        places: list[tuple[int, int]] = []  # (request, candidate) of each that goes on
        parts: list[Request] = []
        for r, (request, group) in enumerate(zip(asked, begun, strict=True)):
            ended = [one for one in group if not _open(request, one)]
            going = [one for one in group if _open(request, one)]
            count = self.candidates - len(ended) if going else 0
            found.append([*ended, *(going[c % len(going)] for c in range(count))])
            for c in range(count):
                ids = going[c % len(going)].ids
                prompt, copy = request.place
                place = (prompt, copy * self.candidates + c)
                left = min(self.block, request.max_tokens - len(ids))
                parts.append(Request(request.prompt, request.ids + ids, place, left))
                places.append((r, len(ended) + c))
        drawn = seed_of_repr(seed, "block", turn) if turn else seed
        for (r, c), part in zip(places, self.rollout.complete(parts, sampling=sampling, seed=drawn), strict=True):
            found[r][c] = self._joined(asked[r], found[r][c], part, sampling)
        return found

    def _joined(self, request: Request, begun: Generated, part: Generated, sampling: Sampling) -> Generated:
        """Returns a completion with a block more; it ends where a text that stops it does, across blocks, too."""
        whole = Generated(begun.ids + part.ids, part.finish)
        for end in range(len(begun.ids) + 1, len(whole.ids) + 1) if sampling.stop else ():
            text = data.decode_after(self.tokenizer, request.ids, whole.ids[:end])
            if any(stop in text for stop in sampling.stop):
                return Generated(whole.ids[:end], "stop")
        return whole

    def _filtered(
        self, asked: list[Request], found: list[list[Generated]], sampling: Sampling
    ) -> list[list[Generated]]:
        """Returns the candidates of each request that go on, the best first."""
        rows = [(request, one) for request, group in zip(asked, found, strict=True) for one in group]
        told = self.rollout.samples([request for request, _ in rows], [one for _, one in rows], sampling)
        scores = self.score(told.prompts, told.completions).tolist()
        if any(map(math.isnan, scores)):
            raise ValueError(f"expected a score for each begun completion, got {sum(map(math.isnan, scores))} NaN")
        kept, at = [], 0
        for group in found:
            own = scores[at : at + len(group)]
            at += len(group)
            best = sorted(range(len(group)), key=lambda c, own=own: -own[c])[: self.keep]
            kept.append([group[c] for c in best if c == best[0] or own[c] >= self.least])
        return kept


def _open(request: Request, one: Generated) -> bool:
    """Returns whether a completion has neither ended nor reached the longest length."""
    return one.finish == "length" and len(one.ids) < request.max_tokens
