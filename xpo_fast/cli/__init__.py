"""The command `xpo-fast`: train, reward and rl train models, eval-reward measures them, recipe iterates; methods and
doctor list methods and backends, tune finds the fastest kernel launches, and bench measures; help and completion are
about the command itself.

One file per command; they share options.py, the checks of checks.py, and the steps of training.py. The words are
rewritten into the form that the parser declares (parser.py, aliases.py, config_file.py). Nothing here imports torch or
transformers before a command needs it.
"""

from .main import build_parser, main, parse, parsers

__all__ = ["build_parser", "main", "parse", "parsers"]
