"""Reward functions with TRL's signature, weighted and summed; a fault raises an error or leaves its row out."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import importlib
import importlib.util
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rollout import Samples

logger = logging.getLogger("xpo_fast")

RewardFunction = Callable[..., Any]

PROMPT_INDEX = "prompt_index"  # a column of online runs: the number that the completions of one prompt share
OWN_COLUMNS = ("prompts", "completions", "completion_ids")  # the arguments that come from the samples


class RewardError(RuntimeError):
    """Raised if a reward function failed as a whole: it raised, took too long, or returned no list of R numbers."""


@dataclass
class Scored:
    """The rewards of R samples by F reward functions."""

    rewards: Tensor  # (R,) float32, the weighted sum; NaN where there is none
    each: Tensor  # (R, F) float32; NaN where a function returned None
    names: list[str]  # of the F functions

    @property
    def valued(self) -> Tensor:
        """The rows that have a reward, (R,) bool."""
        return ~self.rewards.isnan()


class Rewards:
    """Several reward functions as one: a weighted sum per sample.

        rewards = Rewards([accuracy, brevity], weights=[1.0, 0.2], timeout_s=60)
        scored = rewards(samples, {"answer": answers})

    functions: one or more, each called as f(prompts=, completions=, completion_ids=, **columns) and returning R
        entries, numbers or None (TRL's signature, without its trainer_state and loggers; a function without **kwargs
        receives only the arguments that it names). It may be `async`. A reward model is such a function. Each function
        is given copies of its own: what it edits in them changes nothing for others, for training, or in the data.
    weights: one per function; default 1.
    timeout_s: the limit in seconds for one call of one function. A function with a limit runs in a thread of its own,
        since only a thread can be abandoned; a blocked call remains in that thread until the process ends. Without a
        limit the function runs in the caller's thread, where signals work, too.

    An entry None means that the function does not apply to the row, whose reward is the sum of the others. A row has no
    reward if no function applies, or, with a warning, if an entry is NaN or infinite or the sum is beyond float32. Such
    rows are NaN in `Scored.rewards`. Raises RewardError, naming the function, if one raises (SystemExit too, which code
    under test may raise; KeyboardInterrupt goes through), needs a column that the data lack, returns something other
    than R numbers, or takes longer than `timeout_s`.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions or not all(map(callable, self.functions)):
            raise ValueError(f"expected one reward function or more, got {functions!r}")
        self.weights = [1.0] * len(self.functions) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(self.functions) or not all(map(math.isfinite, self.weights)):
            raise ValueError(
                f"expected a finite weight for each of {len(self.functions)} reward functions, got {weights!r}"
            )
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"expected timeout_s of more than 0 seconds, or None, got {timeout_s!r}")
        self.timeout_s = timeout_s
        self.names = _names(self.functions)

    def __call__(self, samples: Samples, columns: Mapping[str, Sequence[Any]] | None = None) -> Scored:
        """Returns the rewards of all samples. columns: further columns of the data by name, one entry per sample.

        Raises ValueError for a column of another length or with a name of `OWN_COLUMNS`, and RewardError.
        """
        rows = len(samples)
        columns = columns or {}
        for name, column in columns.items():
            if name in OWN_COLUMNS:
                raise ValueError(f"a column named {name!r} would hide the samples' own: rename it")
            if len(column) != rows:
                raise ValueError(
                    f"expected column {name!r} to have an entry for each of {rows} samples, got {len(column)}"
                )
        table = torch.full((rows, len(self.functions)), math.nan)
        lost = torch.zeros(rows, dtype=torch.bool)
        for i, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            given = {
                "prompts": samples.prompts,
                "completions": samples.completions,
                "completion_ids": samples.completion_ids,
                **columns,
            }
            values = _checked(self._call(name, function, given) if rows else [], rows, name)
            table[:, i] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float32)
            applies = torch.tensor([v is not None for v in values], dtype=torch.bool)
            faulty = applies & ~table[:, i].isfinite()
            if faulty.any():
                warn_of_faults(f"reward function {name!r}", faulty, samples.prompts, samples.completions)
            lost |= faulty
        total = (table * torch.tensor(self.weights)).nansum(dim=1)
        beyond = ~lost & ~total.isfinite()
        if beyond.any():
            logger.warning(
                "the weighted rewards of %d of %d completions sum up to more than float32 holds: they have no reward "
                "and are left out",
                *(int(beyond.sum()), rows),
            )
        lost |= beyond | table.isnan().all(dim=1)
        return Scored(total.masked_fill(lost, math.nan), table, list(self.names))

    def _call(self, name: str, function: RewardFunction, given: dict[str, Any]) -> Any:
        others: dict[int, tuple[Any, Any]] = {}
        accepted = _accepted(function, given, name)
        arguments = {key: [copied(x, others) for x in column] for key, column in accepted.items()}

        def run() -> Any:
            result = function(**arguments)
            return asyncio.run(_wait_for(result)) if inspect.isawaitable(result) else result

        try:
            with torch.no_grad():
                if self.timeout_s is None and not inspect.iscoroutinefunction(function):
                    return run()
                return _in_thread(run, self.timeout_s)
        except _TookTooLong:
            raise RewardError(
                f"reward function {name!r} did not return within {self.timeout_s:g} s for {len(given['prompts'])} "
                "completions: raise the limit, or give up earlier inside of it"
            ) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise RewardError(
                f"reward function {name!r} raised {type(error).__name__} on {len(given['prompts'])} completions: "
                f"{error}. Catch it there and return None for a completion that cannot be scored"
            ) from error


