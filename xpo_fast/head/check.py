"""The check of triton's kernels on a device: small problems, run twice and compared with float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..device import to_device
from ..wording import one_line
from . import chunked, dense
from .operands import Operands, Reference
from .rows import Group
from .spec import Scaling
from .tiling import Tiling

LOGP_ALLOWED = 5e-4  # |Δ| in nats; tensor cores truncate what they add
GRADIENT_ALLOWED = 2.0**-7  # ‖Δ‖ / ‖g‖
# Errors that only the kernels can be to blame for.
_FAULTS = ("illegal memory access", "launch failure", "misaligned address")


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    lasting: whether the kernels themselves are to blame, by wrong results or a fault. Not lasting are reasons that may
    be gone next time and say nothing about the kernels: a GPU whose memory others use, no compiler, a full disk.
    """

    ok: bool
    reason: str = ""
    lasting: bool = True

    def __str__(self) -> str:
        if self.ok:
            return "passed its check"
        return f"failed its check ({self.reason})" if self.lasting else f"could not be checked ({self.reason})"


class Contender(NamedTuple):
    """The implementation under check: a backend, and the kernels for given logits if `auto` launches them too."""

    loops: Any  # `forward`, `backward` and `unit_gradients` of chunked.py with the backend's row operations
    gather: Any = None  # `forward` and `write_gradient` of kernels/gather.py


def triton_kernels() -> Contender:
    """Returns the implementations that `auto` launches; imports triton."""
    from ..kernels import gather  # pyright: ignore[reportMissingImports]
    from . import triton

    functions = (chunked.forward, chunked.backward, chunked.unit_gradients)
    loops = SimpleNamespace(**{f.__name__: partial(f, operations=triton.row_operations) for f in functions})
    return Contender(loops, gather)


class Measure(NamedTuple):
    """How far one result is off: a 0-dimensional tensor on the device, NaN if the result contains one."""

    what: str
    off: Tensor
    allowed: float


_EMPTY = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


