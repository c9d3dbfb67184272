"""Measures of policies: ranking accuracy on pairs, win rates and Elo among several, reward against KL over a run."""

from .frontier import Point, efficient, kl_estimates, point
from .games import Games, NotFinite, bradley_terry, elo, win_rates
from .ranking import FLIPS, PairLogps, flips, ideal_margin, ranking

__all__ = [
    "FLIPS",
    "Games",
    "NotFinite",
    "PairLogps",
    "Point",
    "bradley_terry",
    "efficient",
    "elo",
    "flips",
    "ideal_margin",
    "kl_estimates",
    "point",
    "ranking",
    "win_rates",
]
