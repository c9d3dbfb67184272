"""Critique and revision of completions by their own model (Constitutional AI, arXiv 2212.08073)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..rewards.judges import Completion
from ..rewards.llm_judges import continued
from ..rollout import Prompt, Rollout, Sampling

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
