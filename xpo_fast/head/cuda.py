"""The `cuda` backend: the loops of chunked.py with cuBLAS products, and for their rows the kernel of csrc/rows.cu.

That kernel reads each logit from device memory once if a row fits the shared memory of a cluster, else twice. It
computes log-probs, the statistics that need no reference, and the gradient of log-probs and log-sum-exps. Divergences
and the gradient of entropy are left to Triton's kernel, or to torch where Triton is not installed. float64 operands
take torch's row operations. The launch needs no operator of its own: it runs inside `xpo_fast::token_stats` and the
other operators of autograd.py, which torch.compile does not look into.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from .. import native
from ..device import has_triton
from .gemms import Gemms
from .row_operations import OutOfPlaceRowOperations, RowOperations

STATISTICS = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logit", "top1")
DIFFERENTIABLE = ("logp", "lse")
_GRAD_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Rows(ctypes.Structure):
    """XpoRows of csrc/xpo.h."""

    _fields_ = (
        ("products", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in STATISTICS),
        *((f"u_{name}", ctypes.c_void_p) for name in DIFFERENTIABLE),
        ("grad", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "vocab", "stride", "grad_stride")),
        *((name, ctypes.c_float) for name in ("gain", "inner", "ceiling")),
        ("grad_type", ctypes.c_int32),
    )


class RowPlan(ctypes.Structure):
    """XpoRowPlan of csrc/xpo.h: how the rows of a vocabulary size are read."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("ranks", "part", "kept", "threads")),
        ("shared_bytes", ctypes.c_int64),
    )


def run(
    products: Tensor,  # (n, V) float32, h Wᵀ
    targets: Tensor,  # (n,) int64
    *,
    bias: Tensor | None = None,  # (V,) float32
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    out: Mapping[str, Tensor] | None = None,  # statistic → (n,) float32, written
    upstream: Mapping[str, Tensor] | None = None,  # logp, lse → (n,) ∂L/∂statistic; the gradient of Σ logp if empty
    grad: Tensor | None = None,  # (n, V) written; float32 may be the products themselves
    plan: RowPlan | None = None,
) -> None:
    """Writes the statistics named in `out` and, if `grad` is given, ∂L/∂products, as `kernels.rows.run` does.

    plan: for checks only; by default the device plans for itself.
    """
    out, upstream = dict(out or {}), dict(upstream or {})
    assert set(out) <= set(STATISTICS) and set(upstream) <= set(DIFFERENTIABLE)
    n, vocab = products.shape
    vectors = (*out.values(), *upstream.values())
    assert all(x.shape == (n,) for x in vectors) and targets.shape == (n,) and targets.dtype == torch.int64
    assert bias is None or bias.shape == (vocab,)
    for x in (products, *vectors, *(() if bias is None else (bias,))):
        assert x.dtype == torch.float32 and (x.stride(-1) == 1 or x.numel() <= 1), (x.dtype, x.stride())
    assert targets.stride(-1) == 1 or n <= 1
    if grad is not None:
        assert grad.shape == products.shape and grad.dtype in _GRAD_TYPES and (grad.stride(-1) == 1 or vocab == 1)
        same = (products.dtype, products.stride()) == (grad.dtype, grad.stride())
        assert n == 0 or same or grad.data_ptr() != products.data_ptr()
    everything = (products, targets, bias, grad, *vectors)
    assert all(x is None or x.device == products.device for x in everything)
    rows = _Rows(
        products=products.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        targets=targets.data_ptr(),
        **{name: x.data_ptr() for name, x in out.items()},
        **{f"u_{name}": x.data_ptr() for name, x in upstream.items()},
        grad=None if grad is None else grad.data_ptr(),
        n=n,
        vocab=vocab,
        stride=products.stride(0),
        grad_stride=0 if grad is None else grad.stride(0),
        gain=logit_scale / temperature,
        inner=0.0 if softcap is None else logit_scale / softcap,
        ceiling=0.0 if softcap is None else softcap / temperature,
        grad_type=0 if grad is None else _GRAD_TYPES[grad.dtype],
    )
    native.call(
        "xpo_rows" if plan is None else "xpo_rows_planned",
        *(ctypes.byref(x) for x in (rows, plan) if x is not None),
        device=products.device,
        reads=(products, targets, bias, *upstream.values()),
        writes=(*out.values(), grad),
    )


class CudaRowOperations(RowOperations):
    """`RowOperations` by the kernel of csrc/rows.cu; its dz is exact, with a factor of 1."""

    def __init__(self, gemms: Gemms, ref_gemms: Gemms | None = None) -> None:
        super().__init__(gemms, ref_gemms)
        self.own_memory = True
        self.run = partial(run, bias=gemms.bias, **asdict(gemms.scaling))
        self._others: RowOperations | None = None

    @property
    def others(self) -> RowOperations:
        """The row operations for what this kernel does not compute: Triton's, or torch's."""
        if self._others is None:
            if has_triton() and self.gemms.weight.device.type == "cuda":
                from .triton import TritonRowOperations

                self._others = TritonRowOperations(self.gemms, self.ref_gemms)
            else:
                self._others = OutOfPlaceRowOperations(self.gemms, self.ref_gemms)
        return self._others

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
        if z_ref is not None or not set(outputs) <= set(STATISTICS):
            self.others.statistics(z, z_ref, y, outputs, rows, dz, factor)
            return
        self.run(z, y, out=dict(zip(("logp", "lse", *outputs), rows, strict=True)), grad=dz)
        if factor is not None:
            factor.fill_(1)

    def gradient(
        self, z: Tensor, z_ref: Tensor | None, y: Tensor, u: Mapping[str, Tensor], v: Mapping[str, Tensor], dz: Tensor
    ) -> None:
        if set(u) <= set(DIFFERENTIABLE):
            self.run(z, y, upstream=u, grad=dz)
        else:
            self.others.gradient(z, z_ref, y, u, v, dz)


def row_operations(gemms: Gemms, ref_gemms: Gemms | None = None) -> RowOperations:
    """Returns the row operations of a call: by the kernel, or by torch for float64."""
    kind = CudaRowOperations if gemms.dtype == torch.float32 else RowOperations
    return kind(gemms, ref_gemms)
