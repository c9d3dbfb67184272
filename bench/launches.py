"""Counts the launches of a call of the head on a device, the bytes they move and the memory they take, without times.

    python bench/launches.py --json bench/results/launches.json

The calls run on the meta device, which has shapes and no values, but take the branches of a CUDA device. Every operator
on the device counts as one launch (those in SEVERAL as more), and so does every kernel of ours. A call that reads the
device raises. `bytes a logit`: bytes read and written of tensors as wide as the vocabulary, by the GEMMs and by
everything else, divided by N·V. `peak`: the most memory that the call holds at once beyond its operands, gradients
included, on a card of 80 GB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xpo_fast.bench.measure import table
from xpo_fast.bench.problem import Shape
from xpo_fast.files import write_json

META = torch.device("meta")
GEMMS = ("mm", "addmm", "addmv_")
FREE = (  # without a launch
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "alias"),
)
SEVERAL = {"logsumexp": 7, "index_put": 2}  # launches per operator
OVERWRITES = ("copy_", "fill_", "zero_")  # do not read their output
ROWS = ("index_select", "index_copy_")
PICKS = ("gather", "scatter_add_")  # move single entries
PADDING = 64  # of a tile: columns beyond the vocabulary at most


class Meter(TorchDispatchMode):
    """Counts launches, bytes and memory in a `with` block."""

    def __init__(self, vocab: int, weight: Tensor) -> None:
        super().__init__()
        self.head = weight.untyped_storage()._cdata
        self.vocab, self.launches, self.kernels = vocab, 0, {}
        self.row_bytes = self.gemm_bytes = 0
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from xpo_fast.head import autograd

        kwargs = kwargs or {}
        operators = {op._opoverload: op._init_fn for op in (autograd.token_stats, autograd.token_stats_backward)}
        if func in operators:  # count its code, not only the shapes that it declares
            with self:
                return operators[func](*args, **kwargs)
        self.note_freed()
        before = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = func(*args, **kwargs)
        after = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.device == META for x in (*before, *after)):
            self.note(func, before, after, args, kwargs)
        return out

    def note(self, func: Any, before: list[Tensor], after: list[Tensor], args: Any, kwargs: Any) -> None:
        """Counts an operator on the device. before, after: the tensors among its inputs and outputs."""
        known = {x.untyped_storage()._cdata for x in before}
        for x in after:
            storage = x.untyped_storage()
            if storage._cdata not in known and x.device == META:
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.held.values()))
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE:
            return
        self.count(name, SEVERAL.get(name, 1))
        if name in PICKS:
            return
        written = [kwargs["out"]] if "out" in kwargs else [args[0]] if name.endswith("_") else after
        read = tree_leaves((args, {k: x for k, x in kwargs.items() if k != "out"}))
        if name in ROWS:  # only the selected rows
            read = written = [args[3] if name == "index_copy_" else after[0]]
        elif name in OVERWRITES or (name == "addmm" and kwargs.get("beta", 1) == 0):
            read = read[1:]
        moved = sum(self.wide_bytes(x) for x in (*read, *written) if isinstance(x, Tensor))
        if name in GEMMS:
            self.gemm_bytes += moved
        else:
            self.row_bytes += moved

    def count(self, name: str, launches: int = 1) -> None:
        """Counts launches under a name."""
        self.launches += launches
        self.kernels[name] = self.kernels.get(name, 0) + launches

    def wide_bytes(self, x: Tensor) -> int:
        """Returns the bytes of a tensor of logits; 0 for others, and for the head, whose transpose is as wide."""
        wide = x.dim() == 2 and self.vocab <= x.shape[1] <= self.vocab + PADDING
        return x.numel() * x.itemsize if wide and x.untyped_storage()._cdata != self.head else 0

    def note_freed(self) -> None:
        """Forgets memory that has been freed."""
        for key, (storage, _) in list(self.held.items()):
            if storage.expired():
                del self.held[key]

    # Stand-ins for our kernels, which cannot run on the meta device.

    def rows_run(self, products: Tensor, targets: Tensor, **options: Any) -> None:
        """Counts kernels.rows.run."""
        self.kernel("row_pass", products, options, reads=2 if options.get("grad") is not None else 1)

    def one_read_run(self, products: Tensor, targets: Tensor, **options: Any) -> None:
        """Counts kernels.one_read.run, or the kernel of csrc/rows.cu."""
        self.kernel("one_read", products, options, reads=1)

    def kernel(self, name: str, products: Tensor, options: dict[str, Any], reads: int) -> None:
        """Counts a launch of a kernel that reads the products `reads` times and writes the gradient, if any."""
        self.count(name)
        tensors = [products, *(options[k] for k in ("ref_products",) if options.get(k) is not None)]
        grad = options.get("grad")
        self.row_bytes += sum(reads * self.wide_bytes(x) for x in tensors)
        self.row_bytes += 0 if grad is None else self.wide_bytes(grad)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces our kernels by stand-ins that count, and allows every backend, in a `with` block."""
        from xpo_fast.kernels import one_read, rows  # pyright: ignore[reportMissingImports]

        from xpo_fast.head import tiling
        from xpo_fast.head.cuda import CudaRowOperations
        from xpo_fast.head.triton import TritonRowOperations

        with (
            mock.patch.object(rows, "run", self.rows_run),
            mock.patch.object(one_read, "run", self.one_read_run),
            mock.patch("xpo_fast.head.triton.prefers_fused", lambda *_: False),
            mock.patch("xpo_fast.head.cuda.run", self.one_read_run),
            # As on a GPU: the meta device would get torch's row operations.
            mock.patch.object(
                CudaRowOperations, "others", property(lambda own: TritonRowOperations(own.gemms, own.ref_gemms))
            ),
            mock.patch("xpo_fast.head.plan.check_backend", lambda *_: None),
            mock.patch.dict(tiling.DEFAULT_TILE_BYTES, cuda=int(tiling.SHARE_OF_CARD * CARD_BYTES)),
            self,
        ):
            yield


