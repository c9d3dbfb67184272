"""The reference of a call: its log-probs, given or computed, or an error that names those that are missing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..head.operands import Operands
from ..head.statistics import statistics
from .batch import Batch
from .columns import check_logps
from .known import Known, row_sums
from .settings import Settings


def reference_logp(operands: Operands, settings: Settings) -> Tensor:
    """Returns the log-probs (N,) under the reference of flat operands, without a graph."""
    ref = operands.ref
    assert ref is not None
    alone = replace(operands, hidden=ref.hidden, weight=ref.weight, bias=ref.bias)
    alone = replace(alone, adapter=None, ref=None, weight_grad=None, selected=None)
    with torch.no_grad():
        return statistics(alone, (), settings.plan_options).logp


def add_reference(
    known: Known,
    batch: Batch,
    settings: Settings,
    operands: Operands,  # admitted and flat, with the batch's targets
    ref_logps: Tensor | None,  # of rows (R,), or shaped as targets
    ref_tokens: Tensor | None,  # shaped as targets
    computed: Tensor | None = None,  # (N,) what `reference_logp` returns, if it has been computed
) -> None:
    """Adds the rows' log-probs under the reference to `known`, and the tokens' if they are available.

    Raises ValueError if a method needs a reference and none is given, or more of it than was given, or if it was given
    in two ways.
    """
    ref = operands.ref
    reads = [term for term in settings.terms if term.reads_reference]
    if not reads:
        return
    names = ", ".join(term.method.name for term in reads)
    by_token = settings.layout == "policy" or settings.ld_alpha is not None
    forms = {"ref_hidden=": ref, "ref_logps=": ref_logps, "ref_token_logp=": ref_tokens}
    given = [name for name, x in forms.items() if x is not None]
    if len(given) > 1:
        raise ValueError(f"expected one reference, and the reference came twice, by {' and '.join(given)}: pass one")
    if not given:
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
    per_row, per_token = torch.Size((batch.count,)), torch.Size(batch.shape)
    if ref_tokens is not None:
        tokens = check_logps(batch, "ref_token_logp", ref_tokens, [per_token]).reshape(-1)
    elif ref_logps is not None:
        ref_logps = check_logps(batch, "ref_logps", ref_logps, [per_row, per_token])
        if ref_logps.shape == per_token and (per_token != per_row or by_token):
            tokens = ref_logps.reshape(-1)
    else:
        tokens = reference_logp(operands, settings) if computed is None else computed
    if tokens is not None:
        known.tokens["ref_token_logp"] = tokens = torch.where(batch.scored, tokens, 0.0)
        known.rows["ref_logp"] = (batch.row_sums(tokens), -1.0)
        if settings.ld_alpha is not None:
            known.discounted_ref = row_sums(batch, tokens, None, settings.ld_alpha)
    elif by_token:
        raise ValueError(
            f"{names} looks at the reference's single tokens: pass ref_hidden=, or ref_logps= shaped as targets, "
            f"{tuple(batch.shape)}; got ({batch.count},), one per row"
        )
    else:
        assert ref_logps is not None
        known.rows["ref_logp"] = (ref_logps, -1.0)
