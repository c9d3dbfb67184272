"""What the registry says of the methods, as text: a table, a card, docs/methods.md."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping

from ..methods import METHODS, Method
from ..methods.inputs import INPUTS, LAYOUTS
from ..methods.math import check_choice
from ..methods.registry import DENOMINATORS, RLDefaults
from ..methods.survey import ATTRIBUTES

REGENERATE = "xpo-fast methods --markdown > docs/methods.md"


def where(text: str) -> set[str]:
    """Returns the names of the methods of which NAME=WORD holds. Raises ValueError for an unknown name or word."""
    name, _, word = text.lower().partition("=")
    codes = {a.name: code for code, a in ATTRIBUTES.items()}
    check_choice("the name in --where NAME=WORD", name, ("data", *codes))
    if name == "data":
        check_choice("the word in --where data=WORD", word, tuple(LAYOUTS))
        return {n for n, m in METHODS.items() if m.layout == word}
    words = [w.lower() for w in ATTRIBUTES[codes[name]].words]
    check_choice(f"the word in --where {name}=WORD", word, (*words, "none"))
    printed = {n: m.card.attributes[codes[name]].lower() for n, m in METHODS.items()}
    return {n for n, w in printed.items() if w == word.replace("none", "-") or (w == "hybrid" and word != "none")}


def table(methods: list[Method]) -> str:
    """Returns one line per method."""
    rows = [("name", "data", "unit", "reference", "hyperparameters")]
    given = (" ".join(f"{k}={v}" for k, v in m.defaults.items()) for m in methods)
    rows += [(m.name, m.layout, m.unit, _reference(m), text) for m, text in zip(methods, given)]
    width = max(len(row[0]) for row in rows)
    lines = [f"{a:<{width}}  {b:<8}  {c:<5}  {d:<9}  {e}".rstrip() for a, b, c, d, e in rows]
    if not methods:
        lines = ["no method is like that: ask for less"]
    more = "xpo-fast methods --card NAME prints what one computes and where it comes from; --where NAME=WORD filters"
    return "\n".join([*lines, "", more])


def _reference(method: Method) -> str:
    if method.needs_reference:
        return "yes"
    return "optional" if any(n.startswith("ref_") for n in method.inputs) else "no"


def _unit(method: Method) -> str:
    """Returns the word for what has one loss; the unit "batch" says only that losses depend on one another."""
    in_batch = {"pairwise": "pair", "listwise": "list"}
    return in_batch.get(method.layout, "row") if method.unit == "batch" else method.unit


def shape(method: Method, name: str) -> str:
    """Returns an input's shape in letters: P pairs or prompts, B rows, K completions, T tokens, … a size of its own."""
    unit = "B" if method.layout in ("unpaired", "policy") or method.unit == "row" else "P"
    letters = {"U": unit, "I": "…"}
    shapes = (
        "(" + ", ".join(letters.get(a, a) for a in axes) + ("," if len(axes) == 1 else "") + ")"
        for axes in method.axes(name)
    )
    return " or ".join(shapes)


def card(method: Method) -> str:
    """Returns everything about one method."""
    hyperparameters = {
        f"{name}={default!r}": " | ".join(map(str, method.choices.get(name, ())))
        for name, default in method.defaults.items()
    }
    facts = {
        "data": f"{method.layout}: {LAYOUTS[method.layout].about}",
        "reference": _reference(method),
        "the mean is over": DENOMINATORS[method.denominator].format(unit=_unit(method)),
        **({"online RL": rl} if (rl := _online(method)) else {}),
        "survey": method.card.survey or "-",
    }
    attributes = {f"{a} {ATTRIBUTES[a].about}": word for a, word in method.card.attributes.items() if word != "-"}
    inputs = {
        f"{name} {shape(method, name)}": INPUTS[name].meaning + ("" if name in method.required else " (optional)")
        for name in method.inputs
    }
    parts = {"inputs": inputs, "hyperparameters": hyperparameters, "facts": facts}
    parts["attributes, in the words of the survey's Table 1"] = attributes
    return "\n\n".join(
        [
            f"{method.name}: {method.card.paper}",
            f"  loss per {_unit(method)} = {method.card.equation}",
            textwrap.indent(_doc(method), "  "),
            *(f"{title}\n{_columns(part)}" for title, part in parts.items() if part),
        ]
    )


def _columns(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in rows.items())


def _doc(method: Method) -> str:
    return inspect.cleandoc(method.__doc__ or "")


