"""Rows and units of a call: which row belongs to which unit, which of them count, and a method's inputs from them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
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
HARMLESS = {"score_w": 1.0, "score_l": 0.0, "prob_w": 0.5}


def _columns(sides: Collection[str]) -> slice:
    """The sides of pairs (P, 2) that are read: no list, which would be copied to a device and waited for."""
    return slice(int("_w" not in sides), 1 + int("_l" in sides))


class Batch:
    """The layout of one call, from its targets alone.

    methods: of one layout. pairs: None, or how lists become pairs for a pairwise method ("all", "extremes").
    list_size: rows a list, where the layout has lists. device: where the call computes; if not given nothing is computed
    but counts, where the targets are.

    A call needs to know which positions are scored: the layout is worked out on the host, and what the device needs of it
    is copied there. Targets that are on a device are waited for, once, here. While a CUDA graph is captured nothing may be
    read: then the layout is worked out on the device, and every position is taken, the ignored ones too.
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
    ) -> None:
        self.methods, self.ignore_index, self.pairs = methods, ignore_index, pairs
        self.name = " + ".join(m.name for m in methods)
        self.device = targets.device if device is None else device
        self.static, self._from_host = static_shapes(targets), on_host(targets)
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

        of_units = lengths[index]
        sides = {side for m in methods for side in m.sides}
        read = _columns(sides)
        if self.layout == "pairwise":
            valid = (of_units[:, read] > 0).all(dim=1)
        elif self.has_rejected:
            valid = (of_units[:, :-1] > 0).any(dim=1) & (of_units[:, -1] > 0)
        else:
            valid = (of_units > 0).any(dim=1)
        # The head need not see a row that no method reads, nor a unit that does not count.
        seen = index[:, read] if self.layout == "pairwise" else index
        counted = torch.zeros(self.count, dtype=torch.bool, device=flat.device)
        counted[seen] = valid[:, None].expand_as(seen)
        # What the head scores (N,), where it is read; and the layout there, if that is the host.
        self.targets = torch.where(counted[rows], flat, ignore_index)
        self._home = (rows, lengths, index, valid)
        # The rows of the positions (N,), scored tokens of rows (R,), rows of units (U, rows a unit), units that count (U,).
        self.rows, self.lengths, self.index, self.valid = (to_device(x, self.device) for x in self._home)
        # The targets (N,) there; those that are scored (N,); each position's place in its row (N,), where rows are laid out.
        self.device_targets = to_device(self.targets, self.device)
        self.scored = self.device_targets != ignore_index
        if self.layout == "policy" or any(m.draws_rivals for m in methods):
            self.offsets = torch.arange(rows.shape[0], device=self.device) - self.starts[self.rows]

    def _check_capture(self) -> None:
        reasons = {m.name: self._against_capture(m) for m in self.methods} if self.static else {}
        for name, why in reasons.items():
            if why is not None:
                raise ValueError(f"{name} cannot be captured into a CUDA graph: {why}; call it without one")

    @staticmethod
    def _against_capture(method: Method) -> str | None:
        if method.state is not None:
            return "what it remembers of earlier batches would not go on from replay to replay"
        if method.unit == "batch":
            return "its losses depend on one another, and which units count is known only from the targets' values"
        return None

    # --- what is where ------------------------------------------------------------------------------------------------

    @property
    def packed(self) -> bool:
        return self._cu_seqlens is not None

    @property
    def rejected_targets(self) -> Tensor:
        """(N,) `targets`, where they are, of the rejected halves of pairs alone."""
        return torch.where(self._home[0] >= self.units, self.targets, self.ignore_index)

    @property
    def starts(self) -> Tensor:
        """The first position of each row: (R,)."""
        sizes = sum_rows(torch.ones_like(self.rows), self.rows, self.count)
        return sizes.cumsum(0) - sizes

    @cached_property
    def row_sizes(self) -> list[int]:
        """Positions of each row, scored or not, known to the host: from shapes, or from offsets."""
        if self._cu_seqlens is None:
            return [self.shape[1]] * self.count
        if static_shapes(self._cu_seqlens):
            raise ValueError(
                f"{self.name} needs the lengths of packed rows, which cannot be read while a CUDA graph is captured: pass "
                "cu_seqlens= on the CPU"
            )
        return self._cu_seqlens.diff().tolist()

    @property
    def width(self) -> int:
        """The positions of the longest row."""
        return self.shape[1] if len(self.shape) == 2 else max([1, *self.row_sizes])

    @property
    def has_rejected(self) -> bool:
        """Whether the last row of each list is the rejected completion beside those that the policy made (`nn`)."""
        return any("logp_l" in m.inputs for m in self.methods if m.layout == "listwise")

    def _rows_of_units(self, device: torch.device) -> Tensor:
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

    # --- what is counted ----------------------------------------------------------------------------------------------

    def items(self, method: Method) -> Tensor:
        """What `reduction="mean"` counts in this batch: () int64."""
        if method.denominator == "tokens":
            return self.tokens(method).sum()
        if method.denominator == "local_tokens":
            return self.valid.any().long()
        return self.valid.sum()

    def tokens(self, method: Method) -> Tensor:
        """Scored tokens of each unit that counts, in the rows that the method reads: (U,)."""
        lengths = self.lengths[self.index]
        if self.layout == "pairwise":
            lengths = lengths[:, _columns(method.sides)]
        return lengths.sum(dim=1) * self.valid

    def weights(self, method: Method, fixed_length: int | None, dtype: torch.dtype) -> Tensor | None:
        """What each unit's (or each token's) loss is multiplied by before the sum over units: (U,), or None for 1."""
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
        """The scored tokens of a pair after its first min(len_w, len_l): (N,) bool."""
        before = self.scored.long().cumsum(0) - self.scored.long()
        rank = before - torch.cat([before, before.new_zeros(1)])[self.starts[self.rows]]
        shorter = self.lengths[self.index].amin(dim=1).repeat(2)  # pairs are halves
        return rank >= shorter[self.rows]

    # --- inputs of a method -------------------------------------------------------------------------------------------

    def of_units(self, rows: Tensor, units: Tensor | None) -> Tensor:
        """(R,) values of rows as (U, rows a unit), of the units given or all."""
        return rows[self.index if units is None else self.index[units]]

    def choose_pairs(self, scores: Tensor) -> None:
        """With `pairs`: which completion of a list is better than which, by scores (U, K)."""
        if scores.shape != self.index.shape:
            raise ValueError(
                f"{self.name}: scores must be a tensor {tuple(self.index.shape)}, got {tuple(scores.shape)}"
            )
        assert self.pairs is not None
        given, scores = scores, self.placed("scores", scores)
        mask = self.list_mask(None)
        finite = torch.where(mask, scores, 0.0).isfinite().all(dim=1)
        check_rows(
            finite,
            "finite scores",
            "give each completion of the list one, or drop it",
            scores=scores.sum(dim=1),
        )
        self._chosen = list_pairs(scores, mask, self.pairs)
        if any(m.unit == "batch" for m in self.methods):  # `counted_at` wants to know
            _, lengths, index, _ = self._home
            real = list_pairs(to_host(given), to_host(lengths[index] > 0), self.pairs)[2]
            self._pairs_at_home = real.flatten()

    def list_mask(self, units: Tensor | None) -> Tensor:
        """Which of a list's completions there are: (U, K) bool."""
        mask = self.of_units(self.lengths > 0, units)
        return mask[:, :-1] if self.has_rejected else mask

    def _pairs(self, units: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        winner, loser, real = self._chosen if units is None else tuple(x[units] for x in self._chosen)
        return winner, loser, real

    @property
    def counted(self) -> Tensor:
        """The units that count, or with `pairs` the pairs of all lists: bool."""
        return self._pairs(None)[2].flatten() if self.pairs else self.valid

    @property
    def counted_at(self) -> Tensor:
        """Indices of those that are counted."""
        counted = self._pairs_at_home if self.pairs else self._home[-1]
        return to_device(counted.nonzero().squeeze(1), self.device)

    def mean_of_pairs(
        self, losses: Tensor, metrics: dict[str, Tensor], units: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (U·C,) of pairs as means over each list's (U,); metrics NaN where there is no pair."""
        real = self._pairs(units)[2]
        total = torch.where(real, losses.view(real.shape), 0.0).sum(dim=1)
        metrics = {name: torch.where(real, x.view(real.shape), torch.nan) for name, x in metrics.items()}
        return total / real.sum(dim=1).clamp(min=1), metrics

    def inputs(self, prefix: str, rows: Tensor, units: Tensor | None, absent: float) -> dict[str, Tensor]:
        """(R,) values of rows by the names that methods know, "logp" → logp_w, logp_l; `absent` in units left out."""
        valid = self.valid if units is None else self.valid[units]
        values = self.of_units(rows, units)
        values = torch.where(valid[:, None], values, absent)
        if self.pairs:
            winner, loser, real = self._pairs(units)
            # Where there is no pair, numbers that every method takes.
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
        """x (n,), one value a position, as (U, T) rows; `absent` where a row has no position.

        positions (n,): where the values stand, None for all N of them. units: the rows wanted, None for all.
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
        """x (N,) as rows (U, T), of the pairs whose rejected rows are given."""
        wanted = torch.full((self.count,), -1, device=self.device)
        wanted[rows] = torch.arange(rows.shape[0], device=self.device)
        at = wanted[self.rows]  # −1, which is the last: all other rows' positions go into one that is dropped
        blank = torch.zeros((rows.shape[0] + 1, self.width), dtype=x.dtype, device=x.device)
        return blank.index_put((at, self.offsets), x)[:-1]

    # --- columns ------------------------------------------------------------------------------------------------------

    def check_columns(self, given: Mapping[str, Tensor | None], supplied: set[str]) -> dict[str, Tensor]:
        """The methods' inputs that come from the caller; ValueError for a missing, unknown or misshapen one.

        supplied: inputs that the objective has from elsewhere, if the caller does not give them.
        """
        takes = dict.fromkeys(n for m in self.methods for n in m.columns)
        needed = dict.fromkeys(n for m in self.methods for n in m.columns if n in m.required)
        if self.pairs:  # nothing else could be said of each pair
            takes = {
                n: None for m in self.methods for n in ("scores", *m.columns) if n == "scores" or m.axes(n) == ("",)
            }
            needed = {n: None for n in takes if n == "scores" or n in needed}
        unknown = sorted(set(given) - set(takes))
        missing = [n for n in needed if given.get(n) is None and n not in supplied]
        if unknown or missing:
            raise ValueError(
                f"{self.name}: "
                + "; ".join(f"{what} {', '.join(n)}" for what, n in (("missing", missing), ("unknown", unknown)) if n)
                + f". It takes the columns: {', '.join(takes) or 'none'}"
            )
        columns = {name: x for name, x in given.items() if x is not None}
        for name, x in columns.items():
            expected = self._column_shapes(name)
            if not isinstance(x, Tensor) or (expected and tuple(x.shape) not in expected):
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                shapes = " or ".join(dict.fromkeys(str(shape) for shape in expected))
                if expected == [(), ()]:
                    raise ValueError(f"{self.name}: {name} must be one number () for all units, got {got}")
                raise ValueError(f"{self.name}: {name} must be a tensor {shapes}, got {got}")
            columns[name] = self.placed(name, x)
        return columns

    def placed(self, name: str, x: Tensor) -> Tensor:
        """x where the call computes: it is there, or on the host as the targets are; else ValueError."""
        if x.device != self.device and not (self._from_host and on_host(x)):
            raise ValueError(f"{self.name}: {name} is on {x.device} and hidden on {self.device}: move one of them")
        return to_device(x, self.device)

    def _column_shapes(self, name: str) -> list[tuple[int, ...]]:
        method = next((m for m in self.methods if name in m.inputs), None)
        if method is None or self.pairs:
            return [(self.units, self.index.shape[1])] if name == "scores" else [(self.units,), ()]
        width = self.index.shape[1] - self.has_rejected
        sizes = {"": (), "U": (self.units,), "UK": (self.units, width), "UT": tuple(self.shape)}
        axes = method.axes(name)
        return [] if "II" in axes else [sizes[a] for a in axes] + [()]

    def per_token(self, name: str, x: Tensor) -> bool:
        """Whether a column has one entry a token; an (N,) one of as many packed rows as positions has one a row."""
        return "UT" in self.methods[0].axes(name) and x.dim() > 0 and (
            x.shape == self.shape and (x.shape != (self.units,) or "U" not in self.methods[0].axes(name))
        )  # fmt: skip

    def column(self, name: str, x: Tensor, units: Tensor | None) -> dict[str, Tensor]:
        """A caller's column as inputs of the units given; in units left out, a number that every method takes."""
        if self.pairs and name == "scores":
            return self.inputs("score", x.reshape(-1), units, 0.0)
        if x.dim() == 0:
            return {name: x}
        valid = self.valid
        if units is not None:
            x, valid = x[units], valid[units]
        if x.dim() == 1 and x.is_floating_point():
            x = torch.where(valid, x, HARMLESS.get(name, 0.0))
        return {name: x}

    def check_rows(self, name: str, values: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
        """`values` detached, if it is of one of the shapes; else ValueError."""
        if values.shape not in shapes:
            expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
            raise ValueError(f"{name} must be {expected}, got {tuple(values.shape)}")
        values = self.placed(name, values.detach())
        return values if values.dtype == torch.float64 else values.float()

    # --- tiles --------------------------------------------------------------------------------------------------------

    @cached_property
    def _by_unit(self) -> tuple[Tensor, list[list[int]]]:
        """The positions to score sorted by unit, and how many each row of each unit has."""
        # Positions of a row stand together, so that rows are all there is to sort.
        if self.static:  # every position, and only sizes are known
            at, sizes = torch.arange(self.rows.shape[0], device=self.device), self.row_sizes
            index = self._rows_of_units(torch.device("cpu"))
        else:
            at = (self.targets != self.ignore_index).nonzero().squeeze(1)
            rows, _, index, _ = self._home
            sizes = torch.bincount(rows[at], minlength=self.count).tolist()
        parts = at.split(sizes)
        by_unit = torch.cat([at[:0], *(parts[row] for row in index.flatten().tolist())])
        return to_device(by_unit, self.device), [[sizes[row] for row in unit] for unit in index.tolist()]

    @property
    def longest_unit(self) -> int:
        return max(map(sum, self._by_unit[1]), default=0)

    def groups(self, tile_tokens: int, vocab: int, *, by_token: bool) -> list[Group]:
        """Whole units packed into tiles, or tokens where each is a unit; ValueError for a bad target that can be read."""
        check_targets(self.targets, self.ignore_index, vocab)
        index, sizes = self._by_unit
        if not by_token:
            return pack(index, [sum(rows) for rows in sizes], tile_tokens)
        count = -(-index.shape[0] // tile_tokens)
        parts = index.tensor_split(count) if count else ()
        starts = itertools.accumulate((part.shape[0] for part in parts), initial=0)
        return [Group(part, (), start) for part, start in zip(parts, starts)]

    # --- offsets of rows ----------------------------------------------------------------------------------------------

    @cached_property
    def row_bounds(self) -> Tensor:
        """Offsets (R + 1,) of the rows among all positions."""
        return self._bounds(self.row_sizes)

    @cached_property
    def unit_bounds(self) -> Tensor:
        """Offsets (R + 1,) of the rows among the positions of all groups: the rows of a unit side by side."""
        return self._bounds([size for rows in self._by_unit[1] for size in rows])

    def _bounds(self, sizes: list[int]) -> Tensor:
        if len(set(sizes)) == 1:
            return sizes[0] * torch.arange(len(sizes) + 1, device=self.device)
        return to_device(torch.tensor([0, *itertools.accumulate(sizes)]), self.device)


def list_pairs(scores: Tensor, mask: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which of a list's completions are better than which: (winner (U, C), loser (U, C), real (U, C) bool).

    scores (U, K), higher is better; mask (U, K). how: "all" pairs, or the "extremes", the best against the worst.
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
