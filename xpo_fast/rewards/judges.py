"""Judges: how good a completion is, or which of two is better; by reward functions, a reward model, or a subclass.

    score(prompts, completions)        (R,) numbers, higher is better; NaN where the judge has no score
    compare(prompts, first, second)    (R,) P(first beats second); NaN where the judge has no verdict

A judge implements at least one of the two. Scores imply comparisons. Comparisons imply a score only within a group of
completions of one prompt: `group_scores`, `group_wins`. Judges that ask a language model are in llm_judges.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import as_conversation, words
from ..methods.math import win_rates
from ..rollout import Prompt, Samples
from .functions import PROMPT_INDEX, RewardFunction, Rewards, copied, warn_of_faults

Completion = str | list[dict[str, str]]


class Judge:
    """Base class of judges; a subclass overrides `score`, `compare`, or both.

    Further keyword arguments of both methods are columns of the data with R entries each (a reference answer, for
    example). A judge that scores is also a reward function: it can be called with TRL's signature.
    """

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> Tensor:
        """Returns the scores (R,) float32, higher is better. Raises ValueError for a judge that only compares."""
        raise ValueError(f"{type(self).__name__} compares and does not score: use `group_scores`, or another judge")

    def compare(
        self, prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], **columns: Any
    ) -> Tensor:
        """Returns P(first beats second), (R,) float32; unless overridden, `link` of the difference of the scores."""
        doubled = {name: [*column, *column] for name, column in columns.items()}
        scores = self.score([*prompts, *prompts], [*first, *second], **doubled)
        return self.link(scores[: len(prompts)] - scores[len(prompts) :])

    def link(self, gap: Tensor) -> Tensor:
        """Returns P(first beats second) given score(first) − score(second): Bradley–Terry's σ."""
        return gap.sigmoid()

    def places(self) -> dict[str, float]:
        """Returns, and resets, sums over the comparisons made in both orders; {} for a judge that makes none.

        compared: comparisons answered in both orders. first_place: P(the answer shown first wins), averaged over the
        two orders, ½ without a preference for a position. flipped: 1 if the position alone decides, which it does if
        the same position wins in both orders.
        """
        return {}

    @property
    def scores(self) -> bool:
        """Whether the judge scores single completions."""
        return type(self).score is not Judge.score

    @property
    def compares(self) -> bool:
        """Whether the judge compares by a rule of its own, not by its scores."""
        return type(self).compare is not Judge.compare

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """Returns the scores as a reward function does, None where there is none."""
        if completion_ids is not None:
            columns["completion_ids"] = completion_ids
        return _or_none(self.score(prompts, completions, **columns))


class FunctionJudge(Judge):
    """A judge by verifiable functions, one or several weighted: `Rewards`, or its arguments.

    The completion with the higher sum wins; equal sums give ½. The functions receive completion_ids if the columns have
    them, else empty lists.
    """

    def __init__(self, functions: Any, weights: Sequence[float] | None = None) -> None:
        self.rewards = functions if isinstance(functions, Rewards) else Rewards(functions, weights)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> Tensor:
        """Returns the weighted sums of the functions (R,)."""
        nothing: list[list[int]] = [[] for _ in prompts]
        ids = list(columns.pop("completion_ids", nothing))
        samples = Samples(list(prompts), nothing, ids, list(completions), ["stop"] * len(ids))
        return self.rewards(samples, columns).rewards

    def link(self, gap: Tensor) -> Tensor:
        """Returns 1, ½ or 0 by the sign of the gap, NaN for NaN."""
        return ((gap.sign() + 1) / 2).masked_fill(gap.isnan(), math.nan)  # sign(NaN) is 0


