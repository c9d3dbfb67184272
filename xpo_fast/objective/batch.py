"""Rows and units of a call: the rows of each unit, the units that count, and the methods' inputs from both."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..device import on_host, static_shapes, to_device, to_host
from ..head.rows import Group, packed_rows, sum_rows
from ..head.spec import check_targets
from ..head.units import pack
from ..methods import Method
from ..methods.math import check_rows

PAIRS = ("all", "extremes")
# Values of columns that every method accepts, for units that do not count; 0 for other columns.
HARMLESS = {"score_w": 1.0, "score_l": 0.0, "prob_w": 0.5}


def _columns(sides: Collection[str]) -> slice:
    """Returns the columns of pairs (P, 2) that `sides` name; a slice, since an index list would wait for a device."""
    return slice(int("_w" not in sides), 1 + int("_l" in sides))


class Batch:
    """The layout of one call, from its targets alone.

    methods: of one layout. pairs: None, or how lists become pairs for a pairwise method ("all", "extremes").
    list_size: rows per list, for layouts of lists. device: where the call computes; if not given, only counts can be
    computed, on the targets' device. exact_sums: how `row_sums` adds, see `sum_rows`.

    Since a call must know which positions are scored, the layout is computed on the host, and copied to the device as
    far as needed there. The host waits once, here, for targets that are on a device. While a CUDA graph is captured
    nothing may be read: the layout is then computed on the device, and all positions are scored, ignored ones, too.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        targets: Tensor,  # (R, T), or (N,) packed
        cu_seqlens: Tensor | None,
        ignore_index: int,
        *,
        device: torch.device | None = None,
        pairs: str | None = None,
        list_size: int | None = None,
        exact_sums: bool = False,
    ) -> None:
        self.methods, self.ignore_index, self.pairs = methods, ignore_index, pairs
        self.name, self.exact_sums = " + ".join(m.name for m in methods), exact_sums
        self.device = targets.device if device is None else device
        self.static, self._targets_on_host = static_shapes(targets), on_host(targets)
        if device is not None:
            self._check_capture()
            if not self.static and not torch.compiler.is_compiling():
                targets, cu_seqlens = to_host(targets), None if cu_seqlens is None else to_host(cu_seqlens)
        self._cu_seqlens, self._list_size = cu_seqlens, list_size
        rows, self.count = packed_rows(targets, cu_seqlens)  # (N,), R
        self.shape = targets.shape
        self.layout = "listwise" if pairs else methods[0].layout
        flat = targets.reshape(-1).long()
        lengths = sum_rows((flat != ignore_index).long(), rows, self.count)
        index = self._rows_of_units(flat.device)
        self.units = index.shape[0]

        unit_lengths = lengths[index]
        sides = {side for m in methods for side in m.sides}
        read = _columns(sides)
        if self.layout == "pairwise":
            valid = (unit_lengths[:, read] > 0).all(dim=1)
        elif self.has_rejected:
            valid = (unit_lengths[:, :-1] > 0).any(dim=1) & (unit_lengths[:, -1] > 0)
        else:
            valid = (unit_lengths > 0).any(dim=1)
        # The head need not score a row that no method reads, nor a unit that does not count.
        seen = index[:, read] if self.layout == "pairwise" else index
        counted = torch.zeros(self.count, dtype=torch.bool, device=flat.device)
        counted[seen] = valid[:, None].expand_as(seen)
        # The targets that the head scores (N,), and the layout: on the host, or under graph capture on the device.
        self.targets = torch.where(counted[rows], flat, ignore_index)
        self._row_tables = (rows, lengths, index, valid)
        # On the call's device: the row of each position (N,), scored tokens of each row (R,), rows of each unit
        # (U, rows per unit) and the units that count (U,).
        self.rows, self.lengths, self.index, self.valid = (to_device(x, self.device) for x in self._row_tables)
        # There, too: the targets (N,), whether each is scored (N,), and the offset of each position in its row (N,).
        self.device_targets = to_device(self.targets, self.device)
        self.scored = self.device_targets != ignore_index
        if self.layout == "policy" or any(m.draws_rivals for m in methods):
            self.offsets = torch.arange(rows.shape[0], device=self.device) - self.starts[self.rows]

    def _check_capture(self) -> None:
        """Raises ValueError if a CUDA graph is being captured and a method cannot be captured into one."""
        reasons = {m.name: self._capture_error(m) for m in self.methods} if self.static else {}
        for name, why in reasons.items():
            if why is not None:
                raise ValueError(f"{name} cannot be captured into a CUDA graph: {why}; call it without one")

    @staticmethod
    def _capture_error(method: Method) -> str | None:
        """Returns why a method cannot be captured into a CUDA graph, or None if it can."""
        if method.state is not None:
            return "what it remembers of earlier batches would not be updated from replay to replay"
        if method.unit == "batch":
            return "its losses depend on one another, and which units count is known only from the targets' values"
        return None

    # --- rows and positions -------------------------------------------------------------------------------------------

    def row_sums(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns the sums over rows (R,) of floats (n,) at some positions, or at all N."""
        rows = self.rows if positions is None else self.rows[positions]
        return sum_rows(x, rows, self.count, exact=self.exact_sums)

    @property
    def packed(self) -> bool:
        """Returns whether the rows are packed."""
        return self._cu_seqlens is not None

    @property
    def rejected_targets(self) -> Tensor:
        """Returns `targets` (N,) of the rejected rows of pairs, with those of the chosen rows ignored."""
        return torch.where(self._row_tables[0] >= self.units, self.targets, self.ignore_index)

    @property
    def starts(self) -> Tensor:
        """Returns the first position of each row: (R,)."""
        sizes = sum_rows(torch.ones_like(self.rows), self.rows, self.count)
        return sizes.cumsum(0) - sizes

    @cached_property
    def row_sizes(self) -> list[int]:
        """Returns the number of positions of each row, scored or not: from shapes, or from offsets on the host."""
        if self._cu_seqlens is None:
            return [self.shape[1]] * self.count
        if static_shapes(self._cu_seqlens):
            raise ValueError(
                f"{self.name} needs the lengths of packed rows, which cannot be read while a CUDA graph is captured: "
                "pass cu_seqlens= on the CPU"
            )
        return self._cu_seqlens.diff().tolist()

    @property
    def width(self) -> int:
        """Returns the number of positions of the longest row."""
        return self.shape[1] if len(self.shape) == 2 else max([1, *self.row_sizes])

    @property
    def has_rejected(self) -> bool:
        """Returns whether the last row of each list is the rejected completion, after the policy's own (`nn`)."""
        return any("logp_l" in m.inputs for m in self.methods if m.layout == "listwise")

    def _rows_of_units(self, device: torch.device) -> Tensor:
        """Returns the rows of each unit, (U, rows per unit). Raises ValueError if the number of rows does not fit."""
        order, list_size = torch.arange(self.count, device=device), self._list_size
        if self.layout == "pairwise":
            if self.count % 2:
                raise ValueError(
                    f"{self.name} takes pairs, the chosen rows and then as many rejected ones: expected an even "
                    f"number of rows, got {self.count}"
                )
            return order.view(2, self.count // 2).T
        if self.layout != "listwise":
            return order.view(self.count, 1)
        if list_size is None:
            raise ValueError(
                f"{self.name} takes lists, the K rows of a prompt side by side: pass scores= (P, K), or list_size="
            )
        least = 1 + self.has_rejected
        if list_size < least or self.count % list_size:
            raise ValueError(
                f"{self.name} takes lists of {list_size} rows: expected a multiple of them, got {self.count} rows"
            )
        return order.view(self.count // list_size, list_size)

    # --- counts and weights -------------------------------------------------------------------------------------------

    def items(self, method: Method) -> Tensor:
        """Returns the number of items by which `reduction="mean"` divides the method's losses: () int64."""
        if method.denominator == "tokens":
            return self.tokens(method).sum()
        if method.denominator == "local_tokens":
            return self.valid.any().long()
        return self.valid.sum()

    def tokens(self, method: Method) -> Tensor:
        """Returns the scored tokens of each unit in the rows that the method reads: (U,), 0 if it does not count."""
        lengths = self.lengths[self.index]
        if self.layout == "pairwise":
            lengths = lengths[:, _columns(method.sides)]
        return lengths.sum(dim=1) * self.valid

    def weights(self, method: Method, fixed_length: int | None, dtype: torch.dtype) -> Tensor | None:
        """Returns the weight of each unit's losses in the sum over units: (U,), or None for 1."""
        ones = torch.ones(self.units, dtype=dtype, device=self.device)
        if method.denominator == "row_means":
            return ones / self.tokens(method).clamp(min=1)
        if method.denominator == "local_tokens":
            return ones / self.tokens(method).sum().clamp(min=1)
        if method.denominator == "fixed_length":
            return ones / (self.width if fixed_length is None else fixed_length)
        return None

    @property
    def beyond_shorter(self) -> Tensor:
        """Returns which positions are beyond their pair's shorter completion, in scored tokens: (N,) bool."""
        before = self.scored.long().cumsum(0) - self.scored.long()
        rank = before - torch.cat([before, before.new_zeros(1)])[self.starts[self.rows]]
        shorter = self.lengths[self.index].amin(dim=1).repeat(2)  # pairs are halves
        return rank >= shorter[self.rows]

    # --- inputs of a method -------------------------------------------------------------------------------------------

    def by_unit(self, rows: Tensor, units: Tensor | None) -> Tensor:
        """Returns values of rows (R,) as (U, rows per unit), for some units, or with None for all."""
        return rows[self.index if units is None else self.index[units]]

    def choose_pairs(self, scores: Tensor) -> None:
        """Chooses the pairs of each list, as `pairs` says, by the completions' scores (U, K)."""
        if scores.shape != self.index.shape:
            raise ValueError(
                f"{self.name}: scores must be a tensor {tuple(self.index.shape)}, got {tuple(scores.shape)}"
            )
        assert self.pairs is not None
        given, scores = scores, self.placed("scores", scores)
        mask = self.list_mask(None)
        finite = torch.where(mask, scores, 0.0).isfinite().all(dim=1)
        check_rows(
            finite, "finite scores", "give each completion of the list one, or drop it", scores=scores.sum(dim=1)
        )
        self._chosen = list_pairs(scores, mask, self.pairs)
        if any(m.unit == "batch" for m in self.methods):  # for `counted_indices`
            _, lengths, index, _ = self._row_tables
            real = list_pairs(to_host(given), to_host(lengths[index] > 0), self.pairs)[2]
            self._real_pairs_on_host = real.flatten()

    def list_mask(self, units: Tensor | None) -> Tensor:
        """Returns which completions of a list exist: (U, K) bool."""
        mask = self.by_unit(self.lengths > 0, units)
        return mask[:, :-1] if self.has_rejected else mask

    def _pairs(self, units: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `list_pairs` of some units, or with None of all."""
        winner, loser, real = self._chosen if units is None else tuple(x[units] for x in self._chosen)
        return winner, loser, real

    @property
    def counted(self) -> Tensor:
        """Returns which units count (U,), or with `pairs` which pairs of all lists (U·C,): bool."""
        return self._pairs(None)[2].flatten() if self.pairs else self.valid

    @property
    def counted_indices(self) -> Tensor:
        """Returns the indices of `counted`, found on the host."""
        counted = self._real_pairs_on_host if self.pairs else self._row_tables[-1]
        return to_device(counted.nonzero().squeeze(1), self.device)

    def mean_of_pairs(
        self, losses: Tensor, metrics: dict[str, Tensor], units: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean loss over each list's pairs (U,), and metrics (U, C), NaN where there is no pair.

        losses, metrics: of all pairs, (U·C,).
        """
        real = self._pairs(units)[2]
        total = torch.where(real, losses.view(real.shape), 0.0).sum(dim=1)
        metrics = {name: torch.where(real, x.view(real.shape), torch.nan) for name, x in metrics.items()}
        return total / real.sum(dim=1).clamp(min=1), metrics

    def inputs(self, prefix: str, rows: Tensor, units: Tensor | None, absent: float) -> dict[str, Tensor]:
        """Returns values of rows (R,) under the methods' names of inputs: "logp" → logp_w, logp_l.

        Units that do not count get `absent`.
        """
        valid = self.valid if units is None else self.valid[units]
        values = self.by_unit(rows, units)
        values = torch.where(valid[:, None], values, absent)
        if self.pairs:
            winner, loser, real = self._pairs(units)
            # Where there is no pair, numbers that every method accepts.
            dummies = (1.0, 0.0) if prefix == "score" else (absent, absent)
            sides = (torch.where(real, values.gather(1, at), x) for at, x in zip((winner, loser), dummies))
            return {prefix + side: x.flatten() for side, x in zip(("_w", "_l"), sides, strict=True)}
        if self.layout == "pairwise":
            return {prefix + "_w": values[:, 0], prefix + "_l": values[:, 1]}
        if self.layout == "listwise":
            plural = prefix + "s"
            if self.has_rejected:
                last = {"logp": "logp_l", "ref_logp": "ref_pos_logp_l"}.get(prefix)
                return {plural: values[:, :-1], **({last: values[:, -1]} if last else {})}
            return {plural: values}
        return {"length" if prefix == "len" else prefix: values[:, 0]}

    def grid(self, x: Tensor, positions: Tensor | None, units: Tensor | None, absent: float = 0.0) -> Tensor:
        """Returns x (n,), one value per position, as rows (U, T), with `absent` where a row has no position.

        positions (n,): the positions of the values, None for all N. units: the rows to return, None for all.
        """
        rows = self.rows if positions is None else self.rows[positions]
        at = self.offsets if positions is None else self.offsets[positions]
        count = self.units
        if units is not None:
            local = torch.full((self.units,), -1, device=self.device)
            local[units] = torch.arange(units.shape[0], device=self.device)
            rows, count = local[rows], units.shape[0]
        blank = torch.full((count, self.width), absent, dtype=x.dtype, device=x.device)
        return blank.index_put((rows, at), x)

    def rejected_grid(self, x: Tensor, rows: Tensor) -> Tensor:
        """Returns x (N,) as rows (U, T), of the rejected rows given."""
        wanted = torch.full((self.count,), -1, device=self.device)
        wanted[rows] = torch.arange(rows.shape[0], device=self.device)
        at = wanted[self.rows]  # −1 for positions of other rows: they are written into an extra last row, and dropped
        blank = torch.zeros((rows.shape[0] + 1, self.width), dtype=x.dtype, device=x.device)
        return blank.index_put((at, self.offsets), x)[:-1]

    def placed(self, name: str, x: Tensor) -> Tensor:
        """Returns x on the call's device. Raises ValueError if it is neither there nor on the host with the targets."""
        if x.device != self.device and not (self._targets_on_host and on_host(x)):
            raise ValueError(f"{self.name}: {name} is on {x.device} and hidden on {self.device}: move one of them")
        return to_device(x, self.device)

    # --- tiles --------------------------------------------------------------------------------------------------------

    @cached_property
    def _sorted_positions(self) -> tuple[Tensor, list[list[int]]]:
        """Returns the positions to score, sorted by unit, and the number of them in each row of each unit."""
        # The positions of a row are contiguous, so only rows need to be sorted.
        if self.static:  # all positions are scored, and only their numbers are known
            at, sizes = torch.arange(self.rows.shape[0], device=self.device), self.row_sizes
            index = self._rows_of_units(torch.device("cpu"))
        else:
            at = (self.targets != self.ignore_index).nonzero().squeeze(1)
            rows, _, index, _ = self._row_tables
            sizes = torch.bincount(rows[at], minlength=self.count).tolist()
        parts = at.split(sizes)
        ordered = torch.cat([at[:0], *(parts[row] for row in index.flatten().tolist())])
        return to_device(ordered, self.device), [[sizes[row] for row in unit] for unit in index.tolist()]

    @property
    def longest_unit(self) -> int:
        """Returns the scored tokens of the longest unit."""
        return max(map(sum, self._sorted_positions[1]), default=0)

    def groups(self, tile_tokens: int, vocab: int, *, by_token: bool) -> list[Group]:
        """Returns whole units packed into tiles; with by_token, tokens, each of them a unit.

        Checks the targets: raises ValueError for one outside the vocabulary if it can be read.
        """
        check_targets(self.targets, self.ignore_index, vocab)
        index, sizes = self._sorted_positions
        if not by_token:
            return pack(index, [sum(rows) for rows in sizes], tile_tokens)
        count = -(-index.shape[0] // tile_tokens)
        parts = index.tensor_split(count) if count else ()
        starts = itertools.accumulate((part.shape[0] for part in parts), initial=0)
        return [Group(part, (), start) for part, start in zip(parts, starts)]

    # --- offsets of rows ----------------------------------------------------------------------------------------------

    @cached_property
    def row_bounds(self) -> Tensor:
        """Returns the offsets (R + 1,) of the rows among all positions."""
        return self._bounds(self.row_sizes)

    @cached_property
    def unit_bounds(self) -> Tensor:
        """Returns the offsets (R + 1,) of the rows among all groups' positions, where a unit's rows are adjacent."""
        return self._bounds([size for rows in self._sorted_positions[1] for size in rows])

    def _bounds(self, sizes: list[int]) -> Tensor:
        """Returns the offsets (R + 1,) of rows of these sizes, without a copy from the host if all are equal."""
        if len(set(sizes)) == 1:
            return sizes[0] * torch.arange(len(sizes) + 1, device=self.device)
        return to_device(torch.tensor([0, *itertools.accumulate(sizes)]), self.device)


def list_pairs(scores: Tensor, mask: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pairs of each list's completions: winner (U, C), loser (U, C), and real (U, C), whether it is a pair.

    scores (U, K), higher is better; mask (U, K). how: "all" pairs, or "extremes", the best against the worst.
    Completions of equal score are no pair.
    """
    size = scores.shape[1]
    if how == "all":
        i, j = torch.triu_indices(size, size, offset=1, device=scores.device)
        swap = scores[:, j] > scores[:, i]
        winner, loser = torch.where(swap, j, i), torch.where(swap, i, j)
        real = mask[:, i] & mask[:, j] & (scores[:, i] != scores[:, j])
        return winner, loser, real
    best = torch.where(mask, scores, -torch.inf).argmax(dim=1, keepdim=True)
    worst = torch.where(mask, scores, torch.inf).argmin(dim=1, keepdim=True)
    real = mask.any(dim=1, keepdim=True) & (scores.gather(1, best) > scores.gather(1, worst))
    return best, worst, real
