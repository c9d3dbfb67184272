"""`xpo-fast methods`: the methods as a table, one as a card, all of them as docs/methods.md."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..methods import Method

# The survey's 13 attributes: the option that filters by it, what it is, the words of its Table 1.
ATTRIBUTES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "RM1": ("reward", "reward model", ("Explicit", "Implicit")),
    "RM2": ("reward-form", "form of the reward", ("Point", "Preference")),
    "RM3": ("reward-level", "level of the reward", ("Response", "Token")),
    "RM4": ("reward-sign", "sign of the reward", ("Positive", "Negative")),
    "F1": ("feedback", "feedback", ("Preference", "Binary")),
    "F2": ("feedback-source", "source of the feedback", ("Human", "AI")),
    "F3": ("feedback-form", "completions compared", ("Pair", "List")),
    "RL1": ("reference", "reference model", ("Reference", "Free")),
    "RL2": ("length", "length of completions", ("Control", "Uncontrol")),
    "RL3": ("divergence", "divergence from the reference", ("KL", "Multiple")),
    "RL4": ("policy", "samples of the policy", ("On", "Off", "Hybrid")),
    "O1": ("optimization", "optimization", ("Online", "Offline", "Hybrid")),
    "O2": ("sft", "fine-tuning and alignment", ("Separate", "Merge")),
}
LAYOUTS = {
    "pairwise": "pairs of a chosen and a rejected completion",
    "unpaired": "single completions",
    "listwise": "K completions a prompt",
    "policy": "the policy's own samples, token by token",
    "reward": "outputs of a reward model",
}
DENOMINATORS = {
    "units": "the number of {unit}s",
    "tokens": "the number of tokens",
    "row_means": "the number of rows, each the mean of its tokens",
    "fixed_length": "the number of rows times a fixed number of tokens",
    "local_tokens": "the number of micro-batches, each the mean of its tokens",
}
_LOGP = "log-prob summed over the {} completion's tokens"
INPUTS = {
    "logp_w": _LOGP.format("chosen"),
    "logp_l": _LOGP.format("rejected"),
    "ref_logp_w": "the same under the reference policy",
    "ref_logp_l": "the same under the reference policy",
    "len_w": "tokens of the chosen completion",
    "len_l": "tokens of the rejected completion",
    "logp_sft": "log-prob of a completion to stay close to",
    "score_w": "annotator's or reward model's score of the chosen completion",
    "score_l": "annotator's or reward model's score of the rejected completion",
    "prob_w": "probability that the chosen completion beats the rejected one",
    "kl_w": "KL(reference ‖ policy) summed over the chosen completion's positions",
    "kl_l": "KL(reference ‖ policy) summed over the rejected completion's positions",
    "ref_pos_logp_l": "log-prob of the rejected completion under the second, helpful reference",
    "pos_score": "logit of a token sampled in place of the rejected completion's",
    "neg_score": "logit of the rejected completion's token",
    "logp": "log-prob summed over the completion's tokens",
    "ref_logp": "the same under the reference policy",
    "length": "tokens of the completion",
    "desirable": "thumbs up or down",
    "reward": "scalar feedback",
    "kl": "KTO's reference point in nats, detached",
    "delta": "running mean of the rewards, kept by the objective",
    "m0": "running mean of the log-ratio margins, kept by the objective",
    "s": "running standard deviation of the log-ratio margins, kept by the objective",
    "logps": "log-prob of each of K completions",
    "ref_logps": "the same under the reference policy",
    "lens": "tokens of each of K completions",
    "scores": "score of each of K completions, higher is better",
    "token_logp": "log-prob of each token",
    "old_logp": "the same under the policy that sampled",
    "ref_token_logp": "the same under the reference policy",
    "entropy": "entropy of each token's distribution",
    "advantage": "advantage of each row or token",
    "value": "value of the prompt, or of each token's state",
    "old_value": "the same when the rows were sampled",
    "returns": "return from each token on",
    "ptx_logp": "log-prob of each token of the pretraining text",
    "ptx_mask": "tokens of the pretraining text that count",
    "mask": "entries that count: completion tokens, or completions that exist",
    "reward_w": "the model's reward of the chosen completion",
    "reward_l": "the model's reward of the rejected completion",
    "margin": "by how much the chosen completion is better",
    "logit": "the model's logit",
    "rewards": "K rewards, of completions or of objectives",
    "ranks": "rank of each completion, 1 = best",
    "targets": "the rating on each objective",
    "rewards_w": "rewards of the chosen completion on K objectives",
    "rewards_l": "rewards of the rejected completion on K objectives",
    "gate": "logits of the gate over K objectives",
    "gate_w": "logits of the gate over K objectives",
    "gate_l": "logits of the gate over K objectives",
}
REGENERATE = "xpo-fast methods --markdown > docs/methods.md"


def add_parser(commands: Any) -> None:
    methods = commands.add_parser(
        "methods",
        help="list the methods and their hyperparameters",
        description="The methods, filtered by what the survey's Table 1 says of them; the value none means that it says "
        "nothing. Hybrid ones count as both.",
        allow_abbrev=False,
    )
    which = methods.add_mutually_exclusive_group().add_argument
    which("--card", metavar="NAME", help="everything about one method: equation, paper, inputs")
    which("--markdown", action="store_true", help="everything about all of them, in Markdown")
    add = methods.add_argument_group("filters").add_argument
    for option, (about, words) in _filters().items():
        add(f"--{option}", type=str.lower, choices=words, metavar="|".join(words), help=about)
    methods.set_defaults(run=run)


def _filters() -> dict[str, tuple[str, tuple[str, ...]]]:
    """What there is to filter by: option → (what it is, the words it takes)."""
    attributes = {
        option: (about, (*(w.lower() for w in words), "none")) for option, about, words in ATTRIBUTES.values()
    }
    return {"data": ("layout of the rows", tuple(LAYOUTS)), **attributes}


def run(args: argparse.Namespace) -> int:
    from ..methods import METHODS, get_method

    options = vars(args)
    asked = {o: v for o in _filters() if (v := options[o.replace("-", "_")]) is not None}
    if (args.card or args.markdown) and asked:
        raise ValueError(f"filters are for the table: leave out --{next(iter(asked))}, --card or --markdown")
    if args.card:
        print(card(get_method(args.card)))
    elif args.markdown:
        print(markdown(), end="")
    else:
        print(table([m for _, m in sorted(METHODS.items()) if _matches(m, asked)]))
    return 0


def _matches(method: Method, asked: Mapping[str, str]) -> bool:
    words = {option: method.card.attributes[attribute].lower() for attribute, (option, _, _) in ATTRIBUTES.items()}
    return all(
        method.layout == value
        if option == "data"
        else words[option] == value.replace("none", "-") or (words[option] == "hybrid" and value != "none")
        for option, value in asked.items()
    )


# --- table, card --------------------------------------------------------------------------------------------------


def table(methods: list[Method]) -> str:
    rows = [("name", "data", "unit", "reference", "hyperparameters")]
    rows += [
        (m.name, m.layout, m.unit, _reference(m), " ".join(f"{k}={v}" for k, v in m.defaults.items())) for m in methods
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{a:<{width}}  {b:<8}  {c:<5}  {d:<9}  {e}".rstrip() for a, b, c, d, e in rows]
    if not methods:
        lines = ["no method is like that: ask for less"]
    more = "--card NAME tells what one computes and where it comes from, -h how to filter"
    return "\n".join([*lines, "", f"xpo-fast methods {more}"])


def _reference(method: Method) -> str:
    if method.needs_reference:
        return "yes"
    return "optional" if any(n.startswith("ref_") for n in method.inputs) else "no"


def _unit(method: Method) -> str:
    """What has one loss; the unit "batch" says only that losses depend on one another."""
    in_batch = {"pairwise": "pair", "listwise": "list"}
    return in_batch.get(method.layout, "row") if method.unit == "batch" else method.unit


def _mean_over(method: Method) -> str:
    return DENOMINATORS[method.denominator].format(unit=_unit(method))


def shape(method: Method, name: str) -> str:
    """An input's shape in letters: P pairs or prompts, B rows, K completions, T tokens, … a size of its own."""
    unit = "B" if method.layout in ("unpaired", "policy") or method.unit == "row" else "P"
    letters = {"U": unit, "I": "…"}
    shapes = (
        "(" + ", ".join(letters.get(a, a) for a in axes) + ("," if len(axes) == 1 else "") + ")"
        for axes in method.axes(name)
    )
    return " or ".join(shapes)