ROW_TOKENS = 1024
SHAPES = [Shape(n, d, v) for n in (8192, 32768) for d, v in ((4096, 128256), (2048, 151936), (4096, 32000))]
CARD_BYTES = 80 * 10**9  # scratch memory is a share of it
RANKS = 8  # that share a vocabulary


class Case(NamedTuple):
    """A call to be counted."""

    call: Callable[[Tensor, Tensor, Tensor, str], Any]  # of hidden (N, D), weight (V, D), targets (N,), backend
    learns: bool = False  # whether the head is trainable
    backends: tuple[str, ...] = ("torch", "triton", "cuda")


def _logps(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str, **options: Any) -> Tensor:
    from xpo_fast import token_logps

    return token_logps(hidden, weight, targets, backend=backend, **options)


def _frozen(*operands: Any, **options: Any) -> None:
    _logps(*operands, **options).sum().backward()


def _without_gradient(*operands: Any) -> None:
    with torch.no_grad():
        _logps(*operands)


def _entropy(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> None:
    from xpo_fast import token_stats

    found = token_stats(hidden, weight, targets, backend=backend, outputs=("entropy",))
    assert found.entropy is not None
    (found.logp.sum() + found.entropy.sum()).backward()


def _dpo(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> None:
    from xpo_fast import Objective

    rows = targets.shape[0] // ROW_TOKENS
    batch = hidden.view(rows, ROW_TOKENS, -1)
    ref = torch.zeros(rows, device=META)
    objective = Objective("dpo", beta=0.1, backend=backend)
    objective(batch, weight, targets.view(rows, -1), ref_logps=ref).loss.backward()


def _gather(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> None:
    from xpo_fast.head import gather

    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]))
    # Replaces the only wait of a call, which asks the device for the scored positions.
    every = torch.arange(hidden.shape[0], device=META)
    with mock.patch.object(gather, "scored_positions", lambda *_: every):
        logp, _ = gather._forward._init_fn(logits, targets, 1.0, -100, False, False)
        gather._write_gradient(logits, targets, logp, 1.0, -100, None, torch.empty_like(logits))


def _distillation(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str, **options: Any) -> None:
    from xpo_fast.integrations.liger.distillation import distillation_loss

    teacher = hidden.detach(), weight.detach()
    heads = dict(zip(("teacher_hidden", "teacher_weight"), teacher, strict=True))
    found = distillation_loss(hidden, weight, targets, **heads, **options)
    found.loss.backward()


def _vocab_parallel(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from xpo_fast.head.vocab_parallel import VocabShard

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        rows = weight.shape[0] // RANKS
        shard = VocabShard(dist.group.WORLD, weight.shape[0], 0, rows, rows, True)
        _logps(hidden, weight[:rows], targets, backend, vocab_shard=shard).sum().backward()
    finally:
        dist.destroy_process_group()


CASES = {
    "frozen": Case(_frozen),
    "frozen, softcap": Case(partial(_frozen, softcap=30.0)),
    "trainable": Case(_dpo, learns=True),
    "log-probs": Case(_without_gradient),
    "entropy with its gradient": Case(_entropy),
    "gather_logps": Case(_gather, backends=("torch",)),
    "vocabulary over 8 ranks": Case(_vocab_parallel, backends=("torch",)),
    "distillation": Case(_distillation, learns=True, backends=("torch",)),
}


def measure(name: str, shape: Shape, backend: str) -> dict[str, Any]:
    """Returns the launches, bytes and peak memory of one call."""
    case = CASES[name]
    hidden = torch.empty(shape.scored, shape.width, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight = torch.empty(shape.vocab, shape.width, dtype=torch.bfloat16, device=META, requires_grad=case.learns)
    targets = torch.zeros(shape.scored, dtype=torch.int64)
    if name == "gather_logps":
        targets = targets.to(META)
    meter = Meter(shape.vocab // RANKS if name.startswith("vocab") else shape.vocab, weight)
    with meter.installed():
        case.call(hidden, weight, targets, backend)
    logits = shape.scored * meter.vocab
    return {
        "case": name,
        "shape": shape._asdict(),
        "backend": backend,
        "launches": meter.launches,
        "kernels": dict(sorted(meter.kernels.items(), key=lambda item: -item[1])),
        "row_bytes_a_logit": meter.row_bytes / logits,
        "gemm_bytes_a_logit": meter.gemm_bytes / logits,
        "peak_mb": meter.peak_bytes / 1e6,
    }


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = [
        measure(name, shape, backend) for name, case in CASES.items() for shape in SHAPES for backend in case.backends
    ]
    header = ["case, N×D×V", "backend", "launches", "bytes a logit: rows", "GEMMs", "peak MB"]
    rows = [
        [
            f"{r['case']} {Shape(**r['shape'])}",
            r["backend"],
            str(r["launches"]),
            f"{r['row_bytes_a_logit']:.1f}",
            f"{r['gemm_bytes_a_logit']:.1f}",
            f"{r['peak_mb']:.0f}",
        ]
        for r in found
    ]
    print(table(header, rows))
    if args.json:
        write_json(args.json, {"what": "counted on the meta device, not timed", "counted": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
