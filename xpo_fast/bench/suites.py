"""Lists the suites, and the cases of those that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from ..wording import did_you_mean
from .work import Settings, Work


@dataclass(frozen=True)
class Suite:
    """A group of cases. works: the module in this room and its function that yields them."""

    about: str
    works: tuple[str, str]
    default: bool = True

    def cases(self, settings: Settings) -> Iterator[Work]:
        """Yields the cases; the module is imported here, since whole steps need transformers."""
        module, function = self.works
        try:
            make: Callable[[Settings], Iterable[Work]] = getattr(import_module(f".{module}", __package__), function)
        except ModuleNotFoundError as error:
            needs = f"the suites of whole steps and of precision need {error.name}"
            raise ImportError(f"{needs}: pip install 'xpo-fast[train]', or name other suites") from error
        yield from make(settings)


SUITES = {
    "losses": Suite("every loss by every backend and peer: errors against float64, time", ("head", "works")),
    "sweep": Suite("time as one size varies: T, V, D, scored share, P, K", ("head", "sweep_works")),
    "memory": Suite("peak memory of the losses, each in a fresh process", ("memory", "works")),
    "steps": Suite("whole training steps by layout, and TRL's", ("steps", "works")),
    "step-memory": Suite("peak memory of whole steps by layout", ("steps", "peak_works"), default=False),
    "precision": Suite("bfloat16 against float32 on this CPU", ("precision", "works"), default=False),
}
DEFAULT = tuple(name for name, suite in SUITES.items() if suite.default)


def plan(names: Sequence[str], settings: Settings) -> list[Work]:
    """Returns the cases of suites, in their order; without names those of DEFAULT.

    Raises ValueError for a name that is no suite, and for `cases` or `contenders` that name nothing.
    """
    for name in names:
        if name not in SUITES:
            raise ValueError(f"no suite named {name!r}{did_you_mean(name, SUITES)}; there are {', '.join(SUITES)}")
    found = [work for name in dict.fromkeys(names or DEFAULT) for work in SUITES[name].cases(settings)]
    if not found:
        raise ValueError(
            f"no case of {', '.join(names or DEFAULT)} is, or begins with, {' or '.join(settings.cases)}: "
            "`xpo-fast bench SUITE --list` shows their names"
        )
    return found
