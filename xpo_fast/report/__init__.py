"""A run's folder as one page of HTML: curves, figures before and after, samples, what was found, and its settings."""

from .page import render
from .run import Run, read_run

__all__ = ["Run", "read_run", "render"]
