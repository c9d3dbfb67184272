"""SPPO on a language model's preferences until its held-out grades stop rising: a recipe with some settings changed.

    python examples/recipe_ai_feedback.py

In each iteration SmolLM2-135M-Instruct answers every question three times. The judge, the same model before training,
is asked which of every two answers is better, in both orders, and the two probabilities are averaged. Each answer's
log-ratio then regresses to its win rate. After each iteration the judge grades answers to held-out questions from 1 to
9, mapped to −1 to 1, and the loop ends when the grades are no better than the best so far. A model of this size is a
poor judge: a rise shows what it likes more, and the share of its verdicts that depend on the order alone is printed.
All samples and judgements are in --folder; the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from xpo_fast.data import load_prompts
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.recipes import RECIPES, StoppingRule, override
from xpo_fast.recipes.loop import run
from xpo_fast.recipes.setup import Outcome, Setup
from xpo_fast.rewards.llm_judges import LLMJudge, TokenChoice
from xpo_fast.rollout import Sampling

RULE = StoppingRule(patience=1, z=0.5)  # better means by more than half a standard error


def main(
    name: str = SMOLLM2,
    folder: str | Path = "runs/recipe_ai_feedback",
    *,
    recipe: str = "sppo",
    questions: int = 12,
    held_out: int = 12,
    iterations: int = 3,
    draws: int = 3,
    tokens: int = 40,
    rule: StoppingRule = RULE,
    **training: Any,
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Returns the outcome of the run, and a summary of each iteration: what was sampled, judged and selected."""
    load = functools.partial(load_model, dtype="float32")  # merging an adapter into 16 bits would round it
    judge = LLMJudge(TokenChoice(*load(name)), both_orders=True)
    rows = [{"prompt": row["prompt"]} for row in load_prompts(PAIRS)]
    setup = Setup(
        model=name,
        load=load,
        rows=rows[:questions],
        held_out=rows[-held_out:],
        output=Path(folder),
        judge=judge,
        stopping=rule,
        sampling=Sampling(max_new_tokens=tokens),
        peft_config=LoraConfig(target_modules="all-linear"),
        training={"learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": 8, "save_strategy": "no"}
        | training,
    )
    outcome = run(override(RECIPES[recipe], {"iterations": iterations, "draws.n": draws}), setup)
    told = sorted(Path(folder).glob("iteration-*/summary.json"))
    return outcome, [json.loads(path.read_text(encoding="utf-8")) for path in told]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default="runs/recipe_ai_feedback")
    given = parser.parse_args()
    outcome, summaries = main(folder=given.folder)
    print(f"\n{outcome.reason}\nheld-out grades: " + ", ".join(f"{grade:+.4f}" for grade in outcome.history))
    for i, told in enumerate(summaries):
        print(
            f"iteration {i + 1}: P(the answer shown first wins) {told['first_place']:.2f} on average; "
            f"{told['flipped']:.0%} of the verdicts depend on the order alone"
        )
    print(f"the best model is that of iteration {outcome.best}, 0 being the start: {outcome.model}")
