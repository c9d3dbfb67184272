"""Every method as a pure function: keyword tensors and hyperparameters in, (losses, metrics) out."""

from . import distillation, listwise, pairwise, policy, reward, unpaired, vocabulary
from .registry import METHODS, Card, Method, get_method, of_valid, register

__all__ = [
    "METHODS",
    "Card",
    "Method",
    "distillation",
    "get_method",
    "listwise",
    "of_valid",
    "pairwise",
    "policy",
    "register",
    "reward",
    "unpaired",
    "vocabulary",
]
