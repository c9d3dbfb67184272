"""The recipes by name, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..wording import did_you_mean
from .asking import ASPECTS, EDIT, HELPFUL, IMPROVE, PROPOSE, REWRITE, UNHELPFUL
from .recipe import Draw, Recipe, Train

_ONLINE = {"select": "online", "reference": "fixed", "iterations": 1}
_FREE = {"reference": "none", "iterations": 1}
_CONTRAST = {"draws": (Draw(1, ask=HELPFUL, rank=1), Draw(1, ask=UNHELPFUL, rank=-1)), "judge": "none"} | {
    "select": "as-asked"
}
# Name: ((what it is, source), fields of Recipe).
_TABLE: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "raft": (
        ("reward-ranked fine-tuning on the best of K samples", "arXiv 2304.06767"),
        {"train": (Train("sft"),), "draws": (Draw(8),), "select": "best", "reference": "none"},
    ),
    "rso": (
        ("statistical rejection sampling, then the hinge loss", "arXiv 2309.06657, survey 3.3.2, S4"),
        {"train": (Train("rso"),), "draws": (Draw(64),), "reference": "fixed", "iterations": 1}
        | {"select": "rejection", "select_args": {"n": 8, "beta": 0.5}},
    ),
    "slic": (
        ("SLiC-HF on samples that a ranker has ordered", "arXiv 2305.10425, survey 3.3.1"),
        {"train": (Train("slic"),), "draws": (Draw(8),), **_FREE},
    ),
    "iterative-dpo": (
        ("DPO on best and worst of n, the best-of-n enhancer of online RLHF", "arXiv 2312.11456, survey 3.1.4"),
        {"train": (Train("dpo"),), "draws": (Draw(8),)},
    ),
    "online-rlhf": (
        ("DPO on a sample and one of an enhancer of higher temperature", "arXiv 2312.11456, survey 3.1.4"),
        {"train": (Train("dpo"),), "draws": (Draw(1, 0.7), Draw(1, 1.2)), "select": "pair", "judge": "preference"},
    ),
    "self-rewarding": (
        ("the model judges its own samples, 0 to 5 points", "arXiv 2401.10020, survey 3.5.1"),
        {"train": (Train("dpo"),), "draws": (Draw(4, 0.7, 0.9),), "judge": "self"},
    ),
    "rlaif": (
        ("an LLM's preferences train a reward model, PPO follows it", "arXiv 2309.00267, survey 3.2.2"),
        {"train": (Train("bradley_terry"),), "draws": (Draw(2),), "select": "pair", "judge": "llm", **_FREE}
        | {"then": "ppo"},
    ),
    "rlaif-direct": (
        ("PPO on an LLM's grades, without a reward model", "arXiv 2309.00267, survey 3.2.2"),
        {"train": (Train("ppo"),), "draws": (Draw(1),), "judge": "llm", **_ONLINE},
    ),
    "constitutional": (
        ("SFT on revised answers, then RLAIF", "arXiv 2212.08073, survey 3.2.1"),
        {"train": (Train("sft"),), "draws": (Draw(1),), "revise": 4, "judge": "none", "select": "only", **_FREE}
        | {"then": "rlaif"},
    ),
    "rlcd": (
        ("two contrasting prompts make each pair, a reward model learns them, PPO follows it", "arXiv 2307.12950"),
        {"train": (Train("bradley_terry"),), **_CONTRAST, **_FREE, "then": "ppo"},
    ),
    "rlcd-dpo": (
        ("two contrasting prompts make each pair, DPO learns them", "arXiv 2307.12950"),
        {"train": (Train("dpo"),), **_CONTRAST, "iterations": 1},
    ),
    "rmboost": (
        ("an answer, and one made better or worse in named aspects, for a reward model", "arXiv 2407.16008"),
        {"train": (Train("bradley_terry"),), "draws": (Draw(1), Draw(1, ask=EDIT, aspects=ASPECTS)), **_FREE}
        | {"judge": "none", "select": "as-asked"},
    ),
    "iterated-rlhf": (
        ("reward models of the newest policy's answers, compared, and PPO on each, in turns", "arXiv 2204.05862"),
        {"train": (Train("bradley_terry"),), "draws": (Draw(2),), "select": "pair", "judge": "preference", **_FREE}
        | {"then": "ppo", "rounds": 2},
    ),
    "rlp": (
        (
            "reward models that learn the policy's own samples beside the pairs, and PPO on each, in turns",
            "arXiv 2403.19279",
        ),
        {"train": (Train("rlp"),), "draws": (Draw(4),), "gold": True, "rival": True, "judge": "none", **_FREE}
        | {"select": "agreed", "then": "ppo", "rounds": 2},
    ),
    "apo-game": (
        (
            "a reward model learns to tell gold answers from the policy's, the policy follows it, in turns",
            "arXiv 2311.08045",
        ),
        {"train": (Train("bradley_terry"),), "draws": (Draw(1),), "gold": True, "rival": True, **_FREE}
        | {"judge": "none", "select": "as-asked", "then": "apo-policy", "rounds": 2},
    ),
    "apo-policy": (
        ("the policy's turn in apo-game: DPO on best and worst of four by the reward model", "arXiv 2311.08045"),
        {"train": (Train("dpo"),), "draws": (Draw(4),), "iterations": 1},
    ),
    "bpo": (
        ("a rewriter of prompts learns from what a critic of good and bad answers wrote", "arXiv 2311.04155"),
        {"train": (Train("sft"),), "draws": (Draw(1, ask=IMPROVE),), "task": REWRITE, **_FREE}
        | {"judge": "none", "select": "only"},
    ),
    "opro": (
        ("a model proposes instructions from those scored so far; no weights change", "arXiv 2309.03409"),
        {"train": (), "draws": (Draw(8, ask=PROPOSE),), "select": "prompts", "reference": "none", "iterations": 20},
    ),
    "sppo": (
        ("each sample's log-ratio regresses to its win rate", "arXiv 2405.00675, survey 3.11.2, S60–61"),
        {"train": (Train("sppo"),), "draws": (Draw(5),), "select": "all-pairs", "judge": "preference"},
    ),
    "dno": (
        ("pairs of large margin among samples and the gold answer", "arXiv 2404.03715, survey 3.11.3, S62"),
        {"train": (Train("dno"),), "draws": (Draw(5),), "gold": True, "select": "large-margin", "judge": "preference"},
    ),
    "nash-md": (
        ("against the mixture of policy and reference", "arXiv 2312.00886, survey 3.11.1, S55–59"),
        {"train": (Train("nash_md"),), "draws": (Draw(1),), "judge": "preference", "mix": 0.125, **_ONLINE},
    ),
    "cringe": (
        ("iterative pairwise CRINGE on best and worst of four", "arXiv 2312.16682, survey 3.5.2"),
        {"train": (Train("cringe"),), "draws": (Draw(4),), "reference": "none", "iterations": 2},
    ),
    "nn": (
        ("negating negatives: own samples against the data's rejected answer", "arXiv 2403.03419, survey 3.10.1"),
        {"train": (Train("nn"),), "draws": (Draw(4),), "judge": "none", "select": "against-rejected"}
        | {"reference": "two", "iterations": 2},
    ),
    "sdpo": (
        ("DPO on the data in steps, each step's model the next one's reference", "arXiv 2403.19270, survey 3.3.7"),
        {"train": (Train("dpo"),), "judge": "none", "select": "split", "iterations": 2},
    ),
    "paft": (
        ("SFT + l1 and DPO side by side as two adapters, merged", "arXiv 2406.17923, survey 3.7.2, S43"),
        {"train": (Train("sft", l1=1e-5), Train("dpo")), "judge": "none", "select": "dataset", "iterations": 1}
        | {"merge": {"combination_type": "ties", "density": 0.5}},
    ),
    "ppo": (
        ("proximal policy optimisation with a value head", "arXiv 1707.06347, survey 3.1.1, S2"),
        {"train": (Train("ppo"),), "draws": (Draw(1),), **_ONLINE},
    ),
    "grpo": (
        ("group-relative advantages, no value head", "arXiv 2402.03300"),
        {"train": (Train("grpo"),), "draws": (Draw(8),), **_ONLINE},
    ),
    "rloo": (
        ("REINFORCE with the leave-one-out baseline", "arXiv 2402.14740, survey 3.8.1, S48"),
        {"train": (Train("rloo"),), "draws": (Draw(4),), **_ONLINE},
    ),
}
RECIPES: Mapping[str, Recipe] = {name: Recipe(name, *about, **x) for name, (about, x) in _TABLE.items()}


def get_recipe(name: str) -> Recipe:
    """Returns the recipe of that name. Raises ValueError, with similar names, if there is none."""
    if name not in RECIPES:
        near = did_you_mean(name, RECIPES)
        raise ValueError(f"no recipe named {name!r}{near}{' There' if near else '; there'} are {', '.join(RECIPES)}")
    return RECIPES[name]


def table() -> str:
    """Returns the recipes as a table of text."""
    head = ("recipe", "generate", "judge", "select", "method", "reference", "iterations")
    lines = [head, *((r.name, *r.cells(), str(r.iterations)) for r in RECIPES.values())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
