"""One tile of logits at a time: the loops that every backend but `dense` shares, and the row operations of `torch`.

A tile is (tile_tokens, V) logits in float32 (float64 for float64 operands), made by one GEMM of torch's. The row
operations turn it into statistics and into dz = ∂L/∂(product), which goes into the gradient GEMMs, and the tile is used
again. They are what backends differ in. Here they are torch's, in place, over blocks of a few rows that stay in cache
between passes, so that memory is crossed once.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .spec import Scaling, accumulation_dtype, scored_positions

# Bytes of the blocks that row operations and weight conversions work on: small enough to stay in a core's cache.
_BLOCK_BYTES = 2 * 2**20


class _Bf16Products:
    """Lets oneDNN multiply float32 operands as bf16, accumulating and returning float32, in a `with` block.

    Exact for operands that are bf16 values already, and the only way to bf16 GEMMs with float32 results on CPU,
    where torch.mm has no out_dtype. The setting is the process's: it is turned on for single GEMMs, and put back by
    the last of the threads that use it.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, "none"
        self._setting: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._setting.fp32_precision
                self._setting.fp32_precision = "bf16"
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._setting.fp32_precision = self._before


_bf16_products = _Bf16Products()


class _Head:
    """The GEMMs of one head, and what its forward does to logits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> None:
        self.weight, self.scaling = weight, scaling
        self.vocab, self.width = weight.shape
        self.dtype = accumulation_dtype(weight.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.narrow = weight.dtype != self.dtype
        # torch.mm has no float32 result for narrow operands on CPU: widen the weight there, a block at a time.
        self.widen = self.narrow and weight.device.type != "cuda"
        self.gemm_dtype = self.dtype if self.widen else weight.dtype  # of the operands of the GEMMs
        self._wide = None
        self._products = _bf16_products if self.widen and weight.dtype == torch.bfloat16 else nullcontext()

    def rows(self, hidden: Tensor, index: Tensor) -> Tensor:
        """hidden[index] (n, D), in the dtype that the GEMMs take."""
        h = hidden.index_select(0, index)
        return h.to(self.dtype) if self.widen else h

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if not self.widen:
            yield slice(0, self.vocab), self.weight
            return
        size = max(1, min(self.vocab, _BLOCK_BYTES // (self.width * self.dtype.itemsize)))
        if self._wide is None:
            self._wide = self.weight.new_empty((size, self.width), dtype=self.dtype)
        for start in range(0, self.vocab, size):
            block = slice(start, min(start + size, self.vocab))
            yield block, self._wide[: block.stop - start].copy_(self.weight[block])

    def logits(self, h: Tensor, out: Tensor) -> Tensor:
        """h Wᵀ into out (n, V): 1F. `finish` makes them final."""
        for block, weight in self._weight_blocks():
            if self.narrow and not self.widen:
                torch.mm(h, weight.T, out_dtype=self.dtype, out=out)
            else:
                with self._products:
                    torch.mm(h, weight.T, out=out[:, block])
        return out

    def into_hidden(self, dz: Tensor) -> Tensor:
        """dz W (n, D), 1F, in the accumulation dtype."""
        if self.narrow and not self.widen:
            return torch.mm(dz.to(self.gemm_dtype), self.weight, out_dtype=self.dtype)
        out = dz.new_empty((dz.shape[0], self.width))
        for block, weight in self._weight_blocks():
            with self._products:
                torch.addmm(out, dz[:, block], weight, beta=0 if block.start == 0 else 1, out=out)
        return out

    def into_weight(self, dz: Tensor, h: Tensor, out: Tensor, first: bool) -> None:
        """out (V, D) = or += dzᵀ h, 1F, in the accumulation dtype."""
        beta = 0 if first else 1
        if self.narrow and not self.widen:
            torch.addmm(out, dz.to(self.gemm_dtype).T, h, beta=beta, out_dtype=self.dtype, out=out)
        else:
            with self._products:
                torch.addmm(out, dz.T, h, beta=beta, out=out)

    def finish(self, z: Tensor) -> None:
        """Products to final logits, in place."""
        s = self.scaling
        if self.bias is not None:
            z.add_(self.bias)
        if s.softcap is not None:
            z.mul_(s.logit_scale / s.softcap).tanh_().mul_(s.softcap / s.temperature)
        elif s.gain != 1:
            z.mul_(s.gain)

    def logits_of(self, p: Tensor, y: Tensor, logp: Tensor, lse: Tensor) -> Tensor:
        """The final logits back from probabilities, where a softcap bounds them; p (r, V), the others (r,)."""
        ceiling = self.scaling.ceiling
        assert ceiling is not None
        z = p.log().add_(lse.unsqueeze(1)).clamp_(-ceiling, ceiling)
        return z.scatter_(1, y.unsqueeze(1), (logp + lse).unsqueeze(1))

    def unfinish(self, dz: Tensor, z: Tensor | None) -> None:
        """∂L/∂z to ∂L/∂(product), in place; z: the final logits, needed with a softcap."""
        ceiling = self.scaling.ceiling
        if ceiling is not None:
            assert z is not None
            dz.mul_(z.div(ceiling).square_().neg_().add_(1))
        if self.scaling.gain != 1:
            dz.mul_(self.scaling.gain)


def _row_blocks(tile: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_BYTES // (tile.shape[1] * tile.dtype.itemsize))
    for start in range(0, tile.shape[0], rows):
        yield slice(start, min(start + rows, tile.shape[0]))


def _softmax_(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (r, V) to probabilities in place, up to a factor a row that is close to 1.

    Returns the largest logit (r,), log Σ e^(z − largest) (r,), and the sum that each row came to (r,), by which its
    entries, or what multiplies them later, are to be divided. torch's own softmax adds the row up one by one, which is
    off by 2e-5 at a vocabulary of 128k; its `sum` is accurate.
    """
    largest = z.amax(dim=1)
    if z.device.type == "cpu":
        # The CPU kernel reads an element before it writes it, so it may write where it reads.
        torch.softmax(z, dim=1, out=z)
        total = z.sum(dim=1)
        return largest, total.log().sub_(z.amax(dim=1).log_()), total
    z.sub_(largest.unsqueeze(1)).exp_()
    total = z.sum(dim=1)
    return largest, total.log(), total


