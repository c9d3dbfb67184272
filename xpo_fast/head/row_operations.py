"""Row operations: from products to statistics and dz, between the GEMMs; in torch, in place, on any device.

On the CPU they work on blocks of a few rows, which stay in cache between passes, so that memory is read and written
once. On a device they work on all rows at once, since a launch per few rows would take longer than the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .divergence import COPIES, expectation, jsd
from .gemms import BLOCK_BYTES, Gemms
from .spec import compares, jsd_of


def row_blocks(tile: Tensor, block: int = 0) -> Iterator[slice]:
    """Yields the rows of a tile in blocks: of a cache's size on the CPU, elsewhere all at once.

    block: 0, or a power of two of which tile has a multiple of rows; every block then has the same number of rows, two
    at least, for torch may sum a single row by threads, in another order than several.
    """
    rows = block or max(1, tile.shape[0])
    if tile.device.type == "cpu":
        rows = max(1, BLOCK_BYTES // (tile.shape[1] * tile.dtype.itemsize))
        rows = min(block, max(2, 1 << rows.bit_length() - 1)) if block else rows
    for start in range(0, tile.shape[0], rows):
        yield slice(start, min(start + rows, tile.shape[0]))


def softmax_(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites logits (r, V) by unnormalised probabilities, and returns what normalises them.

    Returns the largest logit (r,), log Σ e^(z − largest) (r,), and the sum of each row (r,). The caller divides the
    row, or whatever multiplies it later, by that sum. It is close to 1 on the CPU, where torch.softmax is used: that
    sums a row sequentially, which is off by 2e-5 at a vocabulary of 128k, while torch.sum is accurate.
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


def copies(outputs: Sequence[str], softcap: bool) -> int:
    """Returns the most tensors as large as a step's logits that torch's row operations hold beside them on a device."""
    if compares(outputs):
        return 7 + (COPIES if any(map(jsd_of, outputs)) else 0)
    if outputs:
        return 4
    return 2 if softcap else 0


class RowOperations:
    """The row operations of the `torch` backend; other backends override them.

    z: (n, V) the products h Wᵀ, overwritten; z_ref: the reference's, overwritten, too. y: (n,) the targets.
    dz: (n, V) memory for ∂L/∂(product), or None if it is not wanted. With own_memory it is a buffer of its own, in the
    dtype of the GEMMs' operands; otherwise it is z.
    """

    def __init__(self, gemms: Gemms, ref_gemms: Gemms | None = None) -> None:
        self.gemms, self.ref_gemms = gemms, ref_gemms
        self.vocab = gemms.vocab  # number of valid targets
        self.own_memory = gemms.gemm_dtype != gemms.dtype

    def fused(self, gathered: Callable[[], Tensor], y: Tensor, outputs: Sequence[str], found: Tensor) -> bool:
        """Writes found (2 + len(outputs), n) by a kernel that needs no tile, if that is faster. Returns whether it did.

        gathered: returns the hidden states (n, D) of the scored positions.
        """
        return False

    def softmax_(self, z: Tensor, rows: slice, *, reference: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Applies the function `softmax_` to some rows z of a step, the policy's or the reference's."""
        return softmax_(z)

    def add_at_targets(self, z: Tensor, rows: slice, y: Tensor, x: Tensor) -> None:
        """Adds x[i] to z[i, y[i]], in some rows of a step."""
        z.scatter_add_(1, y.unsqueeze(1), x.unsqueeze(1))

    def statistics(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        outputs: Sequence[str],
        rows: Tensor,  # (2 + len(outputs), n) written: logp, lse, outputs
        dz: Tensor | None,
        factor: Tensor | None,  # (n,) written, where dz is
    ) -> None:
        """Writes the statistics into rows, and ∂logp/∂(product) = factor · dz into dz and factor.

        The caller applies the factor, times ∂L/∂logp, to h and dH, which are smaller than the tile.
        """
        softcap = self.gemms.scaling.softcap is not None
        for b in row_blocks(z, self.gemms.block):
            p = z[b]
            self.gemms.finish(p)
            keep = p.clone() if outputs or (dz is not None and softcap) else None
            z_y = p.gather(1, y[b].unsqueeze(1)).squeeze(1)
            largest, log_total, total = self.softmax_(p, b)
            rows[0, b] = z_y.sub_(largest).sub_(log_total)
            rows[1, b] = largest + log_total
            if outputs:
                assert keep is not None
                p.div_(total.unsqueeze(1))
                total.fill_(1)
                q = None
                if z_ref is not None:
                    assert self.ref_gemms is not None
                    q = z_ref[b]
                    self.ref_gemms.finish(q)
                _statistics(rows[2:, b], outputs, p, keep, q, largest, log_total, rows[0, b])
            if dz is not None:
                assert factor is not None
                if dz.dtype == torch.float16:  # whose range is too small for Σ e^z
                    p.div_(total.unsqueeze(1))
                    total.fill_(1)
                self.add_at_targets(p, b, y[b], -total)
                self.gemms.times_slope(p, keep)
                factor[b] = total.reciprocal_().mul_(-self.gemms.scaling.gain)
        if dz is not None and self.own_memory:
            dz.copy_(z)

    def gradient(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        u: Mapping[str, Tensor],  # name of a differentiable output → (n,) ∂L/∂output
        v: Mapping[str, Tensor],  # entropy and reverse_kl (n,), where u has them
        dz: Tensor,
    ) -> None:
        """Writes ∂L/∂(product) into dz, for L with gradients in any of the differentiable outputs."""
        extra = set(u) - {"logp", "lse"}
        for b in row_blocks(z, self.gemms.block):
            p = z[b]
            self.gemms.finish(p)
            keep = p.clone() if extra or self.gemms.scaling.softcap is not None else None
            largest, log_total, total = self.softmax_(p, b)
            factor = p.new_zeros(p.shape[0])
            if "logp" in u:
                factor -= u["logp"][b]
            if "lse" in u:
                factor += u["lse"][b]
            if extra:
                assert keep is not None
                log_p = keep - (largest + log_total).unsqueeze(1)
                p.div_(total.unsqueeze(1))
                _extra_dz_(self, p, factor, log_p, None if z_ref is None else z_ref[b], u, v, b)
            else:
                p.mul_(factor.div_(total).unsqueeze(1))
            if "logp" in u:
                self.add_at_targets(p, b, y[b], u["logp"][b])
            self.gemms.times_slope(p, keep)
            if self.gemms.scaling.gain != 1:
                p.mul_(self.gemms.scaling.gain)
        if self.own_memory:
            dz.copy_(z)


