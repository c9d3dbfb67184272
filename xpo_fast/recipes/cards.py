"""The recipes, and systems that are a command or a method instead, as cards: one as text, all as docs/recipes.md."""

from __future__ import annotations

from collections.abc import Mapping

from .recipe import JUDGES, REFERENCES
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
    "rlp": "Better than the state of the art on three benchmarks, without new preferences of people.",
    "apo-game": "Better than the ways of alignment it is added to, in helpfulness and harmlessness.",
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
# What short runs of SmolLM2-135M on a CPU gave: docs/log.md, "The last systems of the surveys".
MEASURED: Mapping[str, str] = {
    "rlcd-dpo": "8 prompts, 24 tokens, 2 steps: 149 s; the pairs as labelled, no instruction in the rows.",
    "rmboost": "4 prompts: 278 s.",
    "rlp": "4 prompts, samples of 12 tokens, 2 rounds of a step each: 275 s; in each round the samples of one prompt "
    "agree and make a pair; multi-view loss 0.846 and 1.165.",
    "bpo": "4 prompts, one of them held out: 291 s; answers of 19 words before and after.",
    "opro": "6 sums, 2 iterations of 4: 300 s; the checked score from 1/6 to 6/6, by the instruction '@6,792,610,243', "
    "scored on the rows it was found on.",
}
# Systems that no recipe is: each by the command that runs it.
OTHERS: Mapping[str, Mapping[str, str]] = {
    "router": {
        "about": "domain experts as adapters on one backbone, and a router that picks one for each prompt",
        "source": "arXiv 2407.17546",
        "run": "xpo-fast router --data FILE --expert NAME=FOLDER --expert NAME=FOLDER",
        "data": "prompt, domain; for each domain a reward model with an adapter (xpo-fast reward --lora)",
        "stages": "a reward model for each domain → their adapters on one base model → the router, by the prompts' "
        "last hidden states → a folder that is used where a reward model's is",
        "the paper": "On par with the reward models it is compared with, of fewer parameters in all.",
    },
    "rahf": {
        "about": "hidden states moved by the difference of what is preferred and what is not",
        "source": "arXiv 2312.15997",
        "run": "xpo-fast rahf --data FILE --signal dual",
        "data": "prompt, chosen, rejected",
        "stages": "adapters that know what is preferred and what is not, one for both (single) or one each (dual) → "
        "the difference of their hidden states → an adapter whose states are the base's and that difference",
        "the paper": "Moves a model to a broad range of human preferences, where representations had been moved for "
        "single concepts such as honesty.",
        "measured": "dual, 4 steps at a learning rate of 1e-3: the distance to the aligned states of held-out rows "
        "from 0.0662 to 0.0194.",
    },
    "goal_conditioned": {
        "about": "a reward model whose states tell whether a begun answer leads to what is preferred",
        "source": "arXiv 2407.13887",
        "run": "xpo-fast reward --method goal_conditioned --data FILE",
        "data": "prompt, chosen, rejected",
        "stages": "Bradley–Terry with a contrast of the states along preferred and rejected answers → the goal, the "
        "mean last state of preferred ones → Q-values: as a judge (--judge goal:FOLDER), or as a filter while decoding "
        "(xpo-fast chat --goal FOLDER)",
        "the paper": "Up to 0.09 AUROC more on MATH and GSM8k, 2.3% more accuracy on Helpful-Harmless; up to 55% of "
        "generated tokens saved in majority voting.",
        "measured": "a planted goal, a tiny model, 200 held-out pairs: AUC of the Q-value after 1, 2 and all tokens "
        "0.892, 0.957, 0.998, and without the contrast 0.588, 0.699, 0.953. SmolLM2, 8 steps: training loss from "
        "1.424 to 1.267; the states along its texts are alike (cosine 0.45), so the rejected side hardly moves. "
        "The filter, 80 answers of a policy that reaches the planted goal as often as not: 0.51 reach it plainly, 0.95 "
        "with the best of 4 beginnings after every 2 tokens.",
    },
    "meta": {
        "about": "a reward model that tells the policy's own samples apart before each step",
        "source": "arXiv 2401.06080, arXiv 2405.00438",
        "run": "xpo-fast reward --method meta --data FILE --samples FILE --whiten",
        "data": "prompt, chosen, rejected; samples: prompt, completions",
        "stages": "an inner step by how far the samples' rewards lie apart → the pairs' gradient there → a step from "
        "where it began",
        "measured": "whitened, 6 steps, the pairs' own completions as samples: loss from 0.695 to 0.616, spread of the "
        "rewards from 0.252 to 0.268, loss on 8 held-out rows from 0.699 to 0.645.",
    },
    "context_distillation": {
        "about": "a model learns to answer as it would under a long prompt",
        "source": "arXiv 2112.00861",
        "run": "xpo-fast train --method context_distillation --data FILE --context FILE",
        "data": "prompt, completion",
        "stages": "KL of each token to the same model under the context, in one run",
        "measured": "a pirate's prompt, 12 steps at a learning rate of 1e-3: KL a token on 8 held-out rows from 0.273 "
        "to 0.103.",
    },
    "ranking": {
        "about": "how often a policy and its reference rank pairs as labelled, and which pairs training flipped",
        "source": "arXiv 2405.19534",
        "run": "xpo-fast evaluate ranking RUN --data FILE",
        "data": "prompt, chosen, rejected",
        "stages": "log-probs under policy and reference → accuracies, that of the objective's optimum, flipped pairs",
        "the paper": "Most preference-tuned models rank fewer than 60% of pairs as labelled, and DPO seldom flips one "
        "that the reference ranks wrong.",
        "measured": "DPO by LoRA, 24 steps, 64 pairs, most of them also trained on: reference 0.266 ± 0.055, policy "
        "0.312 ± 0.058, the optimum at β = 0.1 0.516, implicit reward 1.000; 3 pairs flipped to right, none to wrong, "
        "44 stay wrong.",
    },
    "frontier": {
        "about": "reward against KL from the reference over a run's checkpoints",
        "source": "arXiv 2204.05862",
        "run": "xpo-fast evaluate frontier RUN --data FILE --judge SPEC",
        "data": "prompt",
        "stages": "samples of each checkpoint → their mean reward, and KL by the k3 estimate → a table and a plot",
        "measured": "DPO by LoRA, 24 steps, 8 prompts, reward = −words: KL 0, 0.13, 1.01, 1.15; reward −23.6, −22.0, "
        "−21.3, −22.0, each ± 2: within noise.",
    },
}