def _add_at(rows: Tensor, y: Tensor, x: Tensor) -> None:
    """rows[i, y[i]] += x[i]."""
    rows.scatter_add_(1, y.unsqueeze(1), x.unsqueeze(1))


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Σ p·x a row, x overwritten; 0·∞ = 0 for tokens that a bias of −∞ rules out."""
    return x.masked_fill_(p == 0, 0).mul_(p).sum(dim=1)


def _tiles(index: Tensor, tile_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Equal tiles of at most tile_tokens positions."""
    count = -(-index.shape[0] // tile_tokens)
    for k in range(count):
        part = slice(k * index.shape[0] // count, (k + 1) * index.shape[0] // count)
        yield part, index[part]


def _on_huge_pages(memory: Tensor) -> Tensor:
    """The tensor, its untouched CPU memory backed by huge pages where Linux has them.

    A GEMM that meets fresh pages of 4 KiB out of order takes a fifth longer than one into used memory; fresh huge pages
    cost it nothing. NumPy asks for them in the same way.
    """
    if memory.device.type == "cpu" and sys.platform == "linux":
        first = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = memory.data_ptr() + memory.numel() * memory.itemsize - first
        if size > 0:
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return memory


# The tiles of the last call on CPU, as bytes. Touching fresh memory costs page faults, 7% of the two GEMMs of a small
# head; a tile that has been used costs nothing.
_used_tiles: list[Tensor] = []
_KEEP_TILES, _KEEP_BYTES = 2, 256 * 2**20


def release_tiles() -> None:
    """Give back the memory that is kept for the next call on CPU, 256 MiB a tile at most."""
    _used_tiles.clear()


@contextmanager
def _tile(rows: int, head: _Head) -> Iterator[Tensor]:
    """Memory for (rows, V) logits, with anything in it."""
    shape, device = (rows, head.vocab), head.weight.device
    if device.type != "cpu":
        yield torch.empty(shape, dtype=head.dtype, device=device)
        return
    size = rows * head.vocab * head.dtype.itemsize
    try:
        memory = _used_tiles.pop()
    except IndexError:
        memory = torch.empty(0, dtype=torch.uint8)
    if memory.numel() < size:
        del memory  # before its successor is allocated
        memory = _on_huge_pages(torch.empty(size, dtype=torch.uint8))
    try:
        yield memory[:size].view(head.dtype).view(shape)
    finally:
        if len(_used_tiles) < _KEEP_TILES and memory.numel() <= _KEEP_BYTES:
            _used_tiles.append(memory)


Reference = tuple[Tensor, Tensor, "Tensor | None"]  # hidden (N, Dr), weight (V, Dr), bias (V,)


class RowOperations:
    """What happens to the rows of one tile between its GEMMs; other backends have their own.

    z: (n, V) the products h Wᵀ, overwritten, and so is z_ref, the reference's. y: (n,) the targets. dz is ∂L/∂(product),
    (n, V), in the dtype of the tile or of the GEMMs; it may lie in the memory of z.
    """

    def __init__(self, head: _Head, ref_head: _Head | None = None) -> None:
        self.head, self.ref_head = head, ref_head

    def statistics(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        outputs: Sequence[str],
        rows: Tensor,  # (2 + len(outputs), n) written: logp, lse, outputs
        with_dz: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """dz of Σ logp, if wanted, up to a factor a row, by which whatever it is multiplied into is to be divided."""
        total = torch.empty_like(rows[0])
        for b in _row_blocks(z):
            p = z[b]
            self.head.finish(p)
            keep = p.clone() if outputs or (with_dz and self.head.scaling.softcap is not None) else None
            z_y = p.gather(1, y[b].unsqueeze(1)).squeeze(1)
            largest, log_total, total[b] = _softmax_(p)
            rows[0, b] = z_y.sub_(largest).sub_(log_total)
            rows[1, b] = largest + log_total
            if outputs:
                assert keep is not None
                p.div_(total[b].unsqueeze(1))
                total[b] = 1
                q = None
                if z_ref is not None:
                    assert self.ref_head is not None
                    q = z_ref[b]
                    self.ref_head.finish(q)
                _statistics(rows[2:, b], outputs, p, keep, q, largest, log_total, rows[0, b])
            if with_dz:
                _add_at(p, y[b], -total[b])
                self.head.unfinish(p, keep)
        return z, -total if with_dz else None

    def gradient(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        u: dict[str, Tensor],  # name of a differentiable output → (n,) ∂L/∂output
        v: dict[str, Tensor],  # entropy and reverse_kl (n,), where u has them
    ) -> Tensor:
        """dz of any function of the differentiable outputs."""
        extra = set(u) - {"logp", "lse"}
        for b in _row_blocks(z):
            p = z[b]
            self.head.finish(p)
            keep = p.clone() if extra or self.head.scaling.softcap is not None else None
            largest, log_total, total = _softmax_(p)
            factor = p.new_zeros(p.shape[0])
            if "logp" in u:
                factor -= u["logp"][b]
            if "lse" in u:
                factor += u["lse"][b]
            if extra:
                assert keep is not None
                log_p = keep - (largest + log_total).unsqueeze(1)
                p.div_(total.unsqueeze(1))
                _extra_dz_(p, factor, log_p, None if z_ref is None else z_ref[b], self.ref_head, u, v, b)
            else:
                p.mul_(factor.div_(total).unsqueeze(1))
            if "logp" in u:
                _add_at(p, y[b], u["logp"][b])
            self.head.unfinish(p, keep)
        return z

    def scores(self, z: Tensor, y: Tensor, logp: Tensor) -> tuple[Tensor, ...]:
        """Writes logp (n,); returns what `unit_gradient` will want beside the tile, (n,) each."""
        lse, total = torch.empty((2, *logp.shape), dtype=logp.dtype, device=logp.device)
        for b in _row_blocks(z):
            self.head.finish(z[b])
            z_y = z[b].gather(1, y[b].unsqueeze(1)).squeeze(1)
            largest, log_total, total[b] = _softmax_(z[b])
            logp[b] = z_y.sub_(largest).sub_(log_total)
            lse[b] = largest + log_total
        return logp, lse, total

    def unit_gradient(
        self, z: Tensor, y: Tensor, u: Tensor, known: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """dz of Σ u·logp of a tile as `scores` left it, with what it returned; u (n,).

        Or dz up to a factor a row, (n,), and the factor: h and dH are smaller than the tile to multiply it into.
        """
        logp, lse, total = known
        softcap = self.head.scaling.softcap is not None
        if not softcap and not self.head.narrow:  # a narrow h would be rounded once more
            _add_at(z, y, -total)
            return z, (-u / total).mul_(self.head.scaling.gain)
        for b in _row_blocks(z):
            keep = None
            if softcap:
                keep = self.head.logits_of(z[b].div_(total[b].unsqueeze(1)), y[b], logp[b], lse[b])
                total[b] = 1
            z[b].mul_((-u[b] / total[b]).unsqueeze(1))
            _add_at(z[b], y[b], u[b])
            self.head.unfinish(z[b], keep)
        return z, None


MakeRowOperations = Callable[..., RowOperations]  # (head, reference's head or None)


def _products(
    head: _Head,
    hidden: Tensor,
    ref_head: _Head | None,
    ref: Reference | None,
    index: Tensor,
    tile_tokens: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Tile by tile: its positions (n,), hidden states (n, D), products h Wᵀ (n, V), and the reference's (n, V)."""
    rows = min(tile_tokens, index.shape[0])
    with ExitStack() as stack:
        tile = stack.enter_context(_tile(rows, head))
        ref_tile = None if ref_head is None else stack.enter_context(_tile(rows, ref_head))
        for _, part in _tiles(index, tile_tokens):
            h = head.rows(hidden, part)
            z_ref = None
            if ref is not None and ref_head is not None and ref_tile is not None:
                z_ref = ref_head.logits(ref_head.rows(ref[0], part), ref_tile[: part.shape[0]])
            yield part, h, head.logits(h, tile[: part.shape[0]]), z_ref


def final_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    scaling: Scaling,
    index: Tensor,  # (n,) positions
    tile_tokens: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tile by tile: its positions (n,) and their final logits (n, V), to be used before the next tile is asked for."""
    head = _Head(weight, bias, scaling)
    for part, _, z, _ in _products(head, hidden, None, None, index, tile_tokens):
        for b in _row_blocks(z):
            head.finish(z[b])
        yield part, z


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    ref: Reference | None,
    scaling: Scaling,
    ignore_index: int,
    outputs: Sequence[str],
    tile_tokens: int,
    save_grad: bool,
    operations: MakeRowOperations = RowOperations,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp (N,), lse (N,), the other outputs (len(outputs), N), and ∂logp/∂hidden (N, D), or (0, D) if not saved.

    1F, one more to save the gradient, one more for a reference. top1 comes as 0 and 1.
    """
    head = _Head(weight, bias, scaling)
    ref_head = None if ref is None else _Head(ref[1], ref[2], scaling)
    row_operations = operations(head, ref_head)
    index = scored_positions(targets, ignore_index, head.vocab)
    found = torch.zeros((2 + len(outputs), targets.shape[0]), dtype=head.dtype, device=hidden.device)
    dlogp = torch.zeros(
        hidden.shape if save_grad else (0, head.width), dtype=hidden.dtype, device=hidden.device
    )

    for part, _, z, z_ref in _products(head, hidden, ref_head, ref, index, tile_tokens):
        rows = torch.empty((found.shape[0], part.shape[0]), dtype=head.dtype, device=hidden.device)
        dz, divisor = row_operations.statistics(z, z_ref, targets[part], outputs, rows, save_grad)
        found[:, part] = rows
        if save_grad:
            d_hidden = head.into_hidden(dz)
            if divisor is not None:
                d_hidden.div_(divisor.unsqueeze(1))
            dlogp[part] = d_hidden.to(hidden.dtype)
    return found[0].clone(), found[1].clone(), found[2:].clone(), dlogp


def _statistics(
    rows: Tensor,  # (len(outputs), r) written
    outputs: Sequence[str],
    p: Tensor,  # (r, V) probabilities
    z: Tensor,  # (r, V) final logits
    z_ref: Tensor | None,  # (r, V) the reference's final logits, overwritten
    largest: Tensor,  # (r,)
    log_total: Tensor,  # (r,)
    logp: Tensor,  # (r,)
) -> None:
    log_ratio = q = None
    if z_ref is not None:
        log_ratio = z_ref - z
        ref_largest, ref_log_total, ref_total = _softmax_(z_ref)
        q = z_ref.div_(ref_total.unsqueeze(1))
        shift = (ref_largest + ref_log_total) - (largest + log_total)
        log_ratio.sub_(shift.unsqueeze(1))  # log q − log p
    for row, name in zip(rows, outputs, strict=True):
        if name == "entropy":
            row.copy_(log_total - _expectation(p, z - largest.unsqueeze(1)))
        elif name == "kl":
            assert log_ratio is not None and q is not None
            row.copy_(_expectation(q, log_ratio.clone()))
        elif name == "reverse_kl":
            assert log_ratio is not None
            row.copy_(_expectation(p, -log_ratio))
        elif name == "log_sum_sq_probs":
            row.copy_(p.square().sum(dim=1).log_())
        elif name == "mean_logit":
            row.copy_(z.mean(dim=1))
        else:
            assert name == "top1", name
            row.copy_(logp >= -log_total)


def backward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    ref: Reference | None,
    scaling: Scaling,
    ignore_index: int,
    tile_tokens: int,
    upstream: dict[str, Tensor],  # name of a differentiable output → (N,) ∂L/∂output
    values: dict[str, Tensor],  # entropy and reverse_kl (N,), where upstream has them
    needs: tuple[bool, bool, bool],  # hidden, weight, bias
    operations: MakeRowOperations = RowOperations,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by recomputing each tile: 1F, and 1F for hidden, 1F for weight, 1F for a reference."""
    head = _Head(weight, bias, scaling)
    ref_head = None if ref is None else _Head(ref[1], ref[2], scaling)
    row_operations = operations(head, ref_head)
    index = scored_positions(targets, ignore_index, head.vocab)
    grads = _Gradients(head, hidden, needs, hidden.dtype)

    for part, h, z, z_ref in _products(head, hidden, ref_head, ref, index, tile_tokens):
        u = {name: x[part].to(head.dtype) for name, x in upstream.items()}
        v = {name: x[part] for name, x in values.items()}
        grads.add(row_operations.gradient(z, z_ref, targets[part], u, v), h, part)
    return grads.finished()


def _extra_dz_(
    p: Tensor,  # (r, V) probabilities, turned into dz
    factor: Tensor,  # (r,) what multiplies p so far
    log_p: Tensor,  # (r, V) overwritten
    z_ref: Tensor | None,  # (r, V) products of the reference, overwritten
    ref_head: _Head | None,
    u: dict[str, Tensor],
    v: dict[str, Tensor],
    b: slice,
) -> None:
    """dz of entropy and both divergences on top of `factor`.

    ∂entropy/∂z = −p (log p + entropy); ∂KL(q‖p)/∂z = p − q; ∂KL(p‖q)/∂z = p (log p − log q − KL(p‖q)).
    """
    q = None
    coefficient = torch.zeros_like(p)
    if z_ref is not None:
        assert ref_head is not None
        ref_head.finish(z_ref)
        log_q = z_ref.clone() if "reverse_kl" in u else None
        largest, log_total, total = _softmax_(z_ref)
        q = z_ref.div_(total.unsqueeze(1))
        if log_q is not None:
            log_q.sub_((largest + log_total).unsqueeze(1)).sub_(log_p).neg_()
            coefficient.addcmul_(log_q, u["reverse_kl"][b].unsqueeze(1))
            factor = factor - u["reverse_kl"][b] * v["reverse_kl"][b]
    if "kl" in u:
        factor = factor + u["kl"][b]
    if "entropy" in u:
        factor = factor - u["entropy"][b] * v["entropy"][b]
        coefficient.addcmul_(log_p, u["entropy"][b].unsqueeze(1), value=-1)
    ruled_out = p == 0
    p.mul_(coefficient.add_(factor.unsqueeze(1))).masked_fill_(ruled_out, 0)
    if "kl" in u:
        assert q is not None
        p.sub_(q.mul_(u["kl"][b].unsqueeze(1)))


class _Gradients:
    """dH, dW and db, accumulated over tiles in the accumulation dtype; dH and dW end in `dtype`."""

    def __init__(
        self, head: _Head, hidden: Tensor, needs: tuple[bool, bool, bool], dtype: torch.dtype
    ) -> None:
        self.head, self.dtype = head, dtype
        weight, device = head.weight, hidden.device
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
        self.weight = None
        if needs[1]:
            self.weight = _on_huge_pages(torch.empty(weight.shape, dtype=head.dtype, device=device))
        self.bias = torch.zeros(head.vocab, dtype=head.dtype, device=device) if needs[2] else None
        self.first = True

    def add(self, dz: Tensor, h: Tensor, part: Tensor, factor: Tensor | None = None) -> None:
        """Add a tile: dz (n, V), up to a factor a row (n,) if it is given; h (n, D), the n positions it stands for."""
        if self.hidden is not None:
            d_hidden = self.head.into_hidden(dz)
            self.hidden[part] = (d_hidden if factor is None else d_hidden.mul_(factor.unsqueeze(1))).to(
                self.dtype
            )
        if self.weight is not None:
            h = h if factor is None else h * factor.unsqueeze(1)
            self.head.into_weight(dz, h, self.weight, self.first)
        if self.bias is not None:
            self.bias += dz.sum(dim=0, dtype=self.bias.dtype) if factor is None else torch.mv(dz.T, factor)
        self.first = False

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.weight is not None:
            if self.first:
                self.weight.zero_()
            self.weight = self.weight.to(self.dtype)
        return self.hidden, self.weight, self.bias


def unit_gradients(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    scaling: Scaling,
    groups: Sequence[tuple[Tensor, Sequence[int]]],
    tile_tokens: int,
    coefficients: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
    needs: tuple[bool, bool, bool],
    operations: MakeRowOperations = RowOperations,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """logp (N,) and the gradients of a loss that is a sum over units, with the tile still live when u is known.

    groups: the scored positions (n,) of some whole units, and the units. Once all tiles of a group have been scored,
    coefficients(logp (n,), positions (n,), units) gives u = ∂L/∂logp (n,). A group of one tile costs 3F; of a longer
    one, all tiles but the last are made again: 4F.
    """
    head = _Head(weight, bias, scaling)
    row_operations = operations(head)
    # A loss scale comes with the backward: until then float16 would lose what is small.
    dtype = head.dtype if hidden.dtype == torch.float16 else hidden.dtype
    grads = _Gradients(head, hidden, needs, dtype)
    logp = torch.zeros(targets.shape, dtype=head.dtype, device=hidden.device)
    longest = max((index.shape[0] for index, _ in groups), default=0)

    def score(part: Tensor, tile: Tensor, found: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """h (n, D), the tile, and what its row operations want to know of it; found (n,) is given the log-probs."""
        h = head.rows(hidden, part)
        z = head.logits(h, tile[: part.shape[0]])
        return h, z, row_operations.scores(z, targets[part], found)

    with _tile(min(tile_tokens, longest), head) as tile:
        for index, units in groups:
            parts = list(_tiles(index, tile_tokens))
            scored = torch.empty(index.shape, dtype=head.dtype, device=hidden.device)
            live = None
            for at, part in parts:
                live = score(part, tile, scored[at])
            u = coefficients(scored, index, units)
            for at, part in reversed(parts):
                h, z, known = live if live is not None else score(part, tile, scored[at])
                live = None
                dz, factor = row_operations.unit_gradient(z, targets[part], u[at], known)
                grads.add(dz, h, part, factor)
            logp[index] = scored
    return logp, grads.finished()
