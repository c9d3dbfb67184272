"""The recipes as cards: one as text, all of them as docs/recipes.md."""

from __future__ import annotations

from collections.abc import Mapping

from .recipe import JUDGES, REFERENCES, Recipe
from .table import RECIPES, get_recipe

REGENERATE = "xpo-fast recipe --markdown > docs/recipes.md"
# What the papers report, in their own setting.
FOUND: Mapping[str, str] = {
    "raft": "LLaMA-7B on HH-RLHF: mean reward 2.294, against 2.077 by PPO and 0.772 by SFT alone.",
    "self-rewarding": "Llama 2 70B on AlpacaEval 2.0: 9.94% wins after the first iteration, 15.38% after the second, "
    "20.44% after the third.",
    "rlaif": "Summaries: preferred to SFT's in 71% of comparisons, RLHF's in 73%; dialogues: 88% harmless, RLHF's 76%, "
    "SFT's 64%.",
    "rlaif-direct": "Summaries: preferred to SFT's in 74% of comparisons, and in 60% to those of RLAIF with a labeller "
    "of the policy's size.",
    "rlcd": "Better than RLAIF and context distillation for harmlessness, helpfulness and story outlines, with data "
    "from models of 7B and of 30B.",
    "rmboost": "Reward models on four backbones are better with its pairs than with those of other ways to make "
    "preference data.",
    "bpo": "Answers to rewritten prompts win 22 points more often than they lose for ChatGPT, and 10 for GPT-4, with "
    "neither of them trained.",
    "opro": "The best instructions found are better than those written by people by up to 8% on GSM8K and up to 50% on "
    "tasks of Big-Bench Hard.",
    "sppo": "Mistral-7B-Instruct v0.2 on AlpacaEval 2.0: 28.53% length-controlled wins, from 60 thousand prompts and a "
    "preference model of 0.4B.",
    "dno": "Orca-2.5 7B on AlpacaEval 2.0: 33% wins against GPT-4-Turbo, 26 points more than at the start.",
    "grpo": "DeepSeekMath 7B: GSM8K from 82.9% to 88.2%, MATH from 46.8% to 51.7%.",
    "rloo": "TL;DR summaries with 4 samples a prompt: 77.9% wins, PPO's 67.6%.",
}


def card(name: str) -> str:
    """Returns a recipe in full, as text. Raises ValueError, with similar names, if there is none."""
    lines = {"recipe": f"{name}: {get_recipe(name).about}", **_lines(get_recipe(name))}
    return "\n".join(f"{k:<11} {v}" for k, v in lines.items())


def markdown() -> str:
    """Returns the text of docs/recipes.md."""
    rows = ((f"[`{r.name}`](#{r.name})", *r.cells(), str(r.iterations)) for r in RECIPES.values())
    head = ("recipe", "generate", "judge", "select", "method", "reference", "iterations")
    table = [head, ("---",) * len(head), *rows]
    return "\n".join(
        [
            "# Recipes\n",
            f"Made from the table of recipes by `{REGENERATE}`. `xpo-fast recipe NAME --data FILE` runs one, "
            "`xpo-fast recipe NAME --list` prints its section, and `--set NAME=VALUE` changes it. Each iteration "
            "generates, judges, selects and trains; what each stage made is kept, and a run that was stopped goes on "
            "with `--resume`.\n",
            "Under *generate* stand completions per prompt: *asked* ones are sampled under an instruction that nothing "
            "is trained on, *edited* ones are another answer made better or worse.\n",
            *(f"| {' | '.join(line)} |" for line in table),
            "",
            *(_section(recipe) for recipe in RECIPES.values()),
        ]
    )


def _section(recipe: Recipe) -> str:
    bullets = (f"- {name[0].upper()}{name[1:]}: {text}" for name, text in _lines(recipe).items())
    return f"## {recipe.name}\n\n{recipe.about[0].upper()}{recipe.about[1:]}.\n\n" + "\n".join(bullets) + "\n"


def _lines(recipe: Recipe) -> dict[str, str]:
    """Returns what a card says, by name."""
    generate, judge, select, method, reference = recipe.cells()
    given = ", ".join(f"{k}={v}" for k, v in recipe.select_args.items())
    found = {
        "source": recipe.paper,
        "data": ", ".join(("prompt", *recipe.columns)),
        "generate": generate,
        "judge": JUDGES.get(judge, JUDGES["none"]),
        "select": select + (f" ({given})" if given else ""),
        "method": method,
        "reference": REFERENCES.get(reference, REFERENCES["none"]),
        "iterations": str(recipe.iterations),
    }
    asks = [" ".join(draw.ask.split()) for draw in recipe.draws if draw.ask]
    found |= {"asked": " / ".join(repr(text) for text in asks)} if asks and max(map(len, asks)) < 80 else {}
    aspects = [name for draw in recipe.draws for name in draw.aspects]
    found |= {"aspects": ", ".join(aspects)} if aspects else {}
    return found | ({"the paper": FOUND[recipe.name]} if recipe.name in FOUND else {})
