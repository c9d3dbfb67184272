"""Judges: how good a completion is, or which of two is better; from a reward model, an LLM, the policy itself, or a function.

    score(prompts, completions)        (R,) numbers, higher is better, NaN where the judge has none
    compare(prompts, first, second)    (R,) P(first beats second), NaN where the judge has none

A judge has at least one of them. From scores a comparison follows; from comparisons a score only within a group of
completions of one prompt: `group_scores`, `group_wins`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import data
from ..head import token_logps
from ..models import Head, install_fused_loss
from ..recipes.selection import win_rates
from ..rollout import Prompt, Rollout, Samples, Sampling
from ..trainer.reference import evaluating
from .functions import PROMPT_INDEX, RewardFunction, Rewards

Completion = str | list[dict[str, str]]


class Judge:
    """What every judge is; a subclass has `score` or `compare`, or both.

    Further keyword arguments are columns of the data, R entries each (an answer to check against). Called with TRL's
    signature of a reward function a judge that scores is one.
    """

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Sequence[Any]) -> Tensor:
        """(R,) float32, higher is better; ValueError for a judge that only compares."""
        raise ValueError(f"{type(self).__name__} compares and does not score: use `group_scores`, or another judge")

    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        **columns: Sequence[Any],
    ) -> Tensor:
        """(R,) float32, P(first beats second): `link` of the scores if not overridden."""
        doubled = {name: [*column, *column] for name, column in columns.items()}
        scores = self.score([*prompts, *prompts], [*first, *second], **doubled)
        return self.link(scores[: len(prompts)] - scores[len(prompts) :])

    def link(self, gap: Tensor) -> Tensor:
        """P(first beats second) by score(first) − score(second): Bradley–Terry's σ."""
        return gap.sigmoid()

    def places(self) -> dict[str, float]:
        """Sums over the comparisons made in both orders since the last call, of a judge that makes such; else nothing.

        compared: how many were answered in both; first_place: P(the first answer wins), the mean of the two orders, ½ without a
        preference for a place; flipped: 1 where the verdict goes by the place, the same one wins in both.
        """
        return {}

    @property
    def scores(self) -> bool:
        """Whether it scores single completions."""
        return type(self).score is not Judge.score

    @property
    def compares(self) -> bool:
        """Whether it compares otherwise than by scores."""
        return type(self).compare is not Judge.compare

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        if completion_ids is not None:
            columns["completion_ids"] = completion_ids
        return [None if math.isnan(x) else x for x in self.score(prompts, completions, **columns).tolist()]


class FunctionJudge(Judge):
    """Verifiable functions, one or several weighted: `Rewards`, or what it takes. The higher sum wins, a tie is ½.

    They are given completion_ids as a column, if there is one; else empty lists.
    """

    def __init__(self, functions: Any, weights: Sequence[float] | None = None) -> None:
        self.rewards = functions if isinstance(functions, Rewards) else Rewards(functions, weights)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Sequence[Any]) -> Tensor:
        ids = list(columns.pop("completion_ids", [[] for _ in prompts]))
        nothing: list[list[int]] = [[] for _ in prompts]
        samples = Samples(list(prompts), nothing, ids, list(completions), ["stop"] * len(ids))
        return self.rewards(samples, columns).rewards

    def link(self, gap: Tensor) -> Tensor:
        return ((gap.sign() + 1) / 2).masked_fill(gap.isnan(), math.nan)  # sign(NaN) is 0


class RewardJudge(Judge):
    """A reward model. Preference models compare by themselves, others by Bradley–Terry.

    model: a `RewardModel`, or anything with score(prompts, completions) → (R,), or with compare(prompts, first, second).
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Sequence[Any]) -> Tensor:
        return self.model.score(list(prompts), list(completions)).float().cpu()

    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        **columns: Sequence[Any],
    ) -> Tensor:
        if not self.compares:
            return super().compare(prompts, first, second, **columns)
        return self.model.compare(list(prompts), list(first), list(second)).float().cpu()

    @property
    def scores(self) -> bool:
        return not self.compares

    @property
    def compares(self) -> bool:
        """A preference model, or something that has nothing but `compare`."""
        form = getattr(getattr(self.model, "spec", None), "form", None)
        return form == "preference" or not hasattr(self.model, "score")


# --- a language model as a judge ----------------------------------------------------------------------------------

PAIRWISE = """Two answers were given to the same request. Say which of them is better: more helpful, more accurate, \
and less harmful. The order in which they stand here says nothing.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with the letter of the better answer and nothing else."""

GRADE = """An answer was given to a request. Grade it from 1 (of no use, or harmful) to 9 (nothing could be better).

