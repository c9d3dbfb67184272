"""Judges that ask a language model: which of two answers is better, for a grade, or for points in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import data
from ..head import token_logps
from ..models import Head, check_ids, check_lengths, install_fused_loss, no_router_loss
from ..models.modes import evaluating
from ..rollout import Prompt, Rollout, Sampling
from .judges import Completion, Judge, text_of

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

# The additive criteria of self-rewarding language models (arXiv 2401.10020): each adds one point to those before.
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
    """Asks a model questions whose answer is one of C words. chat: whether questions are conversations, or text."""

    chat: bool

    def __call__(self, questions: Sequence[Prompt], words: Sequence[str]) -> Tensor:
        """Returns the probability of each word as the answer, (R, C) with rows that sum to 1; NaN if it gives none."""
        ...


class TokenChoice:
    """A `Choice` by the next-token distribution: the probabilities of the words' first tokens, normalised.

    model: a causal LM of transformers. A call raises ValueError if two words begin with the same token, and, naming the
    question, for a token without an embedding and for more tokens than the model has positions.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 8) -> None:
        install_fused_loss(model)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.chat = bool(tokenizer.chat_template)

    def __call__(self, questions: Sequence[Prompt], words: Sequence[str]) -> Tensor:
        """Returns the probabilities (R, C), see `Choice`."""
        rows = [self._ids(question, words) for question in questions]
        for r, (ids, first) in enumerate(rows):
            check_ids(self.model, self.tokenizer, [*ids, *first], f"the judge's question {r}")
        remedy = "shorten prompts and completions, or take a judge with more positions"
        check_lengths(self.model, [len(ids) for ids, _ in rows], lambda r: f"the judge's question {r}", remedy)
        order = sorted(range(len(rows)), key=lambda r: len(rows[r][0]))
        table = torch.empty(len(rows), len(words))
        for start in range(0, len(order), self.batch_size):
            at = order[start : start + self.batch_size]
            table[at] = self._logps([rows[r] for r in at]).softmax(dim=1).cpu()
        if (broken := table.isnan().any(dim=1)).any():
            asked = questions[int(broken.nonzero()[0])]
            raise ValueError(
                f"the judge's model, {type(self.model).__name__}, has logits that are not finite after "
                f"{text_of(asked)[-80:]!r}: load it in another dtype, or another model"
            )
        return table

    def _ids(self, question: Prompt, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """Returns the question's token ids, and the first token of each word when it follows the question."""
        text = data.render(self.tokenizer, question, [], "the judge's question")[0]
        texts = [text, *(f"{text} {word}" if isinstance(question, str) else text + word for word in words)]
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        split = data.split_ids(self.tokenizer, texts, ids, own=True)
        prompt, first = split.prompt, [completion[0] for completion in split.completions]
        if len(set(first)) < len(words):
            raise ValueError(
                f"the tokenizer begins some of the answers {', '.join(words)} with the same token: choose others"
            )
        opening = data.leading_ids(self.tokenizer, question)
        return (prompt if prompt[: len(opening)] == opening else opening + prompt), first

    def _logps(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Returns the log-probs (R, C) of the words' first tokens after each question."""
        device = next(self.model.parameters()).device
        batch = data.pad_rows([(ids, []) for ids, _ in rows], 0, last=True)
        ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        words = torch.tensor([first for _, first in rows], device=device)  # (R, C)

        def fused(hidden: Tensor, head: Head) -> Tensor:
            at = hidden[torch.arange(len(rows), device=device), mask.sum(dim=1) - 1]  # (R, D)
            return token_logps(at[:, None].expand(-1, words.shape[1], -1).contiguous(), head, words)

        with evaluating(self.model):
            return self.model(
                input_ids=ids, attention_mask=mask, fused_loss=fused, **no_router_loss(self.model)
            ).float()


class SampledChoice:
    """A `Choice` by n sampled replies of a rollout (a server, for example): the first of the words in each reply."""

    def __init__(
        self, rollout: Rollout, *, n: int = 1, sampling: Sampling | None = None, seed: int = 0, chat: bool = True
    ) -> None:
        self.rollout, self.n, self.seed, self.chat = rollout, n, seed, chat
        self.sampling = sampling or Sampling(max_new_tokens=8, temperature=0.0 if n == 1 else 1.0)

    def __call__(self, questions: Sequence[Prompt], words: Sequence[str]) -> Tensor:
        """Returns each word's share (R, C) of the replies that contain one, see `Choice`."""
        samples = self.rollout.generate(questions, self.n, sampling=self.sampling, seed=self.seed)
        pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)")
        counts = torch.zeros(len(questions), len(words))
        for row, reply in enumerate(samples.completions):
            if match := pattern.search(text_of(reply)):
                counts[row // self.n, words.index(match[1])] += 1
        return counts / counts.sum(dim=1, keepdim=True)


class LLMJudge(Judge):
    """A judge that asks a language model, as in RLAIF (arXiv 2309.00267).

    compare: asks which of two answers is better, in both orders, and averages the two probabilities, so that a
        preference for the first or the second position cancels (both_orders=False asks once); `places` measures it.
    score: the expected grade on 1 … 9, mapped to −1 … 1 (direct RLAIF; its authors ask for 1 … 10, whereas every grade
        here is one token).
    choice: how the model answers, `TokenChoice` or `SampledChoice`.
    reason: a rollout of the same model that first writes its reasons (chain of thought); the answer is read after them.
    pairwise, grade: the questions; they contain {prompt}, {first}, {second}, and {prompt}, {completion}.
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
        for template, fields in ((pairwise, ("prompt", "first", "second")), (grade, ("prompt", "completion"))):
            lacking = [f for f in fields if f"{{{f}}}" not in template]
            if lacking:
                raise ValueError(f"a judge's question must hold {{{lacking[0]}}}; got {template[:60]!r}")
        self.choice, self.both_orders, self.reason = choice, both_orders, reason
        self.pairwise, self.grade, self.seed = pairwise, grade, seed
        self.sampling = sampling or Sampling(max_new_tokens=256, temperature=0.0)
        self._places: dict[str, float] = {}

    def places(self) -> dict[str, float]:
        """Returns, and resets, the sums described in `Judge.places`."""
        found, self._places = self._places, {}
        return found

    def compare(
        self, prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], **columns: Any
    ) -> Tensor:
        """Returns P(first beats second), (R,): the mean of both orders, or one order's."""

        def ask(first: Sequence[Completion], second: Sequence[Completion]) -> Tensor:
            rows = zip(prompts, first, second, strict=True)
            asked = [filled(self.pairwise, prompt=x, first=a, second=b) for x, a, b in rows]
            return self._ask(asked, ("A", "B"))[:, 0]

        forth = ask(first, second)
        if not self.both_orders:
            return forth
        back = ask(second, first)
        answered = ~(forth + back).isnan()
        both = torch.stack([forth, back])[:, answered].double()  # P(the answer shown first wins), in each order
        sums = {
            "compared": both.shape[1],
            "first_place": both.mean(dim=0).sum().item(),
            "flipped": int(((both > 0.5).all(dim=0) | (both < 0.5).all(dim=0)).sum()),
        }
        self._places = {name: self._places.get(name, 0) + x for name, x in sums.items()}
        return (forth + 1 - back) / 2

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> Tensor:
        """Returns the expected grades (R,), from −1 to 1."""
        rows = zip(prompts, completions, strict=True)
        asked = [filled(self.grade, prompt=x, completion=y) for x, y in rows]
        return self._ask(asked, tuple("123456789")) @ torch.linspace(-1.0, 1.0, 9)

    def _ask(self, texts: list[str], words: Sequence[str]) -> Tensor:
        """Returns the probabilities (R, C) of the words, after the model's reasons if it gives any."""
        if not texts:
            return torch.empty(0, len(words))
        if self.reason is None:
            return self.choice([as_prompt(text, self.choice.chat) for text in texts], words)
        asked = [as_prompt(f"{text}\n\n{REASON}", self.choice.chat) for text in texts]
        samples = self.reason.generate(asked, 1, sampling=self.sampling, seed=self.seed)
        verdict = VERDICT.format(words=" or ".join(words))
        return self.choice([continued(q, r, verdict) for q, r in zip(asked, samples.completions)], words)


class SelfRewardJudge(Judge):
    """A judge by the policy itself, which gives 0 to 5 points in words (self-rewarding LMs, arXiv 2401.10020).

    The score is the mean over the replies, of n, that state one (the authors sample three); NaN if none does.
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

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> Tensor:
        """Returns the mean points (R,), from 0 to 5."""
        if not prompts:
            return torch.empty(0)
        rows = zip(prompts, completions, strict=True)
        asked = [as_prompt(filled(self.question, prompt=x, completion=y), self.chat) for x, y in rows]
        samples = self.rollout.generate(asked, self.n, sampling=self.sampling, seed=self.seed)
        points = torch.tensor([points_of(text_of(reply)) for reply in samples.completions])
        return points.view(-1, self.n).nanmean(dim=1)


def points_of(reply: str) -> float:
    """Returns the number after the last "Score:" of a reply, 0 … 5; NaN if there is none."""
    found = [float(x) for x in _POINTS.findall(reply)]
    return found[-1] if found and found[-1] <= 5 else math.nan


def as_prompt(text: str, chat: bool) -> Prompt:
    """Returns a question as a conversation of one turn, or as text that ends where the answer begins."""
    return [{"role": "user", "content": text}] if chat else f"{text}\n\nAnswer:"


def continued(prompt: Prompt, answer: Completion, question: str) -> Prompt:
    """Returns the prompt followed by an answer and the next question."""
    if isinstance(prompt, str):
        return f"{prompt}{text_of(answer)}\n\n{question}\n\nAnswer:"
    turn = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return data.as_conversation(prompt).followed_by([*turn, {"role": "user", "content": question}])


def filled(template: str, **values: Any) -> str:
    """Returns the template with its {names} replaced, all in one pass: the values may contain braces themselves."""
    return re.sub(r"\{(\w+)\}", lambda m: text_of(values[m[1]]) if m[1] in values else m[0], template)
