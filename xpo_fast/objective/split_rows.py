"""A call whose rows are cut over ranks: what the ranks tell each other, so that each evaluates the same whole rows.

A call makes three all-gathers, and its backward none: a header of a few integers, by which all ranks learn the widths
of the chunks and whether a call fits the others'; the inputs by token; and the statistics of tokens that the head
computed. Whatever is refused is refused on every rank, before the head is read.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import on_host, static_shapes, to_device
from ..head import RowShard
from ..head.operands import Operands
from ..head.plan import Plan, plan_of
from ..head.row_parallel import RowParts
from ..head.spec import check_targets, statistic
from ..head.statistics import statistics
from ..reduce import each_row_on
from ..types import TokenStats
from .batch import Batch
from .reference import reference_logp
from .settings import Settings

# The header: integers that must be equal on all ranks, by what they stand for in an error; and then the rank's own.
_SAME = (
    "number of axes of targets",
    "number of rows",
    "settings of the objective and scalars of the call",
    "gradient mode",
    "names, dtypes and shapes of inputs",
)
_TOKEN, _UNIT, _EITHER = 1, 2, 0  # how a rank reads an input: by token, or not, or it cannot tell


@dataclass
class RowInputs:
    """The tensors of a call that have to do with rows: of a rank's chunk, and after `meet` of whole rows."""

    targets: Tensor  # (R, w), or (n,) packed
    cu_seqlens: Tensor | None  # (R + 1,) of whole rows
    columns: dict[str, Any]
    ref_logps: Tensor | None  # (R,), or shaped as targets
    ref_tokens: Tensor | None  # shaped as targets
    denominator: float | Tensor | None


@dataclass(frozen=True)
class SplitRows:
    """The chunk of this rank among those of the others, once all ranks have met."""

    parts: RowParts
    shape: torch.Size  # of whole targets

    def own(self, x: Tensor) -> Tensor:
        """Returns this rank's positions (n,) of all positions of whole rows (N,)."""
        return self.parts.own(x.view(self.shape)).reshape(-1)

    def statistics(
        self, operands: Operands, batch: Batch, settings: Settings, *, reference: bool
    ) -> tuple[TokenStats, Tensor | None]:
        """Returns the statistics that the methods need of all positions (N,), and the reference's log-probs (N,).

        operands: flat, with this rank's targets. reference: whether the reference's log-probs are to be computed.
        """
        check_targets(batch.targets, batch.ignore_index, operands.vocab)  # on all ranks alike
        stats = statistics(operands, settings.outputs(), settings.plan_options)
        names = ("logp", *map(statistic, settings.outputs()))
        found = [getattr(stats, name) for name in names]
        if reference:
            found.append(reference_logp(operands, settings).to(stats.logp.dtype))
        local = torch.stack(found).view(len(found), *self.shape[:-1], -1)
        whole = self.parts.whole(local).flatten(1).unbind(0)
        by_name = dict(zip(names, whole, strict=False))
        by_name |= {n: x.detach() for n, x in by_name.items() if n == "log_sum_sq_probs"}
        return TokenStats(lse=by_name["logp"].detach(), **by_name), whole[-1].detach() if reference else None

    @contextmanager
    def counted_once(self) -> Iterator[None]:
        """Counts each row once in sums over all ranks, though every rank of the group has it."""
        with each_row_on(self.parts.shard.world):
            yield