class _Poisoned(TorchDispatchMode):
    """Fills new memory with NaN, so that an element that is not written shows; in this thread only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY:
            out.fill_(math.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)
        return out


SCORED, IGNORED, WIDTH, IGNORE, TEMPERATURE = 40, 3, 64, -100, 0.7
VOCABULARIES = (1031, 4160)  # rows that are not aligned, and rows that are
# Several tiles with several steps each and both lanes; and one tile, whose dW is made in the dtype of the operands.
TILINGS = (Tiling(16, 4, lanes=2), Tiling(64, 4, lanes=2))
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logit", "top1")
DIVERGENCES = ("kl", "reverse_kl")
# Rows whose last logit exceeds all others, the target's too, by some 20, 60 and 100. A kernel that reads a row once,
# with a reference logit from its first block, has to read these again: e^88 is the largest that float32 holds.
OUTLIERS = {1: 4.0, 2: 9.5, 3: 14.0}


class Problem:
    """Hidden states, a head and targets, the exact results in float64, and how far a contender is off.

    The operands hold bfloat16 values in any dtype. TF32 multiplies these exactly, so the user's TF32 setting has no
    effect.
    """

    def __init__(self, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(vocab)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
            return (x * std).to(torch.bfloat16).to(dtype)

        count = SCORED + IGNORED
        everything = vocab % 2 == 1  # with bias, scale, softcap, temperature and reference, or with none of them
        self.vocab = vocab
        self.scaling = Scaling(temperature=0.5, softcap=80.0, logit_scale=1.25) if everything else Scaling()
        self.weight = normal(vocab, WIDTH, std=3 / WIDTH**0.5)
        self.bias = normal(vocab) if everything else None
        self.hidden, self.u = normal(count, WIDTH), normal(count).float()
        self.ref = Reference(normal(count, WIDTH), normal(vocab, WIDTH, std=1 / WIDTH**0.5)) if everything else None
        # The last column of the hidden states makes the outliers alone: sums before it stay small, and so does what is
        # truncated.
        self.weight[:, -1], self.hidden[:, -1] = 0, 0
        self.weight[-1, -1] = 8
        for row, x in OUTLIERS.items():
            self.hidden[row, -1] = x
        # On the host, where reading them waits for nothing; the first, a middle and the last one are ignored.
        targets = (torch.arange(count) * 97) % vocab
        targets[[0, count // 2, count - 1]] = IGNORE
        self.targets = targets
        self.at = to_device((targets != IGNORE).nonzero().squeeze(1), device)
        self.y = to_device(targets, device)[self.at]
        self.hidden.masked_fill_(to_device(targets == IGNORE, device).unsqueeze(1), math.nan)  # which must not be read

    def run(self, contender: Contender) -> dict[str, Tensor]:
        """Returns the results of a contender by name."""
        found: dict[str, Tensor] = {}
        alone = Operands(self.hidden, self.weight, self.targets, self.bias, scaling=self.scaling, ignore_index=IGNORE)
        needs, tiling, loops = (True, True, self.bias is not None, False), TILINGS[0], contender.loops
        found["logp"], found["lse"], _, found["dlogp"] = loops.forward(alone, (), tiling, True)
        _, _, extra, _ = loops.forward(alone, STATISTICS, tiling, False)
        found.update(zip(STATISTICS, extra, strict=True))
        u, v = {"logp": self.u, "entropy": self.u}, {"entropy": found["entropy"]}
        found.update(self._named("backward", loops.backward(alone, tiling, u, v, needs)))
        if self.ref is not None:
            both = replace(alone, ref=self.ref)
            _, _, extra, _ = loops.forward(both, DIVERGENCES, tiling, False)
            found.update(zip(DIVERGENCES, extra, strict=True))
            u, v = dict.fromkeys(DIVERGENCES, self.u), {"reverse_kl": found["reverse_kl"]}
            found.update(self._named("divergences", loops.backward(both, tiling, u, v, needs)))
        for tiling in TILINGS:
            # The first group is longer than the smaller tile, so that all of its tiles but the last are computed twice.
            first = SCORED * 3 // 5
            groups = [Group(self.at[:first], (0,), 0), Group(self.at[first:], (1,), first)]
            if tiling.tile >= SCORED:
                groups = [Group(self.at, (0, 1), 0)]
            name = f"units by {tiling.tile}"
            logp, grads = loops.unit_gradients(alone, groups, tiling, self._coefficients, needs)
            found[f"{name}: logp"] = logp
            found.update(self._named(name, grads))
        if contender.gather is not None:
            z, y = self._logits(), to_device(self.targets, self.hidden.device)
            found["gather: logp"], normaliser = contender.gather.forward(z, y, TEMPERATURE, IGNORE)
            found["gather: dz"] = out = torch.empty_like(z)
            contender.gather.write_gradient(z, y, normaliser, self.u, TEMPERATURE, IGNORE, out)
        return found

    def exact(self, contender: Contender) -> dict[str, Tensor]:
        """Returns the results that `run` should have, in float64."""
        with torch.enable_grad():
            leaves = [
                None if x is None else x.double().requires_grad_()
                for x in (self.hidden[self.at], self.weight, self.bias)
            ]
            h, weight, bias = leaves
            assert h is not None and weight is not None
            z = dense.logits(h, weight, bias, self.scaling)
            logprobs = z.log_softmax(dim=1)
            probs, logp = logprobs.exp(), logprobs.gather(1, self.y.unsqueeze(1)).squeeze(1)
            entropy = -(probs * logprobs).sum(dim=1)
            u = self.u[self.at].double()

            def gradients(loss: Tensor) -> list[Tensor]:
                wanted = [x for x in leaves if x is not None]
                grads = list(torch.autograd.grad(loss, wanted, retain_graph=True))
                return [self._spread(grads[0]), *grads[1:]]

            found = {"logp": self._spread(logp), "lse": self._spread(z.logsumexp(dim=1))}
            (found["dlogp"], *_) = gradients(logp.sum())
            found |= {
                "entropy": self._spread(entropy),
                "log_sum_sq_probs": self._spread((2 * logprobs).logsumexp(dim=1)),
                "mean_logit": self._spread(z.mean(dim=1)),
                "top1": self._spread((z.gather(1, self.y.unsqueeze(1)).squeeze(1) >= z.amax(dim=1)).double()),
            }
            found |= self._named("backward", gradients((u * (logp + entropy)).sum()))
            if self.ref is not None:
                ref_hidden, ref_weight, _ = self.ref
                z_ref = dense.logits(ref_hidden[self.at].double(), ref_weight.double(), None, self.scaling)
                log_ratio = z_ref.log_softmax(dim=1) - logprobs
                kl, reverse = (z_ref.softmax(dim=1) * log_ratio).sum(dim=1), -(probs * log_ratio).sum(dim=1)
                found |= {"kl": self._spread(kl), "reverse_kl": self._spread(reverse)}
                found |= self._named("divergences", gradients((u * (kl + reverse)).sum()))
            units = gradients((u * 8 * (logp / 8).exp()).sum())
        for tiling in TILINGS:
            name = f"units by {tiling.tile}"
            found |= {f"{name}: logp": found["logp"], **self._named(name, units)}
        if contender.gather is not None:
            scaled = self._logits().double()[self.at] / TEMPERATURE
            logprobs = scaled.log_softmax(dim=1)
            found["gather: logp"] = self._spread(logprobs.gather(1, self.y.unsqueeze(1)).squeeze(1))
            ones = torch.zeros_like(logprobs).scatter_(1, self.y.unsqueeze(1), 1.0)
            found["gather: dz"] = self._spread((ones - logprobs.exp()) * (u / TEMPERATURE).unsqueeze(1))
        return {name: x.detach() for name, x in found.items()}

    def measures(self, contender: Contender) -> Iterator[Measure]:
        """Yields how far each result of two runs is off, and in how many elements the two differ.

        Results of a GEMM may differ from run to run: its library may split a sum as it likes.
        """
        with _Poisoned():
            first, second = self.run(contender), self.run(contender)
        exact = self.exact(contender)
        for name, x in first.items():
            want, where = exact[name], f"{name}, V {self.vocab}"
            from_gemm = name.rpartition(": ")[2] in ("dlogp", "hidden", "weight", "bias")
            off = torch.stack([x, second[name]] if from_gemm else [x]).double() - want
            if name == "top1":
                yield Measure(where, off.ne(0).sum().double(), 0)
            elif from_gemm or name.endswith("dz"):
                yield Measure(f"∂ {where}", off.flatten(1).norm(dim=1).amax() / want.norm(), GRADIENT_ALLOWED)
            else:
                yield Measure(where, off.abs().amax(), LOGP_ALLOWED)
            if not from_gemm:
                yield Measure(f"elements that change from run to run of {where}", x.ne(second[name]).sum().double(), 0)

    def _coefficients(self, logp: Tensor, group: Group) -> Tensor:
        """∂L/∂logp (n,) of the loss Σ 8 u e^(logp / 8)."""
        return self.u[group.positions] * (logp / 8).exp()

    @staticmethod
    def _named(name: str, grads: Iterable[Tensor | None]) -> dict[str, Tensor]:
        return {f"{name}: {of}": g for of, g in zip(("hidden", "weight", "bias"), grads, strict=False) if g is not None}

    def _logits(self) -> Tensor:
        """The logits (N, V) that `gather` is given, in the dtype of the operands."""
        return self._spread(self.hidden[self.at].double() @ self.weight.double().T).to(self.hidden.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        """x (n, …) at the scored positions of (N, …), 0 elsewhere."""
        return x.new_zeros((self.targets.shape[0], *x.shape[1:])).index_copy(0, self.at, x)


def check(device: torch.device, dtype: torch.dtype, contender: Contender) -> Verdict:
    """Returns whether a contender is right on a device for operands of a dtype; any exception is a failure.

    Runs in a thread of its own. There autocast, inference mode, dispatch modes and the current stream are torch's
    defaults, and the caller's settings stay as they are. The device is waited for once.
    """
    try:
        with ThreadPoolExecutor(1) as pool:
            measures = pool.submit(_measured, device, dtype, contender).result()
    except Exception as error:  # by the compiler, the launcher or the device: the kernels do not run
        return Verdict(False, one_line(error), lasting=any(x in str(error).lower() for x in _FAULTS))
    wrong = [
        f"{what}: {'not finite' if not math.isfinite(off) else f'{off:.2g}'} (allowed {allowed:.2g})"
        for what, off, allowed in measures
        if not off <= allowed
    ]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Verdict(not wrong, f"off by {'; '.join(wrong[:3])}{more}" if wrong else "")


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype, contender: Contender) -> list[tuple[str, float, float]]:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        measures = [m for vocab in VOCABULARIES for m in Problem(vocab, dtype, device).measures(contender)]
        found = torch.stack([m.off for m in measures]).tolist()
    return [(m.what, off, m.allowed) for m, off in zip(measures, found, strict=True)]
