"""Recipes: iterative alignment as data (table.py), run by one loop (loop.py)."""

from .asking import Rewriter, Rewriting, Search
from .cards import card, markdown
from .recipe import JUDGES, REFERENCES, Draw, Recipe, Train, override
from .run_folder import runs_in
from .stopping import StoppingRule, paired
from .table import RECIPES, get_recipe, table

__all__ = [
    "JUDGES",
    "RECIPES",
    "REFERENCES",
    "Draw",
    "Recipe",
    "Rewriter",
    "Rewriting",
    "Search",
    "StoppingRule",
    "Train",
    "card",
    "get_recipe",
    "markdown",
    "override",
    "paired",
    "runs_in",
    "table",
]
