"""Objective: hidden states and a head in, the loss and metrics of a method out. It composes the arrows, owns no loss."""

from .objective import Objective, made_up

__all__ = ["Objective", "made_up"]
