"""The objective: from hidden states and a head to the loss and metrics of a method."""

from .objective import Objective

__all__ = ["Objective"]