class OutOfPlaceRowOperations(RowOperations):
    """The row operations of `torch` with dz in a separate buffer for any dtype: a tile may have several steps."""

    def __init__(self, gemms: Gemms, ref_gemms: Gemms | None = None) -> None:
        super().__init__(gemms, ref_gemms)
        self.own_memory = True


def _statistics(
    rows: Tensor,  # (len(outputs), r) written
    outputs: Sequence[str],
    p: Tensor,  # (r, V) probabilities
    z: Tensor,  # (r, V) final logits
    z_ref: Tensor | None,  # (r, V) the reference's final logits, overwritten
    largest: Tensor,  # (r,)
    log_total: Tensor,  # (r,) log Σ e^(z − largest)
    logp: Tensor,  # (r,)
) -> None:
    """Writes the further statistics of a block of rows."""
    log_ratio = q = None
    divergences = {n: jsd(z.clone(), z_ref.clone(), *s)[0] for n in outputs if z_ref is not None and (s := jsd_of(n))}
    if z_ref is not None and {"kl", "reverse_kl"} & set(outputs):
        log_ratio = z_ref - z
        ref_largest, ref_log_total, ref_total = softmax_(z_ref)
        q = z_ref.div_(ref_total.unsqueeze(1))
        shift = (ref_largest + ref_log_total) - (largest + log_total)
        log_ratio.sub_(shift.unsqueeze(1))  # log q − log p
    for row, name in zip(rows, outputs, strict=True):
        if name == "entropy":
            row.copy_(log_total - expectation(p, z - largest.unsqueeze(1)))
        elif name in divergences:
            row.copy_(divergences[name])
        elif name == "kl":
            assert log_ratio is not None and q is not None
            row.copy_(expectation(q, log_ratio.clone()))
        elif name == "reverse_kl":
            assert log_ratio is not None
            row.copy_(expectation(p, -log_ratio))
        elif name == "log_sum_sq_probs":
            row.copy_(p.square().sum(dim=1).log_())
        elif name == "mean_logit":
            row.copy_(z.mean(dim=1))
        else:
            assert name == "top1", name
            row.copy_(logp >= -log_total)


def _extra_dz_(
    operations: RowOperations,
    p: Tensor,  # (r, V) probabilities, turned into dz
    factor: Tensor,  # (r,) coefficient of p from logp and lse
    log_p: Tensor,  # (r, V) overwritten
    z_ref: Tensor | None,  # (r, V) products of the reference, overwritten
    u: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    b: slice,
) -> None:
    """Overwrites p by factor · p plus the gradients of entropy and both divergences in the final logits z.

    ∂entropy/∂z = −p (log p + entropy); ∂KL(q‖p)/∂z = p − q; ∂KL(p‖q)/∂z = p (log p − log q − KL(p‖q)); see `jsd`.
    """
    q = further = None
    if z_ref is not None:
        assert operations.ref_gemms is not None
        operations.ref_gemms.finish(z_ref)
        for name in u:
            if settings := jsd_of(name):
                _, further, scale = jsd(log_p.clone(), z_ref.clone(), *settings)
                further.mul_((scale * u[name][b]).unsqueeze(1))
    coefficient = torch.zeros_like(p)
    if "kl" in u or "reverse_kl" in u:
        assert z_ref is not None
        log_q = z_ref.clone() if "reverse_kl" in u else None
        largest, log_total, total = operations.softmax_(z_ref, b, reference=True)
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
    if further is not None:
        p.add_(further)


MakeRowOperations = Callable[[Gemms, "Gemms | None"], RowOperations]  # from the policy's GEMMs and the reference's