def meet(
    shard: RowShard,
    settings: Settings,
    operands: Operands,  # before `admit`
    given: RowInputs,
    scalars: tuple[Any, ...],
) -> tuple[Operands, RowInputs, SplitRows]:
    """Returns the admitted operands of this rank, the inputs of whole rows, and this rank's place: two collectives.

    scalars: the call's numbers that are in no other argument; they must be the same on all ranks. Raises ValueError on
    every rank for what one of them refuses, and for calls that do not fit each other.
    """
    _refuse(settings, operands, shard, given)
    problem, kinds = None, {}
    try:
        operands = operands.admit()
        kinds = _kinds(settings, given)
    except ValueError as error:
        problem = error
    divisor = None if isinstance(given.denominator, Tensor) else given.denominator
    of_call = (*scalars, divisor, operands.scaling, operands.ignore_index, operands.hidden.dtype, shard.balanced)
    numbers = f"{settings!r} {of_call}"
    header = [0] * len(_SAME) if problem is not None else _header(settings, given, numbers)
    width = given.targets.shape[-1] if given.targets.dim() else 0
    own = [int(problem is None), *header, sum(kind << 2 * k for k, kind in enumerate(kinds.values())), width]
    device = operands.hidden.device
    table = shard.every(torch.tensor(own, device=device)).tolist()
    _check(table, problem)
    widths = [row[-1] for row in table]
    if shard.balanced and any(width % 2 for width in widths):
        raise ValueError(f"balanced chunks have two pieces of equal width, got {widths} positions: pad rows")
    parts = RowParts(shard, tuple(widths))
    by_token = _settle(kinds, [row[-2] for row in table])
    return operands, *_exchange(parts, given, by_token, device)


def plan_of_chunk(settings: Settings, operands: Operands, targets: Tensor, shard: RowShard) -> Plan:
    """Returns the plan of this rank's part of a call on admitted operands; no other rank is asked.

    It counts all scored tokens of the chunk, those of units that do not count, too.
    """
    plan = plan_of(operands, settings.outputs(), settings.plan_options)
    why = f"{plan.why}; rows are cut over {shard.world} ranks, which exchange what a loss reads of each token"
    passes = plan.passes
    if operands.ref is not None:
        passes, why = passes + 1, why + "; 1F of it for the reference"
    return dataclasses.replace(plan, tokens=int((targets != operands.ignore_index).sum()), passes=passes, why=why)


# --- what is refused --------------------------------------------------------------------------------------------------


def _refuse(settings: Settings, operands: Operands, shard: RowShard, given: RowInputs) -> None:
    """Raises ValueError for what cannot be computed on rows in parts, the same on every rank."""
    name = ", ".join(m.name for m in settings.methods)
    if not isinstance(shard, RowShard):
        raise ValueError(f"row_shard must be a RowShard(group), got {type(shard).__name__}")
    if settings.draws_rivals:
        raise ValueError(f"{name} draws a rival of each rejected token of whole rows: leave out row_shard")
    if operands.shard is not None and operands.shard.group is shard.group:
        raise ValueError(
            "row_shard and vocab_shard are over one group: the ranks of a vocabulary have the same tokens, and those "
            "of a row different ones: pass the groups of two axes of a device mesh"
        )
    if torch.compiler.is_compiling() or static_shapes(operands.hidden):
        raise ValueError("row_shard exchanges shapes, which torch.compile and CUDA graphs cannot record: call it bare")
    learning = [n for n, x in given.columns.items() if isinstance(x, Tensor) and x.requires_grad]
    if learning and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: {', '.join(learning)} has a gradient of its own, which every rank of row_shard would add: "
            "detach it, or give its loss apart"
        )


# --- the header -------------------------------------------------------------------------------------------------------


def _named(given: RowInputs) -> dict[str, Any]:
    """Returns the inputs beside targets by name, in the same order on all ranks."""
    others = {"ref_logps": given.ref_logps, "ref_token_logp": given.ref_tokens, "cu_seqlens": given.cu_seqlens}
    others["denominator"] = given.denominator if isinstance(given.denominator, Tensor) else None
    named = {n: x for n, x in {**given.columns, **others}.items() if x is not None}
    return dict(sorted(named.items()))


def _may_be_by_token(settings: Settings, name: str) -> bool:
    """Returns whether an input can be one entry per token, of this rank's chunk."""
    of_reference = name in ("ref_logps", "ref_token_logp")
    return of_reference or any("UT" in m.axes(name) for m in settings.methods if name in m.inputs)


def _rows(given: RowInputs) -> int:
    return given.targets.shape[0] if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1