class RewardJudge(Judge):
    """A judge by a reward model. A preference model compares directly, other models by Bradley–Terry.

    model: a `RewardModel`, or an object with score(prompts, completions) → (R,) or compare(prompts, first, second).
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> Tensor:
        """Returns the model's rewards (R,), float32 on the CPU; a warning names the first that is not finite."""
        return self._finite(self.model.score(list(prompts), list(completions)), prompts, completions)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """Returns the model's rewards as a reward function does; a NaN stays one, for it is not that none applies."""
        if self.compares:
            return super().__call__(prompts, completions)
        return self.model.score(list(prompts), list(completions)).tolist()

    def compare(
        self, prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], **columns: Any
    ) -> Tensor:
        """Returns P(first beats second), (R,): the preference model's own, else σ of the difference of rewards."""
        if not self.compares:
            return super().compare(prompts, first, second, **columns)  # by `link`, which undoes whitening
        return self._finite(self.model.compare(list(prompts), list(first), list(second)), prompts, first)

    def link(self, gap: Tensor) -> Tensor:
        """Returns σ(scale·gap), the model's own P(first beats second) whether its rewards are whitened or not."""
        return (getattr(self.model, "scale", 1.0) * gap).sigmoid()

    def _finite(self, found: Tensor, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Tensor:
        """Returns what the model found, (R,) float32 on the CPU, NaN where it is not finite, which a warning names."""
        found = found.float().cpu()
        faulty = ~found.isfinite()
        if faulty.any():
            name = getattr(self.model, "__name__", type(self.model).__name__)
            warn_of_faults(f"the judge's model {name!r}", faulty, prompts, completions)
        return found.masked_fill(faulty, math.nan)

    @property
    def scores(self) -> bool:
        """Whether the model rewards single completions."""
        return not self.compares

    @property
    def compares(self) -> bool:
        """Whether the model is a preference model, or has only `compare`."""
        form = getattr(getattr(self.model, "spec", None), "form", None)
        return form == "preference" or not hasattr(self.model, "score")


def group_scores(
    judge: Judge,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    ids: Sequence[Sequence[list[int]]] | None = None,
) -> list[Tensor]:
    """Returns the scores (K,) of each prompt's completions; win rates within the group if the judge only compares.

    columns: one entry per prompt. ids: token ids of the completions, where they are known.
    """
    if not judge.scores:
        return [win_rates(wins) for wins in group_wins(judge, prompts, groups, columns)]
    at = [i for i, group in enumerate(groups) for _ in group]
    if not at:
        return [torch.empty(0) for _ in groups]
    flat = [completion for group in groups for completion in group]
    known = {} if ids is None else {"completion_ids": [x for group in ids for x in group]}
    given = [[prompts[i] for i in at], flat, {**_rows(columns, at), **known}]
    asked, answers, further = copied(given, {})  # a judge of the user's own may edit what it is given
    scores = judge.score(asked, answers, **further)
    return list(scores.split([len(group) for group in groups]))


def group_wins(
    judge: Judge,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    ids: Sequence[Sequence[list[int]]] | None = None,
) -> list[Tensor]:
    """Returns P(i beats j) of each prompt's completions, (K, K), ½ on the diagonal.

    Each pair is compared once; a judge that compares by scores scores each completion once.
    """
    if not judge.compares:
        found = group_scores(judge, prompts, groups, columns, ids)
        return [judge.link(scores[:, None] - scores).fill_diagonal_(0.5) for scores in found]
    met = [(g, i, j) for g, group in enumerate(groups) for i in range(len(group)) for j in range(i + 1, len(group))]
    at = [g for g, _, _ in met]
    first, second = ([groups[row[0]][row[side]] for row in met] for side in (1, 2))
    tables = [torch.full((len(group), len(group)), 0.5) for group in groups]
    if met:
        asked, one, other, further = copied([[prompts[g] for g in at], first, second, _rows(columns, at)], {})
        probabilities = judge.compare(asked, one, other, **further)
        for (g, i, j), p in zip(met, probabilities.tolist(), strict=True):
            tables[g][i, j], tables[g][j, i] = p, 1 - p
    return tables


def win_rate(judge: Judge) -> RewardFunction:
    """Returns a judge that compares as a reward function: a completion's win rate among those of its prompt.

    The completions of a prompt stand side by side: rows with one `prompt_index`, or, without that column, adjacent
    equal prompts. Rates are in [0, 1], as `nash_md` takes them, and the rivals are the policy's own samples; recipes
    draw them from the mixture of policy and reference, as the paper does (`recipes.mixture.AgainstMixture`).
    """

    def win_rate(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        ids = columns.pop("completion_ids", None)
        which = columns.pop(PROMPT_INDEX, prompts)  # two prompts of a rollout may be equal
        starts = [i for i in range(len(prompts)) if i == 0 or which[i] != which[i - 1]]
        spans = list(zip(starts, [*starts[1:], len(prompts)], strict=True))
        groups = [completions[a:b] for a, b in spans]
        known = None if ids is None else [ids[a:b] for a, b in spans]
        wins = group_wins(judge, [prompts[a] for a in starts], groups, _rows(columns, starts), known)
        return [x for table in wins for x in _or_none(win_rates(table))]

    return win_rate


def _rows(columns: Mapping[str, Sequence[Any]] | None, at: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [column[i] for i in at] for name, column in (columns or {}).items()}


def _or_none(scores: Tensor) -> list[float | None]:
    """Returns the numbers of a tensor (R,), None for NaN."""
    return [None if math.isnan(x) else x for x in scores.tolist()]


def text_of(message: Any) -> str:
    """Returns a prompt or completion as text: a conversation with its turns named, a single message as its content."""
    if isinstance(message, str):
        return message
    tools = as_conversation(message).tools
    if len(message) == 1 and tools is None:
        return _words_and_calls(message[0])
    turns = [f"{m['role'].capitalize()}: {_words_and_calls(m)}" for m in message]
    return "\n\n".join([*([] if tools is None else [f"Tools: {json.dumps(tools, ensure_ascii=False)}"]), *turns])


def _words_and_calls(message: Any) -> str:
    """Returns the content of a message, and the tools that it calls as JSON."""
    calls = message.get("tool_calls")
    return "\n".join([*filter(None, [words(message)]), *([json.dumps(calls, ensure_ascii=False)] if calls else [])])
