"""`xpo-fast methods`: the methods as a table, one as a card, all of them as docs/methods.md."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command `methods`."""
    methods = commands.add_parser(
        "methods",
        help="list the methods and their hyperparameters",
        description="The methods as a table, one method's card, or all of them as docs/methods.md.",
    )
    which = methods.add_mutually_exclusive_group().add_argument
    which("--card", metavar="NAME", help="everything about one method: equation, paper, inputs")
    which("--markdown", action="store_true", help="everything about all of them, in Markdown")
    methods.add_argument(
        "--where",
        metavar="NAME=WORD",
        action="append",
        help="list only methods with this layout (data=pairwise) or this attribute in the survey's Table 1 "
        "(reference=free, feedback=binary, sft=none; hybrid counts as both); may be repeated; an unknown name or word "
        "is answered with those that exist",
    )
    methods.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what is asked for."""
    from ..methods import METHODS, get_method
    from . import cards

    if (args.card or args.markdown) and args.where:
        raise ValueError("--where is for the table: leave out --where, --card or --markdown")
    if args.card:
        print(cards.card(get_method(args.card)))
    elif args.markdown:
        print(cards.markdown(), end="")
    else:
        wanted = [cards.where(text) for text in args.where or ()]
        print(cards.table([m for _, m in sorted(METHODS.items()) if all(m.name in names for names in wanted)]))
    return 0