def _online(method: Method) -> str:
    """Returns the defaults of online RL with a method, "" for a method that it does not train by."""
    if "token_logp" not in method.inputs:
        return ""
    rl, plain = method.card.rl, RLDefaults()
    own = [n for n in ("kl_coef", "max_draws", "overlong") if getattr(rl, n) != getattr(plain, n)]
    said = [f"{n} {getattr(rl, n)}" for n in ("advantage", *own)]
    said += [f"{n}={value!r} unless {' or '.join(rl.unless)} is given" for n, value in rl.settings.items()]
    said += [f"{n}={value!r} for several steps per rollout" for n, value in rl.reuse.items()]
    said += ["kl_target adapts beta"] * rl.adapts_beta + ["one step per rollout"] * ("old_logp" not in method.inputs)
    return ", ".join(said)


def markdown() -> str:
    """Returns the text of docs/methods.md."""
    methods = [m for _, m in sorted(METHODS.items())]
    given = {m.name: " ".join(f"`{k}={v!r}`" for k, v in m.defaults.items()) for m in methods}
    overview = _markdown_table(
        ("method", "data", "unit", "reference", "hyperparameters", "survey"),
        (
            (f"[`{m.name}`](#{m.name})", m.layout, m.unit, _reference(m), given[m.name], m.card.survey or "")
            for m in methods
        ),
    )
    attributes = _markdown_table(
        ("method", *ATTRIBUTES), ((f"`{m.name}`", *(m.card.attributes[a] for a in ATTRIBUTES)) for m in methods)
    )
    return "\n".join(
        [
            "# Methods\n",
            f"Made from the registry by `{REGENERATE}`. Each method is a function of keyword tensors; its "
            "signature is in `xpo_fast/methods/`, and `xpo-fast methods --card NAME` prints its section.\n",
            "Letters: P pairs or prompts, B rows, K completions per prompt (or objectives of a reward model), T tokens "
            "per row, D the width of a hidden state, S samples of the policy; `_w` the chosen completion, `_l` the "
            "rejected one. Log-probs are in nats, summed over a completion's tokens. Δw = logp_w − ref_logp_w, Δl "
            "likewise, h = β(Δw − Δl), σ the logistic function. "
            "*S n* is equation n of the survey (arXiv 2407.16216).\n",
            overview,
            "## Attributes\n",
            "The survey's 13, in the words of its Table 1, with the names and words that `xpo-fast methods --where "
            "NAME=WORD` takes (`none` is -; Hybrid counts as both):\n",
            _markdown_table(
                ("attribute", "about", "name", "words"),
                ((code, a.about, f"`{a.name}`", ", ".join(a.words)) for code, a in ATTRIBUTES.items()),
            ),
            attributes,
            *(_section(m) for m in methods),
        ]
    )


def _section(method: Method) -> str:
    title, _, text = _doc(method).partition("\n\n")
    optional = {name: "" if name in method.required else " (optional)" for name in method.inputs}
    rows = ((f"`{name}`{end}", shape(method, name), INPUTS[name].meaning) for name, end in optional.items())
    inputs = _markdown_table(("input", "shape", "meaning"), rows)
    words = {k: f" ({', '.join(f'`{w}`' for w in taken)})" for k, taken in method.choices.items()}
    hyperparameters = ", ".join(f"`{k}={v!r}`" + words.get(k, "") for k, v in method.defaults.items())
    mean_over = DENOMINATORS[method.denominator].format(unit=_unit(method))
    parts = [
        f"## {method.name}",
        _escape(title),
        f"```\nloss per {_unit(method)} = {method.card.equation}\n```",
        _escape(text.strip()),
        inputs.rstrip(),
        f"- Hyperparameters: {hyperparameters or 'none'}",
        f"- Mean over {mean_over}; data {method.layout}: "
        f"{LAYOUTS[method.layout].about}; reference: {_reference(method)}",
        f"- Online RL: {rl}" if (rl := _online(method)) else "",
        f"- Paper: {_escape(method.card.paper)}; survey: {method.card.survey or 'not in it'}",
    ]
    bullets = "\n".join(p for p in parts[5:] if p)
    return "\n\n".join([*(p for p in parts[:5] if p), bullets]) + "\n"


def _markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |" for line in lines) + "\n"


def _escape(text: str) -> str:
    """Returns plain text as Markdown; code between backquotes and characters within a word are left alone."""
    parts = text.split("`")
    special = r"([*]|(?<!\w)_|_(?!\w)|<(?=[\w/]))"
    return "`".join(p if i % 2 else re.sub(special, r"\\\1", p) for i, p in enumerate(parts))