def warn_of_faults(
    who: str,
    faulty: Tensor,  # (R,) bool
    prompts: Sequence[Any],
    completions: Sequence[Any],
) -> None:
    """Logs a warning about rewards that are NaN or infinite: who gave them, how many, and the first one's row."""
    row = int(faulty.nonzero()[0])
    logger.warning(
        "%s returned NaN or an infinity for %d of %d completions (the first is row %d, %.80r, of the prompt %.80r): "
        "they have no reward and are left out",
        *(who, int(faulty.sum()), len(faulty), row, completions[row], prompts[row]),
    )


_LEAVES = (str, bytes, int, float, complex, type(None))
_PLAIN = frozenset((*_LEAVES, bool))
_shared: set[type] = set()  # the types that a warning has named


def copied(value: Any, others: dict[int, tuple[Any, Any]]) -> Any:
    """Returns a value whose lists and dicts can be edited without a trace: new ones, at every depth.

    Types derived from them, such as `Conversation`, stay what they are. Other objects (tensors, images) are deep
    copies, one for each object however often it occurs; one that cannot be copied is given as it is, with a warning.
    others: the copies made so far, by the object's id.
    """
    kind = type(value)
    if kind is list:
        plain = _PLAIN.issuperset(map(type, value))  # token ids: there are many
        return value.copy() if plain else [copied(x, others) for x in value]
    if kind is dict:
        return {key: copied(x, others) for key, x in value.items()}
    if kind is tuple:
        return tuple([copied(x, others) for x in value])
    if isinstance(value, _LEAVES):
        return value
    if isinstance(value, (list, dict)):
        made: Any = copy.copy(value)
        for key, x in enumerate(value) if isinstance(value, list) else value.items():
            made[key] = copied(x, others)
        for name, x in getattr(value, "__dict__", {}).items():
            setattr(made, name, _copied_once(x, others))
        return made
    return _copied_once(value, others)


def _copied_once(value: Any, others: dict[int, tuple[Any, Any]]) -> Any:
    if id(value) not in others:
        try:
            others[id(value)] = value, copy.deepcopy(value)
        except Exception as error:  # an open file, a tensor with a graph, a lock
            others[id(value)] = value, value
            if type(value) not in _shared:
                _shared.add(type(value))
                logger.warning(
                    "a %s of the data cannot be copied (%s: %s): reward functions are given the object itself, and "
                    "what one edits in it the others see",
                    *(type(value).__name__, type(error).__name__, error),
                )
    return others[id(value)][1]


def load_reward(spec: str) -> RewardFunction:
    """Returns the reward function that "file.py:function" or "package.module:function" names.

    Raises ValueError if there is none.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"expected a reward function as file.py:function or package.module:function, got {spec!r}")
    path = Path(place).expanduser()
    if place.endswith(".py") and not path.is_file():
        raise ValueError(f"no file {place!r} to take the reward function {name!r} from")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(path.stem, path)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # the user's code runs here and may raise anything
        raise ValueError(
            f"cannot import {place!r} to take the reward function {name!r} from: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"no function {name!r} in {place}; there are {', '.join(there) or 'none'}")
    return function


def _names(functions: Sequence[RewardFunction]) -> list[str]:
    """Returns the functions' names, made distinct by a number where two are equal."""
    names: list[str] = []
    for function in functions:
        inner = function
        while hasattr(inner, "func"):  # functools.partial
            inner = inner.func  # type: ignore[attr-defined]
        name = getattr(inner, "__name__", type(inner).__name__)
        twins = sum(n == name or (n.startswith(f"{name}_") and n[len(name) + 1 :].isdigit()) for n in names)
        names.append(f"{name}_{twins + 1}" if twins else name)
    return names


def _accepted(function: RewardFunction, given: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the arguments that the function takes. Raises RewardError if it needs more."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return given
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
    ]
    if missing:
        raise RewardError(
            f"reward function {name!r} needs {', '.join(missing)}, which the data have not: they have "
            f"{', '.join(given)}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    return {p.name: given[p.name] for p in parameters if p.name in given}


def _checked(values: Any, rows: int, name: str) -> list[float | None]:
    """Returns the function's values as R floats or None. Raises RewardError for anything else."""
    expected = f"reward function {name!r}: expected a list of {rows} numbers or None, one a completion"
    if hasattr(values, "tolist"):  # a tensor or an array
        try:
            values = values.tolist()
        except Exception as error:  # sparse ones, or without data
            raise RewardError(f"{expected}; got {type(values).__name__}, of which none can be made: {error}") from error
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"{expected}; got {type(values).__name__} {values!r:.80}")
    if len(values) != rows:
        raise RewardError(f"{expected}; got {len(values)}")
    checked: list[float | None] = []
    for row, value in enumerate(values):
        scalar = value.tolist() if hasattr(value, "tolist") else value  # of torch or numpy
        if scalar is not None and not isinstance(scalar, (bool, int, float)):
            raise RewardError(f"{expected}; entry {row} is {type(value).__name__} {value!r:.80}")
        try:
            checked.append(None if scalar is None else float(scalar))
        except OverflowError:  # an integer beyond float's range
            checked.append(math.inf)
    return checked


class _TookTooLong(Exception):
    pass


def _in_thread(run: Callable[[], Any], timeout_s: float | None) -> Any:
    """Returns run(), called in a thread, or raises its error; after timeout_s abandons it and raises _TookTooLong."""
    outcome: dict[str, Any] = {}
    context = contextvars.copy_context()

    def work() -> None:
        try:
            with torch.no_grad():
                outcome["value"] = context.run(run)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True, name="reward function")
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise _TookTooLong
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


async def _wait_for(result: Awaitable[Any]) -> Any:
    return await result
