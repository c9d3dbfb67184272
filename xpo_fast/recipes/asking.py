"""Generation under an instruction that nothing is trained on, and the prompts that ask for it.

An instruction (`Draw.ask`) is one of four, by the fields in it:

    none                            stands behind the prompt: "Human: Hi Assistant (giving a helpful response):" (RLCD)
    {label} and {aspects}           follows the first draw's answer: write it better, or worse, in these (RMBoost)
    {prompt}, {chosen}, {rejected}  is a question of its own about a row of the data (BPO)
    {history}, {examples}           is a question of its own about scored instructions (OPRO, see search.py)
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import DataError, as_conversation, words
from ..rewards.judges import Completion, text_of
from ..rewards.llm_judges import as_prompt, continued, filled
from ..rollout import Prompt, Rollout, Samples, Sampling
from ..wording import did_you_mean

# RLCD (arXiv 2307.12950): the affixes of its helpfulness task.
HELPFUL, UNHELPFUL = "(giving a helpful response)", "(giving an unhelpful response)"

# RMBoost (arXiv 2407.16008): the second answer follows from the first, a label and aspects.
LABELS = ("better", "worse")
ASPECTS = ("helpfulness", "correctness", "completeness", "coherence", "conciseness", "harmlessness")
MOST_ASPECTS = 3
EDIT = (
    "Now write another answer to my request that is {label} than your last one in {aspects}, and otherwise like it. "
    "Reply with the answer and nothing else."
)

# BPO (arXiv 2311.04155): a critic makes the targets, and the rewriter is trained to answer REWRITE with them.
IMPROVE = """Below are an instruction, a good answer to it and a bad one. Compare the answers: which is more correct, \
more helpful and less harmful, and what would the instruction have to say so that answers like the good one are given \
rather than answers like the bad one? Then rewrite the instruction so that it does. Keep what it asks for, ask for \
nothing that the good answer does not show, do not quote the answers, and do not answer the instruction.

[Instruction]
{prompt}

[Good answer]
{chosen}

[Bad answer]
{rejected}

Reply with the rewritten instruction and nothing else."""
REWRITE = """You are an expert in writing instructions. Improve this one so that it gets a more helpful and harmless \
answer:
{prompt}"""

# OPRO (arXiv 2309.03409): the optimiser reads scored instructions, the best last, and examples of the task.
PROPOSE = """Below are instructions with their scores, from the lowest score to the highest; higher is better.

{history}

An instruction is used in the place of <INS> below, and what is then answered is scored.

{examples}

Write one new instruction that differs from all of these and scores as high as it can. Write it in square brackets."""


@dataclass(frozen=True)
class Search:
    """Arguments of select="prompts": where the search for an instruction begins, and what the optimiser reads.

    start: the first instruction; "" for none. keep: the best so far that are shown. examples: rows that are shown.
    """

    start: str = "Let's solve the problem."
    keep: int = 20
    examples: int = 3

    def __post_init__(self) -> None:
        least = type(self.keep) is int and self.keep >= 1 and type(self.examples) is int and self.examples >= 0
        if not (isinstance(self.start, str) and least):
            raise ValueError(f"expected start to be text, keep >= 1 and examples >= 0, got {self}")


# The fields that an instruction may have together.
KINDS_OF_ASK = (set(), {"label", "aspects"}, {"prompt", "chosen", "rejected"}, {"history", "examples"})


def fields(text: str) -> set[str]:
    """Returns the names of the {fields} in an instruction. Raises ValueError for an unknown one, or some that clash."""
    found = set(re.findall(r"\{(\w+)\}", text))
    known = set().union(*KINDS_OF_ASK)
    for name in sorted(found - known):
        raise ValueError(
            f"an instruction with the fields {', '.join(sorted(known))}, not {name!r}{did_you_mean(name, known)}"
        )
    if not any(found <= kind for kind in KINDS_OF_ASK):
        raise ValueError(f"an instruction with fields that go together, not {', '.join(sorted(found))}")
    return found


def affixed(prompt: Prompt, ask: str) -> Prompt:
    """Returns the prompt with an instruction: behind a text, in the last turn of the user in a conversation.

    Where a text ends with a speaker's name and a colon, an instruction in brackets stands before that colon, as RLCD's
    do, and another before that line. An empty instruction leaves the prompt as it is. Raises DataError for a
    conversation without a user's turn.
    """
    if not ask:
        return prompt
    if isinstance(prompt, str):
        end = re.search(r":?\s*\Z" if ask.startswith("(") else r"(\s*\n[^\n]{1,30}:)?\s*\Z", prompt)
        assert end is not None
        head, tail = prompt[: end.start()], prompt[end.start() :]
        return f"{head} {ask}{tail}" if head else f"{ask}{tail}"
    at, request = _request(prompt)
    turn = {**prompt[at], "content": f"{request} {ask}" if request else ask}
    return as_conversation(prompt).changed({at: turn})


def request_of(prompt: Prompt) -> str:
    """Returns what a prompt asks for: its text, or that of the user's last turn. Raises DataError without one."""
    return prompt if isinstance(prompt, str) else _request(prompt)[1]