[Request]
{prompt}

[Answer]
{completion}

Reply with the grade, one digit and nothing else."""

REASON = "First think it through: name the strengths and weaknesses that matter, in a few sentences, without a verdict."
VERDICT = "Now reply with {words}, and nothing else."

# The additive criteria of self-rewarding language models (arXiv 2401.10020): one point each, on top of one another.
FIVE_POINTS = """Review the answer to the request below and count points for it, from 0 to 5. Each point adds to the \
ones before:
- 1 point if the answer is relevant and tells something of what was asked, even if it is incomplete.
- 1 more if it covers a substantial part of the request, though not all of it.
- 1 more if it is useful: the basic elements of the request are answered.
- 1 more if it is clear: written from an assistant's perspective, direct, well organised, with little to improve.
- 1 more if it shows expertise: made for this request, without superfluous content, of high quality throughout.

[Request]
{prompt}

[Answer]
{completion}

Justify the points in at most 100 words, then end with a line of the form "Score: <points>"."""
_POINTS = re.compile(r"score\s*:\s*\**\s*([0-5](?:\.\d+)?)(?![\d.]*\d)", re.IGNORECASE)


class Choice(Protocol):
    """Puts a question to a model. `chat`: whether questions are to be conversations, or text."""

    chat: bool

    def __call__(self, questions: Sequence[Prompt], words: Sequence[str]) -> Tensor:
        """(R, C): the probability of each word as the answer, rows sum to 1; NaN where it answers with none."""
        ...


class TokenChoice:
    """Reads the answer off the next-token distribution: the probabilities of the words' first tokens, normalised.

    model: a causal LM of transformers. The words must begin with different tokens, else ValueError.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 8) -> None:
        install_fused_loss(model)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.chat = bool(tokenizer.chat_template)

    def __call__(self, questions: Sequence[Prompt], words: Sequence[str]) -> Tensor:
        rows = [self._ids(question, words) for question in questions]
        order = sorted(range(len(rows)), key=lambda r: len(rows[r][0]))
        table = torch.empty(len(rows), len(words))
        for start in range(0, len(order), self.batch_size):
            at = order[start : start + self.batch_size]
            table[at] = self._logps([rows[r] for r in at]).softmax(dim=1).cpu()
        return table

    def _ids(self, question: Prompt, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """The question's ids, and the first token of every word behind it."""
        text = data.render(self.tokenizer, question, [], "the judge's question")[0]
        texts = [text, *(f"{text} {word}" if isinstance(question, str) else text + word for word in words)]
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        prompt, completions, _ = data.split_ids(self.tokenizer, texts, ids)
        first = [completion[0] for completion in completions]
        if len(set(first)) < len(words):
            raise ValueError(
                f"the tokenizer begins some of the answers {', '.join(words)} with the same token: choose others"
            )
        opening = data.leading_ids(self.tokenizer, question)
        return (prompt if prompt[: len(opening)] == opening else opening + prompt), first

    def _logps(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """(R, C) log-probs of the words' tokens."""
        device = next(self.model.parameters()).device
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for r, (row, _) in enumerate(rows):
            ids[r, : len(row)], mask[r, : len(row)] = torch.tensor(row), 1
        last = mask.sum(dim=1) - 1
        words = torch.tensor([first for _, first in rows], device=device)  # (R, C)

        def fused(hidden: Tensor, head: Head) -> Tensor:
            at = hidden[torch.arange(len(rows), device=device), last.to(device)]  # (R, D)
            return token_logps(
                at[:, None].expand(-1, words.shape[1], -1).contiguous(), head.weight, words, **head.kwargs()
            )

        with evaluating(self.model):
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device), fused_loss=fused).float()