def choices(method: Method) -> dict[str, tuple[str, ...]]:
    """The values of the hyperparameters that are words, as the function's own `check_choice` has them."""
    found = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method.fn)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check_choice":
            name, _, values = node.args
            table = method.fn.__globals__[values.id] if isinstance(values, ast.Name) else ast.literal_eval(values)
            found[ast.literal_eval(name)] = tuple(table)
    return found


def card(method: Method) -> str:
    words = choices(method)
    hyperparameters = {
        f"{name}={default!r}": " | ".join(words.get(name, ())) for name, default in method.defaults.items()
    }
    facts = {
        "data": f"{method.layout}: {LAYOUTS[method.layout]}",
        "reference": _reference(method),
        "the mean is over": _mean_over(method),
        "survey": method.card.survey or "-",
    }
    attributes = {f"{a} {ATTRIBUTES[a][1]}": word for a, word in method.card.attributes.items() if word != "-"}
    inputs = {
        f"{name} {shape(method, name)}": _meaning(method, name) + ("" if name in method.required else " (optional)")
        for name in method.inputs
    }
    return "\n\n".join(
        [
            f"{method.name}: {method.card.paper}",
            f"  loss a {_unit(method)} = {method.card.equation}",
            textwrap.indent(_doc(method), "  "),
            *(
                f"{title}\n{_columns(part)}"
                for title, part in (
                    ("inputs", inputs),
                    ("hyperparameters", hyperparameters),
                    ("facts", facts),
                    ("attributes, in the words of the survey's Table 1", attributes),
                )
                if part
            ),
        ]
    )


