"""Recipes: iterative alignment as data, one loop and a table of choices (recipe_loop.py runs them)."""

from .recipe import (
    FROM_DATA,
    JUDGES,
    RECIPES,
    REFERENCES,
    Draw,
    Recipe,
    StoppingRule,
    Train,
    get_recipe,
    override,
    paired,
    runs_in,
    table,
)

__all__ = [
    "FROM_DATA",
    "JUDGES",
    "RECIPES",
    "REFERENCES",
    "Draw",
    "Recipe",
    "StoppingRule",
    "Train",
    "get_recipe",
    "override",
    "paired",
    "runs_in",
    "table",
]
