"""docs/systems.md: every system has a method, recipe, command or file that exists, or a sentence why there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import xpo_fast as xf
from xpo_fast import cli
from xpo_fast.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "systems.md"
# The papers of the reading list on RLHF, and of the survey's chapter 3; none may go from the page.
NAMED = """
1506.02438 1502.05477 1707.06347 2112.00861 2203.02155 2204.05862 2212.08073 2303.08774 2304.05302 2304.06767
2305.10425 2305.18290 2305.20050 2306.17492 2307.09288 2307.12950 2309.00267 2309.03409 2309.06657 2309.16240
2310.12036 2311.04155 2311.08045 2311.17391 2312.00886 2312.11456 2312.15997 2312.16682 2401.06080 2401.08417
2401.10020 2402.01306 2402.01878 2402.03300 2402.10571 2402.13228 2402.14740 2403.00409 2403.03419 2403.07691
2403.13787 2403.19159 2403.19270 2403.19279 2404.00934 2404.03715 2404.05868 2404.10719 2404.11999 2404.12358
2404.14723 2405.00675 2405.14734 2405.19107 2405.19534 2406.10216 2406.11704 2406.12845 2406.17923 2407.04185
2407.08639 2407.13887 2407.16008 2407.17546
"""


def rows_of(text: str) -> list[list[str]]:
    """Returns the cells of the rows of the tables, their heads left out."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if line[0].strip() not in ("system", "---")]


def faults(rows: list[list[str]]) -> list[str]:
    """Returns what is wrong with the rows: names that do not exist, no name and no reason, a system twice."""
    known = {"method": xf.METHODS, "recipe": RECIPES, "command": cli.parsers()}
    found, seen = [], set()
    for system, paper, here in rows:
        refs = re.findall(r"\b(method|recipe|command|file) `([^`]+)`", here)
        for kind, name in refs:
            there = (ROOT / name).is_file() if kind == "file" else name in known[kind]
            if not there:
                found.append(f"{system}: no {kind} {name}")
        reason = here.partition("not built: ")[2] if here.startswith("not built: ") else ""
        if not refs and len(reason.split()) < 5:
            found.append(f"{system}: neither a place nor a reason")
        if not paper or system in seen:
            found.append(f"{system}: {'twice' if paper else 'no paper'}")
        seen.add(system)
    return found


def test_every_system_is_somewhere_or_is_told_why_not():
    rows = rows_of(PAGE.read_text("utf-8"))
    assert not faults(rows)
    named = set(NAMED.split())
    papers = set(re.findall(r"\d{4}\.\d{5}", " ".join(row[1] for row in rows)))
    assert named <= papers, sorted(named - papers)


def test_every_recipe_is_on_the_page():
    named = set(re.findall(r"recipe `([^`]+)`", PAGE.read_text("utf-8")))
    assert set(RECIPES) <= named, sorted(set(RECIPES) - named)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (["A", "arXiv 1", "method `dpoo`"], "A: no method dpoo"),
        (["A", "arXiv 1", "recipe `rafft`, method `dpo`"], "A: no recipe rafft"),
        (["A", "arXiv 1", "file `xpo_fast/nothing.py`"], "A: no file xpo_fast/nothing.py"),
        (["A", "arXiv 1", "command `evaluates`"], "A: no command evaluates"),
        (["A", "arXiv 1", "later"], "A: neither a place nor a reason"),
        (["A", "arXiv 1", "not built: too hard"], "A: neither a place nor a reason"),
        (["A", "", "method `dpo`"], "A: no paper"),
    ],
)
def test_faults_are_found(row, fault):
    assert faults([row]) == [fault]
    assert faults([["B", "arXiv 1", "method `dpo`"]] * 2) == ["B: twice"]