def _kinds(settings: Settings, given: RowInputs) -> dict[str, int]:
    """Returns how this rank reads each input. Raises ValueError for inputs that cannot be a chunk's."""
    targets, kinds = given.targets, {}
    if targets.dim() != (2 if given.cu_seqlens is None else 1):
        raise ValueError(
            "row_shard takes this rank's chunk of each row, targets (R, T), or of the packed rows, (N,), with "
            f"cu_seqlens= of the whole ones; got targets {tuple(targets.shape)}"
            + ("" if given.cu_seqlens is None else " with cu_seqlens=")
        )
    chunk, by_row = tuple(targets.shape), (_rows(given),)
    for name, x in _named(given).items():
        kinds[name] = _UNIT
        if not _may_be_by_token(settings, name):
            continue
        shapes: dict[Any, int] = (
            {chunk: _TOKEN} if name == "ref_token_logp" else {chunk: _TOKEN, by_row: _UNIT, (): _UNIT}
        )
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if shape not in shapes:
            raise ValueError(f"{name} must be {chunk}, as this rank's targets are, or one per row, got {shape}")
        kinds[name] = _EITHER if shape == chunk == by_row and name != "ref_token_logp" else shapes[shape]
    return kinds


def _header(settings: Settings, given: RowInputs, numbers: str) -> list[int]:
    """Returns the integers that `_SAME` names."""
    inputs = [
        (n, str(x.dtype), x.dim() == 0, None if _may_be_by_token(settings, n) else tuple(x.shape))
        if isinstance(x, Tensor)
        else (n, type(x).__name__)
        for n, x in _named(given).items()
    ]
    sums = [zlib.crc32(repr(x).encode()) for x in (numbers, inputs)]
    return [given.targets.dim(), _rows(given), sums[0], int(torch.is_grad_enabled()), sums[1]]


def _check(table: list[list[int]], problem: ValueError | None) -> None:
    """Raises ValueError on all ranks for a call that one of them refuses, or that do not fit each other."""
    if problem is not None:
        raise problem
    refused = [rank for rank, row in enumerate(table) if not row[0]]
    if refused:
        raise ValueError(f"rank {refused[0]} of row_shard refuses its part of this call: see its error")
    for k, what in enumerate(_SAME, start=1):
        found = [row[k] for row in table]
        if len(set(found)) > 1:
            got = f", got {found}" if max(found) < 1 << 20 else ""
            raise ValueError(f"the ranks of row_shard must give the same {what}{got}")


def _settle(kinds: Mapping[str, int], given: list[int]) -> list[str]:
    """Returns the names of the inputs by token, from every rank's kinds. Raises ValueError where they differ."""
    by_token = []
    for k, name in enumerate(kinds):
        found = {kind >> 2 * k & 3 for kind in given} - {_EITHER}
        if len(found) != 1:
            what = "its chunk, one entry per token" if found else "either one entry per token or one per row"
            raise ValueError(f"{name} is on some ranks of row_shard {what}: give it one shape, or pad the rows")
        if found == {_TOKEN}:
            by_token.append(name)
    return by_token


# --- the inputs -------------------------------------------------------------------------------------------------------


def _exchange(
    parts: RowParts, given: RowInputs, by_token: list[str], device: torch.device
) -> tuple[RowInputs, SplitRows]:
    """Returns the inputs of whole rows, from those of the chunks."""
    named = {n: to_device(x.detach(), device) for n, x in _named(given).items() if isinstance(x, Tensor)}
    tokens = [to_device(given.targets, device).long(), *(named[n] for n in by_token)]
    same = [n for n in named if n not in by_token]
    (targets, *rows), equal = parts.exchange(tokens, [named[n] for n in same])
    for name, x in zip(same, equal, strict=True):
        message = f"{name} is not by token and must be the same on all ranks of row_shard, which have the same rows"
        if not on_host(x):
            torch._assert_async(x, message)  # pyright: ignore[reportPrivateImportUsage]
        elif not bool(x):
            raise ValueError(message)
    whole = dict(zip(by_token, rows, strict=True))
    columns = {n: whole.get(n, x) for n, x in given.columns.items()}
    inputs = dataclasses.replace(
        given,
        targets=targets,
        columns=columns,
        ref_logps=whole.get("ref_logps", given.ref_logps),
        ref_tokens=whole.get("ref_token_logp"),
    )
    return inputs, SplitRows(parts, targets.shape)
