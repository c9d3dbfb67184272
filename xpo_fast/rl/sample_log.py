"""The samples of an online run as a table: a file with one line per sample, and a few of them printed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import words
from ..files import finite, saving
from .collect import Completion, Groups
from .experience import Experience

SAMPLES_FILE = "samples.jsonl"


def sample_lines(
    groups: Groups, used: Sequence[Completion], experience: Experience, names: Sequence[str], **where: int
) -> list[dict[str, Any]]:
    """Returns one JSON object per sampled completion.

    used: the completions that are the rows of the experience, in its order; names: of the reward functions; where:
    fields of every line.
    """
    advantage = experience.columns.get("advantage", experience.columns.get("prob_w"))
    assert advantage is not None
    lengths = experience.lengths.clamp(min=1)
    advantages = advantage if advantage.dim() == 1 else advantage.sum(dim=1) / lengths
    place = {id(row): i for i, row in enumerate(used)}
    lines = []
    for k, group in enumerate(groups):
        for row in group:
            i = place.get(id(row))
            about = {**where, "group": k, "prompt": row.prompt, "completion": row.completion, "tokens": len(row.ids)}
            about |= {"truncated": row.truncated, "reward": row.reward}
            about["rewards"] = dict(zip(names, row.scores, strict=True))
            about["advantage"] = None if i is None else float(advantages[i])
            about["trained"] = i is not None and bool(experience.kept[i])
            lines.append(finite(about))
    return lines


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]], end: int) -> int:
    """Writes the lines after byte `end` of the file, and returns where it ends then.

    end: where the file ended for the last checkpoint; anything after it was written by a run that died, and is dropped.
    """
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            end = min(end, file.tell())
            file.truncate(end)
            file.write(content)
    return end + len(content)


def table(samples: Sequence[Mapping[str, Any]], count: int, width: int = 120) -> str:
    """Returns `count` lines of SAMPLES_FILE as text, from the highest reward to the lowest, `width` characters wide.

    The number of tokens of a truncated completion ends in "…"; a completion without a reward has "–".
    """

    def one(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def line(*cells: str) -> str:
        return "".join(f"{cell:>9} " for cell in cells[:3]) + "  ".join(cells[3:])

    ranked = sorted(samples, key=lambda s: -math.inf if s["reward"] is None else s["reward"], reverse=True)
    last = max(min(count, len(ranked)) - 1, 1)
    shown = [ranked[k * (len(ranked) - 1) // last] for k in range(min(count, len(ranked)))]
    half = max((width - 32) // 2, 10)
    head = f"rollout {samples[0]['rollout']}: {len(shown)} of {len(samples)} completions, by reward"
    lines = [head, line("reward", "advantage", "tokens", f"{'prompt':<{half}}", "completion")]
    for sample in shown:
        tokens = f"{sample['tokens']}{'…' if sample['truncated'] else ''}"
        prompt, completion = (_one_line(sample[name]) for name in ("prompt", "completion"))
        prompt = prompt if len(prompt) <= half else "…" + prompt[-half + 1 :]
        completion = completion if len(completion) <= half else completion[: half - 1] + "…"
        numbers = one(sample["reward"], ".3f"), one(sample["advantage"], "+.3f"), tokens
        lines.append(line(*numbers, f"{prompt:<{half}}", completion).rstrip())
    return "\n".join(lines)


def _one_line(text: Any) -> str:
    """Returns a text, or a conversation's last message, without line breaks and control characters."""
    text = text if isinstance(text, str) else words(text[-1])
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