def _columns(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in rows.items())


def _doc(method: Method) -> str:
    return inspect.cleandoc(method.__doc__ or "")


def _meaning(method: Method, name: str) -> str:
    if name != "mask":
        return INPUTS[name]
    return "completion tokens" if "T" in method.axes(name)[0] else "entries that there are, where K varies"


# --- docs/methods.md ----------------------------------------------------------------------------------------------


def markdown() -> str:
    """docs/methods.md."""
    from ..methods import METHODS

    methods = [m for _, m in sorted(METHODS.items())]
    overview = _markdown_table(
        ("method", "data", "unit", "reference", "hyperparameters", "survey"),
        (
            (
                f"[`{m.name}`](#{m.name})",
                m.layout,
                m.unit,
                _reference(m),
                " ".join(f"`{k}={v!r}`" for k, v in m.defaults.items()),
                m.card.survey or "",
            )
            for m in methods
        ),
    )
    attributes = _markdown_table(
        ("method", *ATTRIBUTES),
        ((f"`{m.name}`", *(m.card.attributes[a] for a in ATTRIBUTES)) for m in methods),
    )
    return "\n".join(
        [
            "# Methods",
            "",
            f"Made from the registry by `{REGENERATE}`. Each method is a function of keyword tensors; its signature is "
            "in `xpo_fast/methods/`, and `xpo-fast methods --card NAME` prints its section.",
            "",
            "Letters: P pairs or prompts, B rows, K completions of a prompt (or objectives of a reward model), T tokens "
            "of a row; `_w` the chosen completion, `_l` the rejected one. Log-probs are in nats, summed over a "
            "completion's tokens. Δw = logp_w − ref_logp_w, Δl likewise, h = β(Δw − Δl), σ the logistic function. "
            "*S n* is equation n of the survey (arXiv 2407.16216).",
            "",
            overview,
            "## Attributes",
            "",
            "The survey's 13, in the words of its Table 1: "
            + ", ".join(f"{a} {about}" for a, (_, about, _) in ATTRIBUTES.items())
            + ". `xpo-fast methods -h` has a filter for each.",
            "",
            attributes,
            *(_section(m) for m in methods),
        ]
    )


def _section(method: Method) -> str:
    title, _, text = _doc(method).partition("\n\n")
    inputs = _markdown_table(
        ("input", "shape", "meaning"),
        (
            (
                f"`{name}`" + ("" if name in method.required else " (optional)"),
                shape(method, name),
                _meaning(method, name),
            )
            for name in method.inputs
        ),
    )
    words = choices(method)
    hyperparameters = ", ".join(
        f"`{k}={v!r}`" + (f" ({', '.join(f'`{w}`' for w in words[k])})" if k in words else "")
        for k, v in method.defaults.items()
    )
    parts = [
        f"## {method.name}",
        _escape(title),
        f"```\nloss a {_unit(method)} = {method.card.equation}\n```",
        _escape(text.strip()),
        inputs.rstrip(),
        f"- Hyperparameters: {hyperparameters or 'none'}",
        f"- Mean over {_mean_over(method)}; data {method.layout}: "
        f"{LAYOUTS[method.layout]}; reference: {_reference(method)}",
        f"- Paper: {_escape(method.card.paper)}; survey: {method.card.survey or 'not in it'}",
    ]
    bullets = "\n".join(p for p in parts[5:] if p)
    return "\n\n".join([*(p for p in parts[:5] if p), bullets]) + "\n"


def _markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |" for line in lines) + "\n"


def _escape(text: str) -> str:
    """Plain text as Markdown: what stands between backquotes, or within a word, is left alone."""
    parts = text.split("`")
    special = r"([*]|(?<!\w)_|_(?!\w)|<(?=[\w/]))"
    return "`".join(p if i % 2 else re.sub(special, r"\\\1", p) for i, p in enumerate(parts))
