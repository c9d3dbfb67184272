"""A head whose vocabulary is cut over ranks: each rank multiplies the rows of W that it holds, for the same tokens.

The softmax over the whole vocabulary needs only a few sums over each rank's logits. For each row of a step's products a
rank computes its largest logit, Σ e^(z − largest), the target's logit if it holds the target, and the like for other
statistics. One all-gather exchanges them all, after which each rank has the exact softmax at its own columns. dz and dW
stay local; dH is summed over the ranks once, when the backward leaves the head. The products cost what they cost
without the cut, divided over the ranks.

The exchange is one collective per step, and another one per step of a gradient by recomputation, of a few float32 per
token and rank. It is not overlapped with the products. Ranks combine the same numbers in the same order, so their
statistics are equal bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .divergence import expectation
from .gemms import Gemms
from .row_operations import RowOperations, row_blocks
from .tiling import DEFAULT_TILE_BYTES

# Shards by handle. Entries are never removed, since a compiled graph keeps the handle; there is one per cut vocabulary.
_by_handle: dict[str, VocabShard] = {}


@dataclass(frozen=True)
class VocabShard:
    """The tokens of this rank's rows of the weight, start … start + rows − 1 of a vocabulary. Created by `agree`.

    Rows from token `vocab` on are padding: no logits are computed of them, and their gradient is 0.
    """

    group: Any  # torch.distributed.ProcessGroup
    vocab: int
    start: int
    rows: int  # of this rank's weight, padding included
    largest: int  # tokens of the largest shard of the group
    sum_hidden_grad: bool

    @classmethod
    def agree(
        cls,
        rows: int,
        vocab: int | None = None,
        *,
        start: int | None = None,
        group: Any = None,
        sum_hidden_grad: bool = True,
    ) -> VocabShard:
        """Returns this rank's shard after the ranks of a group have exchanged which tokens each holds.

        A collective: every rank calls it once, when the model is created.

            shard = xf.VocabShard.agree(weight.shape[0], vocab=50257, group=tensor_parallel_group)
            logp = xf.token_logps(hidden, weight, targets, vocab_shard=shard)

        rows: the rows of this rank's weight (and bias); ranks may have different numbers. vocab: the number of tokens,
            if some rows are padding; by default the sum of all rows.
        start: the first token of this rank; by default shards are in the order of ranks. group: by default all ranks.
        sum_hidden_grad: whether dH is summed over the ranks here, as it must be for a `hidden` that every rank has;
            False if the operation that computed `hidden` sums it, as the reduce-scatter of sequence parallelism does.

        For a DTensor that is sharded on its rows over a mesh of one dimension, call
        `agree(weight.to_local().shape[0], group=weight.device_mesh.get_group())` and pass `weight.to_local()` as the
        weight.

        Raises ValueError, on every rank alike, for shards that overlap, leave a gap or hold no token, and for ranks
        that do not agree on `vocab` or `sum_hidden_grad`.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("a vocabulary is cut over the ranks of a process group: call init_process_group() first")
        group = dist.group.WORLD if group is None else group
        table: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(table, (start, rows, vocab, sum_hidden_grad), group)
        shards, vocab = _check(table)
        return cls(group, vocab, shards[dist.get_rank(group)][0], rows, max(b - a for a, b in shards), sum_hidden_grad)

    @property
    def stop(self) -> int:
        """Returns the end of this rank's tokens, start … stop − 1."""
        return min(self.start + self.rows, self.vocab)

    @property
    def world(self) -> int:
        """Returns the number of ranks of the group."""
        return dist.get_world_size(self.group)

    @property
    def why(self) -> str:
        """Returns the words that `Plan.why` has about the shard."""
        return f"; {self._part}: what {self.world} ranks found is exchanged once a tile"

    @property
    def _part(self) -> str:
        return f"tokens {self.start}:{self.stop} of {self.vocab}, rank {dist.get_rank(self.group)} of {self.world}"

    def handle(self) -> str:
        """Returns a string that stands for this shard in the arguments of an operator; `shard_of` is the inverse."""
        name = f"{self._part}, group {self.group.group_name}"
        _by_handle[name] = self
        return name

    def tokens(self, **operands: Tensor | None) -> list[Any]:
        """Returns weights and biases without the rows of padding.

        Raises ValueError for another number of rows than was agreed on.
        """
        for name, x in operands.items():
            if x is not None and x.shape[:1] != (self.rows,):
                raise ValueError(
                    f"{name} is {tuple(x.shape)} and the ranks agreed on {self.rows} rows of this rank's: pass that "
                    "shard, or make another VocabShard.agree(weight.shape[0], …) on every rank"
                )
        count = self.stop - self.start
        return [None if x is None else x if count == self.rows else x[:count] for x in operands.values()]

    def replicated(self, hidden: Tensor) -> Tensor:
        """Returns the hidden states (…, D) with a gradient that is summed over the ranks, if `sum_hidden_grad`."""
        if not self.sum_hidden_grad:
            return hidden
        same: Any = _SumGradient.apply(hidden, self.group)
        return same

    def place(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this rank's columns of target tokens (n,), 0 for other ranks' tokens, and which are its own (n,)."""
        own = (y >= self.start) & (y < self.stop)
        return torch.where(own, y - self.start, 0), own

    def target_rows(self, weight: Tensor, y: Tensor) -> Tensor:
        """Returns W[y] (n, D), with zeros for the tokens of other ranks."""
        columns, own = self.place(y)
        return weight[columns] * own.unsqueeze(1)

    def tile_bytes(self, device: torch.device) -> int:
        """Returns the default budget of a tile, which ignores this rank's card: tiles must be equal on all ranks."""
        return DEFAULT_TILE_BYTES["cpu" if device.type == "cpu" else "cuda"]


@functools.lru_cache(maxsize=64)
def agreed_shard(rows: int, group: Any, start: int | None = None, sum_hidden_grad: bool = True) -> VocabShard:
    """Returns what `VocabShard.agree` returns, with a collective only in the first call with these arguments.

    All ranks of a group call it together, so that the shard is cached on all of them or on none.
    """
    return VocabShard.agree(rows, start=start, group=group, sum_hidden_grad=sum_hidden_grad)


def _check(table: Sequence[tuple[int | None, int, int | None, bool]]) -> tuple[list[tuple[int, int]], int]:
    """Returns each rank's tokens (start, stop), and the vocabulary's size, from every rank's arguments of `agree`.

    table: (start, rows, vocab, sum_hidden_grad) of each rank.
    """
    starts, rows, vocabs, sums = zip(*table, strict=True)
    for name, values in (("vocab", vocabs), ("sum_hidden_grad", sums)):
        if len(set(values)) > 1:
            raise ValueError(f"the ranks of a vocabulary must give the same {name}, got {list(values)}")
    if None in starts:
        if set(starts) != {None}:
            raise ValueError(f"start= must be given on all ranks of a vocabulary, or on none, got {list(starts)}")
        starts = [sum(rows[:rank]) for rank in range(len(rows))]
    vocab = sum(rows) if vocabs[0] is None else vocabs[0]
    shards = [(start, min(start + count, vocab)) for start, count in zip(starts, rows, strict=True)]
    reached = 0
    for start, stop in sorted(shards):
        if start != reached or start >= stop:
            raise ValueError(
                f"the shards of a vocabulary of {vocab} tokens must follow on each other, none of them empty, got "
                + ", ".join(f"{a}:{b} on rank {rank}" for rank, (a, b) in enumerate(shards))
            )
        reached = stop
    if reached != vocab:
        raise ValueError(
            f"the shards of a vocabulary of {vocab} tokens end at {reached}, in rows {list(rows)} of the ranks"
        )
    return shards, vocab


class _SumGradient(torch.autograd.Function):
    """The identity, with a gradient that is summed over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def shard_of(handle: str) -> VocabShard | None:
    """Returns the shard of a handle; None for "", which stands for a vocabulary that is not cut."""
    return _by_handle[handle] if handle else None


class _Softmax:
    """The softmax over all ranks' columns, from each rank's largest logit (G, n) and Σ e^(z − largest) (G, n)."""

    def __init__(self, largest: Tensor, total: Tensor) -> None:
        self.largest = largest.amax(dim=0)  # (n,)
        self.shift = largest - self.largest  # (G, n)
        self.share = self.shift.exp()
        self.total = (self.share * total).sum(dim=0)  # (n,) Σ e^(z − largest)
        self.log_total = self.total.log()

    @property
    def lse(self) -> Tensor:
        """Returns log Σ e^z (n,)."""
        return self.largest + self.log_total

    def sum(self, x: Tensor) -> Tensor:
        """Returns Σ e^(z − largest)·x over all ranks (n,), from Σ e^(z − largest of the rank)·x (G, n)."""
        return torch.where(self.share == 0, 0, self.share * x).sum(dim=0)


class VocabParallelRows(RowOperations):
    """torch's row operations on a rank's columns, with the softmax over the columns of all ranks."""

    def __init__(self, shard: VocabShard, gemms: Gemms, ref_gemms: Gemms | None = None) -> None:
        super().__init__(gemms, ref_gemms)
        self.shard, self.vocab = shard, shard.vocab
        self._policy: _Softmax | None = None
        self._ref: _Softmax | None = None
        self._own: Tensor | None = None  # (n,) bool

    def softmax_(self, z: Tensor, rows: slice, *, reference: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Overwrites logits by probabilities over the whole vocabulary; they are normalised, so the sums are 1."""
        found = self._ref if reference else self._policy
        assert found is not None
        largest, log_total, total = (x[rows] for x in (found.largest, found.log_total, found.total))
        z.sub_(largest.unsqueeze(1)).exp_().div_(total.unsqueeze(1))
        return largest, log_total, torch.ones_like(total)

    def add_at_targets(self, z: Tensor, rows: slice, y: Tensor, x: Tensor) -> None:
        """Adds x[i] to z[i, y[i]] for the rows whose target this rank holds; y are its columns."""
        assert self._own is not None
        super().add_at_targets(z, rows, y, x * self._own[rows])

    def statistics(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        y: Tensor,
        outputs: Sequence[str],
        rows: Tensor,
        dz: Tensor | None,
        factor: Tensor | None,
    ) -> None:
        """Exchanges sums with the other ranks, writes the statistics from them, and then dz of this rank's columns."""
        y, sums = self._exchange(z, z_ref, y, outputs)
        for row, name in zip(rows, ("logp", "lse", *outputs), strict=True):
            row.copy_(self._statistic(name, sums))
        if dz is not None:
            super().statistics(z, None, y, (), torch.empty_like(rows[:2]), dz, factor)

    def gradient(
        self, z: Tensor, z_ref: Tensor | None, y: Tensor, u: Mapping[str, Tensor], v: Mapping[str, Tensor], dz: Tensor
    ) -> None:
        """Exchanges sums with the other ranks, and then writes dz of this rank's columns."""
        y, _ = self._exchange(z, z_ref, y, ())
        super().gradient(z, z_ref, y, u, v, dz)

    def _exchange(
        self, z: Tensor, z_ref: Tensor | None, y: Tensor, outputs: Sequence[str]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns the targets' columns (n,), and every rank's sums by name (G, n); keeps the softmax over all ranks."""
        columns, self._own = self.shard.place(y)
        blocks = [
            self._sums(z[b], None if z_ref is None else z_ref[b], columns[b], self._own[b], outputs)
            for b in row_blocks(z)
        ]
        own = torch.stack([torch.cat([sums[name] for sums in blocks]) for name in blocks[0]])  # (K, n)
        every = own.new_empty((self.shard.world, *own.shape))
        dist.all_gather(list(every.unbind(0)), own, group=self.shard.group)
        sums = dict(zip(blocks[0], every.unbind(1), strict=True))
        self._policy = _Softmax(sums["largest"], sums["total"])
        self._ref = None if z_ref is None else _Softmax(sums["ref_largest"], sums["ref_total"])
        return columns, sums

    def _sums(
        self,
        z: Tensor,  # (r, V) products, left as they are
        z_ref: Tensor | None,  # (r, V)
        y: Tensor,  # (r,) columns
        own: Tensor,  # (r,) bool
        outputs: Sequence[str],
    ) -> dict[str, Tensor]:
        """Returns this rank's sums of a block of rows, (r,) each, by name: those that the ranks exchange."""
        z, e, largest = _exponentials(self.gemms, z)
        sums = {"largest": largest, "total": e.sum(dim=1)}
        sums["target"] = torch.where(own, z.gather(1, y.unsqueeze(1)).squeeze(1), 0)
        q = None
        if z_ref is not None:
            assert self.ref_gemms is not None
            z_ref, q, sums["ref_largest"] = _exponentials(self.ref_gemms, z_ref)
            sums["ref_total"] = q.sum(dim=1)
        for name in outputs:
            if name == "entropy":
                sums[name] = expectation(e, z - _finite(largest).unsqueeze(1))
            elif name == "kl":
                assert z_ref is not None and q is not None
                sums[name] = expectation(q, z_ref - z)
            elif name == "reverse_kl":
                assert z_ref is not None
                sums[name] = expectation(e, z - z_ref)
            elif name == "log_sum_sq_probs":
                sums[name] = e.square().sum(dim=1)
            elif name == "mean_logit":
                sums[name] = z.sum(dim=1)
        return sums

    def _statistic(self, name: str, sums: Mapping[str, Tensor]) -> Tensor:
        """Returns a statistic over the whole vocabulary (n,)."""
        policy, ref = self._policy, self._ref
        assert policy is not None
        if name == "lse":
            return policy.lse
        target = sums["target"].sum(dim=0)
        if name == "logp":
            return target - policy.largest - policy.log_total
        if name == "top1":
            return (target >= policy.largest).to(target.dtype)
        if name == "entropy":
            return policy.log_total - policy.sum(sums[name] + sums["total"] * policy.shift) / policy.total
        if name == "mean_logit":
            return sums[name].sum(dim=0) / self.shard.vocab
        if name == "log_sum_sq_probs":
            return (policy.share.square() * sums[name]).sum(dim=0).log() - 2 * policy.log_total
        assert ref is not None, name
        log_ratio = (ref.largest - policy.largest) + (ref.log_total - policy.log_total)  # lse of ref − lse of policy
        if name == "kl":
            return ref.sum(sums[name]) / ref.total - log_ratio
        assert name == "reverse_kl", name
        return policy.sum(sums[name]) / policy.total + log_ratio


def _exponentials(gemms: Gemms, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the final logits z (r, V), e^(z − largest) (r, V) and the largest (r,) from products."""
    z = products.clone()
    gemms.finish(z)
    largest = z.amax(dim=1)
    return z, (z - _finite(largest).unsqueeze(1)).exp_(), largest


def _finite(largest: Tensor) -> Tensor:
    """Returns the largest logits (r,), with 0 where a bias of −∞ rules out every token of a rank."""
    return largest.masked_fill(largest == -torch.inf, 0)
