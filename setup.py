"""Everything is declared in pyproject.toml; the compiled backend will need more than it can say."""

from setuptools import setup

setup()
