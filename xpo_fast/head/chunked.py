"""The loops over tiles that all backends but `dense` share.

A tile is the part of dz = ∂L/∂(product) that is in memory at once for the gradient GEMMs, (n, V). Its logits are
computed in steps: one of torch's GEMMs gives products in float32 (float64 for float64 operands), and the backend's row
operations turn them into statistics and into rows of the tile. On the CPU products and tile share memory, and a step is
a whole tile. On a device the tile has the dtype of the gradient GEMMs; with two lanes the products of a step are
computed while the row operations of the previous step run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gemms import Gemms, aligned_rows, logits_memory, on_huge_pages
from .operands import Operands
from .row_operations import MakeRowOperations, RowOperations, row_blocks
from .rows import Group
from .selected import Selected
from .spec import scored_positions, static_shapes, to_device
from .streams import Lanes
from .tiling import ROWS, Tiling, buffer_rows

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight, bias, adapter


class Span(NamedTuple):
    """The scored positions start … stop − 1, which make up a tile."""

    start: int
    stop: int
    with_dz: bool

    @property
    def slice(self) -> slice:
        """Returns the positions as a slice."""
        return slice(self.start, self.stop)


@dataclass
class Step:
    """The rows of a tile whose products are in memory."""

    tile: int  # index among the call's spans
    span: Span
    h: Tensor  # (n, D), of the whole tile
    dz: Tensor | None  # (n, V), of the whole tile; None if ∂L/∂(product) is not computed
    at: slice  # the step's rows among all scored positions
    z: Tensor  # (r, V) products
    z_ref: Tensor | None  # (r, V) the reference's products
    made: Any  # event after z and z_ref were computed
    done: Any = None  # event after they were used

    @property
    def last(self) -> bool:
        """Returns whether this is the last step of its tile."""
        return self.at.stop == self.span.stop

    @property
    def own_dz(self) -> Tensor | None:
        """Returns the step's rows of dz, (r, V)."""
        start = self.span.start
        return None if self.dz is None else self.dz[self.at.start - start : self.at.stop - start]


