"""What a call knows beside the policy's log-probs: columns, the reference's log-probs, further statistics."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..head.operands import Operands
from ..head.plan import PlanOptions
from ..head.rows import sum_rows
from ..head.statistics import statistics
from ..methods.vocabulary import wpo_weights
from .batch import Batch
from .settings import Settings


@dataclass
class Known:
    """What a call knows before the policy's log-probs, or beside them."""

    columns: dict[str, Tensor]
    # (R,), and what stands in units left out
    rows: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)  # (N,)
    discounted_ref: Tensor | None = None  # (R,) reference log-probs as `ld_alpha` has them
    row_weight: Tensor | None = None  # (R,) what a row's loss is multiplied by

    @property
    def learns(self) -> bool:
        """Whether the loss has a gradient by more than the policy's log-probs."""
        return any(x.requires_grad for x in (*self.columns.values(), *self.tokens.values()))


def row_sums(batch: Batch, logp: Tensor, positions: Tensor | None = None, ld_alpha: float | None = None) -> Tensor:
    """Returns log-probs (n,) of the positions, or of all, summed over rows (R,).

    ld_alpha: what the tokens of a pair beyond its shorter completion are multiplied by; None for no discount.
    """
    if ld_alpha is not None:
        beyond = batch.beyond_shorter if positions is None else batch.beyond_shorter[positions]
        logp = torch.where(beyond, ld_alpha * logp, logp)
    return sum_rows(logp, batch.rows if positions is None else batch.rows[positions], batch.count)


def add_reference(
    known: Known,
    batch: Batch,
    settings: Settings,
    operands: Operands,  # admitted and flat, with the batch's targets
    options: PlanOptions,
    ref_logps: Tensor | None,  # of rows (R,), or shaped as targets
    ref_tokens: Tensor | None,  # shaped as targets
) -> None:
    """Adds the rows' log-probs under the reference to `known`, and the tokens' where they are known.

    Raises ValueError if a method needs a reference that is not there, or more of it than was given, or if it came twice.
    """
    ref = operands.ref
    reads = [term for term in settings.terms if term.reads_reference]
    if not reads:
        return
    names = ", ".join(term.method.name for term in reads)
    by_token = settings.layout == "policy" or settings.ld_alpha is not None
    if sum(x is not None for x in (ref, ref_logps, ref_tokens)) > 1:
        raise ValueError("the reference came twice: pass one of ref_hidden=, ref_logps= and ref_token_logp=")
    if ref_logps is None and ref is None and ref_tokens is None:
        if settings.needs_reference:
            what = "shaped as targets, the log-prob of each token" if by_token else "the summed log-prob of each row"
            raise ValueError(
                f"{names} compares with a reference: pass ref_hidden= (and ref_weight= unless it has the policy's "
                f"head) or ref_logps=, {what}"
            )
        return
    if ref is None and settings.needs_reference_hidden:
        raise ValueError(f"{names} compares whole distributions with the reference's: pass ref_hidden=")
    tokens: Tensor | None = None
    rows, whole = torch.Size((batch.count,)), torch.Size(batch.shape)
    if ref_tokens is not None:
        tokens = batch.check_rows("ref_token_logp", ref_tokens, [whole]).reshape(-1)
    elif ref_logps is not None:
        ref_logps = batch.check_rows("ref_logps", ref_logps, [rows, whole])
        if ref_logps.shape == whole and (whole != rows or by_token):
            tokens = ref_logps.reshape(-1)
    else:
        assert ref is not None
        alone = replace(operands, hidden=ref.hidden, weight=ref.weight, bias=ref.bias)
        alone = replace(alone, adapter=None, ref=None, weight_grad=None)
        with torch.no_grad():
            tokens = statistics(alone, (), options).logp
    if tokens is not None:
        known.tokens["ref_token_logp"] = tokens = torch.where(batch.scored, tokens, 0.0)
        known.rows["ref_logp"] = (sum_rows(tokens, batch.rows, batch.count), -1.0)
        if settings.ld_alpha is not None:
            known.discounted_ref = row_sums(batch, tokens, None, settings.ld_alpha)
    elif by_token:
        raise ValueError(
            f"{names} looks at the reference's single tokens: pass ref_hidden=, or ref_logps= shaped as targets, "
            f"{tuple(batch.shape)}; got ({batch.count},), one a row"
        )
    else:
        assert ref_logps is not None
        known.rows["ref_logp"] = (ref_logps, -1.0)


def add_statistics(known: Known, batch: Batch, settings: Settings, operands: Operands, options: PlanOptions) -> Tensor:
    """Returns the policy's log-probs (N,); adds the further statistics that the methods need to `known`."""
    stats = statistics(operands, settings.outputs(), options)
    if stats.kl is not None:
        known.rows["kl"] = (sum_rows(stats.kl, batch.rows, batch.count), 0.0)
    if stats.entropy is not None:
        known.tokens["entropy"] = stats.entropy
    if stats.log_sum_sq_probs is not None:
        logp = sum_rows(stats.logp.detach(), batch.rows, batch.count)
        squares = sum_rows(stats.log_sum_sq_probs, batch.rows, batch.count)
        known.row_weight = wpo_weights(logp, squares, batch.lengths, clamp=False)
    return stats.logp
