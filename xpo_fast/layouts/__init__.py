"""Layouts of a batch: padded rows, rows packed side by side, and rows whose common beginnings stand once."""

from .attention import current, laid_out
from .model import install_layouts
from .rows import CHOICES, LAYOUTS, Layout, lay_out