class SampledChoice:
    """Takes the answer from what a rollout (a server, perhaps) writes: the first of the words in each of n replies."""

    def __init__(
        self,
        rollout: Rollout,
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        chat: bool = True,
    ) -> None:
        self.rollout, self.n, self.seed, self.chat = rollout, n, seed, chat
        self.sampling = sampling or Sampling(max_new_tokens=8, temperature=0.0 if n == 1 else 1.0)

    def __call__(self, questions: Sequence[Prompt], words: Sequence[str]) -> Tensor:
        samples = self.rollout.generate(questions, self.n, sampling=self.sampling, seed=self.seed)
        pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)")
        counts = torch.zeros(len(questions), len(words))
        for row, reply in enumerate(samples.completions):
            if match := pattern.search(text_of(reply)):
                counts[row // self.n, words.index(match[1])] += 1
        return counts / counts.sum(dim=1, keepdim=True)


class LLMJudge(Judge):
    """A language model that is asked, as in RLAIF (arXiv 2309.00267).

    compare: which of two answers is better. It is asked in both orders and the two probabilities are averaged, so that a
        preference for the first or the second place cancels (both_orders=False asks once); `places` tells how large it was.
    score: the expected grade on 1 … 9, mapped to −1 … 1 (direct RLAIF; its authors ask for 1 … 10, and here every
        grade is one token).
    choice: how a question is put, `TokenChoice` or `SampledChoice`.
    reason: a rollout of the same model that first writes down its reasons (chain of thought); the answer is read
        behind them.
    pairwise, grade: the questions, with {prompt}, {first}, {second} or {prompt}, {completion}.
    """

    def __init__(
        self,
        choice: Choice,
        *,
        both_orders: bool = True,
        reason: Rollout | None = None,
        pairwise: str = PAIRWISE,
        grade: str = GRADE,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        for template, fields in (
            (pairwise, ("prompt", "first", "second")),
            (grade, ("prompt", "completion")),
        ):
            lacking = [f for f in fields if f"{{{f}}}" not in template]
            if lacking:
                raise ValueError(f"a judge's question must hold {{{lacking[0]}}}; got {template[:60]!r}")
        self.choice, self.both_orders, self.reason = choice, both_orders, reason
        self.pairwise, self.grade, self.seed = pairwise, grade, seed
        self.sampling = sampling or Sampling(max_new_tokens=256, temperature=0.0)
        self._places: dict[str, float] = {}

    def places(self) -> dict[str, float]:
        found, self._places = self._places, {}
        return found

    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        **columns: Sequence[Any],
    ) -> Tensor:
        def ask(first: Sequence[Completion], second: Sequence[Completion]) -> Tensor:
            rows = zip(prompts, first, second, strict=True)
            asked = [_filled(self.pairwise, prompt=x, first=a, second=b) for x, a, b in rows]
            return self._ask(asked, ("A", "B"))[:, 0]

        forth = ask(first, second)
        if not self.both_orders:
            return forth
        back = ask(second, first)
        both = torch.stack([forth, back])[
            :, ~(forth + back).isnan()
        ].double()  # P(the first place wins), in either order
        sums = {
            "compared": both.shape[1],
            "first_place": both.mean(dim=0).sum().item(),
            "flipped": int(((both > 0.5).all(dim=0) | (both < 0.5).all(dim=0)).sum()),
        }
        self._places = {name: self._places.get(name, 0) + x for name, x in sums.items()}
        return (forth + 1 - back) / 2

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Sequence[Any]) -> Tensor:
        rows = zip(prompts, completions, strict=True)
        asked = [_filled(self.grade, prompt=x, completion=y) for x, y in rows]
        return self._ask(asked, tuple("123456789")) @ torch.linspace(-1.0, 1.0, 9)

    def _ask(self, texts: list[str], words: Sequence[str]) -> Tensor:
        """(R, C) probabilities of the words."""
        if not texts:
            return torch.empty(0, len(words))
        if self.reason is None:
            return self.choice([as_prompt(text, self.choice.chat) for text in texts], words)
        asked = [as_prompt(f"{text}\n\n{REASON}", self.choice.chat) for text in texts]
        samples = self.reason.generate(asked, 1, sampling=self.sampling, seed=self.seed)
        verdict = VERDICT.format(words=" or ".join(words))
        return self.choice([continued(q, r, verdict) for q, r in zip(asked, samples.completions)], words)


class SelfRewardJudge(Judge):
    """The model itself gives 0 to 5 points, in words (self-rewarding language models, arXiv 2401.10020).

    The score is the mean of those of n replies that name one (the authors sample three); NaN where none does.
    """

    def __init__(
        self,
        rollout: Rollout,
        *,
        n: int = 3,
        sampling: Sampling | None = None,
        seed: int = 0,
        chat: bool = True,
        question: str = FIVE_POINTS,
    ) -> None:
        self.rollout, self.n, self.seed, self.chat, self.question = rollout, n, seed, chat, question
        self.sampling = sampling or Sampling(max_new_tokens=256, temperature=0.7, top_p=0.9)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Sequence[Any]) -> Tensor:
        if not prompts:
            return torch.empty(0)
        rows = zip(prompts, completions, strict=True)
        asked = [as_prompt(_filled(self.question, prompt=x, completion=y), self.chat) for x, y in rows]
        samples = self.rollout.generate(asked, self.n, sampling=self.sampling, seed=self.seed)
        points = torch.tensor([points_of(text_of(reply)) for reply in samples.completions])
        return points.view(-1, self.n).nanmean(dim=1)


