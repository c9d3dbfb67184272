"""Every method as a pure function: keyword tensors and hyperparameters in, (losses, metrics) out."""

from . import pairwise, unpaired
from .registry import METHODS, Card, Method, get_method, register

__all__ = ["METHODS", "Card", "Method", "get_method", "pairwise", "register", "unpaired"]