def cut(start: int, stop: int, most: int, block: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of consecutive parts of at most `most` each, as equal as possible.

    Where `most` is a multiple of `block`, so is the size of every part but the last.
    """
    count = -(-(stop - start) // most)
    if most % block or block == 1:
        bounds = [start + k * (stop - start) // count for k in range(count)]
    else:
        bounds = list(range(start, stop, -(-(stop - start) // (count * block)) * block)) if count else []
    yield from zip(bounds, [*bounds[1:], stop])


class Passes:
    """The tiles of one call: their positions, memory and streams.

    scored: (n,) the positions to score, in order; by default all whose target is not ignored.
    """

    def __init__(
        self,
        operands: Operands,  # flat
        tiling: Tiling,
        operations: MakeRowOperations,
        scored: Tensor | None = None,
    ) -> None:
        hidden, targets, ignore_index = operands.hidden, operands.targets, operands.ignore_index
        self.hidden, self.ref = hidden, operands.ref
        self.gemms = Gemms(operands.weight, operands.bias, operands.scaling, operands.adapter)
        self.ref_gemms = None if self.ref is None else Gemms(self.ref.weight, self.ref.bias, operands.scaling)
        self.operations = operations(self.gemms, self.ref_gemms)
        device = hidden.device
        if scored is None:
            scored = scored_positions(targets, ignore_index, self.operations.vocab, device)
        self.index = scored
        self.y = to_device(targets, device)[scored]
        self.ignored = None
        if static_shapes(targets):
            self.ignored = self.y == ignore_index
            self.y.masked_fill_(self.ignored, 0)
        self.tiling = tiling
        self.block = 1 if device.type == "cpu" else ROWS
        two_lanes = tiling.lanes == 2 and self.operations.own_memory and len(self) > tiling.step
        self.lanes = Lanes(device, two_lanes)
        self._multiplied: Any = None  # event after the gradient GEMMs of the previous tile read dz

    def __len__(self) -> int:
        return self.index.shape[0]

    @property
    def early_grad_dtype(self) -> torch.dtype:
        """Returns the dtype of gradients computed in the forward: float32 for float16, where small ones underflow.

        The loss scale, which prevents that, is applied in the backward only.
        """
        return self.gemms.dtype if self.hidden.dtype == torch.float16 else self.hidden.dtype

    def selected(self, operands: Operands) -> Selected | None:
        """Returns the operands' selected ids at the scored positions; None if there are none."""
        if operands.selected is None:
            return None
        return Selected(operands.selected, self.index, self.ignored, self.gemms, operands.shard)

    def spans(self, with_dz: bool, start: int = 0, stop: int | None = None) -> list[Span]:
        """Returns the tiles of the scored positions start … stop − 1, by default of all."""
        stop = len(self) if stop is None else stop
        return [Span(a, b, with_dz) for a, b in cut(start, stop, self.tiling.tile, self.block)]

    def steps(self, spans: Sequence[Span]) -> Iterator[Step]:
        """Yields the steps of the tiles in order; with two lanes the next step's products are already being computed.

        The caller must enqueue all work on a step, in `rows` and `gradient`, before it asks for the next step.
        """
        work = [
            (k, span, slice(a, b))
            for k, span in enumerate(spans)
            for a, b in cut(span.start, span.stop, self.tiling.step, self.block)
        ]
        rows = max((at.stop - at.start for *_, at in work), default=0)
        longest = max((span.stop - span.start for span in spans if span.with_dz), default=0)
        if rows and self.hidden.device.type != "cpu":
            rows, longest = buffer_rows(rows, self.tiling.step), longest and buffer_rows(longest, self.tiling.tile)
        gemms = [x for x in (self.gemms, self.ref_gemms) if x is not None]
        count = min(self.lanes.ahead, len(work))
        with ExitStack() as stack:
            with self._explaining_out_of_memory():
                buffers = [[stack.enter_context(logits_memory(rows, x)) for x in gemms] for _ in range(count)]
                memory = None
                if self.operations.own_memory and longest:
                    dtype = self.gemms.gemm_dtype
                    memory = aligned_rows(longest, self.gemms.vocab, dtype, self.hidden.device)
            stack.callback(self.lanes.join)  # before the memory is freed
            steps: deque[Step] = deque()
            h, h_tile, used = None, -1, None
            for k, (tile, span, at) in enumerate(work):
                if used is not None:
                    self.lanes.wait(used.done)
                if tile != h_tile or h is None:
                    h, h_tile = self.gathered(span.slice), tile
                z, *z_ref = (x[: at.stop - at.start] for x in buffers[k % count])
                self.gemms.logits(h[at.start - span.start : at.stop - span.start], z)
                if self.ref is not None and self.ref_gemms is not None:
                    self.ref_gemms.logits(self._rows(self.ref_gemms, self.ref.hidden, at), *z_ref)
                dz = None
                if span.with_dz:
                    dz = z if memory is None else memory[: span.stop - span.start]
                steps.append(Step(tile, span, h, dz, at, z, *(z_ref or [None]), made=self.lanes.mark()))
                if len(steps) == count:
                    used = steps.popleft()
                    yield used
            yield from steps

    @contextmanager
    def _explaining_out_of_memory(self) -> Iterator[None]:
        """Adds the tile's size, and the options that shrink it, to an out-of-memory error."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.add_note(
                f"xpo_fast was at work on a tile of {self.tiling.tile} tokens x {self.gemms.vocab}, of which "
                f"{self.tiling.step} are logits at once: pass a smaller tile_bytes= or chunk_tokens="
            )
            raise

    def gathered(self, at: slice) -> Tensor:
        """Returns the hidden states (n, D) of scored positions, in the dtype of the GEMMs."""
        return self._rows(self.gemms, self.hidden, at)

    def _rows(self, gemms: Gemms, hidden: Tensor, at: slice) -> Tensor:
        """Returns the policy's or the reference's hidden states (n, D) of scored positions."""
        return gemms.rows(hidden, self.index[at], None if self.ignored is None else self.ignored[at])

    @contextmanager
    def rows(self, step: Step) -> Iterator[None]:
        """Provides the stream on which the step's row operations are to be enqueued, for a `with` block."""
        with self.lanes.other(), self._explaining_out_of_memory():
            self.lanes.wait(step.made)
            self.lanes.wait(self._multiplied)
            yield
            step.done = self.lanes.mark()

    @contextmanager
    def gradient(self, step: Step) -> Iterator[Tensor]:
        """Yields the dz (n, V) of the tile that this step ends, for the gradient GEMMs in a `with` block."""
        assert step.last and step.dz is not None
        self.lanes.wait(step.done)
        with self._explaining_out_of_memory():
            yield step.dz
        self._multiplied = self.lanes.mark()

    def statistics(self, step: Step, outputs: Sequence[str], found: Tensor, factor: Tensor | None) -> None:
        """Writes a step's columns of found (2 + len(outputs), n) and, if dz is computed, its entries of factor (n,).

        See `RowOperations.statistics`.
        """
        at, dz = step.at, step.own_dz
        own = None if dz is None or factor is None else factor[at]
        self.operations.statistics(step.z, step.z_ref, self.y[at], outputs, found[:, at], dz, own)

    def spread(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logp (N,), lse (N,) and the other statistics (E, N) from found (2 + E, n), 0 where not scored."""
        spread = found.new_zeros((found.shape[0], self.hidden.shape[0]))
        spread.index_copy_(1, self.index, self.masked(found))
        return spread[0].clone(), spread[1].clone(), spread[2:].clone()

    def masked(self, x: Tensor, at: slice = slice(None)) -> Tensor:
        """Writes 0 into x (…, n) at ignored positions, which are among the scored ones under CUDA graph capture."""
        return x if self.ignored is None else x.masked_fill_(self.ignored[at], 0)


def final_logits(
    operands: Operands,
    index: Tensor,  # (n,) positions
    tile_tokens: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields tile by tile the positions (n,) and their final logits (n, V), whose memory the next tile reuses."""
    gemms = Gemms(operands.weight, operands.bias, operands.scaling)
    parts = list(cut(0, index.shape[0], tile_tokens))
    with logits_memory(max((b - a for a, b in parts), default=0), gemms) as memory:
        for a, b in parts:
            z = gemms.logits(gemms.rows(operands.hidden, index[a:b]), memory[: b - a])
            for block in row_blocks(z):
                gemms.finish(z[block])
            yield index[a:b], z


def forward(
    operands: Operands,  # flat
    outputs: Sequence[str],
    tiling: Tiling,
    save_grad: bool,
    operations: MakeRowOperations = RowOperations,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logp (N,), lse (N,), the other outputs (E, N), and ∂logp/∂hidden: (N, D), or (0, D) if not saved.

    The other outputs are followed by the log-probs of the selected ids, (E + K, N) in all. Costs 1F, one more F to save
    the gradient, one more for a reference. top1 is returned as 0 and 1.
    """
    hidden = operands.hidden
    passes = Passes(operands, tiling, operations)
    selected = passes.selected(operands)
    own, k = 2 + len(outputs), 0 if selected is None else selected.count
    found = torch.empty((own + k, len(passes)), dtype=passes.gemms.dtype, device=hidden.device)
    dlogp = torch.zeros(hidden.shape if save_grad else (0, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    if (
        selected is None
        and not save_grad
        and passes.operations.fused(lambda: passes.gathered(slice(None)), passes.y, outputs, found)
    ):
        return *passes.spread(found), dlogp
    factor = torch.empty_like(found[0]) if save_grad else None
    for step in passes.steps(passes.spans(save_grad)):
        with passes.rows(step):
            if selected is not None:
                found[own:, step.at] = selected.logits(step.z, step.at).T
            passes.statistics(step, outputs, found[:own], factor)
        if factor is not None and step.last:
            with passes.gradient(step) as dz:
                d_hidden = _times(passes.gemms.into_hidden(dz), factor[step.span.slice], hidden.dtype)
                dlogp.index_copy_(0, passes.index[step.span.slice], d_hidden)
    if selected is not None:
        selected.over_ranks(found[own:]).sub_(found[1])
    return *passes.spread(found), dlogp


def backward(
    operands: Operands,  # flat
    tiling: Tiling,
    upstream: Mapping[str, Tensor],  # name of a differentiable output → (N,) ∂L/∂output
    values: Mapping[str, Tensor],  # entropy and reverse_kl (N,), where upstream has them
    needs: Sequence[bool],  # hidden, weight, bias, adapter
    operations: MakeRowOperations = RowOperations,
    d_selected: Tensor | None = None,  # (K, N) ∂L/∂(log-probs of the selected ids)
) -> Grads:
    """Returns gradients by recomputing each tile: 1F, and 1F each for hidden, for weight and for a reference.

    Here and in `unit_gradients` all gradients but that of hidden may be in the accumulation dtype.
    """
    hidden = operands.hidden
    passes = Passes(operands, tiling, operations)
    u = {name: passes.masked(x[passes.index].to(passes.gemms.dtype)) for name, x in upstream.items()}
    v = {name: x[passes.index] for name, x in values.items()}
    selected = None if d_selected is None else passes.selected(operands)
    if d_selected is not None:
        d_selected = passes.masked(d_selected[:, passes.index].to(passes.gemms.dtype))
        u["lse"] = u.get("lse", 0) - d_selected.sum(dim=0)
    spans = passes.spans(True)
    grads = Gradients(passes, spans, needs, hidden.dtype, operands.weight_grad)
    logp_alone = set(u) == {"logp"}
    found = torch.empty((2, len(passes)), dtype=passes.gemms.dtype, device=hidden.device)
    factor = torch.empty_like(found[0])
    for step in passes.steps(spans):
        with passes.rows(step):
            own_u, own_v = ({name: x[step.at] for name, x in some.items()} for some in (u, v))
            dz = step.own_dz
            assert dz is not None
            z_selected = None if selected is None else selected.logits(step.z, step.at)
            if logp_alone:
                passes.statistics(step, (), found, factor)
                factor[step.at].mul_(own_u["logp"])
            else:
                passes.operations.gradient(step.z, step.z_ref, passes.y[step.at], own_u, own_v, dz)
            if selected is not None and z_selected is not None and d_selected is not None:
                selected.add_gradient(dz, z_selected, d_selected[:, step.at].T, step.at)
        if step.last:
            grads.add(step, factor[step.span.slice] if logp_alone else None)
    return grads.finished()


class Gradients:
    """The gradients of a call, summed over its tiles.

    dH has `dtype`. dW, db and dB have the accumulation dtype; dW of a single tile may have that of the GEMMs instead.
    weight_grad: a buffer to which dW is added; `finished` then returns None for it.
    """

    def __init__(
        self,
        passes: Passes,
        spans: Sequence[Span],
        needs: Sequence[bool],  # hidden, weight, bias, adapter
        dtype: torch.dtype,
        weight_grad: Tensor | None = None,
    ) -> None:
        self.passes, self.gemms, self.dtype = passes, passes.gemms, dtype
        self.hidden = torch.zeros_like(passes.hidden, dtype=dtype) if needs[0] else None
        self.adds = weight_grad is not None
        self.weight = weight_grad
        if needs[1] and not self.adds:
            tiles = sum(span.with_dz for span in spans)
            narrow = tiles == 1 and dtype == self.gemms.gemm_dtype
            memory = torch.empty_like(self.gemms.weight, dtype=dtype if narrow else self.gemms.dtype)
            self.weight = on_huge_pages(memory)
        self.bias = torch.zeros_like(self.gemms.weight[:, 0], dtype=self.gemms.dtype) if needs[2] else None
        self.adapter, adapter = None, self.gemms.adapter
        if adapter is not None and needs[3]:
            self.adapter = torch.zeros_like(adapter, dtype=self.gemms.dtype)
        self.first = not self.adds

    def add(self, step: Step, factor: Tensor | None) -> None:
        """Adds the tile that this step ends. factor (n,): multiplies the rows of dz, if given."""
        with self.passes.gradient(step) as dz:
            if self.hidden is not None:
                d_hidden = _times(self.gemms.into_hidden(dz), factor, self.dtype)
                self.hidden.index_copy_(0, self.passes.index[step.span.slice], d_hidden)
                del d_hidden  # before the next GEMM allocates
            h, x = self.gemms.parts(step.h)
            if self.weight is not None:
                self.gemms.into_weight(dz, _times(h, factor, h.dtype), self.weight, self.first)
            if self.adapter is not None:
                self.gemms.into_weight(dz, _times(x, factor, x.dtype), self.adapter, first=False)
            if self.bias is not None:
                self.gemms.into_bias(dz, factor, self.bias)
        self.first = False

    def finished(self) -> Grads:
        """Returns the gradients of hidden, weight, bias and adapter, None for those that were not wanted."""
        if self.weight is not None and self.first:
            self.weight.zero_()
        return self.hidden, None if self.adds else self.weight, self.bias, self.adapter


def _times(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns x (n, D) · factor (n,) in `dtype`, rounding on the fly rather than through a wider copy."""
    if factor is None:
        return x.to(dtype)
    if x.dtype == torch.promote_types(x.dtype, factor.dtype) == dtype:
        return x * factor.unsqueeze(1)
    return torch.mul(x, factor.unsqueeze(1), out=torch.empty_like(x, dtype=dtype))


def unit_gradients(
    operands: Operands,  # flat
    groups: Sequence[Group],
    tiling: Tiling,
    coefficients: Callable[[Tensor, Group], Tensor],
    needs: Sequence[bool],  # hidden, weight, bias, adapter
    operations: MakeRowOperations = RowOperations,
) -> tuple[Tensor, Grads]:
    """Returns logp (N,) and the gradients of a loss that is a sum over units, evaluated while their tile is live.

    groups: the scored positions in order. Once a group is scored, coefficients(logp (n,), group) returns u = ∂L/∂logp
    (n,), by which the rows of dz are scaled. A group that fits one tile costs 3F. Of a longer group all tiles but the
    last are computed again: 4F.
    """
    hidden, targets = operands.hidden, operands.targets
    order = torch.cat([group.positions for group in groups]) if groups else targets.new_empty(0, device=hidden.device)
    passes = Passes(operands, tiling, operations, order)
    spans: list[Span] = []
    complete: dict[int, tuple[slice, Group]] = {}  # tile that ends a group
    for group in groups:
        at = slice(group.start, group.start + group.positions.shape[0])
        # Only the last tile is computed once, so it is as large as a tile can be.
        full = max(at.start, at.stop - tiling.tile)
        before, last = passes.spans(True, at.start, full), Span(full, at.stop, True)
        spans += (span._replace(with_dz=False) for span in before)
        complete[len(spans)] = at, group
        spans += (last, *before)
    found = torch.empty((2, len(passes)), dtype=passes.gemms.dtype, device=hidden.device)  # logp, lse
    u, factor = torch.empty_like(found[0]), torch.empty_like(found[0])
    grads = Gradients(passes, spans, needs, passes.early_grad_dtype, operands.weight_grad)

    for step in passes.steps(spans):
        with passes.rows(step):
            passes.statistics(step, (), found, factor)
            if step.last and step.tile in complete:
                at, group = complete[step.tile]
                logp = passes.masked(found[0, at], at)
                u[at] = coefficients(logp, group)
                passes.masked(u[at], at)
            if step.last and step.span.with_dz:
                factor[step.span.slice].mul_(u[step.span.slice])
        if step.last and step.span.with_dz:
            grads.add(step, factor[step.span.slice])
    logp = found.new_zeros(targets.shape).index_copy_(0, passes.index, passes.masked(found)[0])
    return logp, grads.finished()