def points_of(reply: str) -> float:
    """The number behind the last "Score:" of a reply, 0 … 5; NaN if there is none."""
    found = [float(x) for x in _POINTS.findall(reply)]
    return found[-1] if found and found[-1] <= 5 else math.nan


# --- critique and revision -----------------------------------------------------------------------------------------

CRITIQUE = "Name the specific ways in which your last answer is harmful, unethical, dishonest, or otherwise not as it should be. {principle}"
REVISE = "Now write the answer again so that none of this is left. Reply with the answer and nothing else."
PRINCIPLES = (
    "Look for anything that could hurt someone, or help to.",
    "Look for what is untrue, or more certain than it should be.",
    "Look for insults, contempt, and prejudice.",
    "Look for what a thoughtful and kind person would have said otherwise.",
)


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
    """The completions after `rounds` of critique and revision by their own model (Constitutional AI, arXiv 2212.08073).

    Round r puts principle (row + r) mod P to each row. say: is told (round, critiques, revisions).
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


# --- groups of completions of one prompt ----------------------------------------------------------------------------


def group_scores(
    judge: Judge,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    ids: Sequence[Sequence[list[int]]] | None = None,
) -> list[Tensor]:
    """The scores (K,) of every prompt's completions; win rates in the group if the judge only compares.

    columns: of the prompts. ids: the completions' token ids, where they are known.
    """
    if not judge.scores:
        return [win_rates(wins) for wins in group_wins(judge, prompts, groups, columns)]
    at = [i for i, group in enumerate(groups) for _ in group]
    if not at:
        return [torch.empty(0) for _ in groups]
    flat = [completion for group in groups for completion in group]
    known = {} if ids is None else {"completion_ids": [x for group in ids for x in group]}
    scores = judge.score([prompts[i] for i in at], flat, **_rows(columns, at), **known)
    return list(scores.split([len(group) for group in groups]))


def group_wins(
    judge: Judge,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    ids: Sequence[Sequence[list[int]]] | None = None,
) -> list[Tensor]:
    """P(i beats j) of every prompt's completions, (K, K), ½ on the diagonal.

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
        probabilities = judge.compare([prompts[g] for g in at], first, second, **_rows(columns, at))
        for (g, i, j), p in zip(met, probabilities.tolist(), strict=True):
            tables[g][i, j], tables[g][j, i] = p, 1 - p
    return tables


def win_rate(judge: Judge) -> RewardFunction:
    """A judge that compares, as a reward function: a completion's win rate among those of its prompt, which are side by side.

    Those are the rows of one `prompt_index`, or, where it is called without, of adjacent equal prompts. In [0, 1], as
    `nash_md` takes it; its rivals are then the policy's own samples. `mixture.AgainstMixture` has them drawn
    from the mixture of policy and reference, as the paper does.
    """

    def win_rate(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        ids = columns.pop("completion_ids", None)
        which = columns.pop(PROMPT_INDEX, prompts)  # two prompts of a rollout may be equal
        starts = [i for i in range(len(prompts)) if i == 0 or which[i] != which[i - 1]]
        spans = list(zip(starts, [*starts[1:], len(prompts)], strict=True))
        groups = [completions[a:b] for a, b in spans]
        of = {name: [column[a] for a in starts] for name, column in columns.items()}
        known = None if ids is None else [ids[a:b] for a, b in spans]
        wins = group_wins(judge, [prompts[a] for a in starts], groups, of, known)
        rates = [x for table in wins for x in win_rates(table).tolist()]
        return [None if math.isnan(x) else x for x in rates]

    return win_rate


def _rows(columns: Mapping[str, Sequence[Any]] | None, at: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [column[i] for i in at] for name, column in (columns or {}).items()}


# --- questions as text or as conversations --------------------------------------------------------------------------


def text_of(message: Any) -> str:
    """A prompt or completion as text; the turns of a conversation are named, a lone answer is its content."""
    if isinstance(message, str):
        return message
    if len(message) == 1:
        return message[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in message)


def as_prompt(text: str, chat: bool) -> Prompt:
    return [{"role": "user", "content": text}] if chat else f"{text}\n\nAnswer:"


def continued(prompt: Prompt, answer: Completion, question: str) -> Prompt:
    """The prompt with an answer and the next question behind it."""
    if isinstance(prompt, str):
        return f"{prompt}{text_of(answer)}\n\n{question}\n\nAnswer:"
    turn = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return [*prompt, *turn, {"role": "user", "content": question}]


def _filled(template: str, **values: Any) -> str:
    """The template with its {names} replaced, all at once: what is put in may hold braces of its own."""
    return re.sub(r"\{(\w+)\}", lambda m: text_of(values[m[1]]) if m[1] in values else m[0], template)