def with_request(prompt: Prompt, request: str) -> Prompt:
    """Returns the prompt with another request in the place of `request_of`."""
    if isinstance(prompt, str):
        return request
    at, _ = _request(prompt)
    return as_conversation(prompt).changed({at: {**prompt[at], "content": request}})


def _request(prompt: list[dict[str, Any]]) -> tuple[int, str]:
    users = [i for i, message in enumerate(prompt) if message.get("role") == "user"]
    if not users:
        roles = ", ".join(str(message.get("role")) for message in prompt)
        raise DataError(f"a prompt without a turn of the user, which an instruction goes to; it has: {roles}")
    return users[-1], words(prompt[users[-1]])


def about(row: Mapping[str, Any], ask: str, chat: bool) -> Prompt:
    """Returns a question about a row of the data: its request, and its chosen and rejected answers."""
    values = {name: row[name] for name in ("chosen", "rejected") if name in row}
    return as_prompt(filled(ask, prompt=request_of(row["prompt"]), **values), chat)


def edit(prompt: Prompt, first: Completion, ask: str, label: str, aspects: Sequence[str]) -> Prompt:
    """Returns the prompt, its first answer, and the request for one that is better or worse in these aspects."""
    *most, last = aspects
    named = f"{', '.join(most)} and {last}" if most else last
    return continued(prompt, first, filled(ask, label=label, aspects=named))


def drawn_edit(draws: random.Random, aspects: Sequence[str]) -> tuple[str, list[str]]:
    """Draws a label, and one to three of the aspects in their order."""
    label = draws.choice(LABELS)
    chosen = draws.sample(range(len(aspects)), draws.randint(1, min(MOST_ASPECTS, len(aspects))))
    return label, [aspects[k] for k in sorted(chosen)]


def answer_to(prompt: Prompt, completion: Completion, *, stripped: bool = False) -> Completion:
    """Returns a completion in the form of an answer to the prompt: text behind text, a message behind messages.

    stripped: without whitespace around it, but for a space behind a text.
    """
    text = text_of(completion)
    if isinstance(prompt, str):
        return f" {text.strip()}" if stripped else text
    if stripped or isinstance(completion, str):
        return [{"role": "assistant", "content": text.strip() if stripped else text}]
    return completion


class Rewriter:
    """Function that rewrites the requests of prompts by a model that the recipe `bpo` trained (BPO, arXiv 2311.04155).

    rollout: samples from that model. task: the question it was trained on, which holds {prompt}. chat: whether it is
    asked in a conversation. sampling: default the most likely tokens, 256 at most.
    A prompt whose rewriting is empty stays as it is. Raises ValueError for a task without {prompt}, and DataError for a
    conversation without a user's turn.
    """

    def __init__(
        self, rollout: Rollout, *, task: str = REWRITE, chat: bool = True, sampling: Sampling | None = None
    ) -> None:
        if fields(task) != {"prompt"}:
            raise ValueError(f"a rewriter's task must hold {{prompt}} and no other field; got {task[:60]!r}")
        self.rollout, self.task, self.chat = rollout, task, chat
        self.sampling = sampling or Sampling(max_new_tokens=256, temperature=0.0)

    def __call__(self, prompts: Sequence[Prompt], *, seed: int = 0) -> list[Prompt]:
        """Returns the prompts rewritten."""
        if not len(prompts):
            return []
        asked = [as_prompt(filled(self.task, prompt=request_of(prompt)), self.chat) for prompt in prompts]
        found = self.rollout.generate(asked, 1, sampling=self.sampling, seed=seed).completions
        texts = [text_of(completion).strip() for completion in found]
        return [with_request(x, text) if text else x for x, text in zip(prompts, texts, strict=True)]


class Rewriting:
    """A `Rollout` behind a rewriter: the model reads each prompt as the rewriter writes it.

    say(prompt, rewritten) is called for each prompt. `Samples.prompts` are the prompts as they were given, for judges
    and logs; `Samples.prompt_ids` are of what the model has read. `update` is the rollout's.
    """

    def __init__(
        self,
        rollout: Rollout,
        rewriter: Callable[..., list[Prompt]],
        say: Callable[[Prompt, Prompt], Any] = lambda *_: None,
    ) -> None:
        self.rollout, self.rewriter, self.say = rollout, rewriter, say

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Samples n completions of each prompt after it has been rewritten."""
        rewritten = self.rewriter(prompts, seed=seed)
        for prompt, other in zip(prompts, rewritten, strict=True):
            self.say(prompt, other)
        samples = self.rollout.generate(rewritten, n, sampling=sampling, seed=seed)
        samples.prompts = [prompt for prompt in prompts for _ in range(n)]
        return samples

    def update(self, model: Any) -> None:
        """Tells the rollout that the policy's weights have changed."""
        self.rollout.update(model)