def card(name: str) -> str:
    """Returns a recipe or one of `OTHERS` in full, as text. Raises ValueError, with similar names, if there is none."""
    about = OTHERS[name]["about"] if name in OTHERS else get_recipe(name).about
    lines = {"recipe" if name in RECIPES else "system": f"{name}: {about}", **_lines(name)}
    return "\n".join(f"{k:<11} {v}" for k, v in lines.items())


def markdown() -> str:
    """Returns the text of docs/recipes.md."""
    rows = ((f"[`{r.name}`](#{r.name})", *r.cells(), str(r.iterations)) for r in RECIPES.values())
    head = ("recipe", "generate", "judge", "select", "method", "reference", "iterations")
    table = [head, ("---",) * len(head), *rows]
    others = [("system", "what runs it"), ("---",) * 2]
    others += [(f"[`{name}`](#{name})", f"`{about['run']}`") for name, about in OTHERS.items()]
    return "\n".join(
        [
            "# Recipes\n",
            f"Made from the table of recipes by `{REGENERATE}`. `xpo-fast recipe NAME --data FILE` runs one, "
            "`xpo-fast recipe NAME --list` prints its section, and `--set NAME=VALUE` changes it. Each iteration "
            "generates, judges, selects and trains; what each stage made is kept, and a run that was stopped goes on "
            "with `--resume`.\n",
            "Under *generate* stand completions per prompt: *asked* ones are sampled under an instruction that nothing "
            "is trained on, *edited* ones are another answer made better or worse.\n",
            "*Measured* are short runs on a CPU, of SmolLM2-135M unless a card says otherwise, from [log.md](log.md): "
            "they show that a system works by its command, more than the paper's effect.\n",
            *(f"| {' | '.join(line)} |" for line in table),
            "",
            "Systems that are a command or a method, and no recipe:\n",
            *(f"| {' | '.join(line)} |" for line in others),
            "",
            *(_section(name, recipe.about) for name, recipe in RECIPES.items()),
            *(_section(name, about["about"]) for name, about in OTHERS.items()),
        ]
    )


def _section(name: str, about: str) -> str:
    bullets = (f"- {key[0].upper()}{key[1:]}: {text}" for key, text in _lines(name, code="`").items())
    return f"## {name}\n\n{about[0].upper()}{about[1:]}.\n\n" + "\n".join(bullets) + "\n"


def _lines(name: str, *, code: str = "") -> dict[str, str]:
    """Returns what a card says, by name. code: what stands around a command."""
    if name in OTHERS:
        lines = {key: text for key, text in OTHERS[name].items() if key != "about"}
        return {**lines, "run": f"{code}{lines['run']}{code}"}
    recipe = get_recipe(name)
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
    said = {"the paper": FOUND.get(name), "measured": MEASURED.get(name)}
    return found | {key: text for key, text in said.items() if text}
