"""Log-probs of selected ids, read from the products of a step before row operations overwrite them.

log p(id) = z_id − lse. With u = ∂L/∂(log p), ∂L/∂lse gets −Σ_k u_k, by the row operations of any backend, and
∂L/∂z gets u_k at id_k, here.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..device import on_host, to_device
from .gemms import Gemms
from .spec import check_selected
from .vocab_parallel import VocabShard


class Selected:
    """The columns of the selected ids at the scored positions of a call.

    Raises ValueError for an id outside the vocabulary at a scored position; on a device, trips an assertion.
    """

    def __init__(
        self,
        ids: Tensor,  # (K,), or (N, K) of all positions
        index: Tensor,  # (n,) the scored positions
        ignored: Tensor | None,  # (n,) bool: which of them are ignored, under CUDA graph capture
        gemms: Gemms,
        shard: VocabShard | None = None,
    ) -> None:
        self.gemms, self.shard = gemms, shard
        vocab = gemms.vocab if shard is None else shard.vocab
        if ids.dim() == 1 and on_host(ids):
            check_selected(ids, vocab)
        same, ids = ids.dim() == 1, to_device(ids, index.device)
        if not same:
            ids = ids[index]
            if ignored is not None:
                ids = ids.masked_fill(ignored.unsqueeze(1), 0)
        check_selected(ids, vocab)
        ids = ids.expand(index.shape[0], -1)
        self.columns, self.own = (ids, None) if shard is None else shard.place(ids)

    @property
    def count(self) -> int:
        """Returns K."""
        return self.columns.shape[1]

    def logits(self, z: Tensor, at: slice) -> Tensor:
        """Returns the final logits (r, K) from the products z (r, V) at some positions, 0 for other ranks' ids."""
        columns = self.columns[at]
        found = z.gather(1, columns)
        self.gemms.finish(found, columns)
        return found if self.own is None else found.masked_fill_(~self.own[at], 0)

    def over_ranks(self, logits: Tensor) -> Tensor:
        """Returns the logits (K, n), in place, with those of the ids that other ranks hold."""
        if self.shard is not None and logits.numel():
            dist.all_reduce(logits, group=self.shard.group)
        return logits

    def add_gradient(self, dz: Tensor, logits: Tensor, u: Tensor, at: slice) -> None:
        """Adds to dz (r, V) the gradient u (r, K) in the logits (r, K) of some positions."""
        u = u.clone() if self.own is None else u.masked_fill(~self.own[at], 0)
        self.gemms.times_slope(u, logits)
        dz.scatter_add_(1, self.columns[at], u.mul_(self.gemms.scaling.gain).to(dz.dtype))
