"""Objective: hidden states and a head in, the loss and metrics of a method out."""

from .objective import Objective

__all__ = ["Objective"]
